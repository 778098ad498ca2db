//! Applying changed settings while everything runs. Owns the order of the steps: everything that can
//! be wrong is found first, and a file with a fault changes nothing. Which keys take effect is decided
//! in `config::reload`; running sessions and control connections stay as they are.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tracing::{error, info, warn};

use super::auth::Secrets;
use super::certificates::{self, Watch};
use super::doors::{NewDoor, Opened, Step};
use super::drain::Stop;
use super::hub::Hub;
use super::rights::{self, Admission, Keys, who_may_register};
use super::status::ReloadStatus;
use crate::base::time::Now;
use crate::cluster::seats::Seats;
use crate::config::reload::{Prepared, Transition, between};
use crate::config::services::{SERVICES_MAX, ServiceConfig, ServiceIds};
use crate::config::{Config, Listen, doubts, plans, rules};
use crate::logs;
use crate::tls::Tls;

/// Removed services that may still have sessions, at most.
const LEAVING_MAX: usize = 1024;
const TOO_MANY_LEAVING: &str =
    "too many removed services still have sessions: wait until some have ended";

/// Reads the settings again; they come complete and checked.
pub type Reread = Box<dyn FnMut() -> Result<Config, String>>;

/// Fits settings to this host and its doors, and says what it has worked out. If they do not fit, a
/// sentence for the operator.
pub type Fit = Box<dyn Fn(&mut Config) -> Result<Vec<String>, String>>;

/// Opens users' doors, all or none.
pub type Open = Box<dyn Fn(&[NewDoor]) -> Result<Vec<Opened>, String>>;

/// Reads the certificates, keys and authorities that settings name, in place of those in use. If one is at fault,
/// a sentence for the operator.
pub type Certify = Box<dyn Fn(&Config, &Tls) -> Result<Arc<Tls>, String>>;

/// What a reload needs from the code that started the balancer.
pub struct Reload {
    pub fit: Fit,
    pub open: Open,
    pub certify: Certify,
    pub reread: Reread,
    pub seats: Arc<Seats>,
    /// The doors of services as in the settings last applied, the others as in the first: they stay where
    /// they are until a restart.
    pub asked: Asked,
    pub ids: ServiceIds,
    pub prepared: Prepared,
    pub watch: Watch,
}

/// Where settings say that the doors are. The settings in use say where they really are.
pub struct Asked {
    listen: Listen,
    /// In the clear, and by HTTPS.
    services: BTreeMap<String, [Vec<SocketAddr>; 2]>,
}

impl Asked {
    pub fn of(config: &Config) -> Asked {
        let own = |service: &ServiceConfig| {
            (service.name.clone(), [service.listen.clone(), service.listen_tls.clone()])
        };
        Asked { listen: config.listen.clone(), services: config.services.iter().map(own).collect() }
    }

    /// A door that is asked for as before is the one that is open, even if the kernel chose its port.
    fn find_open(&self, wanted: &mut Config, running: &Config) {
        let (before, open) = (&self.listen, &running.listen);
        let of = |it: &Listen| [it.tcp, it.udp, it.api, it.api_tls, it.control, it.admin];
        let listen = &mut wanted.listen;
        let all = [
            &mut listen.tcp,
            &mut listen.udp,
            &mut listen.api,
            &mut listen.api_tls,
            &mut listen.control,
            &mut listen.admin,
        ];
        for ((wanted, before), open) in all.into_iter().zip(of(before)).zip(of(open)) {
            if *wanted == before {
                *wanted = open;
            }
        }
        for service in &mut wanted.services {
            let Some(running) = running.find_service(&service.name) else { continue };
            let Some([plain, sealed]) = self.services.get(&service.name) else { continue };
            if service.listen == *plain {
                service.listen.clone_from(&running.listen);
            }
            if service.listen_tls == *sealed {
                service.listen_tls.clone_from(&running.listen_tls);
            }
        }
    }
}

/// Who may enter by the control door and with what proof, and who may make changes over the admin
/// door. Everything for which the settings name a file is here, so a reload reads all of those files
/// again.
pub struct Entrance {
    pub admission: Admission,
    pub keys: Option<Rc<Keys>>,
    /// The tokens that permit changes over TCP.
    pub tokens: Option<Rc<Secrets>>,
}

impl Entrance {
    /// # Errors
    /// A sentence for the operator: a door open to strangers, or a secret that cannot be read.
    pub fn new(config: &Config) -> Result<Entrance, String> {
        let admission = who_may_register(config)?;
        let keys = Keys::load(config)?.map(Rc::new);
        let tokens = rights::tokens(config)?;
        if let Some(service) = &admission.everyone {
            let service = &**service;
            warn!(service, "allow lets every host register, and so receive users' traffic");
        }
        Ok(Entrance { admission, keys, tokens: tokens.map(Rc::new) })
    }
}

/// A reload of which everything that can go wrong has gone well.
struct Planned {
    change: Transition,
    derived: Vec<String>,
    warnings: Vec<String>,
    asked: Asked,
    entrance: Entrance,
    tls: Arc<Tls>,
    doors: Step,
    opened: Vec<Opened>,
}

impl Reload {
    /// Reads the settings again and applies them, or logs why not.
    pub fn run(&mut self, hub: &RefCell<Hub>, entrance: &RefCell<Entrance>, now: Now) {
        let planned = self.plan(&hub.borrow(), now);
        let mut hub = hub.borrow_mut();
        match planned {
            Ok(Planned {
                change,
                derived,
                warnings,
                asked,
                entrance: next,
                tls,
                doors,
                opened,
            }) => {
                *entrance.borrow_mut() = next;
                (self.asked, hub.derived) = (asked, derived);
                self.seats.set_max(change.config.limits.sessions);
                logs::set_level(change.config.log.level);
                say(&change);
                let Transition { config, now: done, after_restart } = change;
                let shifts_ended = hub.reloaded(config, tls, (doors, opened), now);
                warnings.iter().for_each(|warning| warn!(%warning, "settings"));
                let refused = None;
                hub.reload =
                    ReloadStatus { refused, now: done, after_restart, warnings, shifts_ended };
            }
            Err(reason) => {
                error!(%reason, "reload refused, nothing was changed");
                hub.counters.reloads_refused.one();
                hub.reload = ReloadStatus { refused: Some(reason), ..ReloadStatus::default() };
            }
        }
    }

    /// Everything that can go wrong; opening the doors comes last.
    fn plan(&mut self, hub: &Hub, now: Now) -> Result<Planned, String> {
        if hub.stop != Stop::Serving {
            return Err("the balancer is stopping".into());
        }
        let mut wanted = (self.reread)()?;
        let asked = Asked { listen: self.asked.listen.clone(), ..Asked::of(&wanted) };
        self.asked.find_open(&mut wanted, &hub.config);
        let warnings = doubts::warnings(&wanted);
        let derived = (self.fit)(&mut wanted)?;
        let mut added = BTreeSet::new();
        let mut number = || {
            let all = hub.registry.services().count() + added.len();
            if all >= LEAVING_MAX + SERVICES_MAX {
                return Err(TOO_MANY_LEAVING.to_owned());
            }
            let taken = |id| hub.registry.has_service(id) || added.contains(&id);
            let id = self.ids.next(taken);
            added.insert(id);
            Ok(id)
        };
        // What needs a restart does not change yet, so the doors are judged as they are now.
        let mut change = between(&hub.config, &wanted, self.prepared, &mut number)?;
        // Each file may fit together, and a mixture of the two still not.
        rules::check(&change.config)?;
        (self.fit)(&mut change.config)?;
        let entrance = Entrance::new(&change.config)?;
        let tls = (self.certify)(&change.config, &hub.snapshot.tls)?;
        let doors = hub.doors.step(&plans::doors(&change.config), now)?;
        if !hub.workers.can_change_doors(doors.changes()) {
            return Err(
                "the workers have yet to follow earlier reloads: try again in a moment".into()
            );
        }
        let opened = (self.open)(&doors.open)?;
        Ok(Planned { change, derived, warnings, asked, entrance, tls, doors, opened })
    }
}

impl Reload {
    /// Reads certificates and keys again if their files have changed, and turns the keys of tickets. A fault in a
    /// file is told, and those in use stay; half of a pair that is being replaced is one, until the other half
    /// has come.
    pub fn look_at_certificates(&mut self, hub: &RefCell<Hub>, now: Now) {
        if self.watch.looks(now) {
            let (config, before) = {
                let hub = hub.borrow();
                (Arc::clone(&hub.config), Arc::clone(&hub.snapshot.tls))
            };
            let read = match self.watch.finds_change(&config.tls_files()) {
                true => self.read_again(&config, &before, hub, now),
                false => None,
            };
            let turned = turned(read.as_ref().unwrap_or(&before), now);
            if let Some(tls) = turned.or(read) {
                hub.borrow_mut().certified(tls);
            }
        }
        if self.watch.warns(now) {
            certificates::warn(&hub.borrow().snapshot, now);
        }
    }

    fn read_again(
        &mut self,
        config: &Config,
        before: &Tls,
        hub: &RefCell<Hub>,
        now: Now,
    ) -> Option<Arc<Tls>> {
        match (self.certify)(config, before) {
            Ok(tls) => {
                info!("certificates read again");
                self.watch.renewed(now);
                Some(tls)
            }
            Err(reason) => {
                hub.borrow_mut().counters.certificates_refused.one();
                error!(%reason, "certificates not read again, those in use stay");
                None
            }
        }
    }
}

/// The same with new keys for tickets, if those have had their time.
fn turned(tls: &Tls, now: Now) -> Option<Arc<Tls>> {
    let turned = tls.turned(now.unix_seconds());
    let turned = turned.inspect_err(|reason| error!(%reason, "ticket keys not turned")).ok()??;
    if let Some(agreed) = &turned.agreed
        && let Err(reason) = agreed.tickets.keep()
    {
        warn!(%reason, "ticket keys not kept");
    }
    Some(Arc::new(turned))
}

fn say(change: &Transition) {
    for setting in &change.now {
        info!(%setting, "reload: in use from now on");
    }
    for setting in &change.after_restart {
        warn!(%setting, "reload: this setting needs a restart");
    }
    let (now, after_restart) = (change.now.len(), change.after_restart.len());
    info!(now, after_restart, "reloaded");
}
