//! `lb shift`: gives the groups of a service other shares of its users, and says what they are now.

use std::fmt::Write;

use clap::Args;

use super::door::Door;
use super::{Failure, print, wait_for};
use crate::client::admin;
use crate::cluster::groups::SHARE_MAX;
use crate::control::status::{Changed, GroupStatus};

/// Change the shares of a service's groups: blue/green and canary.
///
/// New users are shared out anew at once, and running sessions stay where they are. Groups not named keep
/// their shares. The file's shares are back with the next reload.
#[derive(Args)]
pub struct Arguments {
    /// The service, as the balancer's file names it
    service: String,
    /// Groups with their new shares, such as blue=0 green=100
    #[arg(required = true, value_name = "GROUP=SHARE", value_parser = share)]
    shares: Vec<(String, u8)>,
    #[command(flatten)]
    door: Door,
}

fn share(text: &str) -> Result<(String, u8), String> {
    let parsed = text.split_once('=').map(|(group, share)| (group, share.parse()));
    match parsed {
        Some((group, Ok(share))) if !group.is_empty() && share <= SHARE_MAX => {
            Ok((group.to_owned(), share))
        }
        _ => Err(format!("write GROUP=SHARE with a share from 0 to {SHARE_MAX}, such as green=5")),
    }
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (group, share) in &arguments.shares {
        query.append_pair(group, &share.to_string());
    }
    let service: String = form_urlencoded::byte_serialize(arguments.service.as_bytes()).collect();
    let path = format!("/services/{service}/shift?{}", query.finish());
    let changed = wait_for(shift(&arguments, &path))??;
    print(&told(&arguments.service, &changed.groups, changed.sessions))
}

/// A balancer without groups refuses the request as one that it does not know, or takes it for another.
async fn shift(arguments: &Arguments, path: &str) -> Result<Changed, String> {
    let door = &arguments.door.admin;
    let outcome = arguments.door.change(path).await;
    if outcome.as_ref().is_ok_and(|changed| has_shifted(&changed.groups, &arguments.shares)) {
        return outcome;
    }
    let knows_groups = admin::status_text(door).await.map(|status| knows_groups(&status));
    match (outcome, knows_groups) {
        (_, Ok(false)) => Err(format!(
            "the balancer at {door} is older than groups and has shifted nothing: update it"
        )),
        (Err(said), _) => Err(said),
        (Ok(_), _) => Err(format!(
            "the balancer at {door} does not say that the shares have changed: `lb status` shows what holds"
        )),
    }
}

/// Whether the groups of an answer have the shares that were asked for.
fn has_shifted(groups: &[GroupStatus], wanted: &[(String, u8)]) -> bool {
    let has = |(name, share): &(String, u8)| {
        groups.iter().any(|it| (&it.name, it.share) == (name, *share))
    };
    wanted.iter().all(has)
}

/// Whether a balancer that describes itself so tells each service's groups, even where there are none.
fn knows_groups(status: &[u8]) -> bool {
    let status: serde_json::Value = serde_json::from_slice(status).unwrap_or_default();
    let services = status["services"].as_array();
    services.is_some_and(|all| all.iter().any(|service| service.get("groups").is_some()))
}

/// One line for each group, and one for those who stay.
fn told(service: &str, groups: &[GroupStatus], sessions: u64) -> String {
    let mut out = String::new();
    for GroupStatus { name, share, file_share, backends, serving } in groups {
        // Writing to a string cannot fail.
        let _ = write!(out, "{service} {name}={share}: {serving} of {backends} backends serve");
        if share != file_share {
            let _ = write!(out, ", {file_share} again after the next reload");
        }
        if *share > 0 && *serving == 0 {
            out += ", so the other groups have its users";
        }
        out.push('\n');
    }
    let _ = writeln!(out, "{sessions} sessions stay where they are");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_group_and_a_number_from_0_to_100() {
        assert_eq!(share("blue=0"), Ok(("blue".to_owned(), 0)));
        assert_eq!(share("green=100"), Ok(("green".to_owned(), 100)));
        for wrong in ["blue", "=5", "blue=", "blue=101", "blue=-1", "blue=5%", "blue=256"] {
            assert!(share(wrong).unwrap_err().contains("GROUP=SHARE"), "{wrong}");
        }
    }

    #[test]
    fn a_balancer_knows_groups_if_it_shows_them_and_has_shifted_if_they_are_as_asked() {
        for (status, knows) in [
            (r#"{"services":[{"name":"tcp","groups":[]}]}"#, true),
            (r#"{"services":[{"name":"tcp"}]}"#, false),
            (r#"{"services":[]}"#, false),
            (r#"{"schema":1}"#, false),
            ("oh", false),
        ] {
            assert_eq!(knows_groups(status.as_bytes()), knows, "{status}");
        }
        let name = "blue".to_owned();
        let blue =
            GroupStatus { name: name.clone(), share: 5, file_share: 9, backends: 1, serving: 1 };
        let groups = [blue];
        assert!(has_shifted(&groups, &[(name.clone(), 5)]));
        assert!(!has_shifted(&groups, &[(name.clone(), 6)]) && !has_shifted(&[], &[(name, 5)]));
    }

    #[test]
    fn what_is_said_is_what_holds_now_and_where_it_differs_from_the_file() {
        let group = |name: &str, share, file_share, serving| GroupStatus {
            name: name.to_owned(),
            share,
            file_share,
            backends: 2,
            serving,
        };
        let groups = [group("blue", 0, 95, 2), group("green", 5, 5, 0)];
        assert_eq!(
            told("shop", &groups, 7),
            "shop blue=0: 2 of 2 backends serve, 95 again after the next reload\n\
             shop green=5: 0 of 2 backends serve, so the other groups have its users\n\
             7 sessions stay where they are\n"
        );
    }
}
