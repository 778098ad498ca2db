//! How the machine behaves towards a store that is played by the test, as a table. What no schedule breaks is shown
//! by `tests/share_sim`.

use super::event::Op;
use super::value::Parting;
use super::*;
use crate::cluster::backend::Protocol;
use crate::cluster::registry::Lasts;

fn at(ms: u64) -> Now {
    Now::from_nanos(ms * 1_000_000)
}

fn place(port: u16) -> Place {
    let address = ([192, 0, 2, 1], port).into();
    Place { service: "tcp".into(), protocol: Protocol::Tcp, address }
}

fn member(node: &str, process: u32) -> Share {
    Share::new(Membership::of_test(node, process), at(0))
}

fn report(share: &mut Share, ms: u64) {
    let drains = share.own.reported().map(|it| it.drains.clone()).unwrap_or_default();
    share.report(NodeReport { version: "1".to_owned(), drains, ..NodeReport::default() }, at(ms));
}

/// Connected, with the keys that there are, and everything of its own written.
fn live(share: &mut Share, rows: Vec<Row>, ms: u64) {
    share.tick(at(ms));
    assert_eq!(share.commands(), [Command::Open { attempt: share.link.attempt() }]);
    hear(share, Event::Opened { store: 1, revision: 10 }, ms);
    assert_eq!(share.commands(), [Command::List, Command::Grant]);
    hear(share, Event::Listed { revision: 10, rows }, ms);
    hear(share, Event::Granted { lease: 5 }, ms);
    assert_eq!(share.commands()[0], Command::Watch { from: 11 });
}

fn hear(share: &mut Share, event: Event, ms: u64) {
    share.hear(share.link.attempt(), event, at(ms));
}

/// The batch that is to be written, which the store takes as this revision.
fn take(share: &mut Share, revision: i64, ms: u64) -> Vec<Op> {
    let commands = share.commands();
    let written = commands.iter().find_map(|command| match command {
        Command::Write { ops, .. } => Some(ops.clone()),
        _ => None,
    });
    let Some(ops) = written else { return Vec::new() };
    hear(share, Event::Written { revision }, ms);
    let (mut puts, mut deletes) = (Vec::new(), Vec::new());
    for op in &ops {
        match op.clone() {
            Op::Put { key, value } => puts.push(Row { key, value, revision }),
            Op::Delete { key } => deletes.push((key, revision)),
        }
    }
    hear(share, Event::Changed { revision, puts, deletes }, ms);
    ops
}

fn row(key: String, value: String, revision: i64) -> Row {
    Row { key, value, revision }
}

#[test]
fn what_waits_is_written_at_once_and_our_presence_last() {
    let mut share = member("a", 1);
    for port in 1..=200 {
        share.say(&place(port), Offer::plain(), at(0));
    }
    report(&mut share, 0);
    assert_eq!(share.summary().unwritten, 200);
    live(&mut share, Vec::new(), 1);
    // The first batch was asked for when the lease was granted.
    share.link.refused("again".to_owned(), at(1), &mut Vec::new());
    share.tick(at(1002));
    let first = take(&mut share, 11, 1003);
    let second = take(&mut share, 12, 1004);
    assert_eq!((first.len(), second.len()), (125, 76));
    assert_eq!(second.last().unwrap().key(), "/lb/c/1/node/a~00000001");
    assert!(share.summary().is_present && share.summary().unwritten == 0);
    assert_eq!(take(&mut share, 13, 1005), []);
}

#[test]
fn a_batch_that_is_not_answered_is_written_again_at_the_next_endpoint() {
    let mut share = member("a", 1);
    report(&mut share, 0);
    live(&mut share, Vec::new(), 1);
    share.tick(at(500));
    share.tick(at(1001));
    assert_eq!(share.commands(), [Command::Close]);
    share.tick(at(1102));
    assert_eq!(share.commands(), [Command::Open { attempt: 1 }]);
    share.hear(0, Event::Lost { said: "long ago".to_owned() }, at(1103));
    assert!(matches!(share.link.phase(), Phase::Opening { .. }), "of the connection before");
}

#[test]
fn a_word_takes_a_backend_away_and_a_key_that_vanishes_does_not() {
    let (mut share, other) = (member("a", 1), NodeId::new("b", 2));
    report(&mut share, 0);
    let key = share.prefix.back(&other, &place(80));
    let serving = value::write_back(1, &Offer::plain());
    live(&mut share, vec![row(key.clone(), serving, 9)], 1);
    assert!(matches!(share.changes()[..], [Change::Claim { .. }]));
    take(&mut share, 11, 2);
    hear(
        &mut share,
        Event::Changed { revision: 12, puts: vec![], deletes: vec![(key.clone(), 12)] },
        3,
    );
    assert_eq!((share.changes(), share.summary().orphans), (vec![], 1));
    let again = row(key.clone(), value::write_back(2, &Offer::plain()), 13);
    hear(&mut share, Event::Changed { revision: 13, puts: vec![again], deletes: vec![] }, 4);
    assert_eq!((share.changes(), share.summary().orphans), (vec![], 0));
    let lost = value::write_back(3, &Offer { state: State::Lost, ..Offer::plain() });
    let lost = row(key, lost, 14);
    hear(&mut share, Event::Changed { revision: 14, puts: vec![lost], deletes: vec![] }, 5);
    let why = event::Gone::Lost;
    assert_eq!(share.changes(), [Change::Unclaim { place: place(80), why }]);
}

#[test]
fn a_loopback_address_means_something_on_its_own_host_only() {
    let (mut share, other) = (member("a", 1), NodeId::new("b", 2));
    let of =
        |host: &str| value::write_back(1, &Offer { host: Some(host.into()), ..Offer::plain() });
    let rows = [(80, of("here")), (81, of("there"))]
        .map(|(port, value)| row(share.prefix.back(&other, &place(port)), value, 9));
    live(&mut share, rows.to_vec(), 1);
    let claimed: Vec<Change> = share.changes();
    assert!(
        matches!(&claimed[..], [Change::Claim { place: it, .. }] if *it == place(80)),
        "{claimed:?}"
    );
}

#[test]
fn a_request_is_acted_on_once_and_taken_away() {
    let (mut share, other) = (member("a", 1), NodeId::new("b", 2));
    report(&mut share, 0);
    let key = share.prefix.ask(&share.me.clone(), &other, 1);
    let verb = Verb::Drain(Lasts::Never);
    let asked = row(key.clone(), value::write_ask(&place(80).to_string(), &verb), 9);
    live(&mut share, vec![asked.clone()], 1);
    let from = "b~00000002.1".to_owned();
    assert_eq!(share.changes(), [Change::Asked { place: place(80), verb, from }]);
    hear(&mut share, Event::Compacted, 2);
    hear(&mut share, Event::Listed { revision: 10, rows: vec![asked] }, 3);
    assert_eq!(share.changes(), [], "it was heard before");
    share.tick(at(4));
    hear(&mut share, Event::LeaseGone, 4);
    hear(&mut share, Event::Granted { lease: 6 }, 5);
    let ops = take(&mut share, 11, 6);
    assert!(ops.contains(&Op::Delete { key }), "{ops:?}");
    assert!(!share.own.has_work());
}

#[test]
fn a_drain_is_over_when_all_who_are_there_have_said_so() {
    let mut share = member("a", 1);
    let name = parting(&share.me, 3);
    let node = |share: &Share, process, n, drains: &[(u64, u64)]| {
        let drains = drains.iter().map(|count| (name.clone(), *count)).collect();
        let id = NodeId::new("b", process);
        let report = NodeReport { drains, ..NodeReport::default() };
        row(share.prefix.node(&id), value::write_node(n, &report), n as i64)
    };
    let rows = vec![node(&share, 2, 1, &[(4, 0)]), node(&share, 3, 2, &[])];
    live(&mut share, rows, 1);
    assert_eq!(share.drained(3), (4, 0, 1), "one has not said anything");
    let puts = vec![node(&share, 2, 11, &[(1, 2)]), node(&share, 3, 12, &[(5, 0)])];
    hear(&mut share, Event::Changed { revision: 12, puts, deletes: vec![] }, 2);
    assert_eq!(share.drained(3), (6, 2, 0));
    let gone = share.prefix.node(&NodeId::new("b", 3));
    hear(&mut share, Event::Changed { revision: 13, puts: vec![], deletes: vec![(gone, 13)] }, 3);
    assert_eq!(share.drained(3), (1, 2, 0), "who is not there is not waited for");
}

#[test]
fn an_operators_drain_holds_whatever_is_newer_and_an_owners_does_not() {
    for (by, drains) in [(DrainedBy::Operator, true), (DrainedBy::Owner, false)] {
        let (mut share, one, two) = (member("a", 1), NodeId::new("b", 2), NodeId::new("c", 3));
        let draining = State::Draining(Parting { by, number: 1, lasts: None });
        let rows = vec![
            row(
                share.prefix.back(&one, &place(80)),
                value::write_back(1, &Offer::plain().with(draining)),
                5,
            ),
            row(share.prefix.back(&two, &place(80)), value::write_back(1, &Offer::plain()), 6),
        ];
        live(&mut share, rows, 1);
        let changes = share.changes();
        let Some(Change::Claim { offer, owner, .. }) = changes.last() else {
            panic!("{changes:?}")
        };
        assert_eq!(offer.drains().is_some(), drains, "{by:?}");
        assert_eq!(*owner, if drains { one } else { two });
        let known = share.partings().count();
        assert_eq!(known, 1);
    }
}

#[test]
fn what_is_not_known_here_is_found_by_an_audit() {
    let mut share = member("a", 1);
    live(&mut share, Vec::new(), 1);
    share.tick(at(2001));
    assert!(share.commands().contains(&Command::Audit));
    let audited = Event::Audited { store: 1, revision: 12, count: 1, newest: 12 };
    hear(&mut share, audited, 2002);
    assert_eq!(share.commands(), [], "it may be on its way");
    share.tick(at(3002));
    assert!(share.commands().contains(&Command::List));
    assert_eq!(share.summary().relisted, 1);
}

#[test]
fn an_audit_that_a_change_has_overtaken_is_no_other_store() {
    for (revision, is_other) in [(10, false), (9, true)] {
        let mut share = member("a", 1);
        live(&mut share, Vec::new(), 1);
        share.tick(at(2001));
        assert!(share.commands().contains(&Command::Audit));
        let puts = vec![row("/lb/c/1/x".to_owned(), String::new(), 11)];
        hear(&mut share, Event::Changed { revision: 11, puts, deletes: vec![] }, 2002);
        hear(&mut share, Event::Audited { store: 1, revision, count: 0, newest: 0 }, 2003);
        assert_eq!(share.commands().contains(&Command::List), is_other, "{revision}");
        assert_eq!(share.summary().revision, if is_other { 0 } else { 11 });
    }
}

#[test]
fn why_a_backend_went_that_was_never_known_here_says_nothing_of_a_later_one() {
    let (mut share, other) = (member("a", 1), NodeId::new("b", 2));
    let key = share.prefix.back(&other, &place(80));
    let says = |n: u64, offer: &Offer| row(key.clone(), value::write_back(n, offer), 8 + n as i64);
    let lost = Offer { state: State::Lost, ..Offer::plain() };
    live(&mut share, vec![says(1, &lost)], 1);
    assert_eq!(share.changes(), []);
    hear(&mut share, changed(says(4, &Offer::plain())), 2);
    assert!(matches!(share.changes()[..], [Change::Claim { .. }]));
    // It is there for those on its own host only.
    let far = Offer { host: Some("there".into()), ..Offer::plain() };
    hear(&mut share, changed(says(5, &far)), 3);
    let why = event::Gone::Left;
    assert_eq!(share.changes(), [Change::Unclaim { place: place(80), why }]);
}

fn changed(put: Row) -> Event {
    Event::Changed { revision: put.revision, puts: vec![put], deletes: vec![] }
}

#[test]
fn what_a_member_refuses_at_once_is_what_the_operator_is_told() {
    let mut share = member("a", 1);
    share.tick(at(1));
    share.commands();
    let said = "etcdserver: permission denied".to_owned();
    hear(&mut share, Event::Refused { why: Refusal::Other, said: said.clone() }, 2);
    assert_eq!(share.commands(), [Command::Close]);
    assert!(matches!(share.phase(), Phase::Down { .. }));
    assert_eq!(share.summary().trouble, Some(said));
}

#[test]
fn a_lease_is_not_late_while_the_list_before_it_is_under_way() {
    let mut share = member("a", 1);
    let begun = |share: &mut Share, ms: u64, asks: Command| {
        share.tick(at(ms));
        share.commands();
        hear(share, Event::Opened { store: 1, revision: 10 }, ms);
        assert_eq!(share.commands(), [Command::List, asks]);
        share.tick(at(ms + 4000));
        assert_eq!(share.commands(), [], "the list takes its time");
        hear(share, Event::Listed { revision: 10, rows: vec![] }, ms + 4000);
        share.tick(at(ms + 4100));
        assert_eq!(share.commands(), [Command::Watch { from: 11 }]);
    };
    begun(&mut share, 1, Command::Grant);
    hear(&mut share, Event::Granted { lease: 5 }, 4200);
    hear(&mut share, Event::Lost { said: "reset".to_owned() }, 4300);
    share.commands();
    begun(&mut share, 5000, Command::Renew { lease: 5 });
    share.tick(at(9000 + 1500));
    assert!(share.commands().contains(&Command::Close), "now it is");
}
