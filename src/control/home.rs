//! Whether an address leads back to the balancer itself, which would send users in a circle. Owns the
//! comparison with our doors, and asks the kernel which addresses belong to this host.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use nix::sys::socket::SockaddrStorage;

use super::status::Doors;
use crate::cluster::Protocol;
use crate::config::Config;
use crate::config::services::ServiceConfig;

/// Whether a backend at `address` would be one of our doors: those of the built-in services, of backends
/// and of operators, or those of `named` services of its kind. A door on all addresses is reachable at
/// every address that is `ours`, which is asked only if the port matches that of a door.
pub fn is_own_door(
    doors: &Doors,
    named: impl IntoIterator<Item = SocketAddr>,
    protocol: Protocol,
    address: SocketAddr,
    ours: impl Fn(SocketAddr) -> bool,
) -> bool {
    let built_in = match protocol {
        Protocol::Udp => [doors.udp, None, None, None, None],
        Protocol::Tcp | Protocol::Api => {
            [doors.tcp, doors.api, doors.api_tls, doors.control, doors.admin]
        }
    };
    let mut all = built_in.into_iter().flatten().chain(named);
    all.any(|door| leads_to(door, address, &ours))
}

/// Whether `address` is where this door is.
pub fn leads_to(door: SocketAddr, address: SocketAddr, ours: &impl Fn(SocketAddr) -> bool) -> bool {
    let (at, host) = (door.ip().to_canonical(), address.ip().to_canonical());
    let same_kind = at.is_ipv4() == host.is_ipv4();
    // 127.0.0.2 is the same host as a door at 127.0.0.1.
    let loopback = same_kind && at.is_loopback() && host.is_loopback();
    // A door on [::] accepts IPv4 as well.
    let everywhere = at.is_unspecified() && (same_kind || at.is_ipv6());
    let same_host = at == host || loopback || host.is_unspecified();
    door.port() == address.port() && (same_host || everywhere && ours(address))
}

/// Whether packets to `address` stay on this host: it is the address of an interface, or the kernel would
/// send them over loopback, as it does for whole networks routed to the host itself.
pub fn is_of_this_host(address: SocketAddr) -> bool {
    let host = address.ip().to_canonical();
    host.is_loopback() || host.is_unspecified() || is_on_interface(host) || is_routed_here(address)
}

fn is_on_interface(host: IpAddr) -> bool {
    addresses().any(|ours| ours == host)
}

/// The doors of named services that what is sent to a backend of this protocol could come to.
pub fn named_doors(config: &Config, protocol: Protocol) -> impl Iterator<Item = SocketAddr> {
    let is_datagrams = |protocol| protocol == Protocol::Udp;
    let alike = move |it: &&ServiceConfig| is_datagrams(it.protocol) == is_datagrams(protocol);
    config.services.iter().filter(alike).flat_map(ServiceConfig::doors)
}

/// The addresses of this host's interfaces, canonical.
pub fn addresses() -> impl Iterator<Item = IpAddr> {
    let plain = |address: SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
        let v6 = address.as_sockaddr_in6().map(|it| IpAddr::V6(it.ip()).to_canonical());
        v4.or(v6)
    };
    let all = nix::ifaddrs::getifaddrs().into_iter().flatten();
    all.filter_map(|it| it.address).filter_map(plain)
}

/// Whether an address means something on one link only, and which one it does not say.
pub(super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Connecting a datagram socket sends nothing, and reveals the source address packets would have. On a
/// route that never leaves the host, that is the destination itself or loopback.
fn is_routed_here(address: SocketAddr) -> bool {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let from = || {
        let socket = UdpSocket::bind(any)?;
        socket.connect(address)?;
        socket.local_addr()
    };
    from().is_ok_and(|from| from.ip() == address.ip() || from.ip().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Option<SocketAddr> {
        Some(text.parse().unwrap())
    }

    const OURS: [&str; 4] = ["10.9.9.1", "10.9.9.2", "2001:db8::1", "127.0.0.1"];

    fn own(doors: &Doors, protocol: Protocol, address: &str) -> bool {
        let ours = |it: SocketAddr| OURS.contains(&it.ip().to_canonical().to_string().as_str());
        is_own_door(doors, [], protocol, address.parse().unwrap(), ours)
    }

    #[test]
    fn a_door_on_all_addresses_is_reached_at_each_of_ours() {
        let doors = Doors {
            tcp: at("0.0.0.0:81"),
            udp: at("0.0.0.0:82"),
            api: at("[::]:83"),
            api_tls: at("[::]:443"),
            control: at("[::]:80"),
            admin: at("127.0.0.1:84"),
        };
        for (protocol, address, expected) in [
            (Protocol::Tcp, "10.9.9.1:81", true),
            (Protocol::Tcp, "10.9.9.2:81", true),
            (Protocol::Api, "10.9.9.2:81", true),
            (Protocol::Tcp, "[::ffff:10.9.9.2]:81", true),
            (Protocol::Tcp, "10.9.9.3:81", false),
            (Protocol::Tcp, "[2001:db8::1]:81", false),
            (Protocol::Tcp, "[2001:db8::1]:83", true),
            (Protocol::Tcp, "10.9.9.1:83", true),
            (Protocol::Tcp, "10.9.9.1:80", true),
            (Protocol::Tcp, "10.9.9.1:84", false),
            (Protocol::Tcp, "127.0.0.2:84", true),
            (Protocol::Tcp, "[::1]:84", false),
            (Protocol::Tcp, "10.9.9.1:82", false),
            (Protocol::Udp, "10.9.9.1:82", true),
            (Protocol::Udp, "10.9.9.1:81", false),
            (Protocol::Tcp, "10.9.9.1:85", false),
        ] {
            assert_eq!(own(&doors, protocol, address), expected, "{protocol} {address}");
        }
    }

    #[test]
    fn a_door_on_one_address_leaves_its_port_free_on_the_others() {
        let doors =
            Doors { tcp: at("10.9.9.1:81"), udp: at("[::ffff:10.9.9.1]:82"), ..Doors::default() };
        assert!(own(&doors, Protocol::Tcp, "10.9.9.1:81"));
        assert!(own(&doors, Protocol::Udp, "10.9.9.1:82"));
        assert!(!own(&doors, Protocol::Tcp, "10.9.9.2:81"));
        assert!(!own(&doors, Protocol::Tcp, "127.0.0.1:81"));
    }

    #[test]
    fn the_kernel_knows_which_addresses_are_this_hosts() {
        let of_this_host = |text: &str| is_of_this_host(text.parse().unwrap());
        assert!(["127.0.0.1:1", "127.9.9.9:1", "0.0.0.0:1"].into_iter().all(of_this_host));
        assert!(!of_this_host("192.0.2.77:1"), "an address for documentation");
        for interface in nix::ifaddrs::getifaddrs().unwrap() {
            let v4 = interface.address.and_then(|it| it.as_sockaddr_in().map(|it| it.ip()));
            assert!(v4.is_none_or(|ip| is_of_this_host((ip, 1).into())), "{v4:?}");
        }
        assert!(is_routed_here("127.9.9.9:9".parse().unwrap()), "though on no interface");
    }
}
