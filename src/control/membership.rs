//! The part of this balancer in a cluster: what it is called there, and the task that takes what is to be asked to
//! the store and what that says to the hub.

use std::cell::RefCell;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::etcd::{self, Access, Store};
use super::hub::Hub;
use super::hub::sharing::Sharing;
use super::status::Doors;
use super::{TICK, home};
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

/// How long the last word to the store may take.
const PART_PATIENCE: Duration = Duration::from_secs(2);

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
    let is_far = |ip: &IpAddr| !ip.is_loopback() && !home::is_link_local(*ip);
    let all = home::addresses().filter(|ip| ip.is_ipv4() || door.is_ipv6()).filter(is_far);
    all.take(CONTROL_MAX).map(|ip| SocketAddr::new(ip, door.port()).to_string()).collect()
}

/// Joins the cluster of these settings, if there is one, with the doors that were bound. Nothing waits for its store.
///
/// # Errors
/// One sentence with the cure.
pub fn join(hub: &RefCell<Hub>, config: &Config, bound: Doors) -> Result<Option<Joined>, String> {
    let Some(membership) = of(config)? else { return Ok(None) };
    let access = Access::read(&config.cluster)?;
    let prefix = Prefix::new(&membership.cluster);
    let now = Now::read();
    let sharing = Sharing::new(membership, control(bound.control), now).behind(bound);
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
        if hub.borrow().is_handed_over() {
            return part(&hub, &mut store, &mut heard).await;
        }
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

/// Has the store told that another process is the node now. If that is not known there in time, the others wait for as
/// long as the lease lasts.
async fn part(hub: &RefCell<Hub>, store: &mut Store, heard: &mut Heard) {
    let said = async {
        loop {
            let commands = match &mut hub.borrow_mut().sharing {
                Some(sharing) if !sharing.has_said_all() => sharing.commands(),
                _ => return,
            };
            commands.into_iter().for_each(|command| store.carry_out(command));
            let Some((attempt, event)) = heard.recv().await else { return };
            if let Some(sharing) = &mut hub.borrow_mut().sharing {
                sharing.hear_last(attempt, event, Now::read());
            }
        }
    };
    let _ = tokio::time::timeout(PART_PATIENCE, said).await;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::base::publish::Publisher;
    use crate::cluster::Snapshot;
    use crate::config::file;
    use crate::control::workers::Workers;

    #[test]
    fn others_are_told_of_the_door_that_was_bound() {
        let text = "[listen]\ncontrol = \"127.0.0.1:0\"\n[cluster]\nname = \"c\"\nnode = \"a\"\n\
                    endpoints = [\"http://127.0.0.1:1\"]\n";
        let config = file::read("lb.toml", text).unwrap();
        let (workers, snapshots) = (Workers::new(vec![]), Publisher::new(Snapshot::default()));
        let hub = Hub::new(Arc::new(config.clone()), workers, snapshots, Now::read());
        let hub = RefCell::new(hub);
        let bound = Doors { control: Some(([127, 0, 0, 1], 4000).into()), ..Doors::default() };
        join(&hub, &config, bound).unwrap();
        let mut hub = hub.into_inner();
        hub.tick_cluster(Now::read());
        let reported = hub.sharing.as_ref().and_then(|it| it.share.reported());
        assert_eq!(reported.unwrap().control, ["127.0.0.1:4000"]);
    }

    #[test]
    fn a_door_on_all_addresses_is_told_of_at_each_that_others_can_reach() {
        for (door, takes_v6) in [("0.0.0.0:7", false), ("[::]:7", true)] {
            let told = control(door.parse().ok());
            assert!(told.len() <= CONTROL_MAX);
            for address in told.iter().map(|it| it.parse::<SocketAddr>().unwrap()) {
                let ip = address.ip();
                assert!(home::is_of_this_host(address) && !ip.is_loopback(), "{address}");
                assert!(address.port() == 7 && (ip.is_ipv4() || takes_v6), "{address}");
            }
        }
    }
}
