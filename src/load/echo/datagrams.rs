//! Echo backends for datagrams: as many as wait are taken with one call and sent back with another.
//! Blocking calls, because a batch of datagrams costs less this way than as single operations.

use std::io::{IoSlice, IoSliceMut};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg,
};

use crate::load::message::{BACKEND_AT, HEAD_BYTES, Head};

/// Datagrams taken with one call.
const BATCH: usize = 64;
/// The longest datagram of IPv4 (RFC 768 within RFC 791).
const DATAGRAM_BYTES: usize = 65_507;

/// Serves until `stop` is written.
pub fn serve(sockets: &[UdpSocket], stop: &EventFd) {
    let mut batch = Batch::new();
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
    memory: Vec<u8>,
    headers: MultiHeaders<SockaddrStorage>,
    answers: MultiHeaders<SockaddrStorage>,
}

impl Batch {
    fn new() -> Batch {
        Batch {
            memory: vec![0; BATCH * DATAGRAM_BYTES],
            headers: MultiHeaders::preallocate(BATCH, None),
            answers: MultiHeaders::preallocate(BATCH, None),
        }
    }

    /// Takes what waits on a socket and sends it back, stamped. What cannot be sent is lost, as
    /// datagrams may be.
    fn echo(&mut self, socket: &UdpSocket) {
        let number = socket.local_addr().map_or(0, |address| u32::from(address.port()));
        let mut sizes = [0; BATCH];
        let mut from = [None; BATCH];
        let count = {
            let mut places: Vec<[IoSliceMut; 1]> = self
                .memory
                .chunks_mut(DATAGRAM_BYTES)
                .map(|place| [IoSliceMut::new(place)])
                .collect();
            let flags = MsgFlags::MSG_DONTWAIT;
            let Ok(taken) =
                recvmmsg(socket.as_raw_fd(), &mut self.headers, places.iter_mut(), flags, None)
            else {
                return;
            };
            let mut count = 0;
            for message in taken {
                sizes[count] = message.bytes;
                from[count] = message.address;
                count += 1;
            }
            count
        };
        for (place, size) in self.memory.chunks_mut(DATAGRAM_BYTES).zip(sizes).take(count) {
            stamp(&mut place[..size], number);
        }
        let answers: Vec<[IoSlice; 1]> = self
            .memory
            .chunks(DATAGRAM_BYTES)
            .zip(sizes)
            .take(count)
            .map(|(place, size)| [IoSlice::new(&place[..size])])
            .collect();
        let none: [ControlMessage; 0] = [];
        let flags = MsgFlags::MSG_DONTWAIT;
        let _ =
            sendmmsg(socket.as_raw_fd(), &mut self.answers, &answers, &from[..count], none, flags);
    }
}

/// Says who answers, in a datagram of the generator; leaves every other as it is.
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
