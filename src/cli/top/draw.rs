//! How `lb top` looks. Owns columns and colours; decides nothing and only reads the screen's state.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Row as Cells, Table, TableState, Wrap};

use super::screen::{Mode, Rates, Row, Screen};
use crate::cli::table::{grouped, lasting, sized};
use crate::control::status::{BackendState, BackendStatus, RunState, SessionStatus, Status};

const FAINT: Style = Style::new().add_modifier(Modifier::DIM);
const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);

/// Draws everything.
pub fn screen(screen: &Screen, frame: &mut Frame) {
    let rows = [Constraint::Length(3), Constraint::Min(3), Constraint::Length(1)];
    let [top, middle, bottom] = Layout::vertical(rows).areas(frame.area());
    frame.render_widget(Paragraph::new(head(screen)), top);
    match &screen.mode {
        Mode::Sessions { backend } => sessions(screen, backend, frame, middle),
        _ => backends(screen, frame, middle),
    }
    frame.render_widget(Paragraph::new(foot(screen)), bottom);
    if let Mode::Confirm { backend } = &screen.mode {
        confirm(screen, backend, frame);
    }
}

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
    let about = format!("{left}, up {up}, {}", now.policy.replace('_', " "));
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
        "sessions {} of {}, {} new, {} up, {} down, {} turned away",
        grouped(totals.active),
        grouped(totals.limit),
        per_second(rates.new, grouped),
        per_second(rates.up, sized),
        per_second(rates.down, sized),
        grouped(totals.refused),
    )
}

fn per_second(rate: Option<u64>, how: fn(u64) -> String) -> String {
    rate.map_or("-".to_owned(), |rate| how(rate) + "/s")
}

/// A column of the backends. In a terminal that is too narrow, the columns of lowest rank go first.
struct Column {
    title: &'static str,
    rank: u8,
    number: bool,
}

const fn column(title: &'static str, rank: u8, number: bool) -> Column {
    Column { title, rank, number }
}

const BACKENDS: [Column; 13] = [
    column("id", 12, false),
    column("service", 8, false),
    column("users", 6, false),
    column("address", 11, false),
    column("name", 3, false),
    column("state", 9, false),
    column("share", 2, true),
    column("sessions", 10, true),
    column("new/s", 5, true),
    column("up/s", 4, true),
    column("down/s", 4, true),
    column("hello", 1, true),
    column("failed", 7, true),
];
/// The place of the column that is shown only if there are named services.
const SERVICE: usize = 1;

/// Which columns fit into `room` with a space between each two, by their places, and their widths.
fn fitting(widths: [u16; BACKENDS.len()], named: bool, room: u16) -> Vec<(usize, u16)> {
    let mut shown: Vec<(usize, u16)> = widths.into_iter().enumerate().collect();
    shown.retain(|(place, _)| named || *place != SERVICE);
    let taken = |shown: &[(usize, u16)]| -> u16 { shown.iter().map(|(_, width)| width + 1).sum() };
    while shown.len() > 1 && taken(&shown) > room + 1 {
        let least = shown.iter().map(|(place, _)| BACKENDS[*place].rank).min();
        shown.retain(|(place, _)| Some(BACKENDS[*place].rank) != least);
    }
    shown
}

fn backends(screen: &Screen, frame: &mut Frame, area: Rect) {
    let rows = screen.rows();
    let cells: Vec<_> = rows.iter().map(backend).collect();
    let widths = std::array::from_fn(|place| {
        let title = Line::from(BACKENDS[place].title).width();
        let widest = cells.iter().map(|row: &[Line; BACKENDS.len()]| row[place].width()).max();
        // A name may be as long as 64 letters; rates change, and columns that jump about are hard
        // to read.
        let (least, most) = if BACKENDS[place].number { (9, 16) } else { (title, 46) };
        u16::try_from(widest.unwrap_or(0).max(title).clamp(least, most)).unwrap_or(u16::MAX)
    });
    let named = screen.now.as_ref().is_some_and(Status::has_named_services);
    let shown = fitting(widths, named, area.width);
    let pick = |row: [Line<'static>; BACKENDS.len()]| {
        Cells::new(shown.iter().map(|(place, _)| row[*place].clone()).collect::<Vec<_>>())
    };
    let titles = BACKENDS.map(|column| {
        let side = if column.number { Alignment::Right } else { Alignment::Left };
        Line::from(column.title).alignment(side)
    });
    let widths = shown.iter().map(|(_, width)| Constraint::Length(*width));
    let table = Table::new(cells.into_iter().map(pick), widths)
        .header(pick(titles).style(FAINT))
        .row_highlight_style(CHOSEN);
    let mut state = TableState::new().with_selected((!rows.is_empty()).then_some(screen.chosen));
    frame.render_stateful_widget(table, area, &mut state);
    if rows.is_empty() && screen.now.is_some() {
        let words = match screen.filter.is_empty() {
            true => "No backend is registered: users are turned away until one joins.",
            false => "No backend matches the filter.",
        };
        let below = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
        frame.render_widget(Paragraph::new(words), below);
    }
}

/// Headings; those from `numbers` on are above numbers.
fn header(titles: &[&'static str], numbers: usize) -> Cells<'static> {
    let cell = |(place, title): (usize, &&'static str)| {
        let side = if place < numbers { Alignment::Left } else { Alignment::Right };
        Line::from(*title).alignment(side)
    };
    Cells::new(titles.iter().enumerate().map(cell).collect::<Vec<_>>()).style(FAINT)
}

/// The contents of the columns of [`BACKENDS`].
fn backend(row: &Row) -> [Line<'static>; BACKENDS.len()] {
    let backend = &row.backend;
    let (state, colour) = match backend.state {
        BackendState::Serving if row.no_room => ("no room", Color::Red),
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
    let failed = if backend.connects_failed > 0 { Color::Red } else { Color::Reset };
    let number = |text: String| Line::from(text).right_aligned();
    [
        Line::from(backend.id.clone()),
        Line::from(backend.membership()),
        Line::from(backend.protocol.name()),
        Line::from(backend.address.to_string()),
        Line::from(backend.name.clone().unwrap_or_default()),
        Line::styled(state, colour),
        number(share),
        number(grouped(backend.sessions_active)),
        number(row.rates.new.map_or("-".to_owned(), grouped)),
        number(row.rates.up.map_or("-".to_owned(), sized)),
        number(row.rates.down.map_or("-".to_owned(), sized)),
        hello.right_aligned(),
        Line::styled(grouped(backend.connects_failed), failed).right_aligned(),
    ]
}

fn sessions(screen: &Screen, backend: &str, frame: &mut Frame, area: Rect) {
    let count = screen.sessions.len();
    let more = if screen.more { " and more" } else { "" };
    let rows = [Constraint::Length(1), Constraint::Min(1)];
    let [title, body] = Layout::vertical(rows).areas(area);
    let words = format!("sessions of {backend}: {count}{more}");
    frame.render_widget(Paragraph::new(words).style(Modifier::BOLD), title);
    let titles = ["session", "users", "client", "age", "idle", "up", "down"];
    let widths = [18, 5, 46, 13, 13, 11, 11].map(Constraint::Length);
    let table = Table::new(screen.sessions.iter().map(session), widths)
        .header(header(&titles, 3))
        .row_highlight_style(CHOSEN);
    let mut state = TableState::new().with_selected((count > 0).then_some(screen.chosen));
    frame.render_stateful_widget(table, body, &mut state);
}

fn session(session: &SessionStatus) -> Cells<'static> {
    let number = |text: String| Line::from(text).right_aligned();
    Cells::new(vec![
        Line::from(session.id.clone()),
        Line::from(session.protocol.name()),
        Line::from(session.client.to_string()),
        number(lasting(session.age_ms)),
        number(lasting(session.idle_ms)),
        number(sized(session.bytes_up)),
        number(sized(session.bytes_down)),
    ])
}

fn foot(screen: &Screen) -> Line<'static> {
    if screen.mode == Mode::Filter {
        return Line::from(format!("filter: {}_   Enter keeps it, Esc drops it", screen.filter));
    }
    if !screen.message.is_empty() {
        return Line::styled(screen.message.clone(), Color::Yellow);
    }
    let keys = match &screen.mode {
        Mode::Sessions { .. } => "Esc backends   d drain   q quit".to_owned(),
        _ => {
            let way = if screen.reversed { ", reversed" } else { "" };
            let order = screen.order.name();
            let filter = match screen.filter.is_empty() {
                true => String::new(),
                false => format!("   showing \"{}\"", screen.filter),
            };
            format!(
                "q quit   / filter   s sort ({order}{way})   r reverse   Enter sessions   d drain{filter}"
            )
        }
    };
    Line::styled(keys, FAINT)
}

/// Whose users a backend gets: its service, which an older balancer does not say.
fn of(backend: &BackendStatus) -> &str {
    if backend.service.is_empty() { backend.protocol.name() } else { &backend.service }
}

fn confirm(screen: &Screen, backend: &str, frame: &mut Frame) {
    let found = screen.rows().into_iter().find(|row| row.backend.id == backend);
    let about = found.map_or(String::new(), |row| {
        format!(
            " ({} {}, {} sessions)",
            of(&row.backend),
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
mod tests {
    use std::collections::BTreeMap;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::screen::Press;
    use super::super::screen::tests::{backend, screen as known, status};
    use super::*;
    use crate::cluster::Protocol;
    use crate::control::status::{ServiceLimits, ServiceStatus};

    fn drawn(state: &Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen(state, frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let rows = buffer.content.chunks(usize::from(width));
        let lines = rows.map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>());
        lines.map(|line| line.trim_end().to_owned() + "\n").collect()
    }

    #[test]
    fn a_backend_is_a_row_with_its_state_share_and_rates() {
        let mut state = known();
        let mut grown = backend(1, 2);
        grown.sessions_total += 3000;
        grown.bytes_down = 4 << 20;
        state.looked(Ok(status(3000, vec![grown])));
        let text = drawn(&state, 140, 8);
        let row = text.lines().find(|line| line.starts_with("b1 ")).expect(&text);
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!(
            words,
            [
                "b1",
                "tcp",
                "10.0.0.1:80",
                "web-1",
                "serving",
                "25.0",
                "%",
                "2",
                "1,500",
                "0",
                "B",
                "2.0",
                "MiB",
                "150",
                "us",
                "0"
            ]
        );
        assert!(text.starts_with("lb 0.1.0 serving, up 3.0 s, round robin"), "{text}");
    }

    #[test]
    fn a_backend_whose_users_are_turned_away_for_want_of_room_is_marked_while_they_are() {
        let mut state = known();
        let mut short = backend(1, 2);
        for (turned_away, word) in [(5, "no room"), (5, "serving"), (6, "no room")] {
            short.turned_away = turned_away;
            let at = state.now.as_ref().map_or(0, |now| now.uptime_ms) + 1000;
            state.looked(Ok(status(at, vec![short.clone()])));
            let text = drawn(&state, 80, 8);
            let row = text.lines().find(|line| line.starts_with("b1 ")).expect(&text);
            assert!(row.contains(word), "{text}");
        }
    }

    #[test]
    fn a_narrow_terminal_leaves_columns_out_and_cuts_none() {
        let mut state = known();
        let mut far = backend(1, 2);
        far.address = "[2001:db8:1:2:3:4:5:6]:65535".parse().unwrap();
        state.looked(Ok(status(2000, vec![far, backend(2, 1)])));
        for width in [60, 80, 110, 200] {
            let text = drawn(&state, width, 8);
            assert!(
                text.contains("b1 ") && text.contains("[2001:db8:1:2:3:4:5:6]:65535"),
                "{text}"
            );
            assert!(text.contains("serving"), "{text}");
            assert_eq!(text.contains("web-1"), width >= 110, "{text}");
            assert_eq!(text.contains(" hello"), width >= 200, "{text}");
        }
    }

    #[test]
    fn the_service_is_a_column_once_there_are_named_ones_and_a_filter_finds_it() {
        let mut state = known();
        let mut redis = backend(2, 1);
        redis.service = "redis".into();
        let mut look = status(2000, vec![backend(1, 1), redis]);
        state.looked(Ok(look.clone()));
        assert!(!drawn(&state, 140, 8).contains("service"));
        let service = |name: &str| ServiceStatus {
            name: name.into(),
            protocol: Protocol::Tcp,
            doors: Vec::new(),
            leaving: false,
            register: true,
            backends: BTreeMap::new(),
            sessions_active: 0,
            terms: Vec::new(),
            limits: ServiceLimits::default(),
            turned_away: BTreeMap::new(),
            groups: Vec::new(),
        };
        look.services = vec![service("tcp"), service("redis")];
        state.looked(Ok(look));
        let text = drawn(&state, 140, 8);
        assert!(text.contains("b2 redis   tcp"), "{text}");
        state.filter = "redis".into();
        let text = drawn(&state, 140, 8);
        assert!(text.contains("b2 ") && !text.contains("b1 "), "{text}");
        state.press(Press::Char('d'));
        let text = drawn(&state, 100, 20);
        assert!(text.contains("Drain b2 (redis 10.0.0.2:80, 1 sessions)?"), "{text}");
    }

    #[test]
    fn the_question_names_what_would_be_drained() {
        let mut state = known();
        state.press(Press::Char('d'));
        let text = drawn(&state, 100, 20);
        assert!(text.contains("Drain b1 (tcp 10.0.0.1:80, 2 sessions)?"), "{text}");
    }

    #[test]
    fn the_chosen_one_of_many_is_always_in_sight() {
        let mut state = known();
        state.looked(Ok(status(2000, (1..=200).map(|n| backend(n, 1)).collect())));
        state.press(Press::End);
        assert!(drawn(&state, 120, 12).contains("b200 "));
    }

    #[test]
    fn a_tiny_terminal_and_a_hostile_name_do_no_harm() {
        let mut state = known();
        let mut hostile = backend(1, 1);
        hostile.name = Some("a\u{1b}[2Jb\nc".into());
        state.looked(Ok(status(2000, vec![hostile])));
        assert!(!drawn(&state, 140, 8).contains('\u{1b}'));
        for mode in [Press::Char('d'), Press::Enter, Press::Char('/')] {
            state.press(mode);
            for (width, height) in [(1, 1), (5, 2), (20, 4)] {
                drawn(&state, width, height);
            }
            state.press(Press::Back);
        }
        drawn(&Screen::default(), 3, 3);
    }
}
