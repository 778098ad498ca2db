//! Whether a data port accepts connections, found out by connecting to it. Owns the sentence that says why
//! not. Uses the runtime's own sockets: abandoned at a deadline, they return their descriptor at once,
//! while a connect on the ring would keep it until the kernel's own timeout.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::Semaphore;

/// Most ports tried at once for backends that register, and as many again for those set aside.
pub const AT_ONCE: usize = 64;

/// Connects and hangs up. `turns` bounds how many do so at once.
///
/// # Errors
/// A sentence for the backend.
pub async fn connects(
    address: SocketAddr,
    timeout: Duration,
    turns: &Semaphore,
) -> Result<(), String> {
    let _turn = turns.acquire().await;
    match tokio::time::timeout(timeout, meet(address)).await {
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
///
/// # Errors
/// Why there is no connection, in the kernel's words.
pub async fn meet(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    match stream.local_addr()? == stream.peer_addr()? {
        true => Err(io::ErrorKind::ConnectionRefused.into()),
        false => Ok(stream),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_met_itself_does_not_count_as_a_listener() {
        // The kernel hands out ports of one parity first, in turn, so each of those comes up.
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
        let bounds: Vec<u16> = range.split_whitespace().map(|it| it.parse().unwrap()).collect();
        let is_free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
        let port = (bounds[0]..bounds[1]).step_by(2).filter(is_free).nth(100).unwrap();
        for _ in 0..usize::from(bounds[1] - bounds[0]) {
            let met = meet(([127, 0, 0, 1], port).into()).await;
            assert!(met.is_err(), "nobody listens on {port}");
        }
    }
}
