//! Whether the host at the other end of a connection still takes what it is sent, judged from what
//! the kernel says about its send queue. Owns the difference between a slow host, which lives as
//! long as the settings let it, and one that has vanished; reads no socket and no clock.
//!
//! `TCP_USER_TIMEOUT` cannot tell the two apart: since Linux 5.11 it also counts the time in which
//! a living host answers every window probe and reads nothing. So a host with unacknowledged bytes
//! is looked at now and then: what it owes is an answer, not room.

use std::time::Duration;

use crate::base::time::Now;
use crate::estate::tcp::WatchRecord;

/// A host that has owed an answer for this long has vanished. Keepalive gives an idle host as long.
pub const GIVEN_UP_AFTER: Duration = Duration::from_secs(60);
/// How often a connection with bytes in its send queue is looked at; four times within the time
/// that a session may be still, if that is more often.
pub const LOOK_EVERY: Duration = Duration::from_secs(15);
/// How many window probes must go unanswered before a host owes an answer: one may be lost, and the
/// next is sent up to two minutes later.
pub const PROBES_OWED: u8 = 3;

/// What the kernel says about a connection's send queue.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Outlook {
    /// Bytes that the host has not acknowledged, including its FIN (one).
    pub queued: u32,
    /// Bytes that it has acknowledged since the connection began.
    pub acknowledged: u64,
    /// The connection is over: the host will never have what is queued.
    pub dead: bool,
    /// It should have answered: segments are on their way, or window probes went unanswered.
    pub owed: bool,
    /// For how long, at least: the time that retransmissions have been in vain.
    pub owed_for: Duration,
    /// When it last answered.
    pub heard_ago: Duration,
}

/// What a look at a host has shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Nothing is queued, or the host has not taken anything since the last look.
    Still,
    /// The host has taken something since the last look.
    Moving,
    Vanished,
}

/// What is remembered of one host from look to look.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    /// The value at the last look that found something queued.
    acknowledged: Option<u64>,
    /// Since when it has owed an answer without giving any.
    owing_since: Option<Now>,
}

impl Watch {
    pub const NEW: Watch = Watch { acknowledged: None, owing_since: None };

    /// Takes what the kernel says. `sent` is when bytes were last handed to it, or earlier.
    pub fn look(&mut self, now: Now, sent: Now, outlook: &Outlook) -> Standing {
        if outlook.queued == 0 {
            *self = Watch::NEW;
            return Standing::Still;
        }
        let before = self.acknowledged.replace(outlook.acknowledged);
        if outlook.dead || !outlook.owed {
            self.owing_since = None;
        } else {
            let earlier =
                |by: Duration| Now::from_nanos(now.nanos().saturating_sub(by.as_nanos() as u64));
            let heard = earlier(outlook.heard_ago);
            let since = self.owing_since.unwrap_or(sent.min(now)).min(earlier(outlook.owed_for));
            self.owing_since = Some(since.max(heard));
        }
        if self.gives_up_at().is_some_and(|at| at <= now) {
            return Standing::Vanished;
        }
        match before {
            Some(before) if before < outlook.acknowledged => Standing::Moving,
            _ => Standing::Still,
        }
    }

    /// What is remembered, for whoever takes the session up.
    pub fn describe(&self) -> WatchRecord {
        let acknowledged = self.acknowledged.map_or(0, |count| count.saturating_add(1));
        let since = self.owing_since.map_or(0, |since| since.nanos().max(1));
        WatchRecord { acknowledged: acknowledged.into(), owing_since: since.into() }
    }

    /// When the host will have vanished unless it answers.
    pub fn gives_up_at(&self) -> Option<Now> {
        self.owing_since.map(|since| since.plus(GIVEN_UP_AFTER))
    }
}

impl From<WatchRecord> for Watch {
    fn from(record: WatchRecord) -> Watch {
        let since = Some(record.owing_since.get()).filter(|since| *since > 0);
        Watch {
            acknowledged: record.acknowledged.get().checked_sub(1),
            owing_since: since.map(Now::from_nanos),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Now {
        Now::from_nanos((1_000 + seconds) * 1_000_000_000)
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn owing(heard_ago: u64) -> Outlook {
        Outlook { queued: 10, owed: true, heard_ago: seconds(heard_ago), ..Outlook::default() }
    }

    #[test]
    fn a_host_that_answers_lives_however_long_it_takes_nothing() {
        let mut watch = Watch::NEW;
        for minute in 0..120 {
            // Its window is closed; or a probe is on its way right now, and the last was answered.
            let outlook = Outlook { owed: minute % 2 == 1, ..owing(50) };
            assert_eq!(watch.look(at(60 * minute), at(0), &outlook), Standing::Still);
        }
    }

    #[test]
    fn a_host_that_owes_an_answer_for_a_minute_has_vanished() {
        let mut watch = Watch::NEW;
        for second in [0, 15, 30, 45, 59] {
            assert_eq!(watch.look(at(second), at(0), &owing(second)), Standing::Still, "{second}");
        }
        assert_eq!(watch.gives_up_at(), Some(at(60)));
        assert_eq!(watch.look(at(60), at(0), &owing(60)), Standing::Vanished);
    }

    #[test]
    fn who_is_sent_something_after_a_long_silence_has_a_minute_from_then_on() {
        let mut watch = Watch::NEW;
        assert_eq!(watch.look(at(1000), at(999), &owing(1000)), Standing::Still);
        assert_eq!(watch.gives_up_at(), Some(at(1059)));
        assert_eq!(watch.look(at(1058), at(1057), &owing(1058)), Standing::Still);
        assert_eq!(watch.look(at(1059), at(1057), &owing(1059)), Standing::Vanished);
    }

    #[test]
    fn retransmissions_tell_how_long_an_answer_has_been_owed_before_the_first_look() {
        let mut watch = Watch::NEW;
        let outlook = Outlook { owed_for: seconds(12), ..owing(40) };
        watch.look(at(100), at(99), &outlook);
        assert_eq!(watch.gives_up_at(), Some(at(148)));
        // It has never owed for longer than since it was last heard.
        watch.look(at(110), at(99), &Outlook { owed_for: seconds(22), ..owing(5) });
        assert_eq!(watch.gives_up_at(), Some(at(165)));
    }

    #[test]
    fn an_answer_in_between_begins_the_minute_anew() {
        let mut watch = Watch::NEW;
        watch.look(at(0), at(0), &owing(0));
        watch.look(at(50), at(0), &owing(20));
        assert_eq!(watch.gives_up_at(), Some(at(90)));
        watch.look(at(60), at(0), &Outlook { owed: false, ..owing(0) });
        assert_eq!(watch.gives_up_at(), None);
    }

    #[test]
    fn a_watch_goes_on_elsewhere_as_it_was() {
        let mut watch = Watch::NEW;
        watch.look(at(7), at(5), &owing(2));
        for watch in [Watch::NEW, watch] {
            let again = Watch::from(watch.describe());
            assert_eq!(format!("{again:?}"), format!("{watch:?}"));
        }
    }

    #[test]
    fn who_takes_anything_between_two_looks_is_moving() {
        let mut watch = Watch::NEW;
        let taken = |acknowledged| Outlook { queued: 1, acknowledged, ..Outlook::default() };
        let looks = [(5, Standing::Still), (5, Standing::Still), (6, Standing::Moving)];
        for (acknowledged, standing) in looks {
            assert_eq!(watch.look(at(0), at(0), &taken(acknowledged)), standing);
        }
        watch.look(at(0), at(0), &Outlook::default());
        assert_eq!(watch.look(at(0), at(0), &taken(9)), Standing::Still, "it began anew");
    }
}
