//! Users who speak HTTP/2: many requests at a time on a connection, which some of them treat badly.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};

use crate::call::{Call, Fate};
use crate::dice::Dice;
use crate::message::{Framing, Request};
use crate::pipe::{Mouth, Pipe, pipe};
use crate::weather::Weather;
use crate::wire::{End, Wire};

/// What a user is up to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    Good,
    /// Resets the connection at some point.
    Resetting,
    /// Says at some point that it will send no more.
    Truncating,
    /// Reads nothing for a long while.
    NotReading,
    /// Takes nothing from some point on.
    Deaf,
}

type Opened = Result<(SendRequest<Bytes>, Connection<Pipe, Bytes>), h2::Error>;

enum Link {
    Handshake(Pin<Box<dyn Future<Output = Opened>>>),
    Open(Box<Connection<Pipe, Bytes>>),
    Over,
}

pub struct Client {
    pub manner: Manner,
    pub requests: Vec<Request>,
    /// How many have been answered, by whomever.
    pub answered: usize,
    pub ended: Option<End>,
    calm: bool,
    mouth: Mouth,
    link: Link,
    sender: Option<SendRequest<Bytes>>,
    calls: Vec<Call>,
    begun: usize,
    /// How many requests it has under way at most.
    depth: usize,
    patience: usize,
}

/// Frames that ask for nothing: PING, PRIORITY, one of an unknown type.
const IDLE: &[&[u8]] = &[
    &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
    &[0, 0, 5, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 7],
    &[0, 0, 1, 99, 0, 0, 0, 0, 0, 1],
];
/// It wants no streams of the balancer's.
const GOAWAY: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

impl Client {
    /// The next user, with requests from `next_id` on.
    pub fn arriving(weather: &Weather, next_id: &mut u64, _: usize, dice: &mut Dice) -> Client {
        let manner = match (weather.calm, dice.below(12)) {
            (false, 0) => Manner::Resetting,
            (false, 1) => Manner::Truncating,
            (false, 2) => Manner::NotReading,
            (false, 3) => Manner::Deaf,
            _ => Manner::Good,
        };
        let window = match weather.calm {
            // Each update is about half of a window, and is counted against what was sent.
            true => dice.pick(&[4_000, 65_535, 1 << 20]),
            false => dice.pick(&[100, 1_000, 65_535, 1 << 20]),
        };
        let longest = weather.longest.min(window as usize * 30);
        let count = 1 + dice.below(24);
        let requests = (*next_id..).take(count);
        let requests: Vec<Request> = requests.map(|id| request(id, longest, dice)).collect();
        *next_id += count as u64;
        let (pipe, mouth) = pipe();
        let handshake = Builder::new()
            .initial_window_size(window)
            .initial_connection_window_size(dice.pick(&[65_535, 1 << 20]))
            .max_frame_size(dice.pick(&[1 << 14, 1 << 20]))
            .enable_push(false)
            .handshake(pipe);
        Client {
            manner,
            requests,
            answered: 0,
            ended: None,
            calm: weather.calm,
            mouth,
            link: Link::Handshake(Box::pin(handshake)),
            sender: None,
            calls: Vec::new(),
            begun: 0,
            depth: if dice.one_in(4) { 1 } else { 1 + dice.below(16) },
            patience: if manner == Manner::NotReading { 2_000 } else { dice.below(400) },
        }
    }

    /// Whether it takes what it is sent, sooner or later.
    pub fn reads(&self) -> bool {
        !matches!(self.manner, Manner::NotReading | Manner::Deaf)
    }

    pub fn is_deaf(&self) -> bool {
        self.manner == Manner::Deaf && self.patience == 0
    }

    pub fn turn(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        self.step(wire, dice)
    }

    /// What it still waits for.
    pub fn waits_for(&self) -> Vec<String> {
        self.calls.iter().filter_map(Call::waits_for).collect()
    }

    /// Does some of what it may do now; returns whether it did anything.
    pub fn step(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        if self.ended.is_some() {
            return false;
        }
        let has_patience = self.patience > 0;
        self.patience = self.patience.saturating_sub(1);
        let reads = match self.manner {
            Manner::NotReading => !has_patience,
            Manner::Deaf => has_patience,
            _ => true,
        };
        let mut any = self.manner == Manner::NotReading && has_patience;
        any |= reads && self.mouth.read(wire, dice);
        any |= self.mouth.write(wire, dice);
        self.poll();
        any |= self.begin_next(dice);
        let cx = &mut Context::from_waker(Waker::noop());
        for call in &mut self.calls {
            any |= call.step(cx, dice);
        }
        self.count();
        self.poll();
        if matches!(self.link, Link::Open(_)) && dice.one_in(300) {
            let is_last = !self.calm && dice.one_in(4);
            self.mouth.say(if is_last { GOAWAY } else { dice.pick(IDLE) });
            any = true;
        }
        self.part(wire, dice) || any
    }

    fn poll(&mut self) {
        let cx = &mut Context::from_waker(Waker::noop());
        if let Link::Handshake(handshake) = &mut self.link {
            match handshake.as_mut().poll(cx) {
                Poll::Pending => return,
                Poll::Ready(Ok((sender, connection))) => {
                    self.sender = Some(sender);
                    self.link = Link::Open(Box::new(connection));
                }
                Poll::Ready(Err(_)) => self.link = Link::Over,
            }
        }
        if let Link::Open(connection) = &mut self.link
            && Pin::new(&mut **connection).poll(cx).is_ready()
        {
            (self.link, self.sender) = (Link::Over, None);
        }
    }

    fn begin_next(&mut self, dice: &mut Dice) -> bool {
        let cx = &mut Context::from_waker(Waker::noop());
        let under_way = self.calls.iter().filter(|call| call.fate.is_none()).count();
        let Some(sender) = &mut self.sender else { return false };
        let Some(request) = self.requests.get(self.begun) else {
            if under_way == 0 {
                // Its connection says goodbye.
                self.sender = None;
            }
            return false;
        };
        if under_way >= self.depth {
            return false;
        }
        match sender.poll_ready(cx) {
            Poll::Pending => return false,
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => {
                self.sender = None;
                return true;
            }
        }
        match Call::begin(*request, self.calm, sender, dice) {
            Some(call) => {
                self.calls.push(call);
                self.begun += 1;
            }
            None => self.sender = None,
        }
        true
    }

    fn count(&mut self) {
        let is_answered = |call: &&Call| matches!(call.fate, Some(Fate::Answered { .. }));
        self.answered = self.calls.iter().filter(is_answered).count();
    }

    /// Leaves, if it is time to.
    fn part(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        let is_late = self.patience == 0;
        if self.manner == Manner::Resetting && is_late {
            wire.reset(dice);
            self.ended = Some(End::Reset);
        } else if wire.outward.is_empty() && wire.outward_end != End::Open {
            wire.finish();
            // What has come can still be read.
            let cx = &mut Context::from_waker(Waker::noop());
            let goes_on = self.calls.iter_mut().fold(false, |any, call| any | call.step(cx, dice));
            if goes_on || self.mouth.read(wire, dice) {
                return true;
            }
            self.count();
            self.ended = Some(wire.outward_end);
        } else {
            let is_done = matches!(self.link, Link::Over) && self.mouth.is_flushed();
            let leaves = is_done || self.manner == Manner::Truncating && is_late;
            if !leaves || !wire.inward_is_open() {
                return false;
            }
            wire.finish();
        }
        if self.ended.is_some() {
            self.calls.iter_mut().for_each(Call::give_up);
        }
        true
    }

    /// Compares what it has received with what it was owed, once it has gone.
    pub fn hold_to_account(&self, weather: &Weather, drained: bool) {
        assert!(self.ended.is_some());
        if !weather.calm {
            return;
        }
        assert_eq!(self.ended, Some(End::Fin));
        for call in &self.calls {
            let is_served = call.fate == Some(Fate::Answered { is_served: true });
            let is_spared = drained && call.fate == Some(Fate::Unseen);
            assert!(is_served || is_spared, "{:?} for {:?}", call.fate, call.request);
        }
        assert!(drained || self.begun == self.requests.len(), "{} were begun", self.begun);
    }
}

fn request(id: u64, longest: usize, dice: &mut Dice) -> Request {
    let mut request = Request::random(id, dice, longest);
    // Each stream is a user of its own.
    (request.newer, request.upgrade, request.user) = (true, false, id as usize);
    if request.framing == Framing::UntilClose {
        request.framing = Framing::Chunked;
    }
    request
}
