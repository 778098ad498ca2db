//! Whether a data port accepts connections, found out by connecting to it. Owns the sentence that says why
//! not. Uses the runtime's own sockets: abandoned at a deadline, they return their descriptor at once,
//! while a connect on the ring would keep it until the kernel's own timeout.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

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

/// Connects and hangs up. `turns` bounds how many do so at once.
///
/// # Errors
/// A sentence for the backend.
pub async fn connects(port: Port, timeout: Duration, turns: &Semaphore) -> Result<(), String> {
    let address = port.address;
    let _turn = turns.acquire().await;
    match tokio::time::timeout(timeout, meet(port)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            Err(format!("cannot connect to {address}: {error}; does the backend listen there?"))
        }
        Err(_) => Err(format!(
            "cannot connect to {address}: no answer within {} ms; is a firewall in between?",
            timeout.as_millis()
        )),
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
