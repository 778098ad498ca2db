//! `lb status`: what the running balancer says about itself, as tables for people or JSON for
//! scripts.

use std::fmt::Write;

use clap::Args;

use super::table::{Cell, Look, bytes, colour, drawn, number, painted, span, word};
use super::{Failure, peer, print, wait_for};
use crate::client::admin;
use crate::control::status::{
    BackendState, BackendStatus, Doors, GroupStatus, Percentiles, RunState, ServiceStatus,
    SessionStatus, Status, WorkerStatus,
};

/// Limit on the sessions shown; a script that wants more asks the admin door page by page.
const SESSIONS_MAX: usize = 1_000_000;

/// Show the backends, sessions and workers of a running balancer.
#[derive(Args)]
pub struct Arguments {
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
    /// Show every running session instead
    #[arg(long)]
    sessions: bool,
    /// The balancer's admin door
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = peer)]
    admin: String,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let text = wait_for(async {
        match (arguments.sessions, arguments.json) {
            (false, true) => {
                let text = admin::status_text(&arguments.admin).await?;
                Ok(String::from_utf8_lossy(&text).trim_end().to_owned() + "\n")
            }
            (false, false) => Ok(page(&admin::status(&arguments.admin).await?, colour())),
            (true, json) => {
                let (sessions, more) = admin::sessions(&arguments.admin, SESSIONS_MAX).await?;
                Ok(if json { session_lines(&sessions) } else { session_page(&sessions, more) })
            }
        }
    })?;
    print(&text.map_err(Failure)?)
}

/// One JSON object per line, as in the admin door's pages.
fn session_lines(sessions: &[SessionStatus]) -> String {
    let line = |session| serde_json::to_string(session).expect("a session is plain values");
    sessions.iter().map(|session| line(session) + "\n").collect()
}

fn session_page(sessions: &[SessionStatus], more: bool) -> String {
    let named = sessions.iter().any(|it| !matches!(&*it.service, "" | "tcp" | "udp" | "api"));
    let rows: Vec<Vec<Cell>> =
        sessions.iter().map(|it| with_service(named, &it.service, session_row(it))).collect();
    let heads = ["session", "users", "client", "backend", "at", "age", "idle", "up", "down"];
    let mut out = drawn(&headed(named, &heads), &rows, colour());
    let count = sessions.len();
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{count} sessions{}", if more { ", and more" } else { "" });
    out
}

/// A row with its service in the second column, if there are named services.
fn with_service(named: bool, service: &str, mut row: Vec<Cell>) -> Vec<Cell> {
    if named {
        row.insert(1, word(service));
    }
    row
}

/// The headings of such rows.
fn headed(named: bool, heads: &[&'static str]) -> Vec<&'static str> {
    let mut heads = heads.to_vec();
    if named {
        heads.insert(1, "service");
    }
    heads
}

fn session_row(session: &SessionStatus) -> Vec<Cell> {
    let at = session.backend_address.map(|address| address.to_string());
    vec![
        word(&session.id),
        word(session.protocol.name()),
        word(session.client.to_string()),
        word(session.backend.as_deref().unwrap_or("-")),
        word(at.as_deref().unwrap_or("-")),
        span(session.age_ms),
        span(session.idle_ms),
        bytes(session.bytes_up),
        bytes(session.bytes_down),
    ]
}

/// The whole balancer on one page.
fn page(status: &Status, colour: bool) -> String {
    let title = |text: &str| painted(text, Look::Faint, colour);
    let mut out = head(status, colour);
    let _ = writeln!(out, "\n{}", title("doors"));
    out.push_str(&doors(&status.doors, colour));
    let named = status.has_named_services();
    if named {
        let _ = writeln!(out, "\n{}", title("services"));
        let rows: Vec<Vec<Cell>> = status.services.iter().map(service_row).collect();
        let heads = ["service", "users", "doors", "serving", "sessions", "joining", "own settings"];
        out.push_str(&drawn(&heads, &rows, colour));
    }
    let _ = writeln!(out, "\n{}", title("backends"));
    if status.backends.is_empty() {
        out.push_str("none: users are turned away until one registers (lb backend --help)\n");
    } else {
        let row = |it: &BackendStatus| with_service(named, &it.membership(), backend_row(it));
        let rows: Vec<Vec<Cell>> = status.backends.iter().map(row).collect();
        let heads = [
            "id", "users", "address", "name", "state", "share", "hello", "active", "total",
            "failed", "no room", "up", "down",
        ];
        out.push_str(&drawn(&headed(named, &heads), &rows, colour));
    }
    let _ = writeln!(out, "\n{}", title("workers"));
    let rows: Vec<Vec<Cell>> = status.workers.iter().map(worker_row).collect();
    let heads = ["worker", "active", "started", "refused", "retries", "resets", "up", "down"];
    out.push_str(&drawn(&heads, &rows, colour));
    let _ = writeln!(out, "\n{}", title("times"));
    out.push_str(&times(status, colour));
    out
}

fn head(status: &Status, colour: bool) -> String {
    let (word, look) = match status.state {
        RunState::Serving => ("serving", Look::Good),
        RunState::Draining => ("draining", Look::Warning),
        RunState::Stopping => ("stopping", Look::Bad),
    };
    let left = status.stops_in_ms.map(|ms| format!(", {} s left", ms.div_ceil(1000)));
    let sessions = &status.sessions;
    format!(
        "lb {} (pid {}) {}{} for {} s, policy {}\n\
         sessions {} of {}, started {}, ended {}, refused {}\n",
        status.version,
        status.pid,
        painted(word, look, colour),
        left.unwrap_or_default(),
        status.uptime_ms / 1000,
        status.policy,
        sessions.active,
        sessions.limit,
        sessions.started,
        sessions.ended,
        sessions.refused,
    )
}

fn doors(doors: &Doors, colour: bool) -> String {
    let all = [
        ("tcp", doors.tcp),
        ("udp", doors.udp),
        ("api", doors.api),
        ("control", doors.control),
        ("admin", doors.admin),
    ];
    let shown = all.map(|(name, address)| {
        vec![word(name), word(address.map_or("off".to_owned(), |address| address.to_string()))]
    });
    drawn(&["door", "address"], &shown, colour)
}

fn service_row(service: &ServiceStatus) -> Vec<Cell> {
    let list = |all: Vec<String>| if all.is_empty() { "-".to_owned() } else { all.join(", ") };
    let doors = service.doors.iter().map(ToString::to_string).collect();
    let serving = service.backends.get(&BackendState::Serving).copied().unwrap_or(0);
    let of: u64 = service.backends.values().sum();
    let serving = word(format!("{serving} of {of}")).right();
    vec![
        word(&service.name),
        word(service.protocol.name()),
        word(list(doors)),
        serving,
        number(service.sessions_active),
        word(match service.register {
            _ if service.leaving => "leaving",
            true => "open",
            false => "closed",
        }),
        word(list(settings(service))),
    ]
}

/// What is particular about a service: its terms and its groups.
fn settings(service: &ServiceStatus) -> Vec<String> {
    let group = |group: &GroupStatus| {
        let GroupStatus { name, share, file_share, .. } = group;
        let file = (share != file_share).then(|| format!(" (file: {file_share})"));
        format!("{name}={share}{}", file.unwrap_or_default())
    };
    service.groups.iter().map(group).chain(service.terms.iter().cloned()).collect()
}

fn backend_row(backend: &BackendStatus) -> Vec<Cell> {
    let look = match backend.state {
        BackendState::Serving => Look::Good,
        BackendState::Draining => Look::Warning,
        BackendState::Aside | BackendState::Failing | BackendState::Left => Look::Bad,
    };
    let share = match backend.round {
        0 => "-".to_owned(),
        round => format!("{:.1} %", f64::from(backend.turns) * 100.0 / f64::from(round)),
    };
    vec![
        word(&backend.id),
        word(backend.protocol.name()),
        word(match backend.proxy {
            Some(version) => format!("{} (PROXY v{version})", backend.address),
            None => backend.address.to_string(),
        }),
        word(backend.name.as_deref().unwrap_or("-")),
        word(backend.state.name()).looking(look),
        word(share).right(),
        hello(backend),
        number(backend.sessions_active),
        number(backend.sessions_total),
        number(backend.connects_failed),
        marked(backend.turned_away),
        bytes(backend.bytes_up),
        bytes(backend.bytes_down),
    ]
}

/// A number that should be zero.
fn marked(count: u64) -> Cell {
    let cell = number(count);
    if count > 0 { cell.looking(Look::Bad) } else { cell }
}

fn hello(backend: &BackendStatus) -> Cell {
    let misses = backend.hello.misses;
    match (misses, backend.hello.took_us) {
        (1.., _) => word(format!("{misses} missed")).looking(Look::Warning),
        (0, Some(took)) => word(microseconds(took)),
        (0, None) => word("-"),
    }
    .right()
}

fn worker_row(worker: &WorkerStatus) -> Vec<Cell> {
    let count = |name: &str| worker.counters.get(name).copied().unwrap_or(0);
    let refused: u64 = worker
        .counters
        .iter()
        .filter(|(name, _)| name.starts_with("users_refused"))
        .map(|(_, count)| count)
        .sum();
    vec![
        number(u64::from(worker.worker)),
        number(count("sessions_active")),
        number(count("sessions_started")),
        number(refused),
        number(count("retries")),
        number(count("resets")),
        bytes(count("bytes_up")),
        bytes(count("bytes_down")),
    ]
}

fn times(status: &Status, colour: bool) -> String {
    let row = |name: &str, times: &Percentiles| {
        let at = |bound: Option<u64>| {
            word(bound.map_or("-".to_owned(), |us| format!("<= {}", microseconds(us)))).right()
        };
        vec![word(name), number(times.count), at(times.p50_us), at(times.p90_us), at(times.p99_us)]
    };
    let rows = [
        row("connect", &status.timings.connect),
        row("first byte", &status.timings.first_byte),
        row("session", &status.timings.session_length),
    ];
    drawn(&["time", "count", "p50", "p90", "p99"], &rows, colour)
}

fn microseconds(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{}.{} ms", us / 1_000, us % 1_000 / 100),
        _ => format!("{}.{} s", us / 1_000_000, us % 1_000_000 / 100_000),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::control::status::ServiceLimits;

    use super::*;
    use crate::cluster::Protocol;
    use crate::control::status::{
        CheckStatus, HelloStatus, ReloadStatus, SCHEMA, SessionTotals, Timings,
    };

    fn backend() -> BackendStatus {
        BackendStatus {
            proxy: None,
            id: "b1".into(),
            service: "tcp".into(),
            protocol: Protocol::Tcp,
            address: "10.0.0.5:9991".parse().unwrap(),
            name: Some("web\x1b[2J".into()),
            group: None,
            weight: 2,
            state: BackendState::Serving,
            turns: 2,
            round: 3,
            registered_unix_ms: 0,
            hello: HelloStatus { answered_unix_ms: Some(1), took_us: Some(310), misses: 0 },
            check: CheckStatus::default(),
            drains_in_ms: None,
            sessions_active: 7,
            sessions_total: 12_345,
            connects_failed: 0,
            turned_away: 0,
            bytes_up: 1024,
            bytes_down: 0,
        }
    }

    fn status() -> Status {
        Status {
            schema: SCHEMA,
            version: "0.1.0".into(),
            pid: 42,
            state: RunState::Serving,
            started_unix_ms: 0,
            uptime_ms: 65_000,
            stops_in_ms: None,
            doors: Doors { tcp: Some("[::]:8081".parse().unwrap()), ..Doors::default() },
            policy: "round_robin".into(),
            snapshot: 3,
            services: vec![service("tcp", 2)],
            sessions: SessionTotals { active: 7, limit: 100, ..SessionTotals::default() },
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
            timings: Timings {
                connect: Percentiles { count: 9, p50_us: Some(200), ..Percentiles::default() },
                ..Timings::default()
            },
            reload: ReloadStatus::default(),
            control: BTreeMap::new(),
        }
    }

    #[test]
    fn a_page_shows_every_part_aligned() {
        let page = page(&status(), false);
        for line in [
            "lb 0.1.0 (pid 42) serving for 65 s, policy round_robin",
            "sessions 7 of 100, started 0, ended 0, refused 0",
            "tcp      [::]:8081",
            "admin    off",
            "id   users  address        name      state     share     hello  active   total  failed  no room       up  down",
            "b1   tcp    10.0.0.5:9991  web?[2J  serving  66.7 %    310 us       7  12,345       0        0  1.0 KiB   0 B",
            "b12  tcp    10.0.0.5:9991  -         aside         -  2 missed       7  12,345       0        0  1.0 KiB   0 B",
            "worker  active  started  refused  retries  resets   up  down",
            "     0       7        0        5        0       0  0 B   0 B",
            "connect         9  <= 200 us    -    -",
        ] {
            let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(page.lines().any(|found| squeezed(found) == squeezed(line)), "{line}\n{page}");
        }
        assert!(!page.contains('\x1b'), "{page}");
        let table: Vec<&str> = page.lines().filter(|line| line.starts_with("b1")).collect();
        assert_eq!(table[0].find("10.0.0.5"), table[1].find("10.0.0.5"), "{page}");
    }

    fn service(name: &str, serving: u64) -> ServiceStatus {
        ServiceStatus {
            name: name.into(),
            protocol: Protocol::Tcp,
            doors: vec!["[::]:8081".parse().unwrap()],
            leaving: false,
            register: true,
            backends: BTreeMap::from([(BackendState::Serving, serving), (BackendState::Aside, 1)]),
            sessions_active: 7,
            terms: Vec::new(),
            limits: ServiceLimits::default(),
            turned_away: BTreeMap::new(),
            groups: Vec::new(),
        }
    }

    #[test]
    fn services_are_shown_once_there_are_named_ones() {
        let mut status = status();
        assert!(!page(&status, false).contains("service"), "the built-in ones go without saying");
        let terms = vec!["policy = \"least_sessions\"".into(), "connect_ms = 9".into()];
        let redis = ServiceStatus { terms, register: false, ..service("redis", 0) };
        status.services.push(ServiceStatus { doors: Vec::new(), ..redis });
        status.backends[1].service = "redis".into();
        let page = page(&status, false);
        for line in [
            "service users doors serving sessions joining own settings",
            "tcp tcp [::]:8081 2 of 3 7 open -",
            "redis tcp - 0 of 1 7 closed policy = \"least_sessions\", connect_ms = 9",
            "b12 redis tcp 10.0.0.5:9991 - aside - 2 missed 7 12,345 0 0 1.0 KiB 0 B",
        ] {
            let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(page.lines().any(|found| squeezed(found) == line), "{line}\n{page}");
        }
    }

    #[test]
    fn sessions_are_shown_with_their_service_once_one_is_of_a_named_one() {
        let session = |service: &str| SessionStatus::example("0-1-1", service);
        let plain = session_page(&[session("tcp"), session("")], false);
        assert!(!plain.contains("service"), "{plain}");
        let named = session_page(&[session("tcp"), session("redis")], false);
        assert!(named.contains("service") && named.contains("redis"), "{named}");
    }

    #[test]
    fn an_empty_balancer_says_what_to_do() {
        let page = page(&Status { backends: Vec::new(), ..status() }, false);
        assert!(page.contains("until one registers"), "{page}");
    }

    #[test]
    fn a_stopping_balancer_says_for_how_long() {
        let status = Status { state: RunState::Draining, stops_in_ms: Some(1_500), ..status() };
        assert!(page(&status, false).contains("draining, 2 s left"));
        assert!(page(&status, true).contains("\x1b[33mdraining\x1b[0m"));
    }
}
