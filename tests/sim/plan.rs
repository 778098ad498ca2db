//! What kind of day it is: everything that a seed decides before a run begins, drawn within the
//! bounds of a weather. Faults are switched on and off by seed, so that each is also seen without
//! the others.

use std::time::Duration;

use lb::cluster::{Policy, Timeouts};

use super::kernel::Temper;
use super::peer::{End, Habits, How, Pace, Script, When};
use super::pipes::Bounds;
use super::random::Random;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weather {
    /// Nothing goes wrong; everyone must be served to the end.
    Fair,
    /// Peers, network and kernel do what they may.
    Hostile,
    /// Far too few blocks, and readers who stall.
    Starved,
    /// Backends come and go, refuse and hang; orders end sessions.
    Churn,
    /// Long streams, and a few pipes for them.
    Streams,
    /// Far too few blocks, and most readers stop for ever.
    Stalled,
    /// As fair, and the worker is frozen again and again.
    Winter,
    /// Any of the others, and the worker is frozen again and again.
    Frost,
}

impl Weather {
    pub const ALL: [Weather; 8] = [
        Weather::Fair,
        Weather::Hostile,
        Weather::Starved,
        Weather::Churn,
        Weather::Streams,
        Weather::Stalled,
        Weather::Winter,
        Weather::Frost,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Weather::Fair => "fair",
            Weather::Hostile => "hostile",
            Weather::Starved => "starved",
            Weather::Churn => "churn",
            Weather::Streams => "streams",
            Weather::Stalled => "stalled",
            Weather::Winter => "winter",
            Weather::Frost => "frost",
        }
    }
}

/// Chances are per thousand.
#[derive(Clone, Debug)]
pub struct Plan {
    pub users: usize,
    pub arrive_within: Duration,
    pub seats: usize,
    pub small_blocks: usize,
    pub large_blocks: usize,
    pub posted_first: usize,
    pub receive_cap: bool,
    pub splice: bool,
    pub pipes: Bounds,
    pub policy: Policy,
    pub timeouts: Timeouts,
    pub backends: usize,
    /// Least number of bytes that each end has to say, unless it has nothing to say.
    pub bytes_min: u64,
    pub bytes_max: u64,
    pub window_min: u64,
    pub window_max: u64,
    /// Peers that read nothing for a while.
    pub slow: u64,
    /// Peers that leave early.
    pub rude: u64,
    /// Peers that stop reading or never finish.
    pub lazy: u64,
    /// Some of those that never finish go on reading.
    pub lazy_read: bool,
    pub refused: u64,
    pub hanging: u64,
    pub no_descriptor: u64,
    /// Connections for which there is no local port.
    pub no_port: u64,
    pub temper: Temper,
    /// How many orders come, and how many changes of the backends.
    pub orders: u64,
    pub changes: u64,
    pub stops: bool,
    /// Turns in which the worker begins to freeze.
    pub freezes: u64,
}

impl Plan {
    pub fn draw(weather: Weather, random: &mut Random) -> Plan {
        let users = random.any_size(24) as usize;
        let arrive_within = random.any_time(Duration::from_secs(5));
        let calm = Plan {
            users,
            arrive_within,
            seats: users,
            small_blocks: 512,
            large_blocks: 64,
            posted_first: 64,
            receive_cap: random.half(),
            splice: random.half(),
            pipes: Bounds { pipes: 16, pipe_bytes: 1 << 20, step_bytes: 512 << 10 },
            policy: random.pick(&Policy::ALL),
            timeouts: Timeouts {
                connect: Duration::from_secs(3),
                tcp_idle: Duration::from_secs(120),
                half_close: Duration::from_secs(60),
                udp_idle: Duration::from_secs(60),
            },
            backends: random.between(1, 5) as usize,
            bytes_min: 1,
            bytes_max: if random.in_thousand(100) { 1024 * 1024 } else { 96 * 1024 },
            window_min: 16,
            window_max: 256 * 1024,
            slow: 200,
            rude: 0,
            lazy: 0,
            lazy_read: true,
            refused: 0,
            hanging: 0,
            no_descriptor: 0,
            no_port: 0,
            temper: Temper { sluggish: 300, ..Temper::default() },
            orders: 0,
            changes: 0,
            stops: false,
            freezes: 0,
        };
        match weather {
            Weather::Fair => calm,
            Weather::Hostile => hostile(calm, random),
            Weather::Starved => starved(calm, random),
            Weather::Churn => churn(calm, random),
            Weather::Streams => streams(calm, random),
            Weather::Stalled => stalled(calm, random),
            Weather::Winter => Plan { freezes: random.between(20, 500), ..calm },
            Weather::Frost => frost(calm, random),
        }
    }

    pub fn script(&self, random: &mut Random) -> Script {
        if random.half() {
            let mut total = || match random.in_thousand(100) {
                true => 0,
                false => random.any_size(self.bytes_max).max(self.bytes_min),
            };
            return Script::AtOnce { up: total(), down: total() };
        }
        let rounds = random.any_size(30);
        let mut message = || random.any_size(self.bytes_max / rounds / 4);
        Script::InTurns { rounds, up: message(), down: message() }
    }

    pub fn habits(&self, random: &mut Random, total: u64) -> Habits {
        // Nobody needs thousands of turns per session.
        let pace = |random: &mut Random| Pace {
            bytes: random.pick(&[600, 4096, 16 * 1024, 128 * 1024]).max(total / 4),
            every: random.any_time(Duration::from_millis(30)),
        };
        let mut habits = Habits {
            write: pace(random),
            read: pace(random),
            stall: None,
            end: if random.half() { End::First } else { End::Last },
            leave: None,
        };
        if random.in_thousand(self.slow) {
            let short = random.any_time(Duration::from_secs(5));
            habits.stall = Some((random.any_size(self.bytes_max) - 1, Some(short)));
        }
        if random.in_thousand(self.lazy) {
            match random.below(3) {
                0 if self.lazy_read => habits.end = End::Never,
                _ => habits.stall = Some((random.any_size(self.bytes_max) - 1, None)),
            }
        }
        if random.in_thousand(self.rude) {
            let when = match random.half() {
                true => When::Written(random.any_size(self.bytes_max)),
                false => When::After(random.any_time(Duration::from_secs(2))),
            };
            habits.leave =
                Some((when, random.pick(&[How::Reset, How::Reset, How::Close, How::Silent])));
        }
        habits
    }

    pub fn window(&self, random: &mut Random) -> u64 {
        random.any_size(self.window_max).max(self.window_min)
    }
}

/// Switched on in two seeds of three, and then at most this frequent.
fn some(random: &mut Random, most: u64) -> u64 {
    if random.in_thousand(667) { random.any_size(most) } else { 0 }
}

fn hostile(calm: Plan, random: &mut Random) -> Plan {
    Plan {
        small_blocks: random.between(64, 256) as usize,
        large_blocks: random.between(4, 32) as usize,
        rude: some(random, 500),
        lazy: some(random, 300),
        refused: some(random, 200),
        hanging: some(random, 100),
        no_descriptor: some(random, 100),
        no_port: some(random, 200),
        temper: temper(random),
        orders: some(random, 4),
        changes: some(random, 4),
        stops: random.in_thousand(100),
        ..calm
    }
}

fn starved(calm: Plan, random: &mut Random) -> Plan {
    let small_blocks = random.any_size(32) as usize;
    Plan {
        users: random.between(2, 24) as usize,
        seats: 24,
        small_blocks,
        large_blocks: random.below(6) as usize,
        posted_first: random.between(1, small_blocks as u64 + 1) as usize,
        rude: some(random, 100),
        lazy: some(random, 300),
        temper: temper(random),
        bytes_max: 96 * 1024,
        window_max: 64 * 1024,
        ..calm
    }
}

fn stalled(calm: Plan, random: &mut Random) -> Plan {
    let small_blocks = random.between(4, 64) as usize;
    Plan {
        users: 40,
        seats: 40,
        arrive_within: Duration::from_secs(2),
        small_blocks,
        large_blocks: random.below(6) as usize,
        posted_first: random.between(1, small_blocks as u64 + 1) as usize,
        lazy: random.between(300, 700),
        lazy_read: false,
        temper: Temper { failed_sends: 0, ..temper(random) },
        bytes_max: 256 * 1024,
        // A third of it takes a block.
        window_min: 16 * 1024,
        window_max: 32 * 1024,
        ..calm
    }
}

fn churn(calm: Plan, random: &mut Random) -> Plan {
    Plan {
        users: random.between(1, 60) as usize,
        seats: random.between(1, 60) as usize,
        small_blocks: random.between(64, 256) as usize,
        large_blocks: 4,
        backends: random.below(6) as usize,
        bytes_max: 32 * 1024,
        rude: some(random, 300),
        lazy: some(random, 100),
        refused: some(random, 600),
        hanging: some(random, 400),
        no_descriptor: some(random, 200),
        no_port: some(random, 400),
        temper: temper(random),
        orders: random.below(20),
        changes: random.below(20),
        stops: random.in_thousand(300),
        ..calm
    }
}

fn streams(calm: Plan, random: &mut Random) -> Plan {
    Plan {
        users: random.between(1, 6) as usize,
        seats: 6,
        splice: true,
        pipes: Bounds {
            pipes: random.below(5) as usize,
            pipe_bytes: random.between(4 << 10, 1 << 20),
            step_bytes: random.between(16 << 10, 512 << 10),
        },
        bytes_min: random.pick(&[1, 512 << 10]),
        bytes_max: 4 << 20,
        window_min: random.pick(&[8 << 10, 128 << 10]),
        window_max: 1 << 20,
        slow: random.pick(&[100, 800]),
        rude: random.below(600),
        lazy: some(random, 300),
        temper: temper(random),
        orders: some(random, 4),
        stops: random.in_thousand(100),
        ..calm
    }
}

fn frost(calm: Plan, random: &mut Random) -> Plan {
    let freezes = random.between(20, 500);
    let plan = match random.below(4) {
        0 => hostile(calm, random),
        1 => starved(calm, random),
        2 => churn(calm, random),
        _ => streams(calm, random),
    };
    let temper = Temper { unwaited_sends: some(random, 300), ..plan.temper };
    Plan { freezes, temper, ..plan }
}

fn temper(random: &mut Random) -> Temper {
    Temper {
        short_sends: some(random, 300),
        failed_sends: some(random, 20),
        unwaited_sends: 0,
        early_ends: some(random, 100),
        late_cancels: some(random, 1000),
        sluggish: random.below(800),
        lost_wakeups: some(random, 1000),
    }
}
