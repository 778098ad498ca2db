//! The log: lines of text for people, JSON objects for machines, on standard output. Owns the one
//! thread that writes. Logging a line only puts it into a bounded queue: if standard output is
//! slower than the lines come, lines are dropped and counted, and nobody waits. Part of the queue
//! is reserved for lines that peers cannot cause, so that a flood of the others pushes none of them
//! out.
//!
//! If standard output is systemd's journal, each line begins with its priority as defined by
//! sd-daemon(3), which the journal strips and `journalctl -p` uses. Text then has no time, since
//! the journal adds its own.

mod fields;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::{Event, Level, Metadata, Subscriber};
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::writer::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use crate::base::thread;
use crate::config::{Log, LogFormat};
pub use fields::Fields;

/// Limit on the lines that wait for standard output.
const LINES_MAX: usize = 8192;

/// How many of these are reserved for lines that peers cannot cause.
const LINES_KEPT: u64 = 2048;
const _: () = assert!(LINES_KEPT < LINES_MAX as u64);

/// The target of lines that peers can cause in any number: about users, requests, strangers.
pub const TRAFFIC: &str = "lb::traffic";

static LINES: OnceLock<Lines> = OnceLock::new();
static ON_TERMINAL: OnceLock<bool> = OnceLock::new();
static LEVELS: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// The running log. Dropping it writes what is queued, within a second.
pub struct Logs {
    _writer: WorkerGuard,
}

/// Starts the log of this process; only the first call has an effect.
pub fn start(log: &Log) -> Logs {
    let (lines, writer) = queue(io::stdout());
    let _ = LINES.set(lines.clone());
    let _ = ON_TERMINAL.set(io::stdout().is_terminal());
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

/// A sentence that ends the program, formatted for standard error: for the journal, an error.
pub fn last_words(said: &str) -> String {
    let priority = if is_journal(&io::stderr()) { priority(Level::ERROR) } else { "" };
    format!("{priority}lb: {said}\n")
}

/// Lines lost since the start because standard output was slower than they came.
pub fn dropped() -> u64 {
    LINES.get().map_or(0, Lines::dropped)
}

/// Whether the lines go to a terminal, where somebody may be watching.
pub fn is_on_terminal() -> bool {
    ON_TERMINAL.get().copied().unwrap_or_default()
}

/// Puts a text for the person at the terminal among the lines, if there is one.
pub fn tell(text: &str) {
    if let Some(lines) = LINES.get().filter(|_| is_on_terminal()) {
        let _ = lines.make_writer().write(text.as_bytes());
    }
}

/// From now on writes lines of this level and of more important ones.
pub fn set_level(level: Level) {
    if let Some(handle) = LEVELS.get() {
        // Fails only if the log no longer exists.
        let _ = handle.reload(levels(level));
    }
}

fn queue(out: impl Write + Send + 'static) -> (Lines, WorkerGuard) {
    let written = Arc::<AtomicU64>::default();
    let out = Counting { out, written: Arc::clone(&written) };
    let (queue, guard) = thread::without_signals(|| {
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LINES_MAX).finish(out)
    });
    (Lines { queue, put: Arc::default(), written, turned_away: Arc::default() }, guard)
}

/// The end of the queue that loggers use.
#[derive(Clone)]
struct Lines {
    queue: NonBlocking,
    /// Lines put into the queue, and lines that found no room in it.
    put: Arc<AtomicU64>,
    /// Lines that have left it.
    written: Arc<AtomicU64>,
    /// Lines of traffic that found only the reserved room.
    turned_away: Arc<AtomicU64>,
}

impl Lines {
    fn found_no_room(&self) -> u64 {
        self.queue.error_counter().dropped_lines() as u64
    }

    fn dropped(&self) -> u64 {
        self.found_no_room() + self.turned_away.load(Ordering::Relaxed)
    }

    /// Lines in the queue. Another thread may change either count between the two reads, so the
    /// result is approximate, which is enough for the reserved room.
    fn waiting(&self) -> u64 {
        let left = self.written.load(Ordering::Relaxed) + self.found_no_room();
        self.put.load(Ordering::Relaxed).saturating_sub(left)
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Pen<'a>;

    fn make_writer(&'a self) -> Pen<'a> {
        Pen { lines: self, writes: true }
    }

    fn make_writer_for(&'a self, about: &Metadata<'_>) -> Pen<'a> {
        let may = about.target() != TRAFFIC || self.waiting() < LINES_MAX as u64 - LINES_KEPT;
        Pen { lines: self, writes: may }
    }
}

/// Writes one line into the queue, or counts it.
struct Pen<'a> {
    lines: &'a Lines,
    writes: bool,
}

impl Write for Pen<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !self.writes {
            self.lines.turned_away.fetch_add(1, Ordering::Relaxed);
            return Ok(line.len());
        }
        self.lines.put.fetch_add(1, Ordering::Relaxed);
        self.lines.queue.clone().write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard output, with a count of the lines written, one per call.
struct Counting<W> {
    out: W,
    written: Arc<AtomicU64>,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn write_all(&mut self, line: &[u8]) -> io::Result<()> {
        self.written.fetch_add(1, Ordering::Relaxed);
        self.out.write_all(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// This program's lines at the level asked for; those of libraries only when something is wrong. What a peer does wrong
/// in HTTP/2 is counted, and would fill the log.
fn levels(level: Level) -> Targets {
    let lines = Targets::new().with_target("lb", level).with_target("h2", LevelFilter::OFF);
    lines.with_default(level.min(Level::WARN))
}

/// Who reads what is written.
#[derive(Clone, Copy, PartialEq)]
enum Reader {
    Terminal,
    Journal,
    Other,
}

/// Whether a stream leads to the journal: systemd names the stream that it created in
/// `JOURNAL_STREAM`, and somebody may have redirected it since (systemd.exec(5)).
fn is_journal(stream: &impl AsFd) -> bool {
    let Ok(named) = std::env::var("JOURNAL_STREAM") else { return false };
    let about = stream.as_fd().try_clone_to_owned().and_then(|copy| File::from(copy).metadata());
    about.is_ok_and(|about| named == format!("{}:{}", about.dev(), about.ino()))
}

/// The prefix that sd-daemon(3) defines for a line of this level.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

/// Writes the priority before what another format writes, if the journal reads it.
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
    lines: Lines,
    reader: Reader,
) -> impl Subscriber + Send + Sync {
    let layer = fmt::layer().with_writer(lines);
    let text = layer.with_target(false).with_ansi(reader == Reader::Terminal);
    let text = text.fmt_fields(Fields);
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
            tracing::info!(target: "lb::control", port = 9991, "backend connected");
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
        assert!(lines[0].ends_with("backend connected port=9991"), "{text}");
        assert!(lines[1].contains("a library's trouble"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn a_value_that_is_more_than_a_word_is_quoted() {
        let page = Page::default();
        let (lines, writer) = queue(page.clone());
        let (levels, _) = reload::Layer::new(levels(Level::INFO));
        let subscriber = subscriber(LogFormat::Text, levels, lines, Reader::Journal);
        tracing::subscriber::with_default(subscriber, || {
            let (name, reason) = ("my cache", "Connection refused (os error 111)");
            tracing::info!(target: "lb", backend = %"b1", %name, %reason, port = 9, "set aside");
            let (setting, why, forged) = ("a.b = 5", "stopped", "x level=error");
            tracing::info!(target: "lb", %setting, why, %forged, empty = %"", ms = 2.0, "reload");
            let escape = "\u{1b}[31m\nb\"";
            tracing::info!(target: "lb", %escape, "said {escape}");
        });
        drop(writer);
        let text = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
        let wanted = [
            "<6> INFO set aside backend=b1 name=\"my cache\" \
             reason=\"Connection refused (os error 111)\" port=9",
            "<6> INFO reload setting=\"a.b = 5\" why=\"stopped\" forged=\"x level=error\" \
             empty=\"\" ms=2.0",
            r#"<6> INFO said \u{1b}[31m\nb" escape="\u{1b}[31m\nb\"""#,
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn json_is_one_object_a_line() {
        let text = written(&json(), Reader::Other);
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["message"], "backend connected");
        assert_eq!(first["port"], 9991);
        assert_eq!(first["level"], "INFO");
        assert!(first["timestamp"].as_str().unwrap().starts_with("20"));
    }

    #[test]
    fn the_journal_gets_priorities_and_keeps_the_time_itself() {
        let text = written(&Log::default(), Reader::Journal);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "<6> INFO backend connected port=9991");
        assert_eq!(lines[1], "<4> WARN a library's trouble");
        let text = written(&json(), Reader::Journal);
        let first = text.lines().next().unwrap().strip_prefix("<6>").expect(&text);
        let first: serde_json::Value = serde_json::from_str(first).unwrap();
        assert_eq!(first["message"], "backend connected");
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

    /// Standard output to a pager that nobody scrolls.
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
        let counts = lines.clone();
        let (levels, _) = reload::Layer::new(levels(Level::INFO));
        let subscriber = subscriber(LogFormat::Text, levels, lines, Reader::Other);
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..LINES_MAX + 1000 {
                tracing::info!(target: "lb", "another line");
            }
        });
        let lost = counts.dropped();
        assert!((900..=1000).contains(&lost), "{lost} lines were dropped");
        drop(release);
        drop(writer);
    }

    #[test]
    fn a_flood_of_traffic_leaves_room_for_what_matters() {
        let (release, stuck) = mpsc::channel();
        let (lines, writer) = queue(Stuck(stuck));
        let counts = lines.clone();
        let (levels, _) = reload::Layer::new(levels(Level::INFO));
        let subscriber = subscriber(LogFormat::Text, levels, lines, Reader::Other);
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..LINES_MAX {
                tracing::info!(target: TRAFFIC, "user connected");
            }
            let lost = counts.dropped();
            assert!((LINES_KEPT - 100..=LINES_KEPT).contains(&lost), "{lost} lines were dropped");
            for _ in 0..LINES_KEPT {
                tracing::info!(target: "lb::control", "backend left");
            }
            assert_eq!(counts.dropped(), lost, "none of what matters");
        });
        drop(release);
        drop(writer);
    }
}
