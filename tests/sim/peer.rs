//! The people at both ends: users and backends with habits, from diligent to rude. Owns what a peer
//! does next on its socket; sees nothing of the balancer except that socket.

use std::time::Duration;

use nix::errno::Errno;

use lb::base::time::Now;
use lb::proxy::Side;

use super::net::{Conn, Read};
use super::random::Random;

/// What the two ends of a session have to say to each other.
#[derive(Clone, Copy, Debug)]
pub enum Script {
    /// Both say everything as fast as they can.
    AtOnce { up: u64, down: u64 },
    /// One question, one answer, and so on: nothing else would reveal a lost wake-up.
    InTurns { rounds: u64, up: u64, down: u64 },
}

impl Script {
    pub fn total(self, side: Side) -> u64 {
        match (self, side) {
            (Script::AtOnce { up, .. }, Side::Client) => up,
            (Script::AtOnce { down, .. }, Side::Backend) => down,
            (Script::InTurns { rounds, up, .. }, Side::Client) => rounds * up,
            (Script::InTurns { rounds, down, .. }, Side::Backend) => rounds * down,
        }
    }

    /// How much a side may have said once it has heard `heard` bytes.
    fn allowed(self, side: Side, heard: u64) -> u64 {
        match (self, side) {
            (Script::AtOnce { .. }, _) => self.total(side),
            (Script::InTurns { rounds, up, down }, Side::Client) => {
                (heard / down + 1).min(rounds) * up
            }
            (Script::InTurns { rounds, up, down }, Side::Backend) => {
                (heard / up).min(rounds) * down
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Habits {
    pub write: Pace,
    pub read: Pace,
    /// Stops reading after a number of bytes, for some time; `None`: for ever.
    pub stall: Option<(u64, Option<Duration>)>,
    pub end: End,
    /// Leaves early.
    pub leave: Option<(When, How)>,
}

#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub bytes: u64,
    pub every: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Finishes when everything is said.
    First,
    /// Finishes when the other end has.
    Last,
    Never,
}

#[derive(Clone, Copy, Debug)]
pub enum When {
    Written(u64),
    After(Duration),
}

#[derive(Clone, Copy, Debug)]
pub enum How {
    Reset,
    /// Closes without having read everything.
    Close,
    Silent,
}

impl Habits {
    /// Whether someone like this reaches the end of a session unaided.
    pub fn are_diligent(&self) -> bool {
        let stalls_for_ever = matches!(self.stall, Some((_, None)));
        self.leave.is_none() && !stalls_for_ever && self.end != End::Never
    }
}

#[derive(Debug)]
pub struct Peer {
    pub conn: usize,
    side: Side,
    script: Script,
    habits: Habits,
    /// The earliest time of the next read; `None`: never again.
    read_at: Option<Now>,
    write_at: Now,
    leave_at: Option<Now>,
    finished: bool,
    /// How the other end's stream ended.
    pub heard_end: Option<Read>,
    pub gone: bool,
}

impl Peer {
    pub fn new(conn: usize, side: Side, script: Script, habits: Habits, now: Now) -> Peer {
        let leave_at = match habits.leave {
            Some((When::After(time), _)) => Some(now.plus(time)),
            _ => None,
        };
        Peer {
            conn,
            side,
            script,
            habits,
            read_at: Some(now),
            write_at: now,
            leave_at,
            finished: false,
            heard_end: None,
            gone: false,
        }
    }

    /// Does what is due now; false if nothing is.
    pub fn act(&mut self, now: Now, conn: &mut Conn, random: &mut Random) -> bool {
        if self.gone {
            return false;
        }
        if self.leave_at.is_some_and(|at| now >= at) {
            self.leave(now, conn);
            return true;
        }
        let read = self.may_read(conn) && self.read_at.is_some_and(|at| now >= at);
        if read {
            self.read(now, conn, random);
        }
        let write = !self.gone && self.may_write(conn) && now >= self.write_at;
        if write {
            self.write(now, conn, random);
        }
        read || write
    }

    /// When [`Peer::act`] next has something to do that is not due now.
    pub fn next_at(&self, conn: &Conn) -> Option<Now> {
        if self.gone {
            return None;
        }
        let read = self.read_at.filter(|_| self.may_read(conn));
        let write = Some(self.write_at).filter(|_| self.may_write(conn));
        [read, write, self.leave_at].into_iter().flatten().min()
    }

    fn may_read(&self, conn: &Conn) -> bool {
        self.heard_end.is_none() && conn.peer_can_read()
    }

    fn may_write(&self, conn: &Conn) -> bool {
        if self.finished || conn.broken {
            return false;
        }
        let allowed = self.script.allowed(self.side, conn.outward.read);
        conn.inward.written < allowed && conn.peer_can_write() || self.wants_to_finish(conn)
    }

    fn wants_to_finish(&self, conn: &Conn) -> bool {
        let all_said = conn.inward.written == self.script.total(self.side);
        // A peer that is not given the answer it needs to go on has nothing more to say, either.
        let cut_short = self.heard_end.is_some()
            && conn.inward.written == self.script.allowed(self.side, conn.outward.read);
        match self.habits.end {
            End::First => all_said || cut_short,
            End::Last => self.heard_end.is_some() && (all_said || cut_short),
            End::Never => false,
        }
    }

    fn read(&mut self, now: Now, conn: &mut Conn, random: &mut Random) {
        let most = random.any_size(self.habits.read.bytes);
        match conn.peer_read(most) {
            Read::Bytes(count) => {
                self.read_at = Some(now.plus(random.any_time(self.habits.read.every)));
                let heard = conn.outward.read;
                if let Some((after, time)) = self.habits.stall
                    && heard > after
                    && heard - count <= after
                {
                    self.read_at = time.map(|time| now.plus(time));
                }
            }
            Read::Later => {}
            Read::Failed(errno) => {
                self.heard_end = Some(Read::Failed(errno));
                self.gone = true;
            }
            Read::End => {
                self.heard_end = Some(Read::End);
                self.close_if_over(conn);
            }
        }
    }

    fn write(&mut self, now: Now, conn: &mut Conn, random: &mut Random) {
        self.write_at = now.plus(random.any_time(self.habits.write.every));
        let allowed = self.script.allowed(self.side, conn.outward.read);
        let left = allowed - conn.inward.written;
        if left > 0 {
            conn.peer_write(random.any_size(self.habits.write.bytes).min(left));
        }
        if let Some((When::Written(most), _)) = self.habits.leave
            && conn.inward.written >= most
        {
            return self.leave(now, conn);
        }
        if self.wants_to_finish(conn) && (left == 0 || random.half()) {
            self.finished = true;
            conn.peer_finish();
            self.close_if_over(conn);
        }
    }

    fn close_if_over(&mut self, conn: &mut Conn) {
        if self.finished && self.heard_end.is_some() {
            self.gone = true;
            conn.peer_close();
        }
    }

    fn leave(&mut self, now: Now, conn: &mut Conn) {
        self.gone = true;
        match self.habits.leave.map(|(_, how)| how) {
            Some(How::Close) => conn.peer_close(),
            Some(How::Silent) => conn.peer_falls_silent(now),
            _ => conn.peer_reset(Errno::ECONNRESET),
        }
    }
}
