//! Where several registrations of one program stand, balancer by balancer. Owns the line that tells it. Pure:
//! it is told what each of them says, and says itself when there is something new.

use std::fmt::Write;

use super::backend::Notice;

/// One registration, as it stands.
#[derive(Clone, PartialEq, Eq, Debug)]
enum State {
    /// It has yet to say anything.
    New,
    Registered,
    Unregistered,
    /// Not registered, for this reason; it is tried again.
    Apart(String),
    /// It cannot be registered there as things are.
    Barred(String),
}

/// A balancer and what is registered there.
struct Balancer {
    address: String,
    states: Vec<State>,
    told: String,
}

/// The registrations of all balancers: the same ones at each.
pub struct Board {
    /// What each registers.
    names: Vec<String>,
    balancers: Vec<Balancer>,
}

/// A line about one balancer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    pub text: String,
    /// Whether something that should be registered there is not.
    pub is_trouble: bool,
}

impl Board {
    pub fn new(balancers: &[String], names: Vec<String>) -> Board {
        let balancer = |address: &String| Balancer {
            address: address.clone(),
            states: vec![State::New; names.len()],
            told: String::new(),
        };
        Board { balancers: balancers.iter().map(balancer).collect(), names }
    }

    /// What a registration says. Returns the new line of its balancer, if that has changed.
    pub fn said(&mut self, balancer: usize, which: usize, notice: &Notice) -> Option<Line> {
        let state = match notice {
            Notice::Registered => State::Registered,
            Notice::Unregistered => State::Unregistered,
            Notice::Failed { why, .. } => State::Apart(why.clone()),
            _ => return None,
        };
        self.change(balancer, which, state)
    }

    /// A registration cannot be made as things are.
    pub fn barred(&mut self, balancer: usize, which: usize, why: &str) -> Option<Line> {
        self.change(balancer, which, State::Barred(why.to_owned()))
    }

    /// Whether no registration is left that could be made.
    pub fn is_hopeless(&self) -> bool {
        let mut all = self.balancers.iter().flat_map(|balancer| &balancer.states);
        all.all(|state| matches!(state, State::Barred(_)))
    }

    fn change(&mut self, balancer: usize, which: usize, state: State) -> Option<Line> {
        let Balancer { address, states, told } = &mut self.balancers[balancer];
        states[which] = state;
        if states.contains(&State::New) {
            // The others are about to say something, too.
            return None;
        }
        let all: Vec<(&String, &State)> = self.names.iter().zip(states.iter()).collect();
        let text = format!("{address}: {}", words(&all));
        if *told == text {
            return None;
        }
        told.clone_from(&text);
        let is_trouble = states.iter().any(|it| matches!(it, State::Apart(_) | State::Barred(_)));
        Some(Line { text, is_trouble })
    }
}

/// All registrations with their states, those of the same state together.
fn words(all: &[(&String, &State)]) -> String {
    let mut text = String::new();
    let mut rest = all.to_vec();
    while let Some(&(_, state)) = rest.first() {
        let (same, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(_, it)| *it == state);
        let names: Vec<&str> = same.iter().map(|(name, _)| name.as_str()).collect();
        let names = names.join(", ");
        let separator = if text.is_empty() { "" } else { "; " };
        let _ = match state {
            State::New => Ok(()),
            State::Registered => write!(text, "{separator}registered: {names}"),
            State::Unregistered => write!(text, "{separator}unregistered: {names}"),
            State::Apart(why) | State::Barred(why) => {
                write!(text, "{separator}not registered: {names} ({why})")
            }
        };
        rest = others;
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn failed(why: &str, ms: u64) -> Notice {
        Notice::Failed { why: why.to_owned(), again_in: Duration::from_millis(ms) }
    }

    fn board() -> Board {
        let names = ["redis port 1", "pg port 2"].map(str::to_owned);
        Board::new(&["a:1".to_owned(), "b:1".to_owned()], names.into())
    }

    #[test]
    fn each_balancer_has_one_line_that_is_told_when_it_changes() {
        let mut board = board();
        assert_eq!(board.said(0, 0, &Notice::Registered), None, "the other is on its way");
        let mut line = |balancer, which, notice: &Notice| {
            board.said(balancer, which, notice).map(|line| (line.text, line.is_trouble))
        };
        let both = Some(("a:1: registered: redis port 1, pg port 2".to_owned(), false));
        assert_eq!(line(0, 1, &Notice::Registered), both);
        assert_eq!(line(0, 1, &Notice::Hello), None);
        assert_eq!(line(1, 0, &failed("it is away", 100)), None);
        let away = "b:1: not registered: redis port 1, pg port 2 (it is away)";
        assert_eq!(line(1, 1, &failed("it is away", 90)), Some((away.to_owned(), true)));
        assert_eq!(line(1, 1, &failed("it is away", 200)), None, "that is nothing new");
        let one = "b:1: registered: redis port 1; not registered: pg port 2 (it is away)";
        assert_eq!(line(1, 0, &Notice::Registered), Some((one.to_owned(), true)));
        let one = "a:1: unregistered: redis port 1; registered: pg port 2";
        assert_eq!(line(0, 0, &Notice::Unregistered), Some((one.to_owned(), false)));
    }

    #[test]
    fn it_is_hopeless_once_all_are_barred() {
        let mut board = board();
        for (balancer, which) in [(0, 0), (0, 1), (1, 0)] {
            board.barred(balancer, which, "no secret");
            assert!(!board.is_hopeless());
        }
        let line = board.barred(1, 1, "no secret").unwrap();
        assert_eq!(line.text, "b:1: not registered: redis port 1, pg port 2 (no secret)");
        assert!(board.is_hopeless());
        board.said(0, 0, &Notice::Registered);
        assert!(!board.is_hopeless());
    }
}
