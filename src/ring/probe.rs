//! What the kernel can do, found out by trying. Owns the names of the features that the workers
//! need or use, and the sentences that tell an operator why io_uring cannot be used. That an opcode
//! is known says nothing about its flags, so what matters is tried on a pair of sockets.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

use super::pool::Class;
use super::restrict::OPERATIONS;
use super::{Done, Ring, RingSettings, Tag, sys};

/// The first kernel with everything that the workers need (`DEFER_TASKRUN`).
const KERNEL_MIN: (u32, u32) = (6, 1);
/// A ring for trying needs only a few blocks.
const SETTINGS: RingSettings =
    RingSettings { small_blocks: 64, large_blocks: 4, datagram_blocks: 0 };
/// Everything tried here completes at once or never.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often a ring is tried for which there is no memory, and the pause in between.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(20);
/// `IORING_RECVSEND_BUNDLE`.
const BUNDLE: u16 = 1 << 4;
const RECEIVE: Tag = Tag { kind: 1, generation: 1, slot: 1 };

/// What this kernel has. The workers cannot start without the first five features; they use the
/// others if they are there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Features {
    /// The kernel's own name for its version, such as `6.8.0-45-generic`.
    pub release: String,
    pub single_issuer: bool,
    pub defer_taskrun: bool,
    pub opcodes: bool,
    pub buffer_ring: bool,
    pub multishot_receive: bool,
    pub coop_taskrun: bool,
    /// A multishot receive can be given a total after which it ends (6.17).
    pub receive_cap: bool,
    /// One receive can fill several buffers (6.10).
    pub bundle: bool,
    /// A ring refuses what the workers never ask of it.
    pub restrictions: bool,
    /// Armed receives whose buffer ring is taken away leave what comes in the socket.
    pub withdrawal: bool,
}

impl fmt::Display for Features {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "kernel {}", self.release)?;
        let all = [
            ("single issuer", self.single_issuer),
            ("deferred task run", self.defer_taskrun),
            ("cooperative task run", self.coop_taskrun),
            ("opcodes", self.opcodes),
            ("buffer rings", self.buffer_ring),
            ("multishot receive", self.multishot_receive),
            ("receive cap", self.receive_cap),
            ("bundles", self.bundle),
            ("restrictions", self.restrictions),
            ("withdrawal", self.withdrawal),
        ];
        for (name, there) in all {
            write!(out, ", {}{name}", if there { "" } else { "no " })?;
        }
        Ok(())
    }
}

/// Why the workers cannot run here. Each is one sentence with the cure.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProbeError {
    /// The kernel has no io_uring, or something hides it.
    Absent {
        release: String,
    },
    /// `kernel.io_uring_disabled` is 1 or 2.
    Disabled {
        setting: u8,
    },
    /// A seccomp filter refuses the calls, as containers' default profiles do.
    Filtered,
    /// Permission denied for some other reason, such as a security module.
    Denied,
    /// The kernel lacks what `missing` names.
    TooOld {
        release: String,
        missing: String,
    },
    /// Memory may not be locked.
    Memlock {
        limit: u64,
    },
    /// The process is out of descriptors.
    Descriptors,
    Other {
        errno: Errno,
    },
}

impl fmt::Display for ProbeError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeError::Absent { release } => write!(
                out,
                "kernel {release} has no io_uring or a seccomp profile hides it: use a kernel from \
                 {}.{} up, and in a container a profile that allows io_uring_setup, io_uring_enter \
                 and io_uring_register",
                KERNEL_MIN.0, KERNEL_MIN.1
            ),
            ProbeError::Disabled { setting: 1 } => out.write_str(
                "kernel.io_uring_disabled is 1, which leaves io_uring to one group: put this user \
                 into the group of kernel.io_uring_group, or run `sysctl kernel.io_uring_disabled=0`",
            ),
            ProbeError::Disabled { setting } => write!(
                out,
                "kernel.io_uring_disabled is {setting}, which forbids io_uring to everyone: run \
                 `sysctl kernel.io_uring_disabled=0`"
            ),
            ProbeError::Filtered => out.write_str(
                "a seccomp filter forbids io_uring, as the default profiles of Docker and containerd \
                 do: run with a profile that allows io_uring_setup, io_uring_enter and \
                 io_uring_register",
            ),
            ProbeError::Denied => out.write_str(
                "the kernel denies io_uring to this user, although kernel.io_uring_disabled allows \
                 it: look for a security module's line in `journalctl -k` and allow it there",
            ),
            ProbeError::TooOld { release, missing } => write!(
                out,
                "kernel {release} lacks {missing}: use a kernel from {}.{} up (Ubuntu 22.04: `apt \
                 install linux-generic-hwe-22.04` and reboot)",
                KERNEL_MIN.0, KERNEL_MIN.1
            ),
            ProbeError::Memlock { limit } => write!(
                out,
                "the rings do not fit into the {limit} bytes of memory that this user may lock: \
                 raise `ulimit -l` (systemd: LimitMEMLOCK) to 8 MiB or more for each worker, or to \
                 infinity"
            ),
            ProbeError::Descriptors => out.write_str(
                "the process is out of file descriptors: raise `ulimit -n` (systemd: LimitNOFILE)",
            ),
            ProbeError::Other { errno } => {
                write!(out, "io_uring cannot be set up: {}", errno.desc())
            }
        }
    }
}

impl std::error::Error for ProbeError {}

/// Tries everything that the workers need, on this thread.
///
/// # Errors
/// What is missing, and the cure.
pub fn probe() -> Result<Features, ProbeError> {
    let wrong = |error: io::Error| Surroundings::read().explain(&error);
    // The plainest ring there is: if this fails, it is not for lack of a feature.
    patiently(|| IoUring::new(1)).map_err(wrong)?;
    let builder = IoUring::<squeue::Entry>::builder;
    let has = |set_up: &dyn Fn() -> io::Result<IoUring>| is_known(patiently(set_up)).map_err(wrong);
    let mut features = Features {
        release: release(),
        single_issuer: has(&|| builder().setup_single_issuer().build(1))?,
        defer_taskrun: has(&|| builder().setup_single_issuer().setup_defer_taskrun().build(1))?,
        coop_taskrun: has(&|| builder().setup_coop_taskrun().build(1))?,
        opcodes: unknown_opcodes().is_empty(),
        buffer_ring: false,
        multishot_receive: false,
        receive_cap: false,
        bundle: false,
        restrictions: false,
        withdrawal: false,
    };
    if features.defer_taskrun {
        let mut ring = match patiently(|| Ring::new(SETTINGS)) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return lacking(features),
            ring => ring.map_err(wrong)?,
        };
        try_receives(&mut ring, &mut features).map_err(wrong)?;
    }
    lacking(features)
}

/// Whether the kernel knows what a ring was asked to be. Any other refusal says nothing about that.
fn is_known(ring: io::Result<IoUring>) -> io::Result<bool> {
    match ring {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sets up a ring where others have just been closed: the kernel takes a moment to count their memory as
/// unlocked.
///
/// # Errors
/// As `set_up`.
pub fn patiently<T>(mut set_up: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..ATTEMPTS {
        match set_up() {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => thread::sleep(PAUSE),
            outcome => return outcome,
        }
    }
    set_up()
}

/// The features, if they suffice.
fn lacking(features: Features) -> Result<Features, ProbeError> {
    let needed = [
        ("IORING_SETUP_SINGLE_ISSUER", features.single_issuer),
        ("IORING_SETUP_DEFER_TASKRUN", features.defer_taskrun),
        ("opcodes that the workers submit", features.opcodes),
        ("buffer rings", features.buffer_ring),
        ("multishot receive", features.multishot_receive),
    ];
    let missing: Vec<&str> =
        needed.iter().filter(|(_, there)| !there).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(features);
    }
    Err(ProbeError::TooOld { release: features.release, missing: missing.join(", ") })
}

/// The names of those opcodes that the kernel does not know.
fn unknown_opcodes() -> Vec<&'static str> {
    let mut probe = Probe::new();
    let asked =
        patiently(|| IoUring::new(1)).and_then(|ring| ring.submitter().register_probe(&mut probe));
    let known = |code| asked.is_ok() && probe.is_supported(code);
    OPERATIONS.iter().filter(|(_, code)| !known(*code)).map(|(name, _)| *name).collect()
}

fn try_receives(ring: &mut Ring, features: &mut Features) -> io::Result<()> {
    let (mut far, near) = UnixStream::pair()?;
    far.write_all(b"once")?;
    ring.receive(RECEIVE, near.as_fd(), Class::Small, false);
    features.buffer_ring = received(ring)? == [(Ok(4), false)];

    let (mut far, near) = UnixStream::pair()?;
    far.write_all(b"twice")?;
    ring.receive_many(RECEIVE, near.as_fd(), 0);
    let first = received(ring)?;
    drop(far);
    features.multishot_receive = first == [(Ok(5), true)] && received(ring)? == [(Ok(0), false)];

    let (mut far, near) = UnixStream::pair()?;
    far.write_all(b"too much")?;
    ring.receive_many(RECEIVE, near.as_fd(), 3);
    // The kernel checks the total after each receive, so the receive that passes it may be longer.
    features.receive_cap = matches!(received(ring)?[..], [(Ok(1..), false)]);
    // If the total is ignored, the operation goes on: end it before its socket.
    ring.cancel(RECEIVE);
    received(ring)?;

    features.restrictions = refuses(ring)?;
    features.withdrawal = leaves(ring)?;
    features.bundle = ring.io.params().is_feature_recvsend_bundle() && bundle(ring)?;
    Ok(())
}

/// Whether a receive that is armed when the blocks are withdrawn leaves in the socket what comes then.
fn leaves(ring: &mut Ring) -> io::Result<bool> {
    let (mut far, near) = UnixStream::pair()?;
    ring.receive(RECEIVE, near.as_fd(), Class::Small, true);
    ring.enter(Some(Duration::ZERO))?;
    ring.withdraw()?;
    far.write_all(b"later")?;
    let is_left = received(ring)? == [(Err(Errno::ENOBUFS), false)];
    // An armed receive must not outlive its socket.
    ring.cancel(RECEIVE);
    ring.enter(Some(Duration::ZERO))?;
    received(ring)?;
    let is_restocked = ring.restock()?;
    let is_whole = sys::peek(near.as_fd(), &mut [0; 8]) == Ok(5);
    ring.receive(RECEIVE, near.as_fd(), Class::Small, false);
    Ok(is_left && is_restocked && is_whole && received(ring)? == [(Ok(5), false)])
}

/// Whether an operation and a registration are refused that no worker asks for.
fn refuses(ring: &mut Ring) -> io::Result<bool> {
    ring.push(RECEIVE.pack(), opcode::Nop::new().build());
    let operation = received(ring)? == [(Err(Errno::EACCES), false)];
    let registration = ring.io.submitter().register_files_sparse(1);
    let errno = registration.err().and_then(|error| error.raw_os_error());
    Ok(operation && errno == Some(libc::EACCES))
}

/// Whether one receive fills more than one block. Must be the last thing tried on a ring: the
/// blocks that it takes are not accounted for.
fn bundle(ring: &mut Ring) -> io::Result<bool> {
    let (mut far, near) = UnixStream::pair()?;
    let two_blocks = vec![0; 2 * Class::Small.bytes()];
    far.write_all(&two_blocks)?;
    let all = two_blocks.len() as u32;
    let entry = opcode::Recv::new(types::Fd(near.as_raw_fd()), std::ptr::null_mut(), all)
        .buf_group(Class::Small as u16)
        .ioprio(BUNDLE)
        .build()
        .flags(squeue::Flags::BUFFER_SELECT);
    ring.push(RECEIVE.pack(), entry);
    ring.enter(Some(PATIENCE))?;
    let entry = ring.io.completion().next();
    Ok(entry.is_some_and(|entry| usize::try_from(entry.result()) == Ok(two_blocks.len())))
}

/// What completes now: each result, and whether the operation goes on.
fn received(ring: &mut Ring) -> io::Result<Vec<(Result<u32, Errno>, bool)>> {
    let mut done: Vec<Done> = Vec::new();
    ring.enter(Some(PATIENCE))?;
    ring.reap(&mut done);
    let outcome = done.iter().map(|done| (done.result, done.more)).collect();
    for buf in done.into_iter().filter_map(|done| done.buf) {
        ring.pool_mut().give_back(buf);
    }
    Ok(outcome)
}

/// What the system says about itself, to explain a refusal.
struct Surroundings {
    release: String,
    /// `kernel.io_uring_disabled`; zero if the kernel does not have it.
    disabled: u8,
    /// Whether a seccomp filter is on this process.
    filtered: bool,
    memlock: u64,
}

impl Surroundings {
    fn read() -> Surroundings {
        let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Surroundings {
            release: release(),
            disabled: disabled.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0),
            filtered: status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "2"])),
            memlock: getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft),
        }
    }

    fn explain(&self, error: &io::Error) -> ProbeError {
        let release = self.release.clone();
        match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::ENOSYS => ProbeError::Absent { release },
            Errno::EPERM | Errno::EACCES if self.disabled > 0 => {
                ProbeError::Disabled { setting: self.disabled }
            }
            Errno::EPERM | Errno::EACCES if self.filtered => ProbeError::Filtered,
            Errno::EPERM | Errno::EACCES => ProbeError::Denied,
            Errno::EINVAL => ProbeError::TooOld {
                release,
                missing: "part of what the workers ask of io_uring".to_owned(),
            },
            Errno::ENOMEM => ProbeError::Memlock { limit: self.memlock },
            Errno::EMFILE | Errno::ENFILE => ProbeError::Descriptors,
            errno => ProbeError::Other { errno },
        }
    }
}

/// Explains why a ring could not be set up.
pub fn explain(error: &io::Error) -> ProbeError {
    Surroundings::read().explain(error)
}

fn release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_here_is_what_this_kernels_version_promises() {
        let features = probe().unwrap();
        let mut numbers =
            features.release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let version = (numbers.next().unwrap(), numbers.next().unwrap());
        assert_eq!(features.bundle, version >= (6, 10), "{features}");
        assert_eq!(features.receive_cap, version >= (6, 17), "{features}");
        assert!(features.coop_taskrun && features.restrictions, "{features}");
        assert!(features.withdrawal, "{features}");
        let line = features.to_string();
        assert!(line.contains("buffer rings, multishot receive"), "{line}");
        assert!(!line.contains('\n'));
    }

    #[test]
    fn a_feature_that_is_missing_is_named_with_the_cure() {
        let features = Features {
            release: "5.19.0".into(),
            single_issuer: false,
            defer_taskrun: false,
            opcodes: true,
            buffer_ring: false,
            multishot_receive: true,
            coop_taskrun: true,
            receive_cap: false,
            bundle: false,
            restrictions: false,
            withdrawal: false,
        };
        let line = features.to_string();
        assert!(line.contains("no single issuer") && line.contains("no bundles"), "{line}");
        let said = lacking(features).unwrap_err().to_string();
        assert!(
            said.starts_with(
                "kernel 5.19.0 lacks IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_DEFER_TASKRUN, \
                 buffer rings: use a kernel from 6.1 up"
            ),
            "{said}"
        );
        assert!(said.contains("linux-generic-hwe-22.04"), "{said}");
    }

    #[test]
    fn every_refusal_of_the_kernel_is_one_sentence_with_a_cure() {
        let plain = || Surroundings {
            release: "6.8.0".into(),
            disabled: 0,
            filtered: false,
            memlock: 65_536,
        };
        for (surroundings, errno, cure) in [
            (plain(), Errno::ENOSYS, "a profile that allows io_uring_setup"),
            (Surroundings { disabled: 1, ..plain() }, Errno::EPERM, "kernel.io_uring_group"),
            (Surroundings { disabled: 2, ..plain() }, Errno::EPERM, "io_uring_disabled=0"),
            (Surroundings { filtered: true, ..plain() }, Errno::EPERM, "seccomp filter forbids"),
            (plain(), Errno::EPERM, "journalctl -k"),
            (plain(), Errno::EINVAL, "linux-generic-hwe-22.04"),
            (plain(), Errno::ENOMEM, "the 65536 bytes of memory that this user may lock"),
            (plain(), Errno::EMFILE, "ulimit -n"),
        ] {
            let said = surroundings.explain(&errno.into()).to_string();
            assert!(said.contains(cure), "{errno} {said}");
            assert!(!said.contains(['\n', ';']) && !said.ends_with('.'), "{said}");
        }
    }

    #[test]
    fn a_lack_of_memory_is_waited_out_and_not_taken_for_an_old_kernel() {
        let lack = || Err(Errno::ENOMEM.into());
        let left = std::cell::Cell::new(3);
        let after_a_while = || match left.get() {
            0 => Ok(()),
            more => {
                left.set(more - 1);
                lack()
            }
        };
        assert!(patiently(after_a_while).is_ok());
        let for_ever = patiently(|| lack().map(|()| IoUring::new(1).unwrap()));
        assert_eq!(is_known(for_ever).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        assert!(!is_known(Err(Errno::EINVAL.into())).unwrap());
    }

    #[test]
    fn every_opcode_of_the_workers_is_known_here() {
        assert_eq!(unknown_opcodes(), [""; 0]);
    }
}
