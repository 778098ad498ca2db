//! What a balancer and its successor say to each other. Owns the words and the form of what comes with them;
//! members that are not known here are passed over, and those that are missing have their defaults.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::cluster::Protocol;

/// A word of either process. Where one comes with a body or descriptors, it says so.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// From the old process: a [`Hello`] as its body, and the descriptors that it names.
    Hello,
    /// From the new one, which can go on from here: an [`Offer`] as its body.
    Offer,
    /// From the new one, which cannot: why, as a sentence with the cure.
    No(String),
    /// From the old one, which still serves: descriptors that come ahead, two of each session of a worker, the first
    /// of which has this number ([`ahead`](crate::estate::ahead)).
    Ahead { worker: u8, first: u32 },
    /// From the old one: no more come ahead.
    AllAhead,
    /// From the new one, which has taken in all of them.
    Expecting,
    /// From the old one, which stands still: everything (`estate::format`), and the token before all other
    /// descriptors.
    State,
    /// From the new one, which has taken the token and serves.
    Running,
    /// From the old one: the service manager knows that the new one is the main process.
    Main,
    /// From the old one, which still has sessions that could not be handed over: by how much its counters
    /// have grown, as the body.
    Difference,
    /// From the old one: users who were in the middle of something, and no longer are (`estate::format`), and their
    /// sockets.
    Late,
}

/// What a successor needs before it can say whether it goes on.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Hello {
    /// The oldest and the newest format of state that the old process can write.
    pub formats: (u16, u16),
    pub version: String,
    /// How many handovers there were before it started.
    pub generation: u64,
    /// The origin of its clock, in nanoseconds of `CLOCK_MONOTONIC`.
    pub clock_origin: u64,
    /// What its control core says before everything else.
    pub prelude: serde_json::Value,
    /// The name in `Via` that it has made up.
    pub via: Option<String>,
    /// The users' doors. Their sockets come with the state.
    pub doors: Vec<UserDoor>,
    /// The first number that no door has had.
    pub next_door: u16,
    /// Where its own doors are; their listeners are descriptors of the message, in this order.
    pub own_doors: Vec<OwnDoor>,
    /// Cores that its workers have to themselves; the claims are the next descriptors.
    pub cores: Vec<usize>,
}

/// A users' door of the old process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UserDoor {
    pub id: u16,
    /// The service whose table asks for it, or the flag that places it.
    pub name: String,
    pub protocol: Protocol,
    /// As the settings had it.
    pub asked: SocketAddr,
    pub address: SocketAddr,
    pub is_tls: bool,
}

/// A door of the control core.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnDoor {
    Control { asked: SocketAddr },
    Admin { asked: SocketAddr },
    Socket { path: std::path::PathBuf },
}

/// What a successor says of itself when it could go on.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Offer {
    /// The format of state that it wants.
    pub format: u16,
    /// It takes in descriptors that come ahead.
    pub expects: bool,
    /// Doors of the old process that it does not open, by their numbers.
    pub doors_gone: Vec<u16>,
    /// It takes up users one by one when it serves.
    pub takes_late: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_of_another_age_do_no_harm() {
        let newer =
            r#"{"formats":[1,4],"soon":true,"own_doors":[{"control":{"asked":"127.0.0.1:0"}}]}"#;
        let hello: Hello = serde_json::from_str(newer).unwrap();
        assert_eq!(hello.formats, (1, 4));
        assert_eq!(hello.own_doors, [OwnDoor::Control { asked: "127.0.0.1:0".parse().unwrap() }]);
        assert_eq!(hello.next_door, 0);
        let word: Word = serde_json::from_str(r#"{"no":"why"}"#).unwrap();
        assert_eq!(word, Word::No("why".into()));
        assert!(serde_json::from_str::<Word>(r#""later""#).is_err());
    }
}
