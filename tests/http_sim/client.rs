//! Users: some patient, some hostile. Each knows what it asked for, and accepts nothing else.

use std::collections::VecDeque;

use crate::dice::Dice;
use crate::message::{Framing, Head, Request, damaged, dechunk};
use crate::services::host;
use crate::weather::Weather;
use crate::wire::{End, Wire};

/// What a user is up to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    Good,
    /// Sends everything at once, and says that it will send no more.
    HalfClosing,
    /// Resets the connection at some point.
    Resetting,
    /// Stops in the middle of a request.
    Truncating,
    /// Sends what is not a request.
    Malformed,
    /// Reads nothing for a long while.
    NotReading,
    /// Never reads anything.
    Deaf,
    /// Sends requests in which some bytes are wrong, and accepts whatever comes.
    Noisy,
}

const MALFORMED: &[&str] = &[
    "GET / HTTP/1.1\r\n\r\n",
    "GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "POST /0/POST/9/Length/9 HTTP/1.1\r\nHost: sim\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "GET / HTTP/1.1\nHost: x\n\n",
    "GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "GET / HTTP/3.0\r\nHost: x\r\n\r\n",
];

pub struct Client {
    pub manner: Manner,
    pub requests: Vec<Request>,
    /// How many requests it has begun to write, and how many responses have arrived complete.
    begun: usize,
    pub answered: usize,
    /// How many answers a backend gave.
    served: usize,
    /// How many requests no backend may serve.
    refused: usize,
    head: VecDeque<u8>,
    body: VecDeque<u8>,
    waits_for_continue: bool,
    depth: usize,
    inbox: Vec<u8>,
    last: bool,
    tunnel: Option<(Vec<u8>, usize)>,
    /// In a tunnel it finishes with its last word, without waiting for the echo.
    hasty: bool,
    patience: usize,
    pub ended: Option<End>,
    /// How it logs in.
    scheme: &'static str,
}

impl Manner {
    fn random(weather: &Weather, dice: &mut Dice) -> Manner {
        match (weather.calm, dice.below(12)) {
            (_, 4..) if weather.stalled => Manner::Deaf,
            _ if weather.noisy => Manner::Noisy,
            (true, 0..2) | (false, 0) => Manner::HalfClosing,
            (true, 2) => Manner::Malformed,
            (true, _) => Manner::Good,
            (false, 1) => Manner::Resetting,
            (false, 2) => Manner::Truncating,
            (false, 3) => Manner::Malformed,
            (false, 4) => Manner::NotReading,
            (false, _) => Manner::Good,
        }
    }
}

impl Client {
    /// The user who comes as the `place`th, with requests from `next_id` on.
    pub fn arriving(weather: &Weather, next_id: &mut u64, place: usize, dice: &mut Dice) -> Client {
        let manner = Manner::random(weather, dice);
        let count = 1 + dice.below(6);
        let mut requests = Vec::new();
        for _ in 0..count {
            let mut request = Request::random(*next_id, dice, weather.longest);
            // A user that finishes at once cannot wait for 100 (Continue), nor go on in a tunnel.
            if manner == Manner::HalfClosing {
                (request.expect, request.upgrade) = (false, false);
            }
            request.user = place;
            request.host = host(weather, *next_id as usize);
            requests.push(request);
            *next_id += 1;
        }
        Client {
            manner,
            requests,
            begun: 0,
            answered: 0,
            served: 0,
            refused: 0,
            head: VecDeque::new(),
            body: VecDeque::new(),
            waits_for_continue: false,
            depth: if dice.one_in(2) { 1 } else { 1 + dice.below(4) },
            inbox: Vec::new(),
            last: false,
            tunnel: None,
            hasty: dice.one_in(2),
            patience: match manner {
                Manner::Resetting => dice.below(300),
                _ => 200 + dice.below(2000),
            },
            ended: None,
            scheme: weather.scheme,
        }
    }

    /// Whether it takes what it is sent, sooner or later.
    pub fn reads(&self) -> bool {
        !matches!(self.manner, Manner::NotReading | Manner::Deaf)
    }

    pub fn is_deaf(&self) -> bool {
        self.manner == Manner::Deaf
    }

    /// What it has sent a part of, or waits for, in the order of its requests.
    pub fn waits_for(&self) -> &[Request] {
        &self.requests[self.answered.min(self.begun)..self.begun]
    }

    /// Compares what it has received with what it was owed, once it has gone.
    pub fn hold_to_account(&self, weather: &Weather, drained: bool) {
        if self.is_deaf() {
            assert!(self.ended.is_some(), "a user who takes nothing has been given up");
        } else if weather.calm && drained {
            assert_eq!(self.ended, Some(End::Fin), "{:?}", self.manner);
            assert!(self.has_no_half_answer(), "a response was cut by a drain");
        } else if weather.calm {
            let count = self.requests.len();
            let got = (self.served, self.answered);
            assert_eq!(got, (count - self.refused, count), "{:?}", self.manner);
            assert_eq!(self.ended, Some(End::Fin), "{:?}", self.manner);
            assert!(self.tunnel_is_whole(), "a tunnel lost bytes");
        }
    }

    /// Has its turn: goes on, and leaves a tunnel in which all is said.
    pub fn turn(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        self.step(wire, dice) | self.leave_tunnel(wire)
    }

    /// Does some of what it may do now; returns whether it did anything.
    pub fn step(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        if self.ended.is_some() {
            return false;
        }
        self.patience = self.patience.saturating_sub(1);
        if self.manner == Manner::Noisy {
            return self.make_noise(wire, dice);
        }
        let read = self.read(wire, dice);
        if self.ended.is_some() {
            return true;
        }
        match self.manner {
            Manner::Resetting if self.patience == 0 => {
                wire.reset(dice);
                self.ended = Some(End::Reset);
                true
            }
            _ => self.write(wire, dice) || read,
        }
    }

    /// What it sends may mean something other than intended, so nothing is known about the answers
    /// except that they are answers.
    fn make_noise(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        self.inbox.extend(wire.outward.drain(..));
        let shown = self.inbox.len().min(b"HTTP/1.1 ".len());
        assert!(b"HTTP/1.1 ".starts_with(&self.inbox[..shown]), "an answer without a status line");
        if wire.outward_end != End::Open || dice.one_in(2_000) {
            wire.finish();
            self.ended = Some(wire.outward_end);
            return true;
        }
        if let Some(request) = self.requests.get(self.begun) {
            let whole = [request.head(self.scheme, dice), request.body(dice)].concat();
            self.head.extend(damaged(whole, dice));
            self.begun += 1;
        }
        if self.head.is_empty() {
            return dice.one_in(20) && self.finish_noise(wire);
        }
        let count = dice.some(self.head.len()).min(self.head.len()).min(wire.room());
        let bytes: Vec<u8> = self.head.drain(..count).collect();
        if wire.inward_is_open() {
            wire.write(&bytes);
        }
        count > 0
    }

    fn finish_noise(&mut self, wire: &mut Wire) -> bool {
        let open = wire.inward_is_open();
        wire.finish();
        open
    }

    fn write(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        if self.begin_next(wire, dice) {
            return true;
        }
        let queue = match (&mut self.head, &mut self.body) {
            (head, _) if !head.is_empty() => head,
            (_, body) if !body.is_empty() && !self.waits_for_continue => body,
            _ => return false,
        };
        let count = dice.some(queue.len()).min(queue.len()).min(wire.room());
        let bytes: Vec<u8> = queue.drain(..count).collect();
        wire.write(&bytes);
        if self.manner == Manner::Truncating && self.begun == self.requests.len() && dice.one_in(4)
        {
            self.head.clear();
            self.body.clear();
            wire.finish();
        }
        count > 0
    }

    fn begin_next(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        let idle = self.head.is_empty() && self.body.is_empty() && self.tunnel.is_none();
        let ahead = self.begun - self.answered;
        if !idle || self.last || ahead >= self.depth && self.manner != Manner::HalfClosing {
            return false;
        }
        // Nobody knows what follows a request that may change the protocol, or be the last.
        if ahead > 0 && self.requests[self.begun - 1].upgrade {
            return false;
        }
        let Some(request) = self.requests.get(self.begun) else {
            return self.finish_asking(wire);
        };
        self.begun += 1;
        if self.manner == Manner::Malformed && self.begun == self.requests.len() {
            let meant = &mut self.requests[self.begun - 1];
            // One of them goes wrong only after its head, which a backend may have by then.
            let named = format!("Host: {}\r\nX-User: {}\r\n", meant.host, meant.user);
            self.head = dice.pick(MALFORMED).replace("Host: sim\r\n", &named).bytes().collect();
            (meant.method, meant.newer, meant.upgrade) = ("GET", true, false);
            self.refused = 1;
            return true;
        }
        self.head = request.head(self.scheme, dice).into();
        self.body = request.body(dice).into();
        self.waits_for_continue = request.expect && dice.one_in(2);
        if request.close || !request.newer {
            // It says itself that nothing will follow.
            self.requests.truncate(self.begun);
        }
        true
    }

    fn finish_asking(&mut self, wire: &mut Wire) -> bool {
        if self.manner == Manner::HalfClosing && wire.inward_is_open() {
            wire.finish();
            return true;
        }
        if self.answered == self.requests.len() && self.ended.is_none() && wire.inward_is_open() {
            wire.finish();
            return true;
        }
        false
    }

    fn read(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        let stalls = self.manner == Manner::NotReading && self.patience > 0;
        if stalls || self.manner == Manner::Deaf {
            return false;
        }
        let here = wire.outward.len();
        let count = if dice.one_in(2) { here } else { dice.below(here + 1) };
        self.inbox.extend(wire.outward.drain(..count));
        let mut any = count > 0;
        while self.take_one() {
            any = true;
        }
        if wire.outward.is_empty() && wire.outward_end != End::Open {
            self.connection_ended(wire.outward_end);
            wire.finish();
            any = true;
        }
        any
    }

    /// Takes a whole message out of the inbox.
    fn take_one(&mut self) -> bool {
        if let Some((echoed, sent)) = &mut self.tunnel {
            echoed.append(&mut self.inbox);
            assert!(echoed.len() <= *sent, "a tunnel gave more than was sent");
            return false;
        }
        let Some(head) = Head::read(&self.inbox) else { return false };
        let request = self.current(&head);
        let status: u16 = head.start[9..12].parse().expect("a status");
        assert!(head.start.starts_with("HTTP/1.1 "), "{head:?}");
        if status < 200 {
            self.interim(&request, status, &head);
            return true;
        }
        let bare = request.method == "HEAD" || matches!(status, 204 | 304);
        let Some((content, bytes)) = self.whole_body(&head, bare) else { return false };
        self.judge(&request, status, &head, &content, bare);
        self.inbox.drain(..bytes);
        self.waits_for_continue = false;
        self.answered += 1;
        let closes = head.all("connection").any(|value| value == "close");
        let all_said = self.head.is_empty() && self.body.is_empty();
        assert!(closes || all_said || self.begun > self.answered, "an answer to half a request");
        if closes {
            assert!(
                self.inbox.is_empty(),
                "something follows the last response: {head:?} {:?}",
                String::from_utf8_lossy(&self.inbox)
            );
            self.last = true;
            self.head.clear();
            self.body.clear();
        }
        true
    }

    fn current(&self, head: &Head) -> Request {
        assert!(self.answered < self.begun, "an answer to nothing: {head:?}");
        assert!(!self.last, "an answer after the last: {head:?}");
        self.requests[self.answered]
    }

    fn interim(&mut self, request: &Request, status: u16, head: &Head) {
        assert!(request.newer, "an interim response to HTTP/1.0");
        assert_eq!(head.framing().0, Framing::None, "{head:?}");
        self.inbox.drain(..head.bytes);
        if status == 100 {
            self.waits_for_continue = false;
        }
        if status == 101 {
            assert!(request.upgrade, "a change of protocol unasked");
            assert_eq!(head.one("upgrade"), Some("echo"));
            self.served += 1;
            self.answered += 1;
            let words: Vec<u8> = request.answer_content();
            self.body = words.iter().copied().collect();
            self.tunnel = Some((std::mem::take(&mut self.inbox), words.len()));
            self.requests.truncate(self.begun);
        }
    }

    /// The content of the response at the front, and its length on the wire.
    fn whole_body(&self, head: &Head, bare: bool) -> Option<(Vec<u8>, usize)> {
        let rest = &self.inbox[head.bytes..];
        if bare {
            return Some((Vec::new(), head.bytes));
        }
        match head.framing() {
            (Framing::Length, length) => Some((rest.get(..length)?.to_vec(), head.bytes + length)),
            (Framing::Chunked, _) => {
                let (content, bytes) = dechunk(rest)?;
                Some((content, head.bytes + bytes))
            }
            // Complete once the connection is, which `connection_ended` checks.
            _ => None,
        }
    }

    /// An answer is the backend's to this very request, or the balancer's own.
    fn judge(&mut self, request: &Request, status: u16, head: &Head, content: &[u8], bare: bool) {
        let Some(id) = head.one("x-id") else {
            // What a backend says unasked reaches whoever it is connected to next, unless it came
            // before that user's request went out; the wire makes sure of that.
            if head.start.ends_with("Stray") {
                return;
            }
            assert!(matches!(status, 400..=599), "{head:?}");
            // A backend that is tired of waiting says so to whoever comes next; a request that may
            // not be repeated, or is incomplete, has to take it.
            let repeatable = request.idempotent() && request.framing == Framing::None;
            if head.start.ends_with("Too Late") && !repeatable {
                return;
            }
            let own = String::from_utf8_lossy(content);
            assert!(bare || own.contains("(request "), "whose answer is this? {head:?}");
            return;
        };
        assert_eq!(id, request.id.to_string(), "an answer to another request");
        self.served += 1;
        let wanted = if request.answer == Framing::None { 204 } else { 200 };
        assert_eq!(status, wanted);
        assert!(head.one("date").is_some());
        if !request.newer {
            assert_eq!(head.one("connection"), Some("close"));
            assert_eq!(head.one("transfer-encoding"), None);
        }
        if !bare {
            assert!(content == request.answer_content(), "wrong content for {request:?}");
        }
    }

    fn connection_ended(&mut self, end: End) {
        self.ended = Some(end);
        if let Some((echoed, _)) = &self.tunnel {
            let wanted = self.requests[self.answered - 1].answer_content();
            assert!(wanted.starts_with(echoed), "a tunnel changed what was sent");
            return;
        }
        let Some(head) = Head::read(&self.inbox) else { return };
        if self.answered >= self.begun {
            panic!("an answer to nothing: {head:?}");
        }
        let request = self.requests[self.answered];
        let until_close = head.framing().0 == Framing::None;
        if until_close && end == End::Fin {
            // The end of the connection is the end of the body, so it must be complete.
            let status: u16 = head.start[9..12].parse().expect("a status");
            let content = self.inbox[head.bytes..].to_vec();
            self.judge(&request, status, &head, &content, false);
            self.answered += 1;
            self.inbox.clear();
        }
    }

    /// Whether no part of an incomplete response is left.
    fn has_no_half_answer(&self) -> bool {
        self.tunnel.is_some() || self.inbox.is_empty()
    }

    /// Whether everything in the tunnel came back.
    fn tunnel_is_whole(&self) -> bool {
        self.tunnel.as_ref().is_none_or(|(echoed, sent)| echoed.len() == *sent)
    }

    /// Leaves a tunnel once it has heard everything.
    fn leave_tunnel(&mut self, wire: &mut Wire) -> bool {
        let heard = self.hasty || self.tunnel_is_whole();
        let done = self.tunnel.is_some() && heard && self.body.is_empty();
        if done && wire.inward_is_open() {
            wire.finish();
            return true;
        }
        false
    }
}
