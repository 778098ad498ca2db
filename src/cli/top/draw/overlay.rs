//! What lies over the lists of `lb top`: the question before a drain, and the help.

use ratatui::Frame;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph};

use super::super::brief::{self, sessions};
use super::super::question::Question;
use super::super::screen::{Overlay, Screen};
use super::{BOLD, FAINT, centred, wrapped};
use crate::cli::table::lasting;
use crate::cli::text::{middled, shown};
use crate::cli::trouble;
use crate::control::status::{BackendState, BackendStatus};
use crate::control::view::ms;

/// The widest that a box becomes, so that its lines can be read.
const WIDTH_MAX: u16 = 66;
/// The box and a space on both sides.
const FRAME: u16 = 4;

/// The keys while it is there.
pub fn keys(overlay: &Overlay) -> Vec<&'static str> {
    match overlay {
        Overlay::Help { .. } => vec!["Esc back", "up and down scroll"],
        Overlay::Drain(_) => vec!["Enter drains", "Esc does not", "type another deadline"],
    }
}

/// Asks before a drain, and says what will happen.
pub fn question(screen: &Screen, question: &Question, frame: &mut Frame) {
    let Some(backend) = screen.backend(&question.backend) else { return };
    let width = frame.area().width.min(WIDTH_MAX);
    let room = usize::from(width.saturating_sub(FRAME)).max(1);
    let mut lines = vec![Line::styled(middled(&named(backend), room), BOLD)];
    let say = |text: String| wrapped(&text, room).into_iter().map(Line::from);
    lines.extend(say(consequences(question, backend, screen.is_old())));
    if let Some(warning) = warning(screen, backend) {
        let red = |line: String| Line::styled(line, Color::Red);
        lines.extend(wrapped(&warning, room).into_iter().map(red));
    }
    let typed = match question.untouched {
        true => {
            Span::styled(question.deadline.clone(), Style::new().add_modifier(Modifier::REVERSED))
        }
        false => Span::from(format!("{}_", question.deadline)),
    };
    let fault = question.fault.clone().map(|fault| format!("   {fault}")).unwrap_or_default();
    lines.push(Line::from(vec![
        Span::styled("deadline: ", BOLD),
        typed,
        Span::styled(fault, Color::Red),
    ]));
    lines.push(Line::styled("Enter drains, Esc does not; type another deadline", FAINT));
    boxed(" Drain ", width, lines, frame);
}

/// What is to be drained, so that nobody drains the neighbour.
fn named(backend: &BackendStatus) -> String {
    let service = super::lists::of(backend);
    let name = backend.name.as_deref().map(|name| format!(" {}", shown(name)));
    format!("{}{} ({service} {})", backend.id, name.unwrap_or_default(), backend.address)
}

fn consequences(question: &Question, backend: &BackendStatus, is_old: bool) -> String {
    let left = backend.drains_in_ms.map(|ms| format!(", for another {}", brief::left(ms)));
    let is_owners = backend.drain.by.as_deref() == Some("owner");
    let before = match backend.state {
        BackendState::Draining if is_owners => {
            format!("It drains at its own request{}. ", left.unwrap_or_default())
        }
        BackendState::Draining => format!("It drains already{}. ", left.unwrap_or_default()),
        _ => "It gets no new sessions from now on. ".to_owned(),
    };
    let count = backend.sessions_active;
    let cut = match question.lasts() {
        _ if count == 0 => "It has no session now.".to_owned(),
        Ok(Some(lasts)) if lasts.is_zero() => format!("Its {} are cut at once.", sessions(count)),
        Ok(Some(lasts)) => {
            let lasts = lasting(ms(lasts));
            format!("It has {}: what is left after {lasts} is cut.", sessions(count))
        }
        Ok(None) => format!("It has {}, which end by themselves.", sessions(count)),
        Err(_) => format!("It has {}.", sessions(count)),
    };
    let after = match (is_old, is_owners) {
        (true, _) => "It then leaves; this balancer is older and cannot take a drain back.",
        (_, true) => "It then leaves, unless it takes its drain back itself.",
        _ => "It stays registered, and u takes the drain back.",
    };
    format!("{before}{cut} {after}")
}

/// What nobody wants to learn from the users.
fn warning(screen: &Screen, backend: &BackendStatus) -> Option<String> {
    let service = screen.service(super::lists::of(backend))?;
    let is_last = backend.state == BackendState::Serving && trouble::serving_now(service) == 1;
    is_last
        .then(|| format!("Nobody else serves {}: its new users will be turned away.", service.name))
}

const KEYS: [(&str, &str); 21] = [
    ("up, down, k, j", "the row above or below"),
    ("PgUp, PgDn", "a page up or down"),
    ("Home, End", "the first or last row"),
    ("Enter", "a service's backends, their sessions"),
    ("Esc", "drops the filter, then goes back"),
    ("/", "only rows with some text in them"),
    ("s, r", "sort otherwise; turn the order round"),
    ("b", "backends of all services"),
    ("a", "sessions of the whole service"),
    ("d", "drain the backend, with a deadline"),
    ("u", "undrain: take a drain back"),
    ("h", "last 15 minutes; again: of all services"),
    ("v", "other curves: bytes, errors, p99 ..."),
    ("q, Ctrl-C", "quit"),
    ("", ""),
    ("K M G", "steps of 1024 for bytes, else of 1000"),
    ("new/s, up, down", "between the last two looks"),
    ("since", "in its state; 8x: changed 8x in 15 min"),
    ("share", "part of its service's new sessions"),
    ("failed", "failed connections, since the start"),
    ("hello", "how long its last answer took"),
];
/// What the left of these takes.
const KEY_WIDTH: usize = 16;

/// What the keys and columns mean, from line `first` on, which is brought back to what there is.
pub fn help(first: &mut usize, frame: &mut Frame) {
    let width = frame.area().width.min(WIDTH_MAX);
    let room = usize::from(width.saturating_sub(FRAME));
    let tall = usize::from(frame.area().height.saturating_sub(3)).max(1);
    *first = (*first).min(KEYS.len().saturating_sub(tall));
    let line = |(key, does): &(&str, &str)| {
        let does = crate::cli::text::headed(does, room.saturating_sub(KEY_WIDTH));
        Line::from(vec![Span::styled(format!("{key:KEY_WIDTH$}"), BOLD), Span::raw(does)])
    };
    let lines: Vec<Line> = KEYS.iter().skip(*first).take(tall).map(line).collect();
    let below = KEYS.len().saturating_sub(*first + tall);
    let title = match (*first, below) {
        (0, 0) => " Help ".to_owned(),
        (above, below) => format!(" Help: {above} above, {below} below "),
    };
    boxed(&title, width, lines, frame);
}

/// The lines in a box in the middle, above the keys.
fn boxed(title: &str, width: u16, lines: Vec<Line<'static>>, frame: &mut Frame) {
    let mut area = frame.area();
    area.height = area.height.saturating_sub(1);
    let height = u16::try_from(lines.len() + 2).unwrap_or(u16::MAX);
    let place = centred(area, width, height);
    let frame_of =
        Block::bordered().title(title.to_owned()).padding(ratatui::widgets::Padding::horizontal(1));
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(lines).block(frame_of), place);
}
