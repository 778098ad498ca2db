//! `lb check`: whether `lb serve` would start with these settings on this host, one line per
//! requirement, and how many sessions the host can hold. Tries what serve would do and undoes it;
//! changes nothing.

use std::fmt::Write;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use clap::Args;
use nix::sys::resource::{Resource, getrlimit};

use super::flags::Flags;
use super::table::{Look, colour, painted, sized};
use super::{Failure, print, wait_for};
use crate::boot::{self, Trouble, capacity, circles, datagrams, doors};
use crate::client::admin;
use crate::cluster::Protocol;
use crate::config::Config;
use crate::config::plans::{self, DoorPlan, Name};
use crate::control::auth::Secrets;
use crate::control::status::{Doors, Status};
use crate::proxy::udp::SOCKETS_MAX;
use crate::ring::{Ring, probe, sys};
use crate::session::flows::Waits;

/// How long the running balancer may take to say what it has.
const RUNNING_WITHIN: Duration = Duration::from_secs(2);

/// Report whether `lb serve` would start here with these settings, and how many sessions fit.
///
/// Each line begins with "ok" or "bad"; a bad one ends with the fix. The exit code is 2 if serve
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
    outcome: Result<String, String>,
}

impl Finding {
    fn new(what: &str, outcome: Result<String, String>) -> Finding {
        Finding { what: what.to_owned(), outcome }
    }
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let config = match arguments.flags.load() {
        Ok(config) => config,
        Err(Failure(said)) => {
            let finding = Finding::new("settings", Err(said));
            return conclude(&[finding], None);
        }
    };
    conclude(&findings(&config), Some(&capacity(&config)))
}

fn conclude(findings: &[Finding], capacity: Option<&str>) -> Result<(), Failure> {
    let mut out = shown(findings, colour());
    let bad = findings.iter().filter(|finding| finding.outcome.is_err()).count();
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
            Ok(said) => (painted("ok ", Look::Good, colour), said),
            Err(said) => (painted("bad", Look::Bad, colour), said),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{mark}  {what:width$}  {said}");
    }
    out
}

fn findings(config: &Config) -> Vec<Finding> {
    let mut findings = vec![
        Finding::new("settings", Ok("the file and the flags fit together".into())),
        Finding::new("io_uring", io_uring()),
        Finding::new("rings", rings(config, boot::workers(config))),
        Finding::new("memory", memory(config, available(&read("/proc/meminfo")))),
        Finding::new("descriptors", descriptors(config)),
    ];
    let own = config.services.iter().map(|service| ("secret", &service.secret_file));
    let global = [("secret", &config.control.secret_file), ("tokens", &config.admin.token_file)];
    for (what, path) in global.into_iter().chain(own) {
        let Some(path) = path else { continue };
        let outcome = Secrets::load(path).map(|_| format!("{} holds secrets", path.display()));
        findings.push(Finding::new(what, outcome));
    }
    if !config.udp_local_addresses.is_empty() {
        let usable = datagrams::local_addresses(&config.udp_local_addresses);
        let outcome = usable.map(|()| "can be sent from".to_owned()).map_err(|it| it.to_string());
        findings.push(Finding::new("addresses", outcome));
    }
    if let Err(Trouble(said)) = circles::refuse(config) {
        findings.push(Finding::new("backends", Err(said)));
    }
    findings.extend(doors_of(config));
    findings
}

/// A door that was tried.
struct Tried {
    name: String,
    datagrams: bool,
    /// `None` if it is off.
    address: Option<SocketAddr>,
    outcome: Result<String, String>,
}

/// Tries every door: those with a flag of their own, even if they are off, and those of the services in
/// the file.
fn doors_of(config: &Config) -> Vec<Finding> {
    let listen = &config.listen;
    let flags = [
        ("tcp", listen.tcp),
        ("udp", listen.udp),
        ("api", listen.api),
        ("control", listen.control),
        ("admin", listen.admin),
    ];
    let built_in = flags.map(|(name, at)| tried(&Name::flag(name), name == "udp", at));
    let named = plans::doors(config).into_iter().filter(|plan| !plan.name.is_flag());
    let named = named.map(|DoorPlan { name, protocol, address, .. }| {
        tried(&name, protocol == Protocol::Udp, Some(address))
    });
    let mut all: Vec<Tried> = built_in.into_iter().chain(named).collect();
    if all.iter().any(|door| door.outcome.is_err())
        && let Some(running) = running(config)
    {
        all.iter_mut().for_each(|door| recognise(door, &running));
    }
    let shown = |door: Tried| Finding::new(&format!("{} door", door.name), door.outcome);
    all.into_iter().map(shown).collect()
}

fn tried(name: &Name, datagrams: bool, address: Option<SocketAddr>) -> Tried {
    let outcome = address.map_or(Ok("off".to_owned()), |address| door(name, datagrams, address));
    Tried { name: name.to_string(), datagrams, address, outcome }
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

/// A door that could not be opened because the running balancer has it is none that is missing.
fn recognise(door: &mut Tried, running: &Status) {
    let Doors { tcp, udp, api, control, admin } = running.doors;
    let named = running.services.iter().flat_map(|service| {
        service.doors.iter().map(|door| (service.protocol == Protocol::Udp, *door))
    });
    let streams = [tcp, api, control, admin].into_iter().flatten().map(|door| (false, door));
    let mut open = streams.chain(udp.map(|door| (true, door))).chain(named);
    let Some(address) = door.address else { return };
    let is_it = |it: (bool, SocketAddr)| (it.0, it.1.port()) == (door.datagrams, address.port());
    if door.outcome.is_err() && open.any(is_it) {
        let pid = running.pid;
        door.outcome = Ok(format!("{address} is open in the running balancer (process {pid})"));
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn io_uring() -> Result<String, String> {
    probe::probe().map(|features| features.to_string()).map_err(|error| error.to_string())
}

/// Sets up as many rings as there will be workers, all at the same time, as serve does.
fn rings(config: &Config, workers: usize) -> Result<String, String> {
    let each = boot::buffers(config, workers);
    let rings: io::Result<Vec<Ring>> = (0..workers).map(|_| Ring::new(each)).collect();
    let bytes = sized(config.limits.buffer_bytes as u64);
    let are = if workers == 1 { "worker" } else { "workers" };
    rings
        .map(|rings| format!("{} {are} with {bytes} of buffers", rings.len()))
        .map_err(|error| probe::explain(&error).to_string())
}

/// Memory that is available without swapping, in bytes; `None` if the kernel does not say.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn memory(config: &Config, available: Option<u64>) -> Result<String, String> {
    let wanted = config.limits.buffer_bytes as u64;
    match available {
        Some(there) if there < wanted => Err(format!(
            "limits.buffer_bytes = {wanted}, and {there} bytes can be had: lower it, or free memory"
        )),
        Some(there) => Ok(format!("{} can be had", sized(there))),
        None => Ok("the kernel does not say how much can be had".to_owned()),
    }
}

fn descriptors(config: &Config) -> Result<String, String> {
    let sessions = capacity::sessions(config).map_err(|trouble| trouble.to_string())?;
    Ok(format!("{} may be open, enough for {sessions} sessions", descriptors_allowed()))
}

/// The hard limit of descriptors, to which serve raises its own.
fn descriptors_allowed() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard)
}

/// Opens a door as serve would, and closes it again.
fn door(name: &Name, datagrams: bool, address: SocketAddr) -> Result<String, String> {
    let opened = match datagrams {
        true => doors::on_all(address, name, |address| UdpSocket::bind(address).map(drop)),
        false => doors::on_all(address, name, |address| sys::listen(address, false).map(drop)),
    };
    opened.map(|((), at)| format!("{at} is free")).map_err(|trouble| trouble.to_string())
}

/// How many sessions the host can hold, and what limits them.
fn capacity(config: &Config) -> String {
    let descriptors = descriptors_allowed();
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
    use std::net::TcpListener;

    use super::*;
    use crate::config::services::ServiceConfig;

    #[test]
    fn every_finding_is_one_aligned_line() {
        let findings = [
            Finding::new("rings", Ok("fine".into())),
            Finding::new("admin door", Err("taken: move".into())),
        ];
        assert_eq!(
            shown(&findings, false),
            "ok   rings       fine\nbad  admin door  taken: move\n"
        );
    }

    #[test]
    fn the_host_is_read_from_what_the_kernel_says() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:    7936 kB\n"), Some(7936 * 1024));
        assert_eq!(available("MemTotal:  9 kB\n"), None);
        assert!(available(&read("/proc/meminfo")) > Some(0));
    }

    #[test]
    fn a_door_that_another_program_has_is_told_with_the_flag_that_moves_it() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap();
        let said = door(&Name::flag("tcp"), false, address).unwrap_err();
        assert!(said.contains("is taken") && said.contains("--tcp"), "{said}");
        assert!(door(&Name::flag("udp"), true, address).is_ok(), "UDP has ports of its own");
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        let said = door(&Name::flag("udp"), true, other.local_addr().unwrap()).unwrap_err();
        assert!(said.contains("is taken") && said.contains("--udp"), "{said}");
        let elsewhere = "192.0.2.1:80".parse().unwrap();
        assert!(door(&Name::flag("api"), false, elsewhere).unwrap_err().contains("ip address"));
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
        let findings = doors_of(&config);
        let bad: Vec<_> = findings.iter().filter(|it| it.outcome.is_err()).collect();
        assert_eq!((findings.len(), bad.len()), (5 + 3, 1));
        let said = bad[0].outcome.as_ref().unwrap_err();
        assert_eq!(bad[0].what, "redis door");
        assert!(said.ends_with("choose another in [service.redis]"), "{said}");
        assert_eq!(findings[7].what, "dns door");
    }

    #[test]
    fn buffers_that_do_not_fit_are_told() {
        let mut config = Config::default();
        assert_eq!(memory(&config, Some(1 << 30)).unwrap(), "1.0 GiB can be had");
        config.limits.buffer_bytes = 2 << 30;
        let said = memory(&config, Some(1 << 30)).unwrap_err();
        assert!(said.contains("limits.buffer_bytes = 2147483648"), "{said}");
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
