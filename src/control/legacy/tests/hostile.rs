//! Descriptions that nobody in their right mind has written: each is refused with a sentence, or does no harm.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use serde_json::Value;

use super::*;
use crate::base::random::xorshift;

fn json() -> Vec<u8> {
    let register = br#"{"cmd":"register","protocol":"udp","port":77,"group":"x"}"#;
    let (hub, _workers) = eventful(2);
    let mut legacy = hub.describe(at(20_010));
    legacy.numbers.connection = 9;
    let connection = |number: u64| format::Connection {
        number,
        socket: number as usize - 7,
        peer: Some(address(9)),
        framer: serde_json::from_str(r#"{"state":"Inside","message":"eyJj","depth":1}"#).unwrap(),
        unheard: bytes::Bytes(b"md\":\"list\"}".to_vec()),
        pending: vec![format::Pending {
            said: bytes::Bytes(register.to_vec()),
            ..format::Pending::default()
        }],
        unsent: bytes::Bytes(b"{}\n".to_vec()),
        unproven: Some(at(20_000)),
        answered: Some((at(9), Some(Duration::from_millis(2)))),
        identity: Some(format::Identity { name: "web".to_owned(), keyrings: vec![None] }),
        listing: Some(format::Listing::Services { after: None }),
        ..format::Connection::default()
    };
    legacy.connections.extend([7, 8].map(connection));
    legacy.to_json().unwrap()
}

/// Takes it up if it can be, and lives with it for a while.
async fn live_with(json: &[u8]) -> Result<(), String> {
    let legacy = Legacy::from_json(json)?;
    let (config, door) = (config(), TcpListener::bind("127.0.0.1:0").unwrap());
    let (control, workers) = talks::control(&config, &door);
    let pair = || {
        let far = TcpStream::connect(door.local_addr().unwrap()).unwrap();
        (far, OwnedFd::from(door.accept().unwrap().0))
    };
    let (_far, sockets): (Vec<_>, Vec<_>) =
        (0..legacy.connections.len().min(4)).map(|_| pair()).unzip();
    let core = control.inherit(&legacy, sockets, at(20_010))?.begin_talks();
    for ms in [20_100, 26_000, 31_000, 95_000] {
        core.hub.borrow_mut().publish();
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        let mut hub = core.hub.borrow_mut();
        turn(&mut hub, &workers, ms);
        while let Some((due, _)) = hub.next_check(at(ms)) {
            hub.checked(due, Ok(()), Duration::ZERO, at(ms));
        }
        let ids: Vec<_> = hub.registry.entries().map(|it| it.backend.id).collect();
        ids.into_iter().for_each(|id| drop(hub.next_try(id)));
        crate::control::exposition::text(&hub);
        crate::control::view::status(&hub, crate::control::status::Doors::default(), at(ms));
        let _ = hub.apply(Change::Register(join(Source::Connection(7), TCP, 999)), at(ms));
        drop(hub);
        let _ = core.freeze(at(ms)).describe().0.to_json();
    }
    core.door.lines().let_go();
    Ok(())
}

#[test]
fn the_description_as_it_is_can_be_lived_with() {
    tokio_uring::start(async {
        live_with(&json()).await.unwrap();
        live_with(b"{}").await.unwrap();
    });
}

#[test]
fn a_description_that_is_cut_off_is_refused() {
    tokio_uring::start(async {
        let json = json();
        let mut random = xorshift(3);
        for cut in (0..40).map(|_| random(json.len() as u64) as usize).chain([json.len() - 1]) {
            let said = live_with(&json[..cut]).await.unwrap_err();
            assert!(said.starts_with("not a description"), "{said}");
        }
        assert!(Legacy::from_json(&vec![b' '; BYTES_MAX + 1]).unwrap_err().contains("too long"));
    });
}

#[test]
fn bytes_that_have_changed_do_no_harm() {
    tokio_uring::start(async {
        let json = json();
        let mut random = xorshift(11);
        let mut taken = 0;
        for _ in 0..300 {
            let mut json = json.clone();
            for _ in 0..=random(3) {
                let place = random(json.len() as u64) as usize;
                json[place] = match random(3) {
                    0 => b'0' + random(10) as u8,
                    1 => json[place] ^ 1 << random(7),
                    _ => random(256) as u8,
                };
            }
            taken += usize::from(live_with(&json).await.is_ok());
        }
        assert!(taken > 10, "some are still descriptions");
    });
}

/// Every value within, one after the other.
fn each(value: &mut Value, place: &mut usize, wanted: usize, with: &Value) -> bool {
    if *place == wanted {
        *value = with.clone();
        return true;
    }
    *place += 1;
    match value {
        Value::Array(all) => all.iter_mut().any(|it| each(it, place, wanted, with)),
        Value::Object(all) => all.iter_mut().any(|(_, it)| each(it, place, wanted, with)),
        _ => false,
    }
}

#[test]
fn any_value_may_be_any_other() {
    tokio_uring::start(async {
        let tree: Value = serde_json::from_slice(&json()).unwrap();
        let others = [
            Value::Null,
            serde_json::json!(0),
            serde_json::json!(1),
            serde_json::json!(65_535),
            serde_json::json!(u32::MAX),
            serde_json::json!(u64::MAX),
            serde_json::json!(1u64 << 60),
            serde_json::json!(-1),
            serde_json::json!(1e300),
            serde_json::json!(true),
            serde_json::json!("127.0.0.1:11"),
            serde_json::json!([]),
            serde_json::json!({}),
            serde_json::json!([1, 2]),
        ];
        let mut random = xorshift(5);
        let (mut taken, mut refused) = (0, 0);
        for _ in 0..600 {
            let mut tree = tree.clone();
            let with = &others[random(others.len() as u64) as usize];
            let mut place = 0;
            each(&mut tree, &mut place, random(3_000) as usize, with);
            match live_with(&serde_json::to_vec(&tree).unwrap()).await {
                Ok(()) => taken += 1,
                Err(sentence) => {
                    assert!(!sentence.is_empty());
                    refused += 1;
                }
            }
        }
        assert!(taken > 50 && refused > 50, "{taken} taken, {refused} refused");
    });
}

#[test]
fn a_member_of_tomorrow_is_passed_over_and_one_of_yesterday_not_missed() {
    tokio_uring::start(async {
        let mut tree: Value = serde_json::from_slice(&json()).unwrap();
        tree["of_tomorrow"] = serde_json::json!({"a": [1, 2, 3]});
        tree["backends"][0]["of_tomorrow"] = serde_json::json!("x");
        tree["counts"]["control"]["of_tomorrow_total"] = serde_json::json!(8);
        live_with(&serde_json::to_vec(&tree).unwrap()).await.unwrap();
        // A backend belongs to a connection and has an id that was given out.
        let needed = ["services", "numbers", "connections", "backends"];
        let members: Vec<String> = tree.as_object().unwrap().keys().cloned().collect();
        for member in members.into_iter().filter(|it| !needed.contains(&it.as_str())) {
            let mut tree = tree.clone();
            tree.as_object_mut().unwrap().remove(&member);
            let lived = live_with(&serde_json::to_vec(&tree).unwrap()).await;
            lived.unwrap_or_else(|why| panic!("{member}: {why}"));
        }
    });
}

#[test]
fn what_cannot_be_is_refused_with_a_sentence() {
    type Spoil = fn(&mut Legacy);
    let spoiled: [(&str, Spoil); 12] = [
        ("there twice", |it| it.backends[1].id = it.backends[0].id),
        ("another's, or none", |it| it.backends[1].slot = it.backends[0].slot),
        ("another's, or none", |it| it.backends[1].slot = BACKENDS as u16),
        ("address of another", |it| it.backends[1].address = it.backends[0].address),
        ("before its time", |it| it.numbers.backend = 2),
        ("weight out of its range", |it| it.backends[0].weight = 0),
        ("no address", |it| it.backends[0].address = None),
        ("a service that is not there", |it| it.backends[0].service = 77),
        ("the number of another service", |it| it.services[3].name = "other".to_owned()),
        ("is there twice", |it| it.services[3].id = 0),
        ("out of all reason", |it| it.counts.workers[0].connect.sum_us = u64::MAX),
        ("the check of backend", |it| it.backends[0].check = Some("ping".to_owned())),
    ];
    let whole = Legacy::from_json(&json()).unwrap();
    for (why, spoil) in spoiled {
        let mut legacy = whole.clone();
        spoil(&mut legacy);
        let (mut hub, _workers) = hub(config(), 1, at(20_010));
        let said = hub.inherit(&legacy, at(20_010)).unwrap_err();
        assert!(said.contains(why), "{said:?} instead of {why:?}");
    }
}

#[test]
fn connections_that_cannot_be_are_refused_with_a_sentence() {
    type Spoil = fn(&mut Legacy);
    let spoiled: [(&str, Spoil); 6] = [
        ("is there twice", |it| it.connections[1].number = 7),
        ("before its time", |it| it.numbers.connection = 8),
        ("has no socket", |it| it.connections[1].socket = 0),
        ("comes from nowhere", |it| it.connections[0].peer = None),
        ("came with", |it| drop(it.connections.pop())),
        ("that has not come", |it| it.connections[0].number = 1),
    ];
    let whole = Legacy::from_json(&json()).unwrap();
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let far: Vec<TcpStream> =
        (0..2).map(|_| TcpStream::connect(door.local_addr().unwrap()).unwrap()).collect();
    for (why, spoil) in spoiled {
        let mut legacy = whole.clone();
        spoil(&mut legacy);
        let sockets = far.iter().map(|it| OwnedFd::from(it.try_clone().unwrap())).collect();
        let (control, _workers) = talks::control(&config(), &door);
        let said = control.inherit(&legacy, sockets, at(20_010)).err().unwrap();
        assert!(said.contains(why), "{said:?} instead of {why:?}");
    }
}

const BACKENDS: usize = crate::metrics::BACKENDS_MAX;
