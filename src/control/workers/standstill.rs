//! All workers made to stand still together, and what they leave or are given then. Owns the waiting for them,
//! which blocks the control core: nothing may change while sessions are handed over.

use std::os::fd::{OwnedFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

use super::Workers;
use crate::control::doors::OpenDoor;
use crate::estate::Estate;
use crate::worker::brake::Request;
use crate::worker::link::{ControlEnd, DoorChange, Listener};

/// How often to look whether they are done.
const LOOK_EVERY: Duration = Duration::from_micros(100);

/// Waits until these workers have carried out what they were asked. False: some have not by then.
pub fn are_done<'w, All: Iterator<Item = &'w ControlEnd>>(
    workers: impl Fn() -> All,
    until: Instant,
) -> bool {
    while !workers().all(|worker| worker.brake.is_done()) {
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(LOOK_EVERY);
    }
    true
}

impl Workers {
    /// Makes a request of every worker, and does not wait.
    pub fn ask(&self, what: Request) {
        self.ends.iter().for_each(|end| end.link.ask(what));
    }

    /// The same, and waits until all have carried it out. False: some have not within `patience`.
    pub fn have(&self, what: Request, patience: Duration) -> bool {
        self.ask(what);
        self.wait(patience)
    }

    /// Waits until all have carried out what they were asked. False: some have not within `patience`.
    pub fn wait(&self, patience: Duration) -> bool {
        are_done(|| self.ends.iter().map(|end| &end.link), Instant::now() + patience)
    }

    /// Duplicates of the sockets of the next sessions of a worker, or of its first; none if there are no more. `None`:
    /// it does not say within `patience`.
    pub fn sockets(
        &self,
        worker: u8,
        of_first: bool,
        patience: Duration,
    ) -> Option<Vec<[OwnedFd; 2]>> {
        let link = &self.ends.get(usize::from(worker))?.link;
        link.ask_for_sockets(of_first);
        self.wait(patience).then(|| link.brake.take_sockets())
    }

    /// Gives each worker its socket at a door that was open before they were started.
    pub fn open_inherited(&mut self, door: &OpenDoor, mut sockets: impl Iterator<Item = OwnedFd>) {
        let OpenDoor { id, service, protocol, is_tls, .. } = *door;
        self.change_door(protocol, || {
            let socket = sockets.next().expect("there is a socket for each worker");
            DoorChange::Open(Listener { id, socket, service, is_tls })
        });
    }

    /// What they have described, by worker.
    pub fn estates(&self) -> Vec<Estate<RawFd>> {
        self.ends.iter().filter_map(|end| end.link.brake.take_estate()).collect()
    }

    /// Gives the workers these estates: each to the worker of its number, or dealt out if there are fewer
    /// workers than that.
    ///
    /// # Errors
    /// One cannot be taken over, or that takes longer than `patience`: a sentence.
    pub fn take_over(
        &self,
        estates: Vec<Estate<OwnedFd>>,
        patience: Duration,
    ) -> Result<(), String> {
        let until = Instant::now() + patience;
        let mut estates = estates.into_iter().peekable();
        // One at a time for each worker.
        while estates.peek().is_some() {
            let mut given = Vec::new();
            for end in &self.ends {
                let Some(estate) = estates.next() else { break };
                end.link.give(estate);
                given.push(end);
            }
            if !self.wait(until.saturating_duration_since(Instant::now())) {
                return Err("its workers have not taken everything over in time".into());
            }
            if let Some(why) = given.iter().find_map(|end| end.link.brake.take_refusal()) {
                return Err(format!("what was left to it is at fault: {why}"));
            }
        }
        Ok(())
    }
}
