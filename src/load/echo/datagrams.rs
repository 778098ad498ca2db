//! Echo backends for datagrams: all that wait are taken with one call and sent back with another,
//! and those that the kernel delivered as one (UDP_GRO) go back as one (UDP_SEGMENT). The calls
//! block, because a batch of datagrams costs less this way than as single operations.

use std::io::{IoSlice, IoSliceMut};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg,
    sendmmsg, sendmsg, setsockopt, sockopt,
};

use crate::load::message::{BACKEND_AT, HEAD_BYTES, Head};

/// Limit on the datagrams taken with one call.
const BATCH: usize = 64;
/// The longest datagram over IPv4 (RFC 768 within RFC 791).
const DATAGRAM_BYTES: usize = 65_507;

/// Serves until `stop` is written. With `gso`, datagrams that arrive as one are received and
/// answered as one.
pub fn serve(sockets: &[UdpSocket], gso: bool, stop: &EventFd) {
    let mut batch = Batch::new(gso);
    for socket in sockets.iter().filter(|_| gso) {
        // If it fails they come one by one, which is right as well.
        let _ = setsockopt(socket, sockopt::UdpGroSegment, &true);
    }
    loop {
        let mut ready: Vec<PollFd> =
            sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        ready.push(PollFd::new(stop.as_fd(), PollFlags::POLLIN));
        if poll(&mut ready, PollTimeout::NONE).is_err() {
            continue;
        }
        let readable: Vec<bool> = ready.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if readable[sockets.len()] {
            return;
        }
        for (socket, _) in sockets.iter().zip(readable).filter(|(_, readable)| *readable) {
            batch.echo(socket);
        }
    }
}

struct Batch {
    gso: bool,
    memory: Vec<u8>,
    headers: MultiHeaders<SockaddrStorage>,
    answers: MultiHeaders<SockaddrStorage>,
    taken: Vec<Taken>,
}

/// What one place in the memory holds.
#[derive(Clone, Copy)]
struct Taken {
    bytes: usize,
    from: Option<SockaddrStorage>,
    /// If there are several datagrams, the length of each but the last.
    segment: Option<u16>,
}

impl Batch {
    fn new(gso: bool) -> Batch {
        Batch {
            gso,
            memory: vec![0; BATCH * DATAGRAM_BYTES],
            headers: MultiHeaders::preallocate(BATCH, None),
            answers: MultiHeaders::preallocate(BATCH, None),
            taken: Vec::with_capacity(BATCH),
        }
    }

    /// Takes what waits on a socket and sends it back, stamped. What cannot be sent is lost, as
    /// datagrams may be.
    fn echo(&mut self, socket: &UdpSocket) {
        let number = socket.local_addr().map_or(0, |address| u32::from(address.port()));
        self.take(socket);
        for (place, taken) in self.memory.chunks_mut(DATAGRAM_BYTES).zip(&self.taken) {
            let each = taken.segment.map_or(DATAGRAM_BYTES, usize::from);
            place[..taken.bytes].chunks_mut(each).for_each(|datagram| stamp(datagram, number));
        }
        let mut next = 0;
        while next < self.taken.len() {
            next += self.answer(socket, next);
        }
    }

    fn take(&mut self, socket: &UdpSocket) {
        self.taken.clear();
        if self.gso {
            // The kernel overwrites how much room each header has for the segment's length.
            self.headers = MultiHeaders::preallocate(BATCH, Some(nix::cmsg_space!(i32)));
        }
        let mut places: Vec<[IoSliceMut; 1]> =
            self.memory.chunks_mut(DATAGRAM_BYTES).map(|place| [IoSliceMut::new(place)]).collect();
        let flags = MsgFlags::MSG_DONTWAIT;
        let Ok(messages) =
            recvmmsg(socket.as_raw_fd(), &mut self.headers, places.iter_mut(), flags, None)
        else {
            return;
        };
        for message in messages {
            let segment = message.cmsgs().ok().and_then(|mut notes| {
                notes.find_map(|note| match note {
                    ControlMessageOwned::UdpGroSegments(bytes) => u16::try_from(bytes).ok(),
                    _ => None,
                })
            });
            let segment = segment.filter(|segment| (1..message.bytes).contains(&(*segment).into()));
            self.taken.push(Taken { bytes: message.bytes, from: message.address, segment });
        }
    }

    /// Sends back what is at `first`, and what follows if one call can do that; returns how many.
    fn answer(&mut self, socket: &UdpSocket, first: usize) -> usize {
        let flags = MsgFlags::MSG_DONTWAIT;
        let place = |at: usize, taken: &Taken| {
            let start = at * DATAGRAM_BYTES;
            IoSlice::new(&self.memory[start..start + taken.bytes])
        };
        if let Taken { segment: Some(segment), from: Some(from), .. } = &self.taken[first] {
            let note = [ControlMessage::UdpGsoSegments(segment)];
            let train = [place(first, &self.taken[first])];
            let _ = sendmsg(socket.as_raw_fd(), &train, &note, flags, Some(from));
            return 1;
        }
        let singles = self.taken[first..].iter().take_while(|taken| taken.segment.is_none());
        let (answers, to): (Vec<[IoSlice; 1]>, Vec<_>) = singles
            .enumerate()
            .map(|(behind, taken)| ([place(first + behind, taken)], taken.from))
            .unzip();
        let none: [ControlMessage; 0] = [];
        let _ = sendmmsg(socket.as_raw_fd(), &mut self.answers, &answers, &to, none, flags);
        answers.len().max(1)
    }
}

/// Writes who answers into a datagram of the generator; leaves all others as they are.
fn stamp(datagram: &mut [u8], number: u32) {
    if datagram.len() >= HEAD_BYTES && Head::decode(datagram).is_some() {
        datagram[BACKEND_AT].copy_from_slice(&number.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::message::Kind;

    #[test]
    fn only_the_generators_datagrams_are_stamped() {
        let head = Head { kind: Kind::Echo, connection: 1, backend: 0, sequence: 2 };
        let mut ours = head.encode();
        stamp(&mut ours, 9_201);
        assert_eq!(Head::decode(&ours), Some(Head { backend: 9_201, ..head }));
        let mut theirs = *b"a datagram of somebody else's";
        stamp(&mut theirs, 9_201);
        assert_eq!(&theirs, b"a datagram of somebody else's");
        stamp(&mut [], 9_201);
    }
}
