//! `lb user`: sends the lines a person types to the balancer and prints the replies. The exit code
//! tells whether they came.

use std::io::{self, BufRead};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::sync::mpsc;

use super::{Failure, duration, peer, protocol, wait_for};
use crate::base::thread;
use crate::client::user::{Answers, talk};
use crate::cluster::Protocol;

/// Be a user: send the lines you type, print the replies.
///
/// TCP sends each line as it is, and the end of the input as the end of the stream. UDP sends each
/// line as a datagram and waits for its reply. API takes one request per line: a path, GET /path, or
/// POST /path and the body.
///
/// The exit code is 0 if the answers came: every datagram and request had one, and a stream brought
/// something back. It is 1 if one is missing, also where an API answer is 502, 503 or 504, with
/// which a balancer says that no backend answered; and 2 if the balancer cannot be reached.
#[derive(Args)]
pub struct Arguments {
    /// What kind of user to be
    #[arg(long, value_parser = protocol())]
    protocol: Protocol,
    /// Where the balancer listens for such users [default: this host, at the default port]
    #[arg(long, value_name = "ADDR", value_parser = peer)]
    to: Option<String>,
    /// How long to wait for an answer: 10s, 500ms, 2m
    #[arg(long, value_name = "T", default_value = "5s", value_parser = duration)]
    timeout: Duration,
}

pub fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    if arguments.timeout.is_zero() {
        return Err("a --timeout of 0 s waits for no answer; give a longer one".into());
    }
    let to = arguments.to.unwrap_or_else(|| {
        let port = match arguments.protocol {
            Protocol::Tcp => 8081,
            Protocol::Udp => 8082,
            Protocol::Api => 8083,
        };
        format!("127.0.0.1:{port}")
    });
    let (say, said) = mpsc::channel(16);
    thread::spawn("lines", move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if say.blocking_send(line).is_err() {
                return;
            }
        }
    })?;
    let mut out = io::stdout();
    let talked = talk(arguments.protocol, &to, arguments.timeout, said, &mut out);
    Ok(match wait_for(talked)?? {
        Answers::Came => ExitCode::SUCCESS,
        Answers::Missing => ExitCode::FAILURE,
    })
}
