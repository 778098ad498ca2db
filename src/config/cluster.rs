//! The settings of a cluster: the table `[cluster]`, how its values are written, and what must hold between them.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::kinds::{Given, Kind, texts};
use crate::cluster::share::key::{NAME_BYTES_MAX, is_name};

/// Most members of the store that are named.
const ENDPOINTS_MAX: usize = 16;

/// One registry with other balancers, over etcd.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// `None`: this balancer is alone.
    pub name: Option<String>,
    /// What this balancer is called; `None`: as its host is.
    pub node: Option<String>,
    pub endpoints: Vec<Endpoint>,
    /// Who it is to the store; `None`: nobody asks.
    pub user: Option<String>,
    pub password_file: Option<PathBuf>,
    /// The authorities of the store's certificate; `None`: those that this host trusts.
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// Secrets that the balancers of the cluster share, one per line; the first seals.
    pub secret_file: Option<PathBuf>,
    pub lease: Duration,
    /// How long a backend goes on whose balancer is not heard of.
    pub orphan: Duration,
}

impl Default for Cluster {
    fn default() -> Cluster {
        Cluster {
            name: None,
            node: None,
            endpoints: Vec::new(),
            user: None,
            password_file: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            secret_file: None,
            lease: Duration::from_secs(10),
            orphan: Duration::from_secs(15),
        }
    }
}

/// A member of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub is_tls: bool,
    /// An address, without brackets, or a name.
    pub host: String,
    pub port: u16,
}

impl Endpoint {
    fn parse(text: &str) -> Option<Endpoint> {
        let (scheme, rest) = text.split_once("://")?;
        let is_tls = match scheme {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        let (host, port) = rest.strip_suffix('/').unwrap_or(rest).rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let fits = match inner {
            Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
            None => is_name(host),
        };
        fits.then(|| Endpoint { is_tls, host: inner.unwrap_or(host).to_owned(), port })
    }

    /// Whether nobody else can be in between.
    pub fn is_loopback(&self) -> bool {
        let address = self.host.parse::<IpAddr>();
        self.host == "localhost" || address.is_ok_and(|ip| ip.to_canonical().is_loopback())
    }

    /// Host and port, as a `Host` field has them.
    pub fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_tls { "https" } else { "http" };
        write!(out, "{scheme}://{}", self.authority())
    }
}

/// A name, or nothing, which is written as this word.
pub struct Name(pub &'static str);

impl Kind<Option<String>> for Name {
    fn takes(&self) -> String {
        format!("\"{}\" or up to {NAME_BYTES_MAX} letters, digits, `-`, `.` and `_`", self.0)
    }

    fn read(&self, given: &Given) -> Result<Option<String>, String> {
        match given.text() {
            Some(text) if text == self.0 => Ok(None),
            Some(text) if is_name(text) => Ok(Some(text.to_owned())),
            _ => Err(given.described()),
        }
    }

    fn show(&self, name: &Option<String>) -> String {
        format!("\"{}\"", name.as_deref().unwrap_or(self.0))
    }
}

/// Members of the store.
pub struct Endpoints;

impl Kind<Vec<Endpoint>> for Endpoints {
    fn takes(&self) -> String {
        format!(
            "a list of up to {ENDPOINTS_MAX} URLs with their ports, such as [\"https://10.1.0.5:2379\"]"
        )
    }

    fn read(&self, given: &Given) -> Result<Vec<Endpoint>, String> {
        let all = texts(given)?;
        if all.len() > ENDPOINTS_MAX {
            return Err(format!("{} of them", all.len()));
        }
        let one = |text: &&str| Endpoint::parse(text).ok_or_else(|| format!("{text:?}"));
        all.iter().map(one).collect()
    }

    fn show(&self, endpoints: &Vec<Endpoint>) -> String {
        let all: Vec<String> = endpoints.iter().map(|it| format!("\"{it}\"")).collect();
        format!("[{}]", all.join(", "))
    }
}

/// What holds between the keys of the table.
///
/// # Errors
/// One sentence that names the keys and the fix.
pub fn check(cluster: &Cluster) -> Result<(), String> {
    let Cluster { name, endpoints, user, secret_file, .. } = cluster;
    if name.is_none() {
        return match endpoints.first() {
            Some(endpoint) => Err(format!(
                "cluster.endpoints names {endpoint}, and cluster.name is empty: give the cluster a name, \
                 the same at each of its balancers, or leave the endpoints out"
            )),
            None => Ok(()),
        };
    }
    if endpoints.is_empty() {
        return Err("cluster.name needs cluster.endpoints: name the members of its etcd, such as \
                    [\"http://127.0.0.1:2379\"]"
            .to_owned());
    }
    let together = [
        ("user", user.is_some(), "password_file", cluster.password_file.is_some()),
        ("cert_file", cluster.cert_file.is_some(), "key_file", cluster.key_file.is_some()),
    ];
    for (one, has_one, other, has_other) in together {
        if has_one != has_other {
            let (given, lacks) = if has_one { (one, other) } else { (other, one) };
            return Err(format!("cluster.{given} needs cluster.{lacks}: give both, or neither"));
        }
    }
    let is_open = |endpoint: &&Endpoint| {
        let is_guarded = secret_file.is_some() || endpoint.is_tls && user.is_some();
        !endpoint.is_loopback() && !is_guarded
    };
    match endpoints.iter().find(is_open) {
        Some(endpoint) => Err(format!(
            "cluster.endpoints names {endpoint}, and whoever can write there could send users anywhere: set \
             cluster.secret_file, or use https with cluster.user"
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file;

    fn said(lines: &str) -> String {
        match file::read("f", &format!("[cluster]\n{lines}\n")) {
            Ok(config) => crate::config::rules::check(&config).err().unwrap_or_default(),
            Err(said) => said.to_string(),
        }
    }

    #[test]
    fn a_cluster_has_a_name_and_endpoints_and_is_guarded_beyond_loopback() {
        const HERE: &str =
            "name = \"a\"\nendpoints = [\"http://127.0.0.1:2379\", \"http://[::1]:1\"]";
        const FAR: &str = "name = \"a\"\nendpoints = [\"https://etcd.example:2379\"]";
        for (lines, words) in [
            ("", ""),
            (HERE, ""),
            ("name = \"a\"", "cluster.name needs cluster.endpoints"),
            ("endpoints = [\"http://localhost:1\"]", "cluster.name is empty"),
            (FAR, "set cluster.secret_file, or use https"),
            (&format!("{FAR}\nsecret_file = \"s\""), ""),
            (&format!("{FAR}\nuser = \"u\"\npassword_file = \"p\""), ""),
            (&format!("{FAR}\nuser = \"u\""), "cluster.user needs cluster.password_file"),
            (&format!("{HERE}\nkey_file = \"u\""), "cluster.key_file needs cluster.cert_file"),
            ("name = \"a b\"", "takes"),
            ("endpoints = [\"etcd:2379\"]", "takes a list of up to 16 URLs"),
            ("endpoints = [\"ftp://etcd:2379\"]", "takes a list"),
            ("endpoints = [\"http://etcd\"]", "takes a list"),
            ("endpoints = [\"http://a/b:1\"]", "takes a list"),
        ] {
            let said = said(lines);
            assert_eq!(said.is_empty(), words.is_empty(), "{lines}: {said}");
            assert!(said.contains(words), "{lines}: {said}");
        }
    }

    #[test]
    fn an_endpoint_is_shown_as_it_was_written() {
        for text in
            ["http://127.0.0.1:2379", "https://[2001:db8::1]:2379", "https://etcd-1.example:1"]
        {
            assert_eq!(Endpoint::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Endpoint::parse("http://etcd:2379/").unwrap().authority(), "etcd:2379");
    }
}
