//! `lb weight BACKEND WEIGHT`: gives backends another share of the new users.

use clap::Args;

use super::door::{called, json_line, path_of};
use super::naming::{self, Among};
use super::{Failure, print, wait_for};
use crate::cluster::WEIGHT_MAX;
use crate::control::status::{BackendStatus, Changed};

/// Give a backend another share of the new users, relative to the others of its service.
///
/// Holds until the backend registers again, or for one of the file until the next reload.
#[derive(Args)]
pub struct Arguments {
    /// The backend, by its id, name or address as in `lb status`
    backend: String,
    /// Its weight, 1 to 256
    #[arg(value_parser = weight)]
    weight: u16,
    #[command(flatten)]
    among: Among,
}

fn weight(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) => Err("a backend that is to get no users is drained: use `lb drain`".to_owned()),
        Ok(weight @ 1..=WEIGHT_MAX) => Ok(weight),
        _ => Err(format!("write a whole number from 1 to {WEIGHT_MAX}")),
    }
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    wait_for(weigh(&arguments))?
}

async fn weigh(arguments: &Arguments) -> Result<(), Failure> {
    let door = &arguments.among.door;
    let (status, _) = door.look().await?;
    let words = std::slice::from_ref(&arguments.backend);
    for before in naming::registered(&status, words, arguments.among.scope())? {
        let path = format!("{}?to={}", path_of(before, "weight"), arguments.weight);
        let changed = door.change(&path).await?;
        let line = told(before, &changed, arguments.weight);
        print(&if arguments.among.json { json_line(&changed) } else { line })?;
    }
    Ok(())
}

/// The weight as it is now, and the share that it comes to.
fn told(before: &BackendStatus, changed: &Changed, weight: u16) -> String {
    let who = called(before);
    let share = match &changed.backend {
        Some(after) if after.turns > 0 => {
            let share = f64::from(after.turns) * 100.0 / f64::from(after.round);
            format!(", {share:.1} % of the new users")
        }
        Some(after) => format!(", and no new users while it is {}", after.state.name()),
        None => String::new(),
    };
    match before.weight == weight {
        true => format!("{who} has weight {weight} already{share}\n"),
        false => format!("{who} now has weight {weight} instead of {}{share}\n", before.weight),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::tests::backend;
    use crate::control::status::{BackendState, SCHEMA};

    #[test]
    fn a_weight_is_in_its_range_and_none_is_a_drain() {
        assert_eq!((weight("1"), weight("256")), (Ok(1), Ok(256)));
        assert!(weight("0").unwrap_err().contains("lb drain"));
        for text in ["", "257", "-1", "1.5", "10%", "99999999999"] {
            assert!(weight(text).unwrap_err().contains("from 1 to 256"), "{text}");
        }
    }

    #[test]
    fn the_share_that_a_weight_comes_to_is_told() {
        let told = |turns, state, weight| {
            let after = Some(BackendStatus { turns, round: 4, state, ..backend() });
            let changed =
                Changed { schema: SCHEMA, sessions: 0, backend: after, groups: Vec::new() };
            told(&backend(), &changed, weight)
        };
        let line = told(3, BackendState::Serving, 5);
        assert!(
            line.ends_with("now has weight 5 instead of 2, 75.0 % of the new users\n"),
            "{line}"
        );
        let line = told(0, BackendState::Draining, 2);
        assert!(line.ends_with("already, and no new users while it is draining\n"), "{line}");
    }
}
