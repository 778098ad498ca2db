//! Chunked bodies (RFC 9112 7.1) as they pass: read, checked and rewritten in place.
//!
//! Every output byte is written where its input byte stood, or earlier: digits, line ends and
//! content come out one for one, and extensions are dropped. So a block can be rewritten in place
//! however the body is cut into blocks, and nothing is buffered but the trailer section, which is
//! bounded.
//!
//! From a backend we also accept blanks around a size and control bytes in trailers: some backends pad
//! sizes to a fixed width, the meaning is clear, and neither reaches the user. A bare line feed is
//! refused even from a backend: there is no room to insert the carriage return, and readers disagree
//! about it.

use std::ops::Range;

use super::field;
use super::head::{FIELDS_MAX, Field};
use super::{LENGTH_MAX, Malformed};

/// Limit on the bytes of extensions after one chunk size. They mean nothing to anyone and are
/// dropped.
pub const EXTENSION_BYTES_MAX: u16 = 256;
/// Limit on the bytes of a trailer section.
pub const TRAILER_BYTES_MAX: usize = 4 << 10;
/// Limit on the digits of a chunk size: 16 fit 64 bits, of which [`LENGTH_MAX`] leaves 63.
const DIGITS_MAX: u8 = 16;

const BAD_SIZE: Malformed = Malformed::new(400, "malformed chunk size");
const BAD_END: Malformed = Malformed::new(400, "malformed line end in a chunked body");
const BAD_TRAILERS: Malformed = Malformed::new(400, "malformed trailer section");

/// The longest line that says a chunk's size.
pub const SIZE_LINE_MAX: usize = DIGITS_MAX as usize + 2;

/// Writes a chunk's size line at the end of `line`; returns where it starts.
pub fn size_line(line: &mut [u8], size: usize) -> usize {
    let mut start = line.len() - 2;
    line[start..].copy_from_slice(b"\r\n");
    let mut left = size;
    while left > 0 {
        start -= 1;
        line[start] = b"0123456789abcdef"[left % 16];
        left /= 16;
    }
    start
}

/// ```text
///   (Indent) -> Size -> (Padding) -> (Extension) -> SizeEnd -> Content -> ContentReturn -> ContentEnd -> Size
///                             |
///                             +-- the last chunk -> Trailers -> (TrailersEnd) -> Finished
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// In the digits; the number read so far.
    Size(u8),
    /// In blanks before or after the size; the number read so far.
    Indent(u16),
    Padding(u16),
    /// In an extension after the size; the number of bytes read so far.
    Extension(u16),
    /// A line feed must follow the size line's carriage return.
    SizeEnd,
    Content,
    ContentReturn,
    ContentEnd,
    /// At the first byte of the trailer section, or collecting it.
    Trailers,
    /// There are no trailers; a line feed must follow.
    TrailersEnd,
    Finished,
}

/// What became of a block of body bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Passed {
    /// How many bytes belonged to the body; what follows is the next message's.
    pub consumed: usize,
    /// The range of the same block to pass on now.
    pub output: Range<usize>,
    /// The body is complete.
    pub finished: bool,
}

/// A chunked body on its way through.
#[derive(Debug)]
pub struct Chunked {
    state: State,
    keep_framing: bool,
    /// The body comes from a backend.
    lenient: bool,
    /// In a size line, the chunk's size as far as it has been read; then the content bytes still to
    /// come.
    left: u64,
    /// Content that may still come before the body is too large.
    allowed: u64,
    /// The trailer section as it arrives; once it is complete, the part that may be passed on.
    trailers: Vec<u8>,
}

/// A block being rewritten: what was read, and where the next byte goes.
struct Cursor<'a> {
    bytes: &'a mut [u8],
    read: usize,
    output: Option<(usize, usize)>,
}

impl Cursor<'_> {
    /// Copies the next `count` bytes to the output.
    fn keep(&mut self, count: usize) {
        let (_, end) = self.output.get_or_insert((self.read, self.read));
        if *end != self.read {
            self.bytes.copy_within(self.read..self.read + count, *end);
        }
        *end += count;
        self.read += count;
    }

    fn take(&mut self, keep: bool) {
        if keep { self.keep(1) } else { self.read += 1 }
    }
}

impl Chunked {
    /// With `keep_framing` the output is chunked again; otherwise it is the content alone. More
    /// than `bytes_max` bytes of content are refused with 413.
    pub const fn new(keep_framing: bool, bytes_max: u64) -> Chunked {
        Chunked {
            state: State::Size(0),
            keep_framing,
            lenient: false,
            left: 0,
            allowed: bytes_max,
            trailers: Vec::new(),
        }
    }

    /// Accepts what backends may write and users may not.
    pub fn of_backend(self) -> Chunked {
        Chunked { lenient: true, ..self }
    }

    /// Processes the next bytes to arrive. Once the body is finished, its output is followed by
    /// [`Chunked::trailer_section`].
    pub fn pass(&mut self, bytes: &mut [u8]) -> Result<Passed, Malformed> {
        let mut cursor = Cursor { bytes, read: 0, output: None };
        while cursor.read < cursor.bytes.len() && self.state != State::Finished {
            match self.state {
                State::Content => self.content(&mut cursor),
                State::Trailers => self.collect_trailers(&mut cursor)?,
                _ => self.framing(&mut cursor)?,
            }
        }
        let (start, end) = cursor.output.unwrap_or_default();
        let finished = self.state == State::Finished;
        Ok(Passed { consumed: cursor.read, output: start..end, finished })
    }

    /// What to send after the output of a finished body: the trailers that may be passed on and the
    /// empty line, or nothing if these have been written in place.
    pub fn trailer_section(&self) -> &[u8] {
        if self.keep_framing { &self.trailers } else { &[] }
    }

    /// Whether the next byte is content.
    pub fn is_in_content(&self) -> bool {
        self.state == State::Content
    }

    /// The field lines of a finished body's trailer section that may be passed on, and the empty line that ends them
    /// if there are any.
    pub fn trailers(&self) -> &[u8] {
        &self.trailers
    }

    fn content(&mut self, cursor: &mut Cursor<'_>) {
        let here = cursor.bytes.len() - cursor.read;
        let count = usize::try_from(self.left).unwrap_or(usize::MAX).min(here);
        cursor.keep(count);
        self.left -= count as u64;
        if self.left == 0 {
            self.state = State::ContentReturn;
        }
    }

    /// One byte of a size line or a line end.
    fn framing(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Malformed> {
        let byte = cursor.bytes[cursor.read];
        let mut keep = self.keep_framing;
        self.state = match (self.state, byte) {
            (State::Size(digits), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                self.digit(digits, byte)?
            }
            (State::Indent(_), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => self.digit(0, byte)?,
            (State::Size(1..) | State::Padding(_), b'\r') => State::SizeEnd,
            (State::Size(1..) | State::Padding(_), b';') => {
                keep = false;
                State::Extension(1)
            }
            (State::Size(_) | State::Indent(_) | State::Padding(_), b' ' | b'\t') => {
                keep = false;
                self.blank()?
            }
            (State::Size(_) | State::Indent(_) | State::Padding(_), _) => return Err(BAD_SIZE),
            (State::Extension(_), b'\r') => State::SizeEnd,
            (State::Extension(count), b'\t' | b' '..=b'~' | 0x80..) => {
                if count == EXTENSION_BYTES_MAX {
                    return Err(Malformed::new(400, "chunk extensions too long"));
                }
                keep = false;
                State::Extension(count + 1)
            }
            (State::Extension(_), _) => return Err(BAD_END),
            (State::SizeEnd, b'\n') => self.start_chunk()?,
            (State::ContentReturn, b'\r') => State::ContentEnd,
            (State::ContentEnd, b'\n') => State::Size(0),
            (State::TrailersEnd, b'\n') => State::Finished,
            _ => return Err(BAD_END),
        };
        cursor.take(keep);
        Ok(())
    }

    fn digit(&mut self, before: u8, byte: u8) -> Result<State, Malformed> {
        if before == DIGITS_MAX {
            return Err(BAD_SIZE);
        }
        let digit = char::from(byte).to_digit(16).unwrap_or_default();
        self.left = self.left << 4 | u64::from(digit);
        Ok(State::Size(before + 1))
    }

    /// A blank before or behind a size.
    fn blank(&self) -> Result<State, Malformed> {
        match self.state {
            _ if !self.lenient => Err(BAD_SIZE),
            State::Size(0) => Ok(State::Indent(1)),
            State::Indent(count) if count < EXTENSION_BYTES_MAX => Ok(State::Indent(count + 1)),
            State::Size(_) => Ok(State::Padding(1)),
            State::Padding(count) if count < EXTENSION_BYTES_MAX => Ok(State::Padding(count + 1)),
            _ => Err(BAD_SIZE),
        }
    }

    fn start_chunk(&mut self) -> Result<State, Malformed> {
        if self.left == 0 {
            return Ok(State::Trailers);
        }
        if self.left > LENGTH_MAX {
            return Err(BAD_SIZE);
        }
        match self.allowed.checked_sub(self.left) {
            Some(allowed) => self.allowed = allowed,
            None => return Err(Malformed::new(413, "body too large")),
        }
        Ok(State::Content)
    }

    fn collect_trailers(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Malformed> {
        if self.trailers.is_empty() && cursor.bytes[cursor.read] == b'\r' {
            cursor.take(self.keep_framing);
            self.state = State::TrailersEnd;
            return Ok(());
        }
        // Byte by byte up to the empty line: trailers are rare, short, and must not be read beyond.
        while let Some(byte) = cursor.bytes.get(cursor.read) {
            if *byte == b'\n' && self.trailers.last() != Some(&b'\r') {
                return Err(BAD_TRAILERS);
            }
            self.trailers.push(*byte);
            cursor.read += 1;
            if self.trailers.len() > TRAILER_BYTES_MAX {
                return Err(Malformed::new(400, "trailer section too large"));
            }
            if self.trailers.ends_with(b"\n\r\n") {
                if self.lenient {
                    field::clean(&mut self.trailers);
                }
                self.trailers = allowed_trailers(&self.trailers)?;
                self.state = State::Finished;
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The trailer fields that may be passed on, written again, and the empty line that ends them.
fn allowed_trailers(section: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let lines: &[Field<'_>] = match httparse::parse_headers(section, &mut fields) {
        Ok(httparse::Status::Complete((_, lines))) => lines,
        _ => return Err(BAD_TRAILERS),
    };
    let mut written = Vec::with_capacity(section.len());
    for line in lines.iter().filter(|line| field::may_be_trailer(line.name)) {
        for part in [line.name.as_bytes(), b": ", line.value, b"\r\n"] {
            written.extend_from_slice(part);
        }
    }
    written.extend_from_slice(b"\r\n");
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes a body in pieces of `step` bytes. Returns the output, how many bytes were taken and
    /// whether the body was complete, or the status of the refusal.
    fn pass(text: &[u8], step: usize, keep_framing: bool) -> Result<(Vec<u8>, usize, bool), u16> {
        pass_through(Chunked::new(keep_framing, 1 << 20), text, step)
    }

    fn pass_through(
        mut chunked: Chunked,
        text: &[u8],
        step: usize,
    ) -> Result<(Vec<u8>, usize, bool), u16> {
        let mut out = Vec::new();
        let mut consumed = 0;
        for block in text.chunks(step) {
            let mut block = block.to_vec();
            let passed = chunked.pass(&mut block).map_err(|fault| fault.status)?;
            out.extend_from_slice(&block[passed.output]);
            consumed += passed.consumed;
            if passed.finished {
                out.extend_from_slice(chunked.trailer_section());
                return Ok((out, consumed, true));
            }
        }
        Ok((out, consumed, false))
    }

    #[test]
    fn a_body_comes_out_the_same_however_it_is_cut() {
        let text = b"5\r\nhello\r\n0b;a=b;c=\"d\"\r\n wide world\r\n00;x\r\nA: 1\r\nHost: y\r\nB:2 \r\n\r\nGET";
        let chunks = b"5\r\nhello\r\n0b\r\n wide world\r\n00\r\nA: 1\r\nB: 2\r\n\r\n".to_vec();
        let content = b"hello wide world".to_vec();
        for step in 1..=text.len() {
            assert_eq!(
                pass(text, step, true),
                Ok((chunks.clone(), text.len() - 3, true)),
                "{step}"
            );
            assert_eq!(
                pass(text, step, false),
                Ok((content.clone(), text.len() - 3, true)),
                "{step}"
            );
        }
    }

    #[test]
    fn framing_that_is_plain_already_is_not_moved() {
        let mut text = b"5\r\nhello\r\n0\r\n\r\nnext".to_vec();
        let before = text.clone();
        let passed = Chunked::new(true, 100).pass(&mut text).unwrap();
        assert_eq!(passed, Passed { consumed: 15, output: 0..15, finished: true });
        assert_eq!(text, before);
        let passed = Chunked::new(false, 100).pass(&mut text).unwrap();
        assert_eq!(passed, Passed { consumed: 15, output: 3..8, finished: true });
        assert_eq!(text, before);
    }

    #[test]
    fn what_is_not_a_chunked_body_is_refused() {
        for text in [
            &b"\r\n"[..],
            b"g\r\n",
            b"-1\r\n",
            b"+1\r\n",
            b" 1\r\n",
            b"1 \r\n",
            b"1\t;a\r\n",
            b"0x1\r\n",
            b"1\n",
            b"1\r\r\n",
            b"1\ra",
            b";a\r\n",
            b"1;a\n",
            b"1;a\0\r\n",
            b"1;a\r\r\n",
            b"00000000000000001\r\n",
            b"1\r\nab",
            b"1\r\na\n",
            b"1\r\na\rb",
            b"1\r\na\r\n\r\n",
            b"0\r\n\n",
            b"0\r\n\ra",
            b"0\r\nA: b\n\n",
            b"0\r\nA: b\n\r\n",
            b"0\r\nA : b\r\n\r\n",
            b"0\r\n A: b\r\n\r\n",
            b"0\r\nA: b\r\n c\r\n\r\n",
            b"0\r\nA\r\n\r\n",
            b"0\r\nA: \0\r\n\r\n",
        ] {
            for step in 1..=text.len() {
                let got = pass(text, step, true);
                assert_eq!(got, Err(400), "{} in {step}", text.escape_ascii());
            }
        }
    }

    #[test]
    fn a_backend_may_pad_its_sizes_and_the_user_does_not_see_it() {
        let text =
            b"5   \r\nhello\r\n\t 0b \t;a=b\r\n wide world\r\n   0 \r\nA: 1\x01\x002\r\n\r\nGET";
        let chunks = b"5\r\nhello\r\n0b\r\n wide world\r\n0\r\nA: 1  2\r\n\r\n".to_vec();
        for step in 1..=text.len() {
            let whole = |keep, wanted: &[u8]| {
                let got = pass_through(Chunked::new(keep, 100).of_backend(), text, step);
                assert_eq!(got, Ok((wanted.to_vec(), text.len() - 3, true)), "{step}");
            };
            whole(true, &chunks);
            whole(false, b"hello wide world");
            assert_eq!(pass(text, step, true), Err(400), "a user may not: {step}");
        }
        let blanks = |count: usize| " ".repeat(count);
        for (text, wanted) in [
            (format!("1{}\r\n", blanks(256)), Ok(())),
            (format!("1{}\r\n", blanks(257)), Err(400)),
            (format!("{}1\r\n", blanks(256)), Ok(())),
            (format!("{}1\r\n", blanks(257)), Err(400)),
            ("1 1\r\n".to_string(), Err(400)),
            (" \r\n".to_string(), Err(400)),
            (" ;a\r\n".to_string(), Err(400)),
            ("1 \n".to_string(), Err(400)),
            ("1\x0b\r\n".to_string(), Err(400)),
            ("0\r\nA\x01: b\r\n\r\n".to_string(), Err(400)),
            ("0\r\nA: b\n\r\n".to_string(), Err(400)),
        ] {
            for step in 1..=text.len() {
                let chunked = Chunked::new(true, 100).of_backend();
                let got = pass_through(chunked, text.as_bytes(), step).map(drop);
                assert_eq!(got, wanted, "{text:?} in {step}");
            }
        }
    }

    #[test]
    fn a_chunk_size_fits_63_bits_and_the_limit() {
        assert_eq!(pass(b"100001\r\n", 99, true), Err(413));
        assert_eq!(pass(b"7fffffffffffffff\r\n", 99, true), Err(413));
        assert_eq!(pass(b"8000000000000000\r\n", 99, true), Err(400));
        assert!(pass(b"100000\r\n", 99, true).is_ok());
        let two = [b"80000\r\n".as_slice(), &[b'x'; 0x80000], b"\r\n80001\r\n"].concat();
        assert_eq!(pass(&two, usize::MAX, true), Err(413));
        let mut all = Chunked::new(true, u64::MAX);
        assert!(all.pass(&mut b"7FFFFFFFFFFFFFFF\r\nx".to_vec()).is_ok());
        for size in ["8000000000000000", "FFFFFFFFFFFFFFFF"] {
            let mut all = Chunked::new(true, u64::MAX);
            let refused = all.pass(format!("{size}\r\nx").into_bytes().as_mut());
            assert_eq!(refused.map_err(|fault| fault.status), Err(400), "{size}");
        }
    }

    #[test]
    fn extensions_and_trailers_are_bounded() {
        let extension = |count: usize| format!("1;{}\r\n", "e".repeat(count - 1)).into_bytes();
        assert!(pass(&extension(256), 7, true).is_ok());
        assert_eq!(pass(&extension(257), 7, true), Err(400));
        let trailer =
            |count: usize| format!("0\r\nA: {}\r\n\r\n", "t".repeat(count - 7)).into_bytes();
        assert!(matches!(pass(&trailer(TRAILER_BYTES_MAX), 999, true), Ok((_, _, true))));
        assert_eq!(pass(&trailer(TRAILER_BYTES_MAX + 1), 999, true), Err(400));
        let many = format!("0\r\n{}\r\n", "A:b\r\n".repeat(FIELDS_MAX + 1));
        assert_eq!(pass(many.as_bytes(), 999, true), Err(400));
    }

    #[test]
    fn a_body_that_stops_early_is_not_complete() {
        let text = b"5\r\nhello\r\n0\r\n\r\n";
        for end in 0..text.len() {
            assert!(!pass(&text[..end], 99, true).unwrap().2, "{end}");
        }
    }
}
