//! `lb sessions`: the running sessions that an operator asks for, as a table for people or JSON for scripts.

use std::fmt::Write;
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;

use super::door::door;
use super::naming::{self, Scope};
use super::table::{Cell, bytes, colour, drawn, headed, span, with_service, word};
use super::{Failure, duration, print, protocol, trouble, wait_for};
use crate::client::admin;
use crate::cluster::Protocol;
use crate::control::status::SessionStatus;

/// Show the running sessions, all or those of one service, backend, user or worker.
///
/// Each has the id that `lb end` takes. With --json there is one object a line.
#[derive(Args)]
pub struct Arguments {
    /// Only those of this service
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// Only those of this kind
    #[arg(long, value_parser = protocol())]
    protocol: Option<Protocol>,
    /// Only those on this backend: its id, name or address
    #[arg(long, value_name = "BACKEND")]
    backend: Option<String>,
    /// Only those of users at this address or in this network, such as 10.1.0.0/16
    #[arg(long, value_name = "ADDR", value_parser = network)]
    client: Option<String>,
    /// Only those that this worker relays
    #[arg(long, value_name = "N")]
    worker: Option<u8>,
    /// Only those that are at least this old, such as 90s or 2h
    #[arg(long, value_name = "TIME", value_parser = duration)]
    age: Option<Duration>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// Only those after a page that ended here
    #[arg(long, value_name = "PLACE")]
    after: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    /// The balancer's admin door, or the path of its admin.socket
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = door)]
    admin: String,
}

fn network(text: &str) -> Result<String, String> {
    let parsed = super::end::address(text).map(|ip| ip.to_string());
    parsed.or_else(|| text.parse::<IpNet>().ok().map(|it| it.to_string())).ok_or_else(|| {
        "write an address such as 10.1.2.3, or a network such as 10.1.0.0/16".to_owned()
    })
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let (found, next) = wait_for(ask(&arguments))??;
    print(&if arguments.json { lines(&found) } else { page(&found, next.as_deref()) })
}

async fn ask(arguments: &Arguments) -> Result<(Vec<SessionStatus>, Option<String>), String> {
    let Arguments { service, protocol, backend, client, worker, age, limit, after, .. } = arguments;
    let door = arguments.admin.as_str();
    let mut filters: Vec<(&str, String)> = Vec::new();
    if service.is_some() || backend.is_some() {
        let status = admin::status(door).await?;
        if let Some(name) = service {
            trouble::find(&status, name)?;
            filters.push(("service", name.clone()));
        }
        if let Some(said) = backend {
            let scope = Scope { service: service.as_deref(), all: false };
            filters.push(("backend", naming::any(&status, said, scope)?.id.clone()));
        }
    }
    filters.extend(protocol.map(|it| ("protocol", it.name().to_owned())));
    filters.extend(client.as_ref().map(|it| ("client", it.clone())));
    filters.extend(worker.map(|it| ("worker", it.to_string())));
    filters.extend(age.map(|it| ("age_ms", it.as_millis().to_string())));
    let most = usize::try_from(*limit).unwrap_or(usize::MAX);
    admin::sessions(door, &filters, after.as_deref(), most).await
}

/// One JSON object per line, as in the admin door's pages.
pub fn lines(sessions: &[SessionStatus]) -> String {
    let line = |session| serde_json::to_string(session).expect("a session is plain values");
    sessions.iter().map(|session| line(session) + "\n").collect()
}

pub fn page(sessions: &[SessionStatus], next: Option<&str>) -> String {
    let named = sessions.iter().any(|it| !matches!(&*it.service, "" | "tcp" | "udp" | "api"));
    let rows: Vec<Vec<Cell>> =
        sessions.iter().map(|it| with_service(named, &it.service, row(it))).collect();
    let heads = ["session", "users", "client", "backend", "at", "age", "idle", "up", "down"];
    let mut out = drawn(&headed(named, &heads), &rows, colour());
    let count = super::door::sessions(sessions.len() as u64);
    let more = next.map(|next| format!(", and more: --after {next} shows the next"));
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{count}{}", more.unwrap_or_default());
    out
}

fn row(session: &SessionStatus) -> Vec<Cell> {
    let at = session.backend_address.map(|address| address.to_string());
    vec![
        word(&session.id),
        word(session.spoken()),
        word(session.client.to_string()),
        word(session.backend.as_deref().unwrap_or("-")),
        word(at.as_deref().unwrap_or("-")),
        span(session.age_ms),
        span(session.idle_ms),
        bytes(session.bytes_up),
        bytes(session.bytes_down),
    ]
}
