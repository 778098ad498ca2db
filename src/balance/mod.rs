//! Picks the backend for the next user. Owns the policies, as one pure function of a service and a
//! question about it; knows no socket, no clock and no chance. Health, membership, turns and tables come with the
//! service.

mod least_sessions;
mod rendezvous;
mod source_hash;
mod two_choices;

use std::net::SocketAddr;

use crate::cluster::groups::{Part, Split};
use crate::cluster::rotation::Rotation;
use crate::cluster::service::Pool;
use crate::cluster::table::Table;
use crate::cluster::turn::Turn;
use crate::cluster::{Backend, BackendId, Policy, Service};
pub use least_sessions::{Contest, Tally};
use source_hash::User;

/// What a choice may depend on apart from the service.
pub struct Question<'a> {
    pub user: SocketAddr,
    /// Any number, another one each time, for the policy that draws lots.
    pub random: u64,
    /// Running sessions of a backend, across all workers.
    pub load: &'a dyn Fn(&Backend) -> u64,
    /// Who has the fewest for the weight: see [`Tally::least`].
    pub least: &'a dyn Fn(&Contest<'_>) -> Option<u16>,
    /// Backends that have refused this user or have just failed.
    pub excluded: &'a dyn Fn(BackendId) -> bool,
    /// The backend that was picked for this user before, if this is another attempt.
    pub after: Option<BackendId>,
}

/// The backend for a new session of this service, by its policy; `None` if every backend in the rotation
/// is excluded.
pub fn pick<'s>(service: &'s Service, question: &Question) -> Option<&'s Backend> {
    match &service.pool.split {
        Some(split) => by_group(service, split, question),
        None => {
            let Pool { rotation, table, .. } = &*service.pool;
            within(service, rotation, table.as_ref(), &service.turn, question)
        }
    }
}

/// As [`pick`], share first and weight within. Another attempt takes no turn of the groups and stays in
/// the group that the user was given, while somebody there is left.
#[inline(never)]
fn by_group<'s>(
    service: &'s Service,
    split: &'s Split,
    question: &Question,
) -> Option<&'s Backend> {
    let from = |part: &'s Part| {
        within(service, &part.rotation, part.table.as_ref(), &part.group.turn, question)
    };
    let before = question.after.and_then(|id| service.pool.get(id));
    let again = before.and_then(|backend| split.part_of(backend)).and_then(from);
    again.or_else(|| match service.terms.policy {
        Policy::RoundRobin | Policy::LeastSessions | Policy::TwoChoices => {
            split.from_turn(service.turn.take()).find_map(from)
        }
        Policy::SourceHash => {
            source_hash::groups(split.parts(), user(service, question)).find_map(from)
        }
    })
}

fn user(service: &Service, question: &Question) -> User {
    User::new(service.pool.key, service.terms.hash.purpose(), question.user)
}

/// The backend among those of one rotation.
#[inline]
fn within<'s>(
    service: &'s Service,
    rotation: &'s Rotation,
    table: Option<&'s Table>,
    counter: &Turn,
    question: &Question,
) -> Option<&'s Backend> {
    if rotation.is_empty() {
        return None;
    }
    let pool = &service.pool;
    let fit = |place: u16| {
        let backend = pool.backends.get(usize::from(place))?;
        (!(question.excluded)(backend.id)).then_some(backend)
    };
    let in_turn = |turn| rotation.from_turn(turn).filter_map(fit);
    match service.terms.policy {
        Policy::RoundRobin => {
            let turn = counter.take();
            rotation.whose(turn).and_then(fit).or_else(|| in_turn(turn).next())
        }
        Policy::LeastSessions => {
            let (backends, first) = (&pool.backends, rotation.whose(counter.take())?);
            let contest = Contest { backends, rotation, first, excluded: question.excluded };
            (question.least)(&contest).and_then(|place| backends.get(usize::from(place)))
        }
        Policy::TwoChoices => two_choices::pick(rotation, fit, question.load, question.random),
        Policy::SourceHash => {
            if let [alone] = rotation.shares() {
                return fit(alone.place);
            }
            let user = user(service, question);
            let home = table.and_then(|table| source_hash::pick(table, fit, user));
            home.or_else(|| source_hash::compare(rotation.places().filter_map(fit), user))
        }
    }
}

/// Whether the first has fewer sessions for its weight than the second. Compared by cross-multiplication (a/b < c/d
/// as a*d < c*b), so that nothing is lost to rounding.
fn is_less_loaded(first: (u64, u16), second: (u64, u16)) -> bool {
    u128::from(first.0) * u128::from(second.1) < u128::from(second.0) * u128::from(first.1)
}

#[cfg(test)]
pub(crate) mod tests {
    mod returning;
    mod shares;

    use std::cell::Cell;
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::Arc;

    use super::*;
    use crate::base::random::xorshift;
    use crate::cluster::{Protocol, ServiceId, Snapshot, Standing, Terms};

    const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);
    const USER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 1000);

    /// TCP backends with these weights.
    pub(crate) fn backends(weights: &[u16]) -> Vec<Backend> {
        let backend = |(place, weight): (usize, &u16)| Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(place as u32 + 1),
            slot: place as u16,
            service: TCP,
            address: format!("10.0.{}.{}:80", (place + 1) >> 8, (place + 1) & 255).parse().unwrap(),
            weight: *weight,
            name: None,
            group: None,
            standing: Standing::Serving,
        };
        weights.iter().enumerate().map(backend).collect()
    }

    /// A service with backends of these weights, in this rotation.
    fn service(policy: Policy, weights: &[u16], rotation: Rotation) -> Service {
        let terms = Terms { policy, ..Terms::default() };
        let pool =
            Arc::new(Pool { backends: backends(weights).into(), rotation, ..Pool::default() });
        Service { terms, pool, ..Snapshot::default().service(TCP).unwrap().clone() }
    }

    fn in_order(places: &[u16]) -> Rotation {
        places.iter().copied().collect()
    }

    /// A service with three backends of equal weight.
    fn three(policy: Policy) -> Service {
        service(policy, &[1; 3], in_order(&[0, 1, 2]))
    }

    /// Who is least busy where backends have these sessions.
    pub(crate) fn least_by(
        load: &dyn Fn(&Backend) -> u64,
    ) -> impl Fn(&Contest<'_>) -> Option<u16> + '_ {
        move |contest| {
            let mut tally = Tally::new(contest.backends.len());
            contest.backends.iter().for_each(|it| tally.set(it.slot, load(it) as u32));
            tally.least(contest)
        }
    }

    pub(super) fn idle(contest: &Contest<'_>) -> Option<u16> {
        least_by(&|_| 0)(contest)
    }

    /// One user, while no session is running.
    fn asked() -> Question<'static> {
        Question {
            user: USER,
            random: 0,
            load: &|_| 0,
            least: &idle,
            excluded: &|_| false,
            after: None,
        }
    }

    /// Backend 1 runs 10 sessions, backend 2 20, and so on.
    fn picks(service: &Service, not: &[u32], count: usize) -> Vec<u32> {
        let load = |backend: &Backend| u64::from(backend.id.0) * 10;
        let question = Question {
            load: &load,
            least: &least_by(&load),
            excluded: &|id| not.contains(&id.0),
            ..asked()
        };
        (0..count).filter_map(|_| pick(service, &question)).map(|b| b.id.0).collect()
    }

    #[test]
    fn round_robin_takes_turns() {
        assert_eq!(picks(&three(Policy::RoundRobin), &[], 7), [1, 2, 3, 1, 2, 3, 1]);
    }

    #[test]
    fn an_excluded_backend_is_passed_over() {
        assert_eq!(picks(&three(Policy::RoundRobin), &[2], 4), [1, 3, 3, 1]);
        assert_eq!(picks(&three(Policy::RoundRobin), &[1, 2, 3], 4), [0; 0]);
    }

    #[test]
    fn nobody_registered_is_nobody_picked() {
        for policy in Policy::ALL {
            assert_eq!(picks(&service(policy, &[], Rotation::default()), &[], 2), [0; 0]);
        }
    }

    #[test]
    fn two_workers_take_turns_together() {
        let mut counts = [0; 3];
        let first = three(Policy::RoundRobin);
        let workers = [first.clone(), first];
        for turn in 0..300 {
            let question = asked();
            // Unevenly: every third user goes to the second worker.
            let backend = pick(&workers[usize::from(turn % 3 == 0)], &question).unwrap();
            counts[usize::from(backend.slot)] += 1;
        }
        assert_eq!(counts, [100; 3]);
    }

    #[test]
    fn two_workers_serve_a_large_weighted_pool_exactly_by_its_weights() {
        let weights: Vec<u16> = (0..1000).map(|it| 1 + it * 7 % 256).collect();
        let places: Vec<(u16, u16)> = (0u16..).zip(weights.iter().copied()).collect();
        let first = service(Policy::RoundRobin, &weights, Rotation::weighted(&places));
        let workers = [first.clone(), first];
        let question = asked();
        let mut served = vec![0; weights.len()];
        let round: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
        for turn in 0..round {
            let backend = pick(&workers[usize::from(turn % 3 == 0)], &question).unwrap();
            served[usize::from(backend.slot)] += 1;
        }
        assert_eq!(served, weights);
    }

    #[test]
    fn turns_go_on_when_others_come_and_go() {
        let two = Snapshot::default().with(&backends(&[1; 2]));
        let three = two.with(&backends(&[1; 3]));
        let of = |snapshot: &Snapshot| snapshot.service(TCP).unwrap().clone();
        assert_eq!(picks(&of(&two), &[], 5), [1, 2, 1, 2, 1]);
        assert_eq!(picks(&of(&three), &[], 2), [3, 1], "the sixth turn, and the seventh");
        assert_eq!(picks(&of(&two), &[], 1), [2]);
    }

    /// The backends of users for whom these numbers are drawn.
    fn drawn(service: &Service, load: &dyn Fn(&Backend) -> u64, draws: u32) -> Vec<u32> {
        let mut random = xorshift(7);
        let of = |random| Question { random, load, ..asked() };
        (0..draws).map(|_| pick(service, &of(random(u64::MAX))).unwrap().id.0).collect()
    }

    #[test]
    fn two_choices_never_take_the_one_with_most_sessions_for_its_weight() {
        let service = service(Policy::TwoChoices, &[1, 4, 1], in_order(&[1, 0, 1, 2, 1, 1]));
        let load = |backend: &Backend| [10, 20, 30][usize::from(backend.slot)];
        let picked = drawn(&service, &load, 300);
        assert!(!picked.contains(&3), "30 for 1 is most");
        let of_heavy = picked.iter().filter(|id| **id == 2).count();
        assert!(of_heavy > 200, "20 for 4 is least, and drawn most often: {of_heavy}");
    }

    #[test]
    fn among_equals_two_choices_go_by_weight() {
        let weights: Vec<(u16, u16)> = vec![(0, 1), (1, 2), (2, 5)];
        let service = service(Policy::TwoChoices, &[1, 2, 5], Rotation::weighted(&weights));
        let picked = drawn(&service, &|_| 0, 8000);
        for (id, weight) in [(1, 1), (2, 2), (3, 5)] {
            let count = picked.iter().filter(|it| **it == id).count();
            assert!(count.abs_diff(1000 * weight) < 150, "{count} of weight {weight}");
        }
    }

    #[test]
    fn two_choices_fill_many_backends_almost_evenly() {
        let service = service(Policy::TwoChoices, &[1; 100], (0..100).collect());
        let loads: Vec<Cell<u64>> = vec![Cell::new(0); 100];
        let mut random = xorshift(3);
        for _ in 0..10_000 {
            let load = |backend: &Backend| loads[usize::from(backend.slot)].get();
            let question = Question { random: random(u64::MAX), load: &load, ..asked() };
            let slot = usize::from(pick(&service, &question).unwrap().slot);
            loads[slot].set(loads[slot].get() + 1);
        }
        let (least, most) = (loads.iter().min().unwrap().get(), loads.iter().max().unwrap().get());
        assert!(least >= 96 && most <= 104, "{least} to {most}; one choice makes 70 to 130");
    }

    #[test]
    fn two_choices_pass_over_the_excluded_and_take_one_where_there_is_no_other() {
        let three = three(Policy::TwoChoices);
        for random in (0..50).map(crate::base::mix::mix) {
            let of = |not: &[u32]| {
                let excluded = |id: BackendId| not.contains(&id.0);
                let question = Question { random, excluded: &excluded, ..asked() };
                pick(&three, &question).map(|backend| backend.id.0)
            };
            assert_ne!(of(&[2]), Some(2));
            assert_eq!((of(&[1, 3]), of(&[1, 2, 3])), (Some(2), None));
        }
    }

    #[test]
    fn least_sessions_prefers_the_idle_one_for_its_weight() {
        assert_eq!(picks(&three(Policy::LeastSessions), &[], 3), [1, 1, 1]);
        assert_eq!(picks(&three(Policy::LeastSessions), &[1], 2), [2, 2]);
        let rotation = in_order(&[1, 0, 1, 2, 1, 1]);
        let heavy = service(Policy::LeastSessions, &[1, 4, 1], rotation);
        assert_eq!(picks(&heavy, &[], 1), [2], "20 over 4 is less than 10");
    }

    #[test]
    fn among_equals_least_sessions_takes_the_one_whose_turn_it_is() {
        let uneven = service(Policy::LeastSessions, &[1, 2, 1], in_order(&[0, 1, 2]));
        let pick = |loads: [u64; 3]| {
            let load = |backend: &Backend| loads[usize::from(backend.slot)];
            let question = Question { least: &least_by(&load), ..asked() };
            super::pick(&uneven, &question).map(|backend| backend.id.0)
        };
        // The second has twice the weight.
        let all_equal = [5, 10, 5];
        let picked: Vec<u32> = (0..6).filter_map(|_| pick(all_equal)).collect();
        assert_eq!(picked, [1, 2, 3, 1, 2, 3]);
        let picked: Vec<u32> = (0..3).filter_map(|_| pick([5, 9, 4])).collect();
        assert_eq!(picked, [3, 3, 3], "a lighter load outweighs the turn");
        let picked: Vec<u32> = (0..3).filter_map(|_| pick([5, 12, 5])).collect();
        assert_eq!(picked, [1, 3, 3], "of two equals, the first in turn");
    }

    #[test]
    fn a_user_keeps_the_backend_while_others_come_and_go() {
        let four = service(Policy::SourceHash, &[1; 4], in_order(&[0, 1, 2, 3]));
        let home = picks(&four, &[], 1)[0];
        for gone in (1..=4).filter(|id| *id != home) {
            assert_eq!(picks(&four, &[gone], 1), [home]);
        }
        assert_ne!(picks(&four, &[home], 1), [home]);
    }
}
