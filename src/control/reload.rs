//! Applying changed settings while everything runs. Owns the order of the steps: everything that can
//! be wrong is found first, and a file with a fault changes nothing. Which keys take effect is decided
//! in `config::reload`; running sessions and control connections stay as they are.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use tracing::{error, info, warn};

use super::auth::Secrets;
use super::hub::Hub;
use super::rights::{Admission, Keys, who_may_register};
use super::status::ReloadStatus;
use crate::base::time::Now;
use crate::cluster::seats::Seats;
use crate::config::Config;
use crate::config::reload::{Transition, between};
use crate::config::rules;
use crate::logs;

/// Reads the settings again; they come complete, checked, and within what the host can hold.
pub type Reread = Box<dyn FnMut() -> Result<Config, String>>;

/// Whether settings fit this host and its doors. If not, a sentence for the operator.
pub type Fits = Box<dyn Fn(&Config) -> Result<(), String>>;

/// What a reload needs from the code that started the balancer.
pub struct Reload {
    pub fits: Fits,
    pub reread: Reread,
    pub seats: Arc<Seats>,
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
        let tokens = config.admin.token_file.as_deref().map(Secrets::load).transpose()?;
        if let Some(service) = &admission.everyone {
            let service = &**service;
            warn!(service, "allow lets every host register, and so receive users' traffic");
        }
        Ok(Entrance { admission, keys, tokens: tokens.map(Rc::new) })
    }
}

impl Reload {
    /// Reads the settings again and applies them, or logs why not.
    pub fn run(&mut self, hub: &RefCell<Hub>, entrance: &RefCell<Entrance>) {
        let planned = (self.reread)().and_then(|wanted| {
            // What needs a restart does not change yet, so the door is judged as it is now.
            let change = between(&hub.borrow().config, &wanted);
            // Each file may fit together, and a mixture of the two still not.
            rules::check(&change.config)?;
            (self.fits)(&change.config)?;
            Entrance::new(&change.config).map(|next| (change, next))
        });
        match planned {
            Ok((change, next)) => {
                *entrance.borrow_mut() = next;
                self.seats.set_max(change.config.limits.sessions);
                logs::set_level(change.config.log.level);
                say(&change);
                let mut hub = hub.borrow_mut();
                let Transition { config, now, after_restart } = change;
                let shifts_ended = hub.reloaded(config, Now::read());
                hub.reload = ReloadStatus { refused: None, now, after_restart, shifts_ended };
            }
            Err(reason) => {
                error!(%reason, "reload refused, nothing was changed");
                let mut hub = hub.borrow_mut();
                hub.counters.reloads_refused.one();
                hub.reload = ReloadStatus { refused: Some(reason), ..ReloadStatus::default() };
            }
        }
    }
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
