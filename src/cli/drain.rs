//! `lb drain BACKEND`: takes backends out of the rotation, says what that will do, and waits for it if asked to.

mod wait;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::time::{Instant, sleep};

use super::door::{called, json_line, path_of, sessions};
use super::naming::{self, Among};
use super::table::lasting;
use super::{Failure, duration, print, wait_for};
use crate::client::admin;
use crate::control::status::{BackendState, BackendStatus, Changed, Status};
use crate::control::verbs::DRAIN_MAX;
use crate::logs;
use wait::Wait;

/// How often to ask how many sessions are left.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// The exit code if sessions did not end by themselves.
const CUT: u8 = 1;

/// Take backends out of the rotation: no new users, and the sessions that are left are ended after a time.
///
/// The backend stays registered, and `lb undrain` gives it users again. To change the time, drain it again
/// with another --within. With --wait, exits with 0 once no session is left, and with 1 if some had to be
/// ended; interrupting it stops the waiting only. To stop the balancer itself, use `lb stop`.
#[derive(Args)]
pub struct Arguments {
    /// Backends, each by its id, name or address as in `lb status`
    #[arg(value_name = "BACKEND")]
    backends: Vec<String>,
    /// How long their sessions may go on: a time such as 30s, 5m or 1h, `now` or `never`; otherwise the
    /// balancer's timeouts.drain_ms, or what the drain was given before
    #[arg(long, value_name = "TIME", value_parser = within)]
    within: Option<Within>,
    /// Return only when no session is left
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    among: Among,
}

/// How long sessions may go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Within {
    Time(Duration),
    Never,
}

fn within(text: &str) -> Result<Within, String> {
    match text {
        "now" => Ok(Within::Time(Duration::ZERO)),
        "never" => Ok(Within::Never),
        text => match duration(text) {
            Ok(time) if time <= DRAIN_MAX => Ok(Within::Time(time)),
            Ok(_) => Err("at most 24h, or never".to_owned()),
            Err(said) => Err(format!("{said}; or write now or never")),
        },
    }
}

/// This command used to stop the balancer, so what it does now is said to whoever names no backend.
const NOBODY: &str = "`lb drain BACKEND` drains a backend, which `lb status` lists; to stop the balancer, \
                      type `lb stop`. Nothing was done";

pub fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    if arguments.backends.is_empty() {
        return Err(Failure(NOBODY.to_owned()));
    }
    wait_for(drain(&arguments))?
}

async fn drain(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let door = &arguments.among.door;
    let (status, is_known) = door.look().await?;
    let targets = naming::registered(&status, &arguments.backends, arguments.among.scope())?;
    if !is_known && arguments.within == Some(Within::Never) {
        return Err(Failure(door.too_old("lb drain --within never")));
    }
    for before in &targets {
        let changed = door.change(&path(before, arguments.within)).await?;
        let line = told(before, &changed, arguments.within);
        print(&if arguments.among.json { json_line(&changed) } else { line })?;
    }
    for service in deserted(&status, &targets) {
        let said = format!("no other backend of service {service} is serving now");
        let _ = io::stderr().write_all(logs::last_words(&said).as_bytes());
    }
    match arguments.wait {
        true => wait(arguments, &status, &targets).await,
        false => Ok(ExitCode::SUCCESS),
    }
}

fn path(backend: &BackendStatus, within: Option<Within>) -> String {
    let path = path_of(backend, "drain");
    match within {
        None => path,
        Some(Within::Never) => path + "?deadline_ms=never",
        Some(Within::Time(time)) => format!("{path}?deadline_ms={}", time.as_millis()),
    }
}

/// What the drain of a backend will do.
fn told(before: &BackendStatus, changed: &Changed, within: Option<Within>) -> String {
    let (who, left) = (called(before), sessions(changed.sessions));
    let drain = changed.backend.as_ref().map(|it| &it.drain);
    let left_ms = match (&changed.backend, within) {
        (Some(after), _) => after.drains_in_ms,
        (None, Some(Within::Time(time))) => u64::try_from(time.as_millis()).ok(),
        (None, _) => None,
    };
    let drains = match (before.state, within) {
        (BackendState::Draining, None) => "was draining already",
        (BackendState::Draining, Some(_)) => "was draining already and has a new deadline",
        _ => "drains",
    };
    let are = if changed.sessions == 1 { "is" } else { "are" };
    let what = match (changed.sessions, left_ms, drain) {
        (0, ..) => "no session is left".to_owned(),
        (_, Some(0), _) => format!("its {left} {are} ended now"),
        (_, Some(ms), _) => format!("{left} left, which {are} ended in {}", lasting(ms)),
        (_, None, None) => format!("{left} left, which {are} ended after timeouts.drain_ms"),
        (_, None, Some(_)) => format!("{left} left, which may end by themselves"),
    };
    let back = match drain.and_then(|drain| drain.by.as_deref()) {
        Some("operator") => format!("; `lb undrain {}` gives it users again", before.id),
        Some("owner") => "; it has asked to drain itself, and leaves then".to_owned(),
        _ => String::new(),
    };
    format!("{who} {drains}: {what}{back}\n")
}

/// The services of these backends that nobody else serves.
fn deserted<'s>(status: &'s Status, targets: &[&'s BackendStatus]) -> Vec<&'s str> {
    let is_target = |it: &&BackendStatus| targets.iter().any(|target| target.id == it.id);
    let serves = |service: &str| {
        let others = status.backends.iter().filter(|it| it.service == service && !is_target(it));
        others.into_iter().any(|it| it.state == BackendState::Serving)
    };
    let mut found: Vec<&str> = Vec::new();
    for service in targets.iter().map(|it| it.service.as_str()) {
        if !serves(service) && !found.contains(&service) {
            found.push(service);
        }
    }
    found
}

async fn wait(
    arguments: &Arguments,
    before: &Status,
    targets: &[&BackendStatus],
) -> Result<ExitCode, Failure> {
    let began = Instant::now();
    let mut waits: Vec<Wait> = targets.iter().map(|it| Wait::new(it)).collect();
    while waits.iter().any(|it| !it.is_over()) {
        let status = admin::status(&arguments.among.door.admin).await?;
        if status.pid != before.pid {
            return Err(Failure("the balancer was restarted meanwhile; drain again".to_owned()));
        }
        for wait in waits.iter_mut().filter(|it| !it.is_over()) {
            if let Some(line) = wait.look(&status, began.elapsed())?
                && !arguments.among.json
            {
                print(&line)?;
            }
        }
        sleep(ASK_EVERY).await;
    }
    match waits.iter().any(|it| it.cut() > 0) {
        true => Ok(ExitCode::from(CUT)),
        false => Ok(ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::tests::{backend, status};
    use crate::control::status::{DrainStatus, SCHEMA};

    #[test]
    fn a_time_is_how_long_sessions_may_go_on() {
        let time = |ms| Ok(Within::Time(Duration::from_millis(ms)));
        for (text, expected) in [
            ("30s", time(30_000)),
            ("30", time(30_000)),
            ("500ms", time(500)),
            ("24h", time(86_400_000)),
            ("1d", time(86_400_000)),
            ("now", time(0)),
            ("0", time(0)),
            ("never", Ok(Within::Never)),
        ] {
            assert_eq!(within(text), expected, "{text}");
        }
        for text in ["", "soon", "2d", "25h", "-1", "30 s"] {
            assert!(within(text).unwrap_err().contains("never"), "{text}");
        }
    }

    #[test]
    fn a_drain_is_asked_for_with_its_deadline() {
        let second = Some(Within::Time(Duration::from_secs(1)));
        for (within, path) in [
            (None, "/backends/b1/drain"),
            (second, "/backends/b1/drain?deadline_ms=1000"),
            (Some(Within::Never), "/backends/b1/drain?deadline_ms=never"),
        ] {
            assert_eq!(super::path(&backend(), within), path);
        }
    }

    #[test]
    fn what_a_drain_will_do_is_said_in_every_case() {
        use BackendState::{Draining, Serving};
        let now = Some(Within::Time(Duration::ZERO));
        for (state, by, sessions, ms, within, words) in [
            (
                Serving,
                Some("operator"),
                7,
                Some(30_000),
                None,
                "drains: 7 sessions left, which are ended in 30.0 s; `lb undrain b1` gives it users again",
            ),
            (
                Serving,
                Some("operator"),
                0,
                Some(30_000),
                None,
                "drains: no session is left; `lb undrain b1`",
            ),
            (
                Serving,
                Some("operator"),
                1,
                None,
                Some(Within::Never),
                "drains: 1 session left, which may end by themselves",
            ),
            (Serving, Some("operator"), 2, Some(0), now, "drains: its 2 sessions are ended now"),
            (
                Draining,
                Some("operator"),
                2,
                Some(61_000),
                None,
                "was draining already: 2 sessions left, which are ended in 1 min 01 s",
            ),
            (
                Draining,
                Some("owner"),
                2,
                Some(9_000),
                now,
                "has a new deadline: 2 sessions left, which are ended in 9.0 s; it has asked to drain itself, and leaves then",
            ),
        ] {
            let before = BackendStatus { state, ..backend() };
            let drain = DrainStatus { by: by.map(str::to_owned), ..DrainStatus::default() };
            let after = BackendStatus { state: Draining, drain, drains_in_ms: ms, ..backend() };
            let changed =
                Changed { schema: SCHEMA, sessions, backend: Some(after), groups: Vec::new() };
            let line = told(&before, &changed, within);
            assert!(line.contains(words), "{line}");
        }
    }

    #[test]
    fn what_an_older_balancer_does_not_say_is_left_out() {
        let older = Changed { schema: SCHEMA, sessions: 7, backend: None, groups: Vec::new() };
        let line = told(&backend(), &older, None);
        assert!(
            line.contains("7 sessions left, which are ended after timeouts.drain_ms\n"),
            "{line}"
        );
    }

    #[test]
    fn a_service_that_nobody_else_serves_is_told() {
        let status = status();
        let [first, aside] = &status.backends[..] else { panic!() };
        assert_eq!(deserted(&status, &[first]), ["tcp"], "the other one is aside");
        assert_eq!(deserted(&status, &[aside]), [""; 0]);
        assert_eq!(deserted(&status, &[first, aside]), ["tcp"]);
    }
}
