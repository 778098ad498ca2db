//! Whether new users would be served, for load balancers and orchestrators in front. Owns the rule and the
//! sentence that says why not. Pure.

use crate::cluster::{Backend, Service, Standing};

/// Why none of these services would serve a new user; `None` if one of them would. A built-in service that is
/// not in use has no backends and so decides nothing.
///
/// A service serves while one of its backends is in the rotation and not set aside. A backend set aside gets
/// users where there is no other, but its port has refused the last of them. Failing backends count where
/// the check says `when_all_fail = "serve"`. A service under maintenance serves nobody.
pub fn why_nobody_is_served<'a>(
    services: impl Iterator<Item = &'a Service> + Clone,
) -> Option<String> {
    let open = services.clone().filter(|service| !service.terms.maintenance);
    if open.clone().any(|service| service.pool.serves_somebody()) {
        return None;
    }
    let closed = services.filter(|service| service.terms.maintenance);
    let backends: Vec<&Backend> = open.flat_map(|service| &service.pool.backends).collect();
    Some(match backends.len() {
        0 if closed.map(|service| service.pool.backends.len()).sum::<usize>() > 0 => {
            "every service with a backend is under maintenance".to_owned()
        }
        0 => "no backend is registered".to_owned(),
        _ => why(&backends),
    })
}

/// Why none of these backends serves.
fn why(backends: &[&Backend]) -> String {
    let number = |standing| backends.iter().filter(|it| it.standing == standing).count();
    let all =
        [Standing::Aside, Standing::Failing, Standing::Draining, Standing::Serving].map(number);
    let [aside, failing, draining, without_users] = all;
    match all {
        [_, 0, 0, 0] => "every backend is set aside: its port refused a connection".to_owned(),
        [0, _, 0, 0] => "every backend fails its check".to_owned(),
        [0, 0, _, 0] => "every backend is draining".to_owned(),
        [0, 0, 0, _] => "every backend is in a group without a share".to_owned(),
        _ => {
            let each = [
                (aside, "set aside"),
                (failing, "failing the check"),
                (draining, "draining"),
                (without_users, "in a group without a share"),
            ];
            let each = each.iter().filter(|(number, _)| *number > 0);
            let said: Vec<String> = each.map(|(number, what)| format!("{number} {what}")).collect();
            format!("no backend serves: {}", said.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cluster::service::Pool;
    use crate::cluster::{BackendId, Snapshot, Terms, WhenAllFail};

    fn service(standings: &[Standing], terms: Terms) -> Service {
        let backends = standings.iter().zip(1..).map(|(standing, number)| Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(number),
            slot: 0,
            service: Snapshot::default().services[0].id,
            address: ([127, 0, 0, 1], 9).into(),
            weight: 1,
            name: None,
            group: None,
            standing: *standing,
        });
        let service = Service { terms, ..Snapshot::default().services[0].clone() };
        let pool = Pool::frozen(backends.collect(), &service, service.pool.key);
        Service { pool: Arc::new(pool), ..service }
    }

    #[test]
    fn one_service_with_a_backend_that_serves_is_enough_and_one_set_aside_is_not() {
        use Standing::{Aside, Draining, Failing, Serving};
        let of = |services: &[&[Standing]]| {
            let services: Vec<_> =
                services.iter().map(|it| service(it, Terms::default())).collect();
            why_nobody_is_served(services.iter()).unwrap_or_default()
        };
        assert_eq!(of(&[&[], &[Serving], &[Aside]]), "");
        assert_eq!(of(&[&[Aside, Serving]]), "");
        assert_eq!(of(&[&[], &[]]), "no backend is registered");
        let aside = "every backend is set aside: its port refused a connection";
        assert_eq!(of(&[&[Aside]]), aside);
        assert_eq!(of(&[&[Aside, Aside], &[], &[Aside]]), aside);
        assert_eq!(of(&[&[Failing]]), "every backend fails its check");
        assert_eq!(of(&[&[Draining]]), "every backend is draining");
        let mixed = "no backend serves: 1 set aside, 2 failing the check, 1 draining";
        assert_eq!(of(&[&[Aside, Failing], &[Draining, Failing]]), mixed);
    }

    #[test]
    fn maintenance_serves_nobody_and_when_all_fail_serve_those_that_fail_do() {
        let maintained = Terms { maintenance: true, ..Terms::default() };
        let closed = service(&[Standing::Serving], maintained);
        let said = |services: &[Service]| why_nobody_is_served(services.iter());
        let why = "every service with a backend is under maintenance";
        assert_eq!(said(std::slice::from_ref(&closed)).as_deref(), Some(why));
        let open = service(&[Standing::Serving], Terms::default());
        assert_eq!(said(&[closed, open]), None);
        let serves = Terms { checks: Some(WhenAllFail::Serve), ..Terms::default() };
        assert_eq!(said(&[service(&[Standing::Failing], serves)]), None);
    }
}
