//! One connection of the balancer, with a simulated kernel between it and its peer: what is armed,
//! what is in flight, what has arrived. Every operation that a kernel would not forgive is a
//! failure.

use std::collections::VecDeque;

use lb::proxy::outlook::Outlook;
use lb::proxy::{Event, Intake, Received, Side};
use lb::ring::pool::{Class, Outgoing, Pool, Stock};
use nix::errno::Errno;

use crate::dice::Dice;
use crate::message::METHODS;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Open,
    /// Finished sending.
    Fin,
    Reset,
}

/// The capacity of a socket's buffers each way, in bytes.
const WINDOW: usize = 32 << 10;

pub struct Wire {
    pub side: Side,
    /// From the peer to the balancer.
    inward: VecDeque<u8>,
    inward_end: End,
    /// From the balancer to the peer.
    pub outward: VecDeque<u8>,
    pub outward_end: End,
    armed: Option<Intake>,
    cancelled: bool,
    /// The armed receive took data when the end had already arrived, and lost the wake-up for that
    /// (as Linux 6.18 may).
    asleep: bool,
    sending: Option<Outgoing>,
    send_cancelled: bool,
    /// The kernel was asked whether it takes more.
    room_asked: bool,
    room_cancelled: bool,
    /// The balancer has closed its socket.
    pub closed: bool,
    /// The peer has closed its own socket altogether.
    pub left: bool,
    /// A reset is reported once; after that the stream reads as merely ended.
    told: bool,
    /// How many bytes the balancer has read.
    pub consumed: usize,
    /// Where what nobody asked for begins in the stream from the peer.
    pub unasked_at: Option<usize>,
    /// How many bytes the balancer's kernel has taken.
    sent: usize,
    /// Some of that had been read when the send in flight began.
    spoiled: bool,
}

impl Wire {
    pub fn new(side: Side) -> Wire {
        Wire {
            side,
            inward: VecDeque::new(),
            inward_end: End::Open,
            outward: VecDeque::new(),
            outward_end: End::Open,
            armed: None,
            cancelled: false,
            asleep: false,
            sending: None,
            send_cancelled: false,
            room_asked: false,
            room_cancelled: false,
            closed: false,
            left: false,
            told: false,
            consumed: 0,
            unasked_at: None,
            spoiled: false,
            sent: 0,
        }
    }

    // What the peer does.

    /// How many bytes the peer may write now.
    pub fn room(&self) -> usize {
        WINDOW.saturating_sub(self.inward.len())
    }

    pub fn write(&mut self, bytes: &[u8]) {
        assert_eq!(self.inward_end, End::Open, "the simulated peer speaks after its end");
        if !self.closed {
            self.inward.extend(bytes);
        } else if !bytes.is_empty() {
            self.reset_peer();
        }
    }

    pub fn finish(&mut self) {
        if self.inward_end == End::Open {
            self.inward_end = End::Fin;
        }
    }

    /// The peer resets the connection; the last that it sent may be lost.
    pub fn reset(&mut self, dice: &mut Dice) {
        self.inward_end = End::Reset;
        self.left = true;
        self.outward.clear();
        if dice.one_in(2) {
            let kept = dice.below(self.inward.len() + 1);
            self.inward.truncate(kept);
        }
    }

    /// The peer closes: a reset follows if it had not read everything, or if it is sent more.
    pub fn leave(&mut self, dice: &mut Dice) {
        if self.outward.is_empty() {
            self.finish();
            self.left = true;
        } else {
            self.reset(dice);
        }
    }

    // What the balancer asks for.

    pub fn arm(&mut self, how: Intake) {
        assert!(!self.closed, "a receive on a closed socket");
        assert!(self.armed.is_none(), "two receives on one socket");
        self.armed = Some(how);
        (self.cancelled, self.asleep) = (false, false);
    }

    pub fn cancel_receive(&mut self) {
        self.cancelled = self.armed.is_some();
    }

    pub fn send(&mut self, what: Outgoing) {
        assert!(!self.closed, "a send on a closed socket");
        assert!(self.sending.is_none(), "two sends on one socket");
        assert_eq!(self.outward_end, End::Open, "a send after the end of sending");
        self.spoiled = self.unasked_at.is_some_and(|at| self.consumed > at);
        self.sending = Some(what);
        self.send_cancelled = false;
    }

    pub fn cancel_send(&mut self) {
        self.send_cancelled = self.sending.is_some();
    }

    pub fn await_room(&mut self) {
        assert!(!self.closed && !self.room_asked, "room is asked for once");
        (self.room_asked, self.room_cancelled) = (true, false);
    }

    pub fn cancel_room(&mut self) {
        self.room_cancelled = self.room_asked;
    }

    pub fn finish_writing(&mut self) {
        assert!(!self.closed && self.sending.is_none(), "an end with a send in flight");
        self.outward_end = End::Fin;
    }

    pub fn close(&mut self, reset: bool) {
        assert!(!self.closed, "a socket closed twice");
        assert!(self.armed.is_none(), "closed while a receive is armed");
        assert!(self.sending.is_none(), "closed while a send is in flight");
        assert!(!self.room_asked, "closed while it waits for room");
        self.closed = true;
        if reset || !self.inward.is_empty() {
            self.reset_peer();
        } else if self.outward_end == End::Open {
            self.outward_end = End::Fin;
        }
    }

    /// A kernel resets a connection that is closed with bytes unread, or sent to after the close;
    /// the peer loses what it has not read yet.
    fn reset_peer(&mut self) {
        self.outward_end = End::Reset;
        self.outward.clear();
    }

    pub fn idle(&self) -> bool {
        self.armed.is_none() && self.sending.is_none() && !self.room_asked
    }

    // What the kernel does.

    /// Answers the question whether the socket takes more, if it does or never will.
    pub fn answer_room(&mut self) -> Option<Event> {
        let roomy = self.is_roomy();
        let gone = self.left || self.inward_end == End::Reset;
        if !self.room_asked || !(roomy || gone || self.room_cancelled) {
            return None;
        }
        self.room_asked = false;
        Some(Event::Room { side: self.side })
    }

    /// Completes the armed receive, if anything has arrived for it.
    pub fn receive(&mut self, pool: &mut Pool, dice: &mut Dice) -> Option<Event> {
        let how = self.armed?;
        if self.cancelled && dice.one_in(2) {
            return Some(self.received(Received::Stopped, false));
        }
        if self.asleep && !self.cancelled {
            return None;
        }
        if self.inward.is_empty() {
            let what = match self.inward_end {
                End::Open if self.cancelled => Received::Stopped,
                End::Open => return None,
                End::Fin => Received::End,
                End::Reset if self.told => Received::End,
                End::Reset => Received::Failed(Errno::ECONNRESET),
            };
            return Some(self.received(what, false));
        }
        let (class, stock) = match how {
            Intake::Many { .. } => (Class::Small, Stock::Common),
            Intake::Once { class, .. } => (class, Stock::Common),
            Intake::Last { .. } => (Class::Small, Stock::Reserve),
        };
        let set_aside = pool.set_aside(class, stock);
        let Some(mut buf) = set_aside.inspect(|_| pool.took(class, stock)) else {
            return Some(self.received(Received::NoBuffers, false));
        };
        let here = self.inward.len().min(class.bytes());
        let count = if dice.one_in(3) { dice.some(here) } else { here };
        let bytes: Vec<u8> = self.inward.drain(..count).collect();
        self.consumed += count;
        assert_eq!(pool.append(&mut buf, &bytes), count);
        let more = match how {
            Intake::Many { bytes_max } => {
                let left = bytes_max.saturating_sub(count as u32);
                self.armed = Some(Intake::Many { bytes_max: left });
                let ended = self.inward.is_empty() && self.inward_end != End::Open;
                self.asleep = ended && dice.one_in(3);
                left > 0
            }
            Intake::Once { .. } | Intake::Last { .. } => false,
        };
        Some(self.received(Received::Data(buf), more))
    }

    fn received(&mut self, what: Received, more: bool) -> Event {
        if !more {
            self.armed = None;
            self.cancelled = false;
        }
        Event::Received { side: self.side, what, more, nonempty: !self.inward.is_empty() }
    }

    /// Completes the send in flight, if the peer has room for all of it or never will.
    pub fn complete_send(&mut self, pool: &Pool, dice: &mut Dice) -> Option<Event> {
        let what = self.sending?;
        let gone = self.left || self.inward_end == End::Reset;
        let bytes: Vec<u8> = pool.pieces(what).flatten().copied().collect();
        let begins = begins_request(&bytes);
        assert!(!(begins && self.spoiled), "a connection that said too much is used again");
        if gone || self.send_cancelled {
            self.sending = None;
            self.told |= gone;
            let errno = if gone { Errno::EPIPE } else { Errno::ECANCELED };
            let part = if dice.one_in(2) { 0 } else { dice.below(bytes.len()) };
            if part == 0 {
                return Some(Event::Sent { side: self.side, result: Err(errno) });
            }
            if !gone {
                self.outward.extend(&bytes[..part]);
                self.sent += part;
            }
            return Some(Event::Sent { side: self.side, result: Ok(part as u32) });
        }
        if self.outward.len() > WINDOW {
            return None;
        }
        self.sending = None;
        let part = if dice.one_in(20) { dice.some(bytes.len()) } else { bytes.len() };
        self.outward.extend(&bytes[..part]);
        self.sent += part;
        Some(Event::Sent { side: self.side, result: Ok(part as u32) })
    }
}

/// Whether these are a request's first bytes; the rest of a send may begin within its first line.
fn begins_request(bytes: &[u8]) -> bool {
    let second = bytes.split(|byte| *byte == b'\n').nth(1);
    let method = bytes.split(|byte| *byte == b' ').next().unwrap_or_default();
    second == Some(b"Host: sim\r") && METHODS.iter().any(|known| known.as_bytes() == method)
}

impl Wire {
    /// Whether it takes more at once.
    pub fn is_roomy(&self) -> bool {
        self.outward.len() <= WINDOW * 2 / 3
    }

    /// What the kernel says about the send queue. All that the peer has not read yet counts as
    /// queued.
    pub fn outlook(&self) -> Outlook {
        Outlook {
            queued: self.outward.len() as u32,
            acknowledged: (self.sent - self.outward.len()) as u64,
            dead: self.left || self.inward_end == End::Reset,
            ..Outlook::default()
        }
    }

    /// Whether the balancer does not know about the end, and never will by itself.
    pub fn is_asleep(&self) -> bool {
        self.asleep && self.armed.is_some()
    }

    /// Whether the peer is still sending.
    pub fn inward_is_open(&self) -> bool {
        self.inward_end == End::Open && !self.left
    }
}
