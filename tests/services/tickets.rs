//! Tickets whose keys come from a file that several balancers share.

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lb::cluster::Protocol;
use lb::config::Config;
use lb::config::services::ServiceConfig;
use rustls::HandshakeKind;

use crate::harness::Balancer;
use crate::tls_user::{Certificates, get, shake, user};

/// A balancer with an HTTPS door and a TCP service under TLS, and the tickets of this file.
fn balancer(certificates: &Certificates, tickets: Option<PathBuf>) -> Balancer {
    Balancer::start_with(|config: &mut Config| {
        let any = "127.0.0.1:0".parse().unwrap();
        config.listen.api_tls = Some(any);
        let mail = ServiceConfig::new("mail", Protocol::Tcp);
        config.set_services(vec![ServiceConfig { listen: vec![any], tls: true, ..mail }]);
        certificates.put(config);
        config.tls.ticket_file = tickets;
    })
}

fn keys(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| STANDARD.encode([*byte; 48]) + "\n").collect()
}

#[test]
fn a_user_resumes_at_whichever_balancer_has_the_keys() {
    let certificates = Certificates::new("tickets", &[&["a.example"]]);
    let file = certificates.write("tickets", &keys(&[1, 2, 3]));
    let client = certificates.client();
    let at = |balancer: &Balancer| balancer.plane.doors.api_tls().unwrap();
    let kind = |to| {
        let mut user = user(&client, "a.example", to);
        let kind = shake(&mut user).unwrap();
        // The answer comes after the tickets.
        assert!(get(&mut user, "a.example", "/").unwrap().starts_with("HTTP/1.1 503"));
        kind
    };
    let one = balancer(&certificates, Some(file.clone()));
    assert_eq!(kind(at(&one)), HandshakeKind::Full);
    let other = balancer(&certificates, Some(file.clone()));
    assert_eq!(kind(at(&other)), HandshakeKind::Resumed);
    // One that has the next file already, and one that has it not yet.
    let next = certificates.write("next", &keys(&[2, 3, 4]));
    let third = balancer(&certificates, Some(next));
    for (to, wanted) in [(&third, HandshakeKind::Resumed), (&one, HandshakeKind::Resumed)] {
        assert_eq!(kind(at(to)), wanted);
    }
    let stranger = balancer(&certificates, None);
    assert_eq!(kind(at(&stranger)), HandshakeKind::Full);
    // What was given for requests is good for nothing else.
    assert_eq!(kind(at(&one)), HandshakeKind::Full, "the ticket is the stranger's");
    assert_eq!(kind(at(&one)), HandshakeKind::Resumed);
    let mut mail = user(&client, "a.example", one.at("mail"));
    assert_eq!(shake(&mut mail).unwrap(), HandshakeKind::Full);
    [one, other, third, stranger].into_iter().for_each(Balancer::stop);
}
