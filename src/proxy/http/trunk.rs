//! A connection to a backend over which requests of many users go at once, by HTTP/2. Owns its line and the bytes that
//! wait to be sent on it; which request goes over it is the worker's choice, and its streams are [`Back`]'s.

use super::Kit;
use crate::proxy::http2::{Back, News};
use crate::proxy::line::{Features, Line};
use crate::proxy::{Event, Received, Side, StreamCmd};
use crate::ring::pool::{Chain, Pool};

/// Bytes to a backend that wait to be sent; beyond it, nothing more is taken from users.
const WAITING_MAX: usize = 64 * 1024;

/// What a trunk works with while it is called.
pub struct Means<'a> {
    pub pool: &'a mut Pool,
    pub kit: &'a mut Kit,
    pub features: Features,
    pub out: &'a mut Vec<StreamCmd>,
}

pub struct Trunk {
    line: Line,
    waiting: Chain,
    back: Back,
    has_ended: bool,
}

impl Trunk {
    /// A connection that has just been established.
    pub fn new(is_tls: bool, means: &mut Means<'_>) -> Trunk {
        let (line, waiting) = (Line::new(), Chain::EMPTY);
        let mut trunk = Trunk { line, waiting, back: Back::new(is_tls), has_ended: false };
        trunk.drive(means);
        trunk
    }

    /// Something happened on the connection.
    pub fn handle(&mut self, event: Event, means: &mut Means<'_>) {
        if self.has_ended {
            return self.line.settle(event, means.pool);
        }
        match event {
            Event::Received { what, more, nonempty, .. } => {
                self.line.received(&what, more, nonempty);
                match what {
                    Received::Data(buf) => {
                        self.back.received(means.pool.bytes(&buf));
                        means.pool.give_back(buf);
                    }
                    Received::End => self.back.ended(),
                    Received::Failed(_) => self.back.cut(),
                    Received::NoBuffers | Received::Stopped => {}
                }
            }
            Event::Sent { result: Ok(bytes), .. } => {
                self.line.sent(bytes as usize, &mut self.waiting, means.pool);
            }
            Event::Sent { result: Err(_), .. } => {
                means.pool.give_back_chain(self.line.send_failed());
                self.back.cut();
            }
            Event::Room { .. } => self.line.room_answered(),
            Event::Spliced { .. } => debug_assert!(false, "nothing is spliced here"),
        }
        self.drive(means);
    }

    /// Goes on from the present state.
    pub fn drive(&mut self, means: &mut Means<'_>) {
        let waiting = self.waiting.bytes() + self.line.sending().bytes();
        let most = if self.has_ended { 0 } else { WAITING_MAX.saturating_sub(waiting) };
        let mut memory = std::mem::take(&mut means.kit.scratch);
        memory.clear();
        let written = self.back.run(memory, most, means.pool);
        let added = means.kit.append(&mut self.waiting, &written, means.pool);
        means.kit.scratch = written;
        if self.has_ended {
            return;
        }
        if added.is_err() {
            self.back.cut();
        }
        let out = &mut |what| means.out.push(what);
        self.line.send(Side::Backend, &mut self.waiting, means.pool, out);
        if self.back.is_over() && self.waiting.is_empty() && self.line.sending().is_empty() {
            return self.end(means);
        }
        let sees_room =
            !self.line.is_sparing(means.pool) || self.line.sees_room(Side::Backend, out);
        let wanted = self.back.wants_bytes() && sees_room;
        let share = means.kit.share();
        self.line.ask(Side::Backend, wanted, share, means.pool, means.features, out);
    }

    /// Ends the connection; its streams are told so.
    pub fn end(&mut self, means: &mut Means<'_>) {
        if std::mem::replace(&mut self.has_ended, true) {
            return;
        }
        means.pool.give_back_chain(self.waiting.take());
        self.line.stop(Side::Backend, &mut |what| means.out.push(what));
        self.back.cut();
        self.drive(means);
    }

    /// Whether it has ended, no stream has a gateway any more and nothing is in flight.
    pub fn is_settled(&self) -> bool {
        self.has_ended && self.back.live() == 0 && !self.line.in_flight()
    }

    /// Whether it takes another request.
    pub fn has_room(&self) -> bool {
        !self.has_ended && self.back.has_room()
    }

    /// Whether no request is on it.
    pub fn is_idle(&self) -> bool {
        self.back.live() == 0
    }

    /// Takes no further requests.
    pub fn retire(&mut self) {
        self.back.retire();
    }

    /// A stream for a request.
    pub fn open(&mut self) -> Option<u32> {
        self.back.open()
    }

    /// A command of a stream's gateway; if it [is waiting](Trunk::is_waiting) then, [`Trunk::drive`] must follow, once for
    /// several.
    pub fn command(&mut self, number: u32, what: StreamCmd, pool: &mut Pool) {
        self.back.command(number, what, pool);
    }

    /// The gateway of a stream has let go of it; the same goes for this.
    pub fn forget(&mut self, number: u32) {
        self.back.forget(number);
    }

    /// Whether [`Trunk::drive`] has something to do.
    pub fn is_waiting(&self) -> bool {
        self.back.is_waiting()
    }

    /// The next thing that has happened to a stream.
    pub fn next_news(&mut self) -> Option<(u32, News)> {
        self.back.next_news()
    }

    /// Whether its receive waits for blocks.
    pub fn is_starved(&self) -> bool {
        self.line.is_starved()
    }

    /// Blocks have returned to the pool.
    pub fn feed(&mut self, means: &mut Means<'_>) {
        self.line.feed();
        self.drive(means);
    }

    /// Restarts a receive that may have missed the end of the connection.
    pub fn look_again(&mut self, out: &mut Vec<StreamCmd>) {
        self.line.look_again(Side::Backend, &mut |what| out.push(what));
    }
}
