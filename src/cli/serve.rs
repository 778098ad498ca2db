//! `lb serve`: runs the balancer until it is told to stop.

use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;

use clap::Args;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use tracing::warn;

use super::Failure;
use super::flags::Flags;
use crate::base::thread;
use crate::base::time::Now;
use crate::config::{Config, Listen};
use crate::control::Ending;
use crate::handover::predecessor::Predecessor;
use crate::handover::rehearsal;
use crate::handover::successor::Program;
use crate::tls::demo::Made;
use crate::{boot, logs};

/// Limit on echo backends per protocol.
const DEMO_MAX: i64 = 64;
/// Where a demo speaks HTTPS.
const HTTPS_PORT: u16 = 8443;

/// Run the balancer: users in front, backends that register themselves behind.
///
/// Every setting has a default; flags override the file. SIGTERM lets running sessions end, a second
/// one ends them; SIGHUP rereads the file. `lb check` reports whether it would start.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Also start N echo backends per protocol, which register like any other, and open an HTTPS door
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u16).range(0..=DEMO_MAX))]
    demo: u16,
    /// End when the process that started this one ends
    #[arg(long, hide = true)]
    with_parent: bool,
}

/// The HTTPS door of a demo, with a certificate made at its start.
struct DemoHttps {
    door: SocketAddr,
    certificate: Made,
}

impl DemoHttps {
    /// Beside the API door, unless the settings say themselves how TLS is spoken. Without it, a demo starts all
    /// the same.
    fn beside(config: &Config) -> Option<DemoHttps> {
        let api = config.listen.api?;
        if config.listen.api_tls.is_some() || !config.tls.certificates.is_empty() {
            return None;
        }
        // A demo elsewhere must not take the port of one that is where everybody looks for it.
        let port = if Some(api) == Listen::default().api { HTTPS_PORT } else { 0 };
        let door = SocketAddr::new(api.ip(), port);
        let free = TcpListener::bind(door).map(drop);
        let made = free.and_then(|()| Made::new());
        match made {
            Ok(certificate) => Some(DemoHttps { door, certificate }),
            Err(error) => {
                warn!(address = %door, %error, "the demo goes without HTTPS");
                None
            }
        }
    }

    fn open_in(&self, config: &mut Config) {
        config.listen.api_tls = Some(self.door);
        config.tls.certificates = vec![self.certificate.files.clone()];
    }
}

pub fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    // Before anything could replace the file.
    let program = Program::of_this_process().ok();
    let old = Predecessor::behind_stdin().map_err(|fault| {
        format!("the process that started this one is to leave it everything, but {fault}")
    })?;
    let Some(old) = old else { return start(arguments, program, None) };
    // Before the clock is read for the first time.
    let inherited = Now::inherit(old.hello.clock_origin);
    debug_assert!(inherited.is_ok(), "nobody has asked for the time");
    let way = old.way();
    start(arguments, program, Some(old)).inspect_err(|Failure(why)| way.refuse(why))
}

/// In the place of the `old` balancer, if there is one.
fn start(
    arguments: Arguments,
    program: Option<Program>,
    old: Option<Predecessor>,
) -> Result<ExitCode, Failure> {
    // The process that it began with ends long before a balancer that was handed over.
    if arguments.with_parent && old.is_none() {
        prctl::set_pdeathsig(Signal::SIGTERM)?;
    }
    let mut config = arguments.flags.load()?;
    if arguments.demo > 0 && config.listen.control.is_none() {
        return Err(Failure(
            "--demo registers its backends over the control port, which is \"off\": give it an \
             address with --control"
                .to_owned(),
        ));
    }
    // Until the control core hears them.
    thread::hold_signals();
    let _logs = logs::start(&config.log);
    if old.is_some() {
        rehearsal::pause_at("born");
    }
    let flags = arguments.flags;
    let https = if arguments.demo > 0 { DemoHttps::beside(&config) } else { None };
    https.iter().for_each(|https| https.open_in(&mut config));
    let reread = Box::new(move || {
        let mut config = flags.load().map_err(|Failure(said)| said)?;
        https.iter().for_each(|https| https.open_in(&mut config));
        Ok(config)
    });
    let name = std::env::args_os().next().unwrap_or_default();
    let demo = usize::from(arguments.demo);
    let ending = boot::serve(config, demo, reread, &name.to_string_lossy(), program, old)?;
    // Nothing here is at fault that only a change could mend: a service manager is to start another.
    Ok(if ending == Ending::Orphaned { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
