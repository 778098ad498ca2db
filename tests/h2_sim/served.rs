//! One request at a backend that speaks HTTP/2: it is compared with what its user meant to say, and answered, or
//! treated in one of the other ways in which backends treat requests.

use std::task::Context;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Method, Request, Response, StatusCode};

use crate::dice::{Dice, content};
use crate::flow::{Ending, Inflow, Outflow, PROMISE};
use crate::http1::{self, Asked, Seen};
use crate::message::{Framing, Head};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    None,
    /// Is reset before anything is done about it.
    Refused,
    /// Is reset without an answer.
    Silent,
    /// The answer is reset in the middle.
    HalfAnswer,
    /// Never answers.
    Stalls,
    /// Answers before it has read the request, and does not care for the rest.
    Hasty,
    /// The same, but reads on.
    Early,
}

const REASONS: &[Reason] = &[
    Reason::CANCEL,
    Reason::INTERNAL_ERROR,
    Reason::PROTOCOL_ERROR,
    Reason::ENHANCE_YOUR_CALM,
    Reason::NO_ERROR,
];

impl Trouble {
    pub fn random(dice: &mut Dice) -> Trouble {
        dice.pick(&[
            Trouble::Refused,
            Trouble::Silent,
            Trouble::HalfAnswer,
            Trouble::Stalls,
            Trouble::Hasty,
            Trouble::Early,
        ])
    }
}

pub struct Served {
    asked: Asked,
    trouble: Trouble,
    reason: Reason,
    request: Option<Inflow>,
    respond: SendResponse<Bytes>,
    answer: Option<Outflow>,
    is_over: bool,
    /// It answers so much later.
    delay: usize,
}

impl Served {
    pub fn new(
        host: &str,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        trouble: Trouble,
        seen: &mut Seen,
        dice: &mut Dice,
    ) -> Served {
        let (parts, coming) = request.into_parts();
        let asked = http1::understood(&head(&parts), host, http1::Trouble::None);
        let (id, reason) = (asked.id, dice.pick(REASONS));
        if trouble == Trouble::Refused {
            respond.send_reset(Reason::REFUSED_STREAM);
        } else {
            assert!(!seen.heard.contains(&id), "a request is repeated after its answer began");
            *seen.heads.entry(id).or_default() += 1;
        }
        let promise = parts.headers.contains_key(PROMISE).then_some(id);
        let request = Some(Inflow::new(coming, content(id * 2, asked.length), promise));
        let is_over = trouble == Trouble::Refused;
        let delay = if dice.one_in(3) { dice.below(60) } else { 0 };
        Served { asked, trouble, reason, request, respond, answer: None, is_over, delay }
    }

    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Does some of what it may do now; returns whether it did anything.
    pub fn step(&mut self, cx: &mut Context<'_>, dice: &mut Dice) -> bool {
        let is_reset = match &mut self.answer {
            Some(answer) => answer.is_reset(cx),
            None => self.respond.poll_reset(cx).is_ready(),
        };
        self.is_over |= is_reset;
        if self.is_over {
            return false;
        }
        if self.trouble == Trouble::Silent && dice.one_in(8) {
            self.respond.send_reset(self.reason);
            self.is_over = true;
            return true;
        }
        let mut any = self.read(cx, dice);
        let answers_early = matches!(self.trouble, Trouble::Hasty | Trouble::Early);
        let mute = matches!(self.trouble, Trouble::Silent | Trouble::Stalls);
        if self.answer.is_none() && !mute && (self.request.is_none() || answers_early) {
            if self.delay > 0 {
                self.delay -= 1;
                return true;
            }
            self.begin_answer(dice);
            return true;
        }
        let Some(answer) = &mut self.answer else { return any };
        let is_cut = self.trouble == Trouble::HalfAnswer;
        any |= answer.step(!is_cut, cx, dice);
        if is_cut && answer.is_sent() && dice.one_in(4) {
            answer.reset(self.reason);
            self.is_over = true;
        }
        self.is_over |=
            answer.is_over() && (self.request.is_none() || self.trouble == Trouble::Hasty);
        any
    }

    fn read(&mut self, cx: &mut Context<'_>, dice: &mut Dice) -> bool {
        let Some(request) = self.request.as_mut().filter(|_| self.trouble != Trouble::Hasty) else {
            return false;
        };
        let (any, ending) = request.step(cx, dice);
        match ending {
            None => {}
            Some(Ending::Whole) => self.request = None,
            Some(Ending::Cut(_)) => self.is_over = true,
        }
        any
    }

    fn begin_answer(&mut self, dice: &mut Dice) {
        let Asked { id, answer, answer_length, .. } = self.asked;
        if dice.one_in(6) {
            let hints = Response::builder().status(StatusCode::EARLY_HINTS).header("link", "a");
            // A stream that was reset says so when it is looked at.
            drop(self.respond.send_informational(hints.body(()).expect("a response")));
        }
        let is_bare = self.asked.method == Method::HEAD.as_str() || answer == Framing::None;
        let status = if answer == Framing::None { 204 } else { 200 };
        let promises = answer == Framing::Chunked && !is_bare && dice.one_in(2);
        let mut head = Response::builder().status(status).header("x-id", id);
        if promises {
            head = head.header(PROMISE, "yes");
        }
        if answer == Framing::Length {
            head = head.header("content-length", answer_length);
        }
        // Half of the answer's end may be lost with the connection, but never seems to be the whole.
        let is_cut = self.trouble == Trouble::HalfAnswer && !is_bare;
        let head = head.body(()).expect("a response");
        let Ok(going) = self.respond.send_response(head, is_bare) else {
            self.is_over = true;
            return;
        };
        let body = if is_bare { Vec::new() } else { content(id * 2 + 1, answer_length) };
        let mut flow = Outflow::new(going, body, promises.then_some(id));
        if is_cut {
            flow.truncate(dice.below(answer_length + 1));
        }
        if is_bare {
            flow.conclude();
        }
        self.answer = Some(flow);
    }
}

/// The head of a request, as it would be in HTTP/1.1.
fn head(parts: &http::request::Parts) -> Head {
    let path = parts.uri.path_and_query().expect("a path");
    let host = parts.uri.authority().expect("an authority");
    let text = |value: &http::HeaderValue| value.to_str().expect("text").to_string();
    let fields = parts.headers.iter().map(|(name, value)| (name.to_string(), text(value)));
    let host = ("host".to_string(), host.to_string());
    let start = format!("{} {path} HTTP/1.1", parts.method);
    Head { start, fields: fields.chain([host]).collect(), bytes: 0 }
}
