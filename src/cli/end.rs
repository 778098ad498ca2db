//! `lb end SESSION`: ends running sessions, found by their ids or by their users' addresses.

use std::net::{IpAddr, SocketAddr};

use clap::Args;
use ipnet::IpNet;

use super::door::{Door, json_line};
use super::{Failure, print, wait_for};
use crate::client::admin;
use crate::control::status::{Changed, SCHEMA, SessionStatus};
use crate::session::SessionId;

/// Most sessions listed in one sentence.
const LISTED_MAX: usize = 8;
/// Most sessions of one address that are ended in one go.
const SESSIONS_MAX: usize = 1_000_000;

/// End running sessions.
///
/// `lb sessions` lists them. To end all that are on one backend, use `lb drain BACKEND --within now`.
#[derive(Args)]
pub struct Arguments {
    /// Sessions, each by its id such as 0-17-4, or by its user's address such as 192.0.2.7:40312
    #[arg(value_name = "SESSION", required = true)]
    sessions: Vec<String>,
    /// End every session of an address or of a network such as 10.1.0.0/16, not only a single one
    #[arg(long)]
    all: bool,
    /// Print the balancer's answers as JSON, one a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    door: Door,
}

/// What a word can mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Meant {
    Id(SessionId),
    User(SocketAddr),
    Users(IpNet),
}

/// An address, also in the brackets that one has with a port.
pub fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    bare.parse().ok().map(|ip: IpAddr| ip.to_canonical())
}

fn meant(word: &str) -> Result<Meant, String> {
    let id = word.parse().ok().map(Meant::Id);
    let user = || word.parse().ok().map(Meant::User);
    let host = || address(word).map(|ip| Meant::Users(ip.into()));
    let network = || word.parse().ok().map(Meant::Users);
    id.or_else(user).or_else(host).or_else(network).ok_or_else(|| {
        format!(
            "{word} is neither a session's id such as 0-17-4 nor a user's address; `lb sessions` lists \
             the sessions"
        )
    })
}

/// A session to end.
struct Target {
    id: String,
    /// With its user, if known.
    called: String,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    wait_for(end(&arguments))?
}

async fn end(arguments: &Arguments) -> Result<(), Failure> {
    let words: Vec<(&String, Meant)> = (arguments.sessions.iter())
        .map(|word| meant(word).map(|meant| (word, meant)))
        .collect::<Result<_, _>>()?;
    let mut targets: Vec<Target> = Vec::new();
    for (word, meant) in words {
        for target in find(arguments, word, meant).await? {
            if !targets.iter().any(|other| other.id == target.id) {
                targets.push(target);
            }
        }
    }
    for Target { id, called } in targets {
        let answer = arguments.door.change(&format!("/sessions/{id}/end")).await;
        let line = match answer {
            Ok(changed) if arguments.json => json_line(&changed),
            Ok(Changed { .. }) => format!("{called} is ended\n"),
            // Of many, some end by themselves meanwhile.
            Err(said) if arguments.all && said.contains("is running") => match arguments.json {
                true => json_line(&nothing()),
                false => format!("{called} had ended already\n"),
            },
            Err(said) => return Err(Failure(said)),
        };
        print(&line)?;
    }
    Ok(())
}

/// The answer to the end of a session that has ended by itself.
fn nothing() -> Changed {
    Changed { schema: SCHEMA, sessions: 0, backend: None, groups: Vec::new() }
}

async fn find(arguments: &Arguments, word: &str, meant: Meant) -> Result<Vec<Target>, String> {
    let door = &arguments.door.admin;
    let network = match meant {
        Meant::Id(id) => return by_id(door, id).await.map(|target| vec![target]),
        Meant::User(user) => IpNet::from(user.ip().to_canonical()),
        Meant::Users(network) => network,
    };
    let filters = [("client", network.to_string())];
    let (of_host, _) = admin::sessions(door, &filters, None, SESSIONS_MAX).await?;
    chosen(word, meant, &of_host, arguments.all)
}

/// The session with this id. One that has ended has given its place to another, or to nobody.
async fn by_id(door: &str, id: SessionId) -> Result<Target, String> {
    let place = format!("{}-{}", id.worker, id.place);
    let filters = [("worker", id.worker.to_string())];
    let (found, _) = admin::sessions(door, &filters, Some(&place), 1).await?;
    match found.first() {
        Some(session) if session.id == id.to_string() => Ok(target(session)),
        Some(session) if session.id.starts_with(&format!("{place}-")) => {
            Err(format!("session {id} has ended; in its place runs {}", called(session)))
        }
        _ => Err(format!("no session {id} is running; `lb sessions` lists those that are")),
    }
}

/// Those of the sessions of a host or network that are meant.
fn chosen(
    word: &str,
    meant: Meant,
    of_host: &[SessionStatus],
    all: bool,
) -> Result<Vec<Target>, String> {
    let is_meant = |it: &&SessionStatus| match meant {
        Meant::User(user) => {
            (it.client.ip().to_canonical(), it.client.port())
                == (user.ip().to_canonical(), user.port())
        }
        _ => true,
    };
    let found: Vec<&SessionStatus> = of_host.iter().filter(is_meant).collect();
    let nearest: Vec<&SessionStatus> = of_host.iter().collect();
    match (found.len(), of_host.len()) {
        (0, 0) => {
            Err(format!("no session of {word} is running; `lb sessions` lists those that are"))
        }
        (0, _) => Err(format!(
            "no session of {word} is running; those of the same host are {}",
            listed(&nearest)
        )),
        (2.., _) if !all => Err(format!(
            "{word} has {} sessions: {}; give the id of one, or end all of them with --all",
            found.len(),
            listed(&found)
        )),
        _ => Ok(found.into_iter().map(target).collect()),
    }
}

fn target(session: &SessionStatus) -> Target {
    Target { id: session.id.clone(), called: called(session) }
}

/// A session as the lines of this command call it: `0-17-4 (shop 192.0.2.7:40312 on b3)`.
fn called(session: &SessionStatus) -> String {
    let on = session.backend.as_ref().map(|backend| format!(" on {backend}")).unwrap_or_default();
    format!("{} ({} {}{on})", session.id, session.service, session.client)
}

fn listed(sessions: &[&SessionStatus]) -> String {
    let mut shown: Vec<String> = sessions.iter().take(LISTED_MAX).map(|it| called(it)).collect();
    if sessions.len() > LISTED_MAX {
        shown.push(format!("and {} more", sessions.len() - LISTED_MAX));
    }
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_meant_by_its_id_or_by_its_user() {
        let id = SessionId { worker: 0, place: 17, generation: 4 };
        for (word, expected) in [
            ("0-17-4", Meant::Id(id)),
            ("192.0.2.7:80", Meant::User("192.0.2.7:80".parse().unwrap())),
            ("192.0.2.7", Meant::Users("192.0.2.7/32".parse().unwrap())),
            ("[2001:db8::1]", Meant::Users("2001:db8::1/128".parse().unwrap())),
            ("10.1.0.0/16", Meant::Users("10.1.0.0/16".parse().unwrap())),
        ] {
            assert_eq!(meant(word), Ok(expected), "{word}");
        }
        for word in ["", "0-17", "b3", "web1", "10.0.0.0/99"] {
            assert!(meant(word).unwrap_err().contains("`lb sessions` lists"), "{word}");
        }
    }

    #[test]
    fn one_session_of_a_user_is_ended_and_several_only_if_all_are_meant() {
        let session = |id: &str, client: &str| SessionStatus {
            client: client.parse().unwrap(),
            backend: Some("b3".into()),
            ..SessionStatus::example(id, "shop")
        };
        let two = [session("0-1-1", "192.0.2.7:1"), session("0-2-1", "192.0.2.7:2")];
        let ids = |word: &str, all| {
            let found = chosen(word, meant(word).unwrap(), &two, all)?;
            Ok::<_, String>(found.into_iter().map(|it| it.id).collect::<Vec<_>>())
        };
        assert_eq!(ids("192.0.2.7:2", false), Ok(vec!["0-2-1".to_owned()]));
        assert_eq!(ids("192.0.2.7", true), Ok(vec!["0-1-1".to_owned(), "0-2-1".to_owned()]));
        let said = ids("192.0.2.7", false).unwrap_err();
        assert!(said.contains("has 2 sessions: 0-1-1 (shop 192.0.2.7:1 on b3), 0-2-1"), "{said}");
        let said = ids("192.0.2.7:3", true).unwrap_err();
        assert!(said.contains("those of the same host are 0-1-1"), "{said}");
        let said = chosen("10.0.0.1", meant("10.0.0.1").unwrap(), &[], true);
        assert!(said.is_err_and(|said| said.contains("no session of 10.0.0.1 is running")));
    }
}
