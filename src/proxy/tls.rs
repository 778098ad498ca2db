//! A user's or a backend's connection under TLS, between the stream's driver and the session above, as a
//! transformer: it takes the session's commands and the driver's completions, and answers both in their own words,
//! so that neither knows of it. Owns the order in which bytes are opened, sealed and ended; rustls is behind
//! [`Engine`], and the socket behind whatever is passed to write to.
//!
//! ```text
//!   session above:  Receive ----------> Received (plaintext)      Send -----> Sent (all of it is out)
//!                      |                    ^                      |  seal        ^
//!                      v                    | open                 v              |
//!   driver below:   Receive ----------> Received (ciphertext)    written, or AwaitRoom -> room
//! ```
//!
//! A receive of the session's is answered once. Ciphertext is received only for one that is asked for, one
//! block at a time, and its block goes back before the plaintext takes one: a session under TLS holds no
//! more blocks than one without. What is sealed waits in the engine, 64 KiB at most, and is written to the
//! socket from there; so sealing never waits for a block.

mod records;

use std::io::{self, ErrorKind, IoSlice, Write};

use nix::errno::Errno;

use super::{Event, Intake, Received, Side, StreamCmd};
use crate::base::time::Now;
use crate::ring::pool::{Buf, Class, Outgoing, Pool};
use crate::tls::engine::{Engine, Fault};
use records::Records;

/// The most ciphertext that is written before somebody else has a turn, in bytes.
const WRITTEN_IN_TURN_MAX: usize = 256 * 1024;
/// The most blocks that are sealed at once. Each by itself would be a record, and the head of a response has
/// a block of its own.
const SEALED_TOGETHER_MAX: usize = 16;

/// What the driver is to do on the socket. Receives are single ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Below {
    Receive(Intake),
    CancelReceive,
    /// Report when the socket takes more.
    AwaitRoom,
    CancelRoom,
    /// Tell the peer that no more will come.
    FinishWriting,
    /// Count that it has broken the protocol.
    CountBroken,
}

/// What a session works with while it is called.
pub struct Wire<'a> {
    pub now: Now,
    pub pool: &'a mut Pool,
    /// The socket; it never waits.
    pub outlet: &'a mut dyn Write,
    pub below: &'a mut Vec<Below>,
    pub above: &'a mut Vec<Event>,
}

/// One connection.
#[derive(Debug)]
pub struct Session {
    side: Side,
    engine: Engine,
    records: Records,
    /// An end without a close_notify counts as one with it.
    takes_ragged_ends: bool,
    asked: Asked,
    armed: Armed,
    /// Ciphertext that the engine has no room for until plaintext has been taken out of it.
    raw: Option<Buf>,
    /// The same when its block was needed.
    spilt: Vec<u8>,
    nonempty: bool,
    source: Source,
    sending: Option<Sending>,
    sink: Sink,
    room: Room,
}

/// What the session above has asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Asked {
    Nothing,
    Receive(Intake),
    /// It does not want it any more, and waits to be told that it is over.
    Cancelled(Intake),
}

/// The receive below.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Armed {
    No,
    Yes,
    Cancelled,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Open,
    Ended,
    Failed(Errno),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sink {
    Open,
    /// Nothing more will be sent; what is sealed goes out first.
    Finishing,
    Finished,
    Gone(Errno),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Room {
    Unknown,
    Awaited,
    Cancelled,
}

/// A send of the session's.
#[derive(Clone, Copy, Debug)]
struct Sending {
    what: Outgoing,
    /// How many of its bytes are sealed.
    sealed: usize,
}

impl Session {
    /// A connection whose handshake is over. What it has sealed already goes out with the first command.
    pub fn new(side: Side, engine: Engine, takes_ragged_ends: bool) -> Session {
        Session {
            side,
            engine,
            records: Records::default(),
            takes_ragged_ends,
            asked: Asked::Nothing,
            armed: Armed::No,
            raw: None,
            spilt: Vec::new(),
            nonempty: false,
            source: Source::Open,
            sending: None,
            sink: Sink::Open,
            room: Room::Unknown,
        }
    }

    /// Carries out a command of the session above that is about this side. Whether the socket takes more
    /// ([`StreamCmd::AwaitRoom`]) is asked of the driver itself.
    pub fn command(&mut self, what: StreamCmd, wire: &mut Wire<'_>) {
        match what {
            StreamCmd::Receive { how, .. } => {
                self.asked = Asked::Receive(how);
                self.deliver(wire);
            }
            StreamCmd::CancelReceive { .. } => self.cancel_receive(wire),
            StreamCmd::Send { what, .. } => {
                self.sending = Some(Sending { what, sealed: 0 });
                self.advance(wire);
            }
            StreamCmd::CancelSend { .. } => {
                if self.sending.is_some() {
                    // What was sent stops short, and must not look whole.
                    self.sink = Sink::Gone(Errno::ECANCELED);
                }
                self.sent(Err(Errno::ECANCELED), wire);
            }
            StreamCmd::FinishWriting { .. } if self.sink == Sink::Open => {
                self.engine.finish();
                self.sink = Sink::Finishing;
                self.advance(wire);
            }
            StreamCmd::FinishWriting { .. } => {}
            StreamCmd::AwaitRoom { .. }
            | StreamCmd::CancelRoom { .. }
            | StreamCmd::Splice { .. }
            | StreamCmd::CancelSplice { .. }
            | StreamCmd::EndSplice { .. } => {
                debug_assert!(false, "bytes under TLS are not offered a pipe");
            }
        }
    }

    /// The receive below is over.
    pub fn received(&mut self, what: Received, nonempty: bool, wire: &mut Wire<'_>) {
        (self.armed, self.nonempty) = (Armed::No, nonempty);
        match what {
            Received::Data(buf) => self.raw = Some(buf),
            Received::End => self.source = self.end(),
            Received::Failed(errno) => self.source = Source::Failed(errno),
            Received::NoBuffers => return self.answer(Received::NoBuffers, wire),
            Received::Stopped => return self.answer(Received::Stopped, wire),
        }
        self.deliver(wire);
    }

    /// The socket takes more, or has stopped waiting for that.
    pub fn room(&mut self, wire: &mut Wire<'_>) {
        self.room = Room::Unknown;
        self.advance(wire);
    }

    /// The session above has let go of the connection: gives back what it held, and makes what is under way
    /// end. Nothing is sent any more but what the socket takes at once; unless it is a `reset`, the other
    /// end is told that this is the end. Returns whether the driver waits for room on its behalf, and is to stop.
    pub fn close(mut self, reset: bool, mut outlet: &mut dyn Write, pool: &mut Pool) -> bool {
        if !reset && self.sink == Sink::Open {
            self.engine.finish();
        }
        let _ = self.engine.flush(&mut outlet);
        debug_assert!(self.armed == Armed::No, "a session waits for its receives");
        if let Some(raw) = self.raw.take() {
            pool.give_back(raw);
        }
        self.room == Room::Awaited
    }

    fn cancel_receive(&mut self, wire: &mut Wire<'_>) {
        // Otherwise its answer is on its way already.
        if let Asked::Receive(how) = self.asked {
            self.asked = Asked::Cancelled(how);
            if self.armed == Armed::Yes {
                self.armed = Armed::Cancelled;
                wire.below.push(Below::CancelReceive);
            }
        }
    }

    /// An end of the stream below it.
    fn end(&self) -> Source {
        match self.engine.has_ended() || self.takes_ragged_ends {
            true => Source::Ended,
            // Anybody on the way could have cut it off.
            false => Source::Failed(Errno::ECONNRESET),
        }
    }

    /// Answers the receive of the session's, or has more received for it.
    fn deliver(&mut self, wire: &mut Wire<'_>) {
        let (how, is_wanted) = match self.asked {
            Asked::Nothing => return,
            Asked::Receive(how) => (how, true),
            Asked::Cancelled(how) => (how, false),
        };
        while self.engine.plaintext().is_empty() && self.has_raw() {
            self.open(wire);
        }
        if !self.engine.plaintext().is_empty() {
            let what = self.fill(how, wire).map_or(Received::NoBuffers, Received::Data);
            return self.answer(what, wire);
        }
        match self.source {
            Source::Open if self.engine.has_ended() => {
                self.source = Source::Ended;
                self.answer(Received::End, wire);
            }
            Source::Ended => self.answer(Received::End, wire),
            Source::Failed(errno) => self.answer(Received::Failed(errno), wire),
            Source::Open if !is_wanted => self.answer(Received::Stopped, wire),
            Source::Open => {
                self.armed = Armed::Yes;
                wire.below.push(Below::Receive(single(how, self.nonempty)));
            }
        }
    }

    fn answer(&mut self, what: Received, wire: &mut Wire<'_>) {
        if self.asked == Asked::Nothing {
            debug_assert!(false, "nothing is received that was not asked for");
            if let Received::Data(buf) = what {
                wire.pool.give_back(buf);
            }
            return;
        }
        self.asked = Asked::Nothing;
        let nonempty = self.nonempty || self.has_raw() || !self.engine.plaintext().is_empty();
        let event = Event::Received { side: self.side, what, more: false, nonempty };
        wire.above.push(event);
    }

    fn has_raw(&self) -> bool {
        self.raw.is_some() || !self.spilt.is_empty()
    }

    /// Has the engine take ciphertext, and lets it answer.
    fn open(&mut self, wire: &mut Wire<'_>) {
        let all = self.raw.as_ref().map_or(self.spilt.as_slice(), |raw| wire.pool.bytes(raw));
        let mut left = all;
        let taken = self.engine.take(&mut left, wire.now);
        let used = all.len() - left.len();
        match &mut self.raw {
            Some(raw) => wire.pool.skip(raw, used),
            None => drop(self.spilt.drain(..used)),
        }
        if let Err(fault) = taken {
            self.source = Source::Failed(errno(fault));
            self.spilt = Vec::new();
            wire.below.push(Below::CountBroken);
            self.break_off(errno(fault), wire);
        }
        if taken.is_err() || self.raw.as_ref().is_some_and(Buf::is_empty) {
            self.raw.take().into_iter().for_each(|raw| wire.pool.give_back(raw));
        }
        if self.spilt.is_empty() {
            self.spilt = Vec::new();
        }
        if self.engine.has_sealed() {
            self.advance(wire);
        }
    }

    /// A block of plaintext: as much as there is and fits. `None` if the pool is used up.
    fn fill(&mut self, how: Intake, wire: &mut Wire<'_>) -> Option<Buf> {
        let mut buf = self.block(class(how), wire.pool)?;
        loop {
            let plain = self.engine.plaintext();
            let taken = wire.pool.append(&mut buf, plain);
            let (is_full, is_dry) = (taken < plain.len(), plain.is_empty());
            self.engine.consume(taken);
            if is_full || is_dry && !self.has_raw() {
                return Some(buf);
            }
            if self.engine.plaintext().is_empty() && self.has_raw() {
                self.open(wire);
            }
        }
    }

    fn block(&mut self, class: Class, pool: &mut Pool) -> Option<Buf> {
        let block = pool.take(class).or_else(|| pool.take(Class::Small));
        if block.is_some() {
            return block;
        }
        // Its own block serves better empty than full of what cannot be opened yet.
        let raw = self.raw.take()?;
        let class = pool.class(&raw);
        self.spilt = pool.bytes(&raw).to_vec();
        pool.give_back(raw);
        pool.take(class)
    }

    /// Seals and writes as much as the socket takes, and tells the session above when its send is out.
    fn advance(&mut self, wire: &mut Wire<'_>) {
        let mut written = 0;
        loop {
            if self.room == Room::Awaited || matches!(self.sink, Sink::Gone(_)) {
                break;
            }
            match self.engine.flush(&mut wire.outlet) {
                Ok(bytes) => written += bytes,
                Err(error) => return self.write_failed(&error, wire),
            }
            let Some(sending) = &mut self.sending else { break };
            if written >= WRITTEN_IN_TURN_MAX {
                return self.await_room(wire);
            }
            let sealed = seal(&mut self.engine, &mut self.records, sending, wire);
            if sealed == 0 && !self.engine.has_sealed() {
                let (sealed, all) = (sending.sealed, length(sending.what, wire.pool));
                // The engine takes everything as long as the connection is sound.
                let result = if sealed == all { Ok(sealed as u32) } else { Err(Errno::EPROTO) };
                self.sent(result, wire);
            }
        }
        if let Sink::Gone(errno) = self.sink {
            return self.sent(Err(errno), wire);
        }
        if self.sink == Sink::Finishing && self.sending.is_none() && !self.engine.has_sealed() {
            self.sink = Sink::Finished;
            wire.below.push(Below::FinishWriting);
        }
    }

    /// Says why by an alert, if the socket takes it at once; nothing else can be sent.
    fn break_off(&mut self, errno: Errno, wire: &mut Wire<'_>) {
        let _ = self.engine.flush(&mut wire.outlet);
        self.sink = Sink::Gone(errno);
        self.sent(Err(errno), wire);
    }

    fn write_failed(&mut self, error: &io::Error, wire: &mut Wire<'_>) {
        if error.kind() == ErrorKind::WouldBlock {
            return self.await_room(wire);
        }
        let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        self.sink = Sink::Gone(errno);
        self.sent(Err(errno), wire);
    }

    fn await_room(&mut self, wire: &mut Wire<'_>) {
        if self.room == Room::Unknown {
            self.room = Room::Awaited;
            wire.below.push(Below::AwaitRoom);
        }
    }

    fn sent(&mut self, result: Result<u32, Errno>, wire: &mut Wire<'_>) {
        if self.sending.take().is_some() {
            wire.above.push(Event::Sent { side: self.side, result });
        }
        if result == Err(Errno::ECANCELED) && self.room == Room::Awaited {
            self.room = Room::Cancelled;
            wire.below.push(Below::CancelRoom);
        }
    }
}

/// Seals the next bytes of a send, blocks that lie one behind the other as one message, and says how many.
fn seal(
    engine: &mut Engine,
    records: &mut Records,
    sending: &mut Sending,
    wire: &Wire<'_>,
) -> usize {
    let before = sending.sealed;
    loop {
        let most = records.most(wire.now);
        let mut pieces = [IoSlice::new(&[]); SEALED_TOGETHER_MAX];
        let (count, bytes) = gather(&mut pieces, sending, most, wire.pool);
        let sealed = engine.seal(&pieces[..count]);
        records.sealed(sealed, wire.now);
        sending.sealed += sealed;
        if sealed < bytes || bytes < most {
            return sending.sealed - before;
        }
    }
}

/// Lays out what comes next of a send, `most` bytes of it: how many pieces that takes, and their bytes.
fn gather<'p>(
    pieces: &mut [IoSlice<'p>],
    sending: &Sending,
    most: usize,
    pool: &'p Pool,
) -> (usize, usize) {
    let (mut count, mut bytes, mut skip) = (0, 0, sending.sealed);
    for piece in pool.pieces(sending.what) {
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        let Some(next) = pieces.get_mut(count).filter(|_| bytes < most) else { break };
        let piece = &piece[skip..];
        let piece = &piece[..piece.len().min(most - bytes)];
        *next = IoSlice::new(piece);
        (count, bytes, skip) = (count + 1, bytes + piece.len(), 0);
    }
    (count, bytes)
}

fn length(what: Outgoing, pool: &Pool) -> usize {
    pool.pieces(what).map(<[u8]>::len).sum()
}

fn class(how: Intake) -> Class {
    match how {
        Intake::Once { class, .. } => class,
        Intake::Many { .. } | Intake::Last { .. } => Class::Small,
    }
}

/// The same as one receive.
fn single(how: Intake, nonempty: bool) -> Intake {
    match how {
        Intake::Many { .. } => Intake::Once { class: Class::Small, wait_first: !nonempty },
        how => how,
    }
}

/// What a session without TLS would have been told.
fn errno(fault: Fault) -> Errno {
    match fault {
        Fault::Alert | Fault::CertificateRefused | Fault::CutOff => Errno::ECONNRESET,
        _ => Errno::EPROTO,
    }
}

#[cfg(test)]
mod tests;
