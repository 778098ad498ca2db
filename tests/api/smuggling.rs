//! Request smuggling by the published techniques, against a backend that records every byte. Each
//! payload is compared with one strict reading of what the user sent: the backend may see the
//! requests of that reading, in order and with one meaning each, and nothing else.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::harness::Balancer;
use crate::reading::{Said, Stop, request, stray_field, strictly};
use crate::techniques::{BODIES, CHUNKS, CODINGS, HEADS, LENGTHS};
use crate::wait::{PATIENCE, wait_for};

/// What one connection of the backend received since the last look.
struct Heard {
    peer: SocketAddr,
    bytes: Vec<u8>,
    over: bool,
}

type All = Mutex<Vec<Arc<Mutex<Heard>>>>;

/// A backend that answers every request with 200 and records what it received, by connection.
struct Recorder {
    address: SocketAddr,
    all: Arc<All>,
}

impl Recorder {
    fn start() -> Recorder {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let recorder = Recorder { address: listener.local_addr().unwrap(), all: Arc::default() };
        let all = Arc::clone(&recorder.all);
        thread::spawn(move || {
            while let Ok((connection, peer)) = listener.accept() {
                let heard = Heard { peer, bytes: Vec::new(), over: false };
                let heard = Arc::new(Mutex::new(heard));
                all.lock().unwrap().push(Arc::clone(&heard));
                thread::spawn(move || listen(connection, &heard));
            }
        });
        recorder
    }

    fn count(&self, which: impl Fn(&Heard) -> bool) -> u64 {
        let all = self.all.lock().unwrap();
        all.iter().filter(|one| which(&one.lock().unwrap())).count() as u64
    }

    /// Waits until every open connection has been accepted: they come in order.
    fn accept_all(&self) {
        let last = TcpStream::connect(self.address).unwrap();
        let own = last.local_addr().unwrap();
        wait_for("the request to reach its backend", || {
            (self.count(|one| one.peer == own) > 0).then_some(())
        });
    }
}

fn listen(mut connection: TcpStream, heard: &Mutex<Heard>) {
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    let mut ahead = Vec::new();
    let mut block = [0; 16 * 1024];
    'connection: while let Ok(count @ 1..) = connection.read(&mut block) {
        heard.lock().unwrap().bytes.extend_from_slice(&block[..count]);
        ahead.extend_from_slice(&block[..count]);
        while let Ok(Some((_, length, _))) = request(&ahead) {
            ahead.drain(..length);
            if connection.write_all(ANSWER).is_err() {
                break 'connection;
            }
        }
    }
    heard.lock().unwrap().over = true;
}

/// The outcome of one payload.
#[derive(Default)]
struct Outcome {
    /// Statuses of the final responses.
    statuses: Vec<u16>,
    /// Whole requests that the backend received.
    served: Vec<Said>,
    /// Bytes of a request that it did not receive completely.
    half: usize,
    /// What it should not have been able to receive.
    fault: Option<String>,
}

impl Outcome {
    fn take_in(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match request(bytes) {
                Ok(Some((said, length, _))) => {
                    self.fault = self.fault.take().or_else(|| stray_field(bytes));
                    self.served.push(said);
                    bytes = &bytes[length..];
                }
                Ok(None) => {
                    self.half += bytes.len();
                    break;
                }
                Err(why) => {
                    self.fault = Some(why.to_string());
                    break;
                }
            }
        }
    }
}

struct Stage {
    balancer: Balancer,
    recorder: Recorder,
}

impl Stage {
    fn new() -> Stage {
        let recorder = Recorder::start();
        let balancer = Balancer::over(&[recorder.address], |_| {});
        Stage { balancer, recorder }
    }

    /// Sends everything in these parts, says that nothing will follow, and waits until nobody is
    /// working on it any more.
    fn replay(&self, parts: &[&[u8]]) -> Outcome {
        let mut user = TcpStream::connect(self.balancer.door()).unwrap();
        user.set_nodelay(true).unwrap();
        user.set_read_timeout(Some(PATIENCE)).unwrap();
        for part in parts {
            // A refusal may come before the end; what is sent after it does not matter.
            let _ = user.write_all(part);
            if parts.len() > 1 {
                self.balancer.turn();
            }
        }
        let _ = user.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = user.read_to_end(&mut answer);
        let mut outcome = Outcome { statuses: statuses(&answer), ..Outcome::default() };
        self.settle();
        self.look(&mut outcome);
        outcome
    }

    /// Waits until every connection to the backend is closed or idle.
    fn settle(&self) {
        self.balancer.turn();
        self.recorder.accept_all();
        wait_for("every connection that is not over to wait", || {
            self.balancer.turn();
            let waiting = self.balancer.count(|it| it.api_upstream_idle.get());
            (waiting == self.recorder.count(|one| !one.over)).then_some(())
        });
    }

    fn look(&self, outcome: &mut Outcome) {
        let mut all = self.recorder.all.lock().unwrap();
        for heard in all.iter() {
            outcome.take_in(&std::mem::take(&mut heard.lock().unwrap().bytes));
        }
        all.retain(|heard| !heard.lock().unwrap().over);
    }

    /// Compares the outcome of a payload with its strict reading; returns what is wrong.
    fn judge(&self, parts: &[&[u8]], leave: Leave) -> Result<Verdict, String> {
        let payload = parts.concat();
        let (asked, stop) = strictly(&payload);
        let outcome = self.replay(parts);
        let Outcome { statuses, served, half, fault } = &outcome;
        let refused = statuses.last().is_some_and(|status| *status >= 400);
        let whole = parts.len() == 1;
        let wrong = if let Some(fault) = fault {
            format!("the backend heard what has no one meaning: {fault}")
        } else if !asked.starts_with(served) {
            "the backend heard another request".to_string()
        } else if *half > 0 && whole && stop != Stop::Partial {
            "half a request was passed on".to_string()
        } else if matches!(stop, Stop::Refused(_)) && !refused {
            "it was not refused".to_string()
        } else if leave == Leave::Nothing && served.len() != asked.len() {
            "a plain request was not served".to_string()
        } else if served.len() < asked.len() && !refused {
            "a request was lost without a word".to_string()
        } else {
            let all = served.len() == asked.len() && !refused;
            return Ok(if all { Verdict::Served } else { Verdict::Refused });
        };
        let seen: Vec<_> = served.iter().map(|one| (&one.method, &one.target)).collect();
        Err(format!(
            "{wrong}: {}\n  read: {} requests, {stop:?}; answered: {statuses:?}; heard: {seen:?} + {half}",
            payload.escape_ascii(),
            asked.len()
        ))
    }
}

/// Whether the gateway may refuse what the grammar allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leave {
    Nothing,
    Stricter,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Served,
    Refused,
}

fn statuses(mut answer: &[u8]) -> Vec<u16> {
    let mut all = Vec::new();
    while let Some(place) = answer.windows(9).position(|window| window == b"HTTP/1.1 ") {
        let status = String::from_utf8_lossy(&answer[place + 9..place + 12]).parse::<u16>();
        all.extend(status.ok().filter(|status| *status >= 200));
        answer = &answer[place + 12..];
    }
    all
}

/// The request that must not appear on its own.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";

/// Two bodies for a request that states its length twice: in one, a reader by chunks finds the
/// smuggled request, in the other, a reader by length.
fn bodies() -> [(usize, String); 2] {
    let behind_chunks = format!("0\r\n\r\n{SMUGGLED}");
    let behind_length = format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len());
    [(behind_chunks.len(), behind_chunks), (4, behind_length)]
}

fn post(fields: &[u8], body: &str) -> Vec<u8> {
    [b"POST /first HTTP/1.1\r\nHost: x\r\n", fields, b"\r\n\r\n", body.as_bytes()].concat()
}

/// A request with that line beside a `Content-Length`, before or after it, with both bodies.
fn beside_length(line: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (length, body) in bodies() {
        let length = format!("Content-Length: {length}");
        all.push(post(&[line, b"\r\n", length.as_bytes()].concat(), &body));
        all.push(post(&[length.as_bytes(), b"\r\n", line].concat(), &body));
    }
    all
}

fn all_hold(stage: &Stage, leave: Leave, payloads: impl IntoIterator<Item = Vec<u8>>) {
    let mut wrong = Vec::new();
    for payload in payloads {
        wrong.extend(stage.judge(&[&payload], leave).err());
    }
    assert!(
        wrong.is_empty(),
        "{} payloads:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(10)].join("\n")
    );
}

#[test]
fn no_spelling_of_a_coding_hides_a_request() {
    let stage = Stage::new();
    for (law, line) in CODINGS {
        let alone = bodies().map(|(_, body)| post(line.as_bytes(), &body));
        // A sender of the older version has no transfer codings (RFC 9112 6.1).
        let older = |it: &Vec<u8>| String::from_utf8_lossy(it).replacen("/1.1", "/1.0", 1);
        let older = alone.each_ref().map(|payload| older(payload).into_bytes());
        for payload in beside_length(line.as_bytes()).into_iter().chain(alone).chain(older) {
            let outcome = stage.judge(&[&payload], Leave::Nothing);
            assert!(outcome.is_ok(), "RFC 9112 {law}: {}", outcome.unwrap_err());
        }
    }
    stage.balancer.stop();
}

/// Every byte, except most of those that one of their kind can stand for: letters and non-ASCII
/// bytes.
fn odd_bytes() -> impl Iterator<Item = u8> {
    let alike = |byte: &u8| byte.is_ascii_alphabetic() || *byte > 0x80;
    (0..=255)
        .filter(move |byte| !alike(byte) || b"AafFXz\x82\x85\x96\xa0\xad\xc3\xff".contains(byte))
}

/// Puts a byte where it does not belong, in each such place of a line.
fn misplaced(name: &str, value: &str, byte: u8) -> Vec<Vec<u8>> {
    let (name, value, odd) = (name.as_bytes(), value.as_bytes(), &[byte][..]);
    let (colon, usual): (&[u8], &[u8]) = (b":", b": ");
    let half = name.len() / 2;
    vec![
        [odd, name, usual, value].concat(),
        [name, odd, usual, value].concat(),
        [&name[..half], odd, &name[half..], usual, value].concat(),
        [&name[..half], odd, &name[half + 1..], usual, value].concat(),
        [name, colon, odd, value].concat(),
        [name, usual, value, odd].concat(),
        [name, usual, &value[..1], odd, &value[1..]].concat(),
        [odd, name, odd, usual, value].concat(),
        [odd, name, colon, odd, value].concat(),
        [odd, name, usual, value, odd].concat(),
        [name, odd, colon, odd, value].concat(),
        [name, odd, usual, value, odd].concat(),
        [name, colon, odd, value, odd].concat(),
        [b"X: y", odd, name, usual, value].concat(),
        [b"X: y\r\n", odd, b"\r\n", name, usual, value].concat(),
    ]
}

#[test]
fn no_byte_anywhere_in_a_coding_hides_a_request() {
    let stage = Stage::new();
    for byte in odd_bytes() {
        for line in misplaced("Transfer-Encoding", "chunked", byte) {
            let [(all, behind_chunks), (four, behind_length)] = bodies();
            let beside =
                |length| [&line[..], format!("\r\nContent-Length: {length}").as_bytes()].concat();
            let both = [post(&beside(all), &behind_chunks), post(&beside(four), &behind_length)];
            all_hold(&stage, Leave::Nothing, both);
        }
    }
    stage.balancer.stop();
}

#[test]
fn no_byte_anywhere_in_a_length_hides_a_request() {
    let stage = Stage::new();
    let body = format!("12345{SMUGGLED}");
    for byte in odd_bytes() {
        for line in misplaced("Content-Length", "5", byte) {
            let beside = [&line[..], b"\r\nContent-Length: 40"].concat();
            all_hold(&stage, Leave::Nothing, [post(&line, &body), post(&beside, &body)]);
        }
    }
    stage.balancer.stop();
}

#[test]
fn a_length_is_one_number_or_refused_whatever_the_method() {
    let stage = Stage::new();
    for length in LENGTHS {
        // Methods whose body some servers do not read, or read where there is none: CL.0 and 0.CL.
        for method in ["POST", "GET", "HEAD", "OPTIONS", "DELETE", "get", "QUERY"] {
            let leave =
                if *length == "18446744073709551615" { Leave::Stricter } else { Leave::Nothing };
            for target in
                ["/first", "http://x/first", "/first/../con", "/first;x=y", "/first%0d%0aX:y"]
            {
                let head =
                    format!("{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}");
                let payload = format!("{head}\r\n\r\n12345{SMUGGLED}").into_bytes();
                all_hold(&stage, leave, [payload]);
            }
        }
    }
    stage.balancer.stop();
}

#[test]
fn the_head_has_one_end_and_the_request_line_one_shape() {
    let stage = Stage::new();
    let parts = [
        "GET", " ", "/first", " ", "HTTP/1.1", "\r", "\n", "Host: x", "\r", "\n", "A: b", "\r",
        "\n", "\r", "\n",
    ];
    for byte in odd_bytes() {
        let mut payloads = Vec::new();
        for place in 0..parts.len() {
            // In place of a part, and before it.
            for kept in [true, false] {
                let mut payload = Vec::new();
                for (at, part) in parts.iter().enumerate() {
                    if at == place {
                        payload.push(byte);
                    }
                    if at != place || kept {
                        payload.extend_from_slice(part.as_bytes());
                    }
                }
                payload.extend_from_slice(SMUGGLED.as_bytes());
                payloads.push(payload);
            }
        }
        // A method and a host name may be anything by the grammar, but not for us.
        all_hold(&stage, Leave::Stricter, payloads);
    }
    stage.balancer.stop();
}

#[test]
fn a_head_that_says_two_things_is_refused() {
    let stage = Stage::new();
    for (law, head) in HEADS {
        let payload = format!("{head}\r\n\r\n{SMUGGLED}").into_bytes();
        let verdict = stage.judge(&[&payload], Leave::Nothing);
        let legal = ["9112 3.2.2: another in the target"].contains(law);
        let wanted = if legal { Verdict::Served } else { Verdict::Refused };
        assert_eq!(verdict, Ok(wanted), "RFC {law}");
    }
    stage.balancer.stop();
}

#[test]
fn no_byte_anywhere_in_a_chunked_body_hides_a_request() {
    let stage = Stage::new();
    for byte in odd_bytes() {
        let mut payloads = Vec::new();
        for place in 0..CHUNKS.len() {
            for kept in [true, false] {
                let mut body = Vec::new();
                for (at, part) in CHUNKS.iter().enumerate() {
                    if at == place {
                        body.push(byte);
                    }
                    if at != place || kept {
                        body.extend_from_slice(part.as_bytes());
                    }
                }
                body.extend_from_slice(SMUGGLED.as_bytes());
                payloads.push([post(b"Transfer-Encoding: chunked", "").as_slice(), &body].concat());
            }
        }
        all_hold(&stage, Leave::Stricter, payloads);
    }
    stage.balancer.stop();
}

#[test]
fn a_chunk_has_one_end_wherever_the_bytes_are_cut() {
    let stage = Stage::new();
    for body in BODIES {
        let head = post(b"Transfer-Encoding: chunked", "");
        let payload = [head.as_slice(), body.as_bytes(), SMUGGLED.as_bytes()].concat();
        let outcome = stage.judge(&[&payload], Leave::Stricter);
        assert!(outcome.is_ok(), "{}", outcome.unwrap_err());
        for cut in 0..=body.len() {
            let (before, behind) = payload.split_at(head.len() + cut);
            let outcome = stage.judge(&[before, behind], Leave::Stricter);
            assert!(outcome.is_ok(), "cut at {cut}: {}", outcome.unwrap_err());
        }
    }
    stage.balancer.stop();
}

/// For collections outside this repository: `LB_PAYLOADS` names a folder with one payload in each
/// file, as sent over the wire.
#[test]
#[ignore = "needs a folder of payloads in LB_PAYLOADS"]
fn every_payload_of_a_folder_is_refused_or_has_one_meaning() {
    let folder = std::env::var("LB_PAYLOADS").expect("LB_PAYLOADS names a folder of payloads");
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let stage = Stage::new();
    let (mut served, mut refused, mut wrong) = (0, 0, Vec::new());
    for file in &files {
        match stage.judge(&[&std::fs::read(file).unwrap()], Leave::Stricter) {
            Ok(Verdict::Served) => served += 1,
            Ok(Verdict::Refused) => refused += 1,
            Err(why) => wrong.push(format!("{}: {why}", file.display())),
        }
    }
    eprintln!(
        "{} payloads: {served} read as one strict reader does, {refused} refused",
        files.len()
    );
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    stage.balancer.stop();
}
