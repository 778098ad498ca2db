//! `/sessions`: a query, answered from the session table page by page. Owns the query and the cursor;
//! the table is read without a lock and in portions, between which the control core does its other
//! work.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

use super::status::{PAGE_DEFAULT, PAGE_MAX};
use crate::base::time::Now;
use crate::cluster::{BackendId, Protocol, Service};
use crate::session::shards::{SessionView, Shard};

/// Places of the table examined in one go: about a millisecond's work.
pub const PORTION: u32 = 1024;

/// The next place of the table to examine. Written `worker-place`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cursor {
    worker: u8,
    place: u32,
}

impl std::fmt::Display for Cursor {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}-{}", self.worker, self.place)
    }
}

impl FromStr for Cursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Cursor, ()> {
        let (worker, place) = text.split_once('-').ok_or(())?;
        let worker = worker.parse().map_err(|_| ())?;
        Ok(Cursor { worker, place: place.parse().map_err(|_| ())? })
    }
}

/// A backend as a query names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OfBackend {
    Id(BackendId),
    Address(SocketAddr),
}

/// The sessions a query selects, and the page of them it wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Query {
    /// The service's name.
    pub service: Option<String>,
    pub protocol: Option<Protocol>,
    pub backend: Option<OfBackend>,
    pub client: Option<IpNet>,
    pub worker: Option<u8>,
    pub age: Option<Duration>,
    pub limit: usize,
    pub after: Cursor,
}

impl Query {
    /// Reads a query string.
    ///
    /// # Errors
    /// A sentence that names the key and the values it takes.
    pub fn parse(query: &str) -> Result<Query, String> {
        let mut asked = Query {
            service: None,
            protocol: None,
            backend: None,
            client: None,
            worker: None,
            age: None,
            limit: PAGE_DEFAULT,
            after: Cursor::default(),
        };
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            asked.set(&key, &value).ok_or_else(|| complaint(&key))?;
        }
        Ok(asked)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "service" => self.service = Some(value.to_owned()),
            "protocol" => {
                let named = Protocol::ALL.into_iter().find(|known| known.name() == value);
                self.protocol = Some(named?);
            }
            "backend" => self.backend = Some(backend(value)?),
            "client" => self.client = Some(network(value)?),
            "worker" => self.worker = Some(value.parse().ok()?),
            "age_ms" => self.age = Some(Duration::from_millis(value.parse().ok()?)),
            "limit" => {
                let limit = value.parse().ok()?;
                self.limit = (1..=PAGE_MAX).contains(&limit).then_some(limit)?;
            }
            "after" => self.after = value.parse().ok()?,
            _ => return None,
        }
        Some(())
    }

    /// Whether the query selects a session, which is of this service; `address_of` gives a
    /// backend's address.
    pub fn takes(
        &self,
        session: &SessionView,
        service: &Service,
        address_of: impl Fn(BackendId) -> Option<SocketAddr>,
        now: Now,
    ) -> bool {
        let of_backend = |wanted: OfBackend| match wanted {
            OfBackend::Id(id) => session.backend == Some(id),
            OfBackend::Address(at) => session.backend.and_then(&address_of) == Some(at),
        };
        self.service.as_ref().is_none_or(|wanted| *service.name == **wanted)
            && self.protocol.is_none_or(|wanted| service.kind == wanted)
            && self.client.is_none_or(|network| network.contains(&session.client.ip()))
            && self.age.is_none_or(|age| now.since(session.started) >= age)
            && self.backend.is_none_or(of_backend)
    }
}

fn complaint(key: &str) -> String {
    let may_be = match key {
        "protocol" => "tcp, udp or api",
        "backend" => "an id such as b3, or an address with port",
        "client" => "an address, or a network such as 10.1.0.0/16",
        "worker" => "a worker's number",
        "age_ms" => "a number of milliseconds",
        "limit" => return format!("limit must be from 1 to {PAGE_MAX}"),
        "after" => "the `next` of the page before",
        _ => {
            return "the keys are service, protocol, backend, client, worker, age_ms, limit and after"
                .into();
        }
    };
    format!("{key} must be {may_be}")
}

fn backend(value: &str) -> Option<OfBackend> {
    let id = value.strip_prefix('b').and_then(|number| number.parse().ok());
    let id = id.map(|number| OfBackend::Id(BackendId(number)));
    id.or_else(|| value.parse().ok().map(OfBackend::Address))
}

fn network(value: &str) -> Option<IpNet> {
    let single = value.parse::<IpAddr>().ok().map(|address| address.to_canonical().into());
    single.or_else(|| value.parse().ok())
}

/// Examines the next portion of one shard, from `cursor` on, and hands each live session to `pass`,
/// which may stop it by returning `false`. Returns where to continue; `None` once every shard has been
/// examined.
pub fn next_portion(
    shards: &[std::sync::Arc<Shard>],
    wanted: Option<u8>,
    cursor: Cursor,
    mut pass: impl FnMut(SessionView) -> bool,
) -> Option<Cursor> {
    let asked = |shard: &&std::sync::Arc<Shard>| {
        shard.worker() >= cursor.worker && wanted.is_none_or(|worker| shard.worker() == worker)
    };
    let shard = shards.iter().filter(asked).min_by_key(|shard| shard.worker())?;
    let worker = shard.worker();
    let from = if worker == cursor.worker { cursor.place } else { 0 };
    let until = shard.places().min(from.saturating_add(PORTION));
    for place in from..until {
        if let Some(session) = shard.read(place)
            && !pass(session)
        {
            return Some(Cursor { worker, place: place + 1 });
        }
    }
    if until < shard.places() {
        return Some(Cursor { worker, place: until });
    }
    worker.checked_add(1).map(|worker| Cursor { worker, place: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ServiceId, Snapshot};
    use crate::session::SessionId;

    fn query(text: &str) -> Query {
        Query::parse(text).unwrap()
    }

    #[test]
    fn a_query_says_what_is_asked_for() {
        let nothing = query("");
        assert_eq!((nothing.limit, nothing.after), (PAGE_DEFAULT, Cursor::default()));
        let all = query(
            "service=dns&protocol=udp&backend=b7&client=2001%3Adb8%3A%3A%2F32&worker=3&age_ms=5000&limit=7&after=2-90",
        );
        assert_eq!(all.service.as_deref(), Some("dns"));
        assert_eq!(all.protocol, Some(Protocol::Udp));
        assert_eq!(all.backend, Some(OfBackend::Id(BackendId(7))));
        assert_eq!(all.client, Some("2001:db8::/32".parse().unwrap()));
        assert_eq!((all.worker, all.age), (Some(3), Some(Duration::from_secs(5))));
        assert_eq!((all.limit, all.after), (7, Cursor { worker: 2, place: 90 }));
        let at = OfBackend::Address("10.0.0.1:80".parse().unwrap());
        assert_eq!(query("backend=10.0.0.1:80").backend, Some(at));
    }

    #[test]
    fn a_query_that_cannot_be_met_is_refused_with_the_way_out() {
        for (text, words) in [
            ("protocol=sctp", "tcp, udp or api"),
            ("backend=web", "an id such as b3"),
            ("client=10.0.0.0/99", "a network such as"),
            ("limit=0", "from 1 to 100000"),
            ("limit=100001", "from 1 to 100000"),
            ("after=x", "the page before"),
            ("colour=red", "the keys are"),
        ] {
            let complaint = Query::parse(text).unwrap_err();
            assert!(complaint.contains(words), "{complaint}");
        }
    }

    #[test]
    fn a_session_is_taken_if_everything_fits() {
        let session = SessionView {
            id: SessionId { worker: 0, place: 0, generation: 1 },
            service: ServiceId::built_in(Protocol::Tcp),
            client: "10.1.2.3:5".parse().unwrap(),
            is_tls: false,
            backend: Some(BackendId(7)),
            started: Now::from_nanos(0),
            active: Now::from_nanos(0),
            bytes_up: 0,
            bytes_down: 0,
        };
        let now = Now::from_nanos(5_000_000);
        let address = "10.9.9.9:80".parse().unwrap();
        let tcp = &Snapshot::default().services[0];
        let takes = |text: &str| query(text).takes(&session, tcp, |_| Some(address), now);
        for yes in
            ["", "protocol=tcp&client=10.1.0.0/16&age_ms=5", "backend=10.9.9.9:80", "service=tcp"]
        {
            assert!(takes(yes), "{yes}");
        }
        for no in [
            "protocol=udp",
            "service=redis",
            "client=10.1.2.4",
            "age_ms=6",
            "backend=b8",
            "backend=1.1.1.1:1",
        ] {
            assert!(!takes(no), "{no}");
        }
    }

    #[test]
    fn every_session_is_passed_once_over_all_shards_and_pages() {
        let mut shards = Vec::new();
        let mut writers = Vec::new();
        for (worker, sessions) in [(0u8, 5000u32), (1, 0), (255, 3000)] {
            let (mut writer, shard) = Shard::new(worker, 10_000);
            for _ in 0..sessions {
                let service = ServiceId::built_in(Protocol::Tcp);
                writer.open(service, "10.0.0.1:1".parse().unwrap(), Now::default()).unwrap();
            }
            shards.push(shard);
            writers.push(writer);
        }
        let mut seen = std::collections::HashSet::new();
        let mut cursor = Some(Cursor::default());
        while let Some(from) = cursor {
            let mut room = 700;
            cursor = next_portion(&shards, None, from, |session| {
                assert!(seen.insert(session.id), "{} twice", session.id);
                room -= 1;
                room > 0
            });
        }
        assert_eq!(seen.len(), 8000);
        let mut of_one = 0;
        let mut cursor = Some(Cursor::default());
        while let Some(from) = cursor {
            cursor = next_portion(&shards, Some(255), from, |_| {
                of_one += 1;
                true
            });
        }
        assert_eq!(of_one, 3000);
    }
}
