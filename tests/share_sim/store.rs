//! A model of the store: keys with revisions and leases, watches, and whatever may befall an etcd. Owns what is in it;
//! how long messages take is up to the world.

use std::collections::BTreeMap;

use lb::cluster::share::event::{Command, Event, Op, Refusal, Row};

/// How long a lease lasts, in milliseconds.
pub const LEASE_MS: u64 = 10_000;

#[derive(Clone)]
struct Value {
    text: String,
    revision: i64,
    lease: i64,
}

/// What one revision has changed.
#[derive(Clone)]
enum Change {
    Put(Row),
    Delete(String),
}

/// A watch, and the revision that it is told of next.
struct Watch {
    node: usize,
    attempt: usize,
    next: i64,
    is_silent: bool,
}

/// All that a backup holds.
#[derive(Clone, Default)]
pub struct Content {
    keys: BTreeMap<String, Value>,
    leases: BTreeMap<i64, u64>,
    revision: i64,
}

pub struct Store {
    id: u64,
    content: Content,
    history: Vec<(i64, Vec<Change>)>,
    compacted: i64,
    next_lease: i64,
    watches: Vec<Watch>,
    /// It neither answers nor tells anything before.
    pub paused_until: u64,
    pub is_full: bool,
}

/// What is to be told, and to whom.
pub type Told = (usize, usize, Event);

impl Store {
    pub fn new() -> Store {
        Store {
            id: 7,
            content: Content { revision: 1, ..Content::default() },
            history: Vec::new(),
            compacted: 0,
            next_lease: 100,
            watches: Vec::new(),
            paused_until: 0,
            is_full: false,
        }
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.content.keys.keys().map(String::as_str)
    }

    /// Those that a balancer has written.
    pub fn sealed_keys(&self) -> impl Iterator<Item = &str> {
        let sealed = self.content.keys.iter().filter(|(_, value)| value.text.contains("\"mac\""));
        sealed.map(|(key, _)| key.as_str())
    }

    pub fn backup(&self) -> Content {
        self.content.clone()
    }

    /// An older state takes its place, in this store or in a new one.
    pub fn restore(&mut self, content: Content, is_new: bool, now: u64) {
        self.id += u64::from(is_new);
        self.content = content;
        self.content.leases.values_mut().for_each(|ends| *ends = now + LEASE_MS);
        self.history.clear();
        self.compacted = self.content.revision;
        self.watches.clear();
    }

    pub fn wipe(&mut self) {
        self.restore(Content { revision: 1, ..Content::default() }, true, 0);
    }

    pub fn compact(&mut self) {
        self.history.clear();
        self.compacted = self.content.revision;
    }

    pub fn delete_all(&mut self, holds: &str) {
        let keys: Vec<String> =
            self.keys().filter(|key| key.contains(holds)).map(str::to_owned).collect();
        self.change(keys.into_iter().map(Change::Delete).collect(), 0);
    }

    /// Somebody who is no balancer writes over a key.
    pub fn scribble(&mut self, place: usize) {
        let count = self.content.keys.len().max(1);
        let Some(key) = self.content.keys.keys().nth(place % count).cloned() else { return };
        let row = Row {
            key,
            value: "{\"v\":1,\"n\":9999999,\"state\":\"left\"}".to_owned(),
            revision: 0,
        };
        self.change(vec![Change::Put(row)], 0);
    }

    /// From now on, the watches of a balancer say nothing any more.
    pub fn silence(&mut self, node: usize) {
        self.watches.iter_mut().filter(|it| it.node == node).for_each(|it| it.is_silent = true);
    }

    pub fn close(&mut self, node: usize) {
        self.watches.retain(|watch| watch.node != node);
    }

    /// Leases end, in one revision each.
    pub fn expire(&mut self, now: u64) {
        let over = |(id, ends): (&i64, &u64)| (*ends <= now).then_some(*id);
        let over: Vec<i64> = self.content.leases.iter().filter_map(over).collect();
        for lease in over {
            self.content.leases.remove(&lease);
            let keys = self.content.keys.iter().filter(|(_, value)| value.lease == lease);
            let keys: Vec<Change> = keys.map(|(key, _)| Change::Delete(key.clone())).collect();
            self.change(keys, 0);
        }
    }

    fn change(&mut self, changes: Vec<Change>, lease: i64) -> i64 {
        if changes.is_empty() {
            return self.content.revision;
        }
        self.content.revision += 1;
        let revision = self.content.revision;
        let mut done = Vec::new();
        for change in changes {
            match change {
                Change::Put(row) => {
                    let row = Row { revision, ..row };
                    let value = Value { text: row.value.clone(), revision, lease };
                    self.content.keys.insert(row.key.clone(), value);
                    done.push(Change::Put(row));
                }
                Change::Delete(key) => {
                    if self.content.keys.remove(&key).is_some() {
                        done.push(Change::Delete(key));
                    }
                }
            }
        }
        self.history.push((revision, done));
        revision
    }

    /// What the watches have yet to be told.
    pub fn tell(&mut self) -> Vec<Told> {
        let mut told = Vec::new();
        for watch in self.watches.iter_mut().filter(|it| !it.is_silent) {
            let from = watch.next;
            for (revision, changes) in self.history.iter().filter(|(at, _)| *at >= from) {
                let (mut puts, mut deletes) = (Vec::new(), Vec::new());
                for change in changes {
                    match change {
                        Change::Put(row) => puts.push(row.clone()),
                        Change::Delete(key) => deletes.push((key.clone(), *revision)),
                    }
                }
                let event = Event::Changed { revision: *revision, puts, deletes };
                told.push((watch.node, watch.attempt, event));
                watch.next = revision + 1;
            }
        }
        told
    }

    /// Does what it is asked to.
    pub fn carry_out(
        &mut self,
        node: usize,
        attempt: usize,
        command: Command,
        now: u64,
    ) -> Option<Event> {
        let revision = self.content.revision;
        Some(match command {
            Command::Open { .. } => Event::Opened { store: self.id, revision },
            Command::Grant if self.is_full => full(),
            Command::Grant => {
                self.next_lease += 1;
                self.content.leases.insert(self.next_lease, now + LEASE_MS);
                Event::Granted { lease: self.next_lease }
            }
            Command::Renew { lease } => match self.content.leases.get_mut(&lease) {
                Some(ends) => {
                    *ends = now + LEASE_MS;
                    Event::Renewed
                }
                None => Event::LeaseGone,
            },
            Command::List => Event::Listed { revision, rows: self.rows() },
            Command::Watch { from } if from <= self.compacted => Event::Compacted,
            Command::Watch { from } => {
                self.close(node);
                self.watches.push(Watch { node, attempt, next: from, is_silent: false });
                return None;
            }
            Command::Write { ops, .. }
                if self.is_full && ops.iter().any(|op| matches!(op, Op::Put { .. })) =>
            {
                full()
            }
            Command::Write { lease, ops } => self.write(lease, ops),
            Command::Audit => {
                let newest = self.content.keys.values().map(|it| it.revision).max().unwrap_or(0);
                Event::Audited { store: self.id, revision, count: self.content.keys.len(), newest }
            }
            Command::Close => {
                self.close(node);
                return None;
            }
        })
    }

    fn rows(&self) -> Vec<Row> {
        let row = |(key, value): (&String, &Value)| {
            let (key, value, revision) = (key.clone(), value.text.clone(), value.revision);
            Row { key, value, revision }
        };
        self.content.keys.iter().map(row).collect()
    }

    fn write(&mut self, lease: i64, ops: Vec<Op>) -> Event {
        assert!((1..=125).contains(&ops.len()), "{} operations at once", ops.len());
        let mut keys: Vec<&str> = ops.iter().map(Op::key).collect();
        keys.sort_unstable();
        assert!(keys.windows(2).all(|pair| pair[0] != pair[1]), "a key twice");
        if !self.content.leases.contains_key(&lease) {
            let said = "requested lease not found".to_owned();
            return Event::Refused { why: Refusal::LeaseGone, said };
        }
        let change = |op| match op {
            Op::Put { key, value } => Change::Put(Row { key, value, revision: 0 }),
            Op::Delete { key } => Change::Delete(key),
        };
        Event::Written { revision: self.change(ops.into_iter().map(change).collect(), lease) }
    }
}

fn full() -> Event {
    Event::Refused { why: Refusal::Full, said: "mvcc: database space exceeded".to_owned() }
}
