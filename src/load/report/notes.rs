//! What a report says in whole sentences beneath its table: what was agreed on, and what the figures mean.
//! Owns these words.

use super::Report;

impl Report {
    /// That HTTP/2 was spoken, and how many requests were in flight on a connection.
    pub fn http2_note(&self) -> Option<String> {
        let streams = self.streams?;
        let many = if streams == 1 { "1 stream" } else { &format!("{streams} streams") };
        let mut note =
            format!("Spoken was HTTP/2, with at most {many} at a time on each connection.");
        if let Some(permitted) = self.streams_permitted.filter(|permitted| *permitted < streams) {
            note += &format!(" The server permitted {permitted}.");
        }
        Some(note)
    }

    /// What was agreed on under TLS.
    pub fn tls_note(&self) -> Option<String> {
        let agreed = self.tls.as_ref()?.agreed.as_ref()?;
        Some(format!("Agreed with the server: {agreed}."))
    }

    /// What the figures of a closed loop mean: each connection asks again as soon as it is answered,
    /// so that the service never rests.
    pub fn loop_note(&self) -> Option<String> {
        (self.rate_planned.is_none() && !self.is_bulk()).then(|| {
            let half = (self.requests_per_second / 2.0).round().max(1.0);
            format!(
                "Measured at saturation: without a rate, every connection asks again as soon as it \
                 is answered. For latencies at a load of your choice, add --rate, such as \
                 --rate {half:.0}."
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn how_many_streams_there_were_is_told_and_what_the_server_permitted_of_them() {
        let http1 = report("", 1);
        assert_eq!(http1.http2_note(), None);
        for (streams, permitted, note) in [
            (
                1,
                Some(100),
                "Spoken was HTTP/2, with at most 1 stream at a time on each connection.",
            ),
            (
                8,
                Some(5),
                "Spoken was HTTP/2, with at most 8 streams at a time on each connection. The server \
                 permitted 5.",
            ),
            (8, None, "Spoken was HTTP/2, with at most 8 streams at a time on each connection."),
        ] {
            let streams = Some(streams);
            let report = Report { streams, streams_permitted: permitted, ..http1.clone() };
            assert_eq!(report.http2_note().as_deref(), Some(note));
        }
    }

    #[test]
    fn only_a_closed_loop_is_said_to_measure_saturation() {
        let closed = report("", 1);
        let note = closed.loop_note().unwrap();
        assert!(
            note.starts_with("Measured at saturation") && note.ends_with("--rate 250."),
            "{note}"
        );
        let planned = Report { rate_planned: Some(1), ..closed.clone() };
        let bulk = Report { shape: "bulk down".to_owned(), ..closed };
        assert_eq!((planned.loop_note(), bulk.loop_note()), (None, None));
    }
}
