//! What the load generator sends and the echo backends send back: a head that says whose message it
//! is, and content that is determined by the position of each byte. Owns layout and checks; pure.
//!
//! ```text
//! 0      4      8            12       16        24
//! | magic| kind | connection | backend| sequence| content ...
//! ```
//! All numbers are little-endian. `backend` is zero from the client; an echo backend of ours writes
//! its own number there, and any other sends the zero back.

/// Bytes of a head, and the shortest message.
pub const HEAD_BYTES: usize = 24;
/// Where a head keeps the backend's number.
pub const BACKEND_AT: std::ops::Range<usize> = 12..16;

const MAGIC: [u8; 4] = *b"\x93lb\x01";

/// What a TCP echo backend is asked to do with a connection, by its first head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Send everything back.
    Echo,
    /// Send back the head, then endless content.
    Source,
    /// Check the content and send nothing; at the end of the stream, send a head with the count.
    Sink,
}

/// Whose message this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    pub kind: Kind,
    /// Unique among the connections of a run.
    pub connection: u32,
    /// The number of the backend that answered; zero if none said.
    pub backend: u32,
    pub sequence: u64,
}

impl Head {
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let kind: u32 = match self.kind {
            Kind::Echo => 0,
            Kind::Source => 1,
            Kind::Sink => 2,
        };
        let mut bytes = [0; HEAD_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.connection.to_le_bytes());
        bytes[BACKEND_AT].copy_from_slice(&self.backend.to_le_bytes());
        bytes[16..].copy_from_slice(&self.sequence.to_le_bytes());
        bytes
    }

    /// The head at the start of `bytes`; `None` if there is none.
    pub fn decode(bytes: &[u8]) -> Option<Head> {
        let bytes: &[u8; HEAD_BYTES] = bytes.first_chunk()?;
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let kind = match word(4) {
            0 => Kind::Echo,
            1 => Kind::Source,
            2 => Kind::Sink,
            _ => return None,
        };
        if bytes[..4] != MAGIC {
            return None;
        }
        Some(Head {
            kind,
            connection: word(8),
            backend: word(12),
            sequence: u64::from(word(20)) << 32 | u64::from(word(16)),
        })
    }
}

/// Content repeats after this many bytes: short enough for a core's second-level cache, and not a
/// multiple of a block or segment size, so that a block in the wrong place is noticed.
pub const PERIOD: usize = 4 * 65_536 - 168;

/// The content that the bytes of every position come from and are checked against. One per run.
pub struct Content {
    /// Two periods, so that any window of up to one period is a contiguous slice.
    bytes: Box<[u8]>,
}

impl Default for Content {
    fn default() -> Content {
        Content::new()
    }
}

impl Content {
    /// Always the same bytes: both ends know them without exchanging them.
    pub fn new() -> Content {
        let mut state: u64 = 0x6c62_6265_6e63_6831;
        let period: Vec<u8> = (0..PERIOD)
            .map(|_| {
                // xorshift64, which is good enough to tell one position from another.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            })
            .collect();
        Content { bytes: period.repeat(2).into_boxed_slice() }
    }

    /// Up to one period of content, starting at `position`.
    pub fn from(&self, position: u64, len: usize) -> &[u8] {
        let start = (position % PERIOD as u64) as usize;
        &self.bytes[start..start + len.min(PERIOD)]
    }

    /// Whether `bytes` are the content at `position`.
    pub fn matches(&self, position: u64, bytes: &[u8]) -> bool {
        let mut at = position;
        bytes.chunks(PERIOD).all(|part| {
            let same = self.from(at, part.len()) == part;
            at += part.len() as u64;
            same
        })
    }
}

/// Where the content of a message starts: different for every connection and sequence, so that the
/// content of another message does not pass for this one's.
pub fn content_position(connection: u32, sequence: u64) -> u64 {
    (u64::from(connection) << 20 ^ sequence).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: Head =
        Head { kind: Kind::Source, connection: 7, backend: 19_101, sequence: 1 << 40 | 3 };

    #[test]
    fn a_head_survives_the_wire() {
        assert_eq!(Head::decode(&HEAD.encode()), Some(HEAD));
        let bytes = HEAD.encode();
        assert_eq!(bytes[BACKEND_AT], 19_101u32.to_le_bytes());
    }

    #[test]
    fn foreign_or_short_bytes_are_no_head() {
        assert_eq!(Head::decode(&HEAD.encode()[..HEAD_BYTES - 1]), None);
        assert_eq!(Head::decode(&[0; HEAD_BYTES]), None);
        let mut bytes = HEAD.encode();
        bytes[4] = 9;
        assert_eq!(Head::decode(&bytes), None);
    }

    #[test]
    fn content_is_checked_over_the_end_of_a_period() {
        let content = Content::new();
        let mut bytes: Vec<u8> = content.from(PERIOD as u64 - 10, 30).to_vec();
        assert!(content.matches(PERIOD as u64 - 10, &bytes));
        assert!(content.matches(2 * PERIOD as u64 - 10, &bytes));
        assert!(!content.matches(PERIOD as u64 - 9, &bytes));
        bytes[29] ^= 1;
        assert!(!content.matches(PERIOD as u64 - 10, &bytes));
    }

    #[test]
    fn content_longer_than_a_period_is_checked_to_its_end() {
        let content = Content::new();
        let mut bytes = content.from(5, PERIOD).to_vec();
        bytes.extend_from_slice(content.from(5, 100));
        assert!(content.matches(5, &bytes));
        *bytes.last_mut().expect("not empty") ^= 1;
        assert!(!content.matches(5, &bytes));
    }

    #[test]
    fn a_block_in_the_wrong_place_shows() {
        let content = Content::new();
        for step in [512, 1460, 4096, 16_384, 65_536, 262_144, 1 << 20] {
            assert!(!content.matches(step, content.from(0, 64)), "moved by {step}");
        }
    }

    #[test]
    fn messages_next_to_each_other_have_different_content() {
        let content = Content::new();
        let one = content.from(content_position(1, 1), 40);
        assert_ne!(one, content.from(content_position(1, 2), 40));
        assert_ne!(one, content.from(content_position(2, 1), 40));
    }
}
