//! What changed in the last 15 minutes, to be shown beside what came of it: backends that joined, left, were set
//! aside and came back, and reloads. Owns the bound on these marks; pure.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{STEP, STEPS};
use crate::base::time::Now;
use crate::cluster::BackendId;

/// Most marks that are kept, 40 bytes each. What happens to several backends of one service within a step is one.
pub const MARKS_MAX: usize = 512;
const _: () = assert!(size_of::<Mark>() == 40);

const KEPT_FOR: Duration = Duration::from_secs(STEP.as_secs() * STEPS as u64);

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A backend registered.
    Joined,
    /// It unregistered, or had drained.
    Left,
    /// Its control connection was lost.
    Lost,
    /// Its port refused a connection.
    Aside,
    /// Its check failed.
    Failing,
    Draining,
    /// It gets new users again.
    Serving,
    /// New settings were applied.
    Reload,
    /// An operator gave the groups of a service other shares.
    Shift,
}

/// One of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mark {
    pub at: Now,
    pub what: What,
    /// None: the balancer as a whole.
    pub service: Option<Arc<str>>,
    /// The first backend that it happened to,
    pub backend: Option<BackendId>,
    /// and how often it happened in the five seconds from then on.
    pub count: u32,
}

/// The marks.
#[derive(Debug, Default)]
pub struct Marks {
    /// The oldest first.
    kept: VecDeque<Mark>,
}

impl Marks {
    /// Something has happened.
    pub fn add(
        &mut self,
        now: Now,
        what: What,
        service: Option<&Arc<str>>,
        backend: Option<BackendId>,
    ) {
        let recent = self.kept.iter_mut().rev().take_while(|mark| now.since(mark.at) < STEP);
        let mut alike = recent.filter(|mark| mark.what == what && mark.service.as_ref() == service);
        if let Some(mark) = alike.next() {
            mark.count = mark.count.saturating_add(1);
            return;
        }
        while self.kept.front().is_some_and(|mark| now.since(mark.at) > KEPT_FOR)
            || self.kept.len() >= MARKS_MAX
        {
            self.kept.pop_front();
        }
        let service = service.cloned();
        self.kept.push_back(Mark { at: now, what, service, backend, count: 1 });
    }

    /// Every mark that is kept, the oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Mark> {
        self.kept.iter()
    }

    /// Marks that somebody else has kept, the oldest first.
    pub fn go_on(marks: impl Iterator<Item = Mark>) -> Marks {
        Marks { kept: marks.take(MARKS_MAX).collect() }
    }

    /// The marks of the last 15 minutes, the oldest first: all of them, or those that concern a service.
    pub fn recent<'m>(
        &'m self,
        now: Now,
        service: Option<&'m str>,
    ) -> impl Iterator<Item = &'m Mark> {
        let concerns = move |mark: &&Mark| {
            let of = mark.service.as_deref();
            now.since(mark.at) <= KEPT_FOR && (service.is_none() || of.is_none() || of == service)
        };
        self.kept.iter().filter(concerns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    fn shown(marks: &Marks, now: u64, service: Option<&str>) -> Vec<(What, u32, u32)> {
        let row = |mark: &Mark| (mark.what, mark.backend.map_or(0, |it| it.0), mark.count);
        marks.recent(at(now), service).map(row).collect()
    }

    #[test]
    fn what_happens_to_many_of_one_service_at_once_is_one_mark() {
        let mut marks = Marks::default();
        let (web, dns): (Arc<str>, Arc<str>) = ("web".into(), "dns".into());
        for (ms, what, service, id) in [
            (0, What::Joined, &web, 1),
            (10, What::Joined, &dns, 2),
            (4_999, What::Joined, &web, 3),
            (4_999, What::Lost, &web, 1),
            (5_000, What::Joined, &web, 4),
        ] {
            marks.add(at(ms), what, Some(service), Some(BackendId(id)));
        }
        marks.add(at(6_000), What::Reload, None, None);
        use What::{Joined, Lost, Reload};
        let of_web = [(Joined, 1, 2), (Lost, 1, 1), (Joined, 4, 1), (Reload, 0, 1)];
        assert_eq!(shown(&marks, 6_000, Some("web")), of_web);
        assert_eq!(shown(&marks, 6_000, None).len(), 5);
        assert_eq!(shown(&marks, 6_000, Some("none")), [(Reload, 0, 1)]);
        let quarter = 900_000;
        assert_eq!(shown(&marks, quarter + 5_001, None), [(Reload, 0, 1)]);
        assert_eq!(shown(&marks, quarter + 6_001, None), []);
    }

    #[test]
    fn the_oldest_marks_make_room() {
        let mut marks = Marks::default();
        for step in 0..MARKS_MAX as u64 + 3 {
            marks.add(at(step * 5_000), What::Reload, None, None);
            assert!(marks.kept.len() <= MARKS_MAX);
        }
        assert!(marks.kept[0].at > at(0));
    }
}
