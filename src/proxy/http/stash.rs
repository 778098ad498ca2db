//! Bytes that arrived before they were wanted: an incomplete head, or the next request while one is
//! being served. They are on the heap and not in blocks, so that users who send half a head cannot
//! take blocks from the others, however many they are. Bounded by the code that fills it; holds no
//! memory while it is empty.

#[derive(Debug)]
pub struct Stash {
    bytes: Vec<u8>,
    start: usize,
}

impl Stash {
    pub const EMPTY: Stash = Stash { bytes: Vec::new(), start: 0 };

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..]
    }

    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// The heap memory held, in bytes.
    pub fn held(&self) -> usize {
        self.bytes.capacity()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Drops bytes from the front.
    pub fn skip(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.bytes.len(), "only what is there can be skipped");
        if self.start >= self.bytes.len() {
            *self = Stash::EMPTY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_comes_out_in_order_and_leaves_nothing() {
        let mut stash = Stash::EMPTY;
        stash.push(b"one ");
        stash.push(b"two");
        stash.skip(2);
        assert_eq!((stash.bytes(), stash.len()), (&b"e two"[..], 5));
        stash.skip(5);
        assert!(stash.is_empty());
        assert_eq!(stash.bytes.capacity(), 0);
    }
}
