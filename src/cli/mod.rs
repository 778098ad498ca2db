//! What a person types: the subcommands, one file each, and how their failures are reported. The
//! only place that knows clap. Decides nothing about the balancer.

mod backend;
mod bench;
mod check;
mod cluster;
mod door;
mod drain;
mod end;
mod flags;
mod health;
mod naming;
mod papers;
mod reload;
mod running;
mod serve;
mod sessions;
mod shift;
mod status;
mod stop;
mod table;
mod text;
mod top;
mod trouble;
mod undrain;
mod upgrade;
mod user;
mod weight;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{CommandFactory, Parser, Subcommand};

use crate::base::thread;
use crate::cluster::Protocol;
use crate::control::auth::Secrets;
use crate::logs;

/// The exit code for everything the operator can fix.
const OPERATOR: u8 = 2;

/// A load balancer on io_uring with self-registering backends.
#[derive(Parser)]
#[command(name = "lb", version, propagate_version = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::Arguments),
    Check(check::Arguments),
    Backend(backend::Arguments),
    Bench(Box<bench::Arguments>),
    User(user::Arguments),
    Status(status::Arguments),
    Sessions(sessions::Arguments),
    Drain(drain::Arguments),
    Undrain(undrain::Arguments),
    Weight(weight::Arguments),
    Shift(shift::Arguments),
    End(end::Arguments),
    Cluster(cluster::Arguments),
    Health(health::Arguments),
    Reload(reload::Arguments),
    Upgrade(upgrade::Arguments),
    Stop(stop::Arguments),
    #[command(hide = true)]
    Man(papers::Pages),
    #[command(hide = true)]
    Completions(papers::Completions),
    Top(top::Arguments),
}

/// Why a command cannot do its work: one sentence with the fix.
#[derive(Debug)]
struct Failure(String);

impl<T: Display> From<T> for Failure {
    fn from(said: T) -> Failure {
        Failure(said.to_string())
    }
}

/// Runs the program with its command line, name included.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    thread::accept_signals();
    let line = match CommandLine::try_parse_from(arguments) {
        Ok(line) => line,
        Err(said) => {
            // Help and version are not failures, and a closed pipe is nobody's fault.
            let _ = said.print();
            return ExitCode::from(u8::try_from(said.exit_code()).unwrap_or(OPERATOR));
        }
    };
    let outcome = match line.command {
        Command::Serve(arguments) => match serve::run(arguments) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Command::Check(arguments) => check::run(arguments),
        Command::Backend(arguments) => backend::run(arguments),
        Command::Bench(arguments) => match bench::run(*arguments) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Command::User(arguments) => match user::run(arguments) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Command::Status(arguments) => status::run(arguments),
        Command::Cluster(arguments) => cluster::run(arguments),
        Command::Health(arguments) => health::run(arguments),
        Command::Reload(arguments) => reload::run(arguments),
        Command::Sessions(arguments) => sessions::run(arguments),
        Command::Drain(arguments) => match drain::run(arguments) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Command::Undrain(arguments) => undrain::run(arguments),
        Command::Weight(arguments) => weight::run(arguments),
        Command::End(arguments) => end::run(arguments),
        Command::Upgrade(arguments) => upgrade::run(arguments),
        Command::Stop(arguments) => stop::run(arguments),
        Command::Shift(arguments) => shift::run(arguments),
        Command::Man(arguments) => papers::pages(CommandLine::command(), arguments),
        Command::Completions(arguments) => papers::completions(CommandLine::command(), arguments),
        Command::Top(arguments) => top::run(arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(said)) => {
            let _ = io::stderr().write_all(logs::last_words(&said).as_bytes());
            ExitCode::from(OPERATOR)
        }
    }
}

/// Writes to standard output. A reader that has gone away (`lb status | head`) has read enough.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Runs a future to completion on this thread.
fn wait_for<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        format!("cannot start: {error}; raise the limit of open files (ulimit -n)")
    })?;
    let outcome = runtime.block_on(work);
    // A thread may still be reading the terminal; it ends with the process.
    runtime.shutdown_background();
    Ok(outcome)
}

/// A length of time as a person writes it; a bare number means seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let factor = match &text[digits..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ if digits == 0 => return Err("write a time such as 3s, 250ms or 2m".to_owned()),
        unit => {
            return Err(format!(
                "`{unit}` is none of the units us, ms, s, m, h, d: write a time such as 3s, 250ms or 2m"
            ));
        }
    };
    let number: f64 = text[..digits]
        .parse()
        .map_err(|_| format!("`{text}` is no time: write one such as 3s, 250ms or 2m"))?;
    Duration::try_from_secs_f64(number * factor).map_err(|_| format!("`{text}` is too long"))
}

/// `tcp`, `udp` or `api`.
fn protocol() -> impl TypedValueParser<Value = Protocol> {
    PossibleValuesParser::new(Protocol::ALL.map(Protocol::name)).map(|word| {
        let found = Protocol::ALL.into_iter().find(|protocol| protocol.name() == word);
        found.expect("clap lets only these names through")
    })
}

/// Where to connect to: `host:port`, or a port of this host.
fn peer(text: &str) -> Result<String, String> {
    let text = text.strip_prefix(':').unwrap_or(text);
    if text.parse::<u16>().is_ok_and(|port| port > 0) {
        return Ok(format!("127.0.0.1:{text}"));
    }
    let port = text.rsplit_once(':').map(|(host, port)| (host.is_empty(), port.parse::<u16>()));
    match port {
        Some((false, Ok(1..))) => Ok(text.to_owned()),
        _ => Err("write HOST:PORT such as 127.0.0.1:8080, or a port of this host".to_owned()),
    }
}

/// The first token in a file of the admin door.
fn token(file: Option<&Path>) -> Result<Option<String>, Failure> {
    let Some(secret) = secret(file)? else { return Ok(None) };
    match String::from_utf8(secret) {
        Ok(token) => Ok(Some(token)),
        Err(_) => Err(Failure("a token is text: make one with `openssl rand -hex 32`".to_owned())),
    }
}

/// The first secret in a file, which is the one to prove.
fn secret(file: Option<&Path>) -> Result<Option<Vec<u8>>, Failure> {
    let Some(file) = file else { return Ok(None) };
    Ok(Some(Secrets::load(file)?.first().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, millis) in
            [("1.5s", 1_500), ("300ms", 300), ("2", 2_000), ("2m", 120_000), ("1d", 86_400_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)));
        }
        for text in ["", "s", "-3s", "1x", "3 s", "1m30s", "1.2.3s", "99999999999999999999h"] {
            assert!(duration(text).is_err(), "{text}");
        }
        for text in ["", "-3s", "1x", "1.2.3s"] {
            assert!(duration(text).unwrap_err().ends_with("such as 3s, 250ms or 2m"), "{text}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn every_command_and_flag_explains_itself() {
        for command in CommandLine::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for flag in command.get_arguments() {
                assert!(flag.get_help().is_some(), "{} {}", command.get_name(), flag.get_id());
            }
        }
    }

    #[test]
    fn a_peer_is_a_host_with_a_port_or_a_port_of_this_host() {
        for (text, expected) in [
            ("8080", "127.0.0.1:8080"),
            (":8080", "127.0.0.1:8080"),
            ("lb.example:80", "lb.example:80"),
            ("[::1]:80", "[::1]:80"),
        ] {
            assert_eq!(peer(text).as_deref(), Ok(expected));
        }
        for text in ["", "lb.example", "0", "lb:0", "lb:70000", "70000", "http://lb"] {
            assert!(peer(text).is_err(), "{text}");
        }
    }
}
