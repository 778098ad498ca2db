//! Groups of one service, for blue/green and canary: which share of the users each gets, and the order
//! in which the groups and the backends within them are served. Owns the names, the shares and both
//! levels of the rotation; the choice for one user is up to `balance`. Pure and frozen, but for the turn
//! counters.
//!
//! A group takes part if its share is above 0 and somebody in it serves. The groups that take part deal
//! the users out among themselves by their shares, so that the split stays valid when one side is gone.
//! Each level counts its own turns, which keeps both exact:
//!
//! ```text
//!   service.turn ──> blue 95 : green 5
//!   group.turn   ──> within blue by weight     within green by weight
//! ```

use std::sync::Arc;

use super::backend::{Backend, Standing};
use super::rotation::Rotation;
use super::table::{Mould, Table};
use super::turn::Turn;

/// Groups of one service, at most. One pick keeps those it has tried in the bits of a `u16`.
pub const GROUPS_MAX: usize = 16;
/// The largest share that a group may have.
pub const SHARE_MAX: u8 = 100;

/// A group of a service's backends.
#[derive(Clone, Debug)]
pub struct Group {
    pub name: Arc<str>,
    /// The group's part of the users, relative to the other groups that take part. 0: none.
    pub share: u8,
    /// Shared by all workers and snapshots, as that of the service is.
    pub turn: Arc<Turn>,
}

/// By name and share: the turn counter goes with the name.
impl PartialEq for Group {
    fn eq(&self, other: &Group) -> bool {
        (&self.name, self.share) == (&other.name, other.share)
    }
}

impl Eq for Group {}

/// The backends of one group that takes part, in the order in which they are served.
#[derive(Clone, Debug)]
pub struct Part {
    pub group: Group,
    /// Of places among all backends of the service.
    pub rotation: Rotation,
    /// Whom users of the group return to, if the policy wants it.
    pub table: Option<Table>,
}

/// The order in which the groups of a service are served, and within each the backends.
#[derive(Clone, Debug)]
pub struct Split {
    parts: Box<[Part]>,
    /// Of places in `parts`.
    order: Rotation,
}

/// The groups with these names and shares. A group that there was before goes on with its turns.
pub fn regrouped(before: &[Group], wanted: &[(&str, u8)]) -> Arc<[Group]> {
    let group = |(name, share): &(&str, u8)| match before.iter().find(|it| *it.name == **name) {
        Some(known) => Group { share: *share, ..known.clone() },
        None => Group { name: (*name).into(), share: *share, turn: Arc::default() },
    };
    wanted.iter().map(group).collect()
}

/// Whether these are the groups with their shares.
pub fn are(groups: &[Group], wanted: &[(&str, u8)]) -> bool {
    groups.iter().map(|group| (&*group.name, group.share)).eq(wanted.iter().copied())
}

impl Split {
    /// The split of the backends in this standing, with tables if there is a mould for them. `None` if no group
    /// takes part.
    pub fn of(
        groups: &[Group],
        backends: &[Backend],
        standing: Standing,
        mould: Option<&Mould<'_>>,
    ) -> Option<Split> {
        if groups.is_empty() {
            return None;
        }
        let mut members: Vec<Vec<(u16, u16)>> = vec![Vec::new(); groups.len()];
        for (place, backend) in (0u16..).zip(backends).filter(|it| it.1.standing == standing) {
            if let Some(group) = place_of(groups, backend) {
                members[group].push((place, backend.weight));
            }
        }
        let table = |place| mould?.cast(|backend| place_of(groups, backend) == Some(place));
        let parts: Box<[Part]> = (groups.iter().zip(&members).enumerate())
            .filter(|(_, (group, members))| group.share > 0 && !members.is_empty())
            .map(|(place, (group, members))| Part {
                group: group.clone(),
                rotation: Rotation::weighted(members),
                table: table(place),
            })
            .collect();
        let shares: Vec<(u16, u16)> =
            (0u16..).zip(&parts).map(|(place, part)| (place, part.group.share.into())).collect();
        (!parts.is_empty()).then(|| Split { parts, order: Rotation::weighted(&shares) })
    }

    /// The groups that take part.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The group whose turn it is, and then the others, nearest turn first; each once.
    pub fn from_turn(&self, turn: u64) -> impl Iterator<Item = &Part> {
        let mut met = 0u16;
        let first_time = move |place: &u16| {
            let bit = 1u16 << place;
            let is_new = met & bit == 0;
            met |= bit;
            is_new
        };
        self.order.from_turn(turn).filter(first_time).map(|place| &self.parts[usize::from(place)])
    }

    /// The group of a backend, if it takes part.
    pub fn part_of(&self, backend: &Backend) -> Option<&Part> {
        let group = backend.group.as_deref()?;
        self.parts.iter().find(|part| *part.group.name == *group)
    }

    /// Whether the backend at this place is served.
    pub fn has(&self, place: u16) -> bool {
        self.parts.iter().any(|part| part.rotation.has(place))
    }

    /// The places of all backends that are served, each once.
    pub fn places(&self) -> impl Iterator<Item = u16> + '_ {
        self.parts.iter().flat_map(|part| part.rotation.places())
    }

    /// Each place with its turns in a round over both levels, and how many turns that round has.
    pub fn turns(&self) -> impl Iterator<Item = (u16, u64, u64)> + '_ {
        self.order.shares().iter().zip(&self.parts).flat_map(|(group, part)| {
            let (of_group, all) = (u64::from(group.turns), self.order.round());
            part.rotation.shares().iter().map(move |share| {
                (share.place, of_group * u64::from(share.turns), all * part.rotation.round())
            })
        })
    }
}

/// Which of the groups a backend is in; `None` if it is in none of them.
pub fn place_of(groups: &[Group], backend: &Backend) -> Option<usize> {
    let name = backend.group.as_deref()?;
    groups.iter().position(|group| *group.name == *name)
}
