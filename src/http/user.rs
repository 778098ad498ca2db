//! What backends are told of a user whom they cannot see: its address, and how it speaks. Owns the forms in
//! which that is written; which fields it stands in is up to `write`.

use std::fmt::Write;
use std::net::IpAddr;

/// The address of a user in the forms that backends are told, and how it speaks. Made once per connection.
#[derive(Clone, Copy, Debug)]
pub struct User {
    /// Fits an IPv6 address of 39 characters in brackets and quotes.
    text: [u8; 48],
    length: u8,
    /// The range of `text` without quotes and brackets.
    plain: (u8, u8),
    trusted: bool,
    is_tls: bool,
}

impl User {
    /// `trusted`: the peer is a proxy, and we believe what it says about the user. `is_tls`: it has come by
    /// HTTPS.
    pub fn new(address: IpAddr, trusted: bool, is_tls: bool) -> User {
        let address = address.to_canonical();
        let mut written = String::with_capacity(48);
        let around = match address {
            IpAddr::V4(_) => ("", ""),
            IpAddr::V6(_) => ("\"[", "]\""),
        };
        let _ = write!(written, "{}{address}{}", around.0, around.1);
        let mut text = [0; 48];
        text[..written.len()].copy_from_slice(written.as_bytes());
        let end = written.len() - around.1.len();
        User {
            text,
            length: written.len() as u8,
            plain: (around.0.len() as u8, end as u8),
            trusted,
            is_tls,
        }
    }

    /// As in `X-Forwarded-Proto`.
    pub(super) fn scheme(&self) -> &'static [u8] {
        if self.is_tls { b"https" } else { b"http" }
    }

    /// Whether the peer is a proxy that we believe.
    pub fn trusted(&self) -> bool {
        self.trusted
    }

    /// Its address as it is written everywhere else.
    pub(super) fn plain(&self) -> &[u8] {
        &self.text[usize::from(self.plain.0)..usize::from(self.plain.1)]
    }

    /// The form used in `Forwarded` (RFC 7239 6).
    pub(super) fn node(&self) -> &[u8] {
        &self.text[..usize::from(self.length)]
    }
}
