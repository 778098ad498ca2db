//! `lb check`: whether `lb serve` would start with these settings on this host, one line per
//! requirement, and how many sessions the host can hold. Tries what serve would do and undoes it;
//! changes nothing.

use std::fmt::Write;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::flags::Flags;
use super::table::{Look, colour, painted};
use super::{Failure, print, wait_for};
use crate::boot::needs::{self, About, Need};
use crate::boot::{self, Trouble, capacity};
use crate::client::admin;
use crate::cluster::Protocol;
use crate::cluster::share::key::Prefix;
use crate::config::cluster::Endpoint;
use crate::config::{Config, doubts, plans};
use crate::control::etcd::Access;
use crate::control::etcd::look::{Seen, look};
use crate::control::status::{Doors, Status};
use crate::proxy::udp::SOCKETS_MAX;
use crate::session::flows::Waits;

/// How long the running balancer may take to say what it has.
const RUNNING_WITHIN: Duration = Duration::from_secs(2);

/// Report whether `lb serve` would start here with these settings, and how many sessions fit.
///
/// Each line begins with "ok", "warn" or "bad"; a bad one ends with the fix. The exit code is 2 if serve
/// would not start. A port that the balancer running here has is no fault, so that
/// `lb check && lb reload` works beside it.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    flags: Flags,
}

/// One thing that serve needs: what it is, and its state or the cure.
struct Finding {
    what: String,
    outcome: Outcome,
}

enum Outcome {
    Good(String),
    /// Serve starts all the same.
    Doubtful(String),
    Bad(String),
}

impl Finding {
    fn new(what: &str, outcome: Outcome) -> Finding {
        Finding { what: what.to_owned(), outcome }
    }
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let config = match arguments.flags.load() {
        Ok(config) => config,
        Err(Failure(said)) => {
            let finding = Finding::new("settings", Outcome::Bad(said));
            return conclude(&[finding], None);
        }
    };
    conclude(&findings(&config), Some(&capacity(&config)))
}

fn conclude(findings: &[Finding], capacity: Option<&str>) -> Result<(), Failure> {
    let mut out = shown(findings, colour());
    let is_bad = |finding: &&Finding| matches!(finding.outcome, Outcome::Bad(_));
    let bad = findings.iter().filter(is_bad).count();
    if let Some(capacity) = capacity.filter(|_| bad == 0) {
        out.push_str(capacity);
    }
    print(&out)?;
    match bad {
        0 => Ok(()),
        1 => Err(Failure("serve would not start here: mend the line marked \"bad\"".to_owned())),
        _ => {
            Err(Failure(format!("serve would not start here: mend the {bad} lines marked \"bad\"")))
        }
    }
}

fn shown(findings: &[Finding], colour: bool) -> String {
    let width = findings.iter().map(|finding| finding.what.len()).max().unwrap_or(0);
    let mut out = String::new();
    for Finding { what, outcome } in findings {
        let (mark, said) = match outcome {
            Outcome::Good(said) => (painted("ok  ", Look::Good, colour), said),
            Outcome::Doubtful(said) => (painted("warn", Look::Warning, colour), said),
            Outcome::Bad(said) => (painted("bad ", Look::Bad, colour), said),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{mark} {what:width$}  {said}");
    }
    out
}

/// The members of the cluster's store. A balancer starts without them.
fn store(config: &Config) -> Vec<Finding> {
    let Some(name) = &config.cluster.name else { return Vec::new() };
    let Ok(access) = Access::read(&config.cluster) else { return Vec::new() };
    let prefix = Prefix::new(name);
    let looks = async {
        let mut looks = Vec::new();
        for attempt in 0..access.endpoints().len() {
            looks.push(look(&access, attempt, prefix.as_str()).await);
        }
        looks
    };
    let looks = wait_for(tokio::task::LocalSet::new().run_until(looks)).unwrap_or_default();
    let finding = |(endpoint, look): (&Endpoint, Result<Seen, String>)| {
        let outcome = match look {
            Err(why) => Outcome::Doubtful(format!("{endpoint}: {why}")),
            Ok(look) => seen(endpoint, &look),
        };
        Finding::new("etcd", outcome)
    };
    access.endpoints().iter().zip(looks).map(finding).collect()
}

fn seen(endpoint: &Endpoint, look: &Seen) -> Outcome {
    let Seen { version, database_bytes, took, alarms } = look;
    let (ms, megabytes) = (took.as_secs_f64() * 1e3, *database_bytes as f64 / 1e6);
    let said = format!("{endpoint}: version {version}, reads within {ms:.1} ms, {megabytes:.1} MB");
    if !alarms.is_empty() {
        let alarms = alarms.join(", ");
        return Outcome::Doubtful(format!(
            "{said}; it complains of {alarms}: see `etcdctl alarm list`"
        ));
    }
    match version.starts_with("3.4.") {
        true => Outcome::Doubtful(format!("{said}; 3.4 gets no more fixes: use 3.5.16 or newer")),
        false => Outcome::Good(said),
    }
}

/// Everything that serve needs, what it would work out for itself, and what deserves a warning.
fn findings(config: &Config) -> Vec<Finding> {
    let mut all: Vec<Tried> = needs::all(config).into_iter().map(Tried::of).collect();
    if all.iter().any(|it| it.about != About::Host && it.outcome.is_err())
        && let Some(running) = running(config)
    {
        all.iter_mut().for_each(|tried| tried.recognise(&running));
    }
    let mut findings: Vec<Finding> = all.into_iter().map(Tried::found).collect();
    if let Ok(derived) = capacity::settle(&mut config.clone())
        && !derived.is_empty()
    {
        findings.push(Finding::new("auto", Outcome::Good(derived.join(", "))));
    }
    findings.extend(store(config));
    let doubts = doubts::named(config).into_iter();
    findings.extend(doubts.map(|(what, doubt)| Finding::new(what, Outcome::Doubtful(doubt))));
    findings
}

/// A need that was tried.
struct Tried<'a> {
    what: String,
    about: About<'a>,
    outcome: Result<String, Trouble>,
}

impl<'a> Tried<'a> {
    fn of(need: Need<'a>) -> Tried<'a> {
        Tried { what: need.what.clone(), about: need.about, outcome: need.outcome() }
    }

    /// What could not be opened because the running balancer has it is not missing.
    fn recognise(&mut self, running: &Status) {
        let place = match self.about {
            About::Door { datagrams, address } if has_door(running, datagrams, address) => {
                address.to_string()
            }
            About::Socket(path) if listener(path) == Some(running.pid) => {
                path.display().to_string()
            }
            _ => return,
        };
        if self.outcome.is_err() {
            let pid = running.pid;
            self.outcome = Ok(format!("{place} is open in the running balancer (process {pid})"));
        }
    }

    fn found(self) -> Finding {
        let outcome = match self.outcome {
            Ok(said) => Outcome::Good(said),
            Err(Trouble(said)) => Outcome::Bad(said),
        };
        Finding { what: self.what, outcome }
    }
}

/// The balancer that runs on this host, if it is the one of these settings: its admin door is where they say.
fn running(config: &Config) -> Option<Status> {
    let mut door = config.listen.admin?;
    if door.ip().is_unspecified() {
        door.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    if !door.ip().to_canonical().is_loopback() {
        return None;
    }
    let door = door.to_string();
    let answer = async { tokio::time::timeout(RUNNING_WITHIN, admin::status(&door)).await };
    wait_for(answer).ok()?.ok()?.ok()
}

fn has_door(running: &Status, datagrams: bool, address: SocketAddr) -> bool {
    let Doors { tcp, udp, api, api_tls, control, admin } = running.doors;
    let named = running.services.iter().flat_map(|service| {
        service.doors.iter().map(|door| (service.protocol == Protocol::Udp, *door))
    });
    let streams =
        [tcp, api, api_tls, control, admin].into_iter().flatten().map(|door| (false, door));
    let mut open = streams.chain(udp.map(|door| (true, door))).chain(named);
    open.any(|it| (it.0, it.1.port()) == (datagrams, address.port()))
}

/// The process that listens on a unix socket.
fn listener(path: &Path) -> Option<u32> {
    let stream = UnixStream::connect(path).ok()?;
    let peer = getsockopt(&stream, PeerCredentials).ok()?;
    u32::try_from(peer.pid()).ok()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// How many sessions the host can hold, and what limits them.
fn capacity(config: &Config) -> String {
    let descriptors = capacity::raise_descriptors();
    let fit = capacity::sessions_for(descriptors, config);
    let ports = capacity::port_range(&read("/proc/sys/net/ipv4/ip_local_port_range"));
    let tcp = told_capacity(config.limits.sessions, fit, ports);
    let sockets = capacity::udp_sockets_for(descriptors, config);
    match plans::has_door(config, Protocol::Udp) {
        true => tcp + &told_udp_capacity(sockets, config),
        false => tcp,
    }
}

/// `limit` is zero if it is left to the host.
fn told_capacity(limit: usize, fit: usize, local_ports: Option<(usize, usize)>) -> String {
    let most = if limit == 0 { capacity::SESSIONS_DEFAULT } else { limit };
    let bound = match (fit < most, limit) {
        (true, _) => "bounded by the descriptors that may be open".to_owned(),
        (false, 0) => format!("the default limit; its descriptors would be enough for {fit}"),
        (false, _) => format!("bounded by limits.sessions; its descriptors would do for {fit}"),
    };
    let mut out = format!("This host can hold {} TCP sessions at once, {bound}.\n", fit.min(most));
    if let Some((first, last)) = local_ports {
        let ports = (last + 1).saturating_sub(first);
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "It has {ports} local ports for connections to one backend's address and port \
             (net.ipv4.ip_local_port_range)."
        );
    }
    out
}

/// A socket serves one session on each backend, and is in quarantine for that backend afterwards.
fn told_udp_capacity(sockets: usize, config: &Config) -> String {
    let all = config.limits.udp_sessions;
    let most = capacity::udp_sessions_on(sockets, config).min(boot::workers(config) * SOCKETS_MAX);
    let each = most.min(all);
    // For as long as each is in use: sockets in quarantine give way.
    let waits = Waits::default();
    let busy = match config.udp.responses {
        Some(_) => waits.copies,
        None => waits.quiet.min(config.timeouts.udp_idle),
    };
    let rate = each as f64 / busy.as_secs_f64();
    format!(
        "It can hold {each} UDP sessions on one backend, bounded by {}, and {all} on all of them \
         (limits.udp_sessions).\nOne backend can be given up to {rate:.0} new UDP sessions a \
         second for long, if each is answered: a session that nobody uses makes room for another.\n",
        match (each < most || all == most, config.limits.udp_sockets) {
            (true, _) => "limits.udp_sessions",
            (false, 0) => "the local ports and descriptors",
            (false, _) => "limits.udp_sockets",
        }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_is_one_aligned_line() {
        let findings = [
            Finding::new("rings", Outcome::Good("fine".into())),
            Finding::new("admin door", Outcome::Bad("taken: move".into())),
            Finding::new("admin door", Outcome::Doubtful("open".into())),
        ];
        assert_eq!(
            shown(&findings, false),
            "ok   rings       fine\nbad  admin door  taken: move\nwarn admin door  open\n"
        );
    }

    #[test]
    fn the_capacity_names_what_bounds_it() {
        for (limit, fit, said) in [
            (0, 8907, "8907 TCP sessions at once, bounded by the descriptors"),
            (0, 500_000, "100000 TCP sessions at once, the default limit"),
            (100, 8907, "100 TCP sessions at once, bounded by limits.sessions"),
            (9000, 8907, "8907 TCP sessions at once, bounded by the descriptors"),
        ] {
            let told = told_capacity(limit, fit, Some((32_768, 60_999)));
            assert!(told.contains(said) && told.contains("28232 local ports"), "{told}");
        }
    }

    #[test]
    fn the_udp_capacity_is_that_of_the_sockets_for_one_backend() {
        let mut config = Config::default();
        let told = told_udp_capacity(18_000, &config);
        let said = "18000 UDP sessions on one backend, bounded by the local ports and descriptors, \
                    and 100000 on all of them";
        assert!(told.contains(said) && told.contains("given up to 9000 new"), "{told}");
        config.limits.udp_sockets = 18_000;
        let told = told_udp_capacity(18_000, &config);
        assert!(told.contains("bounded by limits.udp_sockets"), "{told}");
        config.limits.udp_sessions = 500;
        let told = told_udp_capacity(18_000, &config);
        assert!(
            told.contains("500 UDP sessions on one backend, bounded by limits.udp_sess"),
            "{told}"
        );
        config = Config { workers: Some(1), ..Config::default() };
        for (addresses, each) in [(2, 36_000), (4, 65_535)] {
            let ip = |number: u32| std::net::Ipv4Addr::from(0x7f00_0001 + number).into();
            config.udp_local_addresses = (0..addresses).map(ip).collect();
            let told = told_udp_capacity(18_000, &config);
            assert!(told.contains(&format!("{each} UDP sessions on one backend")), "{told}");
        }
    }
}
