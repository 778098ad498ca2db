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
        let wanted = file::read("lb.toml", file::tests::FULL).unwrap();
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
