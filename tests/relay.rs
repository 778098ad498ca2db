//! The relay against the real kernel: workers and sockets here, the test in the control core's role.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use lb::boot::DataPlane;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Standing};
use lb::config::Config;
use lb::proxy::line::Features;
use lb::ring::outlook::outlook;
use lb::session::EndReason;
use lb::worker::link::{Ended, Order, Report};

#[path = "common/random.rs"]
mod random;
#[path = "common/wait.rs"]
mod wait;

use random::pattern;
use wait::{PATIENCE, wait_for};

struct Balancer {
    plane: DataPlane,
}

impl Balancer {
    fn start(change: impl FnOnce(&mut Config)) -> Balancer {
        Balancer::start_with(1000, Features { receive_cap: true, splice: true }, change)
    }

    fn start_with(
        sessions: usize,
        features: Features,
        change: impl FnOnce(&mut Config),
    ) -> Balancer {
        let mut config = Config { workers: Some(2), ..Config::default() };
        config.listen.tcp = Some("127.0.0.1:0".parse().unwrap());
        (config.listen.udp, config.listen.api) = (None, None);
        change(&mut config);
        Balancer { plane: DataPlane::start(&config, sessions, features).unwrap() }
    }

    /// Publishes these backends to the workers, numbered from 1.
    fn register(&mut self, addresses: &[SocketAddr]) {
        self.publish(addresses);
        self.wake();
    }

    /// The same, without waking the workers.
    fn publish(&mut self, addresses: &[SocketAddr]) {
        let backend = |(place, address): (usize, &SocketAddr)| Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(place as u32 + 1),
            slot: place as u16,
            service: ServiceId::built_in(Protocol::Tcp),
            address: *address,
            weight: 1,
            name: None,
            group: None,
            standing: Standing::Serving,
        };
        let backends: Vec<_> = addresses.iter().enumerate().map(backend).collect();
        self.plane.snapshots.publish(self.plane.snapshots.current().with(&backends));
    }

    fn order(&mut self, order: Order) {
        for end in &mut self.plane.ends {
            end.orders.push(order).unwrap();
        }
        self.wake();
    }

    fn wake(&self) {
        for end in &self.plane.ends {
            end.wake.write(1).unwrap();
        }
    }

    fn user(&self) -> TcpStream {
        let user = TcpStream::connect(self.plane.door(Protocol::Tcp).unwrap()).unwrap();
        user.set_read_timeout(Some(PATIENCE)).unwrap();
        user.set_write_timeout(Some(PATIENCE)).unwrap();
        user
    }

    /// A user who has been given a registered backend: retried while the news travels.
    fn served_user(&self) -> TcpStream {
        wait_for("a user to be served", || {
            let mut user = self.user();
            user.write_all(b"?").ok()?;
            let mut answer = [0];
            (user.read(&mut answer).ok()? == 1).then_some(user)
        })
    }

    fn sum(&self, value: impl Fn(&lb::metrics::WorkerMetrics) -> u64) -> u64 {
        self.plane.ends.iter().map(|end| value(&end.metrics)).sum()
    }

    fn active(&self) -> u64 {
        self.sum(|metrics| metrics.counters.sessions_active.get())
    }

    fn reports(&mut self) -> Vec<Report> {
        let mut all = Vec::new();
        for end in &mut self.plane.ends {
            while let Ok(report) = end.reports.pop() {
                all.push(report);
            }
        }
        all
    }

    fn stop(mut self) {
        self.order(Order::Stop);
        self.plane.threads.join();
    }
}

/// Serves every connection with `serve`, each in a thread of its own.
fn backend(serve: impl Fn(TcpStream) + Send + Sync + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let serve = serve.clone();
            thread::spawn(move || serve(connection));
        }
    });
    address
}

fn echo(mut connection: TcpStream) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = connection.read(&mut bytes) {
        if connection.write_all(&bytes[..count]).is_err() {
            return;
        }
    }
}

/// Answers every byte with the letter of the backend.
fn named(letter: u8) -> SocketAddr {
    backend(move |mut connection| {
        let mut byte = [0];
        while let Ok(1) = connection.read(&mut byte) {
            if connection.write_all(&[letter]).is_err() {
                return;
            }
        }
    })
}

fn ask(user: &mut TcpStream) -> u8 {
    user.write_all(b"?").unwrap();
    let mut answer = [0];
    user.read_exact(&mut answer).unwrap();
    answer[0]
}

#[test]
fn a_user_who_comes_after_a_registration_is_served() {
    let mut balancer = Balancer::start(|_| {});
    let address = backend(echo);
    // A sleeping worker is woken by the user, and must see the backend before the user.
    balancer.publish(&[address]);
    for _ in 0..20 {
        let mut user = balancer.user();
        user.write_all(b"?").unwrap();
        user.read_exact(&mut [0]).unwrap();
    }
    balancer.stop();
}

#[test]
fn users_are_dealt_out_in_turn_and_stay_where_they_are() {
    let mut balancer = Balancer::start(|_| {});
    let backends = [named(b'a'), named(b'b'), named(b'c')];
    balancer.register(&backends[..2]);
    drop(balancer.served_user());
    let mut users: Vec<_> = (0..10).map(|_| balancer.user()).collect();
    let first: Vec<_> = users.iter_mut().map(ask).collect();
    assert_eq!(first.iter().filter(|letter| **letter == b'a').count(), 5, "{first:?}");
    balancer.register(&backends);
    wait_for("the newcomer to be served", || (ask(&mut balancer.user()) == b'c').then_some(()));
    let again: Vec<_> = users.iter_mut().map(ask).collect();
    assert_eq!(first, again);
    balancer.stop();
}

#[test]
fn both_directions_at_once_arrive_whole_with_half_close() {
    for receive_cap in [true, false] {
        let mut balancer =
            Balancer::start_with(1000, Features { receive_cap, splice: receive_cap }, |_| {});
        let len = 8 << 20;
        let address = backend(move |mut connection| {
            let mut writer = connection.try_clone().unwrap();
            let down = thread::spawn(move || {
                writer.write_all(&pattern(9, len)).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let mut got = Vec::new();
            connection.read_to_end(&mut got).unwrap();
            down.join().unwrap();
            assert!(got == pattern(5, len), "upload differs");
        });
        balancer.register(&[address]);
        let users: Vec<_> = (0..2)
            .map(|_| {
                let mut user = wait_for("a user to be given a backend", || {
                    let user = balancer.user();
                    // No backend: closed at once.
                    user.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                    let open = !matches!(user.peek(&mut [0]), Ok(0));
                    user.set_read_timeout(Some(PATIENCE)).unwrap();
                    open.then_some(user)
                });
                thread::spawn(move || {
                    let mut writer = user.try_clone().unwrap();
                    let up = thread::spawn(move || {
                        writer.write_all(&pattern(5, len)).unwrap();
                        writer.shutdown(Shutdown::Write).unwrap();
                    });
                    let mut got = Vec::new();
                    user.read_to_end(&mut got).unwrap();
                    up.join().unwrap();
                    assert!(got == pattern(9, len), "download differs");
                })
            })
            .collect();
        for user in users {
            user.join().unwrap();
        }
        wait_for("no session to run", || (balancer.active() == 0).then_some(()));
        let finished = |report: &Report| match report {
            Report::Ended(ended) => {
                ended.reason == EndReason::Finished && ended.bytes_up == len as u64
            }
            _ => false,
        };
        assert_eq!(balancer.reports().iter().filter(|report| finished(report)).count(), 2);
        balancer.stop();
    }
}

#[test]
fn a_backend_may_speak_first() {
    let mut balancer = Balancer::start(|_| {});
    balancer.register(&[backend(|mut connection| connection.write_all(b"220 hello\r\n").unwrap())]);
    let greeting = wait_for("the greeting", || {
        let mut text = String::new();
        balancer.user().read_to_string(&mut text).ok().filter(|_| !text.is_empty())?;
        Some(text)
    });
    assert_eq!(greeting, "220 hello\r\n");
    balancer.stop();
}

#[test]
fn without_a_backend_a_user_is_turned_away_at_once() {
    let balancer = Balancer::start(|_| {});
    let mut user = balancer.user();
    assert!(matches!(user.read(&mut [0]), Ok(0) | Err(_)));
    wait_for("the refusal to be counted", || {
        (balancer.sum(|m| m.counters.users_refused_no_backend.get()) == 1).then_some(())
    });
    assert_eq!(balancer.active(), 0);
    balancer.stop();
}

#[test]
fn a_dead_backend_is_passed_over_before_the_user_notices() {
    let mut balancer = Balancer::start(|_| {});
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    balancer.register(&[dead, named(b'b'), dead]);
    drop(balancer.served_user());
    let answers: Vec<_> = (0..12).map(|_| ask(&mut balancer.user())).collect();
    assert_eq!(answers, [b'b'; 12]);
    assert!(balancer.sum(|metrics| metrics.counters.retries.get()) > 0);
    let failed =
        |it: &Report| matches!(it, Report::ConnectFailed { backend, .. } if backend.0 != 2);
    assert!(balancer.reports().iter().any(failed));
    balancer.stop();
}

#[test]
fn when_every_backend_refuses_the_user_is_turned_away() {
    let mut balancer = Balancer::start(|_| {});
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    balancer.register(&[dead, dead]);
    wait_for("the refusal to be counted", || {
        assert!(matches!(balancer.user().read(&mut [0]), Ok(0) | Err(_)));
        (balancer.sum(|m| m.counters.users_refused_unreachable.get()) > 0).then_some(())
    });
    wait_for("no session to run", || (balancer.active() == 0).then_some(()));
    balancer.stop();
}

#[test]
fn a_reset_is_passed_on_as_a_reset() {
    let mut balancer = Balancer::start(|_| {});
    balancer.register(&[backend(|mut connection| {
        let mut bytes = [0; 5];
        let _ = connection.read_exact(&mut bytes[..1]);
        connection.write_all(b"!").unwrap();
        if connection.read_exact(&mut bytes).is_ok() {
            socket2::SockRef::from(&connection).set_linger(Some(Duration::ZERO)).unwrap();
        }
    })]);
    let mut user = balancer.served_user();
    user.write_all(b"crash").unwrap();
    let error = user.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    wait_for("no session to run", || (balancer.active() == 0).then_some(()));
    balancer.stop();
}

#[test]
fn what_a_backend_said_before_its_reset_is_delivered() {
    let mut balancer = Balancer::start(|_| {});
    balancer.register(&[backend(|mut connection| {
        let mut bytes = [0];
        if connection.read_exact(&mut bytes).is_ok() {
            connection.write_all(b"last words").unwrap();
            socket2::SockRef::from(&connection).set_linger(Some(Duration::ZERO)).unwrap();
        }
    })]);
    let mut user = balancer.served_user();
    let mut rest = Vec::new();
    assert!(user.read_to_end(&mut rest).is_err(), "the end must not look like a clean one");
    assert_eq!(rest, b"ast words");
    balancer.stop();
}

/// Sends `len` bytes and, once the next kernel has acknowledged all of them, resets the connection.
fn say_and_reset(mut connection: TcpStream, len: usize) {
    connection.write_all(&pattern(5, len)).unwrap();
    wait_for("the peer to have taken everything", || {
        (outlook(connection.as_fd()).queued == 0).then_some(())
    });
    socket2::SockRef::from(&connection).set_linger(Some(Duration::ZERO)).unwrap();
}

fn ended(balancer: &mut Balancer) -> Ended {
    wait_for("the end of the session", || {
        balancer.reports().into_iter().find_map(|report| match report {
            Report::Ended(ended) => Some(ended),
            _ => None,
        })
    })
}

/// More than a kernel takes for a reader that has read nothing yet, and less than all of them do.
const QUEUED: usize = 512 * 1024;

#[test]
fn a_reset_does_not_overtake_what_was_sent_before_it() {
    for up in [false, true] {
        let mut balancer = Balancer::start(|_| {});
        let (reset, reset_seen) = std::sync::mpsc::channel::<()>();
        let reset_seen = std::sync::Arc::new(std::sync::Mutex::new(reset_seen));
        let (heard, tell) = std::sync::mpsc::channel();
        balancer.register(&[backend(move |mut connection| {
            let mut byte = [0];
            connection.read_exact(&mut byte).unwrap();
            connection.write_all(b"!").unwrap();
            if up {
                reset_seen.lock().unwrap().recv().unwrap();
                heard.send(read_until_reset(connection)).unwrap();
            } else {
                // The rest of the question stays unread, so that the close is a reset.
                say_and_reset(connection, QUEUED);
                heard.send(Vec::new()).unwrap();
            }
        })]);
        let user = balancer.served_user();
        let got = if up {
            say_and_reset(user, QUEUED);
            reset.send(()).unwrap();
            tell.recv().unwrap()
        } else {
            tell.recv().unwrap();
            read_until_reset(user)
        };
        assert!(got == pattern(5, QUEUED), "{} of {QUEUED} bytes, up: {up}", got.len());
        let ended = ended(&mut balancer);
        let side = if up { EndReason::ClientReset } else { EndReason::BackendReset };
        assert_eq!(ended.reason, side);
        let carried = [ended.bytes_up, ended.bytes_down].map(|bytes| bytes as usize);
        assert_eq!(carried, if up { [QUEUED + 1, 1] } else { [1, QUEUED + 1] });
        assert_eq!(balancer.sum(|m| m.counters.bytes_undelivered.get()), 0);
        balancer.stop();
    }
}

/// What came before the reset that must end the stream.
fn read_until_reset(mut stream: TcpStream) -> Vec<u8> {
    let mut got = Vec::new();
    let error = stream.read_to_end(&mut got).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    got
}

#[test]
fn what_a_user_never_took_is_not_counted_as_delivered() {
    let mut balancer = Balancer::start(|_| {});
    balancer.register(&[backend(|mut connection| {
        let mut byte = [0];
        connection.read_exact(&mut byte).unwrap();
        connection.write_all(b"!").unwrap();
        connection.write_all(&pattern(5, QUEUED)).unwrap();
        // Finished when the user has gone.
        let _ = connection.read(&mut byte);
    })]);
    let user = balancer.served_user();
    let sent = QUEUED as u64 + 1;
    wait_for("all bytes to be booked", || {
        (balancer.sum(|m| m.counters.bytes_down.get()) == sent).then_some(())
    });
    drop(user);
    let ended = ended(&mut balancer);
    let undelivered = balancer.sum(|m| m.counters.bytes_undelivered.get());
    assert!(undelivered > 0, "the user's kernel took all of it");
    assert_eq!(ended.bytes_down + undelivered, sent);
    balancer.stop();
}

#[test]
fn no_timer_of_the_kernel_ends_a_session_whose_reader_pauses() {
    let mut balancer = Balancer::start(|_| {});
    balancer.register(&[backend(echo)]);
    let user = balancer.served_user();
    // What the door's connections inherit; those to backends have the same.
    let to_backend = lb::ring::sys::stream(user.peer_addr().unwrap()).unwrap();
    let listener = lb::ring::sys::listen("127.0.0.1:0".parse().unwrap(), true).unwrap();
    for socket in [socket2::SockRef::from(&to_backend), socket2::SockRef::from(&listener)] {
        assert_eq!(socket.tcp_user_timeout().unwrap(), None);
        assert!(socket.keepalive().unwrap());
    }
    balancer.stop();
}

#[test]
fn a_slow_reader_holds_the_sender_back_and_loses_nothing() {
    let mut balancer = Balancer::start(|config| config.limits.buffer_bytes = 4 << 20);
    let len = 8 << 20;
    balancer.register(&[backend(move |mut connection| {
        let mut byte = [0];
        connection.read_exact(&mut byte).unwrap();
        connection.write_all(b"!").unwrap();
        connection.write_all(&pattern(3, len)).unwrap();
    })]);
    let mut slow: Vec<_> = (0..4).map(|_| balancer.served_user()).collect();
    // The stalled readers leave room for one that reads.
    let mut quick = balancer.served_user();
    let mut got = Vec::new();
    quick.read_to_end(&mut got).unwrap();
    assert!(got == pattern(3, len));
    for user in &mut slow {
        got.clear();
        user.read_to_end(&mut got).unwrap();
        assert!(got == pattern(3, len));
    }
    balancer.stop();
}

#[test]
fn a_full_table_sheds_and_recovers() {
    let mut balancer =
        Balancer::start_with(3, Features { receive_cap: true, splice: true }, |_| {});
    balancer.register(&[named(b'a')]);
    let mut users: Vec<_> = (0..3).map(|_| balancer.served_user()).collect();
    assert!(matches!(balancer.user().read(&mut [0]), Ok(0) | Err(_)));
    wait_for("the refusal to be counted", || {
        (balancer.sum(|m| m.counters.users_refused_full.get()) > 0).then_some(())
    });
    users.pop();
    users.push(balancer.served_user());
    assert!(users.iter_mut().all(|user| ask(user) == b'a'));
    balancer.stop();
}

#[test]
fn a_still_session_ends_and_a_half_closed_one_sooner() {
    let mut balancer = Balancer::start(|config| {
        config.timeouts.tcp_idle = Duration::from_millis(400);
        config.timeouts.half_close = Duration::from_millis(100);
    });
    balancer.register(&[backend(|mut connection| {
        let mut byte = [0];
        while let Ok(1) = connection.read(&mut byte) {
            connection.write_all(b"!").unwrap();
        }
        // Keeps its side open after the user has finished.
        thread::sleep(PATIENCE);
    })]);
    let mut still = balancer.served_user();
    let half = balancer.served_user();
    half.shutdown(Shutdown::Write).unwrap();
    assert!(matches!(still.read(&mut [0]), Ok(0) | Err(_)));
    wait_for("no session to run", || (balancer.active() == 0).then_some(()));
    let reasons: Vec<_> = (balancer.reports().into_iter())
        .filter_map(|report| match report {
            Report::Ended(ended) => Some(ended.reason),
            _ => None,
        })
        .collect();
    assert!(reasons.contains(&EndReason::Idle), "{reasons:?}");
    assert!(reasons.contains(&EndReason::HalfCloseIdle), "{reasons:?}");
    balancer.stop();
}

#[test]
fn a_reader_who_stops_in_the_middle_of_a_stream_is_given_up_and_costs_nothing_until_then() {
    let mut balancer = Balancer::start(|config| {
        config.timeouts.half_close = Duration::from_secs(2);
    });
    balancer.register(&[backend(|mut connection| {
        connection.read_to_end(&mut Vec::new()).unwrap();
        let _ = connection.write_all(&vec![7; 20 << 20]);
    })]);
    let mut user = balancer.user();
    user.shutdown(Shutdown::Write).unwrap();
    user.read_exact(&mut [0; 200_000]).unwrap();
    let turns = || balancer.sum(|m| m.counters.turns.get());
    let before = turns();
    wait_for("no session to run", || (balancer.active() == 0).then_some(()));
    assert!(turns() - before < 3000, "{} turns for a stream that stands", turns() - before);
    balancer.stop();
}

#[test]
fn orders_end_sessions_with_a_reset() {
    let mut balancer = Balancer::start(|_| {});
    balancer.register(&[named(b'a'), named(b'b')]);
    let (mut first, mut second) = (balancer.served_user(), balancer.served_user());
    let (one, two) = (ask(&mut first), ask(&mut second));
    assert_ne!(one, two);
    let backend = BackendId(u32::from(one - b'a') + 1);
    balancer.order(Order::EndBackend { backend, reason: EndReason::BackendLeft });
    assert_eq!(first.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(ask(&mut second), two);
    let left: Vec<_> = balancer.plane.ends.iter().flat_map(|end| end.shard.iter()).collect();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].client, second.local_addr().unwrap());
    balancer.order(Order::EndSession { id: left[0].id, reason: EndReason::Operator });
    assert_eq!(second.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    balancer.stop();
}

#[test]
fn draining_turns_users_away_and_lets_sessions_end() {
    let mut balancer = Balancer::start(|_| {});
    balancer.register(&[backend(echo)]);
    let mut user = balancer.served_user();
    balancer.order(Order::Drain);
    wait_for("the door to close", || {
        TcpStream::connect(balancer.plane.door(Protocol::Tcp).unwrap()).is_err().then_some(())
    });
    user.write_all(b"still here").unwrap();
    let mut answer = [0; 10];
    user.read_exact(&mut answer).unwrap();
    drop(user);
    wait_for("no session to run", || (balancer.active() == 0).then_some(()));
    balancer.stop();
}

#[test]
fn a_worker_that_is_woken_again_and_again_goes_on() {
    let balancer = Balancer::start(|_| {});
    for _ in 0..2000 {
        balancer.wake();
        balancer.wake();
        thread::yield_now();
    }
    // Every worker turns a few times a second, whatever happens.
    let each = |place: usize| balancer.plane.ends[place].metrics.counters.turns.get();
    let before = [each(0), each(1)];
    wait_for("both workers to turn", || {
        (0..2).all(|place| each(place) > before[place] + 1).then_some(())
    });
    balancer.stop();
}

#[test]
fn a_port_that_another_balancer_has_is_refused_with_the_cure() {
    let balancer = Balancer::start(|_| {});
    let mut config = Config { workers: Some(1), ..Config::default() };
    config.listen.tcp = balancer.plane.door(Protocol::Tcp);
    let trouble =
        DataPlane::start(&config, 10, Features { receive_cap: true, splice: true }).err().unwrap();
    assert!(trouble.to_string().contains("--tcp"), "{trouble}");
    balancer.stop();
}
