//! `lb reload`: makes the running balancer reread its settings, and waits for the outcome.

use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep};

use super::door::door;
use super::{Failure, print, running, wait_for};
use crate::control::status::{ReloadStatus, ShiftEnded, Status};

/// A balancer that has not answered by then is too busy or hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often to ask.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Apply changed settings without touching a session.
///
/// The running balancer rereads its file. Prints the settings that now apply and those that need a
/// restart. A faulty file changes nothing, and the exit code is 2.
#[derive(Args)]
pub struct Arguments {
    /// The balancer's admin door on this host, or the path of its admin.socket
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = door)]
    admin: String,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let outcome = wait_for(reload(&arguments.admin))??;
    print(&told(&outcome))
}

/// What an operator wants to know: what applies now, and what needs a restart.
fn told(outcome: &ReloadStatus) -> String {
    let mut out = String::new();
    for setting in &outcome.now {
        out += &format!("in use from now on: {setting}\n");
    }
    for setting in &outcome.after_restart {
        out += &format!("needs a restart: {setting}\n");
    }
    for warning in &outcome.warnings {
        out += &format!("warning: {warning}\n");
    }
    for ShiftEnded { service, shares } in &outcome.shifts_ended {
        out += &format!("the shift of {service} is over: {shares}\n");
    }
    let nothing = outcome.now.len() + outcome.after_restart.len() + outcome.shifts_ended.len() == 0;
    out + if nothing { "reloaded, nothing had changed\n" } else { "reloaded\n" }
}

async fn reload(door: &str) -> Result<ReloadStatus, Failure> {
    let before = running::status(door).await?;
    running::tell(&before, Signal::SIGHUP)?;
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let after = running::status(door).await?;
        if count(&after, "reloads_refused") > count(&before, "reloads_refused") {
            let reason = after.reload.refused.unwrap_or_default();
            return Err(Failure(format!("nothing was changed: {reason}")));
        }
        if count(&after, "reloads") > count(&before, "reloads") {
            return Ok(after.reload);
        }
        sleep(ASK_EVERY).await;
    }
    Err(Failure(format!(
        "the balancer has not reloaded within {} s; look into its log",
        PATIENCE.as_secs()
    )))
}

fn count(status: &Status, name: &str) -> u64 {
    status.control.get(name).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_reload_has_done_is_told_and_nothing_only_if_it_was_nothing() {
        assert_eq!(told(&ReloadStatus::default()), "reloaded, nothing had changed\n");
        let now = vec!["balance.policy = \"source_hash\"".to_owned()];
        let after_restart = vec!["workers = 2".to_owned()];
        let ended = ShiftEnded { service: "shop".into(), shares: "blue=95 green=5".into() };
        let outcome = ReloadStatus { shifts_ended: vec![ended], ..ReloadStatus::default() };
        assert_eq!(told(&outcome), "the shift of shop is over: blue=95 green=5\nreloaded\n");
        let warnings = vec!["listen.admin is open".to_owned()];
        assert_eq!(
            told(&ReloadStatus { warnings, ..ReloadStatus::default() }),
            "warning: listen.admin is open\nreloaded, nothing had changed\n"
        );
        assert_eq!(
            told(&ReloadStatus { now, after_restart, ..outcome }),
            "in use from now on: balance.policy = \"source_hash\"\nneeds a restart: workers = 2\n\
             the shift of shop is over: blue=95 green=5\nreloaded\n"
        );
    }
}
