//! What names a request beyond one program: `X-Request-Id`, and the trace of `traceparent` (W3C Trace
//! Context). Owns which of them are well-formed, and the making of new IDs from a seed.

use rand_xoshiro::Xoroshiro128PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

/// Bytes of a request ID, at most: enough for a UUID, and for what load balancers and clouds send.
pub const ID_BYTES_MAX: usize = 64;
/// Bytes of an ID that is made here: 128 bits in hexadecimal digits.
pub const MADE_BYTES: usize = 32;

/// Whether an ID from elsewhere may be taken over: visible ASCII and not too long, so that it can stand in a
/// field and in a line of the log.
pub fn is_id(value: &[u8]) -> bool {
    (1..=ID_BYTES_MAX).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic)
}

/// The trace ID of a `traceparent`: version, trace, parent and flags, of which neither the trace nor the
/// parent may be all zeros. Later versions may say more behind it.
pub fn trace_of(value: &[u8]) -> Option<u128> {
    let part = |from: usize, to: usize| hex(value.get(from..to)?);
    let dashes = [2, 35, 52].iter().all(|at| value.get(*at) == Some(&b'-'));
    let version = part(0, 2)?;
    let (trace, parent, _flags) = (part(3, 35)?, part(36, 52)?, part(53, 55)?);
    let ends = match value.get(55) {
        None => true,
        Some(byte) => version != 0 && *byte == b'-',
    };
    (dashes && ends && version != 0xff && trace != 0 && parent != 0).then_some(trace)
}

/// Up to 32 hexadecimal digits in lower case, as the specification wants them.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

/// A sequence of IDs that do not repeat. They tell requests apart and are no secret: who has seen some can
/// work out the next.
#[derive(Clone, Debug)]
pub struct Ids(Xoroshiro128PlusPlus);

impl Ids {
    /// Another seed gives another sequence.
    pub fn new(seed: [u64; 2]) -> Ids {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(seed.map(u64::to_le_bytes).as_flattened());
        Ids(Xoroshiro128PlusPlus::from_seed(bytes))
    }

    /// The next ID.
    pub fn make(&mut self) -> [u8; MADE_BYTES] {
        let number = u128::from(self.0.next_u64()) << 64 | u128::from(self.0.next_u64());
        let mut text = [0; MADE_BYTES];
        for (two, byte) in text.chunks_exact_mut(2).zip(number.to_be_bytes()) {
            let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
            two.copy_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_visible_ascii_of_bounded_length() {
        let long = [b'x'; ID_BYTES_MAX + 1];
        for (value, fits) in [
            (&b"4bf92f35-77b3-4da6"[..], true),
            (b"Root=1-67891233-abcdef012345678912345678", true),
            (b"x", true),
            (&long[..ID_BYTES_MAX], true),
            (&long, false),
            (b"", false),
            (b"a b", false),
            (b"a\tb", false),
            (b"a\x7f", false),
            ("\u{e9}".as_bytes(), false),
        ] {
            assert_eq!(is_id(value), fits, "{}", String::from_utf8_lossy(value));
        }
    }

    #[test]
    fn the_trace_of_a_well_formed_traceparent_is_known() {
        const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
        let trace = u128::from_str_radix(TRACE, 16).unwrap();
        let zeros = "0".repeat(32);
        for (value, known) in [
            (format!("00-{TRACE}-00f067aa0ba902b7-01"), true),
            (format!("00-{TRACE}-00f067aa0ba902b7-01-more"), false),
            (format!("cc-{TRACE}-00f067aa0ba902b7-01-more"), true),
            (format!("cc-{TRACE}-00f067aa0ba902b7-01more"), false),
            (format!("ff-{TRACE}-00f067aa0ba902b7-01"), false),
            (format!("00-{zeros}-00f067aa0ba902b7-01"), false),
            (format!("00-{TRACE}-0000000000000000-01"), false),
            (format!("00-{}-00f067aa0ba902b7-01", TRACE.to_uppercase()), false),
            (format!("00-{TRACE}-00f067aa0ba902b7-0"), false),
            (format!("00-{TRACE}_00f067aa0ba902b7-01"), false),
            (format!("00-{TRACE}"), false),
            (String::new(), false),
        ] {
            assert_eq!(trace_of(value.as_bytes()), known.then_some(trace), "{value}");
        }
    }

    #[test]
    fn made_ids_are_well_formed_and_do_not_repeat() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in [[0, 0], [1, 2], [2, 1]] {
            let mut ids = Ids::new(seed);
            for _ in 0..1000 {
                let id = ids.make();
                assert!(is_id(&id) && hex(&id).is_some());
                assert!(seen.insert(id), "{seed:?}");
            }
        }
        assert_eq!(Ids::new([1, 2]).make(), Ids::new([1, 2]).make(), "the seed alone decides");
    }
}
