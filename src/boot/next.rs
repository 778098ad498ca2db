//! What a person who has started a balancer in a terminal may type next: how a user reaches each of its
//! services, how a backend joins, where to look. Owns that text, which names the doors that are really
//! open. Pure; who prints it, and whether, is up to `boot`.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::client::demo::reached;
use crate::cluster::Protocol;
use crate::cluster::gate::lists;
use crate::cluster::route::Host;
use crate::config::joining::{Joining, Keyring};
use crate::config::services::ServiceConfig;
use crate::config::{Config, Listen};

/// Services with a line of their own; `lb status` lists the others.
const SERVICES_MAX: usize = 5;

/// The text, with a line end. `config` has the addresses of the open doors, `program` is how this
/// program was called, and `demo` the number of echo backends that each built-in service has.
pub fn text(config: &Config, program: &str, demo: usize) -> String {
    let program = called(program);
    let mut rows = Vec::new();
    let built_in = Protocol::ALL.into_iter().filter(|it| config.listen.has(*it));
    if demo > 0 && built_in.count() > 0 {
        let many = if demo == 1 { "echo backend has" } else { "echo backends have" };
        rows.push(("demo", format!("{demo} {many} joined each of the built-in services")));
    }
    rows.extend(users(config, &program, demo > 0).into_iter().map(|line| ("a user", line)));
    rows.extend(backend(config, &program).map(|line| ("a backend", line)));
    rows.extend(watching(config, &program));
    rows.push(("stop", "Ctrl-C lets running sessions end, a second one ends them".to_owned()));
    let mut text = String::from("\nWhat to type next, in another terminal:\n");
    let mut before = "";
    for (label, line) in rows {
        let shown = if label == before { "" } else { label };
        writeln!(text, "  {shown:<10} {line}").expect("memory takes every write");
        before = label;
    }
    text + "\n"
}

/// How to call this program again: as it was called if that was by its path.
fn called(program: &str) -> String {
    if program.contains('/') { quoted(program) } else { "lb".to_owned() }
}

/// A word of a shell command.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,@%".contains(c);
    match word.chars().all(plain) && !word.is_empty() {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// A flag with an address, unless it is what the command takes anyway.
fn flag(name: &str, address: SocketAddr, default: SocketAddr) -> String {
    if address == default { String::new() } else { format!(" {name} {address}") }
}

/// A command for each service: the named ones first, since somebody gave them their names. With a demo, those
/// that its backends have joined are first, so that the first command gets an answer.
fn users(config: &Config, program: &str, demo: bool) -> Vec<String> {
    let named = config.services.iter().filter(|table| !table.maintenance);
    let named = named.filter_map(|table| user_of_named(config, table, program));
    let built_in = Protocol::ALL.into_iter().filter_map(|protocol| {
        user(config, protocol, config.listen.plain(protocol)?, None, program)
    });
    let https = config.listen.api_tls.map(|door| request_by_https(config, door, None));
    let built_in = built_in.chain(https);
    let mut lines: Vec<String> = match demo {
        true => built_in.chain(named).collect(),
        false => named.chain(built_in).collect(),
    };
    let more = lines.len().saturating_sub(SERVICES_MAX);
    if more > 0 {
        lines.truncate(SERVICES_MAX);
        lines.push(format!("(and {more} more: {program} status{})", admin(config)));
    }
    lines
}

fn user_of_named(config: &Config, table: &ServiceConfig, program: &str) -> Option<String> {
    if let (true, Some(door)) = (table.listen.is_empty(), table.listen_tls.first()) {
        return Some(request_by_https(config, *door, Some(table)));
    }
    let shared = if table.protocol == Protocol::Api { config.listen.api } else { None };
    let door = table.listen.first().copied().or(shared)?;
    user(config, table.protocol, door, Some(table), program)
}

/// What a user of a service types; `None` if a user on this host would have to be a proxy.
fn user(
    config: &Config,
    protocol: Protocol,
    door: SocketAddr,
    table: Option<&ServiceConfig>,
    program: &str,
) -> Option<String> {
    let to = reached(door);
    let own_doors = table.filter(|table| !table.listen.is_empty());
    let proxies = own_doors.map_or(&config.listen.proxy_from, |table| &table.proxy_from);
    let is_proxy = protocol != Protocol::Udp && lists(proxies, to.ip());
    if protocol == Protocol::Api {
        return Some(request(to, table, is_proxy));
    }
    if is_proxy {
        return None;
    }
    // It must say hello in the way of TLS, if only to be told apart by its host.
    if let Some(table) = table.filter(|table| table.tls || !table.hosts.is_empty()) {
        let host = table.hosts.iter().find_map(example);
        let host = host.map_or(String::new(), |host| format!(" -servername {}", quoted(&host)));
        return Some(format!("openssl s_client -quiet{host} -connect {to}"));
    }
    let default = reached(Listen::default().plain(protocol)?);
    let to = flag("--to", to, default);
    Some(format!("printf 'hello\\n' | {program} user --protocol {protocol}{to}"))
}

fn request(to: SocketAddr, table: Option<&ServiceConfig>, is_proxy: bool) -> String {
    let header = if is_proxy { " --haproxy-protocol" } else { "" };
    let host = table.and_then(|table| table.hosts.iter().find_map(example));
    let host =
        host.map_or(String::new(), |host| format!(" -H {}", quoted(&format!("Host: {host}"))));
    let path = table.and_then(|table| table.paths.first()).map_or("/", String::as_str);
    format!("curl -i{header}{host} {}", quoted(&format!("http://{to}{path}")))
}

/// Nobody vouches for a certificate that was made a moment ago; others are for hosts that need not lead here.
fn request_by_https(config: &Config, door: SocketAddr, table: Option<&ServiceConfig>) -> String {
    let to = reached(door);
    let proxies = table.map_or(&config.listen.proxy_from, |table| &table.proxy_from);
    let header = if lists(proxies, to.ip()) { " --haproxy-protocol" } else { "" };
    let path = table.and_then(|table| table.paths.first()).map_or("/", String::as_str);
    match table.and_then(|table| table.hosts.iter().find_map(example)) {
        // The host is asked for in the handshake as well.
        Some(host) => format!(
            "curl -ik{header} --connect-to ::{to} {}",
            quoted(&format!("https://{host}{path}"))
        ),
        None => format!(
            "curl -ik{header} {}",
            quoted(&format!("https://localhost:{}{path}", door.port()))
        ),
    }
}

/// A host that a rule about hosts takes.
fn example(host: &Host) -> Option<String> {
    match host {
        Host::Exact(name) => Some(name.to_string()),
        Host::Below(name) => Some(format!("www.{name}")),
        Host::Rest => None,
    }
}

/// How a backend joins: the first service that takes registrations, the named ones first.
fn backend(config: &Config, program: &str) -> Option<String> {
    let door = config.listen.control?;
    let is_named = |name: &str| config.services.iter().find(|table| table.name == name);
    let mut all: Vec<(&str, Joining<'_>)> = config.joinable().collect();
    all.sort_by_key(|(name, _)| is_named(name).is_none());
    let (name, joining) = *all.first()?;
    let mut line = match is_named(name) {
        None => format!("{program} backend --protocol {name} --port 9991"),
        Some(table) => {
            let group = table.groups.iter().find(|group| group.share > 0);
            let group = group.map_or(String::new(), |it| format!(" --group {}", it.name));
            format!("{program} backend --service {name}{group} --port 9991")
        }
    };
    line += &balancer(door, joining);
    let file = match joining.keyring {
        None => None,
        Some(Keyring::Global) => config.control.secret_file.as_ref(),
        Some(Keyring::Service(name)) => is_named(name).and_then(|it| it.secret_file.as_ref()),
    };
    if let Some(file) = file {
        line += &format!(" --secret-file {}", quoted(&file.display().to_string()));
    }
    Some(line + "   # where it listens")
}

/// The flag for the control door, as seen from a host that may register.
fn balancer(door: SocketAddr, joining: Joining<'_>) -> String {
    let near = reached(door);
    if !joining.admits(near.ip()) && door.ip().is_unspecified() {
        return format!(" --lb THIS-HOST:{}", door.port());
    }
    flag("--lb", near, SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080))
}

/// The flag for the admin door.
fn admin(config: &Config) -> String {
    let default = Listen::default().admin;
    let flagged = |door| flag("--admin", reached(door), reached(default.unwrap_or(door)));
    config.listen.admin.map_or(String::new(), flagged)
}

fn watching(config: &Config, program: &str) -> Vec<(&'static str, String)> {
    let Some(door) = config.listen.admin else { return Vec::new() };
    let admin = admin(config);
    vec![
        ("watch", format!("{program} top{admin}")),
        ("", format!("{program} status{admin}")),
        ("page", format!("http://{}/", reached(door))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file;

    fn read(text: &str) -> Config {
        file::read("f", text).unwrap()
    }

    /// The lines without the heading and the last one.
    fn lines(text: &str, program: &str, demo: usize) -> Vec<String> {
        let text = super::text(&read(text), program, demo);
        let all: Vec<String> = text.trim().lines().map(str::to_owned).collect();
        assert!(all[0].ends_with("terminal:") && all.last().unwrap().contains("Ctrl-C"), "{text}");
        assert!(all.iter().all(|line| line.len() <= 120), "{text}");
        all[1..all.len() - 1].to_vec()
    }

    #[test]
    fn with_the_defaults_no_address_is_needed_but_those_of_the_web() {
        let expected = [
            r"  a user     printf 'hello\n' | lb user --protocol tcp",
            r"             printf 'hello\n' | lb user --protocol udp",
            r"             curl -i http://127.0.0.1:8083/",
            r"  a backend  lb backend --protocol tcp --port 9991   # where it listens",
            r"  watch      lb top",
            r"             lb status",
            r"  page       http://127.0.0.1:8084/",
        ];
        assert_eq!(lines("", "lb", 0), expected);
    }

    #[test]
    fn other_doors_are_named_closed_ones_are_not_and_the_program_is_called_as_before() {
        let doors = "listen = { tcp = \"[::1]:1\", udp = \"off\", api = 3, control = \"127.0.0.1:4\", admin = 5 }";
        let expected = [
            "  demo       3 echo backends have joined each of the built-in services",
            r"  a user     printf 'hello\n' | target/release/lb user --protocol tcp --to [::1]:1",
            "             curl -i http://127.0.0.1:3/",
            "  a backend  target/release/lb backend --protocol tcp --port 9991 --lb 127.0.0.1:4   # where it listens",
            "  watch      target/release/lb top --admin 127.0.0.1:5",
            "             target/release/lb status --admin 127.0.0.1:5",
            "  page       http://127.0.0.1:5/",
        ];
        assert_eq!(lines(doors, "target/release/lb", 3), expected);
        let odd = lines("", "/home/my lb/lb", 0);
        assert!(odd[0].contains("| '/home/my lb/lb' user"), "{odd:?}");
        let off = "listen = { tcp = 1, udp = \"off\", api = \"off\", control = \"off\", admin = \"off\" }";
        assert_eq!(
            lines(off, "lb", 0),
            [r"  a user     printf 'hello\n' | lb user --protocol tcp --to 127.0.0.1:1"]
        );
    }

    #[test]
    fn named_services_come_first_with_what_they_ask_for() {
        let services = r#"
            control.secret_file = "/etc/lb/all"
            [service.shop]
            protocol = "api"
            hosts = ["*.shop.example"]
            paths = ["/cart"]
            groups = { blue = 0, green = 1 }
            [service.redis]
            protocol = "tcp"
            listen = ":6379"
            [service.away]
            protocol = "tcp"
            listen = 1
            maintenance = true
            [service.listed]
            protocol = "udp"
            listen = 2
            register = false
        "#;
        let expected = [
            "  a user     curl -i -H 'Host: www.shop.example' http://127.0.0.1:8083/cart",
            r"             printf 'hello\n' | lb user --protocol tcp --to 127.0.0.1:6379",
            r"             printf 'hello\n' | lb user --protocol udp --to 127.0.0.1:2",
            r"             printf 'hello\n' | lb user --protocol tcp",
            r"             printf 'hello\n' | lb user --protocol udp",
            "             (and 1 more: lb status)",
            "  a backend  lb backend --service shop --group green --port 9991 --secret-file /etc/lb/all   # where it listens",
        ];
        assert_eq!(lines(services, "lb", 0)[..7], expected);
        let sealed =
            services.replace("protocol = \"api\"", "protocol = \"api\"\nlisten_tls = 8444");
        let wanted =
            "  a user     curl -ik --connect-to ::127.0.0.1:8444 https://www.shop.example/cart";
        assert_eq!(lines(&sealed, "lb", 0)[0], wanted);
        let demo = lines(services, "lb", 2);
        assert_eq!(demo[1], r"  a user     printf 'hello\n' | lb user --protocol tcp");
        assert!(demo[4].contains("www.shop.example"), "{demo:?}");
    }

    #[test]
    fn a_stream_under_tls_is_begun_by_a_program_that_speaks_it() {
        let services = r#"
            [service.mail]
            protocol = "tcp"
            listen = 1
            hosts = ["mail.example"]
            [service.rest]
            protocol = "tcp"
            listen = 2
            tls = true
        "#;
        let expected = [
            "  a user     openssl s_client -quiet -servername mail.example -connect 127.0.0.1:1",
            "             openssl s_client -quiet -connect 127.0.0.1:2",
        ];
        assert_eq!(lines(services, "lb", 0)[..2], expected);
    }

    #[test]
    fn a_door_for_proxies_takes_nobody_else_from_this_host() {
        let lines = lines("listen.proxy_from = [\"127.0.0.0/8\"]", "lb", 0);
        assert_eq!(lines[0], r"  a user     printf 'hello\n' | lb user --protocol udp");
        assert_eq!(lines[1], "             curl -i --haproxy-protocol http://127.0.0.1:8083/");
    }

    #[test]
    fn a_backend_that_may_not_join_from_here_is_told_whom_to_reach_from_there() {
        let config = "listen.control = \"0.0.0.0:8080\"\ncontrol.allow = [\"10.0.0.0/8\"]";
        let lines = lines(config, "lb", 0);
        let expected = "  a backend  lb backend --protocol tcp --port 9991 --lb THIS-HOST:8080   # where it listens";
        assert_eq!(lines[3], expected);
    }
}
