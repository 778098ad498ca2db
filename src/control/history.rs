//! The last 15 minutes, in steps of five seconds: what happened in each, for the balancer as a whole, for each
//! protocol and for each service. Owns the samples and the bound on them; pure. The totals come from the hub,
//! and what readers are sent is up to [`page`].
//!
//! # Memory
//!
//! A sample takes 40 bytes, so a series takes 7.2 KB. A service has one while it has sessions or anything else to
//! show within the 15 minutes, and at most [`SERIES_MAX`] of them do, which is 7.4 MB. What other services did is
//! in the series of their protocol and of the whole; how many these are is said.

pub mod marks;
pub mod page;
mod recorded;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use marks::Marks;
pub use recorded::Recorded;

use crate::base::time::Now;
use crate::cluster::{Protocol, ServiceId};
use crate::metrics::{BOUNDS_US, BUCKETS};

/// How long a step lasts.
pub const STEP: Duration = Duration::from_secs(5);
/// Steps that are kept: 15 minutes.
pub const STEPS: usize = 180;
/// The steps that the last minute consists of.
pub const MINUTE: usize = 12;
/// Most services with a series of their own.
pub const SERIES_MAX: usize = 1024;

const _: () = assert!(BUCKETS < NO_BUCKET as usize && MINUTE <= STEPS);
const _: () = assert!(size_of::<Sample>() == 40);

/// Durations by the buckets of a histogram.
pub type Times = [u64; BUCKETS];

/// What has been counted up to a moment. All but `sessions` only grows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Running at the moment.
    pub sessions: u64,
    pub new: u64,
    pub requests: u64,
    pub errors: u64,
    pub refused: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    /// How long users waited for the first byte.
    pub times: Times,
}

impl Totals {
    /// What has been added to `before`. A counter that shows less than before has begun anew.
    fn since(&self, before: &Totals) -> Totals {
        let grown = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
        Totals {
            sessions: self.sessions,
            new: grown(self.new, before.new),
            requests: grown(self.requests, before.requests),
            errors: grown(self.errors, before.errors),
            refused: grown(self.refused, before.refused),
            bytes_up: grown(self.bytes_up, before.bytes_up),
            bytes_down: grown(self.bytes_down, before.bytes_down),
            times: std::array::from_fn(|it| grown(self.times[it], before.times[it])),
        }
    }

    fn add(&mut self, more: &Totals) {
        self.sessions += more.sessions;
        self.new += more.new;
        self.requests += more.requests;
        self.errors += more.errors;
        self.refused += more.refused;
        self.bytes_up += more.bytes_up;
        self.bytes_down += more.bytes_down;
        self.times.iter_mut().zip(more.times).for_each(|(sum, more)| *sum += more);
    }

    fn is_nothing(&self) -> bool {
        *self == Totals::default()
    }
}

/// No bucket: nothing was counted.
const NO_BUCKET: u8 = u8::MAX;

/// What happened in one step. A count that does not fit is shown as the highest that does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sample {
    pub bytes_up: u64,
    pub bytes_down: u64,
    /// Running at its end.
    pub sessions: u32,
    pub new: u32,
    pub requests: u32,
    pub errors: u32,
    pub refused: u32,
    /// The buckets that these percentiles fall into.
    p50: u8,
    p99: u8,
    /// Whether there was anything to look at: the service existed.
    is_known: bool,
}

impl Sample {
    const UNKNOWN: Sample = Sample { is_known: false, ..Sample::NOTHING };
    const NOTHING: Sample = Sample {
        bytes_up: 0,
        bytes_down: 0,
        sessions: 0,
        new: 0,
        requests: 0,
        errors: 0,
        refused: 0,
        p50: NO_BUCKET,
        p99: NO_BUCKET,
        is_known: true,
    };

    fn of(step: &Totals) -> Sample {
        let fitting = |count| u32::try_from(count).unwrap_or(u32::MAX);
        let bucket = |percent| bucket_at(&step.times, percent).map_or(NO_BUCKET, |it| it as u8);
        Sample {
            bytes_up: step.bytes_up,
            bytes_down: step.bytes_down,
            sessions: fitting(step.sessions),
            new: fitting(step.new),
            requests: fitting(step.requests),
            errors: fitting(step.errors),
            refused: fitting(step.refused),
            p50: bucket(50),
            p99: bucket(99),
            is_known: true,
        }
    }

    /// The median of the step in microseconds: the upper bound of its bucket. `None` if nothing was counted, or if
    /// it exceeds every bound.
    pub fn p50_us(&self) -> Option<u64> {
        BOUNDS_US.get(usize::from(self.p50)).copied()
    }

    /// The same for 99 %.
    pub fn p99_us(&self) -> Option<u64> {
        BOUNDS_US.get(usize::from(self.p99)).copied()
    }
}

/// The bucket that a percentile falls into; `None` if nothing was counted.
pub fn bucket_at(counts: &[u64], percent: u64) -> Option<usize> {
    let count: u64 = counts.iter().sum();
    let rank = (count * percent).div_ceil(100);
    let mut so_far = 0;
    counts.iter().position(|bucket| {
        so_far += bucket;
        count > 0 && so_far >= rank
    })
}

type Samples = Box<[Sample; STEPS]>;

fn samples() -> Samples {
    Box::new([Sample::UNKNOWN; STEPS])
}

/// Services are told apart by name and protocol: one that a reload removes, and a later one adds again, goes on.
type Key = (Arc<str>, Protocol);

/// One service.
struct Track {
    /// The first step in which it was there. If there was no room for what happened, the one after that.
    born: u64,
    /// The last step in which it was there.
    seen: u64,
    /// Steps in a row in which nothing happened, while it has samples.
    quiet: usize,
    /// None if nothing has happened since it was born, or for 15 minutes.
    samples: Option<Samples>,
}

/// What is looked at when a step ends.
pub struct Seen<'s> {
    pub id: ServiceId,
    pub name: &'s Arc<str>,
    pub protocol: Protocol,
    pub totals: Totals,
}

/// What the last minute came to, for one protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Minute {
    /// How long it was: less than a minute after the start.
    pub took: Duration,
    pub sum: Totals,
}

/// The samples.
pub struct History {
    /// When the running step is to end.
    due: Now,
    /// When the last one ended.
    ended: Now,
    /// Steps that have ended so far. Step `n` is at place `n % STEPS`.
    steps: u64,
    /// How long each step took, in milliseconds. 0: a gap, in which nobody looked.
    took_ms: Box<[u32; STEPS]>,
    whole: Samples,
    protocols: [Samples; Protocol::ALL.len()],
    /// What each of the last steps added, by protocol.
    minute: [[Totals; Protocol::ALL.len()]; MINUTE],
    services: BTreeMap<Key, Track>,
    /// Services with a series, and those for which there was no room at the last step.
    kept: usize,
    left_out: usize,
    whole_before: Totals,
    before: BTreeMap<ServiceId, Totals>,
    pub marks: Marks,
}

impl History {
    /// A history that begins now, when nothing has been counted.
    pub fn new(now: Now) -> History {
        History {
            due: now.plus(STEP),
            ended: now,
            steps: 0,
            took_ms: Box::new([0; STEPS]),
            whole: samples(),
            protocols: [samples(), samples(), samples()],
            minute: [[Totals::default(); Protocol::ALL.len()]; MINUTE],
            services: BTreeMap::new(),
            kept: 0,
            left_out: 0,
            whole_before: Totals::default(),
            before: BTreeMap::new(),
            marks: Marks::default(),
        }
    }

    /// Whether a step has ended, or the clock has been turned back.
    pub fn is_due(&self, now: Now) -> bool {
        now >= self.due || now < self.ended
    }

    /// Ends the step. Whoever comes later than the next one would have ended leaves a gap: what was added meanwhile
    /// is told as that of one long step.
    pub fn end_step<'s>(
        &mut self,
        now: Now,
        whole: &Totals,
        services: impl Iterator<Item = Seen<'s>>,
    ) {
        let is_turned_back = now < self.ended;
        // To the nearest: a short step after a gap would be all that had waited for it, and so a peak that was none.
        let missed = (now.since(self.due) + STEP / 2).as_nanos() / STEP.as_nanos();
        let missed = u32::try_from(missed).unwrap_or(u32::MAX);
        (0..missed.min(STEPS as u32)).for_each(|_| self.skip());
        let took = u32::try_from(now.since(self.ended).as_millis()).unwrap_or(u32::MAX);
        self.begin_place(if is_turned_back { 0 } else { took.max(1) });
        let added = whole.since(&self.whole_before);
        self.whole_before = *whole;
        self.whole[self.place()] = Sample::of(&added);
        self.put_services(&added, services);
        self.steps += 1;
        self.ended = now;
        // Steps keep to the grid that the first one began, so that a tick's delay does not add up.
        self.due = match is_turned_back {
            true => now.plus(STEP),
            false => self.due.plus(STEP * missed).plus(STEP),
        };
    }

    fn put_services<'s>(&mut self, whole: &Totals, services: impl Iterator<Item = Seen<'s>>) {
        let mut by_protocol = [Totals::default(); Protocol::ALL.len()];
        let mut added: BTreeMap<Key, Totals> = BTreeMap::new();
        let mut before = BTreeMap::new();
        for Seen { id, name, protocol, totals } in services {
            let step = totals.since(self.before.get(&id).unwrap_or(&Totals::default()));
            before.insert(id, totals);
            by_protocol[protocol as usize].add(&step);
            added.entry((Arc::clone(name), protocol)).or_default().add(&step);
        }
        self.before = before;
        // Requests that no service has claimed are requests of the door all the same.
        let api = &mut by_protocol[Protocol::Api as usize];
        (api.requests, api.errors) = (whole.requests, whole.errors);
        let place = self.place();
        for (samples, step) in self.protocols.iter_mut().zip(&by_protocol) {
            samples[place] = Sample::of(step);
        }
        let is_gap = self.took_ms[place] == 0;
        self.minute[self.steps as usize % MINUTE] =
            if is_gap { Default::default() } else { by_protocol };
        self.left_out = 0;
        for (key, step) in added {
            self.put(key, &step);
        }
        self.age();
    }

    fn put(&mut self, key: Key, step: &Totals) {
        let (steps, place) = (self.steps, self.place());
        let new = || Track { born: steps, seen: steps, quiet: 0, samples: None };
        let track = self.services.entry(key).or_insert_with(new);
        if track.seen + 1 < steps {
            track.born = steps;
        }
        track.seen = steps;
        if !step.is_nothing() && track.samples.is_none() {
            if self.kept < SERIES_MAX {
                track.samples = Some(filled(&self.took_ms, track.born, steps));
                track.quiet = 0;
                self.kept += 1;
            } else {
                track.born = steps + 1;
                self.left_out += 1;
            }
        }
        if let Some(samples) = &mut track.samples {
            samples[place] = Sample::of(step);
        }
    }

    /// Lets go of what has nothing to show any more, and of services that have gone.
    fn age(&mut self) {
        let (steps, place) = (self.steps, self.place());
        let kept = &mut self.kept;
        self.services.retain(|_, track| {
            let is_gone = track.seen < steps;
            let Some(samples) = &mut track.samples else { return !is_gone };
            if is_gone {
                samples[place] = Sample::UNKNOWN;
            }
            let is_idle = is_gone || samples[place] == Sample::NOTHING;
            track.quiet = if is_idle { track.quiet + 1 } else { 0 };
            if track.quiet >= STEPS {
                track.samples = None;
                *kept -= 1;
                return !is_gone;
            }
            true
        });
    }

    fn place(&self) -> usize {
        (self.steps % STEPS as u64) as usize
    }

    fn begin_place(&mut self, took_ms: u32) {
        let place = self.place();
        self.took_ms[place] = took_ms;
    }

    /// A step in which nobody looked.
    fn skip(&mut self) {
        self.begin_place(0);
        let place = self.place();
        self.whole[place] = Sample::UNKNOWN;
        for samples in &mut self.protocols {
            samples[place] = Sample::UNKNOWN;
        }
        self.minute[self.steps as usize % MINUTE] = Default::default();
        for track in self.services.values_mut() {
            track.seen += 1;
            if let Some(samples) = &mut track.samples {
                samples[place] = Sample::UNKNOWN;
            }
        }
        self.steps += 1;
    }

    /// The number of steps that can be shown, and how long each of the last `most` took, the oldest first; `None`
    /// is a gap.
    pub fn spans(&self, most: usize) -> impl Iterator<Item = Option<u32>> {
        self.places(most).map(|place| Some(self.took_ms[place]).filter(|took| *took > 0))
    }

    /// The places of the last steps, `most` at most, the oldest first.
    fn places(&self, most: usize) -> impl Iterator<Item = usize> + use<> {
        let count = self.steps.min(STEPS.min(most) as u64);
        (self.steps - count..self.steps).map(|step| (step % STEPS as u64) as usize)
    }

    /// When the last step ended.
    pub fn ended(&self) -> Now {
        self.ended
    }

    /// The last steps of the whole, `most` at most, the oldest first.
    pub fn whole(&self, most: usize) -> Vec<Option<&Sample>> {
        self.read(&self.whole, most)
    }

    /// The same for the services of one protocol.
    pub fn protocol(&self, protocol: Protocol, most: usize) -> Vec<Option<&Sample>> {
        self.read(&self.protocols[protocol as usize], most)
    }

    /// The same for a service; `None` if none of this name has been seen. One that had no traffic shows zeros.
    pub fn service(
        &self,
        name: &Arc<str>,
        protocol: Protocol,
        most: usize,
    ) -> Option<Vec<Option<&Sample>>> {
        let track = self.services.get(&(Arc::clone(name), protocol))?;
        if let Some(samples) = &track.samples {
            return Some(self.read(samples, most));
        }
        let count = self.steps.min(STEPS.min(most) as u64);
        let steps = self.steps - count..self.steps;
        let known = |step: &u64| *step >= track.born && self.took(*step) > 0;
        Some(steps.map(|step| known(&step).then_some(&Sample::NOTHING)).collect())
    }

    fn took(&self, step: u64) -> u32 {
        self.took_ms[(step % STEPS as u64) as usize]
    }

    fn read<'h>(&'h self, samples: &'h Samples, most: usize) -> Vec<Option<&'h Sample>> {
        let shown = |place: usize| {
            let is_shown = samples[place].is_known && self.took_ms[place] > 0;
            is_shown.then_some(&samples[place])
        };
        self.places(most).map(shown).collect()
    }

    /// The services that have a series of their own.
    pub fn with_series(&self) -> impl Iterator<Item = &(Arc<str>, Protocol)> {
        self.services.iter().filter(|(_, track)| track.samples.is_some()).map(|(key, _)| key)
    }

    /// The one of this name that has a series.
    pub fn find(&self, name: &str) -> Option<&(Arc<str>, Protocol)> {
        self.with_series().find(|(of, _)| **of == *name)
    }

    /// How many these are.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// Services for which there was no room.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// What the last minute came to for the services of a protocol.
    pub fn minute(&self, protocol: Protocol) -> Minute {
        let mut minute = Minute::default();
        for place in self.places(MINUTE) {
            minute.took += Duration::from_millis(self.took_ms[place].into());
        }
        let newest = self.steps.min(MINUTE as u64);
        for step in self.steps - newest..self.steps {
            minute.sum.add(&self.minute[step as usize % MINUTE][protocol as usize]);
        }
        minute
    }
}

/// The series of a service to which nothing has happened since step `born`.
fn filled(took_ms: &[u32; STEPS], born: u64, steps: u64) -> Samples {
    let mut samples = samples();
    let oldest = (steps + 1).saturating_sub(STEPS as u64);
    for step in born.max(oldest)..steps {
        let place = (step % STEPS as u64) as usize;
        if took_ms[place] > 0 {
            samples[place] = Sample::NOTHING;
        }
    }
    samples
}

#[cfg(test)]
mod tests;
