//! TCP users who go on in another process: their sockets and pipes, by place in the estate. Owns the way from a
//! session's record to its descriptors and back; what else a record says is `sessions`'s.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::TcpDriver;
use crate::cluster::Protocol;
use crate::estate::tcp::{FlowRecord, NO_SOCKET, SessionRecord};
use crate::estate::{Parcel, Unclaimed};
use crate::proxy::Side;
use crate::ring::pipe::Pipe;
use crate::worker::books::estate::{Named, Names};
use crate::worker::driver::Turn;
use crate::worker::slots::Key;
use crate::worker::stream_driver::StreamDriver;
use crate::worker::streams::claim;
use crate::worker::tcp::sessions::Seat;

impl TcpDriver {
    /// Describes the sessions that could go on elsewhere, and remembers which these are.
    pub(super) fn describe_all(&mut self, parcel: &mut Parcel<RawFd>, turn: &mut Turn<'_>) {
        let streams = &self.streams;
        self.described = self.sessions.movable(|key| streams.is_apart(key));
        let mut names = Names::default();
        let TcpDriver { sessions, commands, described, announced, .. } = self;
        let mut records = Vec::with_capacity(described.len());
        described.retain(|key| {
            let record = sessions.describe(*key, &mut names, parcel, &turn.cx(commands));
            let ahead = announced.number(*key).into();
            records.extend(record.map(|record| SessionRecord { ahead, ..record }));
            record.is_some()
        });
        for (key, mut record) in self.described.iter().copied().zip(records) {
            self.add_descriptors(key, &mut record, parcel);
            parcel.push(&record);
        }
    }

    fn add_descriptors(&self, key: Key, record: &mut SessionRecord, parcel: &mut Parcel<RawFd>) {
        let relays = record.flags & SessionRecord::RELAYS != 0;
        let has_come = record.ahead != 0;
        for side in Side::BOTH {
            let end = self.streams.socket((key, side));
            // What is left of an attempt to connect is of no use.
            if let Some(socket) = end.filter(|_| !has_come && (relays || side == Side::Client)) {
                record.sockets[side as usize] = parcel.add_socket(socket.as_raw_fd());
            }
            let flow = &mut record.relay.flows[side as usize];
            let pipe = self.splices.pipe((key, side)).filter(|_| flow.piped.get() > 0);
            if let Some(pipe) = pipe {
                flow.pipe = pipe.ends().map(|end| parcel.add_socket(end.as_raw_fd()));
            }
        }
    }

    /// Takes up all sessions of a worker's parcel, or none.
    pub(super) fn inherit_all(
        &mut self,
        worker: u8,
        mut parcel: Parcel<OwnedFd>,
        turn: &mut Turn<'_>,
    ) -> Result<(), String> {
        let mut descriptors = Unclaimed::new(std::mem::take(&mut parcel.sockets));
        let (mut services, mut keys) =
            (Named::new(Protocol::Tcp), Vec::with_capacity(parcel.len()));
        for record in parcel.records::<SessionRecord>() {
            let context = (&mut services, &parcel);
            let seat = self.expected(worker, &record);
            let taken = seat.and_then(|seat| {
                let taken = self.take_up(&record, seat, &mut descriptors, context, turn);
                taken.inspect_err(|_| seat.into_iter().for_each(|it| self.expected.give_back(it)))
            });
            match taken {
                Ok(key) => keys.push(key),
                Err(why) => {
                    self.expect_no_more(worker, turn);
                    self.sessions.leave(&keys, &mut turn.cx(&mut self.commands));
                    self.execute(turn);
                    return Err(why);
                }
            }
        }
        self.expect_no_more(worker, turn);
        self.execute(turn);
        Ok(())
    }

    fn take_up(
        &mut self,
        record: &SessionRecord,
        seat: Option<Seat>,
        descriptors: &mut Unclaimed<OwnedFd>,
        (services, parcel): (&mut Named, &Parcel<OwnedFd>),
        turn: &mut Turn<'_>,
    ) -> Result<Key, String> {
        let relays = record.flags & SessionRecord::RELAYS != 0;
        let has_come = [seat.is_some(), seat.is_some() || !relays];
        let mut sockets = [None, None];
        for ((socket, place), has_come) in sockets.iter_mut().zip(record.sockets).zip(has_come) {
            match has_come {
                true if place != NO_SOCKET => {
                    return Err("a session has more sockets than it can".into());
                }
                true => {}
                false => *socket = Some(claim(descriptors, place)?),
            }
        }
        let [up, down] = &record.relay.flows;
        let pipes = [pipe(descriptors, up)?, pipe(descriptors, down)?];
        let cx = &mut turn.cx(&mut self.commands);
        let key = self.sessions.take_up(record, seat, (services, parcel), cx)?;
        for ((side, socket), pipe) in Side::BOTH.into_iter().zip(sockets).zip(pipes) {
            if let Some(socket) = socket {
                self.streams.keep((key, side), socket);
            }
            if let Some(pipe) = pipe {
                self.splices.take_up((key, side), pipe);
            }
        }
        Ok(key)
    }
}

/// The pipe of a flow that has bytes in one.
fn pipe(descriptors: &mut Unclaimed<OwnedFd>, flow: &FlowRecord) -> Result<Option<Pipe>, String> {
    let held = flow.piped.get() as usize;
    if held == 0 {
        return Ok(None);
    }
    let [read, write] = flow.pipe;
    let ends = [descriptors.claim(read)?, descriptors.claim(write)?];
    let pipe = Pipe::taken_up(ends, held);
    pipe.map(Some).ok_or_else(|| "a session's pipe is not what it should be".into())
}
