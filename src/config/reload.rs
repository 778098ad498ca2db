//! From the settings that are in use to those that are wanted, while the balancer runs. Owns which
//! keys take effect at once and which need a restart; pure, so that a reload can be told before it
//! is done.

use super::Config;
use super::keys::KEYS;

/// What a reload comes to.
#[derive(Clone, PartialEq, Debug)]
pub struct Change {
    /// In use from now on: the wanted values where they take effect at once, else the running ones.
    pub config: Config,
    /// What takes effect, as `key = value`.
    pub now: Vec<String>,
    /// What was asked for and waits for a restart, as `key = value`.
    pub after_restart: Vec<String>,
}

/// Takes over what can change while sessions run. The rest is bound to sockets, threads and memory
/// that were made at the start.
pub fn between(running: &Config, wanted: &Config) -> Change {
    let config = merged(running, wanted);
    let (mut now, mut after_restart) = (Vec::new(), Vec::new());
    for key in KEYS {
        let value = key.show(wanted);
        if value == key.show(running) {
            continue;
        }
        let taken = value == key.show(&config);
        let list = if taken { &mut now } else { &mut after_restart };
        list.push(format!("{} = {value}", key.path()));
    }
    Change { config, now, after_restart }
}

fn merged(running: &Config, wanted: &Config) -> Config {
    let mut config = running.clone();
    config.balance = wanted.balance;
    config.health = wanted.health;
    config.timeouts = wanted.timeouts;
    config.limits.sessions = wanted.limits.sessions;
    config.limits.control_connections = wanted.limits.control_connections;
    config.control = wanted.control.clone();
    config.log.level = wanted.log.level;
    config
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
        let names = |said: &[String]| -> Vec<String> {
            said.iter().map(|line| line.split(" = ").next().unwrap().to_owned()).collect()
        };
        let restart = [
            "workers",
            "listen.tcp",
            "listen.udp",
            "listen.api",
            "listen.control",
            "listen.admin",
            "limits.buffer_bytes",
            "limits.udp_sessions",
            "limits.udp_sockets",
            "udp.on_backend_loss",
            "udp.responses",
            "udp.quarantine_ms",
            "udp.source_sessions",
            "udp.source_new_per_second",
            "udp.local_addresses",
            "udp.gro",
            "api.line_bytes",
            "api.field_bytes",
            "api.head_bytes",
            "api.fields",
            "api.body_bytes",
            "api.head_ms",
            "api.body_ms",
            "api.answer_ms",
            "api.idle_ms",
            "api.tunnel_idle_ms",
            "api.upstream_idle_ms",
            "api.upstream_idle_max",
            "api.upstream_private_max",
            "api.retries",
            "api.via",
            "api.trusted",
            "admin.token_file",
            "admin.socket",
            "log.format",
            "log.requests_per_second",
        ];
        assert_eq!(names(&change.after_restart), restart);
        let now: Vec<String> =
            KEYS.iter().map(|key| key.path()).filter(|key| !restart.contains(&&**key)).collect();
        assert_eq!(names(&change.now), now);
        assert!(change.now.contains(&"balance.policy = \"source_hash\"".to_owned()));
        assert_eq!(change.config.listen, Config::default().listen);
        assert_eq!(change.config.timeouts, wanted.timeouts);
    }
}
