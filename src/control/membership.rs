//! The part of this balancer in a cluster: what it is called there, and the task that takes what is to be asked to
//! the store and what that says to the hub.

use std::cell::RefCell;
use std::fs;
use std::net::SocketAddr;
use std::rc::Rc;

use nix::sys::socket::SockaddrStorage;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::TICK;
use super::etcd::{self, Access, Store};
use super::hub::Hub;
use super::hub::sharing::Sharing;
use crate::base::time::Now;
use crate::cluster::share::Membership;
use crate::cluster::share::event::Event;
use crate::cluster::share::key::{NodeId, Prefix, is_name};
use crate::cluster::share::seal::Seal;
use crate::config::Config;

/// Most addresses at which we say that backends register.
const CONTROL_MAX: usize = 8;
/// Most events in a row that are heard before anything is done.
const EVENTS_AT_ONCE: usize = 64;

/// What the store says, with the attempt at which the connection was made.
type Heard = mpsc::Receiver<(usize, Event)>;

/// The way to the store of a cluster that was joined.
pub type Joined = (Store, Heard);

/// What is agreed in the cluster of these settings, and who this is there; `None`: there is none.
///
/// # Errors
/// One sentence with the cure.
pub fn of(config: &Config) -> Result<Option<Membership>, String> {
    let cluster = &config.cluster;
    let Some(name) = cluster.name.clone() else { return Ok(None) };
    let secrets = etcd::secrets(cluster)?;
    let seal = secrets.map_or_else(Seal::default, |secrets| Seal::new(secrets.iter()));
    let node = match &cluster.node {
        Some(node) => node.clone(),
        None => read("/proc/sys/kernel/hostname")?,
    };
    if !is_name(&node) {
        return Err(format!(
            "this host is called {node:?}, which names no balancer: set cluster.node"
        ));
    }
    let mut process = [0; 4];
    getrandom::fill(&mut process).map_err(|error| format!("no random bytes: {error}"))?;
    Ok(Some(Membership {
        cluster: name,
        me: NodeId::new(&node, u32::from_ne_bytes(process)),
        seal,
        host: host()?.into(),
        endpoints: cluster.endpoints.len(),
        lease: cluster.lease,
        orphan: cluster.orphan,
    }))
}

fn read(path: &str) -> Result<String, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))?;
    Ok(text.trim().to_owned())
}

/// This boot of the host and our network namespace: wherever both are the same, 127.0.0.1 is.
fn host() -> Result<String, String> {
    let boot = read("/proc/sys/kernel/random/boot_id")?;
    let namespace = fs::read_link("/proc/self/ns/net");
    let namespace = namespace.map_err(|error| format!("cannot read /proc/self/ns/net: {error}"))?;
    Ok(format!("{boot} {}", namespace.display()))
}

/// Where backends of other hosts can register: at the door's own address, or at each of ours.
fn control(door: Option<SocketAddr>) -> Vec<String> {
    let Some(door) = door else { return Vec::new() };
    if !door.ip().is_unspecified() {
        return vec![door.to_string()];
    }
    let plain = |address: SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|it| SocketAddr::from((it.ip(), door.port())));
        let v6 = address.as_sockaddr_in6().map(|it| SocketAddr::from((it.ip(), door.port())));
        v4.or(v6.filter(|it| door.is_ipv6() && !is_link_local(it)))
    };
    let all = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let all = all.filter_map(|it| it.address).filter_map(plain);
    let reachable = all.filter(|it| !it.ip().is_loopback());
    reachable.take(CONTROL_MAX).map(|it| it.to_string()).collect()
}

fn is_link_local(address: &SocketAddr) -> bool {
    matches!(address, SocketAddr::V6(v6) if v6.ip().is_unicast_link_local())
}

/// Joins the cluster of these settings, if there is one. Nothing waits for its store.
///
/// # Errors
/// One sentence with the cure.
pub fn join(hub: &RefCell<Hub>, config: &Config) -> Result<Option<Joined>, String> {
    let Some(membership) = of(config)? else { return Ok(None) };
    let access = Access::read(&config.cluster)?;
    let prefix = Prefix::new(&membership.cluster);
    let now = Now::read();
    let sharing = Sharing::new(membership, control(config.listen.control), now);
    hub.borrow_mut().join_cluster(sharing, now);
    Ok(Some(Store::new(access, prefix.as_str())))
}

/// Takes what is to be asked to the store, and what that says to the hub.
pub async fn share(hub: Rc<RefCell<Hub>>, mut store: Store, mut heard: Heard) {
    let wanted = hub.borrow().sharing.as_ref().map(|it| it.wanted());
    let Some(wanted) = wanted else { return };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            _ = tick.tick() => {
                hub.borrow_mut().tick_cluster(Now::read());
                None
            }
            () = wanted.notified() => None,
            event = heard.recv() => event,
        };
        let more = std::iter::from_fn(|| heard.try_recv().ok()).take(EVENTS_AT_ONCE);
        for (attempt, event) in event.into_iter().chain(more) {
            hub.borrow_mut().heard_from_store(attempt, event, Now::read());
        }
        let commands = hub.borrow_mut().sharing.as_mut().map(|it| it.commands());
        for command in commands.unwrap_or_default() {
            store.carry_out(command);
        }
    }
}
