//! How this balancer takes over from a predecessor. Owns the order of the steps until it serves, which block:
//! it has nothing else to do before. What is left to it is read as if a stranger had written it; whatever is
//! wrong with it leaves everything with the predecessor, which is told why.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::Control;
use super::doors::OpenDoor;
use super::hub::Hub;
use super::legacy::{Heir, Legacy};
use super::workers::are_done;
use crate::base::thread;
use crate::base::time::Now;
use crate::cluster::{DoorId, Protocol};
use crate::config::keys::WORKERS_MAX;
use crate::estate::api::UserRecord;
use crate::estate::format::State;
use crate::estate::{DoorRecord, Estate};
use crate::handover::channel::{Fault, Packet};
use crate::handover::predecessor::{Beside, Inheritance, Left, Predecessor};
use crate::handover::rehearsal::pause_at;
use crate::handover::words::Word;
use crate::ring::sys::{self, Kind};
use crate::worker::brake::Request;
use crate::worker::link::ControlEnd;

/// How long the workers may take to take everything over.
const TAKING_PATIENCE: Duration = Duration::from_secs(1);
/// How long what comes ahead may take to come, and to be taken in.
const AHEAD_PATIENCE: Duration = Duration::from_secs(5);
/// Sockets at one door, at most: one for each of the most workers that there can be.
const SOCKETS_MAX: usize = WORKERS_MAX;
/// How often to ask whether the predecessor has said something.
const HEAR_EVERY: Duration = Duration::from_secs(60);
/// Messages of the predecessor that may wait here.
const HEARD_MAX: usize = 16;

/// What the predecessor still says, until it has ended.
pub struct Heard {
    pub packets: mpsc::Receiver<Packet<Word>>,
    /// Its doors that have another number here.
    pub beside: Beside,
}

/// Takes everything over. The workers serve when this returns; the control core goes on when it runs.
///
/// # Errors
/// Why this process cannot serve, a sentence; the predecessor serves on, and this process has to end.
pub fn take_up(
    control: Control,
    (mut old, awaited): (Predecessor, Vec<OpenDoor>),
) -> Result<(Heir, Heard), String> {
    pause_at("offering");
    let (State { legacy, estates }, token) = await_everything(&mut old, &control.ends)?;
    pause_at("inherited");
    let read = Now::read();
    let (text, sockets) = legacy;
    let legacy = Legacy::from_json(&text)?;
    let heir = control.inherit(&legacy, sockets, Now::read())?;
    let hub = Rc::clone(&heir.core().hub);
    let mut hub = hub.borrow_mut();
    let core = Now::read();
    let taken = take_workers(estates, &awaited, &old, &mut hub).and_then(|()| {
        pause_at("checked");
        let gone = "the process that started this one has taken everything back";
        token.take().then_some(()).ok_or_else(|| gone.to_owned())
    });
    // Workers that were left nothing stand still until the process ends: what they hold is in use elsewhere.
    taken?;
    pause_at("taken");
    hub.workers.ask(Request::Thaw);
    old.running();
    // Until then nobody is served. If one of them hangs, the pulse of the workers says so.
    hub.workers.wait(TAKING_PATIENCE);
    let stall = Now::read().since(legacy.at);
    let (generation, sessions) = (old.hello.generation.saturating_add(1), hub.workers.sessions());
    hub.handover.taken_over(generation, Now::read(), stall, sessions);
    debug!(
        read_us = read.since(legacy.at).as_micros() as u64,
        core_us = core.since(read).as_micros() as u64,
        workers_us = Now::read().since(core).as_micros() as u64,
        "took everything over"
    );
    pause_at("serving");
    info!(
        generation,
        sessions,
        stall_ms = stall.as_millis() as u64,
        "serving in the place of the process that started this one"
    );
    drop(hub);
    Ok((heir, hear(old)))
}

/// Says that this process can go on from here, and waits for everything. What comes ahead is given to the workers.
fn await_everything(old: &mut Predecessor, workers: &[ControlEnd]) -> Result<Inheritance, String> {
    let failed = |fault| match fault {
        Fault::Gone => {
            "the process that started this one has ended, or has changed its mind".to_owned()
        }
        fault => format!("the process that started this one has left nothing: {fault}"),
    };
    old.offer().map_err(failed)?;
    let until = Instant::now() + AHEAD_PATIENCE;
    let settle = || {
        if !are_done(|| workers.iter(), until) {
            return Err("its workers have not taken in in time what came ahead".to_owned());
        }
        match workers.iter().find_map(|worker| worker.brake.take_refusal()) {
            Some(why) => Err(format!("what came ahead is at fault: {why}")),
            None => Ok(()),
        }
    };
    // The last worker of which something has come.
    let mut came = None;
    loop {
        match old.next_left().map_err(failed)? {
            Left::Ahead(ahead) => {
                settle()?;
                came = came.max(Some(ahead.worker));
                // As their estates are dealt out.
                workers[usize::from(ahead.worker) % workers.len()].expect(ahead);
            }
            Left::AllAhead => {
                settle()?;
                old.expecting().map_err(failed)?;
            }
            Left::Everything((state, token)) => {
                let workers = state.estates.iter().map(|estate| estate.worker);
                if !workers.zip(0..).all(|(worker, place)| worker == place)
                    || came.is_some_and(|worker| usize::from(worker) >= state.estates.len())
                {
                    return Err("it has other workers than it says".into());
                }
                return Ok((state, token));
            }
        }
    }
}

/// Gives the workers what is theirs; nothing moves yet.
fn take_workers(
    mut estates: Vec<Estate<OwnedFd>>,
    awaited: &[OpenDoor],
    old: &Predecessor,
    hub: &mut Hub,
) -> Result<(), String> {
    hand_out_doors(&mut estates, awaited, old, hub)?;
    let udp = hub.doors.open().iter().filter(|door| door.protocol == Protocol::Udp);
    let here: Vec<_> = udp.map(|door| (door.id, door.address)).collect();
    estates.iter_mut().for_each(|estate| estate.doors_here.clone_from(&here));
    for estate in &mut estates {
        let door = |user: &mut UserRecord| user.door = old.asked_for_as(user.door.get()).into();
        estate.api.amend(door);
    }
    hub.workers.take_over(estates, TAKING_PATIENCE)
}

/// Gives the workers the sockets at the doors that were not opened anew. One that is not wanted any more closes
/// when the predecessor lets go of it as well, and whoever waits in its queue is turned away.
fn hand_out_doors(
    estates: &mut [Estate<OwnedFd>],
    awaited: &[OpenDoor],
    old: &Predecessor,
    hub: &mut Hub,
) -> Result<(), String> {
    let mut sockets: Vec<(DoorId, Vec<OwnedFd>)> = Vec::new();
    for estate in estates {
        let doors = std::mem::take(&mut estate.doors);
        let records: Vec<DoorRecord> = doors.records().collect();
        if records.len() != doors.sockets.len() {
            return Err("its doors have other sockets than it says".into());
        }
        for (record, socket) in records.into_iter().zip(doors.sockets) {
            let id = DoorId(old.asked_for_as(record.door.get()));
            let doors = awaited.iter().filter(|door| door.id == id);
            let mut doors = doors.filter(|door| !is_of_door(socket.as_fd(), door.protocol));
            if let Some(door) = doors.next() {
                return Err(format!("a socket of the door at {} is none of a door", door.address));
            }
            match sockets.iter_mut().find(|(door, _)| *door == id) {
                Some((_, all)) => all.push(socket),
                None => sockets.push((id, vec![socket])),
            }
        }
    }
    for door in awaited {
        let found = sockets.iter().position(|(id, _)| *id == door.id);
        let Some(found) = found else {
            return Err(format!("the sockets of the door at {} are missing", door.address));
        };
        open(door, sockets.swap_remove(found).1, hub)?;
    }
    Ok(())
}

/// Whether users of a protocol come by such a socket.
fn is_of_door(socket: BorrowedFd<'_>, protocol: Protocol) -> bool {
    match sys::kind(socket) {
        Kind::Listener => protocol != Protocol::Udp,
        Kind::Datagrams { .. } => protocol == Protocol::Udp,
        Kind::Stream | Kind::Pipe | Kind::Other => false,
    }
}

/// Gives each worker one of the sockets at a door. Of those that are left over, which must not be closed with
/// users in their queues, as many as there are workers are one more door; and where they do not suffice, the
/// group gets new members.
fn open(door: &OpenDoor, mut sockets: Vec<OwnedFd>, hub: &mut Hub) -> Result<(), String> {
    let workers = hub.workers.count();
    if sockets.len() > SOCKETS_MAX || !hub.workers.can_change_doors(SOCKETS_MAX) {
        return Err(format!(
            "the door at {} has too many sockets: restart in place of upgrading",
            door.address
        ));
    }
    while !sockets.len().is_multiple_of(workers) {
        let another = match door.protocol {
            Protocol::Udp => sys::datagram_door(door.address, true, hub.config.udp.gro),
            Protocol::Tcp | Protocol::Api => sys::listen(door.address, true),
        };
        let another = another.map_err(|error| {
            format!("cannot open the door at {} for one more worker: {error}", door.address)
        })?;
        sockets.push(another);
    }
    let mut sockets = sockets.into_iter();
    let mut next = Some(door.clone());
    while sockets.len() > 0 {
        let door = match next.take() {
            Some(door) => door,
            None => hub.doors.open_beside(door)?,
        };
        hub.workers.open_inherited(&door, sockets.by_ref().take(workers));
    }
    Ok(())
}

/// Hears the predecessor until it has ended.
fn hear(old: Predecessor) -> Heard {
    let (say, packets) = mpsc::channel(HEARD_MAX);
    // Whoever waits at a door of the predecessor that is not wanted here is not kept waiting by this thread.
    let (old, beside) = old.into_channel();
    let started = thread::spawn("lb-predecessor", move || {
        loop {
            match old.receive(HEAR_EVERY) {
                Ok(packet) => match say.blocking_send(packet) {
                    Ok(()) => {}
                    Err(_) => return,
                },
                Err(Fault::Late) => {}
                Err(Fault::Garbled(reason)) => {
                    warn!(reason, "what the predecessor says is not understood");
                }
                Err(Fault::Gone | Fault::Failed(_)) => return,
            }
        }
    });
    if let Err(error) = started {
        warn!(%error, "what the old process still counts is not heard: no thread");
    }
    Heard { packets, beside }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn a_socket_that_is_none_of_a_door_is_known() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (pipe, _other) = std::io::pipe().unwrap();
        for (socket, is_stream_door, is_datagram_door) in [
            (listener.as_fd(), true, false),
            (stream.as_fd(), false, false),
            (datagrams.as_fd(), false, true),
            (pipe.as_fd(), false, false),
        ] {
            let found = Protocol::ALL.map(|protocol| is_of_door(socket, protocol));
            let wanted = Protocol::ALL.map(|protocol| match protocol {
                Protocol::Udp => is_datagram_door,
                Protocol::Tcp | Protocol::Api => is_stream_door,
            });
            assert_eq!(found, wanted, "{socket:?}");
        }
    }
}
