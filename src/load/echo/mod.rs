//! Echo backends: what the load is sent to when a run brings its own, and what a demo shows.
//! Owns their start and end; [`server`] serves streams and HTTP on a ring, [`datagrams`] UDP.
//!
//! A backend of ours says who it is: the number of its port, in the head of a message or in
//! `x-lb-backend`. To everyone who does not speak the generator's language it is a plain echo.

mod datagrams;
mod guest;
mod server;
mod web;

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::base::thread;
use crate::cluster::Protocol;
use crate::load::{blocks, line};
use crate::ring::sys;

/// Why a connection is ended from this side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gone {
    /// The content was not what the generator sends.
    Corrupt,
    /// Not a request that can be answered.
    Malformed,
    /// Too few blocks for the answer.
    Exhausted,
}

impl From<blocks::Exhausted> for Gone {
    fn from(_: blocks::Exhausted) -> Gone {
        Gone::Exhausted
    }
}

/// Running backends of one protocol, all on one thread; they end when this is dropped.
pub struct Backends {
    addresses: Vec<SocketAddr>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Backends {
    /// Where they listen, in the order asked for; port 0 has become a real one.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Waits until they have ended, which by themselves they never do.
    pub fn wait(mut self) {
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has been printed there.
            let _ = thread.join();
        }
    }
}

impl Drop for Backends {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        self.join();
    }
}

/// Starts a backend on each address. Fails when an address cannot be bound or the kernel gives no
/// ring. `gso` is for datagrams: they may come and be answered several as one.
pub fn start(protocol: Protocol, at: &[SocketAddr], gso: bool) -> io::Result<Backends> {
    let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let told = Arc::clone(&stop);
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let name = format!("echo-{protocol}");
    let (addresses, thread) = if protocol == Protocol::Udp {
        let sockets = at.iter().map(UdpSocket::bind).collect::<io::Result<Vec<_>>>()?;
        sockets.iter().for_each(line::widen);
        let addresses = sockets.iter().map(UdpSocket::local_addr).collect::<io::Result<_>>()?;
        let thread = thread::spawn(&name, move || {
            let _ = ready.send(Ok(()));
            datagrams::serve(&sockets, gso, &told);
        })?;
        (addresses, thread)
    } else {
        let sockets =
            at.iter().map(|at| sys::listen(*at, false)).collect::<io::Result<Vec<_>>>()?;
        let addresses =
            sockets.iter().map(|socket| sys::local(socket.as_fd())).collect::<io::Result<_>>()?;
        let thread = thread::spawn(&name, move || server::serve(protocol, sockets, &told, &ready))?;
        (addresses, thread)
    };
    started.recv().unwrap_or_else(|_| Err(io::Error::other("the echo thread ended at once")))?;
    Ok(Backends { addresses, stop, thread: Some(thread) })
}
