//! The tables of `lb top`: services, backends and sessions. Owns their columns and what stands in them.

use std::ops::Range;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Table, TableState};

use super::super::brief;
use super::super::columns::{Column, name, number, table, text};
use super::super::rows::Rates;
use super::super::screen::{List, Mode, Of, Row, Screen};
use super::{FAINT, history, rate};
use crate::cli::table::grouped;
use crate::cli::text::{shown, width};
use crate::cli::trouble::{self, Trouble};
use crate::control::history::page::Field;
use crate::control::status::{BackendState, BackendStatus, ServiceStatus, SessionStatus};

const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);

/// The list that is shown, with its marks.
pub fn draw(screen: &Screen, rows: Range<usize>, frame: &mut Frame, area: Rect) {
    let is_cut = rows.len() < screen.count();
    let room = Rect { width: area.width.saturating_sub(if is_cut { 2 } else { 0 }), ..area };
    match (&screen.mode, &screen.list) {
        (Mode::History { service }, _) => {
            return history::draw(screen, service.as_deref(), frame, area);
        }
        (Mode::Sessions { .. }, _) => sessions(screen, rows.clone(), frame, room),
        (_, List::Services) => services(screen, rows.clone(), frame, room),
        (_, List::Backends { service }) => {
            let groups = service.as_ref().map(|name| screen.service(name));
            let groups = groups.map(|it| it.is_some_and(|it| !it.groups.is_empty()));
            backends(screen, groups, rows.clone(), frame, room);
        }
    }
    if is_cut {
        marks(screen.count(), &rows, frame, area);
    }
}

/// A bar on the right that shows which part of the rows is in sight, with an arrow where there are more.
fn marks(count: usize, rows: &Range<usize>, frame: &mut Frame, area: Rect) {
    let height = usize::from(area.height.saturating_sub(1));
    if height == 0 || area.width == 0 {
        return;
    }
    let place = |row: usize| row * height / count;
    let (from, to) = (place(rows.start), place(rows.end).max(place(rows.start) + 1));
    let mark = |line: usize| match line {
        0 if rows.start > 0 => "▲",
        line if line + 1 == height && rows.end < count => "▼",
        line if (from..to).contains(&line) => "█",
        _ => "│",
    };
    let lines: Vec<Line> = (0..height).map(|line| Line::styled(mark(line), FAINT)).collect();
    let (x, y) = (area.x + area.width - 1, area.y + 1);
    frame.render_widget(Paragraph::new(lines), Rect { x, y, width: 1, height: area.height - 1 });
}

/// What is particular about a service: that it has been removed, limits that are reached, and shares.
pub fn notes(service: &ServiceStatus) -> Vec<String> {
    let full = trouble::is_full(service).then(|| "at its limit".to_owned());
    let maintenance = service.terms.iter().any(|term| term == "maintenance = true");
    let maintenance = maintenance.then(|| "maintenance".to_owned());
    let leaving = service.leaving.then(|| "leaving".to_owned());
    leaving.into_iter().chain(full).chain(maintenance).chain(trouble::shares(service)).collect()
}

const SERVICES: [Column; 11] = [
    name("service", 12, 12),
    text("users", 5),
    number("serving", 11, 8),
    number("failing", 4, 7),
    number("sessions", 10, 8),
    number("new/s", 9, 6),
    number("up/s", 7, 5),
    number("down/s", 7, 6),
    number("turned away", 3, 11),
    text("last 15 min", 8),
    name("notes", 8, 8),
];
/// The places of the columns that are shown only if there is something in them.
const CURVE: usize = 9;
const NOTES: usize = 10;
/// The columns of a curve in a row, and from which width of the table on there are more.
const CURVE_WIDTH: usize = 15;
const CURVE_WIDE: (u16, usize) = (110, 30);

fn services(screen: &Screen, rows: Range<usize>, frame: &mut Frame, area: Rect) {
    let in_sight = screen.service_rows().skip(rows.start).take(rows.len());
    let curve = if area.width < CURVE_WIDE.0 { CURVE_WIDTH } else { CURVE_WIDE.1 };
    let bars = |name: &str| Some(screen.past.of(name)?.bars(curve, 1).concat());
    let cells = in_sight.map(|(it, rates)| service(it, rates, bars(&it.name))).collect();
    let longest = |of: fn(&ServiceStatus) -> usize| {
        screen.service_rows().map(|(service, _)| of(service)).max().unwrap_or(0)
    };
    let noted = longest(|it| width(&notes(it).join(" ")));
    let longest = [(0, longest(|it| width(&it.name))), (NOTES, noted)];
    let hidden = [(NOTES, noted == 0), (CURVE, !screen.past.has_rows())];
    let mut columns = SERVICES;
    columns[CURVE] = text(curve_title(screen.past.field), 8);
    let table = table(&columns, cells, &longest, &hidden, area.width);
    show(table, screen, rows.start, frame, area);
    if screen.count() == 0 {
        told("No service matches the filter.", frame, area);
    }
}

/// What the curves in the rows are of, in no more columns than they take.
const fn curve_title(field: Field) -> &'static str {
    match field {
        Field::Sessions => "sessions 15min",
        Field::New => "new/s 15min",
        Field::Requests => "requests 15min",
        Field::Errors => "errors 15min",
        Field::Refused => "refused 15min",
        Field::BytesUp => "up/s 15min",
        Field::BytesDown => "down/s 15min",
        Field::P50 => "p50 15min",
        Field::P99 => "p99 15min",
    }
}

/// The contents of the columns of [`SERVICES`].
fn service(service: &ServiceStatus, rates: Rates, bars: Option<String>) -> Vec<Line<'static>> {
    let serving = match Trouble::of(service) {
        Trouble::Nobody => Color::Red,
        Trouble::Short => Color::Yellow,
        Trouble::Full | Trouble::None => Color::Reset,
    };
    let marked = |bad: bool| if bad { Color::Red } else { Color::Reset };
    let (failing, turned_away) = (trouble::failing(service), trouble::turned_away(service));
    vec![
        Line::from(service.name.clone()),
        Line::from(service.protocol.name()),
        Line::styled(trouble::serving(service), serving),
        Line::styled(grouped(failing), marked(failing > 0)),
        Line::styled(trouble::sessions(service), marked(trouble::is_full(service))),
        Line::from(rate(rates.new, brief::count)),
        Line::from(rate(rates.up, brief::bytes)),
        Line::from(rate(rates.down, brief::bytes)),
        Line::styled(grouped(turned_away), marked(turned_away > 0)),
        Line::from(bars.unwrap_or_default()),
        Line::from(notes(service).join(" ")),
    ]
}

const BACKENDS: [Column; 13] = [
    text("id", 17),
    name("service", 14, 8),
    name("name", 13, 10),
    // An IPv4 address with its port is always whole.
    name("address", 15, 21),
    text("state", 16),
    number("since", 8, 5),
    number("sessions", 11, 8),
    number("new/s", 10, 6),
    number("up/s", 7, 5),
    number("down/s", 7, 6),
    number("failed", 5, 6),
    number("hello", 4, 8),
    number("share", 3, 7),
];
/// The places of the columns that are shown only if they say something.
const SERVICE: usize = 1;
const NAME: usize = 2;

/// The backends of all services, or of one; then `groups` says whether it has any.
fn backends(
    screen: &Screen,
    groups: Option<bool>,
    rows: Range<usize>,
    frame: &mut Frame,
    area: Rect,
) {
    let in_sight = screen.rows().skip(rows.start).take(rows.len());
    let now_ms = screen.now.as_ref().map_or(0, |now| now.started_unix_ms + now.uptime_ms);
    let cells = in_sight.map(|row| backend(&row, groups.is_some(), now_ms)).collect();
    let longest = longest(screen, groups.is_some());
    let has_names = screen.rows().any(|row| row.backend.name.is_some());
    let hidden = [(SERVICE, groups == Some(false)), (NAME, !has_names)];
    let mut columns = BACKENDS;
    if groups.is_some() {
        columns[SERVICE] = name("group", 14, 6);
    }
    let table = table(&columns, cells, &longest, &hidden, area.width);
    show(table, screen, rows.start, frame, area);
    if screen.count() == 0 && screen.now.is_some() {
        let words = match screen.view().filter.is_empty() {
            true => "No backend is registered: users are turned away until one joins.",
            false => "No backend matches the filter.",
        };
        told(words, frame, area);
    }
}

/// How wide the columns are that would otherwise jump about while the list is scrolled.
fn longest(screen: &Screen, one: bool) -> [(usize, usize); 5] {
    let longest = |of: &dyn Fn(&BackendStatus) -> usize| {
        screen.rows().map(|row| of(row.backend)).max().unwrap_or(0)
    };
    [
        (0, longest(&|it| it.id.len())),
        (SERVICE, longest(&|it| membership_width(it, one))),
        (NAME, longest(&|it| it.name.as_ref().map_or(0, |name| width(name)))),
        // Fifteen digits and dots, a colon and a port; longer ones only where they are in sight.
        (3, longest(&|it| address_width(it))),
        (
            4,
            longest(&|it| {
                if it.state == BackendState::Draining { state(it, false).0.len() } else { 0 }
            }),
        ),
    ]
}

fn address_width(backend: &BackendStatus) -> usize {
    match backend.tls.is_some() || backend.http == Some(2) {
        true => address(backend).len(),
        false if backend.address.is_ipv4() => 0,
        false => 21,
    }
}

/// Where it is, and whether it is reached by TLS and speaks HTTP/2.
fn address(backend: &BackendStatus) -> String {
    let tls = if backend.tls.is_some() { " TLS" } else { "" };
    let http = if backend.http == Some(2) { " HTTP/2" } else { "" };
    format!("{}{tls}{http}", backend.address)
}

/// Whose users a backend gets: its service, which an older balancer does not say.
pub fn of(backend: &BackendStatus) -> &str {
    if backend.service.is_empty() { backend.protocol.name() } else { &backend.service }
}

/// The same with its group; `one`: all are of one service, so the group is enough.
fn belongs_to(backend: &BackendStatus, one: bool) -> String {
    let group = backend.group.as_deref();
    match (one, group) {
        (true, group) => group.unwrap_or_default().to_owned(),
        (false, Some(group)) => format!("{}/{group}", of(backend)),
        (false, None) => of(backend).to_owned(),
    }
}

/// The width of that, without making it.
fn membership_width(backend: &BackendStatus, one: bool) -> usize {
    let group = backend.group.as_deref().map(width);
    match one {
        true => group.unwrap_or(0),
        false => width(of(backend)) + group.map_or(0, |group| group + 1),
    }
}

/// A backend's state in words: for one that drains, with the time that its sessions still have.
fn state(backend: &BackendStatus, no_room: bool) -> (String, Color) {
    match backend.state {
        BackendState::Serving if no_room => ("no room".to_owned(), Color::Red),
        BackendState::Serving => ("serving".to_owned(), Color::Green),
        // Nothing is left on it, and it waits to be undrained.
        BackendState::Draining if backend.drain.empty => ("drained".to_owned(), Color::Yellow),
        state @ BackendState::Draining => {
            let left = backend.drains_in_ms.map(|ms| format!(" {}", brief::left(ms)));
            (format!("{}{}", state.name(), left.unwrap_or_default()), Color::Yellow)
        }
        state => (state.name().to_owned(), Color::Red),
    }
}

/// How long it has been in its state, and, if it does not keep to one, how often that has changed lately.
fn since(backend: &BackendStatus, now_ms: u64) -> Line<'static> {
    let Some(since) = backend.state_since_unix_ms else { return Line::from("-") };
    let lasted = brief::span(now_ms.saturating_sub(since));
    match backend.state_changes {
        0..RESTLESS => Line::from(lasted),
        changes => Line::styled(format!("{changes}x {lasted}"), Color::Red),
    }
}

/// A drain and its end, or a restart, are two changes. Whoever changes more often than that flaps.
const RESTLESS: u32 = 3;

/// The contents of the columns of [`BACKENDS`].
fn backend(row: &Row, one: bool, now_ms: u64) -> Vec<Line<'static>> {
    let (backend, rates) = (row.backend, row.change.rates);
    let (state, colour) = state(backend, row.change.no_room);
    let share = match backend.round {
        0 => "-".to_owned(),
        round => format!("{:.1} %", f64::from(backend.turns) * 100.0 / f64::from(round)),
    };
    let hello = match (backend.hello.misses, backend.hello.took_us) {
        (misses @ 1.., _) => Line::styled(format!("{misses} missed"), Color::Red),
        (0, Some(us)) => Line::from(brief::latency(us)),
        (0, None) => Line::from("-"),
    };
    let failed = if backend.failures() > 0 { Color::Red } else { Color::Reset };
    vec![
        Line::from(backend.id.clone()),
        Line::from(belongs_to(backend, one)),
        Line::from(shown(backend.name.as_deref().unwrap_or_default())),
        Line::from(address(backend)),
        Line::styled(state, colour),
        since(backend, now_ms),
        Line::from(grouped(backend.sessions_active)),
        Line::from(rate(rates.new, brief::count)),
        Line::from(rate(rates.up, brief::bytes)),
        Line::from(rate(rates.down, brief::bytes)),
        Line::styled(brief::count(backend.failures()), failed),
        hello,
        Line::from(share),
    ]
}

const SESSIONS: [Column; 8] = [
    text("session", 12),
    text("users", 4),
    name("client", 11, 21),
    text("backend", 10),
    number("age", 7, 5),
    number("idle", 6, 5),
    number("up", 5, 5),
    number("down", 5, 5),
];
/// The place of the column that is shown only for the sessions of a whole service.
const BACKEND: usize = 3;

fn sessions(screen: &Screen, rows: Range<usize>, frame: &mut Frame, area: Rect) {
    let cells = screen.sessions[rows.clone()].iter().map(session).collect();
    let of_service = matches!(screen.mode, Mode::Sessions { of: Of::Service(_) });
    let table = table(&SESSIONS, cells, &[], &[(BACKEND, !of_service)], area.width);
    show(table, screen, rows.start, frame, area);
}

/// The contents of the columns of [`SESSIONS`].
fn session(session: &SessionStatus) -> Vec<Line<'static>> {
    vec![
        Line::from(session.id.clone()),
        Line::from(session.spoken()),
        Line::from(session.client.to_string()),
        Line::from(session.backend.clone().unwrap_or_default()),
        Line::from(brief::span(session.age_ms)),
        Line::from(brief::span(session.idle_ms)),
        Line::from(brief::bytes(session.bytes_up)),
        Line::from(brief::bytes(session.bytes_down)),
    ]
}

/// Shows the rows from `first` on, faintly while they are out of date.
fn show(table: Table<'_>, screen: &Screen, first: usize, frame: &mut Frame, area: Rect) {
    let mut state = TableState::new().with_selected(screen.chosen.saturating_sub(first));
    let style = if screen.trouble.is_some() { FAINT } else { Style::new() };
    frame.render_stateful_widget(table.row_highlight_style(CHOSEN).style(style), area, &mut state);
}

/// A sentence in place of the rows.
fn told(words: &str, frame: &mut Frame, area: Rect) {
    let below = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
    let lines = super::wrapped(words, usize::from(area.width)).into_iter().map(Line::from);
    frame.render_widget(Paragraph::new(lines.collect::<Vec<_>>()), below);
}
