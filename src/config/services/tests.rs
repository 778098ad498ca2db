//! Named services as the file says them, and what is said of their faults.

use super::super::{file, reload, rules};
use super::*;

/// A service in which every key has a value other than its default.
const EVERY_KEY_CHANGED: &str = r#"
    [service.shop]
    protocol = "api"
    listen = ["10.0.0.1:80", ":8443"]
    hosts = ["shop.example", "*.shop.example"]
    paths = ["/api", "/v2/"]
    proxy_from = ["10.0.0.0/8", "192.0.2.7"]
    policy = "least_sessions"
    on_backend_loss = "close"
    connect_ms = 11
    tcp_idle_ms = 12
    half_close_ms = 13
    udp_idle_ms = 14
    register = false
    backends = ["10.0.0.11:80", { address = "[2001:db8::1]:80", weight = 3, proxy = 2 }]
    maintenance = true
    [service.shop.check]
    kind = "http"
    port = 8008
    path = "/primary?x"
    host = "shop.example"
    expect = "200"
    interval_ms = 500
    timeout_ms = 400
    rise = 4
    fall = 5
    on_fail = "close"
    when_all_fail = "serve"
"#;

fn read(text: &str) -> Result<Config, String> {
    let config = file::read("f", text)?;
    rules::check(&config).map(|()| config)
}

#[test]
fn every_key_of_a_service_is_read_and_reads_back_as_it_is_shown() {
    let config = read(EVERY_KEY_CHANGED).unwrap();
    let [service] = &config.services[..] else { panic!() };
    let default = ServiceConfig::new("shop", Protocol::Tcp);
    let mut text = "[service.shop]\n".to_owned();
    for key in SERVICE_KEYS {
        assert_ne!(key.show(service), key.show(&default), "{} was not set", key.path());
        text += &format!("{} = {}\n", key.path(), key.show(service));
    }
    assert_eq!(read(&text), Ok(config.clone()), "{text}");
    let terms = config.terms_of(service);
    assert_eq!(terms.policy, Policy::LeastSessions);
    assert_eq!(terms.timeouts.half_close, Duration::from_millis(13));
    assert_eq!((service.backends[1].weight, service.backends[1].proxy), (3, true));
}

#[test]
fn a_service_takes_the_global_terms_where_it_has_none_of_its_own() {
    let config = read(
        "balance.policy = \"source_hash\"\ntimeouts.connect_ms = 7\n\
         [service.a]\nprotocol = \"tcp\"\nlisten = 1\npolicy = \"round_robin\"",
    );
    let config = config.unwrap();
    let terms = config.terms_by_name("a");
    assert_eq!(terms.policy, Policy::RoundRobin);
    assert_eq!(terms.timeouts.connect, Duration::from_millis(7));
    assert_eq!(config.terms_by_name("tcp"), config.terms());
}

#[test]
fn services_stand_in_the_order_of_the_file() {
    let text: String = ["z", "a", "m"]
        .iter()
        .zip(1..)
        .map(|(name, port)| format!("[service.{name}]\nprotocol = \"udp\"\nlisten = {port}\n"))
        .collect();
    let config = read(&text).unwrap();
    let names: Vec<&str> = config.services.iter().map(|service| service.name.as_str()).collect();
    assert_eq!(names, ["z", "a", "m"]);
}

#[test]
fn a_fault_in_a_service_is_reported_with_line_key_and_cure() {
    for (text, said) in [
        (
            "[service.a]\nlisten = 1",
            "f line 1: [service.a] lacks its protocol: add `protocol = \"tcp\"`, \"udp\" or \"api\"",
        ),
        (
            "[service.a]\nprotocol = \"tcp\"\nlisten = 1\npolcy = 1",
            "f line 4: unknown key `polcy` in [service.a]; did you mean `policy`?",
        ),
        (
            "[service.a]\nprotocol = \"tcp\"\n[service.a.check]\nrize = 1",
            "f line 4: unknown key `rize` in [service.a.check]; did you mean `rise`?",
        ),
        (
            "[service.a]\nprotocol = \"tcp\"\nrise = 1",
            "f line 3: unknown key `rise` in [service.a]; it belongs to [service.a.check]",
        ),
        (
            "[service.a]\nprotocol = \"tcp\"\ncheck = 1",
            "f line 3: `service.a.check` is a table: write [service.a.check] and its keys below it",
        ),
        (
            "[service.a]\nprotocol = \"http\"",
            "f line 2: service.a.protocol takes one of \"tcp\", \"udp\", \"api\", not \"http\"",
        ),
        (
            "[service.a]\nprotocol = \"tcp\"\nlisten = \"off\"",
            "f line 3: service.a.listen takes an address with its port or a port, or a list of up to 16 of them, not \"off\"",
        ),
        (
            "service.a = 1",
            "f line 1: `service.a` is a table: write [service.a] and its keys below it",
        ),
        (
            "[service.tcp]\nprotocol = \"tcp\"",
            "f line 1: a service cannot be called `tcp`: take up to 63 letters, digits, `-` and `_`, but none of tcp, udp and api, which are built in",
        ),
        (
            "[service.a]\nprotocol = \"tcp\"\nbackends = [\"10.0.0.1:1\", \"10.0.0.1:1\"]",
            "f line 3: service.a.backends takes a list of up to 1024 backends, each once, such as [\"10.0.0.11:5432\", { address = \"10.0.0.12:5432\", weight = 2 }], not 10.0.0.1:1 twice",
        ),
    ] {
        assert_eq!(read(text), Err(said.to_owned()), "{text}");
    }
}

#[test]
fn a_value_that_does_not_fit_is_reported_with_what_its_key_takes() {
    for wrong in [
        "\"10.0.0.1\"",
        "{ weight = 2 }",
        "{ address = \"10.0.0.1:1\", weight = 0 }",
        "1",
        "{ adress = \"10.0.0.1:1\" }",
        "\"0.0.0.0:1\"",
    ] {
        let said =
            read(&format!("[service.a]\nprotocol = \"tcp\"\nbackends = [{wrong}]")).unwrap_err();
        assert!(said.starts_with("f line 3: service.a.backends takes"), "{said}");
    }
    for wrong in ["\"api\"", "\"/a/../b\"", "\"/a?b\"", "\"/%2f\""] {
        let said =
            read(&format!("[service.a]\nprotocol = \"api\"\npaths = [{wrong}]")).unwrap_err();
        assert!(said.starts_with("f line 3: service.a.paths takes"), "{said}");
    }
}

/// A table of a service with these rows.
fn service(name: &str, rows: &str) -> String {
    format!("[service.{name}]\n{rows}\n")
}

fn tcp(name: &str, listen: &str) -> String {
    service(name, &format!("protocol = \"tcp\"\nlisten = {listen}"))
}

#[test]
fn what_does_not_fit_together_is_refused_with_the_cure() {
    for (text, said) in [
        (service("a", "protocol = \"tcp\""), "service a has no door: say `listen` in [service.a]"),
        (
            "listen.api = \"off\"\n".to_owned() + &service("a", "protocol = \"api\""),
            "service a has no door: say `listen` in [service.a], or open listen.api",
        ),
        (
            tcp("a", "8081"),
            "listen.tcp and service.a.listen both want port 8081: give one of them another port",
        ),
        (
            tcp("a", "8080"),
            "listen.control and service.a.listen both want port 8080: give one of them another port",
        ),
        (
            tcp("a", "1") + &tcp("b", "\"127.0.0.1:1\""),
            "service.a.listen and service.b.listen both want port 1: give one of them another port",
        ),
        (
            service("a", "protocol = \"tcp\"\nlisten = 1\nhosts = [\"x\"]"),
            "service.a.hosts is for API services, and a is tcp: leave it out",
        ),
        (
            service("a", "protocol = \"udp\"\nlisten = 1\ncheck.kind = \"tcp\""),
            "service.a.check needs a `port`: a UDP backend is checked over TCP or HTTP on another port",
        ),
        (
            service("a", "protocol = \"tcp\"\nlisten = 1\ncheck.timeout_ms = 2001"),
            "service.a.check.timeout_ms (2001) must not be more than interval_ms (2000): lower the first or raise the second",
        ),
        (
            service("a", "protocol = \"api\"\nhosts = [\"x.y\"]")
                + &service("b", "protocol = \"api\"\nhosts = [\"z\", \"X.y.\"]"),
            "services a and b both claim x.y and the path / at one door: give one of them other hosts or paths",
        ),
        (
            service("a", "protocol = \"api\"\nlisten = 1")
                + &service("b", "protocol = \"api\"\nlisten = 1"),
            "services a and b both claim every other host and the path / at one door: give one of them other hosts or paths",
        ),
        (
            service("a", "protocol = \"api\""),
            "services api and a both claim every other host and the path / at one door: give one of them other hosts or paths",
        ),
        (
            service("a", "protocol = \"api\"\nlisten = [1, 2]\nhosts = [\"x\"]")
                + &service("b", "protocol = \"api\"\nlisten = 2\nhosts = [\"y\"]"),
            "service a shares its doors [::]:1 and [::]:2 with different services: give those that share a door the same `listen`",
        ),
    ] {
        assert_eq!(read(&text), Err(said.to_owned()), "{text}");
    }
}

#[test]
fn services_that_fit_together_are_accepted() {
    for text in [
        tcp("a", "1") + &service("b", "protocol = \"udp\"\nlisten = 1"),
        service("a", "protocol = \"api\"\nlisten = 1")
            + &service("b", "protocol = \"api\"\nlisten = 1\nhosts = [\"x\"]"),
        service("a", "protocol = \"api\"\nhosts = [\"x\"]\npaths = [\"/a\"]")
            + &service("b", "protocol = \"api\"\nhosts = [\"x\"]"),
        "listen.tcp = \"off\"\nlisten.udp = \"off\"\nlisten.api = \"off\"\n".to_owned()
            + &tcp("a", "1"),
    ] {
        assert!(read(&text).is_ok(), "{text} {:?}", read(&text));
    }
}

#[test]
fn a_reload_takes_the_terms_of_a_service_and_tells_what_needs_a_restart() {
    let text = "[service.a]\nprotocol = \"tcp\"\nlisten = 1\n[service.gone]\nprotocol = \"tcp\"\nlisten = 2\n";
    let running = read(text).unwrap();
    let wanted = read(
        "[service.new]\nprotocol = \"tcp\"\nlisten = 4\n[service.a]\nprotocol = \"tcp\"\n\
         listen = 3\nconnect_ms = 7\ncheck.kind = \"tcp\"\n",
    );
    let transition = reload::between(&running, &wanted.unwrap());
    assert_eq!(transition.now, ["service.a.connect_ms = 7", "service.a.check.kind = \"tcp\""]);
    assert_eq!(
        transition.after_restart,
        ["service.new is new", "service.a.listen = [\":3\"]", "service.gone is gone"]
    );
    let names: Vec<_> = transition.config.services.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["a", "gone"]);
    assert_eq!(transition.config.services[0].listen, running.services[0].listen);
    assert_eq!(transition.config.services[0].connect, Some(Duration::from_millis(7)));
}

#[test]
fn a_key_that_would_have_no_effect_is_refused() {
    let check = |rows: &str| {
        let rows = format!("protocol = \"tcp\"\nlisten = 1\ncheck = {{ {rows} }}");
        read(&service("a", &rows)).map(drop)
    };
    let said = check("port = 3").unwrap_err();
    assert_eq!(
        said,
        "service.a.check.port has no effect without kind = \"tcp\" or \"http\": add it, or leave the key out"
    );
    let said = check("kind = \"tcp\", path = \"/x\"").unwrap_err();
    assert!(
        said.starts_with("service.a.check.path has no effect without kind = \"http\""),
        "{said}"
    );
    for rows in ["kind = \"tcp\", port = 3", "kind = \"http\", path = \"/x?y=%20\"", ""] {
        assert_eq!(check(rows), Ok(()), "{rows}");
    }
    assert!(check("kind = \"http\", path = \"/<x>\"").is_err(), "it is no request target");
}

#[test]
fn one_backend_in_two_spellings_is_listed_twice() {
    let text =
        "protocol = \"tcp\"\nlisten = 1\nbackends = [\"127.0.0.1:80\", \"[::ffff:127.0.0.1]:80\"]";
    assert!(read(&service("a", text)).unwrap_err().ends_with("127.0.0.1:80 twice"));
}

#[test]
fn a_reload_takes_nothing_of_a_service_that_changes_its_protocol() {
    let running = read(&service("a", "protocol = \"udp\"\nlisten = 1")).unwrap();
    let wanted = "protocol = \"tcp\"\nlisten = 1\nconnect_ms = 7\ncheck.kind = \"http\"";
    let transition = reload::between(&running, &read(&service("a", wanted)).unwrap());
    assert_eq!(transition.after_restart, ["service.a.protocol = \"tcp\""]);
    assert_eq!((transition.now.len(), &transition.config), (0, &running));
}
