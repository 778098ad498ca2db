//! Requests that a service leaves to another while nobody of it serves.

use std::net::{SocketAddr, TcpListener};

use lb::cluster::route::Host;
use lb::cluster::{FALLBACKS_MAX, Protocol, ServiceId, Snapshot, Standing};
use lb::config::services::ServiceConfig;

use crate::harness::{Backend, Balancer, Message, User};

/// The named services in the order of `balancer`.
const SHOP: ServiceId = ServiceId(3);
const OLD: ServiceId = ServiceId(4);
const PAGE: ServiceId = ServiceId(5);
const CLOSED: ServiceId = ServiceId(6);

fn service(name: &str, fallback: &str) -> ServiceConfig {
    ServiceConfig {
        hosts: vec![Host::parse(&format!("{name}.example")).unwrap()],
        fallback: (!fallback.is_empty()).then(|| fallback.to_owned()),
        ..ServiceConfig::new(name, Protocol::Api)
    }
}

/// `shop` falls back to `old` and that to `page`; `closed` is under maintenance.
fn balancer() -> Balancer {
    Balancer::start(|config| {
        let mut closed = service("closed", "page");
        closed.maintenance = true;
        let mut page = service("page", "");
        page.retries = Some(0);
        config.set_services(vec![service("shop", "old"), service("old", "page"), page, closed]);
    })
}

fn get(user: &mut User, host: &str) -> Message {
    user.send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    user.answer()
}

fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[test]
fn a_fallback_serves_while_nobody_else_does_and_no_longer() {
    use Standing::{Draining, Failing, Serving};
    let mut balancer = balancer();
    let [shop, old, page] = ["shop", "old", "page"].map(Backend::named);
    let mut user = balancer.user();
    for (backends, serves, by) in [
        (&[(SHOP, shop.address, Serving), (OLD, old.address, Serving)][..], "shop", SHOP),
        (&[(SHOP, shop.address, Failing), (OLD, old.address, Serving)], "old", OLD),
        (&[(SHOP, shop.address, Draining), (OLD, old.address, Failing)], "page", PAGE),
        (&[], "page", PAGE),
        (&[(SHOP, shop.address, Serving)], "shop", SHOP),
    ] {
        let page = (PAGE, page.address, Serving);
        balancer.register_as(&[backends, &[page]].concat());
        assert_eq!(get(&mut user, "shop.example").text(), serves, "{backends:?}");
        let line = balancer.line();
        let asked = (by != SHOP).then_some(SHOP);
        assert_eq!((line.service, line.asked, line.host()), (Some(by), asked, "shop.example"));
    }
    assert_eq!(balancer.count(|it| it.api_fallbacks.get()), 1 + 2 + 2);
    assert_eq!(balancer.count(|it| it.users_refused_no_backend.get()), 0, "nobody was refused");
    balancer.stop();
}

#[test]
fn a_service_under_maintenance_leaves_its_requests_to_its_fallback() {
    let mut balancer = balancer();
    let [closed, page] = ["closed", "page"].map(Backend::named);
    balancer.register_for(&[(CLOSED, closed.address), (PAGE, page.address)]);
    let mut user = balancer.user();
    assert_eq!(get(&mut user, "closed.example").text(), "page");
    assert_eq!(balancer.count(|it| it.api_maintenance.get()), 0);
    balancer.register_for(&[(CLOSED, closed.address)]);
    let answer = get(&mut user, "closed.example");
    assert_eq!((answer.status(), answer.one("retry-after")), (503, Some("5")));
    assert!(answer.text().contains("no backend is registered"), "{}", answer.text());
    assert_eq!(balancer.count(|it| it.users_refused_no_backend.get()), 1);
    assert_eq!(closed.connections(), 0);
    balancer.stop();
}

#[test]
fn a_request_that_no_backend_could_be_reached_for_is_left_to_the_fallback_whole() {
    let mut balancer = balancer();
    let page = Backend::named("page");
    balancer.register_for(&[(SHOP, nobody()), (SHOP, nobody()), (PAGE, page.address)]);
    let mut user = balancer.user();
    user.send("PUT /x HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 4\r\n\r\nbody");
    assert_eq!(user.answer().text(), "page");
    let [request] = &page.requests()[..] else { panic!("it is asked once") };
    assert_eq!((request.path(), request.one("host")), ("/x", Some("shop.example")));
    assert_eq!(request.text(), "body");
    let line = balancer.line();
    assert_eq!((line.service, line.asked), (Some(PAGE), Some(SHOP)));
    // A fallback that cannot be reached either is the last.
    balancer.register_for(&[(SHOP, nobody()), (PAGE, nobody())]);
    assert_eq!(get(&mut user, "shop.example").status(), 502);
    assert_eq!(balancer.count(|it| it.users_refused_unreachable.get()), 1, "refused once");
    balancer.stop();
}

#[test]
fn a_circle_of_fallbacks_ends() {
    let mut balancer = balancer();
    // No configuration is read that says so.
    let mut snapshot = Snapshot::clone(&balancer.plane.snapshots.current());
    for service in snapshot.services.iter_mut().filter(|it| it.id == PAGE) {
        service.terms.fallback = Some(SHOP);
    }
    balancer.plane.snapshots.publish(snapshot);
    balancer.register_for(&[]);
    let mut user = balancer.user();
    assert_eq!(get(&mut user, "shop.example").status(), 503);
    assert_eq!(balancer.count(|it| it.api_fallbacks.get()), u64::from(FALLBACKS_MAX));
    balancer.stop();
}
