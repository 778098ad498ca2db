//! `lb backend`: keeps a backend registered from its own host; on a terminal, with the menu of the
//! original system.

use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::{Failure, peer, print, protocol, secret, wait_for};
use crate::base::thread;
use crate::client::backend::{Notice, Wish};
use crate::client::echo::Echo;
use crate::client::stay::{Membership, stay};
use crate::client::wire::Offer;
use crate::cluster::{Protocol, WEIGHT_MAX};
use crate::config::Log;
use crate::control::api::NAME_BYTES_MAX;
use crate::logs;

const MENU: &str = "1: register, 2: unregister, q: quit\n";

/// Keep a backend registered: answers hello, registers again after the balancer was away, and
/// unregisters at the end.
///
/// Run it on the backend's own host: the balancer takes the address this connection comes from and
/// connects to the port given here.
#[derive(Args)]
pub struct Arguments {
    /// The service the backend joins, as the balancer's file names it; without one, the built-in
    /// service of --protocol
    #[arg(long, value_name = "NAME", value_parser = name)]
    service: Option<String>,
    /// The kind of users the backend serves; with --service it may be left out
    #[arg(long, value_parser = protocol(), required_unless_present = "service")]
    protocol: Option<Protocol>,
    /// The backend's port on this host; with --echo, 0 takes any free one
    #[arg(long, value_name = "N")]
    port: u16,
    /// The balancer's control port
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080", value_parser = peer)]
    lb: String,
    /// The backend's share of new users relative to the others
    #[arg(long, value_name = "W", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(WEIGHT_MAX)))]
    weight: u16,
    /// The group of the service that the backend joins, where the service has groups
    #[arg(long, value_name = "NAME", value_parser = name, requires = "service")]
    group: Option<String>,
    /// What status and logs call the backend: letters, digits and . _ : -
    #[arg(long, value_name = "S", value_parser = name)]
    name: Option<String>,
    /// Have each user's connection begin with a PROXY header of version 2, which tells the user's address
    #[arg(long, value_name = "VERSION", conflicts_with = "echo", value_parser = clap::value_parser!(u8).range(2..=2))]
    proxy: Option<u8>,
    /// Have the balancer not try the port with an empty connection, for servers that take those for an
    /// attack, such as MySQL
    #[arg(long)]
    no_probe: bool,
    /// File with the secret the balancer asks for
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Be the backend as well: send back whatever arrives, by the rules of --protocol
    #[arg(long, requires = "protocol")]
    echo: bool,
}

/// A name that the balancer accepts, checked here first.
fn name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
    if (1..=NAME_BYTES_MAX).contains(&text.len()) && text.chars().all(fits) {
        return Ok(text.to_owned());
    }
    Err(format!("write 1 to {NAME_BYTES_MAX} letters, digits and . _ : -"))
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    if arguments.port == 0 && !arguments.echo {
        return Err(Failure("--port 0 works with --echo only: name the backend's port".to_owned()));
    }
    let secret = secret(arguments.secret_file.as_deref())?;
    let _logs = logs::start(&Log::default());
    wait_for(serve(arguments, secret))?
}

async fn serve(arguments: Arguments, secret: Option<Vec<u8>>) -> Result<(), Failure> {
    let mut offer = Offer {
        service: arguments.service,
        protocol: arguments.protocol,
        port: arguments.port,
        weight: arguments.weight,
        name: arguments.name,
        group: arguments.group,
        proxy: arguments.proxy.is_some(),
        probe: !arguments.no_probe,
    };
    if let (true, Some(protocol)) = (arguments.echo, offer.protocol) {
        offer.port = echo(&offer, protocol).await?;
    }
    let (wish, wishes) = mpsc::channel(8);
    watch_signals(&wish)?;
    if io::stdin().is_terminal() {
        print(MENU)?;
        thread::spawn("menu", move || menu(&wish))?;
    }
    let what = format!("{} port {} at {}", offer.whom(), offer.port, arguments.lb);
    let secret_file = arguments.secret_file;
    let membership = Membership { balancer: arguments.lb, offer, secret, secret_file };
    stay(membership, wishes, |notice| match notice {
        Notice::Failed { .. } | Notice::NoSecret | Notice::SecretKept { .. } => {
            tracing::warn!("{what}: {notice}")
        }
        _ => tracing::info!("{what}: {notice}"),
    })
    .await?;
    Ok(())
}

/// Starts the echo backend and returns its port.
async fn echo(offer: &Offer, protocol: Protocol) -> Result<u16, Failure> {
    let echo = Echo::bind_everywhere(protocol, offer.port).await.map_err(|error| {
        format!(
            "port {} cannot be opened for the echo backend: {error}; choose another --port, or 0 for \
             any free one",
            offer.port
        )
    })?;
    let port = echo.address().port();
    let name: Arc<str> = Offer { port, ..offer.clone() }.id().into();
    tokio::spawn(echo.run(name));
    Ok(port)
}

/// SIGTERM and SIGINT unregister; a second one ends the program at once.
fn watch_signals(wish: &mpsc::Sender<Wish>) -> io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)?;
        let wish = wish.clone();
        tokio::spawn(async move {
            signals.recv().await;
            let _ = wish.send(Wish::Gone).await;
            signals.recv().await;
            std::process::exit(1);
        });
    }
    Ok(())
}

fn menu(wish: &mpsc::Sender<Wish>) {
    for line in io::stdin().lock().lines().map_while(Result::ok) {
        let chosen = match line.trim() {
            "1" => Wish::Registered,
            "2" => Wish::Unregistered,
            "q" => Wish::Gone,
            _ => {
                let _ = print(MENU);
                continue;
            }
        };
        if wish.blocking_send(chosen).is_err() {
            return;
        }
    }
}
