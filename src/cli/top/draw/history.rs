//! The last 15 minutes in `lb top`: one curve in the head, and the curves of a service or of the whole.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::super::brief;
use super::super::history::{Curve, columns, title};
use super::super::screen::Screen;
use super::{FAINT, wrapped};
use crate::cli::text::headed;
use crate::control::history::page::Field;

/// What the name of a field takes, and its newest and highest value.
const NAME_WIDTH: usize = 11;
const VALUES_WIDTH: usize = 24;
/// The columns of the curve in the head.
const OVERVIEW_MAX: usize = 60;
/// More lines than this make one curve no clearer.
const LINES_MAX: usize = 4;

/// The curve of the whole, in one line.
pub fn overview(screen: &Screen, room: usize) -> Option<Line<'static>> {
    let field = screen.past.field;
    let curve = screen.past.whole()?;
    let name = format!("15 min {} ", title(field));
    let bars = columns(room.saturating_sub(name.len() + VALUES_WIDTH).min(OVERVIEW_MAX));
    let values = values(field, &curve);
    Some(Line::from(vec![
        Span::raw(name),
        Span::styled(curve.bars(bars, 1).concat(), colour(field)),
        Span::raw(headed(&values, room)),
    ]))
}

/// All curves, each in as many lines as there is room for, above what tells the time.
pub fn draw(screen: &Screen, service: Option<&str>, frame: &mut Frame, area: Rect) {
    let room = usize::from(area.width);
    let Some(curves) = screen.past.detail(service) else {
        let said =
            screen.past.trouble.as_deref().map(|said| {
                format!("There is no history, which older balancers do not keep: {said}")
            });
        let said = said.unwrap_or("looking ...".to_owned());
        let lines: Vec<Line> = wrapped(&said, room).into_iter().map(Line::from).collect();
        frame.render_widget(Paragraph::new(lines), area);
        return;
    };
    let height = usize::from(area.height).saturating_sub(1);
    let each = (height / curves.len().max(1)).clamp(1, LINES_MAX);
    let columns = columns(room.saturating_sub(NAME_WIDTH + VALUES_WIDTH));
    let mut lines: Vec<Line> = Vec::new();
    for (field, curve) in &curves {
        lines.extend(drawn(*field, curve, columns, each));
    }
    lines.truncate(height);
    lines.push(Line::styled(axis(columns), FAINT));
    frame.render_widget(Paragraph::new(lines), area);
}

fn drawn(field: Field, curve: &Curve, columns: usize, each: usize) -> Vec<Line<'static>> {
    let bars = curve.bars(columns, each);
    let last = bars.len() - 1;
    let line = |(place, bars): (usize, String)| {
        let name = if place == last { title(field) } else { "" };
        let values = if place == last { values(field, curve) } else { String::new() };
        Line::from(vec![
            Span::raw(format!("{name:NAME_WIDTH$}")),
            Span::styled(bars, colour(field)),
            Span::raw(values),
        ])
    };
    bars.into_iter().enumerate().map(line).collect()
}

/// The newest value and the highest.
fn values(field: Field, curve: &Curve) -> String {
    let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| shown(field, value));
    format!(" now {:>7} max {:>7}", shown(curve.now()), shown(curve.most()))
}

fn shown(field: Field, value: f64) -> String {
    match field {
        Field::BytesUp | Field::BytesDown => brief::bytes(value as u64),
        Field::P50 | Field::P99 => brief::latency(value as u64),
        // Once a minute is not never.
        _ if value > 0.0 && value < 10.0 && field != Field::Sessions => format!("{value:.1}"),
        _ => brief::count(value as u64),
    }
}

fn colour(field: Field) -> Style {
    match field {
        Field::Errors | Field::Refused => Style::new().fg(Color::Red),
        Field::P50 | Field::P99 => Style::new().fg(Color::Yellow),
        _ => Style::new().fg(Color::Cyan),
    }
}

/// What the columns are, in time.
fn axis(columns: usize) -> String {
    let mut line = vec![' '; NAME_WIDTH + columns];
    for (mark, place) in [("-15 min", 0), ("-10", columns / 3), ("-5", columns * 2 / 3)] {
        for (at, letter) in mark.chars().enumerate() {
            if let Some(cell) = line.get_mut(NAME_WIDTH + place + at) {
                *cell = letter;
            }
        }
    }
    let mut line: String = line.into_iter().collect();
    line.truncate((NAME_WIDTH + columns).saturating_sub(3));
    line + "now"
}
