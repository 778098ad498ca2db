//! Relaying, as decisions: events in, commands out, no socket and no clock. Owns the words that the
//! protocols and the worker's shell share.

pub mod greeting;
pub mod http;
pub mod http2;
pub mod line;
pub mod outlook;
mod pace;
mod room;
pub mod tcp;
pub mod tls;
pub mod udp;

use std::time::Duration;

use nix::errno::Errno;

use crate::ring::pool::{Buf, Class, Outgoing};

/// How long a connection must be still before a receive on it that has taken data is restarted,
/// once (see [`line::Line::is_unsure`]).
pub const SECOND_LOOK: Duration = Duration::from_secs(2);

/// The two ends of a session.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    Client,
    Backend,
}

impl Side {
    pub const BOTH: [Side; 2] = [Side::Client, Side::Backend];

    pub const fn other(self) -> Side {
        match self {
            Side::Client => Side::Backend,
            Side::Backend => Side::Client,
        }
    }
}

/// What happened on one side of a session.
#[derive(Debug)]
pub enum Event {
    /// A receive delivered something. With `more` it goes on; otherwise it is over, whatever it
    /// delivered.
    Received { side: Side, what: Received, more: bool, nonempty: bool },
    /// A send is over: how many bytes the kernel took, or why it took none.
    Sent { side: Side, result: Result<u32, Errno> },
    /// The kernel has answered whether the socket on this side takes more.
    Room { side: Side },
    /// A splice step from this side to the other is over; `held` bytes are still in the pipe.
    Spliced { side: Side, moved: u64, held: usize, how: Spliced },
}

impl Event {
    /// The side that it happened on.
    pub const fn side(&self) -> Side {
        match *self {
            Event::Received { side, .. }
            | Event::Sent { side, .. }
            | Event::Room { side }
            | Event::Spliced { side, .. } => side,
        }
    }
}

/// Why a splice step stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Splice {
    /// It moved as much as one step may; there is probably more.
    Moved,
    /// The source has nothing more at the moment, and the sink has everything that came.
    Empty,
    /// The sink takes no more at the moment.
    Full,
    /// The source has ended, and the sink has everything that came.
    Ended,
    /// Reading failed; the sink has everything that came before.
    SourceFailed(Errno),
    SinkFailed(Errno),
}

/// How a splice step ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spliced {
    Step(Splice),
    /// It was cancelled before it began.
    Stopped,
    /// No pipe could be had.
    Unavailable,
}

#[derive(Debug)]
pub enum Received {
    Data(Buf),
    /// The peer has finished sending.
    End,
    /// The pool was empty; nothing was read.
    NoBuffers,
    /// It was cancelled, or ended early for a reason that loses nothing.
    Stopped,
    Failed(Errno),
}

/// What to do on one side of a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamCmd {
    Receive {
        side: Side,
        how: Intake,
    },
    CancelReceive {
        side: Side,
    },
    Send {
        side: Side,
        what: Outgoing,
    },
    CancelSend {
        side: Side,
    },
    /// Report when the socket on this side takes more. `first`: it has not been asked before.
    AwaitRoom {
        side: Side,
        first: bool,
    },
    /// Have that report come at once.
    CancelRoom {
        side: Side,
    },
    /// Tell the peer that no more will come.
    FinishWriting {
        side: Side,
    },
    /// Move bytes from this side to the other within the kernel, at the time given by `when`. One
    /// `Event::Spliced` follows, whatever happens.
    Splice {
        side: Side,
        when: When,
    },
    /// Have the splice step of this side complete at once.
    CancelSplice {
        side: Side,
    },
    /// The pipe of this side is no longer needed.
    EndSplice {
        side: Side,
    },
}

impl StreamCmd {
    /// The side that it is about.
    pub const fn side(&self) -> Side {
        match *self {
            StreamCmd::Receive { side, .. }
            | StreamCmd::CancelReceive { side }
            | StreamCmd::Send { side, .. }
            | StreamCmd::CancelSend { side }
            | StreamCmd::AwaitRoom { side, .. }
            | StreamCmd::CancelRoom { side }
            | StreamCmd::FinishWriting { side }
            | StreamCmd::Splice { side, .. }
            | StreamCmd::CancelSplice { side }
            | StreamCmd::EndSplice { side } => side,
        }
    }
}

/// When to take a splice step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// In the worker's next turn, after everyone else.
    NextTurn,
    /// A little later, together with others that wait so.
    Soon,
    /// When the source has something to read.
    Readable,
    /// When the other side takes more.
    Writable,
    /// After a while: the sink was reported writable, and then took nothing.
    Later,
}

/// How to receive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intake {
    /// Repeatedly into small blocks, up to `bytes_max` bytes in all.
    Many { bytes_max: u32 },
    /// Once. `wait_first`: the socket was seen to be empty, so wait for something before trying.
    Once { class: Class, wait_first: bool },
    /// Once, into a small block of the reserve.
    Last { wait_first: bool },
}
