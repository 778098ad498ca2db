//! Keys and looks, one after the other.

use std::collections::BTreeMap;

use super::*;
use crate::cli::trouble::tests::service;
use crate::cluster::Protocol;
use crate::control::status::{
    BackendState, CheckStatus, Doors, DrainStatus, HelloStatus, ReloadStatus, RunState, SCHEMA,
    SessionTotals, Timings,
};

pub fn backend(number: u32, sessions: u64) -> BackendStatus {
    BackendStatus {
        proxy: None,
        http: None,
        tls: None,
        id: format!("b{number}"),
        service: "tcp".into(),
        protocol: Protocol::Tcp,
        address: format!("10.0.0.{number}:80").parse().unwrap(),
        name: Some(format!("web-{number}")),
        group: None,
        weight: 1,
        state: BackendState::Serving,
        state_since_unix_ms: Some(0),
        state_changes: 0,
        turns: 1,
        round: 4,
        registered_unix_ms: 0,
        hello: HelloStatus { answered_unix_ms: None, took_us: Some(150), misses: 0 },
        check: CheckStatus::default(),
        drain: DrainStatus::default(),
        drains_in_ms: None,
        sessions_active: sessions,
        sessions_total: 100 * sessions,
        connects_failed: 0,
        unanswered: 0,
        unanswered_in_row: 0,
        aside_because: None,
        turned_away: 0,
        bytes_up: 0,
        bytes_down: 0,
    }
}

pub fn status(uptime_ms: u64, backends: Vec<BackendStatus>) -> Status {
    Status {
        schema: SCHEMA,
        version: "0.1.0".into(),
        pid: 7,
        state: RunState::Serving,
        started_unix_ms: 1,
        uptime_ms,
        stops_in_ms: None,
        certificates: Vec::new(),
        cluster: None,
        derived: Vec::new(),
        doors: Doors::default(),
        policy: "round_robin".into(),
        drain_ms: Some(30_000),
        snapshot: 1,
        services: Vec::new(),
        sessions: SessionTotals { active: 6, limit: 100, ..SessionTotals::default() },
        backends,
        workers: Vec::new(),
        timings: Timings::default(),
        last_minute: BTreeMap::new(),
        handover: crate::control::status::HandoverStatus::default(),
        reload: ReloadStatus::default(),
        control: BTreeMap::new(),
    }
}

pub fn screen() -> Screen {
    let mut screen = Screen::default();
    screen.looked(Ok(status(1000, vec![backend(1, 2), backend(2, 3), backend(10, 1)])));
    screen
}

fn rates_of(screen: &Screen, row: usize) -> Rates {
    screen.rows().nth(row).unwrap().change.rates
}

fn ids(screen: &Screen) -> Vec<String> {
    screen.rows().map(|row| row.backend.id.clone()).collect()
}

fn of(backend: &str) -> Of {
    Of::Backend(backend.into())
}

fn type_in(screen: &mut Screen, text: &str) {
    for letter in text.chars() {
        screen.press(Press::Char(letter));
    }
}

#[test]
fn rates_are_what_grew_between_two_looks_of_the_same_process() {
    let mut screen = screen();
    assert_eq!(rates_of(&screen, 0), Rates::default(), "one look tells no rate");
    let mut grown = backend(1, 2);
    grown.sessions_total += 50;
    grown.bytes_up = 4000;
    screen.looked(Ok(status(3000, vec![grown.clone(), backend(3, 9)])));
    let rates = Rates { new: Some(25), up: Some(2000), down: Some(0) };
    assert_eq!(rates_of(&screen, 0), rates);
    assert_eq!(rates_of(&screen, 1), Rates::default(), "it was not there before");
    screen.looked(Ok(Status { pid: 8, ..status(5000, vec![grown]) }));
    assert_eq!(rates_of(&screen, 0), Rates::default(), "another process counts anew");
}

#[test]
fn backends_are_sorted_by_number_by_load_and_backwards() {
    let mut screen = screen();
    assert_eq!(ids(&screen), ["b1", "b2", "b10"]);
    type_in(&mut screen, "sss");
    assert_eq!(screen.backends.order, SortBy::Sessions);
    assert_eq!(ids(&screen), ["b2", "b1", "b10"]);
    type_in(&mut screen, "r");
    assert_eq!(ids(&screen), ["b10", "b1", "b2"]);
    type_in(&mut screen, "ssss");
    assert_eq!(screen.backends.order, SortBy::Id, "after the last comes the first");
}

#[test]
fn a_filter_takes_every_letter_and_narrows_at_once() {
    let mut screen = screen();
    type_in(&mut screen, "/WEB-1");
    assert_eq!(ids(&screen), ["b1", "b10"]);
    screen.press(Press::Erase);
    assert_eq!(ids(&screen).len(), 3);
    type_in(&mut screen, "qd");
    assert_eq!((screen.backends.filter.as_str(), ids(&screen).len()), ("WEB-qd", 0));
    screen.press(Press::Enter);
    assert_eq!(screen.press(Press::Char('d')), Task::Nothing, "there is nothing to drain");
    assert_eq!(screen.mode, Mode::List);
    screen.press(Press::Back);
    assert_eq!(ids(&screen).len(), 3);
}

#[test]
fn the_cursor_stays_on_the_rows() {
    let mut screen = screen();
    for (key, chosen) in [
        (Press::Up, 0),
        (Press::Down, 1),
        (Press::Char('j'), 2),
        (Press::Down, 2),
        (Press::PageUp, 0),
        (Press::PageDown, 2),
        (Press::Home, 0),
        (Press::End, 2),
    ] {
        screen.press(key);
        assert_eq!(screen.chosen, chosen, "{key:?}");
    }
    screen.looked(Ok(status(2000, vec![backend(1, 1)])));
    assert_eq!(screen.chosen, 0);
}

#[test]
fn enter_shows_a_backends_sessions_and_escape_goes_back_to_its_row() {
    let mut screen = screen();
    screen.press(Press::Down);
    assert_eq!(screen.press(Press::Enter), Task::Sessions(of("b2")));
    let again = screen.looked(Ok(status(2000, vec![backend(1, 2), backend(2, 3)])));
    assert_eq!(again, Task::Sessions(of("b2")), "they are kept fresh");
    screen.read(&of("b1"), Err("an answer of before".into()));
    assert_eq!(screen.message, "");
    screen.read(&of("b2"), Ok((Vec::new(), true)));
    assert!(screen.more);
    screen.press(Press::Back);
    assert_eq!((screen.mode.clone(), screen.chosen), (Mode::List, 1));
}

#[test]
fn a_backend_is_drained_after_a_yes_and_by_nothing_else() {
    let mut screen = screen();
    for key in [Press::Back, Press::Char('q')] {
        screen.press(Press::Char('d'));
        assert!(matches!(screen.overlay, Some(Overlay::Drain(_))));
        assert_eq!(screen.press(key), Task::Nothing, "{key:?}");
        assert_eq!((screen.message.as_str(), &screen.overlay), ("b1 was not drained", &None));
    }
    screen.press(Press::Char('d'));
    assert_eq!(screen.message, "", "the next key takes a message away");
    let after = |ms| Task::Drain("b1".into(), Some(Duration::from_millis(ms)));
    assert_eq!(screen.press(Press::Enter), after(30_000), "as the balancer is set");
    screen.changed(&after(30_000), Ok(2));
    assert_eq!(screen.message, "b1 drains: 2 sessions left, cut after 30.0 s; u takes it back");
    type_in(&mut screen, "d5m");
    assert_eq!(screen.press(Press::Enter), after(300_000));
    type_in(&mut screen, "dnever");
    assert_eq!(screen.press(Press::Enter), Task::Drain("b1".into(), None));
    screen.changed(&Task::Drain("b1".into(), None), Ok(1));
    assert_eq!(screen.message, "b1 drains: 1 session left, never cut; u takes it back");
    screen.press(Press::Char('d'));
    assert_eq!(screen.press(Press::Leave), Task::Quit);
}

fn draining(number: u32, by: &str) -> BackendStatus {
    let drain = DrainStatus { by: Some(by.into()), ..DrainStatus::default() };
    let drains_in_ms = Some(25_000);
    BackendStatus { state: BackendState::Draining, drain, drains_in_ms, ..backend(number, 2) }
}

#[test]
fn a_drain_is_taken_back_where_there_is_one() {
    let mut screen = screen();
    let undrain = Task::Undrain("b1".into());
    assert_eq!(screen.press(Press::Char('u')), undrain, "it may drain since the last look");
    screen.looked(Ok(status(2000, vec![draining(1, "operator")])));
    assert_eq!(screen.press(Press::Char('u')), undrain);
    screen.changed(&undrain, Ok(2));
    assert_eq!(screen.message, "b1 no longer drains");
    screen.changed(&undrain, Err("refused: you may not".into()));
    assert_eq!(screen.message, "refused: you may not");
    screen.looked(Ok(Status { drain_ms: None, ..status(3000, vec![draining(1, "operator")]) }));
    screen.changed(&undrain, Err("POST to /backends/ID/drain".into()));
    assert!(screen.message.starts_with("this balancer is older"), "{}", screen.message);
}

#[test]
fn a_backend_that_leaves_takes_the_question_about_it_along() {
    let mut screen = screen();
    type_in(&mut screen, "d5");
    screen.looked(Ok(status(2000, vec![backend(1, 2)])));
    assert!(screen.overlay.is_some(), "it is asked until there is an answer");
    let left = BackendStatus { state: BackendState::Left, ..backend(1, 2) };
    screen.looked(Ok(status(3000, vec![left])));
    assert_eq!((screen.message.as_str(), &screen.overlay), ("b1 has left", &None));
    screen.press(Press::Char('d'));
    assert_eq!(screen.message, "b1 has left: it gets no new sessions");
    assert_eq!(screen.press(Press::Char('u')), Task::Nothing);
    assert_eq!(screen.message, "b1 has left: there is nothing to take back");
    assert_eq!(screen.overlay, None);
}

#[test]
fn help_is_scrolled_by_arrows_and_closed_by_any_other_key() {
    let mut screen = screen();
    type_in(&mut screen, "/?");
    assert_eq!((screen.backends.filter.as_str(), &screen.overlay), ("?", &None), "a letter");
    screen.press(Press::Back);
    type_in(&mut screen, "?");
    for (key, first) in [(Press::Down, 1), (Press::Char('j'), 2), (Press::Up, 1), (Press::Home, 0)]
    {
        screen.press(key);
        assert_eq!(screen.overlay, Some(Overlay::Help { first }));
    }
    assert_eq!((screen.press(Press::Char('q')), &screen.overlay), (Task::Nothing, &None));
}

#[test]
fn a_balancer_that_is_away_is_told_until_it_is_back_and_a_refusal_goes_before() {
    let mut screen = screen();
    screen.looked(Err("cannot be reached".into()));
    assert_eq!(screen.trouble.as_deref(), Some("cannot be reached"));
    assert_eq!(ids(&screen).len(), 3, "the last look is still shown");
    screen.changed(&Task::Undrain("b1".into()), Err("refused".into()));
    screen.looked(Err("cannot be reached".into()));
    assert_eq!(screen.message, "refused");
    screen.press(Press::Down);
    screen.looked(Ok(status(2000, vec![backend(1, 1)])));
    assert_eq!((screen.trouble.as_deref(), screen.message.as_str()), (None, ""));
    screen.looked(Ok(Status { pid: 8, ..status(10, Vec::new()) }));
    assert_eq!(screen.message, "the balancer has been restarted");
}

fn shops(uptime_ms: u64) -> Status {
    let at = |number: u32, name: &str| BackendStatus { service: name.into(), ..backend(number, 1) };
    let mut status = status(uptime_ms, vec![at(1, "a"), at(2, "b"), at(3, "b")]);
    status.services = vec![service("a", 1, 0), service("b", 2, 0), service("c", 1, 0)];
    status
}

fn names(screen: &Screen) -> Vec<&str> {
    screen.service_rows().map(|(service, _)| service.name.as_str()).collect()
}

#[test]
fn one_goes_from_the_services_to_one_of_them_to_its_sessions_and_back() {
    let mut screen = Screen::default();
    screen.looked(Ok(shops(1000)));
    assert_eq!(names(&screen), ["a", "b", "c"]);
    assert_eq!(screen.press(Press::Char('d')), Task::Nothing, "a service cannot be drained");
    assert!(screen.message.starts_with("d and u are for backends"));
    screen.press(Press::Down);
    assert_eq!(screen.press(Press::Enter), Task::Nothing);
    assert_eq!(screen.list, List::Backends { service: Some("b".into()) });
    assert_eq!(ids(&screen), ["b2", "b3"]);
    assert_eq!(screen.press(Press::Char('a')), Task::Sessions(Of::Service("b".into())));
    screen.press(Press::Back);
    screen.press(Press::Down);
    assert_eq!(screen.press(Press::Enter), Task::Sessions(of("b3")));
    screen.press(Press::Back);
    assert_eq!((ids(&screen), screen.chosen), (vec!["b2".to_owned(), "b3".to_owned()], 1));
    type_in(&mut screen, "/b2");
    screen.press(Press::Enter);
    screen.press(Press::Back);
    assert_eq!(ids(&screen).len(), 2, "the first Escape ends the filter");
    screen.press(Press::Back);
    assert_eq!((names(&screen), screen.chosen), (vec!["a", "b", "c"], 1));
    screen.press(Press::Char('b'));
    assert_eq!(ids(&screen), ["b1", "b2", "b3"]);
}

#[test]
fn the_cursor_follows_its_row_and_stays_at_the_top_if_it_is_there() {
    let mut screen = Screen::default();
    screen.looked(Ok(shops(1000)));
    let mut trouble = shops(2000);
    trouble.services[2] = service("c", 0, 1);
    screen.looked(Ok(trouble.clone()));
    assert_eq!((names(&screen), screen.chosen), (vec!["c", "a", "b"], 0));
    type_in(&mut screen, "j");
    screen.looked(Ok(shops(3000)));
    assert_eq!((names(&screen), screen.chosen), (vec!["a", "b", "c"], 0));
    type_in(&mut screen, "j");
    screen.looked(Ok(trouble));
    assert_eq!(names(&screen)[screen.chosen], "b");
}

#[test]
fn a_service_that_has_gone_is_told_and_leads_back_to_the_others() {
    let mut screen = Screen::default();
    screen.looked(Ok(shops(1000)));
    screen.press(Press::Enter);
    let mut without = shops(2000);
    without.services.remove(0);
    screen.looked(Ok(without));
    assert_eq!((screen.list.clone(), names(&screen)), (List::Services, vec!["b", "c"]));
    assert_eq!(screen.message, "there is no service a any more");
    screen.looked(Ok(status(3000, vec![backend(1, 1)])));
    assert_eq!(screen.list, List::Backends { service: None }, "only the built-in ones are left");
}

#[test]
fn the_rates_of_a_service_are_its_own_sessions_and_its_backends_bytes() {
    let mut screen = Screen::default();
    screen.looked(Ok(shops(1000)));
    let mut later = shops(3000);
    later.services[1].sessions_total += 50;
    (later.backends[1].bytes_up, later.backends[2].bytes_up) = (4000, 200);
    screen.looked(Ok(later));
    let rates: Vec<Rates> = screen.service_rows().map(|(_, rates)| rates).collect();
    let quiet = Rates { new: Some(0), up: Some(0), down: Some(0) };
    assert_eq!(rates, [quiet, Rates { new: Some(25), up: Some(2100), down: Some(0) }, quiet]);
}
