//! What `lb top` knows and what a key does to it. Pure: a key or an answer comes in, a task goes
//! out. Owns which list is shown, the chosen row and what lies over it; knows no terminal, no clock and no
//! balancer.

use std::ops::Range;
use std::time::Duration;

use super::brief::sessions;
use super::history::{Ask, Past};
pub use super::press::Press;
use super::question::{Answer, Question};
use super::rows::{self, ApiRates, Change, Growth, Rates, SortBy, View};
use crate::cli::table::lasting;
use crate::control::status::{BackendState, BackendStatus, ServiceStatus, SessionStatus, Status};
use crate::control::view::ms;

/// Limit on the letters of a filter.
const FILTER_MAX: usize = 64;

/// The deadline that is offered where the balancer does not say its own: the default of `timeouts.drain_ms`.
const DRAIN_MS: u64 = 30_000;

/// Whose sessions are shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Of {
    Backend(String),
    Service(String),
}

impl Of {
    /// The name on the screen.
    pub fn name(&self) -> &str {
        let (Of::Backend(name) | Of::Service(name)) = self;
        name
    }
}

/// What the shell must do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Task {
    Nothing,
    Quit,
    /// Read these sessions.
    Sessions(Of),
    /// Drain this backend, and cut what is left after so long; `None`: never.
    Drain(String, Option<Duration>),
    /// Take a drain back.
    Undrain(String),
}

/// The list that is shown, or lies below what is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum List {
    Services,
    /// Of one service, or of all.
    Backends {
        service: Option<String>,
    },
}

/// What is shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Mode {
    List,
    /// Letters go to the filter.
    Filter,
    Sessions {
        of: Of,
    },
    /// The last 15 minutes of a service, or of the whole.
    History {
        service: Option<String>,
    },
}

/// What lies over it and gets the keys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Overlay {
    /// What the keys and columns mean, from this line on.
    Help {
        first: usize,
    },
    Drain(Question),
}

/// A backend with its rates.
#[derive(Clone, Copy, Debug)]
pub struct Row<'s> {
    pub backend: &'s BackendStatus,
    pub change: Change,
}

/// The whole state.
#[derive(Debug)]
pub struct Screen {
    pub mode: Mode,
    pub overlay: Option<Overlay>,
    pub list: List,
    pub now: Option<Status>,
    pub services: View,
    pub backends: View,
    /// The index of the row with the cursor, among the rows shown.
    pub chosen: usize,
    pub sessions: Vec<SessionStatus>,
    /// There are more sessions than were read.
    pub more: bool,
    /// What was done last, or why it was refused; until the next key.
    pub message: String,
    /// Why the last look failed. What is shown is out of date.
    pub trouble: Option<String>,
    /// How long that has been so.
    pub silent: Duration,
    pub past: Past,
    growth: Growth,
    /// The places of the rows of the list in `now`, in order.
    shown: Vec<usize>,
    /// The name of the chosen row, which the cursor follows when the order changes. A cursor at the top stays
    /// there.
    anchor: Option<String>,
    /// The first row in sight, and how many there is room for.
    first: usize,
    room: usize,
}

impl Default for Screen {
    fn default() -> Screen {
        Screen {
            mode: Mode::List,
            overlay: None,
            list: List::Backends { service: None },
            now: None,
            services: View::by(SortBy::Trouble),
            backends: View::by(SortBy::Id),
            chosen: 0,
            sessions: Vec::new(),
            more: false,
            message: String::new(),
            trouble: None,
            silent: Duration::ZERO,
            past: Past::default(),
            growth: Growth::default(),
            shown: Vec::new(),
            anchor: None,
            first: 0,
            room: 10,
        }
    }
}

impl Screen {
    /// A look at the balancer succeeded or failed. Returns what else to read.
    pub fn looked(&mut self, answer: Result<Status, String>) -> Task {
        match answer {
            Ok(status) => self.saw(status),
            Err(said) => self.trouble = Some(said),
        }
        self.arrange();
        match &self.mode {
            Mode::Sessions { of } => Task::Sessions(of.clone()),
            _ => Task::Nothing,
        }
    }

    fn saw(&mut self, status: Status) {
        let same =
            |old: &&Status| (old.pid, old.started_unix_ms) == (status.pid, status.started_unix_ms);
        self.growth = Growth::between(self.now.as_ref().filter(same), &status);
        let is_first = self.now.is_none();
        if self.now.as_ref().is_some_and(|old| !same(&old)) {
            self.message = "the balancer has been restarted".to_owned();
        }
        let named = status.has_named_services();
        self.now = Some(status);
        (self.trouble, self.silent) = (None, Duration::ZERO);
        self.close_question_of_one_that_left();
        let gone = match &self.list {
            List::Services => !named,
            List::Backends { service: Some(name) } => self.service(name).is_none(),
            List::Backends { service: None } => false,
        };
        if let List::Backends { service: Some(name) } = &self.list
            && gone
        {
            self.message = format!("there is no service {name} any more");
        }
        if gone || (is_first && named) {
            self.enter(if named { List::Services } else { List::Backends { service: None } });
        }
    }

    /// Sessions were read.
    pub fn read(&mut self, of: &Of, answer: Result<(Vec<SessionStatus>, bool), String>) {
        if self.mode != (Mode::Sessions { of: of.clone() }) {
            return;
        }
        match answer {
            Ok((sessions, more)) => (self.sessions, self.more) = (sessions, more),
            Err(said) => self.message = said,
        }
        self.keep_choice();
    }

    /// A change was requested.
    pub fn changed(&mut self, task: &Task, answer: Result<u64, String>) {
        self.message = match (task, answer) {
            (Task::Undrain(_), Err(_)) if self.is_old() => {
                "this balancer is older than this program, and cannot take a drain back".to_owned()
            }
            (_, Err(said)) => said,
            (Task::Drain(backend, _), Ok(0)) => format!("{backend} drains and has no session"),
            (Task::Drain(backend, lasts), Ok(left)) => {
                let cut = lasts.map_or("never cut".to_owned(), |lasts| {
                    format!("cut after {}", lasting(ms(lasts)))
                });
                format!("{backend} drains: {} left, {cut}; u takes it back", sessions(left))
            }
            (Task::Undrain(backend), Ok(_)) => format!("{backend} no longer drains"),
            (_, Ok(_)) => return,
        };
    }

    /// Handles a key.
    pub fn press(&mut self, key: Press) -> Task {
        self.message.clear();
        if key == Press::Leave {
            return Task::Quit;
        }
        match self.overlay.take() {
            Some(Overlay::Help { first }) => self.press_on_help(key, first),
            Some(Overlay::Drain(question)) => self.press_on_question(key, question),
            None if key == Press::Char('?') && self.mode != Mode::Filter => {
                self.overlay = Some(Overlay::Help { first: 0 });
                Task::Nothing
            }
            None => match self.mode.clone() {
                Mode::List => self.press_on_list(key),
                Mode::Filter => self.press_on_filter(key),
                Mode::Sessions { of } => self.press_on_sessions(key, of),
                Mode::History { service } => self.press_on_history(key, service),
            },
        }
    }

    /// Arrows scroll; every other key closes it.
    fn press_on_help(&mut self, key: Press, first: usize) -> Task {
        let page = self.room.max(1);
        let first = match key {
            Press::Up | Press::Char('k') => first.saturating_sub(1),
            Press::Down | Press::Char('j') => first + 1,
            Press::PageUp => first.saturating_sub(page),
            Press::PageDown => first + page,
            Press::Home => 0,
            Press::End => usize::MAX / 2,
            _ => return Task::Nothing,
        };
        self.overlay = Some(Overlay::Help { first });
        Task::Nothing
    }

    fn press_on_question(&mut self, key: Press, mut question: Question) -> Task {
        match question.press(key) {
            Answer::Open => self.overlay = Some(Overlay::Drain(question)),
            Answer::No => self.message = format!("{} was not drained", question.backend),
            Answer::After(lasts) => return Task::Drain(question.backend, lasts),
        }
        Task::Nothing
    }

    /// Asks how long a backend's sessions may go on.
    fn ask(&mut self, backend: String) {
        let Some(found) = self.backend(&backend) else { return };
        if found.state == BackendState::Left {
            self.message = format!("{backend} has left: it gets no new sessions");
            return;
        }
        let default = self.now.as_ref().and_then(|now| now.drain_ms).unwrap_or(DRAIN_MS);
        self.overlay = Some(Overlay::Drain(Question::new(backend, default)));
    }

    /// The balancer knows whether it drains: the last look may be older than the drain.
    fn undrain(&mut self, backend: String) -> Task {
        if self.backend(&backend).is_some_and(|it| it.state == BackendState::Left) {
            self.message = format!("{backend} has left: there is nothing to take back");
            return Task::Nothing;
        }
        Task::Undrain(backend)
    }

    fn close_question_of_one_that_left(&mut self) {
        let Some(Overlay::Drain(Question { backend, .. })) = &self.overlay else { return };
        let is_here = |it: &BackendStatus| it.state != BackendState::Left;
        if !self.backend(backend).is_some_and(is_here) {
            self.message = format!("{backend} has left");
            self.overlay = None;
        }
    }

    /// Whether the balancer is of a version in which a backend that is drained leaves for good.
    pub fn is_old(&self) -> bool {
        self.now.as_ref().is_some_and(|now| now.drain_ms.is_none())
    }

    /// The backend of this id.
    pub fn backend(&self, id: &str) -> Option<&BackendStatus> {
        self.now.as_ref()?.backends.iter().find(|backend| backend.id == id)
    }

    fn press_on_list(&mut self, key: Press) -> Task {
        match key {
            Press::Char('q') => return Task::Quit,
            Press::Char('/') => self.mode = Mode::Filter,
            Press::Char('s') => {
                let all = self.orders();
                let view = self.view_mut();
                view.order = view.order.next(all);
                self.arrange();
            }
            Press::Char('r') => {
                let view = self.view_mut();
                view.reversed = !view.reversed;
                self.arrange();
            }
            Press::Char('b') if self.list == List::Services => {
                self.enter(List::Backends { service: None });
            }
            Press::Char('h') => {
                let service = match &self.list {
                    List::Services => self.chosen_name(),
                    List::Backends { service } => service.clone(),
                };
                self.mode = Mode::History { service };
            }
            Press::Char('v') => self.past.turn(),
            Press::Char('a') => {
                if let List::Backends { service: Some(name) } = &self.list {
                    return self.open(Of::Service(name.clone()));
                }
            }
            Press::Char('d' | 'u') => match self.chosen_backend() {
                Some(backend) if key == Press::Char('d') => self.ask(backend),
                Some(backend) => return self.undrain(backend),
                None if self.list == List::Services => {
                    self.message =
                        "d and u are for backends: Enter shows those of a service".into();
                }
                None => {}
            },
            Press::Enter => return self.enter_chosen(),
            Press::Back if self.view().filter.is_empty() => self.back(),
            Press::Back => {
                self.view_mut().filter.clear();
                self.arrange();
            }
            other => self.go(other),
        }
        Task::Nothing
    }

    /// Shows what is in the chosen row.
    fn enter_chosen(&mut self) -> Task {
        match (&self.list, self.chosen_name()) {
            (List::Services, Some(service)) => {
                self.enter(List::Backends { service: Some(service) });
                Task::Nothing
            }
            (List::Backends { .. }, Some(backend)) => self.open(Of::Backend(backend)),
            (_, None) => Task::Nothing,
        }
    }

    /// Returns from the backends to the services, if there are named ones.
    fn back(&mut self) {
        let List::Backends { service } = self.list.clone() else { return };
        if self.has_named_services() {
            self.enter(List::Services);
            self.point_at(service);
        }
    }

    fn press_on_filter(&mut self, key: Press) -> Task {
        let filter = &mut self.view_mut().filter;
        match key {
            Press::Char(letter) if filter.chars().count() < FILTER_MAX => filter.push(letter),
            Press::Erase => drop(filter.pop()),
            Press::Back => {
                filter.clear();
                self.mode = Mode::List;
            }
            Press::Enter => self.mode = Mode::List,
            other => self.go(other),
        }
        self.arrange();
        Task::Nothing
    }

    fn press_on_sessions(&mut self, key: Press, of: Of) -> Task {
        match (key, of) {
            (Press::Char('q'), _) => return Task::Quit,
            (Press::Char('d'), Of::Backend(backend)) => self.ask(backend),
            (Press::Char('u'), Of::Backend(backend)) => return self.undrain(backend),
            (Press::Back | Press::Enter | Press::Erase, of) => self.close(of),
            (other, _) => self.go(other),
        }
        Task::Nothing
    }

    fn press_on_history(&mut self, key: Press, service: Option<String>) -> Task {
        match key {
            Press::Char('q') => return Task::Quit,
            Press::Char('h') if service.is_some() => self.mode = Mode::History { service: None },
            Press::Back | Press::Enter | Press::Erase | Press::Char('h') => self.mode = Mode::List,
            _ => {}
        }
        Task::Nothing
    }

    /// The question about the last 15 minutes that is due.
    pub fn due(&mut self) -> Option<Ask> {
        let now = self.now.as_ref().filter(|_| self.trouble.is_none())?;
        let in_sight = self.shown.iter().skip(self.first).take(self.room);
        let wanted = match (&self.mode, &self.list) {
            (Mode::History { service }, _) => Ask::Detail { service: service.clone() },
            (_, List::Services) => Ask::Overview {
                field: self.past.field,
                services: in_sight.map(|place| now.services[*place].name.clone()).collect(),
            },
            _ => Ask::Overview { field: self.past.field, services: Vec::new() },
        };
        self.past.due(wanted, now.uptime_ms)
    }

    fn open(&mut self, of: Of) -> Task {
        self.mode = Mode::Sessions { of: of.clone() };
        self.sessions.clear();
        self.more = false;
        (self.chosen, self.first) = (0, 0);
        Task::Sessions(of)
    }

    /// Returns to the list, on the row that was left.
    fn close(&mut self, of: Of) {
        self.mode = Mode::List;
        self.point_at(match of {
            Of::Backend(backend) => Some(backend),
            Of::Service(_) => self.anchor.clone(),
        });
    }

    fn enter(&mut self, list: List) {
        self.list = list;
        // Those of another service are other rows.
        self.backends.filter.clear();
        self.mode = Mode::List;
        self.point_at(None);
    }

    /// Puts the cursor on the row of this name, or on the first.
    fn point_at(&mut self, name: Option<String>) {
        (self.chosen, self.first, self.anchor) = (0, 0, name);
        self.arrange();
    }

    fn go(&mut self, key: Press) {
        let page = self.room.max(1);
        self.chosen = match key {
            Press::Up | Press::Char('k') => self.chosen.saturating_sub(1),
            Press::Down | Press::Char('j') => self.chosen + 1,
            Press::PageUp => self.chosen.saturating_sub(page),
            Press::PageDown => self.chosen + page,
            Press::Home => 0,
            Press::End => usize::MAX,
            _ => self.chosen,
        };
        self.keep_choice();
    }

    /// The number of rows of what is shown.
    pub fn count(&self) -> usize {
        match self.mode {
            Mode::Sessions { .. } => self.sessions.len(),
            _ => self.shown.len(),
        }
    }

    fn keep_choice(&mut self) {
        self.chosen = self.chosen.min(self.count().saturating_sub(1));
        if !matches!(self.mode, Mode::Sessions { .. }) {
            self.anchor = self.chosen_name().filter(|_| self.chosen > 0);
        }
    }

    /// Sorts and filters the list anew. The cursor stays on the row that it was on, or where it was if that
    /// has gone.
    fn arrange(&mut self) {
        let Some(now) = &self.now else { return };
        self.shown = match &self.list {
            List::Services => rows::services(now, &self.growth, &self.services),
            List::Backends { service } => {
                rows::backends(now, &self.growth, service.as_deref(), &self.backends)
            }
        };
        if matches!(self.mode, Mode::Sessions { .. }) {
            return;
        }
        let wanted = self.anchor.as_deref();
        let place = self.shown.iter().position(|place| Some(self.name_at(*place)) == wanted);
        self.chosen = place.unwrap_or(self.chosen);
        self.keep_choice();
    }

    /// The rows in sight when there is room for so many: the cursor is always among them.
    pub fn window(&mut self, room: usize) -> Range<usize> {
        let (count, room) = (self.count(), room.max(1));
        let least = (self.chosen + 1).saturating_sub(room);
        self.first = self.first.clamp(least, self.chosen).min(count.saturating_sub(room));
        self.room = room;
        self.first..count.min(self.first + room)
    }

    fn name_at(&self, place: usize) -> &str {
        let Some(now) = &self.now else { return "" };
        match self.list {
            List::Services => &now.services[place].name,
            List::Backends { .. } => &now.backends[place].id,
        }
    }

    fn chosen_name(&self) -> Option<String> {
        self.shown.get(self.chosen).map(|place| self.name_at(*place).to_owned())
    }

    fn chosen_backend(&self) -> Option<String> {
        self.chosen_name().filter(|_| self.list != List::Services)
    }

    pub fn view(&self) -> &View {
        match self.list {
            List::Services => &self.services,
            List::Backends { .. } => &self.backends,
        }
    }

    fn view_mut(&mut self) -> &mut View {
        match self.list {
            List::Services => &mut self.services,
            List::Backends { .. } => &mut self.backends,
        }
    }

    fn orders(&self) -> &'static [SortBy] {
        match self.list {
            List::Services => SortBy::SERVICES,
            List::Backends { .. } => SortBy::BACKENDS,
        }
    }

    pub fn has_named_services(&self) -> bool {
        self.now.as_ref().is_some_and(Status::has_named_services)
    }

    pub fn service(&self, name: &str) -> Option<&ServiceStatus> {
        self.now.as_ref()?.services.iter().rfind(|service| service.name == name)
    }

    /// The backends that the filter lets through, in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Row<'_>> {
        let backends = match self.list {
            List::Services => &[],
            List::Backends { .. } => self.shown.as_slice(),
        };
        let all = self.now.as_ref().map_or(&[][..], |now| &now.backends);
        backends
            .iter()
            .map(|place| Row { backend: &all[*place], change: self.growth.backends[*place] })
    }

    /// The services that the filter lets through, in order.
    pub fn service_rows(&self) -> impl ExactSizeIterator<Item = (&ServiceStatus, Rates)> {
        let services = match self.list {
            List::Services => self.shown.as_slice(),
            List::Backends { .. } => &[],
        };
        let all = self.now.as_ref().map_or(&[][..], |now| &now.services);
        services.iter().map(|place| (&all[*place], self.growth.services[*place]))
    }

    /// The traffic of all users together.
    pub fn totals(&self) -> Rates {
        self.growth.all
    }

    /// What the API door does.
    pub fn api(&self) -> Option<ApiRates> {
        self.growth.api
    }
}

#[cfg(test)]
pub(super) mod tests;
