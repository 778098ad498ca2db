//! Letters that the kernel would not take as they were: owns what is tried again, and in which form.

use nix::errno::Errno;

use super::{REPLY, SEND, UdpDriver};
use crate::base::time::Now;
use crate::ring::datagram::{PktInfo, Returned, Transmit};
use crate::ring::{Ring, Tag, sys};
use crate::worker::udp::outbox::Way;
use crate::worker::udp::sessions::{Load, Why};

/// How often a datagram is offered again whose send reported an error of an earlier one.
const TRIES_MAX: usize = 4;

impl UdpDriver {
    /// A transmit came back: sends its datagrams one by one where that can help, and counts the others.
    pub(super) fn send_again(&mut self, now: Now, returned: Returned, ring: &mut Ring) {
        let Returned { tag, transmit, errno } = returned;
        let errno = match (errno, transmit.segment_size) {
            // The socket is full, and would be for each of them.
            (Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM, _) | (_, None) => errno,
            // The word of ICMP about an earlier datagram says nothing about these.
            (Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH, _) => Errno::EINTR,
            // It may be only the cutting up that is not to be had here.
            (_, Some(segment_size)) => {
                self.outbox.was_refused(Way::of(tag, &transmit), segment_size, now);
                Errno::EINTR
            }
        };
        self.send_one_by_one(now, tag, transmit, errno, ring);
    }

    /// Sends each datagram of a transmit by itself, after the transmit came back for `errno`.
    pub(super) fn send_one_by_one(
        &mut self,
        now: Now,
        tag: Tag,
        transmit: Transmit,
        errno: Errno,
        ring: &mut Ring,
    ) {
        let segment_size = transmit.segment_size.map_or(usize::MAX, usize::from);
        for piece in ring.pool().pieces(transmit.payload.outgoing()) {
            for number in 0..piece.len().div_ceil(segment_size).max(1) {
                let start = number * segment_size.min(piece.len());
                let datagram = &piece[start..piece.len().min(start.saturating_add(segment_size))];
                if let Err(errno) = self.send_one(now, tag, &transmit, datagram, errno) {
                    let load = Load::one(datagram.len());
                    self.sessions.dropped(reason(errno), load, &self.books.borrow());
                }
            }
        }
        ring.pool_mut().give_back_chain(transmit.payload);
    }

    /// Sends one datagram after `errno`, if that may have been the word of ICMP about an earlier one:
    /// it makes the next send from its socket fail, wherever that one goes. A reply whose source the
    /// kernel refuses goes from the address that the route has.
    fn send_one(
        &mut self,
        now: Now,
        tag: Tag,
        transmit: &Transmit,
        datagram: &[u8],
        mut errno: Errno,
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
                    self.read_icmp(now, tag.slot);
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

fn reason(errno: Errno) -> Why {
    match errno {
        Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM => Why::QueueFull,
        Errno::EMSGSIZE => Why::TooBig,
        _ => Why::SendFailed,
    }
}
