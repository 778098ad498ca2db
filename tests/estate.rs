//! Workers whose sessions go on at another one, while their users and backends use them: nobody notices. Both
//! workers are in this process, and what goes from one to the other goes the way it would between two.

#[path = "estate/planes.rs"]
mod planes;
#[path = "common/random.rs"]
mod random;
#[path = "common/streams.rs"]
mod streams;
#[path = "estate/udp.rs"]
mod udp;
#[path = "common/wait.rs"]
mod wait;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use lb::cluster::BackendId;
use lb::estate::tcp::SessionRecord;
use lb::estate::{Estate, Parcel};
use lb::session::EndReason;
use lb::session::shards::SessionView;
use lb::worker::brake::Request;
use lb::worker::link::{Order, Report};
use planes::{Plane, config, delivered};
use random::pattern;
use socket2::SockRef;
use streams::{ask, busy, check};
use wait::{PATIENCE, wait_for};

const HANDOVERS: usize = 10;
/// Users whose bytes come back to them all the time; every third in large pieces, for which pipes are used.
const BUSY: usize = 9;
/// What a user who does not read says, and what one is sent who reads late: more than the kernel's buffers on the
/// way hold.
const UNREAD_BYTES: usize = 12 << 20;

/// The first byte of a connection tells the backend what to do.
const ECHO: u8 = b'e';
/// It says a text and finishes, then reads.
const SAYS_FIRST: u8 = b's';
/// It reads to the end, then says a text.
const SAYS_LAST: u8 = b'l';

fn backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            thread::spawn(move || serve(connection));
        }
    });
    address
}

fn serve(mut connection: TcpStream) -> Option<()> {
    let (mut first, mut bytes) = ([0], vec![0; 64 * 1024]);
    connection.read_exact(&mut first).ok()?;
    let text = || pattern(first[0].into(), UNREAD_BYTES);
    match first[0] {
        SAYS_FIRST => {
            connection.write_all(&text()).ok()?;
            connection.shutdown(Shutdown::Write).ok()?;
            while connection.read(&mut bytes).ok()? > 0 {}
        }
        SAYS_LAST => {
            while connection.read(&mut bytes).ok()? > 0 {}
            connection.write_all(&text()).ok()?;
        }
        _ => loop {
            let count = connection.read(&mut bytes).ok().filter(|count| *count > 0)?;
            connection.write_all(&bytes[..count]).ok()?;
        },
    }
    Some(())
}

/// A user whose backend is told what to do.
fn user(plane: &Plane, what: u8) -> TcpStream {
    let mut user = plane.user();
    user.write_all(&[what]).unwrap();
    user
}

/// What must be the same of a session before and after; its bytes may have moved on.
fn identity(view: SessionView) -> SessionView {
    SessionView { active: view.started, bytes_up: 0, bytes_down: 0, ..view }
}

/// Has another worker take up the sessions of this one, which leaves and stops. Something is done before the other
/// goes on.
pub fn hand_over(mut old: Plane, start: impl Fn() -> Plane, meanwhile: impl FnOnce()) -> Plane {
    let new = start();
    new.request(Request::Freeze);
    old.send_ahead(&new);
    let estate = delivered(old.describe());
    let before = old.views();
    assert_eq!(new.inherit(estate), None);
    assert_eq!(new.views(), before, "they stand in the books as before");
    meanwhile();
    new.request(Request::Thaw);
    old.request(Request::Leave);
    assert_eq!(old.sessions(), 0, "nobody is left");
    let ended = |report: &Report| matches!(report, Report::Ended(_));
    assert!(!old.reports().iter().any(ended), "nobody has ended");
    old.stop();
    let after: Vec<_> = new.views().into_iter().map(identity).collect();
    assert_eq!(after, before.into_iter().map(identity).collect::<Vec<_>>());
    new
}

#[test]
fn users_do_not_notice_that_another_worker_goes_on_with_their_sessions() {
    let backend = backend();
    let start = || Plane::start(&config(), &[backend], &[]);
    let mut plane = start();
    let (stop, moved) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut all: Vec<_> =
        (1..=BUSY).map(|number| busy(user(&plane, ECHO), number, &stop, &moved)).collect();
    let mut idle: Vec<_> = (0..20).map(|_| user(&plane, ECHO)).collect();
    idle.iter_mut().for_each(ask);
    // One says much and does not read, one reads late what a backend says that has finished, one hears much from
    // a backend when it has finished itself.
    let unread = user(&plane, ECHO);
    let unread_text = Arc::new(pattern(77, UNREAD_BYTES));
    all.push({
        let (mut to, text) = (unread.try_clone().unwrap(), Arc::clone(&unread_text));
        thread::spawn(move || {
            to.write_all(&text).expect("nobody is reset");
            to.shutdown(Shutdown::Write).unwrap();
        })
    });
    let hears_first = user(&plane, SAYS_FIRST);
    let mut hears_last = user(&plane, SAYS_LAST);
    hears_last.write_all(&[7; 5000]).unwrap();
    hears_last.shutdown(Shutdown::Write).unwrap();
    wait_for("all of them to be served", || (plane.sessions() >= BUSY as u64 + 23).then_some(()));
    plane.reports();
    for _ in 0..HANDOVERS {
        let before = moved.load(Ordering::Relaxed);
        wait_for("bytes to move", || (moved.load(Ordering::Relaxed) > before).then_some(()));
        plane = hand_over(plane, start, || {});
        assert_eq!(plane.reports(), [], "nobody is new");
        idle.iter_mut().for_each(ask);
    }
    let rest = AtomicU64::new(0);
    for (mut from, what) in [(hears_first, SAYS_FIRST), (hears_last, SAYS_LAST)] {
        let text = pattern(what.into(), UNREAD_BYTES);
        let reader = from.try_clone().unwrap();
        assert_eq!(check(reader, &text, &rest), UNREAD_BYTES as u64);
        let _ = from.write_all(b"bye");
    }
    stop.store(true, Ordering::Relaxed);
    assert_eq!(check(unread, &unread_text, &rest), UNREAD_BYTES as u64);
    all.into_iter().for_each(|one| one.join().unwrap());
    drop(idle);
    wait_for("everybody to have gone", || (plane.sessions() == 0).then_some(()));
    plane.stop();
}

#[test]
fn what_happens_once_sockets_have_gone_ahead_happens_to_their_sessions() {
    let backend = backend();
    let start = || Plane::start(&config(), &[backend], &[]);
    let old = start();
    let mut stays: Vec<_> = (0..300).map(|_| user(&old, ECHO)).collect();
    stays.iter_mut().for_each(ask);
    let [mut ends, resets] = [(); 2].map(|()| {
        let mut user = user(&old, ECHO);
        ask(&mut user);
        user
    });
    let new = start();
    new.request(Request::Freeze);
    assert_eq!(old.send_ahead(&new), 302);
    // They go on, and some of them to their ends.
    stays.iter_mut().step_by(7).for_each(ask);
    ends.shutdown(Shutdown::Write).unwrap();
    assert_eq!(ends.read(&mut [0]).unwrap(), 0, "its end is told while there are duplicates");
    SockRef::from(&resets).set_linger(Some(Duration::ZERO)).unwrap();
    drop(resets);
    wait_for("both to have ended", || (old.sessions() == 300).then_some(()));
    // Others take their places, and one is spliced by now.
    let mut late: Vec<_> = (0..3).map(|_| user(&old, ECHO)).collect();
    late.iter_mut().for_each(ask);
    let mut long = stays.pop().unwrap();
    let text = pattern(3, 1 << 20);
    let echoed = |user: &mut TcpStream| {
        let mut back = vec![0; text.len()];
        thread::scope(|scope| {
            let mut to = user.try_clone().unwrap();
            scope.spawn(|| user.read_exact(&mut back).unwrap());
            to.write_all(&text).unwrap();
        });
        assert!(back == text);
    };
    echoed(&mut long);
    let estate = delivered(old.describe());
    assert!(estate.tcp.sockets.len() <= 2 * 3 + 4, "the others have come");
    assert_eq!(new.inherit(estate), None);
    new.request(Request::Thaw);
    old.request(Request::Leave);
    old.stop();
    assert_eq!(new.sessions(), 303);
    echoed(&mut long);
    stays.iter_mut().chain(&mut late).for_each(ask);
    drop((stays, late, long));
    wait_for("everybody to have gone", || (new.sessions() == 0).then_some(()));
    new.stop();
}

#[test]
fn sockets_that_went_ahead_in_vain_do_no_harm() {
    let backend = backend();
    let start = || Plane::start(&config(), &[backend], &[]);
    let mut plane = start();
    let mut users: Vec<_> = (0..3).map(|_| user(&plane, ECHO)).collect();
    for (spoils, why) in [
        ("nobody is described", None),
        ("one is described twice", Some("a session's sockets have not come ahead")),
        ("what a record points to is missing", Some("bytes of a session are missing")),
    ] {
        users.iter_mut().for_each(ask);
        let new = start();
        new.request(Request::Freeze);
        assert_eq!(plane.send_ahead(&new), 3);
        // Of the last one the receives stay armed.
        users[..2].iter_mut().for_each(ask);
        let mut estate = delivered(plane.describe());
        let records: Vec<SessionRecord> = estate.tcp.records().collect();
        let bare = |records: &[SessionRecord]| {
            let mut parcel = Parcel::default();
            records.iter().for_each(|record| parcel.push(record));
            parcel
        };
        match spoils {
            "nobody is described" => estate.tcp = Parcel::default(),
            "one is described twice" => estate.tcp.push(&records[1]),
            _ => estate.tcp = bare(&records[2..]),
        }
        assert_eq!(new.inherit(estate).as_deref(), why);
        wait_for("those before it to be let go of", || (new.sessions() == 0).then_some(()));
        new.request(Request::Thaw);
        plane.request(Request::Thaw);
        // The other has let go of all of them, and takes no byte.
        (0..100).for_each(|_| users.iter_mut().for_each(ask));
        new.stop();
    }
    users.iter_mut().for_each(ask);
    let new = start();
    new.request(Request::Freeze);
    assert_eq!(plane.send_ahead(&new), 3);
    let order = Order::EndBackend { backend: BackendId(1), reason: EndReason::BackendLeft };
    plane.plane.ends[0].orders.push(order).unwrap();
    plane.plane.ends[0].wake.write(1).unwrap();
    for mut user in users {
        let told = user.read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(told, Err(ErrorKind::ConnectionReset), "told although there are duplicates");
    }
    assert_eq!(new.inherit(delivered(Estate::new(0))), None);
    new.request(Request::Thaw);
    new.stop();
    plane.stop();
}

#[test]
fn who_is_being_connected_is_connected_by_the_other_worker() {
    // Nobody accepts there, and the kernel's queue is full: whoever connects has to wait.
    let listener =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    listener.listen(0).unwrap();
    let listener = TcpListener::from(listener);
    let address = listener.local_addr().unwrap();
    let mut held = vec![TcpStream::connect(address).unwrap()];
    while let Ok(one) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        held.push(one);
    }
    let start = || Plane::start(&config(), &[address], &[]);
    let plane = start();
    let mut user = plane.user();
    user.write_all(b"early").unwrap();
    wait_for("a user to be let in", || (plane.sessions() == 1).then_some(()));
    listener.set_nonblocking(true).unwrap();
    let mut accepted = Vec::new();
    let plane = hand_over(plane, start, || {
        wait_for("the queue to have room", || match listener.accept() {
            Ok((connection, _)) => {
                accepted.push(connection);
                None
            }
            Err(_) => Some(()),
        });
    });
    let mut connection = wait_for("the user's connection", || {
        let (mut connection, _) = listener.accept().ok()?;
        connection.set_nonblocking(false).unwrap();
        connection.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut early = [0; 5];
        connection.read_exact(&mut early).ok()?;
        assert_eq!(early, *b"early");
        Some(connection)
    });
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    connection.write_all(b"served").unwrap();
    let mut answer = [0; 6];
    user.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *b"served");
    plane.stop();
}

#[test]
fn a_worker_that_is_not_succeeded_goes_on_as_if_nothing_had_been() {
    let backend = backend();
    let start = || Plane::start(&config(), &[backend], &[]);
    let plane = start();
    let mut user = user(&plane, ECHO);
    ask(&mut user);
    let before = plane.views();
    for _ in 0..3 {
        let new = start();
        new.request(Request::Freeze);
        assert_eq!(new.inherit(delivered(plane.describe())), None);
        // It closes its descriptors before it has gone on, as if it had died.
        new.request(Request::Describe);
        new.request(Request::Leave);
        new.stop();
        plane.request(Request::Thaw);
        ask(&mut user);
    }
    assert_eq!(
        plane.views().into_iter().map(identity).collect::<Vec<_>>(),
        before.into_iter().map(identity).collect::<Vec<_>>()
    );
    plane.stop();
}

#[test]
fn what_cannot_be_taken_up_is_refused_whole_and_goes_on_where_it_is() {
    let backend = backend();
    let start = || Plane::start(&config(), &[backend], &[]);
    let plane = start();
    let mut users: Vec<_> = (0..3).map(|_| user(&plane, ECHO)).collect();
    users.iter_mut().for_each(ask);
    let new = start();
    new.request(Request::Freeze);
    let mut spoilt = delivered(plane.describe());
    let last = spoilt.tcp.sockets.len() - 1;
    spoilt.tcp.sockets[last] = UdpSocket::bind("127.0.0.1:0").unwrap().into();
    let said = new.inherit(spoilt);
    assert_eq!(said.as_deref(), Some("a session's descriptor is no TCP socket"));
    assert_eq!(new.sessions(), 0, "not even those before it");
    new.request(Request::Thaw);
    new.stop();
    plane.request(Request::Thaw);
    users.iter_mut().for_each(ask);
    plane.stop();
}
