//! One connection of the load with its socket: its state and what is in flight on it. Owns the
//! socket and the chain being sent; the driver decides what happens next.
//!
//! ```text
//!   Down --connect--> Connecting --connected--> Up --fault, end of a short session--> Closing
//!    ^                  |     |                  ^                                      |
//!    |                  |     +---> Shaking -----+  under TLS                           |
//!    +----- refused ----+--------------------- nothing in flight, closed ---------------+
//! ```

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, SockRef, Socket, Type};

use super::client::{Exchange, Flow, Stream};
use super::http2::Http2;
use super::tally::{Home, RequestFailure};
use super::web::Web;
use crate::base::time::Now;
use crate::ring::pool::Chain;
use crate::tls::client::Client;

/// The state of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Down,
    Connecting,
    /// In its TLS handshake.
    Shaking,
    Up,
    Closing,
}

impl Phase {
    /// Whether something may be sent and received.
    pub fn is_open(self) -> bool {
        matches!(self, Phase::Shaking | Phase::Up)
    }
}

/// What lies between a connection and its socket.
pub struct Secured {
    pub client: Client,
    /// When its ClientHello was made.
    pub began: Now,
    /// Bytes of plaintext in what is being sent.
    pub plain: u32,
    /// Nothing follows what is being sent.
    pub finishing: bool,
}

/// What is spoken on a connection.
pub enum Talk {
    Exchange(Exchange),
    Flow(Flow),
    Stream(Stream),
    Web(Web),
    Http2(Box<Http2>),
}

pub struct Connection {
    pub socket: Option<OwnedFd>,
    /// Grows with every new socket, so that completions of an old one are recognised.
    pub generation: u32,
    pub phase: Phase,
    pub talk: Talk,
    pub secured: Option<Box<Secured>>,
    pub home: Home,
    /// The request being sent, on streams.
    pub sending: Chain,
    /// How many sends are in flight, and whether a receive and a connect are.
    pub sends: u32,
    pub receiving: bool,
    pub linking: bool,
    /// Is in the list of idle connections for planned requests.
    pub queued: bool,
    /// When the request awaiting its reply was sent or due, and when it was actually sent.
    pub since: Now,
    pub sent: Now,
    pub free_since: Now,
    /// When a connection that failed may be opened again.
    pub rest_until: Now,
}

impl Connection {
    pub fn new(talk: Talk) -> Connection {
        Connection {
            socket: None,
            generation: 0,
            phase: Phase::Down,
            talk,
            secured: None,
            home: Home::default(),
            sending: Chain::EMPTY,
            sends: 0,
            receiving: false,
            linking: false,
            queued: false,
            since: Now::default(),
            sent: Now::default(),
            free_since: Now::default(),
            rest_until: Now::default(),
        }
    }

    /// Whether any operation is in flight on the socket.
    pub fn busy(&self) -> bool {
        self.receiving || self.sends > 0 || self.linking
    }

    /// Whether a reply is awaited.
    pub fn waiting(&self) -> bool {
        self.phase == Phase::Up
            && match &self.talk {
                Talk::Exchange(exchange) => exchange.waiting(),
                Talk::Flow(flow) => flow.unanswered() > 0,
                Talk::Stream(_) => true,
                Talk::Web(web) => web.waiting(),
                Talk::Http2(http2) => http2.in_flight() > 0,
            }
    }

    /// How many requests are lost with the connection, as far as they are known one by one.
    pub fn unanswered(&self) -> u64 {
        match &self.talk {
            Talk::Http2(http2) if self.phase == Phase::Up => http2.in_flight() as u64,
            _ => u64::from(self.waiting()),
        }
    }

    /// Whether it makes one request at a time and awaits nothing but its reply.
    pub fn asks_singly(&self) -> bool {
        matches!(self.talk, Talk::Exchange(_) | Talk::Web(_))
    }

    /// Makes what is in flight come back.
    pub fn interrupt(&self) {
        if let Some(socket) = &self.socket {
            let _ = SockRef::from(socket).shutdown(Shutdown::Both);
        }
    }
}

/// A datagram socket that talks to one address only. With `segment`, long sends are cut into
/// datagrams of that many bytes, and what is received may be several of them (udp(7), UDP_SEGMENT
/// and UDP_GRO).
pub fn datagram_socket(to: SocketAddr, segment: Option<usize>) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    widen(&socket);
    if let Some(bytes) = segment {
        setsockopt(&socket, sockopt::UdpGsoSegment, &(bytes as i32))?;
        setsockopt(&socket, sockopt::UdpGroSegment, &true)?;
    }
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// How many bytes a datagram socket holds before it drops some: a burst on every flow of a test.
const DATAGRAM_BUFFER_BYTES: usize = 4 << 20;

/// Asks for long queues, or as long as the host allows to a process without the privilege to exceed
/// its limit.
pub fn widen<S: std::os::fd::AsFd>(socket: &S) {
    let bytes = DATAGRAM_BUFFER_BYTES;
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &bytes);
    }
    if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &bytes);
    }
}

/// What an error on a connected socket means.
pub fn fault_of(errno: Errno) -> RequestFailure {
    match errno {
        Errno::ECONNREFUSED => RequestFailure::Refused,
        Errno::ECONNRESET | Errno::EPIPE => RequestFailure::Reset,
        Errno::ETIMEDOUT | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EADDRNOTAVAIL => {
            RequestFailure::Unreachable
        }
        _ => RequestFailure::Closed,
    }
}

/// Borrows the socket of a connection that has one.
pub fn socket_of(socket: &Option<OwnedFd>) -> Option<BorrowedFd<'_>> {
    use std::os::fd::AsFd;
    socket.as_ref().map(AsFd::as_fd)
}
