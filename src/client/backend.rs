//! How a backend stays registered, decided without a socket: what to do when the connection is
//! established, when the balancer speaks, when it falls silent, when the user has a new wish. Time
//! and randomness come in as arguments; `stay` does what is decided here.
//!
//! ```text
//!            +-------------------- lost, refused, silent ---------------------+
//!            v                                                               |
//!  Apart -> Waiting -> Connecting -> (Expecting -> Proving ->) Joining -> Member -> Leaving
//!    ^                                                            ^         ^        |   |
//!    |                                                            |         v        |   v
//!    +---------------------------- unregistered, no connection ---+------ Guest <----+  Over
//! ```
//!
//! A member whose service is removed keeps its connection, and joins again as soon as the service is back.

use std::fmt;
use std::time::Duration;

use super::news;
use super::wire::{HELLO_ANSWER, Offer, Said, proof};
use crate::base::time::Now;
use crate::control::auth;

/// How long the balancer may take to accept the connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long a balancer that wants a proof may take to ask for it.
const CHALLENGE_WITHIN: Duration = Duration::from_secs(3);
/// How long an answer may take; the balancer connects to the backend before it answers `register`.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// How long leaving may delay the end of the program.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
/// The pause between attempts doubles, starting from the first value and limited by the second.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How often a balancer says hello unless its answer to `register` says otherwise.
const INTERVAL: Duration = Duration::from_secs(5);
/// How many hellos may be missing before the connection counts as dead.
const INTERVALS_SILENT: u32 = 3;

/// What the person or the system wants for the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    Registered,
    Unregistered,
    /// Unregistered, and the program ended.
    Gone,
}

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    Connected,
    /// The connection ended or was never established; half a sentence says why.
    Lost(String),
    Said(Box<Said>),
    Wished(Wish),
    /// A deadline may have passed.
    Time,
}

/// What to do. [`Act::Connect`] and [`Act::Disconnect`] alternate.
#[derive(Clone, PartialEq, Debug)]
pub enum Act {
    Connect,
    Disconnect,
    /// One line to the balancer, without its line end.
    Send(String),
    Tell(Notice),
    /// These balancers would take the registration, too.
    Remember(Vec<String>),
    /// The program ends; nothing follows.
    Stop,
    /// It ends as a failure, for the reason in this sentence; nothing follows.
    Fail(String),
}

/// What a person may want to read. Each is one line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    Registered,
    Unregistered,
    Hello,
    /// An attempt failed; the next one follows after this pause.
    Failed {
        why: String,
        again_in: Duration,
    },
    /// What has been done to the backend.
    News(String),
    /// The balancer asked for a proof, and there is no secret.
    NoSecret,
    /// The balancer found something odd about the registration.
    Warned {
        of: String,
    },
    /// It has not said that it checks the backend.
    Unchecked,
    /// The secret's file has become unusable, so the secret stays as it was.
    SecretKept {
        why: String,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Notice::Registered => out.write_str("registered"),
            Notice::Unregistered => out.write_str("unregistered"),
            Notice::Hello => out.write_str("hello"),
            Notice::News(news) => out.write_str(news),
            Notice::Failed { why, again_in } => {
                write!(out, "not registered: {why}; trying again in {} ms", again_in.as_millis())
            }
            Notice::NoSecret => out.write_str(
                "the balancer asks for a proof of a secret: unless the service needs none, give it with \
                 --secret-file",
            ),
            Notice::Warned { of } => write!(out, "the balancer warns: {of}"),
            Notice::Unchecked => out.write_str(
                "the balancer does not check this backend, because it knows no checks that are asked for: \
                 update it, or leave --check out",
            ),
            Notice::SecretKept { why } => write!(out, "going on with the secret as it was: {why}"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// No connection, and none wanted.
    Apart,
    /// No connection until the pause is over.
    Waiting {
        until: Now,
    },
    Connecting {
        until: Now,
    },
    /// Connected, with a secret: the balancer may ask for a proof.
    Expecting {
        until: Now,
    },
    Proving {
        until: Now,
    },
    /// Has asked to register.
    Joining {
        until: Now,
    },
    Member {
        heard: Now,
    },
    /// Has asked to unregister.
    Leaving {
        until: Now,
    },
    /// Connected but not registered, because its service has been removed. Its sessions may still run, so
    /// the connection is kept while it asks for the service again.
    Removed {
        heard: Now,
        again: Now,
    },
    /// Connected but not registered, by the user's wish.
    Guest {
        heard: Now,
    },
    Over,
}

/// The state machine. One for each backend.
#[derive(Debug)]
pub struct Registration {
    offer: Offer,
    secret: Option<Vec<u8>>,
    wish: Wish,
    state: State,
    /// Why the program is to end as a failure, if it is.
    fault: Option<String>,
    /// Whether it has ever been registered: whoever has, had the right secret then.
    was_member: bool,
    /// Whether its service was removed since it last registered on this connection.
    is_removed: bool,
    /// Attempts since the last hello received as a member; each lengthens the pause.
    failures: u32,
    interval: Duration,
}

impl Registration {
    /// A backend that wants to be registered. The first [`Event::Time`] starts it.
    pub fn new(offer: Offer, secret: Option<Vec<u8>>) -> Registration {
        Registration {
            offer,
            secret,
            wish: Wish::Registered,
            fault: None,
            was_member: false,
            is_removed: false,
            state: State::Waiting { until: Now::default() },
            failures: 0,
            interval: INTERVAL,
        }
    }

    /// Uses this secret from the next connection on.
    pub fn prove_with(&mut self, secret: Vec<u8>) {
        self.secret = Some(secret);
    }

    /// When [`Event::Time`] is due; `None` if nothing changes by itself.
    pub fn deadline(&self) -> Option<Now> {
        match self.state {
            State::Apart | State::Over => None,
            State::Waiting { until }
            | State::Connecting { until }
            | State::Expecting { until }
            | State::Proving { until }
            | State::Joining { until }
            | State::Leaving { until } => Some(until),
            State::Member { heard } | State::Guest { heard } => Some(heard.plus(self.patience())),
            State::Removed { heard, again } => Some(again.min(heard.plus(self.patience()))),
        }
    }

    /// Decides. `random` is a fresh number for every call.
    pub fn handle(&mut self, now: Now, random: u64, event: Event, acts: &mut Vec<Act>) {
        match event {
            Event::Connected => self.connected(now, acts),
            Event::Lost(why) => self.lost(now, random, &why, acts),
            Event::Said(said) => self.heard(now, random, &said, acts),
            Event::Wished(wish) => self.wished(now, wish, acts),
            Event::Time if self.deadline().is_some_and(|due| due <= now) => {
                self.late(now, random, acts);
            }
            Event::Time => {}
        }
    }

    fn patience(&self) -> Duration {
        self.interval * INTERVALS_SILENT
    }

    fn has_connection(&self) -> bool {
        !matches!(self.state, State::Apart | State::Waiting { .. } | State::Over)
    }

    fn connected(&mut self, now: Now, acts: &mut Vec<Act>) {
        if !matches!(self.state, State::Connecting { .. }) {
            return;
        }
        if self.secret.is_some() {
            self.state = State::Expecting { until: now.plus(CHALLENGE_WITHIN) };
        } else {
            self.join(now, acts);
        }
    }

    fn join(&mut self, now: Now, acts: &mut Vec<Act>) {
        acts.push(Act::Send(self.offer.register()));
        self.state = State::Joining { until: now.plus(ANSWER_WITHIN) };
    }

    fn leave(&mut self, now: Now, acts: &mut Vec<Act>) {
        acts.push(Act::Send(self.offer.unregister()));
        self.state = State::Leaving { until: now.plus(LEAVE_WITHIN) };
    }

    /// The connection ended by itself.
    fn lost(&mut self, now: Now, random: u64, why: &str, acts: &mut Vec<Act>) {
        if self.has_connection() {
            self.apart(now, random, why, acts);
        }
    }

    /// Ends a connection that is of no further use.
    fn give_up(&mut self, now: Now, random: u64, why: &str, acts: &mut Vec<Act>) {
        acts.push(Act::Disconnect);
        self.apart(now, random, why, acts);
    }

    /// The balancer's file has its service no more.
    fn removed(&mut self, now: Now, random: u64, acts: &mut Vec<Act>) {
        if matches!(self.state, State::Member { .. }) {
            self.is_removed = true;
            let why = format!("the balancer has removed service {}", self.offer.whom());
            self.ask_again(now, random, &why, acts);
        }
    }

    /// Asks for a removed service again after a pause.
    fn ask_again(&mut self, now: Now, random: u64, why: &str, acts: &mut Vec<Act>) {
        let again_in = self.next_pause(random);
        acts.push(Act::Tell(Notice::Failed { why: why.to_owned(), again_in }));
        self.state = State::Removed { heard: now, again: now.plus(again_in) };
    }

    fn next_pause(&mut self, random: u64) -> Duration {
        let pause = pause(self.failures, random);
        self.failures = self.failures.saturating_add(1);
        pause
    }

    /// Decides what follows now that there is no connection.
    fn apart(&mut self, now: Now, random: u64, why: &str, acts: &mut Vec<Act>) {
        self.is_removed = false;
        match self.wish {
            Wish::Gone => self.stop(acts),
            Wish::Unregistered => {
                if matches!(self.state, State::Leaving { .. }) {
                    acts.push(Act::Tell(Notice::Unregistered));
                }
                self.state = State::Apart;
            }
            Wish::Registered => {
                let again_in = self.next_pause(random);
                acts.push(Act::Tell(Notice::Failed { why: why.to_owned(), again_in }));
                self.state = State::Waiting { until: now.plus(again_in) };
            }
        }
    }

    fn stop(&mut self, acts: &mut Vec<Act>) {
        acts.push(self.fault.take().map_or(Act::Stop, Act::Fail));
        self.state = State::Over;
    }

    fn heard(&mut self, now: Now, random: u64, said: &Said, acts: &mut Vec<Act>) {
        if !self.has_connection() {
            return;
        }
        if said.event.as_deref() == Some("removed") {
            return self.removed(now, random, acts);
        }
        if let Some(news) = news::told(said) {
            return acts.push(Act::Tell(Notice::News(news)));
        }
        match (said.cmd.as_deref(), said.ack.as_deref()) {
            (Some("hello"), None) => self.hello(now, acts),
            (Some("auth"), None) => self.challenged(now, said, acts),
            (_, Some("successful")) => self.granted(now, said, acts),
            (_, Some("failed")) => self.refused(now, random, said, acts),
            _ => {}
        }
    }

    fn hello(&mut self, now: Now, acts: &mut Vec<Act>) {
        acts.push(Act::Send(HELLO_ANSWER.to_owned()));
        match &mut self.state {
            State::Member { heard } => {
                *heard = now;
                self.failures = 0;
                acts.push(Act::Tell(Notice::Hello));
            }
            State::Guest { heard } | State::Removed { heard, .. } => *heard = now,
            _ => {}
        }
    }

    fn challenged(&mut self, now: Now, said: &Said, acts: &mut Vec<Act>) {
        let (Some(secret), Some(nonce)) = (&self.secret, &said.nonce) else {
            return acts.push(Act::Tell(Notice::NoSecret));
        };
        let id = self.offer.id();
        acts.push(Act::Send(proof(&id, &auth::mac(secret, nonce, &id))));
        self.state = State::Proving { until: now.plus(ANSWER_WITHIN) };
    }

    fn granted(&mut self, now: Now, said: &Said, acts: &mut Vec<Act>) {
        match self.state {
            State::Proving { .. } => self.join(now, acts),
            State::Joining { .. } if self.is_older(said) => {
                self.fault = Some(self.older());
                self.wish = Wish::Gone;
                self.leave(now, acts);
            }
            State::Joining { .. } if said.cmd.as_deref() != Some("auth") => {
                if let Some(interval) = said.interval_ms {
                    self.interval = Duration::from_millis(interval.clamp(10, 3_600_000));
                }
                self.is_removed = false;
                self.was_member = true;
                acts.push(Act::Tell(Notice::Registered));
                self.oddities(said, acts);
                if !said.nodes.is_empty() {
                    acts.push(Act::Remember(said.nodes.clone()));
                }
                self.state = State::Member { heard: now };
            }
            State::Leaving { .. } if said.cmd.as_deref() != Some("register") => {
                self.left(now, acts)
            }
            _ => {}
        }
    }

    /// What the answer to a registration says beside that it was granted.
    fn oddities(&self, said: &Said, acts: &mut Vec<Act>) {
        if let Some(of) = &said.warning {
            acts.push(Act::Tell(Notice::Warned { of: of.clone() }));
        } else if self.offer.check.is_some() && said.check.is_none() {
            acts.push(Act::Tell(Notice::Unchecked));
        }
    }

    /// Why trying again with this secret, or without one, is of no use.
    fn barred(&self, why: &str) -> String {
        match self.secret {
            None => format!(
                "the balancer wants a secret ({why}): give --secret-file the file that its \
                 control.secret_file names, or secret_file of the service"
            ),
            Some(_) => format!(
                "the secret in --secret-file is not the balancer's ({why}): give it the first line of \
                 the file that control.secret_file names there, or secret_file of the service"
            ),
        }
    }

    /// Whether this answer to a registration comes from a balancer that does not know services by name.
    /// It ignored the name, and if it granted the registration then for the built-in service, whose
    /// users are none of ours.
    fn is_older(&self, said: &Said) -> bool {
        let is_answer = said.cmd.as_deref() == Some("register");
        is_answer && self.offer.service.is_some() && said.service.is_none()
    }

    /// Whether only another secret would help. Whoever has been registered had the right one: it is being
    /// changed, and not yet on both sides.
    fn lacks_secret(&self, said: &Said) -> bool {
        !self.was_member && said.needs.as_deref() == Some("secret")
    }

    fn older(&self) -> String {
        format!(
            "the balancer does not know services by name, so this backend cannot join {}: update the \
             balancer, or leave --service out",
            self.offer.whom()
        )
    }

    fn left(&mut self, now: Now, acts: &mut Vec<Act>) {
        acts.push(Act::Tell(Notice::Unregistered));
        match self.wish {
            Wish::Gone => {
                acts.push(Act::Disconnect);
                self.stop(acts);
            }
            Wish::Unregistered => self.state = State::Guest { heard: now },
            Wish::Registered => self.join(now, acts),
        }
    }

    fn refused(&mut self, now: Now, random: u64, said: &Said, acts: &mut Vec<Act>) {
        let why = said.msg.as_deref().unwrap_or("the balancer refused without a reason");
        match self.state {
            State::Joining { .. } if self.is_older(said) => {
                self.fault = Some(self.older());
                self.wish = Wish::Gone;
                self.give_up(now, random, why, acts);
            }
            State::Proving { .. } | State::Joining { .. } if self.lacks_secret(said) => {
                self.fault = Some(self.barred(why));
                self.wish = Wish::Gone;
                self.give_up(now, random, why, acts);
            }
            State::Joining { .. } if self.is_removed => self.ask_again(now, random, why, acts),
            State::Proving { .. } | State::Joining { .. } => self.give_up(now, random, why, acts),
            // What is not registered cannot be unregistered, so the aim is reached.
            State::Leaving { .. } if said.cmd.as_deref() != Some("register") => {
                self.left(now, acts)
            }
            _ => {}
        }
    }

    fn wished(&mut self, now: Now, wish: Wish, acts: &mut Vec<Act>) {
        if self.wish == Wish::Gone {
            return;
        }
        self.wish = wish;
        match (wish, self.state) {
            (Wish::Registered, State::Apart) => self.connect(now, acts),
            (Wish::Registered, State::Guest { .. } | State::Removed { .. }) => self.join(now, acts),
            (Wish::Registered, _) | (_, State::Leaving { .. } | State::Over) => {}
            (_, State::Joining { .. } | State::Member { .. }) => self.leave(now, acts),
            (Wish::Unregistered, State::Guest { .. }) => {}
            (_, _) => {
                if self.has_connection() {
                    acts.push(Act::Disconnect);
                }
                self.state = State::Apart;
                if wish == Wish::Gone {
                    self.stop(acts);
                }
            }
        }
    }

    fn connect(&mut self, now: Now, acts: &mut Vec<Act>) {
        acts.push(Act::Connect);
        self.state = State::Connecting { until: now.plus(CONNECT_WITHIN) };
    }

    /// The deadline of the state has passed.
    fn late(&mut self, now: Now, random: u64, acts: &mut Vec<Act>) {
        match self.state {
            State::Apart | State::Over => {}
            State::Waiting { .. } => self.connect(now, acts),
            State::Expecting { .. } => self.join(now, acts),
            State::Connecting { .. } => {
                self.give_up(now, random, "the balancer does not accept the connection", acts);
            }
            State::Proving { .. } | State::Joining { .. } | State::Leaving { .. } => {
                self.give_up(now, random, "the balancer does not answer", acts);
            }
            State::Removed { again, .. } if now >= again => self.join(now, acts),
            State::Member { .. } | State::Guest { .. } | State::Removed { .. } => {
                let silent = self.patience().as_millis();
                let why = format!("the balancer has said nothing for {silent} ms");
                self.give_up(now, random, &why, acts);
            }
        }
    }
}

/// Between half of the doubled pause and all of it, so that backends that lost the same balancer do
/// not all return at once.
fn pause(failures: u32, random: u64) -> Duration {
    let whole = PAUSE_MIN.saturating_mul(1 << failures.min(10)).min(PAUSE_MAX);
    let half = u64::try_from(whole.as_millis()).unwrap_or(u64::MAX) / 2;
    Duration::from_millis(half + random % (half + 1))
}

#[cfg(test)]
mod tests;
