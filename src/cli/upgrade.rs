//! `lb upgrade`: has the running balancer start the program that is installed now and leave everything to it,
//! and waits for the outcome.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep};

use super::door::{Door, sessions};
use super::{Failure, print, running, wait_for};
use crate::boot;
use crate::client::admin;
use crate::config::file;
use crate::control::status::Status;

/// A balancer that has not said by then what came of it hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often to ask.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Run the installed version in place of the running one; sessions go on.
///
/// The running balancer starts its program's file again, with its own arguments, and leaves it doors, sessions
/// and backends. Requests under way are answered by the old process, and their connections follow then; sessions
/// under TLS end there, within timeouts.drain_ms. If the new process cannot go on, nothing changes for anybody, and
/// the exit code is 2. Changed settings are read by the new process.
#[derive(Args)]
pub struct Arguments {
    /// Succeed without doing anything if no balancer answers at the admin door
    #[arg(long)]
    if_running: bool,
    /// Find the balancer by its settings file, in place of --admin
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    config: Option<PathBuf>,
    #[command(flatten)]
    door: Door,
}

pub fn run(mut arguments: Arguments) -> Result<(), Failure> {
    if let Some(file) = &arguments.config {
        match admin_of(file)? {
            Some(admin) => arguments.door.admin = admin,
            None if arguments.if_running => {
                return print("the settings have no admin door, so the balancer is left alone\n");
            }
            None => {
                return Err(Failure(format!(
                    "{} has no admin door: send SIGUSR2 to the balancer's process instead",
                    file.display()
                )));
            }
        }
    }
    wait_for(upgrade(&arguments))?
}

/// Where a balancer with these settings is asked: at its socket, or at its door from this host.
fn admin_of(file: &Path) -> Result<Option<String>, Failure> {
    let name = file.display();
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("cannot read {name}: {error}; name the balancer's file"))?;
    let config = file::read(&name.to_string(), &text)?;
    let socket = config.admin.socket.map(|path| path.display().to_string());
    let door = config.listen.admin.map(boot::from_here);
    Ok(socket.or(door))
}

async fn upgrade(arguments: &Arguments) -> Result<(), Failure> {
    let door = &arguments.door;
    if arguments.if_running && !admin::is_there(&door.admin).await {
        return print("no balancer runs, nothing to upgrade\n");
    }
    let before = admin::status(&door.admin).await?;
    ask(door, &before).await?;
    let end = Instant::now() + PATIENCE;
    let refused = failures(&before);
    while Instant::now() < end {
        sleep(ASK_EVERY).await;
        // Between two processes, the door may be slow to answer.
        let Ok(now) = admin::status(&door.admin).await else { continue };
        if now.handover.generation > before.handover.generation && now.pid != before.pid {
            return print(&told(&before, &now));
        }
        if now.pid == before.pid && failures(&now) > refused {
            let why = now.handover.failed.map(|failed| failed.why).unwrap_or_default();
            return Err(Failure(format!(
                "nothing was changed, process {} goes on: {why}",
                now.pid
            )));
        }
        if now.pid != before.pid {
            return Err(Failure(format!(
                "process {} was restarted as process {} meanwhile; look into its log",
                before.pid, now.pid
            )));
        }
    }
    Err(Failure(format!(
        "the balancer has not said within {} s what came of it; look into its log",
        PATIENCE.as_secs()
    )))
}

/// Over the socket or with a token; as its user or root on this host, a signal says the same.
async fn ask(door: &Door, before: &Status) -> Result<(), Failure> {
    if admin::is_socket(&door.admin) || door.has_token() {
        return Ok(door.change("/upgrade").await.map(drop)?);
    }
    match before.handover.refuses() {
        Some(why) => Err(Failure(why.to_owned())),
        None => running::tell(&running::status(&door.admin).await?, Signal::SIGUSR2),
    }
}

fn failures(status: &Status) -> u64 {
    status.handover.failures.values().sum()
}

fn told(before: &Status, now: &Status) -> String {
    let version = match before.version == now.version {
        true => format!("lb {}", now.version),
        false => format!("lb {} in place of {}", now.version, before.version),
    };
    let taken = now.handover.taken.as_ref();
    let stall = taken.map(|taken| taken.stall_us as f64 / 1000.0).unwrap_or_default();
    let kept = sessions(taken.map(|taken| taken.sessions).unwrap_or_default());
    format!(
        "{version} serves as process {} (before: {}): {kept} went on, nobody was served for {stall:.1} ms\n",
        now.pid, before.pid
    )
}
