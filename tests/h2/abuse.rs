//! Users who only make work, one kind after the other on one balancer: each connection is ended, or costs no more than
//! its bounds, a good user beside it is served, and all of them together leave the balancer as large as it was.

use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::frames::{
    CANCEL, CONTINUATION, DATA, END_HEADERS, ENHANCE_YOUR_CALM, Ended, HEADERS, PING, PRIORITY,
    PROTOCOL_ERROR, RST_STREAM, SETTINGS, User, WHOLE, WINDOW_UPDATE, block, frame, pseudo,
    setting,
};
use crate::harness::Balancer;
use crate::recorder::{BIG, Recorder};
use crate::wait::wait_for;

/// How much the balancer may grow over all of it.
const GROWTH_MAX: usize = 64 << 20;
/// SETTINGS_INITIAL_WINDOW_SIZE.
const WINDOW: u16 = 4;
const STREAMS_MAX: u32 = 100;

struct Stage {
    balancer: Balancer,
    recorder: Recorder,
    /// On one connection all along.
    good: User,
    good_streams: u32,
    before: usize,
}

impl Stage {
    fn start() -> Stage {
        let recorder = Recorder::start();
        let balancer = Balancer::with("[api]\nbody_ms = 1000\nhead_ms = 1000\n", &[recorder.port]);
        let good = User::connect(balancer.port);
        let before = balancer.process.memory();
        let mut stage = Stage { balancer, recorder, good, good_streams: 0, before };
        stage.is_served("before anything");
        stage
    }

    fn user(&self) -> User {
        User::connect(self.balancer.port)
    }

    /// The good user is, and the balancer has not grown.
    fn is_served(&mut self, beside: &str) {
        let stream = self.good_streams * 2 + 1;
        self.good_streams += 1;
        let served = Ended::Answered(200, b"ok".to_vec());
        assert_eq!(self.good.get(stream, "/good"), served, "beside {beside}");
        let growth = self.balancer.process.memory().saturating_sub(self.before);
        assert!(growth < GROWTH_MAX, "{} KiB more after {beside}", growth >> 10);
        eprintln!("{beside}: {} KiB more", growth >> 10);
        self.recorder.take();
    }

    /// Sends the same again and again, each time with what `make` gives, until the connection is over; the reason.
    fn ends(
        &mut self,
        what: &str,
        times: u32,
        mut make: impl FnMut(u32) -> Vec<u8>,
    ) -> Option<u32> {
        let mut user = self.user();
        for number in 0..times {
            if !user.send(&make(number)) {
                break;
            }
        }
        self.is_served(what);
        user.end()
    }
}

fn get(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, WHOLE, stream, &block(&pseudo("GET", path)))
}

/// The number of the stream that is the `number`th.
fn stream(number: u32) -> u32 {
    number * 2 + 1
}

/// A POST on stream 1 that is never over.
fn open_post() -> Vec<u8> {
    frame(HEADERS, END_HEADERS, 1, &block(&pseudo("POST", "/post")))
}

fn resets(stage: &mut Stage) {
    let count = stage.recorder.count();
    let why = stage.ends("rapid reset", 5000, |number| {
        let reset = frame(RST_STREAM, 0, stream(number), &CANCEL.to_be_bytes());
        [get(stream(number), "/reset"), reset].concat()
    });
    assert!(matches!(why, None | Some(ENHANCE_YOUR_CALM)), "{why:?}");
    let asked = stage.recorder.count() - count;
    assert!(asked <= 1000, "{asked} requests reached the backend");
    // The balancer is made to reset (CVE-2025-8671): by an increment of zero, and by content after the end.
    let faults: [fn(u32) -> Vec<u8>; 2] = [
        |at| frame(WINDOW_UPDATE, 0, at, &[0; 4]),
        |at| frame(WINDOW_UPDATE, 0, at, &[0x7f, 0xff, 0xff, 0xff]),
    ];
    for fault in faults {
        let count = stage.recorder.count();
        let why = stage.ends("faults that are answered by a reset", 5000, |number| {
            [get(stream(number), "/made"), fault(stream(number))].concat()
        });
        assert!(matches!(why, None | Some(ENHANCE_YOUR_CALM | PROTOCOL_ERROR)), "{why:?}");
        let asked = stage.recorder.count() - count;
        assert!(asked <= 1000, "{asked} requests reached the backend");
    }
}

fn idle_frames(stage: &mut Stage) {
    for (what, first, again) in [
        ("PING", vec![], frame(PING, 0, 0, &[0; 8])),
        ("acknowledgements of PING", vec![], frame(PING, 1, 0, &[0; 8])),
        ("SETTINGS", vec![], frame(SETTINGS, 0, 0, &setting(WINDOW, 1))),
        ("empty SETTINGS", vec![], frame(SETTINGS, 0, 0, b"")),
        ("PRIORITY", vec![], frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1])),
        ("unknown frames", vec![], frame(0x77, 0, 1, b"abc")),
        ("WINDOW_UPDATE", vec![], frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])),
        ("empty DATA", open_post(), frame(DATA, 0, 1, b"")),
        ("padding alone", open_post(), frame(DATA, 8, 1, &[3, 0, 0, 0])),
    ] {
        let many = again.repeat(100);
        let why = stage.ends(what, 500, |number| match number {
            0 => first.clone(),
            _ => many.clone(),
        });
        assert!(matches!(why, None | Some(ENHANCE_YOUR_CALM)), "{what}: {why:?}");
    }
    let why = stage.ends("an update of zero", 10, |_| frame(WINDOW_UPDATE, 0, 0, &[0; 4]));
    assert!(matches!(why, None | Some(PROTOCOL_ERROR)), "{why:?}");
}

fn header_blocks(stage: &mut Stage) {
    let name = vec![b'a'; 1000];
    let piece = block(&[(&name, b"")]);
    let start = frame(HEADERS, 0, 1, &block(&pseudo("GET", "/")));
    for (what, again) in [
        ("CONTINUATION", frame(CONTINUATION, 0, 1, &piece)),
        ("empty CONTINUATION", frame(CONTINUATION, 0, 1, b"")),
    ] {
        stage.ends(what, 20_000, |number| if number == 0 { start.clone() } else { again.clone() });
    }
    // A block that is never over, by a user who then says nothing.
    stage.ends("half a header block", 1, |_| start.clone());
    // One field in the table, and a byte for each time that it is meant (CVE-2026-49975).
    let mut fields = block(&pseudo("GET", "/bomb"));
    fields.push(0x40);
    fields.extend([1, b'x', 0x7f, 0x81, 0x1e]);
    fields.extend(vec![b'v'; 4000]);
    fields.extend(vec![0xbe; 16_000 - fields.len()]);
    let crumbs = {
        let mut fields = block(&pseudo("GET", "/crumbs"));
        fields.extend([0x40, 6]);
        fields.extend(b"cookie\0");
        fields.extend(vec![0xbe; 16_000 - fields.len()]);
        fields
    };
    for (what, fields) in [("a bomb of one field", fields), ("a bomb of crumbs", crumbs)] {
        let count = stage.recorder.count();
        let mut user = User::with(stage.balancer.port, &setting(WINDOW, 0));
        for number in 0..200 {
            if !user.send(&frame(HEADERS, WHOLE, stream(number), &fields)) {
                break;
            }
        }
        stage.is_served(what);
        assert_eq!(stage.recorder.count(), count + 1, "nobody but the good user is served");
    }
}

/// Answers of a megabyte for users who do not take them.
fn shut_windows(stage: &mut Stage) {
    for (what, window) in [("shut windows", 0), ("windows of one byte", 1)] {
        let mut users: Vec<_> =
            (0..20).map(|_| User::with(stage.balancer.port, &setting(WINDOW, window))).collect();
        let count = stage.recorder.count();
        for user in &mut users {
            let asked = (0..STREAMS_MAX).flat_map(|number| get(stream(number), "/big"));
            assert!(user.send(&asked.collect::<Vec<_>>()));
        }
        wait_for("the first answers", || (stage.recorder.count() > count + 10).then_some(()));
        stage.is_served(what);
        // Nobody waits for ever: `body_ms` ends each stream, or the connection of one who reads nothing.
        users.iter_mut().for_each(ends_of_all);
        stage.is_served(what);
    }
    trickles(stage);
    reads_nothing(stage);
}

/// Reads until each stream, or the connection, has come to its end.
fn ends_of_all(user: &mut User) {
    let mut left = STREAMS_MAX;
    while left > 0
        && let Some(frame) = user.next()
    {
        assert!(!frame.ends_stream(), "nobody was given a whole answer");
        left -= u32::from(frame.kind == RST_STREAM);
    }
}

/// A user who opens its window byte by byte.
fn trickles(stage: &mut Stage) {
    let mut user = User::with(stage.balancer.port, &setting(WINDOW, 0));
    user.send(&get(1, "/big"));
    let mut bytes = 0;
    let ended = loop {
        let Some(next) = user.next() else { break None };
        match next.kind {
            RST_STREAM => break Some(next.reason()),
            DATA => bytes += next.payload.len(),
            HEADERS => {}
            _ => continue,
        }
        thread::sleep(Duration::from_millis(50));
        user.send(&frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]));
    };
    assert!(bytes < BIG / 100, "{bytes} bytes before {ended:?}");
    stage.is_served("a window that is opened byte by byte");
}

/// A user with open windows who reads nothing from its socket.
fn reads_nothing(stage: &mut Stage) {
    let open = setting(WINDOW, 0x7fff_ffff);
    let mut user = User::with(stage.balancer.port, &open);
    user.send(&frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0, 0, 0]));
    let asked = (0..STREAMS_MAX).flat_map(|number| get(stream(number), "/big"));
    user.send(&asked.collect::<Vec<_>>());
    for _ in 0..200 {
        // Each asks for an answer that it does not read either.
        if !user.send(&frame(PING, 0, 0, &[0; 8])) {
            break;
        }
    }
    stage.is_served("a user who reads nothing");
    wait_for("the end of a user who reads nothing", || {
        let mut ends = [PollFd::new(user.stream.as_fd(), PollFlags::empty())];
        poll(&mut ends, PollTimeout::ZERO).unwrap();
        ends[0].revents().unwrap().contains(PollFlags::POLLERR).then_some(())
    });
}

#[test]
fn users_who_only_make_work_cost_little() {
    let mut stage = Stage::start();
    idle_frames(&mut stage);
    resets(&mut stage);
    header_blocks(&mut stage);
    shut_windows(&mut stage);
    stage.is_served("everything");
}
