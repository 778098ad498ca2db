//! Keys, hashes and timers of the flow table.

use super::*;

const IDLE: Duration = Duration::from_secs(60);
const SERVICE: ServiceId = ServiceId(4);
const LOCAL: &str = "192.0.2.1:53";

fn at(ms: u64) -> Now {
    Now::from_nanos(ms * 1_000_000)
}

fn key(client: &str) -> FlowKey {
    FlowKey::new(client.parse().unwrap(), LOCAL.parse().unwrap())
}

fn table(capacity: usize) -> Flows<u32> {
    let mut flows = Flows::new(capacity, FlowHasher::new((1, 2)), at(0));
    flows.set_idle(SERVICE, IDLE);
    flows
}

fn open(flows: &mut Flows<u32>, key: FlowKey, state: u32, now: Now) -> Result<u32, u32> {
    let hash = flows.hasher.flow(&key);
    flows.open(hash, key, SERVICE, state, now)
}

fn find(flows: &Flows<u32>, key: FlowKey) -> Option<u32> {
    flows.find(flows.hasher.flow(&key), &key)
}

fn idle(flows: &mut Flows<u32>, now: Now) -> Vec<u32> {
    let mut looks = u32::MAX;
    std::iter::from_fn(|| flows.next_due(now, &mut looks))
        .filter(|(_, due)| *due == Due::Idle)
        .map(|(place, _)| place)
        .collect::<Vec<u32>>()
        .into_iter()
        .filter_map(|place| flows.close(place).map(|flow| flow.state))
        .collect()
}

#[test]
fn every_flow_is_found_when_the_index_has_grown() {
    let count = 3 * INDEX_AT_START as u32;
    let mut flows = table(count as usize);
    let keys: Vec<FlowKey> = (0..count)
        .map(|number| {
            let client = SocketAddr::from((number.to_be_bytes(), 9));
            FlowKey::new(client, LOCAL.parse().unwrap())
        })
        .collect();
    for (number, key) in keys.iter().enumerate() {
        open(&mut flows, *key, number as u32, at(0)).unwrap();
    }
    for (number, key) in keys.iter().enumerate() {
        let place = find(&flows, *key).unwrap();
        assert_eq!(flows.get(place).map(|flow| flow.state), Some(number as u32));
    }
    assert_eq!(find(&flows, key("10.0.0.1:10")), None);
}

#[test]
fn a_key_gives_back_the_addresses_that_it_was_made_of() {
    for (client, local) in [
        ("198.51.100.7:1", "192.0.2.1:53"),
        ("[2001:db8::7]:65535", "[2001:db8::1]:53"),
        ("[fe80::7%3]:9", "[fe80::1%3]:53"),
        ("[2001:db8::7]:9", "[fe80::1%3]:53"),
        ("[fe80::7%3]:9", "[2001:db8::1]:53"),
        ("[2001:db8::7]:9", "[::%3]:53"),
        ("192.0.2.7:9", "0.0.0.0:53"),
    ] {
        let (client, local) = (client.parse().unwrap(), local.parse().unwrap());
        let key = FlowKey::new(client, local);
        assert_eq!((key.client(), key.local()), (client, local));
    }
}

#[test]
fn every_part_of_a_key_tells_flows_apart_and_a_mapped_address_does_not() {
    let base = key("198.51.100.7:1000");
    assert_eq!(key("[::ffff:198.51.100.7]:1000"), base);
    let client = "198.51.100.7:1000".parse().unwrap();
    let others = [
        key("198.51.100.8:1000"),
        key("198.51.100.7:1001"),
        FlowKey::new(client, "192.0.2.2:53".parse().unwrap()),
        FlowKey::new(client, "192.0.2.1:54".parse().unwrap()),
    ];
    let hasher = FlowHasher::new((1, 2));
    for other in others {
        assert_ne!(other, base);
        assert_ne!(hasher.flow(&other), hasher.flow(&base));
    }
    assert_ne!(key("[fe80::1%2]:1"), key("[fe80::1%3]:1"));
    let by = |local: &str| FlowKey::new("[2001:db8::7]:9".parse().unwrap(), local.parse().unwrap());
    assert_ne!(by("[fe80::1%2]:53"), by("[fe80::1%3]:53"));
}

#[test]
fn the_hash_depends_on_its_key() {
    let flow = key("198.51.100.7:1000");
    let hashes = [(1, 2), (1, 3), (2, 2)].map(|key| FlowHasher::new(key).flow(&flow));
    assert!(hashes[0] != hashes[1] && hashes[0] != hashes[2]);
}

#[test]
fn a_full_table_gives_the_state_back_and_takes_another_after_a_close() {
    let mut flows = table(2);
    let first = open(&mut flows, key("198.51.100.1:1"), 1, at(0)).unwrap();
    open(&mut flows, key("198.51.100.1:2"), 2, at(0)).unwrap();
    assert_eq!(flows.vacant(), None);
    assert_eq!(open(&mut flows, key("198.51.100.1:3"), 3, at(0)), Err(3));
    assert_eq!(flows.close(first).unwrap().state, 1);
    assert!(flows.close(first).is_none());
    assert_eq!(find(&flows, key("198.51.100.1:1")), None);
    assert_eq!(flows.vacant(), Some(first));
    assert_eq!(open(&mut flows, key("198.51.100.1:3"), 3, at(0)), Ok(first));
    assert_eq!(flows.len(), 2);
}

#[test]
fn a_flow_ends_when_idle_and_every_datagram_puts_it_off() {
    let mut flows = table(10);
    let kept = open(&mut flows, key("198.51.100.1:1"), 1, at(0)).unwrap();
    open(&mut flows, key("198.51.100.1:2"), 2, at(0)).unwrap();
    flows.get_mut(kept).unwrap().last_seen = at(50_000);
    assert_eq!(idle(&mut flows, at(59_999)), [0u32; 0]);
    assert_eq!(idle(&mut flows, at(60_020)), [2]);
    assert_eq!(idle(&mut flows, at(109_999)), [0u32; 0]);
    assert_eq!(idle(&mut flows, at(110_020)), [1]);
    assert!(flows.is_empty() && flows.next_deadline().is_none());
}

#[test]
fn another_idle_time_counts_from_the_next_look() {
    let mut flows = table(10);
    open(&mut flows, key("198.51.100.1:1"), 1, at(0)).unwrap();
    flows.set_idle(SERVICE, Duration::from_secs(90));
    assert_eq!(idle(&mut flows, at(61_000)), [0u32; 0]);
    assert_eq!(idle(&mut flows, at(90_020)), [1]);
}

#[test]
fn each_flow_ends_after_the_idle_time_of_its_service_but_no_later_than_the_bound() {
    let mut flows = table(10);
    let other = ServiceId(2);
    flows.set_idle(other, Duration::from_secs(5));
    open(&mut flows, key("198.51.100.1:1"), 1, at(0)).unwrap();
    for (service, number) in [(other, 2), (ServiceId(9), 3)] {
        let key = key(&format!("198.51.100.1:{number}"));
        flows.open(flows.hasher.flow(&key), key, service, number, at(0)).unwrap();
    }
    assert_eq!(idle(&mut flows, at(4_990)), [0u32; 0]);
    assert_eq!(idle(&mut flows, at(5_020)), [2]);
    assert_eq!(idle(&mut flows, at(60_020)), [1]);
    assert_eq!(idle(&mut flows, at(1 << 40)), [0u32; 0], "a service without an idle time");
    let bounded = open(&mut flows, key("198.51.100.1:1"), 1, at(1 << 40)).unwrap();
    flows.set_idle_max(Duration::from_secs(1));
    flows.look_anew(bounded);
    assert_eq!(idle(&mut flows, at((1 << 40) + 1_020)), [1]);
}

#[test]
fn a_shorter_idle_time_counts_at_once_for_a_flow_that_is_looked_at_anew() {
    let mut flows = table(10);
    let seen = open(&mut flows, key("198.51.100.1:1"), 1, at(0)).unwrap();
    open(&mut flows, key("198.51.100.1:2"), 2, at(0)).unwrap();
    flows.set_idle(SERVICE, Duration::from_secs(1));
    flows.look_anew(seen);
    flows.look_anew(9);
    assert_eq!(idle(&mut flows, at(999)), [0u32; 0]);
    assert_eq!(idle(&mut flows, at(1_020)), [1]);
    assert_eq!(idle(&mut flows, at(2_020)), [2], "when its check is due anyway");
}

#[test]
fn looking_for_idle_flows_stops_where_the_budget_ends() {
    let mut flows = table(10);
    for port in 1..=5 {
        let client = SocketAddr::from(([198, 51, 100, 1], port));
        let key = FlowKey::new(client, LOCAL.parse().unwrap());
        open(&mut flows, key, u32::from(port), at(0)).unwrap();
    }
    let now = at(61_000);
    let mut looks = 2;
    let mut ended = 0;
    while let Some((place, _)) = flows.next_due(now, &mut looks) {
        flows.close(place);
        ended += 1;
    }
    assert_eq!((ended, looks, flows.len()), (2, 0, 3));
    assert!(flows.next_deadline().unwrap() <= now, "the rest is due at once");
    assert_eq!(idle(&mut flows, now).len(), 3);
}

#[test]
fn a_flow_that_is_idle_and_not_closed_is_named_again() {
    let mut flows = table(1);
    open(&mut flows, key("198.51.100.1:1"), 1, at(0)).unwrap();
    let mut looks = 10;
    let named = Some((0, Due::Idle));
    assert_eq!(flows.next_due(at(61_000), &mut looks), named);
    assert_eq!(flows.next_due(at(61_000), &mut looks), None);
    assert_eq!(flows.next_due(at(62_000), &mut looks), named);
}

#[test]
fn a_flow_is_quiet_when_nothing_passes_and_later_when_it_waits_for_an_answer() {
    let mut flows = table(10);
    let answered = open(&mut flows, key("198.51.100.1:1"), 1, at(0)).unwrap();
    let waiting = open(&mut flows, key("198.51.100.1:2"), 2, at(0)).unwrap();
    flows.get_mut(waiting).unwrap().awaiting = true;
    let due = |flows: &mut Flows<u32>, ms: u64| -> Vec<(u32, Due)> {
        let mut looks = u32::MAX;
        std::iter::from_fn(|| flows.next_due(at(ms), &mut looks)).collect()
    };
    assert_eq!(due(&mut flows, 1_999), []);
    assert_eq!(due(&mut flows, 2_020), [(answered, Due::Quiet)]);
    assert!(flows.get(answered).unwrap().is_quiet() && !flows.get(waiting).unwrap().is_quiet());
    assert_eq!(due(&mut flows, 4_999), []);
    flows.get_mut(answered).unwrap().last_seen = at(5_000);
    flows.stir(answered);
    assert_eq!(due(&mut flows, 6_999), [(waiting, Due::Quiet)]);
    assert_eq!(due(&mut flows, 7_020), [(answered, Due::Quiet)]);
    assert_eq!(due(&mut flows, 60_020), [(waiting, Due::Idle)]);
    flows.close(waiting);
    assert_eq!(due(&mut flows, 65_020), [(answered, Due::Idle)]);
}

#[test]
fn a_datagram_that_passes_keeps_the_flow_and_tells_what_it_was() {
    let mut flows = table(10);
    let place = open(&mut flows, key("198.51.100.1:1"), 1, at(0)).unwrap();
    let pass = |flows: &mut Flows<u32>, ms: u64| {
        flows.pass(place, at(ms)).map(|(flow, before)| (flow.last_seen, flow.is_quiet(), before))
    };
    assert_eq!(pass(&mut flows, 1_999), Some((at(1_999), false, Before::InUse)));
    assert_eq!(pass(&mut flows, 3_999), Some((at(3_999), false, Before::Lapsed)));
    flows.get_mut(place).unwrap().awaiting = true;
    assert_eq!(pass(&mut flows, 8_998), Some((at(8_998), false, Before::InUse)));
    assert_eq!(flows.next_due(at(14_020), &mut 10), Some((place, Due::Quiet)));
    assert_eq!(pass(&mut flows, 14_020), Some((at(14_020), false, Before::Quiet)));
    assert_eq!(flows.next_due(at(19_019), &mut 10), None, "its timer is set anew");
    assert_eq!(flows.next_due(at(19_040), &mut 10), Some((place, Due::Quiet)));
    flows.close(place);
    assert_eq!(pass(&mut flows, 20_000), None);
}

#[test]
fn a_flow_whose_answer_came_late_is_quiet_no_later_than_any_other() {
    let mut flows = table(10);
    let place = open(&mut flows, key("198.51.100.1:1"), 1, at(0)).unwrap();
    flows.get_mut(place).unwrap().awaiting = true;
    let due = |flows: &mut Flows<u32>, ms: u64| flows.next_due(at(ms), &mut 10);
    assert_eq!(due(&mut flows, 2_020), None, "its answer may come for 5 s");
    flows.get_mut(place).unwrap().last_seen = at(2_100);
    flows.answered(place);
    assert_eq!(due(&mut flows, 4_099), None);
    assert_eq!(due(&mut flows, 4_120), Some((place, Due::Quiet)));
}
