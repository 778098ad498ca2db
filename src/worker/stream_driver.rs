//! What the drivers of streams do alike: carry out the commands of their sessions, one after another, begin
//! connections to backends, and close their doors without forgetting whom these have let in. Owns that order of
//! things; the streams and the sessions are the drivers' own.

use nix::errno::Errno;

use super::driver::{Driver, Turn};
use super::greetings::Newcomer;
use super::link::{DoorChange, Order};
use super::opening::{Opening, Unconnected};
use super::slots::Key;
use super::streams::{News, Streams};
use crate::proxy::Event;
use crate::proxy::greeting::Caller;

/// Commands that may wait while one event is handled, before the list has to grow.
pub const COMMANDS: usize = 64;

/// A driver whose users come over streams of this family.
pub trait StreamDriver<const FAMILY: u8>: Driver {
    /// A command of its sessions.
    type Cmd: Copy;

    fn streams(&mut self) -> &mut Streams<FAMILY>;

    /// The list that takes the commands.
    fn commands(&mut self) -> &mut Vec<Self::Cmd>;

    /// Turns a command into operations. It may cause further commands at once.
    fn carry_out(&mut self, command: Self::Cmd, turn: &mut Turn<'_>);

    /// Tells a session what has happened to one of its connections.
    fn happened(&mut self, key: Key, event: Event, turn: &mut Turn<'_>);

    /// The user of whom the backend at the other end of a new connection is told by a PROXY header, if it wants one.
    fn introduces(&mut self, key: Key) -> Option<(Key, Caller)>;

    /// How TLS is begun on a new connection to a backend, if it is.
    ///
    /// # Errors
    /// The backend has left.
    fn opening(&mut self, key: Key, turn: &mut Turn<'_>) -> Result<Option<Opening>, Errno>;

    /// Tells a session that its connection to a backend is good to use, or why there is none.
    fn connected(&mut self, key: Key, result: Result<(), Unconnected>, turn: &mut Turn<'_>);

    /// Begins a session for a user who can be served.
    fn welcome(&mut self, user: Newcomer, turn: &mut Turn<'_>);

    /// The kernel has connected to a backend, or could not. Whatever the backend wants first goes out before its
    /// session hears of it.
    fn established(&mut self, key: Key, result: Result<(), Errno>, turn: &mut Turn<'_>) {
        let result = result.and_then(|()| match self.introduces(key) {
            Some(user) => self.streams().introduce(user, key, turn),
            None => Ok(()),
        });
        match result.and_then(|()| self.opening(key, turn)) {
            Ok(Some(opening)) => self.streams().approach(key, opening),
            Ok(None) => self.connected(key, Ok(()), turn),
            Err(errno) => self.connected(key, Err(errno.into()), turn),
        }
    }

    /// Carries out all commands, in their order, and those that follow from what they bring about at once.
    fn execute(&mut self, turn: &mut Turn<'_>) {
        loop {
            let mut next = 0;
            while let Some(command) = self.commands().get(next).copied() {
                next += 1;
                self.carry_out(command, turn);
            }
            self.commands().clear();
            // Under TLS, one receive may bring several messages: as many as one block holds.
            let Some((key, news)) = self.streams().next_news() else { break };
            match news {
                News::Happened(event) => self.happened(key, event, turn),
                News::Connected(result) => self.connected(key, result, turn),
            }
        }
    }

    /// The same at the end of a turn, when what is to be sealed goes out too.
    fn settle(&mut self, turn: &mut Turn<'_>) {
        self.execute(turn);
        while self.streams().seal(turn) {
            self.execute(turn);
        }
    }

    /// Lets those in, and completes what, waited while the worker stood still.
    fn thaw_streams(&mut self, turn: &mut Turn<'_>) {
        let (held, late) = self.streams().thaw();
        held.into_iter().for_each(|done| self.complete(done, turn));
        self.welcome_all(late.into_iter(), turn);
    }

    /// Changes one of the doors.
    fn change_stream_door(&mut self, change: DoorChange, turn: &mut Turn<'_>) {
        let users = self.streams().change_door(change, turn.ring);
        self.welcome_all(users, turn);
    }

    /// Carries out an order as far as it concerns the doors, before the sessions hear of it.
    fn order_doors(&mut self, order: Order, turn: &mut Turn<'_>) {
        if matches!(order, Order::Drain | Order::Stop) {
            let users = self.streams().close_doors(turn.ring);
            self.welcome_all(users, turn);
        }
        if order == Order::Stop {
            self.streams().stop(turn.ring);
        }
    }

    /// Serves those whom a closing door has let in.
    fn welcome_all(&mut self, users: impl Iterator<Item = Newcomer>, turn: &mut Turn<'_>) {
        for user in users {
            if let Some(user) = self.streams().meet(user, turn) {
                self.welcome(user, turn);
                self.execute(turn);
            }
        }
    }
}
