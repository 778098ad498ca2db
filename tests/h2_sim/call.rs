//! One request of a user: what it says on its stream, and whether what it hears is its answer.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::Reason;
use h2::client::{ResponseFuture, SendRequest};
use http::Response;

use crate::dice::Dice;
use crate::flow::{Ending, Inflow, Outflow, PROMISE};
use crate::message::{Framing, Request};

/// What a user does to a request of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Whim {
    None,
    /// Resets it after so many turns.
    Resets(usize),
    /// Never reads the content of the answer.
    Shut,
    /// Announces more content than it sends.
    Lies,
}

/// How it has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// `is_served`: by a backend.
    Answered {
        is_served: bool,
    },
    Cut,
    /// No backend has got it, and the user was told so.
    Unseen,
    /// The user's own doing.
    Dropped,
}

pub struct Call {
    pub request: Request,
    whim: Whim,
    going: Option<Outflow>,
    answer: Option<ResponseFuture>,
    coming: Option<Inflow>,
    /// A backend's answer has begun.
    is_served: bool,
    pub fate: Option<Fate>,
}

impl Call {
    /// Begins a request; `None` if the connection takes none any more.
    pub fn begin(
        request: Request,
        calm: bool,
        sender: &mut SendRequest<Bytes>,
        dice: &mut Dice,
    ) -> Option<Call> {
        let whim = match (calm, dice.below(24)) {
            (false, 0..3) => Whim::Resets(dice.below(300)),
            (false, 3) => Whim::Shut,
            (false, 4) if request.framing == Framing::Length => Whim::Lies,
            _ => Whim::None,
        };
        let promises = request.framing == Framing::Chunked && dice.one_in(2);
        let is_whole =
            request.framing == Framing::None || request.length == 0 && !promises && dice.one_in(2);
        let mut head = http::Request::builder()
            .method(request.method)
            .uri(format!("http://{}{}", request.host, request.path()))
            .header("x-user", request.user);
        if promises {
            head = head.header(PROMISE, "yes");
        }
        if request.framing == Framing::Length {
            let length = request.length + usize::from(whim == Whim::Lies);
            head = head.header("content-length", length);
        }
        if request.expect {
            head = head.header("expect", "100-continue");
        }
        if dice.one_in(4) {
            head = head.header("x-forwarded-for", "6.6.6.6");
        }
        let is_whole = is_whole && whim != Whim::Lies;
        let head = head.body(()).expect("a request");
        let (answer, going) = sender.send_request(head, is_whole).ok()?;
        let mut going = Outflow::new(going, request.content(), promises.then_some(request.id));
        if is_whole {
            going.conclude();
        }
        let answer = Some(answer);
        let going = Some(going);
        Some(Call { request, whim, going, answer, coming: None, is_served: false, fate: None })
    }

    /// Does some of what it may do now; returns whether it did anything.
    pub fn step(&mut self, cx: &mut Context<'_>, dice: &mut Dice) -> bool {
        if self.fate.is_some() {
            return false;
        }
        if let Whim::Resets(left) = &mut self.whim {
            if *left == 0 {
                self.going.iter_mut().for_each(|going| going.reset(Reason::CANCEL));
                self.end(Fate::Dropped);
                return true;
            }
            *left -= 1;
        }
        let sent = self.going.as_mut().is_some_and(|going| going.step(true, cx, dice));
        sent | self.listen(cx) | self.read(cx, dice)
    }

    /// What it still waits for, if it does.
    pub fn waits_for(&self) -> Option<String> {
        let Call { request, going, answer, coming, .. } = self;
        let sends = going.as_ref().is_some_and(|going| !going.is_over());
        let got = coming.as_ref().map(|coming| coming.got);
        let state = format!("sends: {sends}, no head: {}, got: {got:?}", answer.is_some());
        self.fate.is_none().then(|| format!("{request:?}: {state}"))
    }

    fn end(&mut self, fate: Fate) {
        (self.answer, self.coming, self.going) = (None, None, None);
        self.fate = Some(fate);
    }

    /// The connection is gone: what has not come will not.
    pub fn give_up(&mut self) {
        if self.fate.is_none() {
            self.end(Fate::Dropped);
        }
    }

    /// Waits for the head of the answer.
    fn listen(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(answer) = &mut self.answer else { return false };
        while let Poll::Ready(Some(Ok(interim))) = answer.poll_informational(cx) {
            assert!(matches!(interim.status().as_u16(), 100 | 103), "{interim:?}");
        }
        match Pin::new(answer).poll(cx) {
            Poll::Pending => return false,
            Poll::Ready(Ok(response)) => {
                let (parts, coming) = response.into_parts();
                self.answer = None;
                self.judge(&Response::from_parts(parts, ()), coming);
            }
            Poll::Ready(Err(error)) => {
                let was_refused = error.reason() == Some(Reason::REFUSED_STREAM);
                let is_unseen = was_refused || error.is_go_away();
                self.end(if is_unseen { Fate::Unseen } else { Fate::Cut });
            }
        }
        true
    }

    /// An answer is the backend's to this very request, or the balancer's own.
    fn judge(&mut self, head: &Response<()>, coming: h2::RecvStream) {
        let request = &self.request;
        let field = |name: &str| head.headers().get(name).map(|it| it.to_str().expect("text"));
        let is_bare = request.method == "HEAD" || request.answer == Framing::None;
        assert!(field("connection").is_none(), "{head:?}");
        let Some(id) = field("x-id") else {
            let status = head.status().as_u16();
            // What a backend says unasked may be taken for an answer by whoever comes next.
            let is_stray = status == 200 && self.request.answer != Framing::None;
            assert!(matches!(status, 400..=599) || is_stray, "{head:?}");
            return self.end(Fate::Answered { is_served: false });
        };
        assert_eq!(id, request.id.to_string(), "an answer to another request");
        assert_eq!(head.status().as_u16(), if request.answer == Framing::None { 204 } else { 200 });
        assert!(field("date").is_some(), "{head:?}");
        if let Some(length) = field("content-length").filter(|_| request.answer != Framing::None) {
            assert_eq!(length, request.answer_length.to_string());
        }
        self.is_served = true;
        let wanted = if is_bare { Vec::new() } else { request.answer_content() };
        let promise = field(PROMISE).map(|_| request.id);
        self.coming = Some(Inflow::new(coming, wanted, promise));
    }

    fn read(&mut self, cx: &mut Context<'_>, dice: &mut Dice) -> bool {
        let Some(coming) = self.coming.as_mut().filter(|_| self.whim != Whim::Shut) else {
            return false;
        };
        let (any, ending) = coming.step(cx, dice);
        let is_served = self.is_served;
        let fate = match ending {
            None => return any,
            Some(Ending::Whole) => Fate::Answered { is_served },
            // Whoever has answered in full may stop the request so (RFC 9113 section 8.1).
            Some(Ending::Cut(Some(Reason::NO_ERROR))) => {
                assert!(coming.is_whole(), "cut after {} bytes as if whole", coming.got);
                Fate::Answered { is_served }
            }
            Some(Ending::Cut(_)) => Fate::Cut,
        };
        self.end(fate);
        true
    }
}
