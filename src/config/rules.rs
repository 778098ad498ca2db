//! How settings constrain each other. Owns every relation between two keys; each key's own range is
//! up to `keys`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::Config;
use super::services::{CheckConfig, CheckKind, ServiceConfig, StaticBackend};
use super::units::{SIZES, TIMES};
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
    let built_in = [listen.tcp, listen.udp, listen.api];
    if built_in.iter().all(Option::is_none) && config.services.is_empty() {
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
}

/// No two doors may want the same port. UDP has its own port space, and several API services may share a
/// door, as long as they want the very same address.
fn doors_apart(config: &Config) -> Result<(), String> {
    let listen = &config.listen;
    let global = [
        ("listen.tcp", listen.tcp, Protocol::Tcp),
        ("listen.udp", listen.udp, Protocol::Udp),
        ("listen.api", listen.api, Protocol::Api),
        // These two are TCP, and nobody shares them.
        ("listen.control", listen.control, Protocol::Tcp),
        ("listen.admin", listen.admin, Protocol::Tcp),
    ];
    let claim = |(name, address, protocol): (&str, Option<SocketAddr>, Protocol)| {
        address.map(|address| Claim { name: name.to_owned(), address, protocol })
    };
    let mut claims: Vec<Claim> = global.into_iter().filter_map(claim).collect();
    for service in &config.services {
        for address in &service.listen {
            let name = format!("service.{}.listen", service.name);
            claims.push(Claim { name, address: *address, protocol: service.protocol });
        }
    }
    // By port, so that a thousand services are not a million pairs.
    claims.sort_by_key(|claim| claim.address.port());
    for (place, claim) in claims.iter().enumerate() {
        let same_port =
            claims[..place].iter().rev().take_while(|it| it.address.port() == claim.address.port());
        for other in same_port {
            let apart = (claim.protocol == Protocol::Udp) != (other.protocol == Protocol::Udp);
            let shared = claim.protocol == Protocol::Api
                && other.protocol == Protocol::Api
                && claim.address == other.address;
            if apart || shared || !collide(claim.address, other.address) {
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

/// A key of a check that was given a value and that this kind of check does not look at.
fn unused_key(check: &CheckConfig, protocol: Protocol) -> Option<&'static str> {
    let default = CheckConfig::default();
    let of_http = [
        ("path", check.path != default.path),
        ("host", check.host != default.host),
        ("expect", check.expect != default.expect),
    ];
    let of_any = [
        ("port", check.port != default.port),
        ("rise", check.rise != default.rise),
        // Unanswered requests count towards it, whether there are checks or not.
        ("fall", check.fall != default.fall && protocol != Protocol::Api),
        ("on_fail", check.on_fail != default.on_fail),
        ("when_all_fail", check.when_all_fail != default.when_all_fail),
    ];
    let of_http = of_http.into_iter().filter(|_| check.kind != CheckKind::Http);
    let of_any = of_any.into_iter().filter(|_| check.kind == CheckKind::Off);
    of_http.chain(of_any).find(|(_, given)| *given).map(|(key, _)| key)
}

/// A key that was given a value and means something only to services of another protocol, and of which.
fn key_of_another(service: &ServiceConfig) -> Option<(&'static str, &'static str)> {
    use Protocol::{Api, Tcp, Udp};
    let keys = [
        ("hosts", Api, !service.hosts.is_empty()),
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
        let is_api = service.protocol == Protocol::Api;
        if service.listen.is_empty() && !(is_api && config.listen.api.is_some()) {
            return Err(format!(
                "service {name} has no door: say `listen` in [service.{name}]{}",
                if is_api { ", or open listen.api" } else { "" }
            ));
        }
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
        if let Some(key) = unused_key(check, service.protocol) {
            let kind =
                if check.kind == CheckKind::Off { "\"tcp\" or \"http\"" } else { "\"http\"" };
            return Err(format!(
                "service.{name}.check.{key} has no effect without kind = {kind}: add it, or leave the key \
                 out"
            ));
        }
        let datagrams = service.protocol == Protocol::Udp && check.kind != CheckKind::Off;
        if datagrams && check.port.is_none() {
            return Err(format!(
                "service.{name}.check needs a `port`: a UDP backend is checked over TCP or HTTP on \
                 another port"
            ));
        }
    }
    proxies(config)?;
    claims(config).map(drop)
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
    if !listen.proxy_from.is_empty() && listen.tcp.is_none() && listen.api.is_none() {
        return Err("listen.proxy_from has no effect while listen.tcp and listen.api are \"off\": open one \
             of them, or say proxy_from in the table of a service"
            .to_owned());
    }
    let built_in = listen.api.map(|door| (door, ("listen", &listen.proxy_from)));
    let mut by_door: BTreeMap<SocketAddr, (&str, &Vec<IpNet>)> = built_in.into_iter().collect();
    for service in &config.services {
        let (name, proxies) = (&service.name, &service.proxy_from);
        if service.protocol == Protocol::Udp && !proxies.is_empty() {
            return Err(format!(
                "service.{name}.proxy_from is for TCP and API services, and {name} is udp: leave it out"
            ));
        }
        if service.protocol == Protocol::Udp && service.backends.iter().any(|it| it.proxy) {
            return Err(format!(
                "service.{name}.backends says proxy = 2, and {name} is udp: datagrams carry no PROXY \
                 header, leave it out"
            ));
        }
        if service.listen.is_empty() && !proxies.is_empty() {
            return Err(format!(
                "service.{name}.proxy_from has no effect without `listen` in [service.{name}], whose users \
                 come in by listen.api: say it in listen.proxy_from"
            ));
        }
        let shared =
            service.listen.iter().filter(|it| service.protocol == Protocol::Api && it.port() != 0);
        for door in shared {
            let (other, theirs) = *by_door.entry(*door).or_insert((name, proxies));
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

/// Which service the requests at each API door are for. The built-in API service claims what is left at
/// `listen.api`.
///
/// # Errors
/// One sentence that names the services and the fix.
pub fn claims(config: &Config) -> Result<Claimed, String> {
    let built_in = config.listen.api.map(|_| {
        let service = ServiceId::built_in(Protocol::Api);
        let claims = vec![route::Claim { host: Host::Rest, path: "".into(), service }];
        Claimant { service, listen: Vec::new(), claims }
    });
    let named = config.services.iter().filter(|it| it.protocol == Protocol::Api);
    let claimants =
        named.map(|it| Claimant { service: it.id, listen: it.listen.clone(), claims: it.claims() });
    let claimants: Vec<Claimant> = built_in.into_iter().chain(claimants).collect();
    Claimed::of(config.listen.api, &claimants).map_err(|conflict| sentence(config, &conflict))
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
mod tests {
    use super::super::file;
    use super::*;

    fn said(text: &str) -> Result<(), String> {
        check(&file::read("f", text).unwrap())
    }

    #[test]
    fn the_defaults_fit_together() {
        assert_eq!(check(&Config::default()), Ok(()));
    }

    #[test]
    fn an_answer_must_come_before_the_next_question() {
        assert_eq!(
            said("[health]\ninterval_ms = 1000\ntimeout_ms = \"2s\""),
            Err("health.timeout_ms (2s) must be less than health.interval_ms (1s): lower the first or \
                 raise the second, or leave the first out"
                .to_owned())
        );
        assert_eq!(said("[health]\ninterval_ms = 2001\ntimeout_ms = 2000"), Ok(()));
        for alone in ["10", "1000", "\"1s\"", "\"1h\""] {
            assert_eq!(said(&format!("[health]\ninterval_ms = {alone}")), Ok(()), "{alone}");
        }
    }

    #[test]
    fn two_doors_on_one_port_are_refused_where_their_addresses_meet() {
        for (tcp, admin, fits) in [
            ("9000", "9000", false),
            ("9000", "127.0.0.1:9000", false),
            ("9000", "[::1]:9000", false),
            ("0.0.0.0:9000", "127.0.0.1:9000", false),
            ("127.0.0.1:9000", "[::]:9000", false),
            ("127.0.0.1:9000", "127.0.0.1:9000", false),
            ("0.0.0.0:9000", "[::1]:9000", true),
            ("127.0.0.1:9000", "127.0.0.2:9000", true),
            ("9000", "9001", true),
            ("0", "0", true),
            ("9000", "off", true),
        ] {
            let outcome = said(&format!("[listen]\ntcp = \"{tcp}\"\nadmin = \"{admin}\""));
            assert_eq!(outcome.is_ok(), fits, "{tcp} {admin} {outcome:?}");
        }
        let outcome = said("[listen]\nudp = 8081");
        assert_eq!(outcome, Ok(()), "UDP and TCP may share a number");
        let said = said("[listen]\ntcp = 8080").unwrap_err();
        assert_eq!(
            said,
            "listen.tcp and listen.control both want port 8080: give one of them another port"
        );
    }

    #[test]
    fn proxies_are_said_where_there_is_a_door_for_them_and_once_for_each() {
        const PROXIES: &str = "proxy_from = [\"10.0.0.0/8\"]";
        let api = |name: &str, listen: &str, proxies: &str| {
            format!(
                "[service.{name}]\nprotocol = \"api\"\nhosts = [\"{name}.example\"]\n{listen}\n{proxies}\n"
            )
        };
        let own = "listen = \"192.0.2.1:80\"";
        let global = format!("[listen]\napi = \"192.0.2.1:80\"\n{PROXIES}\n");
        for (text, fault) in [
            (format!("listen.{PROXIES}"), ""),
            (format!("listen.{PROXIES}\nlisten.tcp = \"off\""), ""),
            (
                format!("listen.{PROXIES}\nlisten.tcp = \"off\"\nlisten.api = \"off\""),
                "listen.proxy_from has no effect while",
            ),
            (
                format!("[service.dns]\nprotocol = \"udp\"\nlisten = 53\n{PROXIES}"),
                "service.dns.proxy_from is for TCP and API services, and dns is udp",
            ),
            (
                "[service.dns]\nprotocol = \"udp\"\nlisten = 53\nbackends = [{ address = \"10.0.0.1:53\", \
                 proxy = 2 }]"
                    .to_owned(),
                "service.dns.backends says proxy = 2, and dns is udp",
            ),
            (format!("[service.pg]\nprotocol = \"tcp\"\nlisten = 5432\n{PROXIES}"), ""),
            (api("a", "", PROXIES), "service.a.proxy_from has no effect without `listen`"),
            (api("a", own, PROXIES) + &api("b", own, PROXIES), ""),
            (
                api("a", own, PROXIES) + &api("b", own, ""),
                "service.b.proxy_from and service.a.proxy_from differ",
            ),
            (
                api("a", own, "") + &api("b", own, PROXIES),
                "service.b.proxy_from and service.a.proxy_from differ",
            ),
            (format!("{global}{}", api("a", own, PROXIES)), ""),
            (
                format!("{global}{}", api("a", own, "")),
                "service.a.proxy_from and listen.proxy_from differ",
            ),
        ] {
            let outcome = said(&text);
            let fits = match &outcome {
                Ok(()) => fault.is_empty(),
                Err(said) => !fault.is_empty() && said.starts_with(fault),
            };
            assert!(fits, "{text}: {outcome:?}");
        }
    }

    #[test]
    fn the_services_together_list_no_more_backends_than_can_be_registered() {
        let list = |name: &str, first: usize, count: usize| {
            let address = |number| format!("\"10.0.{}.{}:80\"", number / 256, number % 256);
            let all: Vec<_> = (first..first + count).map(address).collect();
            let backends = all.join(", ");
            format!(
                "[service.{name}]\nprotocol = \"api\"\nhosts = [\"{name}.example\"]\nbackends = [{backends}]\n"
            )
        };
        let rest = BACKENDS_MAX - 1000;
        assert_eq!(said(&(list("a", 0, 1000) + &list("b", 1000, rest))), Ok(()));
        let outcome = said(&(list("a", 0, 1000) + &list("b", 1000, rest + 1))).unwrap_err();
        assert!(outcome.contains("list 16385 backends, and 16384 can be"), "{outcome}");
    }

    #[test]
    fn a_control_door_beyond_loopback_needs_a_list_or_a_secret_for_every_service() {
        let with = |global: &str, own: &str| {
            format!(
                "listen.control = 8080\nlisten.udp = \"off\"\nlisten.api = \"off\"\n{global}\n\
                 [service.a]\nprotocol = \"tcp\"\nlisten = 1\n{own}"
            )
        };
        for (text, fits) in [
            ("[listen]\ncontrol = 8080", false),
            ("[listen]\ncontrol = \"192.0.2.1:8080\"", false),
            ("[listen]\ncontrol = \"127.9.9.9:8080\"", true),
            ("[listen]\ncontrol = \"[::1]:8080\"", true),
            ("[listen]\ncontrol = \"[::ffff:127.0.0.1]:8080\"", true),
            ("[listen]\ncontrol = \"off\"", true),
            ("listen.control = 8080\ncontrol.allow = [\"10.0.0.0/8\"]", true),
            ("listen.control = 8080\ncontrol.secret_file = \"secrets\"", true),
            (&with("listen.tcp = 1", "secret_file = \"own\""), false),
            (&with("listen.tcp = \"off\"", "secret_file = \"own\""), true),
            (&with("listen.tcp = \"off\"", "allow = [\"10.0.0.0/8\"]"), true),
            (&with("listen.tcp = \"off\"", "register = false\nbackends = [\"10.0.0.1:1\"]"), true),
            (&with("listen.tcp = \"off\"", "allow = []"), false),
            (&with("listen.tcp = \"off\"", ""), false),
            (&with("control.allow = [\"10.0.0.0/8\"]", "allow = []"), false),
        ] {
            assert_eq!(said(text).is_ok(), fits, "{text} {:?}", said(text));
        }
    }

    #[test]
    fn a_balancer_without_a_door_for_users_is_refused() {
        let all_off = said("listen.tcp = \"off\"\nlisten.udp = \"off\"\nlisten.api = \"off\"");
        assert!(all_off.unwrap_err().contains("give one of them an address"));
    }
}
