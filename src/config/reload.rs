//! From the settings in use to the settings wanted, while the balancer runs. The rows of the keys say
//! which take effect at once. Pure, so that the outcome of a reload is known before it is carried
//! out.

use super::Config;
use super::keys::{Effect, KEYS};

/// The outcome of a reload.
#[derive(Clone, PartialEq, Debug)]
pub struct Change {
    /// The settings to use from now on: the wanted value where it takes effect at once, otherwise the
    /// running one.
    pub config: Config,
    /// What takes effect, as `key = value`.
    pub now: Vec<String>,
    /// What changed but needs a restart, as `key = value`.
    pub after_restart: Vec<String>,
}

/// Applies what can change while sessions run.
pub fn between(running: &Config, wanted: &Config) -> Change {
    let mut change = Change { config: running.clone(), now: Vec::new(), after_restart: Vec::new() };
    for key in KEYS {
        let value = key.show(wanted);
        if value == key.show(running) {
            continue;
        }
        let line = format!("{} = {value}", key.path());
        match key.effect {
            Effect::Now => {
                key.adopt(&mut change.config, wanted);
                change.now.push(line);
            }
            Effect::Restart => change.after_restart.push(line),
        }
    }
    change
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    #[test]
    fn the_same_settings_again_change_nothing() {
        let change = between(&Config::default(), &Config::default());
        assert_eq!(change.config, Config::default());
        assert!(change.now.is_empty() && change.after_restart.is_empty());
    }

    #[test]
    fn what_runs_keeps_its_sockets_threads_and_memory_and_takes_the_rest() {
        let text = r#"
            workers = 3
            listen.tcp = "10.0.0.1:1"
            listen.udp = 2
            listen.api = ":3"
            listen.control = "[::1]:4"
            listen.admin = "off"
            balance.policy = "source_hash"
            balance.on_backend_loss = "close"
            health.interval_ms = 900
            health.timeout_ms = 800
            health.misses = 2
            timeouts.connect_ms = 11
            timeouts.tcp_idle_ms = 12
            timeouts.half_close_ms = 13
            timeouts.drain_ms = 14
            timeouts.udp_idle_ms = 17
            limits.sessions = 15
            limits.control_connections = 16
            limits.buffer_bytes = 1_048_576
            limits.udp_sessions = 18
            limits.udp_sockets = 19
            udp.on_backend_loss = "drop"
            udp.responses = 20
            udp.quarantine_ms = 21
            udp.source_sessions = 22
            udp.source_new_per_second = 23
            udp.local_addresses = ["10.0.0.5", "::1"]
            udp.gro = false
            api.line_bytes = 1024
            api.field_bytes = 1025
            api.head_bytes = 4096
            api.fields = 50
            api.body_bytes = 24
            api.head_ms = 25
            api.body_ms = 26
            api.answer_ms = 27
            api.idle_ms = 28
            api.tunnel_idle_ms = 29
            api.upstream_idle_ms = 30
            api.upstream_idle_max = 31
            api.upstream_private_max = 32
            api.retries = 1
            api.via = "edge"
            api.trusted = ["10.0.0.0/8"]
            control.allow = ["10.0.0.0/8"]
            control.secret_file = "secrets"
            admin.token_file = "token"
            admin.socket = "/run/lb/admin.sock"
            log.level = "debug"
            log.format = "json"
            log.requests_per_second = 32
        "#;
        let wanted = file::read("lb.toml", text).unwrap();
        let change = between(&Config::default(), &wanted);
        for key in KEYS {
            let line = format!("{} = {}", key.path(), key.show(&wanted));
            let taken = key.effect == Effect::Now;
            assert_eq!(change.now.contains(&line), taken, "{line}");
            assert_eq!(change.after_restart.contains(&line), !taken, "{line}");
            let source = if taken { &wanted } else { &Config::default() };
            assert_eq!(key.show(&change.config), key.show(source), "{line}");
        }
        let restart =
            |section| !KEYS.iter().any(|key| key.section == section && key.effect == Effect::Now);
        assert!(
            restart("listen") && restart("udp") && restart("api"),
            "bound to sockets and memory"
        );
        assert!(change.now.contains(&"balance.policy = \"source_hash\"".to_owned()));
        assert_eq!(change.config.listen, Config::default().listen);
        assert_eq!(change.config.timeouts, wanted.timeouts);
    }
}
