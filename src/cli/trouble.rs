//! What an operator looks for in a long list: the services and backends that need somebody. Owns how urgent
//! each is, which decides the order of the lists, and the words for what is particular about a service.
//! Reads the status and nothing else.

use std::collections::BTreeMap;

use super::table::grouped;
use crate::control::status::{
    BackendState, BackendStatus, CheckVerdict, GroupStatus, ServiceStatus, Status,
};

/// How a service is doing, the most urgent first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Trouble {
    /// Its users find nobody.
    Nobody,
    /// It has as many sessions as it may.
    Full,
    /// Some of its backends do not serve, though nobody drains them.
    Short,
    None,
}

impl Trouble {
    pub const ALL: [Trouble; 4] = [Trouble::Nobody, Trouble::Full, Trouble::Short, Trouble::None];

    pub fn of(service: &ServiceStatus) -> Trouble {
        // A built-in service that nobody has joined is one that nobody uses.
        let unused = service.leaving || backends(service) == 0 && is_built_in(service);
        match (in_state(service, BackendState::Serving), failing(service)) {
            (0, _) if !unused => Trouble::Nobody,
            _ if is_full(service) => Trouble::Full,
            (_, 1..) => Trouble::Short,
            _ => Trouble::None,
        }
    }
}

/// Each kind of trouble that there is, with how many services are in it.
pub fn summary(status: &Status) -> String {
    let mut counts: BTreeMap<Trouble, usize> = BTreeMap::new();
    for service in &status.services {
        *counts.entry(Trouble::of(service)).or_default() += 1;
    }
    let count = |trouble: Trouble| counts.get(&trouble).copied().unwrap_or(0);
    let said = Trouble::ALL.into_iter().filter(|it| count(*it) > 0).map(|trouble| {
        let words = match trouble {
            Trouble::Nobody => "with nobody serving",
            Trouble::Full => "at a limit of sessions",
            Trouble::Short => "with backends failing",
            Trouble::None => "in good order",
        };
        format!("{} {words}", grouped(count(trouble) as u64))
    });
    said.collect::<Vec<_>>().join(", ")
}

/// How urgent a backend is: 0 is the most.
pub fn urgency(backend: &BackendStatus) -> u8 {
    match backend.state {
        BackendState::Failing | BackendState::Aside => 0,
        _ if backend.check.verdict == Some(CheckVerdict::Failing) => 1,
        _ if backend.hello.misses > 0 => 1,
        BackendState::Draining | BackendState::Left => 2,
        BackendState::Serving => 3,
    }
}

fn is_built_in(service: &ServiceStatus) -> bool {
    service.name == service.protocol.name()
}

fn in_state(service: &ServiceStatus, state: BackendState) -> u64 {
    service.backends.get(&state).copied().unwrap_or(0)
}

/// Its registered backends.
pub fn backends(service: &ServiceStatus) -> u64 {
    service.backends.values().sum()
}

/// Those of them that should serve and do not.
pub fn failing(service: &ServiceStatus) -> u64 {
    in_state(service, BackendState::Failing) + in_state(service, BackendState::Aside)
}

/// `3 of 5`: how many of its backends serve.
pub fn serving(service: &ServiceStatus) -> String {
    let serving = in_state(service, BackendState::Serving);
    format!("{} of {}", grouped(serving), grouped(backends(service)))
}

/// Its sessions, and of how many where it has a limit.
pub fn sessions(service: &ServiceStatus) -> String {
    match service.limits.sessions {
        Some(limit) => {
            let used = grouped(service.limits.sessions_used);
            format!("{used} of {}", grouped(u64::from(limit)))
        }
        None => grouped(service.sessions_active),
    }
}

/// Whether the next user would be turned away for a limit of the service.
pub fn is_full(service: &ServiceStatus) -> bool {
    let used = service.limits.sessions_used;
    let room = in_state(service, BackendState::Serving);
    let on_backends = service.limits.backend_sessions.map(|each| u64::from(each) * room);
    let limits = [service.limits.sessions.map(u64::from), on_backends.filter(|_| room > 0)];
    limits.into_iter().flatten().any(|limit| used >= limit)
}

/// Users turned away by its own barriers, since the start.
pub fn turned_away(service: &ServiceStatus) -> u64 {
    service.turned_away.values().sum()
}

/// The shares of its groups, if it has any: `blue=95 green=5`.
pub fn shares(service: &ServiceStatus) -> Vec<String> {
    let share = |group: &GroupStatus| {
        let GroupStatus { name, share, file_share, serving, .. } = group;
        let file = (share != file_share).then(|| format!(" (file: {file_share})"));
        let none = (*share > 0 && *serving == 0).then_some(" (nobody serves)");
        format!("{name}={share}{}{}", file.unwrap_or_default(), none.unwrap_or_default())
    };
    service.groups.iter().map(share).collect()
}

/// What is particular about a service: the shares of its groups and its terms.
pub fn settings(service: &ServiceStatus) -> Vec<String> {
    shares(service).into_iter().chain(service.terms.iter().cloned()).collect()
}

/// How alike two names must be, from 0 to 1, for one to be taken for a slip of the other.
const ALIKE: f64 = 0.4;
/// How many names are suggested.
const SUGGESTED_MAX: usize = 3;

/// The service of this name.
///
/// # Errors
/// That there is none, with the names that come near it.
pub fn find<'s>(status: &'s Status, name: &str) -> Result<&'s ServiceStatus, String> {
    // One that has come back stands behind the one that leaves.
    if let Some(found) = status.services.iter().rfind(|service| service.name == name) {
        return Ok(found);
    }
    let near = near(status.services.iter().map(|it| (it.name.as_str(), it.name.as_str())), name);
    let count = status.services.len();
    Err(match near.as_slice() {
        [] => format!("there is no service {name}; `lb status` lists the {count} that there are"),
        near => format!(
            "there is no service {name}; similar names among the {count} are: {}",
            near.join(", ")
        ),
    })
}

/// The things whose names come nearest to this one, the nearest first and each once.
pub fn near<'s, T: PartialEq>(names: impl Iterator<Item = (&'s str, T)>, said: &str) -> Vec<T> {
    let likeness = |known: &str| match known.contains(said) || said.contains(known) {
        true => 1.0,
        false => strsim::normalized_damerau_levenshtein(known, said),
    };
    let mut near: Vec<(f64, T)> = names.map(|(known, it)| (likeness(known), it)).collect();
    near.retain(|(likeness, _)| *likeness >= ALIKE);
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut found: Vec<T> = Vec::new();
    for (_, it) in near {
        if found.len() < SUGGESTED_MAX && !found.contains(&it) {
            found.push(it);
        }
    }
    found
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cluster::Protocol;
    use crate::control::status::ServiceLimits;

    /// A TCP service with this many backends that serve, and that are aside.
    pub fn service(name: &str, serving: u64, aside: u64) -> ServiceStatus {
        ServiceStatus {
            name: name.into(),
            protocol: Protocol::Tcp,
            doors: vec!["[::]:8081".parse().unwrap()],
            leaving: false,
            register: true,
            backends: BTreeMap::from([
                (BackendState::Serving, serving),
                (BackendState::Aside, aside),
            ]),
            sessions_active: 7,
            sessions_total: 12,
            terms: Vec::new(),
            limits: ServiceLimits::default(),
            turned_away: BTreeMap::new(),
            groups: Vec::new(),
        }
    }

    fn limited(sessions: Option<u32>, backend_sessions: Option<u32>, used: u64) -> ServiceStatus {
        let limits = ServiceLimits {
            sessions,
            backend_sessions,
            sessions_used: used,
            ..ServiceLimits::default()
        };
        ServiceStatus { limits, ..service("shop", 2, 1) }
    }

    #[test]
    fn a_service_is_in_trouble_when_its_users_are() {
        for (service, trouble) in [
            (service("shop", 0, 0), Trouble::Nobody),
            (service("shop", 0, 2), Trouble::Nobody),
            (service("tcp", 0, 2), Trouble::Nobody),
            (service("tcp", 0, 0), Trouble::None),
            (service("shop", 2, 0), Trouble::None),
            (service("shop", 2, 1), Trouble::Short),
            (limited(Some(9), None, 8), Trouble::Short),
            (limited(Some(9), None, 9), Trouble::Full),
            (limited(None, Some(4), 7), Trouble::Short),
            (limited(None, Some(4), 8), Trouble::Full),
        ] {
            assert_eq!(Trouble::of(&service), trouble, "{service:?}");
        }
    }

    #[test]
    fn shares_say_where_they_differ_from_the_file_and_where_nobody_serves() {
        let group = |name: &str, share, file_share, serving| GroupStatus {
            name: name.into(),
            share,
            file_share,
            backends: 1,
            serving,
        };
        let groups = vec![group("blue", 0, 95, 0), group("green", 5, 5, 0), group("x", 1, 1, 1)];
        let service = ServiceStatus { groups, ..service("shop", 1, 0) };
        assert_eq!(shares(&service), ["blue=0 (file: 95)", "green=5 (nobody serves)", "x=1"]);
    }
}
