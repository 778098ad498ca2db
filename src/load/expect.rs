//! What a run is expected to show, as a person writes it: `p99<2ms`, `errors=0`, `sticky=100%`,
//! `spread<=1`. Owns the little language and its judgement; pure.

use std::fmt;
use std::str::FromStr;

use super::tally::{RequestFailure, Tally};
use super::{Load, Shape, units};
use crate::cluster::Protocol;

/// One expectation.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Expectation {
    measure: Measure,
    relation: Relation,
    /// In the measure's own unit: nanoseconds, percent, or a plain number.
    value: f64,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Measure {
    /// The latency of a share of all requests, 0 to 1.
    Percentile(f64),
    Least,
    Mean,
    /// Faults of all kinds, or of one kind.
    Errors,
    RequestFailure(RequestFailure),
    /// Percent of sessions that stayed on one backend.
    Sticky,
    /// Sessions of the busiest backend minus those of the least busy one.
    Spread,
    /// Requests per second, and in all.
    Rate,
    Requests,
    /// Payload bytes per second, both ways.
    Throughput,
    /// The generator's own lateness at the 99th percentile.
    Lag,
    /// TLS handshakes that were made, and the percentage of them that took up an earlier session.
    Handshakes,
    Resumed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Relation {
    Less,
    AtMost,
    More,
    AtLeast,
    Equal,
    Different,
}

/// How an expectation turned out.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Verdict {
    pub expectation: Expectation,
    /// What the run showed; `None` if it could not show it, which is a failure too.
    pub found: Option<f64>,
    pub met: bool,
}

impl Expectation {
    /// Refuses what this load can never show. The error is for the person who expects it.
    pub fn check(self, load: &Load) -> Result<(), String> {
        let bulk = matches!(load.shape, Shape::Bulk(_));
        let reason = match self.measure {
            Measure::Lag if load.rate.is_none() => "kept by a schedule only: give --rate",
            Measure::Handshakes | Measure::Resumed if load.tls.is_none() => {
                "known under TLS only: give --tls"
            }
            Measure::Sticky if load.protocol == Protocol::Api => {
                "unknown for API: its requests are balanced one by one; expect spread instead"
            }
            Measure::Percentile(_) | Measure::Least | Measure::Mean if bulk => {
                "unknown with --bulk, which makes no requests; expect throughput instead"
            }
            Measure::Rate | Measure::Requests if bulk => {
                "unknown with --bulk, which makes no requests; expect throughput instead"
            }
            _ => return Ok(()),
        };
        Err(format!("`{}` is {reason}", self.measure))
    }

    /// Judges a run by it. `seconds` is the length of the measured window.
    pub fn judge(self, tally: &Tally, seconds: f64) -> Verdict {
        let found = self.measure.of(tally, seconds);
        let met = found.is_some_and(|found| self.relation.holds(found, self.value));
        Verdict { expectation: self, found, met }
    }
}

impl Measure {
    fn of(self, tally: &Tally, seconds: f64) -> Option<f64> {
        let latency = &tally.latency;
        let measured = !latency.is_empty();
        match self {
            Measure::Percentile(share) => measured.then(|| latency.value_at_quantile(share) as f64),
            Measure::Least => measured.then(|| latency.min() as f64),
            Measure::Mean => measured.then(|| latency.mean()),
            Measure::Errors => Some(tally.errors() as f64),
            Measure::RequestFailure(fault) => Some(tally.faults[fault as usize] as f64),
            Measure::Sticky => tally.sticky_percent(),
            Measure::Spread => tally.spread().map(|spread| spread as f64),
            Measure::Rate => Some(tally.requests as f64 / seconds),
            Measure::Requests => Some(tally.requests as f64),
            Measure::Throughput => Some((tally.bytes_sent + tally.bytes_received) as f64 / seconds),
            Measure::Lag => {
                (!tally.lag.is_empty()).then(|| tally.lag.value_at_quantile(0.99) as f64)
            }
            Measure::Handshakes => Some(tally.handshakes.total() as f64),
            Measure::Resumed => tally.handshakes.resumed_percent(),
        }
    }

    fn named(name: &str) -> Option<Measure> {
        if let Some(digits) = name.strip_prefix('p')
            && let Ok(percent) = digits.parse::<f64>()
        {
            return (0.0..=100.0)
                .contains(&percent)
                .then_some(Measure::Percentile(percent / 100.0));
        }
        let fault = || {
            RequestFailure::ALL
                .into_iter()
                .find(|fault| fault.name() == name)
                .map(Measure::RequestFailure)
        };
        Some(match name {
            "min" => Measure::Least,
            "mean" => Measure::Mean,
            "max" => Measure::Percentile(1.0),
            "errors" => Measure::Errors,
            "sticky" => Measure::Sticky,
            "spread" => Measure::Spread,
            "rate" => Measure::Rate,
            "requests" => Measure::Requests,
            "throughput" => Measure::Throughput,
            "lag" => Measure::Lag,
            "handshakes" => Measure::Handshakes,
            "resumed" => Measure::Resumed,
            _ => return fault(),
        })
    }

    /// The factor that a unit stands for, if it fits this measure.
    fn unit(self, unit: &str) -> Option<f64> {
        let time =
            matches!(self, Measure::Percentile(_) | Measure::Least | Measure::Mean | Measure::Lag);
        match (self, unit) {
            (_, "ns") if time => Some(1.0),
            (_, "us" | "µs") if time => Some(1e3),
            (_, "ms") if time => Some(1e6),
            (_, "s") if time => Some(1e9),
            (Measure::Sticky | Measure::Resumed, "%" | "") => Some(1.0),
            (Measure::Throughput, "B/s" | "") => Some(1.0),
            (Measure::Throughput, "MB/s") => Some(1e6),
            (Measure::Throughput, "GB/s") => Some(1e9),
            (Measure::Rate, "/s") => Some(1.0),
            (_, "") if !time => Some(1.0),
            _ => None,
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Measure::Percentile(_) | Measure::Least | Measure::Mean | Measure::Lag => {
                units::time(value)
            }
            Measure::Sticky | Measure::Resumed => units::percent(value),
            Measure::Throughput => units::throughput(value),
            Measure::Rate => units::rate(value),
            _ => format!("{value}"),
        }
    }
}

impl Relation {
    /// Longest first, so that `<=` is not read as `<`.
    const ALL: [(&'static str, Relation); 7] = [
        ("<=", Relation::AtMost),
        (">=", Relation::AtLeast),
        ("!=", Relation::Different),
        ("==", Relation::Equal),
        ("<", Relation::Less),
        (">", Relation::More),
        ("=", Relation::Equal),
    ];

    fn holds(self, found: f64, value: f64) -> bool {
        match self {
            Relation::Less => found < value,
            Relation::AtMost => found <= value,
            Relation::More => found > value,
            Relation::AtLeast => found >= value,
            Relation::Equal => found == value,
            Relation::Different => found != value,
        }
    }

    fn sign(self) -> &'static str {
        match self {
            Relation::Less => "<",
            Relation::AtMost => "<=",
            Relation::More => ">",
            Relation::AtLeast => ">=",
            Relation::Equal => "=",
            Relation::Different => "!=",
        }
    }
}

const MEASURES: &str = "p50, p99, p99.9 and the like, min, mean, max, errors, sticky, spread, rate, \
                        requests, throughput, lag, handshakes, resumed, or a kind of error by its name";

/// Why nobody knows which backend had which session, and what to do about it.
const UNNAMED: &str = "unknown: no reply named its backend; those of `lb bench serve` do";

impl FromStr for Expectation {
    type Err = String;

    fn from_str(text: &str) -> Result<Expectation, String> {
        let text = text.trim();
        let (at, sign, relation) = text
            .char_indices()
            .find_map(|(at, _)| {
                let rest = &text[at..];
                let (sign, relation) =
                    Relation::ALL.into_iter().find(|(sign, _)| rest.starts_with(sign))?;
                Some((at, sign, relation))
            })
            .ok_or_else(|| format!("`{text}` compares nothing; write for example p99<2ms"))?;
        let name = text[..at].trim();
        let measure = Measure::named(name)
            .ok_or_else(|| format!("`{name}` is not measured; there is {MEASURES}"))?;
        let amount = text[at + sign.len()..].trim();
        let digits = amount.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(amount.len());
        let number: f64 = amount[..digits]
            .parse()
            .map_err(|_| format!("`{amount}` in `{text}` does not begin with a number"))?;
        let unit = amount[digits..].trim();
        let factor = measure.unit(unit).ok_or_else(|| {
            format!("`{amount}` is not an amount of `{name}`; times need ns, us, ms or s")
        })?;
        Ok(Expectation { measure, relation, value: number * factor })
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Measure::Percentile(share) if *share == 1.0 => out.write_str("max"),
            // Rounded, because 99.9 has no exact binary form.
            Measure::Percentile(share) => {
                write!(out, "p{}", (share * 100.0 * 1e6).round() / 1e6)
            }
            Measure::Least => out.write_str("min"),
            Measure::Mean => out.write_str("mean"),
            Measure::Errors => out.write_str("errors"),
            Measure::RequestFailure(fault) => out.write_str(fault.name()),
            Measure::Sticky => out.write_str("sticky"),
            Measure::Spread => out.write_str("spread"),
            Measure::Rate => out.write_str("rate"),
            Measure::Requests => out.write_str("requests"),
            Measure::Throughput => out.write_str("throughput"),
            Measure::Lag => out.write_str("lag"),
            Measure::Handshakes => out.write_str("handshakes"),
            Measure::Resumed => out.write_str("resumed"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Expectation { measure, relation, value } = self.expectation;
        let word = if self.met { "met" } else { "NOT MET" };
        write!(out, "{word}: {measure}{}{}, ", relation.sign(), measure.show(value))?;
        match (self.found, measure) {
            (Some(found), _) => write!(out, "found {}", measure.show(found)),
            (None, Measure::Sticky | Measure::Spread) => out.write_str(UNNAMED),
            (None, _) => out.write_str("unknown: nothing was measured"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::load::tally::Home;

    fn tally() -> Tally {
        let mut tally = Tally::new();
        for millis in 1..=100 {
            tally.answered(Duration::from_millis(millis));
        }
        tally.fault(RequestFailure::Lost);
        for backend in [1, 1, 2] {
            Home::default().answered_by(backend, &mut tally);
        }
        tally
    }

    fn judge(text: &str) -> bool {
        text.parse::<Expectation>().unwrap().judge(&tally(), 10.0).met
    }

    #[test]
    fn expectations_are_judged() {
        for (text, met) in [
            ("p50<51ms", true),
            ("p50 < 50ms", false),
            ("p99<=100ms", true),
            ("p99.9>0.09s", true),
            ("max<99000us", false),
            ("min>=0.99ms", true),
            ("mean=50.5ms", false),
            ("errors=0", false),
            ("errors==1", true),
            ("lost=1", true),
            ("moved=0", true),
            ("wrong_client!=0", false),
            ("sticky=100%", true),
            ("spread<=1", true),
            ("spread<1", false),
            ("rate>=10/s", true),
            ("rate>10", false),
            ("requests=100", true),
            ("throughput<1GB/s", true),
        ] {
            assert_eq!(judge(text), met, "{text}");
        }
    }

    #[test]
    fn what_a_run_cannot_show_is_not_met() {
        let empty = Tally::new();
        for text in
            ["p99<1h".replace('h', "s"), "sticky<=100%".into(), "spread>=0".into(), "lag<1s".into()]
        {
            let verdict = text.parse::<Expectation>().unwrap().judge(&empty, 1.0);
            assert_eq!((verdict.found, verdict.met), (None, false), "{text}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        for (text, word) in [
            ("p99", "compares nothing"),
            ("p101<1ms", "not measured"),
            ("speed>3", "not measured"),
            ("p99<fast", "number"),
            ("p99<2", "times need"),
            ("errors<2ms", "not an amount"),
            ("rate>1.2.3", "number"),
        ] {
            let error = text.parse::<Expectation>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_verdict_reads_as_it_was_written() {
        let verdict = "p99.9<2ms".parse::<Expectation>().unwrap().judge(&tally(), 1.0);
        assert_eq!(verdict.to_string(), "NOT MET: p99.9<2 ms, found 100 ms");
        let verdict = "sticky=100%".parse::<Expectation>().unwrap().judge(&tally(), 1.0);
        assert_eq!(verdict.to_string(), "met: sticky=100 %, found 100 %");
        let verdict = "sticky=100%".parse::<Expectation>().unwrap().judge(&Tally::new(), 1.0);
        let told = verdict.to_string();
        assert!(told.starts_with("NOT MET: sticky=100 %, unknown: no reply named its backend"));
    }

    #[test]
    fn what_a_load_cannot_show_is_refused_before_it_runs() {
        use crate::load::message::Kind;
        use crate::load::report::tests::load;
        let closed = load();
        let bulk = Load { shape: Shape::Bulk(Kind::Echo), ..closed.clone() };
        let api = Load { protocol: Protocol::Api, ..closed.clone() };
        for (text, load, word) in [
            ("lag<1ms", &closed, "--rate"),
            ("p99<1ms", &bulk, "throughput"),
            ("requests>0", &bulk, "throughput"),
            ("sticky=100%", &api, "one by one"),
        ] {
            let error = text.parse::<Expectation>().unwrap().check(load).unwrap_err();
            assert!(error.contains(text.split(['<', '=', '>']).next().unwrap()), "{error}");
            assert!(error.contains(word), "{text}: {error}");
        }
        let planned = Load { rate: Some(1), ..closed.clone() };
        for (text, load) in
            [("lag<1ms", &planned), ("p99<1ms", &api), ("sticky=1%", &closed), ("errors=0", &bulk)]
        {
            assert_eq!(text.parse::<Expectation>().unwrap().check(load), Ok(()), "{text}");
        }
    }
}
