//! Whether a data port accepts connections, found out by connecting to it. Owns the sentence that says why
//! not. Uses the runtime's own sockets: abandoned at a deadline, they return their descriptor at once,
//! while a connect on the ring would keep it until the kernel's own timeout.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;
use tokio::sync::Semaphore;

use super::contact::{Contact, Missed, Port};
use crate::base::lack::Lack;
use crate::tls::backends::{Client, reason};
use crate::tls::engine::Fault;

/// Most ports tried at once for backends that register, and as many again for those set aside.
pub const AT_ONCE: usize = 64;

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

    fn by_fault(port: &Port, fault: Fault) -> Unreached {
        let (address, why) = (port.address, reason(fault));
        let name = port.tls.as_ref().map_or_else(String::new, Client::name);
        let sentence = format!("no TLS with {address} as {name}: {why}");
        Unreached { sentence, is_ours: fault == Fault::Internal }
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
    match tokio::time::timeout(timeout, Contact::make(&port)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(Missed::Wire(error))) => Err(Unreached::by_error(port.address, &error)),
        Ok(Err(Missed::Tls(fault))) => Err(Unreached::by_fault(&port, fault)),
        Err(_) => Err(Unreached::in_time(port.address, timeout)),
    }
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
            let port = Port { address: listener.local_addr().unwrap(), proxy, tls: None };
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
            let met = Contact::make(&Port { address, proxy: false, tls: None }).await;
            assert!(met.is_err(), "nobody listens on {port}");
        }
    }
}
