//! What others say in the store, as far as it is known here. Owns which keys there are, whom they are from, and
//! when a word of theirs has lost its weight. Words are taken back by their own writer; a key that vanishes says
//! nothing but that time begins to run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::event::{Gone, Row};
use super::key::{Key, NodeId, Place, Prefix};
use super::seal::Seal;
use super::value::{self, NodeReport, Offer, State, Verb};
use crate::cluster::registry::DrainedBy;

/// Most places of which others say something, be it that the backend has left.
const PLACES_MAX: usize = 4096;
/// Most processes of other balancers: 32 balancers that have each just been restarted.
const NODES_MAX: usize = 64;
/// Most keys that are counted.
const ROWS_MAX: usize = 16_384;

/// What one balancer says of one backend.
#[derive(Clone, Debug)]
struct Claim {
    offer: Offer,
    n: u64,
    /// When it was written.
    revision: i64,
    /// Whether the store has it, or had and lost it.
    is_stored: bool,
    /// For how long it has been lost, as far as that counts.
    alone: Duration,
}

/// Another balancer.
#[derive(Clone, Debug)]
pub struct Peer {
    pub report: NodeReport,
    n: u64,
    pub is_stored: bool,
    alone: Duration,
}

/// What a key was about.
#[derive(PartialEq, Eq, Debug)]
pub enum Heard {
    /// Of others.
    Nothing,
    /// Of this balancer itself.
    Own,
    /// Somebody asks something of it.
    Asked { place: Place, verb: Verb, from: Arc<str> },
}

/// The others.
pub struct Mirror {
    prefix: Prefix,
    seal: Seal,
    me: NodeId,
    host: Arc<str>,
    rows: BTreeMap<String, i64>,
    /// The newest revision that was heard of.
    pub revision: i64,
    nodes: BTreeMap<NodeId, Peer>,
    claims: BTreeMap<Place, BTreeMap<NodeId, Claim>>,
    /// Places about which something has changed.
    touched: BTreeSet<Place>,
    gone: BTreeMap<Place, Gone>,
    /// Values that nobody of the cluster can have written, or too many.
    pub rejected: u64,
}

impl Mirror {
    pub fn new(prefix: Prefix, seal: Seal, me: NodeId, host: Arc<str>) -> Mirror {
        Mirror {
            prefix,
            seal,
            me,
            host,
            rows: BTreeMap::new(),
            revision: 0,
            nodes: BTreeMap::new(),
            claims: BTreeMap::new(),
            touched: BTreeSet::new(),
            gone: BTreeMap::new(),
            rejected: 0,
        }
    }

    /// A key was written. What is older than what is known of that key is passed over.
    pub fn put(&mut self, row: &Row) -> Heard {
        let known = self.rows.get(&row.key).copied();
        if known.is_some_and(|known| known >= row.revision) {
            return Heard::Nothing;
        }
        if known.is_some() || self.rows.len() < ROWS_MAX {
            self.rows.insert(row.key.clone(), row.revision);
        }
        let Some(key) = self.prefix.parse(&row.key) else { return Heard::Nothing };
        if let Key::Node(node) | Key::Back(node, _) = &key
            && *node == self.me
        {
            return Heard::Own;
        }
        let holds = self.seal.holds(&row.key, &row.value);
        let taken = match key {
            Key::Ask(to, from) if to == self.me && holds => {
                let asked = value::read_ask(&row.value);
                let asked = asked.and_then(|(place, verb)| Some((Place::parse(&place)?, verb)));
                if let Some((place, verb)) = asked {
                    return Heard::Asked { place, verb, from };
                }
                false
            }
            Key::Ask(..) => true,
            Key::Node(node) => holds && self.put_node(node, &row.value),
            Key::Back(node, place) if holds => self.put_claim(node, place, row),
            Key::Back(node, place) => {
                // Somebody has written over what its balancer had said.
                self.lose(&node, &place);
                false
            }
        };
        self.rejected += u64::from(!taken);
        Heard::Nothing
    }

    fn put_node(&mut self, id: NodeId, text: &str) -> bool {
        let Some((n, report)) = value::read_node(text) else { return false };
        if !self.nodes.contains_key(&id) && self.nodes.len() >= NODES_MAX {
            return false;
        }
        let (is_stored, alone) = (true, Duration::ZERO);
        let peer =
            self.nodes.entry(id).or_insert(Peer { report: report.clone(), n, is_stored, alone });
        (peer.is_stored, peer.alone) = (true, Duration::ZERO);
        // An older word than the last comes from a backup.
        if n >= peer.n {
            (peer.n, peer.report) = (n, report);
        }
        true
    }

    fn put_claim(&mut self, node: NodeId, place: Place, row: &Row) -> bool {
        let Some((n, offer)) = value::read_back(&row.value) else {
            self.lose(&node, &place);
            return false;
        };
        if !self.claims.contains_key(&place) && self.claims.len() >= PLACES_MAX {
            return false;
        }
        let claims = self.claims.entry(place.clone()).or_default();
        let known = claims.get(&node).filter(|known| known.n > n);
        let (n, offer) = known.map_or((n, offer), |known| (known.n, known.offer.clone()));
        if !offer.is_claim() {
            let lost = offer.state == State::Lost;
            self.gone.insert(place.clone(), if lost { Gone::Lost } else { Gone::Left });
        }
        let (revision, is_stored, alone) = (row.revision, true, Duration::ZERO);
        claims.insert(node, Claim { offer, n, revision, is_stored, alone });
        self.touched.insert(place);
        true
    }

    /// A key was deleted. Returns whether it was one of this balancer's own.
    pub fn delete(&mut self, key: &str, revision: i64) -> bool {
        if self.rows.get(key).is_none_or(|known| *known > revision) {
            return false;
        }
        self.rows.remove(key);
        match self.prefix.parse(key) {
            Some(Key::Node(node) | Key::Back(node, _)) if node == self.me => return true,
            Some(Key::Node(node)) => {
                if let Some(peer) = self.nodes.get_mut(&node) {
                    peer.is_stored = false;
                }
            }
            Some(Key::Back(node, place)) => self.lose(&node, &place),
            Some(Key::Ask(..)) | None => {}
        }
        false
    }

    /// What a balancer says of a place is in the store no more. A word that ended a claim has done its work.
    fn lose(&mut self, node: &NodeId, place: &Place) {
        let Some(claims) = self.claims.get_mut(place) else { return };
        let Some(claim) = claims.get_mut(node) else { return };
        claim.is_stored = false;
        if !claim.offer.is_claim() {
            claims.remove(node);
        }
        if claims.is_empty() {
            self.claims.remove(place);
        }
        self.touched.insert(place.clone());
    }

    /// Every key there is. What is not among them is lost, and what is there is heard as ever, by the caller.
    pub fn begin_list(&mut self, revision: i64) {
        self.rows.clear();
        self.revision = revision;
        self.nodes.values_mut().for_each(|peer| peer.is_stored = false);
        for (place, claims) in &mut self.claims {
            claims.values_mut().for_each(|claim| claim.is_stored = false);
            self.touched.insert(place.clone());
        }
    }

    /// Whatever the list had no word of any more is done.
    pub fn end_list(&mut self) {
        self.claims.retain(|_, claims| {
            claims.retain(|_, claim| claim.is_stored || claim.offer.is_claim());
            !claims.is_empty()
        });
    }

    /// This is another store, or an older state of the same: revisions begin anew.
    pub fn other_store(&mut self) {
        self.begin_list(0);
        self.claims
            .values_mut()
            .flat_map(BTreeMap::values_mut)
            .for_each(|claim| claim.revision = 0);
    }

    /// What is lost has been so for longer by this. What has been for `most` is over.
    pub fn age(&mut self, by: Duration, most: Duration) {
        let (gone, touched) = (&mut self.gone, &mut self.touched);
        self.claims.retain(|place, claims| {
            let known = claims.len();
            claims.retain(|_, claim| {
                claim.alone += if claim.is_stored { Duration::ZERO } else { by };
                claim.is_stored || claim.alone < most
            });
            if claims.len() < known {
                gone.insert(place.clone(), Gone::Orphaned);
                touched.insert(place.clone());
            }
            !claims.is_empty()
        });
        self.nodes.retain(|_, peer| {
            peer.alone = if peer.is_stored { Duration::ZERO } else { peer.alone + by };
            peer.alone < most
        });
    }

    /// Something has changed about this place.
    pub fn touch(&mut self, place: Place) {
        self.touched.insert(place);
    }

    /// The places about which something has changed since this was asked last.
    pub fn touched(&mut self) -> BTreeSet<Place> {
        std::mem::take(&mut self.touched)
    }

    /// Why nobody has that backend any more.
    pub fn why_gone(&mut self, place: &Place) -> Gone {
        self.gone.remove(place).unwrap_or(Gone::Left)
    }

    /// What holds of a place: the newest word about it that the store has, else the newest that it had. Every
    /// balancer that has heard the same comes to the same. An operator's drain holds until it is taken back by the
    /// balancer that was asked for it.
    pub fn prevailing(&self, place: &Place) -> Option<(&NodeId, Offer, i64)> {
        let counts = |offer: &Offer| {
            offer.is_claim() && offer.host.as_ref().is_none_or(|host| *host == self.host)
        };
        let claims = self.claims.get(place)?.iter().filter(|(_, claim)| counts(&claim.offer));
        let (node, claim) =
            claims.clone().max_by_key(|(node, claim)| (claim.is_stored, claim.revision, *node))?;
        let is_operators = |state: &State| matches!(state, State::Draining(parting) if parting.by == DrainedBy::Operator);
        let revision = if claim.is_stored { claim.revision } else { 0 };
        let mut drains = claims.filter(|(_, claim)| is_operators(&claim.offer.state));
        let (node, state) = match drains.next() {
            Some((other, drains)) if !is_operators(&claim.offer.state) => {
                (other, drains.offer.state)
            }
            _ => (node, claim.offer.state),
        };
        Some((node, Offer { state, ..claim.offer.clone() }, revision))
    }

    /// Who has a backend registered there and is in the store.
    pub fn owners(&self, place: &Place) -> Vec<NodeId> {
        let claims = self.claims.get(place).into_iter().flatten();
        let live = claims.filter(|(_, claim)| claim.is_stored && claim.offer.is_claim());
        live.map(|(node, _)| node.clone()).collect()
    }

    /// Every drain that another balancer runs: whose it is, of what, and its number.
    pub fn partings(&self) -> impl Iterator<Item = (&NodeId, &Place, u64)> {
        let all = self.claims.iter();
        let all = all.flat_map(|(place, claims)| claims.iter().map(move |it| (place, it)));
        all.filter_map(|(place, (node, claim))| match claim.offer.state {
            State::Draining(parting) => Some((node, place, parting.number)),
            _ => None,
        })
    }

    pub fn nodes(&self) -> impl Iterator<Item = (&NodeId, &Peer)> {
        self.nodes.iter()
    }

    /// How many words are lost and still hold.
    pub fn orphans(&self) -> usize {
        let all = self.claims.values().flat_map(BTreeMap::values);
        all.filter(|claim| !claim.is_stored && claim.offer.is_claim()).count()
    }

    /// How many words a balancer has about backends.
    pub fn claims_of(&self, node: &NodeId) -> usize {
        let claims = self.claims.values().filter_map(|claims| claims.get(node));
        claims.filter(|claim| claim.offer.is_claim()).count()
    }

    /// The number of keys and the newest revision among them; `None` if there are more than are counted.
    pub fn sum(&self) -> Option<(usize, i64)> {
        let newest = self.rows.values().copied().max().unwrap_or(0);
        (self.rows.len() < ROWS_MAX).then_some((self.rows.len(), newest))
    }
}
