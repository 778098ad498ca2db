//! The shares of a service's groups. Owns the way there from the configuration and from an operator's shift:
//! a shift applies until the next reload, with which the configuration's shares are back.

use tracing::info;

use super::Hub;
use crate::base::time::Now;
use crate::cluster::groups::{Group, SHARE_MAX};
use crate::cluster::{Service, ServiceId};
use crate::config::Config;
use crate::control::history::marks::What;
use crate::control::services;
use crate::control::status::ShiftEnded;

impl Hub {
    /// Gives each service the groups and shares of this configuration. Returns whether the workers would see
    /// a difference, and the shifts that are over.
    pub(super) fn follow_shares(&mut self, config: &Config) -> (bool, Vec<ShiftEnded>) {
        let (mut changed, mut ended) = (false, Vec::new());
        for table in &config.services {
            let id = table.id;
            let shifted = self.is_shifted(self.registry.service(id));
            if self.registry.group(id, &table.shares()) {
                changed = true;
                if shifted {
                    let shares = shown(&self.registry.service(id).groups);
                    info!(service = %table.name, shares, "reload: the shift is over");
                    ended.push(ShiftEnded { service: table.name.clone(), shares });
                }
            }
        }
        (changed, ended)
    }

    /// Gives groups of a service other shares until the next reload; those not named keep theirs. The workers
    /// learn of it with the next publication, and running sessions stay.
    ///
    /// # Errors
    /// Why not, in a sentence for the operator; nothing has changed.
    pub fn shift(&mut self, name: &str, wanted: &[(String, u64)]) -> Result<ServiceId, String> {
        let service = services::named(&self.registry, name)?;
        let (id, groups) = (service.id, service.groups.clone());
        if groups.is_empty() {
            return Err(format!(
                "service {name} has no groups: give it some in [service.{name}] and reload"
            ));
        }
        let mut shares: Vec<(&str, u8)> = groups.iter().map(|it| (&*it.name, it.share)).collect();
        for (group, share) in wanted {
            let Some(row) = shares.iter_mut().find(|row| row.0 == group) else {
                return Err(format!(
                    "service {name} has no group {group}; its groups are {}",
                    shown(&groups)
                ));
            };
            let fits = u8::try_from(*share).ok().filter(|share| *share <= SHARE_MAX);
            row.1 = fits
                .ok_or_else(|| format!("a share is from 0 to {SHARE_MAX}, not {group}={share}"))?;
        }
        if shares.iter().all(|row| row.1 == 0) {
            return Err(format!(
                "service {name} would have no users left: give one of its groups a share above 0"
            ));
        }
        if self.registry.group(id, &shares) {
            self.publication.ask();
            let name = &self.registry.service(id).name;
            self.history.marks.add(Now::read(), What::Shift, Some(name), None);
        }
        let (from, to) = (shown(&groups), shown(&self.registry.service(id).groups));
        info!(service = %name, from, to, "shares shifted");
        Ok(id)
    }

    /// The share that the configuration gives to a group.
    pub fn share_in_file(&self, service: &Service, group: &str) -> Option<u8> {
        let table = self.config.service(service.id)?;
        table.groups.iter().find(|it| it.name == group).map(|it| it.share)
    }

    /// Whether a shift has given the service other shares than the configuration does.
    pub fn is_shifted(&self, service: &Service) -> bool {
        let differs = |it: &Group| self.share_in_file(service, &it.name) != Some(it.share);
        service.groups.iter().any(differs)
    }
}

/// Groups with their shares, as `lb shift` takes them.
pub fn shown(groups: &[Group]) -> String {
    let shown: Vec<String> =
        groups.iter().map(|group| format!("{}={}", group.name, group.share)).collect();
    shown.join(" ")
}
