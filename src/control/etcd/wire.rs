//! etcd's JSON gateway in bytes: what is asked, and what the answers mean. Owns the forms of etcd 3.4 to 3.7, which
//! write 64-bit numbers as text, leave out what has its usual value, and word errors differently; knows no socket.
//! See `api/etcdserverpb/rpc.proto` of etcd, and its gateway's `rpc.swagger.json`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cluster::share::event::{Command, Event, Op, Refusal, Row};

/// The longest line of a watch, in bytes: all keys of a cluster at once are shorter.
pub const LINE_BYTES_MAX: usize = 4 << 20;

/// A request: the path, and the body.
pub type Request = (&'static str, String);

/// The name and the password, for a token.
pub fn authenticate(user: &str, password: &str) -> Request {
    ("/v3/auth/authenticate", json!({ "name": user, "password": password }).to_string())
}

/// The token in the answer to [`authenticate`].
pub fn token(body: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(body).ok()?;
    Some(answer.get("token")?.as_str()?.to_owned())
}

/// What a command asks for; `None`: nothing. The keys are those that begin with `prefix`, and a lease lasts for so
/// many seconds.
pub fn request(command: &Command, prefix: &str, lease_seconds: u64) -> Option<Request> {
    let (key, end) = (coded(prefix), coded(&after(prefix)));
    let newest = || {
        json!({
            "key": key, "range_end": end, "limit": "1", "keys_only": true,
            "sort_order": "DESCEND", "sort_target": "MOD",
        })
    };
    let (path, body) = match command {
        Command::Open { .. } | Command::Audit => ("/v3/kv/range", newest()),
        Command::List => ("/v3/kv/range", json!({ "key": key, "range_end": end })),
        Command::Grant => ("/v3/lease/grant", json!({ "TTL": lease_seconds.to_string() })),
        Command::Renew { lease } => ("/v3/lease/keepalive", json!({ "ID": lease.to_string() })),
        Command::Write { lease, ops } => {
            let ops: Vec<Value> = ops.iter().map(|op| operation(op, *lease)).collect();
            ("/v3/kv/txn", json!({ "success": ops }))
        }
        Command::Watch { from } => {
            let wanted =
                json!({ "key": key, "range_end": end, "start_revision": from.to_string() });
            ("/v3/watch", json!({ "create_request": wanted }))
        }
        Command::Close => return None,
    };
    Some((path, body.to_string()))
}

fn operation(op: &Op, lease: i64) -> Value {
    match op {
        Op::Put { key, value } => {
            json!({ "request_put": { "key": coded(key), "value": coded(value), "lease": lease.to_string() } })
        }
        Op::Delete { key } => json!({ "request_delete_range": { "key": coded(key) } }),
    }
}

fn coded(text: &str) -> String {
    STANDARD.encode(text)
}

/// The end of the range of all keys that begin so. A prefix ends with a letter that has one after it.
fn after(prefix: &str) -> String {
    let mut bytes = prefix.as_bytes().to_vec();
    if let Some(last) = bytes.last_mut() {
        *last += 1;
    }
    String::from_utf8(bytes).expect("the letter after an ASCII letter is one")
}

/// A number that may be written as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Text(String),
    Signed(i64),
    Unsigned(u64),
}

impl Default for Number {
    fn default() -> Number {
        Number::Signed(0)
    }
}

impl Number {
    fn signed(&self) -> i64 {
        match self {
            Number::Text(text) => text.parse().unwrap_or(0),
            Number::Signed(number) => *number,
            Number::Unsigned(number) => i64::try_from(*number).unwrap_or(0),
        }
    }

    fn unsigned(&self) -> u64 {
        match self {
            Number::Text(text) => text.parse().unwrap_or(0),
            Number::Signed(number) => u64::try_from(*number).unwrap_or(0),
            Number::Unsigned(number) => *number,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Header {
    cluster_id: Number,
    revision: Number,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct KeyValue {
    key: String,
    value: String,
    mod_revision: Number,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Range {
    header: Header,
    kvs: Vec<KeyValue>,
    count: Number,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Lease {
    #[serde(rename = "ID")]
    id: Number,
    #[serde(rename = "TTL")]
    ttl: Number,
}

#[derive(Deserialize)]
struct Streamed<R> {
    result: Option<R>,
    error: Option<Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Written {
    header: Header,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Watched {
    canceled: bool,
    compact_revision: Number,
    cancel_reason: String,
    events: Vec<Happened>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Happened {
    r#type: String,
    kv: KeyValue,
}

/// What an answer to a command means.
pub fn answer(command: &Command, status: u16, body: &[u8]) -> Event {
    if status != 200 {
        return failed(status, &told(body));
    }
    let understood = match command {
        Command::Open { .. } => read(body).map(|Range { header, .. }| Event::Opened {
            store: header.cluster_id.unsigned(),
            revision: header.revision.signed(),
        }),
        Command::Audit => read(body).map(|Range { header, kvs, count }| Event::Audited {
            store: header.cluster_id.unsigned(),
            revision: header.revision.signed(),
            count: usize::try_from(count.signed()).unwrap_or(0),
            newest: kvs.first().map_or(0, |it| it.mod_revision.signed()),
        }),
        Command::List => read(body).map(|Range { header, kvs, .. }| Event::Listed {
            revision: header.revision.signed(),
            rows: kvs.iter().map(row).collect(),
        }),
        Command::Grant => read(body).map(|Lease { id, .. }| Event::Granted { lease: id.signed() }),
        Command::Renew { .. } => {
            read(body).map(|Streamed::<Lease> { result, error }| match (result, error) {
                (Some(lease), _) if lease.ttl.signed() > 0 => Event::Renewed,
                (Some(_), _) => Event::LeaseGone,
                (None, error) => failed(status, &error.map_or_else(String::new, |it| words(&it))),
            })
        }
        Command::Write { .. } => read(body)
            .map(|Written { header }| Event::Written { revision: header.revision.signed() }),
        Command::Watch { .. } | Command::Close => None,
    };
    understood.unwrap_or_else(|| Event::Lost { said: "its answer is none of etcd's".to_owned() })
}

fn read<'b, T: Deserialize<'b>>(body: &'b [u8]) -> Option<T> {
    serde_json::from_slice(body).ok()
}

fn decoded(text: &str) -> Option<String> {
    String::from_utf8(STANDARD.decode(text).ok()?).ok()
}

/// What is no text is nothing of ours, and still counts as a key: it goes by the letters that it came in.
fn row(kv: &KeyValue) -> Row {
    let key = decoded(&kv.key).unwrap_or_else(|| kv.key.clone());
    let value = decoded(&kv.value).unwrap_or_default();
    Row { key, value, revision: kv.mod_revision.signed() }
}

/// What a line of a watch means; `None`: nothing has happened.
pub fn watched(line: &[u8]) -> Option<Event> {
    let Some(Streamed::<Watched> { result, error }) = read(line) else {
        return Some(Event::Lost { said: "the watch says what is none of etcd's".to_owned() });
    };
    if let Some(error) = error {
        return Some(failed_watch(&words(&error)));
    }
    let watched = result?;
    if watched.compact_revision.signed() > 0 {
        return Some(Event::Compacted);
    }
    if watched.canceled {
        return Some(failed_watch(&watched.cancel_reason));
    }
    let revision = watched.events.iter().map(|it| it.kv.mod_revision.signed()).max()?;
    let (mut puts, mut deletes) = (Vec::new(), Vec::new());
    for event in &watched.events {
        let row = row(&event.kv);
        match event.r#type == "DELETE" {
            true => deletes.push((row.key, row.revision)),
            false => puts.push(row),
        }
    }
    Some(Event::Changed { revision, puts, deletes })
}

/// Why a request failed, in etcd's words.
pub fn told(body: &[u8]) -> String {
    read::<Value>(body)
        .map_or_else(|| String::from_utf8_lossy(body).chars().take(200).collect(), |it| words(&it))
}

fn words(error: &Value) -> String {
    let of = |key: &str| error.get(key).and_then(Value::as_str);
    let inner = error.get("error").filter(|it| it.is_object()).map(words);
    let said = inner.or_else(|| of("message").or(of("error")).map(str::to_owned));
    said.unwrap_or_else(|| "no reason given".to_owned())
}

fn failed(status: u16, said: &str) -> Event {
    let refused = |why| Event::Refused { why, said: said.to_owned() };
    if said.contains("lease not found") {
        refused(Refusal::LeaseGone)
    } else if said.contains("space exceeded") {
        // So that the alarm can be found by its name.
        Event::Refused { why: Refusal::Full, said: format!("alarm NOSPACE: {said}") }
    } else if said.contains("permission denied") {
        refused(Refusal::Other)
    } else {
        Event::Lost { said: format!("{said} (status {status})") }
    }
}

fn failed_watch(said: &str) -> Event {
    match said.contains("compacted") {
        true => Event::Compacted,
        false => Event::Lost { said: format!("the watch has ended: {said}") },
    }
}

/// Lines of a stream, put together from what arrives.
#[derive(Default)]
pub struct Lines {
    kept: Vec<u8>,
}

impl Lines {
    /// What has arrived, line by line.
    ///
    /// # Errors
    /// A line is too long.
    pub fn take(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) -> Result<(), &'static str> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            self.kept.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            if !self.kept.trim_ascii().is_empty() {
                line(&self.kept);
            }
            self.kept.clear();
        }
        self.kept.extend_from_slice(rest);
        match self.kept.len() <= LINE_BYTES_MAX {
            true => Ok(()),
            false => Err("a line of the watch is too long"),
        }
    }
}

#[cfg(test)]
mod tests;
