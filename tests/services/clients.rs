//! Certificates of users: who is let in with which, what backends are told, and that nobody gets to a service
//! by a connection that was set up for another.

use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use lb::cluster::Protocol;
use lb::cluster::route::Host;
use lb::config::Config;
use lb::config::clients::{Clients, Demand, ServiceClients};
use lb::config::services::ServiceConfig;
use rcgen::ExtendedKeyUsagePurpose;
use rustls::{AlertDescription, ClientConfig, Error, HandshakeKind};

use crate::authority::{Authority, Client};
use crate::harness::{Balancer, connect};
use crate::tls::{counted, echoing, telling};
use crate::tls_user::{Certificates, User, get, shake, user, versions};

const OPEN: &str = "open.example";
const FREE: &str = "free.example";
const STRICT: &str = "strict.example";
const OTHER: &str = "other.example";
const NAMES: &[&str] =
    &[OPEN, FREE, STRICT, OTHER, "unclaimed.example", "x.example", "mail.example"];

/// A balancer whose services ask their users for different certificates.
struct Setup {
    certificates: Certificates,
    authority: Authority,
    /// Below it.
    middle: Authority,
    other: Authority,
    balancer: Balancer,
    https: SocketAddr,
}

/// What the authority of most has revoked.
const REVOKED: u64 = 99;

impl Setup {
    fn new(test: &str) -> Setup {
        let [authority, other] = ["ours", "theirs"].map(Authority::new);
        let middle = authority.below("between");
        let certificates = Certificates::new(test, &[NAMES]);
        let lists = authority.revokes(&[REVOKED], 2040) + &middle.revokes(&[], 2021);
        let crl = certificates.write("ca.crl", &lists);
        let ca = certificates.write("ca.pem", &authority.pem());
        let other_ca = certificates.write("other.pem", &other.pem());
        let mut balancer = Balancer::start_with(|config: &mut Config| {
            let any = "127.0.0.1:0".parse().unwrap();
            (config.listen.api, config.listen.api_tls) = (Some(any), Some(any));
            certificates.put(config);
            config.tls.clients = Clients { ca: Some(ca), crl: vec![crl], ..Clients::default() };
            let api = |name: &str, demand, tells_chain| {
                let clients = ServiceClients { demand, tells_chain, ..ServiceClients::default() };
                let hosts = vec![Host::parse(&format!("{name}.example")).unwrap()];
                ServiceConfig { hosts, clients, ..ServiceConfig::new(name, Protocol::Api) }
            };
            let mut theirs = api("other", Some(Demand::Required), None);
            theirs.clients.ca = Some(other_ca);
            let mail = ServiceConfig::new("mail", Protocol::Tcp);
            let clients =
                ServiceClients { demand: Some(Demand::Required), ..ServiceClients::default() };
            config.set_services(vec![
                api("open", None, None),
                api("free", Some(Demand::Optional), Some(true)),
                api("strict", Some(Demand::Required), None),
                theirs,
                ServiceConfig { listen: vec![any], tls: true, clients, ..mail },
            ]);
            lb::config::rules::check(config).unwrap();
        });
        let backend = telling();
        for service in ["api", "open", "free", "strict", "other"] {
            balancer.register(service, backend);
        }
        balancer.register("mail", echoing());
        let https = balancer.plane.doors.api_tls().unwrap();
        Setup { certificates, authority, middle, other, balancer, https }
    }

    /// A user who shows these, its own first.
    fn client(&self, chain: &[&[u8]], own: Option<&Client>) -> Arc<ClientConfig> {
        self.certificates.client_showing(chain, own.map(|own| own.key.serialize_pem()), versions(0))
    }

    fn showing(&self, own: &Client) -> Arc<ClientConfig> {
        self.client(&[own.der()], Some(own))
    }

    fn counted(&self, what: &str) -> u64 {
        counted(&self.balancer, what)
    }

    /// What a backend was told in a request to this host; an error if the handshake fails.
    fn get(&self, client: &Arc<ClientConfig>, host: &str) -> io::Result<String> {
        let mut user = user(client, host, self.https);
        shake(&mut user)?;
        get(&mut user, host, "/").map_err(|error| match error.kind() {
            // With TLS 1.3 it has sent its request before it is answered; the answer has come all the same.
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => last_words(&mut user),
            _ => error,
        })
    }
}

/// What has come before the connection was closed.
fn last_words(user: &mut User) -> io::Error {
    let read = user.conn.read_tls(&mut user.sock);
    read.and_then(|_| user.conn.process_new_packets().map_err(io::Error::other)).unwrap_err()
}

/// The alert with which the handshake ended.
fn alert(outcome: io::Result<String>) -> AlertDescription {
    match outcome.unwrap_err().downcast::<Error>() {
        Ok(Error::AlertReceived(alert)) => alert,
        other => panic!("{other:?}"),
    }
}

fn told<'a>(answer: &'a str, field: &str) -> Vec<&'a str> {
    answer.lines().filter_map(|line| line.strip_prefix(field)?.strip_prefix(": ")).collect()
}

fn encoded(der: &[u8]) -> String {
    use base64::Engine as _;
    format!(":{}:", base64::engine::general_purpose::STANDARD.encode(der))
}

#[test]
fn backends_are_told_the_certificate_and_users_cannot_say_it_themselves() {
    let setup = Setup::new("told");
    let own = setup.authority.client(1);
    let answer = setup.get(&setup.showing(&own), STRICT).unwrap();
    assert_eq!(told(&answer, "Client-Cert"), [encoded(own.der())]);
    let below = setup.middle.client(2);
    let client = setup.client(&[below.der(), setup.middle.der()], Some(&below));
    let [strict, free] = [STRICT, FREE].map(|host| setup.get(&client, host).unwrap());
    for answer in [&strict, &free] {
        assert_eq!(told(answer, "Client-Cert"), [encoded(below.der())]);
    }
    assert!(told(&strict, "Client-Cert-Chain").is_empty(), "{strict}");
    assert_eq!(told(&free, "Client-Cert-Chain"), [encoded(setup.middle.der())]);
    // What users say themselves is lost, with a certificate and without, under TLS and in the clear.
    let said = "\r\nClient-Cert: :AAAA:\r\nclient_cert: :AAAA:\r\nClient-Cert-Chain: :AAAA:\r\nX: ";
    let lie = |host: &str, client: &Arc<ClientConfig>| {
        let mut user = user(client, host, setup.https);
        shake(&mut user).unwrap();
        get(&mut user, &format!("{host}{said}"), "/").unwrap()
    };
    assert!(!lie(OPEN, &client).to_lowercase().contains("client"), "it was not asked there");
    let anonymous = setup.client(&[], None);
    assert!(!lie(FREE, &anonymous).to_lowercase().contains("client"));
    let answer = lie(FREE, &client);
    assert_eq!(told(&answer, "Client-Cert"), [encoded(below.der())]);
    assert_eq!(answer.to_lowercase().matches("client").count(), 2, "{answer}");
    let mut plain = connect(setup.balancer.at("api"));
    let request = format!("GET / HTTP/1.1\r\nHost: {OPEN}{said}\r\nConnection: close\r\n\r\n");
    plain.write_all(request.as_bytes()).unwrap();
    let answer = io::read_to_string(plain).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(!answer.to_lowercase().contains("client"), "{answer}");
    setup.balancer.stop();
}

#[test]
fn whoever_shows_none_or_none_that_counts_is_told_why_and_counted() {
    let setup = Setup::new("refused");
    let stranger = Authority::new("stranger").client(1);
    let server = |params: &mut rcgen::CertificateParams| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    };
    let ours = &setup.authority;
    let cases = [
        (ours.former_client(2), AlertDescription::CertificateExpired, "expired"),
        (ours.client(REVOKED), AlertDescription::CertificateRevoked, "revoked"),
        (stranger, AlertDescription::UnknownCA, "untrusted"),
        (setup.other.client(3), AlertDescription::UnknownCA, "untrusted"),
        (ours.client_with(4, server), AlertDescription::UnsupportedCertificate, "untrusted"),
    ];
    for version in [1, 2] {
        let client = |own: &Client| {
            let key = Some(own.key.serialize_pem());
            setup.certificates.client_showing(&[own.der()], key, versions(version))
        };
        for (own, wanted, reason) in &cases {
            let what = format!("tls_refused_client_certificate_{reason}");
            let before = setup.counted(&what);
            // One that is shown must be good also where none is required.
            for host in [STRICT, FREE] {
                assert_eq!(alert(setup.get(&client(own), host)), *wanted, "{reason} {version}");
            }
            assert_eq!(setup.counted(&what), before + 2, "{reason}");
        }
        let anonymous = setup.certificates.client_showing(&[], None, versions(version));
        let before = setup.counted("tls_refused_no_client_certificate");
        assert_eq!(alert(setup.get(&anonymous, STRICT)), AlertDescription::CertificateRequired);
        assert_eq!(setup.counted("tls_refused_no_client_certificate"), before + 1);
        for host in [FREE, OPEN] {
            assert!(setup.get(&anonymous, host).unwrap().starts_with("HTTP/1.1 200 OK\r\n"));
        }
        let own = ours.client(5);
        assert!(setup.get(&client(&own), STRICT).unwrap().starts_with("HTTP/1.1 200 OK\r\n"));
        // That of another policy does not count here, nor does ours there.
        assert_eq!(alert(setup.get(&client(&own), OTHER)), AlertDescription::UnknownCA);
    }
    setup.balancer.stop();
}

#[test]
fn no_connection_leads_to_a_host_that_asks_for_something_else() {
    let setup = Setup::new("misdirected");
    let own = setup.authority.client(1);
    let client = setup.showing(&own);
    let mut count = 0;
    for (sni, host, status) in [
        (OPEN, STRICT, "421 Misdirected Request"),
        (OPEN, "STRICT.example.:443", "421 Misdirected Request"),
        (OPEN, FREE, "421 Misdirected Request"),
        (FREE, STRICT, "421 Misdirected Request"),
        (FREE, OPEN, "421 Misdirected Request"),
        (STRICT, OTHER, "421 Misdirected Request"),
        (STRICT, OPEN, "421 Misdirected Request"),
        // Nobody asks there for anything, as at the first.
        (OPEN, "unclaimed.example", "200 OK"),
        ("unclaimed.example", OPEN, "200 OK"),
        ("unclaimed.example", STRICT, "421 Misdirected Request"),
        (STRICT, STRICT, "200 OK"),
    ] {
        let mut user = user(&client, sni, setup.https);
        shake(&mut user).unwrap();
        let answer = get(&mut user, host, "/").unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{sni} {host}: {answer}");
        count += u64::from(status.starts_with("421"));
    }
    assert_eq!(setup.counted("api_misdirected"), count);
    // By its target, whatever its Host, and as the second request of a connection that has served one.
    let mut both = user(&client, OPEN, setup.https);
    shake(&mut both).unwrap();
    assert!(get(&mut both, OPEN, "/").unwrap().starts_with("HTTP/1.1 200 OK\r\n"));
    let answer = get(&mut both, OPEN, &format!("https://{STRICT}/")).unwrap();
    assert!(answer.starts_with("HTTP/1.1 421 "), "{answer}");
    // Without a name in the ClientHello.
    let mut nameless = Arc::unwrap_or_clone(setup.showing(&own));
    nameless.enable_sni = false;
    let nameless = Arc::new(nameless);
    for (host, status) in [(STRICT, 421), (OPEN, 200)] {
        let mut user = user(&nameless, "x.example", setup.https);
        shake(&mut user).unwrap();
        let answer = get(&mut user, host, "/").unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{host}: {answer}");
    }
    setup.balancer.stop();
}

#[test]
fn in_the_clear_nobody_gets_to_a_service_that_requires_a_certificate() {
    let setup = Setup::new("clear");
    let ask = |host: &str| {
        let mut user = connect(setup.balancer.at("api"));
        let request = format!("GET /a HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        user.write_all(request.as_bytes()).unwrap();
        io::read_to_string(user).unwrap()
    };
    let answer = ask(STRICT);
    assert!(answer.starts_with("HTTP/1.1 308 "), "{answer}");
    let location = format!("\r\nLocation: https://{STRICT}:{}/a\r\n", setup.https.port());
    assert!(answer.contains(&location), "{answer}");
    assert!(ask(FREE).starts_with("HTTP/1.1 200 OK\r\n") && ask(OPEN).starts_with("HTTP/1.1 200"));
    setup.balancer.stop();
}

#[test]
fn whoever_was_asked_for_a_certificate_is_asked_again() {
    let setup = Setup::new("again");
    let own = setup.authority.client(1);
    for version in [1, 2] {
        let key = Some(own.key.serialize_pem());
        let client = setup.certificates.client_showing(&[own.der()], key, versions(version));
        let kinds = |host: &str| {
            [0; 3].map(|_| {
                let mut user = user(&client, host, setup.https);
                shake(&mut user).unwrap();
                assert!(get(&mut user, host, "/").unwrap().starts_with("HTTP/1.1 200"));
                user.conn.handshake_kind().unwrap()
            })
        };
        use HandshakeKind::{Full, Resumed};
        assert_eq!(kinds(OPEN), [Full, Resumed, Resumed]);
        assert_eq!((kinds(STRICT), kinds(FREE)), ([Full; 3], [Full; 3]));
    }
    setup.balancer.stop();
}

#[test]
fn a_stream_is_let_in_by_its_certificate() {
    let setup = Setup::new("stream");
    let (own, at) = (setup.authority.client(1), setup.balancer.at("mail"));
    let shaken = |client: &Arc<ClientConfig>| {
        let mut user = user(client, "mail.example", at);
        shake(&mut user)?;
        let mut back = [0; 5];
        let echoed = user.write_all(b"hello").and_then(|()| user.read_exact(&mut back));
        match echoed.map_err(|error| (error.kind(), error)) {
            Ok(()) => Ok(String::from_utf8_lossy(&back).into_owned()),
            Err((ErrorKind::BrokenPipe | ErrorKind::ConnectionReset, _)) => {
                Err(last_words(&mut user))
            }
            Err((_, error)) => Err(error),
        }
    };
    assert_eq!(shaken(&setup.showing(&own)).unwrap(), "hello");
    let revoked = setup.authority.client(REVOKED);
    assert_eq!(alert(shaken(&setup.showing(&revoked))), AlertDescription::CertificateRevoked);
    let anonymous = setup.client(&[], None);
    assert_eq!(alert(shaken(&anonymous)), AlertDescription::CertificateRequired);
    assert_eq!(setup.counted("tls_refused_no_client_certificate"), 1);
    setup.balancer.stop();
}
