//! Named services as the file says them, and what is said of their faults.

mod reached;

use super::super::{file, reload, rules};
use super::*;

/// A service in which every key has a value other than its default.
const EVERY_KEY_CHANGED: &str = r#"
    [service.shop]
    protocol = "api"
    listen = ["10.0.0.1:80", ":8443"]
    listen_tls = [":443"]
    hosts = ["shop.example", "*.shop.example"]
    paths = ["/api", "/v2/"]
    proxy_from = ["10.0.0.0/8", "192.0.2.7"]
    tls = true
    tls_clients = "optional"
    tls_client_ca = "ca.pem"
    tls_client_crl = ["ca.crl", "old.crl"]
    tls_client_chain = true
    https_only = true
    policy = "least_sessions"
    hash = "address_port"
    on_backend_loss = "close"
    connect_ms = 11
    tcp_idle_ms = 12
    half_close_ms = 13
    udp_idle_ms = 14
    responses = 15
    answer_ms = 16
    body_ms = 17
    body_bytes = 18
    retries = 9
    tunnel_idle_ms = 19
    register = false
    probe = false
    allow = ["10.1.0.0/16"]
    secret_file = "shop.secret"
    fallback = "page"
    backends_max = 15
    sessions = 16
    backend_sessions = 17
    users = ["10.2.0.0/16"]
    backends = [{ address = "10.0.0.11:80", group = "a" }, { address = "[2001:db8::1]:80", weight = 3, group = "b", proxy = 2, http = 2, tls = { name = "b.example", ca = "own.pem" } }]
    groups = { a = 95, b = 5 }
    maintenance = true
    [service.shop.check]
    kind = "http"
    port = 8008
    path = "/primary?x"
    grpc_service = "shop.Orders"
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
    // Not the rules: no one service has a use for every key.
    let config = file::read("f", EVERY_KEY_CHANGED).unwrap();
    let [service] = &config.services[..] else { panic!() };
    let default = ServiceConfig::new("shop", Protocol::Tcp);
    let mut text = "[service.shop]\n".to_owned();
    for key in SERVICE_KEYS {
        assert_ne!(key.show(service), key.show(&default), "{} was not set", key.path());
        text += &format!("{} = {}\n", key.path(), key.show(service));
    }
    assert_eq!(file::read("f", &text), Ok(config.clone()), "{text}");
    let terms = config.terms_of(service);
    assert_eq!(terms.policy, Policy::LeastSessions);
    assert_eq!(terms.timeouts.half_close, Duration::from_millis(13));
    assert_eq!((service.backends[1].weight, service.backends[1].proxy), (3, true));
    assert_eq!(service.backends.iter().map(|it| it.http2).collect::<Vec<_>>(), [false, true]);
    let tls = service.backends[1].tls.as_ref().unwrap();
    assert_eq!(
        (tls.name.as_deref(), tls.ca.as_deref()),
        (Some("b.example"), Some("own.pem".as_ref()))
    );
}

#[test]
fn a_service_takes_the_global_terms_where_it_has_none_of_its_own() {
    let config = read(
        "balance.policy = \"source_hash\"\ntimeouts.connect_ms = 7\n\
         [service.a]\nprotocol = \"tcp\"\nlisten = 1\npolicy = \"round_robin\"",
    );
    let config = config.unwrap();
    let terms = config.terms_for(ServiceId(3));
    assert_eq!(terms.policy, Policy::RoundRobin);
    assert_eq!(terms.timeouts.connect, Duration::from_millis(7));
    assert_eq!(config.terms_for(ServiceId::built_in(Protocol::Tcp)), config.terms());
}

#[test]
fn a_service_may_set_or_lift_the_limits_of_its_requests_and_sessions() {
    let config = read(
        "api.body_bytes = 10\napi.retries = 5\napi.answer_ms = 70\nudp.responses = 3\n\
         [service.a]\nprotocol = \"api\"\nlisten = 1\nbody_bytes = 0\nretries = 0\nbody_ms = 60\n\
         tunnel_idle_ms = 80\n[service.b]\nprotocol = \"api\"\nlisten = 2\nbody_bytes = \"global\"\n\
         answer_ms = 90\n[service.c]\nprotocol = \"udp\"\nlisten = 3\nresponses = 0\n\
         [service.d]\nprotocol = \"udp\"\nlisten = 4",
    );
    let config = config.unwrap();
    let ms = Duration::from_millis;
    let global = RequestLimits { body_bytes: 10, retries: 5, answer: ms(70), ..Default::default() };
    assert_eq!(config.terms().requests, global);
    assert_eq!(
        config.terms_for(ServiceId(3)).requests,
        RequestLimits {
            body_bytes: u64::MAX,
            retries: 0,
            body: ms(60),
            tunnel_idle: ms(80),
            ..global
        }
    );
    assert_eq!(config.terms_for(ServiceId(4)).requests, RequestLimits { answer: ms(90), ..global });
    assert_eq!(config.terms_for(ServiceId(5)).responses, None);
    assert_eq!(config.terms_for(ServiceId(6)).responses, NonZeroU32::new(3));
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
            "f line 3: service.a.listen takes an address with its port or a port, or a list of up to 16 of them, each once, not \"off\"",
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
            "f line 3: service.a.backends takes a list of up to 16384 backends, each once, such as [\"10.0.0.11:5432\", { address = \"10.0.0.12:5432\", weight = 2 }], not 10.0.0.1:1 twice",
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
            service("a", "protocol = \"udp\"\nlisten = 1\ncheck.kind = \"tcp\""),
            "service.a.check needs a `port`: a UDP backend is checked over TCP, HTTP or gRPC on another port",
        ),
        (
            service("a", "protocol = \"tcp\"\nlisten = 1\ncheck.timeout_ms = 2001"),
            "service.a.check.timeout_ms (2001ms) must not be more than interval_ms (2s): lower the first or raise the second, or leave the first out",
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
    ] {
        assert_eq!(read(&text), Err(said.to_owned()), "{text}");
    }
}

#[test]
fn one_door_listed_twice_is_refused_however_it_is_written() {
    let takes = "f line 3: service.a.listen takes an address with its port or a port, or a list of up to \
                 16 of them, each once, not";
    for (protocol, doors, said) in [
        ("tcp", "[\":1\", 1]", format!("{takes} 1 twice")),
        ("api", "[\":1\", \":2\", \":1\"]", format!("{takes} \":1\" twice")),
        (
            "tcp",
            "[\":1\", \":2\", \"127.0.0.1:1\"]",
            "service.a.listen names port 1 twice, and [::]:1 and 127.0.0.1:1 overlap: leave one of them out"
                .to_owned(),
        ),
    ] {
        let rows = format!("protocol = \"{protocol}\"\nlisten = {doors}");
        assert_eq!(read(&service("a", &rows)), Err(said), "{doors}");
    }
    assert!(
        read(&tcp("a", "[\"127.0.0.1:0\", \"127.0.0.1:0\"]")).is_ok(),
        "two ports of the kernel's"
    );
}

#[test]
fn services_are_a_table_of_tables() {
    let said = "`service` is a table of tables: write [service.NAME] and its keys below it";
    for (text, line) in [("workers = 1\nservice = 3", 2), ("[[service]]\nprotocol = \"tcp\"", 1)] {
        assert_eq!(read(text), Err(format!("f line {line}: {said}")));
    }
}

#[test]
fn a_service_whose_users_nobody_could_ever_serve_is_refused() {
    let of = |protocol: &str, rows: &str| {
        let rows = format!("protocol = \"{protocol}\"\nlisten = 1\n{rows}");
        read(&service("a", &rows)).map(drop)
    };
    let said = "service.a.register is false and service.a.backends lists nobody, so nobody could ever \
                serve: list its backends, or let them register";
    for protocol in ["tcp", "udp", "api"] {
        assert_eq!(of(protocol, "register = false"), Err(said.to_owned()));
        assert_eq!(of(protocol, "register = false\nbackends = [\"10.0.0.1:1\"]"), Ok(()));
        assert_eq!(of(protocol, ""), Ok(()));
    }
    assert_eq!(of("api", "register = false\nfallback = \"api\""), Ok(()));
    assert_eq!(of("api", "register = false\nmaintenance = true"), Ok(()));
}

#[test]
fn a_udp_service_has_no_say_in_whether_its_ports_are_tried() {
    let of = |protocol: &str| {
        read(&service("a", &format!("protocol = \"{protocol}\"\nlisten = 1\nprobe = false")))
            .map(drop)
    };
    let said =
        "service.a.probe has no effect, since a is udp and its ports are never tried: leave it out";
    assert_eq!(of("udp"), Err(said.to_owned()));
    assert_eq!((of("tcp"), of("api")), (Ok(()), Ok(())));
}

#[test]
fn a_key_of_another_protocol_is_refused() {
    let asked = |protocol: &str, row: &str| {
        read(&service("a", &format!("protocol = \"{protocol}\"\nlisten = 1\n{row}"))).map(drop)
    };
    for (rows, of) in [
        (&["tcp_idle_ms = 10", "half_close_ms = 10"][..], "tcp"),
        (&["udp_idle_ms = 10", "responses = 0"], "udp"),
        (&["paths = [\"/x\"]", "maintenance = true", "retries = 2"], "api"),
        (&["fallback = \"api\""], "api"),
        (&["answer_ms = 10", "body_ms = 10", "body_bytes = 0", "tunnel_idle_ms = 10"], "api"),
    ] {
        for row in rows {
            let key = row.split(' ').next().unwrap();
            for protocol in ["tcp", "udp", "api"] {
                let named = of.to_uppercase();
                let said = format!(
                    "service.a.{key} is for {named} services, and a is {protocol}: leave it out"
                );
                let wanted = if protocol == of { Ok(()) } else { Err(said) };
                assert_eq!(asked(protocol, row), wanted);
            }
        }
    }
}

#[test]
fn a_fallback_is_another_api_service_and_no_chain_of_them_is_endless() {
    let api = |name: &str, fallback: &str| {
        service(
            name,
            &format!("protocol = \"api\"\nhosts = [\"{name}\"]\nfallback = \"{fallback}\""),
        )
    };
    let chain = |length: usize| -> String {
        let link = |at| api(&format!("s{at}"), &format!("s{}", at + 1));
        (0..length).map(link).collect::<String>() + &api(&format!("s{length}"), "")
    };
    for (text, said) in [
        (api("a", "b") + &api("b", "api"), ""),
        (chain(8), ""),
        (
            chain(9),
            "service.s0.fallback begins a chain of more than 8 services, or a circle: shorten it",
        ),
        (api("a", "a"), "service.a.fallback leads back to a: let one of them have no fallback"),
        (
            api("a", "b") + &api("b", "a"),
            "service.a.fallback leads back to a: let one of them have no fallback",
        ),
        (api("a", "b"), "service.a.fallback is b, which does not exist: name another API service"),
        (
            api("a", "b") + &tcp("b", "1"),
            "service.a.fallback is b, which is not an API service: name another API service",
        ),
        (
            api("a", "tcp"),
            "service.a.fallback is tcp, which is not an API service: name another API service",
        ),
    ] {
        let wanted = if said.is_empty() { Ok(()) } else { Err(said.to_owned()) };
        assert_eq!(read(&text).map(drop), wanted, "{text}");
    }
    assert!(read(&api("a", "no name")).unwrap_err().contains("service.a.fallback takes the name"));
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
fn a_reload_takes_services_in_and_out_and_whatever_their_tables_say() {
    let text = "[service.gone]\nprotocol = \"tcp\"\nlisten = 2\n[service.a]\nprotocol = \"tcp\"\nlisten = 1\n";
    let running = read(text).unwrap();
    let wanted = read(
        "[service.new]\nprotocol = \"udp\"\nlisten = 4\n[service.a]\nprotocol = \"tcp\"\n\
         listen = 3\nconnect_ms = 7\ncheck.kind = \"tcp\"\n",
    );
    let transition = reload::tests::change(&running, &wanted.unwrap()).unwrap();
    assert_eq!(
        transition.now,
        [
            "service.gone is gone",
            "service.a.listen = [\":3\"]",
            "service.a.connect_ms = \"7ms\"",
            "service.a.check.kind = \"tcp\"",
            "service.new is new"
        ]
    );
    assert_eq!(transition.after_restart, [""; 0]);
    let taken: Vec<_> = transition.config.services.iter().map(|it| (&*it.name, it.id.0)).collect();
    assert_eq!(taken, [("a", 4), ("new", 100)], "nobody has the number of another");
    assert_eq!(transition.config.services[0].connect, Some(Duration::from_millis(7)));
}

#[test]
fn rule_11_a_service_keeps_its_protocol() {
    let running = read(&service("a", "protocol = \"udp\"\nlisten = 1")).unwrap();
    let wanted = read(&service("a", "protocol = \"tcp\"\nlisten = 1\nconnect_ms = 7")).unwrap();
    assert_eq!(
        reload::tests::change(&running, &wanted).unwrap_err(),
        "service.a.protocol is udp while users are served, not tcp: give the new service another name"
    );
}

#[test]
fn the_first_service_of_a_protocol_without_memory_waits_for_a_restart() {
    let mut running = Config::default();
    (running.listen.udp, running.listen.api) = (None, None);
    let prepared = reload::Prepared::for_doors_of(&running);
    let wanted = read(
        &(service("a", "protocol = \"udp\"\nlisten = 1")
            + &service("b", "protocol = \"tcp\"\nlisten = 2")),
    );
    let mut number = || Ok(ServiceId(9));
    let transition = reload::between(&running, &wanted.unwrap(), prepared, &mut number).unwrap();
    let names: Vec<_> = transition.config.services.iter().map(|it| &*it.name).collect();
    assert_eq!(names, ["b"]);
    assert!(transition.after_restart.contains(&"service.a is the first udp service".to_owned()));
}

#[test]
fn a_number_is_given_again_only_after_all_others() {
    let mut ids = ServiceIds::behind(&Config::default());
    let free = |_| false;
    assert_eq!([ids.next(free), ids.next(free)], [ServiceId(3), ServiceId(4)]);
    assert_eq!(ids.next(|id| id.0 < 9), ServiceId(9));
    let last = std::iter::from_fn(|| Some(ids.next(free))).find(|id| id.0 == u16::MAX - 2);
    assert!(last.is_some());
    assert_eq!(ids.next(|id| id.0 == 3), ServiceId(4), "neither nobody's nor a built-in one's");
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
        "service.a.check.port has no effect without kind = \"tcp\", \"http\" or \"grpc\": add it, or leave the key out"
    );
    let said = check("kind = \"tcp\", path = \"/x\"").unwrap_err();
    assert!(
        said.starts_with("service.a.check.path has no effect without kind = \"http\""),
        "{said}"
    );
    for (rows, key, kinds) in [
        ("kind = \"grpc\", path = \"/x\"", "path", "\"http\""),
        ("kind = \"grpc\", expect = \"200\"", "expect", "\"http\""),
        ("kind = \"http\", grpc_service = \"x\"", "grpc_service", "\"grpc\""),
        ("grpc_service = \"x\"", "grpc_service", "\"grpc\""),
        ("kind = \"tcp\", host = \"x\"", "host", "\"http\" or \"grpc\""),
    ] {
        let said = check(rows).unwrap_err();
        let why = format!("service.a.check.{key} has no effect without kind = {kinds}: add it");
        assert!(said.starts_with(&why), "{said}");
    }
    let all = "kind = \"grpc\", grpc_service = \"shop.Orders\", host = \"x\", port = 3";
    assert_eq!(check(all), Ok(()));
    let said = check("kind = \"grpc\", grpc_service = \"a b\"").unwrap_err();
    assert!(said.contains("takes the name of a gRPC service"), "{said}");
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
fn rule_13_a_service_lists_no_more_backends_than_it_may_have() {
    let with = |max: u32| {
        read(&format!(
            "[service.a]\nprotocol = \"tcp\"\nlisten = 1\nbackends_max = {max}\n\
             backends = [\"10.0.0.1:1\", \"10.0.0.2:1\"]"
        ))
    };
    assert!(with(0).is_ok() && with(2).is_ok());
    let said = with(1).unwrap_err();
    assert!(said.starts_with("service.a.backends lists 2, more than service.a.backends_max (1)"));
}

#[test]
fn groups_have_shares_of_which_one_at_least_is_above_0() {
    let groups = |groups: &str| {
        read(&format!("[service.a]\nprotocol = \"tcp\"\nlisten = 1\ngroups = {groups}"))
            .map(|config| config.services[0].shares().iter().map(|it| it.1).collect::<Vec<_>>())
    };
    assert_eq!(groups("{ blue = 0, green = 100 }"), Ok(vec![0, 100]));
    assert_eq!(groups("{ a = 1, b = 1, c = 1 }"), Ok(vec![1, 1, 1]), "they need not add up to 100");
    assert_eq!(groups("{}"), Ok(vec![]));
    let many = |count: u8| {
        let all: Vec<_> = (0..count).map(|number| format!("g{number} = 1")).collect();
        format!("{{ {} }}", all.join(", "))
    };
    assert!(groups(&many(16)).is_ok());
    for wrong in [
        "{ blue = 0 }",
        "{ blue = 101 }",
        "{ blue = -1 }",
        "{ blue = \"5\" }",
        "{ \"b c\" = 5 }",
        "[\"blue\"]",
        &many(17),
    ] {
        let said = groups(wrong).unwrap_err();
        assert!(said.contains("groups") && said.contains("share from 0 to 100"), "{wrong}: {said}");
    }
}

#[test]
fn a_listed_backend_is_in_one_of_the_groups_if_there_are_any() {
    let said = |rest: &str| {
        let text = format!("[service.a]\nprotocol = \"tcp\"\nlisten = 1\n{rest}");
        read(&text).map(drop)
    };
    let in_blue = "backends = [{ address = \"10.0.0.1:1\", group = \"blue\" }]";
    assert_eq!(said(&format!("{in_blue}\ngroups = {{ blue = 1 }}")), Ok(()));
    for (text, part) in [
        (in_blue.to_owned(), "and a has none"),
        (format!("{in_blue}\ngroups = {{ green = 1 }}"), "which a does not have"),
        ("backends = [\"10.0.0.1:1\"]\ngroups = { green = 1 }".to_owned(), "in none of them"),
    ] {
        let said = said(&text).unwrap_err();
        assert!(said.contains(part), "{said}");
    }
}
