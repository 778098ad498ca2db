//! Tables for people: aligned columns and, on a terminal, colour. Owns widths and colours; knows
//! nothing about what the cells mean.

use std::env;
use std::fmt::Write;
use std::io::{self, IsTerminal};

/// How a cell looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Look {
    Plain,
    Good,
    Warning,
    Bad,
    Faint,
}

/// One cell. Its text has no line breaks.
#[derive(Clone, Debug)]
pub struct Cell {
    text: String,
    look: Look,
    /// Right-aligned, as numbers are.
    right: bool,
}

/// Words.
pub fn word(text: impl Into<String>) -> Cell {
    Cell { text: shown(&text.into()), look: Look::Plain, right: false }
}

/// A number with its digits in groups of three.
pub fn number(value: u64) -> Cell {
    Cell { text: grouped(value), look: Look::Plain, right: true }
}

/// A number of bytes in the largest unit that it fills.
pub fn bytes(value: u64) -> Cell {
    Cell { text: sized(value), look: Look::Plain, right: true }
}

/// A time in milliseconds, as a person would say it.
pub fn span(ms: u64) -> Cell {
    Cell { text: lasting(ms), look: Look::Plain, right: true }
}

impl Cell {
    pub fn looking(self, look: Look) -> Cell {
        Cell { look, ..self }
    }

    /// Right-aligns the cell.
    pub fn right(self) -> Cell {
        Cell { right: true, ..self }
    }
}

/// Whether to use colour: standard output is a terminal, and the user has not declined
/// (<https://no-color.org>).
pub fn colour() -> bool {
    io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|said| said.is_empty())
}

/// The rows below their headings, each column as wide as its widest cell.
pub fn drawn(heads: &[&str], rows: &[Vec<Cell>], colour: bool) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].text.chars().count());
        cells.chain([heads[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let right = |column: usize| rows.first().is_some_and(|row| row[column].right);
    let top: Vec<Cell> = heads
        .iter()
        .enumerate()
        .map(|(column, head)| Cell {
            text: (*head).to_owned(),
            look: Look::Faint,
            right: right(column),
        })
        .collect();
    let mut out = String::new();
    for row in std::iter::once(&top).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let pad = " ".repeat(width - cell.text.chars().count());
            let text = painted(&cell.text, cell.look, colour);
            let (before, after) = if cell.right { (pad.as_str(), "") } else { ("", pad.as_str()) };
            // Writing to a string cannot fail.
            let _ = write!(line, "{before}{text}{after}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// The text in the colour of its look.
pub fn painted(text: &str, look: Look, colour: bool) -> String {
    let code = match look {
        _ if !colour || text.is_empty() => return text.to_owned(),
        Look::Plain => return text.to_owned(),
        Look::Good => 32,
        Look::Warning => 33,
        Look::Bad => 31,
        Look::Faint => 2,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// Text from the network may hold anything, including what a terminal would obey.
pub fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// The text in at most `width` characters. Long names differ at their ends as often as at their beginnings, so
/// what is left out is the middle.
pub fn middled(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    let kept = width.saturating_sub(1);
    let (before, after) = (kept.div_ceil(2), kept / 2);
    let mark = if width == 0 { "" } else { "…" };
    let start: String = text.chars().take(before).collect();
    let end: String = text.chars().skip(count - after).collect();
    format!("{start}{mark}{end}")
}

/// A number with its digits in groups of three.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number of bytes in the largest unit that it fills.
pub fn sized(value: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let step = (u64::BITS - value.max(1).leading_zeros() - 1) as usize / 10;
    if step == 0 {
        return format!("{value} B");
    }
    // Tenths, rounded down, so that no unit ever shows more than it holds.
    let tenths = (u128::from(value) * 10) >> (10 * step);
    format!("{}.{} {}", tenths / 10, tenths % 10, units[step])
}

/// A time in milliseconds, as a person would say it.
pub fn lasting(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        60_000..3_600_000 => format!("{} min {:02} s", ms / 60_000, ms / 1_000 % 60),
        3_600_000..86_400_000 => format!("{} h {:02} min", ms / 3_600_000, ms / 60_000 % 60),
        _ => format!("{} d {:02} h", ms / 86_400_000, ms / 3_600_000 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_tail() {
        let rows = [
            vec![word("a"), number(5), word("serving").looking(Look::Good)],
            vec![word("bcd"), number(12_345), word("")],
        ];
        assert_eq!(
            drawn(&["name", "users", "state"], &rows, false),
            "name   users  state\n\
             a          5  serving\n\
             bcd   12,345\n"
        );
    }

    #[test]
    fn colour_does_not_move_the_columns() {
        let rows = [vec![word("bad").looking(Look::Bad), word("x")], vec![word("fine"), word("y")]];
        let painted = drawn(&["one", "two"], &rows, true);
        assert!(painted.contains("\x1b[31mbad\x1b[0m   x\n"), "{painted:?}");
        let plain = drawn(&["one", "two"], &rows, false);
        assert!(!plain.contains('\x1b') && plain.contains("bad   x\n"), "{plain:?}");
    }

    #[test]
    fn nothing_from_the_network_reaches_the_terminal_as_an_order() {
        assert_eq!(word("a\x1b[2Jb\n").text, "a?[2Jb?");
    }

    #[test]
    fn a_long_name_keeps_both_its_ends() {
        for (width, shown) in
            [(9, "shop-eu-1"), (8, "shop…u-1"), (7, "sho…u-1"), (2, "s…"), (1, "…"), (0, "")]
        {
            assert_eq!(middled("shop-eu-1", width), shown);
        }
        assert_eq!(middled("ééééé", 3), "é…é");
    }

    #[test]
    fn quantities_are_as_a_person_would_say_them() {
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_572_864, "1.5 MiB"),
            (1_048_575, "1023.9 KiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(sized(value), text);
        }
        for (value, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(value), text);
        }
        for (ms, text) in [
            (999, "999 ms"),
            (1_250, "1.2 s"),
            (61_000, "1 min 01 s"),
            (3_660_000, "1 h 01 min"),
            (90_000_000, "1 d 01 h"),
        ] {
            assert_eq!(lasting(ms), text);
        }
    }
}
