//! What a peer may make us do without asking for anything: the frames of its connection are counted as they come, by
//! what they are good for. Owns these budgets and what is known of a header block that has not come to its end; the
//! frames themselves are `h2`'s to read.
//!
//! `h2` has its own bounds on CONTINUATION frames, on small DATA frames, and on streams that were reset before they
//! were seen; what follows are those that it lacks. RFC 9113 section 10.5 asks for such bounds.

use h2::Reason;

use crate::base::quota::{Meter, Rate};
use crate::base::time::Now;

/// Frames that ask for nothing, PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty DATA and frames of unknown types, beyond
/// those that go with something useful.
const IDLE_FRAMES: Rate = Rate::new(1000, 100);
/// How many of them go with a request, with a message of content, and with each kilobyte sent. Clients of gRPC measure
/// the path by a PING for what they receive, and open two windows for it.
const WITH_REQUEST: u64 = 8;
const WITH_CONTENT: u64 = 2;
const BYTES_A_FRAME: usize = 1024;
/// Those that are saved up at most.
const SAVED_MAX: u64 = 10_000;
/// Streams that end by a reset, the peer's, or ours for a fault of the peer's, beyond one for each that was answered.
const RESETS: Rate = Rate::new(500, 50);

/// Before the first frame of a user's connection (RFC 9113 section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const HEAD_BYTES: usize = 9;
// The types of RFC 9113 section 6.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
// Flags of theirs.
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// What a peer has done too much of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Excess {
    IdleFrames,
    Resets,
}

/// Why a connection ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Breach {
    /// A frame that `h2` would refuse too, but later or for another reason than the one RFC 9113 asks for.
    Frame(Reason),
    Excess(Excess),
}

impl From<Excess> for Breach {
    fn from(excess: Excess) -> Breach {
        Breach::Excess(excess)
    }
}

/// The budgets of one connection.
#[derive(Debug)]
pub struct Guard {
    /// Bytes of the preface that are still to come.
    preface: usize,
    head: [u8; HEAD_BYTES],
    /// Bytes of the head that have come.
    filled: usize,
    /// Bytes of the payload that are still to come.
    payload: usize,
    idle: Meter,
    /// Frames that ask for nothing, and resets, which are still welcome.
    welcome: u64,
    welcome_resets: u64,
    resets: Meter,
    /// Since when a header block has been incomplete.
    block_since: Option<Now>,
    /// The peer has acknowledged our SETTINGS.
    is_agreed: bool,
}

impl Guard {
    /// `preface`: bytes that come before the first frame.
    pub fn new(preface: usize) -> Guard {
        Guard {
            preface,
            head: [0; HEAD_BYTES],
            filled: 0,
            payload: 0,
            idle: Meter::default(),
            welcome: 0,
            welcome_resets: 0,
            resets: Meter::default(),
            block_since: None,
            is_agreed: false,
        }
    }

    /// Counts what has come.
    ///
    /// # Errors
    /// What is too much, or what is wrong with a frame.
    pub fn received(&mut self, mut bytes: &[u8], now: Now) -> Result<(), Breach> {
        let skipped = self.preface.min(bytes.len());
        self.preface -= skipped;
        bytes = &bytes[skipped..];
        while !bytes.is_empty() {
            let skipped = self.payload.min(bytes.len());
            self.payload -= skipped;
            bytes = &bytes[skipped..];
            let count = (HEAD_BYTES - self.filled).min(bytes.len());
            self.head[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
            if self.filled == HEAD_BYTES {
                self.filled = 0;
                self.begun(now)?;
            }
        }
        Ok(())
    }

    /// The head of a frame has come.
    fn begun(&mut self, now: Now) -> Result<(), Breach> {
        let [high, middle, low, kind, flags, ..] = self.head;
        self.payload = u32::from_be_bytes([0, high, middle, low]) as usize;
        check(kind, flags, self.payload)?;
        match kind {
            DATA if self.payload > 0 => {
                self.earn(1);
                return Ok(());
            }
            DATA if flags & END_STREAM != 0 => return Ok(()),
            HEADERS | CONTINUATION if flags & END_HEADERS != 0 => {
                self.block_since = None;
                self.earn(WITH_REQUEST);
                return Ok(());
            }
            HEADERS | CONTINUATION => {
                self.block_since.get_or_insert(now);
                return Ok(());
            }
            SETTINGS if flags & ACK != 0 && !self.is_agreed => {
                self.is_agreed = true;
                return Ok(());
            }
            RST_STREAM => return Ok(self.reset(now)?),
            _ => {}
        }
        if self.welcome > 0 {
            self.welcome -= 1;
            return Ok(());
        }
        Ok(spend(&mut self.idle, IDLE_FRAMES, now, Excess::IdleFrames)?)
    }

    fn earn(&mut self, count: u64) {
        self.welcome = (self.welcome + count).min(SAVED_MAX);
    }

    /// So much content was sent to the peer.
    pub fn sent(&mut self, bytes: usize) {
        if bytes > 0 {
            self.earn(WITH_CONTENT + (bytes / BYTES_A_FRAME) as u64);
        }
    }

    /// A stream was answered to the end.
    pub fn answered(&mut self) {
        self.welcome_resets = (self.welcome_resets + 1).min(SAVED_MAX);
    }

    /// A stream has ended by a reset.
    ///
    /// # Errors
    /// There have been too many.
    pub fn reset(&mut self, now: Now) -> Result<(), Excess> {
        if self.welcome_resets > 0 {
            self.welcome_resets -= 1;
            return Ok(());
        }
        spend(&mut self.resets, RESETS, now, Excess::Resets)
    }

    /// Whether the peer has acknowledged our SETTINGS.
    pub fn is_agreed(&self) -> bool {
        self.is_agreed
    }

    /// Since when a header block has been incomplete.
    pub fn block_since(&self) -> Option<Now> {
        self.block_since
    }
}

/// Whether a frame may be what its head says.
fn check(kind: u8, flags: u8, payload: usize) -> Result<(), Breach> {
    let fits = match kind {
        PRIORITY => payload == 5,
        RST_STREAM | WINDOW_UPDATE => payload == 4,
        SETTINGS if flags & ACK != 0 => payload == 0,
        SETTINGS => payload.is_multiple_of(6),
        PING => payload == 8,
        // No user may push (section 8.4). `h2` would wait for the end of the block, for which no deadline runs.
        PUSH_PROMISE => return Err(Breach::Frame(Reason::PROTOCOL_ERROR)),
        _ => true,
    };
    if fits { Ok(()) } else { Err(Breach::Frame(Reason::FRAME_SIZE_ERROR)) }
}

fn spend(meter: &mut Meter, rate: Rate, now: Now, excess: Excess) -> Result<(), Excess> {
    if !meter.has_room(rate, now) {
        return Err(excess);
    }
    meter.take(rate, now);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Now = Now::from_nanos(1_000_000_000_000);

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn many(count: usize, bytes: &[u8]) -> Result<(), Breach> {
        let mut guard = Guard::new(0);
        (0..count).try_for_each(|_| guard.received(bytes, START))
    }

    #[test]
    fn frames_that_ask_for_nothing_are_too_many_at_some_time() {
        for (name, bytes) in [
            ("PING", frame(PING, 0, &[0; 8])),
            ("SETTINGS", frame(SETTINGS, 0, b"")),
            ("PRIORITY", frame(PRIORITY, 0, &[0; 5])),
            ("empty DATA", frame(DATA, 0, b"")),
            ("WINDOW_UPDATE", frame(WINDOW_UPDATE, 0, &[0; 4])),
            ("unknown", frame(77, 0, b"abc")),
        ] {
            assert_eq!(many(1000, &bytes), Ok(()), "{name}");
            let excess = Err(Breach::Excess(Excess::IdleFrames));
            assert_eq!(many(1001, &bytes), excess, "{name}");
        }
        for bytes in [frame(DATA, 0, b"x"), frame(DATA, END_STREAM, b""), frame(HEADERS, 5, b"x")] {
            assert_eq!(many(100_000, &bytes), Ok(()));
        }
    }

    #[test]
    fn a_promise_is_refused_with_its_first_frame() {
        for flags in [0, END_HEADERS] {
            let promise = frame(PUSH_PROMISE, flags, &[0, 0, 0, 2]);
            assert_eq!(Guard::new(0).received(&promise[..8], START), Ok(()));
            let refused = Err(Breach::Frame(Reason::PROTOCOL_ERROR));
            assert_eq!(Guard::new(0).received(&promise, START), refused);
        }
    }

    #[test]
    fn frames_of_one_size_are_refused_in_another() {
        let refused = Err(Breach::Frame(Reason::FRAME_SIZE_ERROR));
        for (kind, flags, size) in [
            (PRIORITY, 0, 5),
            (RST_STREAM, 0, 4),
            (SETTINGS, ACK, 0),
            (PING, 0, 8),
            (WINDOW_UPDATE, 0, 4),
        ] {
            let received =
                |size| Guard::new(0).received(&frame(kind, flags, &vec![0; size]), START);
            assert_eq!(received(size), Ok(()), "{kind}");
            assert_eq!(received(size + 1), refused, "{kind}");
        }
        assert_eq!(many(1, &frame(SETTINGS, 0, &[0; 12])), Ok(()));
        assert_eq!(many(1, &frame(SETTINGS, 0, &[0; 13])), refused);
    }

    #[test]
    fn updates_are_welcome_for_what_was_sent() {
        let mut guard = Guard::new(0);
        guard.sent(2998 * 1024);
        let update = frame(WINDOW_UPDATE, 0, &[0; 4]);
        assert!((0..4000).all(|_| guard.received(&update, START).is_ok()));
        assert!(guard.received(&update, START).is_err());
    }

    #[test]
    fn what_goes_with_calls_and_their_answers_is_never_too_much() {
        let mut guard = Guard::new(0);
        let call = [frame(HEADERS, 4, b"x"), frame(DATA, END_STREAM, b"hello")].concat();
        let ping = [frame(6, 0, &[0; 8]), frame(WINDOW_UPDATE, 0, &[0; 4])].concat();
        for _ in 0..100_000 {
            guard.received(&call, START).unwrap();
            guard.sent(5);
            (0..5).for_each(|_| guard.received(&ping, START).unwrap());
            guard.answered();
            guard.received(&frame(RST_STREAM, 0, &[0; 4]), START).unwrap();
        }
    }

    #[test]
    fn a_request_that_is_reset_at_once_is_too_much_at_some_time() {
        let rapid = [frame(HEADERS, 5, b"x"), frame(RST_STREAM, 0, &[0; 4])].concat();
        assert_eq!(many(500, &rapid), Ok(()));
        assert_eq!(many(501, &rapid), Err(Excess::Resets.into()));
    }

    #[test]
    fn frames_are_told_apart_however_they_are_cut() {
        let mut bytes = PREFACE.to_vec();
        bytes.extend(frame(HEADERS, 0, b"abc"));
        bytes.extend(frame(CONTINUATION, 0, b""));
        let open = bytes.len();
        bytes.extend(frame(CONTINUATION, END_HEADERS, b"defgh"));
        bytes.extend(frame(SETTINGS, ACK, b""));
        for step in 1..bytes.len() {
            let mut guard = Guard::new(PREFACE.len());
            let mut come = 0;
            for part in bytes.chunks(step) {
                guard.received(part, START).unwrap();
                come += part.len();
                assert_eq!(guard.is_agreed(), come == bytes.len());
                if come == open {
                    assert_eq!(guard.block_since(), Some(START));
                }
            }
            assert_eq!(guard.block_since(), None);
        }
    }

    #[test]
    fn resets_are_too_many_at_some_time_and_forgiven_later() {
        let mut guard = Guard::new(0);
        assert!((0..500).all(|_| guard.reset(START).is_ok()));
        assert_eq!(guard.reset(START), Err(Excess::Resets));
        let later = START.plus(std::time::Duration::from_secs(1));
        assert!((0..50).all(|_| guard.reset(later).is_ok()));
        assert_eq!(guard.reset(later), Err(Excess::Resets));
    }
}
