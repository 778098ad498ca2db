//! What a worker looks up about the TLS of its users: whether it ends here, for whom they come, and what is asked
//! of them first.

use std::net::SocketAddr;

use super::Books;
use crate::cluster::doors::Requests;
use crate::cluster::{Doorway, ServiceId};
use crate::tls::Tls;
use crate::tls::clients::ClientPolicy;
use crate::worker::link::{HostAsked, Report};

impl Books {
    /// The certificates and rules of the doors with TLS.
    pub fn tls(&self) -> &Tls {
        &self.snapshot.tls
    }

    /// Whether the TLS of users who come in here ends here.
    pub fn speaks_tls(&self, at: Doorway) -> bool {
        at.is_tls || self.snapshot.service(at.service).is_some_and(|service| service.terms.tls)
    }

    /// Whether a stream says in its ClientHello which service it is for.
    pub fn is_split(&self, at: Doorway) -> bool {
        matches!(self.snapshot.doors.at(at), Requests::Split(_))
    }

    /// The service of a stream that asks for this host. `None`: nobody claims it.
    pub fn service_for(&self, at: Doorway, host: &str) -> Option<ServiceId> {
        match self.snapshot.doors.at(at) {
            Requests::All(service) => Some(service),
            Requests::Split(routes) => routes.find(host.as_bytes(), b"/"),
        }
    }

    /// What is asked of users of a service before they are served.
    pub fn clients(&self, service: ServiceId) -> Option<&ClientPolicy> {
        self.snapshot.service(service)?.terms.clients.as_deref()
    }

    /// The same for the requests of an API user whose ClientHello asks for this host. Of one whom nobody claims,
    /// nothing is.
    pub fn clients_for(&self, at: Doorway, host: &str) -> Option<&ClientPolicy> {
        let service = match self.snapshot.doors.at(at) {
            Requests::All(service) => service,
            Requests::Split(routes) => routes.find_any(host.as_bytes())?,
        };
        self.clients(service)
    }

    /// Tells why the TLS of a user could not be agreed on, who may have said already which host it asks for.
    pub fn handshake_failed(
        &mut self,
        (service, client): (ServiceId, SocketAddr),
        host: Option<&str>,
        why: &'static str,
        is_ours: bool,
    ) {
        if self.snapshot.report_sessions {
            let host = HostAsked::new(host);
            self.report(Report::HandshakeFailed { service, client, host, why, is_ours });
        }
    }
}
