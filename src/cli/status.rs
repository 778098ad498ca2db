//! `lb status`: what the running balancer says about itself, as tables for people or JSON for
//! scripts.

mod services;

use std::fmt::Write;
use std::io::{self, IsTerminal};

use clap::Args;
use serde_json::Value;

use super::door::door;
use super::sessions;
use super::table::{
    Cell, Look, bytes, colour, drawn, grouped, headed, lasting, number, painted, with_service, word,
};
use super::{Failure, print, trouble, wait_for};
use crate::client::admin as client;
use crate::control::status::{
    BackendState, BackendStatus, Doors, HandoverState, HandoverStatus, Quantiles, RunState, Status,
    WorkerStatus,
};

/// Limit on the sessions shown; a script that wants more asks the admin door page by page.
const SESSIONS_MAX: usize = 1_000_000;
/// How many rows of one list a terminal is given, unless all are asked for.
const ROWS_MAX: usize = 50;

/// Show the services, backends, sessions and workers of a running balancer.
#[derive(Args)]
pub struct Arguments {
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
    /// Show every running session instead
    #[arg(long)]
    sessions: bool,
    /// Show one service, with all its backends
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// List every service and backend on a terminal too, not only the first 50 of each
    #[arg(long)]
    all: bool,
    /// The balancer's admin door, or the path of its admin.socket
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = door)]
    admin: String,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let (admin, service) = (arguments.admin.as_str(), arguments.service.as_deref());
    // What a program reads, or a person searches, is whole.
    let everything = arguments.all || service.is_some() || !io::stdout().is_terminal();
    let list = List { most: if everything { usize::MAX } else { ROWS_MAX }, colour: colour() };
    let text = wait_for(async {
        match (arguments.sessions, arguments.json) {
            (false, true) => {
                let text = client::status_text(admin).await?;
                match service {
                    Some(name) => narrowed(&text, name),
                    None => Ok(String::from_utf8_lossy(&text).trim_end().to_owned() + "\n"),
                }
            }
            (false, false) => {
                let status = client::status(admin).await?;
                match service {
                    Some(name) => Ok(services::one(&status, trouble::find(&status, name)?, list)),
                    None => Ok(page(&status, list)),
                }
            }
            (true, json) => {
                if let Some(name) = service {
                    trouble::find(&client::status(admin).await?, name)?;
                }
                let of = service.map(|name| ("service", name.to_owned()));
                let filters = Vec::from_iter(of);
                let (found, next) = client::sessions(admin, &filters, None, SESSIONS_MAX).await?;
                let next = next.as_deref();
                Ok(if json { sessions::lines(&found) } else { sessions::page(&found, next) })
            }
        }
    })?;
    print(&text.map_err(Failure)?)
}

/// How lists are shown.
#[derive(Clone, Copy)]
struct List {
    /// The rows of each, at most.
    most: usize,
    colour: bool,
}

impl List {
    /// A line that tells how many rows of a list are not shown, if there are any.
    fn left(self, count: usize, what: &str) -> String {
        match count.saturating_sub(self.most) {
            0 => String::new(),
            left => format!(
                "and {} more {what}: --all lists them, --service NAME shows one service\n",
                grouped(left as u64)
            ),
        }
    }
}

/// The status with only one of its services, and the backends of that.
fn narrowed(text: &[u8], name: &str) -> Result<String, String> {
    let strange =
        |error| format!("the balancer's status is not what this program expects: {error}");
    let status: Status = serde_json::from_slice(text).map_err(strange)?;
    trouble::find(&status, name)?;
    let mut all: Value = serde_json::from_slice(text).map_err(strange)?;
    for (list, key) in [("services", "name"), ("backends", "service")] {
        if let Some(items) = all[list].as_array_mut() {
            items.retain(|item| item[key] == name);
        }
    }
    Ok(all.to_string() + "\n")
}

/// The whole balancer on one page.
fn page(status: &Status, list: List) -> String {
    let title = |text: &str| painted(text, Look::Faint, list.colour);
    let mut out = head(status, list.colour);
    if !status.derived.is_empty() {
        let _ = writeln!(out, "auto: {}", status.derived.join(", "));
    }
    for one in status.certificates.iter().filter(|it| it.is_due()) {
        let said = format!("certificate {} {}", one.name(), one.remaining());
        let _ = writeln!(out, "{}: {}", painted(&said, Look::Bad, list.colour), one.file.display());
    }
    let named = status.has_named_services();
    if named {
        let count = grouped(status.services.len() as u64);
        let _ = writeln!(out, "services {count}: {}", trouble::summary(status));
    }
    let _ = writeln!(out, "\n{}", title("doors"));
    out.push_str(&doors(&status.doors, list.colour));
    if named {
        let _ = writeln!(out, "\n{}", title("services"));
        out.push_str(&services::table(status, list));
    }
    let _ = writeln!(out, "\n{}", title("backends"));
    out.push_str(&backend_table(status.backends.iter().collect(), named, list));
    let _ = writeln!(out, "\n{}", title("workers"));
    let rows: Vec<Vec<Cell>> = status.workers.iter().map(worker_row).collect();
    let heads = ["worker", "active", "started", "refused", "retries", "resets", "up", "down"];
    out.push_str(&drawn(&heads, &rows, list.colour));
    let _ = writeln!(out, "\n{}", title("times"));
    out.push_str(&times(status, list.colour));
    out
}

/// Backends in a table, the most urgent first.
fn backend_table(mut backends: Vec<&BackendStatus>, named: bool, list: List) -> String {
    if backends.is_empty() {
        return "none: users are turned away until one registers (lb backend --help)\n".to_owned();
    }
    backends.sort_by_key(|backend| trouble::urgency(backend));
    let row = |it: &&BackendStatus| with_service(named, &it.membership(), backend_row(it));
    let rows: Vec<Vec<Cell>> = backends.iter().take(list.most).map(row).collect();
    let heads = [
        "id", "users", "address", "name", "state", "share", "hello", "active", "total", "failed",
        "no room", "up", "down",
    ];
    let reasons: String = backends.iter().take(list.most).filter_map(|it| reason(it)).collect();
    let table = drawn(&headed(named, &heads), &rows, list.colour);
    table + &list.left(backends.len(), "backends") + &reasons
}

/// Why a backend gets no users, in a line.
fn reason(backend: &BackendStatus) -> Option<String> {
    let why = match backend.state {
        BackendState::Aside => backend.aside_because.as_ref(),
        BackendState::Failing => backend.check.failure.as_ref(),
        _ => None,
    }?;
    let why: String = why.chars().filter(|letter| !letter.is_control()).collect();
    Some(format!("{} {}: {why}\n", backend.id, backend.state.name()))
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
        "lb {} (pid {}) {}{} for {} s, policy {}{}\n\
         sessions {} of {}, udp {} of {}, started {}, ended {}, refused {}\n",
        status.version,
        status.pid,
        painted(word, look, colour),
        left.unwrap_or_default(),
        status.uptime_ms / 1000,
        status.policy,
        handed_over(&status.handover).map(|said| format!("\n{said}")).unwrap_or_default(),
        sessions.streams(),
        sessions.limit,
        sessions.udp_active,
        sessions.udp_limit,
        sessions.started,
        sessions.ended,
        sessions.refused,
    )
}

/// Who this process has taken over from, or why nobody takes over from it; on a line of its own.
fn handed_over(handover: &HandoverStatus) -> Option<String> {
    let HandoverStatus { state, generation, taken, failed, .. } = handover;
    match (state, failed, taken) {
        (HandoverState::Starting, _, _) => Some("upgrade: a successor is starting".to_owned()),
        (HandoverState::Lingering, _, _) => Some(
            "upgrade: a successor serves, and what it could not take over ends here".to_owned(),
        ),
        (HandoverState::None, Some(failed), _) => {
            Some(format!("upgrade: failed ({}): {}", failed.step, failed.why))
        }
        (HandoverState::None, None, Some(taken)) => {
            let stall = taken.stall_us as f64 / 1000.0;
            let kept = super::door::sessions(taken.sessions);
            let times =
                if *generation == 1 { "once".to_owned() } else { format!("{generation} times") };
            Some(format!(
                "upgraded {times} while it ran, last with {kept} and a stall of {stall:.1} ms"
            ))
        }
        (HandoverState::None, None, None) => None,
    }
}

fn doors(doors: &Doors, colour: bool) -> String {
    let all = [
        ("tcp", doors.tcp),
        ("udp", doors.udp),
        ("api", doors.api),
        ("api-tls", doors.api_tls),
        ("control", doors.control),
        ("admin", doors.admin),
    ];
    let shown = all.map(|(name, address)| {
        vec![word(name), word(address.map_or("off".to_owned(), |address| address.to_string()))]
    });
    drawn(&["door", "address"], &shown, colour)
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
        word(address(backend)),
        word(backend.name.as_deref().unwrap_or("-")),
        word(state(backend)).looking(look),
        word(share).right(),
        hello(backend),
        number(backend.sessions_active),
        number(backend.sessions_total),
        number(backend.failures()),
        marked(backend.turned_away),
        bytes(backend.bytes_up),
        bytes(backend.bytes_down),
    ]
}

/// Where it is, and how a connection to it begins.
fn address(backend: &BackendStatus) -> String {
    let proxy = backend.proxy.map(|version| format!("PROXY v{version}"));
    let tls = backend.tls.as_ref().map(|_| "TLS".to_owned());
    let http2 = (backend.http == Some(2)).then(|| "HTTP/2".to_owned());
    let said: Vec<String> = proxy.into_iter().chain(tls).chain(http2).collect();
    match said.is_empty() {
        true => backend.address.to_string(),
        false => format!("{} ({})", backend.address, said.join(", ")),
    }
}

/// The state, of one that drains with the time that its sessions still have.
fn state(backend: &BackendStatus) -> String {
    match (backend.state, backend.drains_in_ms) {
        (BackendState::Draining, _) if backend.drain.empty => "drained".to_owned(),
        (BackendState::Draining, Some(ms)) => format!("draining, {}", lasting(ms)),
        (state, _) => state.name().to_owned(),
    }
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
    let row = |name: &str, times: Quantiles| {
        let at = |bound: Option<u64>| {
            word(bound.map_or("-".to_owned(), |us| format!("<= {}", microseconds(us)))).right()
        };
        vec![word(name), number(times.count), at(times.p50_us), at(times.p90_us), at(times.p99_us)]
    };
    let used = status.last_minute.iter().filter(|(_, minute)| minute.first_byte.count > 0);
    let minute = used.map(|(protocol, minute)| {
        row(&format!("first byte, {protocol}, last minute"), minute.first_byte)
    });
    let rows: Vec<Vec<Cell>> = [
        row("connect", status.timings.connect.into()),
        row("first byte", status.timings.first_byte.into()),
        row("session", status.timings.session_length.into()),
    ]
    .into_iter()
    .chain(minute)
    .collect();
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
pub(super) mod tests;
