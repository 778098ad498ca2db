//! Of whom a certificate is asked: of the users of all services whose TLS ends here, or of those of one. Owns what
//! the settings come to for each service, and how they must agree.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use super::Config;
use super::clients::{Clients, Demand, ServiceClients};
use super::services::ServiceConfig;
use crate::cluster::Protocol;
use crate::cluster::route::Host;
use crate::tls::clients::ClientPolicy;

impl Config {
    /// Whether users of a service speak TLS that ends here.
    fn ends_tls(&self, service: &ServiceConfig) -> bool {
        match service.protocol {
            Protocol::Api => {
                let is_shared = !service.has_doors() && self.listen.api_tls.is_some();
                is_shared || !service.listen_tls.is_empty()
            }
            Protocol::Tcp => service.tls,
            Protocol::Udp => false,
        }
    }

    /// What the users of a service are asked for when they set up TLS.
    pub fn clients_of(&self, service: &ServiceConfig) -> Option<Arc<ClientPolicy>> {
        self.ends_tls(service).then(|| self.tls.clients.with(&service.clients).policy())?
    }

    /// The same for the built-in API service, the only one of them that ends TLS.
    pub fn clients_of_built_in(&self) -> Option<Arc<ClientPolicy>> {
        self.listen.api_tls.and_then(|_| self.tls.clients.policy())
    }

    /// All that users are asked for anywhere.
    pub fn client_policies(&self) -> impl Iterator<Item = Arc<ClientPolicy>> {
        let named = self.services.iter().filter_map(|service| self.clients_of(service));
        self.clients_of_built_in().into_iter().chain(named)
    }
}

/// What holds between these settings and the doors with TLS.
///
/// # Errors
/// One sentence that names the keys and the cure.
pub fn check(config: &Config) -> Result<(), String> {
    let Clients { demand, ca, crl, tells_chain } = &config.tls.clients;
    if *demand != Demand::None && ca.is_none() {
        return Err(
            "tls.clients asks users for certificates, and nobody is named who vouches for \
                    them: add tls.client_ca, a file with the certificates of authorities"
                .to_owned(),
        );
    }
    if ca.is_none() && !crl.is_empty() {
        return Err("tls.client_crl says what authorities have revoked, and tls.client_ca names \
                    none: add it, or leave the lists out"
            .to_owned());
    }
    let asks_somewhere = config.client_policies().next().is_some();
    if *tells_chain && !asks_somewhere {
        return Err("tls.client_chain has no effect, since no user is asked for a certificate: \
                    set tls.clients or a service's tls_clients, or leave it out"
            .to_owned());
    }
    config.services.iter().try_for_each(|service| own(config, service))?;
    hosts_agree(config)?;
    config.services.iter().try_for_each(|service| fallback(config, service))
}

fn own(config: &Config, service: &ServiceConfig) -> Result<(), String> {
    let (name, own) = (&service.name, &service.clients);
    if *own == ServiceClients::default() {
        return Ok(());
    }
    if !config.ends_tls(service) {
        let cure = match service.protocol {
            Protocol::Udp => "leave it out",
            Protocol::Tcp => "set `tls = true` there, or leave it out",
            Protocol::Api => "open listen.api_tls, or a `listen_tls` of its own, or leave it out",
        };
        return Err(format!(
            "service.{name} speaks of certificates of users, and no TLS of its users ends here: {cure}"
        ));
    }
    if own.ca.is_none() && !own.crl.is_empty() {
        return Err(format!(
            "service.{name}.tls_client_crl belongs to an authority of its own: add \
             service.{name}.tls_client_ca, or name the lists in tls.client_crl"
        ));
    }
    let whole = config.tls.clients.with(own);
    if whole.demand == Demand::None && (own.ca.is_some() || own.tells_chain == Some(true)) {
        return Err(format!(
            "service.{name} has an authority for certificates of users, and asks for none: set \
             service.{name}.tls_clients to \"optional\" or \"required\", or leave tls_client_ca and \
             tls_client_chain out"
        ));
    }
    if whole.demand != Demand::None && whole.ca.is_none() {
        return Err(format!(
            "service.{name}.tls_clients asks users for certificates, and nobody is named who vouches \
             for them: add service.{name}.tls_client_ca or tls.client_ca"
        ));
    }
    Ok(())
}

type Asked = Option<Arc<ClientPolicy>>;

/// A user is asked before its first request, by the host alone: whoever serves requests of one host at a door
/// has to ask for the same.
fn hosts_agree(config: &Config) -> Result<(), String> {
    let mut seen: BTreeMap<(Option<SocketAddr>, String), (&str, Asked)> = BTreeMap::new();
    if config.listen.api_tls.is_some() {
        let rest = Host::Rest.to_string();
        seen.insert((None, rest), (Protocol::Api.name(), config.clients_of_built_in()));
    }
    for service in config.services.iter().filter(|it| it.protocol == Protocol::Api) {
        let asked = config.clients_of(service);
        let own = service.listen_tls.iter().filter(|door| door.port() != 0).copied().map(Some);
        let common = (!service.has_doors()).then_some(None);
        let doors: Vec<_> = own.chain(common).collect();
        for claim in service.claims() {
            for door in &doors {
                let first = seen
                    .entry((*door, claim.host.to_string()))
                    .or_insert_with(|| (&service.name, asked.clone()));
                if first.1 != asked {
                    return Err(format!(
                        "services {} and {} both have requests for {}, and ask its users for \
                         different certificates, which is done before the path is known: make \
                         tls_clients and the keys beside it equal, or give one of them other hosts",
                        first.0, service.name, claim.host
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Nobody gets to a service that requires a certificate by way of one that does not.
fn fallback(config: &Config, service: &ServiceConfig) -> Result<(), String> {
    let Some(name) = &service.fallback else { return Ok(()) };
    let asked = match config.find_service(name) {
        Some(other) => config.clients_of(other),
        None => config.clients_of_built_in(),
    };
    let is_required = asked.as_ref().is_some_and(|policy| policy.is_required);
    if is_required && asked != config.clients_of(service) {
        return Err(format!(
            "service.{}.fallback is {name}, which requires certificates that {} does not ask its users \
             for: make tls_clients and the keys beside it equal, or name another service",
            service.name, service.name
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::{file, rules};
    use super::*;

    const HEAD: &str =
        "[listen]\napi_tls = 443\n[[tls.certificate]]\ncertificate = \"c\"\nkey = \"k\"\n";

    fn read(text: &str) -> Config {
        file::read("f", &format!("{HEAD}{text}")).unwrap()
    }

    fn wrong(text: &str) -> String {
        rules::check(&read(text)).unwrap_err()
    }

    fn told(asked: Asked) -> String {
        asked.map_or("none".to_owned(), |it| {
            let demand = if it.is_required { "required" } else { "optional" };
            format!("{demand} {} {:?} {}", it.ca.display(), it.crl, it.tells_chain)
        })
    }

    #[test]
    fn a_service_asks_as_all_do_unless_it_says_otherwise() {
        let config = read(
            r#"
            [tls]
            clients = "optional"
            client_ca = "ca"
            client_crl = ["l1", "l2"]
            [service.same]
            protocol = "api"
            hosts = ["same.example"]
            [service.strict]
            protocol = "api"
            hosts = ["strict.example"]
            tls_clients = "required"
            tls_client_chain = true
            [service.own]
            protocol = "tcp"
            listen = 1
            tls = true
            tls_client_ca = "other"
            [service.open]
            protocol = "api"
            hosts = ["open.example"]
            tls_clients = "none"
            [service.plain]
            protocol = "tcp"
            listen = 2
            [service.door]
            protocol = "api"
            listen = 3
            [service.sealed]
            protocol = "api"
            listen_tls = 4
            "#,
        );
        rules::check(&config).unwrap();
        let all = config.services.iter().map(|it| told(config.clients_of(it)));
        let all: Vec<String> =
            [told(config.clients_of_built_in())].into_iter().chain(all).collect();
        let common = r#"optional ca ["l1", "l2"] false"#;
        let strict = r#"required ca ["l1", "l2"] true"#;
        let own = "optional other [] false";
        let wanted = [common, common, strict, own, "none", "none", "none", common];
        assert_eq!(all, wanted);
        let files: Vec<String> =
            config.tls_files().iter().map(|it| it.display().to_string()).collect();
        assert_eq!(files, ["c", "ca", "k", "l1", "l2", "other"]);
        for (service, said) in config.services.iter().zip(&wanted[1..]) {
            assert_eq!(told(config.terms_of(service).clients), *said, "{}", service.name);
        }
        let plain = Config { listen: super::super::Listen::default(), ..config };
        assert_eq!(told(plain.terms().clients), "none", "nobody speaks TLS");
    }

    #[test]
    fn the_files_of_users_doors_and_of_backends_are_looked_at() {
        let text = "backend_tls.ca = \"ca.pem\"\n[[tls.certificate]]\ncertificate = \"a.pem\"\n\
                    key = \"a.key\"\n[service.s]\nprotocol = \"api\"\nbackends = [{ address = \
                    \"192.0.2.1:443\", tls = { ca = \"own.pem\" } }, \"192.0.2.2:80\"]";
        let config = file::read("f", text).unwrap();
        let names = ["a.key", "a.pem", "ca.pem", "own.pem"].map(PathBuf::from);
        assert_eq!(config.tls_files(), names);
        assert!(Config::default().tls_files().is_empty());
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_the_cure() {
        for (text, said) in [
            ("[tls]\nclients = \"required\"", "add tls.client_ca"),
            ("[tls]\nclient_crl = [\"l\"]", "tls.client_ca names none"),
            ("[tls]\nclient_chain = true", "tls.client_chain has no effect"),
            (
                "[service]\na = { protocol = \"udp\", listen = 1, tls_clients = \"optional\" }",
                "leave it out",
            ),
            (
                "[service]\na = { protocol = \"tcp\", listen = 1, tls_clients = \"none\" }",
                "`tls = true`",
            ),
            (
                "[service]\na = { protocol = \"api\", listen = 1, tls_client_ca = \"a\" }",
                "listen.api_tls",
            ),
            (
                "[service]\na = { protocol = \"api\", hosts = [\"a\"], tls_clients = \"required\" }",
                "add service.a.tls_client_ca or tls.client_ca",
            ),
            (
                "[service]\na = { protocol = \"api\", hosts = [\"a\"], tls_client_crl = [\"l\"] }",
                "add service.a.tls_client_ca",
            ),
            (
                "[service]\na = { protocol = \"api\", hosts = [\"a\"], tls_client_ca = \"a\" }",
                "set service.a.tls_clients to",
            ),
        ] {
            let refused = wrong(text);
            assert!(refused.contains(said), "{text}: {refused}");
        }
    }

    #[test]
    fn services_of_one_host_ask_its_users_for_the_same() {
        let two = |first: &str, second: &str| {
            format!(
                "[tls]\nclient_ca = \"ca\"\n[service.a]\nprotocol = \"api\"\nhosts = [\"x.example\"]\n\
                 paths = [\"/a\"]\n{first}\n[service.b]\nprotocol = \"api\"\npaths = [\"/b\"]\n{second}\n"
            )
        };
        let required = "tls_clients = \"required\"";
        let same_host = format!("hosts = [\"X.example\"]\n{required}");
        let said = wrong(&two("", &same_host));
        assert!(
            said.starts_with("services a and b both have requests for x.example, and ask"),
            "{said}"
        );
        rules::check(&read(&two(required, &same_host))).unwrap();
        let said = wrong(&two("", required));
        assert!(
            said.starts_with("services api and b both have requests for every other host"),
            "{said}"
        );
        rules::check(&read(&two("", &format!("hosts = [\"*.x.example\"]\n{required}")))).unwrap();
        let own = |port: u16| format!("listen_tls = {port}\n{same_host}");
        rules::check(&read(&two("", &own(4)))).unwrap();
        let said = wrong(&two("listen_tls = 4", &own(4)));
        assert!(said.starts_with("services a and b both have requests for x.example"), "{said}");
    }

    #[test]
    fn nobody_gets_to_a_service_by_way_of_another_that_asks_for_less() {
        let two = |first: &str, second: &str| {
            format!(
                "[tls]\nclient_ca = \"ca\"\n[service.a]\nprotocol = \"api\"\nhosts = [\"a.example\"]\n\
                 fallback = \"b\"\n{first}\n[service.b]\nprotocol = \"api\"\nhosts = [\"b.example\"]\n\
                 {second}\n"
            )
        };
        let (optional, required) = ("tls_clients = \"optional\"", "tls_clients = \"required\"");
        for less in ["", optional] {
            let said = wrong(&two(less, required));
            assert!(said.starts_with("service.a.fallback is b, which requires"), "{said}");
        }
        for (first, second) in [(required, required), (required, ""), ("", optional)] {
            rules::check(&read(&two(first, second))).unwrap();
        }
    }
}
