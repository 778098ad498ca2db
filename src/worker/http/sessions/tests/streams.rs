//! API users who speak HTTP/2.

use super::*;

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
