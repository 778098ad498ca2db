//! Answers as members of several versions have given them.

use super::*;

const LIST: Command = Command::List;

#[test]
fn requests_are_what_the_gateway_takes() {
    let prefix = "/lb/a/1/";
    let asked = |command: &Command| request(command, prefix, 10).unwrap();
    let (key, end) = ("L2xiL2EvMS8=", "L2xiL2EvMTA=");
    assert_eq!((coded(prefix), coded(&after(prefix))), (key.to_owned(), end.to_owned()));
    let (path, body) = asked(&Command::Write {
        lease: 7,
        ops: vec![
            Op::Put { key: "k".to_owned(), value: "v".to_owned() },
            Op::Delete { key: "k2".to_owned() },
        ],
    });
    assert_eq!(path, "/v3/kv/txn");
    let put = r#"{"request_put":{"key":"aw==","lease":"7","value":"dg=="}}"#;
    let delete = r#"{"request_delete_range":{"key":"azI="}}"#;
    assert_eq!(body, format!(r#"{{"success":[{put},{delete}]}}"#));
    assert_eq!(asked(&LIST).1, format!(r#"{{"key":"{key}","range_end":"{end}"}}"#));
    assert_eq!(asked(&Command::Grant).1, r#"{"TTL":"10"}"#);
    assert!(asked(&Command::Watch { from: 9 }).1.contains(r#""start_revision":"9""#));
    assert_eq!(request(&Command::Close, prefix, 10), None);
}

#[test]
fn answers_are_understood_whatever_they_leave_out() {
    let said = |command: &Command, body: &str| answer(command, 200, body.as_bytes());
    let header = r#""header":{"cluster_id":"14841639068965178418","revision":"42"}"#;
    let listed = format!(
        r#"{{{header},"kvs":[{{"key":"aw==","create_revision":"2","mod_revision":"41","value":"dg=="}},{{"key":"azI=","mod_revision":"3"}}],"count":"2"}}"#
    );
    let row = |key: &str, value: &str, revision| Row {
        key: key.to_owned(),
        value: value.to_owned(),
        revision,
    };
    let rows = vec![row("k", "v", 41), row("k2", "", 3)];
    assert_eq!(said(&LIST, &listed), Event::Listed { revision: 42, rows });
    let empty = format!("{{{header}}}");
    assert_eq!(said(&LIST, &empty), Event::Listed { revision: 42, rows: vec![] });
    let store = 14841639068965178418;
    let audited = Event::Audited { store, revision: 42, count: 0, newest: 0 };
    assert_eq!(said(&Command::Audit, &empty), audited);
    let opened = Event::Opened { store, revision: 42 };
    assert_eq!(said(&Command::Open { attempt: 0 }, &empty), opened);
    let granted = format!(r#"{{{header},"ID":"7587869122234245894","TTL":"10"}}"#);
    assert_eq!(said(&Command::Grant, &granted), Event::Granted { lease: 7587869122234245894 });
    let renew = Command::Renew { lease: 5 };
    let alive = format!(r#"{{"result":{{{header},"ID":"5","TTL":"10"}}}}"#);
    assert_eq!(said(&renew, &alive), Event::Renewed);
    let gone = format!(r#"{{"result":{{{header},"ID":"5"}}}}"#);
    assert_eq!(said(&renew, &gone), Event::LeaseGone);
    let write = Command::Write { lease: 5, ops: vec![] };
    assert_eq!(
        said(&write, &format!(r#"{{{header},"succeeded":true}}"#)),
        Event::Written { revision: 42 }
    );
    assert!(matches!(said(&LIST, "<html>"), Event::Lost { .. }));
}

#[test]
fn refusals_are_told_apart_in_the_words_of_every_version() {
    let write = Command::Write { lease: 5, ops: vec![] };
    for (status, body, why) in [
        (
            404,
            r#"{"error":"etcdserver: requested lease not found","code":5}"#,
            Some(Refusal::LeaseGone),
        ),
        (
            404,
            r#"{"code":5,"message":"etcdserver: requested lease not found"}"#,
            Some(Refusal::LeaseGone),
        ),
        (
            429,
            r#"{"code":8,"message":"etcdserver: mvcc: database space exceeded"}"#,
            Some(Refusal::Full),
        ),
        (
            403,
            r#"{"error":"etcdserver: permission denied","message":"etcdserver: permission denied","code":7}"#,
            Some(Refusal::Other),
        ),
        (401, r#"{"error":"etcdserver: invalid auth token","code":16}"#, None),
        (503, r#"{"error":"etcdserver: no leader","code":14}"#, None),
        (502, "bad gateway", None),
    ] {
        match (answer(&write, status, body.as_bytes()), why) {
            (Event::Refused { why, said }, Some(wanted)) => {
                assert_eq!(why, wanted, "{body}");
                assert_eq!(said.contains("NOSPACE"), why == Refusal::Full, "{said}");
            }
            (Event::Lost { said }, None) => assert!(said.contains(&status.to_string()), "{said}"),
            (event, _) => panic!("{body}: {event:?}"),
        }
    }
    assert_eq!(token(br#"{"header":{},"token":"abc.7"}"#).as_deref(), Some("abc.7"));
    assert_eq!(token(b"{}"), None);
}

#[test]
fn a_watch_is_read_line_by_line() {
    let created = r#"{"result":{"header":{"revision":"9"},"created":true}}"#;
    let changed = r#"{"result":{"header":{"revision":"12"},"events":[{"kv":{"key":"aw==","mod_revision":"10","value":"dg=="}},{"type":"DELETE","kv":{"key":"azI=","mod_revision":"11"}}]}}"#;
    let compacted =
        r#"{"result":{"header":{"revision":"12"},"canceled":true,"compact_revision":"8"}}"#;
    let leaderless =
        r#"{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader"}}"#;
    let text = [created, changed, compacted, leaderless, ""].join("\n");
    for size in [1, 7, text.len()] {
        let (mut lines, mut events) = (Lines::default(), Vec::new());
        for part in text.as_bytes().chunks(size) {
            lines.take(part, |line| events.extend(watched(line))).unwrap();
        }
        let row = Row { key: "k".to_owned(), value: "v".to_owned(), revision: 10 };
        let deletes = vec![("k2".to_owned(), 11)];
        assert_eq!(events[0], Event::Changed { revision: 11, puts: vec![row], deletes });
        assert_eq!(events[1], Event::Compacted);
        assert!(matches!(&events[2..], [Event::Lost { said }] if said.contains("no leader")));
    }
    let long = vec![b'x'; LINE_BYTES_MAX + 1];
    assert!(Lines::default().take(&long, |_| {}).is_err());
}

#[test]
fn a_key_that_is_no_text_counts_as_one() {
    let kv = r#"{"key":"/w==","mod_revision":"4","value":"dg=="}"#;
    let listed = format!(r#"{{"header":{{"revision":"9"}},"kvs":[{kv}],"count":"1"}}"#);
    let row = Row { key: "/w==".to_owned(), value: "v".to_owned(), revision: 4 };
    let rows = vec![row.clone()];
    assert_eq!(answer(&LIST, 200, listed.as_bytes()), Event::Listed { revision: 9, rows });
    let watched_as = |kind: &str| {
        watched(format!(r#"{{"result":{{"events":[{{{kind}"kv":{kv}}}]}}}}"#).as_bytes())
    };
    let (revision, puts) = (4, vec![row]);
    assert_eq!(watched_as(""), Some(Event::Changed { revision, puts, deletes: vec![] }));
    let (puts, deletes) = (vec![], vec![("/w==".to_owned(), 4)]);
    assert_eq!(watched_as(r#""type":"DELETE","#), Some(Event::Changed { revision, puts, deletes }));
}
