//! Session tickets: what users keep of a connection to take it up again. Owns the keys that seal them, how long
//! each key is good, and the files that keys come from or outlast a restart in. A ticket is laid out as RFC 5077
//! section 4 recommends, with AES-256-GCM in place of a cipher and a MAC of its own:
//!
//! ```text
//!   name of the key (16) | nonce (12) | sealed state | tag (16)
//! ```
//!
//! The policy under which it was given is not in the ticket but sealed with it (as associated data), so that it
//! opens under no other.

mod file;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::server::ProducesTickets;
use sha2::{Digest as _, Sha256};

/// How long a key of ours seals, in seconds.
const SEALS: i64 = 6 * 60 * 60;
/// How long it opens what it has sealed, in seconds.
const OPENS: i64 = 12 * 60 * 60;
/// How long a ticket is good at least, and users are told to keep it, in seconds: one that was sealed by the
/// last light of a key opens for as long as that still does.
const LIFETIME: u32 = (OPENS - SEALS) as u32;
const NAME_BYTES: usize = 16;
const SECRET_BYTES: usize = 32;
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
/// The most bytes of a ticket. What rustls seals in one is a few hundred.
const TICKET_BYTES_MAX: usize = 4096;
/// The most keys: each that a user names is looked for among them.
const KEYS_MAX: usize = 16;
/// The fewest keys of a file that several balancers share: one that seals, and the next, which all of them must
/// open before any of them seals with it.
const SHARED_MIN: usize = 2;

const _: () = assert!(OPENS / SEALS < KEYS_MAX as i64, "own keys never fill it");

/// Keys of one moment, the oldest first.
#[derive(Clone, Debug)]
pub struct Keyring {
    keys: Vec<Arc<Key>>,
    /// The place of the one that seals.
    seals: usize,
    source: Source,
}

/// Where keys come from.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Source {
    /// They are made here, and kept in this file over a restart.
    Own { kept: Option<PathBuf> },
    /// An operator's file, which other balancers may have as well.
    Shared,
}

struct Key {
    name: [u8; NAME_BYTES],
    secret: [u8; SECRET_BYTES],
    cipher: RandomizedNonceKey,
    /// When it was made, in seconds of Unix time. Those of an operator's file do not age.
    made: i64,
}

/// Nobody reads a secret in a log.
impl fmt::Debug for Key {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.debug_struct("Key").field("made", &self.made).finish_non_exhaustive()
    }
}

impl Key {
    fn new(made: i64) -> Result<Key, String> {
        let mut bytes = [0; NAME_BYTES + SECRET_BYTES];
        getrandom::fill(&mut bytes)
            .map_err(|error| format!("keys for TLS tickets need random numbers: {error}"))?;
        Key::of(&bytes, made).ok_or_else(|| "keys for TLS tickets cannot be made".to_owned())
    }

    /// A name and a secret: the first 16 bytes and the last 32.
    fn of(bytes: &[u8], made: i64) -> Option<Key> {
        let (name, secret) = (*bytes.first_chunk()?, *bytes.last_chunk()?);
        let cipher = RandomizedNonceKey::new(&AES_256_GCM, &secret).ok()?;
        Some(Key { name, secret, cipher, made })
    }

    fn seal(&self, binding: &Binding, state: &[u8]) -> Option<Vec<u8>> {
        let bytes = NAME_BYTES + NONCE_BYTES + state.len() + TAG_BYTES;
        if bytes > TICKET_BYTES_MAX {
            return None;
        }
        let mut ticket = Vec::with_capacity(bytes);
        ticket.extend_from_slice(&self.name);
        ticket.extend_from_slice(&[0; NONCE_BYTES]);
        ticket.extend_from_slice(state);
        let (head, sealed) = ticket.split_at_mut(NAME_BYTES + NONCE_BYTES);
        let data = Aad::from(&binding.0);
        let (nonce, tag) = self.cipher.seal_in_place_separate_tag(data, sealed).ok()?;
        head[NAME_BYTES..].copy_from_slice(nonce.as_ref());
        ticket.extend_from_slice(tag.as_ref());
        Some(ticket)
    }

    fn open(&self, binding: &Binding, rest: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = rest.split_at_checked(NONCE_BYTES)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut state = sealed.to_vec();
        let opened = self.cipher.open_in_place(nonce, Aad::from(&binding.0), &mut state).ok()?;
        let length = opened.len();
        state.truncate(length);
        Some(state)
    }

    /// Whether it is good for `time` from when it was made. One from the future, by a clock that was put back,
    /// counts as new for as long as it could be one.
    fn is_within(&self, time: i64, now: i64) -> bool {
        (-SEALS..time).contains(&(now - self.made))
    }
}

impl Keyring {
    /// A key of our own, and those that are left of what was `kept` in this file.
    ///
    /// # Errors
    /// There are no random numbers.
    pub fn own(kept: Option<&Path>, now: i64) -> Result<Keyring, String> {
        let source = Source::Own { kept: kept.map(Path::to_owned) };
        let keys = kept.and_then(file::kept).unwrap_or_default();
        let before = Keyring { seals: keys.len().saturating_sub(1), keys, source };
        Ok(before.turned(now)?.unwrap_or(before))
    }

    /// The keys of an operator's file, the oldest first; the last but one seals, and all of them open.
    ///
    /// # Errors
    /// One sentence that names the file and the cure.
    pub fn shared(path: &Path) -> Result<Keyring, String> {
        let keys = file::shared(path)?;
        Ok(Keyring { seals: keys.len() - SHARED_MIN, keys, source: Source::Shared })
    }

    /// Whether they are made here.
    pub fn is_own(&self) -> bool {
        self.source != Source::Shared
    }

    /// What follows these at `now`, in seconds of Unix time, if anything does: those that have had their time
    /// go, and when the one that seals has had its, another comes.
    ///
    /// # Errors
    /// There are no random numbers.
    pub fn turned(&self, now: i64) -> Result<Option<Keyring>, String> {
        if !self.is_own() {
            return Ok(None);
        }
        let good = self.keys.iter().filter(|key| key.is_within(OPENS, now));
        let mut keys: Vec<Arc<Key>> = good.cloned().collect();
        if !keys.last().is_some_and(|key| key.is_within(SEALS, now)) {
            keys.push(Arc::new(Key::new(now)?));
        }
        let is_same = keys.len() == self.keys.len()
            && keys.iter().zip(&self.keys).all(|(one, other)| Arc::ptr_eq(one, other));
        let seals = keys.len() - 1;
        Ok((!is_same).then(|| Keyring { keys, seals, source: self.source.clone() }))
    }

    /// Keeps them over a restart, where there is a place for that. Only our own user may read the file.
    ///
    /// # Errors
    /// One sentence: they cannot be written.
    pub fn keep(&self) -> Result<(), String> {
        match &self.source {
            Source::Own { kept: Some(path) } => file::keep(path, &self.keys),
            Source::Own { kept: None } | Source::Shared => Ok(()),
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.keys.len()
    }

    /// What seals and opens tickets under a policy.
    pub(super) fn sealer(self: &Arc<Keyring>, binding: Binding) -> Arc<dyn ProducesTickets> {
        Arc::new(Sealer { keys: Arc::clone(self), binding })
    }
}

/// What tells the tickets of one policy from those of another, at every balancer alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Binding([u8; 32]);

impl Binding {
    /// The policy that these words describe; their number and their order count.
    pub fn of<'a>(words: impl IntoIterator<Item = &'a [u8]>) -> Binding {
        let mut digest = Sha256::new_with_prefix(b"lb ticket 1");
        for word in words {
            digest.update((word.len() as u64).to_be_bytes());
            digest.update(word);
        }
        Binding(digest.finalize().into())
    }
}

/// The keys as rustls asks them.
#[derive(Debug)]
struct Sealer {
    keys: Arc<Keyring>,
    binding: Binding,
}

impl ProducesTickets for Sealer {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.keys.keys.get(self.keys.seals)?.seal(&self.binding, plain)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        if cipher.len() > TICKET_BYTES_MAX {
            return None;
        }
        let (name, rest) = cipher.split_first_chunk::<NAME_BYTES>()?;
        let key = self.keys.keys.iter().find(|key| key.name == *name)?;
        key.open(&self.binding, rest)
    }
}

/// A name and a secret in a line of a file.
fn line_of(key: &Key) -> String {
    STANDARD.encode([&key.name[..], &key.secret].concat())
}

#[cfg(test)]
mod tests;
