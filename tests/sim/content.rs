//! What the bytes of a stream look like: every place of every stream has its own content, so that a
//! byte that is lost, doubled, out of order or with the wrong peer is noticed by its value.

use std::sync::OnceLock;

use lb::proxy::Side;
use lb::ring::pool::LARGE_BYTES;

use super::random::Random;

/// The streams are windows into one random text, which repeats after a prime number of bytes, so
/// that a mistake by whole blocks never hits the same text again.
const PERIOD: u64 = 65_521;

/// What one peer of one user's session sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stream {
    pub user: usize,
    pub from: Side,
}

impl Stream {
    /// Bytes `offset..offset + len`, at most one large block.
    pub fn text(self, offset: u64, len: usize) -> &'static [u8] {
        let start = Random::new((self.user as u64) << 1 | self.from as u64).next();
        let place = ((start % PERIOD + offset) % PERIOD) as usize;
        &text()[place..place + len]
    }
}

fn text() -> &'static [u8] {
    static TEXT: OnceLock<Vec<u8>> = OnceLock::new();
    TEXT.get_or_init(|| {
        let mut random = Random::new(1);
        let once: Vec<u8> = (0..PERIOD).map(|_| random.next() as u8).collect();
        once.iter().cycle().take(PERIOD as usize + LARGE_BYTES).copied().collect()
    })
}
