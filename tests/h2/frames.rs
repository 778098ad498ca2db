//! HTTP/2 by hand: frames of any kind, field blocks of literals, and what comes back for them. It checks nothing that
//! it sends, so that a test may say what no library would.
#![allow(dead_code, reason = "each test program needs a part of it")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use crate::wait::PATIENCE;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
/// HEADERS that are the whole request.
pub const WHOLE: u8 = END_HEADERS | END_STREAM;

pub const PROTOCOL_ERROR: u32 = 1;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// SETTINGS_HEADER_TABLE_SIZE 0: whoever answers has to write its fields out.
const NO_TABLE: [u8; 6] = [0, 1, 0, 0, 0, 0];

pub type Field<'a> = (&'a [u8], &'a [u8]);

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// One setting, as SETTINGS carry it.
pub fn setting(name: u16, value: u32) -> [u8; 6] {
    let ([a, b], [c, d, e, f]) = (name.to_be_bytes(), value.to_be_bytes());
    [a, b, c, d, e, f]
}

/// A field block of literals that are neither indexed nor compressed (RFC 7541 section 6.2.2).
pub fn block(fields: &[Field<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        out.push(0);
        for text in [name, value] {
            integer(&mut out, text.len());
            out.extend_from_slice(text);
        }
    }
    out
}

/// With a prefix of seven bits (RFC 7541 section 5.1).
fn integer(out: &mut Vec<u8>, value: usize) {
    if value < 127 {
        return out.push(value as u8);
    }
    out.push(127);
    let mut left = value - 127;
    while left >= 128 {
        out.push(left as u8 & 127 | 128);
        left >>= 7;
    }
    out.push(left as u8);
}

/// A request's pseudo-header fields.
pub fn pseudo<'a>(method: &'a str, path: &'a str) -> [Field<'a>; 4] {
    [
        (b":method", method.as_bytes()),
        (b":scheme", b"http"),
        (b":path", path.as_bytes()),
        (b":authority", b"x.example"),
    ]
}

/// A frame that has come.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The reason that an RST_STREAM or a GOAWAY gives.
    pub fn reason(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    /// The status with which a field block without a table begins (RFC 7541 appendices A and B).
    pub fn status(&self) -> u16 {
        let sizes = self.payload.iter().take_while(|byte| **byte & 0xe0 == 0x20).count();
        match self.payload[sizes..] {
            [index @ 0x88..=0x8e, ..] => {
                [200, 204, 206, 304, 400, 404, 500][usize::from(index) - 0x88]
            }
            [0x08 | 0x18 | 0x48, 3, a, b, c, ..] => {
                [a, b, c].iter().fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0'))
            }
            [0x08 | 0x18 | 0x48, length, ref text @ ..] => {
                digits(&text[..usize::from(length & 0x7f)])
            }
            _ => panic!("no status: {:?}", self.payload),
        }
    }
}

/// Three digits in Huffman's code: 0 to 2 have five bits, the others six.
fn digits(text: &[u8]) -> u16 {
    let bits: Vec<u16> = text
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |at| u16::from(byte >> at & 1)))
        .collect();
    let (mut at, mut number) = (0, 0);
    for _ in 0..3 {
        let value = |count| bits[at..at + count].iter().fold(0, |sum, bit| sum << 1 | bit);
        let (digit, count) = if value(5) < 3 { (value(5), 5) } else { (value(6) - 22, 6) };
        (number, at) = (number * 10 + digit, at + count);
    }
    number
}

/// How a stream has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ended {
    Answered(u16, Vec<u8>),
    Reset(u32),
    /// With the connection, and a GOAWAY of this reason if one came.
    Gone(Option<u32>),
}

/// A user's connection.
pub struct User {
    pub stream: TcpStream,
    ahead: Vec<u8>,
    /// The reason of the last GOAWAY.
    pub goaway: Option<u32>,
}

impl User {
    pub fn connect(port: u16) -> User {
        User::with(port, &[])
    }

    /// With these settings, and both sides' acknowledged.
    pub fn with(port: u16, settings: &[u8]) -> User {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut user = User { stream, ahead: Vec::new(), goaway: None };
        let settings = frame(SETTINGS, 0, 0, &[&NO_TABLE[..], settings].concat());
        assert!(user.send(&[PREFACE, &settings].concat()));
        while user.next().expect("SETTINGS come first").kind != SETTINGS {}
        assert!(user.send(&frame(SETTINGS, ACK, 0, b"")));
        user
    }

    /// Whether the connection still takes it.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// The next frame, a PING answered; `None` once the connection is over.
    pub fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(next) = self.take() {
                match next.kind {
                    GOAWAY => self.goaway = Some(next.reason()),
                    PING if next.flags & ACK == 0 => {
                        self.send(&frame(PING, ACK, 0, &next.payload));
                    }
                    _ => {}
                }
                return Some(next);
            }
            let mut bytes = [0; 16 * 1024];
            match self.stream.read(&mut bytes) {
                Ok(count @ 1..) => self.ahead.extend_from_slice(&bytes[..count]),
                Ok(0) => return None,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("neither a frame nor an end: {error}"),
            }
        }
    }

    fn take(&mut self) -> Option<Frame> {
        let &[high, middle, low, kind, flags, a, b, c, d, ref rest @ ..] = &self.ahead[..] else {
            return None;
        };
        let length = u32::from_be_bytes([0, high, middle, low]) as usize;
        let payload = rest.get(..length)?.to_vec();
        self.ahead.drain(..9 + length);
        Some(Frame { kind, flags, stream: u32::from_be_bytes([a, b, c, d]), payload })
    }

    /// How a stream ends; what comes for others is passed over.
    pub fn end_of(&mut self, stream: u32) -> Ended {
        let (mut status, mut body) = (0, Vec::new());
        while let Some(frame) = self.next() {
            if frame.stream != stream {
                continue;
            }
            match frame.kind {
                HEADERS if status < 200 => status = frame.status(),
                DATA => body.extend_from_slice(&frame.payload),
                RST_STREAM => return Ended::Reset(frame.reason()),
                _ => {}
            }
            if frame.ends_stream() {
                return Ended::Answered(status, body);
            }
        }
        Ended::Gone(self.goaway)
    }

    /// Asks for something, and how that ends.
    pub fn get(&mut self, stream: u32, path: &str) -> Ended {
        self.send(&frame(HEADERS, WHOLE, stream, &block(&pseudo("GET", path))));
        self.end_of(stream)
    }

    /// Reads until the connection is over: the reason of its GOAWAY, if it had one.
    pub fn end(&mut self) -> Option<u32> {
        while self.next().is_some() {}
        self.goaway
    }
}
