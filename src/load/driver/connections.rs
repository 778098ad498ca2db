//! The connections of one thread: opened, answered, ended. Owns when a connection may be closed:
//! not before everything in flight on it has come back.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;

use super::super::Shape;
use super::super::connection::{self, Phase, Talk, socket_of};
use super::super::handshakes::Reason;
use super::super::tally::RequestFailure;
use super::{BURST_BYTES, CONNECT, CONNECTING_MAX, Driver, RECEIVE, REST, tag, talk};
use crate::base::time::Now;
use crate::cluster::Protocol;
use crate::ring::pool::Class;
use crate::ring::sys;

impl Driver<'_> {
    /// Opens what is to be opened. Fails for lack of descriptors, which is no fault of the service.
    pub(super) fn connect_some(&mut self) -> io::Result<()> {
        let most = if self.load.shape == Shape::Churn { usize::MAX } else { CONNECTING_MAX };
        for _ in 0..self.to_connect.len() {
            if self.connecting >= most {
                return Ok(());
            }
            let Some(slot) = self.to_connect.pop_front() else { return Ok(()) };
            if self.connections[slot as usize].rest_until > self.now {
                self.to_connect.push_back(slot);
                continue;
            }
            self.try_to_connect(slot)?;
        }
        Ok(())
    }

    fn try_to_connect(&mut self, slot: u32) -> io::Result<()> {
        if let Err(error) = self.connect(slot) {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            if matches!(errno, Errno::EMFILE | Errno::ENFILE) {
                return Err(error);
            }
            self.failed_to_connect(slot, errno);
        }
        Ok(())
    }

    /// Opens a short connection whose request is due.
    pub(super) fn open_for(&mut self, slot: u32, due: Now) -> io::Result<()> {
        self.try_to_connect(slot)?;
        self.connections[slot as usize].since = due;
        Ok(())
    }

    pub(super) fn connect(&mut self, slot: u32) -> io::Result<()> {
        let connection = &mut self.connections[slot as usize];
        connection.talk = match std::mem::replace(&mut connection.talk, talk(self.load, 0)) {
            Talk::Stream(stream) => Talk::Stream(stream.anew()),
            Talk::Exchange(exchange) => Talk::Exchange(exchange.anew()),
            Talk::Flow(flow) => Talk::Flow(flow),
            Talk::Web(web) => Talk::Web(web.anew()),
            Talk::Http2(http2) => Talk::Http2(Box::new(http2.anew())),
        };
        (connection.since, connection.sent) = (self.now, self.now);
        if self.load.protocol == Protocol::Udp {
            connection.socket = Some(connection::datagram_socket(
                self.load.to,
                self.load.gso.then_some(self.load.size),
            )?);
            self.connected(slot);
            return Ok(());
        }
        let socket = sys::stream(self.load.to)?;
        self.ring.connect(tag(CONNECT, slot, connection), socket.as_fd(), self.load.to);
        connection.socket = Some(socket);
        connection.phase = Phase::Connecting;
        connection.linking = true;
        self.connecting += 1;
        Ok(())
    }

    pub(super) fn failed_to_connect(&mut self, slot: u32, errno: Errno) {
        self.unreachable = self.unreachable.or(Some(errno));
        self.fault(slot, connection::fault_of(errno));
    }

    pub(super) fn connected(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        connection.phase = Phase::Up;
        if let Talk::Http2(http2) = &mut connection.talk {
            http2.open();
        }
        self.receive(slot);
        if let Talk::Stream(stream) = &self.connections[slot as usize].talk {
            let head = stream.opening();
            self.send_head(slot, head);
        } else {
            self.next(slot);
        }
    }

    pub(super) fn receive(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        let Some(socket) = socket_of(&connection.socket) else { return };
        let is_full = matches!(&connection.talk, Talk::Http2(http2) if http2.is_full());
        if connection.receiving || is_full || !connection.phase.is_open() {
            return;
        }
        connection.receiving = true;
        let tag = tag(RECEIVE, slot, connection);
        let class = if self.large_replies { Class::Large } else { Class::Small };
        match class {
            Class::Large | Class::Datagram => self.ring.receive(tag, socket, Class::Large, true),
            Class::Small if self.load.shape == Shape::Churn => {
                self.ring.receive(tag, socket, Class::Small, true);
            }
            Class::Small => self.ring.receive_many(tag, socket, BURST_BYTES),
        }
    }

    pub(super) fn connect_done(&mut self, slot: u32, result: Result<u32, Errno>) {
        let connection = &mut self.connections[slot as usize];
        connection.linking = false;
        match result {
            _ if connection.phase == Phase::Closing => self.connecting -= 1,
            Ok(_) if self.load.tls.is_some() => self.shake(slot),
            Ok(_) => {
                self.connecting -= 1;
                self.connected(slot);
            }
            Err(errno) => {
                self.connecting -= 1;
                connection.phase = Phase::Up;
                self.failed_to_connect(slot, errno);
            }
        }
    }

    /// Counts a fault and ends the connection.
    pub(super) fn fault(&mut self, slot: u32, fault: RequestFailure) {
        if self.connections[slot as usize].phase == Phase::Shaking {
            let reason = Reason::from(fault);
            return self.fail_handshake(slot, reason, || reason.words().to_owned());
        }
        self.count_fault(slot, fault);
    }

    pub(super) fn count_fault(&mut self, slot: u32, fault: RequestFailure) {
        let connection = &mut self.connections[slot as usize];
        if connection.phase != Phase::Closing {
            self.tally.faults[fault as usize] += connection.unanswered().max(1);
            connection.rest_until = self.now.plus(REST);
        }
        self.end(slot);
    }

    /// Ends a connection; it is opened again once nothing is in flight on it.
    pub(super) fn end(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        if connection.phase == Phase::Closing {
            return;
        }
        self.say_farewell(slot);
        let connection = &mut self.connections[slot as usize];
        if connection.phase == Phase::Shaking {
            self.connecting -= 1;
        }
        connection.phase = Phase::Closing;
        if connection.busy() {
            connection.interrupt();
        }
        self.close_if_quiet(slot);
    }

    pub(super) fn close_if_quiet(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        if connection.phase != Phase::Closing || connection.busy() {
            return;
        }
        connection.secured = None;
        if let Some(socket) = connection.socket.take() {
            self.ring.close(socket);
        }
        self.ring.pool_mut().give_back_chain(connection.sending.take());
        connection.generation = (connection.generation + 1) & 0x7f_ffff;
        connection.phase = Phase::Down;
        connection.home.end(&mut self.tally);
        if self.load.shape == Shape::Churn && self.plan.is_some() {
            self.await_plan(slot);
        } else if self.asking || self.start == Now::default() {
            self.to_connect.push_back(slot);
        }
    }

    /// Winds a connection down when the run ends: a stream is finished, a short connection left
    /// alone.
    pub(super) fn wind_down(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        let Talk::Stream(stream) = &mut connection.talk else { return };
        if !stream.sends() {
            self.end(slot);
        } else if connection.sends == 0 && connection.phase == Phase::Up {
            stream.finish();
            if connection.secured.is_some() {
                self.finish_sealed(slot);
            } else if let Some(socket) = socket_of(&connection.socket) {
                sys::finish_writing(socket);
            }
        }
    }
}
