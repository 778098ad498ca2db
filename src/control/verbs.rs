//! Changes that operators make over the admin door: drain a backend, set its weight, end a session.
//! Owns the paths, the permission and the effect; every change goes through [`Hub::apply`] or an order
//! to the workers like any other, is counted, and leaves a line in the log.
//!
//! # The requests
//!
//! | request | does |
//! |---|---|
//! | `POST /backends/b3/drain?deadline_ms=30000` | no new sessions; those left at the deadline are ended (`never`: none are; without one, after `timeouts.drain_ms`) |
//! | `POST /backends/b3/undrain` | takes back a drain that an operator asked for |
//! | `POST /backends/b3/weight?to=5` | share of new sessions relative to the others, until the backend registers again |
//! | `POST /sessions/0-17-4/end` | ends one session |
//! | `POST /upgrade` | starts the program again as it is installed now, and leaves everything to it; `handover` in `/status` says what came of it |
//! | `POST /services/shop/shift?blue=0&green=100` | gives groups of a service other shares of the users, until the next reload |
//!
//! # Who may ask
//!
//! Over `[admin] socket`, a unix socket: root and the user that runs the balancer, as the kernel
//! reports the peer (`SO_PEERCRED`, unix(7)). Over TCP: anyone who connects from loopback and presents
//! a line of `[admin] token_file`, as `Authorization: Bearer <token>` (RFC 6750).
//!
//! A page from elsewhere could make a browser on this host send such a request. It cannot set that
//! header without a preflight, which is never granted; in addition, `Origin` must be the door itself,
//! and `Host` must be an address or `localhost`, because a stranger can point a name at this host (DNS
//! rebinding).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, ORIGIN};
use tracing::field::display;
use tracing::info;

use super::auth::Secrets;
use super::drain::Stop;
use super::hub::Hub;
use super::peer::Peer;
use super::services;
use super::status::{Changed, GroupStatus, SCHEMA};
use super::view;
use crate::base::time::Now;
use crate::cluster::groups::{GROUPS_MAX, SHARE_MAX};
use crate::cluster::registry::{Change, Fault, Lasts};
use crate::cluster::{BackendId, WEIGHT_MAX};
use crate::session::shards::SessionView;
use crate::session::{EndReason, SessionId};
use crate::worker::link::Order;

/// The longest deadline that a drain may be given.
pub const DRAIN_MAX: Duration = Duration::from_secs(24 * 3600);
/// The header in which a browser says where a request comes from (Fetch Metadata).
static FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// A change that an operator requests.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verb {
    Drain { backend: BackendId, lasts: Lasts },
    Undrain { backend: BackendId },
    Weigh { backend: BackendId, weight: u16 },
    End { session: SessionId },
    Shift { service: String, shares: Vec<(String, u64)> },
    Upgrade,
}

/// Why a request was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    pub code: StatusCode,
    /// One sentence that includes the cure.
    pub sentence: String,
}

fn refuse<T>(code: StatusCode, sentence: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { code, sentence: sentence.into() })
}

impl Verb {
    /// The backend that it changes, if it changes one.
    const fn backend(&self) -> Option<BackendId> {
        match self {
            Verb::Drain { backend, .. }
            | Verb::Undrain { backend }
            | Verb::Weigh { backend, .. } => Some(*backend),
            Verb::End { .. } | Verb::Shift { .. } | Verb::Upgrade => None,
        }
    }

    /// Reads a request's path and query.
    ///
    /// # Errors
    /// If there is no such verb, or it does not take these parameters.
    pub fn parse(path: &str, query: &str) -> Result<Verb, Refusal> {
        if path == "/upgrade" && query.is_empty() {
            return Ok(Verb::Upgrade);
        }
        let mut parts = path.trim_start_matches('/').split('/');
        let parts = [parts.next(), parts.next(), parts.next(), parts.next()];
        let [Some(kind), Some(id), Some(verb), None] = parts else { return unknown() };
        if (kind, verb) == ("services", "shift") {
            return Ok(Verb::Shift { service: id.to_owned(), shares: shares(query)? });
        }
        let parameter = parameter(query)?;
        let given = parameter.as_ref().map(|(key, value)| (key.as_str(), value.as_str()));
        match (kind, verb, given) {
            ("backends", "drain", None) => {
                Ok(Verb::Drain { backend: backend(id)?, lasts: Lasts::AsSet })
            }
            ("backends", "drain", Some(("deadline_ms", ms))) => {
                Ok(Verb::Drain { backend: backend(id)?, lasts: lasts(ms)? })
            }
            ("backends", "undrain", None) => Ok(Verb::Undrain { backend: backend(id)? }),
            ("backends", "weight", Some(("to", to))) => {
                Ok(Verb::Weigh { backend: backend(id)?, weight: weight(to)? })
            }
            ("sessions", "end", None) => match id.parse() {
                Ok(session) => Ok(Verb::End { session }),
                Err(()) => refuse(StatusCode::BAD_REQUEST, "a session's id looks like 0-17-4"),
            },
            ("backends", "drain" | "undrain" | "weight", _) | ("sessions", "end", _) => refuse(
                StatusCode::BAD_REQUEST,
                "drain takes deadline_ms or nothing, weight takes to, undrain and end take nothing",
            ),
            _ => unknown(),
        }
    }
}

fn unknown<T>() -> Result<T, Refusal> {
    refuse(
        StatusCode::NOT_FOUND,
        "POST to /backends/ID/drain, /backends/ID/undrain, /backends/ID/weight?to=N, /sessions/ID/end, \
         /services/NAME/shift?GROUP=SHARE or /upgrade",
    )
}

/// The only parameter of a query, if there is one.
fn parameter(query: &str) -> Result<Option<(String, String)>, Refusal> {
    let mut pairs = form_urlencoded::parse(query.as_bytes());
    let first = pairs.next().map(|(key, value)| (key.into_owned(), value.into_owned()));
    match pairs.next() {
        None => Ok(first),
        Some(_) => refuse(StatusCode::BAD_REQUEST, "a verb takes one parameter at most"),
    }
}

/// Groups with the shares that a query gives them.
fn shares(query: &str) -> Result<Vec<(String, u64)>, Refusal> {
    let mut shares: Vec<(String, u64)> = Vec::new();
    for (group, share) in form_urlencoded::parse(query.as_bytes()) {
        // One that is no number, or too large for one, is out of the range.
        let Ok(share) = share.parse() else {
            let said = format!("a share is from 0 to {SHARE_MAX}, as in blue=0&green=100");
            return refuse(StatusCode::BAD_REQUEST, said);
        };
        if shares.iter().any(|other| *other.0 == *group) || shares.len() == GROUPS_MAX {
            let said = format!("shift takes up to {GROUPS_MAX} groups, each once");
            return refuse(StatusCode::BAD_REQUEST, said);
        }
        shares.push((group.into_owned(), share));
    }
    if shares.is_empty() {
        let said = "shift takes the share of each group to change, as in blue=0&green=100";
        return refuse(StatusCode::BAD_REQUEST, said);
    }
    Ok(shares)
}

fn backend(id: &str) -> Result<BackendId, Refusal> {
    match id.strip_prefix('b').and_then(|number| number.parse().ok()) {
        Some(number) => Ok(BackendId(number)),
        None => refuse(StatusCode::BAD_REQUEST, "a backend's id looks like b3"),
    }
}

fn lasts(ms: &str) -> Result<Lasts, Refusal> {
    if ms == "never" {
        return Ok(Lasts::Never);
    }
    match ms.parse().map(Duration::from_millis) {
        Ok(lasts) if lasts <= DRAIN_MAX => Ok(Lasts::For(lasts)),
        _ => refuse(
            StatusCode::BAD_REQUEST,
            format!("deadline_ms must be from 0 to {}, or never", DRAIN_MAX.as_millis()),
        ),
    }
}

fn weight(to: &str) -> Result<u16, Refusal> {
    match to.parse() {
        Ok(weight @ 1..=WEIGHT_MAX) => Ok(weight),
        _ => refuse(StatusCode::BAD_REQUEST, format!("to must be from 1 to {WEIGHT_MAX}")),
    }
}

/// Checks whether a request may change anything.
///
/// # Errors
/// Why it may not.
pub fn admit(peer: Peer, headers: &HeaderMap, tokens: Option<&Secrets>) -> Result<(), Refusal> {
    let Peer::Tcp(address) = peer else { return Ok(()) };
    if !address.ip().to_canonical().is_loopback() {
        return refuse(StatusCode::FORBIDDEN, "changes are accepted from this host only");
    }
    from_the_door_itself(headers)?;
    let Some(tokens) = tokens else {
        return refuse(
            StatusCode::FORBIDDEN,
            "changes over TCP are off: set [admin] token_file, or use the socket of [admin] socket",
        );
    };
    let bearer = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
    match bearer.and_then(|value| value.strip_prefix(b"Bearer ")) {
        Some(token) if tokens.hold(token.trim_ascii()) => Ok(()),
        _ => refuse(
            StatusCode::UNAUTHORIZED,
            "send `Authorization: Bearer` with a line of the [admin] token_file",
        ),
    }
}

fn from_the_door_itself(headers: &HeaderMap) -> Result<(), Refusal> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(HOST).unwrap_or("");
    if !is_no_name(host) {
        return refuse(
            StatusCode::MISDIRECTED_REQUEST,
            "the Host header must be this door's address or localhost",
        );
    }
    let same_origin = match headers.contains_key(ORIGIN) {
        true => text(ORIGIN).and_then(|origin| origin.strip_prefix("http://")) == Some(host),
        false => true,
    };
    let same_site = match headers.contains_key(&FETCH_SITE) {
        true => matches!(text(FETCH_SITE.clone()), Some("same-origin" | "none")),
        false => true,
    };
    if same_origin && same_site {
        return Ok(());
    }
    refuse(StatusCode::FORBIDDEN, "pages from elsewhere may not change anything here")
}

/// Whether a `Host` is an address or `localhost`, with or without a port. A stranger may have pointed
/// any other name at this host.
pub fn is_no_name(host: &str) -> bool {
    let bare = match host.rsplit_once(':') {
        Some((bare, port)) if port.parse::<u16>().is_ok() => bare,
        _ => host,
    };
    let inner = bare.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    bare == "localhost" || inner.unwrap_or(bare).parse::<IpAddr>().is_ok()
}

/// Carries out a change.
///
/// # Errors
/// If there is no such backend or session (any more), if the change itself is refused, or if the
/// worker takes no more orders.
pub fn carry_out(hub: &mut Hub, verb: Verb, by: Peer, now: Now) -> Result<Changed, Refusal> {
    if hub.is_handed_over() {
        let sentence = "a newer process has taken over meanwhile: ask again";
        return refuse(StatusCode::SERVICE_UNAVAILABLE, sentence);
    }
    let mut groups = Vec::new();
    // Known before the change, after which the backend or session may be gone.
    let service = service_of(hub, &verb);
    let sessions = match &verb {
        Verb::Drain { backend, lasts } => {
            change(hub, Change::DrainBackend { backend: *backend, lasts: *lasts }, now)?
        }
        Verb::Undrain { backend } => {
            change(hub, Change::UndrainBackend { backend: *backend }, now)?
        }
        Verb::Weigh { backend, weight } => {
            change(hub, Change::Weigh { backend: *backend, weight: *weight }, now)?
        }
        Verb::End { session } => end(hub, *session)?,
        Verb::Upgrade => upgrade(hub)?,
        Verb::Shift { service, shares } => {
            let sessions;
            (groups, sessions) = shift(hub, service, shares)?;
            sessions
        }
    };
    // An operator who is told that it is done may rely on the workers having been told.
    hub.publish();
    tell(&verb, by, service.as_deref(), sessions);
    let backend = verb.backend().and_then(|id| view::backend_now(hub, id, now));
    Ok(Changed { schema: SCHEMA, sessions, backend, groups })
}

/// Puts a change into the log, with the ids that the admin door takes and shows.
fn tell(verb: &Verb, by: Peer, service: Option<&str>, sessions: u64) {
    let service = service.map(display);
    match verb {
        Verb::Drain { backend, lasts } => {
            let deadline_ms = match lasts {
                Lasts::For(lasts) => Some(view::ms(*lasts)),
                Lasts::AsSet | Lasts::Never => None,
            };
            let never = (*lasts == Lasts::Never).then_some(true);
            info!(%by, service, change = "drain", %backend, deadline_ms, never, sessions, "changed by an operator");
        }
        Verb::Undrain { backend } => {
            info!(%by, service, change = "undrain", %backend, sessions, "changed by an operator");
        }
        Verb::Weigh { backend, weight } => {
            info!(%by, service, change = "weight", %backend, weight, sessions, "changed by an operator");
        }
        Verb::End { session } => {
            info!(%by, service, change = "end", %session, sessions, "changed by an operator");
        }
        Verb::Upgrade => info!(%by, change = "upgrade", sessions, "changed by an operator"),
        Verb::Shift { shares, .. } => {
            let shares: Vec<String> =
                shares.iter().map(|(name, to)| format!("{name}={to}")).collect();
            info!(%by, service, change = "shift", shares = shares.join(" "), sessions, "changed by an operator");
        }
    }
}

/// The name of the service that a change is about, unless it is a built-in one.
fn service_of(hub: &Hub, verb: &Verb) -> Option<Arc<str>> {
    let id = match verb {
        Verb::Drain { backend, .. } | Verb::Undrain { backend } | Verb::Weigh { backend, .. } => {
            hub.registry.get(*backend)?.backend.service
        }
        Verb::End { session } => {
            let view = running(hub, *session)?;
            hub.serving(view.service, view.backend)
        }
        Verb::Shift { service, .. } => services::named(&hub.registry, service).ok()?.id,
        Verb::Upgrade => return None,
    };
    let service = hub.registry.find_service(id)?;
    (!id.is_built_in()).then(|| Arc::clone(&service.name))
}

/// What comes of it is said later, in the status.
fn upgrade(hub: &Hub) -> Result<u64, Refusal> {
    let stops = || (hub.stop != Stop::Serving).then_some("the balancer is stopping");
    if let Some(why) = hub.handover.refuses().or_else(stops) {
        return refuse(StatusCode::CONFLICT, why);
    }
    hub.upgrade_wanted.notify_one();
    Ok(hub.workers.sessions())
}

fn change(hub: &mut Hub, change: Change, now: Now) -> Result<u64, Refusal> {
    match hub.ask_elsewhere(&change, now) {
        Some(Ok(id)) => return Ok(hub.sessions_on(id)),
        Some(Err(said)) => return refuse(StatusCode::SERVICE_UNAVAILABLE, said),
        None => {}
    }
    match hub.apply(change, now) {
        Ok(applied) => Ok(applied.backend.map_or(0, |id| hub.sessions_on(id))),
        Err(fault @ Fault::Unknown { .. }) => {
            refuse(StatusCode::NOT_FOUND, format!("{fault}; /status lists them"))
        }
        Err(fault) => refuse(StatusCode::CONFLICT, fault.to_string()),
    }
}

/// The groups of the service after the shift, and the sessions of the service, which stay where they are.
fn shift(
    hub: &mut Hub,
    name: &str,
    shares: &[(String, u64)],
) -> Result<(Vec<GroupStatus>, u64), Refusal> {
    if let Err(said) = services::named(&hub.registry, name) {
        return refuse(StatusCode::NOT_FOUND, said);
    }
    match hub.shift(name, shares) {
        Ok(id) => {
            let sessions = services::tallies(hub).get(&id).map_or(0, |tally| tally.sessions);
            Ok((view::groups(hub, hub.registry.service(id)), sessions))
        }
        Err(said) => refuse(StatusCode::CONFLICT, said),
    }
}

fn end(hub: &mut Hub, id: SessionId) -> Result<u64, Refusal> {
    let Some(session) = running(hub, id) else {
        return refuse(StatusCode::NOT_FOUND, format!("no session {id} is running"));
    };
    let order = Order::EndSession { id, reason: EndReason::Operator };
    if hub.workers.order_one(id.worker, order) {
        session.backend.into_iter().for_each(|backend| hub.ended_by_operator(backend));
        return Ok(1);
    }
    hub.counters.orders_lost.one();
    refuse(StatusCode::SERVICE_UNAVAILABLE, "the worker takes no more orders; try again")
}

/// A session, if it still runs.
fn running(hub: &Hub, id: SessionId) -> Option<SessionView> {
    let shards = hub.workers.shards();
    let shard = shards.iter().find(|shard| shard.worker() == id.worker)?;
    shard.read(id.place).filter(|it| it.id == id)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn a_path_and_a_query_are_a_verb() {
        let backend = BackendId(3);
        let session = SessionId { worker: 0, place: 17, generation: 4 };
        let lasts = Lasts::For(Duration::from_millis(50));
        let shares = vec![("blue".to_owned(), 0), ("green".to_owned(), 100)];
        let shift = Verb::Shift { service: "shop".to_owned(), shares };
        for (path, query, verb) in [
            ("/backends/b3/drain", "", Verb::Drain { backend, lasts: Lasts::AsSet }),
            ("/backends/b3/drain", "deadline_ms=50", Verb::Drain { backend, lasts }),
            (
                "/backends/b3/drain",
                "deadline_ms=never",
                Verb::Drain { backend, lasts: Lasts::Never },
            ),
            ("/backends/b3/undrain", "", Verb::Undrain { backend }),
            ("/backends/b3/weight", "to=256", Verb::Weigh { backend, weight: 256 }),
            ("/sessions/0-17-4/end", "", Verb::End { session }),
            ("/services/shop/shift", "blue=0&green=100", shift),
        ] {
            assert_eq!(Verb::parse(path, query), Ok(verb), "{path}?{query}");
        }
    }

    #[test]
    fn what_is_no_verb_is_told_how_they_are_written() {
        for (path, query, code, words) in [
            ("/", "", 404, "POST to"),
            ("/backends/b3/paint", "", 404, "POST to"),
            ("/backends/b3/drain/now", "", 404, "POST to"),
            ("/backends/3/drain", "", 400, "like b3"),
            ("/backends/b3/drain", "deadline_ms=-1", 400, "from 0 to 86400000"),
            ("/backends/b3/drain", "deadline_ms=86400001", 400, "from 0 to 86400000"),
            ("/backends/b3/drain", "after=1", 400, "deadline_ms or nothing"),
            ("/backends/b3/drain", "deadline_ms=soon", 400, "or never"),
            ("/backends/b3/undrain", "deadline_ms=1", 400, "undrain and end take nothing"),
            ("/backends/b3/weight", "", 400, "weight takes to"),
            ("/backends/b3/weight", "to=0", 400, "from 1 to 256"),
            ("/backends/b3/weight", "to=257", 400, "from 1 to 256"),
            ("/backends/b3/weight", "to=1&to=2", 400, "one parameter"),
            ("/sessions/17/end", "", 400, "like 0-17-4"),
            ("/services/shop/shift", "", 400, "blue=0&green=100"),
            ("/services/shop/shift", "blue=-1", 400, "from 0 to 100"),
            ("/services/shop/shift", "blue=1&blue=2", 400, "each once"),
            ("/services/shop/shift/now", "blue=1", 404, "POST to"),
        ] {
            let refusal = Verb::parse(path, query).unwrap_err();
            assert_eq!(refusal.code.as_u16(), code, "{path}?{query}");
            assert!(refusal.sentence.contains(words), "{}", refusal.sentence);
        }
    }

    const TOKEN: &str = "0123456789abcdef0123";

    fn asked(peer: &str, headers: &[(&'static str, &str)], tokens: Option<&Secrets>) -> u16 {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        let peer = Peer::Tcp(peer.parse().unwrap());
        admit(peer, &map, tokens).map_or_else(|refusal| refusal.code.as_u16(), |()| 200)
    }

    #[test]
    fn only_who_holds_a_token_on_this_host_and_is_led_by_no_page_may_change_things() {
        let tokens = Secrets::parse(TOKEN.as_bytes()).unwrap();
        let bearer = format!("Bearer {TOKEN}");
        let good = ("authorization", bearer.as_str());
        let host = ("host", "127.0.0.1:8084");
        let here = "127.0.0.1:50000";
        for (peer, headers, code) in [
            (here, vec![host, good], 200),
            ("[::ffff:127.0.0.1]:5", vec![("host", "[::1]:8084"), good], 200),
            (here, vec![host, good, ("origin", "http://127.0.0.1:8084")], 200),
            (here, vec![host, good, ("sec-fetch-site", "same-origin")], 200),
            ("192.0.2.7:50000", vec![host, good], 403),
            (here, vec![host], 401),
            (here, vec![host, ("authorization", "Bearer 0123456789abcdef0124")], 401),
            (here, vec![host, ("authorization", "Bearer ")], 401),
            (here, vec![host, ("authorization", TOKEN)], 401),
            (here, vec![good], 421),
            (here, vec![("host", "evil.example:8084"), good], 421),
            (here, vec![host, good, ("origin", "http://evil.example")], 403),
            (here, vec![host, good, ("origin", "null")], 403),
            (here, vec![host, good, ("origin", "http://127.0.0.1:9000")], 403),
            (here, vec![host, good, ("sec-fetch-site", "cross-site")], 403),
            (here, vec![host, good, ("sec-fetch-site", "same-site")], 403),
        ] {
            assert_eq!(asked(peer, &headers, Some(&tokens)), code, "{peer} {headers:?}");
        }
        assert_eq!(asked(here, &[host, good], None), 403, "no token is configured");
        assert_eq!(admit(Peer::Unix { uid: 7 }, &HeaderMap::new(), None), Ok(()));
    }

    #[test]
    fn a_host_is_no_name_if_nobody_can_point_it_elsewhere() {
        for yes in ["127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:80", "localhost", "localhost:1"] {
            assert!(is_no_name(yes), "{yes}");
        }
        for no in ["", "evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip"]
        {
            assert!(!is_no_name(no), "{no}");
        }
    }
}
