//! Small backends to try a balancer with: what arrives goes back. Owns their sockets; knows nothing of
//! the balancer. TCP echoes the stream and its half-close, UDP every datagram (empty ones too), and
//! `echo_api` answers HTTP requests with what it received.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use super::echo_api;
use crate::cluster::Protocol;

/// Limit on simultaneous connections; further ones wait in the listener's queue.
const CONNECTIONS_MAX: usize = 16 * 1024;
/// The largest datagram: its length field has 16 bits.
const DATAGRAM_BYTES_MAX: usize = 65_535;
/// After an accept that failed for lack of descriptors, all we can do is wait for some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// An echo backend whose port is open but which does not answer yet.
pub struct Echo {
    socket: Socket,
    address: SocketAddr,
}

enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
    Api(TcpListener),
}

impl Echo {
    /// Opens a port of `address` (0: any free one) within a tokio runtime.
    ///
    /// # Errors
    /// The port is taken or not allowed.
    pub async fn bind(protocol: Protocol, address: SocketAddr) -> io::Result<Echo> {
        let (socket, address) = match protocol {
            Protocol::Udp => {
                let socket = UdpSocket::bind(address).await?;
                let address = socket.local_addr()?;
                (Socket::Udp(socket), address)
            }
            Protocol::Tcp | Protocol::Api => {
                let listener = TcpListener::bind(address).await?;
                let address = listener.local_addr()?;
                let api = protocol == Protocol::Api;
                (if api { Socket::Api(listener) } else { Socket::Tcp(listener) }, address)
            }
        };
        Ok(Echo { socket, address })
    }

    /// Opens a port on every address of the host: both families, or IPv4 where there is no IPv6.
    ///
    /// # Errors
    /// The port is taken or not allowed.
    pub async fn bind_everywhere(protocol: Protocol, port: u16) -> io::Result<Echo> {
        let both = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
        match Echo::bind(protocol, both).await {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                Echo::bind(protocol, SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)).await
            }
            bound => bound,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers for as long as it is polled. `name` identifies it in API answers.
    pub async fn run(self, name: Arc<str>) {
        match self.socket {
            Socket::Tcp(listener) => serve(listener, echo_stream).await,
            Socket::Udp(socket) => echo_datagrams(socket).await,
            Socket::Api(listener) => {
                serve(listener, move |stream| echo_api::serve(stream, Arc::clone(&name))).await;
            }
        }
    }
}

async fn serve<Answer>(listener: TcpListener, answer: impl Fn(TcpStream) -> Answer)
where
    Answer: Future<Output = ()> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let answer = answer(stream);
                tokio::spawn(async move {
                    answer.await;
                    drop(place);
                });
            }
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Whatever ends the stream, only the peer would want to know, and it does.
async fn echo_stream(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let (mut from, mut to) = stream.split();
    if copy(&mut from, &mut to).await.is_ok() {
        let _ = to.shutdown().await;
    }
}

async fn echo_datagrams(socket: UdpSocket) {
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        // An error comes from an earlier answer (to a peer that is gone), and the socket remains
        // usable.
        if let Ok((length, peer)) = socket.recv_from(&mut datagram).await {
            let _ = socket.send_to(&datagram[..length], peer).await;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::time::timeout;

    use super::*;

    pub(crate) async fn started(protocol: Protocol) -> SocketAddr {
        let echo = Echo::bind(protocol, "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = echo.address();
        tokio::spawn(echo.run("echo-1".into()));
        address
    }

    pub(crate) async fn soon<T>(scene: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(20), scene).await.expect("it takes no longer than that")
    }

    #[tokio::test]
    async fn a_stream_comes_back_whole_after_its_half_close() {
        let address = started(Protocol::Tcp).await;
        soon(async {
            let stream = TcpStream::connect(address).await.unwrap();
            let (mut from, mut to) = stream.into_split();
            let sent: Vec<u8> = (0..3_000_000u32).map(|place| (place % 251) as u8).collect();
            let expected = sent.clone();
            let sending = tokio::spawn(async move {
                to.write_all(&sent).await.unwrap();
                to.shutdown().await.unwrap();
            });
            let mut back = Vec::new();
            from.read_to_end(&mut back).await.unwrap();
            sending.await.unwrap();
            assert!(back == expected, "{} bytes came back", back.len());
        })
        .await;
    }

    #[tokio::test]
    async fn datagrams_come_back_one_for_one_also_empty_ones() {
        let address = started(Protocol::Udp).await;
        soon(async {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            for datagram in [b"".as_slice(), b"one", &[7; 65_507]] {
                socket.send_to(datagram, address).await.unwrap();
                let mut back = vec![0; 70_000];
                let (length, from) = socket.recv_from(&mut back).await.unwrap();
                assert_eq!(from, address);
                assert!(&back[..length] == datagram, "{} bytes", datagram.len());
            }
        })
        .await;
    }
}
