//! Handshakes that fail: what is counted, and what the control core is told for the log.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};

use lb::config::Config;
use lb::worker::link::Report;

use crate::harness::{Balancer, connect};
use crate::tls_user::{Certificates, shake, user};
use crate::wait::wait_for;

struct Stage {
    balancer: Balancer,
    certificates: Certificates,
    at: SocketAddr,
}

/// An HTTPS door for `a.example` alone.
fn stage(test: &str) -> Stage {
    let certificates = Certificates::new(test, &[&["a.example"]]);
    let balancer = Balancer::start_with(|config: &mut Config| {
        config.listen.api_tls = Some("127.0.0.1:0".parse().unwrap());
        config.tls.strict_sni = true;
        config.tls.handshake = std::time::Duration::from_millis(300);
        certificates.put(config);
    });
    let at = balancer.plane.doors.api_tls().unwrap();
    Stage { balancer, certificates, at }
}

/// A failed handshake as the control core hears of it.
#[derive(PartialEq, Debug)]
struct Told {
    client: SocketAddr,
    host: Option<String>,
    why: &'static str,
    is_ours: bool,
}

impl Stage {
    /// The next failure that is told.
    fn told(&mut self) -> Told {
        let ends = &mut self.balancer.plane.ends;
        let report = wait_for("a report", || ends.iter_mut().find_map(|it| it.reports.pop().ok()));
        let Report::HandshakeFailed { client, host, why, is_ours, .. } = report else {
            panic!("{report:?}");
        };
        Told { client, host: host.shown(), why, is_ours }
    }

    fn hears_nothing(&mut self) -> bool {
        self.balancer.let_workers_turn();
        self.balancer.plane.ends.iter().all(|it| it.reports.is_empty())
    }

    fn counted(&self, what: &str) -> u64 {
        let rows = lb::metrics::WorkerCounters::ROWS;
        let place = rows.iter().position(|row| row.name == what).unwrap();
        self.balancer.plane.ends.iter().map(|end| end.metrics.counters.values()[place]).sum()
    }

    /// Sends this in the clear and nothing more. What is told, and counted under this name.
    fn says(&mut self, bytes: &[u8], counter: &str) -> &'static str {
        let mut user = connect(self.at);
        let client = user.local_addr().unwrap();
        user.write_all(bytes).unwrap();
        let before = self.counted(counter);
        user.shutdown(Shutdown::Write).unwrap();
        let _ = user.read_to_end(&mut Vec::new());
        let told = self.told();
        let wanted = Told { client, host: None, why: told.why, is_ours: false };
        assert_eq!(told, wanted);
        assert!(self.counted(counter) >= before.max(1), "{counter}");
        told.why
    }
}

#[test]
fn who_cannot_be_served_is_told_with_address_host_and_reason() {
    let mut stage = stage("failures");
    let config = stage.certificates.client();
    let mut other = user(&config, "Other.example", stage.at);
    shake(&mut other).unwrap_err();
    let client = other.sock.local_addr().unwrap();
    let (host, why) = (Some("other.example".to_owned()), "no certificate is for this host");
    assert_eq!(stage.told(), Told { client, host, why, is_ours: false });

    let stranger = Certificates::new("failures-stranger", &[]);
    let mut distrustful = user(&stranger.client(), "a.example", stage.at);
    shake(&mut distrustful).unwrap_err();
    let _ = distrustful.conn.complete_io(&mut distrustful.sock);
    let told = stage.told();
    assert_eq!(told.host.as_deref(), Some("a.example"));
    assert_eq!(told.why, "it does not know who signed our certificate (unknown_ca)");
    assert_eq!(stage.counted("tls_refused_by_user"), 1);

    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    let is_of_rsa = |suite: &rustls::SupportedCipherSuite| {
        format!("{:?}", suite.suite()).starts_with("TLS_ECDHE_RSA")
    };
    provider.cipher_suites.retain(is_of_rsa);
    let other = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    shake(&mut user(&other.into(), "a.example", stage.at)).unwrap_err();
    let wanted = "it offers no cipher or signature that goes with the certificates of this host";
    assert_eq!(stage.told().why, wanted);
    assert_eq!(stage.counted("tls_refused_nothing_in_common"), 1);

    let mut http3 = (*config).clone();
    http3.alpn_protocols = vec![b"h3".to_vec()];
    shake(&mut user(&http3.into(), "a.example", stage.at)).unwrap_err();
    assert_eq!(stage.told().why, "it offers no protocol (ALPN) that is spoken here");
    stage.balancer.stop();
}

#[test]
fn who_speaks_no_tls_or_stops_is_told_without_its_text() {
    let mut stage = stage("failures-text");
    for (said, counter, why) in [
        (
            &b"GET / HTTP/1.1\r\n"[..],
            "tls_refused_plain_http",
            "it sent an HTTP request in the clear",
        ),
        (b"\x1b[31mlb forged=1\n", "tls_refused_hello", "its first bytes are no TLS"),
        (&[22, 3, 1, 64, 1], "tls_refused_hello", "its ClientHello contradicts itself"),
        (&[22, 3, 1, 1, 0, 1], "tls_gone", "its connection ended in the middle of the handshake"),
    ] {
        assert_eq!(stage.says(said, counter), why);
    }
    let mut silent = connect(stage.at);
    silent.write_all(&[22, 3, 1, 1, 0, 1]).unwrap();
    assert_eq!(stage.told().why, "it took longer than tls.handshake_ms");
    // Whoever only looks whether somebody is here is nothing to speak of.
    let looker = connect(stage.at);
    wait_for("the connection", || (stage.counted("tls_refused_late") == 1).then_some(()));
    looker.shutdown(Shutdown::Both).unwrap();
    assert!(stage.hears_nothing());
    stage.balancer.stop();
}

#[test]
fn where_nobody_reads_the_lines_none_are_sent() {
    let mut stage = stage("failures-quiet");
    let quiet = &stage.balancer.plane.snapshots;
    let snapshot = lb::cluster::Snapshot { report_sessions: false, ..(*quiet.current()).clone() };
    quiet.publish(snapshot);
    stage.balancer.let_workers_turn();
    let mut user = connect(stage.at);
    user.write_all(b"SSH-2.0-x\r\n").unwrap();
    let _ = user.read_to_end(&mut Vec::new());
    assert_eq!(stage.counted("tls_refused_hello"), 1);
    assert!(stage.hears_nothing());
    stage.balancer.stop();
}
