//! The predecessor, as the new process sees it: who started this program to leave it everything. Owns what it
//! has announced and not yet been asked for; what is done with it is up to `boot` and `control`.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::channel::{Channel, Fault, Packet, Token};
use super::words::{Hello, Offer, OwnDoor, UserDoor, Word};
use crate::estate::ahead::{Ahead, SESSIONS_MAX};
use crate::estate::format::{NEWEST, OLDEST, State};

/// How long the old process may take to say hello, which it does at once.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take to stand still and send everything.
const STATE_PATIENCE: Duration = Duration::from_secs(10);
const SEND_PATIENCE: Duration = Duration::from_secs(1);
/// How much is told of why this process cannot go on; settings may be quoted in it, and each character may be
/// escaped.
const WHY_CHARS_MAX: usize = 2000;

/// The process that started this one to be succeeded by it.
#[derive(Debug)]
pub struct Predecessor {
    channel: Arc<Channel>,
    pub hello: Hello,
    /// Listeners of its own doors; `None` once taken.
    own: Vec<(OwnDoor, Option<OwnedFd>)>,
    /// Doors of users that nobody has asked for yet.
    users: Vec<UserDoor>,
    beside: Beside,
    claims: Vec<(usize, OwnedFd)>,
}

/// Everything that the old process leaves, and the right to it: it is this process's once it has taken the
/// token.
pub type Inheritance = (State<OwnedFd>, Token);

/// What the old process leaves, one after another.
pub enum Left {
    /// Sockets of sessions that still go on there.
    Ahead(Ahead<OwnedFd>),
    /// That were all of them.
    AllAhead,
    Everything(Inheritance),
}

/// Doors that are where another is, which has been asked for.
#[derive(Clone, Debug, Default)]
pub struct Beside(Vec<(u16, u16)>);

impl Beside {
    /// The number by which the sockets of a door are asked for: that of another one, if both are in one place.
    pub fn asked_for_as(&self, door: u16) -> u16 {
        let beside = self.0.iter().find(|(other, _)| *other == door);
        beside.map_or(door, |(_, asked)| *asked)
    }
}

/// The way back to the old process.
#[derive(Clone, Debug)]
pub struct Way(Arc<Channel>);

impl Way {
    /// Says that this process cannot go on, and why. Once it serves, nobody listens any more.
    pub fn refuse(&self, why: &str) {
        let why = why.chars().take(WHY_CHARS_MAX).collect();
        // If it is gone, nobody asks any more.
        let _ = self.0.send(&Word::No(why), &[], &[], SEND_PATIENCE);
    }
}

impl Predecessor {
    /// The one whose end of a channel is this process's standard input, which is empty from then on. `None`: there
    /// is none, as with every program that was started from elsewhere.
    ///
    /// # Errors
    /// It has ended, or has said something else than hello.
    pub fn behind_stdin() -> Result<Option<Predecessor>, Fault> {
        let Ok(socket) = io::stdin().as_fd().try_clone_to_owned() else { return Ok(None) };
        let Some(channel) = Channel::over(socket) else { return Ok(None) };
        // Nothing that this process starts is to hold the channel open.
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        Predecessor::of(channel, nix::unistd::getppid().as_raw()).map(Some)
    }

    /// The process of this number, if it has made the channel. Another one is the parent once that has ended.
    fn of(channel: Channel, parent: i32) -> Result<Predecessor, Fault> {
        if channel.maker()? != parent {
            return Err(Fault::Gone);
        }
        Predecessor::over(channel)
    }

    fn over(channel: Channel) -> Result<Predecessor, Fault> {
        let packet: Packet<Word> = channel.receive(HELLO_PATIENCE)?;
        let garbled = |what: &str| Fault::Garbled(what.to_owned());
        if packet.word != Word::Hello {
            return Err(garbled("another word than hello"));
        }
        let hello: Hello = serde_json::from_slice(&packet.body)
            .map_err(|error| Fault::Garbled(format!("a hello that reads {error}")))?;
        let mut descriptors = packet.descriptors.into_iter();
        let own = hello.own_doors.iter().map(|door| (door.clone(), descriptors.next())).collect();
        let claims: Vec<_> = hello.cores.iter().copied().zip(descriptors.by_ref()).collect();
        if claims.len() != hello.cores.len() || descriptors.next().is_some() {
            return Err(garbled("other descriptors than it named"));
        }
        let users = hello.doors.clone();
        Ok(Predecessor {
            channel: Arc::new(channel),
            hello,
            own,
            users,
            beside: Beside::default(),
            claims,
        })
    }

    /// The way to it, for whoever finds out that this process cannot go on.
    pub fn way(&self) -> Way {
        Way(Arc::clone(&self.channel))
    }

    /// The format of state that both know.
    ///
    /// # Errors
    /// There is none: a sentence.
    pub fn format(&self) -> Result<u16, String> {
        let (oldest, newest) = self.hello.formats;
        let common = newest.min(NEWEST);
        if common < oldest.max(OLDEST) {
            return Err(format!(
                "version {} writes sessions in formats {oldest} to {newest}, and this one reads \
                 {OLDEST} to {NEWEST}: restart in place of upgrading",
                self.hello.version
            ));
        }
        Ok(common)
    }

    /// The listener of the control door, if the settings had it there.
    pub fn control(&mut self, wanted: SocketAddr) -> Option<OwnedFd> {
        self.own_door(|door| *door == OwnDoor::Control { asked: wanted })
    }

    /// The listener of the admin door, if the settings had it there.
    pub fn admin(&mut self, wanted: SocketAddr) -> Option<OwnedFd> {
        self.own_door(|door| *door == OwnDoor::Admin { asked: wanted })
    }

    /// The listener of the operators' socket, if it is there.
    pub fn socket(&mut self, wanted: &Path) -> Option<OwnedFd> {
        self.own_door(|door| matches!(door, OwnDoor::Socket { path } if path == wanted))
    }

    fn own_door(&mut self, is_it: impl Fn(&OwnDoor) -> bool) -> Option<OwnedFd> {
        self.own.iter_mut().find(|(door, _)| is_it(door))?.1.take()
    }

    /// A users' door of the old process that is where this one is wanted, which nobody else gets from now on.
    /// Where the kernel was to choose the port, it is one of the same service's.
    pub fn user_door(&mut self, wanted: &UserDoor) -> Option<UserDoor> {
        let is_it = |door: &UserDoor| {
            let is_there = match wanted.asked.port() {
                0 => door.name == wanted.name && door.address.ip() == wanted.asked.ip(),
                _ => [door.asked, door.address].contains(&wanted.asked),
            };
            is_there && door.protocol == wanted.protocol && door.is_tls == wanted.is_tls
        };
        let place = self.users.iter().position(is_it)?;
        let door = self.users.remove(place);
        let is_beside =
            |other: &mut UserDoor| other.address == door.address && other.protocol == door.protocol;
        let beside = self.users.extract_if(.., is_beside);
        self.beside.0.extend(beside.map(|other| (other.id, door.id)));
        Some(door)
    }

    /// The number by which the sockets of a door are asked for: that of another one, if both are in one place.
    pub fn asked_for_as(&self, door: u16) -> u16 {
        self.beside.asked_for_as(door)
    }

    /// The name in `Via` that it has made up.
    pub fn via(&self) -> Option<String> {
        self.hello.via.clone()
    }

    /// The claims to cores, with their numbers.
    pub fn claims(&mut self) -> Vec<(usize, OwnedFd)> {
        std::mem::take(&mut self.claims)
    }

    /// Says that this process can go on from here.
    ///
    /// # Errors
    /// The old process has gone.
    pub fn offer(&mut self) -> Result<(), Fault> {
        let format = self.format().map_err(Fault::Failed)?;
        let doors_gone = self.users.iter().map(|door| door.id).collect();
        let offer = Offer { format, expects: true, takes_late: true, doors_gone };
        let body = serde_json::to_vec(&offer).map_err(|error| Fault::Failed(error.to_string()))?;
        self.channel.send(&Word::Offer, &body, &[], SEND_PATIENCE)
    }

    /// Waits for what the old process leaves next.
    ///
    /// # Errors
    /// It has gone or changed its mind, or what it has sent is at fault.
    pub fn next_left(&mut self) -> Result<Left, Fault> {
        let packet: Packet<Word> = self.channel.receive(STATE_PATIENCE)?;
        match packet.word {
            Word::Ahead { worker, first } => {
                let mut descriptors = packet.descriptors.into_iter();
                let mut sockets = Vec::with_capacity(SESSIONS_MAX);
                while let Some(client) = descriptors.next() {
                    let Some(backend) = descriptors.next().filter(|_| sockets.len() < SESSIONS_MAX)
                    else {
                        return Err(Fault::Garbled("descriptors of no session".into()));
                    };
                    sockets.push([client, backend]);
                }
                Ok(Left::Ahead(Ahead { worker, first, sockets }))
            }
            Word::AllAhead => Ok(Left::AllAhead),
            Word::State => everything(packet).map(Left::Everything),
            _ => Err(Fault::Garbled("another word than everything".into())),
        }
    }

    /// Says that all that came ahead has been taken in.
    ///
    /// # Errors
    /// The old process has gone.
    pub fn expecting(&self) -> Result<(), Fault> {
        self.channel.send(&Word::Expecting, &[], &[], SEND_PATIENCE)
    }

    /// Says that this process serves.
    pub fn running(&self) {
        // If it is gone, nobody asks any more.
        let _ = self.channel.send(&Word::Running, &[], &[], SEND_PATIENCE);
    }

    /// What the old process still says comes by this; it ends with it. What nobody has asked for is let go of.
    pub fn into_channel(self) -> (Arc<Channel>, Beside) {
        (self.channel, self.beside)
    }
}

fn everything(packet: Packet<Word>) -> Result<Inheritance, Fault> {
    let mut descriptors = packet.descriptors.into_iter();
    let Some(token) = descriptors.next() else {
        return Err(Fault::Garbled("no token".into()));
    };
    let state = State::read(&packet.body, descriptors.collect());
    let state = state.map_err(|why| Fault::Garbled(format!("its state cannot be read: {why}")))?;
    Ok((state, Token::over(token)))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::{AsRawFd, RawFd};

    use super::*;
    use crate::cluster::Protocol;

    const SOON: Duration = Duration::from_secs(5);

    fn door(id: u16, name: &str, asked: &str, address: &str) -> UserDoor {
        let (asked, address) = (asked.parse().unwrap(), address.parse().unwrap());
        let name = name.to_owned();
        UserDoor { id, name, protocol: Protocol::Tcp, asked, address, is_tls: false }
    }

    fn hello() -> Hello {
        Hello {
            formats: (OLDEST, NEWEST),
            doors: vec![
                door(0, "tcp", "127.0.0.1:0", "127.0.0.1:9001"),
                door(4, "shop", "127.0.0.1:80", "127.0.0.1:80"),
            ],
            own_doors: vec![
                OwnDoor::Control { asked: "127.0.0.1:0".parse().unwrap() },
                OwnDoor::Socket { path: "/run/lb/admin.sock".into() },
            ],
            cores: vec![3],
            ..Hello::default()
        }
    }

    /// What this process hears of one that sends this hello with so many descriptors.
    fn heard(hello: &Hello, descriptors: usize) -> Result<Predecessor, Fault> {
        let (old, new) = Channel::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let raw: Vec<RawFd> = vec![file.as_raw_fd(); descriptors];
        old.send(&Word::Hello, &serde_json::to_vec(hello).unwrap(), &raw, SOON).unwrap();
        Predecessor::over(Channel::over(new).unwrap())
    }

    #[test]
    fn a_door_is_taken_once_by_who_wants_it_where_it_is() {
        let mut old = heard(&hello(), 3).unwrap();
        let any = door(0, "tcp", "127.0.0.1:0", "127.0.0.1:0");
        assert_eq!(old.user_door(&any).map(|door| door.id), Some(0));
        assert_eq!(old.user_door(&any), None);
        let other =
            UserDoor { protocol: Protocol::Api, ..door(0, "shop", "127.0.0.1:80", "127.0.0.1:0") };
        assert_eq!(old.user_door(&other), None);
        let renamed = door(9, "store", "127.0.0.1:80", "127.0.0.1:0");
        assert_eq!(old.user_door(&renamed).map(|door| door.id), Some(4));
        assert!(old.control("127.0.0.1:1".parse().unwrap()).is_none());
        assert!(old.control("127.0.0.1:0".parse().unwrap()).is_some());
        assert!(old.control("127.0.0.1:0".parse().unwrap()).is_none());
        assert!(old.socket(Path::new("/run/lb/admin.sock")).is_some());
        assert_eq!(old.claims().into_iter().map(|(core, _)| core).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_channel_that_another_process_than_the_parent_has_made_leads_to_nobody() {
        let own = std::process::id() as i32;
        for (parent, is_there) in [(own, true), (1, false)] {
            let (old, new) = Channel::pair().unwrap();
            old.send(&Word::Hello, &serde_json::to_vec(&Hello::default()).unwrap(), &[], SOON)
                .unwrap();
            let found = Predecessor::of(Channel::over(new).unwrap(), parent);
            let is_gone = matches!(found, Err(Fault::Gone));
            assert!(found.is_ok() == is_there && is_gone != is_there, "{parent}");
        }
    }

    #[test]
    fn listeners_that_nobody_has_asked_for_are_closed_when_only_the_channel_is_left() {
        let (old, new) = Channel::pair().unwrap();
        let (listener, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let own_doors = vec![OwnDoor::Socket { path: "/run/lb/admin.sock".into() }];
        let hello = serde_json::to_vec(&Hello { own_doors, ..Hello::default() }).unwrap();
        old.send(&Word::Hello, &hello, &[other.as_raw_fd()], SOON).unwrap();
        drop(other);
        let channel = Predecessor::over(Channel::over(new).unwrap()).unwrap().into_channel().0;
        listener.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!((&listener).read(&mut [0; 1]).unwrap(), 0, "nobody has the other end any more");
        old.send(&Word::Main, &[], &[], SOON).unwrap();
        assert_eq!(channel.receive::<Word>(SOON).unwrap().word, Word::Main);
    }

    #[test]
    fn a_hello_with_other_descriptors_than_it_names_is_none() {
        for count in [0, 2, 4] {
            assert!(matches!(heard(&hello(), count), Err(Fault::Garbled(_))), "{count}");
        }
    }

    #[test]
    fn formats_that_have_nothing_in_common_are_refused_with_the_cure() {
        for (formats, is_fine) in [((1, 1), true), ((1, 9), true), ((2, 9), false), ((0, 0), false)]
        {
            let old = heard(&Hello { formats, ..hello() }, 3).unwrap();
            let format = old.format();
            assert_eq!(format.is_ok(), is_fine, "{formats:?} {format:?}");
            assert!(is_fine || format.unwrap_err().ends_with("restart in place of upgrading"));
        }
    }
}
