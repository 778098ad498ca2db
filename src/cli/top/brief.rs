//! Quantities in few columns. Owns the units of `lb top`, which `?` explains: K, M, G and T are steps of 1024 for
//! bytes and of 1000 for everything else.

use crate::cli::table::grouped;

/// Bytes in at most 5 columns: `512`, `1.5K`, `99.9M`, `1023G`.
pub fn bytes(value: u64) -> String {
    scaled(value, 1024)
}

/// A count in at most 6 columns: all digits up to 99,999, then as bytes are.
pub fn count(value: u64) -> String {
    if value < 100_000 { grouped(value) } else { scaled(value, 1000) }
}

/// Rounded down, so that no unit ever shows more than it holds.
fn scaled(value: u64, step: u64) -> String {
    let units = ["", "K", "M", "G", "T", "P", "E"];
    let place = (0..6).find(|place| value / step.pow(*place) < step).unwrap_or(6);
    let (unit, suffix) = (step.pow(place), units[place as usize]);
    let whole = value / unit;
    if place == 0 || whole >= 100 {
        return format!("{whole}{suffix}");
    }
    let tenths = u128::from(value) * 10 / u128::from(unit) % 10;
    format!("{whole}.{tenths}{suffix}")
}

/// A time in at most 4 columns, in the largest unit that it fills: `0s`, `59s`, `12m`, `3h`, `99d`.
pub fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// What is left of a time, rounded up, so that nothing is at 0 that goes on: `25s`, `1m 05s`, `2h 05m`.
pub fn left(ms: u64) -> String {
    let seconds = ms.div_ceil(1000);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

/// A latency in at most 6 columns: `150us`, `1.0ms`, `100ms`, `2.5s`.
pub fn latency(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}us"),
        1_000..100_000 => format!("{}.{}ms", us / 1_000, us % 1_000 / 100),
        100_000..1_000_000 => format!("{}ms", us / 1_000),
        _ => format!("{}.{}s", us / 1_000_000, us % 1_000_000 / 100_000),
    }
}

/// `1 session`, `12 sessions`.
pub fn sessions(count: u64) -> String {
    format!("{} session{}", grouped(count), if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_short_and_never_more_than_there_is() {
        let shown = |of: fn(u64) -> String, values: &[u64]| {
            values.iter().map(|value| of(*value)).collect::<Vec<_>>().join(" ")
        };
        let many = [0, 512, 1023, 1024, 1_572_864, 104_857_599, 1_048_575 << 20, u64::MAX];
        assert_eq!(shown(bytes, &many), "0 512 1023 1.0K 1.5M 99.9M 1023G 15.9E");
        let many = [0, 999, 99_999, 100_000, 1_250_000, u64::MAX];
        assert_eq!(shown(count, &many), "0 999 99,999 100K 1.2M 18.4E");
        let many = [0, 999, 59_999, 60_000, 3_599_000, 86_400_000, 8_640_000_000];
        assert_eq!(shown(span, &many), "0s 0s 59s 1m 59m 1d 100d");
        assert_eq!(shown(left, &[0, 1, 60_000, 3_600_001]), "0s 1s 1m 00s 1h 00m");
        let many = [0, 999, 1_000, 99_999, 150_000, 2_500_000];
        assert_eq!(shown(latency, &many), "0us 999us 1.0ms 99.9ms 150ms 2.5s");
    }
}
