//! The admin door: HTTP for operators and their tools. Owns the paths and how an answer is sent; the
//! contents come from `view`, `exposition` and `listing`, and the changes it can make are in `verbs`.
//! It uses the runtime's own sockets, because an HTTP server needs timeouts, and an operation on the
//! ring must not be raced against one.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::channel::{Channel, Sender};
use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderValue,
    REFERRER_POLICY, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::AbortHandle;
use tracing::warn;

use super::exposition;
use super::history::page as history;
use super::hub::Hub;
use super::listing::{Query, next_portion};
use super::page;
use super::peer::Peer;
use super::places::{Places, Watched};
use super::readiness::why_nobody_is_served;
use super::reload::Entrance;
use super::services;
use super::status::{Doors, Problem, RunState, SCHEMA, SessionStatus};
use super::verbs::{self, Refusal, Verb};
use super::view;
use crate::base::time::Now;
use crate::cluster::Service;
use crate::session::shards::SessionView;

/// How long a request's head may take, and how long a connection may idle between two requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may last, so that stalled readers do not keep others out.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(120);
/// Pause after a failed accept, mostly for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Approximate size of the pieces a list of sessions is sent in.
const PIECE_BYTES: usize = 64 * 1024;
/// Pause between two portions of the session table, during which the control core does its other work
/// and submits the ring's operations.
const PORTION_PAUSE: Duration = Duration::from_millis(1);

type Body = Either<Full<Bytes>, Channel<Bytes, Infallible>>;

/// The admin door: what every request needs.
#[derive(Clone)]
pub struct AdminDoor {
    pub hub: Rc<RefCell<Hub>>,
    pub doors: Doors,
    /// Replaced by a reload, with effect on later requests.
    pub entrance: Rc<RefCell<Entrance>>,
}

/// Where operators connect.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection over TCP or a unix socket.
trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

impl Listener {
    /// The TCP door.
    ///
    /// # Errors
    /// When the runtime cannot watch the listener.
    pub fn door(listener: std::net::TcpListener) -> io::Result<Listener> {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener).map(Listener::Tcp)
    }

    /// The unix socket, which is already open.
    ///
    /// # Errors
    /// When the runtime cannot watch it.
    pub fn socket(listener: StdUnixListener) -> io::Result<Listener> {
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener).map(Listener::Unix)
    }

    async fn accept(&self) -> io::Result<(Box<dyn Stream>, Peer)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Box::new(stream), Peer::Tcp(address)))
            }
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred()?.uid();
                Ok((Box::new(stream), Peer::Unix { uid }))
            }
        }
    }
}

/// Accepts forever and serves each connection in a task of its own.
pub async fn serve(admin: AdminDoor, listener: Listener) {
    let places = Rc::new(RefCell::new(Places::default()));
    let own = nix::unistd::geteuid().as_raw();
    loop {
        match listener.accept().await {
            // Any other user on the unix socket is disconnected.
            Ok((_, Peer::Unix { uid })) if uid != own && uid != 0 => {
                admin.hub.borrow_mut().console.admin_stranger(Now::read(), uid);
            }
            Ok((stream, peer)) => attend(&admin, &places, stream, peer),
            Err(reason) => {
                warn!(%reason, "cannot accept a connection to the admin door");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves a connection in a task of its own; another connection may have to make room for it.
fn attend(
    admin: &AdminDoor,
    places: &Rc<RefCell<Places<AbortHandle>>>,
    stream: Box<dyn Stream>,
    peer: Peer,
) {
    if let Some(other) = places.borrow_mut().make_room(peer.source()) {
        admin.hub.borrow().counters.admin_connections_shed.one();
        other.abort();
    }
    let moved = Rc::new(Cell::new(Now::read()));
    let id = places.borrow_mut().name();
    let talk = converse(admin.clone(), Watched { stream, moved: Rc::clone(&moved) }, peer);
    let held = Rc::clone(places);
    let task = tokio_uring::spawn(async move {
        // A connection that broke or took too long concerns only its peer.
        let _ = tokio::time::timeout(CONNECTION_TIMEOUT, talk).await;
        held.borrow_mut().leave(id);
    });
    places.borrow_mut().enter(id, peer.source(), moved, task.abort_handle());
}

async fn converse(
    admin: AdminDoor,
    stream: Watched<Box<dyn Stream>>,
    peer: Peer,
) -> hyper::Result<()> {
    let service = service_fn(move |request| {
        let response = admin.answer(&request, peer);
        async move { Ok::<_, Infallible>(response) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

impl AdminDoor {
    fn answer(&self, request: &Request<Incoming>, peer: Peer) -> Response<Body> {
        self.hub.borrow().counters.admin_requests.one();
        let mut response = self.respond(request, peer);
        if self.hub.borrow().is_handed_over() {
            // The next request is for the process that serves now.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    fn respond(&self, request: &Request<Incoming>, peer: Peer) -> Response<Body> {
        if self.came_by_a_foreign_name(request) {
            return problem(
                StatusCode::MISDIRECTED_REQUEST,
                "a door on loopback answers to its address or localhost, not to other names",
            );
        }
        match *request.method() {
            Method::GET | Method::HEAD => self.show(request),
            Method::POST => self.change(request, peer),
            _ => {
                let sentence = "use GET to read and POST to change";
                self.note_refused(request, peer, sentence);
                let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, sentence);
                let allowed = HeaderValue::from_static("GET, HEAD, POST");
                response.headers_mut().insert(ALLOW, allowed);
                response
            }
        }
    }

    /// Whether a browser may have been led to a door on loopback under a foreign host name, whose page
    /// could then read the answers (DNS rebinding).
    fn came_by_a_foreign_name(&self, request: &Request<Incoming>) -> bool {
        let private = self.doors.admin.is_some_and(|door| door.ip().to_canonical().is_loopback());
        let host = request.headers().get(HOST);
        private && host.is_some_and(|host| !host.to_str().is_ok_and(verbs::is_no_name))
    }

    fn change(&self, request: &Request<Incoming>, peer: Peer) -> Response<Body> {
        let (path, query) = (request.uri().path(), request.uri().query().unwrap_or(""));
        let tokens = self.entrance.borrow().tokens.clone();
        let outcome = verbs::admit(peer, request.headers(), tokens.as_deref())
            .and_then(|()| Verb::parse(path, query))
            .and_then(|verb| verbs::carry_out(&mut self.hub.borrow_mut(), verb, peer, Now::read()));
        match outcome {
            Ok(changed) => {
                self.hub.borrow().counters.admin_changes.one();
                json(StatusCode::ACCEPTED, &changed)
            }
            Err(Refusal { code, sentence }) => {
                self.note_refused(request, peer, &sentence);
                let mut response = problem(code, &sentence);
                if code == StatusCode::UNAUTHORIZED {
                    let bearer = HeaderValue::from_static("Bearer");
                    response.headers_mut().insert(WWW_AUTHENTICATE, bearer);
                }
                response
            }
        }
    }

    /// Counts a change that was refused, and says so in the log.
    fn note_refused(&self, request: &Request<Incoming>, peer: Peer, why: &str) {
        let mut hub = self.hub.borrow_mut();
        hub.counters.admin_refused.one();
        let asked = (request.method().as_str(), request.uri().path());
        hub.console.change_refused(Now::read(), peer, asked, why);
    }

    fn show(&self, request: &Request<Incoming>) -> Response<Body> {
        match request.uri().path() {
            "/" => page(),
            "/healthz" => self.health(request.uri().query() == Some("users")),
            "/readyz" => self.readiness(),
            "/status" => self.status(),
            "/sessions" => self.sessions(request),
            "/history" | "/history/services" => self.history(request),
            "/metrics" => {
                let text = exposition::text(&self.hub.borrow());
                whole(StatusCode::OK, exposition::CONTENT_TYPE, text)
            }
            _ => problem(
                StatusCode::NOT_FOUND,
                "the paths are /, /healthz, /readyz, /status, /sessions, /history, /history/services and /metrics",
            ),
        }
    }

    /// Whether every worker's loop is turning; for those who send users here, also whether it goes on doing so.
    fn health(&self, is_for_users: bool) -> Response<Body> {
        let hub = self.hub.borrow();
        if hub.is_stalled() {
            return plain(StatusCode::SERVICE_UNAVAILABLE, "a worker does not turn any more\n");
        }
        if is_for_users && view::run_state(&hub) != RunState::Serving {
            return plain(StatusCode::SERVICE_UNAVAILABLE, "the balancer is stopping\n");
        }
        plain(StatusCode::OK, "ok\n")
    }

    /// Whether a new user would be served.
    fn readiness(&self) -> Response<Body> {
        let hub = self.hub.borrow();
        let why_not = if view::run_state(&hub) != RunState::Serving {
            Some("the balancer is stopping".to_owned())
        } else if hub.is_stalled() {
            Some("a worker does not turn any more".to_owned())
        } else if hub.awaits_cluster(Now::read()) {
            Some("the cluster's registry has not been read yet".to_owned())
        } else {
            let services = hub.snapshot.services.iter().filter(|it| !hub.is_leaving(it.id));
            why_nobody_is_served(services)
        };
        match why_not {
            Some(why) => plain(StatusCode::SERVICE_UNAVAILABLE, why + "\n"),
            None => plain(StatusCode::OK, "ready\n"),
        }
    }

    fn status(&self) -> Response<Body> {
        let status = view::status(&self.hub.borrow(), self.doors, Now::read());
        json(StatusCode::OK, &status)
    }

    fn history(&self, request: &Request<Incoming>) -> Response<Body> {
        let hub = self.hub.borrow();
        let asked = history::Query::parse(request.uri().query().unwrap_or(""));
        let answer = asked.and_then(|query| {
            let known = |name: &String| match services::named(&hub.registry, name) {
                Ok(service) => Ok((Arc::clone(&service.name), service.kind)),
                // What one did that has been removed since is still of interest.
                Err(complaint) => hub.history.find(name).cloned().ok_or(complaint),
            };
            let known = query.services.iter().map(known).collect::<Result<Vec<_>, String>>()?;
            Ok(match (request.uri().path(), known.as_slice()) {
                ("/history/services", known) => {
                    json(StatusCode::OK, &history::many(&hub.history, &query, known))
                }
                (_, [] | [_]) => json(
                    StatusCode::OK,
                    &history::page(&hub.history, &query, known.first(), Now::read()),
                ),
                _ => return Err("several services are shown by /history/services".to_owned()),
            })
        });
        answer.unwrap_or_else(|complaint| problem(StatusCode::BAD_REQUEST, &complaint))
    }

    fn sessions(&self, request: &Request<Incoming>) -> Response<Body> {
        let query = match Query::parse(request.uri().query().unwrap_or("")) {
            Ok(query) => query,
            Err(complaint) => return problem(StatusCode::BAD_REQUEST, &complaint),
        };
        if let Some(name) = &query.service
            && let Err(complaint) = services::named(&self.hub.borrow().registry, name)
        {
            return problem(StatusCode::BAD_REQUEST, &complaint);
        }
        let (sender, body) = Channel::new(1);
        tokio_uring::spawn(list(Rc::clone(&self.hub), query, sender));
        response(StatusCode::OK, JSON, Either::Right(body))
    }
}

/// Sends a page of the session table, a `SessionsPage`, in pieces. Ends when the page is full, at the
/// end of the table, or when the reader has gone away.
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
            let Some(service) = hub.find_serving(session.service, session.backend) else {
                return true;
            };
            if query.takes(&session, service, |id| hub.address_of(id), now) {
                if left < query.limit {
                    piece.push(b',');
                }
                serde_json::to_writer(&mut piece, &shown(&hub, service, &session, now))
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
    // Fails only if the reader has gone away.
    let _ = sender.send_data(piece.into()).await;
}

fn shown(hub: &Hub, service: &Service, session: &SessionView, now: Now) -> SessionStatus {
    let ms = |since| u64::try_from(now.since(since).as_millis()).unwrap_or(u64::MAX);
    SessionStatus {
        id: session.id.to_string(),
        service: service.name.to_string(),
        protocol: service.kind,
        client: session.client,
        tls: session.is_tls,
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

/// The page for people, with the policy that browsers enforce on it.
fn page() -> Response<Body> {
    let mut response = whole(StatusCode::OK, "text/html; charset=utf-8", page::HTML);
    let headers = response.headers_mut();
    let policy = HeaderValue::from_static(page::POLICY.as_str());
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

fn plain(code: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
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
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
