//! Values in the store: what a balancer says of a backend, of itself, and what it asks of another. Owns their JSON.
//! A member that is not known is passed over, and a state that is not known means no new sessions, so that balancers
//! of several versions understand each other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cluster::backend::{AskedCheck, ServiceId, WEIGHT_MAX, is_name};
use crate::cluster::registry::{DrainedBy, Lasts, Registered, Registration};
use crate::cluster::source::Source;
use crate::tls::backends::BackendTls;

/// The version of these forms.
const VERSION: u32 = 1;
/// Longest value about a backend, in bytes.
pub const BACK_BYTES_MAX: usize = 1024;
/// Longest value about a balancer.
pub const NODE_BYTES_MAX: usize = 64 << 10;
/// Longest host, of a certificate or of an address, within a value about a backend.
const TEXT_BYTES_MAX: usize = 256;

/// Whether a backend is to be given sessions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum State {
    #[default]
    Serving,
    /// It drains at somebody's request.
    Draining(Parting),
    /// It has left in good order,
    Left,
    /// or was lost with its control connection.
    Lost,
    /// What only a later version knows. It gets no new sessions.
    Unknown,
}

impl State {
    /// The same, but that a drain which was asked for by this party does not count.
    pub fn unless_asked_by(self, by: DrainedBy) -> State {
        match self {
            State::Draining(parting) if parting.by == by => State::Serving,
            other => other,
        }
    }
}

/// A drain at the balancer where it was asked for, which runs it everywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parting {
    pub by: DrainedBy,
    /// Which of that balancer's drains this is.
    pub number: u64,
    /// How long the sessions had when this was written; `None`: until they end by themselves.
    pub lasts: Option<Duration>,
}

/// What one balancer says of a backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    pub weight: u16,
    pub name: Option<Arc<str>>,
    pub group: Option<Arc<str>>,
    /// Whether each connection to it begins with a PROXY header.
    pub proxy: bool,
    /// Whether it speaks HTTP/2, rather than HTTP/1.1.
    pub http2: bool,
    /// Whether it is reached by TLS, and the host that its certificate must be for if that is not its address.
    pub tls: Option<Option<Arc<str>>>,
    /// Whether it may be tried by a connection that is closed again at once.
    pub probe: bool,
    pub check: Option<AskedCheck>,
    /// Where an address that only its own host can reach belongs.
    pub host: Option<Arc<str>>,
    pub state: State,
}

impl Offer {
    /// A backend that serves, with all else as it is unless somebody says otherwise.
    pub fn plain() -> Offer {
        Offer {
            weight: 1,
            name: None,
            group: None,
            proxy: false,
            http2: false,
            tls: None,
            probe: true,
            check: None,
            host: None,
            state: State::Serving,
        }
    }

    /// The same in another state.
    pub fn with(&self, state: State) -> Offer {
        Offer { state, ..self.clone() }
    }

    /// What is said of a backend that is registered here.
    pub fn of(entry: &Registered, state: State) -> Offer {
        let backend = &entry.backend;
        Offer {
            weight: backend.weight,
            name: backend.name.clone(),
            group: backend.group.clone(),
            proxy: backend.proxy,
            http2: backend.http2,
            tls: backend.tls.as_ref().map(|tls| tls.name.clone()),
            probe: entry.probe,
            check: entry.check.clone(),
            host: None,
            state,
        }
    }

    /// What that is to the registry of a balancer that hears of it.
    pub fn registration(&self, service: ServiceId, address: SocketAddr) -> Registration {
        Registration {
            source: Source::Cluster,
            service,
            address,
            weight: self.weight,
            name: self.name.clone(),
            group: self.group.clone(),
            proxy: self.proxy,
            http2: self.http2,
            tls: self.tls.as_ref().map(|name| BackendTls { name: name.clone(), ca: None }),
            probe: self.probe,
            check: self.check.clone(),
        }
    }

    /// Who has asked for its drain, if it gets no new sessions.
    pub fn drains(&self) -> Option<DrainedBy> {
        match self.state {
            State::Serving => None,
            State::Draining(parting) => Some(parting.by),
            State::Left | State::Lost | State::Unknown => Some(DrainedBy::Owner),
        }
    }

    /// Whether the balancer that says this has the backend registered.
    pub fn is_claim(&self) -> bool {
        !matches!(self.state, State::Left | State::Lost)
    }
}

/// A sealed value's content, and its place in the order in which its balancer wrote.
pub type Numbered<T> = (u64, T);

#[derive(Serialize, Deserialize)]
struct Back {
    v: u32,
    n: u64,
    #[serde(default = "one")]
    weight: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    proxy: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    http2: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    tls: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tls_name: Option<String>,
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    probe: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    check: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    state: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drain: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ends_in_ms: Option<u64>,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

fn is_true(on: &bool) -> bool {
    *on
}

fn is_false(on: &bool) -> bool {
    !*on
}

fn owned(text: &Option<Arc<str>>) -> Option<String> {
    text.as_deref().map(str::to_owned)
}

/// Writes what a balancer says of a backend as its `n`-th word.
pub fn write_back(n: u64, offer: &Offer) -> String {
    let parting = match offer.state {
        State::Draining(parting) => Some(parting),
        _ => None,
    };
    let state = match offer.state {
        State::Serving => "serving",
        State::Draining(_) => "draining",
        State::Left => "left",
        State::Lost => "lost",
        State::Unknown => "unknown",
    };
    let back = Back {
        v: VERSION,
        n,
        weight: offer.weight,
        name: owned(&offer.name),
        group: owned(&offer.group),
        proxy: offer.proxy,
        http2: offer.http2,
        tls: offer.tls.is_some(),
        tls_name: offer.tls.as_ref().and_then(owned),
        probe: offer.probe,
        check: offer.check.as_ref().map(AskedCheck::to_string),
        host: owned(&offer.host),
        state: state.to_owned(),
        by: parting.map(|it| it.by.name().to_owned()),
        drain: parting.map(|it| it.number),
        ends_in_ms: parting.and_then(|it| it.lasts).map(|lasts| lasts.as_millis() as u64),
    };
    text(&back)
}

/// Reads it; `None` if it is nothing that could be acted on.
pub fn read_back(value: &str) -> Option<Numbered<Offer>> {
    if value.len() > BACK_BYTES_MAX {
        return None;
    }
    let back: Back = serde_json::from_str(value).ok()?;
    let is_short =
        |text: &Option<String>| text.as_ref().is_none_or(|it| it.len() <= TEXT_BYTES_MAX);
    // As on the control port: they come into the log and onto terminals.
    let is_word = |text: &Option<String>| text.as_ref().is_none_or(|it| is_name(it));
    let fits = (1..=WEIGHT_MAX).contains(&back.weight)
        && [&back.name, &back.group].into_iter().all(is_word)
        && [&back.tls_name, &back.host].into_iter().all(is_short);
    let check = back.check.map(|check| check.parse()).transpose().ok()?;
    let state = match back.state.as_str() {
        "serving" => State::Serving,
        "left" => State::Left,
        "lost" => State::Lost,
        "draining" => State::Draining(Parting {
            by: drained_by(back.by.as_deref()),
            number: back.drain.unwrap_or(0),
            lasts: back.ends_in_ms.map(Duration::from_millis),
        }),
        _ => State::Unknown,
    };
    let offer = Offer {
        weight: back.weight,
        name: back.name.map(Arc::from),
        group: back.group.map(Arc::from),
        proxy: back.proxy,
        http2: back.http2,
        tls: back.tls.then(|| back.tls_name.map(Arc::from)),
        probe: back.probe,
        check,
        host: back.host.map(Arc::from),
        state,
    };
    fits.then_some((back.n, offer))
}

fn drained_by(word: Option<&str>) -> DrainedBy {
    match word {
        Some(word) if word == DrainedBy::Operator.name() => DrainedBy::Operator,
        _ => DrainedBy::Owner,
    }
}

/// What a balancer says of itself.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeReport {
    /// Where backends register at it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub control: Vec<String>,
    pub version: String,
    /// How it gives users to backends under `source_hash`.
    pub algo: u32,
    /// `serving` or `stopping`.
    pub state: String,
    pub sessions: u64,
    /// The host and network namespace that it runs in.
    pub host: String,
    /// A sum over the table of each service, by which balancers that choose differently are found.
    pub tables: BTreeMap<String, String>,
    /// Of drains, `<node>~<hex8>#<number>`: the sessions left here, and those that were ended.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub drains: BTreeMap<String, (u64, u64)>,
}

impl NodeReport {
    /// Whether it differs in what the others act on, and not only in what they show.
    pub fn is_news_after(&self, before: &NodeReport) -> bool {
        NodeReport { sessions: before.sessions, ..self.clone() } != *before
    }
}

#[derive(Serialize, Deserialize)]
struct Node<R> {
    v: u32,
    n: u64,
    #[serde(flatten)]
    report: R,
}

/// Writes a balancer's report as its `n`-th word. Reports of drains that do not fit are left out: it then counts as
/// not heard of.
pub fn write_node(n: u64, report: &NodeReport) -> String {
    let whole = text(&Node { v: VERSION, n, report });
    if whole.len() + 128 <= NODE_BYTES_MAX {
        return whole;
    }
    text(&Node { v: VERSION, n, report: &NodeReport { drains: BTreeMap::new(), ..report.clone() } })
}

pub fn read_node(value: &str) -> Option<Numbered<NodeReport>> {
    if value.len() > NODE_BYTES_MAX {
        return None;
    }
    serde_json::from_str::<Node<NodeReport>>(value).ok().map(|node| (node.n, node.report))
}

/// What one balancer asks of another, for an operator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verb {
    Drain(Lasts),
    Undrain,
    Weigh(u16),
}

#[derive(Serialize, Deserialize)]
struct Ask {
    v: u32,
    verb: String,
    backend: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lasts_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "is_false")]
    never: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weight: Option<u16>,
}

/// Writes a request about the backend at `place`, as [`super::key::Place`] is written.
pub fn write_ask(place: &str, verb: &Verb) -> String {
    let (word, lasts, weight) = match verb {
        Verb::Drain(lasts) => ("drain", Some(*lasts), None),
        Verb::Undrain => ("undrain", None, None),
        Verb::Weigh(weight) => ("weight", None, Some(*weight)),
    };
    let lasts_ms = match lasts {
        Some(Lasts::For(lasts)) => Some(lasts.as_millis() as u64),
        _ => None,
    };
    text(&Ask {
        v: VERSION,
        verb: word.to_owned(),
        backend: place.to_owned(),
        lasts_ms,
        never: lasts == Some(Lasts::Never),
        weight,
    })
}

/// Reads it: the place, and what is asked.
pub fn read_ask(value: &str) -> Option<(String, Verb)> {
    let ask: Ask = Some(value)
        .filter(|it| it.len() <= BACK_BYTES_MAX)
        .and_then(|it| serde_json::from_str(it).ok())?;
    let verb = match ask.verb.as_str() {
        "drain" if ask.never => Verb::Drain(Lasts::Never),
        "drain" => match ask.lasts_ms {
            Some(ms) => Verb::Drain(Lasts::For(Duration::from_millis(ms))),
            None => Verb::Drain(Lasts::AsSet),
        },
        "undrain" => Verb::Undrain,
        "weight" => Verb::Weigh(ask.weight?),
        _ => return None,
    };
    Some((ask.backend, verb))
}

fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("text, numbers and lists of them can be written as JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::time::Now;
    use crate::cluster::Snapshot;
    use crate::cluster::registry::{Change, Registry};

    #[test]
    fn what_is_said_of_a_backend_is_read_as_it_was_written() {
        let parting = |by, lasts| State::Draining(Parting { by, number: 3, lasts });
        let second = Some(Duration::from_secs(1));
        for (offer, says) in [
            (Offer::plain(), r#"{"v":1,"n":7,"weight":1,"state":"serving"}"#),
            (
                Offer { state: parting(DrainedBy::Operator, second), ..Offer::plain() },
                r#"{"v":1,"n":7,"weight":1,"state":"draining","by":"operator","drain":3,"ends_in_ms":1000}"#,
            ),
            (
                Offer { state: parting(DrainedBy::Owner, None), tls: Some(None), ..Offer::plain() },
                r#"{"v":1,"n":7,"weight":1,"tls":true,"state":"draining","by":"owner","drain":3}"#,
            ),
            (
                Offer { state: State::Lost, ..Offer::plain() },
                r#"{"v":1,"n":7,"weight":1,"state":"lost"}"#,
            ),
            (
                Offer {
                    weight: 256,
                    name: Some("a".into()),
                    group: Some("blue".into()),
                    proxy: true,
                    http2: true,
                    tls: Some(Some("b.example".into())),
                    probe: false,
                    check: Some(AskedCheck::Http("/up".into())),
                    host: Some("h".into()),
                    state: State::Left,
                },
                r#"{"v":1,"n":7,"weight":256,"name":"a","group":"blue","proxy":true,"http2":true,"tls":true,"tls_name":"b.example","probe":false,"check":"http:/up","host":"h","state":"left"}"#,
            ),
        ] {
            assert_eq!(write_back(7, &offer), says);
            assert_eq!(read_back(says), Some((7, offer)));
        }
    }

    #[test]
    fn a_backend_is_elsewhere_what_it_is_where_it_has_registered() {
        let service = Snapshot::default().services[0].clone();
        let address = ([192, 0, 2, 1], 80).into();
        let plain = Offer::plain();
        for offer in [
            plain.clone(),
            Offer { weight: 3, name: Some("a".into()), probe: false, ..plain.clone() },
            Offer { proxy: true, ..plain.clone() },
            Offer { http2: true, ..plain.clone() },
            Offer { tls: Some(Some("b.example".into())), ..plain.clone() },
        ] {
            let mut registry = Registry::new(1, std::slice::from_ref(&service));
            let wanted = offer.registration(service.id, address);
            registry.apply(Change::Register(wanted), Now::default()).unwrap();
            let entry = registry.find(service.id, address).unwrap();
            assert_eq!(Offer::of(entry, State::Serving), offer);
            assert_eq!((entry.backend.proxy, entry.backend.http2), (offer.proxy, offer.http2));
        }
    }

    #[test]
    fn a_later_version_is_understood_as_far_as_it_goes() {
        let (n, offer) =
            read_back(r#"{"v":2,"n":1,"state":"dreaming","zone":["a"],"mac":"00"}"#).unwrap();
        assert_eq!((n, offer), (1, Offer { state: State::Unknown, ..Offer::plain() }));
        let long = format!(r#"{{"v":1,"n":1,"state":"serving","name":"{}"}}"#, "x".repeat(300));
        let longer = format!(r#"{{"v":1,"n":1,"state":"serving","zone":"{}"}}"#, "x".repeat(1100));
        for value in [
            "",
            "7",
            r#"{"v":1,"state":"serving"}"#,
            r#"{"v":1,"n":1,"state":"serving","weight":0}"#,
            r#"{"v":1,"n":1,"state":"serving","weight":257}"#,
            r#"{"v":1,"n":1,"state":"serving","check":"ftp"}"#,
            r#"{"v":1,"n":1,"state":"serving","name":"\u001b[2J"}"#,
            r#"{"v":1,"n":1,"state":"serving","name":""}"#,
            r#"{"v":1,"n":1,"state":"serving","group":"blue\ngreen"}"#,
            &long,
            &longer,
        ] {
            assert_eq!(read_back(value), None, "{value}");
        }
    }

    #[test]
    fn a_balancer_says_what_it_is_and_how_its_drains_go() {
        let report = NodeReport {
            control: vec!["192.0.2.1:8080".to_owned()],
            sessions: 4,
            drains: [("a~00000001#3".to_owned(), (2, 1))].into(),
            ..NodeReport::default()
        };
        assert_eq!(read_node(&write_node(9, &report)), Some((9, report.clone())));
        assert!(!NodeReport { sessions: 5, ..report.clone() }.is_news_after(&report));
        assert!(NodeReport { algo: 2, ..report.clone() }.is_news_after(&report));
        let drains = (0..4096).map(|number| (format!("a~00000001#{number}"), (u64::MAX, 0)));
        let many = NodeReport { drains: drains.collect(), ..report.clone() };
        let (_, read) = read_node(&write_node(9, &many)).unwrap();
        assert_eq!((read.drains.len(), read.sessions), (0, 4), "the rest is told all the same");
        assert_eq!(read_node(r#"{"v":1,"n":"x"}"#), None);
    }

    #[test]
    fn what_is_asked_is_understood() {
        for verb in [
            Verb::Drain(Lasts::AsSet),
            Verb::Drain(Lasts::Never),
            Verb::Drain(Lasts::For(Duration::from_millis(5))),
            Verb::Undrain,
            Verb::Weigh(9),
        ] {
            let said = write_ask("tcp/tcp/192.0.2.1:80", &verb);
            assert_eq!(read_ask(&said), Some(("tcp/tcp/192.0.2.1:80".to_owned(), verb)), "{said}");
        }
        assert_eq!(read_ask(r#"{"v":1,"verb":"paint","backend":"x"}"#), None);
        assert_eq!(read_ask(r#"{"v":1,"verb":"weight","backend":"x"}"#), None);
    }
}
