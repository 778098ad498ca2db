//! The flags that stand for settings, which override the file. Which values a setting takes is
//! `config::keys`' matter.

use std::path::PathBuf;

use clap::Args;

use super::Failure;
use crate::config::keys::{self, KEYS};
use crate::config::kinds::Given;
use crate::config::{Config, file, rules};

/// Flags of the commands that start or check a balancer.
#[derive(Args, Default)]
pub struct Flags {
    /// Read settings from this TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where TCP users connect: an address with its port, a port for all addresses, or "off"
    #[arg(long, value_name = "ADDR")]
    tcp: Option<String>,
    /// Where UDP users connect; written like --tcp
    #[arg(long, value_name = "ADDR")]
    udp: Option<String>,
    /// Where API (HTTP) users connect; written like --tcp
    #[arg(long, value_name = "ADDR")]
    api: Option<String>,
    /// Where backends register; written like --tcp
    #[arg(long, value_name = "ADDR")]
    control: Option<String>,
    /// Where operators read status and metrics; written like --tcp
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// Worker threads, or "auto" for one fewer than the machine has cores
    #[arg(long, value_name = "N")]
    workers: Option<String>,
}

impl Flags {
    /// The defaults, overridden by the file, overridden by the flags, and checked.
    pub fn load(&self) -> Result<Config, Failure> {
        let mut config = self.read_file()?;
        let flags = [
            ("listen", "tcp", &self.tcp),
            ("listen", "udp", &self.udp),
            ("listen", "api", &self.api),
            ("listen", "control", &self.control),
            ("listen", "admin", &self.admin),
            ("", "workers", &self.workers),
        ];
        for (section, name, flag) in flags {
            if let Some(text) = flag {
                let key = keys::find(KEYS, section, name).expect("every flag stands for a key");
                key.set(&mut config, &given(text)).map_err(|said| format!("--{name} {said}"))?;
            }
        }
        rules::check(&config)?;
        Ok(config)
    }

    fn read_file(&self) -> Result<Config, Failure> {
        let Some(path) = &self.config else { return Ok(Config::default()) };
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| {
            format!("cannot read {name}: {error}; check the path that follows --config")
        })?;
        Ok(file::read(&name, &text)?)
    }
}

fn given(text: &str) -> Given {
    text.parse().map_or_else(|_| Given::Text(text.to_owned()), Given::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_beat_the_file_and_the_file_beats_the_defaults() {
        let folder = std::env::temp_dir().join(format!("lb-settings-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("lb.toml");
        std::fs::write(&path, "workers = 2\n[listen]\ntcp = 1111\nudp = 2222\n").unwrap();
        let flags = Flags {
            config: Some(path),
            tcp: Some("3333".to_owned()),
            workers: Some("auto".to_owned()),
            ..Flags::default()
        };
        let config = flags.load().unwrap();
        assert_eq!(config.listen.tcp.unwrap().port(), 3333);
        assert_eq!(config.listen.udp.unwrap().port(), 2222);
        assert_eq!(config.listen.api.unwrap().port(), 8083);
        assert_eq!(config.workers, None);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_wrong_flag_is_named() {
        let wrong = |flags: Flags| flags.load().unwrap_err().0;
        let said = wrong(Flags { tcp: Some("here".into()), ..Flags::default() });
        assert!(said.starts_with("--tcp takes an address with its port"), "{said}");
        let said = wrong(Flags { workers: Some("0".into()), ..Flags::default() });
        assert_eq!(said, "--workers takes a number from 1 to 128 or \"auto\", not 0");
        let said = wrong(Flags { control: Some("8080".into()), ..Flags::default() });
        assert!(said.contains("control.allow or control.secret_file"), "{said}");
        let said = wrong(Flags { config: Some("no/such.toml".into()), ..Flags::default() });
        assert!(said.starts_with("cannot read no/such.toml: "), "{said}");
    }
}
