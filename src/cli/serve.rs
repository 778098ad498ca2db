//! `lb serve`: runs the balancer until it is told to stop.

use clap::Args;
use nix::sys::prctl;
use nix::sys::signal::Signal;

use super::Failure;
use super::flags::Flags;
use crate::{boot, logs};

/// Limit on echo backends per protocol.
const DEMO_MAX: i64 = 64;

/// Run the balancer: users in front, backends that register themselves behind.
///
/// Every setting has a default; flags override the file. SIGTERM lets running sessions end, a second
/// one ends them; SIGHUP rereads the file. `lb check` reports whether it would start.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Also start N echo backends per protocol, which register like any other
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u16).range(0..=DEMO_MAX))]
    demo: u16,
    /// End when the process that started this one ends
    #[arg(long, hide = true)]
    with_parent: bool,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    if arguments.with_parent {
        prctl::set_pdeathsig(Signal::SIGTERM)?;
    }
    let config = arguments.flags.load()?;
    if arguments.demo > 0 && config.listen.control.is_none() {
        return Err(Failure(
            "--demo registers its backends over the control port, which is \"off\": give it an \
             address with --control"
                .to_owned(),
        ));
    }
    let _logs = logs::start(&config.log);
    let flags = arguments.flags;
    let reread = Box::new(move || flags.load().map_err(|Failure(said)| said));
    let program = std::env::args_os().next().unwrap_or_default();
    boot::serve(config, usize::from(arguments.demo), reread, &program.to_string_lossy())?;
    Ok(())
}
