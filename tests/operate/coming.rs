//! Services that a reload adds, changes and removes while users are served.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::harness::Balancer;
use crate::wait::{PATIENCE, wait_for};

/// A TCP backend that answers each byte with its letter.
fn lettered(letter: u8) -> SocketAddr {
    serve(move |mut connection| {
        let mut byte = [0];
        while let Ok(1) = connection.read(&mut byte) {
            if connection.write_all(&[letter]).is_err() {
                return;
            }
        }
    })
}

/// A web server that answers each request with its letter, over a connection that stays open.
fn site(letter: char) -> SocketAddr {
    serve(move |connection| {
        let mut lines = BufReader::new(connection.try_clone().unwrap()).lines();
        while let Some(Ok(line)) = lines.next() {
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{letter}");
            if line.is_empty() && (&connection).write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    })
}

fn serve(serve: impl Fn(TcpStream) + Copy + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            std::thread::spawn(move || serve(connection));
        }
    });
    at
}

/// A UDP backend that answers each datagram with its letter.
fn datagrams(letter: u8) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut bytes) {
            let _ = socket.send_to(&[letter], from);
        }
    });
    at
}

fn table(name: &str, protocol: &str, listen: &str, backends: &[SocketAddr], more: &str) -> String {
    let backends: Vec<String> = backends.iter().map(|it| format!("\"{it}\"")).collect();
    let (backends, listen) = (backends.join(", "), listen.to_owned());
    format!(
        "[service.{name}]\nprotocol = \"{protocol}\"\nlisten = \"{listen}\"\nbackends = [{backends}]\n\
         {more}\n"
    )
}

const ANY: &str = "127.0.0.1:0";

/// A place for a door that nobody else has while the tests run.
fn place() -> SocketAddr {
    static COUNT: AtomicU16 = AtomicU16::new(1);
    let [high, low] = (std::process::id() as u16).to_be_bytes();
    ([127, 80, high, low], 7000 + COUNT.fetch_add(1, Ordering::Relaxed)).into()
}

fn start(settings: &str) -> Balancer {
    let balancer = Balancer::start_on_loopback(settings, |_| ());
    balancer.wait_until_told("READY=1");
    balancer
}

fn service(balancer: &Balancer, name: &str) -> Option<Value> {
    let status = balancer.status();
    let mut all = status["services"].as_array().unwrap().iter();
    // One that has come back stands behind the one that leaves.
    all.rfind(|it| it["name"] == name).cloned()
}

fn door(balancer: &Balancer, name: &str) -> SocketAddr {
    let service = service(balancer, name).expect("the service is known");
    service["doors"][0].as_str().unwrap().parse().unwrap()
}

fn succeed(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn connect(at: SocketAddr) -> TcpStream {
    let user = TcpStream::connect(at).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user
}

/// The letter of the backend that serves this user; `None` once the session has ended.
fn ask(user: &TcpStream) -> Option<u8> {
    let (mut user, mut letter) = (user, [0]);
    user.write_all(b"?").ok()?;
    user.read_exact(&mut letter).ok().map(|()| letter[0])
}

fn get(user: &TcpStream, host: &str) -> Option<(String, char)> {
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let mut at = user;
    at.write_all(request.as_bytes()).ok()?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        at.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "))?;
    let mut body = vec![0; length.parse().unwrap()];
    at.read_exact(&mut body).ok()?;
    Some((head, char::from(body[0])))
}

fn udp_user(at: SocketAddr) -> UdpSocket {
    let user = UdpSocket::bind("127.0.0.1:0").unwrap();
    user.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    user.connect(at).unwrap();
    user
}

fn udp_ask(user: &UdpSocket) -> Option<u8> {
    let mut letter = [0];
    user.send(b"?").ok()?;
    user.recv(&mut letter).ok().map(|_| letter[0])
}

#[test]
fn rule_10_a_reload_adds_services_and_leaves_the_others_alone() {
    let red = table("red", "tcp", ANY, &[lettered(b'a'), lettered(b'b')], "");
    let game = table("game", "udp", ANY, &[datagrams(b'g')], "");
    let blog = table("blog", "api", ANY, &[site('b')], "hosts = [\"blog.example\"]");
    let before = red + &game + &blog;
    let balancer = start(&before);
    let at = ["red", "game", "blog"].map(|name| door(&balancer, name));
    let (tcp, udp, api) = (connect(at[0]), udp_user(at[1]), connect(at[2]));
    let first = ask(&tcp).unwrap();
    assert_eq!(udp_ask(&udp), Some(b'g'));
    assert_eq!(get(&api, "blog.example").unwrap().1, 'b');

    let green = table("green", "tcp", ANY, &[lettered(b'c')], "");
    let dns = table("dns", "udp", ANY, &[datagrams(b'd')], "");
    let shop = table("shop", "api", &at[2].to_string(), &[site('s')], "hosts = [\"shop.example\"]");
    let said = succeed(balancer.change(&format!("{green}{before}{dns}{shop}")));
    for name in ["green", "dns", "shop"] {
        assert!(said.contains(&format!("service.{name} is new\n")), "{said}");
    }
    assert_eq!(ask(&connect(door(&balancer, "green"))), Some(b'c'));
    assert_eq!(udp_ask(&udp_user(door(&balancer, "dns"))), Some(b'd'));
    assert_eq!(["red", "game", "blog"].map(|name| door(&balancer, name)), at);
    // The connection that was there before the service has its requests served as any other.
    assert_eq!(get(&api, "shop.example").unwrap().1, 's');
    assert_eq!(get(&api, "blog.example").unwrap().1, 'b');
    assert_eq!((ask(&tcp), udp_ask(&udp)), (Some(first), Some(b'g')));
    let second = ask(&connect(at[0])).unwrap();
    assert_ne!(second, first, "its turn goes on where it was");
    assert_eq!(ask(&connect(at[0])), Some(first));
}

#[test]
fn rule_10_anything_wrong_changes_nothing() {
    let red = table("red", "tcp", ANY, &[lettered(b'r')], "");
    let balancer = start(&red);
    wait_for("the demo's backends to join", || {
        (balancer.status()["backends"].as_array().unwrap().len() == 4).then_some(())
    });
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let free = place();
    let before = balancer.status();
    let one = table("one", "tcp", &free.to_string(), &[], "");
    let at = taken.local_addr().unwrap().to_string();
    let two = table("two", "tcp", &at, &[], "");
    for (wrong, why) in [
        (red.clone() + &one + &two, "the two port"),
        (red.clone() + &one + &one.replace("service.one", "service.two"), "both want port"),
        (red.replace("\"tcp\"", "\"udp\"") + &one, "service.red.protocol is tcp while users are"),
        (
            red.clone() + &one.replace("backends", "secret_file = \"/nowhere\"\nbackends"),
            "/nowhere",
        ),
    ] {
        let refused = balancer.change(&wrong);
        assert!(!refused.status.success());
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(said.contains(why), "{said}");
        assert!(TcpStream::connect(free).is_err(), "{why}: its door is not open");
        let after = balancer.status();
        assert_eq!(after["services"], before["services"], "{why}");
        assert_eq!(after["version"], before["version"], "{why}");
    }
    let served = ask(&connect(door(&balancer, "red")));
    assert_eq!(served, Some(b'r'));
}

#[test]
fn rule_11_a_removed_service_drains_and_is_gone() {
    let red = table("red", "tcp", ANY, &[lettered(b'r')], "");
    let game = table("game", "udp", ANY, &[datagrams(b'g')], "");
    let blog = table("blog", "api", ANY, &[site('b')], "");
    let kept = "timeouts.drain_ms = 3000\n";
    let balancer = start(&format!("{kept}{red}{game}{blog}"));
    let at = ["red", "game", "blog"].map(|name| door(&balancer, name));
    let (tcp, udp, api) = (connect(at[0]), udp_user(at[1]), connect(at[2]));
    assert_eq!((ask(&tcp), udp_ask(&udp)), (Some(b'r'), Some(b'g')));
    assert_eq!(get(&api, "blog.example").unwrap().1, 'b');

    let said = succeed(balancer.change(kept));
    assert!(said.contains("service.red is gone\n"), "{said}");
    wait_for("its TCP doors to close", || {
        (TcpStream::connect(at[0]).is_err() && TcpStream::connect(at[2]).is_err()).then_some(())
    });
    assert_eq!((ask(&tcp), udp_ask(&udp)), (Some(b'r'), Some(b'g')), "its sessions go on");
    assert_eq!(udp_ask(&udp_user(at[1])), None, "nobody new is served");
    assert_eq!((&api).read(&mut [0]).unwrap(), 0, "an idle connection is closed in good order");
    assert_eq!(service(&balancer, "red").unwrap()["leaving"], true);
    let end = (&tcp).read(&mut [0]);
    assert!(matches!(end, Ok(0) | Err(_)), "its time is over: {end:?}");
    wait_for("the session of datagrams to end", || udp_ask(&udp).is_none().then_some(()));
    for name in ["red", "game", "blog"] {
        wait_for("the service to be gone", || service(&balancer, name).is_none().then_some(()));
        balancer.wait_for_log(&format!("service gone: its last session has ended service={name}"));
    }
    UdpSocket::bind(at[1]).expect("the port is free");
}

#[test]
fn rule_11_a_registered_backend_is_told_and_may_join_again_when_the_service_is_back() {
    let settings = "timeouts.drain_ms = 100\n";
    let red = table("red", "tcp", ANY, &[], "");
    let balancer = start(&format!("{settings}{red}"));
    let backend = lettered(b'r');
    let control = connect(balancer.door("control"));
    let mut lines = BufReader::new(control.try_clone().unwrap()).lines();
    let mut hear = |word: &str| loop {
        let line = lines.next().unwrap().unwrap();
        if line.contains(word) {
            return serde_json::from_str::<Value>(&line).unwrap();
        }
    };
    let register = |control: &TcpStream| {
        let mut control = control;
        let port = backend.port();
        writeln!(control, r#"{{"cmd":"register","service":"red","port":{port}}}"#).unwrap();
    };
    register(&control);
    hear("successful");
    let user = connect(door(&balancer, "red"));
    assert_eq!(ask(&user), Some(b'r'));
    succeed(balancer.change(settings));
    let told = hear("removed");
    assert_eq!((&told["event"], &told["service"]), (&"removed".into(), &"red".into()));
    assert_eq!(told["port"], backend.port());
    register(&control);
    assert!(hear("failed")["msg"].as_str().unwrap().starts_with("there is no service red"));
    hear("drained");
    succeed(balancer.change(&format!("{settings}{red}")));
    register(&control);
    hear("successful");
    assert_eq!(ask(&connect(door(&balancer, "red"))), Some(b'r'));
}

#[test]
fn rule_11_a_service_comes_back_while_the_one_before_it_drains() {
    let kept = "timeouts.drain_ms = 60000\n";
    let at = place().to_string();
    let of = |letter| table("red", "tcp", &at, &[lettered(letter)], "");
    let udp_at = place().to_string();
    let game = |letter| table("game", "udp", &udp_at, &[datagrams(letter)], "");
    let balancer = start(&format!("{kept}{}{}", of(b'1'), game(b'1')));
    let (old, old_game) = (connect(at.parse().unwrap()), udp_user(udp_at.parse().unwrap()));
    assert_eq!((ask(&old), udp_ask(&old_game)), (Some(b'1'), Some(b'1')));
    succeed(balancer.change(kept));
    let said = succeed(balancer.change(&format!("{kept}{}{}", of(b'2'), game(b'2'))));
    assert!(said.contains("service.red is new"), "{said}");
    assert_eq!(ask(&connect(at.parse().unwrap())), Some(b'2'));
    assert_eq!(udp_ask(&udp_user(udp_at.parse().unwrap())), Some(b'2'));
    assert_eq!((ask(&old), udp_ask(&old_game)), (Some(b'1'), Some(b'1')));
    let status = balancer.status();
    let named = status["services"].as_array().unwrap().iter().filter(|it| it["name"] == "red");
    let leaving: Vec<bool> = named.map(|it| it["leaving"] == true).collect();
    assert_eq!(leaving, [true, false]);
    let mut admin = connect(balancer.door("admin"));
    admin
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut metrics = String::new();
    admin.read_to_string(&mut metrics).unwrap();
    assert!(metrics.contains("lb_service_sessions_total{service=\"red\""), "{metrics}");
    let mut series = BTreeSet::new();
    for line in metrics.lines().filter(|line| line.starts_with("lb_")) {
        let (name, _) = line.rsplit_once(' ').unwrap();
        assert!(series.insert(name), "{name} is there twice");
    }
}

#[test]
fn rule_10_a_door_that_changes_hands_is_never_shut() {
    let at = place().to_string();
    let udp_at = place().to_string();
    let one = table("one", "tcp", &at, &[lettered(b'1')], "")
        + &table("old", "udp", &udp_at, &[datagrams(b'1')], "");
    let two = table("two", "tcp", &at, &[lettered(b'2')], "")
        + &table("new", "udp", &udp_at, &[datagrams(b'2')], "");
    let balancer = start(&one);
    let (old, old_udp) = (connect(at.parse().unwrap()), udp_user(udp_at.parse().unwrap()));
    assert_eq!((ask(&old), udp_ask(&old_udp)), (Some(b'1'), Some(b'1')));
    let told = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let users = scope.spawn(|| {
            let mut letters = Vec::new();
            while !told.load(Ordering::Relaxed) {
                letters.push(ask(&connect(at.parse().unwrap())).expect("everyone is served"));
            }
            letters
        });
        succeed(balancer.change(&two));
        wait_for("the door to be the other's", || {
            (ask(&connect(at.parse().unwrap())) == Some(b'2')).then_some(())
        });
        told.store(true, Ordering::Relaxed);
        let letters = users.join().unwrap();
        assert!(letters.is_sorted(), "first the one, then the other: {letters:?}");
    });
    assert_eq!((ask(&old), udp_ask(&old_udp)), (Some(b'1'), Some(b'1')), "its session goes on");
    assert_eq!(udp_ask(&udp_user(udp_at.parse().unwrap())), Some(b'2'));
}

#[test]
fn rule_10_users_of_a_shared_door_go_on_when_the_service_they_came_in_for_leaves() {
    let at = place().to_string();
    let of = |name: &str, letter| {
        table(name, "api", &at, &[site(letter)], &format!("hosts = [\"{name}.example\"]"))
    };
    let kept = format!("timeouts.drain_ms = 100\n{}", of("blog", 'b'));
    let balancer =
        start(&format!("timeouts.drain_ms = 100\n{}{}", of("shop", 's'), of("blog", 'b')));
    let user = connect(at.parse().unwrap());
    assert_eq!(get(&user, "shop.example").unwrap().1, 's');
    succeed(balancer.change(&kept));
    wait_for("the service to be gone", || service(&balancer, "shop").is_none().then_some(()));
    assert_eq!(get(&user, "blog.example").unwrap().1, 'b');
    let (head, _) = get(&user, "shop.example").unwrap();
    assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
    let alone = of("blog", 'c').replace("hosts", "# hosts");
    succeed(balancer.change(&format!("timeouts.drain_ms = 100\n{alone}")));
    assert_eq!(get(&user, "any.example").unwrap().1, 'c', "it claims every host now");
}

#[test]
fn a_reload_moves_the_doors_of_a_service_and_its_sessions_stay() {
    let (red, game) = (lettered(b'r'), datagrams(b'g'));
    let of = |listen: &str| {
        table("red", "tcp", listen, &[red], "") + &table("game", "udp", listen, &[game], "")
    };
    let (first, second) = (place(), place());
    let balancer = start(&of(&first.to_string()));
    let (user, player) = (connect(first), udp_user(first));
    assert_eq!((ask(&user), udp_ask(&player)), (Some(b'r'), Some(b'g')));
    let said = succeed(balancer.change(&of(&second.to_string())));
    let line = format!("in use from now on: service.red.listen = [\"{second}\"]\n");
    assert!(said.contains(&line), "{said}");
    assert_eq!(ask(&connect(second)), Some(b'r'));
    wait_for("the old door to close", || TcpStream::connect(first).is_err().then_some(()));
    assert_eq!(udp_ask(&udp_user(second)), Some(b'g'));
    assert_eq!(udp_ask(&udp_user(first)), None, "nobody new");
    assert_eq!((ask(&user), udp_ask(&player)), (Some(b'r'), Some(b'g')));
    // The same port for another protocol.
    let api = table("site", "api", &second.to_string(), &[site('w')], "");
    let moved = of(&first.to_string()) + &api;
    succeed(balancer.change(&moved));
    wait_for("the other kind of door", || {
        let user = TcpStream::connect(second).ok()?;
        user.set_read_timeout(Some(PATIENCE)).unwrap();
        (get(&user, "x.example")?.1 == 'w').then_some(())
    });
    assert_eq!(ask(&connect(first)), Some(b'r'));
    assert_eq!(ask(&user), Some(b'r'));
}

#[test]
fn users_of_a_door_for_datagrams_that_closed_are_served_when_it_is_back() {
    let [kept, at] = [place(), place()].map(|it| it.to_string());
    let drain = "timeouts.drain_ms = 100\n";
    let backends = [datagrams(b'1')];
    let one = table("one", "udp", &kept, &backends, "");
    let both = one.replace(&format!("\"{kept}\""), &format!("[\"{kept}\", \"{at}\"]"));
    let balancer = start(&format!("{drain}{both}"));
    let at: SocketAddr = at.parse().unwrap();
    let (user, other) = (udp_user(at), udp_user(kept.parse().unwrap()));
    assert_eq!((udp_ask(&user), udp_ask(&other)), (Some(b'1'), Some(b'1')));
    succeed(balancer.change(&format!("{drain}{one}")));
    wait_for("the door to close", || UdpSocket::bind(at).ok().map(drop));
    assert_eq!(udp_ask(&other), Some(b'1'));
    let two = table("two", "udp", &at.to_string(), &[datagrams(b'2')], "");
    succeed(balancer.change(&format!("{drain}{one}{two}")));
    assert_eq!((udp_ask(&user), udp_ask(&other)), (Some(b'2'), Some(b'1')));
}

#[test]
fn a_setting_that_needs_a_restart_is_named_by_every_reload_until_then() {
    let asked = |port: u16| format!("listen.tcp = \"127.0.0.1:{port}\"\n");
    let balancer = Balancer::start_as(&asked(0), |lb| {
        lb.args(["--udp", "off", "--api", "off", "--control", ANY, "--admin", ANY]);
    });
    balancer.wait_until_told("READY=1");
    let elsewhere = asked(place().port());
    for _ in 0..2 {
        let said = succeed(balancer.change(&elsewhere));
        assert!(said.contains("listen.tcp"), "{said}");
        let status = balancer.status();
        assert_eq!(status["reload"]["after_restart"].as_array().unwrap().len(), 1, "{status}");
    }
    let said = succeed(balancer.change(&asked(0)));
    assert!(!said.contains("listen.tcp"), "that is where it is open: {said}");
}

#[test]
fn a_balancer_that_stops_opens_no_more_doors() {
    let red = table("red", "tcp", ANY, &[lettered(b'r')], "");
    let balancer = start(&format!("timeouts.drain_ms = 60000\n{red}"));
    let user = connect(door(&balancer, "red"));
    assert_eq!(ask(&user), Some(b'r'));
    balancer.signal(nix::sys::signal::Signal::SIGTERM);
    balancer.wait_for_log("stopping: no more users are accepted");
    let at = place();
    let blue = table("blue", "tcp", &at.to_string(), &[lettered(b'b')], "");
    let refused = balancer.change(&format!("timeouts.drain_ms = 60000\n{red}{blue}"));
    assert!(!refused.status.success());
    assert!(String::from_utf8(refused.stderr).unwrap().contains("is stopping"));
    assert!(TcpStream::connect(at).is_err());
    assert_eq!(ask(&user), Some(b'r'));
}

#[test]
fn a_user_who_says_for_whom_it_comes_after_its_door_has_closed_does_not_keep_the_service() {
    let kept = "timeouts.drain_ms = 100\nlisten.proxy_from = [\"127.0.0.1\"]\n";
    let blog = table("blog", "api", ANY, &[site('b')], "");
    let balancer = start(&format!("{kept}{blog}"));
    let at = door(&balancer, "blog");
    let user = connect(at);
    succeed(balancer.change(kept));
    wait_for("the door to close", || TcpStream::connect(at).is_err().then_some(()));
    (&user).write_all(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n").unwrap();
    let (head, _) = get(&user, "blog.example").unwrap();
    assert!(head.contains("Connection: close\r\n"), "{head}");
    let mut rest = Vec::new();
    (&user).read_to_end(&mut rest).unwrap();
    balancer.wait_for_log("service gone: its last session has ended service=blog");
}

#[test]
fn a_door_for_datagrams_that_becomes_one_for_all_addresses_serves_new_users_at_once() {
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (at, all) = (format!("127.0.0.1:{port}"), format!("0.0.0.0:{port}"));
    let drain = "timeouts.drain_ms = 60000\n";
    let game = table("game", "udp", &at, &[datagrams(b'g')], "");
    let balancer = start(&format!("{drain}{game}"));
    let at: SocketAddr = at.parse().unwrap();
    let user = udp_user(at);
    assert_eq!(udp_ask(&user), Some(b'g'));
    succeed(balancer.change(&format!("{drain}{}", game.replace(&at.to_string(), &all))));
    assert_eq!((udp_ask(&user), udp_ask(&udp_user(at))), (Some(b'g'), Some(b'g')));
}
