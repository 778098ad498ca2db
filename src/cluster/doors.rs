//! The API doors, where a request's host and path may decide which service it is for. Owns which services
//! share a door; what their claims mean is `route`'s.
//!
//! Users are admitted for one of the services that listen at a door, whichever their requests are for.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use super::route::{Claim, Conflict, Host, Routes};
use super::{DoorId, Doorway, Protocol, ServiceId};

/// An API service, where it listens, and what it claims at each of these doors.
#[derive(Clone, Debug)]
pub struct Claimant {
    pub service: ServiceId,
    /// Empty for the common door.
    pub listen: Vec<SocketAddr>,
    pub claims: Vec<Claim>,
}

impl Claimant {
    fn claims_everything(&self) -> bool {
        let every =
            |claim: &Claim| claim.host == Host::Rest && claim.path.trim_matches('/').is_empty();
        self.claims.iter().any(every)
    }
}

/// What the requests at one door are for.
#[derive(Clone, Debug)]
pub enum Routing {
    /// All of them are for this service, and nothing is looked up.
    All(ServiceId),
    Split(Arc<Routes>),
}

/// What the requests at each listening address of API services are for.
#[derive(Default, Debug)]
pub struct Claimed(BTreeMap<Address, Routing>);

/// With its service where the port is 0: one that the kernel is to choose is never another's.
type Address = (SocketAddr, Option<ServiceId>);

fn address(listen: SocketAddr, service: ServiceId) -> Address {
    (listen, (listen.port() == 0).then_some(service))
}

impl Claimed {
    /// What these services claim; `common` are where those listen that name no door.
    ///
    /// # Errors
    /// Two claims at one door that leave it open which service a request is for.
    pub fn of(common: &[SocketAddr], claimants: &[Claimant]) -> Result<Claimed, Conflict> {
        let mut at = BTreeMap::<Address, Vec<&Claimant>>::new();
        for claimant in claimants {
            let own = |door: &SocketAddr| address(*door, claimant.service);
            let common = common.iter().filter(|_| claimant.listen.is_empty());
            let common = common.map(|door| address(*door, ServiceId::built_in(Protocol::Api)));
            for door in claimant.listen.iter().map(own).chain(common) {
                at.entry(door).or_default().push(claimant);
            }
        }
        let routing = |sharing: Vec<&Claimant>| match sharing[..] {
            [only] if only.claims_everything() => Ok(Routing::All(only.service)),
            _ => {
                let claims = sharing.iter().flat_map(|claimant| claimant.claims.clone());
                Ok(Routing::Split(Arc::new(Routes::new(claims)?)))
            }
        };
        let all = at.into_iter().map(|(at, sharing)| Ok((at, routing(sharing)?)));
        all.collect::<Result<_, _>>().map(Claimed)
    }

    /// What the requests at this address, where the service listens, are for.
    pub fn at(&self, listen: SocketAddr, service: ServiceId) -> Option<&Routing> {
        self.0.get(&address(listen, service))
    }
}

/// The routing of every open API door.
#[derive(Clone, Default, Debug)]
pub struct Doors(
    /// By the number of its id.
    Vec<Option<Routing>>,
);

impl Doors {
    pub fn set(&mut self, door: DoorId, routing: Routing) {
        let place = usize::from(door.0);
        if self.0.len() <= place {
            self.0.resize(place + 1, None);
        }
        self.0[place] = Some(routing);
    }

    /// Which requests of a user are for whom. One whose door is not known is its service's.
    #[inline]
    pub fn at(&self, user: Doorway) -> Requests<'_> {
        match self.0.get(usize::from(user.door.0)) {
            Some(Some(Routing::Split(routes))) => Requests::Split(routes),
            Some(Some(Routing::All(service))) => Requests::All(*service),
            _ => Requests::All(user.service),
        }
    }

    /// The routing of a door, to be kept while its last users are served.
    pub fn get(&self, door: DoorId) -> Option<&Routing> {
        self.0.get(usize::from(door.0))?.as_ref()
    }
}

/// The requests of one user.
#[derive(Clone, Copy, Debug)]
pub enum Requests<'a> {
    All(ServiceId),
    Split(&'a Routes),
}

#[cfg(test)]
mod tests {
    use super::*;

    const API: ServiceId = ServiceId(2);
    const SHOP: ServiceId = ServiceId(3);
    const BLOG: ServiceId = ServiceId(4);

    fn claimant(service: ServiceId, ports: &[u16], hosts: &[&str], paths: &[&str]) -> Claimant {
        let hosts = hosts.iter().map(|host| match *host {
            "" => Host::Rest,
            host => Host::parse(host).unwrap(),
        });
        let claim =
            |host: &Host, path: &str| Claim { host: host.clone(), path: path.into(), service };
        let claims = hosts.flat_map(|host| paths.iter().map(move |path| claim(&host, path)));
        let listen = ports.iter().map(|port| at(*port));
        Claimant { service, listen: listen.collect(), claims: claims.collect() }
    }

    fn at(port: u16) -> SocketAddr {
        ([192, 0, 2, 1], port).into()
    }

    fn claimed(common: Option<u16>, claimants: &[Claimant]) -> Claimed {
        Claimed::of(common.map(at).as_slice(), claimants).unwrap()
    }

    /// For whom a request at a port of a service is.
    fn found(
        claimed: &Claimed,
        (port, of): (u16, ServiceId),
        host: &str,
        path: &str,
    ) -> Option<ServiceId> {
        match claimed.at(at(port), of).unwrap() {
            Routing::All(service) => Some(*service),
            Routing::Split(routes) => routes.find(host.as_bytes(), path.as_bytes()),
        }
    }

    #[test]
    fn services_whose_ports_the_kernel_chooses_share_no_door() {
        let all = [claimant(SHOP, &[0], &[""], &[""]), claimant(BLOG, &[0], &[""], &[""])];
        let claimed = claimed(None, &all);
        for service in [SHOP, BLOG] {
            let routing = claimed.at(at(0), service);
            assert!(matches!(routing, Some(Routing::All(only)) if *only == service));
        }
    }

    #[test]
    fn a_door_of_one_service_that_claims_everything_needs_no_routes() {
        for paths in [&[""][..], &["/"]] {
            let claimed = claimed(
                None,
                &[claimant(API, &[80], &[""], &[""]), claimant(SHOP, &[81, 82], &[""], paths)],
            );
            for (port, service) in [(80, API), (81, SHOP), (82, SHOP)] {
                let routing = claimed.at(at(port), service);
                assert!(matches!(routing, Some(Routing::All(only)) if *only == service));
            }
            assert!(claimed.at(at(83), SHOP).is_none());
        }
    }

    #[test]
    fn the_rest_of_a_door_is_for_whoever_claims_it_there() {
        let claimed = claimed(
            None,
            &[
                claimant(API, &[80], &[""], &[""]),
                claimant(BLOG, &[80, 81], &["blog.example"], &[""]),
                claimant(SHOP, &[80], &["shop.example", "*.shop.example"], &["/api", "/cart"]),
            ],
        );
        let common = (80, API);
        assert_eq!(found(&claimed, common, "blog.example", "/"), Some(BLOG));
        assert_eq!(found(&claimed, common, "other.example", "/"), Some(API));
        for host in ["shop.example", "www.shop.example"] {
            for path in ["/api", "/cart/1"] {
                assert_eq!(found(&claimed, common, host, path), Some(SHOP));
            }
            let other = found(&claimed, common, host, "/");
            assert_eq!(other, None, "the host is claimed, the path is not");
        }
        let own = (81, BLOG);
        assert_eq!(found(&claimed, own, "blog.example", "/"), Some(BLOG));
        assert_eq!(
            found(&claimed, own, "other.example", "/"),
            None,
            "nobody claims the rest there"
        );
        for ((port, of), by_path) in [(common, true), (own, false)] {
            let Some(Routing::Split(routes)) = claimed.at(at(port), of) else { panic!("{port}") };
            assert_eq!(routes.by_path(), by_path);
        }
    }

    #[test]
    fn equal_claims_at_one_door_are_refused_and_at_two_they_are_not() {
        let claims = |ports: &[u16]| {
            Claimed::of(
                &[],
                &[claimant(API, &[80], &[""], &[""]), claimant(SHOP, ports, &[""], &[""])],
            )
        };
        let services = [API, SHOP];
        let conflict = Conflict { host: Host::Rest, path: "".into(), services };
        assert_eq!(claims(&[80]).unwrap_err(), conflict);
        assert!(claims(&[81]).is_ok());
    }

    #[test]
    fn services_without_a_door_share_the_common_one_and_a_chosen_port_is_never_shared() {
        for port in [0, 80] {
            let claimed = claimed(
                Some(port),
                &[
                    claimant(API, &[], &[""], &[""]),
                    claimant(SHOP, &[], &["shop.example"], &[""]),
                    claimant(BLOG, &[port], &["blog.example"], &[""]),
                ],
            );
            assert_eq!(found(&claimed, (port, API), "shop.example", "/"), Some(SHOP));
            let blog = if port == 0 { API } else { BLOG };
            assert_eq!(found(&claimed, (port, API), "blog.example", "/"), Some(blog));
            assert_eq!(found(&claimed, (port, BLOG), "blog.example", "/"), Some(BLOG));
        }
    }

    #[test]
    fn doors_of_one_service_may_be_shared_with_different_others() {
        let claimed = claimed(
            None,
            &[
                claimant(SHOP, &[80, 81], &["shop.example"], &[""]),
                claimant(BLOG, &[81], &["blog.example"], &[""]),
            ],
        );
        assert_eq!(found(&claimed, (80, SHOP), "blog.example", "/"), None);
        assert_eq!(found(&claimed, (81, SHOP), "blog.example", "/"), Some(BLOG));
    }

    #[test]
    fn a_user_whose_door_is_not_known_is_its_services() {
        let mut doors = Doors::default();
        doors.set(DoorId(2), Routing::All(BLOG));
        for (door, service) in [(0, SHOP), (2, BLOG), (3, SHOP)] {
            let user = Doorway { door: DoorId(door), service: SHOP, is_tls: false };
            assert!(matches!(doors.at(user), Requests::All(found) if found == service), "{door}");
        }
        assert!(doors.get(DoorId(1)).is_none() && doors.get(DoorId(2)).is_some());
    }
}
