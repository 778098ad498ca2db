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

impl TcpDriver {
    /// Describes the sessions that could go on elsewhere, and remembers which these are.
    pub(super) fn describe_all(&mut self, parcel: &mut Parcel<RawFd>, turn: &mut Turn<'_>) {
        let streams = &self.streams;
        self.described = self.sessions.movable(|key| streams.is_apart(key));
        let mut names = Names::default();
        let TcpDriver { sessions, commands, described, .. } = self;
        let mut records = Vec::with_capacity(described.len());
        described.retain(|key| {
            let record = sessions.describe(*key, &mut names, parcel, &turn.cx(commands));
            records.extend(record);
            record.is_some()
        });
        for (key, mut record) in self.described.iter().copied().zip(records) {
            self.add_descriptors(key, &mut record, parcel);
            parcel.push(&record);
        }
    }

    fn add_descriptors(&self, key: Key, record: &mut SessionRecord, parcel: &mut Parcel<RawFd>) {
        let relays = record.flags & SessionRecord::RELAYS != 0;
        for side in Side::BOTH {
            let end = self.streams.socket((key, side));
            // What is left of an attempt to connect is of no use.
            if let Some(socket) = end.filter(|_| relays || side == Side::Client) {
                record.sockets[side as usize] = parcel.add_socket(socket.as_raw_fd());
            }
            let flow = &mut record.relay.flows[side as usize];
            let pipe = self.splices.pipe((key, side)).filter(|_| flow.piped.get() > 0);
            if let Some(pipe) = pipe {
                flow.pipe = pipe.ends().map(|end| parcel.add_socket(end.as_raw_fd()));
            }
        }
    }

    /// Takes up all sessions of a parcel, or none.
    pub(super) fn inherit_all(
        &mut self,
        mut parcel: Parcel<OwnedFd>,
        turn: &mut Turn<'_>,
    ) -> Result<(), String> {
        let mut descriptors = Unclaimed::new(std::mem::take(&mut parcel.sockets));
        let (mut services, mut keys) =
            (Named::new(Protocol::Tcp), Vec::with_capacity(parcel.len()));
        for record in parcel.records::<SessionRecord>() {
            let taken = self.take_up(&record, &mut descriptors, &mut services, &parcel, turn);
            match taken {
                Ok(key) => keys.push(key),
                Err(why) => {
                    self.sessions.leave(&keys, &mut turn.cx(&mut self.commands));
                    self.execute(turn);
                    return Err(why);
                }
            }
        }
        Ok(())
    }

    fn take_up(
        &mut self,
        record: &SessionRecord,
        descriptors: &mut Unclaimed<OwnedFd>,
        services: &mut Named,
        parcel: &Parcel<OwnedFd>,
        turn: &mut Turn<'_>,
    ) -> Result<Key, String> {
        let relays = record.flags & SessionRecord::RELAYS != 0;
        if !relays && record.sockets[Side::Backend as usize] != NO_SOCKET {
            return Err("a session that is not connected has two sockets".into());
        }
        let [client, backend] = record.sockets;
        let client = claim(descriptors, client)?;
        let backend = relays.then(|| claim(descriptors, backend)).transpose()?;
        let [up, down] = &record.relay.flows;
        let pipes = [pipe(descriptors, up)?, pipe(descriptors, down)?];
        let cx = &mut turn.cx(&mut self.commands);
        let key = self.sessions.take_up(record, services, parcel, cx)?;
        self.streams.keep((key, Side::Client), client);
        if let Some(backend) = backend {
            self.streams.keep((key, Side::Backend), backend);
        }
        for (side, pipe) in Side::BOTH.into_iter().zip(pipes) {
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
