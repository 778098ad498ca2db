//! What the hub makes of what others say, with one other balancer, or two, and a store that the test plays.

use super::super::changes::tests::{TCP, UNCONNECTED, address, at, hub, join, standings, turn};
use super::*;
use crate::cluster::Protocol;
use crate::cluster::hash_key::HashKey;
use crate::cluster::registry::{DrainedBy, Lasts};
use crate::cluster::share::event::Row;
use crate::cluster::share::{parting, value};
use crate::config::Config;
use crate::control::mailbox::Mailbox;
use crate::worker::link::WorkerEnd;

fn place(protocol: Protocol) -> Place {
    Place { service: "tcp".into(), protocol, address: address(80) }
}

fn other(process: u32) -> NodeId {
    NodeId::new("b", process)
}

/// A hub in a cluster whose store has been read, and the one worker's end.
fn member() -> (Hub, WorkerEnd) {
    let (mut hub, worker) = hub(Config::default());
    let sharing = Sharing::new(Membership::of_test("a", 1), Vec::new(), at(0));
    hub.join_cluster(sharing, at(0));
    hub.tick_cluster(at(0));
    hub.heard_from_store(0, Event::Opened { store: 1, revision: 1 }, at(0));
    hub.heard_from_store(0, Event::Listed { revision: 1, rows: vec![] }, at(0));
    (hub, worker)
}

fn put(hub: &mut Hub, key: String, value: String, revision: i64, ms: u64) {
    let puts = vec![Row { key, value, revision }];
    hub.heard_from_store(0, Event::Changed { revision, puts, deletes: vec![] }, at(ms));
}

/// Another balancer says this of the backend at port 80.
fn says(hub: &mut Hub, process: u32, offer: &Offer, revision: i64, ms: u64) {
    let prefix = hub.sharing.as_ref().unwrap().share.prefix().clone();
    let key = prefix.back(&other(process), &place(Protocol::Tcp));
    put(hub, key, value::write_back(revision as u64, offer), revision, ms);
}

/// Another balancer says this of itself.
fn reports(hub: &mut Hub, process: u32, report: &NodeReport, revision: i64, ms: u64) {
    let prefix = hub.sharing.as_ref().unwrap().share.prefix().clone();
    let key = prefix.node(&other(process));
    put(hub, key, value::write_node(revision as u64, report), revision, ms);
}

fn draining(by: DrainedBy, number: u64) -> Offer {
    Offer::plain().with(State::Draining(Parting { by, number, lasts: None }))
}

fn drains(ours: u64, counts: (u64, u64)) -> NodeReport {
    let drains = [(parting(&NodeId::new("a", 1), ours), counts)].into();
    NodeReport { state: "serving".to_owned(), drains, ..NodeReport::default() }
}

/// The workers have heard of all.
fn settle(hub: &mut Hub, worker: &WorkerEnd) {
    hub.publish();
    turn(worker);
}

fn drain_here(hub: &mut Hub, ms: u64) -> BackendId {
    let backend = hub.apply(join(UNCONNECTED, TCP, 80), at(ms)).unwrap().backend.unwrap();
    let (service, address, lasts) = (TCP, address(80), Lasts::Never);
    hub.apply(Change::Drain { source: UNCONNECTED, service, address, lasts }, at(ms)).unwrap();
    backend
}

#[test]
fn a_start_waits_for_the_registry_but_not_for_long() {
    let (mut hub, _worker) = super::super::tests::hub(Config::default());
    let at = |ms: u64| hub.started.plus(Duration::from_millis(ms));
    let [early, late] = [at(1_999), at(2_000)];
    assert!(!hub.awaits_cluster(early), "it is in no cluster");
    let membership = Membership::of_test("a", 2);
    hub.sharing = Some(Box::new(Sharing::new(membership, Vec::new(), early)));
    assert!(hub.awaits_cluster(early) && !hub.awaits_cluster(late));
}

#[test]
fn a_drain_waits_for_a_balancer_that_the_store_has_forgotten() {
    let (mut hub, worker) = member();
    reports(&mut hub, 2, &NodeReport::default(), 2, 1);
    let backend = drain_here(&mut hub, 2);
    settle(&mut hub, &worker);
    let prefix = hub.sharing.as_ref().unwrap().share.prefix().clone();
    let deletes = vec![(prefix.node(&other(2)), 3)];
    hub.heard_from_store(0, Event::Changed { revision: 3, puts: vec![], deletes }, at(3));
    hub.tick(at(4));
    assert!(hub.registry.get(backend).is_some(), "its sessions there may go on");
    reports(&mut hub, 2, &drains(1, (0, 0)), 4, 5);
    hub.tick(at(6));
    assert!(hub.registry.get(backend).is_none());
}

#[test]
fn a_drain_does_not_wait_for_a_process_that_another_has_succeeded() {
    for is_forgotten in [false, true] {
        let (mut hub, worker) = member();
        reports(&mut hub, 2, &NodeReport::default(), 2, 1);
        let backend = drain_here(&mut hub, 2);
        settle(&mut hub, &worker);
        hub.tick(at(3));
        assert!(hub.registry.get(backend).is_some(), "it has yet to say what it has");
        let state = "succeeded".to_owned();
        reports(&mut hub, 2, &NodeReport { state, ..NodeReport::default() }, 3, 4);
        if is_forgotten {
            let key = hub.sharing.as_ref().unwrap().share.prefix().node(&other(2));
            let deletes = vec![(key, 4)];
            hub.heard_from_store(0, Event::Changed { revision: 4, puts: vec![], deletes }, at(5));
        }
        hub.tick(at(6));
        assert!(hub.registry.get(backend).is_none(), "forgotten: {is_forgotten}");
    }
}

#[tokio::test]
async fn the_owner_hears_that_its_drain_is_over_though_another_still_serves_the_backend() {
    let (mut hub, worker) = member();
    let mailbox = Rc::new(Mailbox::default());
    let source = hub.welcome(address(9), Rc::clone(&mailbox), at(1));
    let backend = hub.apply(join(source, TCP, 80), at(1)).unwrap().backend.unwrap();
    let (service, address, lasts) = (TCP, address(80), Lasts::Never);
    hub.apply(Change::Drain { source, service, address, lasts }, at(1)).unwrap();
    says(&mut hub, 2, &draining(DrainedBy::Owner, 4), 2, 1);
    settle(&mut hub, &worker);
    hub.tick(at(2));
    assert_eq!(hub.registry.get(backend).unwrap().source, Source::Cluster);
    let heard = tokio::time::timeout(Duration::from_secs(5), mailbox.next()).await;
    let heard = String::from_utf8(heard.expect("it is told").unwrap()).unwrap();
    assert!(heard.contains(r#""event":"drained""#), "{heard}");
}

#[test]
fn a_process_that_is_succeeded_says_so_last() {
    let (mut hub, _worker) = member();
    hub.heard_from_store(0, Event::Granted { lease: 7 }, at(1));
    hub.tick_cluster(at(2));
    let written = hub.sharing.as_mut().unwrap().commands();
    let written = written.into_iter().find_map(|command| match command {
        Command::Write { mut ops, .. } => ops.pop(),
        _ => None,
    });
    let Some(event::Op::Put { key, value }) = written else { panic!("{written:?}") };
    hub.heard_from_store(0, Event::Written { revision: 2 }, at(3));
    put(&mut hub, key, value, 2, 3);
    assert!(hub.sharing.as_ref().unwrap().has_said_all());
    hub.hand_over(at(500));
    let sharing = hub.sharing.as_mut().unwrap();
    assert!(!sharing.has_said_all());
    let said = format!("{:?}", sharing.commands());
    assert!(said.contains("succeeded"), "{said}");
}

#[test]
fn each_of_two_drains_of_one_backend_is_reported_on() {
    let (mut hub, worker) = member();
    says(&mut hub, 2, &draining(DrainedBy::Operator, 1), 2, 1);
    says(&mut hub, 3, &draining(DrainedBy::Operator, 7), 3, 1);
    let slot = usize::from(hub.registry.find(TCP, address(80)).unwrap().backend.slot);
    worker.metrics.backends[slot].active.set(3);
    settle(&mut hub, &worker);
    let reported = hub.report().unwrap().drains;
    let wanted = [(parting(&other(2), 1), (3, 0)), (parting(&other(3), 7), (3, 0))];
    assert_eq!(reported, wanted.into());
    says(&mut hub, 2, &Offer::plain(), 4, 2);
    says(&mut hub, 3, &draining(DrainedBy::Owner, 8), 5, 3);
    says(&mut hub, 2, &Offer::plain(), 6, 4);
    assert_eq!(standings(&mut hub), [(80, Standing::Serving)], "it has come back elsewhere");
    let reported = hub.report().unwrap().drains;
    assert_eq!(reported, [(parting(&other(3), 8), (0, 0))].into(), "nobody is waited for");
}

#[test]
fn a_drain_elsewhere_is_reported_on_after_one_here_has_ended() {
    let (mut hub, worker) = member();
    says(&mut hub, 2, &draining(DrainedBy::Operator, 4), 2, 1);
    reports(&mut hub, 2, &drains(1, (0, 0)), 3, 1);
    let backend = drain_here(&mut hub, 2);
    settle(&mut hub, &worker);
    hub.tick(at(3));
    assert_eq!(hub.registry.get(backend).unwrap().source, Source::Cluster, "it has left here");
    hub.tick_cluster(at(1_100));
    settle(&mut hub, &worker);
    let reported = hub.report().unwrap().drains;
    assert_eq!(reported, [(parting(&other(2), 4), (0, 0))].into());
}

#[test]
fn what_another_balancer_counts_overflows_nothing() {
    let (mut hub, worker) = member();
    let backend = drain_here(&mut hub, 1);
    let slot = usize::from(hub.registry.get(backend).unwrap().backend.slot);
    worker.metrics.backends[slot].active.set(1);
    reports(&mut hub, 2, &drains(1, (u64::MAX, u64::MAX)), 2, 1);
    settle(&mut hub, &worker);
    hub.tick(at(2));
    hub.draining.get_mut(&backend).unwrap().drain.cut = 1;
    worker.metrics.backends[slot].active.set(0);
    reports(&mut hub, 2, &drains(1, (0, u64::MAX)), 3, 3);
    hub.tick(at(4));
    assert!(hub.registry.get(backend).is_none());
}

#[test]
fn a_backend_is_told_of_other_balancers_only_in_plain_addresses() {
    let (mut hub, _worker) = member();
    let control = ["192.0.2.7:4000", "\u{1b}[2J", "example:1", "127.0.0.1:4000", "[2001:db8::1]:9"];
    let control = control.map(str::to_owned).to_vec();
    let report = NodeReport { control, host: "there".to_owned(), ..drains(1, (0, 0)) };
    reports(&mut hub, 2, &report, 2, 1);
    assert_eq!(hub.cluster_nodes(), ["192.0.2.7:4000", "[2001:db8::1]:9"]);
}

#[test]
fn a_place_of_another_protocol_is_another_place() {
    let (mut hub, _worker) = member();
    hub.apply(join(UNCONNECTED, TCP, 80), at(1)).unwrap();
    let prefix = hub.sharing.as_ref().unwrap().share.prefix().clone();
    let udp = place(Protocol::Udp);
    let asked = value::write_ask(&udp.to_string(), &Verb::Drain(Lasts::Never));
    put(&mut hub, prefix.ask(&NodeId::new("a", 1), &other(2), 1), asked, 2, 1);
    assert_eq!(standings(&mut hub), [(80, Standing::Serving)]);
    says(&mut hub, 2, &Offer::plain(), 3, 1);
    let key = prefix.back(&other(2), &udp);
    put(&mut hub, key.clone(), value::write_back(4, &Offer::plain()), 4, 1);
    put(&mut hub, key, value::write_back(5, &Offer::plain().with(State::Left)), 5, 1);
    assert!(hub.registry.find(TCP, address(80)).unwrap().is_claimed, "that was another one");
}

#[test]
fn a_claim_that_was_left_out_is_tried_again() {
    let (mut hub, _worker) = member();
    says(&mut hub, 2, &Offer::plain(), 2, 1);
    says(&mut hub, 2, &Offer { group: Some("red".into()), ..Offer::plain() }, 3, 1);
    let left_out = |hub: &Hub| hub.sharing.as_ref().unwrap().left_out().count();
    assert_eq!(left_out(&hub), 1);
    hub.registry.group(TCP, &[("red", 100)]);
    hub.tick_cluster(at(1_100));
    assert_eq!(left_out(&hub), 0);
    let entry = hub.registry.find(TCP, address(80)).unwrap();
    assert_eq!(entry.backend.group.as_deref(), Some("red"));
}

#[test]
fn a_door_that_was_bound_is_no_backend() {
    let (mut hub, _worker) = member();
    let doors = status::Doors { control: Some(address(80)), ..status::Doors::default() };
    let sharing = hub.sharing.take().unwrap();
    hub.sharing = Some(Box::new(sharing.behind(doors)));
    says(&mut hub, 2, &Offer::plain(), 2, 1);
    assert!(hub.registry.is_empty());
}

#[test]
fn balancers_with_other_secrets_are_seen_to_choose_otherwise() {
    let sums = |key: HashKey| {
        let (mut hub, _worker) = member();
        hub.registry.set_key(key);
        hub.apply(join(UNCONNECTED, TCP, 80), at(1)).unwrap();
        hub.publish();
        hub.report().unwrap().tables
    };
    let [one, two] = [[1; 16], [2; 16]].map(|bytes| sums(HashKey::new(bytes)));
    assert_eq!(one, sums(HashKey::new([1; 16])));
    assert_ne!(one, two);
}
