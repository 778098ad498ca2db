//! Relaying, as decisions: events in, commands out, no socket and no clock. Owns the words that the
//! protocols and the worker's shell share.

pub mod http;
pub mod line;
pub mod outlook;
mod pace;
mod room;
pub mod tcp;
pub mod udp;

use std::time::Duration;

use nix::errno::Errno;

use crate::ring::pool::{Buf, Class, Outgoing};

/// How long a connection is still before a receive on it that has taken data is begun anew, once (see
/// [`line::Line::is_unsure`]).
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
    /// A receive gave something. `more`: it goes on; otherwise it is over, whatever it gave.
    Received { side: Side, what: Received, more: bool, nonempty: bool },
    /// A send is over: how many bytes the kernel took, or why none.
    Sent { side: Side, result: Result<u32, Errno> },
    /// The socket on this side was asked whether it takes more, and the answer is there.
    Room { side: Side },
    /// A splice step from this side to the other is over; `held` bytes are still between them.
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

/// Why a splice step moved no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Splice {
    /// As much as one step may; there is likely more.
    Moved,
    /// The source has no more at the moment, and all that came is with the sink.
    Empty,
    /// The sink takes no more at the moment.
    Full,
    /// The source has ended, and all that came is with the sink.
    Ended,
    /// Reading failed; all that came before is with the sink.
    SourceFailed(Errno),
    SinkFailed(Errno),
}

/// How a splice step ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spliced {
    Step(Splice),
    /// It was cancelled before it began.
    Stopped,
    /// There is no pipe to be had.
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

/// What is to be done on one side of a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cmd {
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
    /// Say when the socket on this side takes more. `first`: it was not asked before.
    AwaitRoom {
        side: Side,
        first: bool,
    },
    /// Have that answered at once.
    CancelRoom {
        side: Side,
    },
    /// Tell the peer that no more will come.
    FinishWriting {
        side: Side,
    },
    /// Move bytes from this side to the other within the kernel, at the time that is said. One
    /// `Event::Spliced` follows, whatever happens.
    Splice {
        side: Side,
        when: When,
    },
    /// Have the splice step of this side answer at once.
    CancelSplice {
        side: Side,
    },
    /// The pipe of this side is needed no more.
    EndSplice {
        side: Side,
    },
}

impl Cmd {
    /// The side that it is about.
    pub const fn side(&self) -> Side {
        match *self {
            Cmd::Receive { side, .. }
            | Cmd::CancelReceive { side }
            | Cmd::Send { side, .. }
            | Cmd::CancelSend { side }
            | Cmd::AwaitRoom { side, .. }
            | Cmd::CancelRoom { side }
            | Cmd::FinishWriting { side }
            | Cmd::Splice { side, .. }
            | Cmd::CancelSplice { side }
            | Cmd::EndSplice { side } => side,
        }
    }
}

/// When to take a splice step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// In the worker's next turn, after everyone else.
    NextTurn,
    /// In a moment, together with others that wait so.
    Soon,
    /// When the side that is read from has something.
    Readable,
    /// When the other side takes more.
    Writable,
    /// After a while: the other side was said to take more, and then took nothing.
    Later,
}

/// How to receive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intake {
    /// Again and again into small blocks, `bytes_max` in all.
    Many { bytes_max: u32 },
    /// Once. `wait_first`: the socket was seen empty, do not try before something comes.
    Once { class: Class, wait_first: bool },
    /// Once, into a small block of the reserve.
    Last { wait_first: bool },
}
