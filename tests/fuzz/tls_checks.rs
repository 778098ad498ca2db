//! What must hold of TLS for any bytes at all, as functions over bytes, like those in `checks.rs`: of bytes that
//! begin a connection, and of one that is agreed on, where they say what happens next.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use lb::base::time::Now;
use lb::config::Config;
use lb::proxy::tls::{Below, Session, Wire};
use lb::proxy::{Event, Intake, Received, Side, StreamCmd};
use lb::ring::pool::{Chain, Class, Pool};
use lb::tls::demo::Made;
use lb::tls::engine::Engine;
use lb::tls::hello;
use lb::tls::keys::{Speech, Terms};
use nix::errno::Errno;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

/// What is agreed at a door of streams, and a user who trusts its certificate.
static AGREED: LazyLock<(Terms, Arc<ClientConfig>)> = LazyLock::new(|| {
    let made = Made::new().expect("a certificate can be made");
    let mut config = Config::default();
    config.tls.certificates = vec![made.files.clone()];
    let tls = lb::boot::tls::load(&config, 1, None).expect("it was just made");
    let identities = &tls.agreed.as_ref().unwrap().identities;
    let pem = std::fs::read(&made.files.certificate).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    let user = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    (identities.terms(Speech::Stream, None).unwrap().clone(), Arc::new(user))
});

fn user() -> ClientConnection {
    ClientConnection::new(Arc::clone(&AGREED.1), ServerName::try_from("localhost").unwrap())
        .unwrap()
}

/// A ClientHello as a user really says it, to begin with.
pub fn a_hello() -> Vec<u8> {
    let mut hello = Vec::new();
    user().write_tls(&mut hello).unwrap();
    hello
}

/// Reads the start of a connection in one piece, and cut at every byte; then has it answered.
pub fn client_hello(bytes: &[u8]) {
    let whole = hello::read(bytes);
    let verdict = (0..bytes.len()).map(|end| hello::read(&bytes[..end]));
    match verdict.into_iter().find(|verdict| *verdict != Ok(None)) {
        None => {}
        Some(Ok(early)) => assert_eq!(Ok(early), whole, "what follows changes nothing"),
        Some(Err(_)) => assert!(whole.is_err(), "what follows makes nothing well"),
    }
    let Ok(Some(found)) = whole else { return };
    assert!(found.bytes <= bytes.len() && found.bytes <= hello::BYTES_MAX);
    if let Some(host) = &found.host {
        let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        assert!(
            host.bytes().all(|byte| is_plain(byte) || b"-._".contains(&byte)) && !host.is_empty()
        );
    }
    match Engine::accept(&bytes[..found.bytes], &AGREED.0) {
        Ok(engine) => {
            let host = engine.host().map(|host| host.trim_end_matches('.').to_ascii_lowercase());
            assert_eq!(host, found.host, "both read the same host");
        }
        Err(refused) => assert!(!refused.why.is_empty()),
    }
}

/// A user and an engine after their handshake.
fn shake_hands() -> (ClientConnection, Engine) {
    let mut user = user();
    let mut hello = Vec::new();
    user.write_tls(&mut hello).unwrap();
    let mut engine = Engine::accept(&hello, &AGREED.0).expect("they have everything in common");
    while engine.is_handshaking() || user.is_handshaking() || engine.has_sealed() {
        let (mut down, mut up) = (Vec::new(), Vec::new());
        engine.flush(&mut down).unwrap();
        let mut down = down.as_slice();
        while !down.is_empty() {
            user.read_tls(&mut down).unwrap();
            user.process_new_packets().unwrap();
        }
        while user.wants_write() {
            user.write_tls(&mut up).unwrap();
        }
        engine.take(&mut up.as_slice(), Now::default()).unwrap();
    }
    (user, engine)
}

/// A socket that takes so many bytes more.
struct Outlet<'a>(&'a mut Vec<u8>, &'a mut usize);

impl Write for Outlet<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(*self.1);
        if taken == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        *self.1 -= taken;
        self.0.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A session, its user, and what is between them.
struct Scene {
    user: ClientConnection,
    session: Session,
    pool: Pool,
    now: Now,
    up: Vec<u8>,
    down: Vec<u8>,
    room: usize,
    armed: Option<Intake>,
    is_room_awaited: bool,
    asked: bool,
    sending: Chain,
    /// Somebody on the way has changed a byte.
    is_changed: bool,
    has_ended: bool,
    is_broken: bool,
    /// What was said by either, and heard by the other.
    said: [usize; 2],
    heard: [usize; 2],
}

/// The byte at each place of what is said.
fn byte(place: usize) -> u8 {
    (place % 251) as u8
}

impl Scene {
    fn call(&mut self, act: impl FnOnce(&mut Session, &mut Wire<'_>)) {
        let (mut below, mut above) = (Vec::new(), Vec::new());
        let Scene { session, pool, now, down, room, .. } = self;
        let outlet = &mut Outlet(down, room);
        act(session, &mut Wire { now: *now, pool, outlet, below: &mut below, above: &mut above });
        for what in below {
            match what {
                Below::Receive(how) => assert!(self.armed.replace(how).is_none()),
                Below::AwaitRoom => self.is_room_awaited = true,
                Below::CancelReceive
                | Below::CancelRoom
                | Below::FinishWriting
                | Below::CountBroken => {}
            }
        }
        above.into_iter().for_each(|event| self.hear(event));
    }

    /// What the session above is told.
    fn hear(&mut self, event: Event) {
        match event {
            Event::Received { what, more, .. } => {
                assert!(std::mem::take(&mut self.asked) && !more, "one answer to each question");
                if let Received::Data(buf) = what {
                    let bytes = self.pool.bytes(&buf);
                    let places = self.heard[0]..;
                    assert!(
                        !bytes.is_empty()
                            && bytes.iter().zip(places).all(|(it, at)| *it == byte(at))
                    );
                    self.heard[0] += bytes.len();
                    assert!(self.heard[0] <= self.said[0]);
                    self.pool.give_back(buf);
                } else if let Received::End | Received::Failed(_) = what {
                    self.has_ended = true;
                }
            }
            Event::Sent { result, .. } => {
                self.is_broken |= result.is_err();
                let sent = self.sending.take();
                self.pool.give_back_chain(sent);
            }
            other => panic!("{other:?}"),
        }
    }

    fn user_says(&mut self, count: usize) {
        let bytes: Vec<u8> = (self.said[0]..self.said[0] + count).map(byte).collect();
        // It says no more once it has heard an alert.
        self.said[0] += self.user.writer().write(&bytes).unwrap_or(0);
        while self.user.wants_write() {
            self.user.write_tls(&mut self.up).unwrap();
        }
    }

    fn user_hears(&mut self) {
        let mut down = self.down.as_slice();
        while !down.is_empty() {
            let read = self.user.read_tls(&mut down).map_err(drop);
            let state = read.and_then(|_| self.user.process_new_packets().map_err(drop));
            let Ok(state) = state else {
                assert!(self.is_broken || self.is_changed, "our records are sound");
                break;
            };
            let mut plain = vec![0; state.plaintext_bytes_to_read()];
            self.user.reader().read_exact(&mut plain).unwrap();
            assert!(plain.iter().zip(self.heard[1]..).all(|(it, at)| *it == byte(at)));
            self.heard[1] += plain.len();
            assert!(self.heard[1] <= self.said[1]);
        }
        self.down.clear();
    }

    fn ask(&mut self, pick: u8) {
        if self.asked || self.has_ended {
            return;
        }
        self.asked = true;
        let how = match pick % 3 {
            0 => Intake::Many { bytes_max: 65_536 },
            1 => Intake::Once { class: Class::Large, wait_first: true },
            _ => Intake::Last { wait_first: true },
        };
        self.call(|it, wire| it.command(StreamCmd::Receive { side: Side::Client, how }, wire));
    }

    fn deliver(&mut self, most: usize) {
        if self.armed.is_none() || self.up.is_empty() {
            return;
        }
        self.armed = None;
        let what = self.pool.take(Class::Large).or_else(|| self.pool.take(Class::Small));
        let what = what.map_or(Received::NoBuffers, |mut buf| {
            let count = self.up.len().min(most.max(1));
            let taken = self.pool.append(&mut buf, &self.up[..count]);
            self.up.drain(..taken);
            Received::Data(buf)
        });
        let nonempty = !self.up.is_empty();
        self.call(|it, wire| it.received(what, nonempty, wire));
    }

    fn send(&mut self, count: usize) {
        if !self.sending.is_empty() || self.is_broken {
            return;
        }
        let Some(mut buf) = self.pool.take(Class::Large) else { return };
        let bytes: Vec<u8> = (self.said[1]..self.said[1] + count.max(1)).map(byte).collect();
        self.said[1] += self.pool.append(&mut buf, &bytes);
        self.pool.push(&mut self.sending, buf);
        let what = self.sending.outgoing();
        self.call(|it, wire| it.command(StreamCmd::Send { side: Side::Client, what }, wire));
    }

    fn make_room(&mut self, bytes: usize) {
        self.room += bytes;
        if std::mem::take(&mut self.is_room_awaited) {
            self.call(Session::room);
        }
    }

    fn step(&mut self, what: u8, much: u8) {
        let count = usize::from(much);
        match what % 10 {
            0 => self.user_says(count * 37),
            1 => self.deliver(count * count),
            2 => self.ask(much),
            3 if self.asked => {
                self.call(|it, wire| {
                    it.command(StreamCmd::CancelReceive { side: Side::Client }, wire);
                });
            }
            4 => self.send(count * 64),
            5 => self.make_room(count * 100),
            6 => self.user_hears(),
            7 => drop(self.user.refresh_traffic_keys()),
            8 => self.now = self.now.plus(Duration::from_millis(u64::from(much) * 10)),
            9 if much == 9 && !self.up.is_empty() => {
                let place = self.up.len() / 2;
                self.up[place] ^= 1;
                self.is_changed = true;
            }
            _ => {}
        }
    }

    fn end(mut self) {
        if self.armed.take().is_some() {
            self.call(|it, wire| it.received(Received::Failed(Errno::ECONNRESET), false, wire));
        }
        if !self.sending.is_empty() {
            self.call(|it, wire| {
                it.command(StreamCmd::CancelSend { side: Side::Client }, wire);
            });
        }
        let Scene { session, mut pool, mut down, mut room, .. } = self;
        session.close(false, &mut Outlet(&mut down, &mut room), &mut pool);
        for class in [Class::Small, Class::Large] {
            assert_eq!(pool.free(class), pool.blocks(class), "all blocks are back");
        }
    }
}

/// A connection that is agreed on, to which each two bytes say what happens next: nothing is lost, changed or
/// made up, and every block comes back.
pub fn tls_session(bytes: &[u8]) {
    let (user, engine) = shake_hands();
    let session = Session::new(Side::Client, engine, false);
    let mut scene = Scene {
        user,
        session,
        pool: Pool::new(4, 4),
        now: Now::from_nanos(1 << 40),
        up: Vec::new(),
        down: Vec::new(),
        room: 10_000,
        armed: None,
        is_room_awaited: false,
        asked: false,
        sending: Chain::EMPTY,
        is_changed: false,
        has_ended: false,
        is_broken: false,
        said: [0; 2],
        heard: [0; 2],
    };
    for step in bytes.chunks_exact(2).take(2000) {
        scene.step(step[0], step[1]);
    }
    scene.end();
}
