//! The messages of the control protocol: what is understood, what is refused, and how answers are written.

use super::*;
use crate::cluster::{Standing, WEIGHT_MAX};

const UDP: Target = Target::BuiltIn(Protocol::Udp);
const API: Target = Target::BuiltIn(Protocol::Api);

fn heard(input: &str) -> Vec<Incoming> {
    let mut into = VecDeque::new();
    Inbox::default().push(input.as_bytes(), &mut into);
    into.into_iter().map(|heard| heard.what).collect()
}

/// What the answer to the only message warns of.
fn warning_of(input: &str) -> Option<String> {
    let mut into = VecDeque::new();
    Inbox::default().push(input.as_bytes(), &mut into);
    assert_eq!(into.len(), 1, "{input}");
    into.pop_front().unwrap().warning
}

fn fault_of(input: &str) -> BadMessage {
    let mut all = heard(input);
    assert_eq!(all.len(), 1, "{input}: {all:?}");
    all.remove(0).expect_err(input)
}

fn said(reply: Reply) -> String {
    let mut outbox = Outbox::default();
    outbox.push(&reply).unwrap();
    let line = String::from_utf8(outbox.take()).unwrap();
    line.strip_suffix('\n').unwrap().to_owned()
}

#[test]
fn every_command_is_understood_with_and_without_optional_members() {
    let register = |weight, name: Option<&str>| {
        Request::Register(Joining {
            proxy: None,
            http2: None,
            tls: None,
            tls_name: None,
            probe: None,
            check: None,
            target: Target::BuiltIn(Protocol::Tcp),
            port: 9991,
            weight,
            name: name.map(Into::into),
            group: None,
        })
    };
    let drain = |lasts| Request::Drain { target: API, port: 80, lasts };
    let cases = [
        (r#"{"cmd": "register", "protocol": "tcp", "port": 9991}"#, register(None, None)),
        (
            r#"{"cmd":"register","protocol":"tcp","port":9991,"weight":256,"name":"a-b.c:1_"}"#,
            register(Some(256), Some("a-b.c:1_")),
        ),
        (
            r#"{"port":9991,"later":{"x":[1]},"protocol":"tcp","cmd":"register","name":null}"#,
            register(None, None),
        ),
        (
            r#"{"cmd":"unregister","protocol":"udp","port":1}"#,
            Request::Unregister { target: UDP, port: 1 },
        ),
        (
            r#"{"cmd":"drain","protocol":"api","port":80,"deadline_ms":1500}"#,
            drain(Lasts::For(Duration::from_millis(1500))),
        ),
        (r#"{"cmd":"drain","protocol":"api","port":80}"#, drain(Lasts::AsSet)),
        (
            r#"{"cmd":"drain","protocol":"api","port":80,"deadline_ms":"never"}"#,
            drain(Lasts::Never),
        ),
        (
            r#"{"cmd":"undrain","protocol":"udp","port":1}"#,
            Request::Undrain { target: UDP, port: 1 },
        ),
        (r#"{"cmd":"list"}"#, Request::List { target: None }),
        (r#"{"cmd":"list","protocol":"sctp"}"#, Request::List { target: None }),
        (r#"{"cmd":"services"}"#, Request::Services),
        (r#"{"ack":"hello"}"#, Request::Hello),
        (r#"{"cmd":"hello"}"#, Request::Hello),
        (
            r#"{"cmd":"auth","id":"web-1","mac":"00ff"}"#,
            Request::Auth { id: "web-1".into(), mac: "00ff".into() },
        ),
    ];
    for (input, expected) in cases {
        assert_eq!(heard(input), [Ok(expected)], "{input}");
    }
    assert_eq!(heard(r#"{"ack":"successful"}{"ack":7}"#), [], "needs no answer");
}

#[test]
fn rule_1_a_message_means_the_service_that_it_names_or_else_the_built_in_one() {
    let named = |protocol| Target::Named { service: "redis".into(), protocol };
    for (members, target) in [
        (r#""protocol":"udp""#, UDP),
        (r#""protocol":"udp","service":null"#, UDP),
        (r#""service":"redis""#, named(None)),
        (r#""service":"redis","protocol":null"#, named(None)),
        (r#""protocol":"tcp","service":"redis""#, named(Some(Protocol::Tcp))),
    ] {
        let of = |cmd: &str| heard(&format!(r#"{{"cmd":"{cmd}",{members},"port":6379}}"#));
        let (port, weight, name, lasts) = (6379, None, None, Lasts::AsSet);
        let all = target.clone();
        assert_eq!(of("unregister"), [Ok(Request::Unregister { target: all, port })], "{members}");
        let all = target.clone();
        assert_eq!(of("drain"), [Ok(Request::Drain { target: all, port, lasts })], "{members}");
        let all = Some(target.clone()).filter(|target| *target != UDP);
        assert_eq!(of("list"), [Ok(Request::List { target: all })], "{members}");
        assert_eq!(
            of("register"),
            [Ok(Request::Register(Joining {
                target,
                port,
                weight,
                name,
                group: None,
                proxy: None,
                http2: None,
                tls: None,
                tls_name: None,
                probe: None,
                check: None
            }))]
        );
    }
}

#[test]
fn a_faulty_message_that_names_a_service_is_answered_with_its_name() {
    let fault = fault_of(r#"{"cmd":"register","service":"redis","port":0}"#);
    assert_eq!((fault.cmd, fault.service.as_deref()), (Some("register"), Some("redis")));
    let fault = fault_of(r#"{"cmd":"register","protocol":"tcp","port":0}"#);
    assert_eq!(fault.service, None);
}

#[test]
fn a_whole_number_is_the_same_however_it_is_written() {
    for port in ["9002", "9002.0", "9002.000", "9.002e3", "9002E0", "900200e-2", "0.9002e+4"] {
        let input = format!(r#"{{"cmd":"unregister","protocol":"udp","port":{port}}}"#);
        let expected = Request::Unregister { target: UDP, port: 9002 };
        assert_eq!(heard(&input), [Ok(expected)], "{port}");
    }
    for (deadline, ms) in [("0.0", 0), ("-0.0", 0), ("-0", 0), ("8.64e7", DRAIN_MS_MAX)] {
        let input =
            format!(r#"{{"cmd":"drain","protocol":"api","port":80,"deadline_ms":{deadline}}}"#);
        let lasts = Lasts::For(Duration::from_millis(ms));
        let expected = Request::Drain { target: API, port: 80, lasts };
        assert_eq!(heard(&input), [Ok(expected)], "{input}");
    }
}

#[test]
fn every_fault_is_named() {
    let cases = [
        (r#"{"cmd":"register","protocol":"tcp","port":0}"#, "from 1 to 65535, not 0"),
        (r#"{"cmd":"register","protocol":"tcp","port":70000}"#, "not 70000"),
        (r#"{"cmd":"register","protocol":"tcp","port":-1}"#, "not -1"),
        (r#"{"cmd":"register","protocol":"tcp","port":80.5}"#, "not 80.5"),
        (r#"{"cmd":"register","protocol":"tcp","port":"80"}"#, "whole number"),
        (r#"{"cmd":"register","protocol":"tcp"}"#, "port is missing"),
        (r#"{"cmd":"register","port":80}"#, "protocol is missing"),
        (r#"{"cmd":"register","protocol":"sctp","port":80}"#, "unknown protocol sctp"),
        (r#"{"cmd":"register","protocol":7,"port":80}"#, "protocol must be a string"),
        (r#"{"cmd":"register","service":7,"port":80}"#, "service must be a string"),
        (r#"{"cmd":"drain","service":"a b","port":80}"#, "service must be 1 to 64"),
        (r#"{"cmd":"list","service":""}"#, "service must be 1 to 64"),
        (r#"{"cmd":"list","service":"redis","protocol":"sctp"}"#, "unknown protocol sctp"),
        (r#"{"cmd":"register","protocol":"tcp","port":80,"weight":0}"#, "weight"),
        (r#"{"cmd":"register","protocol":"tcp","port":80,"weight":257}"#, "1 to 256"),
        (r#"{"cmd":"register","protocol":"tcp","port":80,"name":""}"#, "name must be"),
        (r#"{"cmd":"register","protocol":"tcp","port":80,"name":"a b"}"#, "name must be"),
        (r#"{"cmd":"drain","protocol":"tcp","port":80,"deadline_ms":1e99}"#, "deadline_ms"),
        (r#"{"cmd":"auth","id":"a"}"#, "mac is missing"),
        (r#"{"cmd":"fly"}"#, "unknown cmd fly"),
        (r#"{"cmd":7}"#, "cmd must be a string"),
        (r#"{"cmd":"list","cmd":"list"}"#, "cmd twice"),
        (r#"{"cmd":"list","x":1,"x":2}"#, "x twice"),
        ("{}", "cmd is missing"),
        ("{cmd}", "not JSON"),
        ("[]\n", "JSON object"),
        (r#"{"cmd":"register","protocol":"tcp","port":9002.5}"#, "not 9002.5"),
        (r#"{"cmd":"register","protocol":"tcp","port":-0.0}"#, "from 1 to 65535, not -0.0"),
        (r#"{"cmd":"register","protocol":"tcp","port":65536.0}"#, "not 65536.0"),
        (r#"{"cmd":"register","protocol":"tcp","port":1e300}"#, "not 1e+300"),
        (r#"{"cmd":"register","protocol":"tcp","port":1e400}"#, "out of range"),
        (r#"{"cmd":"register","protocol":"tcp","port":9002e-4}"#, "not 0.9002"),
        (r#"{"cmd":"drain","protocol":"tcp","port":8,"deadline_ms":18446744073709551617}"#, "not"),
    ];
    for (input, words) in cases {
        let fault = fault_of(input);
        assert!(fault.msg.contains(words), "{input}: {}", fault.msg);
        assert!(!fault.fatal, "{input}");
    }
    assert_eq!(fault_of(cases[0].0).cmd, Some("register"));
    assert!(heard(&"[".repeat(10_000)).pop().unwrap().unwrap_err().fatal);
    let foreign = fault_of("POST / HTTP/1.1\r\n\r\n{\"cmd\":\"list\"}");
    assert!(foreign.fatal && foreign.msg.contains("JSON object"), "{foreign:?}");
}

#[test]
fn a_peers_text_is_quoted_short_and_tame() {
    let fault = fault_of(&format!(r#"{{"cmd":"\u001b[2J{}"}}"#, "x".repeat(500)));
    assert!(fault.msg.len() < 80, "{}", fault.msg);
    assert!(!fault.msg.chars().any(char::is_control), "{:?}", fault.msg);
}

/// A backend of the built-in TCP service.
fn about() -> About {
    About::of(&crate::cluster::Snapshot::default().services[0], 9991)
}

#[test]
fn messages_are_written_as_documented() {
    let warning = "unknown member x".to_owned();
    let cases = [
        (
            Reply::Warned { answer: Reply::Authenticated.into(), warning },
            r#"{"ack":"successful","cmd":"auth","warning":"unknown member x"}"#,
        ),
        (Reply::AskHello, r#"{"cmd":"hello"}"#),
        (Reply::AskAuth { nonce: "ab".into() }, r#"{"cmd":"auth","nonce":"ab","v":1}"#),
        (Reply::Authenticated, r#"{"ack":"successful","cmd":"auth"}"#),
        (
            Reply::Registered {
                about: about(),
                id: "b3".into(),
                address: "10.0.0.5:9991".parse().unwrap(),
                weight: 2,
                interval: Duration::from_secs(5),
                check: None,
                nodes: vec!["10.0.0.2:8080".into()],
            },
            concat!(
                r#"{"ack":"successful","cmd":"register","protocol":"tcp","port":9991,"#,
                r#""service":"tcp","id":"b3","address":"10.0.0.5:9991","weight":2,"interval_ms":5000,"#,
                r#""nodes":["10.0.0.2:8080"]}"#
            ),
        ),
        (
            Reply::Failed { msg: "no".into(), cmd: None, about: None, needs_secret: true },
            r#"{"ack":"failed","msg":"no","needs":"secret"}"#,
        ),
        (
            Reply::Failed {
                msg: "no".into(),
                cmd: Some("drain"),
                about: Some(About { service: "redis".into(), protocol: None, port: None }),
                needs_secret: false,
            },
            r#"{"ack":"failed","msg":"no","cmd":"drain","service":"redis"}"#,
        ),
    ];
    for (reply, expected) in cases {
        assert_eq!(said(reply), expected);
    }
}

#[test]
fn events_are_written_as_documented() {
    let happened = |event| Reply::Happened(about(), event);
    let cases = [
        (
            happened(Event::Draining { left: 4 }),
            r#"{"event":"draining","left":4,"protocol":"tcp","port":9991,"service":"tcp"}"#,
        ),
        (
            happened(Event::Removed),
            r#"{"event":"removed","protocol":"tcp","port":9991,"service":"tcp"}"#,
        ),
        (
            happened(Event::DrainedByOperator { left: 4, deadline: None }),
            concat!(
                r#"{"event":"draining","left":4,"deadline_ms":null,"by":"operator","#,
                r#""protocol":"tcp","port":9991,"service":"tcp"}"#
            ),
        ),
        (
            happened(Event::Ended { sessions: 2 }),
            concat!(
                r#"{"event":"ended","sessions":2,"by":"operator","#,
                r#""protocol":"tcp","port":9991,"service":"tcp"}"#
            ),
        ),
        (
            happened(Event::Drained { cut: 0 }),
            r#"{"event":"drained","protocol":"tcp","port":9991,"service":"tcp"}"#,
        ),
    ];
    for (reply, expected) in cases {
        assert_eq!(said(reply), expected);
    }
}

#[test]
fn lists_are_written_as_documented() {
    let cases = [
        (
            Reply::Listed { service: None, backends: Vec::new(), more: false },
            r#"{"ack":"successful","cmd":"list","backends":[],"more":false}"#,
        ),
        (
            Reply::Listed { service: Some("redis".into()), backends: Vec::new(), more: false },
            r#"{"ack":"successful","cmd":"list","service":"redis","backends":[],"more":false}"#,
        ),
        (
            Reply::Services { services: vec![line("redis", 1)], more: true },
            concat!(
                r#"{"ack":"successful","cmd":"services","services":[{"name":"redis","#,
                r#""protocol":"tcp","doors":["[2001:db80:1111:2222:3333:4444:5555:6666%4294967295]"#,
                r#":65535"],"serving":1024,"register":false}],"more":true}"#
            ),
        ),
    ];
    for (reply, expected) in cases {
        assert_eq!(said(reply), expected);
    }
}

/// A service that takes as much room as one of this name and with so many doors can.
fn line(name: &str, doors: usize) -> ServiceLine {
    let door = "[2001:db80:1111:2222:3333:4444:5555:6666%4294967295]:65535".parse().unwrap();
    ServiceLine {
        name: name.to_owned(),
        protocol: Protocol::Tcp,
        doors: vec![door; doors],
        serving: 1024,
        register: false,
    }
}

#[test]
fn the_longest_list_of_services_is_a_message_like_any_other() {
    for (letters, doors) in [(1, 0), (NAME_BYTES_MAX, 1), (NAME_BYTES_MAX, DOORS_LISTED_MAX)] {
        let line = line(&"n".repeat(letters), doors);
        let count = SERVICES_BYTES_MAX / line.bytes_max();
        assert!(count > 0);
        let said = said(Reply::Services { services: vec![line; count], more: false });
        assert!(said.len() < MESSAGE_BYTES_MAX, "{letters} letters: {}", said.len());
    }
}

#[test]
fn the_longest_list_is_a_message_like_any_other() {
    let longest = Listed {
        id: format!("b{}", u32::MAX),
        service: "s".repeat(NAME_BYTES_MAX),
        protocol: Protocol::Tcp,
        address: "[2001:db80:1111:2222:3333:4444:5555:6666%4294967295]:65535".parse().unwrap(),
        weight: WEIGHT_MAX,
        name: Some("n".repeat(NAME_BYTES_MAX)),
        group: Some("g".repeat(NAME_BYTES_MAX)),
        state: Standing::Draining,
        own: false,
        sessions: u64::MAX,
    };
    let line = said(Reply::Listed {
        service: Some("s".repeat(NAME_BYTES_MAX).into()),
        backends: vec![longest; LISTED_MAX],
        more: false,
    });
    assert!(line.len() < MESSAGE_BYTES_MAX, "{}", line.len());
}

#[test]
fn the_queue_for_a_peer_that_never_reads_is_bounded() {
    let mut outbox = Outbox::default();
    let pushed = (0..100_000).take_while(|_| outbox.push(&Reply::AskHello).is_ok()).count();
    assert_eq!(pushed, OUTBOX_BYTES_MAX / "{\"cmd\":\"hello\"}\n".len());
    assert!(outbox.len() <= OUTBOX_BYTES_MAX);
    assert!(!outbox.take().is_empty() && outbox.is_empty());
    assert_eq!(outbox.push(&Reply::AskHello), Ok(()));
}

#[test]
fn noise_of_any_kind_is_a_fault_and_never_a_panic() {
    let mut state = 9u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let sound = br#"{"cmd":"register","protocol":"tcp","port":9991,"weight":3,"name":"x"}"#;
    for _ in 0..3_000 {
        let mut bytes = sound.to_vec();
        for _ in 0..1 + next() % 4 {
            let at = usize::from(next()) % bytes.len();
            bytes[at] = next();
        }
        let mut whole = VecDeque::new();
        Inbox::default().push(&bytes, &mut whole);
        let (mut inbox, mut in_portions) = (Inbox::default(), VecDeque::new());
        for portion in bytes.chunks(1 + usize::from(next() % 9)) {
            inbox.push(portion, &mut in_portions);
        }
        assert_eq!(whole, in_portions, "{:?}", String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn a_backend_may_ask_not_to_be_tried() {
    let probe = |member: &str| {
        let text = format!(r#"{{"cmd":"register","protocol":"tcp","port":1{member}}}"#);
        match heard(&text).remove(0) {
            Ok(Request::Register(joining)) => Ok(joining.probe),
            Ok(_) => panic!("it is a registration"),
            Err(bad) => Err(bad.msg),
        }
    };
    for (member, probed) in [
        ("", None),
        (r#","probe":null"#, None),
        (r#","probe":true"#, Some(true)),
        (r#","probe":false"#, Some(false)),
    ] {
        assert_eq!(probe(member), Ok(probed), "{member}");
    }
    for wrong in ["0", "\"no\"", "[]"] {
        let said = probe(&format!(r#","probe":{wrong}"#)).unwrap_err();
        assert_eq!(said, "probe must be true or false");
    }
}

#[test]
fn a_backend_may_ask_for_a_proxy_header_of_version_2_alone() {
    let proxy = |member: &str| {
        let text = format!(r#"{{"cmd":"register","protocol":"tcp","port":1{member}}}"#);
        match heard(&text).remove(0) {
            Ok(Request::Register(joining)) => Ok(joining.proxy),
            Ok(_) => panic!("it is a registration"),
            Err(bad) => Err(bad.msg),
        }
    };
    for (member, wanted) in [
        ("", None),
        (r#","proxy":null"#, None),
        (r#","proxy":false"#, Some(false)),
        (r#","proxy":2"#, Some(true)),
        (r#","proxy":2.0"#, Some(true)),
    ] {
        assert_eq!(proxy(member), Ok(wanted), "{member}");
    }
    for wrong in [r#","proxy":1"#, r#","proxy":3"#, r#","proxy":true"#, r#","proxy":"v2""#] {
        let said = "proxy must be 2, the version of the PROXY header, or false, or left out";
        assert_eq!(proxy(wrong), Err(said.to_owned()), "{wrong}");
    }
}

#[test]
fn a_backend_may_say_which_http_it_speaks() {
    let http2 = |member: &str| {
        let text = format!(r#"{{"cmd":"register","protocol":"api","port":1{member}}}"#);
        match heard(&text).remove(0) {
            Ok(Request::Register(joining)) => Ok(joining.http2),
            Ok(_) => panic!("it is a registration"),
            Err(bad) => Err(bad.msg),
        }
    };
    for (member, wanted) in [
        ("", None),
        (r#","http":null"#, None),
        (r#","http":1"#, Some(false)),
        (r#","http":2"#, Some(true)),
    ] {
        assert_eq!(http2(member), Ok(wanted), "{member}");
    }
    for wrong in [r#","http":0"#, r#","http":3"#, r#","http":true"#, r#","http":"2""#] {
        let said = "http must be 1 or 2, the version of HTTP that the backend speaks, or left out";
        assert_eq!(http2(wrong), Err(said.to_owned()), "{wrong}");
    }
}

#[test]
fn a_backend_may_ask_for_tls_by_a_name_that_a_certificate_can_be_for() {
    let tls = |members: &str| {
        let text = format!(r#"{{"cmd":"register","protocol":"tcp","port":1{members}}}"#);
        match heard(&text).remove(0) {
            Ok(Request::Register(joining)) => Ok((joining.tls, joining.tls_name)),
            Ok(_) => panic!("it is a registration"),
            Err(bad) => Err(bad.msg),
        }
    };
    for (members, wanted) in [
        ("", (None, None)),
        (r#","tls":null,"tls_name":null"#, (None, None)),
        (r#","tls":false"#, (Some(false), None)),
        (r#","tls":true"#, (Some(true), None)),
        (r#","tls":true,"tls_name":"shop.internal""#, (Some(true), Some("shop.internal"))),
        (r#","tls":true,"tls_name":"10.0.0.1""#, (Some(true), Some("10.0.0.1"))),
    ] {
        let wanted = (wanted.0, wanted.1.map(Arc::from));
        assert_eq!(tls(members), Ok(wanted), "{members}");
    }
    assert_eq!(tls(r#","tls":1"#), Err("tls must be true or false".to_owned()));
    for wrong in ["", "a b", "*.example"] {
        let told = tls(&format!(r#","tls":true,"tls_name":"{wrong}""#));
        let said = format!("tls_name must be a host or an address, not {wrong}");
        assert_eq!(told, Err(said));
    }
}

#[test]
fn a_backend_may_ask_to_be_checked() {
    let check = |member: &str| {
        let text = format!(r#"{{"cmd":"register","protocol":"tcp","port":1{member}}}"#);
        match heard(&text).remove(0) {
            Ok(Request::Register(joining)) => {
                Ok(joining.check.map(|asked| asked.map_or("off".to_owned(), |it| it.to_string())))
            }
            Ok(_) => panic!("it is a registration"),
            Err(bad) => Err(bad.msg),
        }
    };
    for (member, wanted) in [
        ("", None),
        (r#","check":null"#, None),
        (r#","check":"off""#, Some("off")),
        (r#","check":"tcp""#, Some("tcp")),
        (r#","check":"http:/up?deep=1""#, Some("http:/up?deep=1")),
        (r#","check":"grpc""#, Some("grpc")),
        (r#","check":"grpc:shop.Orders""#, Some("grpc:shop.Orders")),
    ] {
        assert_eq!(check(member), Ok(wanted.map(str::to_owned)), "{member}");
    }
    let how = "write tcp, http: and a path, such as http:/healthz, or grpc, which a service may \
               follow, such as grpc:shop.Orders";
    for wrong in ["", "TCP", "http", "http:", "http:up", "http://x/up", "udp", "grpc:", "grpc/x"] {
        let outcome = check(&format!(r#","check":"{wrong}""#));
        match wrong {
            "http://x/up" => assert!(outcome.is_ok(), "a path may begin with two slashes"),
            _ => assert_eq!(outcome, Err(format!("check {wrong}: {how}"))),
        }
    }
    for wrong in ["http:/a b", r"http:/a\r\nHost: b", "http:/#x", "http:/\u{e4}"] {
        let said = check(&format!(r#","check":"{wrong}""#)).unwrap_err();
        assert!(said.ends_with("visible ASCII characters without #"), "{said}");
    }
    let long = format!("grpc:{}", "a".repeat(256));
    for wrong in ["grpc:a b", r#"grpc:a\"b"#, r"grpc:a\\b", "grpc:\u{e4}", &long] {
        let said = check(&format!(r#","check":"{wrong}""#)).unwrap_err();
        assert!(said.contains("the service is up to 255 visible ASCII characters"), "{said}");
    }
    assert_eq!(check(r#","check":true"#), Err("check must be a string".to_owned()));
}

#[test]
fn members_that_mean_nothing_are_named_in_the_answer() {
    for (message, warning) in [
        (r#"{"cmd":"register","protocol":"tcp","port":1,"weight":2,"check":"tcp"}"#, ""),
        (
            r#"{"cmd":"register","protocol":"tcp","port":1,"wieght":2}"#,
            "unknown member wieght: perhaps weight",
        ),
        (
            r#"{"cmd":"register","protocol":"tcp","port":1,"Name":"a","later":{"x":[1]}}"#,
            "unknown member Name: perhaps name; unknown member later",
        ),
        (
            r#"{"cmd":"register","protocl":"tcp","port":1}"#,
            "unknown member protocl: perhaps protocol",
        ),
        (
            r#"{"cmd":"register","protocol":"tcp","port":1,"deadline_ms":9}"#,
            "deadline_ms means nothing in register",
        ),
        (r#"{"cmd":"drain","protocol":"tcp","port":1,"deadline_ms":9,"name":"a"}"#, ""),
        (r#"{"cmd":"unregister","protocol":"tcp","port":1,"weight":9}"#, ""),
        (r#"{"cmd":"list","servise":"redis"}"#, "unknown member servise: perhaps service"),
        (r#"{"cmd":"auth","id":"a","mac":"b","nonce":"c","v":1}"#, ""),
        (
            r#"{"cmd":"services","qqqq":1,"zzzz":2,"xx\u001bx":3,"jjjj":4,"kkkk":5}"#,
            "unknown member qqqq; unknown member zzzz; unknown member xx?x; and 2 more",
        ),
        (r#"{"comand":"register"}"#, "unknown member comand: perhaps cmd"),
        (r#"{"ack":"hello","took":5}"#, ""),
        (r#"{"cmd":"hello","took":5}"#, ""),
    ] {
        let wanted = Some(warning.to_owned()).filter(|warning| !warning.is_empty());
        assert_eq!(warning_of(message), wanted, "{message}");
    }
    let long = "x".repeat(3_000);
    let warning = warning_of(&format!(r#"{{"cmd":"services","{long}":1}}"#)).unwrap();
    assert!(warning.len() < 80, "{warning}");
    assert_eq!(fault_of(r#"{"cmd":"regster"}"#).msg, "unknown cmd regster: perhaps register");
}
