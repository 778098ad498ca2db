//! How settings constrain each other. Owns every relation between two keys; each key's own range is
//! up to `keys`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::services::{CheckConfig, CheckKind, ServiceConfig, StaticBackend};
use super::units::{SIZES, TIMES};
use super::{Config, asking, cluster};
use crate::cluster::doors::{Claimant, Claimed};
use crate::cluster::route::{self, Conflict, Host};
use crate::cluster::{FALLBACKS_MAX, Protocol, ServiceId};
use crate::metrics::BACKENDS_MAX;

/// Whether the settings are consistent.
///
/// # Errors
/// One sentence that names the keys and the fix.
pub fn check(config: &Config) -> Result<(), String> {
    let health = &config.health;
    if health.timeout() >= health.interval {
        return Err(format!(
            "health.timeout_ms ({}) must be less than health.interval_ms ({}): lower the first or \
             raise the second, or leave the first out",
            shown(health.timeout()),
            shown(health.interval)
        ));
    }
    let listen = &config.listen;
    if !Protocol::ALL.iter().any(|it| listen.has(*it)) && config.services.is_empty() {
        return Err(
            "listen.tcp, listen.udp and listen.api are all \"off\", so no user could ever connect: \
             give one of them an address"
                .to_owned(),
        );
    }
    if let Some(address) = listen.control.filter(is_open)
        && let Some(name) = config.unguarded()
    {
        let own = match config.services.iter().any(|table| table.name == name) {
            true => format!(", or service.{name}.allow or service.{name}.secret_file"),
            false => String::new(),
        };
        return Err(format!(
            "listen.control is {address}, where any host could register itself and be sent users of \
             service {name}: set control.allow or control.secret_file{own}, or keep it on 127.0.0.1"
        ));
    }
    let api = &config.api;
    for (name, bytes) in [("api.line_bytes", api.line_bytes), ("api.field_bytes", api.field_bytes)]
    {
        if bytes > api.head_bytes {
            return Err(format!(
                "{name} ({}) must not be more than api.head_bytes ({}): lower the first or raise the \
                 second",
                SIZES.bare(bytes as u64),
                SIZES.bare(api.head_bytes as u64)
            ));
        }
    }
    cluster::check(&config.cluster)?;
    doors_apart(config)?;
    services(config)
}

/// Whether a door is open to other hosts.
pub(super) fn is_open(door: &SocketAddr) -> bool {
    !door.ip().to_canonical().is_loopback()
}

/// A time as the file writes it.
fn shown(time: Duration) -> String {
    TIMES.bare(time.as_millis() as u64)
}

/// A listening address and what the file calls it.
struct Claim {
    name: String,
    address: SocketAddr,
    protocol: Protocol,
    is_tls: bool,
    /// Whether it is of a service, and this is for certain hosts only.
    has_hosts: Option<bool>,
}

impl Claim {
    /// Several services may share a door if what comes in says for which of them it is.
    fn is_shared_with(&self, other: &Claim) -> bool {
        let is_told = match (self.protocol, other.protocol) {
            (Protocol::Api, Protocol::Api) => true,
            (Protocol::Tcp, Protocol::Tcp) => match (self.has_hosts, other.has_hosts) {
                (Some(one), Some(two)) => one || two,
                _ => false,
            },
            _ => false,
        };
        let is_alike = self.address == other.address && self.is_tls == other.is_tls;
        is_told && is_alike && self.name != other.name
    }
}

/// No two doors may want the same port. UDP has its own port space, and several API services may share a
/// door, as long as they want the very same address.
fn doors_apart(config: &Config) -> Result<(), String> {
    let listen = &config.listen;
    let global = [
        ("listen.tcp", listen.tcp, Protocol::Tcp),
        ("listen.udp", listen.udp, Protocol::Udp),
        ("listen.api", listen.api, Protocol::Api),
        ("listen.api_tls", listen.api_tls, Protocol::Api),
        // Nobody shares these.
        ("listen.control", listen.control, Protocol::Tcp),
        ("listen.admin", listen.admin, Protocol::Tcp),
    ];
    let claim = |(name, address, protocol): (&str, Option<SocketAddr>, Protocol)| {
        let (name, is_tls, has_hosts) = (name.to_owned(), name == "listen.api_tls", None);
        address.map(|address| Claim { name, address, protocol, is_tls, has_hosts })
    };
    let mut claims: Vec<Claim> = global.into_iter().filter_map(claim).collect();
    for service in &config.services {
        let plain = service.listen.iter().map(|address| (address, "listen", false));
        let sealed = service.listen_tls.iter().map(|address| (address, "listen_tls", true));
        for (address, key, is_tls) in plain.chain(sealed) {
            let name = format!("service.{}.{key}", service.name);
            let has_hosts = Some(!service.hosts.is_empty());
            let (address, protocol) = (*address, service.protocol);
            claims.push(Claim { name, address, protocol, is_tls, has_hosts });
        }
    }
    // By port, so that a thousand services are not a million pairs.
    claims.sort_by_key(|claim| claim.address.port());
    for (place, claim) in claims.iter().enumerate() {
        let same_port =
            claims[..place].iter().rev().take_while(|it| it.address.port() == claim.address.port());
        for other in same_port {
            let apart = (claim.protocol == Protocol::Udp) != (other.protocol == Protocol::Udp);
            if apart || claim.is_shared_with(other) || !collide(claim.address, other.address) {
                continue;
            }
            if claim.name == other.name {
                return Err(format!(
                    "{} names port {} twice, and {} and {} overlap: leave one of them out",
                    claim.name,
                    claim.address.port(),
                    other.address,
                    claim.address
                ));
            }
            return Err(format!(
                "{} and {} both want port {}: give one of them another port",
                other.name,
                claim.name,
                claim.address.port()
            ));
        }
    }
    Ok(())
}

/// A key of a check that was given a value and that this kind of check does not look at, and the kinds that do.
fn unused_key(check: &CheckConfig, protocol: Protocol) -> Option<(&'static str, &'static str)> {
    let default = CheckConfig::default();
    let of_some = [
        ("path", "\"http\"", check.path != default.path),
        ("grpc_service", "\"grpc\"", check.grpc_service != default.grpc_service),
        ("host", "\"http\" or \"grpc\"", check.host != default.host),
        ("expect", "\"http\"", check.expect != default.expect),
    ];
    let of_any = [
        ("port", check.port != default.port),
        ("rise", check.rise != default.rise),
        // Unanswered requests count towards it, whether there are checks or not.
        ("fall", check.fall != default.fall && protocol != Protocol::Api),
        ("on_fail", check.on_fail != default.on_fail),
        ("when_all_fail", check.when_all_fail != default.when_all_fail),
    ];
    let kind = match check.kind {
        CheckKind::Http => "\"http\"",
        CheckKind::Grpc => "\"grpc\"",
        CheckKind::Off | CheckKind::Tcp => "none",
    };
    let of_some = of_some.into_iter().filter(|(_, kinds, _)| !kinds.contains(kind));
    let any = "\"tcp\", \"http\" or \"grpc\"";
    let of_any = of_any.into_iter().map(|(key, given)| (key, any, given));
    let of_any = of_any.filter(|_| check.kind == CheckKind::Off);
    of_some.chain(of_any).find(|(.., given)| *given).map(|(key, kinds, _)| (key, kinds))
}

/// A key that was given a value and means something only to services of another protocol, and of which.
fn key_of_another(service: &ServiceConfig) -> Option<(&'static str, &'static str)> {
    use Protocol::{Api, Tcp, Udp};
    let keys = [
        // Those of a TCP service are asked for by TLS.
        ("hosts", if service.protocol == Tcp { Tcp } else { Api }, !service.hosts.is_empty()),
        ("paths", Api, !service.paths.is_empty()),
        ("tcp_idle_ms", Tcp, service.tcp_idle.is_some()),
        ("half_close_ms", Tcp, service.half_close.is_some()),
        ("udp_idle_ms", Udp, service.udp_idle.is_some()),
        ("responses", Udp, service.responses.is_some()),
        ("answer_ms", Api, service.answer.is_some()),
        ("body_ms", Api, service.body.is_some()),
        ("body_bytes", Api, service.body_bytes.is_some()),
        ("retries", Api, service.retries.is_some()),
        ("tunnel_idle_ms", Api, service.tunnel_idle.is_some()),
        ("fallback", Api, service.fallback.is_some()),
        ("maintenance", Api, service.maintenance),
    ];
    let (key, of, _) = keys.into_iter().find(|(_, of, said)| *said && *of != service.protocol)?;
    Some(match of {
        Tcp => (key, "TCP"),
        Udp => (key, "UDP"),
        Api => (key, "API"),
    })
}

/// A service whose users nobody could ever serve: it takes no registrations and lists no backends.
fn somebody_may_serve(service: &ServiceConfig) -> Result<(), String> {
    let ServiceConfig { name, register, backends, fallback, maintenance, .. } = service;
    if *register || !backends.is_empty() || fallback.is_some() || *maintenance {
        return Ok(());
    }
    Err(format!(
        "service.{name}.register is false and service.{name}.backends lists nobody, so nobody could ever \
         serve: list its backends, or let them register"
    ))
}

/// A service may list no more backends than it takes.
fn backends_fit(service: &ServiceConfig) -> Result<(), String> {
    let (name, listed) = (&service.name, service.backends.len());
    match service.backends_max.filter(|most| listed > most.get() as usize) {
        None => Ok(()),
        Some(most) => Err(format!(
            "service.{name}.backends lists {listed}, more than service.{name}.backends_max ({most}): \
             list fewer or raise the limit"
        )),
    }
}

/// What holds between the keys of each named service.
fn services(config: &Config) -> Result<(), String> {
    let listed: usize = config.services.iter().map(|service| service.backends.len()).sum();
    if listed > BACKENDS_MAX {
        return Err(format!(
            "the services list {listed} backends, and {BACKENDS_MAX} can be registered at once: list fewer"
        ));
    }
    for service in &config.services {
        let name = &service.name;
        somewhere(config, service)?;
        if let Some((key, of)) = key_of_another(service) {
            return Err(format!(
                "service.{name}.{key} is for {of} services, and {name} is {}: leave it out",
                service.protocol
            ));
        }
        if service.protocol == Protocol::Udp && !service.probe {
            return Err(format!(
                "service.{name}.probe has no effect, since {name} is udp and its ports are never \
                 tried: leave it out"
            ));
        }
        fallbacks(config, service)?;
        somebody_may_serve(service)?;
        backends_fit(service)?;
        groups(service)?;
        let check = &service.check;
        if check.timeout() > check.interval {
            return Err(format!(
                "service.{name}.check.timeout_ms ({}) must not be more than interval_ms ({}): lower the \
                 first or raise the second, or leave the first out",
                shown(check.timeout()),
                shown(check.interval)
            ));
        }
        if let Some((key, kind)) = unused_key(check, service.protocol) {
            return Err(format!(
                "service.{name}.check.{key} has no effect without kind = {kind}: add it, or leave the key \
                 out"
            ));
        }
        let datagrams = service.protocol == Protocol::Udp && check.kind != CheckKind::Off;
        if datagrams && check.port.is_none() {
            return Err(format!(
                "service.{name}.check needs a `port`: a UDP backend is checked over TCP, HTTP or gRPC on \
                 another port"
            ));
        }
    }
    proxies(config)?;
    tls(config)?;
    asking::check(config)?;
    claims(config).map(drop)
}

/// A service has a door, of its own or a common one.
fn somewhere(config: &Config, service: &ServiceConfig) -> Result<(), String> {
    let ServiceConfig { name, protocol, .. } = service;
    let is_api = *protocol == Protocol::Api;
    if service.has_doors() || is_api && config.listen.has(Protocol::Api) {
        return Ok(());
    }
    Err(format!(
        "service {name} has no door: say `listen` in [service.{name}]{}",
        if is_api { ", or open listen.api" } else { "" }
    ))
}

/// The fallback of a service must be another API service, and the chain of theirs must end.
fn fallbacks(config: &Config, service: &ServiceConfig) -> Result<(), String> {
    let name = &service.name;
    let mut at = service;
    for _ in 0..=FALLBACKS_MAX {
        let Some(next) = &at.fallback else { return Ok(()) };
        if next == name {
            return Err(format!(
                "service.{name}.fallback leads back to {name}: let one of them have no fallback"
            ));
        }
        if next == Protocol::Api.name() {
            return Ok(());
        }
        let known = config.services.iter().find(|it| it.name == *next);
        let Some(known) = known.filter(|it| it.protocol == Protocol::Api) else {
            let built_in = Protocol::ALL.iter().any(|it| it.name() == next);
            let exists = known.is_some() || built_in;
            let fault = if exists { "is not an API service" } else { "does not exist" };
            return Err(format!(
                "service.{}.fallback is {next}, which {fault}: name another API service",
                at.name
            ));
        };
        at = known;
    }
    Err(format!(
        "service.{name}.fallback begins a chain of more than {FALLBACKS_MAX} services, or a circle: \
         shorten it"
    ))
}

/// Where a service has groups, each of its backends is in one of them; elsewhere none is.
fn groups(service: &ServiceConfig) -> Result<(), String> {
    let ServiceConfig { name, groups, backends, .. } = service;
    let is_group = |wanted: &str| groups.iter().any(|group| group.name == wanted);
    for StaticBackend { address, group, .. } in backends {
        match group {
            Some(group) if groups.is_empty() => {
                return Err(format!(
                    "service.{name}.backends puts {address} in the group {group}, and {name} has none: \
                     add `groups`, or leave the group out"
                ));
            }
            Some(group) if !is_group(group) => {
                return Err(format!(
                    "service.{name}.backends puts {address} in the group {group}, which {name} does not \
                     have: add it to `groups`, or name one of them"
                ));
            }
            None if !groups.is_empty() => {
                return Err(format!(
                    "service.{name} has groups, and {address} is in none of them: list it as {{ address \
                     = \"{address}\", group = \"{}\" }}",
                    groups[0].name
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What holds between the doors and the proxies in front of them.
fn proxies(config: &Config) -> Result<(), String> {
    let listen = &config.listen;
    let has_streams = [Protocol::Tcp, Protocol::Api].iter().any(|it| listen.has(*it));
    if !listen.proxy_from.is_empty() && !has_streams {
        return Err("listen.proxy_from has no effect while listen.tcp and listen.api are \"off\": open one \
             of them, or say proxy_from in the table of a service"
            .to_owned());
    }
    let built_in = listen.of(Protocol::Api).map(|door| (door, ("listen", &listen.proxy_from)));
    let mut by_door: BTreeMap<SocketAddr, (&str, &Vec<IpNet>)> = built_in.collect();
    for service in &config.services {
        let (name, proxies) = (&service.name, &service.proxy_from);
        if service.protocol == Protocol::Udp && !proxies.is_empty() {
            return Err(format!(
                "service.{name}.proxy_from is for TCP and API services, and {name} is udp: leave it out"
            ));
        }
        reached(service)?;
        if !service.has_doors() && !proxies.is_empty() {
            return Err(format!(
                "service.{name}.proxy_from has no effect without `listen` in [service.{name}], whose users \
                 come in by listen.api: say it in listen.proxy_from"
            ));
        }
        let shared =
            service.doors().filter(|it| service.protocol != Protocol::Udp && it.port() != 0);
        for door in shared {
            let (other, theirs) = *by_door.entry(door).or_insert((name, proxies));
            if theirs != proxies {
                let other = if other == "listen" { "listen" } else { &format!("service.{other}") };
                return Err(format!(
                    "service.{name}.proxy_from and {other}.proxy_from differ, though both are about the door \
                     {door}: make them equal"
                ));
            }
        }
    }
    Ok(())
}

/// A listed backend is reached in no way that its service does not know.
fn reached(service: &ServiceConfig) -> Result<(), String> {
    let ServiceConfig { name, protocol, backends, .. } = service;
    let is_udp = *protocol == Protocol::Udp;
    if is_udp && backends.iter().any(|it| it.proxy) {
        return Err(format!(
            "service.{name}.backends says proxy = 2, and {name} is udp: datagrams carry no PROXY header, \
             leave it out"
        ));
    }
    if *protocol != Protocol::Api && backends.iter().any(|it| it.http2) {
        return Err(format!(
            "service.{name}.backends says http = 2, and {name} is {protocol}: only API backends speak HTTP, \
             leave it out"
        ));
    }
    if is_udp && backends.iter().any(|it| it.tls.is_some()) {
        return Err(format!(
            "service.{name}.backends says tls, and {name} is udp: datagrams are not sealed, leave it out"
        ));
    }
    Ok(())
}

/// What holds between the doors with TLS and the certificates.
fn tls(config: &Config) -> Result<(), String> {
    let of_other =
        config.services.iter().find(|service| service.tls && service.protocol != Protocol::Tcp);
    if let Some(ServiceConfig { name, protocol, .. }) = of_other {
        let cure = match protocol {
            Protocol::Api => {
                "say in listen_tls where its users come in by HTTPS, or open listen.api_tls"
            }
            _ => "leave it out",
        };
        return Err(format!(
            "service.{name}.tls is for TCP services, and {name} is {protocol}: {cure}"
        ));
    }
    for service in &config.services {
        https(config, service)?;
    }
    let wants =
        config.services.iter().find_map(|ServiceConfig { name, tls, listen_tls, .. }| {
            let key = if *tls { "tls" } else { "listen_tls" };
            (*tls || !listen_tls.is_empty()).then(|| format!("service.{name}.{key}"))
        });
    let wants = config.listen.api_tls.map(|_| "listen.api_tls".to_owned()).or(wants);
    match wants.filter(|_| config.tls.certificates.is_empty()) {
        Some(wants) => Err(format!(
            "{wants} needs a certificate: add [[tls.certificate]] with the paths `certificate` and `key`"
        )),
        None => Ok(()),
    }
}

/// What holds for the HTTPS of a service.
fn https(config: &Config, service: &ServiceConfig) -> Result<(), String> {
    let ServiceConfig { name, protocol, listen_tls, https_only, .. } = service;
    let is_api = *protocol == Protocol::Api;
    if !listen_tls.is_empty() && !is_api {
        let cure = match protocol {
            Protocol::Tcp => "say tls = true, and its doors in listen speak TLS",
            _ => "leave it out",
        };
        return Err(format!(
            "service.{name}.listen_tls is for API services, and {name} is {protocol}: {cure}"
        ));
    }
    if *https_only && !is_api {
        return Err(format!(
            "service.{name}.https_only is for API services, and {name} is {protocol}: leave it out"
        ));
    }
    if *https_only && service.has_doors() && listen_tls.is_empty() {
        return Err(format!(
            "service.{name}.https_only sends users to service.{name}.listen_tls, where nothing is said: \
             give it an address"
        ));
    }
    if *https_only && !service.has_doors() && config.listen.api_tls.is_none() {
        return Err(format!(
            "service.{name}.https_only sends users to listen.api_tls, which is \"off\": give it an address"
        ));
    }
    Ok(())
}

/// Which service the requests at each API door are for, and the streams at a door that several share. The
/// built-in API service claims what is left at `listen.api`.
///
/// # Errors
/// One sentence that names the services and the fix.
pub fn claims(config: &Config) -> Result<Claimed, String> {
    let common: Vec<SocketAddr> = config.listen.of(Protocol::Api).collect();
    let built_in = common.first().map(|_| {
        let service = ServiceId::built_in(Protocol::Api);
        let claims = vec![route::Claim { host: Host::Rest, path: "".into(), service }];
        Claimant { service, listen: Vec::new(), claims }
    });
    // Streams are looked at only where some are told apart by their hosts.
    let by_host =
        config.services.iter().any(|it| it.protocol == Protocol::Tcp && !it.hosts.is_empty());
    let named = config.services.iter().filter(|it| match it.protocol {
        Protocol::Api => true,
        Protocol::Tcp => by_host,
        Protocol::Udp => false,
    });
    let claimants = named.map(|it| Claimant {
        service: it.id,
        listen: it.doors().collect(),
        claims: it.claims(),
    });
    let claimants: Vec<Claimant> = built_in.into_iter().chain(claimants).collect();
    Claimed::of(&common, &claimants).map_err(|conflict| sentence(config, &conflict))
}

fn sentence(config: &Config, conflict: &Conflict) -> String {
    let name = |id: &ServiceId| {
        let named = config.services.iter().find(|service| service.id == *id);
        named.map_or(Protocol::Api.name(), |service| &service.name)
    };
    let [one, other] = conflict.services.each_ref().map(name);
    let path = if conflict.path.is_empty() { "/" } else { &conflict.path };
    format!(
        "services {one} and {other} both claim {} and the path {path} at one door: give one of them other \
         hosts or paths",
        conflict.host
    )
}

fn collide(one: SocketAddr, two: SocketAddr) -> bool {
    // An IPv6 wildcard covers IPv4 too; an IPv4 wildcard does not cover IPv6.
    let covers = |wide: IpAddr, narrow: IpAddr| {
        wide == narrow || wide.is_unspecified() && (wide.is_ipv6() || narrow.is_ipv4())
    };
    one.port() == two.port()
        && one.port() != 0
        && (covers(one.ip(), two.ip()) || covers(two.ip(), one.ip()))
}

#[cfg(test)]
mod tests;
