//! Backends: they answer what they are asked, or do one of the many other things that backends do.
//! Each request that arrives is compared with what its user meant to say.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;

use crate::dice::{Dice, content};
use crate::message::{Framing, Head, damaged, dechunk, framed};
use crate::services::host_at;
use crate::weather::Weather;
use crate::wire::{End, Wire};

/// What goes wrong with one request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    None,
    /// Closes or resets without an answer.
    Silent,
    /// Stops in the middle of the answer.
    HalfAnswer,
    /// Sends something that is not a response.
    Nonsense,
    /// Never answers.
    Stalls,
    /// Closes or resets before it has read the request.
    Impatient,
    /// Answers before it has read the request, and discards the rest.
    Hasty,
    /// Says more than the answer.
    Talkative,
    /// Closes the connection after the answer without having said so.
    ClosesAfter,
}

const TROUBLES: &[Trouble] = &[
    Trouble::Silent,
    Trouble::HalfAnswer,
    Trouble::Nonsense,
    Trouble::Stalls,
    Trouble::Impatient,
    Trouble::Hasty,
    Trouble::Talkative,
    Trouble::ClosesAfter,
];

/// What a noisy backend means to say.
const ANSWERS: &[&[u8]] = &[
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a\r\nhello\r\n0\r\nT: u\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
    b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 205 Reset Content\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    b"HTTP/1.1 426 Upgrade Required\r\nConnection: upgrade\r\nUpgrade: x\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nhello",
];
const INTERIM: &[&[u8]] = &[
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\nA: b\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n",
];

/// What all backends of a run have seen.
#[derive(Default)]
pub struct Seen {
    /// How often the head of a request arrived anywhere.
    pub heads: HashMap<u64, u32>,
    /// Requests of whose answer the balancer has read at least a part.
    pub heard: HashSet<u64>,
}

/// One connection, as its backend sees it.
pub struct Peer {
    /// Answers anything with anything, in bytes of which some are wrong.
    noisy: bool,
    /// What its service claims.
    host: &'static str,
    inbox: Vec<u8>,
    outbox: VecDeque<u8>,
    asked: Option<Asked>,
    after: After,
    tunnel: bool,
    served: u32,
    /// The number of bytes said in all.
    said: usize,
    /// The request being answered, and where its answer begins.
    answering: Option<(u64, usize)>,
    /// The user who logged in on it.
    owner: Option<String>,
    user: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum After {
    Nothing,
    Leave,
    Reset,
    /// Neither reads nor writes any more.
    Stall,
}

/// A request whose head has arrived.
pub struct Asked {
    pub id: u64,
    pub method: String,
    pub length: usize,
    pub answer: Framing,
    pub answer_length: usize,
    framing: (Framing, usize),
    upgrade: bool,
    expects: bool,
    trouble: Trouble,
}

impl Peer {
    /// A connection to the backend at this address.
    pub fn at(weather: &Weather, to: SocketAddr) -> Peer {
        Peer {
            noisy: weather.noisy,
            host: host_at(weather, to),
            inbox: Vec::new(),
            outbox: VecDeque::new(),
            asked: None,
            after: After::Nothing,
            tunnel: false,
            served: 0,
            said: 0,
            answering: None,
            owner: None,
            user: String::new(),
        }
    }

    /// Does some of what it may do now; returns whether it did anything.
    pub fn step(&mut self, wire: &mut Wire, seen: &mut Seen, calm: bool, dice: &mut Dice) -> bool {
        if wire.left || self.after == After::Stall {
            return false;
        }
        let mut any = self.write(wire, dice);
        let here = wire.outward.len();
        let count = if dice.one_in(2) { here } else { dice.below(here + 1) };
        self.inbox.extend(wire.outward.drain(..count));
        any |= count > 0;
        if self.tunnel && !calm && dice.one_in(300) {
            // It has had enough.
            self.after = dice.pick(&[After::Leave, After::Reset]);
        }
        if self.tunnel {
            any |= !self.inbox.is_empty();
            self.outbox.extend(self.inbox.drain(..));
        } else if self.noisy {
            any |= self.make_noise(dice);
        } else {
            any |= self.think(wire, seen, calm, dice);
        }
        if wire.outward.is_empty() && wire.outward_end != End::Open && !wire.left {
            // The balancer has closed, so the rest of what it meant to say does not matter.
            if !self.tunnel || self.outbox.is_empty() || wire.outward_end == End::Reset {
                wire.finish();
                wire.left = true;
                return true;
            }
        }
        any
    }

    /// Records what the balancer has read so far.
    pub fn was_heard(&self, wire: &Wire, seen: &mut Seen) {
        if let Some((id, from)) = self.answering
            && wire.consumed > from
        {
            seen.heard.insert(id);
        }
    }

    /// The user whose answer is not complete yet.
    pub fn answers(&self) -> Option<usize> {
        let busy = self.asked.is_some() || !self.outbox.is_empty();
        self.user.parse().ok().filter(|_| busy)
    }

    fn say(&mut self, bytes: &[u8]) {
        self.said += bytes.len();
        self.outbox.extend(bytes);
    }

    fn write(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        if self.outbox.is_empty() {
            match self.after {
                After::Nothing | After::Stall => return false,
                After::Leave => wire.leave(dice),
                After::Reset => wire.reset(dice),
            }
            return true;
        }
        let most = self.outbox.len().min(wire.room());
        let count = if most == 0 { 0 } else { dice.some(most) };
        let bytes: Vec<u8> = self.outbox.drain(..count).collect();
        wire.write(&bytes);
        count > 0
    }

    fn think(&mut self, wire: &mut Wire, seen: &mut Seen, calm: bool, dice: &mut Dice) -> bool {
        if self.after != After::Nothing {
            return false;
        }
        if self.asked.is_none() {
            if !calm && self.served > 0 && self.outbox.is_empty() && dice.one_in(400) {
                return self.idle_whim(wire, dice);
            }
            let Some(head) = Head::read(&self.inbox) else { return false };
            self.hold_to_service(&head);
            self.inbox.drain(..head.bytes);
            let trouble = if calm || !dice.one_in(4) { Trouble::None } else { dice.pick(TROUBLES) };
            let asked = understood(&head, self.host, trouble);
            assert!(
                !seen.heard.contains(&asked.id),
                "a request is repeated after its answer began"
            );
            *seen.heads.entry(asked.id).or_default() += 1;
            self.answering = Some((asked.id, self.said));
            self.know(&head);
            self.begin(asked, dice);
            return true;
        }
        self.answer_when_complete(wire, dice)
    }

    /// Whatever a user says, a request reaches a backend only of the service that claims its host. One
    /// service claims all of them.
    fn hold_to_service(&self, head: &Head) {
        let host = head.one("host").unwrap_or_default().to_ascii_lowercase();
        let own = self.host == "sim" || host.starts_with(self.host);
        assert!(own, "a request for {host} at a backend for {}", self.host);
    }

    /// Checks the connection against the user who logged in on it.
    fn know(&mut self, head: &Head) {
        let user = head.one("x-user");
        self.user = user.unwrap_or_else(|| panic!("nobody's request: {head:?}")).to_string();
        if let Some(owner) = &self.owner {
            assert_eq!(owner, &self.user, "a request over a connection that is another user's");
        }
        if head.one("authorization").is_some() {
            self.owner = Some(self.user.clone());
        }
    }

    /// The head of a request has arrived.
    fn begin(&mut self, asked: Asked, dice: &mut Dice) {
        if asked.expects && (dice.one_in(2) || asked.trouble == Trouble::None) {
            self.say(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        if asked.upgrade && dice.one_in(2) {
            self.say(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n",
            );
            self.tunnel = true;
            return;
        }
        match asked.trouble {
            Trouble::Impatient => self.after = dice.pick(&[After::Leave, After::Reset]),
            Trouble::Hasty => {
                self.answer(&asked, dice);
                if asked.answer == Framing::UntilClose {
                    self.after = After::Leave;
                }
                self.asked = Some(asked);
            }
            _ => self.asked = Some(asked),
        }
    }

    /// Something that happens to an idle connection.
    fn idle_whim(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        match dice.below(3) {
            0 => wire.reset(dice),
            1 => wire.leave(dice),
            _ => {
                wire.unasked_at = Some(self.said);
                self.answering = None;
                self.say(b"HTTP/1.1 408 Too Late\r\nContent-Length: 0\r\n\r\n");
                self.after = After::Leave;
            }
        }
        true
    }

    /// Reads what must be one plain request, and answers with what may be no response.
    fn make_noise(&mut self, dice: &mut Dice) -> bool {
        if self.after != After::Nothing {
            return false;
        }
        let Some(head) = Head::read(&self.inbox) else { return false };
        self.hold_to_service(&head);
        let rest = &self.inbox[head.bytes..];
        let length = match head.framing() {
            (Framing::Chunked, _) => dechunk(rest).map(|(_, bytes)| bytes),
            (_, length) => (rest.len() >= length).then_some(length),
        };
        let hasty = length.is_none() && dice.one_in(8);
        if length.is_none() && !hasty {
            return false;
        }
        self.inbox.drain(..head.bytes + length.unwrap_or(0));
        let mut answer = dice.pick(ANSWERS).to_vec();
        if dice.one_in(3) {
            answer.splice(..0, dice.pick(INTERIM).iter().copied());
        }
        if dice.one_in(2) {
            answer = damaged(answer, dice);
        }
        self.say(&answer);
        if hasty || dice.one_in(3) {
            self.after = dice.pick(&[After::Leave, After::Reset]);
        }
        true
    }

    fn answer_when_complete(&mut self, wire: &mut Wire, dice: &mut Dice) -> bool {
        let asked = self.asked.as_ref().expect("a request is being read");
        if asked.trouble == Trouble::Stalls {
            return false;
        }
        let (content, bytes) = match asked.framing {
            (Framing::Length, length) if self.inbox.len() >= length => {
                (self.inbox[..length].to_vec(), length)
            }
            (Framing::Chunked, _) => match dechunk(&self.inbox) {
                Some(whole) => whole,
                None => return false,
            },
            (Framing::None, _) => (Vec::new(), 0),
            _ => return false,
        };
        let wanted = crate::dice::content(asked.id * 2, asked.length);
        assert!(content == wanted, "request {} arrived with another body", asked.id);
        self.inbox.drain(..bytes);
        let asked = self.asked.take().expect("a request is being read");
        self.served += 1;
        self.answer_as_troubled(&asked, wire, dice);
        true
    }

    fn answer_as_troubled(&mut self, asked: &Asked, wire: &mut Wire, dice: &mut Dice) {
        match asked.trouble {
            // It has already been answered.
            Trouble::Hasty => {}
            Trouble::Silent => self.after = dice.pick(&[After::Leave, After::Reset]),
            Trouble::Nonsense => {
                let nonsense: &[&[u8]] = &[
                    b"HTTP/1.1 OK\r\n\r\n",
                    b"220 mail\r\n\r\n",
                    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                    b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
                    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n",
                ];
                self.say(dice.pick(nonsense));
            }
            Trouble::HalfAnswer => {
                self.answer(asked, dice);
                let whole = self.outbox.len();
                let kept = if dice.one_in(2) { dice.below(whole) } else { whole - 1 };
                self.outbox.truncate(kept);
                self.said -= whole - kept;
                // To finish properly would be the end of a body that ends with the connection.
                let until_close = asked.answer == Framing::UntilClose && asked.method != "HEAD";
                self.after =
                    if until_close || dice.one_in(2) { After::Reset } else { After::Leave };
            }
            _ => {
                self.answer(asked, dice);
                match asked.trouble {
                    // After a body without an end of its own, it would be part of the body.
                    Trouble::Talkative if asked.answer != Framing::UntilClose => {
                        wire.unasked_at = Some(self.said);
                        self.say(b"HTTP/1.1 200 Stray\r\n\r\n");
                    }
                    Trouble::ClosesAfter => self.after = After::Leave,
                    _ => {}
                }
                if asked.answer == Framing::UntilClose {
                    self.after = After::Leave;
                }
            }
        }
    }

    /// Says the whole answer.
    fn answer(&mut self, asked: &Asked, dice: &mut Dice) {
        if dice.one_in(6) {
            self.say(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n");
        }
        let content = content(asked.id * 2 + 1, asked.answer_length);
        let status = if asked.answer == Framing::None { "204 No Content" } else { "200 OK" };
        let mut head = format!("HTTP/1.1 {status}\r\nX-Id: {}\r\nX-Hop: 1\r\n", asked.id);
        if dice.one_in(8) {
            // From here on it takes the user to be known.
            self.owner = Some(self.user.clone());
            head += dice
                .pick(&["WWW-Authenticate: NTLM\r\n", "Proxy-Authenticate: x, negotiate y\r\n"]);
        }
        match asked.answer {
            Framing::Length => head += &format!("Content-Length: {}\r\n", content.len()),
            Framing::Chunked => head += "Transfer-Encoding: chunked\r\n",
            Framing::UntilClose => head += "Connection: close\r\n",
            Framing::None => head += "Connection: x-hop\r\n",
        }
        self.say(head.as_bytes());
        self.say(b"\r\n");
        if asked.method != "HEAD" && asked.answer != Framing::None {
            self.say(&framed(&content, asked.answer, dice));
        }
    }
}

/// Checks what must hold for every request that a backend gets.
pub fn understood(head: &Head, host: &str, trouble: Trouble) -> Asked {
    let parts: Vec<&str> = head.start.split(' ').collect();
    assert!(parts.len() == 3 && parts[2] == "HTTP/1.1", "{head:?}");
    let path: Vec<&str> = parts[1].split('/').collect();
    assert_eq!(path.len(), 6, "{head:?}");
    assert_eq!(path[2], parts[0], "the method of another request: {head:?}");
    assert_eq!(head.one("host"), Some(host));
    assert_eq!(head.one("x-forwarded-for"), Some("192.0.2.1"));
    assert!(head.all("via").any(|via| via == "1.1 sim"));
    for gone in ["keep-alive", "x-hop", "proxy-connection"] {
        assert!(head.one(gone).is_none(), "{head:?}");
    }
    let answer = match path[4] {
        "None" => Framing::None,
        "Length" => Framing::Length,
        "Chunked" => Framing::Chunked,
        _ => Framing::UntilClose,
    };
    Asked {
        id: path[1].parse().expect("an id"),
        method: parts[0].to_string(),
        length: path[3].parse().expect("a length"),
        answer,
        answer_length: path[5].parse().expect("a length"),
        framing: head.framing(),
        upgrade: head.one("upgrade").is_some(),
        expects: head.one("expect").is_some(),
        trouble,
    }
}
