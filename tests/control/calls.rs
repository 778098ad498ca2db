//! Backends of gRPC that are checked by its health call, over real sockets: served by the `h2` crate, in the clear and
//! under TLS.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use lb::cluster::{Protocol, Standing};
use lb::config::Config;
use lb::config::services::{CheckConfig, CheckKind, ServiceConfig, StaticBackend};
use lb::tls::demo::Made;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;

use crate::harness::{Core, data_port};
use crate::wait::wait_for;

const SERVING: u8 = 1;
const NOT_SERVING: u8 = 2;
/// It takes calls and answers none.
const SILENT: u8 = 255;

/// What a server answers to calls now, and the message of the last one.
struct Server {
    health: AtomicU8,
    asked: Mutex<Vec<u8>>,
}

impl Server {
    fn is_from_now_on(&self, health: u8) {
        self.health.store(health, Ordering::Relaxed);
    }

    fn asked(&self) -> Vec<u8> {
        self.asked.lock().unwrap().clone()
    }
}

/// A server at a port of its own, under TLS if it has settings for that. It begins as not serving.
fn server(tls: Option<ServerConfig>) -> (u16, Arc<Server>) {
    let (listener, port) = data_port();
    let server = Server { health: AtomicU8::new(NOT_SERVING), asked: Mutex::default() };
    let server = Arc::new(server);
    let shown = Arc::clone(&server);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(accept(listener, tls, shown));
    });
    (port, server)
}

async fn accept(listener: TcpListener, tls: Option<ServerConfig>, server: Arc<Server>) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let acceptor = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, server) = (acceptor.clone(), Arc::clone(&server));
        tokio::spawn(async move {
            match acceptor {
                None => serve(stream, server).await,
                Some(acceptor) => match acceptor.accept(stream).await {
                    // As servers of gRPC do, it insists on what is agreed on.
                    Ok(sealed) if sealed.get_ref().1.alpn_protocol() == Some(b"h2") => {
                        serve(sealed, server).await;
                    }
                    _ => {}
                },
            }
        });
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, server: Arc<Server>) {
    // A trial connects and hangs up.
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((request, respond))) = connection.accept().await {
        tokio::spawn(answer(request, respond, Arc::clone(&server)));
    }
}

async fn answer(
    request: Request<h2::RecvStream>,
    mut respond: SendResponse<Bytes>,
    server: Arc<Server>,
) -> Result<(), h2::Error> {
    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
    let (mut body, mut asked) = (request.into_body(), Vec::new());
    while let Some(chunk) = body.data().await {
        asked.extend_from_slice(&chunk?);
    }
    *server.asked.lock().unwrap() = asked;
    let health = server.health.load(Ordering::Relaxed);
    if health == SILENT {
        // Until the other side has had enough.
        std::future::poll_fn(|context| respond.poll_reset(context)).await?;
        return Ok(());
    }
    let head = Response::builder().header("content-type", "application/grpc");
    let mut stream = respond.send_response(head.body(()).unwrap(), false)?;
    stream.send_data(Bytes::from(vec![0, 0, 0, 0, 2, 0x08, health]), false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    stream.send_trailers(trailers)
}

/// A core with an API service `shop`, whose checks are quick.
fn core(change: impl FnOnce(&mut Config, &mut ServiceConfig)) -> Core {
    Core::start(|config| {
        let mut shop = ServiceConfig::new("shop", Protocol::Api);
        shop.check.interval = Duration::from_millis(50);
        shop.check.timeout = Some(Duration::from_millis(50));
        change(config, &mut shop);
        config.set_services(vec![shop]);
    })
}

fn wait_for_failure(core: &Core, port: u16, words: &str) {
    wait_for(&format!("a check that fails with {words}"), || {
        let check = core.shown(port)["check"].clone();
        (check["failure"].as_str()?.contains(words)).then_some(())
    });
}

#[test]
fn a_backend_that_asks_for_it_serves_while_it_says_that_it_does() {
    let core = core(|_, _| {});
    let (port, server) = server(None);
    let mut backend = core.connect();
    let join =
        json!({"cmd":"register","service":"shop","port":port,"http":2,"check":"grpc:shop.Orders"});
    let answer = backend.ask(&join);
    assert_eq!((&answer["ack"], &answer["check"]), (&json!("successful"), &join["check"]));
    wait_for_failure(&core, port, "answered NOT_SERVING instead of SERVING");
    assert_eq!(core.shown(port)["check"]["kind"], "grpc:shop.Orders");
    assert_eq!(core.shown(port)["state"], "failing", "it has yet to pass");
    assert_eq!(server.asked(), b"\0\0\0\0\x0d\x0a\x0bshop.Orders");
    server.is_from_now_on(SERVING);
    core.wait_for_standing(port, Standing::Serving);
    server.is_from_now_on(NOT_SERVING);
    core.wait_for_standing(port, Standing::Failing);
    server.is_from_now_on(SERVING);
    core.wait_for_standing(port, Standing::Serving);
    server.is_from_now_on(SILENT);
    core.wait_for_standing(port, Standing::Failing);
    wait_for_failure(&core, port, "within 50 ms");
    server.is_from_now_on(SERVING);
    core.wait_for_standing(port, Standing::Serving);
}

#[test]
fn a_table_has_listed_backends_checked_whatever_users_of_theirs_speak() {
    for protocol in [Protocol::Api, Protocol::Tcp] {
        let (port, server) = server(None);
        let core = core(|_, shop| {
            *shop =
                ServiceConfig { check: shop.check.clone(), ..ServiceConfig::new("shop", protocol) };
            shop.check = CheckConfig { kind: CheckKind::Grpc, ..shop.check.clone() };
            let (address, group) = (([127, 0, 0, 1], port).into(), None);
            shop.backends = vec![StaticBackend {
                address,
                weight: 1,
                group,
                proxy: false,
                http2: false,
                tls: None,
            }];
        });
        wait_for_failure(&core, port, "answered NOT_SERVING instead of SERVING");
        assert_eq!(core.shown(port)["check"]["kind"], "grpc");
        assert_eq!(server.asked(), [0; 5], "the whole server");
        server.is_from_now_on(SERVING);
        core.wait_for_standing(port, Standing::Serving);
    }
}

#[test]
fn under_tls_it_is_agreed_on() {
    let made = Made::new().unwrap();
    let certificate = &made.files.certificate;
    let chain = vec![CertificateDer::from_pem_file(certificate).unwrap()];
    let key = PrivateKeyDer::from_pem_file(&made.files.key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"http/1.1".to_vec(), b"h2".to_vec()];
    let (port, server) = server(Some(config));
    let core = core(|config, shop| {
        config.backend_tls.ca = Some(certificate.clone());
        // A handshake takes its time on a busy machine.
        shop.check.timeout = Some(Duration::from_secs(5));
        shop.check.interval = Duration::from_secs(5);
    });
    server.is_from_now_on(SERVING);
    let mut backend = core.connect();
    let join = json!({
        "cmd":"register", "service":"shop", "port":port, "tls":true, "tls_name":"localhost",
        "check":"grpc",
    });
    assert_eq!(backend.ask(&join)["ack"], "successful");
    core.wait_for_standing(port, Standing::Serving);
    assert_eq!(server.asked(), [0; 5]);
}
