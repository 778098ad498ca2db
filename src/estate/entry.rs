//! What the books know about a session, and addresses, as records. Owns their form; a backend is named by its
//! id and its row, which stay with it from process to process, and a service by its name, because its number
//! may be another's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Span;
use crate::base::time::Now;

/// An address, or none.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Address {
    /// That of an IPv4 host in its first four bytes.
    ip: [u8; 16],
    scope: U32,
    port: U16,
    /// 4 or 6; zero: there is no address.
    family: u8,
    unused: u8,
}

impl Address {
    pub const NONE: Address =
        Address { ip: [0; 16], scope: U32::ZERO, port: U16::ZERO, family: 0, unused: 0 };

    /// The address, if there is one.
    ///
    /// # Errors
    /// It is none of a family that is known.
    pub fn get(&self) -> Result<Option<SocketAddr>, String> {
        let port = self.port.get();
        match self.family {
            0 => Ok(None),
            4 => {
                let [a, b, c, d, ..] = self.ip;
                Ok(Some((Ipv4Addr::new(a, b, c, d), port).into()))
            }
            6 => {
                let ip = Ipv6Addr::from(self.ip);
                Ok(Some(SocketAddrV6::new(ip, port, 0, self.scope.get()).into()))
            }
            family => Err(format!("an address is of family {family}")),
        }
    }

    /// The same where there must be one.
    ///
    /// # Errors
    /// There is none.
    pub fn given(&self) -> Result<SocketAddr, String> {
        self.get()?.ok_or_else(|| "an address is missing".into())
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        let (family, scope) = match address {
            SocketAddr::V4(_) => (4, 0),
            SocketAddr::V6(v6) => (6, v6.scope_id()),
        };
        Address {
            port: U16::new(address.port()),
            scope: U32::new(scope),
            ..ip(address.ip(), family)
        }
    }
}

impl From<Option<SocketAddr>> for Address {
    fn from(address: Option<SocketAddr>) -> Address {
        address.map_or(Address::NONE, Address::from)
    }
}

fn ip(ip: IpAddr, family: u8) -> Address {
    let mut bytes = [0; 16];
    match ip {
        IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes = v6.octets(),
    }
    Address { ip: bytes, family, ..Address::NONE }
}

/// A session in the books.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct EntryRecord {
    /// The name of its service.
    pub service: Span,
    pub client: Address,
    /// Its backend, as it was chosen.
    pub backend: Address,
    /// The same; of an API user on no backend, the last that it was on.
    pub backend_id: U32,
    /// The backend's row of the counters.
    pub slot: U16,
    /// Bits of [`EntryRecord::PROXY`].
    pub flags: u8,
    /// The worker, the place and the generation that make its name.
    pub worker: u8,
    pub place: U32,
    pub generation: U32,
    /// In nanoseconds, like all times.
    pub started: U64,
    /// When bytes last moved.
    pub active: U64,
    pub bytes_up: U64,
    pub bytes_down: U64,
}

impl EntryRecord {
    /// A connection to its backend begins with a PROXY header.
    pub const PROXY: u8 = 1;
    /// It has not been on a backend.
    pub const NO_BACKEND: U32 = U32::MAX_VALUE;
}

/// Bytes that one session can have carried; no session has ever had more.
pub const CARRIED_MAX: u64 = 1 << 62;

/// How far the places for sessions were used: nobody's name may be given to another.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct PlacesRecord {
    /// Places that were ever used.
    pub places: U32,
    /// The highest generation of any of them.
    pub generation: U32,
}

/// A moment as it is written.
pub fn nanos(at: Now) -> U64 {
    U64::new(at.nanos())
}

/// A moment as it was written.
pub fn moment(at: U64) -> Now {
    Now::from_nanos(at.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_as_it_was_written() {
        for text in ["192.0.2.1:80", "[2001:db8::1]:443", "[::ffff:192.0.2.1]:80", "[fe80::1%3]:9"]
        {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(Address::from(address).given(), Ok(address), "{text}");
        }
        assert_eq!(Address::from(None).get(), Ok(None));
        assert!(Address::NONE.given().unwrap_err().contains("missing"));
    }

    #[test]
    fn an_address_of_another_family_is_refused() {
        let address = Address { family: 5, ..Address::NONE };
        assert_eq!(address.get().unwrap_err(), "an address is of family 5");
    }
}
