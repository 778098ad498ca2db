//! Finding the service for an API request.

use divan::Bencher;
use lb::cluster::ServiceId;
use lb::cluster::route::{Claim, Host, Routes, is_ambiguous};

const HOSTS: u16 = 1_000;
const PATHS: [&str; 4] = ["", "/api", "/api/v2", "/static"];

/// A thousand hosts, each with four paths; every tenth host is a wildcard.
fn routes() -> Routes {
    let name = |host: u16| match host % 10 {
        0 => format!("*.h{host}.shops.example"),
        _ => format!("h{host}.shops.example"),
    };
    let claims = (0..HOSTS).flat_map(|host| {
        let parsed = Host::parse(&name(host)).expect("a host");
        PATHS.map(|path| Claim {
            host: parsed.clone(),
            path: path.into(),
            service: ServiceId(host),
        })
    });
    Routes::new(claims).expect("each claims something else")
}

fn find(bencher: Bencher, host: &str, path: &str) {
    let routes = routes();
    let ask = || routes.find(divan::black_box(host.as_bytes()), divan::black_box(path.as_bytes()));
    assert!(ask().is_some(), "somebody claims it");
    bencher.bench_local(ask);
}

/// A host by its name, and a path below a claimed one. Budget: 100 ns.
#[divan::bench]
fn exact(bencher: Bencher) {
    find(bencher, "H507.shops.example:8080", "/api/v2/users/1");
}

/// The same by a wildcard: the exact name is looked up in vain. Budget: 150 ns.
#[divan::bench]
fn wildcard(bencher: Bencher) {
    find(bencher, "www.h500.shops.example", "/api/v2/users/1");
}

/// What a door with paths looks at before it routes. Budget: 30 ns.
#[divan::bench]
fn ambiguity(bencher: Bencher) {
    bencher.bench_local(|| is_ambiguous(divan::black_box(b"/api/v2/users/1")));
}
