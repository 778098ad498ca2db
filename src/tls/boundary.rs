//! Where records end in ciphertext that is cut at any place (RFC 8446 section 5.1). Owns the count of what is left
//! of the one under way; opens and keeps nothing but its head.

const HEAD_BYTES: usize = 5;

/// The record under way.
#[derive(Clone, Copy, Default, Debug)]
pub struct Boundary {
    head: [u8; HEAD_BYTES],
    /// How many of its bytes have been seen, those of its head included.
    seen: usize,
}

impl Boundary {
    /// Those of `bytes` that are of the record under way.
    pub fn cut<'b>(&self, bytes: &'b [u8]) -> &'b [u8] {
        let mut next = *self;
        match next.look(bytes) {
            Some(whole) => &bytes[..bytes.len().min(whole - self.seen)],
            None => bytes,
        }
    }

    /// These, which are of the record under way, have been taken. Returns whether it ends with them.
    pub fn pass(&mut self, taken: &[u8]) -> bool {
        let whole = self.look(taken);
        self.seen += taken.len();
        let ends = whole.is_some_and(|whole| self.seen >= whole);
        if ends {
            *self = Boundary::default();
        }
        ends
    }

    /// Keeps what `bytes` has of the head. The length of the record, once its head is whole.
    fn look(&mut self, bytes: &[u8]) -> Option<usize> {
        let before = self.seen.min(HEAD_BYTES);
        let more = bytes.len().min(HEAD_BYTES - before);
        self.head[before..before + more].copy_from_slice(&bytes[..more]);
        let [.., high, low] = self.head;
        let whole = HEAD_BYTES + usize::from(u16::from_be_bytes([high, low]));
        (before + more == HEAD_BYTES).then_some(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_end_where_they_do_however_they_are_cut() {
        let lengths = [0, 1, 300, 22, 0, 16_401];
        let mut bytes = Vec::new();
        for length in lengths {
            bytes.extend_from_slice(&[23, 3, 3]);
            bytes.extend_from_slice(&(length as u16).to_be_bytes());
            bytes.resize(bytes.len() + length, 9);
        }
        for most in [1, 2, 4, 5, 6, 7, 1000, bytes.len()] {
            let (mut boundary, mut left, mut ends) = (Boundary::default(), &bytes[..], Vec::new());
            while !left.is_empty() {
                let part = boundary.cut(&left[..left.len().min(most)]);
                assert!(!part.is_empty());
                left = &left[part.len()..];
                if boundary.pass(part) {
                    ends.push(bytes.len() - left.len());
                }
            }
            let mut at = 0;
            let wanted = lengths.map(|length| {
                at += HEAD_BYTES + length;
                at
            });
            assert_eq!(ends, wanted, "in pieces of {most}");
        }
    }
}
