//! What a worker says about API requests: counters for all of them, and a line for as many a second as
//! the operator wants to read. Owns that limit and the worker's end of the lines' queue; never waits.

use std::sync::Arc;
use std::time::Duration;

use super::link::{LINE_BYTES_MAX, RequestLine};
use crate::base::time::Now;
use crate::metrics::WorkerMetrics;
use crate::proxy::http::{Journal, Record};

/// The journal of one worker's gateways.
pub struct Requests {
    metrics: Arc<WorkerMetrics>,
    lines: rtrb::Producer<RequestLine>,
    /// Lines in a second, at most.
    each_second: u32,
    second: Now,
    written: u32,
}

impl Requests {
    pub fn new(
        metrics: Arc<WorkerMetrics>,
        lines: rtrb::Producer<RequestLine>,
        each_second: u32,
    ) -> Requests {
        Requests { metrics, lines, each_second, second: Now::default(), written: 0 }
    }

    fn count(&self, record: &Record<'_>) {
        let counters = &self.metrics.counters;
        counters.api_requests.one();
        match record.status {
            _ if !record.own => {}
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
        if let Some(answered) = record.times.answered.filter(|_| !record.own) {
            self.metrics.first_byte_time.record(answered.since(record.times.began));
        }
    }

    fn may_write(&mut self, now: Now) -> bool {
        if now.since(self.second) >= Duration::from_secs(1) {
            (self.second, self.written) = (now, 0);
        }
        self.written = self.written.saturating_add(1);
        self.written <= self.each_second
    }
}

impl Journal for Requests {
    fn record(&mut self, record: &Record<'_>) {
        self.count(record);
        if self.each_second == 0 {
            return;
        }
        let written = self.may_write(record.times.ended) && self.lines.push(line(record)).is_ok();
        if !written {
            self.metrics.counters.api_requests_unlogged.one();
        }
    }
}

fn line(record: &Record<'_>) -> RequestLine {
    let mut text = [0; LINE_BYTES_MAX];
    let kept = record.line.len().min(LINE_BYTES_MAX);
    text[..kept].copy_from_slice(&record.line[..kept]);
    RequestLine {
        session: record.session,
        number: record.number,
        client: record.client,
        backend: record.backend,
        text,
        kept: kept as u16,
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
    use crate::proxy::http::Times;
    use crate::session::SessionId;

    fn record(status: u16, own: bool, ended: Now) -> Record<'static> {
        Record {
            session: SessionId { worker: 0, place: 0, generation: 0 },
            client: "192.0.2.1:5".parse().unwrap(),
            number: 1,
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
        let mut requests = Requests::new(Arc::clone(&metrics), lines, 2);
        let second = |second: u64| Now::from_nanos(second * 1_000_000_000);
        let given =
            [(200, false, 1), (404, true, 1), (503, true, 1), (200, false, 2), (0, false, 2)];
        for (status, own, at) in given {
            requests.record(&record(status, own, second(at)));
        }
        let counters = &metrics.counters;
        assert_eq!(counters.api_requests.get(), 5);
        assert_eq!((counters.api_refused.get(), counters.api_failed.get()), (1, 1));
        assert_eq!((counters.api_cut_short.get(), counters.api_upstream_reused.get()), (1, 3));
        // One beyond the two of the first second, one beyond the queue.
        assert_eq!(counters.api_requests_unlogged.get(), 2);
        let first = heard.pop().unwrap();
        assert_eq!((first.request(), first.status), (("GET", "/a"), 200));
    }
}
