//! Drawings of fixed states.

use std::num::NonZero;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use ratatui::backend::{CrosstermBackend, TestBackend};
use ratatui::{Terminal, TerminalOptions, Viewport};

use super::super::history::tests::page;
use super::super::history::{Answer, Ask};
use super::super::screen::tests::{backend, screen as known, status};
use super::super::screen::{Press, Task};
use super::*;
use crate::cli::trouble::tests::service;
use crate::control::history::page::{ManyHistories, ServiceHistory};
use crate::control::status::{
    BackendState, BackendStatus, DrainStatus, GroupStatus, Percentiles, Quantiles, SessionStatus,
    WorkerStatus,
};

/// What a terminal of this size shows, which shares nothing with what draws.
pub fn drawn(state: &mut Screen, width: u16, height: u16) -> String {
    let mut written = Vec::new();
    let viewport = Viewport::Fixed(Rect { x: 0, y: 0, width, height });
    let backend = CrosstermBackend::new(&mut written);
    let mut terminal = Terminal::with_options(backend, TerminalOptions { viewport }).unwrap();
    terminal.draw(|frame| screen(state, frame)).unwrap();
    drop(terminal);
    let size = |count| NonZero::new(count).unwrap();
    let mut emulator = vt100::Parser::new(size(height), size(width), 0);
    emulator.process(&written);
    let rows = emulator.screen().rows(0, width);
    rows.map(|row| row.trim_end().to_owned() + "\n").collect()
}

/// The column at which a text begins in a line.
fn column(line: &str, text: &str) -> usize {
    width(&line[..line.find(text).expect(line)])
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
    let shown = ["b1", "tcp", "web-1", "10.0.0.1:80", "serving", "3s", "2", "1,500", "0", "2.0M"];
    assert_eq!(words[..10], shown, "{text}");
    assert_eq!(words[10..], ["0", "150us", "25.0", "%"], "{text}");
    assert!(text.starts_with("lb 0.1.0 serving, up 3.0 s, round robin"), "{text}");
}

#[test]
fn a_backend_that_is_reached_by_tls_or_speaks_http_2_says_so_behind_its_address() {
    for (tls, http, said) in
        [(true, Some(1), "TLS"), (false, Some(2), "HTTP/2"), (true, Some(2), "TLS HTTP/2")]
    {
        let (mut state, tls) = (known(), tls.then(|| "a.example".into()));
        state.looked(Ok(status(3000, vec![BackendStatus { tls, http, ..backend(1, 2) }])));
        let text = drawn(&mut state, 140, 8);
        assert!(text.contains(&format!(" 10.0.0.1:80 {said} serving ")), "{text}");
    }
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
fn the_service_is_named_with_its_group_and_a_filter_finds_it() {
    let mut state = known();
    let mut redis = backend(2, 1);
    (redis.service, redis.group) = ("redis".into(), Some("blue".into()));
    let mut look = status(2000, vec![backend(1, 1), redis]);
    look.services = vec![service("tcp", 1, 0), service("redis", 1, 0)];
    state.looked(Ok(look));
    let text = drawn(&mut state, 140, 12);
    assert!(text.contains("b2 redis/blue web-2"), "{text}");
    press(&mut state, typed("/redis").chain([Press::Enter]));
    let text = drawn(&mut state, 60, 12);
    assert!(text.contains("filter \"redis\" 1 backend\n"), "{text}");
    assert!(text.contains("b2 ") && !text.contains("b1 "), "{text}");
    assert!(text.contains("Esc drops the filter"), "{text}");
}

/// The lines within a box.
fn boxed(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            let (_, rest) = line.split_once('│')?;
            Some(rest.rsplit_once('│')?.0.trim())
        })
        .collect()
}

#[test]
fn the_question_says_what_will_happen_as_the_deadline_is_typed() {
    let mut state = known();
    let mut look = status(2000, vec![backend(1, 2), backend(2, 3)]);
    look.services = vec![service("tcp", 2, 0)];
    state.looked(Ok(look.clone()));
    press(&mut state, typed("d"));
    let said = |state: &mut Screen| {
        let text = drawn(state, 60, 15);
        assert!(text.lines().last().unwrap().contains("Enter drains"), "{text}");
        boxed(&text).join(" ")
    };
    let text = said(&mut state);
    let begins = "b1 web-1 (tcp 10.0.0.1:80) It gets no new sessions from now on. It has 2 sessions: \
                  what is left after 30.0 s is cut. It stays registered, and u takes the drain back. \
                  deadline: 30s";
    assert!(text.starts_with(begins), "{text}");
    press(&mut state, typed("5m"));
    assert!(said(&mut state).contains("left after 5 min 00 s is cut"));
    press(&mut state, typed("x").chain([Press::Enter]));
    assert!(said(&mut state).contains("deadline: 5mx_   `5mx` is no time: 30s, 5m, now, never"));
    press(&mut state, [Press::Erase; 3]);
    press(&mut state, typed("never"));
    assert!(said(&mut state).contains("It has 2 sessions, which end by themselves."));
    press(&mut state, [Press::Erase; 5]);
    press(&mut state, typed("0"));
    assert!(said(&mut state).contains("Its 2 sessions are cut at once."));
    look.services = vec![service("tcp", 1, 1)];
    state.looked(Ok(look.clone()));
    assert!(
        said(&mut state).contains("Nobody else serves tcp: its new users will be turned away.")
    );
    state.looked(Ok(Status { drain_ms: None, ..look }));
    assert!(said(&mut state).contains("It then leaves; this balancer is older"));
}

#[test]
fn a_drain_is_counted_down_in_its_row_until_nothing_is_left() {
    let mut state = known();
    let mut drains = backend(1, 2);
    drains.state = BackendState::Draining;
    drains.drain = DrainStatus { by: Some("operator".into()), ..DrainStatus::default() };
    for (ms, empty, word) in [
        (Some(24_100), false, " draining 25s "),
        (Some(65_000), false, " draining 1m 05s "),
        (None, false, " draining "),
        (None, true, " drained "),
    ] {
        (drains.drains_in_ms, drains.drain.empty) = (ms, empty);
        state.looked(Ok(status(2000, vec![drains.clone(), backend(2, 1)])));
        let text = drawn(&mut state, 60, 15);
        assert!(text.contains(word), "{word}\n{text}");
    }
    press(&mut state, typed("d"));
    assert!(boxed(&drawn(&mut state, 80, 24)).join(" ").contains("It drains already."));
}

#[test]
fn a_refusal_leaves_the_keys_in_sight_and_goes_with_the_next_key() {
    let mut state = known();
    let said = "the admin door at 127.0.0.1:8084 refused: changes over TCP are off: set [admin] \
                token_file, or use the socket of [admin] socket";
    state.changed(&Task::Undrain("b1".into()), Err(said.into()));
    for (width, height) in [(60, 15), (80, 24), (120, 40)] {
        let text = drawn(&mut state, width, height);
        assert!(text.replace('\n', " ").contains(said), "{text}");
        assert!(text.lines().last().unwrap().starts_with("q quit"), "{text}");
        assert!(text.contains("b10 "), "{text}");
    }
    press(&mut state, [Press::Down]);
    assert!(!drawn(&mut state, 60, 15).contains("refused"));
    state.changed(&Task::Undrain("b1".into()), Err(said.repeat(9)));
    let text = drawn(&mut state, 60, 15);
    assert!(text.contains("b10 ") && text.lines().last().unwrap().starts_with("q quit"), "{text}");
}

#[test]
fn a_balancer_that_is_away_is_seen_to_be_at_every_width() {
    let mut state = known();
    state.silent = std::time::Duration::from_secs(75);
    state.looked(Err("the admin door at 127.0.0.1:8084 cannot be reached".into()));
    for width in [60, 80, 120] {
        let text = drawn(&mut state, width, 15);
        assert!(text.starts_with("lb 0.1.0 NOT ANSWERING for 1m; this is how it was"), "{text}");
        assert!(text.contains("cannot be reached") && text.contains("b1 "), "{text}");
    }
}

/// Backends whose names are wide, combining, hostile or long.
fn many_tongues() -> Screen {
    let mut state = Screen::default();
    let names = [
        "数据库服务器-东京-主",
        "cafe\u{301}-zu\u{308}rich",
        "👨\u{200d}👩\u{200d}👧",
        "مرحبا\u{202e}",
        "a\u{1b}[2Jb\nc",
        "plain",
        "shop-frontend-of-the-eu-west-region-of-the-first-customer",
    ];
    let of =
        |(n, name): (u32, &str)| BackendStatus { name: Some(name.to_owned()), ..backend(n, 1) };
    let mut all: Vec<BackendStatus> = (1..).zip(names).map(of).collect();
    all[6].address = "[2001:db8:1:2:3:4:5:6]:65535".parse().unwrap();
    state.looked(Ok(status(1000, all)));
    state
}

#[test]
fn wide_and_combining_names_keep_every_column_where_it_is() {
    let mut state = many_tongues();
    for (width, height) in [(60, 15), (80, 24), (120, 40)] {
        let text = drawn(&mut state, width, height);
        assert!(!text.contains('\u{1b}') && !text.contains('\u{202e}'), "{text}");
        let rows: Vec<&str> = text.lines().filter(|line| line.contains(" serving ")).collect();
        assert_eq!(rows.len(), 7, "{text}");
        let heads = text.lines().find(|line| line.starts_with("id ")).expect(&text);
        for row in &rows {
            assert_eq!(column(row, "serving"), column(heads, "state"), "{text}");
            assert!(column(row, row) == 0 && super::width(row) <= usize::from(width), "{text}");
        }
        let sessions = column(heads, "sessions") + "sessions".len();
        assert!(rows.iter().all(|row| column_ends(row, sessions, "1")), "{text}");
    }
}

/// Whether the text ends at this column.
fn column_ends(line: &str, end: usize, text: &str) -> bool {
    let before = |place: usize| width(&line[..place]);
    line.match_indices(text).any(|(place, _)| before(place + text.len()) == end)
}

#[test]
fn names_and_addresses_are_cut_before_any_of_them_is_left_out() {
    let mut state = many_tongues();
    let text = drawn(&mut state, 60, 15);
    let row = text.lines().find(|line| line.starts_with("b7 ")).expect(&text);
    assert!(row.contains("shop") && row.contains('…') && row.contains("]:65535"), "{text}");
    assert!(text.contains("10.0.0.1:80 "), "{text}");
    let text = drawn(&mut state, 80, 24);
    let row = text.lines().find(|line| line.starts_with("b7 ")).expect(&text);
    let name = row.split_whitespace().nth(2).unwrap();
    assert!(name.chars().count() >= 14, "it can be read: {text}");
    assert!(text.contains("new/s"), "{text}");
}

#[test]
fn the_chosen_one_of_many_is_always_in_sight() {
    let mut state = known();
    state.looked(Ok(status(2000, (1..=200).map(|n| backend(n, 1)).collect())));
    state.press(Press::End);
    assert!(drawn(&mut state, 120, 12).contains("b200 "));
}

#[test]
fn a_tiny_terminal_does_no_harm() {
    let mut state = known();
    for keys in ["", "d", "?", "/"] {
        press(&mut state, typed(keys));
        for (width, height) in [(1, 1), (5, 2), (20, 4), (59, 3)] {
            drawn(&mut state, width, height);
        }
        press(&mut state, [Press::Back]);
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
        lines[3].starts_with("1-8 of 200 services: 1 with nobody serving, 1 at a limit of"),
        "{text}"
    );
    let words: Vec<&str> = lines[4].split_whitespace().collect();
    let heads = ["service", "users", "serving", "failing", "sessions", "new/s", "up/s", "down/s"];
    assert_eq!(words[..8], heads, "{text}");
    assert!(lines[5].contains("region-199 udp") && lines[5].contains("0 of 5"), "{text}");
    assert!(lines[6].contains("region-198") && lines[6].contains("7 of 7"), "{text}");
    assert!(lines[6].contains("at its limit"), "{text}");
    assert!(lines[7].contains("region-000") && lines[7].contains("blue=95 green=5"), "{text}");
    assert!(lines[13].starts_with("q quit   ? help   / filter   Enter backends"), "{text}");
}

#[test]
fn every_service_and_backend_can_be_reached_and_what_is_out_of_sight_is_marked() {
    let mut state = crowded();
    let marks = |text: &str| {
        let ends = text.lines().filter_map(|line| line.chars().last());
        ends.filter(|mark| "▲▼█│".contains(*mark)).collect::<String>()
    };
    let text = drawn(&mut state, 100, 24);
    assert!(marks(&text).starts_with('█') && marks(&text).ends_with('▼'), "{text}");
    press(&mut state, [Press::End]);
    let text = drawn(&mut state, 100, 24);
    assert!(text.contains("183-200 of 200 services") && text.contains("gion-196 "), "{text}");
    assert!(marks(&text).starts_with('▲') && marks(&text).ends_with('█'), "{text}");
    press(&mut state, [Press::Char('b'), Press::End]);
    let text = drawn(&mut state, 100, 24);
    assert!(text.contains("983-1000 of 1,000 backends") && text.contains("b1000 "), "{text}");
    press(&mut state, [Press::PageUp, Press::Up]);
    let text = drawn(&mut state, 100, 24);
    assert!(text.contains("981-998 of 1,000 backends"), "{text}");
    assert!(marks(&text).starts_with('▲') && marks(&text).ends_with('▼'), "{text}");
    assert_eq!(marks(&drawn(&mut known(), 100, 24)), "", "nothing is out of sight");
}

#[test]
fn one_service_is_shown_with_its_backends_and_the_way_back() {
    let mut state = crowded();
    press(&mut state, typed("/region-000").chain([Press::Enter, Press::Enter]));
    let text = drawn(&mut state, 120, 14);
    let said = "5 backends of shop-frontend-of-the-eu-west-region-000, 5 of 5 serving, sessions 7, blue=95";
    assert!(text.lines().nth(3).unwrap().starts_with(said), "{text}");
    assert!(text.contains("b5 ") && !text.contains("b6 "), "{text}");
    assert!(text.contains("id group name"), "{text}");
    assert!(text.contains("Esc services") && text.contains("a all sessions"), "{text}");
    let text = drawn(&mut state, 60, 14);
    assert!(text.contains("5 backends of shop-front…egion-000, 5 of 5 serving"), "{text}");
    press(&mut state, [Press::Back]);
    let text = drawn(&mut state, 120, 14);
    assert!(text.contains("filter \"region-000\" 1 service: "), "{text}");
}

#[test]
fn at_sixty_columns_a_long_name_gives_way_in_its_middle_and_every_figure_is_whole() {
    let text = drawn(&mut crowded(), 60, 15);
    for part in ["on-199 ", "on-198 ", "shop-f", "0 of 5", "7 of 7", "new/s"] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let keys = text.lines().last().unwrap();
    assert!(keys.starts_with("q quit") && keys.contains("Enter backends"), "{text}");
    let mut state = crowded();
    press(&mut state, [Press::Char('b')]);
    let text = drawn(&mut state, 60, 15);
    assert!(
        text.contains("state") && text.contains("sessions") && text.contains(" shop…000 "),
        "{text}"
    );
    press(&mut state, [Press::Enter]);
    let mut session = SessionStatus::example("0-4294967295-4294967295", "tcp");
    session.client = "[2001:db8:1:2:3:4:5:6]:65535".parse().unwrap();
    state.read(&Of::Backend("b1".into()), Ok((vec![session], true)));
    let text = drawn(&mut state, 60, 15);
    assert!(text.contains("1 session of b1, and more"), "{text}");
    assert!(text.contains("0-4294967295-4294967295 ") && text.contains("]:65535"), "{text}");
}

#[test]
fn help_names_every_key_and_is_scrolled_where_it_does_not_fit() {
    let mut state = known();
    press(&mut state, typed("?"));
    let tall = drawn(&mut state, 80, 24);
    for key in ["/ ", "s, r", "d ", "u ", "a ", "b ", "q, Ctrl-C", "K M G", "hello"] {
        assert!(boxed(&tall).iter().any(|line| line.starts_with(key)), "{key}\n{tall}");
    }
    let text = drawn(&mut state, 60, 15);
    assert!(text.contains("Help: 0 above, "), "{text}");
    press(&mut state, [Press::End]);
    let text = drawn(&mut state, 60, 15);
    assert!(text.contains(" 0 below") && text.contains("hello"), "{text}");
    assert!(text.lines().last().unwrap().contains("Esc back"), "{text}");
    press(&mut state, [Press::Up]);
    assert!(drawn(&mut state, 60, 15).contains(" 1 below"));
}

#[test]
fn waiting_times_and_errors_are_those_of_the_last_minute() {
    let mut state = known();
    let mut look = status(2000, vec![backend(1, 2)]);
    look.doors.api = Some("127.0.0.1:8083".parse().unwrap());
    let minute = |count, p50_us, p99_us, errors| {
        let first_byte = Quantiles { count, p50_us, p90_us: None, p99_us };
        LastMinute { first_byte, errors, ..LastMinute::default() }
    };
    look.last_minute = [
        (Protocol::Tcp, minute(9, Some(100), Some(2500), None)),
        (Protocol::Udp, minute(0, None, None, None)),
        (Protocol::Api, minute(9, Some(5000), None, Some(3))),
    ]
    .into();
    state.looked(Ok(look.clone()));
    let text = drawn(&mut state, 80, 24);
    let said = "first byte p50/p99, last minute: tcp 100us/2.5ms, udp -, api 5.0ms/over 60s\n";
    assert!(text.contains(said), "{text}");
    assert!(text.contains("errors 0/s, 3 in the last minute"), "{text}");
    let text = drawn(&mut state, 60, 15);
    assert!(text.contains("p50/p99: tcp 100us/2.5ms, udp -, api 5.0ms/over 60s\n"), "{text}");
    look.last_minute.clear();
    look.timings.first_byte =
        Percentiles { count: 9, p50_us: Some(50), p99_us: Some(100), ..Percentiles::default() };
    state.looked(Ok(look));
    let text = drawn(&mut state, 60, 15);
    assert!(text.contains("first byte p50/p99, since the start: 50us/100us"), "{text}");
}

#[test]
fn requests_and_errors_of_the_api_door_are_rates_since_the_last_look() {
    let mut state = known();
    let mut look = status(3000, vec![backend(1, 2)]);
    let counted = |requests, refused, failed| WorkerStatus {
        worker: 0,
        counters: [("api_requests", requests), ("api_refused", refused), ("api_failed", failed)]
            .map(|(name, count)| (name.to_owned(), count))
            .into(),
    };
    look.workers = vec![counted(1000, 10, 0), counted(500, 0, 2)];
    state.looked(Ok(look.clone()));
    (look.uptime_ms, look.workers) = (5000, vec![counted(2000, 14, 0), counted(1500, 0, 8)]);
    state.looked(Ok(look));
    for width in [60, 80, 120] {
        let text = drawn(&mut state, width, 15);
        assert!(text.contains("api 1,000 requests/s, 2/s refused, errors 3/s"), "{text}");
    }
}

#[test]
fn a_backend_that_flaps_shows_since_when_and_how_often() {
    let mut state = known();
    let mut flaps = backend(1, 2);
    (flaps.state_since_unix_ms, flaps.state_changes) = (Some(57_001), 14);
    let quiet = BackendStatus { state_since_unix_ms: Some(1), state_changes: 2, ..backend(2, 1) };
    let old = BackendStatus { state_since_unix_ms: None, ..backend(3, 1) };
    state.looked(Ok(status(60_000, vec![flaps, quiet, old])));
    let text = drawn(&mut state, 80, 24);
    let since = |id: &str| {
        let row = text.lines().find(|line| line.starts_with(id)).expect(&text);
        row.split("serving").nth(1).unwrap().trim_start().to_owned()
    };
    assert!(since("b1").starts_with("14x 3s "), "{text}");
    assert!(since("b2").starts_with("1m ") && since("b3").starts_with("- "), "{text}");
}

fn seen(state: &mut Screen, services: &[&str], new: &[u64]) {
    let ask = state.due().expect("it is due");
    let whole = page(None, new);
    let of = |name: &&str| ServiceHistory {
        name: (*name).to_owned(),
        protocol: Protocol::Tcp,
        series: whole.whole.clone(),
    };
    let many = ManyHistories {
        schema: 1,
        step_ms: 5000,
        ended_unix_ms: whole.ended_unix_ms,
        took_ms: whole.took_ms.clone(),
        services: services.iter().map(of).collect(),
        kept: Default::default(),
    };
    let answer = match &ask {
        Ask::Detail { service } => {
            Answer { page: Some(page(service.as_deref(), new)), services: None }
        }
        Ask::Overview { .. } => Answer { page: Some(whole), services: Some(many) },
    };
    state.past.read(ask, Ok(answer));
}

/// Nothing for ten minutes, a burst, and nothing again.
fn burst() -> Vec<u64> {
    let mut new = vec![0; 180];
    new[120..132].fill(500);
    new
}

#[test]
fn services_show_the_last_fifteen_minutes_as_curves_from_eighty_columns_on() {
    let mut state = crowded();
    drawn(&mut state, 80, 24);
    seen(&mut state, &["shop-frontend-of-the-eu-west-region-199"], &burst());
    for (width, height, bars) in [(80, 24, "▁▁▁▁▁▁▁▁▁▁█▁▁▁▁"), (120, 40, "▁██▁")]
    {
        let text = drawn(&mut state, width, height);
        let row = text.lines().find(|line| line.contains("gion-199 ")).expect(&text);
        assert!(text.contains(" new/s 15min") && row.contains(bars), "{text}");
        let head = text.lines().find(|line| line.starts_with("15 min new/s ")).expect(&text);
        assert!(head.contains("█▁") && head.ends_with(" now       0 max     100"), "{text}");
    }
    press(&mut state, typed("v"));
    assert!(drawn(&mut state, 120, 40).contains(" sessions 15min"));
    let text = drawn(&mut state, 60, 15);
    assert!(!text.contains("15min") && text.contains("new/s"), "figures stay: {text}");
}

#[test]
fn the_last_fifteen_minutes_of_one_service_are_drawn_at_every_size() {
    let mut state = crowded();
    press(&mut state, typed("h"));
    let text = drawn(&mut state, 60, 15);
    assert!(text.contains("the last 15 minutes of shop") && text.contains("looking ..."), "{text}");
    seen(&mut state, &[], &burst());
    for (width, height, lines) in [(60, 15, 3), (80, 24, 4), (120, 40, 4)] {
        let text = drawn(&mut state, width, height);
        for (name, now, max) in
            [("sessions", "0", "500"), ("new/s", "0", "100"), ("p99", "0us", "500ms")]
        {
            let row = text
                .lines()
                .find(|line| line.starts_with(name) && line.contains("max"))
                .expect(&text);
            let words: Vec<&str> = row.split_whitespace().rev().take(4).collect();
            assert_eq!(words, [max, "max", now, "now"], "{text}");
            assert!(super::width(row) <= usize::from(width) && row.contains("█▁"), "{text}");
        }
        let full = text.lines().filter(|line| line.contains('█')).count();
        assert_eq!(full, 3 * lines, "{text}");
        let axis = text.lines().find(|line| line.contains("-15 min")).expect(&text);
        let row = text.lines().find(|line| line.starts_with("p99")).expect(&text);
        assert_eq!(column(axis, "now") + 3, column(row, " now "), "{text}");
        assert!(text.lines().last().unwrap().contains("h all services"), "{text}");
    }
    press(&mut state, typed("h"));
    assert!(drawn(&mut state, 80, 24).contains("the last 15 minutes of all services"));
    press(&mut state, [Press::Back]);
    assert!(drawn(&mut state, 80, 24).contains("1-"));
}

#[test]
fn a_balancer_without_history_is_shown_without_it() {
    let mut state = crowded();
    drawn(&mut state, 120, 40);
    let ask = state.due().unwrap();
    state.past.read(ask, Err("refused: there is no /history".into()));
    let text = drawn(&mut state, 120, 40);
    assert!(
        !text.contains("15min") && !text.contains("15 min") && !text.contains("refused"),
        "{text}"
    );
    press(&mut state, typed("h"));
    let ask = state.due().unwrap();
    state.past.read(ask, Err("refused: there is no /history".into()));
    let text = drawn(&mut state, 60, 15).replace('\n', " ");
    assert!(text.contains("There is no history, which older balancers do not keep"), "{text}");
}

#[test]
fn only_the_rows_in_sight_are_drawn() {
    let mut state = Screen::default();
    state.looked(Ok(crowd(2000, 10_000, 1000)));
    press(&mut state, [Press::Char('b')]);
    // Without the emulator, whose time is not ours.
    let mut terminal = Terminal::new(TestBackend::new(120, 40)).unwrap();
    // The processor's time of this thread alone, however busy the host is.
    let spent = || getrusage(UsageWho::RUSAGE_THREAD).unwrap().user_time().num_milliseconds();
    let before = spent();
    for _ in 0..10 {
        terminal.draw(|frame| screen(&mut state, frame)).unwrap();
    }
    // Formatting all rows takes far longer than this, even without optimisation.
    let taken = spent() - before;
    assert!(taken < 1500, "{taken} ms");
}
