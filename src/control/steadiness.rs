//! Since when backends are in their state, and how often that has changed lately: one that comes and goes is
//! told apart from one that has just joined. Goes by service and address, because a backend that flaps by losing
//! its control connection registers anew each time. Pure, and bounded.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::time::Now;
use crate::cluster::{ServiceId, Standing};
use crate::metrics::BACKENDS_MAX;

/// Changes are counted by the minute, over this many.
const MINUTES: usize = 15;
/// Most backends that are remembered. Each takes about 100 bytes.
const REMEMBERED_MAX: usize = BACKENDS_MAX + 1024;

/// One backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Track {
    /// `None` while it is not registered.
    standing: Option<Standing>,
    since: Now,
    /// Changes in each minute since the start, the latest of which is `minute`, at place `minute % MINUTES`.
    changes: [u16; MINUTES],
    minute: u64,
}

impl Track {
    fn new(standing: Option<Standing>, now: Now, minute: u64) -> Track {
        Track { standing, since: now, changes: [0; MINUTES], minute }
    }

    fn change(&mut self, standing: Option<Standing>, now: Now, minute: u64) {
        self.forget(minute);
        (self.standing, self.since) = (standing, now);
        let place = place(self.minute);
        self.changes[place] = self.changes[place].saturating_add(1);
    }

    /// Lets go of the minutes that are too long ago.
    fn forget(&mut self, minute: u64) {
        let passed = minute.saturating_sub(self.minute).min(MINUTES as u64);
        for ago in 0..passed {
            self.changes[place(minute - ago)] = 0;
        }
        self.minute = self.minute.max(minute);
    }

    fn count(mut self, minute: u64) -> u32 {
        self.forget(minute);
        self.changes.iter().map(|count| u32::from(*count)).sum()
    }
}

fn place(minute: u64) -> usize {
    (minute % MINUTES as u64) as usize
}

/// All backends that are registered, and those that have been within the last 15 minutes.
#[derive(Debug)]
pub struct Steadiness {
    began: Now,
    tracks: BTreeMap<(ServiceId, SocketAddr), Track>,
}

impl Steadiness {
    pub fn new(now: Now) -> Steadiness {
        Steadiness { began: now, tracks: BTreeMap::new() }
    }

    /// A backend has this standing, or is not registered. Returns whether that is another than before.
    pub fn saw(
        &mut self,
        service: ServiceId,
        address: SocketAddr,
        standing: Option<Standing>,
        now: Now,
    ) -> bool {
        let minute = self.minute(now);
        if let Some(track) = self.tracks.get_mut(&(service, address)) {
            let is_new = track.standing != standing;
            if is_new {
                track.change(standing, now, minute);
            }
            return is_new;
        }
        if self.tracks.len() >= REMEMBERED_MAX {
            self.tracks.retain(|_, track| track.standing.is_some());
        }
        self.tracks.insert((service, address), Track::new(standing, now, minute));
        false
    }

    /// Everything that is remembered, and since when minutes are counted.
    pub fn all(&self) -> (Now, impl Iterator<Item = (ServiceId, SocketAddr, &Track)>) {
        let tracks = self.tracks.iter();
        (self.began, tracks.map(|((service, address), track)| (*service, *address, track)))
    }

    /// What somebody else has remembered.
    pub fn go_on(
        began: Now,
        tracks: impl Iterator<Item = (ServiceId, SocketAddr, Track)>,
        now: Now,
    ) -> Steadiness {
        let began = began.min(now);
        let minute = now.since(began).as_secs() / 60;
        let bounded =
            |it: Track| Track { since: it.since.min(now), minute: it.minute.min(minute), ..it };
        let tracks = tracks.map(|(service, at, track)| ((service, at), bounded(track)));
        Steadiness { began, tracks: tracks.take(REMEMBERED_MAX).collect() }
    }

    /// Since when a backend is in its state, and how often that has changed within the last 15 minutes.
    pub fn of(&self, service: ServiceId, address: SocketAddr, now: Now) -> Option<(Now, u32)> {
        let track = self.tracks.get(&(service, address))?;
        Some((track.since, track.count(self.minute(now))))
    }

    /// Forgets backends that have been away for so long that nothing of them is shown.
    pub fn forget_gone(&mut self, now: Now) {
        let lasts = Duration::from_secs(60 * MINUTES as u64);
        self.tracks.retain(|_, it| it.standing.is_some() || now.since(it.since) < lasts);
    }

    fn minute(&self, now: Now) -> u64 {
        now.since(self.began).as_secs() / 60
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Protocol;

    const TCP: ServiceId = ServiceId::built_in(Protocol::Tcp);

    fn at(seconds: u64) -> Now {
        Now::from_nanos(seconds * 1_000_000_000)
    }

    fn one(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn a_backend_that_comes_and_goes_is_told_from_one_that_has_just_joined() {
        let mut steadiness = Steadiness::new(at(0));
        let shown = |it: &Steadiness, port, seconds| it.of(TCP, one(port), at(seconds));
        assert_eq!(shown(&steadiness, 1, 0), None);
        steadiness.saw(TCP, one(1), Some(Standing::Serving), at(10));
        steadiness.saw(TCP, one(1), Some(Standing::Serving), at(15));
        assert_eq!(shown(&steadiness, 1, 20), Some((at(10), 0)), "joining is no change");
        for second in 0..4 {
            let standing = [None, Some(Standing::Serving)][second as usize % 2];
            steadiness.saw(TCP, one(1), standing, at(50 + 5 * second));
        }
        assert_eq!(shown(&steadiness, 1, 70), Some((at(65), 4)));
        steadiness.saw(TCP, one(1), Some(Standing::Aside), at(800));
        assert_eq!(shown(&steadiness, 1, 899), Some((at(800), 5)));
        assert_eq!(
            shown(&steadiness, 1, 900),
            Some((at(800), 3)),
            "the first minute is too long ago"
        );
        assert_eq!(shown(&steadiness, 1, 960), Some((at(800), 1)));
        assert_eq!(shown(&steadiness, 1, 100_000), Some((at(800), 0)));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_ends_after_a_while() {
        let mut steadiness = Steadiness::new(at(0));
        for place in 0..=REMEMBERED_MAX {
            let [high, low, ..] = (place as u32).to_le_bytes();
            let address = SocketAddr::from(([127, 0, 0, low], u16::from(high) + 1));
            steadiness.saw(TCP, address, Some(Standing::Serving), at(0));
            steadiness.saw(TCP, address, None, at(0));
            assert!(steadiness.tracks.len() <= REMEMBERED_MAX);
        }
        steadiness.saw(TCP, one(1), Some(Standing::Serving), at(1));
        steadiness.saw(TCP, one(2), Some(Standing::Serving), at(1));
        steadiness.saw(TCP, one(2), None, at(2));
        steadiness.forget_gone(at(901));
        assert_eq!(steadiness.tracks.keys().map(|it| it.1).collect::<Vec<_>>(), [one(1), one(2)]);
        steadiness.forget_gone(at(902));
        assert_eq!(steadiness.tracks.keys().map(|it| it.1).collect::<Vec<_>>(), [one(1)]);
    }
}
