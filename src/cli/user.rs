//! `lb user`: sends the lines a person types to the balancer and prints the replies.

use std::io::{self, BufRead};

use clap::Args;
use tokio::sync::mpsc;

use super::{Failure, peer, protocol, wait_for};
use crate::base::thread;
use crate::client::user::talk;
use crate::cluster::Protocol;

/// Be a user: send the lines you type, print the replies.
///
/// TCP sends each line as it is, and the end of the input as the end of the stream. UDP sends each
/// line as a datagram and waits for its reply. API takes one request per line: a path, GET /path, or
/// POST /path and the body.
#[derive(Args)]
pub struct Arguments {
    /// What kind of user to be
    #[arg(long, value_parser = protocol())]
    protocol: Protocol,
    /// Where the balancer listens for such users [default: this host, at the default port]
    #[arg(long, value_name = "ADDR", value_parser = peer)]
    to: Option<String>,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
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
    wait_for(talk(arguments.protocol, &to, said, &mut io::stdout()))??;
    Ok(())
}
