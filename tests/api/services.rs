//! Several services behind one door: each request reaches a backend of the service that claims it.

use lb::cluster::route::Host;
use lb::cluster::{Protocol, ServiceId, Standing};
use lb::config::services::{CheckKind, ServiceConfig};

use crate::harness::{Backend, Balancer, Message, User};

const API: ServiceId = ServiceId::built_in(Protocol::Api);
/// The named services in the order of `balancer`.
const SHOP: ServiceId = ServiceId(3);
const CART: ServiceId = ServiceId(4);
const BLOG: ServiceId = ServiceId(5);
const CLOSED: ServiceId = ServiceId(6);

fn service(name: &str, hosts: &[&str], paths: &[&str]) -> ServiceConfig {
    ServiceConfig {
        hosts: hosts.iter().map(|host| Host::parse(host).unwrap()).collect(),
        paths: paths.iter().map(|path| path.to_string()).collect(),
        ..ServiceConfig::new(name, Protocol::Api)
    }
}

fn balancer() -> Balancer {
    let mut closed = service("closed", &["closed.example"], &[]);
    closed.maintenance = true;
    Balancer::start(|config| {
        config.set_services(vec![
            service("shop", &["shop.example", "*.shop.example"], &[]),
            service("cart", &["shop.example"], &["/cart"]),
            service("blog", &["blog.example"], &["/posts"]),
            closed,
        ]);
    })
}

fn get(user: &mut User, host: &str, path: &str) -> Message {
    user.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    user.answer()
}

#[test]
fn requests_reach_a_backend_of_the_service_that_claims_them() {
    let mut balancer = balancer();
    let of = [(SHOP, "shop"), (SHOP, "shop"), (CART, "cart"), (BLOG, "blog"), (API, "api")];
    let backends = of.map(|(service, name)| (service, Backend::named(name)));
    let registered: Vec<_> = backends.iter().map(|(id, backend)| (*id, backend.address)).collect();
    balancer.register_for(&registered);
    // One connection for all of them, so that each request has to be routed anew.
    let mut user = balancer.user();
    for _ in 0..3 {
        for (host, path, name) in [
            ("shop.example", "/", "shop"),
            ("SHOP.example.:80", "/cart/1?a=b", "cart"),
            ("shop.example", "/cartoon", "shop"),
            ("shop.example", "/?/cart", "shop"),
            ("a.shop.example", "/cart", "shop"),
            ("blog.example", "/posts", "blog"),
            ("other.example", "/posts", "api"),
        ] {
            assert_eq!(get(&mut user, host, path).text(), name, "{host} {path}");
        }
    }
    let asked = backends.each_ref().map(|(_, backend)| backend.requests().len());
    assert_eq!(asked, [6, 6, 3, 3, 3], "each service in its own turn");
    let connections = backends.each_ref().map(|(_, backend)| backend.connections());
    assert_eq!(connections, [1; 5], "each is kept for the next request of its service");
    balancer.stop();
}

#[test]
fn what_nobody_serves_is_told_apart_and_logged() {
    let mut balancer = balancer();
    let shop = Backend::named("shop");
    balancer.register_for(&[(SHOP, shop.address)]);
    let mut user = balancer.user();
    for (host, path, service, status, why) in [
        ("blog.example", "/", None, 404, "no service has this host and path"),
        ("blog.example", "/posts", Some(BLOG), 503, "no backend is registered"),
        ("closed.example", "/", Some(CLOSED), 503, "the service is under maintenance"),
        ("shop.example", "/../cart", None, 400, "the path can be read in more than one way"),
    ] {
        let answer = get(&mut user, host, path);
        assert_eq!(answer.status(), status, "{host} {path}");
        assert!(answer.text().contains(why), "{}", answer.text());
        let wanted = (status == 503).then_some("5");
        assert_eq!(answer.one("retry-after"), wanted, "{host} {path}");
        let line = balancer.line();
        assert_eq!((line.request(), line.status), (("GET", path), status));
        assert_eq!(line.fault, Some(why));
        assert_eq!((line.host(), line.service), (host, service));
    }
    user.ends();
    assert_eq!(balancer.count(|it| it.api_unclaimed.get()), 1);
    assert_eq!(balancer.count(|it| it.api_maintenance.get()), 1);
    assert_eq!(balancer.count(|it| it.users_refused_no_backend.get()), 1);
    assert_eq!(balancer.count(|it| it.api_refused.get()), 2);
    assert_eq!(balancer.count(|it| it.api_failed.get()), 2);
    assert_eq!(shop.connections(), 0);
    balancer.stop();
}

#[test]
fn a_service_with_a_door_of_its_own_is_reached_there_alone() {
    let mut balancer = Balancer::start(|config| {
        let mut admin = service("admin", &["admin.example"], &[]);
        admin.listen = vec!["127.0.0.1:0".parse().unwrap()];
        config.set_services(vec![admin]);
    });
    let [admin, other] = ["admin", "other"].map(Backend::named);
    balancer.register_for(&[(ServiceId(3), admin.address), (API, other.address)]);
    let door = balancer.plane.doors.open().iter().find(|door| door.service == ServiceId(3));
    let mut user = User::connect(door.expect("it is open").address);
    assert_eq!(get(&mut user, "admin.example", "/").text(), "admin");
    assert_eq!(get(&mut user, "other.example", "/").status(), 404);
    let mut user = balancer.user();
    assert_eq!(get(&mut user, "admin.example", "/").text(), "other", "it claims nothing here");
    balancer.stop();
}

#[test]
fn a_refusal_says_why_nobody_serves() {
    use Standing::{Draining, Failing, Serving};
    let mut balancer = Balancer::start(|config| {
        let mut checked = service("checked", &["checked.example"], &[]);
        checked.check.kind = CheckKind::Tcp;
        config.set_services(vec![checked]);
    });
    let backend = Backend::named("it");
    let mut user = balancer.user();
    for (standings, said) in [
        (&[][..], "no backend is registered"),
        (&[Failing, Failing], "every backend fails its check"),
        (&[Draining], "every backend is draining"),
        (&[Failing, Draining], "every backend fails its check or is draining"),
        (&[Failing, Serving], "it"),
    ] {
        let backends: Vec<_> =
            standings.iter().map(|standing| (SHOP, backend.address, *standing)).collect();
        balancer.register_as(&backends);
        let answer = get(&mut user, "checked.example", "/");
        assert!(answer.text().contains(said), "{standings:?}: {}", answer.text());
        let wanted = (answer.status() == 503).then_some("5");
        assert_eq!(answer.one("retry-after"), wanted, "{standings:?}");
        let line = balancer.line();
        assert_eq!(line.service, Some(SHOP));
        assert_eq!(line.fault, (answer.status() == 503).then_some(said));
    }
    balancer.stop();
}

#[test]
fn a_host_is_kept_for_the_log_as_far_as_there_is_room() {
    let mut balancer = balancer();
    let long = format!("{}.example", "a".repeat(60));
    let mut user = balancer.user();
    assert_eq!(get(&mut user, &long, &format!("/{}", "b".repeat(2000))).status(), 503);
    let line = balancer.line();
    assert_eq!(line.host(), &long[..64]);
    assert_eq!(line.request(), ("GET", &*format!("/{}", "b".repeat(251))));
    user.send("GET / HTTP/1.0\r\n\r\n");
    assert_eq!(user.answer().status(), 503);
    let line = balancer.line();
    assert_eq!((line.host(), line.request()), ("", ("GET", "/")));
    balancer.stop();
}
