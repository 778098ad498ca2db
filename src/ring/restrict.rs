//! What a ring may do: the operations and registrations that this program uses, and no others. Owns their
//! lists. A seccomp filter sees io_uring_enter(2) and not what is submitted, so whoever took over a worker
//! could otherwise open files and start programs through its ring (`io_uring_register(2)`,
//! `IORING_REGISTER_RESTRICTIONS`).

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};

/// Operations, by their names for people.
pub(super) const OPERATIONS: [(&str, u8); 9] = [
    ("accept", opcode::AcceptMulti::CODE),
    ("connect", opcode::Connect::CODE),
    ("recv", opcode::Recv::CODE),
    ("recvmsg", opcode::RecvMsgMulti::CODE),
    ("send", opcode::Send::CODE),
    ("sendmsg", opcode::SendMsg::CODE),
    ("poll", opcode::PollAdd::CODE),
    ("cancel", opcode::AsyncCancel::CODE),
    ("close", opcode::Close::CODE),
];

/// `IORING_REGISTER_PBUF_RING` and `IORING_UNREGISTER_PBUF_RING`: buffer rings come and go while a ring is
/// in use.
const REGISTRATIONS: [u8; 2] = [22, 23];

/// Flags of operations.
const FLAGS: squeue::Flags = squeue::Flags::BUFFER_SELECT.union(squeue::Flags::SKIP_SUCCESS);

/// Restricts a ring that was set up disabled, for good, and enables it. This thread is the one that
/// submits to it from now on.
///
/// # Errors
/// When the kernel knows no restrictions (before 5.10).
pub(super) fn enable(ring: &IoUring) -> io::Result<()> {
    let operations = OPERATIONS.iter().map(|(_, code)| Restriction::sqe_op(*code));
    let registrations = REGISTRATIONS.iter().map(|code| Restriction::register_op(*code));
    let flags = Restriction::sqe_flags_allowed(FLAGS.bits());
    let mut allowed: Vec<_> = operations.chain(registrations).chain([flags]).collect();
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
}
