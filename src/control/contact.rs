//! A connection of the control core's own to a backend, for a trial or a check: over TCP, and under TLS where
//! the backend speaks that. Owns the order of its steps; for how long it may take is up to whoever makes it.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::base::time::Now;
use crate::proxy::greeting::{self, WRITTEN_MAX};
use crate::tls::backends::{Client, reason};
use crate::tls::engine::{Engine, Fault};

/// Who asks, for the backend's log.
pub const AGENT: &str = concat!("lb/", env!("CARGO_PKG_VERSION"), " (check)");
/// The most ciphertext that is read at once, in bytes.
const READ_BYTES: usize = 16 * 1024;

/// Where a backend serves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    pub address: SocketAddr,
    /// Whether it expects a PROXY header.
    pub proxy: bool,
    /// How it is verified, if it is reached by TLS.
    pub tls: Option<Client>,
}

/// A connection.
pub struct Contact {
    stream: TcpStream,
    engine: Option<Box<Engine>>,
    /// Ciphertext that the engine has had no room for.
    raw: Vec<u8>,
}

/// Why there is none.
#[derive(Debug)]
pub enum Missed {
    Wire(io::Error),
    /// The handshake has failed, or a record of it cannot be read.
    Tls(Fault),
}

impl From<io::Error> for Missed {
    fn from(error: io::Error) -> Missed {
        Missed::Wire(error)
    }
}

impl fmt::Display for Missed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missed::Wire(error) => error.fmt(out),
            Missed::Tls(fault) => write!(out, "TLS: {}", reason(*fault)),
        }
    }
}

/// Why a question has no answer.
pub enum Broken {
    /// The connection failed.
    Wire(Missed),
    /// What came was no answer.
    Words(String),
}

impl From<Missed> for Broken {
    fn from(missed: Missed) -> Broken {
        Broken::Wire(missed)
    }
}

impl From<String> for Broken {
    fn from(why: String) -> Broken {
        Broken::Words(why)
    }
}

impl Contact {
    /// Whether it is under TLS.
    pub fn is_tls(&self) -> bool {
        self.engine.is_some()
    }

    /// Connects, and makes sure that the other end is not this one: if the port is among those the kernel
    /// gives out, a connection may get it as its own and meet itself, which shows that nobody listens there.
    /// A backend that expects a PROXY header is told that this connection is for nobody (`LOCAL`), and one that
    /// speaks TLS is verified.
    ///
    /// # Errors
    /// Why there is no connection.
    pub async fn make(port: &Port) -> Result<Contact, Missed> {
        let stream = connect(port.address).await?;
        let mut contact = Contact { stream, engine: None, raw: Vec::new() };
        if port.proxy {
            contact.send(greeting::write(None, &mut [0; WRITTEN_MAX])).await?;
        }
        if let Some(client) = &port.tls {
            contact.shake_hands(client).await?;
        }
        Ok(contact)
    }

    async fn shake_hands(&mut self, client: &Client) -> Result<(), Missed> {
        let mut engine = Box::new(client.begin().map_err(Missed::Tls)?);
        let mut bytes = vec![0; READ_BYTES];
        loop {
            self.flush(&mut engine).await?;
            if !engine.is_handshaking() {
                self.engine = Some(engine);
                return Ok(());
            }
            let count = self.stream.read(&mut bytes).await?;
            if count == 0 {
                return Err(Missed::Tls(Fault::CutOff));
            }
            if let Err(fault) = self.take(&mut engine, &bytes[..count]) {
                // It is told why, if it still listens.
                let _ = self.flush(&mut engine).await;
                return Err(Missed::Tls(fault));
            }
        }
    }

    fn take(&mut self, engine: &mut Engine, bytes: &[u8]) -> Result<(), Fault> {
        self.raw.extend_from_slice(bytes);
        let mut left = self.raw.as_slice();
        let taken = engine.take(&mut left, Now::read());
        let used = self.raw.len() - left.len();
        self.raw.drain(..used);
        taken
    }

    async fn flush(&mut self, engine: &mut Engine) -> io::Result<()> {
        let mut sealed = Vec::new();
        engine.flush(&mut sealed)?;
        self.stream.write_all(&sealed).await
    }

    /// Sends all of these bytes, which are no more than rustls holds at once (64 KiB).
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(mut engine) = self.engine.take() else {
            return self.stream.write_all(bytes).await;
        };
        let sealed = engine.seal(&[IoSlice::new(bytes)]);
        debug_assert_eq!(sealed, bytes.len(), "what is asked is short");
        let outcome = self.flush(&mut engine).await;
        self.engine = Some(engine);
        outcome
    }

    /// Appends what comes next, up to `most` bytes of it. Zero: the other end says no more.
    ///
    /// # Errors
    /// Those of the connection, or of its records.
    pub async fn receive(&mut self, into: &mut Vec<u8>, most: usize) -> Result<usize, Missed> {
        let Some(mut engine) = self.engine.take() else {
            let mut room = (&mut self.stream).take(most as u64);
            return Ok(room.read_buf(into).await?);
        };
        let opened = self.open(&mut engine).await;
        let plain = engine.plaintext();
        let count = plain.len().min(most);
        into.extend_from_slice(&plain[..count]);
        engine.consume(count);
        self.engine = Some(engine);
        opened.map(|()| count)
    }

    /// Waits until there is plaintext, or none comes any more.
    async fn open(&mut self, engine: &mut Engine) -> Result<(), Missed> {
        let mut bytes = vec![0; READ_BYTES];
        self.take(engine, &[]).map_err(Missed::Tls)?;
        while engine.plaintext().is_empty() && !engine.has_ended() {
            let count = self.stream.read(&mut bytes).await?;
            if count == 0 {
                break;
            }
            self.take(engine, &bytes[..count]).map_err(Missed::Tls)?;
        }
        Ok(())
    }
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to).await?;
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::time::Duration;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::config::services::{CheckConfig, CheckKind};
    use crate::control::checker::{self, Target};
    use crate::control::probe;
    use crate::tls::backends::tests::client_for;
    use crate::tls::hello;
    use crate::tls::keys::Speech;
    use crate::tls::keys::tests::identities_and_pem;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// A backend for `a.example` under TLS, which answers each request in this way.
    fn sealed(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut connection in listener.incoming().flatten() {
                let _ = serve(&mut connection, answer);
            }
        });
        address
    }

    fn serve(connection: &mut std::net::TcpStream, answer: &str) -> Option<()> {
        let (mut heard, mut bytes) = (Vec::new(), vec![0; READ_BYTES]);
        while hello::read(&heard).ok()?.is_none() {
            let count = connection.read(&mut bytes).ok().filter(|count| *count > 0)?;
            heard.extend_from_slice(&bytes[..count]);
        }
        let mut engine =
            Engine::accept(&heard, identities_and_pem().0.terms(Speech::Http, None)?).ok()?;
        let mut request = Vec::new();
        loop {
            engine.flush(connection).ok()?;
            let count = connection.read(&mut bytes).ok().filter(|count| *count > 0)?;
            engine.take(&mut &bytes[..count], Now::default()).ok()?;
            request.extend_from_slice(engine.plaintext());
            let heard = engine.plaintext().len();
            engine.consume(heard);
            if request.ends_with(b"\r\n\r\n") {
                assert!(request.starts_with(b"GET /up HTTP/1.1\r\n"));
                engine.seal(&[IoSlice::new(answer.as_bytes())]);
                engine.finish();
                engine.flush(connection).ok()?;
                return connection.flush().ok();
            }
        }
    }

    fn port(address: SocketAddr, name: &str) -> Port {
        Port { address, proxy: false, tls: Some(client_for(Some(name))) }
    }

    async fn checked(kind: CheckKind, port: Port, timeout: Duration) -> Result<(), String> {
        let (path, timeout) = ("/up".to_owned(), Some(timeout));
        let check = CheckConfig { kind, path, timeout, ..CheckConfig::default() };
        let address = port.address.to_string();
        let outcome = checker::check(&Target::of(&check, port)).await;
        outcome.map_err(|failure| failure.sentence.replace(&address, "it"))
    }

    #[tokio::test]
    async fn a_check_passes_only_if_the_backend_is_verified_and_answers_under_tls() {
        let ok = sealed("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        let down = sealed("HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n");
        use CheckKind::{Http, Tcp};
        assert_eq!(checked(Tcp, port(ok, "a.example"), PATIENCE).await, Ok(()));
        assert_eq!(checked(Http, port(ok, "a.example"), PATIENCE).await, Ok(()));
        let said = checked(Http, port(down, "a.example"), PATIENCE).await;
        assert_eq!(said.unwrap_err(), "it answered 503 instead of 200 to 399");
        for kind in [Tcp, Http] {
            let said = checked(kind, port(ok, "b.example"), PATIENCE).await;
            let why = "cannot connect to it: TLS: its certificate is for another name";
            assert_eq!(said.unwrap_err(), why);
        }
    }

    #[tokio::test]
    async fn who_accepts_and_speaks_no_tls_has_shown_nothing() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let brief = Duration::from_millis(50);
        let said = checked(CheckKind::Tcp, port(address, "a.example"), brief).await;
        assert_eq!(said.unwrap_err(), "no answer from it within 50 ms");
        let plain = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = plain.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut connection in plain.incoming().flatten() {
                let _ = connection.write_all(b"220 mail.example ESMTP\r\n");
                let _ = connection.read(&mut [0; 4096]);
            }
        });
        let said = checked(CheckKind::Tcp, port(address, "a.example"), PATIENCE).await;
        assert!(said.unwrap_err().contains("does it speak TLS there?"));
    }

    #[tokio::test]
    async fn a_backend_that_joins_is_told_why_it_is_not_taken_for_itself() {
        let (address, turns) = (sealed(""), Semaphore::new(1));
        assert_eq!(probe::connects(port(address, "a.example"), PATIENCE, &turns).await, Ok(()));
        let told = probe::connects(port(address, "b.example"), PATIENCE, &turns).await;
        let told = told.unwrap_err();
        let said =
            format!("no TLS with {address} as b.example: its certificate is for another name");
        assert_eq!((told.sentence, told.is_ours), (said, false));
    }
}
