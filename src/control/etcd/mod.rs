//! etcd as the store of a cluster: the commands of [`crate::cluster::share`] carried out over its JSON gateway, and
//! its answers as events. Owns the connections, two to one member at a time: one for questions, one for the watch.
//! Decides nothing: what is asked, when it is late and which member is next is up to that machine.
//!
//! The gateway, and not gRPC, because it needs neither a compiler for protocol buffers nor another HTTP library, and
//! a registration takes about as long.

pub mod gateway;
pub mod look;
pub mod wire;

use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use http_body_util::BodyExt;
use hyper::header::HeaderValue;
use rustls::ClientConfig;
use tokio::sync::mpsc;

use crate::cluster::share::event::{Command, Event};
use crate::config::cluster::{Cluster, Endpoint};
use crate::control::auth::Secrets;
use crate::tls::store;
use gateway::{Bound, Gateway, whole};
use wire::Lines;

/// Events that wait for the control core.
const EVENTS_MAX: usize = 256;

/// How the store is reached.
pub struct Access {
    endpoints: Vec<Endpoint>,
    user: Option<(String, String)>,
    tls: Option<Arc<ClientConfig>>,
    lease_seconds: u64,
}

impl Access {
    /// Reads the files that the settings name.
    ///
    /// # Errors
    /// One sentence that names the file and the cure.
    pub fn read(cluster: &Cluster) -> Result<Access, String> {
        let is_tls = cluster.endpoints.iter().any(|endpoint| endpoint.is_tls);
        let identity = cluster.cert_file.as_deref().zip(cluster.key_file.as_deref());
        let tls = || store::client(cluster.ca_file.as_deref(), identity);
        let password = cluster.password_file.as_deref().map(password).transpose()?;
        Ok(Access {
            endpoints: cluster.endpoints.clone(),
            user: cluster.user.clone().zip(password),
            tls: is_tls.then(tls).transpose()?,
            lease_seconds: cluster.lease.as_millis().div_ceil(1000) as u64,
        })
    }

    /// The members, in the order in which they are tried.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    fn endpoint(&self, attempt: usize) -> &Endpoint {
        &self.endpoints[attempt % self.endpoints.len()]
    }

    /// A connection that etcd knows us by.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn connect(&self, attempt: usize) -> Result<Gateway, String> {
        let mut gateway = Gateway::open(self.endpoint(attempt), self.tls.as_ref()).await?;
        if let Some((user, password)) = &self.user {
            gateway.log_in(user, password).await?;
        }
        Ok(gateway)
    }
}

/// The first line of a file that only its owner may read.
fn password(path: &Path) -> Result<String, String> {
    let told = |error| format!("cannot read cluster.password_file {}: {error}", path.display());
    let text = fs::read_to_string(path).map_err(told)?;
    match text.lines().next().map(str::trim).filter(|line| !line.is_empty()) {
        Some(line) => Ok(line.to_owned()),
        None => Err(format!("cluster.password_file {} is empty", path.display())),
    }
}

/// The secrets of a cluster, if it has any.
///
/// # Errors
/// One sentence that names the file and the cure.
pub fn secrets(cluster: &Cluster) -> Result<Option<Secrets>, String> {
    cluster.secret_file.as_deref().map(Secrets::load).transpose()
}

/// The connections to the store.
pub struct Store {
    access: Rc<Access>,
    prefix: Rc<str>,
    events: mpsc::Sender<(usize, Event)>,
    now: Option<(mpsc::UnboundedSender<Command>, Bound)>,
}

impl Store {
    /// Connects to nothing yet. What the store says comes out of the channel, with the attempt at which the
    /// connection was made.
    pub fn new(access: Access, prefix: &str) -> (Store, mpsc::Receiver<(usize, Event)>) {
        let (events, heard) = mpsc::channel(EVENTS_MAX);
        (Store { access: Rc::new(access), prefix: prefix.into(), events, now: None }, heard)
    }

    /// Carries out a command, or begins to.
    pub fn carry_out(&mut self, command: Command) {
        match command {
            Command::Close => self.now = None,
            Command::Open { attempt } => {
                let (sender, commands) = mpsc::unbounded_channel();
                let talk = Talk {
                    access: Rc::clone(&self.access),
                    prefix: Rc::clone(&self.prefix),
                    events: self.events.clone(),
                    attempt,
                };
                self.now = Some((sender, Bound::start(talk.run(commands))));
            }
            other => {
                if let Some((sender, _)) = &self.now {
                    // A connection that has ended has said so.
                    let _ = sender.send(other);
                }
            }
        }
    }
}

/// What goes over one connection.
#[derive(Clone)]
struct Talk {
    access: Rc<Access>,
    prefix: Rc<str>,
    events: mpsc::Sender<(usize, Event)>,
    attempt: usize,
}

impl Talk {
    async fn run(self, commands: mpsc::UnboundedReceiver<Command>) {
        if let Err(said) = self.converse(commands).await {
            self.lost(&said).await;
        }
    }

    async fn lost(&self, said: &str) {
        let said = format!("{}: {said}", self.access.endpoint(self.attempt));
        self.tell(Event::Lost { said }).await;
    }

    async fn tell(&self, event: Event) {
        // Nobody listens any more only when the balancer stops.
        let _ = self.events.send((self.attempt, event)).await;
    }

    async fn converse(&self, mut commands: mpsc::UnboundedReceiver<Command>) -> Result<(), String> {
        let mut gateway = self.access.connect(self.attempt).await?;
        let token = Rc::new(gateway.token());
        self.ask(&mut gateway, &Command::Open { attempt: self.attempt }).await?;
        let mut watch = None;
        while let Some(command) = commands.recv().await {
            if let Command::Watch { .. } = command {
                // The one before ends first.
                drop(watch.take());
                watch = Some(Bound::start(self.clone().watch(command, Rc::clone(&token))));
            } else {
                self.ask(&mut gateway, &command).await?;
            }
        }
        Ok(())
    }

    async fn ask(&self, gateway: &mut Gateway, command: &Command) -> Result<(), String> {
        let request = wire::request(command, &self.prefix, self.access.lease_seconds);
        let Some(request) = request else { return Ok(()) };
        let (status, body) = gateway.ask(request).await?;
        match wire::answer(command, status, &body) {
            Event::Lost { said } => Err(said),
            event => {
                self.tell(event).await;
                Ok(())
            }
        }
    }

    async fn watch(self, command: Command, token: Rc<Option<HeaderValue>>) {
        let ended = self.follow(&command, &token).await;
        let said = ended.err().unwrap_or_else(|| "the watch has ended".to_owned());
        self.lost(&said).await;
    }

    async fn follow(
        &self,
        command: &Command,
        token: &Rc<Option<HeaderValue>>,
    ) -> Result<(), String> {
        let gateway =
            Gateway::open(self.access.endpoint(self.attempt), self.access.tls.as_ref()).await?;
        let mut gateway = gateway.trusted_like(token);
        let request = wire::request(command, &self.prefix, self.access.lease_seconds);
        let response = gateway.begin(request.expect("a watch asks for something")).await?;
        let status = response.status().as_u16();
        let (mut body, mut lines) = (response.into_body(), Lines::default());
        if status != 200 {
            return Err(format!("no watch: status {status}"));
        }
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| whole(&error))?;
            let mut events = Vec::new();
            let bytes = frame.data_ref().map_or(&[][..], |bytes| bytes);
            lines.take(bytes, |line| events.extend(wire::watched(line)))?;
            for event in events {
                if let Event::Lost { said } = event {
                    return Err(said);
                }
                self.tell(event).await;
            }
        }
        Ok(())
    }
}
