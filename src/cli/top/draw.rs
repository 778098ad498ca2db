//! How `lb top` looks: the parts of the screen, its head, its title and the keys. Owns colours and words; decides
//! nothing and only reads the screen's state. Only the rows in sight are drawn.

mod history;
mod lists;
mod overlay;

use std::ops::Range;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::brief;
use super::rows::{ApiRates, Rates};
use super::screen::{List, Mode, Of, Overlay, Screen};
use crate::cli::table::{grouped, lasting};
use crate::cli::text::{headed, middled, width};
use crate::cli::trouble;
use crate::cluster::Protocol;
use crate::control::status::{HandoverState, LastMinute, RunState, ServiceStatus, Status};

const FAINT: Style = Style::new().add_modifier(Modifier::DIM);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

/// Lines that a message may take. A sentence with its cure fits into them at 60 columns.
const MESSAGE_LINES_MAX: usize = 4;
/// The heights from which there is room for all of the head, and for all but its curve.
const TALLER: u16 = 20;
const TALLER_LINES: usize = 5;
const TALL: u16 = 14;
const TALL_LINES: usize = 4;
/// The height from which there is room for the most important part of it.
const MIDDLING: u16 = 7;

/// Draws everything.
pub fn screen(screen: &mut Screen, frame: &mut Frame) {
    let area = frame.area();
    let message = message(screen, usize::from(area.width));
    let mut head = head(screen, usize::from(area.width));
    let is_history = matches!(screen.mode, Mode::History { .. });
    head.truncate(match area.height {
        TALLER.. if is_history => TALL_LINES,
        TALLER.. => TALLER_LINES,
        TALL.. if !is_history => TALL_LINES,
        MIDDLING.. => 2,
        _ => 0,
    });
    let lines = |count: usize| Constraint::Length(u16::try_from(count).unwrap_or(u16::MAX));
    let parts = [lines(head.len()), lines(1), Constraint::Min(2), lines(message.len()), lines(1)];
    let [top, above, middle, said, bottom] = Layout::vertical(parts).areas(area);
    // The heading of a table takes a row.
    let rows = screen.window(usize::from(middle.height.saturating_sub(1)));
    let title = title(screen, &rows, usize::from(above.width));
    frame.render_widget(Paragraph::new(head), top);
    frame.render_widget(Paragraph::new(title), above);
    lists::draw(screen, rows, frame, middle);
    frame.render_widget(Paragraph::new(message), said);
    frame.render_widget(Paragraph::new(foot(screen, usize::from(bottom.width))), bottom);
    match &mut screen.overlay {
        None => {}
        Some(Overlay::Help { first }) => overlay::help(first, frame),
        Some(Overlay::Drain(question)) => {
            let question = question.clone();
            overlay::question(screen, &question, frame);
        }
    }
}

/// The certificate that ends first, if that is soon.
fn due_certificate(screen: &Screen) -> Option<String> {
    let all = screen.now.iter().flat_map(|now| &now.certificates);
    let first = all.filter(|it| it.is_due()).min_by_key(|it| it.days_left)?;
    Some(format!("certificate {} {}", first.name(), first.remaining()))
}

/// What was done or refused, a certificate to be renewed, or why the balancer is silent, in lines of its own: the keys stay in sight.
fn message(screen: &Screen, room: usize) -> Vec<Line<'static>> {
    let due = due_certificate(screen);
    let (said, colour) = match (&*screen.message, &screen.trouble) {
        ("", None) => match &due {
            Some(said) => (&**said, Color::Yellow),
            None => return Vec::new(),
        },
        ("", Some(said)) => (&**said, Color::Red),
        (said, _) => (said, Color::Yellow),
    };
    let mut lines = wrapped(said, room);
    if lines.len() > MESSAGE_LINES_MAX {
        let rest = lines.split_off(MESSAGE_LINES_MAX - 1).join(" ");
        lines.push(headed(&rest, room));
    }
    lines.into_iter().map(|line| Line::styled(line, colour)).collect()
}

/// The words in lines of at most `room` columns.
fn wrapped(text: &str, room: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if width(line) + 1 + width(word) <= room => *line = format!("{line} {word}"),
            _ => lines.push(headed(word, room)),
        }
    }
    lines
}

/// The first of these that fits, or the last without its end.
fn fitting(forms: &[String], room: usize) -> String {
    let found = forms.iter().find(|form| width(form) <= room);
    found.cloned().unwrap_or_else(|| headed(forms.last().map_or("", |it| it), room))
}

/// The balancer: its state, its users, its API door.
fn head(screen: &Screen, room: usize) -> Vec<Line<'static>> {
    let Some(now) = &screen.now else {
        let words = if screen.trouble.is_some() { "no balancer" } else { "looking ..." };
        return vec![Line::from(words.to_owned())];
    };
    let mut lines = vec![state(screen, now, room), Line::from(users(now, screen.totals(), room))];
    lines.extend(api(screen, now, room));
    lines.push(Line::from(latency(now, room)));
    lines.extend(history::overview(screen, room));
    lines
}

fn state(screen: &Screen, now: &Status, room: usize) -> Line<'static> {
    let name = Span::styled(format!("lb {} ", now.version), BOLD);
    if screen.trouble.is_some() {
        let silent = brief::span(u64::try_from(screen.silent.as_millis()).unwrap_or(u64::MAX));
        let words = format!("NOT ANSWERING for {silent}; this is how it was");
        return Line::from(vec![name, Span::styled(words, Color::Red)]);
    }
    let (word, colour) = match now.state {
        RunState::Serving => ("serving", Color::Green),
        RunState::Draining => ("draining", Color::Yellow),
        RunState::Stopping => ("stopping", Color::Red),
    };
    let left = now.stops_in_ms.map(|ms| format!(", {} left", brief::left(ms))).unwrap_or_default();
    let up = lasting(now.uptime_ms / 1000 * 1000);
    let refused = grouped(now.sessions.refused);
    let policy = now.policy.replace('_', " ");
    let upgrade = match now.handover.state {
        HandoverState::None if now.handover.failed.is_some() => ", UPGRADE FAILED (lb status)",
        HandoverState::None => "",
        HandoverState::Starting => ", upgrading",
        HandoverState::Lingering => ", succeeded",
    };
    let left = left + upgrade;
    let forms = [
        format!("{left}, up {up}, {policy}, {refused} turned away"),
        format!("{left}, up {up}, {refused} turned away"),
    ];
    let about = fitting(&forms, room.saturating_sub(name.width() + word.len()));
    Line::from(vec![name, Span::styled(word, colour), Span::raw(about)])
}

fn users(now: &Status, rates: Rates, room: usize) -> String {
    let totals = &now.sessions;
    let [new, up, down] = [
        rate(rates.new, brief::count),
        rate(rates.up, brief::bytes),
        rate(rates.down, brief::bytes),
    ];
    let of = |used: u64, limit: u64, shown: fn(u64) -> String, of: &str| match limit {
        // An older balancer has no limit of its own for UDP.
        0 => shown(used),
        _ => format!("{}{of}{}", shown(used), shown(limit)),
    };
    let streams = |shown, by| of(totals.streams(), totals.limit, shown, by);
    let udp = |shown, by| of(totals.udp_active, totals.udp_limit, shown, by);
    let long = format!(
        "sessions {}, udp {}, {new}/s new, {up}/s up, {down}/s down",
        streams(grouped, " of "),
        udp(grouped, " of ")
    );
    let short = format!(
        "sessions {}, udp {}, new {new}/s, up {up}, down {down}",
        streams(brief::count, "/"),
        udp(brief::count, "/")
    );
    fitting(&[long, short], room)
}

/// Requests and errors of the API door, if there is one.
fn api(screen: &Screen, now: &Status, room: usize) -> Option<Line<'static>> {
    let door = now.doors.api.or(now.doors.api_tls);
    if door.is_none() && super::rows::counted(now, "api_requests") == 0 {
        return None;
    }
    let rates = screen.api();
    let of = |pick: fn(ApiRates) -> u64| rate(rates.map(pick), brief::count);
    let [requests, refused, failed] =
        [of(|it| it.requests), of(|it| it.refused), of(|it| it.failed)];
    // An error is seen for a minute, in case nobody looks in the second in which it happens.
    let minute = now.last_minute.get(&Protocol::Api).and_then(|it| it.errors);
    let recent = minute.map(|errors| format!(", {} in the last minute", grouped(errors)));
    let recent = recent.unwrap_or_default();
    let is_bad = minute.is_some_and(|errors| errors > 0) || rates.is_some_and(|it| it.failed > 0);
    let marked = if is_bad { Style::new().fg(Color::Red) } else { Style::new() };
    let forms = [
        format!("api {requests} requests/s, {refused}/s refused, errors {failed}/s{recent}"),
        format!("api {requests}/s, {refused}/s refused, errors {failed}/s{recent}"),
        format!("api {requests}/s, {refused}/s refused, errors {failed}/s"),
    ];
    Some(Line::styled(fitting(&forms, room), marked))
}

/// How long users wait for the first byte, by protocol: lately, because the past hides what is wrong now.
fn latency(now: &Status, room: usize) -> String {
    let at = |us: Option<u64>| us.map_or("over 60s".to_owned(), brief::latency);
    let times = |count: u64, p50: Option<u64>, p99: Option<u64>| match count {
        0 => "-".to_owned(),
        _ => format!("{}/{}", at(p50), at(p99)),
    };
    if now.last_minute.is_empty() {
        let it = &now.timings.first_byte;
        let all = times(it.count, it.p50_us, it.p99_us);
        return fitting(&[format!("first byte p50/p99, since the start: {all}")], room);
    }
    let of = |(protocol, minute): (&Protocol, &LastMinute)| {
        let LastMinute { first_byte: it, .. } = minute;
        format!("{protocol} {}", times(it.count, it.p50_us, it.p99_us))
    };
    let all = now.last_minute.iter().map(of).collect::<Vec<_>>().join(", ");
    fitting(
        &[
            format!("first byte p50/p99, last minute: {all}"),
            format!("p50/p99, last min: {all}"),
            format!("p50/p99: {all}"),
        ],
        room,
    )
}

fn rate(rate: Option<u64>, how: fn(u64) -> String) -> String {
    rate.map_or("-".to_owned(), how)
}

/// Which rows are in sight of how many, what they are of, and the filter that they have passed.
fn title(screen: &Screen, rows: &Range<usize>, room: usize) -> Line<'static> {
    let Some(now) = &screen.now else { return Line::default() };
    let count = screen.count();
    let place = |what: &str| match (rows.len() < count, count) {
        (true, _) => format!("{}-{} of {} {what}", rows.start + 1, rows.end, grouped(count as u64)),
        (false, 1) => format!("1 {what}"),
        (false, _) => format!("{} {what}s", grouped(count as u64)),
    };
    let many =
        |what: &str| if rows.len() < count { place(&format!("{what}s")) } else { place(what) };
    // What is said about it is to be seen as well.
    let short = |name: &str| middled(name, (room / 3).max(16));
    let (what, about) = match (&screen.mode, &screen.list) {
        (Mode::Sessions { of }, _) => {
            let more = if screen.more { ", and more" } else { "" };
            (many("session"), format!(" of {}{more}", short(of.name())))
        }
        (Mode::History { service }, _) => {
            let of = service.as_deref().map_or("all services".to_owned(), short);
            ("the last 15 minutes".to_owned(), format!(" of {of}"))
        }
        (_, List::Services) => (many("service"), format!(": {}", trouble::summary(now))),
        (_, List::Backends { service: Some(name) }) => {
            let about = screen.service(name).map(about).unwrap_or_default();
            (many("backend"), format!(" of {}{about}", short(name)))
        }
        (_, List::Backends { service: None }) => (many("backend"), String::new()),
    };
    let filter = match screen.mode {
        Mode::Sessions { .. } | Mode::History { .. } => "",
        _ => screen.view().filter.as_str(),
    };
    if filter.is_empty() {
        return Line::styled(headed(&format!("{what}{about}"), room), BOLD);
    }
    let filter = Span::styled(format!("filter \"{}\"", middled(filter, room / 3)), FILTER);
    let rest = headed(&format!(" {what}{about}"), room.saturating_sub(filter.width()));
    Line::from(vec![filter, Span::styled(rest, BOLD)])
}

/// An active filter is easily forgotten, and then a row is missed that is only hidden.
const FILTER: Style = Style::new().fg(Color::Yellow).add_modifier(Modifier::REVERSED);

/// One service in words.
fn about(service: &ServiceStatus) -> String {
    let serving = format!(", {} serving", trouble::serving(service));
    let sessions = format!(", sessions {}", trouble::sessions(service));
    let notes: String = lists::notes(service).iter().map(|note| format!(", {note}")).collect();
    format!("{serving}{sessions}{notes}")
}

/// The keys, always.
fn foot(screen: &Screen, room: usize) -> Line<'static> {
    if let Some(overlay) = &screen.overlay {
        return Line::styled(joined(&overlay::keys(overlay), room), FAINT);
    }
    if screen.mode == Mode::Filter {
        let keys = "   Enter keeps it, Esc drops it";
        let typed = middled(&screen.view().filter, room.saturating_sub(9 + keys.len()).max(8));
        return Line::from(format!("filter: {typed}_{keys}"));
    }
    let view = screen.view();
    let way = if view.reversed { ", reversed" } else { "" };
    let sort = format!("s sort ({}{way})", view.order.name());
    let (sort, named) = (sort.as_str(), screen.has_named_services());
    // Those that matter most come first: what does not fit is left out, and `?` has them all.
    let mut keys = vec!["q quit", "? help"];
    if !view.filter.is_empty() && screen.mode == Mode::List {
        keys.push("Esc drops the filter");
    } else if named && screen.mode == Mode::List && screen.list != List::Services {
        keys.push("Esc services");
    }
    keys.extend(match (&screen.mode, &screen.list) {
        (Mode::Sessions { of: Of::Service(_) }, _) => vec!["Esc backends"],
        (Mode::Sessions { .. }, _) => vec!["Esc backends", "d drain", "u undrain"],
        (Mode::History { service: Some(_) }, _) => vec!["Esc back", "h all services"],
        (Mode::History { service: None }, _) => vec!["Esc back"],
        (_, List::Services) => {
            vec!["/ filter", "Enter backends", "h history", sort, "b all backends", "v other curve"]
        }
        (_, List::Backends { .. }) => {
            vec!["/ filter", "d drain", "u undrain", "Enter sessions", "h history", sort]
        }
    });
    if matches!(screen.list, List::Backends { service: Some(_) }) && screen.mode == Mode::List {
        keys.push("a all sessions");
    }
    Line::styled(joined(&keys, room), FAINT)
}

/// As many of the keys as fit into one line.
fn joined(keys: &[&str], room: usize) -> String {
    let length = |gap: usize| keys.iter().map(|key| key.len() + gap).sum::<usize>() - gap;
    let gap = if length(3) <= room { "   " } else { "  " };
    let mut line = String::new();
    for key in keys {
        let before = if line.is_empty() { "" } else { gap };
        if line.len() + before.len() + key.len() <= room {
            line = line + before + key;
        }
    }
    line
}

/// Where a box of this size stands in the middle.
fn centred(area: Rect, width: u16, height: u16) -> Rect {
    let (width, height) = (area.width.min(width), area.height.min(height));
    let (x, y) = (area.x + (area.width - width) / 2, area.y + (area.height - height) / 2);
    Rect { x, y, width, height }
}

#[cfg(test)]
mod tests;
