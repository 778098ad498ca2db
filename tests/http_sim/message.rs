//! What is said on the wires, and a plain reader for it that shares nothing with the one under
//! test.

use crate::dice::{Dice, content};

/// How a body is framed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Framing {
    None,
    Length,
    Chunked,
    UntilClose,
}

/// Some are listed twice, to be more frequent.
pub const METHODS: &[&str] = &["GET", "GET", "HEAD", "POST", "POST", "PUT", "DELETE", "PATCH"];

/// One request, and the answer it asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    pub id: u64,
    pub method: &'static str,
    pub host: &'static str,
    pub newer: bool,
    pub close: bool,
    pub expect: bool,
    pub upgrade: bool,
    /// Who asks, and whether the request authenticates that user for the connection.
    pub user: usize,
    pub login: bool,
    pub framing: Framing,
    pub length: usize,
    pub answer: Framing,
    pub answer_length: usize,
}

impl Request {
    pub fn random(id: u64, dice: &mut Dice, longest: usize) -> Request {
        let method = dice.pick(METHODS);
        let newer = !dice.one_in(8);
        let framing = match method {
            "GET" | "HEAD" if !dice.one_in(8) => Framing::None,
            _ if newer && dice.one_in(2) => Framing::Chunked,
            _ => Framing::Length,
        };
        let upgrade = newer && method == "GET" && framing == Framing::None && dice.one_in(4);
        let length = if dice.one_in(8) { 0 } else { dice.some(longest) };
        Request {
            id,
            method,
            host: "sim",
            newer,
            close: dice.one_in(12),
            expect: newer && framing != Framing::None && dice.one_in(4),
            upgrade,
            user: 0,
            login: dice.one_in(6),
            framing,
            length: if framing == Framing::None { 0 } else { length },
            answer: dice.pick(&[
                Framing::Length,
                Framing::Length,
                Framing::Chunked,
                Framing::UntilClose,
                Framing::None,
            ]),
            answer_length: if dice.one_in(8) { 0 } else { dice.some(longest) },
        }
    }

    pub fn idempotent(&self) -> bool {
        !matches!(self.method, "POST" | "PATCH")
    }

    /// The path holds everything that a backend must know.
    pub fn path(&self) -> String {
        format!(
            "/{}/{}/{}/{:?}/{}",
            self.id, self.method, self.length, self.answer, self.answer_length
        )
    }

    pub fn head(&self, scheme: &str, dice: &mut Dice) -> Vec<u8> {
        let version = if self.newer { "1.1" } else { "1.0" };
        let (method, path, host) = (self.method, self.path(), self.host);
        let mut head = format!("{method} {path} HTTP/{version}\r\nHost: {host}\r\n");
        let mut line = |wanted: bool, text: &str| {
            if wanted {
                head += text;
                head += "\r\n";
            }
        };
        line(true, &format!("X-User: {}", self.user));
        line(self.login, &format!("Authorization: {scheme} proof"));
        line(self.close, "Connection: close");
        line(self.expect, "Expect: 100-continue");
        line(self.upgrade, "Connection: upgrade\r\nUpgrade: echo");
        line(dice.one_in(4), "X-Forwarded-For: 6.6.6.6");
        line(dice.one_in(4), "Keep-Alive: timeout=9\r\nConnection: x-hop\r\nX-Hop: 1");
        line(dice.one_in(20), &format!("X-Long: {}", "l".repeat(5000)));
        line(self.framing == Framing::Length, &format!("Content-Length: {}", self.length));
        line(self.framing == Framing::Chunked, "Transfer-Encoding: chunked");
        (head + "\r\n").into_bytes()
    }

    pub fn body(&self, dice: &mut Dice) -> Vec<u8> {
        framed(&self.content(), self.framing, dice)
    }

    pub fn content(&self) -> Vec<u8> {
        content(self.id * 2, self.length)
    }

    pub fn answer_content(&self) -> Vec<u8> {
        content(self.id * 2 + 1, self.answer_length)
    }
}

/// Content in its framing, chunks cut at random.
pub fn framed(content: &[u8], framing: Framing, dice: &mut Dice) -> Vec<u8> {
    if framing != Framing::Chunked {
        return content.to_vec();
    }
    let mut body = Vec::new();
    let mut left = content;
    while !left.is_empty() {
        let (chunk, rest) = left.split_at(dice.some(left.len()).min(left.len()));
        let extension = dice.pick(&["", "", "", ";a=b", ";x"]);
        body.extend_from_slice(format!("{:x}{extension}\r\n", chunk.len()).as_bytes());
        body.extend_from_slice(chunk);
        body.extend_from_slice(b"\r\n");
        left = rest;
    }
    body.extend_from_slice(dice.pick(&[b"0\r\n\r\n".as_slice(), b"00;e\r\nX-T: 1\r\n\r\n"]));
    body
}

/// A head as it is on the wire.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    pub start: String,
    pub fields: Vec<(String, String)>,
    pub bytes: usize,
}

impl Head {
    /// `None` if it is incomplete.
    pub fn read(bytes: &[u8]) -> Option<Head> {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
        let text = String::from_utf8_lossy(&bytes[..end]);
        let mut lines = text.split("\r\n");
        let start = lines.next().expect("a split has a first part").to_string();
        let fields = lines.map(|line| {
            let (name, value) = line.split_once(": ").unwrap_or_else(|| {
                panic!(
                    "a field has a name and a value: {text:?} in {:?}",
                    String::from_utf8_lossy(bytes)
                )
            });
            (name.to_ascii_lowercase(), value.to_string())
        });
        Some(Head { start, fields: fields.collect(), bytes: end + 4 })
    }

    pub fn all<'h>(&'h self, wanted: &'h str) -> impl Iterator<Item = &'h str> {
        self.fields.iter().filter(move |(name, _)| name == wanted).map(|(_, value)| value.as_str())
    }

    /// The only value of a field; a second one is a violation.
    pub fn one<'h>(&'h self, wanted: &'h str) -> Option<&'h str> {
        let mut all = self.all(wanted);
        let first = all.next();
        assert!(all.next().is_none(), "{wanted} twice in {self:?}");
        first
    }

    pub fn framing(&self) -> (Framing, usize) {
        match (self.one("content-length"), self.one("transfer-encoding")) {
            (Some(_), Some(_)) => panic!("two framings in {self:?}"),
            (Some(length), None) => (Framing::Length, length.parse().expect("a number")),
            (None, Some(coding)) => {
                assert_eq!(coding, "chunked");
                (Framing::Chunked, 0)
            }
            (None, None) => (Framing::None, 0),
        }
    }
}

/// Bytes meant to be a message, with a few of them changed, removed, doubled or cut off.
pub fn damaged(mut bytes: Vec<u8>, dice: &mut Dice) -> Vec<u8> {
    const TELLING: &[u8] = b"\r\n\0 \t:;,0af-_/\x80";
    for _ in 0..dice.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = dice.below(bytes.len());
        match dice.below(6) {
            0 => bytes[at] = dice.roll() as u8,
            1 => bytes[at] = dice.pick(TELLING),
            2 => bytes.insert(at, dice.pick(TELLING)),
            3 => drop(bytes.remove(at)),
            4 => bytes.insert(at, bytes[at]),
            _ => bytes.truncate(at + 1),
        }
    }
    bytes
}

/// The content of a chunked body and its length on the wire; `None` if it is incomplete. What has
/// arrived must be correct in any case.
pub fn dechunk(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut content = Vec::new();
    let mut at = 0;
    loop {
        let end = bytes[at..].windows(2).position(|two| two == b"\r\n")?;
        let line = std::str::from_utf8(&bytes[at..at + end]).expect("a size line is text");
        let size = usize::from_str_radix(line, 16).expect("only plain sizes are passed on");
        at += end + 2;
        if size == 0 {
            break;
        }
        let chunk = bytes.get(at..at + size)?;
        content.extend_from_slice(chunk);
        let ending = bytes.get(at + size..at + size + 2)?;
        assert_eq!(ending, b"\r\n", "a chunk ends with a line end");
        at += size + 2;
    }
    loop {
        let end = bytes[at..].windows(2).position(|two| two == b"\r\n")?;
        at += end + 2;
        if end == 0 {
            return Some((content, at));
        }
    }
}
