//! Latencies as a picture: one curve per run over the share of requests that were faster, on an
//! axis stretched so that 99 %, 99.9 % and 99.99 % are equally far apart. SVG only. Pure.

use hdrhistogram::Histogram;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::units;

const WIDTH: u32 = 900;
const HEIGHT: u32 = 520;
const MARGIN: u32 = 16;
/// Where the labels of the latencies stand, left of the axis.
const LEFT: u32 = 76;
/// The width of a character on the axes, in a wide sans-serif.
const CHARACTER: u32 = 8;
/// Limit on the nines of the axis: the share of a slowest request among 1e12.
const NINES_MAX: f64 = 12.0;
/// Limit on the curves that are named, and on the characters of a name.
const NAMED_MAX: usize = 16;
const NAME_CHARS_MAX: usize = 64;
/// Distinguishable with colour blindness, too (Okabe and Ito's palette).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
];

/// One run's curve.
pub struct Curve {
    pub label: String,
    /// In nanoseconds.
    pub latency: Histogram<u64>,
}

/// The number of nines: 0 at 0 %, 1 at 90 %, 2 at 99 %.
struct Nines {
    most: f64,
    /// Nines from one label to the next, so that each has room.
    step: usize,
}

impl Nines {
    fn new(most: f64) -> Nines {
        let room = f64::from(WIDTH - LEFT - MARGIN - Nines::margin(most)) / most;
        let step = (f64::from(Nines::label_width(most) + 2 * CHARACTER) / room).ceil();
        Nines { most, step: step.max(1.0) as usize }
    }

    /// The width of the last label, which is the widest.
    fn label_width(most: f64) -> u32 {
        (most.max(2.0) as u32 + 3) * CHARACTER
    }

    /// Half of the last label stands right of the axis.
    fn margin(most: f64) -> u32 {
        MARGIN + Nines::label_width(most) / 2
    }
}

impl Ranged for Nines {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        limit.0 + (value / self.most * f64::from(limit.1 - limit.0)) as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        (0..=self.most as u32).step_by(self.step).map(f64::from).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        0.0..self.most
    }
}

impl ValueFormatter<f64> for Nines {
    fn format_ext(&self, nines: &f64) -> String {
        let decimals = (*nines as usize).saturating_sub(2);
        format!("{:.decimals$} %", 100.0 - 10f64.powf(2.0 - nines))
    }
}

/// Draws the curves. Fails if no run has a single reply.
pub fn svg(curves: &[Curve]) -> Result<String, String> {
    let measured = || curves.iter().filter(|curve| !curve.latency.is_empty());
    let most_requests = measured().map(|curve| curve.latency.len()).max();
    let most_requests = most_requests.ok_or("no run has a latency to draw")?;
    let least = measured().map(|curve| curve.latency.min()).min().unwrap_or(1).max(1);
    let most = measured().map(|curve| curve.latency.max()).max().unwrap_or(1);
    let mut text = String::new();
    draw(&mut text, curves, (most_requests as f64).log10().clamp(1.0, NINES_MAX), least, most)
        .map_err(|error| format!("cannot draw: {error}"))?;
    Ok(text)
}

fn draw(
    text: &mut String,
    curves: &[Curve],
    nines: f64,
    least: u64,
    most: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(text, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    let range = (least as f64 / 1.2..most as f64 * 1.2).log_scale();
    let mut chart = ChartBuilder::on(&root)
        .margin(MARGIN)
        .margin_right(Nines::margin(nines))
        .caption("Latency by percentile", ("sans-serif", 24))
        .x_label_area_size(52)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(Nines::new(nines), range)?;
    chart
        .configure_mesh()
        .light_line_style(BLACK.mix(0.06))
        .bold_line_style(BLACK.mix(0.2))
        .axis_desc_style(("sans-serif", 17))
        .label_style(("sans-serif", 16))
        .x_desc("share of requests that were faster")
        .y_label_formatter(&|nanos| units::time(*nanos))
        .draw()?;
    for (place, curve) in curves.iter().enumerate() {
        let colour = COLOURS[place % COLOURS.len()];
        let line = LineSeries::new(points(&curve.latency, nines), colour.stroke_width(2));
        let drawn = chart.draw_series(line)?;
        let Some(name) = name(curves, place) else { continue };
        drawn
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 17))
        .draw()?;
    root.present()?;
    Ok(())
}

/// A curve's name in the legend; `None` if the legend is full.
fn name(curves: &[Curve], place: usize) -> Option<String> {
    let label = &curves[place].label;
    let hidden = curves.len().saturating_sub(NAMED_MAX);
    match place + 1 {
        ..NAMED_MAX => {}
        NAMED_MAX if hidden == 0 => {}
        NAMED_MAX => return Some(format!("{} more", hidden + 1)),
        _ => return None,
    }
    let chars = label.chars().count();
    let label = match chars > NAME_CHARS_MAX {
        // The end of a name tells runs apart at least as often as its beginning.
        true => {
            let half = NAME_CHARS_MAX / 2 - 1;
            let start: String = label.chars().take(half).collect();
            format!("{start}…{}", label.chars().skip(chars - half).collect::<String>())
        }
        false => label.clone(),
    };
    let nothing = if curves[place].latency.is_empty() { ": nothing measured" } else { "" };
    Some(format!("{label}{nothing}"))
}

fn points(latency: &Histogram<u64>, nines: f64) -> Vec<(f64, f64)> {
    if latency.is_empty() {
        return Vec::new();
    }
    latency
        .iter_quantiles(20)
        .map(|step| {
            let at = -(1.0 - step.quantile_iterated_to()).max(1e-12).log10();
            (at.min(nines), step.value_iterated_to().max(1) as f64)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(label: &str, scale: u64) -> Curve {
        let mut latency = Histogram::new(3).unwrap();
        for micros in 1..=1_000 {
            latency.record(micros * 1_000 * scale).unwrap();
        }
        Curve { label: label.to_owned(), latency }
    }

    #[test]
    fn every_run_has_a_curve_and_a_name() {
        let text = svg(&[curve("direct", 1), curve("balanced <ours>", 3)]).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        for word in
            ["direct", "balanced &lt;ours&gt;", "90 %", "99.9 %", "100 us", "#0072B2", "#D55E00"]
        {
            assert!(text.contains(word), "{word}");
        }
    }

    /// The box that each text takes, at the widths of a usual sans-serif: left, top, right, bottom.
    fn boxes(svg: &str) -> Vec<(String, [f64; 4])> {
        let field = |tag: &str, name: &str| -> String {
            let at = tag.find(&format!(" {name}=\"")).unwrap() + name.len() + 3;
            tag[at..].split('"').next().unwrap().to_owned()
        };
        svg.split("<text")
            .skip(1)
            .map(|part| {
                let (tag, rest) = part.split_once('>').unwrap();
                let text = rest.split("</text>").next().unwrap().trim();
                let text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
                let number = |name| field(tag, name).parse::<f64>().unwrap();
                let (x, y, size) = (number("x"), number("y"), number("font-size"));
                let width = text.chars().count() as f64 * size * 0.55;
                let left = match field(tag, "text-anchor").as_str() {
                    "start" => x,
                    "end" => x - width,
                    _ => x - width / 2.0,
                };
                // Where the baseline is: a capital's height below y, at y, or half a small letter
                // below it.
                let base = match field(tag, "dy").as_str() {
                    "0.76em" => y + size * 0.76,
                    "0.5ex" => y + size * 0.25,
                    _ => y - size * 0.25,
                };
                (text, [left, base - size * 0.76, left + width, base + size * 0.2])
            })
            .collect()
    }

    #[track_caller]
    fn apart(svg: &str) {
        let boxes = boxes(svg);
        for (place, (text, [left, top, right, bottom])) in boxes.iter().enumerate() {
            let inside = *left >= 0.0 && *top >= 0.0 && *right <= 900.0 && *bottom <= 520.0;
            assert!(inside, "`{text}` leaves the picture");
            for (other, [l, t, r, b]) in &boxes[place + 1..] {
                let apart = right < l || r < left || bottom < t || b < top;
                assert!(apart, "`{text}` and `{other}` overlap");
            }
        }
    }

    #[test]
    fn labels_do_not_overlap() {
        let spread = |label: &str, least: u64, most: u64, count: u64| {
            let mut latency = Histogram::new_with_bounds(1, 3_600_000_000_000, 3).unwrap();
            latency.record_n(least, count).unwrap();
            latency.record(most).unwrap();
            Curve { label: label.to_owned(), latency }
        };
        for (least, most) in [
            (1, 3_600_000_000_000),
            (30_000, 40_000),
            (30_000, 300_000_000),
            (99_000, 101_000),
            (1_000_000, 1_000_000),
            (900, 1_100),
        ] {
            for count in [1, 100, 1_000_000, 1_000_000_000_000] {
                apart(&svg(&[spread("direct", least, most, count)]).unwrap());
            }
        }
        let long = "a-run-with-a-long-name-".repeat(10);
        let many: Vec<Curve> =
            (0..60).map(|place| spread(&format!("{long}{place}"), 30_000, 40_000, 9)).collect();
        let crowded = svg(&many).unwrap();
        apart(&crowded);
        assert!(crowded.contains("45 more") && crowded.contains("…"), "{crowded}");
    }

    #[test]
    fn a_slower_run_is_drawn_above() {
        let (fast, slow) = (curve("", 1), curve("", 3));
        for ((x, fast), (_, slow)) in
            points(&fast.latency, 3.0).into_iter().zip(points(&slow.latency, 3.0))
        {
            assert!(x <= 3.0 && slow > fast);
        }
    }

    #[test]
    fn nothing_measured_cannot_be_drawn() {
        let empty = || Curve { label: "none".to_owned(), latency: Histogram::new(3).unwrap() };
        let beside = svg(&[curve("some", 1), empty()]).unwrap();
        assert!(beside.contains("none: nothing measured"), "{beside}");
        assert!(!beside.contains("NaN") && !beside.contains("inf"), "{beside}");
        assert!(svg(&[empty()]).is_err());
        assert!(svg(&[]).is_err());
    }
}
