//! The proof of a shared secret. Owns its wire form, for both sides, and the files that secrets are read
//! from; knows neither sockets nor time. What a proof is good for is up to `rights`.
//!
//! # The proof on the wire
//!
//! Used only when a secret is configured, for any service. Every message is one JSON object; the balancer's end with `\n`.
//!
//! | from | message |
//! |---|---|
//! | balancer, at once after accepting | `{"cmd":"auth","nonce":"<64 hex digits>","v":1}` |
//! | backend, within 5 seconds | `{"cmd":"auth","id":"<name>","mac":"<64 hex digits>"}` |
//! | balancer | `{"ack":"successful","cmd":"auth"}` |
//! | or | `{"ack":"failed","msg":"...","cmd":"auth"}`, and it closes |
//!
//! `mac` is HMAC-SHA256 (RFC 2104, FIPS 180-4) of the bytes `lb1|` nonce `|` id. The nonce goes in as
//! the hex digits that were sent, and the key is the secret without its line end. The id is 1 to 64
//! characters from `A-Z a-z 0-9 . _ : -`. A nonce is good for one answer, right or wrong. Any other
//! message before the proof ends the connection, unless some service can be joined without one: the
//! backend then goes on unproven, also if it says nothing in those 5 seconds.
//!
//! The proof says who opened the connection. It does not encrypt it: on a network where others can
//! inject packets, put the control port behind a tunnel.

use std::fmt;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// How long a backend may take to answer the challenge.
pub const AUTH_TIMEOUT: Duration = Duration::from_secs(5);
/// Most connections at once that have not proved the secret.
pub const UNPROVEN_MAX: usize = 64;
/// Most of them from one source.
pub const UNPROVEN_EACH_MAX: usize = UNPROVEN_MAX / 2;
/// The version of the wire form.
pub const VERSION: u32 = 1;
/// Shortest secret, in bytes; a shorter one could be guessed.
pub const SECRET_BYTES_MIN: usize = 16;
/// Longest file of secrets.
const SECRET_FILE_BYTES_MAX: u64 = 64 * 1024;

/// The secrets, any of which a backend may prove, so that one can be replaced without a gap.
#[derive(Clone)]
pub struct Secrets(Vec<Vec<u8>>);

impl fmt::Debug for Secrets {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} secrets", self.0.len())
    }
}

impl Secrets {
    /// Parses one secret per line; empty lines do not count.
    ///
    /// # Errors
    /// A sentence for the operator: there is no secret, or one is too short.
    pub fn parse(text: &[u8]) -> Result<Secrets, String> {
        let lines = text.split(|byte| *byte == b'\n').map(|line| line.trim_ascii().to_vec());
        let secrets: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
        if secrets.is_empty() {
            return Err("holds no secret: write one per line, for example from \
                 `openssl rand -hex 32`"
                .into());
        }
        if let Some(short) = secrets.iter().position(|it| it.len() < SECRET_BYTES_MIN) {
            return Err(format!(
                "holds a secret that is shorter than {SECRET_BYTES_MIN} bytes (number {}): make a \
                 longer one, for example with `openssl rand -hex 32`",
                short + 1
            ));
        }
        Ok(Secrets(secrets))
    }

    /// Reads a file of secrets, which only its owner may write and strangers may not read.
    ///
    /// # Errors
    /// A sentence for the operator that includes the cure.
    pub fn load(path: &Path) -> Result<Secrets, String> {
        let shown = path.display();
        let file = fs::File::open(path).map_err(|error| {
            format!(
                "cannot read the secret file {shown}: {error}; check that it is there and that this \
                 user may read it"
            )
        })?;
        let about = file.metadata().map_err(|error| format!("cannot look at {shown}: {error}"))?;
        if about.is_dir() {
            return Err(format!("{shown} is a folder: name a file of secrets in it"));
        }
        if about.permissions().mode() & 0o027 != 0 {
            return Err(format!(
                "others may read or change the secret file {shown}: run `chmod 600 {shown}`"
            ));
        }
        let mut text = Vec::new();
        // The extra byte reveals a file that is too long, whose last secret would be cut off.
        file.take(SECRET_FILE_BYTES_MAX + 1)
            .read_to_end(&mut text)
            .map_err(|error| format!("cannot read the secret file {shown}: {error}"))?;
        if text.len() as u64 > SECRET_FILE_BYTES_MAX {
            return Err(format!(
                "the secret file {shown} is longer than {SECRET_FILE_BYTES_MAX} bytes: keep one \
                 secret per line, and only those in use"
            ));
        }
        Secrets::parse(&text).map_err(|fault| format!("the secret file {shown} {fault}"))
    }

    /// Whether `candidate` is one of them. Takes the same time whichever one it is.
    pub fn hold(&self, candidate: &[u8]) -> bool {
        let (nonce, id) = ("", "");
        let shown = keyed(candidate, nonce, id).finalize().into_bytes();
        self.0.iter().fold(false, |held, secret| {
            held | keyed(secret, nonce, id).verify_slice(&shown).is_ok()
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// The secret to answer a challenge with.
    pub fn first(&self) -> &[u8] {
        &self.0[0]
    }
}

/// The answer to a challenge: the value of `mac`, in hex digits.
pub fn mac(secret: &[u8], nonce: &str, id: &str) -> String {
    hex(&keyed(secret, nonce, id).finalize().into_bytes())
}

fn keyed(secret: &[u8], nonce: &str, id: &str) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length");
    for part in ["lb1|", nonce, "|", id] {
        mac.update(part.as_bytes());
    }
    mac
}

/// A challenge, which can be answered once.
#[derive(Debug)]
pub struct Challenge {
    nonce: String,
}

impl Challenge {
    /// A challenge from a nonce, which must be unpredictable.
    pub fn new(nonce: [u8; 32]) -> Challenge {
        Challenge { nonce: hex(&nonce) }
    }

    /// The challenge that was made from a nonce elsewhere; `None` if these are not its hex digits.
    pub fn again(nonce: &str) -> Option<Challenge> {
        let is_nonce = nonce.len() == 64 && bytes(nonce).is_some();
        is_nonce.then(|| Challenge { nonce: nonce.to_owned() })
    }

    /// The hex digits to send.
    pub fn nonce(&self) -> &str {
        &self.nonce
    }

    /// Which of the secrets `answer` proves knowledge of, by their places; usually one, or none. Tries
    /// them all, so the time it takes does not tell whether or where one was met. Uses up the challenge.
    pub fn met_by<S: AsRef<[u8]>>(
        self,
        secrets: impl Iterator<Item = S>,
        id: &str,
        answer: &str,
    ) -> Vec<usize> {
        let answer = bytes(answer).unwrap_or_default();
        let is_met =
            |secret: S| keyed(secret.as_ref(), &self.nonce, id).verify_slice(&answer).is_ok();
        let tried: Vec<bool> = secrets.map(is_met).collect();
        tried.iter().enumerate().filter(|(_, met)| **met).map(|(place, _)| place).collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    if !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) || !hex.len().is_multiple_of(2) {
        return None;
    }
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"correct horse battery staple";

    #[test]
    fn the_mac_is_hmac_sha256_over_version_nonce_and_id() {
        // Python: hmac.new(secret, b"lb1|" + 64 * b"0" + b"|web-1", hashlib.sha256).hexdigest()
        assert_eq!(
            mac(SECRET, &"0".repeat(64), "web-1"),
            "bf71bd9a06632a2875d029b74d939c7715c31b333fa734dd6fc56a5a566b35d7"
        );
    }

    #[test]
    fn any_of_the_secrets_proves_a_backend_and_nothing_else_does() {
        let secrets =
            Secrets::parse(b"the one before it\n\ncorrect horse battery staple\r\n").unwrap();
        let challenge = || Challenge::new([7; 32]);
        let nonce = challenge().nonce().to_owned();
        assert_eq!(nonce, "07".repeat(32));
        let right = mac(SECRET, &nonce, "web-1");
        let met = |answer: &str| challenge().met_by(secrets.iter(), "web-1", answer);
        assert_eq!(met(&right), [1]);
        assert_eq!(met(&right.to_uppercase()), [1]);
        assert_eq!(met(&mac(b"the one before it", &nonce, "web-1")), [0]);
        let another_nonce = Challenge::new([8; 32]).nonce().to_owned();
        let wrong = [
            mac(b"another secret entirely", &nonce, "web-1"),
            mac(SECRET, &another_nonce, "web-1"),
            mac(SECRET, &nonce, "web-2"),
            right[..62].to_owned(),
            format!("{right}00"),
            format!("+{}", &right[1..]),
            "ä".repeat(32),
            String::new(),
        ];
        for answer in wrong {
            assert!(met(&answer).is_empty(), "{answer}");
        }
    }

    #[test]
    fn secrets_that_are_missing_or_short_are_refused_with_the_cure() {
        for (text, words) in [("", "no secret"), (" \n\n", "no secret"), ("short\n", "number 1")] {
            let fault = Secrets::parse(text.as_bytes()).unwrap_err();
            assert!(fault.contains(words) && fault.contains("openssl"), "{fault}");
        }
    }

    #[test]
    fn a_secret_file_that_others_can_read_is_refused() {
        let path = std::env::temp_dir().join(format!("lb-secret-{}", std::process::id()));
        fs::write(&path, b"correct horse battery staple\n").unwrap();
        let with_mode = |mode| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            Secrets::load(&path)
        };
        for mode in [0o600, 0o400, 0o440] {
            assert_eq!(with_mode(mode).unwrap().first(), SECRET, "{mode:o}");
        }
        for mode in [0o644, 0o604, 0o660, 0o602] {
            let fault = with_mode(mode).unwrap_err();
            assert!(fault.contains("chmod 600"), "{fault}");
        }
        fs::write(&path, vec![b'x'; SECRET_FILE_BYTES_MAX as usize + 1]).unwrap();
        assert!(with_mode(0o600).unwrap_err().contains("is longer than 65536 bytes"));
        fs::remove_file(&path).unwrap();
        assert!(Secrets::load(&path).unwrap_err().contains("check that it is there"));
    }
}
