//! Latencies as a picture: one curve per run over the share of requests that were faster, on an
//! axis stretched so that 99 %, 99.9 % and 99.99 % are equally far apart. SVG only. Pure.

use hdrhistogram::Histogram;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::units;

const WIDTH: u32 = 900;
const HEIGHT: u32 = 520;
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
}

impl Ranged for Nines {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        limit.0 + (value / self.most * f64::from(limit.1 - limit.0)) as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        (0..=self.most as u32).map(f64::from).collect()
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
    draw(&mut text, curves, (most_requests as f64).log10().max(1.0), least, most)
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
        .margin(16)
        .caption("Latency by percentile", ("sans-serif", 24))
        .x_label_area_size(52)
        .y_label_area_size(76)
        .build_cartesian_2d(Nines { most: nines }, range)?;
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
        chart
            .draw_series(LineSeries::new(points(&curve.latency, nines), colour.stroke_width(2)))?
            .label(curve.label.as_str())
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

fn points(latency: &Histogram<u64>, nines: f64) -> Vec<(f64, f64)> {
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
        let empty = Curve { label: String::new(), latency: Histogram::new(3).unwrap() };
        assert!(svg(&[empty]).is_err());
        assert!(svg(&[]).is_err());
    }
}
