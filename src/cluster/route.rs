//! Which service an API request is for, by its host and path. Owns the claims of one door and their
//! order of precedence; knows nothing of backends, and reads no request beyond the two names.
//!
//! The host decides first: the exact name, then the longest wildcard, then whoever claims the rest. Among
//! those who claim that host the longest path wins, whole segments at a time.

use std::collections::HashMap;
use std::fmt;
use std::net::Ipv6Addr;

use super::ServiceId;

/// Bytes of a host name at most (RFC 1035, section 2.3.4).
const HOST_MAX: usize = 255;
/// Bytes of one of its labels at most.
const LABEL_MAX: usize = 63;

/// Hosts that a service claims.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Host {
    /// `shop.example`
    Exact(Box<str>),
    /// `*.example`: one label or more before it. Holds what follows the asterisk and its dot.
    Below(Box<str>),
    /// What nobody else claims.
    Rest,
}

impl Host {
    /// Reads `shop.example`, `*.example`, or an address as it stands in a URL. `None`: it is none of
    /// these.
    pub fn parse(text: &str) -> Option<Host> {
        if let Some(address) = text.strip_prefix('[') {
            // Written as browsers write it, whichever of its spellings stands here.
            let address: Ipv6Addr = address.strip_suffix(']')?.parse().ok()?;
            return Some(Host::Exact(format!("[{address}]").into()));
        }
        match text.strip_prefix("*.") {
            Some(name) => read_name(name).map(Host::Below),
            None => read_name(text).map(Host::Exact),
        }
    }
}

/// A name in lower case and without its final dot, if it is labels joined by dots (RFC 1035, section
/// 2.3.1, and the underscore).
fn read_name(text: &str) -> Option<Box<str>> {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let is_label =
        |label: &str| (1..=LABEL_MAX).contains(&label.len()) && label.bytes().all(letter);
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_name = name.len() <= HOST_MAX && name.split('.').all(is_label);
    is_name.then(|| name.to_ascii_lowercase().into())
}

impl fmt::Display for Host {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Exact(name) => out.write_str(name),
            Host::Below(name) => write!(out, "*.{name}"),
            Host::Rest => out.write_str("every other host"),
        }
    }
}

/// A service's claim to a host's requests below a path. The path `/` or an empty one is all of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claim {
    pub host: Host,
    pub path: Box<str>,
    pub service: ServiceId,
}

/// Two services claim the same host and path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conflict {
    pub host: Host,
    pub path: Box<str>,
    pub services: [ServiceId; 2],
}

/// The claims of one door, ready to be searched.
#[derive(Clone, Default, Debug)]
pub struct Routes {
    exact: HashMap<Box<str>, Paths>,
    below: HashMap<Box<str>, Paths>,
    /// Labels of the longest wildcard: no more of a host's are looked at.
    labels_max: usize,
    rest: Paths,
    by_path: bool,
}

impl Routes {
    /// Refuses two services with the same claim; one service may repeat its own.
    pub fn new(claims: impl IntoIterator<Item = Claim>) -> Result<Routes, Conflict> {
        let mut routes = Routes::default();
        for Claim { host, path, service } in claims {
            let path = path.trim_end_matches('/');
            routes.by_path |= !path.is_empty();
            let paths = match &host {
                Host::Exact(name) => routes.exact.entry(name.clone()).or_default(),
                Host::Below(name) => {
                    routes.labels_max = routes.labels_max.max(name.split('.').count());
                    routes.below.entry(name.clone()).or_default()
                }
                Host::Rest => &mut routes.rest,
            };
            if let Some(other) = paths.add(path, service).filter(|other| *other != service) {
                return Err(Conflict { host, path: path.into(), services: [other, service] });
            }
        }
        let tables = routes.exact.values_mut().chain(routes.below.values_mut());
        tables.chain([&mut routes.rest]).for_each(Paths::link);
        Ok(routes)
    }

    /// Whether paths decide: then one that two readers could take for different ones must not pass.
    pub fn by_path(&self) -> bool {
        self.by_path
    }

    /// The service for a request. `host` as it stood in the request, `path` without its query. `None`:
    /// nobody claims it.
    pub fn find(&self, host: &[u8], path: &[u8]) -> Option<ServiceId> {
        self.paths(host).find(path)
    }

    /// A service for requests of this host, whatever their path; all of its services ask the same of users before
    /// it is known. `None`: nobody claims it.
    pub fn find_any(&self, host: &[u8]) -> Option<ServiceId> {
        self.paths(host).0.first().map(|entry| entry.service)
    }

    fn paths(&self, host: &[u8]) -> &Paths {
        let mut lower = [0; HOST_MAX];
        let Some(name) = canonical(host, &mut lower) else { return &self.rest };
        let exact = self.exact.get(name);
        exact.or_else(|| self.wildcard(name)).unwrap_or(&self.rest)
    }

    fn wildcard(&self, name: &str) -> Option<&Paths> {
        let labels = name.split('.').count();
        let skipped = labels.saturating_sub(self.labels_max).max(1);
        let mut rest = name.splitn(skipped + 1, '.').nth(skipped);
        while let Some(suffix) = rest {
            if let Some(paths) = self.below.get(suffix) {
                return Some(paths);
            }
            rest = suffix.split_once('.').map(|(_, shorter)| shorter);
        }
        None
    }
}

/// A host in lower case, without its port and a final dot. `None` when it is no name that could be
/// claimed.
fn canonical<'a>(host: &[u8], lower: &'a mut [u8; HOST_MAX]) -> Option<&'a str> {
    let end = match host.first() {
        Some(b'[') => host.iter().position(|byte| *byte == b']')? + 1,
        _ => host.iter().position(|byte| *byte == b':').unwrap_or(host.len()),
    };
    let name = host[..end].strip_suffix(b".").unwrap_or(&host[..end]);
    let lower = lower.get_mut(..name.len())?;
    lower.copy_from_slice(name);
    lower.make_ascii_lowercase();
    std::str::from_utf8(lower).ok()
}

/// Paths below one host, in the order in which a path comes directly before those below it.
#[derive(Clone, Default, Debug)]
struct Paths(Vec<Entry>);

#[derive(Clone, Debug)]
struct Entry {
    /// Decoded.
    path: Box<[u8]>,
    service: ServiceId,
    /// The longest path above it.
    above: Option<usize>,
}

impl Paths {
    /// Returns who has the path already.
    fn add(&mut self, path: &str, service: ServiceId) -> Option<ServiceId> {
        let path: Box<[u8]> = Decoded(path.as_bytes()).collect();
        let place = |entry: &Entry| ranks(plain(&entry.path)).cmp(ranks(plain(&path)));
        match self.0.binary_search_by(place) {
            Ok(at) => Some(self.0[at].service),
            Err(at) => {
                self.0.insert(at, Entry { path, service, above: None });
                None
            }
        }
    }

    fn link(&mut self) {
        for at in 1..self.0.len() {
            let path = &self.0[at].path;
            let mut before = std::iter::successors(Some(at - 1), |before| self.0[*before].above);
            let above = before.find(|before| is_below(plain(path), &self.0[*before].path));
            self.0[at].above = above;
        }
    }

    /// The longest entry that the path is at or below: the last that does not come after it, or one
    /// above that.
    fn find(&self, path: &[u8]) -> Option<ServiceId> {
        let path = Decoded(path);
        let not_after = |entry: &Entry| ranks(plain(&entry.path)).le(ranks(path.clone()));
        let after = self.0.partition_point(not_after);
        let before = std::iter::successors(after.checked_sub(1), |at| self.0[*at].above);
        let mut entries = before.map(|at| &self.0[at]);
        let found = entries.find(|entry| is_below(path.clone(), &entry.path));
        found.map(|entry| entry.service)
    }
}

/// Bytes of a path with the slash before everything else, so that what lies below a path directly follows
/// it.
fn ranks(path: impl Iterator<Item = u8>) -> impl Iterator<Item = u16> {
    path.map(|byte| if byte == b'/' { 0 } else { u16::from(byte) + 1 })
}

fn plain(path: &[u8]) -> impl Iterator<Item = u8> {
    path.iter().copied()
}

/// Whether `path` is `above` or lies below it, whole segments at a time.
fn is_below(mut path: impl Iterator<Item = u8>, above: &[u8]) -> bool {
    let begins = above.iter().all(|byte| path.next() == Some(*byte));
    begins && (above.is_empty() || path.next().is_none_or(|byte| byte == b'/'))
}

/// The bytes of a path as a backend reads them: `%61` is an `a` (RFC 3986, section 6.2.2.2).
#[derive(Clone)]
struct Decoded<'a>(&'a [u8]);

impl Iterator for Decoded<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        let (byte, skipped) = match coded(self.0) {
            Some(byte) => (byte, 3),
            None => (*self.0.first()?, 1),
        };
        self.0 = &self.0[skipped..];
        Some(byte)
    }
}

/// The byte that a path begins with, if it is percent-coded.
fn coded(path: &[u8]) -> Option<u8> {
    let [b'%', high, low, ..] = path else { return None };
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    Some((digit(high)? << 4 | digit(low)?) as u8)
}

/// Whether two readers could take this path for different ones: dot segments (RFC 3986, section 5.2.4),
/// plain or percent-coded, coded slashes, backslashes, empty segments, which some readers drop, path
/// parameters behind a semicolon, which some readers cut off, and NUL, at which some readers stop. A door
/// that routes by path refuses it, since the backend might read another path than the one that was routed.
pub fn is_ambiguous(path: &[u8]) -> bool {
    let unclear = |byte| matches!(byte, b'/' | b'\\' | b';' | 0);
    path.iter().any(|byte| matches!(byte, b'\\' | b';'))
        || path.windows(2).any(|two| two == b"//")
        || path.windows(3).filter_map(coded).any(unclear)
        || path.split(|byte| *byte == b'/').any(is_dot_segment)
}

/// `.` or `..`.
fn is_dot_segment(segment: &[u8]) -> bool {
    let mut name = Decoded(segment);
    name.next() == Some(b'.')
        && name.next().is_none_or(|byte| byte == b'.')
        && name.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(claims: &[(&str, &str, u16)]) -> Routes {
        Routes::new(claims.iter().map(|claim| claim_of(*claim))).unwrap()
    }

    fn claim_of((host, path, service): (&str, &str, u16)) -> Claim {
        let host = if host.is_empty() { Host::Rest } else { Host::parse(host).unwrap() };
        Claim { host, path: path.into(), service: ServiceId(service) }
    }

    fn found(routes: &Routes, host: &str, path: &str) -> u16 {
        routes.find(host.as_bytes(), path.as_bytes()).map_or(0, |service| service.0)
    }

    #[test]
    fn the_exact_host_comes_before_the_longest_wildcard_before_the_rest() {
        let routes = routes(&[
            ("a.b.example", "", 1),
            ("*.b.example", "", 2),
            ("*.example", "", 3),
            ("", "", 4),
        ]);
        for (host, service) in [
            ("a.b.example", 1),
            ("x.b.example", 2),
            ("x.y.b.example", 2),
            ("b.example", 3),
            ("x.example", 3),
            ("example", 4),
            ("", 4),
            ("xexample", 4),
            (".example", 3),
        ] {
            assert_eq!(found(&routes, host, "/"), service, "{host}");
        }
    }

    #[test]
    fn a_host_is_compared_in_lower_case_without_port_and_final_dot() {
        let routes =
            routes(&[("Shop.Example.", "", 1), ("[2001:DB8::1]", "", 2), ("192.0.2.1", "", 3)]);
        for host in ["shop.example", "SHOP.EXAMPLE", "shop.example:8080", "shop.example.:80"] {
            assert_eq!(found(&routes, host, "/"), 1, "{host}");
        }
        assert_eq!(found(&routes, "[2001:db8::1]:80", "/"), 2);
        assert_eq!(found(&routes, "192.0.2.1:80", "/"), 3);
        for host in ["shop.example..", "[2001:db8::1", "x.shop.example", "\u{e9}"] {
            assert_eq!(found(&routes, host, "/"), 0, "{host}");
        }
        assert_eq!(routes.find(&[b'a'; 300], b"/"), None);
        assert_eq!(routes.find(&[0xff], b"/"), None);
    }

    #[test]
    fn a_host_has_a_service_before_the_path_is_known() {
        let routes = routes(&[("a.example", "/x", 1), ("a.example", "/y", 2), ("*.b", "/", 3)]);
        let found = |host: &str| routes.find_any(host.as_bytes()).map(|service| service.0);
        assert!(matches!(found("A.example."), Some(1 | 2)));
        assert_eq!((found("x.b"), found("b"), found("")), (Some(3), None, None));
    }

    #[test]
    fn the_longest_path_wins_whole_segments_at_a_time() {
        let routes = routes(&[
            ("a", "/api", 1),
            ("a", "/api/v2/", 2),
            ("a", "/", 3),
            ("a", "/api-x", 4),
            ("a", "/api/v2/users", 5),
            ("b", "/api", 6),
        ]);
        for (path, service) in [
            ("/api", 1),
            ("/api/", 1),
            ("/api/x", 1),
            ("/apix", 3),
            ("/api-x", 4),
            ("/api-x/y", 4),
            ("/api-xy", 3),
            ("/api/v2", 2),
            ("/api/v2/user", 2),
            ("/api/v2/users/1", 5),
            ("/api/v20", 1),
            ("/", 3),
            ("*", 3),
            ("", 3),
            // Written in another way, the path is the same to a backend.
            ("/%61p%69", 1),
            ("/api%2dx/y", 4),
            ("/api%2Dx/y", 4),
            ("/api%", 3),
            ("/api%00/x", 3),
        ] {
            assert_eq!(found(&routes, "a", path), service, "{path}");
        }
        assert_eq!([found(&routes, "b", "/api/1"), found(&routes, "b", "/")], [6, 0]);
    }

    #[test]
    fn equal_claims_are_refused_and_both_are_named() {
        for (first, second) in [
            (("a.b", "/x", 1), ("A.b.", "/x/", 2)),
            (("", "", 1), ("", "/", 2)),
            (("a", "/%7ex", 1), ("a", "/~%78", 2)),
        ] {
            let conflict = Routes::new([first, second].map(claim_of)).unwrap_err();
            assert_eq!(conflict.services, [ServiceId(1), ServiceId(2)]);
        }
        let twice = [("a.b", "/x", 1), ("A.b.", "/x/", 1)].map(claim_of);
        assert!(Routes::new(twice).is_ok(), "it says the same again");
    }

    #[test]
    fn the_search_finds_what_a_look_at_every_claim_finds() {
        let names = ["", "/", "/a", "/a/b", "/a-b", "/a/b/c", "/b", "/a/bb", "/a!", "/a0/b"];
        for pick in 0..1usize << names.len() {
            let mut paths = Paths::default();
            let chosen: Vec<&str> = (0..names.len())
                .filter(|at| pick & 1 << at != 0)
                .map(|at| names[at].trim_end_matches('/'))
                .collect();
            for (number, path) in chosen.iter().enumerate() {
                paths.add(path, ServiceId(number as u16));
            }
            paths.link();
            for asked in ["/", "/a", "/a/", "/a/b", "/a/b/c/d", "/a-b/c", "/a!/x", "/a/bbb", "/c"] {
                let fits =
                    chosen.iter().filter(|path| is_below(plain(asked.as_bytes()), path.as_bytes()));
                let longest = fits.max_by_key(|path| path.len());
                let found = paths.find(asked.as_bytes()).map(|it| chosen[usize::from(it.0)]);
                assert_eq!(found, longest.copied(), "{asked} in {chosen:?}");
            }
        }
    }

    #[test]
    fn a_path_that_two_readers_could_take_for_different_ones_is_ambiguous() {
        for path in [
            "/..",
            "/a/../b",
            "/.",
            "/./",
            "/%2e",
            "/%2E%2e/a",
            "/.%2e",
            "/a%2fb",
            "/a%2Fb",
            "/a%5cb",
            "/a\\b",
            "/..;x/a",
            "/%2e;/a",
            "..",
            "//admin",
            "/a//b",
            "/a//",
            "/admin;x=1",
            "/;x/admin",
            "/admin%3b",
            "/admin%00",
        ] {
            assert!(is_ambiguous(path.as_bytes()), "{path}");
        }
        for path in ["/", "/a", "/a/.b", "/...", "/a..b", "/a/", "/%20", "/%2", "*", "/a.%2"] {
            assert!(!is_ambiguous(path.as_bytes()), "{path}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for text in [
            "", "*", "*.", "a..b", "a b", "*.*.b", "http://a", "a:80", "*.[::1]", ".a", "[a b]",
            "[::1", "[::1]:80",
        ] {
            assert_eq!(Host::parse(text), None, "{text}");
        }
        assert_eq!(Host::parse("*.A.b.").unwrap().to_string(), "*.a.b");
        assert_eq!(Host::parse("[2001:DB8:0:0::1]").unwrap().to_string(), "[2001:db8::1]");
    }
}
