//! `lb stop`: shuts the running balancer down gracefully, as SIGTERM does, and watches it.

use std::fmt::Write;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;
use tokio::time::sleep;

use super::door::door;
use super::{Failure, print, running, wait_for};
use crate::control::status::Status;

/// How often to ask how many sessions are left.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Stop the balancer: no more users, running sessions may end within timeouts.drain_ms.
///
/// Shows how many are left, and returns once the balancer has stopped. Under systemd use
/// `systemctl stop lb`, which does the same.
#[derive(Args)]
pub struct Arguments {
    /// The balancer's admin door on this host, or the path of its admin.socket
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = door)]
    admin: String,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    wait_for(stop(&arguments.admin))?
}

async fn stop(door: &str) -> Result<(), Failure> {
    let before = running::status(door).await?;
    // A second signal would end the sessions at once.
    if before.stops_in_ms.is_none() {
        running::tell(&before, Signal::SIGTERM)?;
    }
    let mut shown = String::new();
    // Its door closes with it.
    while let Ok(status) = running::status(door).await {
        if status.pid != before.pid {
            break;
        }
        let line = line(&status);
        if line != shown {
            print(&line)?;
            shown = line;
        }
        sleep(ASK_EVERY).await;
    }
    print("stopped\n")
}

fn line(status: &Status) -> String {
    let mut line = format!("{} left", super::door::sessions(status.sessions.active));
    if let Some(ms) = status.stops_in_ms {
        // Writing to a string cannot fail.
        let _ = write!(line, ", {} s for them to end", ms.div_ceil(1000));
    }
    line.push('\n');
    line
}
