//! Keys in the store. Owns their form, both ways, and what they name: a process of a balancer, and a place where a
//! backend serves.
//!
//! ```text
//! /lb/<cluster>/1/node/<node>~<hex8>                                 a balancer
//! /lb/<cluster>/1/back/<node>~<hex8>/<service>/<protocol>/<ip>:<port>  what it says of a backend
//! /lb/<cluster>/1/ask/<node>~<hex8>/<asker>~<hex8>.<n>               what it is asked to do
//! ```
//!
//! `hex8` is new in every process, so each key has one writer in all its life, and a restart needs nobody to clean
//! up.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::cluster::backend::Protocol;

/// Longest name of a cluster or a node, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Whether a cluster or a node may go by this name: letters, digits, `-`, `_` and `.`.
pub fn is_name(name: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(letter)
}

/// One process of a balancer: `<node>~<hex8>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// The process with this number of the balancer of this name.
    pub fn new(node: &str, process: u32) -> NodeId {
        NodeId(format!("{node}~{process:08x}").into())
    }

    pub fn parse(text: &str) -> Option<NodeId> {
        let (node, process) = text.split_once('~')?;
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let fits = is_name(node) && process.len() == 8 && process.bytes().all(digit);
        fits.then(|| NodeId(text.into()))
    }

    /// The name of the balancer, which a later process of it has, too.
    pub fn node(&self) -> &str {
        self.0.split_once('~').map_or(&self.0, |(node, _)| node)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Where a backend serves, in words that mean the same to every balancer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Place {
    pub service: Arc<str>,
    pub protocol: Protocol,
    /// Canonical.
    pub address: SocketAddr,
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}/{}", self.service, self.protocol, self.address)
    }
}

impl Place {
    pub fn parse(text: &str) -> Option<Place> {
        let mut parts = text.splitn(3, '/');
        let (service, protocol, address) = (parts.next()?, parts.next()?, parts.next()?);
        let protocol = Protocol::ALL.into_iter().find(|it| it.name() == protocol)?;
        let parsed: SocketAddr = address.parse().ok()?;
        // Each address has one way to write it, and so one key.
        let is_plain = parsed.to_string() == address && parsed.ip().to_canonical() == parsed.ip();
        (is_name(service) && is_plain && parsed.port() != 0).then(|| Place {
            service: service.into(),
            protocol,
            address: parsed,
        })
    }
}

/// What a key is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Key {
    Node(NodeId),
    Back(NodeId, Place),
    /// To whom, and who asks, with a number of its own.
    Ask(NodeId, Arc<str>),
}

/// Where the keys of one cluster begin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prefix(Arc<str>);

impl Prefix {
    /// That of the cluster of this name.
    pub fn new(cluster: &str) -> Prefix {
        Prefix(format!("/lb/{cluster}/1/").into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn node(&self, node: &NodeId) -> String {
        format!("{}node/{node}", self.0)
    }

    pub fn back(&self, node: &NodeId, place: &Place) -> String {
        format!("{}back/{node}/{place}", self.0)
    }

    pub fn ask(&self, to: &NodeId, from: &NodeId, number: u64) -> String {
        format!("{}ask/{to}/{from}.{number}", self.0)
    }

    /// What a key is for; `None` if it is none of ours.
    pub fn parse(&self, key: &str) -> Option<Key> {
        let (kind, rest) = key.strip_prefix(&*self.0)?.split_once('/')?;
        if kind == "node" {
            return NodeId::parse(rest).map(Key::Node);
        }
        let (node, rest) = rest.split_once('/')?;
        let node = NodeId::parse(node)?;
        match kind {
            "back" => Place::parse(rest).map(|place| Key::Back(node, place)),
            "ask" => {
                let (from, number) = rest.rsplit_once('.')?;
                NodeId::parse(from)?;
                number.parse::<u64>().ok()?;
                Some(Key::Ask(node, rest.into()))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_are_written() {
        let prefix = Prefix::new("shop-1");
        let (node, other) = (NodeId::new("lb-a.example", 0xab), NodeId::new("lb-b", 1));
        assert_eq!((node.as_str(), node.node()), ("lb-a.example~000000ab", "lb-a.example"));
        for address in ["192.0.2.1:80", "[2001:db8::1]:443"] {
            let address = address.parse().unwrap();
            let place = Place { service: "pg".into(), protocol: Protocol::Tcp, address };
            let key = prefix.back(&node, &place);
            assert_eq!(prefix.parse(&key), Some(Key::Back(node.clone(), place)), "{key}");
        }
        assert_eq!(prefix.parse(&prefix.node(&node)), Some(Key::Node(node.clone())));
        let ask = prefix.ask(&node, &other, 7);
        assert_eq!(ask, "/lb/shop-1/1/ask/lb-a.example~000000ab/lb-b~00000001.7");
        assert_eq!(prefix.parse(&ask), Some(Key::Ask(node, "lb-b~00000001.7".into())));
    }

    #[test]
    fn what_is_no_key_of_the_cluster_is_none() {
        let prefix = Prefix::new("a");
        for key in [
            "",
            "/lb/a/1/",
            "/lb/b/1/node/x~00000001",
            "/lb/a/2/node/x~00000001",
            "/lb/a/1/node/x",
            "/lb/a/1/node/x~0000000G",
            "/lb/a/1/node/x~001",
            "/lb/a/1/node/~00000001",
            "/lb/a/1/node/x y~00000001",
            "/lb/a/1/hat/x~00000001/1",
            "/lb/a/1/back/x~00000001",
            "/lb/a/1/back/x~00000001/tcp/tcp",
            "/lb/a/1/back/x~00000001/tcp/sctp/192.0.2.1:80",
            "/lb/a/1/back/x~00000001//tcp/192.0.2.1:80",
            "/lb/a/1/back/x~00000001/tcp/tcp/192.0.2.1:080",
            "/lb/a/1/back/x~00000001/tcp/tcp/192.0.2.1:0",
            "/lb/a/1/back/x~00000001/tcp/tcp/[::ffff:192.0.2.1]:80",
            "/lb/a/1/back/x~00000001/tcp/tcp/example:80",
            "/lb/a/1/ask/x~00000001/7",
            "/lb/a/1/ask/x~00000001/y~00000001.z",
        ] {
            assert_eq!(prefix.parse(key), None, "{key}");
        }
        assert!(!is_name("") && !is_name(&"x".repeat(65)) && !is_name("a/b") && is_name("a-1_b.c"));
    }
}
