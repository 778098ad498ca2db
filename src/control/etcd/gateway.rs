//! One connection to a member of etcd: HTTP/1.1 over TCP, under TLS where the endpoint says so. Owns its options and
//! how an answer is read; how long it may take is up to the machine that asks.

use std::cell::OnceCell;
use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio_rustls::TlsConnector;

use super::wire;
use crate::config::cluster::Endpoint;

/// After this time, the kernel gives up a connection whose bytes nobody acknowledges.
const UNACKNOWLEDGED: Duration = Duration::from_secs(5);
/// The longest answer, in bytes: a list of all keys of a cluster is shorter.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// A task that ends with whoever has started it.
pub struct Bound(AbortHandle);

impl Bound {
    /// Starts it.
    pub fn start(task: impl Future<Output = ()> + 'static) -> Bound {
        Bound(tokio::task::spawn_local(task).abort_handle())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A connection to a member.
pub struct Gateway {
    sender: SendRequest<Full<Bytes>>,
    host: String,
    token: Option<HeaderValue>,
    /// Why the connection has ended. Requests are told no more than that it has.
    ended: Rc<OnceCell<String>>,
    _driver: Bound,
}

/// An error, and what has led to it.
pub fn whole(error: &dyn Error) -> String {
    let (mut said, mut cause) = (error.to_string(), error.source());
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said
}

impl Gateway {
    /// Connects.
    ///
    /// # Errors
    /// Why there is no connection.
    pub async fn open(
        endpoint: &Endpoint,
        tls: Option<&Arc<ClientConfig>>,
    ) -> Result<Gateway, String> {
        let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await;
        let stream = stream.map_err(|error| error.to_string())?;
        let socket = socket2::SockRef::from(&stream);
        // It may be lost without either, only later.
        let _ = socket.set_tcp_nodelay(true);
        let _ = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
        let Some(tls) = tls.filter(|_| endpoint.is_tls) else {
            return Gateway::over(stream, endpoint).await;
        };
        let name = ServerName::try_from(endpoint.host.clone());
        let name = name.map_err(|_| format!("no certificate can be for {}", endpoint.host))?;
        let secured = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
        Gateway::over(secured.map_err(|error| format!("TLS: {error}"))?, endpoint).await
    }

    async fn over<S>(stream: S, endpoint: &Endpoint) -> Result<Gateway, String>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let begun = handshake(TokioIo::new(stream)).await;
        let (sender, driver) = begun.map_err(|error| whole(&error))?;
        let ended = Rc::<OnceCell<String>>::default();
        let tell = Rc::clone(&ended);
        let driver = Bound::start(async move {
            if let Err(error) = driver.await {
                let _ = tell.set(whole(&error));
            }
        });
        Ok(Gateway { sender, host: endpoint.authority(), token: None, ended, _driver: driver })
    }

    /// Proves who we are.
    ///
    /// # Errors
    /// Why etcd does not believe it.
    pub async fn log_in(&mut self, user: &str, password: &str) -> Result<(), String> {
        let (status, body) = self.ask(wire::authenticate(user, password)).await?;
        let token = wire::token(&body).filter(|_| status == 200);
        let token = token.ok_or_else(|| format!("user {user}: {}", wire::told(&body)))?;
        let value = HeaderValue::try_from(token).map_err(|_| "its token is none".to_owned())?;
        self.token = Some(value);
        Ok(())
    }

    /// Goes by what another connection has proved.
    pub fn trusted_like(mut self, other: &Rc<Option<HeaderValue>>) -> Gateway {
        self.token.clone_from(other);
        self
    }

    pub fn token(&self) -> Option<HeaderValue> {
        self.token.clone()
    }

    /// Asks, and returns the status and the whole body.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn ask(&mut self, request: wire::Request) -> Result<(u16, Bytes), String> {
        let response = self.begin(request).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| whole(&*error))?;
        Ok((status, body.to_bytes()))
    }

    /// Asks for a stream.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn begin(
        &mut self,
        (path, body): wire::Request,
    ) -> Result<Response<Incoming>, String> {
        let mut request = Request::post(path)
            .header(HOST, &self.host)
            .header(CONTENT_TYPE, "application/json")
            // A member that has lost its leader ends a watch instead of falling silent.
            .header("Grpc-Metadata-hasleader", "true");
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token);
        }
        let request = request.body(Full::new(Bytes::from(body)));
        let request = request.map_err(|error| error.to_string())?;
        let told = |error: hyper::Error| match self.ended.get() {
            Some(why) => why.clone(),
            None => whole(&error),
        };
        self.sender.ready().await.map_err(told)?;
        self.sender.send_request(request).await.map_err(told)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;
    use tokio::task::LocalSet;

    use super::*;

    /// What a request is told over a connection on which somebody says this.
    fn told(says: &'static [u8]) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let told = async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let endpoint = Endpoint { is_tls: false, host: "127.0.0.1".to_owned(), port };
            let (gateway, met) = tokio::join!(Gateway::open(&endpoint, None), listener.accept());
            let (mut gateway, (mut met, _)) = (gateway.unwrap(), met.unwrap());
            tokio::task::spawn_local(async move {
                let _ = met.read(&mut [0; 4096]).await;
                let _ = tokio::io::AsyncWriteExt::write_all(&mut met, says).await;
            });
            gateway.ask(wire::authenticate("user", "password")).await.unwrap_err()
        };
        LocalSet::new().block_on(&runtime, told)
    }

    #[test]
    fn an_error_is_told_with_what_has_led_to_it() {
        // The last by itself says no more than that it could not be read.
        assert_eq!(told(b"no HTTP\r\n\r\n"), "invalid HTTP version parsed");
        let cut = told(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12");
        assert!(cut.contains("connection: end of file"), "{cut}");
    }
}
