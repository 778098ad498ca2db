//! `lb check`: whether `lb serve` would start with these settings on this host, one line for each
//! thing that it needs, and how many sessions the host can hold. Tries what serve would do and undoes
//! it; changes nothing.

use std::fmt::Write;
use std::fs;
use std::io;
use std::net::{SocketAddr, UdpSocket};

use clap::Args;
use nix::sys::resource::{Resource, getrlimit};

use super::settings::Settings;
use super::table::{Look, colour, painted, sized};
use super::{Fault, print};
use crate::config::{Config, sizing};
use crate::control::auth::Secrets;
use crate::ring::{self, Ring, probe, sys};

/// Say whether `lb serve` would start here with these settings, and how many sessions fit.
///
/// Each line begins with "ok" or "bad"; a bad one ends with the cure. The exit code is 2 when serve
/// would not start.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    settings: Settings,
}

/// One thing that serve needs: what it is, and how it stands or what would mend it.
struct Finding {
    what: &'static str,
    outcome: Result<String, String>,
}

pub fn run(arguments: Arguments) -> Result<(), Fault> {
    let config = match arguments.settings.load() {
        Ok(config) => config,
        Err(Fault(said)) => {
            let finding = Finding { what: "settings", outcome: Err(said) };
            return conclude(&[finding], None);
        }
    };
    let host = Host::read();
    conclude(&findings(&config, &host), Some(&capacity(&config, &host)))
}

fn conclude(findings: &[Finding], capacity: Option<&str>) -> Result<(), Fault> {
    let mut out = shown(findings, colour());
    let bad = findings.iter().filter(|finding| finding.outcome.is_err()).count();
    if let Some(capacity) = capacity.filter(|_| bad == 0) {
        out.push_str(capacity);
    }
    print(&out)?;
    match bad {
        0 => Ok(()),
        1 => Err(Fault("serve would not start here: mend the line marked \"bad\"".to_owned())),
        _ => Err(Fault(format!("serve would not start here: mend the {bad} lines marked \"bad\""))),
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

/// What the host says about itself.
struct Host {
    workers_cores: usize,
    /// The hard limit, to which serve raises its own.
    descriptors: u64,
    /// Memory that can be had without swapping; `None` where the kernel does not say.
    memory: Option<u64>,
    /// Ports for connections to backends.
    local_ports: Option<(u64, u64)>,
}

impl Host {
    fn read() -> Host {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Host {
            workers_cores: sys::cores().len(),
            descriptors: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard),
            memory: available(&read("/proc/meminfo")),
            local_ports: port_range(&read("/proc/sys/net/ipv4/ip_local_port_range")),
        }
    }

    fn workers(&self, config: &Config) -> usize {
        sizing::workers(config, self.workers_cores)
    }
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn port_range(text: &str) -> Option<(u64, u64)> {
    let mut numbers = text.split_whitespace().map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn findings(config: &Config, host: &Host) -> Vec<Finding> {
    let workers = host.workers(config);
    let mut findings = vec![
        Finding { what: "settings", outcome: Ok("the file and the flags fit together".into()) },
        Finding { what: "io_uring", outcome: io_uring() },
        Finding { what: "rings", outcome: rings(config, workers) },
        Finding { what: "memory", outcome: memory(config, host) },
        Finding { what: "descriptors", outcome: descriptors(config, host, workers) },
    ];
    if let Some(path) = &config.control.secret_file {
        let outcome = Secrets::load(path).map(|_| format!("{} holds secrets", path.display()));
        findings.push(Finding { what: "secret", outcome });
    }
    let listen = &config.listen;
    let doors = [
        ("tcp", "tcp door", listen.tcp),
        ("udp", "udp door", listen.udp),
        ("api", "api door", listen.api),
        ("control", "control door", listen.control),
        ("admin", "admin door", listen.admin),
    ];
    findings.extend(doors.map(|(name, what, at)| Finding { what, outcome: door(name, at) }));
    findings
}

fn io_uring() -> Result<String, String> {
    probe::probe().map(|features| features.to_string()).map_err(|error| error.to_string())
}

/// Sets up as many rings as there will be workers, all at once, as serve does.
fn rings(config: &Config, workers: usize) -> Result<String, String> {
    let bytes = config.limits.buffer_bytes / workers;
    let each = ring::Settings::with_bytes(bytes);
    let rings: io::Result<Vec<Ring>> = (0..workers).map(|_| Ring::new(each)).collect();
    let bytes = sized(config.limits.buffer_bytes as u64);
    let are = if workers == 1 { "worker" } else { "workers" };
    rings
        .map(|rings| format!("{} {are} with {bytes} of buffers", rings.len()))
        .map_err(|error| probe::explain(&error).to_string())
}

fn memory(config: &Config, host: &Host) -> Result<String, String> {
    let wanted = config.limits.buffer_bytes as u64;
    match host.memory {
        Some(there) if there < wanted => Err(format!(
            "limits.buffer_bytes = {wanted}, and {there} bytes can be had: lower it, or free memory"
        )),
        Some(there) => Ok(format!("{} can be had", sized(there))),
        None => Ok("the kernel does not say how much can be had".to_owned()),
    }
}

fn descriptors(config: &Config, host: &Host, workers: usize) -> Result<String, String> {
    let there = host.descriptors;
    let allowed = sizing::sessions(config, workers, there)?;
    if allowed < config.limits.sessions {
        return Ok(format!(
            "{there} may be open, so serve will start with {allowed} sessions instead of the default \
             {}; raise `ulimit -Hn` to {} for all of them",
            config.limits.sessions,
            sizing::descriptors_needed(config, workers)
        ));
    }
    Ok(format!("{there} may be open, {} are enough", sizing::descriptors_needed(config, workers)))
}

/// Opens a door as serve would, and closes it again.
fn door(name: &str, address: Option<SocketAddr>) -> Result<String, String> {
    let Some(address) = address else { return Ok("off".to_owned()) };
    let opened = if name == "udp" {
        UdpSocket::bind(address).map(drop)
    } else {
        sys::listen(address, false).map(drop)
    };
    opened.map(|()| format!("{address} is free")).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "{address} is taken by another program, perhaps a balancer that runs already: stop it, \
             or choose another port with --{name}"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "{address} may not be opened by this user: choose a port from 1024 up with --{name}, or \
             grant CAP_NET_BIND_SERVICE"
        ),
        io::ErrorKind::AddrNotAvailable => format!(
            "{address} is not an address of this host: choose one from `ip address` with --{name}"
        ),
        _ => format!("{address} cannot be opened: {error}; choose another with --{name}"),
    })
}

/// How many sessions the host can hold, and what sets the bound.
fn capacity(config: &Config, host: &Host) -> String {
    let workers = host.workers(config);
    let fit = sizing::sessions_within(host.descriptors, config, workers);
    let held = fit.min(config.limits.sessions as u64);
    let bound = if fit < config.limits.sessions as u64 {
        format!("bounded by {} descriptors", host.descriptors)
    } else {
        format!("bounded by limits.sessions; its descriptors would be enough for {fit}")
    };
    let mut out = format!("This host can hold {held} TCP sessions at once, {bound}.\n");
    if let Some((first, last)) = host.local_ports {
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

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn host() -> Host {
        Host {
            workers_cores: 2,
            descriptors: 20_000,
            memory: Some(1 << 30),
            local_ports: Some((32_768, 60_999)),
        }
    }

    #[test]
    fn every_finding_is_one_aligned_line() {
        let findings = [
            Finding { what: "rings", outcome: Ok("fine".into()) },
            Finding { what: "admin door", outcome: Err("taken: move".into()) },
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
        assert_eq!(port_range("32768\t60999\n"), Some((32_768, 60_999)));
        assert_eq!(port_range(""), None);
        let host = Host::read();
        assert!(host.workers_cores > 0 && host.descriptors > 0 && host.memory > Some(0));
    }

    #[test]
    fn a_door_that_another_program_has_is_told_with_the_flag_that_moves_it() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap();
        let said = door("tcp", Some(address)).unwrap_err();
        assert!(said.contains("is taken") && said.contains("--tcp"), "{said}");
        assert!(door("udp", Some(address)).is_ok(), "UDP has ports of its own");
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        let said = door("udp", Some(other.local_addr().unwrap())).unwrap_err();
        assert!(said.contains("is taken") && said.contains("--udp"), "{said}");
        assert_eq!(door("api", None).unwrap(), "off");
        let elsewhere = "192.0.2.1:80".parse().unwrap();
        assert!(door("api", Some(elsewhere)).unwrap_err().contains("ip address"));
    }

    #[test]
    fn too_few_descriptors_or_bytes_are_told_with_what_would_fit() {
        let mut config = Config::default();
        assert!(descriptors(&config, &host(), 1).unwrap().contains("instead of the default"));
        config.limits.sessions = 9_000;
        let said = descriptors(&config, &host(), 1).unwrap_err();
        assert!(said.contains("or lower limits.sessions to 8907"), "{said}");
        config.limits.sessions = 8_907;
        assert!(descriptors(&config, &host(), 1).is_ok());
        config.limits.buffer_bytes = 2 << 30;
        let said = memory(&config, &host()).unwrap_err();
        assert!(said.contains("limits.buffer_bytes = 2147483648"), "{said}");
    }

    #[test]
    fn the_capacity_names_what_bounds_it() {
        let mut config = Config::default();
        let said = capacity(&config, &host());
        assert!(said.contains("8907 TCP sessions at once, bounded by 20000 descriptors"), "{said}");
        assert!(said.contains("28232 local ports"), "{said}");
        config.limits.sessions = 100;
        let said = capacity(&config, &host());
        assert!(said.contains("100 TCP sessions at once, bounded by limits.sessions"), "{said}");
    }
}
