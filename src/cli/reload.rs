//! `lb reload`: makes the running balancer read its settings again, and waits for what comes of it.

use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep};

use super::{Fault, peer, print, running, wait_for};
use crate::control::status::Status;

/// A balancer that has not answered by then is too busy or hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is asked.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Take changed settings into use without touching a session.
///
/// The running balancer reads its file again. Its log names each setting that is in use from then on,
/// and each that needs a restart; a file with a fault changes nothing, and the exit code is 2.
#[derive(Args)]
pub struct Arguments {
    /// The balancer's admin door, on this host
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = peer)]
    admin: String,
}

pub fn run(arguments: Arguments) -> Result<(), Fault> {
    wait_for(reload(&arguments.admin))??;
    print("reloaded\n")
}

async fn reload(door: &str) -> Result<(), Fault> {
    let before = running::status(door).await?;
    running::tell(&before, Signal::SIGHUP)?;
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let after = running::status(door).await?;
        if count(&after, "reloads_refused") > count(&before, "reloads_refused") {
            return Err(Fault(
                "the settings have a fault and nothing was changed; the balancer's log names it, and \
                 so does `lb check` with the same file"
                    .to_owned(),
            ));
        }
        if count(&after, "reloads") > count(&before, "reloads") {
            return Ok(());
        }
        sleep(ASK_EVERY).await;
    }
    Err(Fault(format!(
        "the balancer has not reloaded within {} s; look into its log",
        PATIENCE.as_secs()
    )))
}

fn count(status: &Status, name: &str) -> u64 {
    status.control.get(name).copied().unwrap_or(0)
}
