//! Where one JSON object ends and the next begins, in a stream that arrives in arbitrary pieces. Owns the
//! bounds of a message: its length, depth and number of lines. Pure; what an object means is up to `api`.
//!
//! ```text
//!              '{'                  matching '}'
//!   Between ---------> Inside ---------------------> Between, with an object
//!      | |               | broken
//!      | |               +----------> SkipLine --- newline ---> Between
//!      | | '[', '"', '-', a digit, t, f, n
//!      | +-----------> Other --- newline, JSON ---> Between
//!      | anything else   | newline, not JSON
//!      +-----------------+----------> Dead
//!   any of them, longer than a message ---> Dead
//! ```
//!
//! Objects need nothing between them, not even whitespace, and a byte order mark before one is skipped.
//! After a fault inside an object the rest of the line is skipped, so one bad line typed by hand gets one
//! answer. An object may span lines, so at the end of each line the framer checks whether the text so
//! far can still become JSON; that is how it tells an unfinished object from one that continues.
//!
//! A line that is not JSON at all was meant for another program. A browser, for example, can be made to
//! send us a request in another protocol, and a message of ours in its body must not get through, so
//! nothing after such a line is read.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::legacy::bytes::Bytes;

/// Longest message, in bytes, in both directions.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Deepest nesting of objects and lists.
pub const DEPTH_MAX: usize = 8;
/// The error for a line that holds something else.
pub const NO_OBJECT: &str = "a message is a JSON object and begins with {";
/// Most lines in one message, which bounds how often an unfinished message is checked.
const LINES_MAX: usize = 64;

/// What the bytes turned out to be.
#[derive(PartialEq, Debug)]
pub enum Piece<'a> {
    /// Balanced braces. Whether there is JSON between them is up to the parser.
    Object(&'a [u8]),
    /// Not a message; the rest of its line is skipped.
    Broken(String),
    /// Another protocol, or an encoding other than UTF-8: nothing more is read.
    Foreign,
    /// Longer than a message may be: nothing more is read.
    TooLong,
}

/// What the framer is within, see the diagram above.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
enum State {
    #[default]
    Between,
    Inside,
    Other,
    SkipLine,
    Dead,
}

/// The UTF-8 byte order mark, which some programs write first.
const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

/// Cuts one connection's bytes into objects.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Framer {
    state: State,
    message: Bytes,
    depth: usize,
    lines: usize,
    in_string: bool,
    escaped: bool,
    skipped: usize,
    /// Bytes of a byte order mark seen so far.
    marked: usize,
}

impl Default for Framer {
    fn default() -> Framer {
        Framer {
            state: State::Between,
            message: Bytes::default(),
            depth: 0,
            lines: 0,
            in_string: false,
            escaped: false,
            skipped: 0,
            marked: 0,
        }
    }
}

impl Framer {
    /// Whether it stands where a framer can, whoever has written it.
    pub fn is_possible(&self) -> bool {
        self.message.0.len() <= MESSAGE_BYTES_MAX
            && self.lines <= LINES_MAX
            && self.skipped <= MESSAGE_BYTES_MAX
            && self.marked < BYTE_ORDER_MARK.len()
            && (self.state != State::Inside || (1..=DEPTH_MAX).contains(&self.depth))
    }

    /// Takes the next bytes and hands `tell` what they complete.
    pub fn push(&mut self, input: &[u8], tell: &mut dyn FnMut(Piece<'_>)) {
        for byte in input {
            match self.state {
                State::Between => self.between(*byte, tell),
                State::Inside => self.inside(*byte, tell),
                State::Other => self.other(*byte, tell),
                State::SkipLine => self.skip(*byte, tell),
                State::Dead => return,
            }
        }
    }

    fn between(&mut self, byte: u8, tell: &mut dyn FnMut(Piece<'_>)) {
        let marked = std::mem::take(&mut self.marked);
        match byte {
            _ if byte == BYTE_ORDER_MARK[marked] => {
                self.marked = (marked + 1) % BYTE_ORDER_MARK.len();
            }
            _ if marked > 0 => self.foreign(tell),
            b'{' => {
                self.begin(State::Inside, byte);
                self.depth = 1;
                self.lines = 0;
                self.in_string = false;
                self.escaped = false;
            }
            b' ' | b'\t' | b'\r' | b'\n' => {}
            b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => {
                self.begin(State::Other, byte);
            }
            _ => self.foreign(tell),
        }
    }

    fn begin(&mut self, state: State, byte: u8) {
        self.state = state;
        self.message.0.clear();
        self.message.0.push(byte);
    }

    /// Possibly JSON, but never a message; the end of the line decides.
    fn other(&mut self, byte: u8, tell: &mut dyn FnMut(Piece<'_>)) {
        if self.message.0.len() == MESSAGE_BYTES_MAX {
            self.dead(Piece::TooLong, tell);
        } else if byte != b'\n' {
            self.message.0.push(byte);
        } else {
            let mut values = serde_json::Deserializer::from_slice(&self.message.0).into_iter();
            match values.all(|value: serde_json::Result<IgnoredAny>| value.is_ok()) {
                true => self.broken(byte, NO_OBJECT.into(), tell),
                false => self.foreign(tell),
            }
        }
    }

    fn foreign(&mut self, tell: &mut dyn FnMut(Piece<'_>)) {
        self.dead(Piece::Foreign, tell);
    }

    fn inside(&mut self, byte: u8, tell: &mut dyn FnMut(Piece<'_>)) {
        if self.message.0.len() == MESSAGE_BYTES_MAX {
            self.dead(Piece::TooLong, tell);
            return;
        }
        self.message.0.push(byte);
        if self.in_string {
            self.in_string(byte, tell);
            return;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' if self.depth == DEPTH_MAX => {
                self.broken(byte, format!("nested deeper than {DEPTH_MAX} levels"), tell);
            }
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.close(tell),
            b'\n' => self.line_end(tell),
            b' ' | b'\t' | b'\r' => {}
            _ if byte < b' ' => {
                self.broken(byte, "not JSON: a control byte; messages are UTF-8".into(), tell);
            }
            _ => {}
        }
    }

    fn in_string(&mut self, byte: u8, tell: &mut dyn FnMut(Piece<'_>)) {
        match byte {
            _ if byte < b' ' => {
                self.broken(byte, "a string is not closed on its line".into(), tell);
            }
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => self.in_string = false,
            _ => {}
        }
    }

    fn close(&mut self, tell: &mut dyn FnMut(Piece<'_>)) {
        self.depth -= 1;
        if self.depth == 0 {
            self.state = State::Between;
            tell(Piece::Object(&self.message.0));
        }
    }

    /// At the end of a line inside an object: gives up if it can no longer become JSON.
    fn line_end(&mut self, tell: &mut dyn FnMut(Piece<'_>)) {
        self.lines += 1;
        if self.lines > LINES_MAX {
            self.broken(b'\n', format!("spread over more than {LINES_MAX} lines"), tell);
        } else if let Err(error) = serde_json::from_slice::<IgnoredAny>(&self.message.0)
            && !error.is_eof()
        {
            self.broken(b'\n', format!("not JSON: {error}"), tell);
        }
    }

    fn broken(&mut self, byte: u8, why: String, tell: &mut dyn FnMut(Piece<'_>)) {
        self.state = if byte == b'\n' { State::Between } else { State::SkipLine };
        self.skipped = 0;
        tell(Piece::Broken(why));
    }

    fn skip(&mut self, byte: u8, tell: &mut dyn FnMut(Piece<'_>)) {
        self.skipped += 1;
        if byte == b'\n' {
            self.state = State::Between;
        } else if self.skipped > MESSAGE_BYTES_MAX {
            self.dead(Piece::TooLong, tell);
        }
    }

    fn dead(&mut self, why: Piece<'static>, tell: &mut dyn FnMut(Piece<'_>)) {
        self.state = State::Dead;
        self.message = Bytes::default();
        tell(why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces found in `input` when it arrives `size` bytes at a time: objects as they are, faults in
    /// brackets.
    fn pieces(input: &[u8], size: usize) -> Vec<String> {
        let mut framer = Framer::default();
        let mut told = Vec::new();
        for portion in input.chunks(size.max(1)) {
            framer.push(portion, &mut |piece| {
                told.push(match piece {
                    Piece::Object(object) => String::from_utf8_lossy(object).into_owned(),
                    Piece::Broken(why) => format!("<{why}>"),
                    Piece::Foreign => "<foreign>".to_owned(),
                    Piece::TooLong => "<too long>".to_owned(),
                });
            });
        }
        told
    }

    #[test]
    fn objects_come_out_whole_however_they_are_cut() {
        let cases: &[(&str, &[&str])] = &[
            ("", &[]),
            (r#"{"a":1}"#, &[r#"{"a":1}"#]),
            (r#"{"a":1}{"b":2}"#, &[r#"{"a":1}"#, r#"{"b":2}"#]),
            ("\r\n {\"a\":\n 1}\n\n\t{}\n", &["{\"a\":\n 1}", "{}"]),
            (r#"{"a":"}{\"\\"}{}"#, &[r#"{"a":"}{\"\\"}"#, "{}"]),
            (r#"{"a":{"b":[1,{"c":2}]}}"#, &[r#"{"a":{"b":[1,{"c":2}]}}"#]),
            (r#"{"unfinished":"#, &[]),
            ("[]{}\n{}", &["<a message is a JSON object and begins with {>", "{}"]),
            ("[1,2]\r\n{}", &["<a message is a JSON object and begins with {>", "{}"]),
            ("-1.5e3\n{}", &["<a message is a JSON object and begins with {>", "{}"]),
            ("null\n{}", &["<a message is a JSON object and begins with {>", "{}"]),
            ("{\"a\n{}", &["<a string is not closed on its line>", "{}"]),
            ("\u{feff}{}", &["{}"]),
            ("\u{feff}\r\n{}\n\u{feff}{}", &["{}", "{}"]),
        ];
        for (input, expected) in cases {
            for size in 1..=input.len().max(1) {
                assert_eq!(&pieces(input.as_bytes(), size), expected, "{input:?} by {size}");
            }
        }
    }

    #[test]
    fn nothing_after_a_line_that_is_not_json_is_read() {
        let body = "{\"cmd\":\"list\"}\n";
        let openings: &[&[u8]] = &[
            b"hello\n",
            b"POST / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\r\n\r\nGET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
            b"\r\n\r\n\0\r\nQUIT\n",
            b"\x16\x03\x01\x02\x00\x01\n",
            b"SSH-2.0-OpenSSH\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"set x 0 0 16\r\n",
            b"nick {}\n",
            b"true story\n",
            b"220 mail.example ESMTP\r\n",
            b"17:{\"cmd\":\"list\"},\n",
            b"\"half\n",
            b"\xef\xbb{}\n",
            b"\xef\xbb\xbfGET /\n",
            b"\xff\xfe{\0}\0\n\0",
            b"\xfe\xff\0{\0}\0\n",
            b"\0{\0}\0\n",
        ];
        for opening in openings {
            let input = [*opening, body.as_bytes()].concat();
            for size in 1..=input.len() {
                let told = pieces(&input, size);
                assert_eq!(told, ["<foreign>"], "{} by {size}", opening.escape_ascii());
            }
        }
        let wide: Vec<u8> = body.bytes().flat_map(|byte| [byte, 0]).collect();
        let told = pieces(&[wide, body.into()].concat(), 5);
        assert_eq!(told, ["<not JSON: a control byte; messages are UTF-8>", "<foreign>"]);
    }

    #[test]
    fn an_unfinished_line_costs_no_more_than_the_line_after_it() {
        let told = pieces(b"{\"cmd\":\"list\"\n{\"cmd\":\"list\"}\n{\"cmd\":\"list\"}\n", 7);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("<not JSON: "), "{told:?}");
        assert_eq!(told[1], r#"{"cmd":"list"}"#);
    }

    #[test]
    fn length_depth_and_lines_are_bounded() {
        let nested = |depth: usize| format!("{}{}", "{\"a\":".repeat(depth - 1), "{}");
        let deep = format!("{}{}\n{{}}", nested(DEPTH_MAX), "}".repeat(DEPTH_MAX - 1));
        assert_eq!(pieces(deep.as_bytes(), 3).len(), 2);
        let told = pieces(format!("{}\n{{}}", nested(DEPTH_MAX + 1)).as_bytes(), 3);
        assert_eq!(told, ["<nested deeper than 8 levels>", "{}"]);

        let of_length = |bytes: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(bytes - 8));
        let longest = of_length(MESSAGE_BYTES_MAX);
        assert_eq!(pieces(longest.as_bytes(), 1000), [longest.as_str()]);
        let longer = of_length(MESSAGE_BYTES_MAX + 1) + "\n{}";
        assert_eq!(pieces(longer.as_bytes(), 1000), ["<too long>"]);

        let told = pieces(&[b'['; 3 * MESSAGE_BYTES_MAX], 1000);
        assert_eq!(told, ["<too long>"]);
        let told = pieces(format!("{{\n\"{}", "\n".repeat(3 * MESSAGE_BYTES_MAX)).as_bytes(), 1000);
        assert_eq!(told, ["<a string is not closed on its line>"]);
        let told = pieces(format!("{{\0{}", "x".repeat(2 * MESSAGE_BYTES_MAX)).as_bytes(), 1000);
        assert_eq!((told.len(), told[1].as_str()), (2, "<too long>"));

        let spread = format!("{{{}}}\n", "\n".repeat(LINES_MAX + 1));
        assert_eq!(pieces(spread.as_bytes(), 1000)[0], "<spread over more than 64 lines>");
    }

    #[test]
    fn any_bytes_in_any_portions_give_the_same_pieces() {
        const WORDS: &[&str] = &[
            "{",
            "}",
            "[",
            "]",
            "\"",
            "\\",
            "\n",
            ":",
            ",",
            " ",
            "cmd",
            "{\"a\":1}",
            "\u{e4}",
            "0",
            "\0",
            "\u{feff}",
            "true",
        ];
        let mut state = 1u64;
        let mut below = |limit: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % limit
        };
        for _ in 0..2_000 {
            let words: String = (0..below(60)).map(|_| WORDS[below(WORDS.len())]).collect();
            let whole = pieces(words.as_bytes(), words.len());
            for size in [1, 2, 3, 7] {
                assert_eq!(pieces(words.as_bytes(), size), whole, "{words:?} by {size}");
            }
        }
    }
}
