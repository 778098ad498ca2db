//! The fuzz targets' checks under a seeded generator: runs in every `cargo test`, bounded, and the same
//! each time. `LB_FUZZ_ROUNDS` asks for more rounds, `LB_FUZZ_SEED` for others.

#[path = "fuzz/checks.rs"]
mod checks;

/// A small generator (xorshift64*), so that a seed means the same bytes for ever.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.roll() >> 11) as usize % bound
    }

    fn one_in(&mut self, odds: usize) -> bool {
        self.below(odds) == 0
    }

    fn pick<'a>(&mut self, from: &[&'a [u8]]) -> &'a [u8] {
        from[self.below(from.len())]
    }
}

const STARTS: &[&[u8]] = &[
    b"GET / HTTP/1.1",
    b"POST /a?b=c HTTP/1.1",
    b"GET http://h/p HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"GET / HTTP/1.0",
    b"get  / HTTP/1.1",
    b"GET /\x80 HTTP/1.1",
    b"GET / HTTP/2.0",
];
const STATUS_LINES: &[&[u8]] = &[
    b"HTTP/1.1 200 OK",
    b"HTTP/1.1 204 No Content",
    b"HTTP/1.0 304 ",
    b"HTTP/1.1 101 Switching Protocols",
    b"HTTP/1.1 99 x",
    b"HTTP/1.1 200",
];
const NAMES: &[&[u8]] = &[
    b"Host",
    b"Content-Length",
    b"content_length",
    b"Transfer-Encoding",
    b"Connection",
    b"Upgrade",
    b"TE",
    b"Via",
    b"X-Forwarded-For",
    b"X-Forwarded-Port",
    b"X-Real-IP",
    b"Forwarded",
    b"Expect",
    b"Keep-Alive",
    b"Cookie",
    b"X-A",
    b"X-B",
    b"Max-Forwards",
    b" X",
    b"X ",
    b"",
    b"X\0",
];
const VALUES: &[&[u8]] = &[
    b"x",
    b"0",
    b"5",
    b"18446744073709551616",
    b"chunked",
    b"gzip, chunked",
    b"close, x-a",
    b"upgrade, x-b",
    b"websocket",
    b"h2c",
    b"trailers",
    b"100-continue",
    b"1.1 lb-test",
    b"[::1]:80",
    b"a,b",
    b"\xe4",
    b"",
    b"a\rb",
    b"a\0",
    b"  spaced\t ",
];
const LINE_ENDS: &[&[u8]] =
    &[b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n "];

fn some_head(dice: &mut Dice, starts: &[&[u8]]) -> Vec<u8> {
    // Most heads are well-formed but for one thing, or nothing would get past the first line.
    let odd = dice.one_in(3);
    let usual = |dice: &mut Dice, all: &[&'static [u8]], good: usize| {
        if odd && dice.one_in(4) { dice.pick(all) } else { dice.pick(&all[..good]) }
    };
    let mut head = Vec::new();
    if dice.one_in(8) {
        head.extend_from_slice(dice.pick(LINE_ENDS));
    }
    head.extend_from_slice(if odd { dice.pick(starts) } else { dice.pick(&starts[..5]) });
    head.extend_from_slice(usual(dice, LINE_ENDS, 6));
    if !dice.one_in(6) {
        head.extend_from_slice(b"Host: x\r\n");
    }
    for _ in 0..dice.below(7) {
        head.extend_from_slice(usual(dice, NAMES, 18));
        head.extend_from_slice(b":");
        head.extend_from_slice(usual(dice, VALUES, 17));
        head.extend_from_slice(usual(dice, LINE_ENDS, 6));
    }
    head.extend_from_slice(usual(dice, LINE_ENDS, 6));
    head.extend_from_slice(b"rest\r\n\r\n");
    head
}

fn some_chunks(dice: &mut Dice) -> Vec<u8> {
    let mut body: Vec<u8> = (0..4).map(|_| dice.below(40) as u8).collect();
    let end = |dice: &mut Dice| if dice.one_in(60) { dice.pick(LINE_ENDS) } else { b"\r\n" };
    for _ in 0..dice.below(6) {
        let size = 1 + dice.below(30);
        let zeros = "0".repeat(dice.below(3));
        let size_line =
            if dice.one_in(2) { format!("{zeros}{size:x}") } else { format!("{size:X}") };
        body.extend_from_slice(size_line.as_bytes());
        if dice.one_in(4) {
            body.extend_from_slice(dice.pick(&[b";a=b", b";", b";\"x;y\"", b" ;a", b";\x01"]));
        }
        body.extend_from_slice(end(dice));
        body.extend((0..size).map(|_| dice.roll() as u8));
        body.extend_from_slice(end(dice));
    }
    body.extend_from_slice(dice.pick(&[b"0", b"0", b"00", b"0;x", b"-0", b""]));
    body.extend_from_slice(end(dice));
    for _ in 0..dice.below(3) {
        body.extend_from_slice(dice.pick(&[b"A: b", b"Host: x", b"B:", b"C : d", b"\xe4: x"]));
        body.extend_from_slice(end(dice));
    }
    body.extend_from_slice(end(dice));
    body.extend_from_slice(b"next");
    body
}

/// Changes, removes or doubles a few bytes.
fn damage(dice: &mut Dice, bytes: &mut Vec<u8>) {
    for _ in 0..dice.below(3) {
        let at = dice.below(bytes.len());
        match dice.below(4) {
            0 => bytes[at] = dice.roll() as u8,
            1 => bytes[at] ^= 1 << dice.below(8),
            2 if bytes.len() > 1 => drop(bytes.remove(at)),
            _ => bytes.insert(at, bytes[at]),
        }
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn many(make: impl Fn(&mut Dice) -> Vec<u8>, check: impl Fn(&[u8])) {
    let mut dice = Dice(number("LB_FUZZ_SEED", 1) | 1 << 63);
    for _ in 0..number("LB_FUZZ_ROUNDS", 10_000) {
        let mut bytes = make(&mut dice);
        if dice.one_in(2) {
            damage(&mut dice, &mut bytes);
        }
        check(&bytes);
    }
}

#[test]
fn no_request_head_is_read_two_ways() {
    many(|dice| some_head(dice, STARTS), checks::request_head);
}

#[test]
fn no_response_head_is_read_two_ways() {
    many(|dice| some_head(dice, STATUS_LINES), checks::response_head);
}

#[test]
fn no_chunked_body_is_read_two_ways() {
    many(some_chunks, checks::chunked_body);
}
