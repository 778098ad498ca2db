//! Times and sizes with their units, as settings and flags write them: `"3s"`, `"48MiB"`. Owns the units
//! and the sentences about amounts that cannot be read; which amounts fit a setting is up to its kind.

/// A unit, and how many of the smallest one it is.
type Unit = (&'static str, u64);

/// Amounts of one kind: what their units are, from the smallest to the largest.
pub struct Units {
    shown: &'static [Unit],
    /// Other ways to write the units. Letters may be small or capital where `any_case` says so.
    also: &'static [Unit],
    any_case: bool,
    /// An amount as an example.
    example: &'static str,
    /// Units that mean different things to different people, and what to write instead.
    unclear: &'static [(&'static str, &'static str)],
}

/// Times, in milliseconds.
pub const TIMES: Units = Units {
    shown: &[("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)],
    also: &[],
    any_case: false,
    example: "3s",
    unclear: &[("M", "m"), ("min", "m"), ("sec", "s"), ("S", "s"), ("us", "ms")],
};

/// Sizes, in bytes. Each unit is 1024 of the one before.
pub const SIZES: Units = Units {
    shown: &[("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)],
    also: &[("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("T", 1 << 40)],
    any_case: true,
    example: "48MiB",
    unclear: &[("kB", "KiB"), ("MB", "MiB"), ("GB", "GiB"), ("TB", "TiB")],
};

impl Units {
    /// Reads a whole number and a unit, such as `3s`; the amount is in the smallest unit.
    ///
    /// # Errors
    /// What is wrong with it, to follow the text: `, which has no unit: write "3s"`.
    pub fn read(&self, text: &str) -> Result<u64, String> {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..end], &text[end..]);
        if text.starts_with('-') {
            return Err(", which is below zero".to_owned());
        }
        if number.is_empty() {
            return Err(format!(", which is no amount: write one such as \"{}\"", self.example));
        }
        let size = self.size_of(number, unit)?;
        if number.contains('.') {
            return Err(self.fraction(number, size));
        }
        let amount = number.parse().ok().and_then(|number: u64| number.checked_mul(size));
        amount.ok_or_else(|| ", which is too large".to_owned())
    }

    fn size_of(&self, number: &str, unit: &str) -> Result<u64, String> {
        let same = |known: &str, unit: &str| match self.any_case {
            true => known.eq_ignore_ascii_case(unit),
            false => known == unit,
        };
        if let Some((_, size)) = self.shown.iter().chain(self.also).find(|it| same(it.0, unit)) {
            return Ok(*size);
        }
        if unit.is_empty() {
            let smallest = self.shown[0].0;
            return Err(format!(", which has no unit: write \"{number}{smallest}\" or {number}"));
        }
        if let Some((_, instead)) = self.unclear.iter().find(|it| same(it.0, unit)) {
            return Err(format!(", whose unit is unclear: write \"{number}{instead}\""));
        }
        let names: Vec<&str> = self.shown.iter().map(|unit| unit.0).collect();
        Err(format!(", whose unit is none of {}: write \"{}\"", names.join(", "), self.example))
    }

    /// What to write instead of a fraction: the same amount in a smaller unit, if it is whole there.
    fn fraction(&self, number: &str, size: u64) -> String {
        let (whole, part) = number.split_once('.').unwrap_or((number, ""));
        let whole = || {
            let scale = 10_u128.checked_pow(u32::try_from(part.len()).ok()?)?;
            let tenths = format!("{whole}{part}").parse::<u128>().ok()?;
            let amount = tenths.checked_mul(u128::from(size))?;
            u64::try_from(amount / scale).ok().filter(|_| amount.is_multiple_of(scale))
        };
        let cure = whole().map(|amount| format!(": write {}", self.show(amount)));
        format!(", which is a fraction{}", cure.unwrap_or_default())
    }

    /// The amount as the file writes it: in the largest unit of which it is a whole number, and zero, which
    /// is the same in each of them, without any.
    pub fn show(&self, amount: u64) -> String {
        match amount {
            0 => "0".to_owned(),
            _ => format!("\"{}\"", self.bare(amount)),
        }
    }

    /// The same without quotes.
    pub fn bare(&self, amount: u64) -> String {
        let whole = self.shown.iter().rev().find(|unit| amount.is_multiple_of(unit.1));
        let (name, size) = whole.unwrap_or(&self.shown[0]);
        if amount == 0 { "0".to_owned() } else { format!("{}{name}", amount / size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amount_is_a_whole_number_with_its_unit() {
        for (text, ms) in [
            ("250ms", 250),
            ("3s", 3000),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("30d", 2_592_000_000),
            ("0s", 0),
            ("007ms", 7),
        ] {
            assert_eq!(TIMES.read(text), Ok(ms), "{text}");
        }
        for (text, bytes) in [
            ("1B", 1),
            ("8K", 8192),
            ("8KiB", 8192),
            ("48M", 48 << 20),
            ("48MiB", 48 << 20),
            ("48m", 48 << 20),
            ("1g", 1 << 30),
            ("2TiB", 2 << 40),
        ] {
            assert_eq!(SIZES.read(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn an_amount_that_cannot_be_read_is_told_with_one_that_can() {
        for (units, text, said) in [
            (&TIMES, "", ", which is no amount: write one such as \"3s\""),
            (&TIMES, "s", ", which is no amount: write one such as \"3s\""),
            (&TIMES, "soon", ", which is no amount: write one such as \"3s\""),
            (&TIMES, "-3s", ", which is below zero"),
            (&TIMES, "3000", ", which has no unit: write \"3000ms\" or 3000"),
            (&TIMES, "3x", ", whose unit is none of ms, s, m, h, d: write \"3s\""),
            (&TIMES, "3 s", ", whose unit is none of ms, s, m, h, d: write \"3s\""),
            (&TIMES, "1m30s", ", whose unit is none of ms, s, m, h, d: write \"3s\""),
            (&TIMES, "3min", ", whose unit is unclear: write \"3m\""),
            (&TIMES, "3M", ", whose unit is unclear: write \"3m\""),
            (&TIMES, "1.5s", ", which is a fraction: write \"1500ms\""),
            (&TIMES, "0.5m", ", which is a fraction: write \"30s\""),
            (&TIMES, "0.5ms", ", which is a fraction"),
            (&TIMES, "1.2.3s", ", which is a fraction"),
            (&TIMES, "99999999999999999999s", ", which is too large"),
            (&TIMES, "9999999999999999999d", ", which is too large"),
            (&SIZES, "48MB", ", whose unit is unclear: write \"48MiB\""),
            (&SIZES, "1.5GiB", ", which is a fraction: write \"1536MiB\""),
            (&SIZES, "48µ", ", whose unit is none of B, KiB, MiB, GiB, TiB: write \"48MiB\""),
            (&SIZES, "48", ", which has no unit: write \"48B\" or 48"),
            (&SIZES, "99999999T", ", which is too large"),
        ] {
            assert_eq!(units.read(text), Err(said.to_owned()), "{text}");
        }
    }

    #[test]
    fn an_amount_is_shown_as_it_can_be_read() {
        for (units, amount, shown) in [
            (&TIMES, 0, "0"),
            (&TIMES, 11, "\"11ms\""),
            (&TIMES, 5000, "\"5s\""),
            (&TIMES, 90_000, "\"90s\""),
            (&TIMES, 3_600_000, "\"1h\""),
            (&SIZES, 1025, "\"1025B\""),
            (&SIZES, 48 << 20, "\"48MiB\""),
            (&SIZES, i64::MAX as u64, "\"9223372036854775807B\""),
        ] {
            assert_eq!(units.show(amount), shown);
            if amount > 0 {
                assert_eq!(units.read(&units.bare(amount)), Ok(amount));
            }
        }
    }
}
