//! The ring against the real kernel, on sockets of this process.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

use super::pool::Chain;
use super::*;

const READ: u8 = 1;
const SEND: u8 = 2;
const ACCEPT: u8 = 3;
const CONNECT: u8 = 4;

fn tag(kind: u8) -> Tag {
    Tag { kind, generation: 7, slot: 3 }
}

fn ring(small_blocks: usize, large_blocks: usize) -> Ring {
    Ring::new(RingSettings { small_blocks, large_blocks, datagram_blocks: 0 }).unwrap()
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn next(ring: &mut Ring) -> Done {
    let mut done = Vec::new();
    for _ in 0..100 {
        ring.enter(Some(Duration::from_millis(50))).unwrap();
        // One at a time, so that the tests read in order.
        let entry = ring.io.completion().next();
        if let Some(entry) = entry {
            done.extend(super::done(&entry, &mut ring.pool, &mut ring.provided));
        }
        if let Some(done) = done.pop() {
            return done;
        }
    }
    panic!("no completion came");
}

#[test]
fn a_tag_survives_the_kernel() {
    let tag = Tag { kind: 254, generation: GENERATION, slot: u32::MAX };
    assert_eq!(Tag::unpack(tag.pack()), tag);
}

#[test]
fn bytes_pass_from_one_socket_to_another_in_their_block() {
    let mut ring = ring(64, 4);
    let (mut user, near) = pair();
    let (far, mut backend) = pair();
    user.write_all(b"over the hills").unwrap();
    ring.receive(tag(READ), near.as_fd(), Class::Small, false);
    let done = next(&mut ring);
    assert_eq!((done.tag, done.result, done.more), (tag(READ), Ok(14), false));
    let mut chain = Chain::EMPTY;
    ring.pool_mut().push(&mut chain, done.buf.unwrap());
    ring.send(tag(SEND), far.as_fd(), chain.outgoing());
    assert_eq!(next(&mut ring).result, Ok(14));
    let mut got = [0; 14];
    backend.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"over the hills");
    ring.pool_mut().give_back_chain(chain);
}

#[test]
fn a_gathered_send_keeps_the_order() {
    let mut ring = ring(256, 4);
    let (far, mut backend) = pair();
    let mut chain = Chain::EMPTY;
    let mut sent = Vec::new();
    for number in 0..GATHER_MAX as u8 {
        let mut buf = ring.pool_mut().take(Class::Small).unwrap();
        ring.pool_mut().append(&mut buf, &[number; 33]);
        ring.pool_mut().push(&mut chain, buf);
        sent.extend([number; 33]);
    }
    ring.send(tag(SEND), far.as_fd(), chain.outgoing());
    assert_eq!(next(&mut ring).result, Ok(33 * GATHER_MAX as u32));
    let mut got = vec![0; sent.len()];
    backend.read_exact(&mut got).unwrap();
    assert_eq!(got, sent);
    ring.pool_mut().give_back_chain(chain);
}

#[test]
fn a_capped_multishot_receive_ends_at_its_cap() {
    let mut ring = ring(64, 4);
    let (mut user, near) = pair();
    ring.receive_many(tag(READ), near.as_fd(), 10);
    for (text, more) in [(&b"12345"[..], true), (b"67890", false)] {
        user.write_all(text).unwrap();
        let done = next(&mut ring);
        assert_eq!((done.result, done.more), (Ok(5), more));
        let buf = done.buf.unwrap();
        assert_eq!(ring.pool().bytes(&buf), text);
        ring.pool_mut().give_back(buf);
    }
}

#[test]
fn an_empty_pool_is_reported_and_recovers() {
    let mut ring = ring(2, 4);
    let (mut user, near) = pair();
    user.write_all(b"first").unwrap();
    ring.receive(tag(READ), near.as_fd(), Class::Small, false);
    let held = next(&mut ring).buf.unwrap();
    user.write_all(b"second").unwrap();
    ring.receive(tag(READ), near.as_fd(), Class::Small, true);
    assert_eq!(next(&mut ring).result, Err(Errno::ENOBUFS));
    ring.pool_mut().give_back(held);
    ring.receive(tag(READ), near.as_fd(), Class::Small, false);
    // The enter that submits the receive posts the block.
    let done = next(&mut ring);
    assert_eq!(done.result, Ok(6));
    ring.pool_mut().give_back(done.buf.unwrap());
}

#[test]
fn receives_never_take_every_block() {
    let mut ring = ring(256, 4);
    for _ in 0..20 {
        ring.provided.iter_mut().for_each(Provided::ran_dry);
        ring.enter(Some(Duration::ZERO)).unwrap();
    }
    assert_eq!((ring.pool().free(Class::Small), ring.pool().free(Class::Large)), (32, 1));
}

#[test]
fn the_reserve_is_for_those_who_name_it() {
    let mut ring = ring(2, 4);
    let (mut user, near) = pair();
    user.write_all(b"first").unwrap();
    ring.receive(tag(READ), near.as_fd(), Class::Small, false);
    let held = next(&mut ring).buf.unwrap();
    user.write_all(b"second").unwrap();
    ring.receive_many(tag(READ), near.as_fd(), 100);
    assert_eq!(next(&mut ring).result, Err(Errno::ENOBUFS));
    ring.receive_last(tag(READ), near.as_fd(), true);
    let done = next(&mut ring);
    assert_eq!((done.result, ring.pool().unused(Class::Small)), (Ok(6), 0));
    ring.pool_mut().give_back(done.buf.unwrap());
    ring.pool_mut().give_back(held);
}

#[test]
fn the_end_of_a_stream_is_a_receive_of_nothing() {
    let mut ring = ring(64, 4);
    let (user, near) = pair();
    drop(user);
    ring.receive(tag(READ), near.as_fd(), Class::Large, true);
    let done = next(&mut ring);
    assert_eq!((done.result, done.more), (Ok(0), false));
    assert_eq!(done.buf, None);
}

#[test]
fn a_cancelled_receive_says_so() {
    let mut ring = ring(64, 4);
    let (_user, near) = pair();
    ring.receive(tag(READ), near.as_fd(), Class::Small, true);
    ring.enter(Some(Duration::ZERO)).unwrap();
    ring.cancel(tag(READ));
    assert_eq!(next(&mut ring).result, Err(Errno::ECANCELED));
}

#[test]
fn a_ring_does_only_what_this_program_uses() {
    let mut ring = ring(64, 4);
    let (near, _far) = pair();
    let fd = types::Fd(near.as_raw_fd());
    let poll = || opcode::PollAdd::new(fd, libc::POLLOUT as u32).build();
    let path = c"/etc/passwd".as_ptr();
    let forbidden = [
        opcode::Nop::new().build(),
        opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path).build(),
        opcode::Read::new(fd, std::ptr::null_mut(), 0).build(),
        poll().flags(squeue::Flags::ASYNC),
    ];
    for entry in forbidden {
        ring.push(tag(SEND).pack(), entry);
        assert_eq!(next(&mut ring).result, Err(Errno::EACCES));
    }
    ring.push(tag(SEND).pack(), poll());
    assert!(next(&mut ring).result.is_ok());
    let refused = ring.io.submitter().register_files_sparse(1).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    ring.io.submitter().unregister_buf_ring(group(Class::Large, Stock::Common)).unwrap();
}

#[test]
fn bytes_that_come_while_blocks_are_withdrawn_stay_in_their_socket() {
    let mut ring = ring(64, 4);
    let ((mut user, near), (mut other, idle)) = (pair(), pair());
    ring.receive(tag(READ), near.as_fd(), Class::Small, true);
    ring.receive_many(tag(ACCEPT), idle.as_fd(), 100);
    ring.enter(Some(Duration::ZERO)).unwrap();
    for round in 0..3 {
        ring.withdraw().unwrap();
        user.write_all(b"left alone").unwrap();
        assert_eq!(next(&mut ring).result, Err(Errno::ENOBUFS), "round {round}");
        ring.receive(tag(READ), near.as_fd(), Class::Large, false);
        assert_eq!(next(&mut ring).result, Err(Errno::ENOBUFS), "round {round}");
        assert_eq!(sys::peek(near.as_fd(), &mut [0; 64]), Ok(10));
        assert!(ring.restock().unwrap());
        assert_eq!(ring.pool().free(Class::Small), 64, "all blocks are back");
        ring.receive(tag(READ), near.as_fd(), Class::Small, false);
        let done = next(&mut ring);
        assert_eq!(ring.pool().bytes(done.buf.as_ref().unwrap()), b"left alone");
        ring.pool_mut().give_back(done.buf.unwrap());
        ring.receive(tag(READ), near.as_fd(), Class::Small, true);
        ring.enter(Some(Duration::ZERO)).unwrap();
    }
    other.write_all(b"on and on").unwrap();
    let done = next(&mut ring);
    assert_eq!((done.tag, done.result, done.more), (tag(ACCEPT), Ok(9), true));
    ring.pool_mut().give_back(done.buf.unwrap());
}

#[test]
fn what_was_received_before_blocks_are_withdrawn_is_handed_out_and_nothing_is_posted_meanwhile() {
    let mut ring = ring(64, 4);
    let (mut user, near) = pair();
    user.write_all(b"before").unwrap();
    ring.receive(tag(READ), near.as_fd(), Class::Small, false);
    ring.enter(Some(Duration::ZERO)).unwrap();
    ring.withdraw().unwrap();
    assert!(!ring.restock().unwrap(), "a completion may hold a block");
    let done = next(&mut ring);
    assert_eq!(ring.pool().bytes(done.buf.as_ref().unwrap()), b"before");
    ring.pool_mut().give_back(done.buf.unwrap());
    let posted = ring.pool().blocks(Class::Small) - ring.pool().free(Class::Small);
    ring.enter(Some(Duration::ZERO)).unwrap();
    assert_eq!(ring.pool().blocks(Class::Small) - ring.pool().free(Class::Small), posted);
    assert!(ring.restock().unwrap());
    assert!(ring.restock().unwrap(), "once is enough");
}

#[test]
fn a_connect_and_its_accept_find_each_other() {
    let mut ring = ring(64, 4);
    let listener = sys::listen("[::1]:0".parse().unwrap(), true).unwrap();
    let address = sys::local(listener.as_fd()).unwrap();
    let socket = sys::stream(address).unwrap();
    ring.accept_many(tag(ACCEPT), listener.as_fd());
    ring.connect(tag(CONNECT), socket.as_fd(), address);
    let mut both = [next(&mut ring), next(&mut ring)];
    both.sort_by_key(|done| done.tag.kind);
    assert!(both[0].more, "the accept goes on");
    assert_eq!(both[1].result, Ok(0));
    let accepted = both[0].accepted.take().unwrap();
    assert_eq!(sys::peer(accepted.as_fd()).unwrap(), sys::local(socket.as_fd()).unwrap());
    ring.close(accepted);
    ring.enter(Some(Duration::ZERO)).unwrap();
}
