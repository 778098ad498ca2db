//! Tests of `config::rules`.

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
        Err(
            "health.timeout_ms (2s) must be less than health.interval_ms (1s): lower the first or \
             raise the second, or leave the first out"
                .to_owned()
        )
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
        (
            "[service.dns]\nprotocol = \"udp\"\nlisten = 53\nbackends = [{ address = \"10.0.0.1:53\", \
             tls = true }]"
                .to_owned(),
            "service.dns.backends says tls, and dns is udp",
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
fn only_backends_of_api_services_speak_http_2() {
    let says = |protocol: &str| {
        let backend = "{ address = \"10.0.0.1:80\", http = 2 }";
        format!("[service.a]\nprotocol = \"{protocol}\"\nlisten = 80\nbackends = [{backend}]")
    };
    all_said(&[
        (says("api"), ""),
        (
            says("tcp"),
            "service.a.backends says http = 2, and a is tcp: only API backends speak HTTP",
        ),
        (
            says("udp"),
            "service.a.backends says http = 2, and a is udp: only API backends speak HTTP",
        ),
        (says("tcp").replace("http = 2", "http = 1"), ""),
    ]);
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

const CERTIFICATE: &str = "[[tls.certificate]]\ncertificate = \"a.pem\"\nkey = \"a.key\"\n";
const BLOG: &str = "[service.b]\nprotocol = \"api\"\nhosts = [\"b.example\"]\n";

/// A certificate, and a service with these rows.
fn a_service(protocol: &str, rows: &str) -> String {
    format!("{CERTIFICATE}[service.a]\nprotocol = \"{protocol}\"\n{rows}\n")
}

/// Each text is refused with a sentence that begins so; or taken, if that is empty.
fn all_said(cases: &[(String, &str)]) {
    for (text, fault) in cases {
        let outcome = said(text);
        let fits = match &outcome {
            Ok(()) => fault.is_empty(),
            Err(said) => !fault.is_empty() && said.starts_with(fault),
        };
        assert!(fits, "{text}: {outcome:?}");
    }
}

#[test]
fn a_door_for_https_is_an_api_services_has_a_certificate_and_is_shared_with_its_like() {
    let sealed = a_service("api", "hosts = [\"a.example\"]\nlisten_tls = 443");
    all_said(&[
        (sealed.clone(), ""),
        (format!("{sealed}{BLOG}listen_tls = 443"), ""),
        // It is at the common door as well.
        (format!("listen.api_tls = 443\n{sealed}"), ""),
        (sealed.replace(CERTIFICATE, ""), "service.a.listen_tls needs a certificate"),
        (
            a_service("tcp", "listen_tls = 443"),
            "service.a.listen_tls is for API services, and a is tcp: say tls = true",
        ),
        (
            a_service("udp", "listen_tls = 443"),
            "service.a.listen_tls is for API services, and a is udp: leave it out",
        ),
        (
            a_service("api", "listen = 443\ntls = true"),
            "service.a.tls is for TCP services, and a is api: say in listen_tls",
        ),
        (
            format!("{sealed}{BLOG}listen = 443"),
            "service.a.listen_tls and service.b.listen both want port 443",
        ),
        (
            a_service("api", "listen = 443\nlisten_tls = 443"),
            "service.a.listen and service.a.listen_tls both want port 443",
        ),
        (
            format!("listen.api_tls = 443\n{}", a_service("api", "listen = 443")),
            "listen.api_tls and service.a.listen both want port 443",
        ),
        (
            a_service("api", "listen_tls = 443\nproxy_from = [\"10.0.0.0/8\"]")
                + BLOG
                + "listen_tls = 443",
            "service.b.proxy_from and service.a.proxy_from differ",
        ),
    ]);
}

#[test]
fn users_are_sent_to_https_only_where_their_service_has_it() {
    let own = a_service("api", "listen = 80\nhttps_only = true");
    let common = a_service("api", "hosts = [\"a.example\"]\nhttps_only = true");
    let door = "listen.api_tls = 443\n";
    all_said(&[
        (format!("{own}listen_tls = 443"), ""),
        (format!("{door}{common}"), ""),
        (own.clone(), "service.a.https_only sends users to service.a.listen_tls"),
        (format!("{door}{own}"), "service.a.https_only sends users to service.a.listen_tls"),
        (common, "service.a.https_only sends users to listen.api_tls, which is \"off\""),
        (
            a_service("tcp", "listen = 80\nhttps_only = true"),
            "service.a.https_only is for API services",
        ),
    ]);
}

#[test]
fn a_balancer_without_a_door_for_users_is_refused() {
    let all_off = said("listen.tcp = \"off\"\nlisten.udp = \"off\"\nlisten.api = \"off\"");
    assert!(all_off.unwrap_err().contains("give one of them an address"));
}
