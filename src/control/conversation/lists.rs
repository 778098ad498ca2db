//! Lists of backends and services, as far as they go into one answer at a time.

use std::sync::Arc;

use super::Conversation;
use crate::cluster::registry::Registered;
use crate::cluster::{BackendId, ServiceId};
use crate::control::api::{
    LISTED_BYTES, LISTED_MAX, Listed, Reply, SERVICES_BYTES_MAX, ServiceLine, Target,
};
use crate::control::services;

/// A list that does not fit into one answer.
pub(super) enum Listing {
    /// The backends that follow this one, of one service or of all.
    Backends { of: Option<Named>, after: BackendId },
    /// The services that follow this one.
    Services { after: Option<ServiceId> },
}

/// A service and its name, which is still said when a reload has removed it meanwhile.
type Named = (ServiceId, Arc<str>);

impl Conversation {
    pub(super) fn begin_list(&mut self, target: Option<&Target>) {
        let meant = target.map(|target| {
            let hub = self.hub.borrow();
            let service = services::meant(&hub.registry, target)?;
            Ok((service.id, Arc::clone(&service.name)))
        });
        match meant.transpose() {
            Ok(of) => self.list(Listing::Backends { of, after: BackendId(0) }),
            Err::<_, String>(msg) => {
                self.fail(&msg, Some("list"), target.map(|target| target.about(None)))
            }
        }
    }

    /// Sends one page of a list.
    pub(super) fn list(&mut self, listing: Listing) {
        let (reply, rest) = match listing {
            Listing::Backends { of, after } => self.page_of_backends(of, after),
            Listing::Services { after } => self.page_of_services(after),
        };
        self.listing = rest;
        self.reply(reply);
    }

    fn page_of_backends(&self, of: Option<Named>, after: BackendId) -> (Reply, Option<Listing>) {
        let (hub, source) = (self.hub.borrow(), self.peer.source);
        let only = of.as_ref().map(|(service, _)| *service);
        let wanted = |entry: &&Registered| only.is_none_or(|it| entry.backend.service == it);
        let mut visible = hub.visible(source, after).filter(wanted);
        let fit = LISTED_MAX.saturating_sub(self.warning_bytes().div_ceil(LISTED_BYTES));
        let page: Vec<&Registered> = visible.by_ref().take(fit.max(1)).collect();
        let more = visible.next().is_some();
        let listed = |entry: &&Registered| {
            let sessions = hub.sessions_on(entry.backend.id);
            let service = hub.registry.service(entry.backend.service);
            Listed::of(service, &entry.backend, entry.source == source, sessions)
        };
        let backends = page.iter().map(listed).collect();
        let last = page.last().filter(|_| more).map(|entry| entry.backend.id);
        let service = of.as_ref().map(|(_, name)| Arc::clone(name));
        let rest = last.map(|after| Listing::Backends { of, after });
        (Reply::Listed { service, backends, more }, rest)
    }

    fn page_of_services(&self, after: Option<ServiceId>) -> (Reply, Option<Listing>) {
        let hub = self.hub.borrow();
        let mut room = SERVICES_BYTES_MAX.saturating_sub(self.warning_bytes());
        let mut page: Vec<ServiceLine> = Vec::new();
        let (mut rest, mut last) = (None, after);
        let tallies = services::tallies(&hub);
        for service in hub.registry.known().filter(|it| Some(it.id) > after) {
            let line = services::line(
                &hub,
                service,
                tallies.get(&service.id).copied().unwrap_or_default(),
            );
            let Some(left) = room.checked_sub(line.bytes_max()) else {
                rest = Some(Listing::Services { after: last });
                break;
            };
            (room, last) = (left, Some(service.id));
            page.push(line);
        }
        (Reply::Services { services: page, more: rest.is_some() }, rest)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::super::{Caller, Shared};
    use super::*;
    use crate::base::publish::Publisher;
    use crate::base::time::Now;
    use crate::cluster::seats::Seats;
    use crate::cluster::source::Source;
    use crate::cluster::{Protocol, Snapshot};
    use crate::config::Config;
    use crate::config::services::ServiceConfig;
    use crate::control::frame::MESSAGE_BYTES_MAX;
    use crate::control::hub::Hub;
    use crate::control::mailbox::Mailbox;
    use crate::control::status::Doors;
    use crate::control::workers::Workers;

    pub fn conversation(config: Config) -> (Conversation, Rc<Mailbox>) {
        let mut first = Snapshot::built_in(config.terms(), |_| Arc::new(Seats::new(1)));
        let kin = first.services[0].clone();
        let named = config.services.iter().map(|table| config.new_service(table, &kin));
        first.services = first.services.iter().cloned().chain(named).collect();
        let workers = Workers::new(Vec::new());
        let hub = Hub::new(Arc::new(config), workers, Publisher::new(first), Now::read());
        let shared = Rc::new(Shared::new(Rc::new(RefCell::new(hub)), Doors::default()));
        let mailbox = Rc::new(Mailbox::default());
        let address = ([127, 0, 0, 1], 7000).into();
        let source = Source::Connection(1);
        let intake = Rc::default();
        let caller = Caller { source, address, mailbox: Rc::clone(&mailbox), intake, ticket: None };
        (Conversation::new(shared, caller, None), mailbox)
    }

    #[tokio::test]
    async fn an_answer_that_warns_is_no_longer_than_any_other() {
        let mut config = Config::default();
        let names = (0..80).map(|number| format!("{number:064}"));
        config.set_services(names.map(|it| ServiceConfig::new(&it, Protocol::Tcp)).collect());
        let (mut conversation, mailbox) = conversation(config);
        for warning in ["", &"\"".repeat(700)] {
            conversation.warn(warning);
            conversation.list(Listing::Services { after: None });
            let said = mailbox.next().await.unwrap().len();
            assert!(said < MESSAGE_BYTES_MAX, "{said}");
        }
        assert!(conversation.listing.is_some(), "there are more");
    }

    #[tokio::test]
    async fn a_list_ends_when_its_service_has_been_removed_between_two_pages() {
        let (mut conversation, mailbox) = conversation(Config::default());
        let of = Some((ServiceId(99), "gone".into()));
        conversation.list(Listing::Backends { of, after: BackendId(7) });
        assert!(conversation.listing.is_none());
        let said = mailbox.next().await.unwrap();
        let said = String::from_utf8(said).unwrap();
        assert!(
            said.contains(r#""service":"gone""#) && said.contains(r#""backends":[]"#),
            "{said}"
        );
    }
}
