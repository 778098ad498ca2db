//! API users who speak HTTP/2.

use super::*;
use crate::proxy::outlook::Outlook;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const ACKNOWLEDGED: &[u8] = b"\0\0\0\x04\x01\0\0\0\0";
/// `GET /` of `empty.example`, on stream 1.
const ASKED: &[u8] = b"\0\0\x12\x01\x05\0\0\0\x01\x82\x86\x84\x01\x0dempty.example";

impl Stage {
    fn receives_bytes(&mut self, user: Key, bytes: &[u8]) {
        let mut buf = self.pool.take(Class::Small).unwrap();
        assert_eq!(self.pool.append(&mut buf, bytes), bytes.len());
        let what = Received::Data(buf);
        let (side, more, nonempty) = (Side::Client, true, false);
        self.happened(Conn::User(user), Event::Received { side, what, more, nonempty });
    }

    /// Bytes that are on their way to the user.
    fn sends_under_way(&mut self) -> Vec<usize> {
        let commands = std::mem::take(&mut self.out).into_iter();
        let bytes = commands.filter_map(|command| match command {
            Cmd::Wire { what: StreamCmd::Send { what, .. }, .. } => {
                Some(self.pool.pieces(what).map(<[u8]>::len).sum())
            }
            _ => None,
        });
        bytes.collect()
    }

    /// Lets every send and every connection attempt succeed, and everybody be found to have taken nothing since; the
    /// bytes that the user gets, and the connections that were made.
    fn pump(&mut self) -> (Vec<u8>, Vec<Key>) {
        let (mut told, mut made, mut next) = (Vec::new(), Vec::new(), 0);
        while let Some(command) = self.out.get(next).copied() {
            next += 1;
            match command {
                Cmd::Connect { link, .. } => {
                    made.push(link);
                    self.act(|sessions, cx| sessions.connected(link, Ok(()), cx));
                }
                Cmd::Wire { conn, what: StreamCmd::Send { side, what } } => {
                    let bytes: Vec<u8> = self.pool.pieces(what).flatten().copied().collect();
                    let result = Ok(bytes.len() as u32);
                    if side == Side::Client {
                        told.extend(bytes);
                    }
                    self.happened(conn, Event::Sent { side, result });
                }
                Cmd::Look { conn } => {
                    self.act(|sessions, cx| sessions.told(conn, Outlook::default(), cx));
                }
                _ => {}
            }
        }
        self.out.clear();
        (told, made)
    }
}

/// The kinds of the frames in these bytes.
fn kinds(mut bytes: &[u8]) -> Vec<u8> {
    let mut kinds = Vec::new();
    while let [high, middle, low, kind, ..] = *bytes {
        kinds.push(kind);
        bytes = &bytes[9 + u32::from_be_bytes([0, high, middle, low]) as usize..];
    }
    kinds
}

#[test]
fn a_user_who_opens_its_window_byte_by_byte_holds_a_response_no_longer_than_one_who_never_does() {
    const RESET: u8 = 3;
    let mut stage = Stage::new();
    let user = stage.user();
    let no_window = b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0";
    let asked = b"\0\0\x11\x01\x05\0\0\0\x01\x82\x86\x84\x01\x0cblog.example";
    stage.receives_bytes(user, &[&PREFACE[..24], no_window, ACKNOWLEDGED, asked].concat());
    let (_, made) = stage.pump();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n{}", "x".repeat(2000));
    stage.receives(Conn::Link(made[0]), Side::Backend, &answer);
    stage.pump();
    let begun = stage.now;
    loop {
        stage.now = stage.now.plus(Duration::from_secs(5));
        stage.receives_bytes(user, b"\0\0\x04\x08\0\0\0\0\x01\0\0\0\x01");
        stage.act(|sessions, cx| sessions.expire(cx));
        let (told, _) = stage.pump();
        if kinds(&told).contains(&RESET) {
            break;
        }
        assert!(stage.now.since(begun) < Duration::from_secs(60), "it is given up");
    }
    assert!(stage.now.since(begun) >= Duration::from_secs(30), "it had its time");
    assert_eq!(stage.log.0.borrow().len(), 1, "and is logged");
}

#[test]
fn an_answer_after_a_long_silence_has_its_time_to_be_taken() {
    let mut stage = Stage::new();
    let user = stage.user();
    stage.receives_bytes(user, &[PREFACE, ACKNOWLEDGED].concat());
    for bytes in stage.sends_under_way() {
        let result = Ok(bytes as u32);
        stage.happened(Conn::User(user), Event::Sent { side: Side::Client, result });
    }
    let (settings, body) = (GatewaySettings::default(), Duration::from_secs(30));
    stage.now = stage.now.plus(body + Duration::from_secs(10));
    stage.receives_bytes(user, ASKED);
    assert!(!stage.sends_under_way().is_empty(), "the answer is on its way");
    let gateway = &stage.sessions.users.get(user).unwrap().gateway;
    assert!(gateway.deadline(&settings).unwrap() > stage.now);
}
