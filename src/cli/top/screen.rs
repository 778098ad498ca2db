//! What `lb top` knows and what a key does to it. Pure: a key or an answer comes in, a task goes
//! out. Owns which list is shown, the chosen row and the question before a drain; knows no terminal, no
//! clock and no balancer.

use std::ops::Range;

use super::rows::{self, Change, Growth, Rates, SortBy, View};
use crate::control::status::{BackendStatus, ServiceStatus, SessionStatus, Status};

/// Limit on the letters of a filter.
const FILTER_MAX: usize = 64;

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
    /// Drain this backend.
    Drain(String),
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

/// What is shown, and which question is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Mode {
    List,
    /// Letters go to the filter.
    Filter,
    Sessions {
        of: Of,
    },
    /// `y` drains it; every other key cancels.
    Confirm {
        backend: String,
    },
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
    pub list: List,
    pub now: Option<Status>,
    pub services: View,
    pub backends: View,
    /// The index of the row with the cursor, among the rows shown.
    pub chosen: usize,
    pub sessions: Vec<SessionStatus>,
    /// There are more sessions than were read.
    pub more: bool,
    /// What was done last, or what went wrong.
    pub message: String,
    /// What is shown is out of date: the last look failed.
    pub stale: bool,
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
            list: List::Backends { service: None },
            now: None,
            services: View::by(SortBy::Trouble),
            backends: View::by(SortBy::Id),
            chosen: 0,
            sessions: Vec::new(),
            more: false,
            message: String::new(),
            stale: false,
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
            Err(said) => {
                self.stale = true;
                self.message = said;
            }
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
        let named = status.has_named_services();
        self.now = Some(status);
        if std::mem::take(&mut self.stale) {
            self.message.clear();
        }
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
            Mode::List => self.press_on_list(key),
            Mode::Filter => self.press_on_filter(key),
            Mode::Sessions { of } => self.press_on_sessions(key, of),
            Mode::Confirm { backend } => {
                self.mode = Mode::List;
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
            Press::Char('u') => {
                if let List::Backends { service: Some(name) } = &self.list {
                    return self.open(Of::Service(name.clone()));
                }
            }
            Press::Char('d') => {
                if let Some(backend) = self.chosen_backend() {
                    self.mode = Mode::Confirm { backend };
                }
            }
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
            (Press::Char('d'), Of::Backend(backend)) => {
                self.close(Of::Backend(backend.clone()));
                self.mode = Mode::Confirm { backend };
            }
            (Press::Back | Press::Enter | Press::Erase, of) => self.close(of),
            (other, _) => self.go(other),
        }
        Task::Nothing
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
}

#[cfg(test)]
pub(super) mod tests;
