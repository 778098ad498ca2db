//! Keeps a backend registered: does what `backend` decides, over a TCP connection. Owns the
//! connection, the clock and the randomness; decides nothing itself.

use std::future::pending;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::backend::{Act, Event, Notice, Registration, Wish};
use super::roads::Roads;
use super::wire::{Incoming, Offer};
use crate::base::time::Now;
use crate::control::auth::Secrets;

/// What to register, and where.
#[derive(Clone, Debug)]
pub struct Membership {
    /// The balancer's control port as `host:port`. The name is resolved anew for every connection.
    pub balancer: String,
    /// Whether to register at another balancer of its cluster when that one has gone.
    pub follows: bool,
    pub offer: Offer,
    /// Proves this backend if the balancer asks.
    pub secret: Option<Vec<u8>>,
    /// Where the secret came from. It is read again for every connection, since it may have been
    /// changed on both sides.
    pub secret_file: Option<PathBuf>,
}

/// The state of the connection, which decides where its next event comes from.
enum Link {
    None,
    Connecting(Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>),
    Up(TcpStream, Incoming),
}

/// Keeps the backend registered until [`Wish::Gone`], or until no sender of wishes is left. `tell`
/// receives every notice.
///
/// # Errors
/// Why it can never be registered there, in one sentence.
pub async fn stay(
    membership: Membership,
    mut wishes: mpsc::Receiver<Wish>,
    tell: impl FnMut(Notice),
) -> Result<(), String> {
    stay_with(membership, &mut wishes, tell).await
}

/// Likewise; whoever still has the wishes afterwards can try again.
///
/// # Errors
/// As [`stay`].
pub async fn stay_with(
    membership: Membership,
    wishes: &mut mpsc::Receiver<Wish>,
    mut tell: impl FnMut(Notice),
) -> Result<(), String> {
    let mut registration = Registration::new(membership.offer, membership.secret);
    let mut link = Link::None;
    let mut roads = Roads::to(&membership.balancer);
    let mut events = vec![Event::Time];
    let mut acts = Vec::new();
    loop {
        for event in events.drain(..) {
            registration.handle(Now::read(), random(), event, &mut acts);
        }
        for act in acts.drain(..) {
            match act {
                Act::Connect => {
                    if let Some(file) = &membership.secret_file {
                        match Secrets::load(file) {
                            Ok(secrets) => registration.prove_with(secrets.first().to_vec()),
                            Err(why) => tell(Notice::SecretKept { why }),
                        }
                    }
                    let address = roads.take().to_owned();
                    link = Link::Connecting(Box::pin(TcpStream::connect(address)));
                }
                Act::Disconnect => link = Link::None,
                Act::Send(line) => events.extend(link.send(&line)),
                Act::Tell(notice) => tell(notice),
                Act::Remember(nodes) if membership.follows => roads.learn(&nodes),
                Act::Remember(_) => {}
                Act::Stop => return Ok(()),
                Act::Fail(why) => return Err(why),
            }
        }
        if events.is_empty() {
            let due = registration.deadline();
            tokio::select! {
                heard = link.next() => events = heard,
                wish = wishes.recv() => events.push(Event::Wished(wish.unwrap_or(Wish::Gone))),
                () = until(due) => events.push(Event::Time),
            }
        }
    }
}

impl Link {
    /// Waits for the next events; cancelling it loses nothing.
    async fn next(&mut self) -> Vec<Event> {
        match self {
            Link::None => pending().await,
            Link::Connecting(attempt) => match attempt.await {
                Ok(stream) => {
                    *self = Link::Up(stream, Incoming::default());
                    vec![Event::Connected]
                }
                Err(error) => self.lost(format!("the balancer cannot be reached: {error}")),
            },
            Link::Up(stream, incoming) => {
                let mut bytes = [0; 4096];
                let said = match stream.read(&mut bytes).await {
                    Ok(0) => Err("the balancer closed the connection".to_owned()),
                    Ok(length) => incoming.push(&bytes[..length]),
                    Err(error) => Err(format!("the connection to the balancer broke: {error}")),
                };
                match said {
                    Ok(messages) => {
                        messages.into_iter().map(|said| Event::Said(Box::new(said))).collect()
                    }
                    Err(why) => self.lost(why),
                }
            }
        }
    }

    fn lost(&mut self, why: String) -> Vec<Event> {
        *self = Link::None;
        vec![Event::Lost(why)]
    }

    /// Messages are short: if the socket has no room for one, the balancer has stopped reading.
    fn send(&mut self, line: &str) -> Vec<Event> {
        let Link::Up(stream, _) = self else { return Vec::new() };
        let line = format!("{line}\n");
        match stream.try_write(line.as_bytes()) {
            Ok(length) if length == line.len() => Vec::new(),
            _ => self.lost("the balancer does not take messages any more".to_owned()),
        }
    }
}

async fn until(due: Option<Now>) {
    match due {
        // Rounded up to the timer's own step, so that a deadline is never checked too early.
        Some(due) => sleep(due.since(Now::read()) + Duration::from_millis(1)).await,
        None => pending().await,
    }
}

/// Unpredictable enough to keep backends apart.
fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(Now::read().nanos())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::os::unix::fs::PermissionsExt;

    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;
    use crate::cluster::Protocol;
    use crate::control::auth::mac;

    fn membership(balancer: SocketAddr) -> Membership {
        Membership {
            balancer: balancer.to_string(),
            follows: true,
            offer: Offer::to_built_in(Protocol::Udp, 7),
            secret: None,
            secret_file: None,
        }
    }

    #[tokio::test]
    async fn a_secret_that_was_changed_is_read_again_for_the_next_connection() {
        const CHALLENGE: &str = "{\"cmd\":\"auth\",\"nonce\":\"00\",\"v\":1}\n";
        let file = std::env::temp_dir().join(format!("lb-stay-{}", std::process::id()));
        let write = |text: &str| {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        };
        write("the secret as it was before");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (wish, wishes) = mpsc::channel(1);
        let (told, mut notices) = mpsc::unbounded_channel();
        let secret = Some(b"the secret as it was before".to_vec());
        let membership = Membership {
            secret,
            secret_file: Some(file.clone()),
            ..membership(listener.local_addr().unwrap())
        };
        let staying = tokio::spawn(stay(membership, wishes, move |notice| {
            let _ = told.send(notice);
        }));
        let proves = async |secret: &str| {
            let mut balancer = Balancer::accept(&listener).await;
            balancer.says(CHALLENGE).await;
            let said = balancer.hears().await;
            let value: serde_json::Value = serde_json::from_str(&said).unwrap();
            let mac = mac(secret.as_bytes(), "00", value["id"].as_str().unwrap());
            assert_eq!(value["mac"], mac, "{said}");
        };
        let scene = async {
            proves("the secret as it was before").await;
            write("the secret as it is from now on");
            proves("the secret as it is from now on").await;
            write("short");
            proves("the secret as it is from now on").await;
            while !matches!(notices.recv().await, Some(Notice::SecretKept { .. })) {}
        };
        timeout(Duration::from_secs(10), scene).await.unwrap();
        drop(wish);
        staying.abort();
        std::fs::remove_file(file).unwrap();
    }

    struct Balancer {
        stream: BufReader<TcpStream>,
    }

    impl Balancer {
        async fn accept(listener: &TcpListener) -> Balancer {
            Balancer { stream: BufReader::new(listener.accept().await.unwrap().0) }
        }

        async fn hears(&mut self) -> String {
            let mut line = String::new();
            self.stream.read_line(&mut line).await.unwrap();
            line.trim_end().to_owned()
        }

        async fn says(&mut self, line: &str) {
            self.stream.write_all(line.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_backend_registers_answers_comes_back_and_says_goodbye() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (wish, wishes) = mpsc::channel(1);
        let (told, mut notices) = mpsc::unbounded_channel();
        let membership = membership(listener.local_addr().unwrap());
        let register = membership.offer.register();
        let staying = tokio::spawn(stay(membership, wishes, move |notice| {
            told.send(notice).unwrap();
        }));

        let scene = async {
            let mut first = Balancer::accept(&listener).await;
            assert_eq!(first.hears().await, register);
            first.says("{\"ack\":\"successful\",").await;
            first.says("\"cmd\":\"register\"}\n{\"cmd\":\"hello\"}\n").await;
            assert_eq!(first.hears().await, r#"{"ack":"hello"}"#);
            assert_eq!(notices.recv().await, Some(Notice::Registered));
            assert_eq!(notices.recv().await, Some(Notice::Hello));
            drop(first);

            let mut second = Balancer::accept(&listener).await;
            let Some(Notice::Failed { why, .. }) = notices.recv().await else { panic!() };
            assert!(why.contains("closed the connection"), "{why}");
            assert_eq!(second.hears().await, register);
            second.says("{\"ack\":\"successful\",\"cmd\":\"register\"}\n").await;
            assert_eq!(notices.recv().await, Some(Notice::Registered));
            wish.send(Wish::Gone).await.unwrap();
            assert!(second.hears().await.contains("unregister"));
            second.says("{\"ack\":\"successful\",\"cmd\":\"unregister\"}\n").await;
            assert_eq!(second.hears().await, "", "the connection ends");
            staying.await.unwrap().unwrap();
        };
        timeout(Duration::from_secs(10), scene).await.unwrap();
    }

    #[tokio::test]
    async fn a_balancer_that_is_not_there_is_told_and_does_not_hold_up_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let nobody = listener.local_addr().unwrap();
        drop(listener);
        let (wish, wishes) = mpsc::channel(1);
        let (told, mut notices) = mpsc::unbounded_channel();
        let staying = tokio::spawn(stay(membership(nobody), wishes, move |notice| {
            told.send(notice).unwrap();
        }));
        let scene = async {
            for _ in 0..2 {
                let Some(Notice::Failed { why, .. }) = notices.recv().await else { panic!() };
                assert!(why.contains("cannot be reached"), "{why}");
            }
            drop(wish);
            staying.await.unwrap().unwrap();
        };
        timeout(Duration::from_secs(10), scene).await.unwrap();
    }
}
