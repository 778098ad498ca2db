//! The rows of `lb top`: what grew between two looks, in which order services and backends stand, and which
//! a filter lets through. Pure; everything that takes the whole of a status is done here once a look or a
//! key, not once for each drawing.

use std::collections::HashMap;

use crate::cli::trouble::{self, Trouble};
use crate::control::status::{BackendStatus, ServiceStatus, Status};

/// What a list is sorted by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SortBy {
    Id,
    Address,
    State,
    Trouble,
    Name,
    Sessions,
    New,
    Bytes,
    Hello,
    TurnedAway,
}

impl SortBy {
    pub const BACKENDS: &[SortBy] = &[
        SortBy::Id,
        SortBy::Address,
        SortBy::State,
        SortBy::Sessions,
        SortBy::New,
        SortBy::Bytes,
        SortBy::Hello,
    ];

    pub const SERVICES: &[SortBy] = &[
        SortBy::Trouble,
        SortBy::Name,
        SortBy::Sessions,
        SortBy::New,
        SortBy::Bytes,
        SortBy::TurnedAway,
    ];

    /// Its name on the screen.
    pub fn name(self) -> &'static str {
        match self {
            SortBy::Id => "id",
            SortBy::Address => "address",
            SortBy::State => "state",
            SortBy::Trouble => "trouble",
            SortBy::Name => "name",
            SortBy::Sessions => "sessions",
            SortBy::New => "new/s",
            SortBy::Bytes => "bytes/s",
            SortBy::Hello => "hello",
            SortBy::TurnedAway => "turned away",
        }
    }

    /// The one after it among `all`.
    pub fn next(self, all: &[SortBy]) -> SortBy {
        let place = all.iter().position(|order| *order == self).map_or(0, |place| place + 1);
        all[place % all.len()]
    }
}

/// The order of a list, and what is shown of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct View {
    pub order: SortBy,
    pub reversed: bool,
    pub filter: String,
}

impl View {
    pub const fn by(order: SortBy) -> View {
        View { order, reversed: false, filter: String::new() }
    }
}

/// Growth since the previous look, per second; `None` until there have been two looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rates {
    pub new: Option<u64>,
    pub up: Option<u64>,
    pub down: Option<u64>,
}

impl Rates {
    fn bytes(self) -> u64 {
        self.up.unwrap_or(0).saturating_add(self.down.unwrap_or(0))
    }

    /// Adds the bytes of one backend to those of its service.
    fn add_bytes(&mut self, of: Rates) {
        let sum = |all: Option<u64>, one: Option<u64>| match (all, one) {
            (all, None) => all,
            (all, Some(one)) => Some(all.unwrap_or(0).saturating_add(one)),
        };
        (self.up, self.down) = (sum(self.up, of.up), sum(self.down, of.down));
    }
}

/// What has happened to one backend since the previous look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Change {
    pub rates: Rates,
    /// Users were turned away from it for lack of room.
    pub no_room: bool,
}

/// What the API door did since the previous look, per second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ApiRates {
    pub requests: u64,
    /// Answered with an error because of the user (4xx), or because no backend answered (5xx).
    pub refused: u64,
    pub failed: u64,
}

/// What grew between two looks at the same process.
#[derive(Debug, Default)]
pub struct Growth {
    /// By the places of the backends and services in the later look.
    pub backends: Vec<Change>,
    pub services: Vec<Rates>,
    /// The traffic of all users together.
    pub all: Rates,
    pub api: Option<ApiRates>,
}

impl Growth {
    pub fn between(before: Option<&Status>, now: &Status) -> Growth {
        // By the balancer's own clock.
        let elapsed = |old: &&Status| now.uptime_ms > old.uptime_ms;
        let Some(before) = before.filter(elapsed) else {
            return Growth {
                backends: vec![Change::default(); now.backends.len()],
                services: vec![Rates::default(); now.services.len()],
                all: Rates::default(),
                api: None,
            };
        };
        let ms = now.uptime_ms - before.uptime_ms;
        let rate = |new: u64, old: u64| Some(new.saturating_sub(old).saturating_mul(1000) / ms);
        let old: HashMap<&str, &BackendStatus> =
            before.backends.iter().map(|backend| (backend.id.as_str(), backend)).collect();
        let change = |backend: &BackendStatus| {
            let Some(old) = old.get(backend.id.as_str()) else { return Change::default() };
            let rates = Rates {
                new: rate(backend.sessions_total, old.sessions_total),
                up: rate(backend.bytes_up, old.bytes_up),
                down: rate(backend.bytes_down, old.bytes_down),
            };
            Change { rates, no_room: backend.turned_away > old.turned_away }
        };
        let backends: Vec<Change> = now.backends.iter().map(change).collect();
        let (new, old) = (&now.sessions, &before.sessions);
        let all = Rates {
            new: rate(new.started, old.started),
            up: rate(new.bytes_up, old.bytes_up),
            down: rate(new.bytes_down, old.bytes_down),
        };
        let of_workers = |name: &str| {
            let grown = rate(counted(now, name), counted(before, name));
            grown.unwrap_or(0)
        };
        let api = ApiRates {
            requests: of_workers("api_requests"),
            refused: of_workers("api_refused"),
            failed: of_workers("api_failed"),
        };
        let services = of_services(before, now, &backends, rate);
        Growth { services, backends, all, api: Some(api) }
    }
}

/// What all workers together have counted under this name.
pub fn counted(status: &Status, name: &str) -> u64 {
    status.workers.iter().filter_map(|worker| worker.counters.get(name)).sum()
}

fn of_services(
    before: &Status,
    now: &Status,
    backends: &[Change],
    rate: impl Fn(u64, u64) -> Option<u64>,
) -> Vec<Rates> {
    let given = before.services.iter().map(|it| (it.name.as_str(), it.sessions_total));
    let given: HashMap<&str, u64> = given.collect();
    let mut bytes: HashMap<&str, Rates> = HashMap::new();
    for (backend, change) in now.backends.iter().zip(backends) {
        bytes.entry(&backend.service).or_default().add_bytes(change.rates);
    }
    let rates = |service: &ServiceStatus| {
        let Some(old) = given.get(service.name.as_str()) else { return Rates::default() };
        let Rates { up, down, .. } = bytes.get(service.name.as_str()).copied().unwrap_or_default();
        Rates {
            new: rate(service.sessions_total, *old),
            up: up.or(Some(0)),
            down: down.or(Some(0)),
        }
    };
    now.services.iter().map(rates).collect()
}

/// The places of the backends to show, in order; of one service, or of all.
pub fn backends(now: &Status, growth: &Growth, service: Option<&str>, view: &View) -> Vec<usize> {
    let wanted = view.filter.to_lowercase();
    let shown = |place: &usize| {
        let backend = &now.backends[*place];
        service.is_none_or(|service| backend.service == service)
            && described(backend).contains(&wanted)
    };
    let mut places: Vec<usize> = (0..now.backends.len()).filter(shown).collect();
    let rank =
        |place: &usize| backend_rank(&now.backends[*place], growth.backends[*place], view.order);
    places.sort_by_cached_key(rank);
    turned(places, view)
}

/// The places of the services to show, in order.
pub fn services(now: &Status, growth: &Growth, view: &View) -> Vec<usize> {
    let wanted = view.filter.to_lowercase();
    let shown = |place: &usize| {
        let service = &now.services[*place];
        format!("{} {}", service.name, service.protocol).to_lowercase().contains(&wanted)
    };
    let mut places: Vec<usize> = (0..now.services.len()).filter(shown).collect();
    let rank =
        |place: &usize| service_rank(&now.services[*place], growth.services[*place], view.order);
    places.sort_by_cached_key(rank);
    turned(places, view)
}

fn turned(mut places: Vec<usize>, view: &View) -> Vec<usize> {
    if view.reversed {
        places.reverse();
    }
    places
}

/// Numbers sort in descending order, names in their own.
fn backend_rank(backend: &BackendStatus, change: Change, order: SortBy) -> (u64, String, u64) {
    let id = backend.id.trim_start_matches('b').parse().unwrap_or(u64::MAX);
    let greatest = |value: u64| (u64::MAX - value, String::new(), id);
    match order {
        SortBy::Address => (0, backend.address.to_string(), id),
        SortBy::Name => (0, backend.name.clone().unwrap_or_default(), id),
        SortBy::State => greatest(backend.state as u64),
        SortBy::Trouble => (u64::from(trouble::urgency(backend)), String::new(), id),
        SortBy::Sessions => greatest(backend.sessions_active),
        SortBy::New => greatest(change.rates.new.unwrap_or(0)),
        SortBy::Bytes => greatest(change.rates.bytes()),
        SortBy::Hello => {
            let misses = u64::from(backend.hello.misses) << 40;
            greatest(misses.saturating_add(backend.hello.took_us.unwrap_or(0)))
        }
        SortBy::TurnedAway => greatest(backend.turned_away),
        SortBy::Id => (0, String::new(), id),
    }
}

fn service_rank(service: &ServiceStatus, rates: Rates, order: SortBy) -> (u64, String) {
    let greatest = |value: u64| (u64::MAX - value, service.name.clone());
    match order {
        SortBy::Trouble => (Trouble::of(service) as u64, service.name.clone()),
        SortBy::Sessions => greatest(service.sessions_active),
        SortBy::New => greatest(rates.new.unwrap_or(0)),
        SortBy::Bytes => greatest(rates.bytes()),
        SortBy::TurnedAway => greatest(trouble::turned_away(service)),
        _ => (0, service.name.clone()),
    }
}

/// The text that the filter searches.
fn described(backend: &BackendStatus) -> String {
    let name = backend.name.as_deref().unwrap_or("");
    let (protocol, state) = (backend.protocol, backend.state.name());
    let service = backend.membership();
    format!("{} {service} {protocol} {} {name} {state}", backend.id, backend.address).to_lowercase()
}
