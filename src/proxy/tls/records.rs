//! How much plaintext goes into one record. Owns that choice: a user can read nothing of a record before all of
//! it has come. While a connection starts, and again after a rest, a record of 16 KiB would be longer than the
//! first flight that TCP allows itself (ten segments, RFC 6928), and the user would wait for another round trip;
//! so records fit one segment until two such flights are out. From then on they are as long as may be, which
//! costs least. Pure: time comes as an argument.

use std::time::Duration;

use crate::base::time::Now;

/// Plaintext of a record that fits one segment: 1,500 bytes less IPv6 (40), TCP (20) with its options (at most
/// 40), and the record's own head, nonce and tag (29 in TLS 1.2, 22 in 1.3).
const SHORT_BYTES: usize = 1500 - 40 - 60 - 29;
/// Two flights of ten segments.
const START_BYTES: usize = 20 * SHORT_BYTES;
/// After a rest as long as this, TCP begins as with a new connection (RFC 5681 section 4.1 has it at one
/// retransmission timeout, which is 200 ms and more).
const REST: Duration = Duration::from_secs(1);

/// Those of one connection.
#[derive(Clone, Copy, Default, Debug)]
pub struct Records {
    /// Bytes sealed since the start, or the last rest.
    sealed: usize,
    last: Now,
}

impl Records {
    /// How many bytes at most go together into the next record, or into the next records that are as long as may
    /// be (`usize::MAX`).
    pub fn most(&mut self, now: Now) -> usize {
        if now.since(self.last) >= REST {
            self.sealed = 0;
        }
        if self.sealed < START_BYTES { SHORT_BYTES } else { usize::MAX }
    }

    /// So many have been sealed.
    pub fn sealed(&mut self, bytes: usize, now: Now) {
        self.sealed = self.sealed.saturating_add(bytes);
        self.last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    /// The lengths of the records that so many bytes are sealed in.
    fn lengths(records: &mut Records, bytes: usize, now: Now) -> Vec<usize> {
        let (mut left, mut lengths) = (bytes, Vec::new());
        while left > 0 {
            let length = left.min(records.most(now));
            records.sealed(length, now);
            lengths.push(length);
            left -= length;
        }
        lengths
    }

    #[test]
    fn records_fit_a_segment_at_the_start_and_after_a_rest_only() {
        let mut records = Records::default();
        assert_eq!(lengths(&mut records, 200, at(5000)), [200], "a small answer is one record");
        let wanted = [vec![SHORT_BYTES; 20], vec![100_000 - 20 * SHORT_BYTES]].concat();
        assert_eq!(lengths(&mut records, 100_000, at(5001)), wanted);
        assert_eq!(lengths(&mut records, 100_000, at(6000)), [100_000], "it streams");
        assert_eq!(lengths(&mut records, 200_000, at(6999)), [200_000]);
        let first = lengths(&mut records, 100_000, at(7999))[..20].to_vec();
        assert_eq!(first, [SHORT_BYTES; 20], "it has rested for a second");
    }
}
