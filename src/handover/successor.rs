//! The successor, as the old process sees it: its start, and what it is told and says until it serves. Owns the
//! child and the patience with it. Nothing here decides what the old process does meanwhile.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::channel::{Channel, Fault, Packet, Token};
use super::out_of_descriptors;
use super::words::{Hello, Offer, Word};
use crate::estate::Estate;
use crate::estate::ahead::Ahead;
use crate::estate::format::{NEWEST, OLDEST, State};

/// How long a successor may take from its start until it could go on: settings, rings, threads, doors.
pub const START_PATIENCE: Duration = Duration::from_secs(10);
/// How often, and how many times, to look whether a successor that is not heard of has ended.
const ENDING_LOOK_EVERY: Duration = Duration::from_millis(10);
const ENDING_LOOKS: u32 = 50;
/// How long a message may wait for a successor to make room.
const SEND_PATIENCE: Duration = Duration::from_secs(1);

/// How this program was started, so that it can be started again as it is installed then.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Program {
    /// As this process was started. Called before anything could replace the file, whose path would be
    /// `(deleted)` from then on.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn of_this_process() -> io::Result<Program> {
        Ok(Program {
            path: std::env::current_exe()?,
            arguments: std::env::args_os().skip(1).collect(),
        })
    }
}

/// A successor under way.
#[derive(Debug)]
pub struct Successor {
    child: Child,
    channel: Channel,
    /// Who takes it serves.
    token: Token,
}

/// Why a successor does not go on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// A sentence.
    pub why: String,
    /// It has not refused, but was late or died: another may be luckier.
    pub may_pass: bool,
}

impl Refusal {
    /// For a reason that stays.
    pub fn lasting(why: impl Into<String>) -> Refusal {
        Refusal { why: why.into(), may_pass: false }
    }

    /// For one that another time may not have.
    pub fn passing(why: impl Into<String>) -> Refusal {
        Refusal { why: why.into(), may_pass: true }
    }
}

impl Successor {
    /// Starts one. It inherits the log's stream, the working directory and the cores of this thread.
    ///
    /// # Errors
    /// A sentence with the cure.
    pub fn start(program: &Program) -> Result<Successor, Refusal> {
        let path = program.path.display();
        let lack = |error| Refusal::lasting(out_of_descriptors(&error));
        let (channel, other) = Channel::pair().map_err(lack)?;
        let token = Token::new().map_err(lack)?;
        let child = Command::new(&program.path)
            .args(&program.arguments)
            .stdin(Stdio::from(other))
            // The service manager's watchdog goes from one main process to the next.
            .env_remove("WATCHDOG_PID")
            .spawn()
            .map_err(|error| {
                Refusal::lasting(format!("cannot start {path}: {error}; install it again"))
            })?;
        Ok(Successor { child, channel, token })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Says hello and waits until it could go on.
    ///
    /// # Errors
    /// Why it cannot, as a sentence.
    pub fn greet(&mut self, hello: &Hello, descriptors: &[RawFd]) -> Result<Offer, Refusal> {
        let body = serde_json::to_vec(hello).map_err(|it| Refusal::lasting(it.to_string()))?;
        let sent = self.channel.send(&Word::Hello, &body, descriptors, SEND_PATIENCE);
        sent.map_err(|fault| self.failed(&fault))?;
        let packet = self.hear(START_PATIENCE)?;
        let offer: Offer = match packet.word {
            Word::Offer => serde_json::from_slice(&packet.body).map_err(|error| {
                Refusal::lasting(format!("the new process made an offer that reads {error}"))
            })?,
            word => return Err(out_of_turn(&word, "an offer")),
        };
        if !(OLDEST..=NEWEST).contains(&offer.format) {
            return Err(Refusal::lasting(format!(
                "the new process reads another format of sessions ({}) than this one writes \
                 ({OLDEST} to {NEWEST}): restart in place of upgrading",
                offer.format
            )));
        }
        Ok(offer)
    }

    /// Sends sockets ahead of everything; this process still serves.
    ///
    /// # Errors
    /// It is gone, or does not take them in time.
    pub fn send_ahead(&mut self, ahead: &Ahead<OwnedFd>) -> Result<(), Refusal> {
        let word = Word::Ahead { worker: ahead.worker, first: ahead.first };
        let all: Vec<RawFd> = ahead.sockets.as_flattened().iter().map(AsRawFd::as_raw_fd).collect();
        let sent = self.channel.send(&word, &[], &all, SEND_PATIENCE);
        sent.map_err(|fault| self.failed(&fault))
    }

    /// No more come ahead: waits until it has taken them in.
    ///
    /// # Errors
    /// What is wrong with them, or that it is gone or late.
    pub fn await_expecting(&mut self, patience: Duration) -> Result<(), Refusal> {
        let sent = self.channel.send(&Word::AllAhead, &[], &[], SEND_PATIENCE);
        sent.map_err(|fault| self.failed(&fault))?;
        match self.hear(patience)?.word {
            Word::Expecting => Ok(()),
            word => Err(out_of_turn(&word, "expecting the rest")),
        }
    }

    /// Sends everything; this process stands still.
    ///
    /// # Errors
    /// It is gone, or does not take it in time.
    pub fn leave_to(
        &mut self,
        state: &[u8],
        sockets: &[RawFd],
        patience: Duration,
    ) -> Result<(), Refusal> {
        let mut descriptors = vec![self.token.as_raw_fd()];
        descriptors.extend_from_slice(sockets);
        let sent = self.channel.send(&Word::State, state, &descriptors, patience);
        sent.map_err(|fault| self.failed(&fault))
    }

    /// Waits until it serves.
    ///
    /// # Errors
    /// Why it has not said so; it may serve all the same, which [`Successor::call_off`] finds out.
    pub fn await_running(&mut self, patience: Duration) -> Result<(), Refusal> {
        match self.hear(patience)?.word {
            Word::Running => Ok(()),
            word => Err(out_of_turn(&word, "serving")),
        }
    }

    /// Takes everything back; the successor is to [end](Successor::end). False: it has taken over, and everything
    /// is its.
    pub fn call_off(&self) -> bool {
        self.token.take()
    }

    /// Whether it is not there any more. One that ends lets go of the channel before it can be waited for, so it has a
    /// moment.
    pub fn has_ended(&mut self) -> bool {
        for _ in 0..ENDING_LOOKS {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return true;
            }
            std::thread::sleep(ENDING_LOOK_EVERY);
        }
        false
    }

    /// Ends one that was left nothing.
    pub fn end(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Tells it that it is the service manager's main process now.
    pub fn is_main(&self) {
        // If it is gone, the service manager knows.
        let _ = self.channel.send(&Word::Main, &[], &[], SEND_PATIENCE);
    }

    /// Tells it by how much counters have grown here since the state was written. False: it was not told.
    pub fn add(&self, difference: &[u8]) -> bool {
        self.channel.send(&Word::Difference, difference, &[], SEND_PATIENCE).is_ok()
    }

    /// Passes on users who have left a worker.
    ///
    /// # Errors
    /// The users: it is gone, or does not take them in time.
    pub fn pass(&self, estate: Estate<OwnedFd>) -> Result<(), Box<Estate<OwnedFd>>> {
        let (text, sockets) = State { legacy: Default::default(), estates: vec![estate] }.write();
        let raw: Vec<RawFd> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
        if self.channel.send(&Word::Late, &text, &raw, SEND_PATIENCE).is_ok() {
            return Ok(());
        }
        let back = State::read(&text, sockets).ok().and_then(|mut state| state.estates.pop());
        Err(Box::new(back.expect("what has been written reads back")))
    }

    fn hear(&mut self, patience: Duration) -> Result<Packet<Word>, Refusal> {
        match self.channel.receive(patience) {
            Ok(Packet { word: Word::No(why), .. }) => Err(Refusal::lasting(why)),
            Ok(packet) => Ok(packet),
            Err(fault) => Err(self.failed(&fault)),
        }
    }

    fn failed(&mut self, fault: &Fault) -> Refusal {
        Refusal::passing(match (fault, self.child.try_wait()) {
            (Fault::Gone, Ok(Some(status))) => {
                format!("the new process ended ({status}) before it could go on: see its log lines")
            }
            _ => format!("the new process failed: {fault}"),
        })
    }
}

fn out_of_turn(word: &Word, wanted: &str) -> Refusal {
    Refusal::lasting(format!("the new process said {word:?} in place of {wanted}"))
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;
    use crate::estate::api::UserRecord;

    #[test]
    fn users_whom_a_successor_does_not_take_any_more_come_back() {
        let (channel, other) = Channel::pair().unwrap();
        let child = Command::new("true").spawn().unwrap();
        let mut successor = Successor { child, channel, token: Token::new().unwrap() };
        let estate = || {
            let mut estate = Estate::new(3);
            estate.api.push(&UserRecord::new_zeroed());
            estate.api.add_socket(std::fs::File::open("/dev/null").unwrap().into());
            estate
        };
        assert!(successor.pass(estate()).is_ok());
        let other = Channel::over(other).unwrap();
        let Packet { word, body, descriptors } = other.receive::<Word>(SEND_PATIENCE).unwrap();
        let taken = State::read(&body, descriptors).unwrap().estates;
        assert_eq!((word, taken.len()), (Word::Late, 1));
        drop(other);
        // A process that another test has just begun may have the other end for a moment.
        let back = std::iter::repeat_with(|| successor.pass(estate()).err()).take(10_000);
        let back = back.flatten().next().unwrap();
        for estate in [taken.into_iter().next().unwrap(), *back] {
            assert_eq!((estate.worker, estate.api.len(), estate.api.sockets.len()), (3, 1, 1));
        }
        successor.end();
    }
}
