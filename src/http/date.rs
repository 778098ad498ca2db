//! The date as HTTP writes it (IMF-fixdate, RFC 9110 5.6.7). Owns the calendar; knows no clock.

const DAYS: [&[u8; 3]; 7] = [b"Thu", b"Fri", b"Sat", b"Sun", b"Mon", b"Tue", b"Wed"];
const MONTHS: [&[u8; 3]; 12] = [
    b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec",
];
const SECONDS_A_DAY: u64 = 24 * 60 * 60;
/// The end of the year 9999: later years do not fit the four digits.
const SECONDS_MAX: u64 = 253_402_300_799;

/// A second as text, which is written again only when the second changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Date {
    second: u64,
    text: [u8; 29],
}

impl Date {
    /// The second of that moment, in milliseconds since 1970.
    pub fn at(unix_ms: u64) -> Date {
        let second = (unix_ms / 1000).min(SECONDS_MAX);
        Date { second, text: written(second) }
    }

    /// Moves on to another moment.
    pub fn set(&mut self, unix_ms: u64) {
        if self.second != (unix_ms / 1000).min(SECONDS_MAX) {
            *self = Date::at(unix_ms);
        }
    }

    /// `Sun, 06 Nov 1994 08:49:37 GMT`
    pub fn text(&self) -> &[u8] {
        &self.text
    }
}

fn written(second: u64) -> [u8; 29] {
    let days = second / SECONDS_A_DAY;
    let (year, month, day) = civil(days);
    let time = second % SECONDS_A_DAY;
    let mut text = *b"Thu, 00 Jan 0000 00:00:00 GMT";
    text[..3].copy_from_slice(DAYS[(days % 7) as usize]);
    text[8..11].copy_from_slice(MONTHS[month as usize]);
    for (place, number) in [
        (5, day),
        (12, year / 100),
        (14, year % 100),
        (17, time / 3600),
        (20, time / 60 % 60),
        (23, time % 60),
    ] {
        text[place] = b'0' + (number / 10) as u8;
        text[place + 1] = b'0' + (number % 10) as u8;
    }
    text
}

/// Year, month (from 0) and day (from 1) of a number of days since 1970.
fn civil(mut days: u64) -> (u64, u64, u64) {
    // Whole cycles of 400 years first, so that what is left is a short walk.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= days_of_year(year) {
        days -= days_of_year(year);
        year += 1;
    }
    let mut month = 0;
    while days >= days_of_month(year, month) {
        days -= days_of_month(year, month);
        month += 1;
    }
    (year, month, days + 1)
}

const fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

const fn days_of_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

const fn days_of_month(year: u64, month: u64) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_written_as_the_calendar_has_them() {
        for (second, wanted) in [
            (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (784_111_777, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (951_782_399, "Mon, 28 Feb 2000 23:59:59 GMT"),
            (951_782_400, "Tue, 29 Feb 2000 00:00:00 GMT"),
            (1_709_251_199, "Thu, 29 Feb 2024 23:59:59 GMT"),
            (4_107_542_399, "Sun, 28 Feb 2100 23:59:59 GMT"),
            (4_107_542_400, "Mon, 01 Mar 2100 00:00:00 GMT"),
            (253_402_300_799, "Fri, 31 Dec 9999 23:59:59 GMT"),
            (u64::MAX / 1001, "Fri, 31 Dec 9999 23:59:59 GMT"),
        ] {
            let date = Date::at(second * 1000 + 999);
            assert_eq!(std::str::from_utf8(date.text()), Ok(wanted));
        }
    }

    #[test]
    fn a_kept_date_moves_on_with_the_second() {
        let mut date = Date::at(999);
        date.set(1_000);
        assert_eq!(date, Date::at(1_500));
        assert_ne!(date, Date::at(0));
    }
}
