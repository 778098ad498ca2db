//! The columns of the tables of `lb top`, and which of them fit. Owns widths: in a terminal that is too narrow
//! the columns of lowest rank go first, and of what is left, names give way before anything else does.

use ratatui::layout::{Alignment, Constraint};
use ratatui::style::Style;
use ratatui::text::Line;
use ratatui::widgets::{Row as Cells, Table};

use crate::cli::table::middled;

/// A column. Of those that do not fit, the one of lowest rank goes first.
#[derive(Clone, Copy)]
pub struct Column {
    title: &'static str,
    rank: u8,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// On the left, whole.
    Text,
    /// On the left, cut in the middle if need be.
    Name,
    /// On the right. At least this wide: rates change, and columns that jump about are hard to read.
    Number(u16),
}

pub const fn text(title: &'static str, rank: u8) -> Column {
    Column { title, rank, kind: Kind::Text }
}

pub const fn name(title: &'static str, rank: u8) -> Column {
    Column { title, rank, kind: Kind::Name }
}

pub const fn number(title: &'static str, rank: u8, least: u16) -> Column {
    Column { title, rank, kind: Kind::Number(least) }
}

/// The narrowest that a long name is cut to.
const NAME_LEAST: u16 = 16;
/// What it gets before columns of a rank up to [`EXTRA`] are shown.
const NAME_GOOD: u16 = 32;
const EXTRA: u8 = 5;

impl Column {
    /// The least and the most that a column takes whose widest cell is so wide.
    fn widths(self, widest: usize) -> (u16, u16) {
        let widest = u16::try_from(widest.max(self.title.len())).unwrap_or(u16::MAX);
        match self.kind {
            Kind::Text => (widest, widest),
            Kind::Name => (widest.min(NAME_LEAST), widest),
            Kind::Number(least) => (widest.max(least), widest.max(least)),
        }
    }

    fn side(self) -> Alignment {
        if matches!(self.kind, Kind::Number(_)) { Alignment::Right } else { Alignment::Left }
    }
}

/// The places of the columns that fit into `room` with a space between each two, and their widths. `widest`
/// is the width of the widest cell of each; `None`: the column has nothing to show.
fn fitting(columns: &[Column], widest: &[Option<usize>], room: u16) -> Vec<(usize, u16)> {
    let column = |(place, widest): (usize, &Option<usize>)| {
        let (least, most) = columns[place].widths((*widest)?);
        Some((place, least, most))
    };
    let mut shown: Vec<(usize, u16, u16)> = widest.iter().enumerate().filter_map(column).collect();
    let taken = |shown: &[(usize, u16, u16)], name: u16| -> u16 {
        let width = |(_, least, most): &(usize, u16, u16)| (*least).max(name.min(*most));
        shown.iter().fold(0, |sum, column| sum.saturating_add(width(column).saturating_add(1)))
    };
    let lowest = |shown: &[(usize, u16, u16)]| {
        shown.iter().map(|(place, ..)| columns[*place].rank).min().unwrap_or(0)
    };
    for (name, up_to) in [(NAME_GOOD, EXTRA), (0, u8::MAX)] {
        while shown.len() > 1
            && taken(&shown, name) > room.saturating_add(1)
            && lowest(&shown) <= up_to
        {
            let least = lowest(&shown);
            shown.retain(|(place, ..)| columns[*place].rank != least);
        }
    }
    let mut left = room.saturating_add(1).saturating_sub(taken(&shown, 0));
    let mut order: Vec<usize> = (0..shown.len()).collect();
    order.sort_by_key(|at| std::cmp::Reverse(columns[shown[*at].0].rank));
    for at in order {
        let (_, least, most) = &mut shown[at];
        let more = left.min(*most - *least);
        (*least, left) = (*least + more, left - more);
    }
    shown.into_iter().map(|(place, width, _)| (place, width)).collect()
}

/// A table of rows with one line for each column. `longest` holds for columns whose widest cell may be out
/// of sight; `hidden` are the places of columns that have nothing to say.
pub fn table<'l>(
    columns: &[Column],
    rows: Vec<Vec<Line<'l>>>,
    longest: &[(usize, usize)],
    hidden: &[usize],
    room: u16,
) -> Table<'l> {
    let widest: Vec<Option<usize>> = (0..columns.len())
        .map(|place| {
            let in_sight = rows.iter().map(|row| row[place].width());
            let known = longest.iter().filter(|(it, _)| *it == place).map(|(_, width)| *width);
            (!hidden.contains(&place)).then(|| in_sight.chain(known).max().unwrap_or(0))
        })
        .collect();
    let shown = fitting(columns, &widest, room);
    let pick = |row: Vec<Line<'l>>| {
        let cell = |(place, width): &(usize, u16)| {
            let side = columns[*place].side();
            cut(row[*place].clone(), usize::from(*width)).alignment(side)
        };
        Cells::new(shown.iter().map(cell).collect::<Vec<_>>())
    };
    let titles = columns.iter().map(|column| Line::from(column.title)).collect();
    let widths: Vec<Constraint> =
        shown.iter().map(|(_, width)| Constraint::Length(*width)).collect();
    let heads = pick(titles).style(Style::new().dim());
    Table::new(rows.into_iter().map(pick), widths).header(heads)
}

/// The line, with its middle left out where it is wider than this.
fn cut(line: Line<'_>, width: usize) -> Line<'_> {
    if line.width() <= width {
        return line;
    }
    let whole: String = line.spans.iter().map(|span| &*span.content).collect();
    Line::styled(middled(&whole, width), line.style)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 4] =
        [name("service", 9), text("users", 6), number("new/s", 7, 8), name("name", 1)];

    #[test]
    fn columns_of_low_rank_go_first_and_names_take_what_is_left() {
        let widest = [Some(40), Some(3), Some(2), Some(20)];
        for (room, shown) in [
            (80, vec![(0, 40), (1, 5), (2, 8), (3, 20)]),
            (70, vec![(0, 38), (1, 5), (2, 8), (3, 16)]),
            (68, vec![(0, 36), (1, 5), (2, 8), (3, 16)]),
            (67, vec![(0, 40), (1, 5), (2, 8)]),
            (47, vec![(0, 32), (1, 5), (2, 8)]),
            (31, vec![(0, 16), (1, 5), (2, 8)]),
            (30, vec![(0, 21), (2, 8)]),
            (5, vec![(0, 16)]),
        ] {
            assert_eq!(fitting(&COLUMNS, &widest, room), shown, "{room}");
        }
        assert_eq!(fitting(&COLUMNS, &[Some(3), None, None, Some(3)], 80), [(0, 7), (3, 4)]);
    }
}
