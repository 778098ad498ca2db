//! Kinds of values that only the table of a service has; otherwise like [`super::kinds`].

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use super::kinds::{DoorAddress, Given, Kind, list, quoted, texts};
use crate::cluster::groups::{GROUPS_MAX, SHARE_MAX};
use crate::cluster::route::Host;
use crate::cluster::{WEIGHT_MAX, is_grpc_service};
use crate::metrics::BACKENDS_MAX;
use crate::tls::backends::{self, BackendTls};

/// Bytes of the name of a service or a group, at most.
pub const NAME_BYTES_MAX: usize = 63;
/// Doors of one service, at most.
pub const DOORS_MAX: usize = 16;
/// Hosts, and paths, of one service, at most.
const CLAIMS_MAX: usize = 64;
/// Bytes of a path, at most.
const PATH_BYTES_MAX: usize = 1024;

/// A backend named in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StaticBackend {
    pub address: SocketAddr,
    pub weight: u16,
    /// Whether each connection to it begins with a PROXY header.
    pub proxy: bool,
    /// Whether it speaks HTTP/2, rather than HTTP/1.1.
    pub http2: bool,
    /// How it is verified, if it is reached by TLS.
    pub tls: Option<BackendTls>,
    pub group: Option<String>,
}

/// A group of backends and its share of the users.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupShare {
    pub name: String,
    pub share: u8,
}

/// The statuses of a passed check, from the first to the last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expected {
    pub first: u16,
    pub last: u16,
}

/// A setting that takes the value of the global key of the same name unless it has one of its own.
pub struct OrGlobal<K>(pub K);

impl<V, K: Kind<V>> Kind<Option<V>> for OrGlobal<K> {
    fn takes(&self) -> String {
        format!("{} or \"global\"", self.0.takes())
    }

    fn read(&self, given: &Given) -> Result<Option<V>, String> {
        match given.text() {
            Some("global") => Ok(None),
            _ => self.0.read(given).map(Some),
        }
    }

    fn show(&self, value: &Option<V>) -> String {
        value.as_ref().map_or("\"global\"".to_owned(), |value| self.0.show(value))
    }
}

/// One door or several, each written as in `[listen]`; none of them `off`.
pub struct Doors;

impl Kind<Vec<SocketAddr>> for Doors {
    fn takes(&self) -> String {
        format!(
            "an address with its port or a port, or a list of up to {DOORS_MAX} of them, each once"
        )
    }

    fn read(&self, given: &Given) -> Result<Vec<SocketAddr>, String> {
        let alone = std::slice::from_ref(given);
        let items = if let Given::List(items) = given { items } else { alone };
        if items.len() > DOORS_MAX {
            return Err(items.len().to_string());
        }
        let mut doors = Vec::new();
        for item in items {
            let door = DoorAddress.read(item)?.ok_or_else(|| item.described())?;
            // The kernel gives out another port for each 0.
            if door.port() != 0 && doors.contains(&door) {
                return Err(format!("{} twice", item.described()));
            }
            doors.push(door);
        }
        Ok(doors)
    }

    fn show(&self, doors: &Vec<SocketAddr>) -> String {
        let doors: Vec<String> = doors.iter().map(|door| DoorAddress.show(&Some(*door))).collect();
        format!("[{}]", doors.join(", "))
    }
}

/// Host names, each exact or with a wildcard in front.
pub struct Hosts;

impl Kind<Vec<Host>> for Hosts {
    fn takes(&self) -> String {
        format!("a list of up to {CLAIMS_MAX} hosts such as [\"shop.example\", \"*.shop.example\"]")
    }

    fn read(&self, given: &Given) -> Result<Vec<Host>, String> {
        let names = texts(given)?;
        if names.len() > CLAIMS_MAX {
            return Err(names.len().to_string());
        }
        names.into_iter().map(|name| Host::parse(name).ok_or_else(|| quoted(name))).collect()
    }

    fn show(&self, hosts: &Vec<Host>) -> String {
        list(hosts.iter())
    }
}

/// Paths, each standing for itself and all that lies below it.
pub struct Paths;

impl Kind<Vec<String>> for Paths {
    fn takes(&self) -> String {
        format!("a list of up to {CLAIMS_MAX} paths such as [\"/api\"]")
    }

    fn read(&self, given: &Given) -> Result<Vec<String>, String> {
        let paths = texts(given)?;
        if paths.len() > CLAIMS_MAX {
            return Err(paths.len().to_string());
        }
        let read = |path: &str| {
            let fits = path.starts_with('/')
                && path.len() <= PATH_BYTES_MAX
                && path.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#\"".contains(&byte))
                && !crate::cluster::route::is_ambiguous(path.as_bytes());
            fits.then(|| path.to_owned()).ok_or_else(|| quoted(path))
        };
        paths.into_iter().map(read).collect()
    }

    fn show(&self, paths: &Vec<String>) -> String {
        list(paths.iter())
    }
}

/// Backends that do not register, each an address with its port, or a table with `address`, `weight`,
/// `group`, `proxy`, `http` and `tls`.
pub struct Backends;

impl Kind<Vec<StaticBackend>> for Backends {
    fn takes(&self) -> String {
        format!(
            "a list of up to {BACKENDS_MAX} backends, each once, such as [\"10.0.0.11:5432\", \
             {{ address = \"10.0.0.12:5432\", weight = 2 }}]"
        )
    }

    fn read(&self, given: &Given) -> Result<Vec<StaticBackend>, String> {
        let Given::List(items) = given else { return Err(given.described()) };
        if items.len() > BACKENDS_MAX {
            return Err(items.len().to_string());
        }
        let mut backends: Vec<StaticBackend> = Vec::new();
        let mut addresses = BTreeSet::new();
        for item in items {
            let backend = static_backend(item)?;
            if !addresses.insert(backend.address) {
                return Err(format!("{} twice", backend.address));
            }
            backends.push(backend);
        }
        Ok(backends)
    }

    fn show(&self, backends: &Vec<StaticBackend>) -> String {
        format!("[{}]", backends.iter().map(shown).collect::<Vec<_>>().join(", "))
    }
}

fn shown(backend: &StaticBackend) -> String {
    let StaticBackend { address, weight, group, proxy, http2, tls } = backend;
    let weight = (*weight != 1).then(|| format!(", weight = {weight}"));
    let group = group.as_ref().map(|group| format!(", group = {}", quoted(group)));
    let proxy = proxy.then(|| ", proxy = 2".to_owned());
    let http = http2.then(|| ", http = 2".to_owned());
    let tls = tls.as_ref().map(|tls| format!(", tls = {}", tls_shown(tls)));
    let said: String = [weight, group, proxy, http, tls].into_iter().flatten().collect();
    match said.is_empty() {
        true => format!("\"{address}\""),
        false => format!("{{ address = \"{address}\"{said} }}"),
    }
}

fn static_backend(item: &Given) -> Result<StaticBackend, String> {
    let address = ([0, 0, 0, 0], 0).into();
    let (weight, group, proxy, http2, tls) = (1, None, false, false, None);
    let mut backend = StaticBackend { address, weight, group, proxy, http2, tls };
    let alone = [("address".to_owned(), item.clone())];
    let rows = if let Given::Table(rows) = item { rows.as_slice() } else { &alone };
    for (name, given) in rows {
        match (name.as_str(), given) {
            ("address", Given::Text(text)) => {
                let address: SocketAddr = text.parse().map_err(|_| given.described())?;
                backend.address = SocketAddr::new(address.ip().to_canonical(), address.port());
            }
            ("weight", Given::Number(weight)) => {
                let fits = u16::try_from(*weight).ok().filter(|it| (1..=WEIGHT_MAX).contains(it));
                backend.weight = fits.ok_or_else(|| format!("the weight {weight}"))?;
            }
            ("group", Given::Text(group)) if is_word(group) => backend.group = Some(group.clone()),
            ("proxy", Given::Number(2)) => backend.proxy = true,
            ("http", Given::Number(version @ (1 | 2))) => backend.http2 = *version == 2,
            ("tls", given) => backend.tls = backend_tls(given)?,
            ("address" | "weight" | "group" | "proxy" | "http", _) => {
                return Err(format!("{name} = {}", given.described()));
            }
            _ => return Err(format!("`{}`", name.escape_debug())),
        }
    }
    let address = backend.address;
    let reachable = address.port() != 0 && !address.ip().is_unspecified();
    if reachable { Ok(backend) } else { Err(item.described()) }
}

/// How a backend is verified: `true`, or a table with a `name`, or a `ca`, or both.
fn backend_tls(given: &Given) -> Result<Option<BackendTls>, String> {
    let rows = match given {
        Given::Switch(on) => return Ok(on.then(BackendTls::default)),
        Given::Table(rows) => rows,
        other => return Err(format!("tls = {}", other.described())),
    };
    let mut tls = BackendTls::default();
    for (key, given) in rows {
        match (key.as_str(), given) {
            ("name", Given::Text(name)) if backends::is_name(name) => {
                tls.name = Some(name.as_str().into());
            }
            ("ca", Given::Text(path)) if !path.is_empty() => {
                tls.ca = Some(Path::new(path).into());
            }
            ("name" | "ca", _) => return Err(format!("tls with {key} = {}", given.described())),
            _ => return Err(format!("tls with `{}`", key.escape_debug())),
        }
    }
    Ok(Some(tls))
}

fn tls_shown(tls: &BackendTls) -> String {
    let name = tls.name.as_ref().map(|name| format!("name = {}", quoted(name)));
    let ca = tls.ca.as_ref().map(|path| format!("ca = {}", quoted(&path.display().to_string())));
    let both: Vec<String> = name.into_iter().chain(ca).collect();
    if both.is_empty() { "true".to_owned() } else { format!("{{ {} }}", both.join(", ")) }
}

/// Whether these are letters, digits, `-` and `_`, few enough for a name.
pub fn is_word(name: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(letter)
}

/// Groups, each with its share.
pub struct Groups;

impl Kind<Vec<GroupShare>> for Groups {
    fn takes(&self) -> String {
        format!(
            "a table of up to {GROUPS_MAX} groups, each with a share from 0 to {SHARE_MAX} and one at \
             least above 0, such as {{ blue = 95, green = 5 }}"
        )
    }

    fn read(&self, given: &Given) -> Result<Vec<GroupShare>, String> {
        let Given::Table(rows) = given else { return Err(given.described()) };
        if rows.len() > GROUPS_MAX {
            return Err(rows.len().to_string());
        }
        let read = |(name, given): &(String, Given)| {
            if !is_word(name) {
                return Err(quoted(name));
            }
            let share = match given {
                Given::Number(share) => u8::try_from(*share).ok().filter(|it| *it <= SHARE_MAX),
                _ => None,
            };
            let share = share.ok_or_else(|| format!("{name} = {}", given.described()))?;
            Ok(GroupShare { name: name.clone(), share })
        };
        let groups: Vec<GroupShare> = rows.iter().map(read).collect::<Result<_, _>>()?;
        match groups.is_empty() || groups.iter().any(|group| group.share > 0) {
            true => Ok(groups),
            false => Err("only shares of 0".to_owned()),
        }
    }

    fn show(&self, groups: &Vec<GroupShare>) -> String {
        let shown: Vec<String> =
            groups.iter().map(|GroupShare { name, share }| format!("{name} = {share}")).collect();
        if shown.is_empty() { "{}".to_owned() } else { format!("{{ {} }}", shown.join(", ")) }
    }
}

/// A status of HTTP, or a range of them.
pub struct Statuses;

impl Kind<Expected> for Statuses {
    fn takes(&self) -> String {
        "a status such as \"200\" or a range such as \"200-399\"".to_owned()
    }

    fn read(&self, given: &Given) -> Result<Expected, String> {
        let text = match given {
            Given::Text(text) => text.clone(),
            Given::Number(number) => number.to_string(),
            _ => return Err(given.described()),
        };
        let (first, last) = text.split_once('-').unwrap_or((&text, &text));
        let status = |text: &str| text.parse().ok().filter(|it| (100..=599).contains(it));
        match (status(first), status(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Expected { first, last }),
            _ => Err(given.described()),
        }
    }

    fn show(&self, expected: &Expected) -> String {
        match expected {
            Expected { first, last } if first == last => format!("\"{first}\""),
            Expected { first, last } => format!("\"{first}-{last}\""),
        }
    }
}

/// A name of up to 255 visible letters, or nothing.
pub struct Name;

impl Kind<Option<String>> for Name {
    fn takes(&self) -> String {
        "a host name in quotes, or \"\"".to_owned()
    }

    fn read(&self, given: &Given) -> Result<Option<String>, String> {
        let text = given.text().ok_or_else(|| given.described())?;
        let fits = text.len() <= 255 && text.bytes().all(|byte| byte.is_ascii_graphic());
        if fits { Ok((!text.is_empty()).then(|| text.to_owned())) } else { Err(given.described()) }
    }

    fn show(&self, name: &Option<String>) -> String {
        format!("\"{}\"", name.as_deref().unwrap_or_default())
    }
}

/// The name by which a service of gRPC is asked about, or nothing.
pub struct GrpcService;

impl Kind<String> for GrpcService {
    fn takes(&self) -> String {
        "the name of a gRPC service such as \"shop.Orders\", or \"\"".to_owned()
    }

    fn read(&self, given: &Given) -> Result<String, String> {
        let name = given.text().filter(|text| is_grpc_service(text));
        name.map(str::to_owned).ok_or_else(|| given.described())
    }

    fn show(&self, name: &String) -> String {
        quoted(name)
    }
}

/// The name of another service, or nothing.
pub struct ServiceName;

impl Kind<Option<String>> for ServiceName {
    fn takes(&self) -> String {
        "the name of another API service in quotes, or \"\"".to_owned()
    }

    fn read(&self, given: &Given) -> Result<Option<String>, String> {
        let text = given.text().ok_or_else(|| given.described())?;
        match text {
            "" => Ok(None),
            _ if is_word(text) => Ok(Some(text.to_owned())),
            _ => Err(given.described()),
        }
    }

    fn show(&self, name: &Option<String>) -> String {
        format!("\"{}\"", name.as_deref().unwrap_or_default())
    }
}

/// A path with its query, as a request asks for it.
pub struct Target;

impl Kind<String> for Target {
    fn takes(&self) -> String {
        "a path such as \"/health\"".to_owned()
    }

    fn read(&self, given: &Given) -> Result<String, String> {
        let text = given.text().ok_or_else(|| given.described())?;
        let fits = text.starts_with('/')
            && text.len() <= PATH_BYTES_MAX
            // What RFC 3986 has no place for in a path or a query is no request target.
            && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"#\"<>\\^`{|}".contains(&byte));
        if fits { Ok(text.to_owned()) } else { Err(given.described()) }
    }

    fn show(&self, target: &String) -> String {
        quoted(target)
    }
}
