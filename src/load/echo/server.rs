//! Echo backends on a ring: accept, receive, send, close, and backpressure on a peer that does not
//! read. What they say is up to [`Guest`].

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::SyncSender;
use std::{io, net};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use socket2::SockRef;

use super::guest::Guest;
use crate::cluster::Protocol;
use crate::load::blocks;
use crate::load::message::{Content, PERIOD};
use crate::ring::pool::{Chain, Class, GATHER_MAX, LARGE_BYTES};
use crate::ring::{Done, Ring, RingSettings, Tag, probe, sys};

const ACCEPT: u8 = 1;
const STOP: u8 = 2;
const RECEIVE: u8 = 3;
const SEND: u8 = 4;

/// Blocks for all connections together. A connection that finds none waits for the next turn.
const SETTINGS: RingSettings =
    RingSettings { small_blocks: 16 * 1024, large_blocks: 4 * 1024, datagram_blocks: 0 };
/// A connection with this many bytes to send is not received from.
const UNSENT_MAX: usize = 4 * LARGE_BYTES;
/// The bytes after which a multishot receive ends, so that what it overshoots is bounded.
const BURST_BYTES: u32 = LARGE_BYTES as u32;

struct Connection {
    socket: Option<OwnedFd>,
    generation: u32,
    backend: u32,
    guest: Guest,
    /// Waiting to be sent, and being sent.
    unsent: Chain,
    sending: Chain,
    send_busy: bool,
    receiving: bool,
    next_class: Class,
    finished: bool,
    doomed: bool,
}

struct Server {
    ring: Ring,
    protocol: Protocol,
    listeners: Vec<(OwnedFd, u32)>,
    connections: Vec<Connection>,
    unused: Vec<u32>,
    /// Connections whose receive found no block.
    starved: Vec<u32>,
    content: Content,
    /// What every source sends, over and over.
    flood: Chain,
    stopped: bool,
}

/// Serves until `stop` is written. Reports through `ready` whether it could begin.
pub fn serve(
    protocol: Protocol,
    listeners: Vec<OwnedFd>,
    stop: &EventFd,
    ready: &SyncSender<io::Result<()>>,
) {
    let mut server = match Server::new(protocol, listeners) {
        Ok(server) => {
            let _ = ready.send(Ok(()));
            server
        }
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    server.ring.watch(Tag { kind: STOP, generation: 0, slot: 0 }, stop.as_fd());
    server.run();
}

impl Server {
    fn new(protocol: Protocol, listeners: Vec<OwnedFd>) -> io::Result<Server> {
        let mut ring = probe::patiently(|| Ring::new(SETTINGS))?;
        let content = Content::new();
        let flood = blocks::content_chain(ring.pool_mut(), &content, PERIOD)
            .expect("a new pool holds a period of content");
        let mut numbered = Vec::new();
        for (place, listener) in listeners.into_iter().enumerate() {
            let port =
                sys::local(listener.as_fd()).map_or(0, |address: net::SocketAddr| address.port());
            let tag = Tag { kind: ACCEPT, generation: 0, slot: place as u32 };
            ring.accept_many(tag, listener.as_fd());
            numbered.push((listener, u32::from(port)));
        }
        Ok(Server {
            ring,
            protocol,
            listeners: numbered,
            connections: Vec::new(),
            unused: Vec::new(),
            starved: Vec::new(),
            content,
            flood,
            stopped: false,
        })
    }

    fn run(&mut self) {
        let mut done = Vec::with_capacity(crate::ring::REAP_MAX);
        while !self.stopped {
            if let Err(error) = self.ring.enter(None) {
                tracing::error!("the echo backends' ring failed: {error}");
                return;
            }
            loop {
                let more = self.ring.reap(&mut done);
                for done in done.drain(..) {
                    self.completed(done);
                }
                if !more {
                    break;
                }
            }
            for slot in std::mem::take(&mut self.starved) {
                self.advance(slot);
            }
        }
    }

    fn completed(&mut self, done: Done) {
        match done.tag.kind {
            ACCEPT => self.accepted(done),
            STOP => self.stopped = true,
            kind => {
                let slot = done.tag.slot;
                let current = self.connections[slot as usize].generation;
                assert_eq!(
                    done.tag.generation, current,
                    "a slot is reused when nothing is in flight"
                );
                if kind == RECEIVE {
                    self.received(slot, done)
                } else {
                    self.sent(slot, done)
                }
                self.advance(slot);
            }
        }
    }

    fn accepted(&mut self, done: Done) {
        let place = done.tag.slot as usize;
        if !done.more && !self.stopped {
            self.ring.accept_many(done.tag, self.listeners[place].0.as_fd());
        }
        let Some(socket) = done.accepted else { return };
        let slot = self.unused.pop().unwrap_or_else(|| {
            self.connections.push(Connection::unused());
            (self.connections.len() - 1) as u32
        });
        let connection = &mut self.connections[slot as usize];
        *connection = Connection {
            socket: Some(socket),
            backend: self.listeners[place].1,
            guest: match self.protocol {
                Protocol::Api => Guest::Web(Box::default()),
                _ => Guest::New,
            },
            generation: connection.generation,
            ..Connection::unused()
        };
        self.advance(slot);
    }

    fn received(&mut self, slot: u32, done: Done) {
        let connection = &mut self.connections[slot as usize];
        connection.receiving = done.more;
        if let Some(buf) = done.buf {
            connection.next_class = blocks::class_after(buf.len());
            let pool = self.ring.pool_mut();
            if connection.doomed || buf.is_empty() {
                pool.give_back(buf);
            } else {
                let (guest, unsent) = (&mut connection.guest, &mut connection.unsent);
                match guest.received(buf, connection.backend, &self.content, pool, unsent) {
                    Ok(last) => connection.finished |= last,
                    Err(_) => connection.doom(),
                }
            }
        }
        match done.result {
            Ok(0) if !connection.finished => {
                connection.finished = true;
                let unsent = &mut connection.unsent;
                if connection.guest.finish(self.ring.pool_mut(), unsent).is_err() {
                    connection.doom();
                }
            }
            Ok(_) => {}
            Err(Errno::ENOBUFS) => self.starved.push(slot),
            Err(_) => connection.doom(),
        }
    }

    fn sent(&mut self, slot: u32, done: Done) {
        let connection = &mut self.connections[slot as usize];
        connection.send_busy = false;
        self.ring.pool_mut().give_back_chain(connection.sending.take());
        if done.result.is_err() {
            connection.doom();
        }
    }

    /// Starts what the connection is ready for: the next send, the next receive, or its end.
    fn advance(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        let Some(socket) = &connection.socket else { return };
        let tag = |kind| Tag { kind, generation: connection.generation, slot };
        if !connection.doomed && !connection.send_busy {
            if !connection.unsent.is_empty() {
                connection.sending = self.ring.pool_mut().split(&mut connection.unsent, GATHER_MAX);
                self.ring.send(tag(SEND), socket.as_fd(), connection.sending.outgoing());
                connection.send_busy = true;
            } else if matches!(connection.guest, Guest::Source) {
                self.ring.send(tag(SEND), socket.as_fd(), self.flood.outgoing());
                connection.send_busy = true;
            } else if connection.finished {
                // A receive in flight ends with the shutdown.
                connection.doomed = true;
                let _ = SockRef::from(socket).shutdown(net::Shutdown::Both);
            }
        }
        let room = connection.unsent.bytes() + connection.sending.bytes() < UNSENT_MAX;
        if !connection.doomed && !connection.receiving && !connection.finished && room {
            match connection.next_class {
                Class::Small => self.ring.receive_many(tag(RECEIVE), socket.as_fd(), BURST_BYTES),
                Class::Large | Class::Datagram => {
                    self.ring.receive(tag(RECEIVE), socket.as_fd(), Class::Large, true);
                }
            }
            connection.receiving = true;
        }
        if connection.doomed && !connection.receiving && !connection.send_busy {
            self.close(slot);
        }
    }

    fn close(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        if let Some(socket) = connection.socket.take() {
            self.ring.close(socket);
        }
        self.ring.pool_mut().give_back_chain(connection.unsent.take());
        connection.generation = (connection.generation + 1) & 0x7f_ffff;
        self.unused.push(slot);
    }
}

impl Connection {
    fn unused() -> Connection {
        Connection {
            socket: None,
            generation: 0,
            backend: 0,
            guest: Guest::New,
            unsent: Chain::EMPTY,
            sending: Chain::EMPTY,
            send_busy: false,
            receiving: false,
            next_class: Class::Small,
            finished: false,
            doomed: false,
        }
    }

    /// Ends the connection; what is in flight on it comes back with an error.
    fn doom(&mut self) {
        self.doomed = true;
        if let Some(socket) = &self.socket {
            let _ = SockRef::from(&socket).shutdown(net::Shutdown::Both);
        }
    }
}
