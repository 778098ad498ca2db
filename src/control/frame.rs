//! Where one JSON object ends and the next begins, in bytes that come in any portions. Owns the
//! bounds of a message: its length, its depth, its lines. Pure; what an object means is `api`'s.
//!
//! ```text
//!              '{'                  matching '}'
//!   Between ---------> Inside ---------------------> Between, with an object
//!      |                 | broken
//!      | anything else   v
//!      +-----------> SkipLine --- newline ---> Between
//!   any of them, too long for a message ---> Dead
//! ```
//!
//! Nothing but whitespace is needed between objects, not even that. After a fault the rest of the
//! line is passed over, so one bad line typed by hand costs one answer. An object may span lines, so
//! an unfinished one is only told from a spanning one by looking at every line's end whether JSON
//! could still become of it.

use serde::de::IgnoredAny;

/// A message is at most this long, in bytes, in both directions.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Objects and lists in one another, at most.
pub const DEPTH_MAX: usize = 8;
/// Lines of one message, at most. Bounds how often an unfinished message is looked at.
const LINES_MAX: usize = 64;

/// What the bytes turned out to be.
#[derive(PartialEq, Debug)]
pub enum Piece<'a> {
    /// Balanced braces; whether JSON stands between them is for the parser to say.
    Object(&'a [u8]),
    /// Not a message; the rest of its line is passed over.
    Broken(String),
    /// Beyond the length of a message: nothing more is read.
    TooLong,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Between,
    Inside,
    SkipLine,
    Dead,
}

/// Cuts one connection's bytes into objects.
pub struct Framer {
    state: State,
    message: Vec<u8>,
    depth: usize,
    lines: usize,
    in_string: bool,
    escaped: bool,
    skipped: usize,
}

impl Default for Framer {
    fn default() -> Framer {
        Framer {
            state: State::Between,
            message: Vec::new(),
            depth: 0,
            lines: 0,
            in_string: false,
            escaped: false,
            skipped: 0,
        }
    }
}

impl Framer {
    /// Takes the next bytes and passes on what they complete.
    pub fn push(&mut self, input: &[u8], tell: &mut dyn FnMut(Piece<'_>)) {
        for byte in input {
            match self.state {
                State::Between => self.between(*byte, tell),
                State::Inside => self.inside(*byte, tell),
                State::SkipLine => self.skip(*byte, tell),
                State::Dead => return,
            }
        }
    }

    fn between(&mut self, byte: u8, tell: &mut dyn FnMut(Piece<'_>)) {
        match byte {
            b'{' => {
                self.state = State::Inside;
                self.message.clear();
                self.message.push(byte);
                self.depth = 1;
                self.lines = 0;
                self.in_string = false;
                self.escaped = false;
            }
            b' ' | b'\t' | b'\r' | b'\n' => {}
            _ => self.broken(byte, "a message is a JSON object and begins with {".into(), tell),
        }
    }

    fn inside(&mut self, byte: u8, tell: &mut dyn FnMut(Piece<'_>)) {
        if self.message.len() == MESSAGE_BYTES_MAX {
            self.dead(tell);
            return;
        }
        self.message.push(byte);
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
            tell(Piece::Object(&self.message));
        }
    }

    /// At the end of a line inside an object: gives up on what can no longer become JSON.
    fn line_end(&mut self, tell: &mut dyn FnMut(Piece<'_>)) {
        self.lines += 1;
        if self.lines > LINES_MAX {
            self.broken(b'\n', format!("spread over more than {LINES_MAX} lines"), tell);
        } else if let Err(error) = serde_json::from_slice::<IgnoredAny>(&self.message)
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
            self.dead(tell);
        }
    }

    fn dead(&mut self, tell: &mut dyn FnMut(Piece<'_>)) {
        self.state = State::Dead;
        self.message = Vec::new();
        tell(Piece::TooLong);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of `input` in portions of `size` bytes: objects as they are, faults in brackets.
    fn pieces(input: &[u8], size: usize) -> Vec<String> {
        let mut framer = Framer::default();
        let mut told = Vec::new();
        for portion in input.chunks(size.max(1)) {
            framer.push(portion, &mut |piece| {
                told.push(match piece {
                    Piece::Object(object) => String::from_utf8_lossy(object).into_owned(),
                    Piece::Broken(why) => format!("<{why}>"),
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
            ("hello\n{}", &["<a message is a JSON object and begins with {>", "{}"]),
            ("[]{}\n{}", &["<a message is a JSON object and begins with {>", "{}"]),
            ("{\"a\n{}", &["<a string is not closed on its line>", "{}"]),
        ];
        for (input, expected) in cases {
            for size in 1..=input.len().max(1) {
                assert_eq!(&pieces(input.as_bytes(), size), expected, "{input:?} by {size}");
            }
        }
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

        let told = pieces(&[b'x'; 3 * MESSAGE_BYTES_MAX], 1000);
        assert_eq!(told.len(), 2, "{told:?}");
        assert_eq!(told[1], "<too long>");

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
