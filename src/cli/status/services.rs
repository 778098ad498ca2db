//! Services in `lb status`: all of them in a table, those in trouble first, or one of them at length. Owns
//! the columns and the order.

use std::fmt::Write;

use crate::cli::table::{Cell, Look, drawn, number, painted, word};
use crate::cli::trouble::{self, Trouble};
use crate::control::status::{BackendStatus, GroupStatus, ServiceStatus, Status};

use super::{List, backend_table};

/// The services of a balancer that has named ones.
pub fn table(status: &Status, list: List) -> String {
    let mut services: Vec<&ServiceStatus> = status.services.iter().collect();
    services.sort_by_key(|service| Trouble::of(service));
    let rows: Vec<Vec<Cell>> = services.iter().take(list.most).map(|it| row(it)).collect();
    let heads = [
        "service",
        "users",
        "doors",
        "serving",
        "failing",
        "sessions",
        "total",
        "turned away",
        "joining",
        "own settings",
    ];
    let left = list.left(services.len(), "services");
    drawn(&heads, &rows, list.colour) + &left
}

fn row(service: &ServiceStatus) -> Vec<Cell> {
    let doors = service.doors.iter().map(ToString::to_string).collect();
    let look = look_of(service);
    let marked = |cell: Cell, bad: bool| if bad { cell.looking(Look::Bad) } else { cell };
    vec![
        word(&service.name),
        word(service.protocol.name()),
        word(listed(doors)),
        word(trouble::serving(service)).right().looking(look),
        marked(number(trouble::failing(service)), trouble::failing(service) > 0),
        marked(word(trouble::sessions(service)).right(), trouble::is_full(service)),
        number(service.sessions_total),
        marked(number(trouble::turned_away(service)), trouble::turned_away(service) > 0),
        word(joining(service)),
        word(listed(trouble::settings(service))),
    ]
}

fn look_of(service: &ServiceStatus) -> Look {
    match Trouble::of(service) {
        Trouble::Nobody => Look::Bad,
        Trouble::Short => Look::Warning,
        Trouble::Full | Trouble::None => Look::Plain,
    }
}

fn listed(all: Vec<String>) -> String {
    if all.is_empty() { "-".to_owned() } else { all.join(", ") }
}

/// One service with all its backends.
pub fn one(status: &Status, service: &ServiceStatus, list: List) -> String {
    let title = |text: &str| painted(text, Look::Faint, list.colour);
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(out, "service {} ({})\n", service.name, service.protocol);
    out += &facts(service, list.colour);
    if !service.groups.is_empty() {
        let _ = writeln!(out, "\n{}", title("groups"));
        out += &groups(&service.groups, list.colour);
    }
    let _ = writeln!(out, "\n{}", title("backends"));
    let own = |backend: &&BackendStatus| backend.service == service.name;
    let backends: Vec<&BackendStatus> = status.backends.iter().filter(own).collect();
    out + &backend_table(backends, !service.groups.is_empty(), list)
}

fn facts(service: &ServiceStatus, colour: bool) -> String {
    let limit = |limit: Option<u32>| limit.map_or("none".to_owned(), |it| it.to_string());
    let limits = &service.limits;
    let doors = service.doors.iter().map(ToString::to_string).collect();
    let turned_away = service.turned_away.iter().filter(|(_, count)| **count > 0);
    let turned_away = turned_away.map(|(barrier, count)| format!("{barrier}: {count}")).collect();
    let facts = [
        ("doors", word(listed(doors))),
        ("serving", word(trouble::serving(service)).looking(look_of(service))),
        ("sessions", word(trouble::sessions(service))),
        ("sessions so far", word(service.sessions_total.to_string())),
        ("turned away", word(listed(turned_away))),
        ("sessions on each backend", word(limit(limits.backend_sessions))),
        ("backends at most", word(limit(limits.backends_max))),
        ("joining", word(joining(service))),
        ("own settings", word(listed(service.terms.clone()))),
    ];
    let rows: Vec<Vec<Cell>> =
        facts.into_iter().map(|(what, cell)| vec![word(what), cell]).collect();
    drawn(&["what", "value"], &rows, colour)
}

fn groups(groups: &[GroupStatus], colour: bool) -> String {
    let row = |group: &GroupStatus| {
        let serving = word(format!("{} of {}", group.serving, group.backends)).right();
        let nobody = group.share > 0 && group.serving == 0;
        vec![
            word(&group.name),
            number(u64::from(group.share)),
            number(u64::from(group.file_share)),
            if nobody { serving.looking(Look::Bad) } else { serving },
        ]
    };
    let rows: Vec<Vec<Cell>> = groups.iter().map(row).collect();
    drawn(&["group", "share", "in the file", "serving"], &rows, colour)
}

/// Whether backends may join.
fn joining(service: &ServiceStatus) -> &'static str {
    match service.register {
        _ if service.leaving => "leaving",
        true => "open",
        false => "closed",
    }
}
