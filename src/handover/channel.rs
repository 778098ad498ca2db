//! The channel between a balancer and its successor: a connected pair of sockets that keep messages apart
//! (`SOCK_SEQPACKET`, unix(7)). Owns how a message, its body and its descriptors are put on it, and their
//! bounds; knows nothing of what they mean.
//!
//! A body travels as sealed memory (memfd_create(2)), which the sender cannot change any more once it is read.
//! Descriptors come in portions behind the message that announces them, as many as the kernel takes at once.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketFlags,
    SocketType, recvmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::estate::format::BYTES_MAX;

/// Descriptors of one message, at most; the kernel takes one more (`SCM_MAX_FD`).
const PORTION: usize = 252;
/// Bytes of one message, at most.
const MESSAGE_BYTES_MAX: usize = 16 * 1024;
/// The most descriptors that one message may announce.
const DESCRIPTORS_MAX: usize = 1 << 20;
/// How long to wait before descriptors are sent again of which the kernel holds too many for one user.
const PAUSE: Duration = Duration::from_micros(500);
/// What makes sure that memory stays as it is.
const SEALS: SealFlags =
    SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK).union(SealFlags::SEAL);

/// Why nothing more will come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The other process has ended, or has closed its end.
    Gone,
    /// It has let its time pass.
    Late,
    /// It has sent what cannot be; the end of a sentence.
    Garbled(String),
    /// The kernel has refused to send or to receive.
    Failed(String),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::Gone => out.write_str("it ended"),
            Fault::Late => out.write_str("it did not answer in time"),
            Fault::Garbled(what) => write!(out, "it sent what cannot be: {what}"),
            Fault::Failed(what) => write!(out, "the kernel did not pass on a message: {what}"),
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Fault::Late,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Fault::Gone,
            _ => Fault::Failed(error.to_string()),
        }
    }
}

impl From<rustix::io::Errno> for Fault {
    fn from(errno: rustix::io::Errno) -> Fault {
        io::Error::from(errno).into()
    }
}

/// One end of the channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// A message as it came.
#[derive(Debug)]
pub struct Packet<T> {
    pub word: T,
    pub body: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

/// What stands in a message beside its word.
#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    word: T,
    /// A body comes with it.
    #[serde(default)]
    body: bool,
    /// How many descriptors follow.
    #[serde(default)]
    descriptors: usize,
}

impl Channel {
    /// Both ends.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn pair() -> io::Result<(Channel, OwnedFd)> {
        let (own, other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Channel { socket: own }, other))
    }

    /// The end that this socket is, unless it is of another kind.
    pub fn over(socket: OwnedFd) -> Option<Channel> {
        let kind = (sockopt::socket_domain(&socket), sockopt::socket_type(&socket));
        let is_one = kind == (Ok(AddressFamily::UNIX), Ok(SocketType::SEQPACKET));
        is_one.then_some(Channel { socket })
    }

    /// The process that made the pair.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn maker(&self) -> io::Result<i32> {
        Ok(sockopt::socket_peercred(&self.socket)?.pid.as_raw_nonzero().get())
    }

    /// Sends a message with its body, if it is not empty, and these descriptors, of which the receiver gets
    /// duplicates.
    ///
    /// # Errors
    /// The other process is gone, or has not made room within `patience`.
    pub fn send(
        &self,
        word: &impl Serialize,
        body: &[u8],
        descriptors: &[RawFd],
        patience: Duration,
    ) -> Result<(), Fault> {
        let deadline = Instant::now() + patience;
        let envelope = Envelope { word, body: !body.is_empty(), descriptors: descriptors.len() };
        let text =
            serde_json::to_vec(&envelope).map_err(|error| Fault::Failed(error.to_string()))?;
        assert!(text.len() <= MESSAGE_BYTES_MAX, "what is long travels as a body");
        let memory = if body.is_empty() { None } else { Some(seal(body)?) };
        let memory: Vec<RawFd> = memory.iter().map(AsRawFd::as_raw_fd).collect();
        self.put(&text, &memory, deadline)?;
        descriptors.chunks(PORTION).try_for_each(|portion| self.put(b"+", portion, deadline))
    }

    fn put(&self, text: &[u8], descriptors: &[RawFd], deadline: Instant) -> Result<(), Fault> {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let rights = if descriptors.is_empty() { &[][..] } else { &rights[..] };
        loop {
            let left = left(deadline)?;
            sockopt::set_socket_timeout(&self.socket, Timeout::Send, Some(left))?;
            let flags = MsgFlags::MSG_NOSIGNAL;
            let sent =
                sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(text)], rights, flags, None);
            match sent {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                // So many are under way for this user; the receiver takes them out.
                Err(Errno::ETOOMANYREFS) => thread::sleep(PAUSE.min(left)),
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
    }

    /// The next message.
    ///
    /// # Errors
    /// None came within `patience`, or none will.
    pub fn receive<T: DeserializeOwned>(&self, patience: Duration) -> Result<Packet<T>, Fault> {
        let deadline = Instant::now() + patience;
        let (text, memory) = self.take(deadline)?;
        let envelope: Envelope<T> = serde_json::from_slice(&text)
            .map_err(|error| Fault::Garbled(format!("a message that reads {error}")))?;
        let body = match (envelope.body, &memory[..]) {
            (false, []) => Vec::new(),
            (true, [memory]) => unseal(memory)?,
            _ => return Err(Fault::Garbled("a body that it did not announce".into())),
        };
        if envelope.descriptors > DESCRIPTORS_MAX {
            return Err(Fault::Garbled("more descriptors than there can be".into()));
        }
        let mut descriptors = Vec::with_capacity(envelope.descriptors);
        while descriptors.len() < envelope.descriptors {
            let (_, portion) = self.take(deadline)?;
            if portion.is_empty() {
                return Err(Fault::Garbled("fewer descriptors than it announced".into()));
            }
            descriptors.extend(portion);
        }
        if descriptors.len() > envelope.descriptors {
            return Err(Fault::Garbled("more descriptors than it announced".into()));
        }
        Ok(Packet { word: envelope.word, body, descriptors })
    }

    fn take(&self, deadline: Instant) -> Result<(Vec<u8>, Vec<OwnedFd>), Fault> {
        let mut text = vec![0; MESSAGE_BYTES_MAX];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PORTION + 1))];
        loop {
            sockopt::set_socket_timeout(&self.socket, Timeout::Recv, Some(left(deadline)?))?;
            let mut rights = RecvAncillaryBuffer::new(&mut space);
            let into = &mut [IoSliceMut::new(&mut text)];
            let got = match recvmsg(&self.socket, into, &mut rights, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => continue,
                outcome => outcome?,
            };
            let mut descriptors = Vec::new();
            for message in rights.drain() {
                if let RecvAncillaryMessage::ScmRights(portion) = message {
                    descriptors.extend(portion);
                }
            }
            if got.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC) {
                return Err(Fault::Garbled(
                    "more than there is room for: raise `ulimit -n` or LimitNOFILE".into(),
                ));
            }
            if got.bytes == 0 {
                return Err(Fault::Gone);
            }
            text.truncate(got.bytes);
            return Ok((text, descriptors));
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What is left until then; a timeout of zero would mean to wait for ever.
fn left(deadline: Instant) -> Result<Duration, Fault> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(Fault::Late),
        left => Ok(left.max(Duration::from_micros(100))),
    }
}

/// Memory with these bytes, which nobody can change.
fn seal(body: &[u8]) -> Result<File, Fault> {
    let memory = memfd_create("lb-handover", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(memory);
    file.write_all(body)?;
    fcntl_add_seals(&file, SEALS)?;
    Ok(file)
}

/// The bytes of such memory.
fn unseal(memory: &OwnedFd) -> Result<Vec<u8>, Fault> {
    if !fcntl_get_seals(memory)?.contains(SEALS) {
        return Err(Fault::Garbled("memory that it can still change".into()));
    }
    let file = File::from(memory.try_clone()?);
    let len = file.metadata()?.len();
    if len > BYTES_MAX {
        return Err(Fault::Garbled(format!("a body of {len} bytes")));
    }
    let mut body = vec![0; len as usize];
    file.read_exact_at(&mut body, 0)?;
    Ok(body)
}

/// What decides which of the two processes serves: there is one, and who takes it keeps it, whoever dies when.
#[derive(Debug)]
pub struct Token {
    /// An eventfd(2) that holds one.
    file: File,
}

impl Token {
    /// The only one of a handover.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Token> {
        use nix::sys::eventfd::{EfdFlags, EventFd};
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(1, flags)?;
        Ok(Token { file: File::from(OwnedFd::from(event)) })
    }

    /// The one that came from another process.
    pub fn over(socket: OwnedFd) -> Token {
        Token { file: File::from(socket) }
    }

    /// Takes it; false: the other process has.
    pub fn take(&self) -> bool {
        matches!((&self.file).read(&mut [0; 8]), Ok(8))
    }
}

impl AsRawFd for Token {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> (Channel, Channel) {
        let (own, other) = Channel::pair().unwrap();
        (own, Channel::over(other).unwrap())
    }

    #[test]
    fn a_message_comes_with_its_body_and_its_descriptors() {
        let (own, other) = pair();
        let kept: Vec<File> = (0..600).map(|_| File::open("/dev/null").unwrap()).collect();
        let raw: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
        let body = vec![7; 300_000];
        own.send(&"state", &body, &raw, SOON).unwrap();
        own.send(&"end", &[], &[], SOON).unwrap();
        let packet: Packet<String> = other.receive(SOON).unwrap();
        assert_eq!((packet.word.as_str(), packet.body), ("state", body));
        assert_eq!(packet.descriptors.len(), 600);
        let first = File::from(packet.descriptors.into_iter().next().unwrap());
        assert!(first.metadata().is_ok());
        let packet: Packet<String> = other.receive(SOON).unwrap();
        assert_eq!((packet.word.as_str(), packet.body.len()), ("end", 0));
    }

    #[test]
    fn whoever_is_silent_is_late_and_whoever_has_closed_is_gone() {
        let (own, other) = pair();
        assert_eq!(own.receive::<String>(Duration::from_millis(5)).unwrap_err(), Fault::Late);
        drop(other);
        assert_eq!(own.receive::<String>(SOON).unwrap_err(), Fault::Gone);
        assert_eq!(own.send(&"word", &[], &[], SOON).unwrap_err(), Fault::Gone);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let (own, other) = pair();
        for text in [&b"{"[..], b"{\"word\":1}", b"{\"word\":\"w\",\"body\":true}", b"\xff"] {
            own.put(text, &[], Instant::now() + SOON).unwrap();
            let fault = other.receive::<String>(SOON).unwrap_err();
            assert!(matches!(fault, Fault::Garbled(_)), "{text:?} {fault}");
        }
        let open = memfd_create("open", MemfdFlags::CLOEXEC).unwrap();
        let text = b"{\"word\":\"w\",\"body\":true}";
        own.put(text, &[open.as_raw_fd()], Instant::now() + SOON).unwrap();
        let fault = other.receive::<String>(SOON).unwrap_err();
        assert!(fault.to_string().ends_with("memory that it can still change"), "{fault}");
        let text = b"{\"word\":\"w\",\"descriptors\":3}";
        for portion in [&[][..], &[1; 4]] {
            own.put(text, &[], Instant::now() + SOON).unwrap();
            own.put(b"+", portion, Instant::now() + SOON).unwrap();
            assert!(matches!(other.receive::<String>(SOON), Err(Fault::Garbled(_))));
        }
    }

    #[test]
    fn a_socket_of_another_kind_is_no_channel() {
        let (datagrams, _other) = UnixDatagram::pair().unwrap();
        assert!(Channel::over(datagrams.into()).is_none());
        assert!(Channel::over(File::open("/dev/null").unwrap().into()).is_none());
    }

    #[test]
    fn the_maker_of_the_pair_is_known_at_both_ends() {
        let (own, other) = pair();
        let pid = std::process::id() as i32;
        assert_eq!((own.maker().unwrap(), other.maker().unwrap()), (pid, pid));
    }

    #[test]
    fn one_token_is_taken_once() {
        let token = Token::new().unwrap();
        let other = Token::over(token.file.try_clone().unwrap().into());
        assert!(other.take());
        assert!(!token.take() && !other.take());
    }
}
