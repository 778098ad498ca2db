//! Splicing without a kernel: pipes on loan, steps that wait for their time, and what a step moves
//! from one socket to the other. Plays `worker::tcp::splices` and `ring::pipe`; a pipe holds
//! numbers of bytes, whose places determine their content.

use std::time::Duration;

use nix::errno::Errno;

use lb::base::time::Now;
use lb::proxy::{Side, Splice};
use lb::worker::slots::Key;

use super::law::{self, check};
use super::net::{Conn, Read};
use super::random::Random;

/// How long `When::Soon` waits in `worker::tcp::splices`.
const MOMENT: Duration = Duration::from_micros(200);
/// How long `When::Later` waits.
const WHILE: Duration = Duration::from_millis(20);

/// A step: the session and the side that is read from.
pub type Step = (Key, Side);

/// A pipe between two sockets.
struct Pipe {
    step: Step,
    /// The place of the first byte held, in the source's stream.
    from: u64,
    held: u64,
}

/// The properties of a run's pipes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// How many pipes there are.
    pub pipes: usize,
    /// The capacity of each in bytes.
    pub pipe_bytes: u64,
    /// How many bytes one step moves.
    pub step_bytes: u64,
}

pub struct Pipes {
    bounds: Bounds,
    lent: Vec<Pipe>,
    /// Steps that wait for the next turn, or for a moment to pass.
    waiting: Vec<(Step, Now)>,
}

/// The result of a step.
pub struct Outcome {
    /// How many bytes have left the source.
    pub taken: u64,
    pub moved: u64,
    pub held: u64,
    pub how: Splice,
}

impl Pipes {
    pub fn new(bounds: Bounds) -> Pipes {
        Pipes { bounds, lent: Vec::new(), waiting: Vec::new() }
    }

    /// Makes sure that the flow has a pipe; false if none can be had.
    pub fn lend(&mut self, step: Step) -> bool {
        let has = self.lent.iter().any(|pipe| pipe.step == step);
        let may = self.lent.len() < self.bounds.pipes;
        if !has && may {
            self.lent.push(Pipe { step, from: 0, held: 0 });
        }
        has || may
    }

    /// The flow no longer needs its pipe; returns how many bytes went with it.
    pub fn end(&mut self, step: Step) -> u64 {
        let place = self.lent.iter().position(|pipe| pipe.step == step);
        place.map_or(0, |place| self.lent.swap_remove(place).held)
    }

    pub fn later(&mut self, step: Step, now: Now) {
        self.waiting.push((step, now.plus(WHILE)));
    }

    pub fn in_next_turn(&mut self, step: Step, now: Now) {
        self.waiting.push((step, now));
    }

    pub fn soon(&mut self, step: Step, now: Now) {
        self.waiting.push((step, now.plus(MOMENT)));
    }

    /// Forgets a step that has not begun; false if none waits here.
    pub fn forget(&mut self, step: Step) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|(waiting, _)| *waiting != step);
        self.waiting.len() < before
    }

    pub fn next_at(&self) -> Option<Now> {
        self.waiting.iter().map(|(_, at)| *at).min()
    }

    /// Takes a step whose time has come.
    pub fn pop_due(&mut self, now: Now) -> Option<Step> {
        let place = self.waiting.iter().position(|(_, at)| now >= *at)?;
        Some(self.waiting.swap_remove(place).0)
    }

    /// How many bytes are between the two sockets.
    pub fn held(&self, step: Step) -> u64 {
        self.lent.iter().find(|pipe| pipe.step == step).map_or(0, |pipe| pipe.held)
    }

    /// Whether anything is left of this session.
    pub fn works_for(&self, key: Key) -> bool {
        self.waiting.iter().any(|((waiting, _), _)| *waiting == key)
    }

    /// The flows that have a pipe.
    pub fn lent(&self) -> impl Iterator<Item = Step> + '_ {
        self.lent.iter().map(|pipe| pipe.step)
    }

    /// Takes a step between the two sockets, which sometimes moves less than it could.
    pub fn step(
        &mut self,
        step: Step,
        source: usize,
        sink: usize,
        conns: &mut [Conn],
        random: &mut Random,
    ) -> Outcome {
        let bounds = self.bounds;
        let pipe = self.lent.iter_mut().find(|pipe| pipe.step == step);
        let Some(pipe) = pipe else {
            panic!("broken law: {}: {step:?} has no pipe", law::PIPES);
        };
        let (mut taken, mut moved) = (0, 0);
        let how = loop {
            if moved >= bounds.step_bytes {
                break Splice::Moved;
            }
            if pipe.held == 0 {
                pipe.from = conns[source].inward.read;
                match conns[source].read(bounds.pipe_bytes.min(random.any_size(1 << 20))) {
                    Read::Bytes(count) => (pipe.held, taken) = (count, taken + count),
                    Read::Later => break Splice::Empty,
                    Read::End => break Splice::Ended,
                    Read::Failed(errno) => break Splice::SourceFailed(errno),
                }
            }
            match pipe.empty(&mut conns[sink], random) {
                Ok(count) => moved += count,
                Err(Errno::EAGAIN) => break Splice::Full,
                Err(errno) => break Splice::SinkFailed(errno),
            }
        };
        Outcome { taken, moved, held: pipe.held, how }
    }
}

impl Pipe {
    fn empty(&mut self, sink: &mut Conn, random: &mut Random) -> Result<u64, Errno> {
        let place = sink.outward.written;
        let count =
            sink.write(if random.half() { self.held } else { random.any_size(self.held) })?;
        if count == 0 {
            return Err(Errno::EAGAIN);
        }
        let right = sink.outward_stream().from == self.step.1 && place == self.from;
        check(right, law::BYTES, || format!("{:?}: {} is put at {place}", self.step, self.from));
        (self.from, self.held) = (self.from + count, self.held - count);
        Ok(count)
    }
}
