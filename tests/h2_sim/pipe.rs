//! The memory between `h2` and a simulated wire: what the one writes reaches the other in pieces of any size.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::dice::Dice;
use crate::wire::{End, Wire};

#[derive(Default)]
struct Memory {
    inward: VecDeque<u8>,
    has_ended: bool,
    outward: VecDeque<u8>,
}

/// The end that `h2` has.
pub struct Pipe(Rc<RefCell<Memory>>);

/// The end at the wire.
pub struct Mouth(Rc<RefCell<Memory>>);

pub fn pipe() -> (Pipe, Mouth) {
    let memory = Rc::<RefCell<Memory>>::default();
    (Pipe(Rc::clone(&memory)), Mouth(memory))
}

impl Mouth {
    /// Takes some of what has arrived on the wire; returns whether there was anything.
    pub fn read(&self, wire: &mut Wire, dice: &mut Dice) -> bool {
        let mut memory = self.0.borrow_mut();
        let here = wire.outward.len();
        let count = if dice.one_in(2) { here } else { dice.below(here + 1) };
        memory.inward.extend(wire.outward.drain(..count));
        let ends = wire.outward.is_empty() && wire.outward_end != End::Open;
        count > 0 || ends && !std::mem::replace(&mut memory.has_ended, true)
    }

    /// Puts some of what `h2` has written on the wire; returns whether there was anything.
    pub fn write(&self, wire: &mut Wire, dice: &mut Dice) -> bool {
        let mut memory = self.0.borrow_mut();
        let most = memory.outward.len().min(wire.room());
        if most == 0 || !wire.inward_is_open() {
            return false;
        }
        let count = dice.some(most).min(most);
        let bytes: Vec<u8> = memory.outward.drain(..count).collect();
        wire.write(&bytes);
        true
    }

    /// Says something past `h2`, which writes whole frames.
    pub fn say(&self, frame: &[u8]) {
        self.0.borrow_mut().outward.extend(frame);
    }

    /// Whether all that `h2` has written is on the wire.
    pub fn is_flushed(&self) -> bool {
        self.0.borrow().outward.is_empty()
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut memory = self.0.borrow_mut();
        if memory.inward.is_empty() && !memory.has_ended {
            return Poll::Pending;
        }
        let count = memory.inward.len().min(into.remaining());
        let bytes: Vec<u8> = memory.inward.drain(..count).collect();
        into.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().outward.extend(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
