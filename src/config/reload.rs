//! From the settings in use to the settings wanted, while the balancer runs. The rows of the keys say
//! which take effect at once. Pure, so that the outcome of a reload is known before it is carried
//! out.

use super::Config;
use super::keys::{Effect, KEYS, Key};
use super::services::{SERVICE_KEYS, ServiceConfig};

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

/// Applies what can change while sessions run.
pub fn between(running: &Config, wanted: &Config) -> Transition {
    let mut transition =
        Transition { config: running.clone(), now: Vec::new(), after_restart: Vec::new() };
    let mut lines = Lines::default();
    lines.compare(KEYS, "", running, wanted, &mut transition.config);
    for service in &wanted.services {
        let is_it = |other: &&ServiceConfig| other.name == service.name;
        let before = running.services.iter().find(is_it);
        let taken = transition.config.services.iter_mut().find(|it| it.name == service.name);
        let (Some(before), Some(taken)) = (before, taken) else {
            lines.after_restart.push(format!("service.{} is new", service.name));
            continue;
        };
        if before.protocol != service.protocol {
            // The rest of the table is meant for users of the other kind.
            let (name, protocol) = (&service.name, service.protocol);
            lines.after_restart.push(format!("service.{name}.protocol = \"{protocol}\""));
            continue;
        }
        lines.compare(SERVICE_KEYS, &format!("service.{}.", service.name), before, service, taken);
    }
    for service in &running.services {
        if !wanted.services.iter().any(|it| it.name == service.name) {
            lines.after_restart.push(format!("service.{} is gone", service.name));
        }
    }
    Transition { now: lines.now, after_restart: lines.after_restart, ..transition }
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
mod tests {
    use super::super::Listen;
    use super::super::file::{self, tests::EVERY_SETTING_CHANGED};
    use super::*;

    #[test]
    fn the_same_settings_again_change_nothing() {
        let transition = between(&Config::default(), &Config::default());
        assert_eq!(transition.config, Config::default());
        assert!(transition.now.is_empty() && transition.after_restart.is_empty());
    }

    /// What a reload hands on: to the workers, the control core and its door, the session limit and the
    /// log. Every other setting is read only at startup.
    const TAKEN_OVER: &[&str] = &[
        "listen.proxy_from",
        "balance.policy",
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
        let transition = between(&Config::default(), &wanted);
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
