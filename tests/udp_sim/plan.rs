//! The plan of a run: how short room is, what is broken on purpose, and the settings of the workers
//! that follow from both.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use lb::config::{OnUdpLoss, Udp};
use lb::proxy::udp::PairLimits;
use lb::session::affinity::Affinity;
use lb::session::flows::{FlowHasher, Waits};
use lb::session::sources::SourceLimits;
use lb::worker::udp::sessions::{AffinityHandle, UdpSettings};

pub const WORKERS: usize = 2;
pub const IDLE: Duration = Duration::from_secs(2);
pub const QUARANTINE: Duration = Duration::from_secs(6);
/// So long that under pressure sessions end because others need their room.
pub const IDLE_UNDER_PRESSURE: Duration = Duration::from_secs(60);
/// A duplicate arrives at most this long after the datagram, in milliseconds.
pub const COPIES: u64 = 400;
/// How late a timer may fire: a tick of the wheel.
pub const TICK: Duration = Duration::from_millis(20);
/// How late an idle session may end: a stall and a tick of the wheel.
pub const LATE: Duration = Duration::from_millis(1100);
/// How long after a datagram an ICMP error about it is believed.
pub const ICMP_LATE: Duration = Duration::from_secs(5);
/// How long a worker avoids a backend after ICMP errors.
pub const AVOIDED: Duration = Duration::from_secs(1);
pub const SESSIONS: usize = 60;
pub const SEATS: usize = 100;
pub const SOCKETS: usize = 40;
pub const SOCKETS_UNDER_PRESSURE: usize = 6;
pub const PER_SOURCE: u32 = 6;
pub const USERS: u64 = 50;
/// The first byte of the addresses that floods come from.
pub const FLOOD: u8 = 203;
pub const STEPS: u64 = 6_000;

/// What is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    None,
    NoQuarantine,
    DeafToSnapshots,
    TrustsAnySender,
    NoAffinity,
    NeverExpires,
    NoSourceLimit,
    ForgetsTheLocalAddress,
    MixesUpSockets,
    /// These need pressure to show.
    EvictsWhoWaits,
    EvictsWhoSpeaks,
    FreesTooEarly,
    MakesNoRoom,
}

/// How short room is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pressure {
    None,
    /// Sockets are short.
    Sockets,
    /// The same, with one reply for each datagram.
    Answers,
    /// Places in the session table are short.
    Places,
}

impl Pressure {
    pub const ALL: [Pressure; 4] =
        [Pressure::None, Pressure::Sockets, Pressure::Answers, Pressure::Places];

    pub fn idle(self) -> Duration {
        if self == Pressure::None { IDLE } else { IDLE_UNDER_PRESSURE }
    }

    pub fn sockets(self) -> usize {
        match self {
            Pressure::None | Pressure::Places => SOCKETS,
            Pressure::Sockets | Pressure::Answers => SOCKETS_UNDER_PRESSURE,
        }
    }

    pub fn sessions(self) -> usize {
        if self == Pressure::Places { 12 } else { SESSIONS }
    }

    pub fn per_source(self) -> Option<u32> {
        (self == Pressure::None).then_some(PER_SOURCE)
    }
}

pub fn waits(fault: Fault) -> Waits {
    let mut waits = Waits::default();
    match fault {
        Fault::EvictsWhoWaits => waits.answer = Duration::from_secs(1),
        Fault::EvictsWhoSpeaks => waits.quiet = Duration::from_millis(50),
        Fault::FreesTooEarly => waits.copies = Duration::ZERO,
        Fault::MakesNoRoom => {
            (waits.quiet, waits.answer) = (Duration::from_secs(900), Duration::from_secs(900));
        }
        _ => {}
    }
    waits
}

/// How long a session counts as in use after a datagram passes.
pub fn in_use_for(owed: u64) -> Duration {
    Duration::from_secs(if owed > 0 { 5 } else { 2 })
}

pub fn settings(
    fault: Fault,
    pressure: Pressure,
    worker: usize,
    seed: u64,
    map: &Arc<Affinity>,
) -> UdpSettings {
    let holder = AffinityHandle { map: Arc::clone(map), worker: worker as u8 };
    let sessions = if fault == Fault::NoSourceLimit { None } else { pressure.per_source() };
    UdpSettings {
        udp: Udp { on_backend_loss: OnUdpLoss::Move, ..Udp::default() },
        waits: waits(fault),
        sessions: pressure.sessions(),
        share: pressure.sockets(),
        pairs: PairLimits {
            sockets: pressure.sockets(),
            quarantine: if fault == Fault::NoQuarantine { Duration::ZERO } else { QUARANTINE },
            quarantined_max: 10_000,
        },
        sources: SourceLimits {
            sessions: sessions.and_then(NonZeroU32::new),
            new_per_second: None,
        },
        hasher: FlowHasher::new((seed, 7)),
        seed,
        affinity: (fault != Fault::NoAffinity).then_some(holder),
    }
}
