//! How a backend joins: what it asks for, whether it may have that, and the trial of its port in between. Owns
//! what a registration says that does not say everything.

use std::rc::Rc;
use std::sync::Arc;

use super::{Conversation, Over, Waiting};
use crate::cluster::registry::{self, Change, Registration};
use crate::cluster::{AskedCheck, Protocol};
use crate::control::api::{About, Joining, Reply};
use crate::control::home;
use crate::control::probe::{self, Unreached};
use crate::control::services;
use crate::tls::backends::BackendTls;

impl Conversation {
    /// The registration a request asks for: what it does not say stays as it was. Without a name, the peer's
    /// identity is used.
    pub(super) fn wanted(&self, joining: &Joining) -> Result<Registration, String> {
        let Joining { target, port, weight, name, group, proxy, http2, probe, check, .. } =
            joining.clone();
        let (source, address) = (self.peer.source, self.address(port));
        let hub = self.hub.borrow();
        let service = services::meant(&hub.registry, &target)?;
        let (service, kind) = (service.id, service.kind);
        let before = hub.registry.find(service, address).filter(|entry| entry.source == source);
        let was = before.map(|entry| &entry.backend);
        let known = || hub.identity(source).map(|identity| Arc::clone(&identity.name));
        let wanted = Registration {
            source,
            service,
            address,
            weight: weight.or(was.map(|it| it.weight)).unwrap_or(1),
            name: name.or_else(|| was.and_then(|it| it.name.clone())).or_else(known),
            group: group.or_else(|| was.and_then(|it| it.group.clone())),
            proxy: proxy.or(was.map(|it| it.proxy)).unwrap_or(false),
            http2: http2.or(was.map(|it| it.http2)).unwrap_or(false),
            tls: tls_of(joining, was.and_then(|it| it.tls.as_ref()))?,
            probe: probe.or(before.map(|it| it.probe)).unwrap_or(true),
            check: check.unwrap_or_else(|| before.and_then(|it| it.check.clone())),
        };
        if wanted.proxy && kind == Protocol::Udp {
            return Err("datagrams carry no PROXY header: leave proxy out".to_owned());
        }
        if wanted.http2 && kind != Protocol::Api {
            return Err("only API backends speak HTTP: leave http out".to_owned());
        }
        if wanted.tls.is_some() && kind == Protocol::Udp {
            return Err("datagrams are not sealed: leave tls out".to_owned());
        }
        if let Some(lack) = hub.snapshot.tls.backends.lack().filter(|_| wanted.tls.is_some()) {
            return Err(format!("the balancer cannot verify a backend: {lack}"));
        }
        if wanted.check.is_some() && kind == Protocol::Udp {
            return Err("a port for datagrams cannot be checked: leave check out".to_owned());
        }
        if wanted.check == Some(AskedCheck::Tcp) && !wanted.probe {
            return Err(
                "a check by tcp tries the port, which probe false forbids: leave out one of \
                        the two"
                    .to_owned(),
            );
        }
        Ok(wanted)
    }

    /// Why the service does not let its backends ask for a check, if it does not.
    fn check_forbidden(&self, wanted: &Registration) -> Option<String> {
        let hub = self.hub.borrow();
        let table = hub.config.service(wanted.service).filter(|_| wanted.check.is_some())?;
        let forbids = !table.probe && !hub.is_checked(wanted.service);
        forbids.then(|| {
            let name = &table.name;
            format!("service {name} has its ports tried by nobody (probe = false): leave check out")
        })
    }

    /// Whether the peer may register for that service.
    fn may_join(&self, wanted: &Registration) -> Result<(), String> {
        let hub = self.hub.borrow();
        let (service, from) = (hub.registry.service(wanted.service), wanted.address.ip());
        services::may_register(&hub.config, service, from, hub.identity(wanted.source))
    }

    /// Whether a registration will be refused before its data port is tried.
    pub(super) fn is_futile(&self, wanted: &Registration) -> bool {
        self.may_join(wanted).is_err() || self.fault_of(wanted).is_some()
    }

    /// Why a registration by one who may register is refused before its data port is tried, if it is.
    fn fault_of(&self, wanted: &Registration) -> Option<String> {
        let Registration { service, address, .. } = *wanted;
        if let Some(msg) = self.check_forbidden(wanted) {
            return Some(msg);
        }
        let hub = self.hub.borrow();
        if let Err(fault) = hub.registry.check(wanted) {
            return Some(fault.to_string());
        }
        let protocol = hub.protocol_of(service);
        let (doors, named) = (&self.shared.doors, home::named_doors(&hub.config, protocol));
        let own = home::is_own_door(doors, named, protocol, address, home::is_of_this_host);
        own.then(|| format!("{address} is a door of the balancer itself"))
    }

    fn about(&self, wanted: &Registration) -> About {
        let hub = self.hub.borrow();
        About::of(hub.registry.service(wanted.service), wanted.address.port())
    }

    /// The peer may not register for that service.
    fn barred(&self, wanted: &Registration, msg: &str, about: About) {
        let hub = self.hub.borrow();
        hub.counters.registrations_refused_rights.one();
        let (service, from) = (hub.registry.service(wanted.service), wanted.address.ip());
        let identity = hub.identity(wanted.source);
        let needs_secret = services::needs_secret(&hub.config, service, from, identity);
        drop(hub);
        match needs_secret {
            true => self.fail_for_secret(msg, Some("register"), Some(about)),
            false => self.fail(msg, Some("register"), Some(about)),
        }
    }

    pub(super) fn register(&mut self, wanted: Registration) -> Option<Waiting> {
        let about = self.about(&wanted);
        if let Err(msg) = self.may_join(&wanted) {
            self.barred(&wanted, &msg, about);
            return None;
        }
        if let Some(msg) = self.fault_of(&wanted) {
            self.fail(&msg, Some("register"), Some(about));
            return None;
        }
        let hub = self.hub.borrow();
        let timeout = hub.registry.service(wanted.service).terms.timeouts.connect;
        let probe = hub.probes(wanted.service, wanted.probe);
        drop(hub);
        if !probe {
            self.tried(wanted, Ok(()));
            return None;
        }
        let shared = Rc::clone(&self.shared);
        let port = self.hub.borrow().port_wanted(&wanted);
        Some(Box::pin(async move {
            let result = probe::connects(port, timeout, &shared.probes).await;
            Over::Tried(wanted, result)
        }))
    }

    pub(super) fn tried(&mut self, wanted: Registration, result: Result<(), Unreached>) {
        // A reload may have removed the service while the port was tried.
        if !self.hub.borrow().registry.has_service(wanted.service) {
            return self.fail(&registry::Fault::Removed.to_string(), Some("register"), None);
        }
        let about = self.about(&wanted);
        if let Err(Unreached { sentence, is_ours }) = result {
            self.hub.borrow().counters.backends_unreachable.add(u64::from(!is_ours));
            self.fail(&sentence, Some("register"), Some(about));
            return;
        }
        // A reload may have changed the rule while the port was tried.
        if let Err(msg) = self.may_join(&wanted) {
            return self.barred(&wanted, &msg, about);
        }
        let is_checked = self.hub.borrow().is_checked(wanted.service);
        if wanted.check.is_some() && is_checked {
            self.warn(&format!(
                "service {} is checked as the balancer's file says, not as asked",
                about.service
            ));
        }
        let said = about.clone();
        let done = self.change(Change::Register(wanted), "register", about, |hub, id| {
            let entry = hub.registry.get(id).expect("it has just been registered");
            let (address, weight) = (entry.backend.address, entry.backend.weight);
            let interval = hub.config.health.interval;
            let check = entry.check.clone().filter(|_| !is_checked);
            let (id, nodes) = (id.to_string(), hub.cluster_nodes());
            Reply::Registered { about: said, id, address, weight, interval, check, nodes }
        });
        if done && self.proof.is_none() {
            self.peer.ticket = None;
        }
    }
}

/// How a backend that registers is to be verified, if it is reached by TLS.
fn tls_of(joining: &Joining, was: Option<&BackendTls>) -> Result<Option<BackendTls>, String> {
    let Joining { tls, tls_name, .. } = joining;
    if !tls.unwrap_or(was.is_some()) {
        return match tls_name {
            Some(_) => Err("tls_name means nothing without tls: say \"tls\":true".to_owned()),
            None => Ok(None),
        };
    }
    let name = tls_name.clone().or_else(|| was.and_then(|was| was.name.clone()));
    Ok(Some(BackendTls { name, ca: None }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Target;

    #[test]
    fn what_a_backend_does_not_say_of_tls_stays_as_it_was() {
        let was = BackendTls { name: Some("a.example".into()), ca: None };
        let said = |tls, tls_name: Option<&str>, was| {
            let joining = Joining {
                target: Target::BuiltIn(Protocol::Tcp),
                port: 1,
                weight: None,
                name: None,
                group: None,
                proxy: None,
                http2: None,
                tls,
                tls_name: tls_name.map(Arc::from),
                probe: None,
                check: None,
            };
            tls_of(&joining, was)
        };
        let by_address = Ok(Some(BackendTls::default()));
        assert_eq!(said(None, None, None), Ok(None));
        assert_eq!(said(Some(true), None, None), by_address);
        assert_eq!(said(Some(true), Some("a.example"), None), Ok(Some(was.clone())));
        for tls in [None, Some(true)] {
            assert_eq!(said(tls, None, Some(&was)), Ok(Some(was.clone())));
        }
        assert_eq!(said(Some(false), None, Some(&was)), Ok(None));
        for tls in [None, Some(false)] {
            let told = said(tls, Some("a.example"), None).unwrap_err();
            assert_eq!(told, "tls_name means nothing without tls: say \"tls\":true");
        }
    }
}
