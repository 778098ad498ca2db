//! Who may join which service, as the settings say it: from which networks, and with whose secrets. Owns the
//! rule of each service, which takes the place of the global one where the service has its own.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::Config;
use super::services::ServiceConfig;
use crate::cluster::Protocol;
use crate::cluster::gate::lists;

/// Whose secrets a backend has to prove.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Keyring<Name> {
    /// Those of `control.secret_file`.
    Global,
    /// Those of the service of this name.
    Service(Name),
}

impl Keyring<Arc<str>> {
    pub fn as_ref(&self) -> Keyring<&str> {
        match self {
            Keyring::Global => Keyring::Global,
            Keyring::Service(name) => Keyring::Service(name),
        }
    }
}

/// Who may join a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Joining<'c> {
    pub allow: &'c [IpNet],
    /// `None`: no proof is needed.
    pub keyring: Option<Keyring<&'c str>>,
}

impl Joining<'_> {
    /// Whether a backend at `address` may join. Without a list, only this host may, or whoever proves a
    /// secret.
    pub fn admits(&self, address: IpAddr) -> bool {
        match self.allow.is_empty() {
            true => self.keyring.is_some() || address.to_canonical().is_loopback(),
            false => lists(self.allow, address),
        }
    }

    /// Whether anything keeps strangers out when the control door is open to other hosts.
    pub fn is_guarded(&self) -> bool {
        !self.allow.is_empty() || self.keyring.is_some()
    }

    /// Whether every host may join.
    pub fn is_everyone(&self) -> bool {
        self.keyring.is_none() && self.allow.iter().any(|network| network.prefix_len() == 0)
    }
}

impl Config {
    /// Who may join a service: with its table, or a built-in one, which has none.
    pub fn joining<'c>(&'c self, table: Option<&'c ServiceConfig>) -> Joining<'c> {
        let allow = table.and_then(|table| table.allow.as_ref()).unwrap_or(&self.control.allow);
        let own = table.filter(|table| table.secret_file.is_some());
        let keyring = match own {
            Some(table) => Some(Keyring::Service(table.name.as_str())),
            None => self.control.secret_file.as_ref().map(|_| Keyring::Global),
        };
        Joining { allow, keyring }
    }

    /// Every service that has users and takes registrations, by name, with who may join it.
    pub fn joinable(&self) -> impl Iterator<Item = (&str, Joining<'_>)> {
        let open = Protocol::ALL.into_iter().filter(|it| self.listen.has(*it));
        let built_in = open.map(|protocol| (protocol.name(), self.joining(None)));
        let named = self.services.iter().filter(|table| table.register);
        built_in.chain(named.map(|table| (table.name.as_str(), self.joining(Some(table)))))
    }

    /// A service that any host could join if the control door were open to other hosts.
    pub fn unguarded(&self) -> Option<&str> {
        self.joinable().find(|(_, joining)| !joining.is_guarded()).map(|(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    const SERVICES: &str = r#"
        [service.own]
        protocol = "tcp"
        listen = 1
        allow = ["192.168.0.0/16"]
        secret_file = "own"
        [service.listed]
        protocol = "tcp"
        listen = 2
        allow = ["192.168.0.0/16"]
        [service.plain]
        protocol = "tcp"
        listen = 3
        [service.closed]
        protocol = "tcp"
        listen = 4
        register = false
    "#;

    fn config(global: &str) -> Config {
        file::read("f", &format!("{global}\n{SERVICES}")).unwrap()
    }

    fn joining<'c>(config: &'c Config, name: &str) -> Joining<'c> {
        config.joining(config.services.iter().find(|table| table.name == name))
    }

    #[test]
    fn rule_12_a_services_own_secrets_and_networks_replace_the_global_ones() {
        let without = config("control.allow = [\"10.0.0.0/8\"]");
        let with = config("control.allow = [\"10.0.0.0/8\"]\ncontrol.secret_file = \"all\"");
        for (name, keyring, [near, far]) in [
            ("own", Some(Keyring::Service("own")), [false, true]),
            ("listed", None, [false, true]),
            ("plain", None, [true, false]),
            ("tcp", None, [true, false]),
        ] {
            let joining = |config| joining(config, name);
            let admits = |address: &str| joining(&without).admits(address.parse().unwrap());
            assert_eq!([admits("10.1.1.1"), admits("::ffff:192.168.1.1")], [near, far], "{name}");
            assert_eq!(joining(&without).keyring, keyring, "{name}");
            assert_eq!(joining(&with).keyring, keyring.or(Some(Keyring::Global)), "{name}");
        }
    }

    #[test]
    fn without_a_list_this_host_may_join_and_whoever_proves_a_secret() {
        let config = config("");
        let admits = |name, address: &str| joining(&config, name).admits(address.parse().unwrap());
        assert!(admits("plain", "127.0.0.1") && !admits("plain", "10.1.1.1"));
        let listed = config.joining(None);
        assert!(!listed.is_guarded() && !listed.is_everyone());
        let anyone = file::read("f", "control.allow = [\"::/0\"]").unwrap();
        assert!(anyone.joining(None).is_everyone());
    }

    #[test]
    fn every_service_that_takes_registrations_must_be_guarded() {
        let off = "listen.tcp = \"off\"\nlisten.udp = \"off\"\nlisten.api = \"off\"";
        assert_eq!(config("").unguarded(), Some("tcp"));
        assert_eq!(config(off).unguarded(), Some("plain"), "what is closed needs no guard");
        let sealed = format!("{off}\nlisten.api_tls = 8443");
        assert_eq!(config(&sealed).unguarded(), Some("api"), "it is open for HTTPS alone");
        for guard in ["allow = [\"10.0.0.0/8\"]", "secret_file = \"all\""] {
            assert_eq!(config(&format!("control.{guard}")).unguarded(), None);
        }
    }
}
