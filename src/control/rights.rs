//! Who may join which service. Owns the keys, which are all secrets with the services they open, what a
//! proof is good for, and the peers that the control door talks to at all. The rule of each service is
//! in the settings ([`crate::config::joining`]).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;

use super::auth::{Challenge, Secrets};
use super::legacy::format;
use crate::cluster::gate::lists;
use crate::config::Config;
use crate::config::joining::{Joining, Keyring};

/// A backend that has proved a secret. Two connections are the same owner's if all of this is the same:
/// a name alone says nothing, since each service may give out the same ones.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    pub name: Arc<str>,
    /// Where the secret stood at that time. A reload takes nothing from those who have proved it.
    keyrings: Arc<[Keyring<Arc<str>>]>,
}

impl Identity {
    /// The identity in the form for a successor.
    pub fn describe(&self) -> format::Identity {
        let keyring = |it: &Keyring<Arc<str>>| match it {
            Keyring::Global => None,
            Keyring::Service(name) => Some(name.to_string()),
        };
        let keyrings = self.keyrings.iter().map(keyring).collect();
        format::Identity { name: self.name.to_string(), keyrings }
    }

    /// An identity that was proved to somebody else.
    pub fn inherit(from: &format::Identity) -> Identity {
        let keyring = |it: &Option<String>| match it {
            None => Keyring::Global,
            Some(name) => Keyring::Service(Arc::from(name.as_str())),
        };
        let keyrings = from.keyrings.iter().map(keyring).collect();
        Identity { name: from.name.as_str().into(), keyrings }
    }

    fn holds(&self, keyring: Keyring<&str>) -> bool {
        self.keyrings.iter().any(|held| held.as_ref() == keyring)
    }
}

/// Checks that a backend may join a service.
///
/// # Errors
/// Why not, in a sentence for the backend.
pub fn may_join(
    service: &str,
    joining: Joining<'_>,
    from: IpAddr,
    identity: Option<&Identity>,
) -> Result<(), String> {
    if !joining.admits(from) {
        return Err(format!("service {service} takes no registrations from {from}"));
    }
    let Some(keyring) = joining.keyring else { return Ok(()) };
    match identity {
        Some(identity) if identity.holds(keyring) => Ok(()),
        Some(_) => Err(format!("the secret that was proved is not for service {service}")),
        None => Err(format!("service {service} takes only backends that have proved its secret")),
    }
}

/// Whether a secret, or another one, is what a backend lacks to join.
pub fn needs_secret(joining: &Joining<'_>, from: IpAddr, identity: Option<&Identity>) -> bool {
    let proved = |keyring| identity.is_some_and(|identity| identity.holds(keyring));
    joining.admits(from) && joining.keyring.is_some_and(|keyring| !proved(keyring))
}

/// Every secret there is.
pub struct Keys {
    keys: Vec<Key>,
    /// Whether no service can be joined without a proof.
    pub is_required: bool,
}

struct Key {
    secret: Box<[u8]>,
    keyrings: Arc<[Keyring<Arc<str>>]>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} secrets", self.keys.len())
    }
}

impl Keys {
    /// Reads all files of secrets; `None` if the settings name none.
    ///
    /// # Errors
    /// A sentence for the operator about the first that cannot be used.
    pub fn load(config: &Config) -> Result<Option<Keys>, String> {
        let mut read: BTreeMap<&Path, Secrets> = BTreeMap::new();
        // By secret, so that one in several files is tried once.
        let mut keyrings: BTreeMap<Box<[u8]>, Vec<Keyring<Arc<str>>>> = BTreeMap::new();
        for (path, keyring) in files(config) {
            if !read.contains_key(path) {
                read.insert(path, load(path, &keyring)?);
            }
            for secret in read[path].iter() {
                let known = keyrings.entry(secret.into()).or_default();
                if !known.contains(&keyring) {
                    known.push(keyring.clone());
                }
            }
        }
        if keyrings.is_empty() {
            return Ok(None);
        }
        let key = |(secret, keyrings): (_, Vec<_>)| Key { secret, keyrings: keyrings.into() };
        let is_required = config.joinable().all(|(_, joining)| joining.keyring.is_some());
        Ok(Some(Keys { keys: keyrings.into_iter().map(key).collect(), is_required }))
    }

    /// Who has met a challenge, if anybody has.
    pub fn identify(&self, challenge: Challenge, name: Arc<str>, answer: &str) -> Option<Identity> {
        let secrets = self.keys.iter().map(|key| &key.secret);
        let met = challenge.met_by(secrets, &name, answer);
        let key = &self.keys[*met.first()?];
        Some(Identity { name, keyrings: Arc::clone(&key.keyrings) })
    }
}

/// Reads one file of secrets.
///
/// # Errors
/// A sentence for the operator.
pub fn load(path: &Path, of: &Keyring<Arc<str>>) -> Result<Secrets, String> {
    Secrets::load(path).map_err(|fault| match of {
        Keyring::Global => fault,
        Keyring::Service(name) => format!("service.{name}.secret_file: {fault}"),
    })
}

/// The tokens that permit changes over TCP, if the settings name a file of them.
///
/// # Errors
/// A sentence for the operator.
pub fn tokens(config: &Config) -> Result<Option<Secrets>, String> {
    let read = |path| Secrets::load(path).map_err(|fault| format!("admin.token_file: {fault}"));
    config.admin.token_file.as_deref().map(read).transpose()
}

/// Every file of secrets that the settings name, and whose it is.
pub fn files(config: &Config) -> impl Iterator<Item = (&Path, Keyring<Arc<str>>)> {
    let global = config.control.secret_file.as_deref().map(|path| (path, Keyring::Global));
    let own = config.services.iter().filter_map(|table| {
        let keyring = Keyring::Service(table.name.as_str().into());
        table.secret_file.as_deref().map(|path| (path, keyring))
    });
    global.into_iter().chain(own)
}

/// Which peers the control door talks to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Admission {
    /// All that some service takes registrations from.
    allow: Vec<IpNet>,
    /// Whether some service takes a proof from anywhere.
    anywhere: bool,
    /// Whether this host is let in.
    loopback: bool,
    /// A service that every host may join without a secret, which deserves a warning.
    pub everyone: Option<Arc<str>>,
}

impl Admission {
    /// Whether the door talks to a peer at `address` at all. Which services it may join is seen when it
    /// asks to.
    pub fn admits(&self, address: IpAddr) -> bool {
        self.anywhere
            || self.loopback && address.to_canonical().is_loopback()
            || lists(&self.allow, address)
    }
}

/// Who may register, according to the configuration: on a loopback door every local peer, on any other
/// only hosts on a list or with a secret.
///
/// # Errors
/// A sentence for the operator when the door would be open to strangers.
pub fn who_may_register(config: &Config) -> Result<Admission, String> {
    if let Some(address) = config.listen.control
        && !is_loopback(address)
        && let Some(service) = config.unguarded()
    {
        return Err(format!(
            "the control port would be open to strangers on {address}, who could register for service \
             {service}: set [control] allow to the networks of your backends, or [control] secret_file, \
             or listen on 127.0.0.1"
        ));
    }
    let global = config.joining(None);
    let named = config.services.iter().filter(|table| table.register);
    let all = || std::iter::once(global).chain(named.clone().map(|it| config.joining(Some(it))));
    let mut allow: Vec<IpNet> = all().flat_map(|joining| joining.allow.iter().copied()).collect();
    allow.sort_unstable();
    allow.dedup();
    let open = |joining: &Joining<'_>| joining.allow.is_empty();
    let everyone = config.joinable().find(|(_, joining)| joining.is_everyone());
    Ok(Admission {
        allow,
        anywhere: all().any(|joining| open(&joining) && joining.keyring.is_some()),
        loopback: all().any(|joining| open(&joining)),
        everyone: everyone.map(|(name, _)| name.into()),
    })
}

fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;
    use crate::cluster::Protocol;
    use crate::config::services::ServiceConfig;
    use crate::control::auth::mac;

    fn config(control: &str, allow: &[&str], secret: bool) -> Config {
        let mut config = Config::default();
        config.listen.control = Some(control.parse().unwrap());
        config.control.allow = allow.iter().map(|network| network.parse().unwrap()).collect();
        config.control.secret_file = secret.then(|| "secret".into());
        config
    }

    /// Files of secrets, which are removed with it.
    struct Files(PathBuf);

    impl Files {
        fn new(name: &str) -> Files {
            let folder = std::env::temp_dir().join(format!("lb-{name}-{}", std::process::id()));
            fs::create_dir(&folder).unwrap();
            Files(folder)
        }

        fn with(&self, name: &str, secrets: &str) -> Option<PathBuf> {
            let path = self.0.join(name);
            fs::write(&path, secrets).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            Some(path)
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const GLOBAL: &str = "the secret of all others";
    const OF_A: &str = "the secret of service a";
    const OF_B: &str = "the secret of service b";
    const OF_BOTH: &str = "a secret of both of them";

    /// Services `a` and `b` with secrets of their own, and `c` without.
    fn services(files: &Files) -> Config {
        let mut config = Config::default();
        let service = |name| ServiceConfig::new(name, Protocol::Tcp);
        config.set_services(["a", "b", "c"].map(service).into());
        config.services[0].secret_file = files.with("a", &format!("{OF_BOTH}\n{OF_A}\n"));
        config.services[1].secret_file = files.with("b", &format!("{OF_B}\n{OF_BOTH}\n"));
        config
    }

    fn proved(keys: &Keys, secret: &str, name: &str) -> Option<Identity> {
        let challenge = Challenge::new([7; 32]);
        let answer = mac(secret.as_bytes(), challenge.nonce(), name);
        keys.identify(challenge, name.into(), &answer)
    }

    /// The services that may be joined from `from`.
    fn joined(config: &Config, from: &str, identity: Option<&Identity>) -> Vec<String> {
        let from = from.parse().unwrap();
        let all = config.joinable();
        let may = all.filter(|(name, rule)| may_join(name, *rule, from, identity).is_ok());
        may.map(|(name, _)| name.to_owned()).collect()
    }

    #[test]
    fn rule_12_a_secret_opens_the_services_that_name_it_and_no_others() {
        let files = Files::new("keys");
        let mut config = services(&files);
        config.control.secret_file = files.with("all", GLOBAL);
        let keys = Keys::load(&config).unwrap().unwrap();
        assert!(keys.is_required);
        for (secret, opened) in [
            (GLOBAL, &["tcp", "udp", "api", "c"][..]),
            (OF_A, &["a"]),
            (OF_B, &["b"]),
            (OF_BOTH, &["a", "b"]),
        ] {
            let identity = proved(&keys, secret, "web").unwrap();
            assert_eq!(joined(&config, "127.0.0.1", Some(&identity)), opened, "{secret}");
        }
        assert_eq!(proved(&keys, "a secret that is in no file", "web"), None);
        assert_eq!(joined(&config, "127.0.0.1", None), [""; 0]);
    }

    #[test]
    fn rule_12_without_global_secrets_the_unproven_join_what_needs_none() {
        let files = Files::new("optional");
        let mut config = services(&files);
        let keys = Keys::load(&config).unwrap().unwrap();
        assert!(!keys.is_required);
        let open = ["tcp", "udp", "api", "c"];
        assert_eq!(joined(&config, "127.0.0.1", None), open);
        assert_eq!(joined(&config, "10.0.0.1", None), [""; 0], "and only from this host");
        config.services[2].allow = Some(vec!["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(joined(&config, "10.0.0.1", None), ["c"]);
        let of_a = proved(&keys, OF_A, "web").unwrap();
        assert_eq!(joined(&config, "10.0.0.1", Some(&of_a)), ["a", "c"]);
        config.services[2].register = false;
        config.listen.tcp = None;
        config.listen.udp = None;
        config.listen.api = None;
        assert!(Keys::load(&config).unwrap().unwrap().is_required, "nothing is left to join");
        assert!(Keys::load(&Config::default()).unwrap().is_none());
    }

    #[test]
    fn rule_12_one_name_with_secrets_of_different_services_is_two_owners() {
        let files = Files::new("owners");
        let keys = Keys::load(&services(&files)).unwrap().unwrap();
        let identity = |secret, name| proved(&keys, secret, name).unwrap();
        assert_eq!(identity(OF_A, "web"), identity(OF_A, "web"));
        assert_ne!(identity(OF_A, "web"), identity(OF_B, "web"));
        assert_ne!(identity(OF_A, "web"), identity(OF_BOTH, "web"));
        assert_ne!(identity(OF_A, "web"), identity(OF_A, "db"));
    }

    #[test]
    fn a_file_of_secrets_that_cannot_be_used_is_named_with_its_service() {
        let files = Files::new("unusable");
        let mut config = services(&files);
        config.services[1].secret_file = Some(files.0.join("none"));
        let fault = Keys::load(&config).unwrap_err();
        assert!(fault.starts_with("service.b.secret_file: cannot read"), "{fault}");
    }

    #[test]
    fn only_loopback_may_be_open_without_a_list_or_a_secret() {
        for open in ["127.0.0.1:8080", "127.9.9.9:1", "[::1]:8080", "[::ffff:127.0.0.1]:80"] {
            let admission = who_may_register(&config(open, &[], false)).unwrap();
            assert!(admission.admits("127.0.0.1".parse().unwrap()), "{open}");
            assert!(!admission.admits("10.0.0.1".parse().unwrap()), "{open}");
        }
        for refused in ["0.0.0.0:8080", "[::]:8080", "10.0.0.1:8080", "[2001:db8::1]:80"] {
            let fault = who_may_register(&config(refused, &[], false)).unwrap_err();
            assert!(fault.contains("allow") && fault.contains("secret_file"), "{fault}");
            assert!(who_may_register(&config(refused, &["10.0.0.0/8"], false)).is_ok());
            assert!(who_may_register(&config(refused, &[], true)).is_ok());
        }
        let mut off = config("0.0.0.0:1", &[], false);
        off.listen.control = None;
        assert!(who_may_register(&off).is_ok());
    }

    #[test]
    fn a_list_admits_only_its_networks_even_as_mapped_addresses() {
        let listed = config("0.0.0.0:80", &["10.1.0.0/16", "2001:db8::/32"], true);
        let admission = who_may_register(&listed).unwrap();
        for (address, admitted) in [
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("2001:db8::7", true),
            ("10.2.0.1", false),
            ("127.0.0.1", false),
            ("2001:db9::7", false),
        ] {
            assert_eq!(admission.admits(address.parse().unwrap()), admitted, "{address}");
        }
        assert_eq!(admission.everyone, None);
        let anyone = who_may_register(&config("0.0.0.0:80", &["0.0.0.0/0"], false)).unwrap();
        assert_eq!(anyone.everyone.as_deref(), Some("tcp"));
        let proven = who_may_register(&config("0.0.0.0:80", &[], true)).unwrap();
        assert!(proven.admits("203.0.113.9".parse().unwrap()) && proven.everyone.is_none());
    }

    #[test]
    fn the_door_admits_a_host_that_any_service_takes() {
        let mut config = config("0.0.0.0:80", &["10.1.0.0/16"], false);
        let mut service = ServiceConfig::new("a", Protocol::Tcp);
        service.allow = Some(vec!["192.168.0.0/16".parse().unwrap()]);
        config.set_services(vec![service]);
        let admits = |config: &Config, address: &str| {
            who_may_register(config).unwrap().admits(address.parse().unwrap())
        };
        assert!(admits(&config, "10.1.2.3") && admits(&config, "192.168.1.1"));
        assert!(!admits(&config, "127.0.0.1") && !admits(&config, "10.2.0.1"));
        config.services[0].register = false;
        assert!(!admits(&config, "192.168.1.1"), "a service without registrations takes nobody");
        config.services[0].register = true;
        config.services[0].secret_file = Some("own".into());
        config.services[0].allow = Some(Vec::new());
        assert!(admits(&config, "203.0.113.9"), "who proves its secret may come from anywhere");
    }
}
