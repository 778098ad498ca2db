//! The question before a drain: how long the sessions of a backend may go on. Pure: a key comes in, an answer
//! goes out.

use std::time::Duration;

use super::press::Press;
use crate::cli::duration;
use crate::control::verbs::DRAIN_MAX;

/// The deadline that does not come.
pub const NEVER: &str = "never";
/// The deadline that has come.
const NOW: &str = "now";
/// Limit on the letters of a deadline.
const LETTERS_MAX: usize = 12;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    pub backend: String,
    /// As typed: `30s`.
    pub deadline: String,
    /// Nobody has typed yet. The first letter then begins a new deadline.
    pub untouched: bool,
    /// Why what was typed will not do.
    pub fault: Option<String>,
}

/// What a key came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    Open,
    No,
    /// Drain it. What is left after so long is cut; `None`: never.
    After(Option<Duration>),
}

impl Question {
    /// `default_ms` is the deadline that is offered.
    pub fn new(backend: String, default_ms: u64) -> Question {
        Question { backend, deadline: written(default_ms), untouched: true, fault: None }
    }

    pub fn press(&mut self, key: Press) -> Answer {
        match key {
            Press::Back => return Answer::No,
            Press::Enter | Press::Char('y' | 'Y') => return self.answer(),
            Press::Char('q') => return Answer::No,
            Press::Char(letter) => self.write(letter),
            Press::Erase => {
                self.deadline.pop();
            }
            _ => return Answer::Open,
        }
        (self.untouched, self.fault) = (false, None);
        Answer::Open
    }

    fn write(&mut self, letter: char) {
        if self.untouched {
            self.deadline.clear();
        }
        if self.deadline.len() < LETTERS_MAX && letter.is_ascii_graphic() {
            self.deadline.push(letter);
        }
    }

    fn answer(&mut self) -> Answer {
        match self.lasts() {
            Ok(lasts) => return Answer::After(lasts),
            Err(fault) => self.fault = Some(fault),
        }
        Answer::Open
    }

    /// What has been typed; `None` means never.
    ///
    /// # Errors
    /// What a deadline looks like.
    pub fn lasts(&self) -> Result<Option<Duration>, String> {
        if self.deadline == NEVER {
            return Ok(None);
        }
        if self.deadline == NOW {
            return Ok(Some(Duration::ZERO));
        }
        match duration(&self.deadline) {
            Ok(lasts) if lasts <= DRAIN_MAX => Ok(Some(lasts)),
            Ok(_) => Err("at most 24h, or never".to_owned()),
            Err(_) if self.deadline.is_empty() => {
                Err("say how long: 30s, 5m, 1h, now, never".to_owned())
            }
            Err(_) => Err(format!("`{}` is no time: 30s, 5m, now, never", self.deadline)),
        }
    }
}

/// A time as it is typed, exact.
fn written(ms: u64) -> String {
    match ms {
        _ if !ms.is_multiple_of(1000) => format!("{ms}ms"),
        _ if ms > 0 && ms.is_multiple_of(3_600_000) => format!("{}h", ms / 3_600_000),
        _ if ms > 0 && ms.is_multiple_of(60_000) => format!("{}m", ms / 60_000),
        _ => format!("{}s", ms / 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(keys: &str) -> (Question, Answer) {
        let mut question = Question::new("b1".into(), 30_000);
        for key in keys.chars() {
            question.press(if key == '<' { Press::Erase } else { Press::Char(key) });
        }
        let answer = question.press(Press::Enter);
        (question, answer)
    }

    #[test]
    fn the_deadline_is_offered_replaced_by_the_first_letter_or_erased() {
        let after = |ms| Answer::After(Some(Duration::from_millis(ms)));
        for (keys, answer) in [
            ("", after(30_000)),
            ("90", after(90_000)),
            ("5m", after(300_000)),
            ("1.5h", after(5_400_000)),
            ("250ms", after(250)),
            ("0", after(0)),
            ("24h", after(86_400_000)),
            ("now", after(0)),
            ("never", Answer::After(None)),
            ("n", Answer::Open),
            ("<", after(30_000)),
            ("<<5s", after(35_000)),
            ("<<<", Answer::Open),
            ("25h", Answer::Open),
            ("5x", Answer::Open),
            ("-1", Answer::Open),
            ("99999999999999999999", Answer::Open),
        ] {
            assert_eq!(typed(keys).1, answer, "{keys}");
        }
        let said = |keys| typed(keys).0.fault.unwrap();
        assert_eq!(said("5x"), "`5x` is no time: 30s, 5m, now, never");
        assert_eq!(said("<<<"), "say how long: 30s, 5m, 1h, now, never");
        assert_eq!(said("25h"), "at most 24h, or never");
    }

    #[test]
    fn what_is_offered_is_what_is_set() {
        for (ms, text) in [
            (0, "0s"),
            (250, "250ms"),
            (30_000, "30s"),
            (90_000, "90s"),
            (120_000, "2m"),
            (7_200_000, "2h"),
        ] {
            assert_eq!(Question::new("b1".into(), ms).deadline, text);
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)));
        }
    }

    #[test]
    fn escape_and_q_drain_nothing_and_y_is_a_yes() {
        for key in [Press::Back, Press::Char('q')] {
            assert_eq!(Question::new("b1".into(), 0).press(key), Answer::No);
        }
        let yes = Question::new("b1".into(), 5000).press(Press::Char('y'));
        assert_eq!(yes, Answer::After(Some(Duration::from_secs(5))));
    }
}
