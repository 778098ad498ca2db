//! From the settings in use to the settings wanted, while the balancer runs. The rows of the keys say
//! which take effect at once. Pure, so that the outcome of a reload is known before it is carried
//! out.

use super::keys::{Effect, KEYS, Key};
use super::services::{SERVICE_KEYS, ServiceConfig};
use super::{Config, plans};
use crate::cluster::{Protocol, ServiceId};

/// The outcome of a reload.
#[derive(Clone, PartialEq, Debug)]
pub struct Transition {
    /// The settings to use from now on: the wanted value where it takes effect at once, otherwise the
    /// running one.
    pub config: Config,
    /// What takes effect, as `key = value`.
    pub now: Vec<String>,
    /// What changed but needs a restart, as `key = value`.
    pub after_restart: Vec<String>,
}

/// The protocols for whose users the balancer has set memory aside, which it does once, when it starts.
#[derive(Clone, Copy, Debug)]
pub struct Prepared {
    udp: bool,
    api: bool,
}

impl Prepared {
    /// For the users who come by the doors of these settings.
    pub fn for_doors_of(config: &Config) -> Prepared {
        let [_, udp, api] = Protocol::ALL.map(|protocol| plans::has_door(config, protocol));
        Prepared { udp, api }
    }

    fn is_for(self, protocol: Protocol) -> bool {
        match protocol {
            Protocol::Tcp => true,
            Protocol::Udp => self.udp,
            Protocol::Api => self.api,
        }
    }
}

/// Applies what can change while sessions run. `number` gives each new service a number.
///
/// # Errors
/// One sentence for the operator: a change that is not possible, whenever it is made.
pub fn between(
    running: &Config,
    wanted: &Config,
    prepared: Prepared,
    number: &mut dyn FnMut() -> Result<ServiceId, String>,
) -> Result<Transition, String> {
    let (mut config, mut lines) = (running.clone(), Lines::default());
    lines.compare(KEYS, "", running, wanted, &mut config);
    let new = |service: &&ServiceConfig| running.find_service(&service.name).is_none();
    config.services.clear();
    // Those that stay keep their place, so that a door which API services share stays the same one's.
    for before in &running.services {
        let ServiceConfig { name, protocol, .. } = before;
        let Some(service) = wanted.find_service(name) else {
            lines.now.push(format!("service.{name} is gone"));
            continue;
        };
        if service.protocol != *protocol {
            return Err(format!(
                "service.{name}.protocol is {protocol} while users are served, not {}: give the new \
                 service another name",
                service.protocol
            ));
        }
        let mut taken = before.clone();
        lines.compare(SERVICE_KEYS, &format!("service.{name}."), before, service, &mut taken);
        config.services.push(taken);
    }
    for service in wanted.services.iter().filter(new) {
        let (name, protocol) = (&service.name, service.protocol);
        if prepared.is_for(protocol) {
            lines.now.push(format!("service.{name} is new"));
            config.services.push(ServiceConfig { id: number()?, ..service.clone() });
        } else {
            lines.after_restart.push(format!("service.{name} is the first {protocol} service"));
        }
    }
    Ok(Transition { config, now: lines.now, after_restart: lines.after_restart })
}

/// What has changed, as it is told.
#[derive(Default)]
struct Lines {
    now: Vec<String>,
    after_restart: Vec<String>,
}

impl Lines {
    /// Compares two values of one table of keys. What takes effect at once is copied to `taken`, and each
    /// difference is told as `key = value` behind `prefix`.
    fn compare<T>(
        &mut self,
        keys: &[Key<T>],
        prefix: &str,
        running: &T,
        wanted: &T,
        taken: &mut T,
    ) {
        for key in keys {
            let value = key.show(wanted);
            if value == key.show(running) {
                continue;
            }
            let line = format!("{prefix}{} = {value}", key.path());
            match key.effect {
                Effect::Now => {
                    key.adopt(taken, wanted);
                    self.now.push(line);
                }
                Effect::Restart => self.after_restart.push(line),
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Listen;
    use super::super::file::{self, tests::EVERY_SETTING_CHANGED};
    use super::*;

    /// The outcome where new services get the numbers 100, 101 and so on.
    pub fn change(running: &Config, wanted: &Config) -> Result<Transition, String> {
        let mut numbers = (100..).map(ServiceId);
        let prepared = Prepared::for_doors_of(&Config::default());
        between(running, wanted, prepared, &mut || Ok(numbers.next().unwrap()))
    }

    #[test]
    fn the_same_settings_again_change_nothing() {
        let transition = change(&Config::default(), &Config::default()).unwrap();
        assert_eq!(transition.config, Config::default());
        assert!(transition.now.is_empty() && transition.after_restart.is_empty());
    }

    /// What a reload hands on: to the workers, the control core and its door, the session limit and the
    /// log. Every other setting is read only at startup.
    const TAKEN_OVER: &[&str] = &[
        "listen.proxy_from",
        "balance.policy",
        "balance.hash",
        "balance.on_backend_loss",
        "health.interval_ms",
        "health.timeout_ms",
        "health.misses",
        "timeouts.connect_ms",
        "timeouts.tcp_idle_ms",
        "timeouts.half_close_ms",
        "timeouts.udp_idle_ms",
        "timeouts.drain_ms",
        "limits.sessions",
        "limits.control_connections",
        "udp.responses",
        "api.body_bytes",
        "api.body_ms",
        "api.answer_ms",
        "api.tunnel_idle_ms",
        "api.retries",
        "tls.certificate",
        "tls.strict_sni",
        "tls.ragged_end",
        "tls.clients",
        "tls.client_ca",
        "tls.client_crl",
        "tls.client_chain",
        "tls.ticket_file",
        "tls.handshake_ms",
        "tls.handshakes",
        "backend_tls.ca",
        "backend_tls.verify",
        "control.allow",
        "control.secret_file",
        "admin.token_file",
        "log.level",
    ];

    #[test]
    fn only_settings_that_a_reload_hands_on_claim_to_take_effect_at_once() {
        let now = KEYS.iter().filter(|key| key.effect == Effect::Now);
        assert_eq!(now.map(|key| key.path()).collect::<Vec<_>>(), TAKEN_OVER);
    }

    #[test]
    fn a_reload_applies_only_what_takes_effect_at_once() {
        let wanted = file::read("lb.toml", EVERY_SETTING_CHANGED).unwrap();
        let transition = change(&Config::default(), &wanted).unwrap();
        for key in KEYS {
            let line = format!("{} = {}", key.path(), key.show(&wanted));
            let taken = key.effect == Effect::Now;
            assert_eq!(transition.now.contains(&line), taken, "{line}");
            assert_eq!(transition.after_restart.contains(&line), !taken, "{line}");
            let source = if taken { &wanted } else { &Config::default() };
            assert_eq!(key.show(&transition.config), key.show(source), "{line}");
        }
        assert!(transition.now.contains(&"balance.policy = \"source_hash\"".to_owned()));
        let listen = Listen { proxy_from: wanted.listen.proxy_from, ..Listen::default() };
        assert_eq!(transition.config.listen, listen);
        assert_eq!(transition.config.timeouts, wanted.timeouts);
    }
}
