//! Which lines are shown, held back and summed up, and how others' text is cut.

use std::io::Write;
use std::sync::{Arc, Mutex};

use super::*;
use crate::cluster::{ServiceId, Snapshot, Standing};

fn at(ms: u64) -> Now {
    Now::from_nanos(ms * 1_000_000)
}

fn host(number: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, (number / 256) as u8, (number % 256) as u8], 5))
}

/// Lines of `topic` shown in ten seconds while each of `hosts` causes 1,000 per second.
fn shown_in_ten_seconds(topic: Topic, hosts: usize) -> usize {
    let mut console = Console::new(7);
    let mut shown = 0;
    for ms in 0..10_000 {
        let of = |host_number: usize| host(host_number).ip();
        shown += (0..hosts).filter(|it| console.shows(topic, of(*it), at(ms))).count();
    }
    assert_eq!(console.held_back() as usize, hosts * 10_000 - shown);
    shown
}

#[test]
fn every_topic_has_a_limit_for_one_source_and_one_for_all() {
    for (topic, one, all) in [
        (Topic::Users, 1050, 1100),
        (Topic::TurnedAway, 30, 250),
        (Topic::Handshakes, 15, 70),
        (Topic::Connections, 30, 250),
        (Topic::Refused, 30, 220),
        (Topic::Proofs, 15, 70),
        (Topic::Hellos, 30, 220),
        (Topic::Silences, 120, 600),
        (Topic::Admin, 15, 70),
        (Topic::Backends, 456, 2024),
    ] {
        let got = shown_in_ten_seconds(topic, 1);
        assert!((one - 2..=one).contains(&got), "{topic:?}: {got} lines of one source");
        let got = shown_in_ten_seconds(topic, 300);
        assert!((all - 2..=all).contains(&got), "{topic:?}: {got} lines of many");
    }
}

#[test]
fn no_topic_uses_up_the_lines_of_another_and_no_source_those_of_the_next() {
    let mut console = Console::new(7);
    for topic in Topic::ALL.into_iter().filter(|topic| *topic != Topic::Backends) {
        for number in 0..20_000 {
            console.shows(topic, host(number).ip(), at(0));
        }
    }
    let held_back = console.held_back();
    for _ in 0..200 {
        assert!(console.shows(Topic::Backends, host(1).ip(), at(0)));
    }
    assert_eq!(console.held_back(), held_back);
    while console.shows(Topic::Backends, host(1).ip(), at(0)) {}
    assert!(console.shows(Topic::Backends, host(2).ip(), at(0)));
}

#[test]
fn lines_held_back_are_summed_up_from_time_to_time() {
    let mut summary = Summary::default();
    let mut held = [0; Topic::ALL.len()];
    let lost = |requests| Lost { requests, ..Lost::default() };
    assert_eq!(summary.due(at(5), held, lost(0)), None, "nothing was");
    held[Topic::Proofs as usize] = 7;
    assert_eq!(summary.due(at(6), held, lost(3)), Some((held, lost(3))));
    let first = held;
    held[Topic::Proofs as usize] = 9;
    assert_eq!(summary.due(at(10_005), held, lost(3)), None, "too soon");
    let mut fresh = first;
    fresh[Topic::Proofs as usize] = 2;
    assert_eq!(summary.due(at(10_006), held, lost(8)), Some((fresh, lost(5))));
    assert_eq!(summary.due(at(30_000), held, lost(8)), None, "nothing more was");
}

#[test]
fn text_from_others_is_cut_to_what_a_line_has_room_for() {
    assert_eq!(kept("short"), "short");
    assert_eq!(kept(&"a".repeat(200)), "a".repeat(200));
    let long = kept(&"a".repeat(30_000)).into_owned();
    assert_eq!(long, format!("{}... (30000 bytes)", "a".repeat(200)));
    assert_eq!(kept(&"ä".repeat(150)), format!("{}... (300 bytes)", "ä".repeat(100)));
    assert_eq!(
        kept(&format!("a{}", "ä".repeat(150))),
        format!("a{}... (301 bytes)", "ä".repeat(99))
    );
}

#[derive(Clone, Default)]
struct Page(Arc<Mutex<Vec<u8>>>);

impl Write for Page {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The lines that are written, without time and level.
fn written(write: impl FnOnce(&mut Console)) -> Vec<String> {
    logged(|| write(&mut Console::new(7)))
}

/// The lines that are logged meanwhile, without time and level.
pub(in crate::control) fn logged(scene: impl FnOnce()) -> Vec<String> {
    let page = Page::default();
    let into = page.clone();
    let log = tracing_subscriber::fmt().with_writer(move || into.clone()).without_time();
    let log = log
        .fmt_fields(crate::logs::Fields)
        .with_target(false)
        .with_level(false)
        .with_ansi(false)
        .finish();
    tracing::subscriber::with_default(log, scene);
    let text = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
    text.lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn a_line_names_the_service_unless_it_is_a_built_in_one() {
    let tcp = Snapshot::default().services[0].clone();
    let redis = Service { id: ServiceId(3), name: "redis".into(), ..tcp.clone() };
    let lines = |service: &Service| {
        let of = || Of::new(service);
        let backend = Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(7),
            slot: 0,
            service: service.id,
            address: host(9),
            weight: 2,
            name: None,
            group: None,
            standing: Standing::Serving,
        };
        written(|console| {
            console.user_connected(at(0), of(), host(1), (BackendId(7), None), 4);
            console.user_refused(at(0), of(), host(1), Refusal::Full, false);
            let asked = HostAsked::new(Some("a.example"));
            console.handshake_failed(at(0), of(), host(1), asked, ("it gave up", false));
            console.handshake_failed(at(0), of(), host(1), HostAsked::new(None), ("late", false));
            console.backend_registered(at(0), of(), &backend, 1);
            console.backend_left(at(0), of(), &backend, "unregistered", 0, 0);
        })
    };
    let plain = [
        "user connected protocol=tcp client=10.0.0.1:5 backend=b7 address=- sessions=4",
        "user turned away protocol=tcp client=10.0.0.1:5 why=\"the session limit is reached\"",
        "TLS handshake failed protocol=tcp client=10.0.0.1:5 host=a.example why=\"it gave up\"",
        "TLS handshake failed protocol=tcp client=10.0.0.1:5 host=- why=\"late\"",
        "backend registered backend=b7 protocol=tcp address=10.0.0.9:5 weight=2 name=- backends=1",
        "backend left backend=b7 protocol=tcp address=10.0.0.9:5 why=\"unregistered\" sessions=0 \
         backends=0",
    ];
    assert_eq!(lines(&tcp), plain);
    let named = |line: &str| line.replace("protocol=tcp", "protocol=tcp service=redis");
    assert_eq!(lines(&redis), plain.map(named));
    let backend = (BackendId(7), None);
    let of = Of::new(&tcp).secured(true);
    let lines = written(|console| console.user_connected(at(0), of, host(1), backend, 4));
    assert_eq!(lines, [plain[0].replace("protocol=tcp", "protocol=tcp tls=true")]);
}

#[test]
fn hellos_are_shown_on_a_terminal_and_share_a_line_where_there_are_many() {
    let took = Some(Duration::from_micros(1500));
    let interval = Duration::from_secs(5);
    let seen = |on_terminal: bool, all: usize| {
        written(|console| {
            console.on_terminal = on_terminal;
            console.sum_up_hellos(at(0), interval, all);
            for round in 0..2 {
                for number in 1..=all {
                    let now = at(round * 5000 + number as u64);
                    let slow = took.map(|took| took * number as u32);
                    console.hello(now, host(number), (1, all), slow);
                }
                for tick in 10..=50 {
                    console.sum_up_hellos(at(round * 5000 + tick * 100), interval, all);
                }
                console.sum_up_hellos(at(round * 5000 + 5001), interval, all);
            }
        })
    };
    let each: Vec<String> = (1..=7)
        .map(|it| format!("hello peer=10.0.0.{it}:5 backends=1 took_ms={:?}", 1.5 * f64::from(it)))
        .collect();
    assert_eq!(seen(true, 7), [each.clone(), each].concat());
    assert_eq!(seen(true, 8), ["hello answers=8 backends=8 slowest_ms=12.0"; 2]);
    assert_eq!(seen(true, 300), ["hello answers=300 backends=300 slowest_ms=450.0"; 2]);
    assert!(seen(false, 7).is_empty() && seen(false, 8).is_empty());
    // Each answer comes right before the tick that finds an interval to be over.
    let lines = written(|console| {
        console.on_terminal = true;
        for tick in 0..=1000 {
            if tick % 50 == 0 {
                (0..8).for_each(|it| console.hello(at(tick * 100), host(it), (1, 8), took));
            }
            console.sum_up_hellos(at(tick * 100), interval, 8);
        }
    });
    assert!((19..=21).contains(&lines.len()), "20 intervals: {lines:?}");
    let mut console = Console::new(7);
    (0..10_000).for_each(|it| console.hello(at(0), host(it), (1, 3), took));
    assert_eq!(console.held_back(), 0, "what is not for this reader is not held back");
}
