//! Transmits that failed. Owns which of their datagrams are sent again, and in which form.

use nix::errno::Errno;

use super::{REPLY, SEND, UdpDriver};
use crate::base::time::Now;
use crate::ring::datagram::{PktInfo, Returned, Transmit};
use crate::ring::{Tag, sys};
use crate::worker::books::Books;
use crate::worker::driver::Turn;
use crate::worker::udp::batching::FourTuple;
use crate::worker::udp::sessions::{DropReason, Segments};

/// How often to send a datagram again whose send reported the error of an earlier one.
const TRIES_MAX: usize = 4;

impl UdpDriver {
    /// Sends the datagrams of a failed transmit one by one where that can help, and drops them
    /// otherwise.
    pub(super) fn retry(&mut self, returned: Returned, turn: &mut Turn<'_>) {
        let Returned { tag, transmit, errno } = returned;
        let errno = match (errno, transmit.segment_size) {
            // The send buffer is full, and would be for each datagram; or there is only one.
            (Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM, _) | (_, None) => errno,
            // An ICMP error about an earlier datagram says nothing about these.
            (Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH, _) => Errno::EINTR,
            // Perhaps the route merely refuses segmentation.
            (_, Some(segment_size)) => {
                self.batches.note_refused(FourTuple::of(tag, &transmit), segment_size, turn.now);
                Errno::EINTR
            }
        };
        self.send_singly(tag, transmit, errno, turn);
    }

    /// Sends each datagram of a transmit by itself. `errno` is why the transmit failed; `EINTR`
    /// says nothing against sending them.
    pub(super) fn send_singly(
        &mut self,
        tag: Tag,
        transmit: Transmit,
        errno: Errno,
        turn: &mut Turn<'_>,
    ) {
        let Turn { now, ref ring, ref mut books } = *turn;
        let segment_size = transmit.segment_size.map_or(usize::MAX, usize::from);
        for piece in ring.pool().pieces(transmit.payload.outgoing()) {
            for number in 0..piece.len().div_ceil(segment_size).max(1) {
                let start = number * segment_size.min(piece.len());
                let datagram = &piece[start..piece.len().min(start.saturating_add(segment_size))];
                if let Err(errno) = self.send_one(tag, &transmit, datagram, errno, now, books) {
                    let segments = Segments::one(datagram.len());
                    self.sessions.dropped(reason(errno), segments, books);
                }
            }
        }
        turn.ring.pool_mut().give_back_chain(transmit.payload);
    }

    /// Sends one datagram again after `errno`, if that may have been an ICMP error about an earlier
    /// one: such an error makes the next send from the socket fail, wherever that goes. A reply
    /// whose source address the kernel refuses is sent from the address of the route.
    ///
    /// # Errors
    /// Why the datagram cannot be sent.
    fn send_one(
        &mut self,
        tag: Tag,
        transmit: &Transmit,
        datagram: &[u8],
        mut errno: Errno,
        now: Now,
        books: &mut Books,
    ) -> Result<(), Errno> {
        let mut from = transmit.from;
        for _ in 0..TRIES_MAX {
            match errno {
                Errno::EINTR => {}
                Errno::EINVAL | Errno::EADDRNOTAVAIL | Errno::ENETUNREACH | Errno::ENODEV
                    if tag.kind == REPLY =>
                {
                    from = Some(from.and_then(PktInfo::relaxed).ok_or(errno)?);
                }
                Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH
                    if tag.kind == SEND =>
                {
                    self.read_icmp_errors(tag.slot, now, books);
                }
                _ => return Err(errno),
            }
            let Some(socket) = self.sender(tag) else { return Err(Errno::EBADF) };
            match sys::send_datagram(socket, datagram, transmit.to, from) {
                Ok(()) => return Ok(()),
                Err(again) => errno = again,
            }
        }
        Err(errno)
    }
}

fn reason(errno: Errno) -> DropReason {
    match errno {
        Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM => DropReason::QueueFull,
        Errno::EMSGSIZE => DropReason::TooBig,
        _ => DropReason::SendFailed,
    }
}
