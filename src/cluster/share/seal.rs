//! Proof that a value in the store was written by a balancer of this cluster, under this key. Owns the form of it.
//! Whoever can write into the store but does not know the secret can take values away, and add none.
//!
//! A sealed value is a JSON object whose last member is `"mac":"<64 hex digits>"`: HMAC-SHA256 (RFC 2104, FIPS
//! 180-4), keyed with the secret, of the bytes `lb-cluster-1|`, the key in the store, `|`, and all of the value
//! before the comma in front of that member.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::cluster::hash_key::HashKey;

/// What stands between a value and the digits of its proof.
const MEMBER: &str = ",\"mac\":\"";
const DIGITS: usize = 64;
const END: &str = "\"}";

/// The secrets of a cluster: the first seals, and all of them open, so that one can be replaced without a gap.
#[derive(Clone, Default)]
pub struct Seal(Vec<Hmac<Sha256>>);

impl fmt::Debug for Seal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} secrets", self.0.len())
    }
}

impl Seal {
    /// With these secrets. Without any, nothing is sealed, and everything is taken for what it says.
    pub fn new<'s>(secrets: impl Iterator<Item = &'s [u8]>) -> Seal {
        Seal(secrets.map(keyed).collect())
    }

    pub fn is_secret(&self) -> bool {
        !self.0.is_empty()
    }

    /// The value `object`, a JSON object with a member at least, as it is written under `key`.
    pub fn seal(&self, key: &str, object: String) -> String {
        let Some(secret) = self.0.first() else { return object };
        let body = object.strip_suffix('}').expect("a JSON object ends with a brace");
        let mac = over(secret, key, body).finalize().into_bytes();
        let digits: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{body}{MEMBER}{digits}{END}")
    }

    /// Whether what stands under `key` was written there by a balancer of this cluster.
    pub fn holds(&self, key: &str, value: &str) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let Some((body, mac)) = split(value) else { return false };
        // Whichever one it is, it takes as long.
        self.0
            .iter()
            .fold(false, |held, secret| held | over(secret, key, body).verify_slice(&mac).is_ok())
    }
}

/// The key of the hashes by which users are given to backends, for those who share this secret.
pub fn hash_key(secret: &[u8]) -> HashKey {
    let digest = keyed(secret).chain_update(b"lb source_hash 1").finalize().into_bytes();
    HashKey::new(std::array::from_fn(|at| digest[at]))
}

fn keyed(secret: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(secret).expect("HMAC takes keys of any length")
}

fn over(secret: &Hmac<Sha256>, key: &str, body: &str) -> Hmac<Sha256> {
    let parts = [b"lb-cluster-1|", key.as_bytes(), b"|", body.as_bytes()];
    parts.into_iter().fold(secret.clone(), |mac, part| mac.chain_update(part))
}

/// A value without its proof, and the proof.
fn split(value: &str) -> Option<(&str, [u8; 32])> {
    let rest = value.strip_suffix(END)?;
    let (rest, digits) = rest.split_at_checked(rest.len().checked_sub(DIGITS)?)?;
    let body = rest.strip_suffix(MEMBER)?;
    let mut mac = [0; 32];
    for (byte, pair) in mac.iter_mut().zip(digits.as_bytes().chunks(2)) {
        let text = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(text, 16).ok()?;
    }
    Some((body, mac))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(secrets: &[&str]) -> Seal {
        Seal::new(secrets.iter().map(|it| it.as_bytes()))
    }

    #[test]
    fn a_value_holds_under_its_own_key_with_a_secret_that_is_known() {
        let (old, new) =
            (seal(&["one secret of old"]), seal(&["another secret", "one secret of old"]));
        let object = || r#"{"v":1,"weight":3}"#.to_owned();
        let sealed = old.seal("/lb/a/1/back/x", object());
        assert!(sealed.starts_with(r#"{"v":1,"weight":3,"mac":""#) && sealed.ends_with("\"}"));
        serde_json::from_str::<serde_json::Value>(&sealed).unwrap();
        assert!(old.holds("/lb/a/1/back/x", &sealed) && new.holds("/lb/a/1/back/x", &sealed));
        assert!(!old.holds("/lb/a/1/back/y", &sealed), "it was copied to another key");
        assert!(!old.holds("/lb/a/1/back/x", &sealed.replace('3', "4")));
        assert!(!old.holds("/lb/a/1/back/x", &object()), "it has no proof");
        assert!(!old.holds("/lb/a/1/back/x", &new.seal("/lb/a/1/back/x", object())));
        assert!(Seal::default().holds("/lb/a/1/back/x", &object()));
        assert_eq!(Seal::default().seal("/lb/a/1/back/x", object()), object());
        assert_eq!(format!("{old:?} {}", old.is_secret()), "1 secrets true");
    }

    #[test]
    fn what_is_no_value_holds_nowhere() {
        let seal = seal(&["one secret of old"]);
        let digits = "0".repeat(64);
        for value in [
            "",
            "}",
            "\"}",
            "{\"mac\":\"\"}",
            "\u{e9}\"}",
            &format!("{}\"}}", "\u{e9}".repeat(40)),
            &format!("{{\"v\":1,\"mac\":\"{digits}\"}}"),
            &format!("{{\"v\":1,\"mac\":\"{}\"}}", "+1".repeat(32)),
        ] {
            assert!(!seal.holds("k", value), "{value}");
        }
    }

    #[test]
    fn the_key_of_hashes_follows_from_the_secret_alone() {
        assert_eq!(hash_key(b"one secret"), hash_key(b"one secret"));
        assert_ne!(hash_key(b"one secret"), hash_key(b"another"));
        assert_ne!(hash_key(b"one secret"), HashKey::default());
    }
}
