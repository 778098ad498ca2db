//! Content on its way in a stream of `h2`, whichever end of the stream we are at: how far it has been sent, and how
//! far what came agrees with what was meant.

use std::task::{Context, Poll};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;

use crate::dice::Dice;

/// A field that names a message, in its trailers if its head has promised them.
pub const SUM: &str = "x-sum";
pub const PROMISE: &str = "x-promise";

/// What is to be sent.
pub struct Outflow {
    going: SendStream<Bytes>,
    content: Bytes,
    /// Follow the content.
    trailers: Option<HeaderMap>,
    is_over: bool,
}

impl Outflow {
    pub fn new(going: SendStream<Bytes>, content: Vec<u8>, id: Option<u64>) -> Outflow {
        let trailers = id.map(|id| {
            HeaderMap::from_iter([(
                http::HeaderName::from_static(SUM),
                id.to_string().parse().expect("a number is a value"),
            )])
        });
        Outflow { going, content: content.into(), trailers, is_over: false }
    }

    /// Nothing more is to be sent than this.
    pub fn truncate(&mut self, length: usize) {
        self.content.truncate(length);
    }

    /// The end has been said with the head.
    pub fn conclude(&mut self) {
        self.is_over = true;
    }

    /// Whether the peer wants no more.
    pub fn is_reset(&mut self, cx: &mut Context<'_>) -> bool {
        self.going.poll_reset(cx).is_ready()
    }

    pub fn is_over(&self) -> bool {
        self.is_over
    }

    pub fn is_sent(&self) -> bool {
        self.content.is_empty()
    }

    pub fn reset(&mut self, why: Reason) {
        self.going.send_reset(why);
        self.is_over = true;
    }

    /// Sends a piece, if the windows let it; `ends`: the end follows the last.
    pub fn step(&mut self, ends: bool, cx: &mut Context<'_>, dice: &mut Dice) -> bool {
        if self.is_over || self.content.is_empty() && !ends {
            return false;
        }
        if self.content.is_empty() {
            self.is_over = true;
            // Whoever no longer listens has said so elsewhere.
            match self.trailers.take() {
                Some(trailers) => drop(self.going.send_trailers(trailers)),
                None => drop(self.going.send_data(Bytes::new(), true)),
            }
            return true;
        }
        self.going.reserve_capacity(self.content.len());
        let mut capacity = self.going.capacity();
        while capacity == 0 {
            match self.going.poll_capacity(cx) {
                Poll::Ready(Some(Ok(more))) => capacity = more,
                Poll::Ready(_) => {
                    self.is_over = true;
                    return true;
                }
                Poll::Pending => return false,
            }
        }
        let most = capacity.min(self.content.len());
        let count = if dice.one_in(3) { dice.some(most).min(most) } else { most };
        let piece = self.content.split_to(count);
        let last = ends && self.content.is_empty() && self.trailers.is_none() && dice.one_in(2);
        self.is_over = self.going.send_data(piece, last).is_err() || last;
        true
    }
}

/// How what comes has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    Whole,
    /// The stream was reset for this reason, or its connection has ended.
    Cut(Option<Reason>),
}

impl Ending {
    pub fn of(error: &h2::Error) -> Ending {
        Ending::Cut(error.reason().filter(|_| error.is_reset()))
    }
}

/// What comes.
pub struct Inflow {
    coming: RecvStream,
    wanted: Vec<u8>,
    pub got: usize,
    /// The message that promised trailers.
    promise: Option<u64>,
    unreleased: usize,
}

impl Inflow {
    pub fn new(coming: RecvStream, wanted: Vec<u8>, promise: Option<u64>) -> Inflow {
        Inflow { coming, wanted, got: 0, promise, unreleased: 0 }
    }

    pub fn is_whole(&self) -> bool {
        self.got == self.wanted.len()
    }

    /// Reads a piece, if there is one.
    pub fn step(&mut self, cx: &mut Context<'_>, dice: &mut Dice) -> (bool, Option<Ending>) {
        let released = match dice.one_in(2) {
            true => self.unreleased,
            false => dice.below(self.unreleased + 1),
        };
        if released > 0 {
            self.unreleased -= released;
            // `h2` refuses only what it never gave.
            drop(self.coming.flow_control().release_capacity(released));
        }
        match self.coming.poll_data(cx) {
            Poll::Pending => (released > 0, None),
            Poll::Ready(Some(Err(error))) => (true, Some(Ending::of(&error))),
            Poll::Ready(Some(Ok(bytes))) => {
                let end = self.got + bytes.len();
                let is_right = self.wanted.get(self.got..end).is_some_and(|some| some == bytes);
                assert!(
                    is_right,
                    "wrong content after {} bytes of {}",
                    self.got,
                    self.wanted.len()
                );
                self.got = end;
                self.unreleased += bytes.len();
                (true, None)
            }
            Poll::Ready(None) => match self.coming.poll_trailers(cx) {
                Poll::Pending => (released > 0, None),
                Poll::Ready(Err(error)) => (true, Some(Ending::of(&error))),
                Poll::Ready(Ok(trailers)) => {
                    self.ended(trailers.as_ref());
                    (true, Some(Ending::Whole))
                }
            },
        }
    }

    fn ended(&self, trailers: Option<&HeaderMap>) {
        let (got, wanted) = (self.got, self.wanted.len());
        assert_eq!(got, wanted, "a message that was cut looks complete");
        let sum = trailers.and_then(|trailers| trailers.get(SUM));
        let sum = sum.map(|value| value.to_str().expect("text").to_string());
        assert_eq!(sum, self.promise.map(|id| id.to_string()), "what follows the content");
    }
}
