//! The API doors at which a request's host and path decide which service it is for. Owns which services
//! share a door; what their claims mean is `route`'s.
//!
//! A door goes by the service that its users are admitted for: of those that listen there, the one with
//! the lowest number. Where that one is alone and claims every request there are no routes, and nothing is
//! looked up.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::ServiceId;
use super::route::{Claim, Conflict, Host, Routes};

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

/// Why the services cannot share their doors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Two services claim the same at one door.
    Conflict(Conflict),
    /// This service would stand for both doors, but they are not shared by the same services.
    Unequal { service: ServiceId, doors: [SocketAddr; 2] },
}

/// The routes of every API door that has any.
#[derive(Default, Debug)]
pub struct Doors(BTreeMap<ServiceId, Routes>);

impl Doors {
    /// Doors of these services; `common` is where those listen that name no door. Refuses what would
    /// leave it open which service a request is for.
    pub fn new(common: Option<SocketAddr>, claimants: &[Claimant]) -> Result<Doors, Fault> {
        type Sharing<'a> = BTreeMap<ServiceId, &'a Claimant>;
        let mut at = BTreeMap::<(SocketAddr, Option<ServiceId>), Sharing<'_>>::new();
        for claimant in claimants {
            let service = claimant.service;
            // A port that the kernel is to choose is never another's.
            let own = |door: &SocketAddr| (*door, (door.port() == 0).then_some(service));
            let common = common.filter(|_| claimant.listen.is_empty()).map(|door| (door, None));
            for door in claimant.listen.iter().map(own).chain(common) {
                at.entry(door).or_default().insert(service, claimant);
            }
        }
        let mut doors = Doors::default();
        let mut known = BTreeMap::<ServiceId, (SocketAddr, BTreeSet<ServiceId>)>::new();
        for ((address, _), sharing) in at {
            let Some(first) = sharing.values().next() else { continue };
            let service = first.service;
            let ids = sharing.keys().copied().collect();
            match known.get(&service) {
                Some((_, others)) if *others == ids => continue,
                Some((other, _)) => {
                    return Err(Fault::Unequal { service, doors: [*other, address] });
                }
                None => drop(known.insert(service, (address, ids))),
            }
            if sharing.len() > 1 || !first.claims_everything() {
                let claims = sharing.values().flat_map(|claimant| claimant.claims.clone());
                doors.0.insert(service, Routes::new(claims).map_err(Fault::Conflict)?);
            }
        }
        Ok(doors)
    }

    /// The routes of a door, by the service that its users are admitted for. `None`: every request there
    /// is for that service.
    #[inline]
    pub fn routes(&self, door: ServiceId) -> Option<&Routes> {
        self.0.get(&door)
    }
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
        let listen = ports.iter().map(|port| ([192, 0, 2, 1], *port).into());
        Claimant { service, listen: listen.collect(), claims: claims.collect() }
    }

    fn found(doors: &Doors, door: ServiceId, host: &str, path: &str) -> Option<ServiceId> {
        doors.routes(door).unwrap().find(host.as_bytes(), path.as_bytes())
    }

    #[test]
    fn services_whose_ports_the_kernel_chooses_share_no_door() {
        let doors = Doors::new(
            None,
            &[claimant(SHOP, &[0], &[""], &[""]), claimant(BLOG, &[0], &[""], &[""])],
        );
        let doors = doors.unwrap();
        assert!(doors.routes(SHOP).is_none() && doors.routes(BLOG).is_none());
    }

    #[test]
    fn a_door_of_one_service_that_claims_everything_needs_no_routes() {
        for paths in [&[""][..], &["/"]] {
            let doors = Doors::new(
                None,
                &[claimant(API, &[80], &[""], &[""]), claimant(SHOP, &[81, 82], &[""], paths)],
            );
            let doors = doors.unwrap();
            assert!(doors.routes(API).is_none() && doors.routes(SHOP).is_none());
        }
    }

    #[test]
    fn the_rest_of_a_door_is_for_whoever_claims_it_there() {
        let doors = Doors::new(
            None,
            &[
                claimant(API, &[80], &[""], &[""]),
                claimant(BLOG, &[80, 81], &["blog.example"], &[""]),
                claimant(SHOP, &[80], &["shop.example", "*.shop.example"], &["/api", "/cart"]),
            ],
        );
        let doors = doors.unwrap();
        assert_eq!(found(&doors, API, "blog.example", "/"), Some(BLOG));
        assert_eq!(found(&doors, API, "other.example", "/"), Some(API));
        for host in ["shop.example", "www.shop.example"] {
            for path in ["/api", "/cart/1"] {
                assert_eq!(found(&doors, API, host, path), Some(SHOP));
            }
            assert_eq!(found(&doors, API, host, "/"), None, "the host is claimed, the path is not");
        }
        assert_eq!(found(&doors, BLOG, "blog.example", "/"), Some(BLOG));
        assert_eq!(found(&doors, BLOG, "other.example", "/"), None, "nobody claims the rest there");
        assert!(doors.routes(API).unwrap().by_path() && !doors.routes(BLOG).unwrap().by_path());
    }

    #[test]
    fn equal_claims_at_one_door_are_refused_and_at_two_they_are_not() {
        let claims = |ports: &[u16]| {
            Doors::new(
                None,
                &[claimant(API, &[80], &[""], &[""]), claimant(SHOP, ports, &[""], &[""])],
            )
        };
        let services = [API, SHOP];
        let conflict = Conflict { host: Host::Rest, path: "".into(), services };
        assert_eq!(claims(&[80]).unwrap_err(), Fault::Conflict(conflict));
        assert!(claims(&[81]).is_ok());
    }

    #[test]
    fn services_without_a_door_share_the_common_one_and_a_chosen_port_is_never_shared() {
        for port in [0, 80] {
            let common = Some(([192, 0, 2, 1], port).into());
            let doors = Doors::new(
                common,
                &[
                    claimant(API, &[], &[""], &[""]),
                    claimant(SHOP, &[], &["shop.example"], &[""]),
                    claimant(BLOG, &[port], &["blog.example"], &[""]),
                ],
            );
            let doors = doors.unwrap();
            assert_eq!(found(&doors, API, "shop.example", "/"), Some(SHOP));
            let blog = if port == 0 { API } else { BLOG };
            assert_eq!(found(&doors, API, "blog.example", "/"), Some(blog));
            assert_eq!(doors.routes(BLOG).is_some(), port == 0, "a door of its own");
        }
    }

    #[test]
    fn a_service_does_not_stand_for_two_doors_that_differ() {
        let doors = Doors::new(
            None,
            &[
                claimant(SHOP, &[80, 81], &["shop.example"], &[""]),
                claimant(BLOG, &[81], &["blog.example"], &[""]),
            ],
        );
        let [one, other] = [80, 81].map(|port| ([192, 0, 2, 1], port).into());
        let fault = Fault::Unequal { service: SHOP, doors: [one, other] };
        assert_eq!(doors.unwrap_err(), fault);
        let doors = Doors::new(
            None,
            &[
                claimant(SHOP, &[80, 81], &["shop.example"], &[""]),
                claimant(BLOG, &[80, 81], &["blog.example"], &[""]),
            ],
        );
        assert_eq!(found(&doors.unwrap(), SHOP, "blog.example", "/"), Some(BLOG));
    }
}
