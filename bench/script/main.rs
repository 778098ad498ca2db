//! Fixed scripts for the pieces on the path of every byte: each run does the same work, so that
//! `bench/instructions` can count it.
//!
//! `script NAME UNITS` plays one of them; without arguments each is played once, to see that it works.

#[path = "../micro/stage.rs"]
mod stage;

use std::hint::black_box;

use lb::http::Limits;
use lb::http::head::{self, Space};
use lb::proxy::Side;
use lb::ring::pool::Class;
use stage::{Datagrams, Stage};

const MESSAGE: [u8; 64] = [7; 64];
const HEAD: &[u8] = b"GET /item/42?full=yes HTTP/1.1\r\nhost: example\r\nuser-agent: curl/8\r\n\
accept: */*\r\naccept-encoding: gzip\r\ncookie: session=0123456789abcdef\r\n\r\n";

/// Does the named work this many times.
type Script = fn(usize);
const SCRIPTS: [(&str, Script); 5] = [
    ("request", requests),
    ("session", sessions),
    ("stream", stream),
    ("datagram", datagrams),
    ("head", heads),
];

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(name) = arguments.next() else {
        SCRIPTS.into_iter().for_each(|(_, script)| script(1));
        return;
    };
    let units = arguments.next().and_then(|units| units.parse().ok()).unwrap_or(1);
    let script = SCRIPTS.into_iter().find(|(known, _)| *known == name);
    let (_, script) = script.expect("the name of a script");
    script(units);
}

/// A small message and its answer, in an established session.
fn requests(units: usize) {
    let mut stage = Stage::new();
    let key = stage.session();
    for _ in 0..units {
        stage.bytes(key, Side::Client, Class::Small, &MESSAGE);
        stage.bytes(key, Side::Backend, Class::Small, &MESSAGE);
    }
    stage.finish(key);
}

/// A user who comes, asks once and goes.
fn sessions(units: usize) {
    let mut stage = Stage::new();
    for _ in 0..units {
        let key = stage.session();
        stage.bytes(key, Side::Client, Class::Small, &MESSAGE);
        stage.bytes(key, Side::Backend, Class::Small, &MESSAGE);
        stage.finish(key);
    }
}

/// A large block of a stream. Its bytes are the kernel's business, so they cost few instructions.
fn stream(units: usize) {
    let mut stage = Stage::new();
    let key = stage.session();
    for _ in 0..units {
        stage.bytes(key, Side::Backend, Class::Large, &MESSAGE);
    }
    stage.finish(key);
}

/// A small datagram and its answer, in one of a hundred established sessions.
fn datagrams(units: usize) {
    let mut datagrams = Datagrams::new();
    for unit in 0..units {
        datagrams.round_trip(([192, 0, 2, 1], 1_000 + (unit % 100) as u16).into(), MESSAGE.len());
    }
}

/// Reading the head of a request.
fn heads(units: usize) {
    let limits = Limits::default();
    for _ in 0..units {
        let mut space = Space::new();
        let head = head::request(black_box(HEAD), 0, &limits, &mut space);
        black_box(head.expect("a valid head").expect("a whole head").length);
    }
}
