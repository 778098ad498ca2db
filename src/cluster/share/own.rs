//! What this balancer says in the store. Owns the values that are to stand there, and what has to be written so that
//! they do: whatever the store has forgotten, or somebody has written over, is written again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::event::Op;
use super::key::{NodeId, Place, Prefix};
use super::seal::Seal;
use super::value::{self, NodeReport, Offer, Verb};
use crate::base::time::Now;

/// Most changes that are written at once; etcd takes 128.
pub const BATCH_MAX: usize = 125;
/// How long a word that a backend has left stands, so that one who was away hears of it when it is back.
const WORD_STAYS: Duration = Duration::from_secs(30);
/// Most such words.
const WORDS_MAX: usize = 1024;
/// How long a request waits to be written.
const ASK_WAITS: Duration = Duration::from_secs(5);
/// Most requests that wait.
const ASKS_MAX: usize = 256;

/// What is said of one place.
struct Mine {
    offer: Offer,
    key: String,
    /// When it was said to have left.
    word: Option<Now>,
}

/// Our own words.
pub struct Own {
    me: NodeId,
    prefix: Prefix,
    seal: Seal,
    n: u64,
    node_key: String,
    report: Option<NodeReport>,
    mine: BTreeMap<Place, Mine>,
    /// What is to be in the store,
    wanted: BTreeMap<String, String>,
    /// what is,
    stored: BTreeMap<String, (String, i64)>,
    /// and where that differs.
    dirty: BTreeSet<String>,
    /// Requests to others that are yet to be written, with the time for it.
    asks: BTreeMap<String, (String, Now)>,
    asked: u64,
    /// Requests of others that are done.
    done: BTreeSet<String>,
    words: usize,
}

impl Own {
    pub fn new(prefix: Prefix, seal: Seal, me: NodeId) -> Own {
        Own {
            node_key: prefix.node(&me),
            me,
            prefix,
            seal,
            n: 0,
            report: None,
            mine: BTreeMap::new(),
            wanted: BTreeMap::new(),
            stored: BTreeMap::new(),
            dirty: BTreeSet::new(),
            asks: BTreeMap::new(),
            asked: 0,
            done: BTreeSet::new(),
            words: 0,
        }
    }

    /// Says something of a place. The same as last time is said `again` if others have said otherwise since. Returns
    /// whether it was said.
    pub fn say(&mut self, place: &Place, offer: Offer, again: bool, now: Now) -> bool {
        let known = self.mine.get(place);
        let is_known = known.is_some_and(|known| known.offer == offer && !again);
        if is_known || known.is_none() && !offer.is_claim() {
            return false;
        }
        let was_word = known.is_some_and(|known| known.word.is_some());
        let key = self.prefix.back(&self.me, place);
        self.n += 1;
        let value = self.seal.seal(&key, value::write_back(self.n, &offer));
        if value.len() > value::BACK_BYTES_MAX {
            return false;
        }
        let word = (!offer.is_claim()).then_some(now);
        self.words = self.words + usize::from(word.is_some()) - usize::from(was_word);
        self.wanted.insert(key.clone(), value);
        self.judge(&key);
        self.mine.insert(place.clone(), Mine { offer, key, word });
        true
    }

    /// Takes words from the store that have stood for long enough, and gives up requests that nobody could be told.
    pub fn expire(&mut self, now: Now) {
        self.asks.retain(|_, (_, until)| now < *until);
        if self.words == 0 {
            return;
        }
        let mut words: Vec<(Now, Place)> =
            self.mine.iter().filter_map(|(place, it)| Some((it.word?, place.clone()))).collect();
        words.sort();
        let spare = words.len().saturating_sub(WORDS_MAX);
        for (number, (since, place)) in words.into_iter().enumerate() {
            if number < spare || now.since(since) >= WORD_STAYS {
                let mine = self.mine.remove(&place).expect("it was just found");
                self.wanted.remove(&mine.key);
                self.judge(&mine.key);
                self.words -= 1;
            }
        }
    }

    /// Says something of this balancer itself.
    pub fn report(&mut self, report: NodeReport) {
        self.n += 1;
        let value = self.seal.seal(&self.node_key, value::write_node(self.n, &report));
        self.wanted.insert(self.node_key.clone(), value);
        self.judge(&self.node_key.clone());
        self.report = Some(report);
    }

    pub fn reported(&self) -> Option<&NodeReport> {
        self.report.as_ref()
    }

    /// Asks something of another balancer, once. Returns whether it will be told.
    pub fn ask(&mut self, to: &NodeId, place: &Place, verb: &Verb, now: Now) -> bool {
        if self.asks.len() >= ASKS_MAX {
            return false;
        }
        self.asked += 1;
        let key = self.prefix.ask(to, &self.me, self.asked);
        let value = self.seal.seal(&key, value::write_ask(&place.to_string(), verb));
        self.asks.insert(key, (value, now.plus(ASK_WAITS)));
        true
    }

    /// A request to this balancer has been seen to. Returns whether it is the first time.
    pub fn acted_on(&mut self, key: &str) -> bool {
        self.done.len() < ASKS_MAX && self.done.insert(key.to_owned())
    }

    /// A batch is in the store.
    pub fn written(&mut self, keys: &[String]) {
        for key in keys {
            self.done.remove(key);
            self.asks.remove(key);
        }
    }

    /// What is said of a place, and when it was written; `None`: it has yet to be.
    pub fn about(&self, place: &Place) -> Option<(&Offer, Option<i64>)> {
        let mine = self.mine.get(place).filter(|mine| mine.word.is_none())?;
        let revision = match self.dirty.contains(&mine.key) {
            true => None,
            false => self.stored.get(&mine.key).map(|(_, revision)| *revision),
        };
        Some((&mine.offer, revision))
    }

    /// The store has this under a key of ours.
    pub fn heard(&mut self, key: &str, value: &str, revision: i64) {
        self.stored.insert(key.to_owned(), (value.to_owned(), revision));
        self.judge(key);
    }

    /// The store has that key of ours no more.
    pub fn lost(&mut self, key: &str) {
        self.stored.remove(key);
        self.judge(key);
    }

    /// The store has none of ours, as far as is known.
    pub fn forget_stored(&mut self) {
        let keys: Vec<String> = std::mem::take(&mut self.stored).into_keys().collect();
        self.dirty = self.wanted.keys().cloned().collect();
        keys.iter().for_each(|key| self.judge(key));
    }

    fn judge(&mut self, key: &str) {
        let stored = self.stored.get(key).map(|(value, _)| value);
        if self.wanted.get(key) == stored {
            self.dirty.remove(key);
        } else {
            self.dirty.insert(key.to_owned());
        }
    }

    /// Whether others can see in the store that this balancer is there.
    pub fn is_present(&self) -> bool {
        self.stored.contains_key(&self.node_key)
    }

    /// How many backends of ours the others have yet to hear of.
    pub fn unwritten(&self) -> usize {
        let dirty = |mine: &&Mine| mine.word.is_none() && self.dirty.contains(&mine.key);
        self.mine.values().filter(dirty).count()
    }

    /// How many backends are said to be registered here.
    pub fn said(&self) -> usize {
        self.mine.len() - self.words
    }

    pub fn has_work(&self) -> bool {
        !self.dirty.is_empty() || !self.asks.is_empty() || !self.done.is_empty()
    }

    /// What is to be written next. Our own presence comes last: it says that all the rest is there.
    pub fn batch(&self) -> Vec<Op> {
        let backs = self.dirty.iter().filter(|key| **key != self.node_key);
        let op = |key: &String| match self.wanted.get(key) {
            Some(value) => Op::Put { key: key.clone(), value: value.clone() },
            None => Op::Delete { key: key.clone() },
        };
        let mut ops: Vec<Op> = backs.take(BATCH_MAX).map(op).collect();
        let room = |ops: &Vec<Op>| BATCH_MAX - ops.len();
        if room(&ops) > 0 && self.dirty.contains(&self.node_key) {
            ops.push(op(&self.node_key));
        }
        let done: Vec<String> = self.done.iter().take(room(&ops)).cloned().collect();
        ops.extend(done.into_iter().map(|key| Op::Delete { key }));
        let asks = self.asks.iter().take(room(&ops));
        let asks = asks.map(|(key, (value, _))| Op::Put { key: key.clone(), value: value.clone() });
        ops.extend(asks.collect::<Vec<_>>());
        ops
    }
}
