//! Whether a data port accepts connections, found out by connecting to it. Owns the sentence that says why
//! not. Uses the runtime's own sockets: abandoned at a deadline, they return their descriptor at once,
//! while a connect on the ring would keep it until the kernel's own timeout.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::base::lack::Lack;
use crate::cluster::Backend;
use crate::proxy::greeting::{self, WRITTEN_MAX};

/// Most ports tried at once for backends that register, and as many again for those set aside.
pub const AT_ONCE: usize = 64;

/// Where a backend serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Port {
    pub address: SocketAddr,
    /// Whether it expects a PROXY header.
    pub proxy: bool,
}

impl Port {
    pub fn of(backend: &Backend) -> Port {
        Port { address: backend.address, proxy: backend.proxy }
    }
}

/// Why there is no connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unreached {
    /// For the backend.
    pub sentence: String,
    /// Whether something was lacking on this side, so that nothing is known about the backend.
    pub is_ours: bool,
}

impl Unreached {
    fn by_error(address: SocketAddr, error: &io::Error) -> Unreached {
        let is_ours = is_own_lack(error);
        let sentence = match is_ours {
            true => format!(
                "the balancer could not try {address} for want of its own resources: {error}; the \
                 backend may be fine, register it again later"
            ),
            false => {
                format!("cannot connect to {address}: {error}; does the backend listen there?")
            }
        };
        Unreached { sentence, is_ours }
    }

    fn in_time(address: SocketAddr, timeout: Duration) -> Unreached {
        let ms = timeout.as_millis();
        let sentence = format!(
            "cannot connect to {address}: no answer within {ms} ms; is a firewall in between?"
        );
        Unreached { sentence, is_ours: false }
    }
}

/// Whether there is no connection because this host has run out of descriptors, memory or local ports.
pub fn is_own_lack(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|errno| Lack::of(Errno::from_raw(errno)) != Lack::None)
}

/// Connects and hangs up. `turns` bounds how many do so at once.
///
/// # Errors
/// If there is no connection within `timeout`.
pub async fn connects(port: Port, timeout: Duration, turns: &Semaphore) -> Result<(), Unreached> {
    let _turn = turns.acquire().await;
    match tokio::time::timeout(timeout, meet(port)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(Unreached::by_error(port.address, &error)),
        Err(_) => Err(Unreached::in_time(port.address, timeout)),
    }
}

/// Connects, and makes sure that the other end is not this one: if the port is among those the kernel
/// gives out, a connection may get it as its own and meet itself, which shows that nobody listens there.
/// A backend that expects a header is told that this connection is for nobody (`LOCAL`).
///
/// # Errors
/// Why there is no connection, in the kernel's words.
pub async fn meet(port: Port) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(port.address).await?;
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    if port.proxy {
        stream.write_all(greeting::write(None, &mut [0; WRITTEN_MAX])).await?;
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_host_lacks_is_not_put_down_to_the_backend() {
        let address = ([192, 0, 2, 1], 9001).into();
        let said = |errno: Errno| Unreached::by_error(address, &io::Error::from(errno));
        for errno in
            [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS, Errno::EADDRNOTAVAIL]
        {
            let Unreached { sentence, is_ours } = said(errno);
            assert!(is_ours, "{errno}");
            assert!(
                sentence.starts_with("the balancer could not try 192.0.2.1:9001"),
                "{sentence}"
            );
            assert!(!sentence.contains("does the backend listen"), "{sentence}");
        }
        for errno in [Errno::ECONNREFUSED, Errno::EHOSTUNREACH, Errno::ETIMEDOUT] {
            let Unreached { sentence, is_ours } = said(errno);
            assert!(!is_ours, "{errno}");
            assert!(sentence.ends_with("does the backend listen there?"), "{sentence}");
        }
    }

    #[tokio::test]
    async fn a_backend_that_expects_a_header_is_told_that_nobody_comes() {
        use tokio::io::AsyncReadExt;
        let turns = Semaphore::new(1);
        for (proxy, wanted) in [(false, &b""[..]), (true, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = Port { address: listener.local_addr().unwrap(), proxy };
            let backend = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut said = Vec::new();
                stream.read_to_end(&mut said).await.unwrap();
                said
            };
            let probe = connects(port, Duration::from_secs(10), &turns);
            let (outcome, said) = tokio::join!(probe, backend);
            assert_eq!((outcome, said.as_slice()), (Ok(()), wanted));
        }
    }

    #[tokio::test]
    async fn a_connection_that_met_itself_does_not_count_as_a_listener() {
        // The kernel hands out ports of one parity first, in turn, so each of those comes up.
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
        let bounds: Vec<u16> = range.split_whitespace().map(|it| it.parse().unwrap()).collect();
        let is_free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
        let port = (bounds[0]..bounds[1]).step_by(2).filter(is_free).nth(100).unwrap();
        for _ in 0..usize::from(bounds[1] - bounds[0]) {
            let address = ([127, 0, 0, 1], port).into();
            let met = meet(Port { address, proxy: false }).await;
            assert!(met.is_err(), "nobody listens on {port}");
        }
    }
}
