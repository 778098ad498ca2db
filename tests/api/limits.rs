//! What one request may take: each service has limits of its own, at one door and on one connection.

use std::net::TcpListener;
use std::num::NonZeroU64;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use lb::cluster::Protocol;
use lb::cluster::ServiceId;
use lb::cluster::route::Host;
use lb::config::services::ServiceConfig;

use crate::harness::{Backend, Balancer};
use crate::wait::PATIENCE;

const SHORT: Duration = Duration::from_millis(150);
/// The named services in the order of the configuration.
const STRICT: ServiceId = ServiceId(3);
const LAX: ServiceId = ServiceId(4);

fn service(name: &str) -> ServiceConfig {
    ServiceConfig {
        hosts: vec![Host::parse(name).unwrap()],
        ..ServiceConfig::new(name, Protocol::Api)
    }
}

fn balancer(
    strict: impl FnOnce(&mut ServiceConfig),
    lax: impl FnOnce(&mut ServiceConfig),
) -> Balancer {
    Balancer::start(|config| {
        let mut services = [service("strict"), service("lax")];
        strict(&mut services[0]);
        lax(&mut services[1]);
        config.set_services(services.into());
    })
}

#[test]
fn the_limit_of_a_body_is_that_of_the_service_asked() {
    let mut balancer = Balancer::start(|config| {
        config.api.body_bytes = NonZeroU64::new(5);
        let (mut strict, mut lax) = (service("strict"), service("lax"));
        strict.body_bytes = Some(NonZeroU64::new(3));
        lax.body_bytes = Some(None);
        config.set_services(vec![strict, lax]);
    });
    let backend = Backend::named("it");
    let api = ServiceId::built_in(Protocol::Api);
    balancer.register_for(&[STRICT, LAX, api].map(|service| (service, backend.address)));
    // One connection: the limits of one request must not outlive it.
    let mut user = balancer.user();
    for (host, bytes, status) in [
        ("lax", 9, 200),
        ("strict", 3, 200),
        ("other", 5, 200),
        ("lax", 100, 200),
        ("strict", 4, 413),
    ] {
        let body = "x".repeat(bytes);
        user.send(format!(
            "PUT / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {bytes}\r\n\r\n{body}"
        ));
        assert_eq!(user.answer().status(), status, "{host} {bytes}");
    }
    let mut user = balancer.user();
    user.send("PUT / HTTP/1.1\r\nHost: other\r\nContent-Length: 6\r\n\r\n123456");
    assert_eq!(user.answer().status(), 413, "the global limit");
    balancer.stop();
}

/// A user whose request to the strict service has failed for lack of patience: whoever asked another
/// service before has waited longer than the strict one would have.
fn outwaits_the_strict(balancer: &Balancer) {
    let mut user = balancer.user();
    user.send("GET / HTTP/1.1\r\nHost: strict\r\n\r\n");
    assert_eq!(user.answer().status(), 504);
}

/// A backend that sends one part of its answer at once and the other when it is told to.
fn in_two_parts(first: &'static str, second: &'static str) -> (Backend, Sender<()>) {
    let (go, told) = channel();
    let told = Mutex::new(told);
    let backend = Backend::run(move |own, mut wire| {
        while own.request(&mut wire).is_some() {
            wire.write(first);
            told.lock().unwrap().recv_timeout(PATIENCE).unwrap();
            wire.write(second);
        }
    });
    (backend, go)
}

#[test]
fn the_patience_with_a_backend_is_that_of_the_service_asked() {
    let mut balancer = balancer(|strict| strict.answer = Some(SHORT), |_| ());
    let silent = Backend::run(|_, mut wire| drop(wire.rest()));
    let (late, go) = in_two_parts("", "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate");
    balancer.register_for(&[(STRICT, silent.address), (LAX, late.address)]);
    let mut user = balancer.user();
    for _ in 0..2 {
        user.send("GET / HTTP/1.1\r\nHost: lax\r\n\r\n");
        outwaits_the_strict(&balancer);
        go.send(()).unwrap();
        assert_eq!(user.answer().text(), "late");
        user.send("GET / HTTP/1.1\r\nHost: strict\r\n\r\n");
        assert_eq!(user.answer().status(), 504);
    }
    balancer.stop();
}

#[test]
fn a_stalled_body_is_given_the_time_of_the_service_asked() {
    let short =
        |strict: &mut ServiceConfig| (strict.body, strict.answer) = (Some(SHORT), Some(SHORT));
    let mut balancer = balancer(short, |_| ());
    let (backend, go) = in_two_parts("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf", "half");
    let silent = Backend::run(|_, mut wire| drop(wire.rest()));
    balancer.register_for(&[(LAX, backend.address), (STRICT, silent.address)]);
    let mut user = balancer.user();
    user.send("GET / HTTP/1.1\r\nHost: lax\r\n\r\n");
    outwaits_the_strict(&balancer);
    go.send(()).unwrap();
    assert_eq!(user.answer().text(), "halfhalf");
    balancer.register_for(&[(STRICT, backend.address)]);
    user.send("GET / HTTP/1.1\r\nHost: strict\r\n\r\n");
    assert!(user.try_answer(false).is_none(), "the response is cut");
    go.send(()).unwrap();
    balancer.stop();
}

#[test]
fn a_tunnel_may_be_idle_for_the_time_of_the_service_asked() {
    let mut balancer =
        balancer(|strict| strict.tunnel_idle = Some(SHORT), |lax| lax.body = Some(SHORT));
    let backend = Backend::run(|own, mut wire| {
        own.request(&mut wire);
        wire.write("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n");
        wire.rest();
    });
    balancer.register_for(&[STRICT, LAX].map(|service| (service, backend.address)));
    let mut users = ["strict", "lax"].map(|host| {
        let mut user = balancer.user();
        user.send(format!(
            "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
        ));
        assert_eq!(user.wire.head().unwrap().status(), 101, "{host}");
        user
    });
    users[0].ends();
    balancer.expect("sessions", 1, |it| it.sessions_active.get());
    balancer.stop();
}

#[test]
fn a_request_is_offered_to_as_many_backends_as_its_service_says() {
    let mut balancer = balancer(|strict| strict.retries = Some(0), |lax| lax.retries = Some(3));
    let refusing: Vec<_> =
        (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()).collect();
    let mut all = Vec::new();
    let good = Backend::named("good");
    for service in [STRICT, LAX] {
        all.extend(refusing.iter().map(|address| (service, *address)));
        all.push((service, good.address));
    }
    balancer.register_for(&all);
    let mut user = balancer.user();
    for (host, status) in [("strict", 502), ("lax", 200)] {
        user.send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(user.answer().status(), status, "{host}");
    }
    balancer.stop();
}
