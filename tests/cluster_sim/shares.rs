//! Who gets the users. Owns the laws of a choice: nobody is picked who does not serve as the worker knows it,
//! turns are dealt out exactly over all workers, and a user returns to the same backend where that is the policy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use lb::cluster::service::Pool;
use lb::cluster::{Backend, BackendId, Policy, Service, ServiceId, Standing, WhenAllFail};

use crate::worker::Pick;

/// Who should be in the rotation of a service, worked out anew: of those in the best standing, the backends
/// in groups that have a share, and only if there are none of these, the backends in no group.
pub fn in_rotation(service: &Service) -> BTreeSet<BackendId> {
    let last = service.terms.checks == Some(WhenAllFail::Serve);
    let standings = [Standing::Serving, Standing::Aside, Standing::Failing];
    for standing in standings.into_iter().take(if last { 3 } else { 2 }) {
        let here: Vec<&Backend> =
            service.pool.backends.iter().filter(|it| it.standing == standing).collect();
        let share = |it: &&&Backend| share_of(service, it);
        let grouped: BTreeSet<BackendId> =
            here.iter().filter(|it| share(it).is_some_and(|it| it > 0)).map(|it| it.id).collect();
        let alone = here.iter().filter(|it| share(it).is_none()).map(|it| it.id).collect();
        let found = if grouped.is_empty() { alone } else { grouped };
        if !found.is_empty() {
            return found;
        }
    }
    BTreeSet::new()
}

/// The share of a backend's group; `None` if it is in none.
fn share_of(service: &Service, backend: &Backend) -> Option<u64> {
    let name = backend.group.as_ref()?;
    service.groups.iter().find(|it| it.name == *name).map(|it| it.share.into())
}

/// Choices in a row from one pool by one policy, over all workers.
struct Window {
    pool: Arc<Pool>,
    policy: Policy,
    picks: u64,
    by_backend: BTreeMap<BackendId, u64>,
    /// With [`Policy::SourceHash`].
    homes: BTreeMap<IpAddr, BackendId>,
}

#[derive(Default)]
pub struct Shares {
    windows: BTreeMap<ServiceId, Window>,
    /// Whole rounds that were found to be exact.
    pub rounds: u64,
    pub picks: u64,
}

impl Shares {
    pub fn picked(&mut self, pick: &Pick) {
        let Pick { worker, service, version, .. } = pick;
        let right = in_rotation(service);
        let limited = service.terms.limits.backend_sessions.is_some();
        let Some(backend) = pick.backend else {
            let is_wrong = pick.is_plain && !limited && !right.is_empty();
            assert!(!is_wrong, "nobody of {} was picked, and {right:?} serve", service.name);
            drop(self.windows.remove(&service.id));
            return;
        };
        self.picks += 1;
        let known = service.pool.get(backend);
        let known = known.unwrap_or_else(|| panic!("{backend} is not of {}", service.name));
        assert_eq!(known.service, service.id, "{backend} was picked for {}", service.name);
        assert!(
            right.contains(&backend),
            "worker {worker} gave a user of {} to {backend}, which in version {version} does not serve: \
             {right:?} do",
            service.name
        );
        if pick.is_plain && !limited {
            self.count(pick, backend);
        } else {
            self.windows.remove(&service.id);
        }
    }

    fn count(&mut self, pick: &Pick, backend: BackendId) {
        let service = &pick.service;
        let goes_on =
            |it: &Window| Arc::ptr_eq(&it.pool, &service.pool) && it.policy == service.terms.policy;
        if !self.windows.get(&service.id).is_some_and(goes_on) {
            self.windows.remove(&service.id);
        }
        let window = self.windows.entry(service.id).or_insert_with(|| Window {
            pool: Arc::clone(&service.pool),
            policy: service.terms.policy,
            picks: 0,
            by_backend: BTreeMap::new(),
            homes: BTreeMap::new(),
        });
        window.picks += 1;
        *window.by_backend.entry(backend).or_default() += 1;
        match window.policy {
            Policy::SourceHash => {
                let home = *window.homes.entry(pick.user.ip()).or_insert(backend);
                assert_eq!(home, backend, "{} of {} has moved", pick.user.ip(), service.name);
            }
            _ => self.rounds += window.exact(service),
        }
    }
}

impl Window {
    /// Returns the number of whole rounds that have ended just now.
    fn exact(&self, service: &Service) -> u64 {
        let serving = in_rotation(service);
        let members = || service.pool.backends.iter().filter(|it| serving.contains(&it.id));
        let mut groups = BTreeMap::<Option<&str>, (u64, u64, u64)>::new();
        for backend in members() {
            let share = share_of(service, backend);
            let name = share.and(backend.group.as_deref());
            let group = groups.entry(name).or_insert((share.unwrap_or(1), 0, 0));
            group.1 += u64::from(backend.weight);
            group.2 += self.by_backend.get(&backend.id).copied().unwrap_or_default();
        }
        let all: u64 = groups.values().map(|group| group.0).sum();
        let mut rounds = 0;
        if groups.len() > 1 && self.picks.is_multiple_of(all) {
            rounds += 1;
            for (name, (share, _, got)) in &groups {
                assert_eq!(*got, self.picks / all * share, "{name:?} of {}", service.name);
            }
        }
        if self.policy != Policy::RoundRobin {
            return rounds;
        }
        for (name, (_, weights, got)) in groups.iter().filter(|it| it.1.2 > 0) {
            if !got.is_multiple_of(*weights) {
                continue;
            }
            rounds += 1;
            for backend in members() {
                let own = share_of(service, backend).and(backend.group.as_deref());
                let of = self.by_backend.get(&backend.id).copied().unwrap_or_default();
                let wanted = got / weights * u64::from(backend.weight);
                assert!(own != *name || of == wanted, "{backend:?} got {of} instead of {wanted}");
            }
        }
        rounds
    }
}
