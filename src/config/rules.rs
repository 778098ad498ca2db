//! How settings constrain each other. Owns every relation between two keys; each key's own range is
//! up to `keys`.

use std::net::{IpAddr, SocketAddr};

use super::Config;

/// Whether the settings are consistent.
///
/// # Errors
/// One sentence that names the keys and the fix.
pub fn check(config: &Config) -> Result<(), String> {
    let health = &config.health;
    if health.timeout >= health.interval {
        return Err(format!(
            "health.timeout_ms ({}) must be less than health.interval_ms ({}): lower the first or \
             raise the second",
            health.timeout.as_millis(),
            health.interval.as_millis()
        ));
    }
    let listen = &config.listen;
    if [listen.tcp, listen.udp, listen.api].iter().all(Option::is_none) {
        return Err(
            "listen.tcp, listen.udp and listen.api are all \"off\", so no user could ever connect: \
             give one of them an address"
                .to_owned(),
        );
    }
    let unproven = config.control.allow.is_empty() && config.control.secret_file.is_none();
    let is_open = |door: &SocketAddr| unproven && !door.ip().to_canonical().is_loopback();
    if let Some(address) = listen.control.filter(is_open) {
        return Err(format!(
            "listen.control is {address}, where any host could register itself and be sent users: \
             set control.allow or control.secret_file, or keep it on 127.0.0.1"
        ));
    }
    let api = &config.api;
    for (name, bytes) in [("api.line_bytes", api.line_bytes), ("api.field_bytes", api.field_bytes)]
    {
        if bytes > api.head_bytes {
            return Err(format!(
                "{name} ({bytes}) must not be more than api.head_bytes ({}): lower the first or \
                 raise the second",
                api.head_bytes
            ));
        }
    }
    doors_apart(config)
}

/// UDP has its own port space, so its door cannot collide with the others.
fn doors_apart(config: &Config) -> Result<(), String> {
    let listen = &config.listen;
    let doors = [
        ("listen.tcp", listen.tcp),
        ("listen.api", listen.api),
        ("listen.control", listen.control),
        ("listen.admin", listen.admin),
    ];
    for (place, (name, address)) in doors.iter().enumerate() {
        for (other_name, other) in &doors[..place] {
            if let (Some(one), Some(two)) = (address, other)
                && collide(*one, *two)
            {
                return Err(format!(
                    "{other_name} and {name} both want port {}: give one of them another port",
                    one.port()
                ));
            }
        }
    }
    Ok(())
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
            said("[health]\ninterval_ms = 1000"),
            Err("health.timeout_ms (2000) must be less than health.interval_ms (1000): lower the \
                 first or raise the second"
                .to_owned())
        );
        assert_eq!(said("[health]\ninterval_ms = 2001"), Ok(()));
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
    fn a_control_door_beyond_loopback_needs_a_list_or_a_secret() {
        for (text, fits) in [
            ("[listen]\ncontrol = 8080", false),
            ("[listen]\ncontrol = \"192.0.2.1:8080\"", false),
            ("[listen]\ncontrol = \"127.9.9.9:8080\"", true),
            ("[listen]\ncontrol = \"[::1]:8080\"", true),
            ("[listen]\ncontrol = \"[::ffff:127.0.0.1]:8080\"", true),
            ("[listen]\ncontrol = \"off\"", true),
            ("listen.control = 8080\ncontrol.allow = [\"10.0.0.0/8\"]", true),
            ("listen.control = 8080\ncontrol.secret_file = \"secrets\"", true),
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
