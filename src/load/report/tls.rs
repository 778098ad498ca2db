//! The part of a report that is about TLS handshakes. Owns its names in the JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Encoded, Latency, per_second};
use crate::load::handshakes::{Handshakes, Reason};

/// What became of the handshakes of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tls {
    /// Version, cipher and group of the first; `null` if there was none.
    pub agreed: Option<String>,
    /// How many were made, and how many of them took up an earlier session. Of short connections, those within
    /// the measured window; of standing ones, all from the start.
    pub handshakes: u64,
    pub full: u64,
    pub resumed: u64,
    /// Within the measured window.
    pub handshakes_per_second: f64,
    /// From the ClientHello to the end.
    pub latency_us: Option<Latency>,
    pub failed: u64,
    /// By reason, over the whole run; reasons that did not occur are omitted.
    pub failures: BTreeMap<String, u64>,
    pub histogram: Encoded,
}

impl Tls {
    pub(super) fn new(handshakes: &Handshakes, seconds: f64) -> Tls {
        let failures = Reason::ALL
            .into_iter()
            .map(|reason| (reason.name().to_owned(), handshakes.failures[reason as usize]))
            .filter(|(_, count)| *count > 0);
        Tls {
            agreed: handshakes.agreed.clone(),
            handshakes: handshakes.total(),
            full: handshakes.full,
            resumed: handshakes.resumed,
            handshakes_per_second: per_second(handshakes.measured as f64, seconds),
            latency_us: Latency::of(&handshakes.latency),
            failed: handshakes.failures.iter().sum(),
            failures: failures.collect(),
            histogram: Encoded::of(&handshakes.latency),
        }
    }

    /// How many, for people.
    pub(super) fn counts(&self) -> String {
        match self.resumed {
            0 => format!("{}", self.handshakes),
            resumed => format!("{} ({resumed} resumed)", self.handshakes),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_json_has_the_names_that_scripts_rely_on() {
        let mut handshakes = Handshakes::default();
        handshakes.made(Duration::from_micros(300), false);
        handshakes.made(Duration::from_micros(100), true);
        handshakes.measured = 2;
        handshakes.agreed = Some("TLS 1.3, AES_128_GCM, X25519".to_owned());
        handshakes.failed(Reason::Certificate, String::new);
        let tls = Tls::new(&handshakes, 0.5);
        assert_eq!(tls.counts(), "2 (1 resumed)");
        let json = serde_json::to_value(tls).unwrap();
        assert_eq!(json["agreed"], "TLS 1.3, AES_128_GCM, X25519");
        assert_eq!(
            (&json["handshakes"], &json["full"], &json["resumed"]),
            (&2.into(), &1.into(), &1.into())
        );
        assert_eq!(json["handshakes_per_second"], 4.0);
        assert!((json["latency_us"]["min"].as_f64().unwrap() - 100.0).abs() < 1.0);
        assert_eq!((&json["failed"], &json["failures"]["certificate"]), (&1.into(), &1.into()));
        assert_eq!(json["histogram"]["unit"], "ns");
    }
}
