//! A balancer for one test: echo backends in this process and `lb serve` as a child, joined over
//! the real control port. Owns their start and end.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::mpsc;

use crate::base::thread;
use crate::boot::{capacity, workers};
use crate::client::backend::{Notice, Wish};
use crate::client::stay::{Membership, stay};
use crate::client::wire::Offer;
use crate::cluster::Protocol;
use crate::config::Config;
use crate::load::echo::{self, Backends};
use crate::tls::keys::Files;

/// How long the balancer may take to start, and the backends to join.
const START_MAX: Duration = Duration::from_secs(15);
/// How long the balancer may take to end before it is killed.
const END_MAX: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Settings of the child apart from its doors. Writing a line for every session would be measured,
/// too.
const SETTINGS: &str = "[log]\nlevel = \"warn\"\n[timeouts]\ndrain_ms = 500\n";
/// The TCP service whose users speak TLS.
const SECURED: &str = "bench";
/// Control connections that the child keeps descriptors for, beside one of each backend.
const CONTROL_SPARE: usize = 8;
/// Descriptors of an echo backend before its first user: its door, and the ring or wake-up of it.
const DESCRIPTORS_PER_BACKEND: u64 = 6;

/// A running balancer with its backends; dropping it ends them all.
pub struct Own {
    door: SocketAddr,
    backends: Backends,
    /// Dropped to leave the balancer.
    wishes: Vec<mpsc::Sender<Wish>>,
    members: Option<JoinHandle<()>>,
    child: Child,
}

impl Own {
    /// Starts `count` backends and a balancer in front of them, which speaks TLS with users if it has a
    /// certificate. The error is for the person who asked.
    pub fn start(
        protocol: Protocol,
        count: usize,
        gso: bool,
        certificate: Option<&Files>,
    ) -> Result<Own, String> {
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let backends = echo::start(protocol, &vec![anywhere; count], gso)
            .map_err(|error| format!("cannot start echo backends: {error}"))?;
        let (door, control) = free_ports(protocol).map_err(|error| format!("no port: {error}"))?;
        let child = serve(protocol, (door, certificate), control, count)
            .map_err(|error| format!("cannot start a balancer: {error}"))?;
        let mut own = Own { door, backends, wishes: Vec::new(), members: None, child };
        // Streams under TLS are those of a service of its own.
        let service = certificate.filter(|_| protocol == Protocol::Tcp).map(|_| SECURED);
        let told = own.join(protocol, service, control)?;
        own.wait_for(&told, count)?;
        Ok(own)
    }

    /// How many descriptors this process opens for its own backends: one for each connection too,
    /// except for datagrams.
    pub fn descriptors(protocol: Protocol, backends: usize, connections: usize) -> u64 {
        let connections = if protocol == Protocol::Udp { 0 } else { connections as u64 };
        backends as u64 * DESCRIPTORS_PER_BACKEND + connections
    }

    /// Whether the child may open enough descriptors to carry `connections`. It inherits the limit
    /// of this process.
    pub fn fits(protocol: Protocol, backends: usize, connections: usize) -> Result<(), String> {
        let mut config = Config::default();
        config.workers = Some(workers(&config));
        config.limits.control_connections = backends + CONTROL_SPARE;
        if protocol != Protocol::Udp {
            config.listen.udp = None;
        }
        let most = match (protocol, capacity::most_sessions(&config)) {
            // A socket carries one flow to each backend.
            (Protocol::Udp, 1..) => capacity::udp_sockets(&config) * backends,
            (_, most) => most,
        };
        if most >= connections {
            return Ok(());
        }
        Err(format!(
            "{} descriptors are enough for {most} connections through a balancer, not for \
             {connections}; raise the limit (`ulimit -Hn`) or ask for fewer with --connections",
            capacity::raise_descriptors()
        ))
    }

    /// Where users connect.
    pub fn door(&self) -> SocketAddr {
        self.door
    }

    /// A backend, to be measured without the balancer.
    pub fn backend(&self) -> SocketAddr {
        self.backends.addresses()[0]
    }

    /// The balancer's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Registers every backend, and keeps them registered on a thread.
    fn join(
        &mut self,
        protocol: Protocol,
        service: Option<&str>,
        control: SocketAddr,
    ) -> Result<Receiver<Notice>, String> {
        let (tell, told) = channel();
        let mut stays = Vec::new();
        for address in self.backends.addresses() {
            let (wish, wished) = mpsc::channel(1);
            self.wishes.push(wish);
            let membership = Membership {
                balancer: control.to_string(),
                follows: false,
                offer: Offer {
                    service: service.map(str::to_owned),
                    ..Offer::to_built_in(protocol, address.port())
                },
                secret: None,
                secret_file: None,
            };
            stays.push((membership, wished, Sender::clone(&tell)));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("cannot register: {error}"))?;
        let members = thread::spawn("members", move || {
            runtime.block_on(async {
                let mut members = tokio::task::JoinSet::new();
                for (membership, wished, tell) in stays {
                    members.spawn(stay(membership, wished, move |notice| {
                        // Nobody listens once all have joined.
                        let _ = tell.send(notice);
                    }));
                }
                while members.join_next().await.is_some() {}
            });
        });
        self.members = Some(members.map_err(|error| format!("cannot register: {error}"))?);
        Ok(told)
    }

    /// Waits until every backend has joined.
    fn wait_for(&mut self, told: &Receiver<Notice>, count: usize) -> Result<(), String> {
        let until = Instant::now() + START_MAX;
        let mut joined = 0;
        let mut last = None;
        while joined < count {
            match told.recv_timeout(LOOK_AGAIN) {
                Ok(Notice::Registered) => joined += 1,
                Ok(notice) => last = Some(notice),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("the balancer did not start ({status}); it said why above"));
            }
            if Instant::now() > until {
                break;
            }
        }
        if joined == count {
            return Ok(());
        }
        let last = last.map_or_else(|| "nothing was heard".to_owned(), |notice| notice.to_string());
        Err(format!("{joined} of {count} backends could join the balancer: {last}"))
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.wishes.clear();
        if let Some(members) = self.members.take() {
            // A panic in the thread has already been printed.
            let _ = members.join();
        }
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let until = Instant::now() + END_MAX;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(LOOK_AGAIN);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port for users of a protocol and one for backends, both free at this moment.
fn free_ports(protocol: Protocol) -> std::io::Result<(SocketAddr, SocketAddr)> {
    let control = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let door = match protocol {
        Protocol::Udp => UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?,
        _ => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?,
    };
    Ok((door, control.local_addr()?))
}

/// Starts this program again as a balancer with one door. It ends with this process.
fn serve(
    protocol: Protocol,
    (door, certificate): (SocketAddr, Option<&Files>),
    control: SocketAddr,
    backends: usize,
) -> std::io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["serve", "--with-parent", "--config", "/dev/stdin", "--admin", "off"]);
    for other in Protocol::ALL {
        let is_plain = other == protocol && certificate.is_none();
        let address = if is_plain { door.to_string() } else { "off".to_owned() };
        command.arg(format!("--{other}")).arg(address);
    }
    if protocol == Protocol::Api && certificate.is_some() {
        command.arg("--api-tls").arg(door.to_string());
    }
    command.arg("--control").arg(control.to_string());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    if let Some(mut settings) = child.stdin.take() {
        let control_connections = backends + CONTROL_SPARE;
        // Said in numbers, because without them the child keeps descriptors for many more.
        let workers = workers(&Config::default());
        writeln!(settings, "workers = {workers}")?;
        write!(settings, "{SETTINGS}[limits]\ncontrol_connections = {control_connections}\n")?;
        if let Some(files) = certificate {
            let [chain, key] = [&files.certificate, &files.key].map(|path| of_this_process(path));
            writeln!(settings, "[[tls.certificate]]\ncertificate = \"{chain}\"\nkey = \"{key}\"")?;
            if protocol == Protocol::Tcp {
                let doors = format!("protocol = \"tcp\"\nlisten = \"{door}\"\ntls = true");
                writeln!(settings, "[service.{SECURED}]\n{doors}")?;
            }
        }
    }
    Ok(child)
}

/// A file of this process as another finds it.
fn of_this_process(path: &Path) -> String {
    let own = format!("/proc/{}/", std::process::id());
    path.display().to_string().replace("/proc/self/", &own)
}
