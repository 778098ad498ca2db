//! `lb backend`: keeps a backend registered from its own host; on a terminal, with the menu of the
//! original system.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Failure, peer, print, protocol, secret, wait_for};
use crate::base::thread;
use crate::client::backend::{Notice, Wish};
use crate::client::board::{Board, Line};
use crate::client::echo::Echo;
use crate::client::stay::{Membership, stay, stay_with};
use crate::client::wire::Offer;
use crate::cluster::{AskedCheck, Protocol, WEIGHT_MAX};
use crate::config::Log;
use crate::control::api::NAME_BYTES_MAX;
use crate::logs;

const MENU: &str = "1: register, 2: unregister, q: quit\n";
/// How long a balancer is left alone that bars one registration of several.
const BARRED_PAUSE: Duration = Duration::from_secs(10);

/// Keep a backend registered: answers hello, registers again after the balancer was away, and
/// unregisters at the end.
///
/// Run it on the backend's own host: the balancer takes the address this connection comes from and
/// connects to the port given here.
///
/// --service and --lb may be given several times, or with commas: each service is registered with each
/// balancer over a connection of its own, and one line for each balancer tells how that stands. It ends
/// with code 2 where no balancer takes it for want of the right secret.
#[derive(Args)]
pub struct Arguments {
    /// The service the backend joins, as the balancer's file names it, with its group and port if they
    /// are not those of --group and --port: NAME, NAME=PORT, NAME/GROUP=PORT; without one, the built-in
    /// service of --protocol
    #[arg(long, value_name = "NAME[=PORT]", value_delimiter = ',')]
    service: Vec<Member>,
    /// The kind of users the backend serves; with --service, and without --echo, it may be left out
    #[arg(long, value_parser = protocol(), required_unless_present = "service")]
    protocol: Option<Protocol>,
    /// The backend's port on this host; with --echo, 0 takes any free one
    #[arg(long, value_name = "N", required_unless_present = "service")]
    port: Option<u16>,
    /// The balancer's control port
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080", value_parser = peer,
          value_delimiter = ',')]
    lb: Vec<String>,
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
    /// Say that the backend speaks HTTP/2, which only API backends do
    #[arg(long, conflicts_with = "echo")]
    http2: bool,
    /// Be reached by TLS, with a certificate from an authority that the balancer trusts
    #[arg(long, conflicts_with = "echo")]
    tls: bool,
    /// The host that this certificate is for, if it is not for the backend's address
    #[arg(long, value_name = "HOST", requires = "tls")]
    tls_name: Option<String>,
    /// Have the balancer not try the port with an empty connection, for servers that take those for an
    /// attack, such as MySQL
    #[arg(long)]
    no_probe: bool,
    /// Have the balancer check the port, and send users there only while that passes: tcp for a
    /// connection, http:/PATH for a request, grpc for the health call of gRPC, perhaps about one service
    #[arg(long, value_name = "tcp|http:/PATH|grpc[:SERVICE]", value_parser = AskedCheck::from_str)]
    check: Option<AskedCheck>,
    /// File with the secret the balancer asks for
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Be the backend as well: send back whatever arrives, by the rules of --protocol
    #[arg(long, requires = "protocol")]
    echo: bool,
}

/// A service to join, as a person writes it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Member {
    service: String,
    group: Option<String>,
    port: Option<u16>,
}

impl FromStr for Member {
    type Err = String;

    fn from_str(text: &str) -> Result<Member, String> {
        let (whom, port) = match text.split_once('=') {
            None => (text, None),
            Some((whom, port)) => {
                let port = port.parse().map_err(|_| format!("write a port after {whom}="))?;
                (whom, Some(port))
            }
        };
        let (service, group) = match whom.split_once('/') {
            None => (whom, None),
            Some((service, group)) => (service, Some(name(group)?)),
        };
        Ok(Member { service: name(service)?, group, port })
    }
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
    let offers = offers(&arguments)?;
    let secret = secret(arguments.secret_file.as_deref())?;
    let _logs = logs::start(&Log::default());
    wait_for(serve(arguments, offers, secret))?
}

/// What is to be registered with each balancer.
fn offers(arguments: &Arguments) -> Result<Vec<Offer>, Failure> {
    let offer = |member: Option<&Member>| {
        let own = member.and_then(|it| it.port).or(arguments.port);
        let service = member.map(|it| it.service.clone());
        let port = own.ok_or_else(|| {
            let service = service.as_deref().unwrap_or_default();
            format!("service {service} has no port: write --service {service}=PORT, or --port PORT")
        })?;
        Ok::<Offer, String>(Offer {
            service,
            protocol: arguments.protocol,
            port,
            weight: arguments.weight,
            name: arguments.name.clone(),
            group: member.and_then(|it| it.group.clone()).or_else(|| arguments.group.clone()),
            proxy: arguments.proxy.is_some(),
            http2: arguments.http2,
            tls: arguments.tls,
            tls_name: arguments.tls_name.clone(),
            probe: !arguments.no_probe,
            check: arguments.check.clone(),
        })
    };
    let offers: Result<Vec<Offer>, String> = match arguments.service.is_empty() {
        true => offer(None).map(|one| vec![one]),
        false => arguments.service.iter().map(|it| offer(Some(it))).collect(),
    };
    let offers = offers?;
    make_sense(arguments, &offers)?;
    Ok(offers)
}

/// Checks what the balancer would refuse, or take for one registration where two are meant.
fn make_sense(arguments: &Arguments, offers: &[Offer]) -> Result<(), Failure> {
    if offers.iter().any(|offer| offer.port == 0) && !arguments.echo {
        return Err(Failure("--port 0 works with --echo only: name the backend's port".to_owned()));
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) =
        offers.iter().find(|it| it.port > 0 && !seen.insert((it.whom().to_owned(), it.port)))
    {
        return Err(Failure(format!(
            "{} port {} is given twice: leave one out",
            twice.whom(),
            twice.port
        )));
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = arguments.lb.iter().find(|address| !seen.insert(*address)) {
        return Err(Failure(format!("--lb {twice} is given twice: leave one out")));
    }
    let why = match (&arguments.check, arguments.protocol) {
        (Some(_), Some(Protocol::Udp)) => {
            "a port for datagrams cannot be checked: leave out --check"
        }
        (Some(AskedCheck::Tcp), _) if arguments.no_probe => {
            "--check tcp tries the port, which --no-probe forbids: leave out one of the two"
        }
        (_, Some(Protocol::Udp)) if arguments.tls => "datagrams are not sealed: leave out --tls",
        (_, Some(Protocol::Tcp | Protocol::Udp)) if arguments.http2 => {
            "only API backends speak HTTP: leave out --http2"
        }
        _ => return Ok(()),
    };
    Err(Failure(why.to_owned()))
}

async fn serve(
    arguments: Arguments,
    mut offers: Vec<Offer>,
    secret: Option<Vec<u8>>,
) -> Result<(), Failure> {
    if let (true, Some(protocol)) = (arguments.echo, arguments.protocol) {
        echo_all(&mut offers, protocol).await?;
    }
    let (wish, wishes) = mpsc::channel(8);
    watch_signals(&wish)?;
    if io::stdin().is_terminal() {
        print(MENU)?;
        thread::spawn("menu", move || menu(&wish))?;
    }
    let membership = |balancer: &String, offer: &Offer| Membership {
        balancer: balancer.clone(),
        // Where several are named, each is stayed with.
        follows: arguments.lb.len() == 1,
        offer: offer.clone(),
        secret: secret.clone(),
        secret_file: arguments.secret_file.clone(),
    };
    if let ([balancer], [offer]) = (&arguments.lb[..], &offers[..]) {
        let what = format!("{} port {} at {balancer}", offer.whom(), offer.port);
        stay(membership(balancer, offer), wishes, |notice| tell(&what, &notice)).await?;
        return Ok(());
    }
    let all = arguments.lb.iter().map(|lb| offers.iter().map(|it| membership(lb, it)).collect());
    let names = offers.iter().map(named).collect();
    stay_everywhere(all.collect(), Board::new(&arguments.lb, names), wishes).await
}

fn tell(what: &str, notice: &Notice) {
    match notice {
        Notice::Failed { .. }
        | Notice::NoSecret
        | Notice::Warned { .. }
        | Notice::Unchecked
        | Notice::SecretKept { .. } => tracing::warn!("{what}: {notice}"),
        _ => tracing::info!("{what}: {notice}"),
    }
}

/// What is registered, in the line about a balancer.
fn named(offer: &Offer) -> String {
    let group = offer.group.as_ref().map(|group| format!("/{group}")).unwrap_or_default();
    format!("{}{group} port {}", offer.whom(), offer.port)
}

/// Keeps every registration with every balancer until it is wished gone.
async fn stay_everywhere(
    all: Vec<Vec<Membership>>,
    board: Board,
    mut wishes: mpsc::Receiver<Wish>,
) -> Result<(), Failure> {
    let board = Arc::new(Mutex::new(board));
    let (mut members, mut wished) = (JoinSet::new(), Vec::new());
    for (balancer, memberships) in all.into_iter().enumerate() {
        for (which, membership) in memberships.into_iter().enumerate() {
            let (wish, own) = mpsc::channel(8);
            wished.push(wish);
            let place = Place { board: Arc::clone(&board), balancer, which };
            members.spawn(place.keep(membership, own));
        }
    }
    loop {
        tokio::select! {
            ended = members.join_next() => match ended {
                None => return Ok(()),
                Some(Ok(Ok(())) | Err(_)) => {}
                Some(Ok(Err(why))) => return Err(Failure(why)),
            },
            Some(wish) = wishes.recv() => {
                for member in &wished {
                    // One that has ended has no wishes left.
                    let _ = member.send(wish).await;
                }
            }
        }
    }
}

/// A registration's place on the board.
struct Place {
    board: Arc<Mutex<Board>>,
    balancer: usize,
    which: usize,
}

impl Place {
    /// Keeps one registration, and tries again later what a balancer bars as long as another may take it.
    ///
    /// # Errors
    /// Why nothing can be registered anywhere.
    async fn keep(
        self,
        membership: Membership,
        mut wishes: mpsc::Receiver<Wish>,
    ) -> Result<(), String> {
        let what = format!("{} at {}", named(&membership.offer), membership.balancer);
        loop {
            let told = |notice: Notice| self.said(&what, &notice);
            let Err(why) = stay_with(membership.clone(), &mut wishes, told).await else {
                return Ok(());
            };
            let (line, is_hopeless) = {
                let mut board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
                (board.barred(self.balancer, self.which, &why), board.is_hopeless())
            };
            line.iter().for_each(show);
            if is_hopeless {
                return Err(why);
            }
            if !self.rest(&what, BARRED_PAUSE, &mut wishes).await {
                return Ok(());
            }
        }
    }

    /// Leaves the balancer alone for so long, and for as long as nobody wants the registration. Returns whether
    /// it is wanted then.
    async fn rest(&self, what: &str, pause: Duration, wishes: &mut mpsc::Receiver<Wish>) -> bool {
        let pause = tokio::time::sleep(pause);
        tokio::pin!(pause);
        let (mut is_over, mut is_wanted) = (false, true);
        while !(is_over && is_wanted) {
            tokio::select! {
                biased;
                wish = wishes.recv() => match wish.unwrap_or(Wish::Gone) {
                    Wish::Gone => return false,
                    Wish::Registered => is_wanted = true,
                    Wish::Unregistered => {
                        is_wanted = false;
                        self.said(what, &Notice::Unregistered);
                    }
                },
                () = &mut pause, if !is_over => is_over = true,
            }
        }
        true
    }

    fn said(&self, what: &str, notice: &Notice) {
        match notice {
            // The line about the balancer says it.
            Notice::Registered
            | Notice::Unregistered
            | Notice::Hello
            | Notice::Failed { .. }
            | Notice::NoSecret => {
                tracing::debug!("{what}: {notice}");
            }
            _ => tell(what, notice),
        }
        let mut board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        board.said(self.balancer, self.which, notice).iter().for_each(show);
    }
}

fn show(line: &Line) {
    match line.is_trouble {
        true => tracing::warn!("{}", line.text),
        false => tracing::info!("{}", line.text),
    }
}

/// Starts an echo backend for each port that is registered. Where several services have the same one, it is
/// the same backend; each 0 is another.
async fn echo_all(offers: &mut [Offer], protocol: Protocol) -> Result<(), Failure> {
    let mut opened = BTreeMap::new();
    for offer in offers {
        let known = opened.get(&offer.port).copied().filter(|_| offer.port > 0);
        let port = match known {
            Some(port) => port,
            None => echo(offer, protocol).await?,
        };
        opened.insert(offer.port, port);
        offer.port = port;
    }
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    /// What is registered, or why nothing is.
    fn registered(words: &str) -> Result<Vec<String>, String> {
        let words = std::iter::once("backend").chain(words.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        let offers = offers(&line.arguments).map_err(|failure| failure.0)?;
        Ok(offers.iter().map(named).collect())
    }

    #[test]
    fn a_backend_speaks_http_2_if_it_says_so() {
        let speaks = |words: &str| {
            let words = std::iter::once("backend").chain(words.split_whitespace());
            let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
            offers(&line.arguments).map(|all| all[0].http2).map_err(|failure| failure.0)
        };
        assert_eq!(speaks("--protocol api --port 1"), Ok(false));
        assert_eq!(speaks("--protocol api --port 1 --http2"), Ok(true));
        assert_eq!(speaks("--service shop --port 1 --http2 --tls"), Ok(true));
    }

    #[tokio::test]
    async fn what_a_person_has_unregistered_is_not_tried_again() {
        let names = vec!["redis port 1".to_owned()];
        let board = Arc::new(Mutex::new(Board::new(&["a:1".to_owned()], names)));
        board.lock().unwrap().barred(0, 0, "no secret");
        let place = Place { board: Arc::clone(&board), balancer: 0, which: 0 };
        let (wish, mut wishes) = mpsc::channel(8);
        wish.send(Wish::Unregistered).await.unwrap();
        {
            let mut rest = std::pin::pin!(place.rest("redis", Duration::ZERO, &mut wishes));
            let a_while = tokio::time::sleep(Duration::from_millis(20));
            tokio::select! {
                _ = &mut rest => panic!("nobody wants it"),
                () = a_while => {}
            }
            assert!(!board.lock().unwrap().is_hopeless(), "a person may register it again");
            wish.send(Wish::Registered).await.unwrap();
            assert!(rest.await);
        }
        wish.send(Wish::Gone).await.unwrap();
        assert!(!place.rest("redis", Duration::ZERO, &mut wishes).await);
    }

    #[test]
    fn several_services_are_written_with_their_groups_and_ports() {
        for (words, expected) in [
            ("--protocol tcp --port 9", vec!["tcp port 9"]),
            ("--service redis --port 9", vec!["redis port 9"]),
            ("--service redis --service pg=7 --port 9", vec!["redis port 9", "pg port 7"]),
            ("--service a=1,b/green=2", vec!["a port 1", "b/green port 2"]),
            ("--service a/blue,b --group green --port 3", vec!["a/blue port 3", "b/green port 3"]),
            ("--service a=1 --lb :1,:2 --lb 10.0.0.1:3", vec!["a port 1"]),
        ] {
            assert_eq!(registered(words).unwrap(), expected, "{words}");
        }
        for (words, why) in [
            ("--service redis", "service redis has no port: write --service redis=PORT"),
            ("--service redis=x", "write a port after redis="),
            ("--service a=1,a=1", "a port 1 is given twice"),
            ("--service a=1 --lb :1,:1", "--lb 127.0.0.1:1 is given twice"),
            ("--service a=0", "works with --echo only"),
            ("--protocol udp --port 1 --check tcp", "datagrams cannot be checked"),
            ("--protocol tcp --port 1 --check tcp --no-probe", "which --no-probe forbids"),
            ("--protocol udp --port 1 --tls", "leave out --tls"),
            ("--protocol api --port 0 --echo --tls", "cannot be used with '--tls'"),
            ("--protocol tcp --port 1 --http2", "leave out --http2"),
            ("--protocol udp --port 1 --http2", "leave out --http2"),
            ("--protocol api --port 0 --echo --http2", "cannot be used with '--http2'"),
            ("--protocol tcp --port 1 --check icmp", "write tcp, http: and a path"),
            ("--protocol tcp", "--port"),
        ] {
            let said = registered(words).unwrap_err();
            assert!(said.contains(why), "{words}: {said}");
        }
    }
}
