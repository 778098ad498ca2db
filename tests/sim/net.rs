//! The network: connections with bounded buffers at both ends, on which bytes, ends and resets
//! travel at their own pace. Owns what each end's socket would answer; does not decide when.

use std::time::Duration;

use nix::errno::Errno;

use lb::base::time::Now;
use lb::proxy::Side;
use lb::proxy::outlook::Outlook;

use super::content::Stream;
use super::random::Random;

/// A silent host is given up by the kernel after this long when nothing is queued for it …
pub const KEEPALIVE: Duration = Duration::from_secs(60);
/// … and when something is (`net.ipv4.tcp_retries2`).
const RETRANSMISSIONS: Duration = Duration::from_secs(924);

/// One direction: numbers of bytes, whose places determine their content.
#[derive(Debug)]
pub struct Pipe {
    /// Taken by the sender's kernel.
    pub written: u64,
    /// In the receiver's kernel.
    pub arrived: u64,
    pub read: u64,
    /// The sender has finished.
    pub finished: bool,
    pub end_arrived: bool,
    /// The bound of each end's buffer, in bytes.
    window: u64,
}

/// A connection between the balancer and a peer.
#[derive(Debug)]
pub struct Conn {
    pub user: usize,
    /// Which side of the session the peer is.
    pub side: Side,
    /// From the peer to the balancer.
    pub inward: Pipe,
    /// From the balancer to the peer.
    pub outward: Pipe,
    /// What the balancer's socket has to report, once.
    error: Option<Errno>,
    /// Nothing moves any more.
    pub broken: bool,
    closed: bool,
    reset_to_peer: bool,
    reset_from_peer: Option<Errno>,
    peer_closed: bool,
    peer_saw_reset: bool,
    /// The peer has fallen silent.
    pub silent_since: Option<Now>,
}

/// The result of a read at one end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Read {
    Bytes(u64),
    End,
    Failed(Errno),
    /// Nothing yet.
    Later,
}

impl Pipe {
    fn new(window: u64) -> Pipe {
        Pipe { written: 0, arrived: 0, read: 0, finished: false, end_arrived: false, window }
    }

    fn on_its_way(&self) -> u64 {
        self.written - self.arrived
    }

    pub fn unread(&self) -> u64 {
        self.arrived - self.read
    }

    fn room(&self) -> u64 {
        self.window - self.on_its_way()
    }

    fn travel(&mut self, random: &mut Random) -> bool {
        let most = self.on_its_way().min(self.window.saturating_sub(self.unread()));
        if most > 0 {
            self.arrived += if random.half() { most } else { random.between(1, most) };
            // Often with the last bytes, in one segment.
            self.end_arrived = self.finished && self.on_its_way() == 0 && random.half();
            return true;
        }
        let ends = self.finished && self.on_its_way() == 0 && !self.end_arrived;
        self.end_arrived |= ends;
        ends
    }
}

impl Conn {
    pub fn new(user: usize, side: Side, window_in: u64, window_out: u64) -> Conn {
        Conn {
            user,
            side,
            inward: Pipe::new(window_in),
            outward: Pipe::new(window_out),
            error: None,
            broken: false,
            closed: false,
            reset_to_peer: false,
            reset_from_peer: None,
            peer_closed: false,
            peer_saw_reset: false,
            silent_since: None,
        }
    }

    pub fn inward_stream(&self) -> Stream {
        Stream { user: self.user, from: self.side }
    }

    pub fn outward_stream(&self) -> Stream {
        Stream { user: self.user, from: self.side.other() }
    }

    /// Moves what is under way; false if nothing can move.
    pub fn travel(&mut self, now: Now, random: &mut Random) -> bool {
        if self.broken {
            return false;
        }
        if let Some(at) = self.gives_up_at() {
            if now >= at {
                self.fail(Errno::ETIMEDOUT);
            }
            return now >= at;
        }
        let moved = self.inward.travel(random) | self.outward.travel(random);
        if self.closed && self.inward.unread() > 0 {
            self.reset_to_peer = true;
        }
        if self.peer_closed && self.outward.unread() > 0 {
            self.reset_from_peer = Some(Errno::ECONNRESET);
        }
        if self.reset_to_peer {
            self.broken = true;
            self.peer_saw_reset = true;
            return true;
        }
        // A reset overtakes nothing that was sent before it, but may find it lost.
        if let Some(errno) = self.reset_from_peer
            && (!moved || random.half())
        {
            self.fail(errno);
            return true;
        }
        moved
    }

    /// When the balancer's kernel gives up a silent peer by itself.
    pub fn gives_up_at(&self) -> Option<Now> {
        let patience = if self.outward.on_its_way() == 0 { KEEPALIVE } else { RETRANSMISSIONS };
        self.silent_since.filter(|_| !self.broken).map(|since| since.plus(patience))
    }

    /// What the balancer's kernel says about its send queue.
    pub fn outlook(&self, now: Now) -> Outlook {
        let fin = self.outward.finished && !self.outward.end_arrived;
        let queued = self.outward.on_its_way() as u32 + u32::from(fin);
        if queued == 0 {
            return Outlook::default();
        }
        Outlook {
            queued,
            acknowledged: self.outward.arrived,
            dead: self.broken,
            owed: self.silent_since.is_some(),
            owed_for: Duration::ZERO,
            heard_ago: self.silent_since.map_or(Duration::ZERO, |since| now.since(since)),
        }
    }

    /// How many bytes the balancer has sent that the peer's kernel has not got.
    pub fn undelivered(&self) -> u64 {
        self.outward.on_its_way()
    }

    /// Whether nothing will ever move here again.
    pub fn is_over(&self) -> bool {
        let quiet = |pipe: &Pipe| pipe.finished && pipe.end_arrived && pipe.unread() == 0;
        self.closed && (self.broken || quiet(&self.inward) && quiet(&self.outward))
    }

    fn fail(&mut self, errno: Errno) {
        self.error = Some(errno);
        self.broken = true;
        self.peer_saw_reset = true;
    }
}

/// The balancer's socket.
impl Conn {
    pub fn is_readable(&self) -> bool {
        self.inward.unread() > 0 || self.inward.end_arrived || self.broken
    }

    /// Whether only the end is left to read.
    pub fn has_ended(&self) -> bool {
        self.inward.unread() == 0 && self.is_readable()
    }

    pub fn read(&mut self, max: u64) -> Read {
        if self.inward.unread() > 0 {
            let count = self.inward.unread().min(max);
            self.inward.read += count;
            return Read::Bytes(count);
        }
        match self.error.take() {
            Some(errno) => Read::Failed(errno),
            None if self.broken || self.inward.end_arrived => Read::End,
            None => Read::Later,
        }
    }

    pub fn is_writable(&self) -> bool {
        self.broken || self.outward.room() > 0
    }

    /// Whether poll(2) would call it writable: a third of its buffer is empty.
    pub fn is_roomy(&self) -> bool {
        self.broken || self.outward.room() >= self.outward.window.div_ceil(3)
    }

    /// Takes up to `max` bytes to send; returns how many, or why none.
    pub fn write(&mut self, max: u64) -> Result<u64, Errno> {
        if self.broken {
            return Err(self.error.take().unwrap_or(Errno::EPIPE));
        }
        let count = self.outward.room().min(max);
        self.outward.written += count;
        Ok(count)
    }

    /// A send that had made progress swallows the error.
    pub fn forget_error(&mut self) {
        self.error = None;
    }

    pub fn finish_writing(&mut self) {
        self.outward.finished = true;
    }

    /// Closes the socket. Unread bytes make that a reset, as tcp(7) says.
    pub fn close(&mut self, reset: bool) {
        self.closed = true;
        if reset || self.inward.unread() > 0 {
            self.reset_to_peer = true;
        } else {
            self.outward.finished = true;
        }
    }
}

/// The peer's socket.
impl Conn {
    pub fn peer_can_write(&self) -> bool {
        !self.broken && !self.peer_closed && self.inward.room() > 0
    }

    pub fn peer_write(&mut self, max: u64) -> u64 {
        let count = self.inward.room().min(max);
        self.inward.written += count;
        count
    }

    pub fn peer_finish(&mut self) {
        self.inward.finished = true;
    }

    pub fn peer_can_read(&self) -> bool {
        self.outward.unread() > 0 || self.outward.end_arrived || self.peer_saw_reset
    }

    pub fn peer_read(&mut self, max: u64) -> Read {
        if self.outward.unread() > 0 {
            let count = self.outward.unread().min(max);
            self.outward.read += count;
            return Read::Bytes(count);
        }
        if self.peer_saw_reset {
            return Read::Failed(Errno::ECONNRESET);
        }
        if self.outward.end_arrived { Read::End } else { Read::Later }
    }

    /// Ends both ways at once: what comes now is answered with a reset.
    pub fn peer_close(&mut self) {
        self.peer_closed = true;
        self.inward.finished = true;
    }

    pub fn peer_reset(&mut self, errno: Errno) {
        self.peer_closed = true;
        self.reset_from_peer = Some(errno);
    }

    pub fn peer_falls_silent(&mut self, now: Now) {
        self.silent_since = Some(now);
    }
}
