//! How `lb top` looks. Owns columns, colours and words; decides nothing and only reads the screen's state.
//! Only the rows in sight are drawn.

use std::ops::Range;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Table, TableState, Wrap};

use super::columns::{Column, name, number, table, text};
use super::rows::Rates;
use super::screen::{List, Mode, Of, Row, Screen};
use crate::cli::table::{grouped, lasting, middled, sized};
use crate::cli::trouble::{self, Trouble};
use crate::control::status::{
    BackendState, BackendStatus, RunState, ServiceStatus, SessionStatus, Status,
};

const FAINT: Style = Style::new().add_modifier(Modifier::DIM);
const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);

/// Draws everything.
pub fn screen(screen: &mut Screen, frame: &mut Frame) {
    let parts = [Constraint::Length(3), Constraint::Min(3), Constraint::Length(1)];
    let [top, middle, bottom] = Layout::vertical(parts).areas(frame.area());
    // The heading of a table takes a row.
    let rows = screen.window(usize::from(middle.height.saturating_sub(1)));
    let mut head = head(screen);
    head.push(title(screen, &rows, usize::from(top.width)));
    frame.render_widget(Paragraph::new(head), top);
    match (&screen.mode, &screen.list) {
        (Mode::Sessions { .. }, _) => sessions(screen, rows, frame, middle),
        (_, List::Services) => services(screen, rows, frame, middle),
        (_, List::Backends { service }) => {
            let groups = service.as_ref().map(|name| screen.service(name));
            let groups = groups.map(|it| it.is_some_and(|it| !it.groups.is_empty()));
            backends(screen, groups, rows, frame, middle);
        }
    }
    frame.render_widget(Paragraph::new(foot(screen, usize::from(bottom.width))), bottom);
    if let Mode::Confirm { backend } = &screen.mode {
        confirm(screen, backend, frame);
    }
}

/// The balancer, in two lines.
fn head(screen: &Screen) -> Vec<Line<'static>> {
    let Some(now) = &screen.now else {
        let words = if screen.stale { "no balancer" } else { "looking ..." };
        return vec![Line::from(words.to_owned())];
    };
    let (word, colour) = match now.state {
        RunState::Serving => ("serving", Color::Green),
        RunState::Draining => ("draining", Color::Yellow),
        RunState::Stopping => ("stopping", Color::Red),
    };
    let left = now.stops_in_ms.map(|ms| format!(", {} left", lasting(ms))).unwrap_or_default();
    let up = lasting(now.uptime_ms / 1000 * 1000);
    let refused = grouped(now.sessions.refused);
    let about = format!("{left}, up {up}, {}, {refused} turned away", now.policy.replace('_', " "));
    vec![
        Line::from(vec![
            Span::styled(format!("lb {} ", now.version), Modifier::BOLD),
            Span::styled(word, colour),
            Span::raw(about),
            Span::styled(if screen.stale { "  NOT ANSWERING" } else { "" }, Color::Red),
        ]),
        Line::from(users(now, screen.totals())),
    ]
}

fn users(now: &Status, rates: Rates) -> String {
    let totals = &now.sessions;
    format!(
        "sessions {} of {}, udp {} of {}, {} new, {} up, {} down",
        grouped(totals.streams()),
        grouped(totals.limit),
        grouped(totals.udp_active),
        grouped(totals.udp_limit),
        per_second(rates.new, grouped),
        per_second(rates.up, sized),
        per_second(rates.down, sized),
    )
}

fn per_second(rate: Option<u64>, how: fn(u64) -> String) -> String {
    rate.map_or("-".to_owned(), |rate| how(rate) + "/s")
}

/// Which rows are in sight of how many, and what they are of. Says nothing where all of a balancer without
/// named services is in sight.
fn title(screen: &Screen, rows: &Range<usize>, width: usize) -> Line<'static> {
    let Some(now) = &screen.now else { return Line::default() };
    let count = screen.count();
    let place = |what: &str| match (rows.len() < count, count) {
        (true, _) => format!("{}-{} of {} {what}", rows.start + 1, rows.end, grouped(count as u64)),
        (false, _) => format!("{} {what}", grouped(count as u64)),
    };
    // What is said about it is to be seen as well.
    let short = |name: &str| middled(name, (width / 3).max(16));
    let (what, about) = match (&screen.mode, &screen.list) {
        (Mode::Sessions { of }, _) => {
            let more = if screen.more { ", and more" } else { "" };
            (place("sessions"), format!(" of {}{more}", short(of.name())))
        }
        (_, List::Services) => (place("services"), format!(": {}", trouble::summary(now))),
        (_, List::Backends { service: Some(name) }) => {
            let about = screen.service(name).map(about).unwrap_or_default();
            (place("backends"), format!(" of {}{about}", short(name)))
        }
        (_, List::Backends { service: None }) => (place("backends"), String::new()),
    };
    let filter = &screen.view().filter;
    let is_filtered = !filter.is_empty() && !matches!(screen.mode, Mode::Sessions { .. });
    let of_all = matches!(screen.list, List::Backends { service: None });
    let is_plain = of_all && matches!(screen.mode, Mode::List | Mode::Confirm { .. });
    if is_plain && !is_filtered && rows.len() == count && !screen.has_named_services() {
        return Line::default();
    }
    let with = if is_filtered { format!(" with \"{filter}\"") } else { String::new() };
    Line::styled(format!("{what}{with}{about}"), Modifier::BOLD)
}

/// One service in words.
fn about(service: &ServiceStatus) -> String {
    let serving = format!(", {} serving", trouble::serving(service));
    let sessions = format!(", sessions {}", trouble::sessions(service));
    let notes: String = notes(service).iter().map(|note| format!(", {note}")).collect();
    format!("{serving}{sessions}{notes}")
}

/// What is particular about a service: that it has been removed, limits that are reached, and shares.
fn notes(service: &ServiceStatus) -> Vec<String> {
    let full = trouble::is_full(service).then(|| "at its limit".to_owned());
    let maintenance = service.terms.iter().any(|term| term == "maintenance = true");
    let maintenance = maintenance.then(|| "maintenance".to_owned());
    let leaving = service.leaving.then(|| "leaving".to_owned());
    leaving.into_iter().chain(full).chain(maintenance).chain(trouble::shares(service)).collect()
}

const SERVICES: [Column; 10] = [
    name("service", 12),
    text("users", 9),
    number("serving", 11, 8),
    number("failing", 10, 7),
    number("sessions", 10, 9),
    number("new/s", 8, 8),
    number("up/s", 4, 10),
    number("down/s", 4, 10),
    number("turned away", 5, 11),
    name("notes", 7),
];

fn services(screen: &Screen, rows: Range<usize>, frame: &mut Frame, area: Rect) {
    let in_sight = screen.service_rows().skip(rows.start).take(rows.len());
    let cells = in_sight.map(|(it, rates)| service(it, rates)).collect();
    let longest = screen.service_rows().map(|(service, _)| service.name.chars().count()).max();
    let longest = [(0, longest.unwrap_or(0))];
    let table = table(&SERVICES, cells, &longest, &[], area.width);
    show(table, screen.chosen - rows.start, frame, area);
    if screen.count() == 0 {
        told("No service matches the filter.", frame, area);
    }
}

/// The contents of the columns of [`SERVICES`].
fn service(service: &ServiceStatus, rates: Rates) -> Vec<Line<'static>> {
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
        Line::from(rates.new.map_or("-".to_owned(), grouped)),
        Line::from(rates.up.map_or("-".to_owned(), sized)),
        Line::from(rates.down.map_or("-".to_owned(), sized)),
        Line::styled(grouped(turned_away), marked(turned_away > 0)),
        Line::from(notes(service).join(" ")),
    ]
}

const BACKENDS: [Column; 13] = [
    text("id", 12),
    name("service", 8),
    text("users", 6),
    text("address", 11),
    name("name", 3),
    text("state", 9),
    number("share", 2, 9),
    number("sessions", 10, 9),
    number("new/s", 5, 9),
    number("up/s", 4, 9),
    number("down/s", 4, 9),
    number("hello", 1, 9),
    number("failed", 7, 9),
];
/// The place of the column that is shown only if there are named services.
const SERVICE: usize = 1;

/// The backends of all services, or of one; then `groups` says whether it has any.
fn backends(
    screen: &Screen,
    groups: Option<bool>,
    rows: Range<usize>,
    frame: &mut Frame,
    area: Rect,
) {
    let in_sight = screen.rows().skip(rows.start).take(rows.len());
    let cells = in_sight.map(|row| backend(&row, groups.is_some())).collect();
    let named = groups.unwrap_or_else(|| screen.has_named_services());
    let hidden: &[usize] = if named { &[] } else { &[SERVICE] };
    let mut columns = BACKENDS;
    if groups.is_some() {
        columns[SERVICE] = name("group", 8);
    }
    let table = table(&columns, cells, &longest(screen, groups.is_some()), hidden, area.width);
    show(table, screen.chosen - rows.start, frame, area);
    if screen.count() == 0 && screen.now.is_some() {
        let words = match screen.view().filter.is_empty() {
            true => "No backend is registered: users are turned away until one joins.",
            false => "No backend matches the filter.",
        };
        told(words, frame, area);
    }
}

/// How wide the columns are that would otherwise jump about while the list is scrolled.
fn longest(screen: &Screen, one: bool) -> [(usize, usize); 4] {
    let longest = |of: fn(&BackendStatus) -> usize| {
        screen.rows().map(|row| of(row.backend)).max().unwrap_or(0)
    };
    let group = |it: &BackendStatus| it.group.as_ref().map_or(0, String::len);
    let membership = |it: &BackendStatus| {
        it.service.len() + it.group.as_ref().map_or(0, |group| group.len() + 1)
    };
    [
        (0, longest(|it| it.id.len())),
        (SERVICE, longest(if one { group } else { membership })),
        // Fifteen digits and dots, a colon and a port; longer ones only where they are in sight.
        (3, longest(|it| if it.address.is_ipv4() { 0 } else { 21 })),
        (4, longest(|it| it.name.as_ref().map_or(0, |name| name.chars().count()))),
    ]
}

/// The contents of the columns of [`BACKENDS`]. `one`: all are of one service, so the group is enough.
fn backend(row: &Row, one: bool) -> Vec<Line<'static>> {
    let (backend, rates) = (row.backend, row.change.rates);
    let (state, colour) = match backend.state {
        BackendState::Serving if row.change.no_room => ("no room", Color::Red),
        BackendState::Serving => ("serving", Color::Green),
        state @ BackendState::Draining => (state.name(), Color::Yellow),
        state => (state.name(), Color::Red),
    };
    let share = match backend.round {
        0 => "-".to_owned(),
        round => format!("{:.1} %", f64::from(backend.turns) * 100.0 / f64::from(round)),
    };
    let hello = match (backend.hello.misses, backend.hello.took_us) {
        (1.., _) => Line::styled(format!("{} missed", backend.hello.misses), Color::Red),
        (0, Some(us)) if us < 10_000 => Line::from(format!("{us} us")),
        (0, Some(us)) => Line::from(format!("{} ms", us / 1000)),
        (0, None) => Line::from("-"),
    };
    let failed = if backend.failures() > 0 { Color::Red } else { Color::Reset };
    let group = backend.group.clone().unwrap_or_default();
    vec![
        Line::from(backend.id.clone()),
        Line::from(if one { group } else { backend.membership() }),
        Line::from(backend.protocol.name()),
        Line::from(backend.address.to_string()),
        Line::from(backend.name.clone().unwrap_or_default()),
        Line::styled(state, colour),
        Line::from(share),
        Line::from(grouped(backend.sessions_active)),
        Line::from(rates.new.map_or("-".to_owned(), grouped)),
        Line::from(rates.up.map_or("-".to_owned(), sized)),
        Line::from(rates.down.map_or("-".to_owned(), sized)),
        hello,
        Line::styled(grouped(backend.failures()), failed),
    ]
}

const SESSIONS: [Column; 8] = [
    text("session", 9),
    text("users", 4),
    text("client", 10),
    text("backend", 3),
    number("age", 7, 9),
    number("idle", 6, 9),
    number("up", 5, 9),
    number("down", 5, 9),
];
/// The place of the column that is shown only for the sessions of a whole service.
const BACKEND: usize = 3;

fn sessions(screen: &Screen, rows: Range<usize>, frame: &mut Frame, area: Rect) {
    let cells = screen.sessions[rows.clone()].iter().map(session).collect();
    let of_service = matches!(screen.mode, Mode::Sessions { of: Of::Service(_) });
    let hidden: &[usize] = if of_service { &[] } else { &[BACKEND] };
    let table = table(&SESSIONS, cells, &[], hidden, area.width);
    show(table, screen.chosen - rows.start, frame, area);
}

/// The contents of the columns of [`SESSIONS`].
fn session(session: &SessionStatus) -> Vec<Line<'static>> {
    vec![
        Line::from(session.id.clone()),
        Line::from(session.protocol.name()),
        Line::from(session.client.to_string()),
        Line::from(session.backend.clone().unwrap_or_default()),
        Line::from(lasting(session.age_ms)),
        Line::from(lasting(session.idle_ms)),
        Line::from(sized(session.bytes_up)),
        Line::from(sized(session.bytes_down)),
    ]
}

fn show(table: Table<'_>, chosen: usize, frame: &mut Frame, area: Rect) {
    let mut state = TableState::new().with_selected(chosen);
    frame.render_stateful_widget(table.row_highlight_style(CHOSEN), area, &mut state);
}

/// A sentence in place of the rows.
fn told(words: &str, frame: &mut Frame, area: Rect) {
    let below = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
    frame.render_widget(Paragraph::new(words), below);
}

fn foot(screen: &Screen, width: usize) -> Line<'static> {
    if screen.mode == Mode::Filter {
        let filter = &screen.view().filter;
        return Line::from(format!("filter: {filter}_   Enter keeps it, Esc drops it"));
    }
    if !screen.message.is_empty() {
        return Line::styled(screen.message.clone(), Color::Yellow);
    }
    let view = screen.view();
    let way = if view.reversed { ", reversed" } else { "" };
    let sort = format!("s sort ({}{way})", view.order.name());
    let (sort, named) = (sort.as_str(), screen.has_named_services());
    // Those that matter most come first: what does not fit is left out.
    let keys = match (&screen.mode, &screen.list) {
        (Mode::Sessions { of: Of::Service(_) }, _) => vec!["q quit", "Esc backends"],
        (Mode::Sessions { .. }, _) => vec!["q quit", "Esc backends", "d drain"],
        (_, List::Services) => {
            vec!["q quit", "/ filter", sort, "Enter backends", "b all backends", "r reverse"]
        }
        (_, List::Backends { service }) => {
            let mut keys =
                vec!["q quit", "/ filter", sort, "r reverse", "Enter sessions", "d drain"];
            if named {
                keys.insert(1, "Esc services");
            }
            keys.extend(service.as_ref().map(|_| "u all sessions"));
            keys
        }
    };
    Line::styled(joined(&keys, width), FAINT)
}

/// As many of the keys as fit into one line.
fn joined(keys: &[&str], width: usize) -> String {
    let length = |gap: usize| keys.iter().map(|key| key.len() + gap).sum::<usize>() - gap;
    let gap = if length(3) <= width { "   " } else { "  " };
    let mut line = String::new();
    for key in keys {
        let before = if line.is_empty() { "" } else { gap };
        if line.len() + before.len() + key.len() <= width {
            line = line + before + key;
        }
    }
    line
}

/// Whose users a backend gets: its service, which an older balancer does not say.
fn of(backend: &BackendStatus) -> &str {
    if backend.service.is_empty() { backend.protocol.name() } else { &backend.service }
}

fn confirm(screen: &Screen, backend: &str, frame: &mut Frame) {
    let found = screen.rows().find(|row| row.backend.id == backend);
    let about = found.map_or(String::new(), |row| {
        format!(
            " ({} {}, {} sessions)",
            of(row.backend),
            row.backend.address,
            grouped(row.backend.sessions_active)
        )
    });
    let area = frame.area();
    let (width, height) = (area.width.min(64), area.height.min(6));
    let place = Rect {
        x: area.x + (area.width - width) / 2,
        y: area.y + (area.height - height) / 2,
        width,
        height,
    };
    let words = format!(
        "Drain {backend}{about}? It gets no new sessions and leaves when those that it has have \
         ended. y drains it, any other key does not."
    );
    frame.render_widget(Clear, place);
    let question = Paragraph::new(words).wrap(Wrap { trim: true });
    frame.render_widget(question.block(Block::bordered().title(" Drain ")), place);
}

#[cfg(test)]
mod tests;
