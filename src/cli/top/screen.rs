//! What `lb top` knows and what a key does to it. Pure: a key or an answer comes in, a task goes
//! out. Owns order, filter, the chosen row and the question before a drain; knows no terminal, no
//! clock and no balancer.

use crate::control::status::{BackendStatus, SessionStatus, Status};

/// Limit on the letters of a filter.
const FILTER_MAX: usize = 64;
/// How many rows a page key moves.
const PAGE: usize = 10;

/// A key as the screen understands it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Press {
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    Enter,
    /// Escape.
    Back,
    Erase,
    Char(char),
    /// Control-C.
    Leave,
}

/// What the shell must do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Task {
    Nothing,
    Quit,
    /// Read the sessions of this backend.
    Sessions(String),
    /// Drain this backend.
    Drain(String),
}

/// What is shown, and which question is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Mode {
    Backends,
    /// Letters go to the filter.
    Filter,
    Sessions {
        backend: String,
    },
    /// `y` drains it; every other key cancels.
    Confirm {
        backend: String,
    },
}

/// What backends are sorted by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SortBy {
    Id,
    Address,
    State,
    Sessions,
    New,
    Bytes,
    Hello,
}

impl SortBy {
    const ALL: [SortBy; 7] = [
        SortBy::Id,
        SortBy::Address,
        SortBy::State,
        SortBy::Sessions,
        SortBy::New,
        SortBy::Bytes,
        SortBy::Hello,
    ];

    /// Its name on the screen.
    pub fn name(self) -> &'static str {
        match self {
            SortBy::Id => "id",
            SortBy::Address => "address",
            SortBy::State => "state",
            SortBy::Sessions => "sessions",
            SortBy::New => "new/s",
            SortBy::Bytes => "bytes/s",
            SortBy::Hello => "hello",
        }
    }

    fn next(self) -> SortBy {
        let place = SortBy::ALL.iter().position(|order| *order == self);
        let place = place.expect("the list holds every order");
        SortBy::ALL[(place + 1) % SortBy::ALL.len()]
    }
}

/// Growth since the previous look, per second; `None` until there have been two looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rates {
    pub new: Option<u64>,
    pub up: Option<u64>,
    pub down: Option<u64>,
}

/// A backend with its rates.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    pub backend: BackendStatus,
    pub rates: Rates,
    /// Users were turned away from it for lack of room since the previous look.
    pub no_room: bool,
}

/// The whole state.
#[derive(Debug)]
pub struct Screen {
    pub mode: Mode,
    pub now: Option<Status>,
    pub order: SortBy,
    pub reversed: bool,
    pub filter: String,
    /// The index of the row with the cursor, among the rows shown.
    pub chosen: usize,
    pub sessions: Vec<SessionStatus>,
    /// There are more sessions than were read.
    pub more: bool,
    /// What was done last, or what went wrong.
    pub message: String,
    /// What is shown is out of date: the last look failed.
    pub stale: bool,
    before: Option<Status>,
}

impl Default for Screen {
    fn default() -> Screen {
        Screen {
            mode: Mode::Backends,
            now: None,
            order: SortBy::Id,
            reversed: false,
            filter: String::new(),
            chosen: 0,
            sessions: Vec::new(),
            more: false,
            message: String::new(),
            stale: false,
            before: None,
        }
    }
}

impl Screen {
    /// A look at the balancer succeeded or failed. Returns what else to read.
    pub fn looked(&mut self, answer: Result<Status, String>) -> Task {
        match answer {
            Ok(status) => {
                let same = |old: &Status| {
                    (old.pid, old.started_unix_ms) == (status.pid, status.started_unix_ms)
                };
                self.before = self.now.take().filter(same);
                self.now = Some(status);
                if std::mem::take(&mut self.stale) {
                    self.message.clear();
                }
            }
            Err(said) => {
                self.stale = true;
                self.message = said;
            }
        }
        self.keep_choice();
        match &self.mode {
            Mode::Sessions { backend } => Task::Sessions(backend.clone()),
            _ => Task::Nothing,
        }
    }

    /// The sessions of a backend were read.
    pub fn read(&mut self, of: &str, answer: Result<(Vec<SessionStatus>, bool), String>) {
        if self.mode != (Mode::Sessions { backend: of.to_owned() }) {
            return;
        }
        match answer {
            Ok((sessions, more)) => (self.sessions, self.more) = (sessions, more),
            Err(said) => self.message = said,
        }
        self.keep_choice();
    }

    /// A drain was requested.
    pub fn drained(&mut self, backend: &str, answer: Result<u64, String>) {
        self.message = match answer {
            Ok(left) => format!("{backend} drains, {left} sessions left"),
            Err(said) => said,
        };
    }

    /// Handles a key.
    pub fn press(&mut self, key: Press) -> Task {
        if key == Press::Leave {
            return Task::Quit;
        }
        match self.mode.clone() {
            Mode::Backends => self.press_on_backends(key),
            Mode::Filter => self.press_on_filter(key),
            Mode::Sessions { backend } => self.press_on_sessions(key, backend),
            Mode::Confirm { backend } => {
                self.mode = Mode::Backends;
                match key {
                    Press::Char('y' | 'Y') => Task::Drain(backend),
                    _ => {
                        self.message = format!("{backend} was not drained");
                        Task::Nothing
                    }
                }
            }
        }
    }

    fn press_on_backends(&mut self, key: Press) -> Task {
        match key {
            Press::Char('q') => return Task::Quit,
            Press::Char('/') => self.mode = Mode::Filter,
            Press::Char('s') => self.order = self.order.next(),
            Press::Char('r') => self.reversed = !self.reversed,
            Press::Char('d') => {
                if let Some(backend) = self.chosen_backend() {
                    self.mode = Mode::Confirm { backend };
                }
            }
            Press::Enter => {
                if let Some(backend) = self.chosen_backend() {
                    self.open(backend.clone());
                    return Task::Sessions(backend);
                }
            }
            Press::Back => self.filter.clear(),
            other => self.go(other),
        }
        self.keep_choice();
        Task::Nothing
    }

    fn press_on_filter(&mut self, key: Press) -> Task {
        match key {
            Press::Char(letter) if self.filter.chars().count() < FILTER_MAX => {
                self.filter.push(letter);
            }
            Press::Erase => {
                self.filter.pop();
            }
            Press::Back => {
                self.filter.clear();
                self.mode = Mode::Backends;
            }
            Press::Enter => self.mode = Mode::Backends,
            other => self.go(other),
        }
        self.keep_choice();
        Task::Nothing
    }

    fn press_on_sessions(&mut self, key: Press, backend: String) -> Task {
        match key {
            Press::Char('q') => return Task::Quit,
            Press::Char('d') => {
                self.close(&backend);
                self.mode = Mode::Confirm { backend };
            }
            Press::Back | Press::Enter | Press::Erase => self.close(&backend),
            other => self.go(other),
        }
        self.keep_choice();
        Task::Nothing
    }

    fn open(&mut self, backend: String) {
        self.mode = Mode::Sessions { backend };
        self.sessions.clear();
        self.more = false;
        self.chosen = 0;
    }

    /// Returns to the table, on the row that was left.
    fn close(&mut self, backend: &str) {
        self.mode = Mode::Backends;
        self.chosen = self.rows().iter().position(|row| row.backend.id == backend).unwrap_or(0);
    }

    fn go(&mut self, key: Press) {
        self.chosen = match key {
            Press::Up | Press::Char('k') => self.chosen.saturating_sub(1),
            Press::Down | Press::Char('j') => self.chosen + 1,
            Press::PageUp => self.chosen.saturating_sub(PAGE),
            Press::PageDown => self.chosen + PAGE,
            Press::Home => 0,
            Press::End => usize::MAX,
            _ => self.chosen,
        };
    }

    fn keep_choice(&mut self) {
        let count = match self.mode {
            Mode::Sessions { .. } => self.sessions.len(),
            _ => self.rows().len(),
        };
        self.chosen = self.chosen.min(count.saturating_sub(1));
    }

    fn chosen_backend(&self) -> Option<String> {
        self.rows().get(self.chosen).map(|row| row.backend.id.clone())
    }

    /// The backends that the filter lets through, in order.
    pub fn rows(&self) -> Vec<Row> {
        let Some(now) = &self.now else { return Vec::new() };
        let wanted = self.filter.to_lowercase();
        let mut rows: Vec<Row> = now
            .backends
            .iter()
            .filter(|backend| described(backend).contains(&wanted))
            .map(|backend| Row {
                rates: self.rates(backend),
                no_room: self.is_short(backend),
                backend: backend.clone(),
            })
            .collect();
        rows.sort_by_key(|row| self.rank(row));
        if self.reversed {
            rows.reverse();
        }
        rows
    }

    /// Numbers sort in descending order, names in their own.
    fn rank(&self, row: &Row) -> (u64, String, u64) {
        let backend = &row.backend;
        let id = backend.id.trim_start_matches('b').parse().unwrap_or(u64::MAX);
        let greatest = |value: u64| (u64::MAX - value, String::new(), id);
        match self.order {
            SortBy::Id => (0, String::new(), id),
            SortBy::Address => (0, backend.address.to_string(), id),
            SortBy::State => (u64::MAX - backend.state as u64, String::new(), id),
            SortBy::Sessions => greatest(backend.sessions_active),
            SortBy::New => greatest(row.rates.new.unwrap_or(0)),
            SortBy::Bytes => {
                greatest(row.rates.up.unwrap_or(0).saturating_add(row.rates.down.unwrap_or(0)))
            }
            SortBy::Hello => {
                let misses = u64::from(backend.hello.misses) << 40;
                greatest(misses.saturating_add(backend.hello.took_us.unwrap_or(0)))
            }
        }
    }

    fn is_short(&self, backend: &BackendStatus) -> bool {
        let before = self.before.as_ref().filter(|_| self.elapsed_ms().is_some());
        let old = before.and_then(|it| it.backends.iter().find(|old| old.id == backend.id));
        old.is_some_and(|old| backend.turned_away > old.turned_away)
    }

    fn rates(&self, backend: &BackendStatus) -> Rates {
        let old = self.before.as_ref().and_then(|before| {
            let old = before.backends.iter().find(|old| old.id == backend.id)?;
            Some((old, self.elapsed_ms()?))
        });
        let Some((old, ms)) = old else { return Rates::default() };
        let rate = |new: u64, old: u64| Some(new.saturating_sub(old).saturating_mul(1000) / ms);
        Rates {
            new: rate(backend.sessions_total, old.sessions_total),
            up: rate(backend.bytes_up, old.bytes_up),
            down: rate(backend.bytes_down, old.bytes_down),
        }
    }

    /// The traffic of all users together.
    pub fn totals(&self) -> Rates {
        let looks = self.before.as_ref().zip(self.now.as_ref()).zip(self.elapsed_ms());
        let Some(((old, new), ms)) = looks else { return Rates::default() };
        let (old, new) = (&old.sessions, &new.sessions);
        let rate = |new: u64, old: u64| Some(new.saturating_sub(old).saturating_mul(1000) / ms);
        Rates {
            new: rate(new.started, old.started),
            up: rate(new.bytes_up, old.bytes_up),
            down: rate(new.bytes_down, old.bytes_down),
        }
    }

    /// The time between the two looks, by the balancer's own clock.
    fn elapsed_ms(&self) -> Option<u64> {
        let (before, now) = (self.before.as_ref()?, self.now.as_ref()?);
        now.uptime_ms.checked_sub(before.uptime_ms).filter(|ms| *ms > 0)
    }
}

/// The text that the filter searches.
fn described(backend: &BackendStatus) -> String {
    let name = backend.name.as_deref().unwrap_or("");
    let (protocol, state) = (backend.protocol, backend.state.name());
    let service = &backend.service;
    format!("{} {service} {protocol} {} {name} {state}", backend.id, backend.address).to_lowercase()
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cluster::Protocol;
    use crate::control::status::{
        BackendState, CheckStatus, Doors, HelloStatus, ReloadStatus, RunState, SCHEMA,
        SessionTotals, Timings,
    };

    pub fn backend(number: u32, sessions: u64) -> BackendStatus {
        BackendStatus {
            proxy: None,
            id: format!("b{number}"),
            service: "tcp".into(),
            protocol: Protocol::Tcp,
            address: format!("10.0.0.{number}:80").parse().unwrap(),
            name: Some(format!("web-{number}")),
            group: None,
            weight: 1,
            state: BackendState::Serving,
            turns: 1,
            round: 4,
            registered_unix_ms: 0,
            hello: HelloStatus { answered_unix_ms: None, took_us: Some(150), misses: 0 },
            check: CheckStatus::default(),
            drains_in_ms: None,
            sessions_active: sessions,
            sessions_total: 100 * sessions,
            connects_failed: 0,
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
            doors: Doors::default(),
            policy: "round_robin".into(),
            snapshot: 1,
            services: Vec::new(),
            sessions: SessionTotals { active: 6, limit: 100, ..SessionTotals::default() },
            backends,
            workers: Vec::new(),
            timings: Timings::default(),
            reload: ReloadStatus::default(),
            control: BTreeMap::new(),
        }
    }

    pub fn screen() -> Screen {
        let mut screen = Screen::default();
        screen.looked(Ok(status(1000, vec![backend(1, 2), backend(2, 3), backend(10, 1)])));
        screen
    }

    fn ids(screen: &Screen) -> Vec<String> {
        screen.rows().into_iter().map(|row| row.backend.id).collect()
    }

    fn type_in(screen: &mut Screen, text: &str) {
        for letter in text.chars() {
            screen.press(Press::Char(letter));
        }
    }

    #[test]
    fn rates_are_what_grew_between_two_looks_of_the_same_process() {
        let mut screen = screen();
        assert_eq!(screen.rows()[0].rates, Rates::default(), "one look tells no rate");
        let mut grown = backend(1, 2);
        grown.sessions_total += 50;
        grown.bytes_up = 4000;
        screen.looked(Ok(status(3000, vec![grown.clone(), backend(3, 9)])));
        let rates = Rates { new: Some(25), up: Some(2000), down: Some(0) };
        assert_eq!(screen.rows()[0].rates, rates);
        assert_eq!(screen.rows()[1].rates, Rates::default(), "it was not there before");
        screen.looked(Ok(Status { pid: 8, ..status(5000, vec![grown]) }));
        assert_eq!(screen.rows()[0].rates, Rates::default(), "another process counts anew");
    }

    #[test]
    fn backends_are_sorted_by_number_by_load_and_backwards() {
        let mut screen = screen();
        assert_eq!(ids(&screen), ["b1", "b2", "b10"]);
        type_in(&mut screen, "sss");
        assert_eq!(screen.order, SortBy::Sessions);
        assert_eq!(ids(&screen), ["b2", "b1", "b10"]);
        type_in(&mut screen, "r");
        assert_eq!(ids(&screen), ["b10", "b1", "b2"]);
        type_in(&mut screen, "ssss");
        assert_eq!(screen.order, SortBy::Id, "after the last comes the first");
    }

    #[test]
    fn a_filter_takes_every_letter_and_narrows_at_once() {
        let mut screen = screen();
        type_in(&mut screen, "/WEB-1");
        assert_eq!(ids(&screen), ["b1", "b10"]);
        screen.press(Press::Erase);
        assert_eq!(ids(&screen).len(), 3);
        type_in(&mut screen, "qd");
        assert_eq!((screen.filter.as_str(), ids(&screen).len()), ("WEB-qd", 0));
        screen.press(Press::Enter);
        assert_eq!(screen.press(Press::Char('d')), Task::Nothing, "there is nothing to drain");
        assert_eq!(screen.mode, Mode::Backends);
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
        assert_eq!(screen.press(Press::Enter), Task::Sessions("b2".into()));
        let again = screen.looked(Ok(status(2000, vec![backend(1, 2), backend(2, 3)])));
        assert_eq!(again, Task::Sessions("b2".into()), "they are kept fresh");
        screen.read("b1", Err("an answer of before".into()));
        assert_eq!(screen.message, "");
        screen.read("b2", Ok((Vec::new(), true)));
        assert!(screen.more);
        screen.press(Press::Back);
        assert_eq!((screen.mode.clone(), screen.chosen), (Mode::Backends, 1));
    }

    #[test]
    fn a_backend_is_drained_after_a_yes_and_by_nothing_else() {
        let mut screen = screen();
        for key in [Press::Enter, Press::Char('n'), Press::Back, Press::Char('d')] {
            screen.press(Press::Char('d'));
            assert_eq!(screen.mode, Mode::Confirm { backend: "b1".into() });
            assert_eq!(screen.press(key), Task::Nothing, "{key:?}");
            assert_eq!(screen.message, "b1 was not drained");
        }
        screen.press(Press::Char('d'));
        assert_eq!(screen.press(Press::Char('y')), Task::Drain("b1".into()));
        screen.drained("b1", Ok(2));
        assert_eq!(screen.message, "b1 drains, 2 sessions left");
        screen.press(Press::Char('d'));
        assert_eq!(screen.press(Press::Leave), Task::Quit);
    }

    #[test]
    fn a_balancer_that_is_away_is_told_until_it_is_back() {
        let mut screen = screen();
        screen.looked(Err("cannot be reached".into()));
        assert!(screen.stale && screen.message == "cannot be reached");
        assert_eq!(ids(&screen).len(), 3, "the last look is still shown");
        screen.looked(Ok(status(2000, Vec::new())));
        assert!(!screen.stale && screen.message.is_empty());
    }
}
