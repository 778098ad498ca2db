//! Echo backends that register over the real control port, so that a newcomer sees the whole at
//! work. Owns one thread for all of them; shares nothing with the balancer in the same process.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::backend::{Notice, Wish};
use super::echo::Echo;
use super::stay::{Membership, stay};
use super::wire::Offer;
use crate::base::thread;
use crate::cluster::Protocol;

/// Echo backends that stay registered until [`Demo::stop`].
pub struct Demo {
    /// Dropped to end the backends: one without a sender of wishes leaves.
    wishes: Vec<mpsc::Sender<Wish>>,
    thread: JoinHandle<()>,
}

/// Starts `each` echo backends for every protocol, on free ports, and keeps them registered at the
/// control port `control`, which may open later. `joined` is called once all of them have registered.
///
/// # Errors
/// The system is out of threads, descriptors or ports.
pub fn start(
    each: usize,
    control: SocketAddr,
    secret: Option<&[u8]>,
    protocols: &[Protocol],
    joined: impl Fn() + Send + Sync + 'static,
) -> io::Result<Demo> {
    let missing = Arc::new((AtomicUsize::new(each * protocols.len()), joined));
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let mut members = JoinSet::new();
    let mut wishes = Vec::new();
    for protocol in protocols {
        for number in 1..=each {
            let name: Arc<str> = format!("demo-{protocol}-{number}").into();
            let echo = runtime.block_on(Echo::bind(*protocol, beside(control)))?;
            let (wish, wished) = mpsc::channel(1);
            wishes.push(wish);
            let membership = Membership {
                balancer: reached(control).to_string(),
                follows: false,
                offer: Offer {
                    name: Some(name.to_string()),
                    ..Offer::to_built_in(*protocol, echo.address().port())
                },
                secret: secret.map(<[u8]>::to_vec),
                secret_file: None,
            };
            runtime.spawn(echo.run(Arc::clone(&name)));
            let mut missing = Some(Arc::clone(&missing));
            let told = move |notice| {
                tracing::debug!("{name}: {notice}");
                let arrived = missing.take_if(|_| matches!(notice, Notice::Registered));
                if let Some((count, joined)) = arrived.as_deref()
                    && count.fetch_sub(1, Ordering::Relaxed) == 1
                {
                    joined();
                }
            };
            members.spawn_on(stay(membership, wished, told), runtime.handle());
        }
    }
    let thread = thread::spawn("demo", move || run(&runtime, members))?;
    Ok(Demo { wishes, thread })
}

fn run(runtime: &Runtime, mut members: JoinSet<Result<(), String>>) {
    runtime.block_on(async { while members.join_next().await.is_some() {} });
}

impl Demo {
    /// Unregisters them all and waits until they are gone; at most two seconds if the balancer does
    /// not answer.
    pub fn stop(self) {
        drop(self.wishes);
        self.thread.join().expect("the demo's thread does not panic");
    }
}

/// The address at which a door is reached from its own host: loopback for a wildcard.
pub fn reached(control: SocketAddr) -> SocketAddr {
    let ip = if control.ip().is_unspecified() {
        // An IPv6 wildcard takes IPv4 as well.
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    } else {
        control.ip()
    };
    SocketAddr::new(ip, control.port())
}

/// A free port on the address that the balancer will see as the peer's.
fn beside(control: SocketAddr) -> SocketAddr {
    SocketAddr::new(reached(control).ip(), 0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn every_backend_registers_a_port_of_its_own_that_answers_and_leaves_at_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Api];
        let (say, said) = std::sync::mpsc::channel();
        let joined = move || say.send(()).unwrap();
        let demo = start(2, listener.local_addr().unwrap(), None, &protocols, joined).unwrap();
        let mut members = Vec::new();
        let mut seen = BTreeSet::new();
        for _ in 0..6 {
            let mut member = BufReader::new(listener.accept().unwrap().0);
            let mut line = String::new();
            member.read_line(&mut line).unwrap();
            let message: serde_json::Value = serde_json::from_str(&line).unwrap();
            let port = u16::try_from(message["port"].as_u64().unwrap()).unwrap();
            if message["protocol"] != "udp" {
                TcpStream::connect(("127.0.0.1", port)).unwrap();
            }
            seen.insert(message["name"].as_str().unwrap().to_owned());
            assert!(said.try_recv().is_err(), "not all have joined");
            member.get_mut().write_all(b"{\"ack\":\"successful\",\"cmd\":\"register\"}\n").unwrap();
            members.push(member);
        }
        let all: Vec<String> = protocols
            .iter()
            .flat_map(|protocol| [1, 2].map(|number| format!("demo-{protocol}-{number}")))
            .collect();
        assert_eq!(seen, BTreeSet::from_iter(all));
        said.recv_timeout(std::time::Duration::from_secs(20)).expect("they have all joined");

        let stopping = std::thread::spawn(move || demo.stop());
        for mut member in members {
            let mut line = String::new();
            member.read_line(&mut line).unwrap();
            assert!(line.contains("unregister"), "{line}");
            member
                .get_mut()
                .write_all(b"{\"ack\":\"successful\",\"cmd\":\"unregister\"}\n")
                .unwrap();
        }
        stopping.join().unwrap();
    }

    #[test]
    fn a_wildcard_is_reached_by_loopback() {
        for (control, from) in
            [("[::]:80", "127.0.0.1:80"), ("0.0.0.0:80", "127.0.0.1:80"), ("[::1]:80", "[::1]:80")]
        {
            assert_eq!(reached(control.parse().unwrap()).to_string(), from);
        }
    }
}
