//! How changes reach the workers: gathered, and published as one snapshot. Owns whether one is due and
//! the replies held back until then, because a peer that reads "successful" may rely on the workers
//! having been told. What has changed is up to the registry, and when to publish is up to `mod`.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;

use super::mailbox::Mailbox;
use crate::base::publish::Publisher;
use crate::cluster::Snapshot;

/// Changes on their way to the workers.
pub struct Publication {
    publisher: Publisher<Snapshot>,
    due: bool,
    /// Mailboxes with replies about changes not yet published.
    held: Vec<Rc<Mailbox>>,
    wanted: Rc<Notify>,
}

impl Publication {
    pub fn new(publisher: Publisher<Snapshot>) -> Publication {
        Publication { publisher, due: false, held: Vec::new(), wanted: Rc::default() }
    }

    /// The snapshot the workers have.
    pub fn current(&self) -> Arc<Snapshot> {
        self.publisher.current()
    }

    /// Notified when a publication is due.
    pub fn wanted(&self) -> Rc<Notify> {
        Rc::clone(&self.wanted)
    }

    /// Something has changed.
    pub fn ask(&mut self) {
        self.due = true;
        self.wanted.notify_one();
    }

    /// Holds back the replies in this mailbox until the workers know.
    pub fn hold(&mut self, mailbox: &Rc<Mailbox>) {
        if self.due && mailbox.hold() {
            self.held.push(Rc::clone(mailbox));
        }
    }

    /// Whether there is anything to publish.
    pub fn is_due(&self) -> bool {
        self.due
    }

    /// Publishes the snapshot, and releases the replies held back for it.
    pub fn publish(&mut self, snapshot: Snapshot) -> Arc<Snapshot> {
        self.publisher.publish(snapshot);
        self.due = false;
        self.held.drain(..).for_each(|mailbox| mailbox.release());
        self.publisher.current()
    }
}

#[cfg(test)]
mod tests {
    use super::super::api::Reply;
    use super::*;

    #[tokio::test]
    async fn a_reply_is_kept_until_the_workers_know_what_it_is_about() {
        let mut publication = Publication::new(Publisher::new(Snapshot::default()));
        let mailbox = Rc::new(Mailbox::default());
        publication.hold(&mailbox);
        mailbox.send(&Reply::AskHello);
        assert!(mailbox.next().await.is_some(), "nothing is due");

        publication.ask();
        publication.hold(&mailbox);
        publication.hold(&mailbox);
        assert_eq!(publication.held.len(), 1);
        mailbox.send(&Reply::AskHello);
        let early = tokio::time::timeout(std::time::Duration::ZERO, mailbox.next()).await;
        assert!(early.is_err(), "the reply is held back");
        let snapshot = publication.publish(Snapshot { version: 7, ..Snapshot::default() });
        assert_eq!((snapshot.version, publication.is_due()), (7, false));
        assert!(mailbox.next().await.is_some());
    }
}
