//! How the workers' UDP drivers are made. Owns the division of the balancer's limits among the
//! workers, and what all of them share.

use std::net::{IpAddr, UdpSocket};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;

use super::{Trouble, capacity};
use crate::base::time::Now;
use crate::cluster::Protocol;
use crate::cluster::seats::Seats;
use crate::config::{Config, plans};
use crate::proxy::udp::PairLimits;
use crate::session::affinity::Affinity;
use crate::session::flows::{FlowHasher, Waits};
use crate::session::sources::SourceLimits;
use crate::worker::udp::driver::{HandoffLink, SocketConfig, UdpDriver};
use crate::worker::udp::handoff::HandoffQueues;
use crate::worker::udp::local_addresses::LocalAddresses;
use crate::worker::udp::sessions::{AffinityHandle, Sessions, UdpSettings};

/// Pairs of backend and socket quarantined at one worker, at most; they take 16 MiB. Beyond that,
/// quarantines end early where no reply can be expected any more.
const QUARANTINED_MAX: usize = 1 << 20;

/// What the workers' UDP drivers have in common.
pub struct Datagrams {
    settings: UdpSettings,
    map: Arc<Affinity>,
    sockets: SocketConfig,
    queues: Arc<HandoffQueues>,
}

/// All it takes to make one worker's driver on that worker's thread.
pub struct DatagramPlan {
    settings: UdpSettings,
    sockets: SocketConfig,
    handoff: HandoffLink,
}

impl Datagrams {
    /// `wakes` holds what wakes each worker, by worker.
    ///
    /// # Errors
    /// The kernel gives no random numbers, or a local address is not this host's.
    pub fn new(config: &Config, wakes: Vec<Arc<EventFd>>) -> Result<Datagrams, Trouble> {
        let workers = wakes.len();
        let mut keys = [[0; 8]; 3];
        getrandom::fill(keys.as_flattened_mut()).map_err(|error| {
            Trouble(format!("the kernel gives no random numbers ({error}); see `man 2 getrandom`"))
        })?;
        let [first, second, seed] = keys.map(u64::from_ne_bytes);
        let open = plans::has_door(config, Protocol::Udp);
        let sessions = if open { config.limits.udp_sessions } else { 0 };
        let share = |limit: Option<NonZeroU32>| {
            limit.and_then(|limit| NonZeroU32::new(limit.get().div_ceil(workers as u32)))
        };
        let sockets_max = capacity::udp_sockets(config);
        local_addresses(&config.udp_local_addresses)?;
        let settings = UdpSettings {
            udp: config.udp,
            waits: Waits::default(),
            // The kernel does not distribute users evenly, so one worker may have them all. Seats
            // bound sessions and sockets across the workers.
            sessions,
            share: capacity::udp_sessions_on(sockets_max, config) / workers.max(1),
            pairs: PairLimits {
                sockets: capacity::udp_sessions_on(sockets_max, config),
                // The driver says how long, by the services that there are.
                quarantine: Duration::ZERO,
                quarantined_max: QUARANTINED_MAX,
            },
            sources: SourceLimits {
                sessions: share(config.udp.source_sessions),
                new_per_second: share(config.udp.source_new_per_second),
            },
            hasher: FlowHasher::new((first, second)),
            seed,
            affinity: None,
        };
        let sockets = SocketConfig {
            offload: config.udp.gro,
            seats: Arc::new(Seats::new(sockets_max)),
            local_addresses: Arc::new(LocalAddresses::new(&config.udp_local_addresses)),
        };
        let map = Arc::new(Affinity::new(sessions));
        // Without UDP doors nothing is ever handed off, so no memory is spent on queues.
        let wakes = wakes.into_iter().filter(|_| open);
        Ok(Datagrams { settings, map, sockets, queues: Arc::new(HandoffQueues::new(wakes)) })
    }

    /// The plan for one worker.
    pub fn driver(&self, worker: u8) -> DatagramPlan {
        let mut settings = self.settings.clone();
        // Gives each worker a random sequence of its own.
        settings.seed ^= u64::from(worker) << 56;
        settings.affinity = Some(AffinityHandle { map: Arc::clone(&self.map), worker });
        let handoff = HandoffLink { queues: Arc::clone(&self.queues), worker };
        DatagramPlan { settings, sockets: self.sockets.clone(), handoff }
    }
}

/// Checks that datagrams can be sent from these addresses.
///
/// # Errors
/// Names the first from which they cannot.
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
        let sessions = Sessions::new(self.settings, now);
        UdpDriver::new(sessions, self.sockets, self.handoff)
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
