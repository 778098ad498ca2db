//! Amounts as a run shows them everywhere: three digits, a space, the unit. Owns the style of the
//! table, the drawing, the verdicts, the live line and the picture. Pure.

/// A length of time.
pub fn time(nanos: f64) -> String {
    scaled(nanos, &[(1.0, "ns"), (1e3, "us"), (1e6, "ms"), (1e9, "s")])
}

/// An amount of bytes; `GB` is 1e9 bytes.
pub fn bytes(bytes: f64) -> String {
    scaled(bytes, &[(1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")])
}

/// Bytes a second.
pub fn throughput(bytes_per_second: f64) -> String {
    format!("{}/s", bytes(bytes_per_second))
}

/// Requests a second.
pub fn rate(per_second: f64) -> String {
    format!("{per_second:.0}/s")
}

/// A share. Rounded down, so that only all is 100 %.
pub fn percent(percent: f64) -> String {
    format!("{} %", trimmed(&format!("{:.4}", (percent * 1e4).floor() / 1e4)))
}

/// The amount in the largest unit of which there is at least one.
fn scaled(amount: f64, units: &[(f64, &str)]) -> String {
    debug_assert!(amount.is_finite(), "only what was measured is shown");
    // What would be shown as 1000 of a unit is 1 of the next.
    let fits = |(size, _): &&(f64, &str)| amount >= size * 0.9995;
    let (size, unit) = units.iter().rev().find(fits).unwrap_or(&units[0]);
    format!("{} {unit}", three_digits(amount / size))
}

fn three_digits(number: f64) -> String {
    match number {
        _ if number < 9.995 => trimmed(&format!("{number:.2}")),
        _ if number < 99.95 => trimmed(&format!("{number:.1}")),
        _ => format!("{number:.0}"),
    }
}

/// Without zeros at the end of a fraction.
fn trimmed(text: &str) -> String {
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_three_digits_and_a_unit() {
        for (nanos, text) in [
            (0.0, "0 ns"),
            (1.0, "1 ns"),
            (999.0, "999 ns"),
            (999.6, "1 us"),
            (1_234.0, "1.23 us"),
            (37_000.0, "37 us"),
            (999_700.0, "1 ms"),
            (4_981_000.0, "4.98 ms"),
            (19_840_000.0, "19.8 ms"),
            (100_000_000.0, "100 ms"),
            (3_600e9, "3600 s"),
        ] {
            assert_eq!(time(nanos), text);
        }
        assert_eq!(throughput(4_860_000.0), "4.86 MB/s");
        assert_eq!(bytes(24.0), "24 B");
        assert_eq!(rate(37_960.4), "37960/s");
    }

    #[test]
    fn only_all_is_a_hundred_percent() {
        for (share, text) in
            [(100.0, "100 %"), (99.999_99, "99.9999 %"), (50.0, "50 %"), (0.0, "0 %")]
        {
            assert_eq!(percent(share), text);
        }
    }
}
