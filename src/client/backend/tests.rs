//! The life of a control connection as a table of behaviour, without a socket.

use super::*;
use crate::cluster::Protocol;

fn registration(secret: Option<&str>) -> Registration {
    let offer = Offer::to_built_in(Protocol::Tcp, 9991);
    Registration::new(offer, secret.map(|secret| secret.as_bytes().to_vec()))
}

fn ms(ms: u64) -> Now {
    Now::from_nanos(ms * 1_000_000)
}

fn said(text: &str) -> Event {
    Event::Said(serde_json::from_str(text).unwrap())
}

fn step(registration: &mut Registration, at: u64, event: Event) -> Vec<Act> {
    let mut acts = Vec::new();
    registration.handle(ms(at), 0, event, &mut acts);
    acts
}

fn sent(acts: &[Act], what: &str) -> bool {
    acts.iter().any(|act| matches!(act, Act::Send(line) if line.contains(what)))
}

const GRANTED: &str = r#"{"ack":"successful","cmd":"register"}"#;

fn member(registration: &mut Registration) {
    assert_eq!(step(registration, 0, Event::Time), [Act::Connect]);
    assert!(sent(&step(registration, 1, Event::Connected), "register"));
    assert_eq!(step(registration, 2, said(GRANTED)), [Act::Tell(Notice::Registered)]);
}

#[test]
fn a_backend_connects_registers_and_answers_hello() {
    let mut registration = registration(None);
    member(&mut registration);
    let acts = step(&mut registration, 3, said(r#"{"cmd":"hello"}"#));
    assert_eq!(acts, [Act::Send(HELLO_ANSWER.into()), Act::Tell(Notice::Hello)]);
    assert_eq!(registration.deadline(), Some(ms(3 + 15_000)));
}

#[test]
fn the_balancer_names_its_own_interval() {
    let mut registration = registration(None);
    step(&mut registration, 0, Event::Time);
    step(&mut registration, 1, Event::Connected);
    step(&mut registration, 2, said(r#"{"ack":"successful","cmd":"register","interval_ms":200}"#));
    assert_eq!(registration.deadline(), Some(ms(602)));
    let acts = step(&mut registration, 602, Event::Time);
    assert_eq!(acts[0], Act::Disconnect, "silence for three intervals");
    let Act::Tell(Notice::Failed { why, .. }) = &acts[1] else { panic!("{acts:?}") };
    assert_eq!(why, "the balancer has said nothing for 600 ms");
}

#[test]
fn a_challenge_is_answered_before_registering() {
    let mut registration = registration(Some("0123456789abcdef"));
    step(&mut registration, 0, Event::Time);
    assert_eq!(step(&mut registration, 1, Event::Connected), [], "waits to be asked");
    let acts = step(&mut registration, 2, said(r#"{"cmd":"auth","nonce":"00ff","v":1}"#));
    let mac = auth::mac(b"0123456789abcdef", "00ff", "tcp-9991");
    assert!(sent(&acts, &mac) && sent(&acts, "\"id\":\"tcp-9991\""), "{acts:?}");
    let acts = step(&mut registration, 3, said(r#"{"ack":"successful","cmd":"auth"}"#));
    assert!(sent(&acts, "register"));
    assert_eq!(step(&mut registration, 4, said(GRANTED)), [Act::Tell(Notice::Registered)]);
}

#[test]
fn a_balancer_that_asks_for_no_proof_is_registered_with_all_the_same() {
    let mut registration = registration(Some("0123456789abcdef"));
    step(&mut registration, 0, Event::Time);
    step(&mut registration, 1, Event::Connected);
    assert!(sent(&step(&mut registration, 3001, Event::Time), "register"));
}

#[test]
fn a_challenge_without_a_secret_is_told() {
    let mut registration = registration(None);
    step(&mut registration, 0, Event::Time);
    step(&mut registration, 1, Event::Connected);
    let acts = step(&mut registration, 2, said(r#"{"cmd":"auth","nonce":"00","v":1}"#));
    assert_eq!(acts, [Act::Tell(Notice::NoSecret)]);
}

#[test]
fn rule_11_a_member_of_a_removed_service_keeps_its_connection_and_joins_when_it_is_back() {
    const GONE: &str = r#"{"ack":"failed","cmd":"register","msg":"there is no service tcp"}"#;
    let mut registration = registration(None);
    member(&mut registration);
    let acts = step(&mut registration, 10, said(r#"{"event":"removed","service":"tcp"}"#));
    let [Act::Tell(Notice::Failed { why, again_in })] = &acts[..] else { panic!("{acts:?}") };
    assert_eq!(why, "the balancer has removed service tcp");
    let mut at = 10 + again_in.as_millis() as u64;
    for _ in 0..20 {
        assert_eq!(registration.deadline(), Some(ms(at)));
        assert!(sent(&step(&mut registration, at, Event::Time), "register"));
        let acts = step(&mut registration, at, said(GONE));
        let [Act::Tell(Notice::Failed { why, again_in })] = &acts[..] else { panic!("{acts:?}") };
        assert_eq!(why, "there is no service tcp");
        at += again_in.as_millis() as u64;
        let hello = step(&mut registration, at - 1, said(r#"{"cmd":"hello"}"#));
        assert_eq!(hello, [Act::Send(HELLO_ANSWER.into())]);
    }
    assert!(sent(&step(&mut registration, at, Event::Time), "register"));
    assert_eq!(step(&mut registration, at, said(GRANTED)), [Act::Tell(Notice::Registered)]);
    // From then on a refusal is one like any other.
    step(&mut registration, at, Event::Lost("it is gone".into()));
    step(&mut registration, at + 20_000, Event::Time);
    step(&mut registration, at + 20_000, Event::Connected);
    let acts = step(&mut registration, at + 20_000, said(GONE));
    assert_eq!(acts.first(), Some(&Act::Disconnect));
}

#[test]
fn a_removed_member_gives_up_a_balancer_that_falls_silent_and_leaves_when_it_is_told_to() {
    let removed = || {
        let mut registration = registration(None);
        member(&mut registration);
        step(&mut registration, 10, said(r#"{"event":"removed","service":"tcp"}"#));
        registration
    };
    let mut silent = removed();
    assert!(sent(&step(&mut silent, 5_000, Event::Time), "register"));
    assert_eq!(step(&mut silent, 30_000, Event::Time).first(), Some(&Act::Disconnect));
    let acts = step(&mut removed(), 20, Event::Wished(Wish::Gone));
    assert_eq!(acts, [Act::Disconnect, Act::Stop]);
}

#[test]
fn a_refusal_is_told_and_tried_again_later_and_later() {
    let mut registration = registration(None);
    let mut at = 0;
    let mut pauses = Vec::new();
    for _ in 0..10 {
        assert_eq!(step(&mut registration, at, Event::Time), [Act::Connect]);
        step(&mut registration, at, Event::Connected);
        let acts = step(&mut registration, at, said(r#"{"ack":"failed","msg":"port closed"}"#));
        let [Act::Disconnect, Act::Tell(Notice::Failed { why, again_in })] = &acts[..] else {
            panic!("{acts:?}")
        };
        assert_eq!(why, "port closed");
        pauses.push(u64::try_from(again_in.as_millis()).unwrap());
        assert_eq!(step(&mut registration, at + pauses[pauses.len() - 1] - 1, Event::Time), []);
        at += pauses[pauses.len() - 1];
    }
    assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    let whole: Vec<u128> = (0..8).map(|count| pause(count, 50).as_millis()).collect();
    assert_eq!(whole, [100, 150, 250, 450, 850, 1650, 3250, 5050]);
    assert_eq!(pause(u32::MAX, 5_000).as_millis(), 10_000);
}

#[test]
fn the_end_of_the_program_unregisters_first() {
    let mut registration = registration(None);
    member(&mut registration);
    assert!(sent(&step(&mut registration, 3, Event::Wished(Wish::Gone)), "unregister"));
    let acts = step(&mut registration, 4, said(r#"{"ack":"successful","cmd":"unregister"}"#));
    assert_eq!(acts, [Act::Tell(Notice::Unregistered), Act::Disconnect, Act::Stop]);
    assert_eq!(registration.deadline(), None);
}

#[test]
fn the_end_does_not_wait_for_a_balancer_that_is_gone() {
    for (event, at) in [(Event::Lost("reset".into()), 4), (Event::Time, 2003)] {
        let mut registration = registration(None);
        member(&mut registration);
        step(&mut registration, 3, Event::Wished(Wish::Gone));
        assert_eq!(step(&mut registration, at, event).last(), Some(&Act::Stop));
    }
    let mut registration = registration(None);
    step(&mut registration, 0, Event::Time);
    let acts = step(&mut registration, 1, Event::Wished(Wish::Gone));
    assert_eq!(acts, [Act::Disconnect, Act::Stop]);
}

#[test]
fn the_menu_leaves_and_joins_on_the_same_connection() {
    let mut registration = registration(None);
    member(&mut registration);
    assert!(sent(&step(&mut registration, 3, Event::Wished(Wish::Unregistered)), "unregister"));
    step(&mut registration, 4, said(r#"{"ack":"successful","cmd":"unregister"}"#));
    let acts = step(&mut registration, 5, said(r#"{"cmd":"hello"}"#));
    assert_eq!(acts, [Act::Send(HELLO_ANSWER.into())]);
    assert!(sent(&step(&mut registration, 6, Event::Wished(Wish::Registered)), "\"register\""));
    assert_eq!(step(&mut registration, 7, said(GRANTED)), [Act::Tell(Notice::Registered)]);
}

#[test]
fn a_backend_that_was_unregistered_by_hand_stays_away_when_the_connection_ends() {
    let mut registration = registration(None);
    member(&mut registration);
    step(&mut registration, 3, Event::Wished(Wish::Unregistered));
    assert_eq!(
        step(&mut registration, 4, Event::Lost("gone".into())),
        [Act::Tell(Notice::Unregistered)]
    );
    assert_eq!(registration.deadline(), None);
    assert_eq!(step(&mut registration, 9, Event::Wished(Wish::Registered)), [Act::Connect]);
}

/// A balancer and a network that fail at random, around the machine.
struct World {
    seed: u64,
    now: u64,
    registration: Registration,
    connection: bool,
    connecting: bool,
    /// Whether the balancer has registered the machine's backend.
    registered: bool,
    /// The balancer has stopped talking on this connection without closing it.
    mute: bool,
    unanswered_hellos: u32,
    /// Events on their way to the machine.
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
            registration: registration(seed.is_multiple_of(3).then_some("0123456789abcdef")),
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
        self.registration.handle(ms(self.now), random, event, &mut acts);
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
            Act::Remember(_) => panic!("this balancer is alone"),
            Act::Fail(why) => panic!("the offer names no service: {why}"),
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
        let in_a_second = world.connects.windows(30).filter(|few| few[29] - few[0] < 1_000).count();
        assert_eq!(in_a_second, 0, "seed {seed}: attempts stay apart");
        assert!(world.connects.len() > 10, "seed {seed}: the faults had an effect");
        // From here on nothing fails: within the longest silence and pause it is back for good.
        for _ in 0..1_000 {
            world.turn(0);
        }
        assert!(world.registered, "seed {seed}: {:?}", world.registration);
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
            assert!(world.now - asked <= 2_100, "seed {seed}: {:?}", world.registration);
        }
    }
}

/// A backend that has asked to join `redis`.
fn joining_redis(protocol: Option<Protocol>) -> Registration {
    let offer = Offer {
        service: Some("redis".into()),
        protocol,
        ..Offer::to_built_in(Protocol::Tcp, 6379)
    };
    let mut registration = Registration::new(offer, None);
    assert_eq!(step(&mut registration, 0, Event::Time), [Act::Connect]);
    assert!(sent(&step(&mut registration, 1, Event::Connected), "\"service\":\"redis\""));
    registration
}

#[track_caller]
fn assert_failed(acts: &[Act]) {
    let Some(Act::Fail(why)) = acts.last() else { panic!("{acts:?}") };
    assert!(why.contains("does not know services by name"), "{why}");
    assert!(acts.contains(&Act::Disconnect));
}

#[test]
fn rule_14_an_answer_without_the_service_is_an_older_balancers_and_ends_the_program() {
    let mut granted = joining_redis(Some(Protocol::Tcp));
    let acts = step(&mut granted, 2, said(GRANTED));
    assert!(sent(&acts, "unregister") && acts.len() == 1, "never registered: {acts:?}");
    let answer = said(r#"{"ack":"successful","left":0,"cmd":"unregister","protocol":"tcp"}"#);
    assert_failed(&step(&mut granted, 3, answer));
    assert_eq!(granted.deadline(), None);

    let mut silent = joining_redis(Some(Protocol::Tcp));
    step(&mut silent, 2, said(GRANTED));
    assert_failed(&step(&mut silent, 2002, Event::Time));

    let mut refused = joining_redis(None);
    let answer = r#"{"ack":"failed","msg":"protocol is missing","cmd":"register"}"#;
    assert_failed(&step(&mut refused, 2, said(answer)));
}

#[test]
fn a_balancer_that_names_the_service_is_current_whether_it_grants_or_refuses() {
    let mut granted = joining_redis(None);
    let answer = said(r#"{"ack":"successful","cmd":"register","service":"redis"}"#);
    assert_eq!(step(&mut granted, 2, answer), [Act::Tell(Notice::Registered)]);

    let mut refused = joining_redis(None);
    let answer = r#"{"ack":"failed","msg":"no such","cmd":"register","service":"redis"}"#;
    let acts = step(&mut refused, 2, said(answer));
    assert!(matches!(acts[1], Act::Tell(Notice::Failed { .. })), "it tries again: {acts:?}");

    let mut full = joining_redis(None);
    let acts = step(&mut full, 2, said(r#"{"ack":"failed","msg":"too many control connections"}"#));
    assert!(matches!(acts[1], Act::Tell(Notice::Failed { .. })), "not about it: {acts:?}");
}

#[test]
fn without_the_right_secret_it_ends_at_once_and_says_what_to_do() {
    let missing = "give --secret-file the file";
    let wrong = "the secret in --secret-file is not the balancer's";
    let challenge = r#"{"cmd":"auth","nonce":"00","v":1}"#;
    let needs = |cmd: &str| {
        said(&format!(r#"{{"ack":"failed","cmd":"{cmd}","msg":"no","needs":"secret"}}"#))
    };
    for (secret, words) in [(None, missing), (Some("a secret that is none"), wrong)] {
        let mut registration = registration(secret);
        step(&mut registration, 0, Event::Time);
        step(&mut registration, 1, Event::Connected);
        step(&mut registration, 2, said(challenge));
        let refused = needs(if secret.is_some() { "auth" } else { "register" });
        let acts = step(&mut registration, 3, refused);
        let [Act::Disconnect, Act::Fail(why)] = &acts[..] else { panic!("{acts:?}") };
        assert!(why.contains(words) && why.contains("(no)"), "{why}");
        assert_eq!(registration.deadline(), None);
    }
    // A refusal for any other reason is tried again, and so is a secret that was right before.
    let mut registration = registration(None);
    step(&mut registration, 0, Event::Time);
    step(&mut registration, 1, Event::Connected);
    let other = said(r#"{"ack":"failed","cmd":"register","msg":"there is no service redis"}"#);
    assert_eq!(step(&mut registration, 2, other)[0], Act::Disconnect);
    step(&mut registration, 1_000, Event::Time);
    step(&mut registration, 1_001, Event::Connected);
    step(&mut registration, 1_002, said(GRANTED));
    step(&mut registration, 1_003, Event::Lost("it was restarted".into()));
    step(&mut registration, 2_000, Event::Time);
    step(&mut registration, 2_001, Event::Connected);
    let acts = step(&mut registration, 2_002, needs("register"));
    assert!(matches!(acts[..], [Act::Disconnect, Act::Tell(Notice::Failed { .. })]), "{acts:?}");
}

#[test]
fn what_the_balancer_finds_odd_is_passed_on() {
    let asking = || {
        let offer = Offer::to_built_in(Protocol::Tcp, 9991);
        let check = Some("http:/up".parse().unwrap());
        let mut registration = Registration::new(Offer { check, ..offer }, None);
        step(&mut registration, 0, Event::Time);
        assert!(sent(&step(&mut registration, 1, Event::Connected), r#""check":"http:/up""#));
        registration
    };
    let registered = Act::Tell(Notice::Registered);
    let granted = r#"{"ack":"successful","cmd":"register","check":"http:/up"}"#;
    assert_eq!(step(&mut asking(), 2, said(granted)), std::slice::from_ref(&registered));
    let unchecked = Act::Tell(Notice::Unchecked);
    assert_eq!(step(&mut asking(), 2, said(GRANTED)), [registered.clone(), unchecked]);
    let warned = r#"{"ack":"successful","cmd":"register","warning":"it has its own"}"#;
    let notice = Act::Tell(Notice::Warned { of: "it has its own".into() });
    assert_eq!(step(&mut asking(), 2, said(warned)), [registered, notice]);
}
