//! Tests of `proxy::tls`: a user on rustls' own client side or a backend on its server side, a network that
//! cuts and holds back, and a session above that asks, sends and changes its mind, all from one seed.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore};
use rustls::{ServerConfig, ServerConnection};

use super::*;
use crate::base::random::xorshift;
use crate::ring::pool::Chain;
use crate::tls::backends::{BackendSpeech, BackendTls, Backends};
use crate::tls::keys::tests::{identities_and_pem, versions};
use crate::tls::keys::{Identities, Speech};

mod hostile;

impl Session {
    /// Whether the driver has something under way that it was asked for.
    fn in_flight(&self) -> bool {
        self.armed != Armed::No || self.room != Room::Unknown
    }
}

/// The same numbers for the same seed.
struct Dice(Box<dyn FnMut(u64) -> u64>);

impl Dice {
    fn below(&mut self, count: usize) -> usize {
        (self.0)(count as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

/// A socket that takes so many bytes more.
struct Outlet<'a> {
    to: &'a mut Vec<u8>,
    room: &'a mut usize,
}

impl Write for Outlet<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(*self.room);
        if taken == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        *self.room -= taken;
        self.to.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct World {
    dice: Dice,
    now: Now,
    side: Side,
    /// The other end: a user, or a backend.
    user: Connection,
    session: Option<Session>,
    pool: Pool,
    /// Ciphertext on its way to us and to the user.
    up: Vec<u8>,
    down: Vec<u8>,
    /// How much more the socket takes.
    room: usize,
    below: Vec<Below>,
    above: Vec<Event>,
    armed: Option<Intake>,
    cancelled: bool,
    room_awaited: bool,
    fin_sent: bool,
    /// The user's stream ends behind what is on its way.
    fin: bool,
    asked: bool,
    sending: Chain,
    /// What was received above and by the user.
    heard: Vec<u8>,
    user_heard: Vec<u8>,
    /// How the receiving side ended.
    end: Option<Result<(), Errno>>,
    broken: bool,
}

fn client(
    identities_pem: &str,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> ClientConnection {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(identities_pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.enable_secret_extraction = true;
    ClientConnection::new(Arc::new(config), ServerName::try_from("a.example").unwrap()).unwrap()
}

/// A user and an engine after their handshake; what the user has sent with its last flight is in `up`.
fn shake_hands(user: &mut Connection, terms: &Identities, up: &mut Vec<u8>) -> Engine {
    let mut hello = Vec::new();
    user.write_tls(&mut hello).unwrap();
    let mut engine = Engine::accept(&hello, terms.terms(Speech::Http, None).unwrap()).unwrap();
    loop {
        let mut down = Vec::new();
        engine.flush(&mut down).unwrap();
        let mut down = down.as_slice();
        while !down.is_empty() {
            user.read_tls(&mut down).unwrap();
            user.process_new_packets().unwrap();
        }
        up.clear();
        while user.wants_write() {
            user.write_tls(up).unwrap();
        }
        if !engine.is_handshaking() {
            return engine;
        }
        let mut rest = up.as_slice();
        engine.take(&mut rest, Now::default()).unwrap();
        up.clear();
    }
}

/// A backend with a certificate of its own.
fn backend(versions: &[&'static rustls::SupportedProtocolVersion]) -> Connection {
    static PAIR: OnceLock<(String, String)> = OnceLock::new();
    let (certificate, key) = PAIR.get_or_init(|| {
        let key = rcgen::KeyPair::generate().unwrap();
        let names = ["b.example".to_owned()];
        let certificate = rcgen::CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    });
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    Connection::Server(ServerConnection::new(Arc::new(config)).unwrap())
}

/// The engine of a connection with a backend after the handshake; what the backend has sent behind it is in `up`.
fn shake_hands_with(backend: &mut Connection, up: &mut Vec<u8>) -> Engine {
    static BACKENDS: OnceLock<Backends> = OnceLock::new();
    let backends =
        BACKENDS.get_or_init(|| Backends::read(None, false, std::iter::empty()).unwrap());
    let at = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut engine =
        backends.client(&BackendTls::default(), at, BackendSpeech::Anything).begin().unwrap();
    loop {
        let mut down = Vec::new();
        engine.flush(&mut down).unwrap();
        let mut down = down.as_slice();
        while !down.is_empty() {
            backend.read_tls(&mut down).unwrap();
            backend.process_new_packets().unwrap();
        }
        up.clear();
        while backend.wants_write() {
            backend.write_tls(up).unwrap();
        }
        if !engine.is_handshaking() && !backend.is_handshaking() {
            return engine;
        }
        engine.take(&mut up.as_slice(), Now::default()).unwrap();
    }
}

impl World {
    fn new(seed: u64, blocks: usize, takes_ragged_ends: bool) -> World {
        let mut dice = Dice(Box::new(xorshift(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)));
        let side = if seed.is_multiple_of(2) { Side::Backend } else { Side::Client };
        let (mut up, versions) = (Vec::new(), versions(dice.below(3)));
        let (user, engine) = match side {
            Side::Client => {
                let (identities, pem) = identities_and_pem();
                let mut user = Connection::Client(client(pem, versions));
                let engine = shake_hands(&mut user, identities, &mut up);
                (user, engine)
            }
            Side::Backend => {
                let mut backend = backend(versions);
                let engine = shake_hands_with(&mut backend, &mut up);
                (backend, engine)
            }
        };
        World {
            side,
            user,
            now: Now::default(),
            session: Some(Session::new(side, engine, takes_ragged_ends)),
            pool: Pool::new(blocks, blocks / 4),
            up,
            down: Vec::new(),
            room: 100_000,
            below: Vec::new(),
            above: Vec::new(),
            armed: None,
            cancelled: false,
            room_awaited: false,
            fin_sent: false,
            fin: false,
            asked: false,
            sending: Chain::EMPTY,
            heard: Vec::new(),
            user_heard: Vec::new(),
            end: None,
            broken: false,
            dice,
        }
    }

    fn call(&mut self, act: impl FnOnce(&mut Session, &mut Wire<'_>)) {
        let World { now, pool, below, above, down, room, session, .. } = self;
        let mut outlet = Outlet { to: down, room };
        let (outlet, now) = (&mut outlet, *now);
        act(session.as_mut().unwrap(), &mut Wire { now, pool, outlet, below, above });
        self.carry_out();
    }

    fn carry_out(&mut self) {
        for what in std::mem::take(&mut self.below) {
            match what {
                Below::Receive(how) => {
                    assert!(self.armed.replace(how).is_none(), "one receive at a time");
                }
                Below::CancelReceive => self.cancelled = true,
                Below::AwaitRoom => self.room_awaited = true,
                Below::CancelRoom => assert!(self.room_awaited),
                Below::FinishWriting => self.fin_sent = true,
                Below::CountBroken => {}
            }
        }
        for event in std::mem::take(&mut self.above) {
            match event {
                Event::Received { what, more, .. } => {
                    assert!(std::mem::take(&mut self.asked) && !more);
                    match what {
                        Received::Data(buf) => {
                            assert!(!buf.is_empty() && self.end.is_none());
                            self.heard.extend_from_slice(self.pool.bytes(&buf));
                            self.pool.give_back(buf);
                        }
                        Received::End => self.end = Some(Ok(())),
                        Received::Failed(errno) => self.end = Some(Err(errno)),
                        Received::NoBuffers | Received::Stopped => {}
                    }
                }
                Event::Sent { result, .. } => {
                    assert!(!self.sending.is_empty());
                    match result {
                        Ok(bytes) => assert_eq!(bytes as usize, self.sending.bytes()),
                        Err(_) => self.broken = true,
                    }
                    let sent = self.sending.take();
                    self.pool.give_back_chain(sent);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn ask(&mut self) {
        if self.asked || self.end.is_some() {
            return;
        }
        self.asked = true;
        let how = match self.dice.below(4) {
            0 => Intake::Many { bytes_max: 65_536 },
            1 => Intake::Once { class: Class::Small, wait_first: false },
            2 => Intake::Once { class: Class::Large, wait_first: true },
            _ => Intake::Last { wait_first: true },
        };
        let side = self.side;
        self.call(|session, wire| session.command(StreamCmd::Receive { side, how }, wire));
    }

    fn cancel(&mut self) {
        if self.asked {
            let side = self.side;
            self.call(|session, wire| session.command(StreamCmd::CancelReceive { side }, wire));
        }
    }

    /// The kernel completes the receive, if it can.
    fn receive(&mut self) {
        let Some(how) = self.armed else { return };
        let what = if std::mem::take(&mut self.cancelled) && self.dice.one_in(2) {
            Received::Stopped
        } else if !self.up.is_empty() {
            let Some(mut buf) = self.pool.take(class(how)) else {
                self.armed = None;
                return self.call(|it, wire| it.received(Received::NoBuffers, true, wire));
            };
            let most = match self.dice.below(4) {
                0 => 1,
                1 => 100,
                _ => usize::MAX,
            };
            let count = self.up.len().min(most);
            let taken = self.pool.append(&mut buf, &self.up[..count]);
            self.up.drain(..taken);
            Received::Data(buf)
        } else if self.fin {
            Received::End
        } else {
            return;
        };
        self.armed = None;
        let nonempty = !self.up.is_empty();
        self.call(|session, wire| session.received(what, nonempty, wire));
    }

    fn make_room(&mut self) {
        self.room += [1, 1_000, 100_000][self.dice.below(3)];
        if std::mem::take(&mut self.room_awaited) {
            self.call(Session::room);
        }
    }

    fn send(&mut self, bytes: &[u8]) -> usize {
        if !self.sending.is_empty() || self.broken {
            return 0;
        }
        let mut at = 0;
        while at < bytes.len() && self.sending.blocks() < 8 {
            let class = if self.dice.one_in(2) { Class::Small } else { Class::Large };
            let Some(mut buf) = self.pool.take(class) else { break };
            let most = bytes.len().min(at + 1 + self.dice.below(70_000));
            at += self.pool.append(&mut buf, &bytes[at..most]);
            self.pool.push(&mut self.sending, buf);
        }
        if at > 0 {
            let (what, side) = (self.sending.outgoing(), self.side);
            self.call(|session, wire| session.command(StreamCmd::Send { side, what }, wire));
        }
        at
    }

    fn user_reads(&mut self) {
        let mut down = self.down.as_slice();
        while !down.is_empty() {
            self.user.read_tls(&mut down).unwrap();
            let state = self.user.process_new_packets().expect("our records are sound");
            let mut plain = vec![0; state.plaintext_bytes_to_read()];
            io::Read::read_exact(&mut self.user.reader(), &mut plain).unwrap();
            self.user_heard.extend(plain);
        }
        self.down.clear();
        self.user_flushes();
    }

    fn user_flushes(&mut self) {
        while !self.fin && self.user.wants_write() {
            self.user.write_tls(&mut self.up).unwrap();
        }
    }

    fn user_writes(&mut self, bytes: &[u8]) -> usize {
        let most = bytes.len().min(1 + self.dice.below(40_000));
        let taken = self.user.writer().write(&bytes[..most]).unwrap();
        if self.dice.one_in(20) {
            let _ = self.user.refresh_traffic_keys();
        }
        self.user_flushes();
        taken
    }

    fn close(mut self) {
        let session = self.session.take().unwrap();
        let World { pool, down, room, .. } = &mut self;
        session.close(false, &mut Outlet { to: down, room }, pool);
        assert!(self.sending.is_empty());
        for class in [Class::Small, Class::Large] {
            assert_eq!(self.pool.free(class), self.pool.blocks(class), "all blocks are back");
        }
    }
}

fn bytes(dice: &mut Dice, count: usize) -> Vec<u8> {
    (0..count).map(|_| dice.below(256) as u8).collect()
}

/// Both sides send and end in the way of TLS, whatever happens in between.
fn relay(seed: u64) {
    let blocks = [4, 8, 64][seed as usize % 3];
    let mut world = World::new(seed, blocks, false);
    let lengths = [0, 1, 5_000, 200_000];
    let pick = |world: &mut World| {
        let length = lengths[world.dice.below(4)];
        bytes(&mut world.dice, length)
    };
    let (to_us, to_user) = (pick(&mut world), pick(&mut world));
    let (mut from_user, mut from_us) = (0, 0);
    let (mut user_done, mut we_are_done) = (false, false);
    for step in 0.. {
        assert!(step < 200_000, "seed {seed} hangs: {} of {}", world.heard.len(), to_us.len());
        world.now = world.now.plus(Duration::from_millis(world.dice.below(50) as u64));
        match world.dice.below(8) {
            0 if from_user < to_us.len() => from_user += world.user_writes(&to_us[from_user..]),
            0 if !user_done => {
                user_done = true;
                world.user.send_close_notify();
                world.user_flushes();
                world.fin = world.dice.one_in(2);
            }
            1 if from_us < to_user.len() => from_us += world.send(&to_user[from_us..]),
            1 if !we_are_done && world.sending.is_empty() => {
                we_are_done = true;
                let what = StreamCmd::FinishWriting { side: world.side };
                world.call(|session, wire| session.command(what, wire));
            }
            2 | 3 => world.ask(),
            4 if world.dice.one_in(4) => world.cancel(),
            4 | 5 => world.receive(),
            6 => world.make_room(),
            7 => world.user_reads(),
            _ => {}
        }
        if user_done && we_are_done && world.fin_sent && world.end.is_some() {
            break;
        }
    }
    world.user_reads();
    assert_eq!(world.heard, to_us, "seed {seed}");
    assert_eq!(world.user_heard, to_user, "seed {seed}");
    assert_eq!(world.end, Some(Ok(())), "seed {seed}");
    let mut none = [0];
    assert_eq!(io::Read::read(&mut world.user.reader(), &mut none).unwrap(), 0, "close_notify");
    world.close();
}

#[test]
fn no_byte_is_lost_or_changed_whatever_is_cut_and_held_back() {
    let seeds = std::env::var("LB_TLS_SIM_SEEDS").map_or(150, |text| text.parse().unwrap());
    (1..=seeds).for_each(relay);
}

/// Receives until it is over.
fn drain(world: &mut World) {
    for _ in 0..1000 {
        world.ask();
        world.receive();
        if world.end.is_some() {
            return;
        }
    }
    panic!("it does not end");
}

#[test]
fn an_end_that_was_cut_off_is_a_reset_unless_it_may_be_ragged() {
    let (cut, ok) = ((false, Err(Errno::ECONNRESET)), (true, Ok(())));
    for (seed, (ragged, end)) in [(7, cut), (7, ok), (8, cut), (8, ok)] {
        let mut world = World::new(seed, 8, ragged);
        world.user_writes(b"all of it");
        world.fin = true;
        drain(&mut world);
        assert_eq!((world.heard.as_slice(), world.end), (&b"all of it"[..], Some(end)));
        world.close();
    }
}

#[test]
fn a_record_that_was_changed_ends_both_ways_with_an_alert() {
    let mut world = World::new(9, 8, false);
    world.up.clear();
    world.user.writer().write_all(b"good").unwrap();
    world.user_flushes();
    world.user.writer().write_all(b"not so good").unwrap();
    world.user_flushes();
    *world.up.last_mut().unwrap() ^= 1;
    drain(&mut world);
    assert_eq!((world.heard.as_slice(), world.end), (&b"good"[..], Some(Err(Errno::EPROTO))));
    assert_eq!(world.send(b"an answer"), 9);
    assert!(world.broken, "nothing can be sent any more");
    let mut down = world.down.as_slice();
    let told = std::iter::from_fn(|| {
        (!down.is_empty()).then(|| {
            world.user.read_tls(&mut down).unwrap();
            world.user.process_new_packets().err()
        })
    });
    let told = told.flatten().next();
    assert_eq!(told, Some(rustls::Error::AlertReceived(rustls::AlertDescription::BadRecordMac)));
    world.close();
}

#[test]
fn a_session_that_lets_go_is_not_waited_for() {
    let mut world = World::new(5, 8, false);
    world.room = 0;
    assert_eq!(world.send(b"held back"), 9);
    assert!(world.room_awaited && world.session.as_ref().unwrap().in_flight());
    let what = StreamCmd::CancelSend { side: world.side };
    world.call(|session, wire| session.command(what, wire));
    assert!(world.broken && world.sending.is_empty());
    world.close();
}

/// What the user makes of the stream's end.
fn told_the_end(world: World) -> bool {
    let World { mut user, down, .. } = world;
    let mut down = down.as_slice();
    while !down.is_empty() {
        user.read_tls(&mut down).unwrap();
        user.process_new_packets().unwrap();
    }
    user.read_tls(&mut io::empty()).unwrap();
    io::Read::read_to_end(&mut user.reader(), &mut Vec::new()).is_ok()
}

#[test]
fn a_connection_that_is_closed_is_ended_in_the_way_of_tls_unless_it_is_reset_or_cut() {
    let ways = [(false, false), (true, false), (false, true)];
    for (seed, (reset, cut)) in [3, 4].into_iter().flat_map(|seed| ways.map(|way| (seed, way))) {
        let mut world = World::new(seed, 8, false);
        if cut {
            world.room = 0;
            world.send(b"cut off");
            let what = StreamCmd::CancelSend { side: world.side };
            world.call(|session, wire| session.command(what, wire));
            world.room = 100;
        }
        let session = world.session.take().unwrap();
        let World { pool, down, room, .. } = &mut world;
        session.close(reset, &mut Outlet { to: down, room }, pool);
        assert_eq!(told_the_end(world), !reset && !cut);
    }
}

/// The lengths of the records on their way to the user, without their heads.
fn record_lengths(mut down: &[u8]) -> Vec<usize> {
    let mut lengths = Vec::new();
    while let [_, _, _, high, low, ..] = down {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        lengths.push(length);
        down = &down[5 + length..];
    }
    lengths
}

#[test]
fn records_are_short_while_a_connection_starts_and_long_once_it_streams() {
    let mut world = World::new(3, 64, false);
    world.room = usize::MAX;
    world.down.clear();
    let bytes = vec![7; 60_000];
    let send_all = |world: &mut World| {
        let mut sent = 0;
        while sent < bytes.len() {
            sent += world.send(&bytes[sent..]);
        }
        let lengths = record_lengths(&world.down);
        world.user_reads();
        lengths
    };
    world.now = Now::from_nanos(10_000_000_000);
    let first = send_all(&mut world);
    assert!(first[..20].iter().all(|length| (17..=1400).contains(length)), "{first:?}");
    assert!(first.iter().any(|length| *length > 4000), "{first:?}");
    let next = send_all(&mut world);
    assert!(next.iter().any(|length| *length > 4000) && next.len() < first.len(), "{next:?}");
    world.now = world.now.plus(Duration::from_secs(1));
    let rested = send_all(&mut world);
    assert!(rested[..20].iter().all(|length| *length <= 1400), "{rested:?}");
    world.close();
}
