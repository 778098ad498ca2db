//! One look at a member of etcd, for `lb check`: its version, how long a read takes, and what it complains of.

use serde::Deserialize;
use tokio::time::{Duration, timeout};

use super::{Access, wire};
use crate::base::time::Now;
use crate::cluster::share::event::{Command, Event};

/// How long a member may take to answer all.
const WITHIN: Duration = Duration::from_secs(3);

/// What a member says.
pub struct Seen {
    pub version: String,
    pub database_bytes: u64,
    /// How long a read took that a leader has confirmed.
    pub took: Duration,
    /// What it complains of, such as `NOSPACE`.
    pub alarms: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    version: String,
    #[serde(rename = "dbSize")]
    size: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Alarms {
    alarms: Vec<Alarm>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Alarm {
    alarm: String,
}

/// Looks at the member that is tried at this attempt.
///
/// # Errors
/// Why that is not possible.
pub async fn look(access: &Access, attempt: usize, prefix: &str) -> Result<Seen, String> {
    let late = |_| format!("no answer within {} s", WITHIN.as_secs());
    timeout(WITHIN, ask(access, attempt, prefix)).await.map_err(late)?
}

async fn ask(access: &Access, attempt: usize, prefix: &str) -> Result<Seen, String> {
    let mut gateway = access.connect(attempt).await?;
    let (_, body) = gateway.ask(("/v3/maintenance/status", "{}".to_owned())).await?;
    let status: Status = serde_json::from_slice(&body).map_err(|_| wire::told(&body))?;
    let alarm = r#"{"action":"GET"}"#.to_owned();
    let (_, body) = gateway.ask(("/v3/maintenance/alarm", alarm)).await?;
    let alarms: Alarms = serde_json::from_slice(&body).map_err(|_| wire::told(&body))?;
    let begun = Now::read();
    let request = wire::request(&Command::Audit, prefix, 0).expect("it asks for something");
    let (code, body) = gateway.ask(request).await?;
    match wire::answer(&Command::Audit, code, &body) {
        Event::Audited { .. } => Ok(Seen {
            version: status.version,
            database_bytes: status.size.parse().unwrap_or(0),
            took: Now::read().since(begun),
            alarms: alarms.alarms.into_iter().map(|it| it.alarm).collect(),
        }),
        Event::Refused { said, .. } | Event::Lost { said } => Err(said),
        _ => Err("its answer is none of etcd's".to_owned()),
    }
}
