//! How a backend stays registered, decided without a socket: what to do when the connection stands,
//! when the balancer speaks, when it falls silent, when the user changes their mind. Time and
//! randomness come in as arguments; `stay` does what is decided here.
//!
//! ```text
//!            +-------------------- lost, refused, silent ---------------------+
//!            v                                                               |
//!  Apart -> Waiting -> Connecting -> (Expecting -> Proving ->) Joining -> Member -> Leaving
//!    ^                                                            ^         ^        |   |
//!    |                                                            |         v        |   v
//!    +---------------------------- unregistered, no connection ---+------ Guest <----+  Over
//! ```

use std::fmt;
use std::time::Duration;

use super::wire::{HELLO_ANSWER, Offer, Said, proof};
use crate::base::time::Now;
use crate::control::auth;

/// How long the balancer may take to accept the connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long a balancer that asks for a proof may take to ask.
const CHALLENGE_WITHIN: Duration = Duration::from_secs(3);
/// How long an answer may take; the balancer connects to the backend before it answers `register`.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// How long a farewell may hold up the end of the program.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
/// The pauses between attempts double from the first to the second.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How often a balancer says hello unless its answer to `register` says otherwise.
const INTERVAL: Duration = Duration::from_secs(5);
/// Hellos that may stay out before the connection counts as dead.
const INTERVALS_SILENT: u32 = 3;

/// What the person or the system wants of the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    Registered,
    Unregistered,
    /// Unregistered, and the program over.
    Gone,
}

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    Connected,
    /// The connection ended or never stood; half a sentence says why.
    Lost(String),
    Said(Said),
    Wished(Wish),
    /// A deadline may have passed.
    Time,
}

/// What is to be done. [`Act::Connect`] and [`Act::Disconnect`] take turns.
#[derive(Clone, PartialEq, Debug)]
pub enum Act {
    Connect,
    Disconnect,
    /// One line to the balancer, without its line end.
    Send(String),
    Tell(Notice),
    /// The program is over; nothing follows.
    Stop,
}

/// What a person may want to read. Each is one line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    Registered,
    Unregistered,
    Hello,
    /// It did not work; the next attempt follows after this pause.
    Failed {
        why: String,
        again_in: Duration,
    },
    /// The balancer asked for a proof and there is no secret.
    NoSecret,
    /// The secret's file is no good any more, so the secret stays what it was.
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
            Notice::Failed { why, again_in } => {
                write!(out, "not registered: {why}; trying again in {} ms", again_in.as_millis())
            }
            Notice::NoSecret => out.write_str(
                "the balancer asks for a proof of its secret: give it with --secret-file",
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
    /// Connected, with a secret: the balancer may ask for the proof.
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
    /// Connected and not registered, by the user's wish.
    Guest {
        heard: Now,
    },
    Over,
}

/// The machine. One for each backend.
#[derive(Debug)]
pub struct Backend {
    offer: Offer,
    secret: Option<Vec<u8>>,
    wish: Wish,
    state: State,
    /// Attempts since the last hello as a member; grows the pause.
    failures: u32,
    interval: Duration,
}

impl Backend {
    /// A backend that wants to be registered. The first [`Event::Time`] starts it.
    pub fn new(offer: Offer, secret: Option<Vec<u8>>) -> Backend {
        Backend {
            offer,
            secret,
            wish: Wish::Registered,
            state: State::Waiting { until: Now::default() },
            failures: 0,
            interval: INTERVAL,
        }
    }

    /// Proves itself with this secret from the next connection on.
    pub fn prove_with(&mut self, secret: Vec<u8>) {
        self.secret = Some(secret);
    }

    /// When [`Event::Time`] is due; `None` when only others can change anything.
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

    /// The connection has ended by itself.
    fn lost(&mut self, now: Now, random: u64, why: &str, acts: &mut Vec<Act>) {
        if self.has_connection() {
            self.apart(now, random, why, acts);
        }
    }

    /// Ends a connection that is of no more use.
    fn give_up(&mut self, now: Now, random: u64, why: &str, acts: &mut Vec<Act>) {
        acts.push(Act::Disconnect);
        self.apart(now, random, why, acts);
    }

    /// What follows when there is no connection any more.
    fn apart(&mut self, now: Now, random: u64, why: &str, acts: &mut Vec<Act>) {
        match self.wish {
            Wish::Gone => self.stop(acts),
            Wish::Unregistered => {
                if matches!(self.state, State::Leaving { .. }) {
                    acts.push(Act::Tell(Notice::Unregistered));
                }
                self.state = State::Apart;
            }
            Wish::Registered => {
                let again_in = pause(self.failures, random);
                self.failures = self.failures.saturating_add(1);
                acts.push(Act::Tell(Notice::Failed { why: why.to_owned(), again_in }));
                self.state = State::Waiting { until: now.plus(again_in) };
            }
        }
    }

    fn stop(&mut self, acts: &mut Vec<Act>) {
        acts.push(Act::Stop);
        self.state = State::Over;
    }

    fn heard(&mut self, now: Now, random: u64, said: &Said, acts: &mut Vec<Act>) {
        if !self.has_connection() {
            return;
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
            State::Guest { heard } => *heard = now,
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
            State::Joining { .. } if said.cmd.as_deref() != Some("auth") => {
                if let Some(interval) = said.interval_ms {
                    self.interval = Duration::from_millis(interval.clamp(10, 3_600_000));
                }
                acts.push(Act::Tell(Notice::Registered));
                self.state = State::Member { heard: now };
            }
            State::Leaving { .. } if said.cmd.as_deref() != Some("register") => {
                self.left(now, acts)
            }
            _ => {}
        }
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
            State::Proving { .. } | State::Joining { .. } => self.give_up(now, random, why, acts),
            // What is not registered cannot be unregistered: gone is gone.
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
            (Wish::Registered, State::Guest { .. }) => self.join(now, acts),
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
            State::Member { .. } | State::Guest { .. } => {
                let silent = self.patience().as_millis();
                let why = format!("the balancer has said nothing for {silent} ms");
                self.give_up(now, random, &why, acts);
            }
        }
    }
}

/// Between half of the doubled pause and all of it, so that backends that lost the same balancer do
/// not all return at the same moment.
fn pause(failures: u32, random: u64) -> Duration {
    let whole = PAUSE_MIN.saturating_mul(1 << failures.min(10)).min(PAUSE_MAX);
    let half = u64::try_from(whole.as_millis()).unwrap_or(u64::MAX) / 2;
    Duration::from_millis(half + random % (half + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Protocol;

    fn backend(secret: Option<&str>) -> Backend {
        let offer = Offer { protocol: Protocol::Tcp, port: 9991, weight: 1, name: None };
        Backend::new(offer, secret.map(|secret| secret.as_bytes().to_vec()))
    }

    fn ms(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    fn said(text: &str) -> Event {
        Event::Said(serde_json::from_str(text).unwrap())
    }

    fn step(backend: &mut Backend, at: u64, event: Event) -> Vec<Act> {
        let mut acts = Vec::new();
        backend.handle(ms(at), 0, event, &mut acts);
        acts
    }

    fn sent(acts: &[Act], what: &str) -> bool {
        acts.iter().any(|act| matches!(act, Act::Send(line) if line.contains(what)))
    }

    const GRANTED: &str = r#"{"ack":"successful","cmd":"register"}"#;

    fn member(backend: &mut Backend) {
        assert_eq!(step(backend, 0, Event::Time), [Act::Connect]);
        assert!(sent(&step(backend, 1, Event::Connected), "register"));
        assert_eq!(step(backend, 2, said(GRANTED)), [Act::Tell(Notice::Registered)]);
    }

    #[test]
    fn a_backend_connects_registers_and_answers_hello() {
        let mut backend = backend(None);
        member(&mut backend);
        let acts = step(&mut backend, 3, said(r#"{"cmd":"hello"}"#));
        assert_eq!(acts, [Act::Send(HELLO_ANSWER.into()), Act::Tell(Notice::Hello)]);
        assert_eq!(backend.deadline(), Some(ms(3 + 15_000)));
    }

    #[test]
    fn the_balancer_names_its_own_interval() {
        let mut backend = backend(None);
        step(&mut backend, 0, Event::Time);
        step(&mut backend, 1, Event::Connected);
        step(&mut backend, 2, said(r#"{"ack":"successful","cmd":"register","interval_ms":200}"#));
        assert_eq!(backend.deadline(), Some(ms(602)));
        let acts = step(&mut backend, 602, Event::Time);
        assert_eq!(acts[0], Act::Disconnect, "silence for three intervals");
        let Act::Tell(Notice::Failed { why, .. }) = &acts[1] else { panic!("{acts:?}") };
        assert_eq!(why, "the balancer has said nothing for 600 ms");
    }

    #[test]
    fn a_challenge_is_answered_before_registering() {
        let mut backend = backend(Some("0123456789abcdef"));
        step(&mut backend, 0, Event::Time);
        assert_eq!(step(&mut backend, 1, Event::Connected), [], "waits to be asked");
        let acts = step(&mut backend, 2, said(r#"{"cmd":"auth","nonce":"00ff","v":1}"#));
        let mac = auth::mac(b"0123456789abcdef", "00ff", "tcp-9991");
        assert!(sent(&acts, &mac) && sent(&acts, "\"id\":\"tcp-9991\""), "{acts:?}");
        let acts = step(&mut backend, 3, said(r#"{"ack":"successful","cmd":"auth"}"#));
        assert!(sent(&acts, "register"));
        assert_eq!(step(&mut backend, 4, said(GRANTED)), [Act::Tell(Notice::Registered)]);
    }

    #[test]
    fn a_balancer_that_asks_for_no_proof_is_registered_with_all_the_same() {
        let mut backend = backend(Some("0123456789abcdef"));
        step(&mut backend, 0, Event::Time);
        step(&mut backend, 1, Event::Connected);
        assert!(sent(&step(&mut backend, 3001, Event::Time), "register"));
    }

    #[test]
    fn a_challenge_without_a_secret_is_told() {
        let mut backend = backend(None);
        step(&mut backend, 0, Event::Time);
        step(&mut backend, 1, Event::Connected);
        let acts = step(&mut backend, 2, said(r#"{"cmd":"auth","nonce":"00","v":1}"#));
        assert_eq!(acts, [Act::Tell(Notice::NoSecret)]);
    }

    #[test]
    fn a_refusal_is_told_and_tried_again_later_and_later() {
        let mut backend = backend(None);
        let mut at = 0;
        let mut pauses = Vec::new();
        for _ in 0..10 {
            assert_eq!(step(&mut backend, at, Event::Time), [Act::Connect]);
            step(&mut backend, at, Event::Connected);
            let acts = step(&mut backend, at, said(r#"{"ack":"failed","msg":"port closed"}"#));
            let [Act::Disconnect, Act::Tell(Notice::Failed { why, again_in })] = &acts[..] else {
                panic!("{acts:?}")
            };
            assert_eq!(why, "port closed");
            pauses.push(u64::try_from(again_in.as_millis()).unwrap());
            assert_eq!(step(&mut backend, at + pauses[pauses.len() - 1] - 1, Event::Time), []);
            at += pauses[pauses.len() - 1];
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        let whole: Vec<u128> = (0..8).map(|count| pause(count, 50).as_millis()).collect();
        assert_eq!(whole, [100, 150, 250, 450, 850, 1650, 3250, 5050]);
        assert_eq!(pause(u32::MAX, 5_000).as_millis(), 10_000);
    }

    #[test]
    fn the_end_of_the_program_unregisters_first() {
        let mut backend = backend(None);
        member(&mut backend);
        assert!(sent(&step(&mut backend, 3, Event::Wished(Wish::Gone)), "unregister"));
        let acts = step(&mut backend, 4, said(r#"{"ack":"successful","cmd":"unregister"}"#));
        assert_eq!(acts, [Act::Tell(Notice::Unregistered), Act::Disconnect, Act::Stop]);
        assert_eq!(backend.deadline(), None);
    }

    #[test]
    fn the_end_does_not_wait_for_a_balancer_that_is_gone() {
        for (event, at) in [(Event::Lost("reset".into()), 4), (Event::Time, 2003)] {
            let mut backend = backend(None);
            member(&mut backend);
            step(&mut backend, 3, Event::Wished(Wish::Gone));
            assert_eq!(step(&mut backend, at, event).last(), Some(&Act::Stop));
        }
        let mut backend = backend(None);
        step(&mut backend, 0, Event::Time);
        let acts = step(&mut backend, 1, Event::Wished(Wish::Gone));
        assert_eq!(acts, [Act::Disconnect, Act::Stop]);
    }

    #[test]
    fn the_menu_leaves_and_joins_on_the_same_connection() {
        let mut backend = backend(None);
        member(&mut backend);
        assert!(sent(&step(&mut backend, 3, Event::Wished(Wish::Unregistered)), "unregister"));
        step(&mut backend, 4, said(r#"{"ack":"successful","cmd":"unregister"}"#));
        let acts = step(&mut backend, 5, said(r#"{"cmd":"hello"}"#));
        assert_eq!(acts, [Act::Send(HELLO_ANSWER.into())]);
        assert!(sent(&step(&mut backend, 6, Event::Wished(Wish::Registered)), "\"register\""));
        assert_eq!(step(&mut backend, 7, said(GRANTED)), [Act::Tell(Notice::Registered)]);
    }

    #[test]
    fn a_backend_that_was_unregistered_by_hand_stays_away_when_the_connection_ends() {
        let mut backend = backend(None);
        member(&mut backend);
        step(&mut backend, 3, Event::Wished(Wish::Unregistered));
        assert_eq!(
            step(&mut backend, 4, Event::Lost("gone".into())),
            [Act::Tell(Notice::Unregistered)]
        );
        assert_eq!(backend.deadline(), None);
        assert_eq!(step(&mut backend, 9, Event::Wished(Wish::Registered)), [Act::Connect]);
    }

    /// A balancer and a network that fail by chance, around the machine.
    struct World {
        seed: u64,
        now: u64,
        backend: Backend,
        connection: bool,
        connecting: bool,
        /// Whether the balancer has it registered.
        registered: bool,
        /// The balancer has stopped talking on this connection without closing it.
        mute: bool,
        unanswered_hellos: u32,
        /// What is under way to the machine.
        inbox: Vec<Event>,
        connects: Vec<u64>,
        stopped: bool,
        told_unregister: bool,
    }

    impl World {
        fn new(seed: u64) -> World {
            World {
                seed,
                now: 0,
                backend: backend(seed.is_multiple_of(3).then_some("0123456789abcdef")),
                connection: false,
                connecting: false,
                registered: false,
                mute: false,
                unanswered_hellos: 0,
                inbox: Vec::new(),
                connects: Vec::new(),
                stopped: false,
                told_unregister: false,
            }
        }

        fn random(&mut self) -> u64 {
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 7;
            self.seed ^= self.seed << 17;
            self.seed
        }

        fn chance(&mut self, percent: u64) -> bool {
            self.random() % 100 < percent
        }

        fn deliver(&mut self, event: Event, faults: u64) {
            assert!(!self.stopped, "nothing is asked of a machine that is over");
            let mut acts = Vec::new();
            let random = self.random();
            self.backend.handle(ms(self.now), random, event, &mut acts);
            for act in acts {
                assert!(!self.stopped, "nothing follows the end");
                self.obey(act, faults);
            }
        }

        fn obey(&mut self, act: Act, faults: u64) {
            match act {
                Act::Connect => {
                    assert!(!self.connection && !self.connecting, "one connection at a time");
                    self.connecting = true;
                    self.connects.push(self.now);
                    if self.chance(faults) {
                        if self.chance(50) {
                            self.inbox.push(Event::Lost("refused".into()));
                        } // Else it hangs, and the machine's own deadline has to end it.
                    } else {
                        self.inbox.push(Event::Connected);
                    }
                }
                Act::Disconnect => {
                    assert!(self.connection || self.connecting, "there is something to end");
                    self.cut();
                }
                Act::Send(line) => {
                    assert!(self.connection, "nothing is sent without a connection: {line}");
                    self.balancer(&line, faults);
                }
                Act::Tell(_) => {}
                Act::Stop => self.stopped = true,
            }
        }

        fn cut(&mut self) {
            self.connection = false;
            self.connecting = false;
            self.registered = false;
            self.mute = false;
            self.unanswered_hellos = 0;
            self.inbox.clear();
        }

        fn balancer(&mut self, line: &str, faults: u64) {
            let message: serde_json::Value = serde_json::from_str(line).unwrap();
            let answer = match message["cmd"].as_str() {
                Some("register") => {
                    assert!(!self.registered, "registers only when it is not registered");
                    if self.chance(faults) {
                        r#"{"ack":"failed","msg":"no"}"#
                    } else {
                        self.registered = true;
                        GRANTED
                    }
                }
                Some("unregister") => {
                    self.told_unregister = true;
                    self.registered = false;
                    r#"{"ack":"successful","cmd":"unregister"}"#
                }
                Some("auth") => r#"{"ack":"successful","cmd":"auth"}"#,
                _ => {
                    assert!(self.unanswered_hellos > 0, "answers only what was asked");
                    return self.unanswered_hellos = 0;
                }
            };
            if !self.mute {
                self.inbox.push(said(answer));
            }
        }

        /// One step of 50 ms: faults, deliveries, hellos, deadlines.
        fn turn(&mut self, faults: u64) {
            self.now += 50;
            if self.connection && self.chance(faults) {
                match self.chance(50) {
                    true => self.mute = true,
                    false => {
                        self.cut();
                        self.deliver(Event::Lost("reset".into()), faults);
                    }
                }
            }
            for event in std::mem::take(&mut self.inbox) {
                if self.stopped || !self.connection && !self.connecting {
                    return;
                }
                match &event {
                    Event::Connected => {
                        self.connecting = false;
                        self.connection = true;
                        if self.chance(30) {
                            self.inbox.push(said(r#"{"cmd":"auth","nonce":"00","v":1}"#));
                        }
                    }
                    Event::Lost(_) => self.cut(),
                    _ => {}
                }
                self.deliver(event, faults);
            }
            if self.connection && !self.mute && self.now.is_multiple_of(5_000) && !self.stopped {
                self.unanswered_hellos += 1;
                self.deliver(said(r#"{"cmd":"hello"}"#), faults);
                assert!(self.unanswered_hellos == 0 || !self.connection, "every hello is answered");
            }
            if !self.stopped {
                self.deliver(Event::Time, faults);
            }
        }
    }

    #[test]
    fn whatever_the_network_does_it_comes_back_and_never_floods() {
        for seed in 1..300 {
            let mut world = World::new(seed);
            for _ in 0..4_000 {
                world.turn(3);
            }
            let in_a_second =
                world.connects.windows(30).filter(|few| few[29] - few[0] < 1_000).count();
            assert_eq!(in_a_second, 0, "seed {seed}: attempts stay apart");
            assert!(world.connects.len() > 10, "seed {seed}: the faults had an effect");
            // From now on nothing fails: within the longest silence and pause it is back for good.
            for _ in 0..1_000 {
                world.turn(0);
            }
            assert!(world.registered, "seed {seed}: {:?}", world.backend);
            let before = world.connects.len();
            for _ in 0..2_000 {
                world.turn(0);
            }
            assert_eq!(world.connects.len(), before, "seed {seed}: a good connection is kept");

            world.deliver(Event::Wished(Wish::Gone), 0);
            for _ in 0..50 {
                if !world.stopped {
                    world.turn(0);
                }
            }
            assert!(world.stopped && world.told_unregister, "seed {seed}: it says goodbye");
        }
    }

    #[test]
    fn whatever_the_network_does_the_end_comes_in_time() {
        for seed in 1..500 {
            let mut world = World::new(seed);
            for _ in 0..seed {
                world.turn(5);
            }
            world.deliver(Event::Wished(Wish::Gone), 5);
            let asked = world.now;
            while !world.stopped {
                world.turn(5);
                assert!(world.now - asked <= 2_100, "seed {seed}: {:?}", world.backend);
            }
        }
    }
}
