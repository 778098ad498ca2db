//! The ring without a kernel: operations that the shell would have submitted, the blocks posted for
//! receives, and completions in an order that is legal for each operation and arbitrary between
//! them. What it may do follows the manual pages and what the real one was seen to do: cancels come
//! too late or find nothing, sends stop short, receives end early, blocks run out before a socket
//! is looked at.

use std::collections::VecDeque;

use nix::errno::Errno;

use lb::base::time::Now;
use lb::proxy::{Intake, Received, Side};
use lb::ring::pool::{Buf, Class, Outgoing, Pool, Stock};
use lb::worker::slots::Key;

use super::law::{self, check};
use super::net::{Conn, Read};
use super::random::Random;

/// One block in four is never posted (`ring::provided`).
const WRITTEN_SHARE: usize = 4;
const WRITTEN_SHARE_OF_RESERVE: usize = 2;

/// Which operation a completion belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tag {
    pub kind: Kind,
    pub key: Key,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Connect,
    Receive(Side),
    Send(Side),
    /// The wait for a socket before a splice step from this side.
    Splice(Side),
    /// The wait for this side's socket to take more.
    Room(Side),
}

#[derive(Debug)]
pub struct Op {
    pub tag: Tag,
    pub conn: usize,
    pub work: Work,
    /// A cancel arrived and could not stop it at once.
    cancelled: bool,
    /// Took data when the end had already arrived, and lost the wake-up for that (as Linux 6.18
    /// may).
    asleep: bool,
}

#[derive(Debug)]
pub enum Work {
    Receive { how: Intake, left: u32 },
    Send { what: Outgoing, bytes: u64, taken: u64 },
    Connect { answer: Result<(), Errno>, at: Now },
    Wait { until: Until },
}

#[derive(Debug)]
pub struct Done {
    pub tag: Tag,
    pub outcome: Outcome,
}

#[derive(Debug)]
pub enum Outcome {
    Connected(Result<(), Errno>),
    Received { what: Received, more: bool, nonempty: bool },
    Sent(Result<u32, Errno>),
    Ready(Result<(), Errno>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    Readable,
    Writable,
    /// Writable as poll(2) defines it: a good part of the buffer is free.
    Roomy,
}

/// How often, per thousand, the kernel does what is legal but unkind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Temper {
    pub short_sends: u64,
    pub failed_sends: u64,
    /// Sends that are not waited for, although nothing is wrong.
    pub unwaited_sends: u64,
    /// Receives that end although nothing is wrong.
    pub early_ends: u64,
    pub late_cancels: u64,
    /// Operations that could go on and wait nevertheless.
    pub sluggish: u64,
    /// Multishot receives that sleep through an end that came with the data before it.
    pub lost_wakeups: u64,
}

/// The world that an operation works in.
pub struct Around<'a> {
    pub now: Now,
    pub pool: &'a mut Pool,
    pub conns: &'a mut Vec<Conn>,
}

/// The posted blocks of one class and stock, by the rules of `ring::provided`.
struct Provided {
    class: Class,
    stock: Stock,
    posted: VecDeque<Buf>,
    target: usize,
    posted_max: usize,
    /// The kernel has been asked to forget them.
    withdrawn: bool,
}

enum Entry {
    Start(Op),
    Cancel(Tag),
}

pub struct Kernel {
    temper: Temper,
    random: Random,
    /// By class, and the reserve.
    provided: [Provided; 4],
    submitted: VecDeque<Entry>,
    ops: Vec<Op>,
    completed: VecDeque<Done>,
    /// Connections that have been established.
    pub established: Vec<usize>,
}

impl Op {
    pub fn new(tag: Tag, conn: usize, work: Work) -> Op {
        Op { tag, conn, work, cancelled: false, asleep: false }
    }
}

impl Kernel {
    pub fn new(temper: Temper, random: Random, pool: &Pool, posted_first: usize) -> Kernel {
        Kernel {
            temper,
            random,
            provided: [
                Provided::new(Class::Small, Stock::Common, pool, posted_first),
                Provided::new(Class::Large, Stock::Common, pool, posted_first),
                Provided::new(Class::Datagram, Stock::Common, pool, posted_first),
                Provided::new(Class::Small, Stock::Reserve, pool, posted_first),
            ],
            submitted: VecDeque::new(),
            ops: Vec::new(),
            completed: VecDeque::new(),
            established: Vec::new(),
        }
    }

    pub fn submit(&mut self, op: Op) {
        self.submitted.push_back(Entry::Start(op));
    }

    pub fn cancel(&mut self, tag: Tag) {
        self.submitted.push_back(Entry::Cancel(tag));
    }

    /// Takes what was submitted, in order.
    pub fn enter(&mut self, around: &mut Around) {
        self.provided.iter_mut().rev().for_each(|provided| provided.replenish(around.pool));
        while let Some(entry) = self.submitted.pop_front() {
            match entry {
                Entry::Start(op) => self.start(op, around),
                Entry::Cancel(tag) => self.stop(tag, around),
            }
        }
    }

    /// Lets operations proceed as far as they can; false if none can.
    pub fn run(&mut self, around: &mut Around) -> bool {
        let mut able = false;
        let count = self.ops.len();
        let first = if count > 0 { self.random.below(count as u64) as usize } else { 0 };
        for number in 0..count {
            let place = (first + number) % count;
            let Some(op) = self.ops.get(place).filter(|op| op.is_able(around)) else { continue };
            able = true;
            if op.cancelled && self.random.half() {
                let op = self.ops.swap_remove(place);
                self.give_up(op);
            } else if !self.random.in_thousand(self.temper.sluggish) {
                let op = self.ops.swap_remove(place);
                self.step(op, around);
            }
        }
        able
    }

    /// Hands out completions, oldest first.
    pub fn reap(&mut self, most: usize) -> impl Iterator<Item = Done> + '_ {
        let count = self.completed.len().min(most);
        self.completed.drain(..count)
    }

    pub fn completions(&self) -> usize {
        self.completed.len()
    }

    pub fn is_idle(&self) -> bool {
        self.submitted.is_empty() && self.completed.is_empty()
    }

    /// When the next connection attempt is answered.
    pub fn next_answer(&self) -> Option<Now> {
        let answers = self.ops.iter().filter_map(|op| match op.work {
            Work::Connect { at, .. } => Some(at),
            _ => None,
        });
        answers.min()
    }

    /// Whether anything of this session is with the kernel, or on its way to or from it.
    pub fn works_for(&self, key: Key) -> bool {
        self.ops.iter().any(|op| op.tag.key == key)
            || self.completed.iter().any(|done| done.tag.key == key)
            || self.submitted.iter().any(|entry| match entry {
                Entry::Start(op) => op.tag.key == key,
                Entry::Cancel(_) => false,
            })
    }

    pub fn posted(&self, class: Class) -> usize {
        let of_it = self.provided.iter().filter(|provided| provided.class == class);
        of_it.map(|provided| provided.posted.len()).sum()
    }

    /// How many blocks are filled and not handed out yet.
    pub fn undelivered(&self) -> usize {
        let holds = |done: &&Done| {
            matches!(done.outcome, Outcome::Received { what: Received::Data(_), .. })
        };
        self.completed.iter().filter(holds).count()
    }

    /// From now on no receive finds a block: `Ring::withdraw`, or the end of a run.
    pub fn withdraw(&mut self, pool: &mut Pool) {
        for provided in &mut self.provided {
            provided.withdrawn = true;
            while let Some(buf) = provided.pop(pool) {
                pool.give_back(buf);
            }
        }
    }

    /// Blocks are posted again.
    pub fn restock(&mut self) {
        self.provided.iter_mut().for_each(|provided| provided.withdrawn = false);
    }

    /// Whether anything is under way that could send a byte, connect, or has filled a block.
    pub fn could_move(&self) -> bool {
        let moves = |work: &Work| matches!(work, Work::Send { .. } | Work::Connect { .. });
        self.ops.iter().any(|op| moves(&op.work)) || !self.is_idle()
    }

    fn start(&mut self, op: Op, around: &mut Around) {
        let tries_first = match &op.work {
            // A block is picked before the socket is looked at, even if it is empty.
            Work::Receive {
                how:
                    how @ (Intake::Once { wait_first: false, .. } | Intake::Last { wait_first: false }),
                ..
            } => {
                if self.provided[group(*how)].posted.is_empty() {
                    return self.receive_without_block(op.tag);
                }
                true
            }
            Work::Receive { .. } | Work::Connect { .. } => false,
            Work::Wait { .. } => self.random.half(),
            Work::Send { .. } => self.random.half(),
        };
        if tries_first && op.is_able(around) { self.step(op, around) } else { self.ops.push(op) }
    }

    fn stop(&mut self, tag: Tag, around: &mut Around) {
        let Some(place) = self.ops.iter().position(|op| op.tag == tag) else { return };
        let late = self.random.in_thousand(self.temper.late_cancels);
        if late && matches!(self.ops[place].work, Work::Connect { .. }) {
            let op = &mut self.ops[place];
            op.cancelled = true;
            // The answer was on its way, and overtook the cancel.
            if let Work::Connect { at, .. } = &mut op.work {
                *at = around.now;
            }
        } else if late && self.ops[place].is_able(around) {
            self.ops[place].cancelled = true;
            let op = self.ops.swap_remove(place);
            self.step(op, around);
        } else if late {
            self.ops[place].cancelled = true;
        } else {
            let op = self.ops.swap_remove(place);
            self.give_up(op);
        }
    }

    /// Ends an operation that was cancelled.
    fn give_up(&mut self, op: Op) {
        let outcome = match op.work {
            Work::Receive { .. } => received(Received::Stopped, false, false),
            Work::Send { taken: 0, .. } => Outcome::Sent(Err(Errno::ECANCELED)),
            Work::Send { taken, .. } => Outcome::Sent(Ok(taken as u32)),
            Work::Connect { .. } => Outcome::Connected(Err(Errno::ECANCELED)),
            Work::Wait { .. } => Outcome::Ready(Err(Errno::ECANCELED)),
        };
        self.complete(op.tag, outcome);
    }

    fn step(&mut self, op: Op, around: &mut Around) {
        match op.work {
            Work::Receive { .. } => self.receive(op, around),
            Work::Send { .. } => self.send(op, around),
            Work::Wait { .. } => self.complete(op.tag, Outcome::Ready(Ok(()))),
            Work::Connect { answer, .. } => {
                if answer.is_ok() {
                    self.established.push(op.conn);
                }
                self.complete(op.tag, Outcome::Connected(answer));
            }
        }
    }

    fn receive_without_block(&mut self, tag: Tag) {
        self.provided.iter_mut().for_each(Provided::ran_dry);
        self.complete(tag, received(Received::NoBuffers, false, false));
    }

    fn receive(&mut self, mut op: Op, around: &mut Around) {
        let Work::Receive { how, left } = &mut op.work else { return };
        let many = matches!(how, Intake::Many { .. });
        let provided = &mut self.provided[group(*how)];
        let class = provided.class;
        if provided.posted.is_empty() {
            return self.receive_without_block(op.tag);
        }
        if self.random.in_thousand(self.temper.early_ends) {
            return self.complete(op.tag, received(Received::Stopped, false, true));
        }
        let conn = &mut around.conns[op.conn];
        let (stream, offset) = (conn.inward_stream(), conn.inward.read);
        let most = (class.bytes() as u64).min(if many { u64::from(*left) } else { u64::MAX });
        let what = match conn.read(most) {
            Read::Later => return self.ops.push(op),
            Read::Bytes(count) => {
                *left = left.saturating_sub(count as u32);
                let mut buf = provided.pop(around.pool).expect("there is a posted block");
                let text = stream.text(offset, count as usize);
                assert_eq!(around.pool.append(&mut buf, text), count as usize);
                Received::Data(buf)
            }
            Read::End => {
                // The block that was picked is used up, or goes back where it was.
                if self.random.half() {
                    let buf = provided.pop(around.pool).expect("there is a posted block");
                    around.pool.give_back(buf);
                }
                Received::End
            }
            Read::Failed(errno) => Received::Failed(errno),
        };
        let goes_on = many && *left > 0 && matches!(what, Received::Data(_));
        let more = goes_on && !self.random.in_thousand(self.temper.early_ends);
        // The flag is a hint: bytes come and go between the read and the look.
        let nonempty = conn.is_readable() ^ self.random.in_thousand(50);
        self.complete(op.tag, received(what, more, nonempty));
        if more {
            op.asleep = conn.has_ended() && self.random.in_thousand(self.temper.lost_wakeups);
            self.ops.push(op);
        }
    }

    fn send(&mut self, mut op: Op, around: &mut Around) {
        let Work::Send { what, bytes, taken } = &mut op.work else { return };
        let conn = &mut around.conns[op.conn];
        let (stream, offset) = (conn.outward_stream(), conn.outward.written);
        if *taken == 0 && self.random.in_thousand(self.temper.failed_sends) {
            return self.complete(op.tag, Outcome::Sent(Err(Errno::ENOMEM)));
        }
        if *taken == 0 && self.temper.unwaited_sends > 0 {
            let is_unwaited = self.random.in_thousand(self.temper.unwaited_sends);
            if is_unwaited {
                return self.complete(op.tag, Outcome::Sent(Err(Errno::EAGAIN)));
            }
        }
        let left = *bytes - *taken;
        let most = if self.random.half() { left } else { self.random.between(1, left) };
        match conn.write(most) {
            Ok(count) => {
                let pieces = around.pool.pieces(*what);
                compare(pieces, *taken, count, |at| stream.text(offset + at.0, at.1));
                *taken += count;
            }
            Err(errno) if *taken == 0 => {
                return self.complete(op.tag, Outcome::Sent(Err(errno)));
            }
            Err(_) => {
                if self.random.half() {
                    conn.forget_error();
                }
                let sent = *taken as u32;
                return self.complete(op.tag, Outcome::Sent(Ok(sent)));
            }
        }
        let short = *taken > 0 && self.random.in_thousand(self.temper.short_sends);
        if *taken == *bytes || short {
            let sent = *taken as u32;
            self.complete(op.tag, Outcome::Sent(Ok(sent)));
        } else {
            self.ops.push(op);
        }
    }

    /// Goes after the completions of the same operation, anywhere among the others. When a socket
    /// has failed, the results of its operations depend on each other: one of them reports the
    /// error, or swallows it, and those that come after find an end. So these keep their order.
    fn complete(&mut self, tag: Tag, outcome: Outcome) {
        let over = |outcome: &Outcome| match outcome {
            Outcome::Sent(_) => true,
            Outcome::Received { more, .. } => !more,
            Outcome::Connected(_) | Outcome::Ready(_) => false,
        };
        let before = |done: &Done| {
            let together = over(&done.outcome) && over(&outcome) && done.tag.key == tag.key;
            done.tag == tag || together
        };
        let own = self.completed.iter().rposition(before);
        let first = own.map_or(0, |place| place + 1);
        let place = self.random.between(first as u64, self.completed.len() as u64) as usize;
        self.completed.insert(place, Done { tag, outcome });
    }
}

impl Op {
    fn is_able(&self, around: &Around) -> bool {
        let conn = &around.conns[self.conn];
        self.cancelled
            || match self.work {
                Work::Receive { .. } => conn.is_readable() && !self.asleep,
                Work::Send { .. } => conn.is_writable(),
                Work::Connect { at, .. } => around.now >= at,
                Work::Wait { until: Until::Readable } => conn.is_readable(),
                Work::Wait { until: Until::Writable } => conn.is_writable(),
                Work::Wait { until: Until::Roomy } => conn.is_roomy(),
            }
    }
}

impl Provided {
    fn new(class: Class, stock: Stock, pool: &Pool, first: usize) -> Provided {
        let (blocks, share) = match stock {
            Stock::Common => (pool.blocks(class), WRITTEN_SHARE),
            Stock::Reserve => (pool.reserve(), WRITTEN_SHARE_OF_RESERVE),
        };
        let posted_max = (blocks - blocks / share).max(1);
        Provided {
            class,
            stock,
            posted: VecDeque::new(),
            target: first.min(posted_max),
            posted_max,
            withdrawn: false,
        }
    }

    fn replenish(&mut self, pool: &mut Pool) {
        while !self.withdrawn && self.posted.len() < self.target {
            let Some(buf) = pool.set_aside(self.class, self.stock) else { return };
            self.posted.push_back(buf);
        }
    }

    fn pop(&mut self, pool: &mut Pool) -> Option<Buf> {
        let buf = self.posted.pop_front()?;
        pool.took(self.class, self.stock);
        Some(buf)
    }

    fn ran_dry(&mut self) {
        if self.withdrawn {
            return;
        }
        self.target = (self.target * 2).min(self.posted_max);
    }
}

/// Which posted blocks a receive takes from.
fn group(how: Intake) -> usize {
    match how {
        Intake::Many { .. } => Class::Small as usize,
        Intake::Once { class, .. } => class as usize,
        Intake::Last { .. } => Class::ALL.len(),
    }
}

fn received(what: Received, more: bool, nonempty: bool) -> Outcome {
    Outcome::Received { what, more, nonempty }
}

/// Compares `count` bytes, starting at `skip`, with what they should be: `text` returns it by place
/// and length.
fn compare<'a>(
    pieces: impl Iterator<Item = &'a [u8]>,
    skip: u64,
    count: u64,
    text: impl Fn((u64, usize)) -> &'static [u8],
) {
    let (mut skip, mut at) = (skip as usize, 0);
    for piece in pieces {
        let cut = skip.min(piece.len());
        skip -= cut;
        let piece = &piece[cut..piece.len().min(cut + count as usize - at)];
        let right = piece == text((at as u64, piece.len()));
        check(right, law::BYTES, || format!("{count} bytes are sent, wrong from {at} on"));
        at += piece.len();
    }
    check(at == count as usize, law::BYTES, || format!("{count} bytes are sent of {at}"));
}
