//! The tables of a fixed status.

use crate::control::certificates::CertificateStatus;
use std::collections::BTreeMap;

use super::*;
use crate::cli::trouble::tests::service;
use crate::cluster::Protocol;
use crate::control::status::{
    CheckStatus, DrainStatus, GroupStatus, HelloStatus, LastMinute, Percentiles, Quantiles,
    ReloadStatus, SCHEMA, ServiceStatus, SessionStatus, SessionTotals, Timings,
};

/// Every row, without colour.
const WHOLE: List = List { most: usize::MAX, colour: false };

pub fn backend() -> BackendStatus {
    BackendStatus {
        proxy: None,
        http: None,
        tls: None,
        id: "b1".into(),
        service: "tcp".into(),
        protocol: Protocol::Tcp,
        address: "10.0.0.5:9991".parse().unwrap(),
        name: Some("web\x1b[2J".into()),
        group: None,
        weight: 2,
        state: BackendState::Serving,
        state_since_unix_ms: None,
        state_changes: 0,
        turns: 2,
        round: 3,
        registered_unix_ms: 0,
        hello: HelloStatus { answered_unix_ms: Some(1), took_us: Some(310), misses: 0 },
        check: CheckStatus::default(),
        drain: DrainStatus::default(),
        drains_in_ms: None,
        sessions_active: 7,
        sessions_total: 12_345,
        connects_failed: 0,
        unanswered: 0,
        unanswered_in_row: 0,
        aside_because: None,
        turned_away: 0,
        bytes_up: 1024,
        bytes_down: 0,
    }
}

fn last_minute() -> BTreeMap<Protocol, LastMinute> {
    let first_byte = Quantiles { count: 4, p99_us: Some(500), ..Quantiles::default() };
    let udp = LastMinute { first_byte, ..LastMinute::default() };
    BTreeMap::from([(Protocol::Tcp, LastMinute::default()), (Protocol::Udp, udp)])
}

pub fn status() -> Status {
    Status {
        schema: SCHEMA,
        version: "0.1.0".into(),
        pid: 42,
        state: RunState::Serving,
        started_unix_ms: 0,
        uptime_ms: 65_000,
        stops_in_ms: None,
        certificates: Vec::new(),
        cluster: None,
        derived: vec!["workers = 1".into(), "limits.sessions = 100".into()],
        doors: Doors { tcp: Some("[::]:8081".parse().unwrap()), ..Doors::default() },
        policy: "round_robin".into(),
        drain_ms: Some(30_000),
        snapshot: 3,
        services: vec![service("tcp", 2, 1)],
        sessions: SessionTotals {
            active: 27,
            limit: 100,
            udp_active: 20,
            udp_limit: 50,
            ..SessionTotals::default()
        },
        backends: vec![
            backend(),
            BackendStatus {
                id: "b12".into(),
                state: BackendState::Aside,
                turns: 0,
                round: 0,
                name: None,
                hello: HelloStatus { misses: 2, ..HelloStatus::default() },
                ..backend()
            },
        ],
        workers: vec![WorkerStatus {
            worker: 0,
            counters: BTreeMap::from([
                ("sessions_active".into(), 7),
                ("users_refused_full".into(), 2),
                ("users_refused_no_backend".into(), 3),
            ]),
        }],
        last_minute: last_minute(),
        timings: Timings {
            connect: Percentiles { count: 9, p50_us: Some(200), ..Percentiles::default() },
            ..Timings::default()
        },
        handover: crate::control::status::HandoverStatus::default(),
        reload: ReloadStatus::default(),
        control: BTreeMap::new(),
    }
}

#[test]
fn a_certificate_that_ends_soon_is_named_above_everything_else() {
    let of = |name: &str, days_left| CertificateStatus {
        names: vec![name.into(), "other.example".into()],
        file: format!("/etc/lb/{name}.pem").into(),
        key: "elliptic curve".into(),
        not_after_unix_ms: 0,
        days_left,
    };
    let certificates = vec![of("a.example", 21), of("b.example", 20), of("c.example", -3)];
    let page = page(&Status { certificates, ..status() }, WHOLE);
    let said: Vec<&str> = page.lines().filter(|line| line.starts_with("certificate")).collect();
    assert_eq!(
        said,
        [
            "certificate b.example ends in 20 days: /etc/lb/b.example.pem",
            "certificate c.example has ended: /etc/lb/c.example.pem"
        ]
    );
}

#[test]
fn a_page_shows_every_part_aligned() {
    let page = page(&status(), WHOLE);
    for line in [
        "lb 0.1.0 (pid 42) serving for 65 s, policy round_robin",
        "sessions 7 of 100, udp 20 of 50, started 0, ended 0, refused 0",
        "auto: workers = 1, limits.sessions = 100",
        "tcp      [::]:8081",
        "admin    off",
        "id   users  address        name      state     share     hello  active   total  failed  no room       up  down",
        "b1   tcp    10.0.0.5:9991  web?[2J  serving  66.7 %    310 us       7  12,345       0        0  1.0 KiB   0 B",
        "b12  tcp    10.0.0.5:9991  -         aside         -  2 missed       7  12,345       0        0  1.0 KiB   0 B",
        "worker  active  started  refused  retries  resets   up  down",
        "     0       7        0        5        0       0  0 B   0 B",
        "connect         9  <= 200 us    -    -",
        "first byte, udp, last minute  4  -  -  <= 500 us",
    ] {
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(page.lines().any(|found| squeezed(found) == squeezed(line)), "{line}\n{page}");
    }
    assert!(!page.contains("tcp, last minute"), "nothing was counted there");
    assert!(!page.contains('\x1b'), "{page}");
    let table: Vec<&str> = page.lines().filter(|line| line.starts_with("b1")).collect();
    assert_eq!(table[0].find("10.0.0.5"), table[1].find("10.0.0.5"), "{page}");
}

#[test]
fn how_a_backend_is_spoken_to_stands_behind_its_address() {
    for (proxy, tls, http, said) in [
        (None, false, Some(1), "10.0.0.5:9991"),
        (None, false, Some(2), "10.0.0.5:9991 (HTTP/2)"),
        (Some(2), true, Some(2), "10.0.0.5:9991 (PROXY v2, TLS, HTTP/2)"),
    ] {
        let tls = tls.then(|| "a.example".into());
        let backends = vec![BackendStatus { proxy, tls, http, ..backend() }];
        let page = page(&Status { backends, ..status() }, WHOLE);
        assert!(page.contains(&format!("  {said}  ")), "{page}");
    }
}

#[test]
fn services_are_shown_once_there_are_named_ones() {
    let mut status = status();
    assert!(!page(&status, WHOLE).contains("service"), "the built-in ones go without saying");
    let terms = vec!["policy = \"least_sessions\"".into(), "connect_ms = 9".into()];
    let redis = ServiceStatus { terms, register: false, ..service("redis", 0, 1) };
    status.services.push(ServiceStatus { doors: Vec::new(), ..redis });
    status.backends[1].service = "redis".into();
    let page = page(&status, WHOLE);
    for line in [
        "services 2: 1 with nobody serving, 1 with backends failing",
        "service users doors serving failing sessions total turned away joining own settings",
        "tcp tcp [::]:8081 2 of 3 1 7 12 0 open -",
        "redis tcp - 0 of 1 1 7 12 0 closed policy = \"least_sessions\", connect_ms = 9",
        "b12 redis tcp 10.0.0.5:9991 - aside - 2 missed 7 12,345 0 0 1.0 KiB 0 B",
    ] {
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(page.lines().any(|found| squeezed(found) == line), "{line}\n{page}");
    }
}

#[test]
fn sessions_are_shown_with_their_service_once_one_is_of_a_named_one() {
    let session = |service: &str| SessionStatus::example("0-1-1", service);
    let plain = sessions::page(&[session("tcp"), session("")], None);
    assert!(!plain.contains("service"), "{plain}");
    let named = sessions::page(&[session("tcp"), session("redis")], None);
    assert!(named.contains("service") && named.contains("redis"), "{named}");
    let sealed = sessions::page(&[SessionStatus { tls: true, ..session("tcp") }], None);
    assert!(sealed.contains(" tcp+tls "), "{sealed}");
}

#[test]
fn an_empty_balancer_says_what_to_do() {
    let page = page(&Status { backends: Vec::new(), ..status() }, WHOLE);
    assert!(page.contains("until one registers"), "{page}");
}

#[test]
fn a_stopping_balancer_says_for_how_long() {
    let status = Status { state: RunState::Draining, stops_in_ms: Some(1_500), ..status() };
    assert!(page(&status, WHOLE).contains("draining, 2 s left"));
    assert!(page(&status, List { colour: true, ..WHOLE }).contains("\x1b[33mdraining\x1b[0m"));
}

/// 203 services with 1,000 backends, of which the last ones are in trouble.
fn crowd() -> Status {
    let mut crowd = status();
    crowd.services.extend((0..202).map(|n| service(&format!("shop-{n}"), 5, u64::from(n == 200))));
    crowd.services.push(service("pg", 0, 5));
    crowd.backends = (0..1000)
        .map(|n| BackendStatus {
            id: format!("b{n}"),
            service: format!("shop-{}", n / 5),
            ..backend()
        })
        .collect();
    crowd.backends[999].state = BackendState::Failing;
    crowd.backends[998].hello.misses = 1;
    crowd
}

#[test]
fn trouble_comes_first_and_what_a_terminal_is_spared_is_told() {
    let short = page(&crowd(), List { most: 50, colour: false });
    let told = "services 204: 1 with nobody serving, 2 with backends failing, 201 in good order";
    assert!(short.contains(told), "{short}");
    let firsts = |start: &str| -> Vec<String> {
        let rows = short.lines().skip_while(|line| !line.starts_with(start)).skip(1);
        rows.take(3).map(|row| row.split_whitespace().next().unwrap().to_owned()).collect()
    };
    assert_eq!(firsts("service "), ["pg", "tcp", "shop-200"]);
    assert_eq!(firsts("id "), ["b999", "b998", "b0"]);
    assert!(
        short.contains("and 154 more services: --all lists them, --service NAME shows"),
        "{short}"
    );
    assert!(short.contains("and 950 more backends"), "{short}");
    assert!(short.lines().count() < 140, "it is to be read");
    let whole = page(&crowd(), WHOLE);
    assert!(!whole.contains(" more "), "{whole}");
    assert_eq!(whole.lines().filter(|line| line.contains(" shop-")).count(), 1000);
}

#[test]
fn one_service_is_shown_with_its_limits_its_groups_and_its_backends_alone() {
    let mut status = crowd();
    let group = |name: &str, share, serving| GroupStatus {
        name: name.into(),
        share,
        file_share: 5,
        backends: 1,
        serving,
    };
    let shop = &mut status.services[8];
    assert_eq!(shop.name, "shop-7");
    shop.groups = vec![group("blue", 95, 1), group("green", 5, 0)];
    (shop.limits.sessions, shop.limits.sessions_used) = (Some(2000), 2000);
    status.backends[36].group = Some("blue".into());
    let shop = &status.services[8];
    let page = services::one(&status, shop, WHOLE);
    for line in [
        "service shop-7 (tcp)",
        "sessions 2,000 of 2,000",
        "sessions so far 12",
        "backends at most none",
        "blue 95 5 1 of 1",
        "green 5 5 0 of 1",
        "b36 shop-7/blue tcp 10.0.0.5:9991 web?[2J serving 66.7 % 310 us 7 12,345 0 0 1.0 KiB 0 B",
    ] {
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(page.lines().any(|found| squeezed(found) == line), "{line}\n{page}");
    }
    let rows = page.lines().filter(|line| line.contains("10.0.0.5"));
    assert_eq!(rows.count(), 5, "{page}");
}

#[test]
fn an_unknown_service_is_answered_with_the_names_that_come_near() {
    let crowd = crowd();
    assert_eq!(trouble::find(&crowd, "pg").map(|it| it.name.as_str()), Ok("pg"));
    for (name, said) in [
        ("gp", "there is no service gp; similar names among the 204 are: pg"),
        ("tpc", "there is no service tpc; similar names among the 204 are: tcp"),
        ("shop-2000", "similar names among the 204 are: shop-2, shop-20, shop-200"),
        ("zebra", "there is no service zebra; `lb status` lists the 204 that there are"),
    ] {
        let told = trouble::find(&crowd, name).unwrap_err();
        assert!(told.contains(said) && !told.contains('\n'), "{told}");
    }
}

#[test]
fn json_of_one_service_is_the_same_status_with_less_in_its_lists() {
    let text = serde_json::to_vec(&crowd()).unwrap();
    let narrow = narrowed(&text, "shop-7").unwrap();
    let read: Status = serde_json::from_str(&narrow).unwrap();
    assert_eq!((read.schema, read.services.len(), read.backends.len()), (SCHEMA, 1, 5));
    assert!(narrowed(&text, "shop-").unwrap_err().contains("similar names"));
}

#[test]
fn a_backend_that_gets_no_users_is_shown_with_the_reason() {
    let silent = "3 requests in a row were not answered in time";
    let aside = BackendStatus {
        state: BackendState::Aside,
        aside_because: Some(silent.to_owned()),
        unanswered: 3,
        connects_failed: 1,
        ..backend()
    };
    let failure = Some("no answer\x1b[2J from 10.0.0.5:9991".to_owned());
    let check = CheckStatus { failure, ..CheckStatus::default() };
    let failing = BackendStatus {
        id: "b2".into(),
        state: BackendState::Failing,
        check: check.clone(),
        ..backend()
    };
    // One whose last check failed and that still serves has no reason not to.
    let serving = BackendStatus { id: "b3".into(), check, ..backend() };
    let table = backend_table(vec![&aside, &failing, &serving], false, WHOLE);
    let reasons: Vec<&str> = table.lines().filter(|line| line.contains(": ")).collect();
    let expected =
        [format!("b1 aside: {silent}"), "b2 failing: no answer[2J from 10.0.0.5:9991".into()];
    assert_eq!(reasons, expected, "{table}");
    let row = table.lines().find(|line| line.starts_with("b1 ")).unwrap();
    assert!(row.split_whitespace().any(|cell| cell == "4"), "failures of both kinds: {row}");
}
