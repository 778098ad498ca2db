//! TLS between the connections of one thread and their sockets: the handshake, what is sealed before it is
//! sent, and what is opened of what came. Owns the order of these on a connection; the calls into rustls are
//! `tls::client`'s.

use std::io::{self, ErrorKind, IoSlice, Write};
use std::os::fd::AsFd;

use super::super::blocks;
use super::super::connection::{Phase, Secured, Talk, socket_of};
use super::super::handshakes::Reason;
use super::super::http2::OUTGOING_BYTES_MAX;
use super::super::message::{Content, PERIOD};
use super::super::tally::RequestFailure;
use super::super::{Load, Shape};
use super::checked::check;
use super::{Driver, SEND, tag};
use crate::ring::pool::{Buf, Chain, Pool};
use crate::ring::sys;
use crate::tls::client::{Alpn, Client, Fault};

/// The most plaintext of a record, and what a record adds to it (RFC 8446 section 5.2).
const RECORD_BYTES: usize = 16_384;
const RECORD_EXTRA_BYTES: usize = 5 + 1 + 16;

/// How many bytes a message has once it is sealed.
pub(super) fn sealed_bytes(plain: usize) -> usize {
    plain + (plain.div_ceil(RECORD_BYTES) + 1) * RECORD_EXTRA_BYTES
}

/// What a connection sends at once: a request, or a piece of its stream.
pub(super) fn sent_at_once(load: &Load) -> usize {
    let plain = match load.streams {
        None => load.request_bytes(),
        Some(streams) => streams.saturating_mul(load.request_bytes()).min(OUTGOING_BYTES_MAX),
    };
    match (&load.tls, load.shape) {
        (None, _) => plain,
        (Some(_), Shape::Bulk(_)) => sealed_bytes(PERIOD),
        (Some(_), _) => sealed_bytes(plain),
    }
}

impl Driver<'_> {
    /// A connection is open, and its handshake begins.
    pub(super) fn shake(&mut self, slot: u32) {
        let Some(terms) = &self.load.tls else { return };
        let connection = &mut self.connections[slot as usize];
        connection.phase = Phase::Shaking;
        match Client::new(terms) {
            Ok(client) => {
                let began = self.now;
                let secured = Secured { client, began, plain: 0, finishing: false };
                connection.secured = Some(Box::new(secured));
                self.receive(slot);
                self.send_sealed(slot);
            }
            Err(fault) => self.refuse(slot, fault),
        }
    }

    /// The handshake is over.
    fn shaken(&mut self, slot: u32) {
        let Some(secured) = &self.connections[slot as usize].secured else { return };
        if self.load.streams.is_some() && !secured.client.has_agreed_on(Alpn::Http2) {
            let words = || "it speaks TLS there, but not HTTP/2 (ALPN `h2`)".to_owned();
            return self.fail_handshake(slot, Reason::Protocol, words);
        }
        self.connecting -= 1;
        let handshakes = &mut self.tally.handshakes;
        if self.measuring || self.load.shape != Shape::Churn {
            handshakes.made(self.now.since(secured.began), secured.client.is_resumed());
        }
        handshakes.measured += u64::from(self.measuring);
        handshakes.agreed.get_or_insert_with(|| secured.client.agreed());
        self.connected(slot);
    }

    /// Ends a connection with which TLS cannot go on.
    fn refuse(&mut self, slot: u32, fault: Fault) {
        match self.connections[slot as usize].phase {
            Phase::Shaking => self.fail_handshake(slot, fault.kind.into(), || fault.words),
            _ => self.fault(slot, RequestFailure::Corrupt),
        }
    }

    /// Counts a handshake that has failed, and ends the connection.
    pub(super) fn fail_handshake(
        &mut self,
        slot: u32,
        reason: Reason,
        words: impl FnOnce() -> String,
    ) {
        self.tally.handshakes.failed(reason, words);
        self.count_fault(slot, RequestFailure::Tls);
    }

    /// Opens what arrived on a connection, and checks it.
    pub(super) fn open(&mut self, slot: u32, buf: &Buf) {
        let mut used = 0;
        while used < buf.len() {
            let connection = &mut self.connections[slot as usize];
            let Some(secured) = connection.secured.as_mut().filter(|_| connection.phase.is_open())
            else {
                return;
            };
            let all = &self.ring.pool().bytes(buf)[used..];
            let mut rest = all;
            let taken = secured.client.take(&mut rest);
            used += all.len() - rest.len();
            let is_shaken = connection.phase == Phase::Shaking && !secured.client.is_handshaking();
            if is_shaken && taken.is_ok() {
                self.shaken(slot);
            }
            self.check_opened(slot);
            if let Err(fault) = taken {
                return self.refuse(slot, fault);
            }
            self.send_sealed(slot);
        }
        let secured = self.connections[slot as usize].secured.as_ref();
        if secured.is_some_and(|secured| secured.client.has_ended()) {
            self.ended(slot);
        }
    }

    /// Checks all plaintext that has come.
    fn check_opened(&mut self, slot: u32) {
        loop {
            let connection = &mut self.connections[slot as usize];
            let Some(secured) = connection.secured.as_mut() else { return };
            let plain = secured.client.plaintext();
            if plain.is_empty() || connection.phase != Phase::Up {
                return;
            }
            let (count, checked) =
                (plain.len(), check(&mut connection.talk, self.load, &self.content, plain));
            secured.client.consume(count);
            self.conclude(slot, checked);
        }
    }

    /// Seals a head with `count` bytes of content from `position`, and sends it.
    pub(super) fn seal(&mut self, slot: u32, head: &[u8], position: u64, count: usize) {
        let Some(secured) = &mut self.connections[slot as usize].secured else { return };
        seal(&mut secured.client, head, &self.content, position, count);
        secured.plain += (head.len() + count) as u32;
        self.send_sealed(slot);
    }

    /// Sends what is sealed, unless a send is under way, which is followed by this.
    pub(super) fn send_sealed(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        let Some(secured) = &mut connection.secured else { return };
        if connection.sends > 0 || !connection.phase.is_open() || !secured.client.has_sealed() {
            return;
        }
        let Some(socket) = socket_of(&connection.socket) else { return };
        let (pool, to) = (self.ring.pool_mut(), &mut connection.sending);
        let mut writer = Blocks { pool, to, last: None };
        let is_short = secured.client.flush(&mut writer).is_err();
        writer.finish();
        if is_short && connection.sending.is_empty() {
            return self.starved.push(slot);
        }
        connection.sends += 1;
        let outgoing = connection.sending.outgoing();
        let tag = tag(SEND, slot, connection);
        self.ring.send(tag, socket, outgoing);
    }

    /// A send under TLS has completed. Returns how many bytes of plaintext have gone out, or `None` if more is
    /// sealed, which follows.
    pub(super) fn sealed_sent(&mut self, slot: u32) -> Option<u32> {
        let connection = &mut self.connections[slot as usize];
        let secured = connection.secured.as_mut()?;
        if secured.client.has_sealed() {
            self.send_sealed(slot);
            return None;
        }
        if secured.finishing
            && let Some(socket) = socket_of(&connection.socket)
        {
            sys::finish_writing(socket);
        }
        Some(std::mem::take(&mut secured.plain))
    }

    /// Tells the server that nothing more will come, behind what is being sent.
    pub(super) fn finish_sealed(&mut self, slot: u32) {
        if let Some(secured) = &mut self.connections[slot as usize].secured {
            secured.client.finish();
            secured.finishing = true;
            self.send_sealed(slot);
        }
    }

    /// The last words of a connection that is about to be closed: an alert, or that this is the end
    /// (close_notify). They must not stand in the midst of another send.
    pub(super) fn say_farewell(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        let Some(secured) = &mut connection.secured else { return };
        let Some(socket) = &connection.socket else { return };
        if connection.sends == 0 {
            if matches!(connection.phase, Phase::Up) && !secured.finishing {
                secured.client.finish();
            }
            // If the socket takes no more, the server will see the end without them.
            let _ = secured.client.flush(&mut sys::Outlet(socket.as_fd()));
        }
    }

    /// Whether the end of a connection's bytes may have been made by anybody on the way.
    pub(super) fn is_cut_off(&self, slot: u32) -> bool {
        let connection = &self.connections[slot as usize];
        let speaks_http = matches!(&connection.talk, Talk::Web(_) | Talk::Http2(_));
        let is_idle = speaks_http && !connection.waiting();
        let secured = connection.secured.as_ref();
        !is_idle && secured.is_some_and(|secured| !secured.client.has_ended())
    }
}

fn seal(client: &mut Client, head: &[u8], content: &Content, position: u64, count: usize) {
    let part = content.from(position, count);
    client.seal(&[IoSlice::new(head), IoSlice::new(part)]);
    let mut at = part.len();
    while at < count {
        let part = content.from(position + at as u64, count - at);
        client.seal(&[IoSlice::new(part)]);
        at += part.len();
    }
}

/// A chain as something to write to, in new blocks.
struct Blocks<'a> {
    pool: &'a mut Pool,
    to: &'a mut Chain,
    last: Option<Buf>,
}

impl Blocks<'_> {
    fn finish(mut self) {
        if let Some(buf) = self.last.take() {
            blocks::push_or_return(self.pool, self.to, buf);
        }
    }
}

impl Write for Blocks<'_> {
    /// Takes a part; fails once there is no block.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            if self.last.is_none() {
                let class = blocks::class_for(bytes.len());
                self.last = self.pool.take(class);
            }
            let Some(last) = &mut self.last else { return Err(ErrorKind::WouldBlock.into()) };
            let written = self.pool.append(last, bytes);
            if written > 0 || bytes.is_empty() {
                return Ok(written);
            }
            if let Some(full) = self.last.take() {
                self.pool.push(self.to, full);
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
