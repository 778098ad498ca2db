//! The flags that stand for settings, which override the file. Which values a setting takes is
//! `config::keys`' matter.

use std::path::PathBuf;

use clap::Args;

use super::Failure;
use crate::cluster::Protocol;
use crate::config::keys::{self, KEYS};
use crate::config::kinds::Given;
use crate::config::services::{SERVICE_KEYS, ServiceConfig};
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
    /// Where API users connect by HTTPS; written like --tcp, and needs a certificate in the file
    #[arg(long, value_name = "ADDR")]
    api_tls: Option<String>,
    /// Where backends register; written like --tcp
    #[arg(long, value_name = "ADDR")]
    control: Option<String>,
    /// Where operators read status and metrics; written like --tcp
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// Worker threads, or "auto" for one fewer than the machine has cores
    #[arg(long, value_name = "N")]
    workers: Option<String>,
    /// A named service and its door, such as redis=tcp@:6379; may be repeated
    #[arg(long = "service", value_name = "NAME=PROTOCOL@ADDR")]
    services: Vec<String>,
}

impl Flags {
    /// The defaults, overridden by the file, overridden by the flags, and checked.
    pub fn load(&self) -> Result<Config, Failure> {
        let mut config = self.read_file()?;
        let flags = [
            ("listen", "tcp", &self.tcp),
            ("listen", "udp", &self.udp),
            ("listen", "api", &self.api),
            ("listen", "api_tls", &self.api_tls),
            ("listen", "control", &self.control),
            ("listen", "admin", &self.admin),
            ("", "workers", &self.workers),
        ];
        for (section, name, flag) in flags {
            if let Some(text) = flag {
                let key = keys::find(KEYS, section, name).expect("every flag stands for a key");
                key.set(&mut config, &given(text))
                    .map_err(|said| format!("--{} {said}", name.replace('_', "-")))?;
            }
        }
        for text in &self.services {
            add_service(&mut config, text).map_err(|said| format!("--service {said}"))?;
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

/// Adds the service that a flag describes, or gives the one of that name in the file another door.
fn add_service(config: &mut Config, text: &str) -> Result<(), String> {
    let parts = text.split_once('=').and_then(|(name, rest)| Some((name, rest.split_once('@')?)));
    let Some((name, (protocol, door))) = parts.filter(|(name, _)| ServiceConfig::is_name(name))
    else {
        return Err(format!(
            "takes a name, a protocol and a door such as redis=tcp@:6379, not \"{}\"",
            text.escape_debug()
        ));
    };
    let mut wanted = ServiceConfig::new(name, Protocol::Tcp);
    for (key, value) in [("protocol", protocol), ("listen", door)] {
        let row = keys::find(SERVICE_KEYS, "", key).expect("every service has these");
        row.set(&mut wanted, &given(value)).map_err(|said| format!("{name}: {key} {said}"))?;
    }
    match config.services.iter_mut().find(|service| service.name == name) {
        Some(known) if known.protocol != wanted.protocol => {
            Err(format!("{name} is {protocol}, but {} in the file: name it once", known.protocol))
        }
        Some(known) => {
            known.listen = wanted.listen;
            Ok(())
        }
        None => {
            config.add_service(wanted);
            Ok(())
        }
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

    fn with_services(file: &str, flags: &[&str]) -> Result<Config, String> {
        let mut config = crate::config::file::read("f", file).unwrap();
        flags.iter().try_for_each(|flag| add_service(&mut config, flag))?;
        Ok(config)
    }

    #[test]
    fn a_flag_names_a_service_or_moves_one_of_the_file() {
        let config = with_services("", &["redis=tcp@:6379", "dns=udp@127.0.0.1:53"]).unwrap();
        let doors: Vec<_> =
            config.services.iter().map(|it| (&*it.name, it.listen[0].port())).collect();
        assert_eq!(doors, [("redis", 6379), ("dns", 53)]);
        let file = "[service.redis]\nprotocol = \"tcp\"\nlisten = 1\nregister = false";
        let config = with_services(file, &["redis=tcp@2"]).unwrap();
        assert_eq!((config.services.len(), config.services[0].listen[0].port()), (1, 2));
        assert!(!config.services[0].register, "the rest of it stays");
    }

    #[test]
    fn a_wrong_service_flag_is_told_how_to_be_written() {
        for wrong in ["redis", "redis=tcp", "redis@:1", "=tcp@:1", "tcp=tcp@:1", "a b=tcp@:1"] {
            let said = with_services("", &[wrong]).unwrap_err();
            assert!(said.contains("such as redis=tcp@:6379"), "{said}");
        }
        let said = with_services("", &["redis=http@:1"]).unwrap_err();
        assert!(said.starts_with("redis: protocol takes one of \"tcp\""), "{said}");
        let said = with_services("", &["redis=tcp@off"]).unwrap_err();
        assert!(said.starts_with("redis: listen takes an address"), "{said}");
        let file = "[service.redis]\nprotocol = \"udp\"\nlisten = 1";
        let said = with_services(file, &["redis=tcp@:1"]).unwrap_err();
        assert_eq!(said, "redis is tcp, but udp in the file: name it once");
    }
}
