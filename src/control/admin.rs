//! The admin door: what operators and their tools read over HTTP. Owns the paths and how an answer is
//! sent; what it says is `view`'s, `exposition`'s and `listing`'s. Its sockets are the runtime's own,
//! because an HTTP server wants timeouts, and an operation on the ring must not be raced against one.

use std::cell::RefCell;
use std::convert::Infallible;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::channel::{Channel, Sender};
use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::warn;

use super::exposition;
use super::hub::Hub;
use super::listing::{Query, next_portion};
use super::status::{Doors, Problem, RunState, SCHEMA, SessionStatus};
use super::view;
use crate::base::time::Now;
use crate::cluster::Standing;
use crate::session::shards::SessionView;

/// Connections to the admin door at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 64;
/// How long a request's head may take, and how long a connection may idle between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may last, so that readers that stall do not keep others out.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(120);
/// How long to wait after an accept failed for lack of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A list of sessions is sent in pieces of about this size.
const PIECE_BYTES: usize = 64 * 1024;
/// The pause between two portions of the session table, in which the control core does its other
/// work and the ring's operations are submitted.
const PORTION_PAUSE: Duration = Duration::from_millis(1);

type Body = Either<Full<Bytes>, Channel<Bytes, Infallible>>;

/// What every request needs.
#[derive(Clone)]
struct Admin {
    hub: Rc<RefCell<Hub>>,
    doors: Doors,
}

/// The listener as the runtime watches it.
///
/// # Errors
/// When the runtime cannot watch the listener.
pub fn listener(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Accepts for ever and answers on each connection in a task of its own.
pub async fn serve(hub: Rc<RefCell<Hub>>, listener: TcpListener, doors: Doors) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let admin = Admin { hub, doors };
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                let admin = admin.clone();
                tokio_uring::spawn(async move {
                    let _place = place;
                    // A connection that broke or took too long concerns nobody but its peer.
                    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, converse(admin, stream)).await;
                });
            }
            Err(reason) => {
                warn!(%reason, "cannot accept a connection to the admin door");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse(admin: Admin, stream: TcpStream) -> hyper::Result<()> {
    let service = service_fn(move |request| {
        let response = admin.answer(&request);
        async move { Ok::<_, Infallible>(response) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

impl Admin {
    fn answer(&self, request: &Request<Incoming>) -> Response<Body> {
        self.hub.borrow().counters.admin_requests.one();
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut response =
                problem(StatusCode::METHOD_NOT_ALLOWED, "the admin door answers GET and HEAD only");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/healthz" => self.health(),
            "/readyz" => self.readiness(),
            "/status" => self.status(),
            "/sessions" => self.sessions(request),
            "/metrics" => {
                let text = exposition::text(&self.hub.borrow());
                whole(StatusCode::OK, exposition::CONTENT_TYPE, text)
            }
            _ => problem(
                StatusCode::NOT_FOUND,
                "the paths are /healthz, /readyz, /status, /sessions and /metrics",
            ),
        }
    }

    /// Whether every worker's loop turns.
    fn health(&self) -> Response<Body> {
        if self.hub.borrow().is_stalled() {
            return words(StatusCode::SERVICE_UNAVAILABLE, "a worker does not turn any more\n");
        }
        words(StatusCode::OK, "ok\n")
    }

    /// Whether new users would be served.
    fn readiness(&self) -> Response<Body> {
        let hub = self.hub.borrow();
        let serves = |standing| standing != Standing::Draining;
        let why_not = if view::run_state(&hub) != RunState::Serving {
            "the balancer is stopping\n"
        } else if hub.is_stalled() {
            "a worker does not turn any more\n"
        } else if !hub.snapshot.backends.iter().any(|backend| serves(backend.standing)) {
            "no backend is registered\n"
        } else {
            return words(StatusCode::OK, "ready\n");
        };
        words(StatusCode::SERVICE_UNAVAILABLE, why_not)
    }

    fn status(&self) -> Response<Body> {
        let status = view::status(&self.hub.borrow(), self.doors, Now::read());
        json(StatusCode::OK, &status)
    }

    fn sessions(&self, request: &Request<Incoming>) -> Response<Body> {
        let query = match Query::parse(request.uri().query().unwrap_or("")) {
            Ok(query) => query,
            Err(complaint) => return problem(StatusCode::BAD_REQUEST, &complaint),
        };
        let (sender, body) = Channel::new(1);
        tokio_uring::spawn(list(Rc::clone(&self.hub), query, sender));
        response(StatusCode::OK, JSON, Either::Right(body))
    }
}

/// Sends a page of the session table, a `SessionsPage`, in pieces. Ends when the page is full, the
/// table has been gone through, or the reader has gone away.
async fn list(hub: Rc<RefCell<Hub>>, query: Query, mut sender: Sender<Bytes, Infallible>) {
    let shards = hub.borrow().workers.shards();
    let mut piece = format!("{{\"schema\":{SCHEMA},\"sessions\":[").into_bytes();
    let mut left = query.limit;
    let mut cursor = Some(query.after);
    while let Some(from) = cursor
        && left > 0
    {
        let now = Now::read();
        cursor = next_portion(&shards, query.worker, from, |session| {
            let hub = hub.borrow();
            if query.takes(&session, |id| hub.address_of(id), now) {
                if left < query.limit {
                    piece.push(b',');
                }
                serde_json::to_writer(&mut piece, &shown(&hub, &session, now))
                    .expect("plain fields always have a JSON form, and memory takes every write");
                left -= 1;
            }
            left > 0
        });
        if piece.len() >= PIECE_BYTES
            && sender.send_data(std::mem::take(&mut piece).into()).await.is_err()
        {
            return;
        }
        tokio::time::sleep(PORTION_PAUSE).await;
    }
    match cursor {
        Some(next) => piece.extend(format!("],\"next\":\"{next}\"}}\n").bytes()),
        None => piece.extend(b"],\"next\":null}\n"),
    }
    // Fails only when the reader has gone away.
    let _ = sender.send_data(piece.into()).await;
}

fn shown(hub: &Hub, session: &SessionView, now: Now) -> SessionStatus {
    let ms = |since| u64::try_from(now.since(since).as_millis()).unwrap_or(u64::MAX);
    SessionStatus {
        id: session.id.to_string(),
        protocol: session.protocol,
        client: session.client,
        backend: session.backend.map(|id| id.to_string()),
        backend_address: session.backend.and_then(|id| hub.address_of(id)),
        worker: session.id.worker,
        started_unix_ms: session.started.unix_ms(),
        age_ms: ms(session.started),
        idle_ms: ms(session.active),
        bytes_up: session.bytes_up,
        bytes_down: session.bytes_down,
    }
}

const JSON: &str = "application/json";

fn problem(code: StatusCode, sentence: &str) -> Response<Body> {
    json(code, &Problem { error: sentence.to_owned() })
}

fn json(code: StatusCode, value: &impl serde::Serialize) -> Response<Body> {
    let mut text =
        serde_json::to_vec(value).expect("plain fields with string keys have a JSON form");
    text.push(b'\n');
    whole(code, JSON, text)
}

fn words(code: StatusCode, text: &'static str) -> Response<Body> {
    whole(code, "text/plain; charset=utf-8", text)
}

fn whole(code: StatusCode, media: &'static str, text: impl Into<Bytes>) -> Response<Body> {
    response(code, media, Either::Left(Full::new(text.into())))
}

fn response(code: StatusCode, media: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
