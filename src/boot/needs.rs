//! What a balancer needs of its settings and of its host. Owns the list: `lb serve` goes through it before it
//! opens anything, and `lb check` shows it, so that neither knows a refusal that the other does not. What a
//! start opens for itself (doors, rings) is only tried for `lb check`, by the code that opens it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use super::{Trouble, capacity, circles, datagrams, doors, plane, tls};
use crate::base::time::Now;
use crate::cluster::Protocol;
use crate::config::plans::{self, Name};
use crate::config::units::SIZES;
use crate::config::{Config, rules};
use crate::control::certificates::{CertificateStatus, remaining};
use crate::control::doors::UserDoors;
use crate::control::etcd::Access;
use crate::control::membership;
use crate::control::rights::{self, who_may_register};
use crate::control::socket;
use crate::ring::probe;
use crate::tls::clients::{Authorities, ClientPolicy};
use crate::tls::keys::{Files, Identity, days, provider};
use crate::tls::tickets::Keyring;

/// What a need is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum About<'a> {
    Host,
    /// A door, which the balancer that runs already may have.
    Door {
        datagrams: bool,
        address: SocketAddr,
    },
    /// The socket for operators, likewise.
    Socket(&'a Path),
}

/// One thing that a start needs.
pub struct Need<'a> {
    /// What it is called, in a word or two.
    pub what: String,
    pub about: About<'a>,
    /// Whether a start finds out by opening it.
    is_opened: bool,
    try_out: Box<dyn FnOnce() -> Result<String, Trouble> + 'a>,
}

impl<'a> Need<'a> {
    fn new(what: &str, try_out: impl FnOnce() -> Result<String, Trouble> + 'a) -> Need<'a> {
        let try_out = Box::new(try_out);
        Need { what: what.to_owned(), about: About::Host, is_opened: false, try_out }
    }

    fn opened(self, about: About<'a>) -> Need<'a> {
        Need { about, is_opened: true, ..self }
    }

    /// Tries it and undoes what it did; says what there is.
    ///
    /// # Errors
    /// Why `lb serve` does not start.
    pub fn outcome(self) -> Result<String, Trouble> {
        (self.try_out)()
    }
}

/// Refuses settings, or a host, with which a start would fail before it opens anything.
///
/// # Errors
/// The first reason.
pub fn refuse(config: &Config) -> Result<(), Trouble> {
    let mut before = all(config).into_iter().filter(|need| !need.is_opened);
    before.try_for_each(|need| need.outcome().map(drop))
}

/// Everything that a start needs, in the order in which it finds out.
pub fn all(config: &Config) -> Vec<Need<'_>> {
    let mut needs = vec![Need::new("settings", || fit_together(config))];
    needs.extend(files(config));
    needs.extend(certificates(config));
    if tls::concerns_backends(config) {
        needs.push(Need::new("authorities", || {
            let backends = tls::backends(config).map_err(Trouble)?;
            let count = backends.authorities();
            Ok(format!("backends that are reached by TLS are verified by {count} of them"))
        }));
    }
    needs.push(Need::new("io_uring", || {
        probe::probe().map(|found| found.to_string()).map_err(|error| Trouble(error.to_string()))
    }));
    needs.push(Need::new("memory", || memory(config, available())));
    needs.push(Need::new("descriptors", || descriptors(config)));
    if !config.udp_local_addresses.is_empty() {
        needs.push(Need::new("addresses", || {
            let usable = datagrams::local_addresses(&config.udp_local_addresses);
            usable.map(|()| "can be sent from".to_owned())
        }));
    }
    needs.push(Need::new("rings", || rings(config)).opened(About::Host));
    needs.extend(doors_of(config));
    if let Some(path) = config.admin.socket.as_deref() {
        let free = move || {
            socket::try_out(path).map_err(Trouble)?;
            Ok(format!("{} can be opened", path.display()))
        };
        needs.push(Need::new("admin socket", free).opened(About::Socket(path)));
    }
    needs
}

fn fit_together(config: &Config) -> Result<String, Trouble> {
    rules::check(config).map_err(Trouble)?;
    who_may_register(config).map_err(Trouble)?;
    rules::claims(config).map_err(Trouble)?;
    UserDoors::default().step(&plans::doors(config), Now::read()).map_err(Trouble)?;
    circles::refuse(config)?;
    Ok("the file and the flags fit together".to_owned())
}

/// The files of secrets and tokens, each of which is read.
fn files(config: &Config) -> Vec<Need<'_>> {
    let mut needs = Vec::new();
    for (path, of) in rights::files(config) {
        let read = move || rights::load(path, &of).map(drop).map_err(Trouble);
        needs.push(Need::new("secret", move || {
            read().map(|()| format!("{} holds secrets", path.display()))
        }));
    }
    if config.cluster.name.is_some() {
        needs.push(Need::new("cluster", || {
            let member = membership::of(config).map_err(Trouble)?;
            Access::read(&config.cluster).map_err(Trouble)?;
            let member = member.expect("it has a name");
            let sealed = if member.seal.is_secret() { "sealed" } else { "not sealed" };
            Ok(format!("{}, as {}; what is written is {sealed}", member.cluster, member.me.node()))
        }));
    }
    if let Some(path) = &config.admin.token_file {
        needs.push(Need::new("tokens", || {
            rights::tokens(config).map_err(Trouble)?;
            Ok(format!("{} holds tokens", path.display()))
        }));
    }
    needs
}

/// The files of certificates, each of which is read.
fn certificates(config: &Config) -> Vec<Need<'_>> {
    let now = Now::read().unix_seconds();
    let read = move |files: &Files| {
        let identity = Identity::read(files).map_err(Trouble)?;
        let names = match identity.names.is_empty() {
            true => "no host".to_owned(),
            false => identity.names.join(", "),
        };
        let status = CertificateStatus::of(&identity, now);
        let (at, key, remaining) = (status.file.display(), &status.key, status.remaining());
        Ok(format!("{at} is for {names} ({key}) and {remaining}"))
    };
    let need = |files| Need::new("certificate", move || read(files));
    let mut needs: Vec<Need<'_>> = config.tls.certificates.iter().map(need).collect();
    for policy in config.client_policies().collect::<BTreeSet<_>>() {
        needs.push(Need::new("client CA", move || authorities(&policy, now)));
    }
    if let Some(path) = &config.tls.ticket_file {
        needs.push(Need::new("tickets", || {
            let keys = Keyring::shared(path).map_err(Trouble)?;
            Ok(format!("{} holds {} keys", path.display(), keys.count()))
        }));
    }
    needs
}

/// Who judges the certificates of users, and how old are the lists of what they have revoked.
fn authorities(policy: &Arc<ClientPolicy>, now: i64) -> Result<String, Trouble> {
    let read = Authorities::read(policy, provider()).map_err(Trouble)?;
    let (at, remaining) = (policy.ca.display(), remaining(days(read.not_after, now)));
    let mut said = match read.count {
        1 => format!("{at} holds one authority, which {remaining}"),
        count => format!("{at} holds {count} authorities, the first of which {remaining}"),
    };
    for list in &read.lists {
        said += &format!("; {} revokes {}", list.file.display(), list.revoked);
        if list.is_overdue(now) {
            said += ", and is out of date: what was revoked since is not known";
        }
    }
    Ok(said)
}

/// Memory that is available without swapping, in bytes; `None` if the kernel does not say.
fn available() -> Option<u64> {
    available_in(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn memory(config: &Config, available: Option<u64>) -> Result<String, Trouble> {
    const MIB: u64 = 1 << 20;
    let wanted = config.limits.buffer_bytes as u64;
    match available {
        Some(there) if there < wanted => Err(Trouble(format!(
            "limits.buffer_bytes is {}, and {} MiB of memory can be had: lower it, or free memory",
            SIZES.bare(wanted),
            there / MIB
        ))),
        Some(there) => Ok(format!("{} MiB can be had", there / MIB)),
        None => Ok("the kernel does not say how much can be had".to_owned()),
    }
}

fn descriptors(config: &Config) -> Result<String, Trouble> {
    let sessions = capacity::sessions(config)?;
    let allowed = capacity::raise_descriptors();
    Ok(format!("{allowed} may be open, enough for {sessions} sessions"))
}

fn rings(config: &Config) -> Result<String, Trouble> {
    plane::try_rings(config)?;
    let (workers, bytes) = (plane::workers(config), config.limits.buffer_bytes as u64);
    let are = if workers == 1 { "worker" } else { "workers" };
    Ok(format!("{workers} {are} with {} of buffers", SIZES.bare(bytes)))
}

/// Every door: those with a flag of their own, even if they are off, and those of the services in the file.
fn doors_of(config: &Config) -> Vec<Need<'_>> {
    let listen = &config.listen;
    let flags = [
        ("control", Protocol::Tcp, listen.control),
        ("admin", Protocol::Tcp, listen.admin),
        ("tcp", Protocol::Tcp, listen.tcp),
        ("udp", Protocol::Udp, listen.udp),
        ("api", Protocol::Api, listen.api),
        ("api-tls", Protocol::Api, listen.api_tls),
    ];
    let flags = flags.map(|(name, protocol, at)| door(Name::flag(name), protocol, at));
    let named = plans::doors(config).into_iter().filter(|plan| !plan.name.is_flag());
    let named = named.map(|plan| door(plan.name, plan.protocol, Some(plan.address)));
    flags.into_iter().chain(named).collect()
}

fn door<'a>(name: Name, protocol: Protocol, address: Option<SocketAddr>) -> Need<'a> {
    let what = format!("{name} door");
    let Some(address) = address else { return Need::new(&what, || Ok("off".to_owned())) };
    let free =
        move || doors::try_out(&name, protocol, address).map(|_| format!("{address} is free"));
    let datagrams = protocol == Protocol::Udp;
    Need::new(&what, free).opened(About::Door { datagrams, address })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;
    use crate::config::services::ServiceConfig;

    #[test]
    fn the_host_is_read_from_what_the_kernel_says() {
        assert_eq!(available_in("MemTotal:  9 kB\nMemAvailable:    7936 kB\n"), Some(7936 * 1024));
        assert_eq!(available_in("MemTotal:  9 kB\n"), None);
        assert!(available() > Some(0));
    }

    #[test]
    fn buffers_that_do_not_fit_are_told() {
        let mut config = Config::default();
        assert_eq!(memory(&config, Some(1 << 30)).unwrap(), "1024 MiB can be had");
        config.limits.buffer_bytes = 2 << 30;
        let said = memory(&config, Some(1 << 30)).unwrap_err().to_string();
        assert!(said.starts_with("limits.buffer_bytes is 2GiB, and 1024 MiB"), "{said}");
    }

    #[test]
    fn a_door_that_another_program_has_is_told_with_the_flag_that_moves_it() {
        let tried = |name: &str, protocol, address| {
            door(Name::flag(name), protocol, Some(address)).outcome().map_err(|it| it.0)
        };
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap();
        let said = tried("tcp", Protocol::Tcp, address).unwrap_err();
        assert!(said.contains("is taken") && said.contains("--tcp"), "{said}");
        assert!(tried("udp", Protocol::Udp, address).is_ok(), "UDP has ports of its own");
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        let said = tried("udp", Protocol::Udp, other.local_addr().unwrap()).unwrap_err();
        assert!(said.contains("is taken") && said.contains("--udp"), "{said}");
        let elsewhere = "192.0.2.1:80".parse().unwrap();
        assert!(tried("api", Protocol::Api, elsewhere).unwrap_err().contains("ip address"));
    }

    #[test]
    fn every_door_of_a_service_is_tried() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = taken.local_addr().map(|at| (at, taken)).unwrap();
        let free = "127.0.0.1:0".parse().unwrap();
        let mut config = Config::default();
        let listen = &mut config.listen;
        (listen.tcp, listen.udp, listen.api) = (None, None, None);
        (listen.control, listen.admin) = (None, None);
        let service = |name, protocol, listen: &[SocketAddr]| ServiceConfig {
            listen: listen.to_vec(),
            ..ServiceConfig::new(name, protocol)
        };
        config.set_services(vec![
            service("redis", Protocol::Tcp, &[free, taken.0]),
            service("dns", Protocol::Udp, &[taken.0]),
        ]);
        let tried: Vec<_> =
            doors_of(&config).into_iter().map(|it| (it.what.clone(), it.outcome())).collect();
        let bad: Vec<_> = tried.iter().filter(|it| it.1.is_err()).collect();
        assert_eq!((tried.len(), bad.len()), (6 + 3, 1));
        let said = bad[0].1.as_ref().unwrap_err().to_string();
        assert_eq!(bad[0].0, "redis door");
        assert!(said.ends_with("choose another in [service.redis]"), "{said}");
        assert_eq!(tried[8].0, "dns door");
    }

    #[test]
    fn a_door_for_https_is_tried_like_any_other() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut config = Config::default();
        config.listen.api_tls = taken.local_addr().ok();
        let door = doors_of(&config).into_iter().find(|it| it.what == "api-tls door").unwrap();
        let said = door.outcome().unwrap_err().to_string();
        assert!(said.contains("is taken") && said.contains("--api-tls"), "{said}");
    }

    #[test]
    fn what_a_start_opens_is_not_tried_before_it() {
        let mut config = Config::default();
        config.admin.socket = Some("no/such/folder/admin.sock".into());
        config.admin.token_file = Some("no/such/file".into());
        let opened = |need: Need<'_>| need.is_opened.then_some(need.what);
        let opened: Vec<String> = all(&config).into_iter().filter_map(opened).collect();
        let doors = ["control door", "admin door", "tcp door", "udp door", "api door"];
        assert_eq!(opened, [&["rings"], &doors[..], &["admin socket"]].concat());
        let said = refuse(&config).unwrap_err().to_string();
        assert!(said.starts_with("admin.token_file: cannot read"), "{said}");
    }
}
