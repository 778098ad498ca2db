//! The columns of the tables of `lb top`, and which of them fit. Owns widths. Where room is short, names are cut
//! first, down to what can still be told apart; then the figures of lowest rank go. Names never go.

use ratatui::layout::{Alignment, Constraint};
use ratatui::style::Style;
use ratatui::text::Line;
use ratatui::widgets::{Row as Cells, Table};

use crate::cli::text::{headed, middled, width};

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
    /// On the left, cut in the middle if need be. At least this wide.
    Name(u16),
    /// On the right. At least this wide: rates change, and columns that jump about are hard to read.
    Number(u16),
}

pub const fn text(title: &'static str, rank: u8) -> Column {
    Column { title, rank, kind: Kind::Text }
}

pub const fn name(title: &'static str, rank: u8, least: u16) -> Column {
    Column { title, rank, kind: Kind::Name(least) }
}

pub const fn number(title: &'static str, rank: u8, least: u16) -> Column {
    Column { title, rank, kind: Kind::Number(least) }
}

/// What a long name gets before figures of a rank up to [`EXTRA`] are shown.
const NAME_GOOD: u16 = 16;
const EXTRA: u8 = 7;
/// Figures from this rank on stay even where names are then hard to read: how many sessions wait for a drain.
const VITAL: u8 = 11;

/// A column that is shown: its place, and the least and the most that it takes.
struct Shown {
    place: usize,
    rank: u8,
    least: u16,
    most: u16,
}

impl Column {
    fn shown(self, place: usize, widest: usize) -> Shown {
        let widest = u16::try_from(widest.max(self.title.len())).unwrap_or(u16::MAX);
        let (least, most) = match self.kind {
            Kind::Text => (widest, widest),
            Kind::Name(least) => (widest.min(least), widest),
            Kind::Number(least) => (widest.max(least), widest.max(least)),
        };
        Shown { place, rank: self.rank, least, most }
    }

    fn is_name(self) -> bool {
        matches!(self.kind, Kind::Name(_))
    }

    fn side(self) -> Alignment {
        if matches!(self.kind, Kind::Number(_)) { Alignment::Right } else { Alignment::Left }
    }
}

/// The places of the columns that fit into `room` with a space between each two, and their widths. `widest`
/// is the width of the widest cell of each; `None`: the column has nothing to show.
fn fitting(columns: &[Column], widest: &[Option<usize>], room: u16) -> Vec<(usize, u16)> {
    let shown =
        |(place, widest): (usize, &Option<usize>)| Some(columns[place].shown(place, (*widest)?));
    let mut shown: Vec<Shown> = widest.iter().enumerate().filter_map(shown).collect();
    // The space after the last column is not needed.
    let room = room.saturating_add(1);
    leave_out(&mut shown, room, NAME_GOOD, |it| it.rank <= EXTRA && !columns[it.place].is_name());
    leave_out(&mut shown, room, 0, |it| it.rank < VITAL && !columns[it.place].is_name());
    if shown.iter().any(|it| !columns[it.place].is_name()) && taken(&shown, 0) > room {
        let names = shown.iter_mut().filter(|it| columns[it.place].is_name());
        names.for_each(|it| it.least = squeezed(it.least));
    }
    leave_out(&mut shown, room, 0, |it| !columns[it.place].is_name());
    leave_out(&mut shown, room, 0, |_| true);
    widen(&mut shown, room);
    shown.into_iter().map(|it| (it.place, it.least)).collect()
}

/// The width of a name that makes room for a vital figure.
const fn squeezed(least: u16) -> u16 {
    least - least * 2 / 5
}

/// What the columns take if each gets `name`, as far as it has a use for it.
fn taken(shown: &[Shown], name: u16) -> u16 {
    let width = |it: &Shown| it.least.max(name.min(it.most)).saturating_add(1);
    shown.iter().map(width).fold(0, u16::saturating_add)
}

/// Leaves columns out, rank by rank, until the others fit. At least one stays.
fn leave_out(shown: &mut Vec<Shown>, room: u16, name: u16, may_go: impl Fn(&Shown) -> bool) {
    while shown.len() > 1 && taken(shown, name) > room {
        let Some(least) = shown.iter().filter(|it| may_go(it)).map(|it| it.rank).min() else {
            return;
        };
        shown.retain(|it| it.rank != least || !may_go(it));
    }
}

/// Gives what is left to the columns that have a use for it, the narrowest first.
fn widen(shown: &mut [Shown], room: u16) {
    for _ in taken(shown, 0)..room {
        let wanting = shown.iter_mut().filter(|it| it.least < it.most);
        let Some(narrowest) = wanting.min_by_key(|it| it.least) else { return };
        narrowest.least += 1;
    }
}

/// A table of rows with one line for each column. `longest` holds for columns whose widest cell may be out
/// of sight; `hidden` says of columns whether they have nothing to say.
pub fn table<'l>(
    columns: &[Column],
    rows: Vec<Vec<Line<'l>>>,
    longest: &[(usize, usize)],
    hidden: &[(usize, bool)],
    room: u16,
) -> Table<'l> {
    let widest: Vec<Option<usize>> = (0..columns.len())
        .map(|place| {
            let in_sight = rows.iter().map(|row| row[place].width());
            let known = longest.iter().filter(|(it, _)| *it == place).map(|(_, width)| *width);
            (!hidden.contains(&(place, true))).then(|| in_sight.chain(known).max().unwrap_or(0))
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
    let title = |(place, width): &(usize, u16)| {
        let column = columns[*place];
        Line::from(headed(column.title, usize::from(*width))).alignment(column.side())
    };
    let heads = Cells::new(shown.iter().map(title).collect::<Vec<_>>());
    let widths: Vec<Constraint> =
        shown.iter().map(|(_, width)| Constraint::Length(*width)).collect();
    Table::new(rows.into_iter().map(pick), widths).header(heads.style(Style::new().dim()))
}

/// The line, with its middle left out where it is wider than this.
fn cut(line: Line<'_>, most: usize) -> Line<'_> {
    let whole: String = line.spans.iter().map(|span| &*span.content).collect();
    if width(&whole) <= most {
        return line;
    }
    Line::styled(middled(&whole, most), line.style)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 5] = [
        name("service", 9, 6),
        text("users", 6),
        number("new/s", 8, 8),
        name("name", 1, 6),
        number("hello", 2, 8),
    ];

    #[test]
    fn names_are_cut_before_figures_go_and_share_what_is_left() {
        let widest = [Some(40), Some(3), Some(2), Some(20), Some(6)];
        for (room, shown) in [
            (90, vec![(0, 40), (1, 5), (2, 8), (3, 20), (4, 8)]),
            (70, vec![(0, 25), (1, 5), (2, 8), (3, 20), (4, 8)]),
            (57, vec![(0, 16), (1, 5), (2, 8), (3, 16), (4, 8)]),
            // Figures that matter little go before names are hard to read.
            (56, vec![(0, 20), (1, 5), (2, 8), (3, 20)]),
            (40, vec![(0, 15), (2, 8), (3, 15)]),
            // One that matters stays while they can be told apart.
            (22, vec![(0, 6), (2, 8), (3, 6)]),
            (21, vec![(0, 10), (3, 10)]),
            (13, vec![(0, 6), (3, 6)]),
            (5, vec![(0, 6)]),
        ] {
            assert_eq!(fitting(&COLUMNS, &widest, room), shown, "{room}");
        }
        let vital = [name("name", 1, 10), number("new/s", 8, 6), number("sessions", VITAL, 8)];
        let of = |room| fitting(&vital, &[Some(20), Some(2), Some(2)], room);
        assert_eq!(of(26), [(0, 10), (1, 6), (2, 8)]);
        assert_eq!(of(25), [(0, 16), (2, 8)]);
        assert_eq!(of(15), [(0, 6), (2, 8)], "a name gives way to a vital figure");
        assert_eq!(of(14), [(0, 14)]);
        assert_eq!(fitting(&COLUMNS[..4], &[Some(3), None, None, Some(3)], 80), [(0, 7), (3, 4)]);
    }
}
