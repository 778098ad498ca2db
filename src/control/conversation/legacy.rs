//! A conversation that goes on in another process: everything it knows, written down and taken up again. Owns
//! what must hold of one that comes from elsewhere. A registration whose data port is being tried becomes a
//! pending request again, and is tried anew.

use std::rc::Rc;
use std::sync::Arc;

use super::{Caller, Conversation, Listing, PENDING_MAX, Shared, ToProve};
use crate::base::time::Now;
use crate::cluster::{BackendId, ServiceId};
use crate::control::api::{self, Heard, Inbox, NAME_BYTES_MAX, OUTBOX_BYTES_MAX};
use crate::control::auth::{AUTH_TIMEOUT, Challenge};
use crate::control::frame::MESSAGE_BYTES_MAX;
use crate::control::legacy::bytes::Bytes;
use crate::control::legacy::format;
use crate::control::rights::Keys;

/// Bytes of a connection that nobody has parsed, at most.
const UNHEARD_MAX: usize = 64 << 10;
/// Longest sentence about a message that was none.
const SENTENCE_MAX: usize = 2 * MESSAGE_BYTES_MAX;

impl Conversation {
    /// All of it, but for what the hub knows of its peer.
    pub fn describe(&self) -> format::Connection {
        let (writing, unsent) = self.peer.mailbox.unsent();
        let mut unheard = self.unheard.clone().unwrap_or_default();
        unheard.extend(self.peer.intake.untaken());
        let waiting = self.trying.iter().chain(&self.pending);
        format::Connection {
            peer: Some(self.peer.address),
            framer: self.inbox.describe(),
            unheard: Bytes(unheard),
            pending: waiting.map(pending).collect(),
            writing: Bytes(writing),
            unsent: Bytes(unsent),
            is_broken: self.peer.mailbox.broken().is_some(),
            ended: self.ended,
            hellos: self.hellos.clone(),
            pace: self.pace.clone(),
            proof: self.proof.as_ref().map(|proof| format::Proof {
                nonce: proof.challenge.nonce().to_owned(),
                deadline: proof.deadline,
            }),
            unproven: self.peer.ticket.as_ref().and_then(|ticket| ticket.since()),
            listing: self.listing.as_ref().map(listing),
            ..format::Connection::default()
        }
    }

    /// Goes on with a conversation, in which nobody has listened since `at`. The secrets are those in use here;
    /// where there are none, nothing is to be proved any more.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn inherit(
        shared: Rc<Shared>,
        peer: Caller,
        from: &format::Connection,
        keys: Option<&Rc<Keys>>,
        (at, now): (Now, Now),
    ) -> Result<Conversation, String> {
        check(from)?;
        let health = shared.hub.borrow().config.health;
        let proof = from.proof.as_ref().zip(keys).map(|(proof, keys)| prove(proof, keys, at, now));
        let inbox = Inbox::inherit(from.framer.clone());
        let mut conversation = Conversation {
            inbox: inbox.ok_or("a message stands where none can")?,
            unheard: Some(from.unheard.0.clone()).filter(|bytes| !bytes.is_empty()),
            pending: from.pending.iter().filter_map(heard).collect(),
            ended: from
                .ended
                .map(|until| until.plus(now.since(at)).min(now.plus(super::AFTER_END))),
            hellos: from.hellos.clone().go_on(health, now),
            pace: from.pace.clone().bounded(now),
            proof: proof.transpose()?,
            listing: from.listing.as_ref().map(goes_on).transpose()?,
            ..Conversation::new(shared, peer, None)
        };
        conversation.stood_still(at, now);
        if from.proof.is_some() && conversation.proof.is_none() {
            conversation.begin_hellos();
        }
        Ok(conversation)
    }

    /// Nobody has listened to the peer from then until now, which is not held against it.
    pub fn stood_still(&mut self, from: Now, now: Now) {
        self.hellos.stood_still(from, now);
        if let Some(proof) = &mut self.proof {
            proof.deadline = proof.deadline.plus(now.since(from)).min(now.plus(AUTH_TIMEOUT));
        }
    }
}

fn check(from: &format::Connection) -> Result<(), String> {
    let bytes = [
        (from.unheard.0.len(), UNHEARD_MAX),
        (from.writing.0.len(), OUTBOX_BYTES_MAX),
        (from.unsent.0.len(), OUTBOX_BYTES_MAX),
        (from.pending.len(), 2 * PENDING_MAX + UNHEARD_MAX / 2),
    ];
    let of_names = from.identity.iter().flat_map(|it| it.keyrings.iter().flatten());
    let mut names = from.identity.iter().map(|it| &it.name).chain(of_names);
    let messages = from.pending.iter().all(|it| {
        let told = it.bad.as_ref().map_or(0, String::len);
        it.said.0.len() <= MESSAGE_BYTES_MAX && told <= SENTENCE_MAX
    });
    if bytes.iter().any(|(count, max)| count > max)
        || names.any(|name| name.len() > NAME_BYTES_MAX)
        || !messages
    {
        return Err(format!("connection {} has more of something than it may", from.number));
    }
    Ok(())
}

fn pending(heard: &Heard) -> format::Pending {
    let bad = heard.what.as_ref().err().filter(|_| heard.said.is_empty());
    format::Pending {
        said: Bytes(heard.said.to_vec()),
        bad: bad.map(|bad| bad.msg.clone()),
        fatal: bad.is_some_and(|bad| bad.fatal),
    }
}

/// What was said means what it means to this release.
fn heard(from: &format::Pending) -> Option<Heard> {
    match &from.bad {
        Some(msg) => Some(api::no_message(msg, from.fatal)),
        None => api::read(&from.said.0),
    }
}

fn prove(from: &format::Proof, keys: &Rc<Keys>, at: Now, now: Now) -> Result<ToProve, String> {
    let challenge = Challenge::again(&from.nonce).ok_or("a nonce is none")?;
    let deadline = from.deadline.min(at.plus(AUTH_TIMEOUT)).min(now.plus(AUTH_TIMEOUT));
    Ok(ToProve { keys: Rc::clone(keys), challenge, deadline })
}

fn listing(listing: &Listing) -> format::Listing {
    match listing {
        Listing::Backends { of, after } => format::Listing::Backends {
            of: of.as_ref().map(|(id, name)| (id.0, name.to_string())),
            after: after.0,
        },
        Listing::Services { after } => format::Listing::Services { after: after.map(|id| id.0) },
    }
}

fn goes_on(from: &format::Listing) -> Result<Listing, String> {
    Ok(match from {
        format::Listing::Backends { of, after } => {
            if of.iter().any(|(_, name)| name.len() > NAME_BYTES_MAX) {
                return Err("a list is of a service whose name is too long".to_owned());
            }
            let of = of.as_ref().map(|(id, name)| (ServiceId(*id), Arc::from(name.as_str())));
            Listing::Backends { of, after: BackendId(*after) }
        }
        format::Listing::Services { after } => Listing::Services { after: after.map(ServiceId) },
    })
}

#[cfg(test)]
mod tests {
    use super::super::lists::tests::conversation;
    use super::*;
    use crate::config::Config;
    use crate::control::mailbox::Mailbox;

    fn heir(from: &format::Connection) -> Result<Conversation, String> {
        let (other, _) = conversation(Config::default());
        let Caller { source, address, .. } = *other.peer();
        let mailbox = Rc::new(Mailbox::with(from.writing.0.clone(), from.unsent.0.clone()));
        let caller = Caller { source, address, mailbox, intake: Rc::default(), ticket: None };
        let now = Now::read();
        Conversation::inherit(Rc::clone(&other.shared), caller, from, None, (now, now))
    }

    #[test]
    fn what_was_heard_and_not_handled_and_what_was_said_and_not_sent_goes_on_in_order() {
        let (mut old, mailbox) = conversation(Config::default());
        old.hear(b"{\"cmd\":\"list\"}{\"cmd\":7}[1]\n{\"cmd\":\"dance\"}{\"c");
        old.received(Some(b"md\":\"serv".to_vec()));
        assert!(old.peer.intake.put(b"ices\"}{"));
        mailbox.send(&api::Reply::AskHello);
        assert!(!mailbox.write(|_| Ok(None)).unwrap());
        let described = old.describe();
        assert_eq!(described.unheard.0, b"md\":\"services\"}{");
        assert_eq!(described.pending.len(), 4);
        let mut new = heir(&described).unwrap();
        assert_eq!(
            new.describe(),
            format::Connection { peer: Some(new.peer.address), ..described }
        );
        assert_eq!(new.pending, old.pending);
        let bytes = new.unheard.take().unwrap();
        new.hear(&bytes);
        assert_eq!(new.pending.back().unwrap().what, Ok(api::Request::Services));
    }

    #[test]
    fn what_no_conversation_can_be_is_none() {
        type Spoil = fn(&mut format::Connection);
        let spoiled: [(&str, Spoil); 5] = [
            ("a message stands", |it| {
                let inside = r#"{"state":"Inside","message":"ew==","depth":0}"#;
                it.framer = serde_json::from_str(inside).unwrap();
            }),
            ("a message stands", |it| {
                it.framer = serde_json::from_str(r#"{"marked":3}"#).unwrap();
            }),
            ("more of something", |it| it.unheard.0 = vec![0; UNHEARD_MAX + 1]),
            ("more of something", |it| it.unsent.0 = vec![0; OUTBOX_BYTES_MAX + 1]),
            ("more of something", |it| {
                let pending = format::Pending { said: Bytes(vec![0; 5000]), ..Default::default() };
                it.pending.push(pending);
            }),
        ];
        for (why, spoil) in spoiled {
            let mut from = conversation(Config::default()).0.describe();
            assert!(heir(&from).is_ok());
            spoil(&mut from);
            let said = heir(&from).err().unwrap();
            assert!(said.contains(why), "{said:?} instead of {why:?}");
        }
    }
}
