//! The key of every hash by which users are given to backends, and what goes into those hashes, byte by byte: two
//! balancers with one key choose alike, whatever machine and whatever program version they are. Owns both, and no
//! choice.

use std::fmt;
use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};

use siphasher::sip::SipHasher13;

/// The key of SipHash-1-3 (J.-P. Aumasson, D. Bernstein, "SipHash: a fast short-input PRF", INDOCRYPT 2012).
/// Whoever knows it can find addresses that all fall to one backend.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey([u64; 2]);

/// The key of balancers that share no secret. It never changes, so their users return to the same backends after a
/// restart and after an upgrade.
impl Default for HashKey {
    fn default() -> HashKey {
        HashKey::new(*b"lb source_hash 1")
    }
}

/// Not shown: it may be a secret.
impl fmt::Debug for HashKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("HashKey")
    }
}

/// What a hash is for. One address thereby has hashes that have nothing to do with each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Purpose {
    /// A user, by the address alone.
    User = 1,
    /// A user, by address and port.
    Connection = 2,
    /// Where a backend's walk through the table begins.
    Start = 3,
    /// How far it goes at each step.
    Step = 4,
    /// A backend without a table.
    Backend = 5,
}

impl HashKey {
    /// The key in these bytes.
    pub fn new(bytes: [u8; 16]) -> HashKey {
        let word = |from| std::array::from_fn(|place| bytes[from + place]);
        HashKey([u64::from_le_bytes(word(0)), u64::from_le_bytes(word(8))])
    }

    /// The hash of a canonical address; users are hashed again, `again` times, when their first choice does not
    /// serve. The port counts unless the purpose is [`Purpose::User`].
    #[inline]
    pub fn address(self, purpose: Purpose, again: u8, address: SocketAddr) -> u64 {
        let port = if purpose == Purpose::User { 0 } else { address.port() };
        let head = u64::from(purpose as u8) << 56 | u64::from(again) << 48 | u64::from(port) << 32;
        let mut hasher = self.hasher();
        // Word by word, least significant byte first; an IPv4 address takes one word with all that goes with it.
        match address.ip() {
            IpAddr::V4(v4) => hasher.write_u64(head | u64::from(v4.to_bits())),
            IpAddr::V6(v6) => {
                let bits = v6.to_bits();
                let words = [head, (bits >> 64) as u64, bits as u64];
                words.into_iter().for_each(|word| hasher.write_u64(word));
            }
        }
        hasher.finish()
    }

    /// The hash of a name.
    pub fn name(self, name: &str) -> u64 {
        self.hasher().hash(name.as_bytes())
    }

    fn hasher(self) -> SipHasher13 {
        SipHasher13::new_with_keys(self.0[0], self.0[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_the_same_on_every_machine_and_in_every_version() {
        let v4 = "192.0.2.1:80".parse().unwrap();
        let v6 = "[2001:db8::1]:80".parse().unwrap();
        let key = HashKey::default();
        let hashes = [
            key.address(Purpose::User, 0, v4),
            key.address(Purpose::User, 1, v4),
            key.address(Purpose::Connection, 0, v4),
            key.address(Purpose::Start, 0, v6),
            key.name("blue"),
        ];
        assert_eq!(hashes, HASHES, "a change deals out all users anew");
    }

    const HASHES: [u64; 5] = [
        12_880_351_722_954_823_811,
        16_803_845_659_286_549_885,
        8_346_019_140_699_082_585,
        4_927_181_040_753_892_703,
        1_271_795_346_187_319_988,
    ];

    #[test]
    fn what_is_hashed_is_a_row_of_bytes() {
        let key = HashKey::default();
        let v4 = key.address(Purpose::Connection, 3, "192.0.2.1:258".parse().unwrap());
        assert_eq!(v4, key.hasher().hash(&[1, 2, 0, 192, 2, 1, 3, 2]));
        let v6 = key.address(Purpose::User, 0, "[2001:db8::1]:258".parse().unwrap());
        let words = [1 << 56, 0x2001_0db8_0000_0000, 1];
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        assert_eq!(v6, key.hasher().hash(&bytes));
    }

    #[test]
    fn the_port_of_a_user_counts_only_where_it_should() {
        let [first, second] = [1, 2].map(|port| SocketAddr::from(([192, 0, 2, 1], port)));
        let key = HashKey::default();
        let both = |purpose| [first, second].map(|user| key.address(purpose, 0, user));
        let [one, other] = both(Purpose::User);
        assert_eq!(one, other);
        let [one, other] = both(Purpose::Connection);
        assert_ne!(one, other);
        assert_ne!(HashKey::new([7; 16]).address(Purpose::User, 0, first), both(Purpose::User)[0]);
        assert_eq!(format!("{key:?}"), "HashKey");
    }
}
