//! What a worker says about API requests: counters for all, and log lines for as many a second as the
//! operator wants to read. Owns that limit, which no single user can use up, and the worker's end of the
//! queue of lines; never waits.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::base::quota::{Quota, Rate};
use crate::http::trace::ID_BYTES_MAX;
use crate::metrics::WorkerMetrics;
use crate::proxy::http::{HOST_KEPT_MAX, Journal, Record};
use crate::worker::link::{LINE_BYTES_MAX, RequestLine};

/// Each user is sure of this part of the lines; the rest goes first to users who have had none.
const SHARE: u32 = 10;

/// The journal of one worker's gateways.
pub struct Requests {
    metrics: Arc<WorkerMetrics>,
    lines: rtrb::Producer<RequestLine>,
    /// Of lines; `None` when none are wanted.
    quota: Option<Quota>,
}

impl Requests {
    pub fn new(
        metrics: Arc<WorkerMetrics>,
        lines: rtrb::Producer<RequestLine>,
        each_second: u32,
    ) -> Requests {
        Requests::with_seed(metrics, lines, each_second, RandomState::new().hash_one(0))
    }

    fn with_seed(
        metrics: Arc<WorkerMetrics>,
        lines: rtrb::Producer<RequestLine>,
        each_second: u32,
        seed: u64,
    ) -> Requests {
        let share = Rate::new(each_second.div_ceil(SHARE), each_second.div_ceil(SHARE));
        let quota = || Quota::lending(Rate::new(each_second, each_second), share, seed);
        Requests { metrics, lines, quota: (each_second > 0).then(quota) }
    }

    fn count(&self, record: &Record<'_>) {
        let counters = &self.metrics.counters;
        counters.api_requests.one();
        match record.status {
            _ if !record.own => {}
            // The balancer says it of nothing else.
            404 => {
                counters.api_refused.one();
                counters.api_unclaimed.one();
            }
            // Nor this.
            421 => {
                counters.api_refused.one();
                counters.api_misdirected.one();
            }
            400..=499 => counters.api_refused.one(),
            500.. => counters.api_failed.one(),
            _ => {}
        }
        if record.fault.is_some() && !record.own {
            counters.api_cut_short.one();
        }
        if record.reused {
            counters.api_upstream_reused.one();
        }
        if record.has_failed() {
            counters.api_errors.one();
        }
        if let Some(took) = record.waited() {
            self.metrics.first_byte_time.record(took);
        }
    }
}

impl Journal for Requests {
    fn record(&mut self, record: &Record<'_>) {
        self.count(record);
        let Some(quota) = &mut self.quota else { return };
        let may = quota.allows(record.client.ip(), record.times.ended);
        let written = may && self.lines.push(line(record)).is_ok();
        if !written {
            self.metrics.counters.api_requests_unlogged.one();
        }
    }
}

fn line(record: &Record<'_>) -> RequestLine {
    let mut text = [0; HOST_KEPT_MAX + ID_BYTES_MAX + LINE_BYTES_MAX];
    let mut end = 0;
    let parts =
        [(record.host, HOST_KEPT_MAX), (record.id, ID_BYTES_MAX), (record.line, LINE_BYTES_MAX)];
    let ends = parts.map(|(part, most)| {
        let part = &part[..part.len().min(most)];
        text[end..end + part.len()].copy_from_slice(part);
        end += part.len();
        end as u16
    });
    RequestLine {
        session: record.session,
        number: record.number,
        client: record.client,
        is_tls: record.is_tls,
        is_http2: record.is_http2,
        service: record.service,
        asked: record.asked,
        backend: record.backend,
        text,
        ends,
        trace: record.trace,
        status: record.status,
        retries: record.retries,
        bytes_up: record.bytes_up,
        bytes_down: record.bytes_down,
        times: record.times,
        fault: record.fault,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::time::Now;
    use crate::proxy::http::Times;
    use crate::session::SessionId;

    fn record(status: u16, own: bool, ended: Now) -> Record<'static> {
        Record {
            session: SessionId { worker: 0, place: 0, generation: 0 },
            client: "192.0.2.1:5".parse().unwrap(),
            is_tls: false,
            is_http2: false,
            number: 1,
            service: None,
            asked: None,
            host: b"shop.example",
            id: b"x-1",
            trace: 7,
            line: b"GET /a",
            status,
            own,
            reused: !own,
            backend: None,
            retries: 0,
            bytes_up: 0,
            bytes_down: 0,
            times: Times { ended, ..Times::default() },
            fault: (status >= 400 || status == 0).then_some("a fault"),
        }
    }

    #[test]
    fn every_request_is_counted_and_some_are_written() {
        let (lines, mut heard) = rtrb::RingBuffer::new(3);
        let metrics = Arc::<WorkerMetrics>::default();
        let mut requests = Requests::new(Arc::clone(&metrics), lines, 4);
        let second = |second: u64| Now::from_nanos(second * 1_000_000_000);
        let given =
            [(200, false, 1), (404, true, 1), (503, true, 1), (421, true, 2), (0, false, 2)];
        for (status, own, at) in given {
            requests.record(&record(status, own, second(at)));
        }
        let counters = &metrics.counters;
        assert_eq!(counters.api_requests.get(), 5);
        assert_eq!((counters.api_refused.get(), counters.api_failed.get()), (2, 1));
        assert_eq!((counters.api_unclaimed.get(), counters.api_misdirected.get()), (1, 1));
        assert_eq!((counters.api_cut_short.get(), counters.api_upstream_reused.get()), (1, 2));
        // One beyond the half that one user may have at once, one beyond the queue.
        assert_eq!(counters.api_requests_unlogged.get(), 2);
        let first = heard.pop().unwrap();
        assert_eq!((first.request(), first.status), (("GET", "/a"), 200));
        assert_eq!((first.host(), first.id(), first.trace), ("shop.example", "x-1", 7));
    }

    #[test]
    fn a_user_alone_has_all_the_lines_and_none_that_another_needs() {
        let (lines, mut heard) = rtrb::RingBuffer::new(1000);
        let mut requests = Requests::with_seed(Arc::default(), lines, 100, 7);
        let mut written = |clients: &[&str], second: u64| {
            for tenth in 0..10 {
                let ended = Now::from_nanos(second * 1_000_000_000 + tenth * 100_000_000);
                for client in clients.iter().cycle().take(1000) {
                    let client = client.parse().unwrap();
                    requests.record(&Record { client, ..record(200, false, ended) });
                }
            }
            let mut by = std::collections::BTreeMap::<String, usize>::new();
            while let Ok(line) = heard.pop() {
                *by.entry(line.client.to_string()).or_default() += 1;
            }
            by.into_values().collect::<Vec<_>>()
        };
        assert_eq!(written(&["192.0.2.1:5"], 1), [50 + 90]);
        assert_eq!(written(&["192.0.2.1:5"], 2), [100], "as many a second as are read");
        let flood = ["192.0.2.1:5"; 99];
        let both = written(&[&flood[..], &["192.0.2.2:5"]].concat(), 3);
        assert!(both[1] >= 18, "{both:?}: the other has its share in full");
    }

    #[test]
    fn a_limit_of_nothing_writes_and_misses_nothing() {
        let (lines, mut heard) = rtrb::RingBuffer::new(3);
        let metrics = Arc::<WorkerMetrics>::default();
        let mut requests = Requests::new(Arc::clone(&metrics), lines, 0);
        requests.record(&record(200, false, Now::from_nanos(1)));
        assert!(heard.pop().is_err());
        assert_eq!(metrics.counters.api_requests_unlogged.get(), 0);
    }
}
