//! How the fields of a line of text are written: `name=value`, so that a program can take the line apart
//! again. Owns the quoting: texts are always quoted, other values where they have a blank in them, or
//! something else that would end them or begin another.

use std::fmt::{self, Write};

use tracing::field::{Field, Visit};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;

/// The format of the fields.
#[derive(Clone, Copy, Default)]
pub struct Fields;

impl<'w> FormatFields<'w> for Fields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut line = Line { writer, is_empty: true, outcome: Ok(()) };
        fields.record(&mut line);
        line.outcome
    }
}

/// A line so far. What goes wrong is kept for the end, because nobody asks before.
struct Line<'w> {
    writer: Writer<'w>,
    is_empty: bool,
    outcome: fmt::Result,
}

impl Line<'_> {
    fn add(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if self.outcome.is_ok() {
            self.outcome = self.write(field.name(), value);
            self.is_empty = false;
        }
    }

    fn write(&mut self, name: &str, value: fmt::Arguments<'_>) -> fmt::Result {
        let between = if self.is_empty { "" } else { " " };
        match (name, self.writer.has_ansi_escapes()) {
            ("message", _) => write!(self.writer, "{between}{value}"),
            (_, true) => write!(self.writer, "{between}\x1b[3m{name}\x1b[0m\x1b[2m=\x1b[0m{value}"),
            (_, false) => write!(self.writer, "{between}{name}={value}"),
        }
    }
}

impl Visit for Line<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.add(field, format_args!("{}", OneLine(value))),
            _ => self.add(field, format_args!("{value:?}")),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        match field.name() {
            "message" => self.add(field, format_args!("{}", OneLine(&text))),
            _ if is_one_word(&text) => self.add(field, format_args!("{text}")),
            _ => self.add(field, format_args!("{text:?}")),
        }
    }
}

/// Whether a value can be told from what follows it without quotes.
fn is_one_word(value: &str) -> bool {
    let ends_it =
        |it: char| it.is_whitespace() || it.is_control() || matches!(it, '"' | '=' | '\\');
    !value.is_empty() && !value.contains(ends_it)
}

/// A sentence in which control characters are escaped: it may quote others.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|it| match it.is_control() {
            true => write!(out, "{}", it.escape_default()),
            false => out.write_char(it),
        })
    }
}
