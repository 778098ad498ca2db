//! Relaying, as decisions: events in, commands out, no socket and no clock. Owns the words that the
//! protocols and the worker's shell share.

pub mod tcp;
pub mod udp;

use nix::errno::Errno;

use crate::ring::pool::{Buf, Class, Outgoing};

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
    /// Tell the peer that no more will come.
    FinishWriting {
        side: Side,
    },
}

/// How to receive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intake {
    /// Again and again into small blocks, `bytes_max` in all.
    Many { bytes_max: u32 },
    /// Once. `wait_first`: the socket was seen empty, do not try before something comes.
    Once { class: Class, wait_first: bool },
}
