//! Backends of either protocol. Those of HTTP/1.1 are those of `http_sim`; those of HTTP/2 are made of what serves a
//! connection, and of what happens to each request on it.

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::server::{Builder, Connection, Handshake, SendResponse};
use h2::{Reason, RecvStream};
use http::Request;

pub use crate::http1::Seen;

use crate::dice::Dice;
use crate::pipe::{Mouth, Pipe, pipe};
use crate::served::Served;
use crate::services::host_at;
use crate::weather::Weather;
use crate::wire::{End, Wire};
use crate::{http1, served};

pub enum Peer {
    Http1(Box<http1::Peer>),
    Http2(Box<Peer2>),
}

impl Peer {
    /// A connection to the backend at this address.
    pub fn at(weather: &Weather, to: SocketAddr) -> Peer {
        match weather.http2 >> (to.port() - 9000) & 1 {
            0 => Peer::Http1(Box::new(http1::Peer::at(weather, to))),
            _ => Peer::Http2(Box::new(Peer2::new(host_at(weather, to)))),
        }
    }

    /// Does some of what it may do now; returns whether it did anything.
    pub fn step(&mut self, wire: &mut Wire, seen: &mut Seen, calm: bool, dice: &mut Dice) -> bool {
        match self {
            Peer::Http1(peer) => peer.step(wire, seen, calm, dice),
            Peer::Http2(peer) => peer.step(wire, seen, calm, dice),
        }
    }

    pub fn was_heard(&self, wire: &Wire, seen: &mut Seen) {
        if let Peer::Http1(peer) = self {
            peer.was_heard(wire, seen);
        }
    }

    /// The one user whose answer is not complete: there may be many.
    pub fn answers(&self) -> Option<usize> {
        None
    }
}

enum Link {
    /// Its settings are drawn when it is first called.
    New,
    Handshake(Box<Handshake<Pipe, Bytes>>),
    Open(Box<Connection<Pipe, Bytes>>),
    Over,
}

/// A connection whose backend speaks HTTP/2.
pub struct Peer2 {
    host: &'static str,
    link: Link,
    pipe: Option<Pipe>,
    mouth: Mouth,
    served: Vec<Served>,
    /// It neither reads nor writes any more.
    is_stuck: bool,
    is_leaving: bool,
}

impl Peer2 {
    fn new(host: &'static str) -> Peer2 {
        let (pipe, mouth) = pipe();
        let (link, pipe, served) = (Link::New, Some(pipe), Vec::new());
        Peer2 { host, link, pipe, mouth, served, is_stuck: false, is_leaving: false }
    }

    fn begin(&mut self, calm: bool, dice: &mut Dice) {
        let Some(pipe) = self.pipe.take() else { return };
        // Requests come before its settings are agreed on. In calm weather these narrow nothing: streams beyond a
        // limit are refused, and `h2` forgets to open a window that was narrowed while it was in use.
        let (streams, window) = match calm {
            true => (dice.pick(&[100, 1000]), dice.pick(&[65_535, 1 << 20])),
            false => (dice.pick(&[1, 3, 100]), dice.pick(&[700, 16_000, 65_535, 1 << 20])),
        };
        let handshake = Builder::new()
            .initial_window_size(window)
            .initial_connection_window_size(dice.pick(&[65_535, 1 << 20]))
            .max_frame_size(dice.pick(&[1 << 14, 1 << 20]))
            .max_concurrent_streams(streams)
            .handshake(pipe);
        self.link = Link::Handshake(Box::new(handshake));
    }

    fn step(&mut self, wire: &mut Wire, seen: &mut Seen, calm: bool, dice: &mut Dice) -> bool {
        if wire.left || self.is_stuck {
            return false;
        }
        self.begin(calm, dice);
        let mut any = self.mouth.read(wire, dice) | self.mouth.write(wire, dice);
        self.poll(seen, calm, dice);
        let cx = &mut Context::from_waker(Waker::noop());
        for served in &mut self.served {
            any |= served.step(cx, dice);
        }
        self.served.retain(|served| !served.is_over());
        self.poll(seen, calm, dice);
        if dice.one_in(if calm { 4_000 } else { 800 }) {
            any |= self.whim(wire, calm, dice);
        }
        let is_over = matches!(self.link, Link::Over) && self.mouth.is_flushed();
        if !wire.left && (is_over || wire.outward.is_empty() && wire.outward_end == End::Reset) {
            self.served.clear();
            match wire.outward_end {
                End::Open if calm => wire.finish(),
                End::Open => wire.leave(dice),
                _ => (wire.finish(), wire.left = true).1,
            }
            self.is_stuck = true;
            return true;
        }
        any
    }

    /// Something that happens to a connection.
    fn whim(&mut self, wire: &mut Wire, calm: bool, dice: &mut Dice) -> bool {
        let Link::Open(connection) = &mut self.link else { return false };
        let kind = if calm { dice.below(2) } else { dice.below(6) };
        match kind {
            0 if self.is_leaving => return false,
            0 => {
                self.is_leaving = true;
                connection.graceful_shutdown();
            }
            1 => self.mouth.say(&[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
            2 => connection.abrupt_shutdown(dice.pick(&[Reason::NO_ERROR, Reason::INTERNAL_ERROR])),
            3 => wire.reset(dice),
            4 => wire.leave(dice),
            _ => self.is_stuck = true,
        }
        true
    }

    fn poll(&mut self, seen: &mut Seen, calm: bool, dice: &mut Dice) {
        let cx = &mut Context::from_waker(Waker::noop());
        if let Link::Handshake(handshake) = &mut self.link {
            match Pin::new(&mut **handshake).poll(cx) {
                Poll::Pending => return,
                Poll::Ready(Ok(connection)) => self.link = Link::Open(Box::new(connection)),
                Poll::Ready(Err(_)) => self.link = Link::Over,
            }
        }
        while let Link::Open(connection) = &mut self.link {
            match connection.poll_accept(cx) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok(come))) => self.take(come, seen, calm, dice),
                Poll::Ready(Some(Err(_)) | None) => self.link = Link::Over,
            }
        }
    }

    fn take(
        &mut self,
        (request, respond): (Request<RecvStream>, SendResponse<Bytes>),
        seen: &mut Seen,
        calm: bool,
        dice: &mut Dice,
    ) {
        let trouble = match calm || !dice.one_in(4) {
            true => served::Trouble::None,
            false => served::Trouble::random(dice),
        };
        self.served.push(Served::new(self.host, request, respond, trouble, seen, dice));
    }
}
