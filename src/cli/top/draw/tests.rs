//! Drawings of fixed states.

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::super::screen::Press;
use super::super::screen::tests::{backend, screen as known, status};
use super::*;
use crate::cli::trouble::tests::service;
use crate::control::status::GroupStatus;

fn drawn(state: &mut Screen, width: u16, height: u16) -> String {
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
    let text = drawn(&mut state, 140, 8);
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
        let text = drawn(&mut state, 80, 8);
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
        let text = drawn(&mut state, width, 8);
        assert!(text.contains("b1 ") && text.contains("[2001:db8:1:2:3:4:5:6]:65535"), "{text}");
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
    assert!(!drawn(&mut state, 140, 8).contains("service"));
    look.services = vec![service("tcp", 1, 0), service("redis", 1, 0)];
    state.looked(Ok(look));
    let text = drawn(&mut state, 140, 8);
    assert!(text.contains("b2 redis   tcp"), "{text}");
    for key in "/redis".chars().map(Press::Char).chain([Press::Enter]) {
        state.press(key);
    }
    let text = drawn(&mut state, 140, 8);
    assert!(text.contains("b2 ") && !text.contains("b1 "), "{text}");
    state.press(Press::Char('d'));
    let text = drawn(&mut state, 100, 20);
    assert!(text.contains("Drain b2 (redis 10.0.0.2:80, 1 sessions)?"), "{text}");
}

#[test]
fn the_question_names_what_would_be_drained() {
    let mut state = known();
    state.press(Press::Char('d'));
    let text = drawn(&mut state, 100, 20);
    assert!(text.contains("Drain b1 (tcp 10.0.0.1:80, 2 sessions)?"), "{text}");
}

#[test]
fn the_chosen_one_of_many_is_always_in_sight() {
    let mut state = known();
    state.looked(Ok(status(2000, (1..=200).map(|n| backend(n, 1)).collect())));
    state.press(Press::End);
    assert!(drawn(&mut state, 120, 12).contains("b200 "));
}

#[test]
fn a_tiny_terminal_and_a_hostile_name_do_no_harm() {
    let mut state = known();
    let mut hostile = backend(1, 1);
    hostile.name = Some("a\u{1b}[2Jb\nc".into());
    state.looked(Ok(status(2000, vec![hostile])));
    assert!(!drawn(&mut state, 140, 8).contains('\u{1b}'));
    for mode in [Press::Char('d'), Press::Enter, Press::Char('/')] {
        state.press(mode);
        for (width, height) in [(1, 1), (5, 2), (20, 4)] {
            drawn(&mut state, width, height);
        }
        state.press(Press::Back);
    }
    drawn(&mut Screen::default(), 3, 3);
}

/// A service for every fifth backend, the last of them in trouble and the one before it full.
pub fn crowd(services: u32, backends: u32, uptime_ms: u64) -> Status {
    let at = |n: u32| format!("shop-frontend-of-the-eu-west-region-{n:03}");
    let of_one = |n: u32| BackendStatus { service: at(n / 5), ..backend(n % 250, 1) };
    let all = (0..backends).map(|n| BackendStatus { id: format!("b{}", n + 1), ..of_one(n) });
    let mut status = status(uptime_ms, all.collect());
    status.services = (0..services).map(|n| service(&at(n), 5, 0)).collect();
    let [.., full, last] = status.services.as_mut_slice() else { return status };
    (full.limits.sessions, full.limits.sessions_used) = (Some(7), 7);
    (last.backends, last.protocol) = (service("", 0, 5).backends, crate::cluster::Protocol::Udp);
    let group = |name: &str, share| GroupStatus {
        name: name.into(),
        share,
        file_share: share,
        backends: 5,
        serving: 1,
    };
    status.services[0].groups = vec![group("blue", 95), group("green", 5)];
    status
}

fn crowded() -> Screen {
    let mut state = Screen::default();
    state.looked(Ok(crowd(200, 1000, 1000)));
    state
}

fn press(state: &mut Screen, keys: impl IntoIterator<Item = Press>) {
    keys.into_iter().for_each(|key| drop(state.press(key)));
}

fn typed(text: &str) -> impl Iterator<Item = Press> {
    text.chars().map(Press::Char)
}

#[test]
fn services_come_first_where_there_are_named_ones_and_those_in_trouble_before_the_others() {
    let text = drawn(&mut crowded(), 120, 14);
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[2].starts_with("1-9 of 200 services: 1 with nobody serving, 1 at a limit of"),
        "{text}"
    );
    let words: Vec<&str> = lines[3].split_whitespace().collect();
    let heads =
        ["service", "users", "serving", "failing", "sessions", "new/s", "turned", "away", "notes"];
    assert_eq!(words, heads, "{text}");
    assert!(lines[4].contains("region-199 udp") && lines[4].contains("0 of 5"), "{text}");
    assert!(lines[5].contains("region-198") && lines[5].contains("7 of 7"), "{text}");
    assert!(lines[5].contains("at its limit"), "{text}");
    assert!(lines[6].contains("region-000") && lines[6].contains("blue=95 green=5"), "{text}");
    assert!(
        lines[13].starts_with("q quit   / filter   s sort (trouble)   Enter backends"),
        "{text}"
    );
}

#[test]
fn every_service_and_backend_can_be_reached_and_what_is_out_of_sight_is_told() {
    let mut state = crowded();
    press(&mut state, [Press::End]);
    let text = drawn(&mut state, 100, 24);
    assert!(text.contains("182-200 of 200 services") && text.contains("region-196"), "{text}");
    press(&mut state, [Press::Char('b'), Press::End]);
    let text = drawn(&mut state, 100, 24);
    assert!(text.contains("982-1000 of 1,000 backends") && text.contains("b1000 "), "{text}");
    press(&mut state, [Press::PageUp, Press::Up]);
    let text = drawn(&mut state, 100, 24);
    assert!(text.contains("980-998 of 1,000 backends"), "{text}");
}

#[test]
fn one_service_is_shown_with_its_backends_and_the_way_back() {
    let mut state = crowded();
    press(&mut state, typed("/region-000").chain([Press::Enter, Press::Enter]));
    let text = drawn(&mut state, 120, 14);
    let said = "5 backends of shop-frontend-of-the-eu-west-region-000, 5 of 5 serving, sessions 7, blue=95";
    assert!(text.lines().nth(2).unwrap().starts_with(said), "{text}");
    assert!(text.contains("b5 ") && !text.contains("b6 "), "{text}");
    assert!(text.contains("id group users"), "{text}");
    assert!(text.contains("Esc services") && text.contains("u all sessions"), "{text}");
    let text = drawn(&mut state, 60, 14);
    assert!(text.contains("5 backends of shop-front…egion-000, 5 of 5 serving"), "{text}");
    press(&mut state, [Press::Back]);
    let text = drawn(&mut state, 120, 14);
    assert!(text.contains("1 services with \"region-000\""), "{text}");
}

#[test]
fn at_sixty_columns_a_long_name_gives_way_in_its_middle_and_every_figure_is_whole() {
    let text = drawn(&mut crowded(), 60, 14);
    for part in ["shop-fron…gion-199 udp", "shop-fron…gion-198 tcp", "0 of 5", "7 of 7", "new/s"]
    {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let keys = text.lines().last().unwrap();
    assert!(keys.starts_with("q quit") && keys.contains("Enter backends"), "{text}");
    let mut state = crowded();
    press(&mut state, [Press::Char('b')]);
    let text = drawn(&mut state, 60, 14);
    assert!(text.contains("b1    shop-fronten…-region-000 10.0.0.0:80"), "{text}");
    assert!(text.contains("state") && text.contains("sessions"), "{text}");
    press(&mut state, [Press::Enter]);
    let mut session = SessionStatus::example("0-4294967295-4294967295", "tcp");
    session.client = "[2001:db8:1:2:3:4:5:6]:65535".parse().unwrap();
    state.read(&Of::Backend("b1".into()), Ok((vec![session], true)));
    let text = drawn(&mut state, 60, 14);
    assert!(text.contains("1 sessions of b1, and more"), "{text}");
    assert!(text.contains("0-4294967295-4294967295 [2001:db8:1:2:3:4:5:6]:65535"), "{text}");
}

#[test]
fn only_the_rows_in_sight_are_drawn() {
    let mut state = Screen::default();
    state.looked(Ok(crowd(2000, 10_000, 1000)));
    press(&mut state, [Press::Char('b')]);
    let mut terminal = Terminal::new(TestBackend::new(120, 40)).unwrap();
    let begun = std::time::Instant::now();
    for _ in 0..10 {
        terminal.draw(|frame| screen(&mut state, frame)).unwrap();
    }
    // Formatting all rows takes far longer than this, even without optimisation.
    assert!(begun.elapsed() < std::time::Duration::from_millis(1500), "{:?}", begun.elapsed());
}
