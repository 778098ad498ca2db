//! `lb undrain BACKEND`: gives backends that an operator has drained users again.

use clap::Args;

use super::door::{called, json_line, path_of};
use super::naming::{self, Among};
use super::{Failure, print, wait_for};
use crate::control::status::{BackendState, BackendStatus, Changed};

/// Give drained backends new users again.
///
/// Takes back `lb drain`. A drain that the backend has asked for itself is the backend's to take back: it may
/// be about to stop.
#[derive(Args)]
pub struct Arguments {
    /// Backends, each by its id, name or address as in `lb status`
    #[arg(value_name = "BACKEND", required = true)]
    backends: Vec<String>,
    #[command(flatten)]
    among: Among,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    wait_for(undrain(&arguments))?
}

async fn undrain(arguments: &Arguments) -> Result<(), Failure> {
    let door = &arguments.among.door;
    let (status, is_known) = door.look().await?;
    let targets = naming::registered(&status, &arguments.backends, arguments.among.scope())?;
    if !is_known {
        return Err(Failure(door.too_old("lb undrain")));
    }
    for before in targets {
        let changed = door.change(&path_of(before, "undrain")).await?;
        print(&if arguments.among.json { json_line(&changed) } else { told(before, &changed) })?;
    }
    Ok(())
}

/// What holds now.
fn told(before: &BackendStatus, changed: &Changed) -> String {
    let who = called(before);
    let Some(after) = &changed.backend else { return format!("{who} has left meanwhile\n") };
    let drained = before.state == BackendState::Draining;
    let failure = after.check.failure.as_deref().map(|why| format!(": {why}"));
    match (drained, after.state) {
        (true, BackendState::Serving) => format!("{who} gets users again\n"),
        (true, BackendState::Failing) => format!(
            "{who} does not drain any more, but its check has to pass first{}\n",
            failure.unwrap_or_default()
        ),
        (true, state) => {
            format!("{who} does not drain any more, but it is {}\n", state.name())
        }
        (false, state) => format!("{who} was not draining: it is {}\n", state.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::tests::backend;
    use crate::control::status::SCHEMA;

    #[test]
    fn what_holds_after_an_undrain_is_told_as_it_is() {
        use BackendState::{Aside, Draining, Failing, Serving};
        for (before, after, words) in [
            (Draining, Serving, "gets users again"),
            (Draining, Failing, "its check has to pass first"),
            (Draining, Aside, "does not drain any more, but it is aside"),
            (Serving, Serving, "was not draining: it is serving"),
        ] {
            let after = Some(BackendStatus { state: after, ..backend() });
            let changed =
                Changed { schema: SCHEMA, sessions: 0, backend: after, groups: Vec::new() };
            let line = told(&BackendStatus { state: before, ..backend() }, &changed);
            assert!(line.contains(words), "{line}");
        }
    }
}
