//! Echo backends: what the load is sent to when a run brings its own backends, and what a demo shows.
//! Owns their start and end; `server` serves streams and HTTP on a ring, `datagrams` serves UDP.
//!
//! Our backends say who they are: by the number of their port, in the head of a message or in
//! `x-lb-backend`. For a peer that does not speak the generator's language they are a plain echo.

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
use crate::load::{blocks, connection};
use crate::ring::sys;

/// Why this side ends a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gone {
    /// The content was not what the generator sends.
    Corrupt,
    /// The request cannot be answered.
    Malformed,
    /// There were too few blocks for the answer.
    Exhausted,
}

impl From<blocks::Exhausted> for Gone {
    fn from(_: blocks::Exhausted) -> Gone {
        Gone::Exhausted
    }
}

/// Running backends of one protocol, all on one thread; dropping this ends them.
pub struct Backends {
    addresses: Vec<SocketAddr>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Backends {
    /// Where they listen, in the order asked for; a port 0 has become a real one.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Waits until they have ended, which they never do by themselves.
    pub fn wait(mut self) {
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has already been printed.
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

/// Starts a backend on each address. Fails if an address cannot be bound or the kernel gives no
/// ring. With `gso`, datagrams may be received and answered several as one.
pub fn start(protocol: Protocol, at: &[SocketAddr], gso: bool) -> io::Result<Backends> {
    let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let told = Arc::clone(&stop);
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let name = format!("echo-{protocol}");
    let (addresses, thread) = if protocol == Protocol::Udp {
        let sockets = at.iter().map(UdpSocket::bind).collect::<io::Result<Vec<_>>>()?;
        sockets.iter().for_each(connection::widen);
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
