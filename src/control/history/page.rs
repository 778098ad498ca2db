//! What `/history` and `/history/services` answer: the schema, the query, and how the samples are written. Owns the
//! names and units of every field; fields may be added, as to `status`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::marks::{Mark, What};
use super::{History, STEP, STEPS, Sample};
use crate::base::time::Now;
use crate::cluster::Protocol;
use crate::control::status::SCHEMA;

/// `GET /history`: the last 15 minutes of the whole and of each protocol, or of one service.
///
/// The query narrows it: `service` (a name) and `last` (the number of steps, 1 to [`STEPS`], by default all).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HistoryPage {
    pub schema: u32,
    /// How long a step lasts.
    pub step_ms: u64,
    /// When the last step ended, in milliseconds since 1970.
    pub ended_unix_ms: u64,
    /// How long each step took, the oldest first. `null`: a gap, in which nobody looked. A step after a gap takes
    /// longer, and what was counted in both is told as its own.
    pub took_ms: Vec<Option<u32>>,
    /// The service that was asked for; its series are in `whole`.
    pub service: Option<String>,
    pub whole: Series,
    /// By protocol; none if a service was asked for.
    pub protocols: BTreeMap<Protocol, Series>,
    /// What changed, the oldest first; of a service, what concerns it.
    pub marks: Vec<MarkShown>,
    pub services: Kept,
}

/// Something that changed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MarkShown {
    /// In milliseconds since 1970.
    pub unix_ms: u64,
    pub what: What,
    /// `null`: the balancer as a whole.
    pub service: Option<String>,
    /// The first backend that it happened to,
    pub backend: Option<String>,
    /// and how often it happened in that service in the five seconds from then on.
    pub count: u32,
}

impl MarkShown {
    fn of(mark: &Mark) -> MarkShown {
        MarkShown {
            unix_ms: mark.at.unix_ms(),
            what: mark.what,
            service: mark.service.as_deref().map(str::to_owned),
            backend: mark.backend.map(|id| id.to_string()),
            count: mark.count,
        }
    }
}

/// `GET /history/services`: chosen series of many services.
///
/// The query narrows it: `service` (a name; may be given up to [`NAMES_MAX`] times; by default each service that
/// has something to show), `last` (by default 12 steps, a minute) and `fields` (names of series, separated by
/// commas; by default `new,requests`).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ManyHistories {
    pub schema: u32,
    pub step_ms: u64,
    pub ended_unix_ms: u64,
    pub took_ms: Vec<Option<u32>>,
    pub services: Vec<ServiceHistory>,
    pub kept: Kept,
}

/// One service in a [`ManyHistories`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServiceHistory {
    pub name: String,
    pub protocol: Protocol,
    #[serde(flatten)]
    pub series: Series,
}

/// How many services have a series.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Kept {
    /// Those that have had anything to show within the 15 minutes.
    pub kept: usize,
    /// Those that had in the last step, and found no room.
    pub left_out: usize,
}

/// A series of one value for each step, the oldest first.
pub type Values = Vec<Option<u64>>;

/// The series of one thing. Counts are of one step, and `null` where nothing is known; a series that does not apply
/// is left out.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Series {
    /// Sessions running at the end of the step; for an API service, requests under way and tunnels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sessions: Option<Values>,
    /// Users that were given a backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<Values>,
    /// Requests of API users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Values>,
    /// Those of them that failed: answered with 5xx, or cut short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errors: Option<Values>,
    /// Users turned away, requests that a limit kept out, and datagrams without a session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Values>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_up: Option<Values>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_down: Option<Values>,
    /// From a user's arrival, or a request's, until the first byte came back: the upper bound of the bucket that the
    /// median falls into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p50_us: Option<Values>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p99_us: Option<Values>,
}

/// What a series consists of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Field {
    Sessions,
    New,
    Requests,
    Errors,
    Refused,
    BytesUp,
    BytesDown,
    P50,
    P99,
}

impl Field {
    pub const ALL: [Field; 9] = [
        Field::Sessions,
        Field::New,
        Field::Requests,
        Field::Errors,
        Field::Refused,
        Field::BytesUp,
        Field::BytesDown,
        Field::P50,
        Field::P99,
    ];

    /// As in the answer.
    pub const fn name(self) -> &'static str {
        match self {
            Field::Sessions => "sessions",
            Field::New => "new",
            Field::Requests => "requests",
            Field::Errors => "errors",
            Field::Refused => "refused",
            Field::BytesUp => "bytes_up",
            Field::BytesDown => "bytes_down",
            Field::P50 => "p50_us",
            Field::P99 => "p99_us",
        }
    }

    /// Whether this means anything for the services of a protocol, or for the whole.
    fn applies(self, to: Option<Protocol>) -> bool {
        match self {
            // Who comes to an API door is no service's before the first request.
            Field::New => to != Some(Protocol::Api),
            Field::Requests | Field::Errors => to.is_none_or(|it| it == Protocol::Api),
            _ => true,
        }
    }

    fn of(self, sample: &Sample) -> Option<u64> {
        match self {
            Field::Sessions => Some(sample.sessions.into()),
            Field::New => Some(sample.new.into()),
            Field::Requests => Some(sample.requests.into()),
            Field::Errors => Some(sample.errors.into()),
            Field::Refused => Some(sample.refused.into()),
            Field::BytesUp => Some(sample.bytes_up),
            Field::BytesDown => Some(sample.bytes_down),
            Field::P50 => sample.p50_us(),
            Field::P99 => sample.p99_us(),
        }
    }
}

impl Series {
    fn of(samples: &[Option<&Sample>], protocol: Option<Protocol>, fields: &[Field]) -> Series {
        let mut series = Series::default();
        for field in fields.iter().filter(|field| field.applies(protocol)) {
            let values = samples.iter().map(|sample| sample.and_then(|it| field.of(it)));
            *series.get_mut(*field) = Some(values.collect());
        }
        series
    }

    fn get_mut(&mut self, field: Field) -> &mut Option<Values> {
        match field {
            Field::Sessions => &mut self.sessions,
            Field::New => &mut self.new,
            Field::Requests => &mut self.requests,
            Field::Errors => &mut self.errors,
            Field::Refused => &mut self.refused,
            Field::BytesUp => &mut self.bytes_up,
            Field::BytesDown => &mut self.bytes_down,
            Field::P50 => &mut self.p50_us,
            Field::P99 => &mut self.p99_us,
        }
    }
}

/// Most names in one query.
pub const NAMES_MAX: usize = 256;
/// Steps of many services, unless the query says otherwise.
const LAST_DEFAULT: usize = super::MINUTE;

/// A query for either.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Query {
    pub services: Vec<String>,
    last: Option<usize>,
    fields: Option<Vec<Field>>,
}

impl Query {
    /// Reads a query string.
    ///
    /// # Errors
    /// A sentence that names the key and the values it takes.
    pub fn parse(query: &str) -> Result<Query, String> {
        let mut asked = Query { services: Vec::new(), last: None, fields: None };
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            asked.set(&key, &value)?;
        }
        Ok(asked)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "service" if self.services.len() < NAMES_MAX => self.services.push(value.to_owned()),
            "service" => return Err(format!("service may be given {NAMES_MAX} times")),
            "last" => {
                let last = value.parse().ok().filter(|last| (1..=STEPS).contains(last));
                let complaint = || format!("last is a number of steps, 1 to {STEPS}");
                self.last = Some(last.ok_or_else(complaint)?);
            }
            "fields" => {
                let field = |name| Field::ALL.into_iter().find(|known| known.name() == name);
                let fields: Option<Vec<Field>> = value.split(',').map(field).collect();
                let names = || Field::ALL.map(Field::name).join(", ");
                let complaint = || format!("fields are names, separated by commas: {}", names());
                self.fields = Some(fields.ok_or_else(complaint)?);
            }
            _ => return Err("the keys are service, last and fields".to_owned()),
        }
        Ok(())
    }
}

/// A service that may be asked for.
pub type Known = (Arc<str>, Protocol);

/// The answer to `/history`, for this service or for the whole.
pub fn page(history: &History, query: &Query, service: Option<&Known>, now: Now) -> HistoryPage {
    let last = query.last.unwrap_or(STEPS);
    let fields = query.fields.as_deref().unwrap_or(&Field::ALL);
    let protocols = Protocol::ALL.into_iter().filter(|_| service.is_none()).map(|protocol| {
        let samples = history.protocol(protocol, last);
        (protocol, Series::of(&samples, Some(protocol), fields))
    });
    let whole = match service {
        None => Series::of(&history.whole(last), None, fields),
        Some((name, protocol)) => {
            // One that was added within the running step has yet to be looked at.
            let samples = history.service(name, *protocol, last);
            let samples = samples.unwrap_or_else(|| vec![None; history.spans(last).count()]);
            Series::of(&samples, Some(*protocol), fields)
        }
    };
    HistoryPage {
        schema: SCHEMA,
        step_ms: step_ms(),
        ended_unix_ms: history.ended().unix_ms(),
        took_ms: history.spans(last).collect(),
        service: service.map(|(name, _)| name.to_string()),
        whole,
        protocols: protocols.collect(),
        marks: history.marks.recent(now, service.map(|it| &*it.0)).map(MarkShown::of).collect(),
        services: kept(history),
    }
}

/// The answer to `/history/services`, for these services or for all that have something to show.
pub fn many(history: &History, query: &Query, services: &[Known]) -> ManyHistories {
    let last = query.last.unwrap_or(LAST_DEFAULT);
    let fields = query.fields.as_deref().unwrap_or(&[Field::New, Field::Requests]);
    let all: Vec<Known> = match services {
        [] => history.with_series().cloned().collect(),
        named => named.to_vec(),
    };
    let shown = |(name, protocol): &Known| {
        let samples = history.service(name, *protocol, last)?;
        let series = Series::of(&samples, Some(*protocol), fields);
        Some(ServiceHistory { name: name.to_string(), protocol: *protocol, series })
    };
    ManyHistories {
        schema: SCHEMA,
        step_ms: step_ms(),
        ended_unix_ms: history.ended().unix_ms(),
        took_ms: history.spans(last).collect(),
        services: all.iter().filter_map(shown).collect(),
        kept: kept(history),
    }
}

fn kept(history: &History) -> Kept {
    Kept { kept: history.kept(), left_out: history.left_out() }
}

fn step_ms() -> u64 {
    STEP.as_millis() as u64
}
