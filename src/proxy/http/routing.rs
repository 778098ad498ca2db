//! Which service a request is for. Owns what is refused because a door routes by path; who serves the
//! request is the worker's choice.

use crate::cluster::doors::Requests;
use crate::cluster::route::is_ambiguous;
use crate::cluster::{Doorway, ServiceId, Snapshot};
use crate::http::Malformed;
use crate::http::head::{RequestHead, Target};

/// Where a user came in.
#[derive(Clone, Copy, Debug)]
pub struct Entrance<'a> {
    pub door: Doorway,
    pub snapshot: &'a Snapshot,
}

impl Entrance<'_> {
    /// The service for a request. `None`: nobody claims its host and path.
    pub fn service_for(&self, head: &RequestHead<'_, '_>) -> Result<Option<ServiceId>, Malformed> {
        let routes = match self.snapshot.doors.at(self.door) {
            Requests::All(service) => return Ok(Some(service)),
            Requests::Split(routes) => routes,
        };
        let path = path(head.target);
        if routes.by_path() && is_ambiguous(path) {
            return Err(Malformed::new(400, "the path can be read in more than one way"));
        }
        Ok(routes.find(head.host.unwrap_or_default().as_bytes(), path))
    }
}

/// The path without its query.
fn path(target: Target<'_>) -> &[u8] {
    let whole = match target {
        Target::Origin(path) | Target::Absolute { path, .. } => path.as_bytes(),
        Target::Asterisk => b"*",
    };
    let end = whole.iter().position(|byte| *byte == b'?').unwrap_or(whole.len());
    &whole[..end]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cluster::doors::{Claimant, Claimed};
    use crate::cluster::route::{Claim, Host};
    use crate::cluster::{DoorId, Doors};
    use crate::http::Limits;
    use crate::http::head::{self, Space};

    const API: ServiceId = ServiceId(2);
    const SHOP: ServiceId = ServiceId(3);
    const CART: ServiceId = ServiceId(4);
    const AT: &str = "192.0.2.1:80";

    fn doors(services: &[(ServiceId, &str, &str)]) -> Snapshot {
        let claimant = |(service, host, path): &(ServiceId, &str, &str)| Claimant {
            service: *service,
            listen: vec![AT.parse().unwrap()],
            claims: vec![Claim {
                host: Host::parse(host).unwrap(),
                path: (*path).into(),
                service: *service,
            }],
        };
        let claimed = Claimed::of(&[], &services.iter().map(claimant).collect::<Vec<_>>());
        let mut doors = Doors::default();
        doors.set(DoorId(1), claimed.unwrap().at(AT.parse().unwrap(), SHOP).unwrap().clone());
        Snapshot { doors: Arc::new(doors), ..Snapshot::default() }
    }

    /// At the door of this number.
    fn asked(snapshot: &Snapshot, door: u16, request: &str) -> Result<Option<u16>, u16> {
        let head = format!("{request}\r\n\r\n");
        let mut space = Space::new();
        let head = head::request(head.as_bytes(), 0, &Limits::default(), &mut space);
        let door = Doorway { door: DoorId(door), service: API, is_tls: false };
        let found = Entrance { door, snapshot }.service_for(&head.unwrap().unwrap());
        found.map(|service| service.map(|id| id.0)).map_err(|fault| fault.status)
    }

    #[test]
    fn host_and_path_of_a_request_are_taken_from_where_they_count() {
        let doors = doors(&[(SHOP, "shop.example", ""), (CART, "shop.example", "/cart")]);
        for (request, service) in [
            ("GET / HTTP/1.1\r\nHost: shop.example", Some(3)),
            ("GET /cart HTTP/1.1\r\nHost: SHOP.example.:80", Some(4)),
            ("GET /cart?/.. HTTP/1.1\r\nHost: shop.example", Some(4)),
            ("GET /?/cart HTTP/1.1\r\nHost: shop.example", Some(3)),
            ("GET /cartoon HTTP/1.1\r\nHost: shop.example", Some(3)),
            // The target comes before the field (RFC 9112, section 3.2.2).
            ("GET http://shop.example/cart HTTP/1.1\r\nHost: other.example", Some(4)),
            ("GET http://other.example/cart HTTP/1.1\r\nHost: shop.example", None),
            ("GET http://shop.example?/cart HTTP/1.1\r\nHost: shop.example", Some(3)),
            ("OPTIONS * HTTP/1.1\r\nHost: shop.example", Some(3)),
            ("GET /cart HTTP/1.1\r\nHost: other.example", None),
            ("GET /cart HTTP/1.0", None),
        ] {
            assert_eq!(asked(&doors, 1, request), Ok(service), "{request}");
        }
    }

    #[test]
    fn a_door_with_paths_refuses_ambiguous_ones_and_another_lets_them_pass() {
        let by_path = doors(&[(SHOP, "shop.example", ""), (CART, "shop.example", "/cart")]);
        let by_host = doors(&[(SHOP, "shop.example", ""), (CART, "cart.example", "")]);
        for path in ["/a/../cart", "/%2e%2E/cart", "/a%2fb", "/a%5Cb", "/a\\b", "/."] {
            let request = format!("GET {path} HTTP/1.1\r\nHost: shop.example");
            assert_eq!(asked(&by_path, 1, &request), Err(400), "{request}");
            assert_eq!(asked(&by_host, 1, &request), Ok(Some(3)), "{request}");
            assert_eq!(asked(&by_host, 0, &request), Ok(Some(2)), "that door has no routes");
        }
    }
}
