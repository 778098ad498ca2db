//! Finding a session among many, and writing it to the table that others read.

use std::net::SocketAddr;

use divan::Bencher;
use lb::base::time::Now;
use lb::cluster::{BackendId, Protocol, ServiceId};
use lb::session::flows::{FlowHasher, FlowKey, Flows};
use lb::session::shards::Shard;

const FLOWS: u32 = 100_000;

fn client(number: u32) -> SocketAddr {
    let [_, a, b, c] = (number / 50_000).to_be_bytes();
    ([10, a, b, c], (number % 50_000) as u16 + 10_000).into()
}

/// The flow of a datagram among 100,000, each in turn, so that the cache does not help.
/// Budget: 200 ns.
#[divan::bench]
fn find_flow(bencher: Bencher) {
    let door: SocketAddr = ([192, 0, 2, 1], 8082).into();
    let hasher = FlowHasher::new((1, 2));
    let now = Now::from_nanos(1);
    let service = ServiceId::built_in(Protocol::Udp);
    let mut flows = Flows::new(FLOWS as usize, hasher, now);
    for number in 0..FLOWS {
        let key = FlowKey::new(client(number), door);
        flows.open(hasher.flow(&key), key, service, number, now).expect("room for every flow");
    }
    let mut number = 0u32;
    bencher.bench_local(|| {
        number = (number + 7_919) % FLOWS;
        let key = FlowKey::new(client(number), door);
        flows.find(hasher.flow(&key), &key)
    });
}

/// A session enters the table, is given its backend, counts bytes and leaves. Budget: 75 ns.
#[divan::bench]
fn table_entry(bencher: Bencher) {
    let (mut writer, _shard) = Shard::new(0, 10_000);
    let user = client(1);
    let now = Now::from_nanos(1);
    bencher.bench_local(|| {
        let place =
            writer.open(ServiceId::built_in(Protocol::Tcp), user, now).expect("a free place");
        writer.set_backend(&place, BackendId(1));
        writer.moved(&place, 64, 64, now);
        writer.close(place);
    });
}
