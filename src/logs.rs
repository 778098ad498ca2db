//! The log: lines of text for people, JSON objects for machines, on standard output. Owns the one
//! thread that writes. Whoever logs only puts a line into a bounded queue: when standard output is
//! slower than the lines come, lines are dropped and counted, and nobody waits.
//!
//! Where standard output is systemd's journal, each line begins with its priority as sd-daemon(3) has
//! it, which the journal takes off and `journalctl -p` goes by; and text has no time, since the journal
//! writes one before it.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use tracing::{Event, Level, Subscriber};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use crate::base::thread;
use crate::config::{Log, LogFormat};

/// Lines that may wait for standard output.
const LINES_MAX: usize = 8192;

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();
static LEVELS: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// The running log. Dropping it writes what waits, for a second at most.
pub struct Logs {
    _writer: WorkerGuard,
}

/// Starts the log of this process; the first call counts.
pub fn start(log: &Log) -> Logs {
    let (lines, writer) = queue(io::stdout());
    let _ = DROPPED.set(lines.error_counter());
    let reader = match io::stdout() {
        out if is_journal(&out) => Reader::Journal,
        out if out.is_terminal() && std::env::var_os("NO_COLOR").is_none() => Reader::Terminal,
        _ => Reader::Other,
    };
    let (levels, handle) = reload::Layer::new(levels(log.level));
    let _ = LEVELS.set(handle);
    let _ = subscriber(log.format, levels, lines, reader).try_init();
    Logs { _writer: writer }
}

/// A sentence that ends the program, as it is written to standard error: for the journal an error.
pub fn last_words(said: &str) -> String {
    let priority = if is_journal(&io::stderr()) { priority(Level::ERROR) } else { "" };
    format!("{priority}lb: {said}\n")
}

/// Lines lost since the start because standard output was slower than they came.
pub fn dropped() -> u64 {
    DROPPED.get().map_or(0, |lines| lines.dropped_lines() as u64)
}

/// Writes lines of this level and the more important ones from now on.
pub fn set_level(level: Level) {
    if let Some(handle) = LEVELS.get() {
        // Fails only when there is no log any more.
        let _ = handle.reload(levels(level));
    }
}

fn queue(out: impl Write + Send + 'static) -> (NonBlocking, WorkerGuard) {
    thread::without_signals(|| {
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LINES_MAX).finish(out)
    })
}

/// This program's lines at the level asked for; those of its libraries only when something is wrong.
fn levels(level: Level) -> Targets {
    Targets::new().with_target("lb", level).with_default(level.min(Level::WARN))
}

/// Who reads what is written.
#[derive(Clone, Copy, PartialEq)]
enum Reader {
    Terminal,
    Journal,
    Other,
}

/// Whether a stream leads to the journal: systemd names the stream that it made in `JOURNAL_STREAM`, and
/// somebody may have redirected it since (systemd.exec(5)).
fn is_journal(stream: &impl AsFd) -> bool {
    let Ok(named) = std::env::var("JOURNAL_STREAM") else { return false };
    let about = stream.as_fd().try_clone_to_owned().and_then(|copy| File::from(copy).metadata());
    about.is_ok_and(|about| named == format!("{}:{}", about.dev(), about.ino()))
}

/// What sd-daemon(3) has before a line of this level.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

/// Writes the priority before what another format writes, where the journal reads it.
struct Prioritised<F> {
    format: F,
    reader: Reader,
}

impl<S, N, F> FormatEvent<S, N> for Prioritised<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        if self.reader == Reader::Journal {
            writer.write_str(priority(*event.metadata().level()))?;
        }
        self.format.format_event(context, writer, event)
    }
}

fn subscriber(
    format: LogFormat,
    levels: reload::Layer<Targets, Registry>,
    lines: NonBlocking,
    reader: Reader,
) -> impl Subscriber + Send + Sync {
    let layer = fmt::layer().with_writer(lines);
    let text = layer.with_target(false).with_ansi(reader == Reader::Terminal);
    let layer = match (format, reader) {
        (LogFormat::Text, Reader::Journal) => {
            text.without_time().map_event_format(|format| Prioritised { format, reader }).boxed()
        }
        (LogFormat::Text, _) => text.boxed(),
        (LogFormat::Json, _) => text
            .with_target(true)
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .map_event_format(|format| Prioritised { format, reader })
            .boxed(),
    };
    tracing_subscriber::registry().with(layer.with_filter(levels))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(log: &Log, reader: Reader) -> String {
        let page = Page::default();
        let (lines, writer) = queue(page.clone());
        let (levels, _) = reload::Layer::new(levels(log.level));
        let subscriber = subscriber(log.format, levels, lines, reader);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "lb::control", port = 9991, "server connected");
            tracing::debug!(target: "lb::control", "too small a thing");
            tracing::info!(target: "hyper", "a library's own affair");
            tracing::warn!(target: "hyper", "a library's trouble");
        });
        drop(writer);
        let bytes = page.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn json() -> Log {
        Log { level: Level::INFO, format: LogFormat::Json, ..Log::default() }
    }

    #[test]
    fn text_is_one_plain_line_with_its_time() {
        let text = written(&Log::default(), Reader::Other);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with("20") && lines[0].contains("Z  INFO "), "{text}");
        assert!(lines[0].ends_with("server connected port=9991"), "{text}");
        assert!(lines[1].contains("a library's trouble"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn json_is_one_object_a_line() {
        let text = written(&json(), Reader::Other);
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["message"], "server connected");
        assert_eq!(first["port"], 9991);
        assert_eq!(first["level"], "INFO");
        assert!(first["timestamp"].as_str().unwrap().starts_with("20"));
    }

    #[test]
    fn the_journal_gets_priorities_and_keeps_the_time_itself() {
        let text = written(&Log::default(), Reader::Journal);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "<6> INFO server connected port=9991");
        assert_eq!(lines[1], "<4> WARN a library's trouble");
        let text = written(&json(), Reader::Journal);
        let first = text.lines().next().unwrap().strip_prefix("<6>").expect(&text);
        let first: serde_json::Value = serde_json::from_str(first).unwrap();
        assert_eq!(first["message"], "server connected");
    }

    #[test]
    fn a_changed_level_holds_for_the_next_line() {
        let page = Page::default();
        let (lines, writer) = queue(page.clone());
        let (filter, handle) = reload::Layer::new(levels(Level::WARN));
        let subscriber = subscriber(LogFormat::Text, filter, lines, Reader::Other);
        tracing::subscriber::with_default(subscriber, || {
            let say = |word: &str| tracing::info!(target: "lb::control", "{word}");
            say("before");
            handle.reload(levels(Level::INFO)).unwrap();
            say("after");
        });
        drop(writer);
        let text = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
        assert!(text.contains("after") && !text.contains("before"), "{text}");
    }

    /// Standard output with a pager that nobody scrolls.
    struct Stuck(mpsc::Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_reader_costs_lines_and_never_holds_anyone_up() {
        let (release, stuck) = mpsc::channel();
        let (lines, writer) = queue(Stuck(stuck));
        let dropped = lines.error_counter();
        let (levels, _) = reload::Layer::new(levels(Level::INFO));
        let subscriber = subscriber(LogFormat::Text, levels, lines, Reader::Other);
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..LINES_MAX + 1000 {
                tracing::info!(target: "lb", "another line");
            }
        });
        let lost = dropped.dropped_lines();
        assert!((900..=1000).contains(&lost), "{lost} lines were dropped");
        drop(release);
        drop(writer);
    }
}
