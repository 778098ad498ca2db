//! Datagrams through the real kernel, on loopback sockets of this process.

use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::*;
use crate::ring::{Done, RingSettings, sys};

const RECEIVE: Tag = Tag { kind: 1, generation: 5, slot: 9 };
const PENDING: Tag = Tag { kind: 3, generation: 5, slot: 0 };
const SEND: Tag = Tag { kind: 2, generation: 6, slot: 8 };

struct Stage {
    ring: Ring,
    door: OwnedFd,
    at: SocketAddr,
}

fn stage(address: &str, blocks: usize) -> Stage {
    let settings = RingSettings { small_blocks: 64, large_blocks: 4, datagram_blocks: blocks };
    let mut ring = Ring::new(settings).unwrap();
    let door = sys::datagram_door(address.parse().unwrap(), false, true).unwrap();
    let at = sys::local(door.as_fd()).unwrap();
    ring.receive_datagrams(RECEIVE, door.as_fd());
    Stage { ring, door, at }
}

fn user(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

/// Turns the ring until something completes or a transmit fails.
fn turn(ring: &mut Ring) -> Vec<Done> {
    let mut done = Vec::new();
    for _ in 0..100 {
        ring.enter(Some(Duration::from_millis(50))).unwrap();
        ring.reap(&mut done);
        if !done.is_empty() || !ring.datagrams.returned.is_empty() {
            return done;
        }
    }
    panic!("nothing completed");
}

impl Stage {
    /// The next datagrams to arrive, each with its metadata.
    fn receive(&mut self) -> Vec<(RecvMeta, Buf)> {
        let mut came = Vec::new();
        for done in turn(&mut self.ring) {
            assert_eq!(done.tag, RECEIVE);
            if !done.more {
                self.ring.receive_datagrams(RECEIVE, self.door.as_fd());
            }
            let Some(mut buf) = done.buf else { continue };
            came.push((self.ring.take_recv_meta(&mut buf).unwrap(), buf));
        }
        came
    }

    fn send(
        &mut self,
        to: SocketAddr,
        from: Option<PktInfo>,
        segment_size: Option<u16>,
        parts: &[&[u8]],
    ) {
        let mut payload = Chain::EMPTY;
        for part in parts {
            let mut buf = self.ring.pool_mut().take(Class::Datagram).unwrap();
            assert_eq!(self.ring.pool_mut().append(&mut buf, part), part.len());
            self.ring.pool_mut().push(&mut payload, buf);
        }
        let transmit = Transmit { to, from, segment_size, payload };
        self.ring.send_datagrams(SEND, self.door.as_fd(), transmit);
    }

    fn settle(&mut self) {
        self.ring.enter(Some(Duration::ZERO)).unwrap();
        assert!(!self.ring.reap(&mut Vec::new()));
    }
}

fn received(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buf = vec![0; 70_000];
    let (len, from) = socket.recv_from(&mut buf).unwrap();
    buf.truncate(len);
    (buf, from)
}

#[test]
fn datagrams_of_every_size_come_whole_and_leave_whole() {
    let mut stage = stage("127.0.0.1:0", 16);
    let user = user("127.0.0.1:0");
    for len in [0, 1, 64, 1472, 1473, 4096, 65_000, 65_507] {
        let sent: Vec<u8> = (0..len).map(|number| (number % 251) as u8).collect();
        user.send_to(&sent, stage.at).unwrap();
        let (meta, buf) = stage.receive().pop().unwrap();
        assert_eq!((meta.from, meta.whole), (user.local_addr().unwrap(), true), "{len}");
        assert_eq!(stage.ring.pool().bytes(&buf), sent, "{len}");
        let mut payload = Chain::EMPTY;
        stage.ring.pool_mut().push(&mut payload, buf);
        let transmit = Transmit { to: meta.from, from: None, segment_size: None, payload };
        stage.ring.send_datagrams(SEND, stage.door.as_fd(), transmit);
        stage.settle();
        assert_eq!(received(&user), (sent, stage.at), "{len}");
    }
    let pool = stage.ring.pool();
    let posted = pool.blocks(Class::Datagram) - pool.free(Class::Datagram);
    assert!(posted <= 12, "{posted} blocks are out of the pool, and no more are posted");
}

#[test]
fn a_reply_leaves_from_the_address_the_datagram_was_sent_to() {
    for (bound, user_at, sent_to) in [
        ("0.0.0.0:0", "127.0.0.1:0", ["127.0.0.1", "127.9.8.7"]),
        ("[::]:0", "127.0.0.1:0", ["127.0.0.1", "127.9.8.7"]),
        ("[::]:0", "[::1]:0", ["::1", "::1"]),
    ] {
        let mut stage = stage(bound, 16);
        let user = user(user_at);
        for ip in sent_to.map(|ip| ip.parse::<IpAddr>().unwrap()) {
            let at = SocketAddr::new(ip, stage.at.port());
            user.send_to(b"who are you", at).unwrap();
            let (meta, buf) = stage.receive().pop().unwrap();
            stage.ring.pool_mut().give_back(buf);
            assert_eq!(meta.to.unwrap().ip.to_canonical(), ip, "{bound}");
            for segment_size in [None, Some(2)] {
                stage.send(meta.from, meta.to, segment_size, &[b"me"]);
                stage.settle();
                assert_eq!(received(&user), (b"me".to_vec(), at), "{bound}");
            }
            let reply = sys::send_datagram(stage.door.as_fd(), b"me", meta.from, meta.to);
            assert_eq!(reply, Ok(()));
            assert_eq!(received(&user), (b"me".to_vec(), at), "{bound}");
        }
    }
}

#[test]
fn a_segmented_send_keeps_the_boundaries_of_its_datagrams() {
    let mut stage = stage("127.0.0.1:0", 16);
    let user = user("127.0.0.1:0");
    stage.send(user.local_addr().unwrap(), None, Some(4), &[b"aaaabbbb", b"cccc", b"dd"]);
    stage.settle();
    let came: Vec<_> = (0..4).map(|_| received(&user).0).collect();
    assert_eq!(came, [&b"aaaa"[..], b"bbbb", b"cccc", b"dd"]);
}

#[test]
fn coalesced_datagrams_come_with_their_segment_size() {
    let mut from = stage("127.0.0.1:0", 16);
    let mut to = stage("127.0.0.1:0", 16);
    from.send(to.at, None, Some(100), &[&[7; 250]]);
    from.settle();
    let (meta, buf) = to.receive().pop().unwrap();
    assert_eq!((meta.segment_size, buf.len()), (Some(100), 250));
    to.ring.pool_mut().give_back(buf);
}

#[test]
fn a_transmit_that_fails_comes_back_with_its_payload() {
    let mut stage = stage("127.0.0.1:0", 16);
    let user = user("127.0.0.1:0");
    let nowhere: SocketAddr = "127.0.0.1:0".parse().unwrap();
    stage.send(user.local_addr().unwrap(), None, None, &[b"before"]);
    stage.send(nowhere, None, None, &[b"lost"]);
    stage.send(user.local_addr().unwrap(), None, None, &[b"after"]);
    turn(&mut stage.ring);
    let Returned { tag, transmit, errno } = stage.ring.next_returned().unwrap();
    assert_eq!((tag, transmit.to, errno), (SEND, nowhere, Errno::EINVAL));
    let text: Vec<u8> =
        stage.ring.pool().pieces(transmit.payload.outgoing()).flatten().copied().collect();
    assert_eq!(text, b"lost");
    stage.ring.pool_mut().give_back_chain(transmit.payload);
    assert!(stage.ring.next_returned().is_none());
    assert_eq!([received(&user).0, received(&user).0], [b"before".to_vec(), b"after".to_vec()]);
}

#[test]
fn failed_transmits_come_back_in_the_order_in_which_they_were_sent() {
    let mut stage = stage("127.0.0.1:0", 16);
    let nowhere: SocketAddr = "127.0.0.1:0".parse().unwrap();
    for text in [b"1", b"2", b"3"] {
        stage.send(nowhere, None, None, &[text]);
    }
    turn(&mut stage.ring);
    let mut texts: Vec<u8> = Vec::new();
    while let Some(returned) = stage.ring.next_returned() {
        texts.extend(stage.ring.pool().pieces(returned.transmit.payload.outgoing()).flatten());
        stage.ring.pool_mut().give_back_chain(returned.transmit.payload);
    }
    assert_eq!(texts, b"123");
}

#[test]
fn a_send_at_once_comes_after_what_is_queued_and_before_what_follows() {
    let mut stage = stage("127.0.0.1:0", 64);
    let user = user("127.0.0.1:0");
    let to = user.local_addr().unwrap();
    for round in 0..5 {
        stage.send(to, None, Some(1), &[b"ab"]);
        for nowhere in [false, true] {
            let mut payload = Chain::EMPTY;
            for part in [b"cc", b"dd"] {
                let mut buf = stage.ring.pool_mut().take(Class::Datagram).unwrap();
                stage.ring.pool_mut().append(&mut buf, part);
                stage.ring.pool_mut().push(&mut payload, buf);
            }
            let to = if nowhere { "127.0.0.1:0".parse().unwrap() } else { to };
            let transmit = Transmit { to, from: None, segment_size: Some(2), payload };
            let returned = stage.ring.send_datagrams_at_once(SEND, stage.door.as_fd(), transmit);
            assert_eq!(returned.is_some(), nowhere);
            let Some(Returned { tag, transmit, errno }) = returned else { continue };
            assert_eq!((tag, transmit.to, errno), (SEND, to, Errno::EINVAL));
            assert_eq!(transmit.payload.bytes(), 4);
            stage.ring.pool_mut().give_back_chain(transmit.payload);
        }
        stage.send(to, None, None, &[b"e"]);
        stage.settle();
        let came: Vec<_> = (0..5).map(|_| received(&user).0).collect();
        assert_eq!(came, [&b"a"[..], b"b", b"cc", b"dd", b"e"], "round {round}");
    }
    let pool = stage.ring.pool();
    assert!(pool.blocks(Class::Datagram) - pool.free(Class::Datagram) <= 60, "no block is lost");
}

#[test]
fn a_refused_source_address_is_relaxed_step_by_step() {
    let source = |ip: &str, interface| PktInfo { ip: ip.parse().unwrap(), interface };
    for (from, then) in [
        (source("192.0.2.1", 0), vec![source("0.0.0.0", 0)]),
        (source("::ffff:192.0.2.1", 0), vec![source("::ffff:0.0.0.0", 0)]),
        (source("2001:db8::1", 0), vec![source("::", 0)]),
        (source("fe80::1", 3), vec![source("::", 3), source("::", 0)]),
        (source("::", 0), vec![]),
    ] {
        let all: Vec<PktInfo> = std::iter::successors(from.relaxed(), |it| it.relaxed()).collect();
        assert_eq!(all, then, "{from:?}");
    }
}

#[test]
fn a_reply_to_a_multicast_or_broadcast_leaves_from_a_local_address() {
    let info =
        |ip: &str| [ip.parse::<Ipv6Addr>().unwrap().octets().as_slice(), &[7, 0, 0, 0]].concat();
    for (to, ip, interface) in [
        ("2001:db8::1", "2001:db8::1", 0),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1", 0),
        ("fe80::1", "fe80::1", 7),
        ("ff02::1", "::", 7),
        ("ff0e::101", "::", 7),
    ] {
        let source = PktInfo { ip: ip.parse().unwrap(), interface };
        assert_eq!(read_v6_info(&info(to)), Some(source), "{to}");
    }
    assert_eq!(read_v6_info(&[0; 19]), None);
    // An IPv6 socket reports twice where an IPv4 datagram arrived; the second report is the better
    // one.
    let mut control = Control { words: [0; CONTROL / 8], len: 0 };
    let [low, high] = halves("::ffff:192.0.2.255".parse::<Ipv6Addr>().unwrap().octets());
    control.put(libc::SOL_UDP, libc::UDP_GRO, 4, &[100]);
    control.put(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, 20, &[low, high, 7]);
    let ours = u64::from(u32::from_ne_bytes([192, 0, 2, 1]));
    control.put(libc::IPPROTO_IP, libc::IP_PKTINFO, 12, &[ours << 32 | 7, 0]);
    assert_eq!(control.len, CONTROL, "the room for control data is exactly enough");
    let bytes: Vec<u8> = control.words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let source = PktInfo { ip: "192.0.2.1".parse().unwrap(), interface: 0 };
    assert_eq!(read_control(&bytes), (Some(source), Some(100)));
}

#[test]
fn more_transmits_than_fit_one_submission_all_leave() {
    let mut stage = stage("127.0.0.1:0", 4096);
    let users: Vec<UdpSocket> = (0..40).map(|_| user("127.0.0.1:0")).collect();
    for round in 0..40 {
        for socket in &users {
            stage.send(socket.local_addr().unwrap(), None, None, &[&[round]]);
        }
    }
    stage.settle();
    for socket in &users {
        assert!((0..40).all(|round| received(socket).0 == [round]));
    }
}

#[test]
fn receiving_goes_on_after_the_blocks_ran_out() {
    let mut stage = stage("127.0.0.1:0", 16);
    let user = user("127.0.0.1:0");
    for number in 0..100u8 {
        user.send_to(&[number], stage.at).unwrap();
    }
    let mut came = Vec::new();
    while came.len() < 100 {
        for (_, buf) in stage.receive() {
            came.extend_from_slice(stage.ring.pool().bytes(&buf));
            stage.ring.pool_mut().give_back(buf);
        }
    }
    assert!(came.iter().copied().eq(0..100));
}

#[test]
fn pending_receives_keep_the_order_and_lose_no_block() {
    let mut stage = stage("127.0.0.1:0", 64);
    let user = user("127.0.0.1:0");
    let mut pending = PENDING;
    // End the multishot receive first.
    user.send_to(&[], stage.at).unwrap();
    assert_eq!(
        turn(&mut stage.ring).pop().map(|done| (done.tag, done.more)),
        Some((RECEIVE, false))
    );
    let texts: [&[u8]; 9] = [b"", b"", b"a", b"b", b"", b"c", b"", b"", b"d"];
    for text in texts {
        user.send_to(text, stage.at).unwrap();
    }
    for number in 0..8 {
        pending.slot = number;
        stage.ring.receive_pending_datagrams(pending, stage.door.as_fd());
    }
    stage.ring.receive_datagrams(RECEIVE, stage.door.as_fd());
    let (mut came, mut ended) = (Vec::new(), Vec::new());
    for done in turn(&mut stage.ring) {
        if !done.more {
            ended.push((done.tag.slot, done.result.err()));
        }
        if let Some(mut buf) = done.buf {
            assert!(stage.ring.take_recv_meta(&mut buf).is_some());
            came.push(stage.ring.pool().bytes(&buf).to_vec());
            stage.ring.pool_mut().give_back(buf);
        }
    }
    assert_eq!(came, texts, "all in one turn");
    let empty = (0..5).map(|slot| (slot, None));
    let nothing = (5..8).map(|slot| (slot, Some(Errno::EAGAIN)));
    assert_eq!(ended, empty.chain(nothing).collect::<Vec<_>>());
    user.send_to(b"e", stage.at).unwrap();
    assert_eq!(
        turn(&mut stage.ring).pop().map(|done| (done.tag, done.more)),
        Some((RECEIVE, true))
    );
    let pool = stage.ring.pool();
    let out = pool.blocks(Class::Datagram) - stage.ring.pool().unused(Class::Datagram);
    assert!(out <= 2, "{out} blocks are lost");
}

#[test]
fn icmp_says_where_nobody_is() {
    let families = [(true, "127.0.0.1:0"), (false, "[::1]:0")];
    for ((v4, gone), tell) in families.into_iter().flat_map(|it| [(it, false), (it, true)]) {
        let mut stage = stage("127.0.0.1:0", 16);
        let upstream = sys::datagram_upstream(v4, true, tell).unwrap();
        stage.ring.receive_datagrams(RECEIVE, upstream.as_fd());
        let to = user(gone).local_addr().unwrap();
        assert_eq!(sys::send_datagram(upstream.as_fd(), b"hello?", to, None), Ok(()));
        let done = turn(&mut stage.ring).pop().unwrap();
        assert_eq!((done.result, done.more), (Err(Errno::ECONNREFUSED), false));
        let said = sys::next_unreachable(upstream.as_fd());
        assert_eq!(said, Some(sys::Unreachable { to, errno: Errno::ECONNREFUSED }));
        assert_eq!(sys::next_unreachable(upstream.as_fd()), None);
    }
}

#[test]
fn truncated_metadata_is_not_believed() {
    assert_eq!(read_head(&[0; HEAD - 1]), None);
    let mut head = [0; HEAD];
    assert_eq!(read_head(&head), None, "no address family");
    let (name, len) = write_name("[fe80::1%7]:99".parse().unwrap());
    head[LENGTHS..LENGTHS + NAME].copy_from_slice(&name);
    head[..4].copy_from_slice(&(len as u32).to_ne_bytes());
    let read = read_head(&head).unwrap();
    assert_eq!((read.from, read.to), ("[fe80::1%7]:99".parse().unwrap(), None));
    head[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    head[LENGTHS + NAME..].fill(0xff);
    assert_eq!(read_head(&head).map(|read| (read.to, read.segment_size)), Some((None, None)));
    head[12..16].copy_from_slice(&(libc::MSG_TRUNC as u32).to_ne_bytes());
    assert!(!read_head(&head).unwrap().whole);
}
