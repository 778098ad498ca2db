//! What the workers' UDP drivers are made from. Owns how the limits of the whole balancer are shared out
//! among the workers, and what all of them use together.

use std::net::{IpAddr, UdpSocket};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;

use super::{Trouble, capacity};
use crate::base::time::Now;
use crate::cluster::seats::Seats;
use crate::config::Config;
use crate::proxy::udp::Limits;
use crate::session::affinity::Affinity;
use crate::session::flows::{FlowHasher, Waits};
use crate::session::sources::SourceLimits;
use crate::worker::udp::driver::{Habits, Neighbours, UdpDoor, UdpDriver};
use crate::worker::udp::origins::Origins;
use crate::worker::udp::passage::Passages;
use crate::worker::udp::sessions::{Holder, Sessions, Settings};

/// Pairs of backend and socket that may rest at a worker: 16 MiB of notes. A session that finds no
/// room waits for one of them.
const RESTING_MAX: usize = 1 << 20;

/// What the workers' UDP drivers have in common.
pub struct Datagrams {
    settings: Settings,
    map: Arc<Affinity>,
    habits: Habits,
    passages: Arc<Passages>,
}

/// What one worker's driver is made from, on that worker's thread.
pub struct DatagramPlan {
    door: Option<UdpDoor>,
    settings: Settings,
    habits: Habits,
    neighbours: Neighbours,
}

impl Datagrams {
    /// For workers that are woken by writing to these, by worker.
    pub fn new(config: &Config, wakes: Vec<Arc<EventFd>>) -> Result<Datagrams, Trouble> {
        let workers = wakes.len();
        let mut keys = [[0; 8]; 3];
        getrandom::fill(keys.as_flattened_mut()).map_err(|error| {
            Trouble(format!("the kernel gives no random numbers ({error}); see `man 2 getrandom`"))
        })?;
        let [first, second, seed] = keys.map(u64::from_ne_bytes);
        let open = config.listen.udp.is_some();
        let sessions = if open { config.limits.udp_sessions } else { 0 };
        let share = |limit: Option<NonZeroU32>| {
            limit.and_then(|limit| NonZeroU32::new(limit.get().div_ceil(workers as u32)))
        };
        let sockets = capacity::udp_sockets(config);
        local_addresses(&config.udp_local_addresses)?;
        let settings = Settings {
            udp: config.udp,
            idle: config.timeouts.udp_idle,
            waits: Waits::default(),
            // The kernel does not deal users out evenly, so each worker might have them all; together
            // sessions and sockets are bounded by their seats.
            sessions,
            share: capacity::udp_sessions_on(sockets, config) / workers.max(1),
            upstream: Limits {
                sockets: capacity::udp_sessions_on(sockets, config),
                rest: config.udp.quarantine(config.timeouts.udp_idle),
                resting: RESTING_MAX,
            },
            sources: SourceLimits {
                sessions: share(config.udp.source_sessions),
                new_per_second: share(config.udp.source_new_per_second),
            },
            hasher: FlowHasher::new((first, second)),
            seed,
            affinity: None,
        };
        let habits = Habits {
            together: config.udp.gro,
            seats: Arc::new(Seats::new(sockets)),
            origins: Arc::new(Origins::new(&config.udp_local_addresses)),
        };
        let map = Arc::new(Affinity::new(sessions));
        // Without the door nothing is ever handed over, and no memory taken for it.
        let wakes = wakes.into_iter().filter(|_| open);
        Ok(Datagrams { settings, map, habits, passages: Arc::new(Passages::new(wakes)) })
    }

    /// The plan for one worker with its socket at the door, if that is open.
    pub fn driver(&self, worker: u8, door: Option<OwnedFd>) -> Result<DatagramPlan, Trouble> {
        let door = door.map(UdpDoor::new).transpose();
        let door = door.map_err(|error| Trouble(format!("cannot ask the udp door: {error}")))?;
        let mut settings = self.settings.clone();
        // Each worker chooses its sockets by a row of its own.
        settings.seed ^= u64::from(worker) << 56;
        settings.affinity = Some(Holder { map: Arc::clone(&self.map), worker });
        let neighbours = Neighbours { passages: Arc::clone(&self.passages), worker };
        Ok(DatagramPlan { door, settings, habits: self.habits.clone(), neighbours })
    }
}

/// Refuses addresses that nothing can be sent from.
pub fn local_addresses(addresses: &[IpAddr]) -> Result<(), Trouble> {
    addresses.iter().try_for_each(|address| {
        let socket = UdpSocket::bind((*address, 0));
        socket.map(drop).map_err(|error| {
            Trouble(format!(
                "udp.local_addresses names {address}, which datagrams cannot be sent from ({error}); \
                 choose addresses that `ip address` shows"
            ))
        })
    })
}

impl DatagramPlan {
    pub fn build(self, now: Now) -> UdpDriver {
        let core = Sessions::new(self.settings, now);
        UdpDriver::new(core, self.door, self.habits, self.neighbours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_another_host_are_refused_with_the_cure() {
        let at = |text: &str| -> IpAddr { text.parse().unwrap() };
        assert!(local_addresses(&[at("127.0.0.1"), at("127.0.0.2")]).is_ok());
        let said = local_addresses(&[at("127.0.0.1"), at("192.0.2.7")]).unwrap_err().to_string();
        assert!(said.starts_with("udp.local_addresses names 192.0.2.7,"), "{said}");
        assert!(said.ends_with("choose addresses that `ip address` shows"), "{said}");
    }
}
