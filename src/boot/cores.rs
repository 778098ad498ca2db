//! Which cores the workers run on, and which are left to the control core. Owns the choice, and the claims by
//! which balancers of one host keep out of each other's way.
//!
//! A claim is a unix socket in the abstract namespace (unix(7)) whose name has the number of the core. The
//! kernel lets one process at a time bind a name, whatever its user and its file system, and takes it back
//! when the process ends, however it ends: nothing is left behind that a restart would stumble over. Balancers
//! in network namespaces of their own do not see each other's claims.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tracing::{info, warn};

use crate::ring::sys;

/// What the name of a claim begins with.
const NAME: &str = "lb-core-";

/// The cores of one balancer.
pub struct Cores {
    /// One for each worker, in their order. Empty if the kernel does not say which there are.
    pub workers: Vec<usize>,
    /// Those of them that another balancer has, too.
    pub shared: Vec<usize>,
    /// Where the control core may run.
    pub control: Vec<usize>,
    /// Held for as long as the workers run, with the numbers of their cores.
    claims: Vec<(usize, OwnedFd)>,
}

impl Cores {
    /// Chooses among the cores that this process may use, and claims those of the workers. Claims that were
    /// `inherited` are as good as new ones.
    pub fn take(workers: usize, mut inherited: Vec<(usize, OwnedFd)>) -> Cores {
        let mut claims = Vec::new();
        let claim = |core| {
            let known = inherited.iter().position(|(claimed, _)| *claimed == core);
            if let Some(place) = known {
                claims.push(inherited.swap_remove(place));
                return true;
            }
            match claim(NAME, core) {
                Ok(claim) => {
                    claims.extend(claim.map(|claim| (core, claim.into())));
                    true
                }
                Err(Taken) => false,
            }
        };
        let chosen = choose(workers, &sys::cores(), claim, |core| is_claimed(NAME, core));
        Cores { claims, ..chosen }
    }

    /// The claims, with the numbers of their cores, for a successor.
    pub fn into_claims(self) -> Vec<(usize, OwnedFd)> {
        self.claims
    }

    /// Says in the log what was chosen.
    pub fn tell(&self) {
        let mut workers = self.workers.clone();
        workers.sort_unstable();
        workers.dedup();
        let (workers, control) = (listed(&workers), listed(&self.control));
        info!(%workers, %control, "pinned to cores");
        if !self.shared.is_empty() {
            let cores = listed(&self.shared);
            warn!(
                %cores,
                cure = "lower workers here or there, or give each balancer cores of its own with taskset or \
                        CPUAffinity",
                "cores are shared with another balancer"
            );
        }
    }
}

/// Another process has it.
#[derive(PartialEq, Eq, Debug)]
struct Taken;

/// The claim to a core, or nothing where claims cannot be made: then nobody else has any either.
fn claim(name: &str, core: usize) -> Result<Option<UnixDatagram>, Taken> {
    let Ok(address) = SocketAddr::from_abstract_name(format!("{name}{core}")) else {
        return Ok(None);
    };
    match UnixDatagram::bind_addr(&address) {
        Ok(claim) => {
            // Nobody has anything to say to it.
            let _ = claim.shutdown(Shutdown::Both);
            Ok(Some(claim))
        }
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(Taken),
        Err(_) => Ok(None),
    }
}

/// Whether some process has a claim to a core.
fn is_claimed(name: &str, core: usize) -> bool {
    let address = SocketAddr::from_abstract_name(format!("{name}{core}"));
    let asked = address.and_then(|at| UnixDatagram::unbound()?.connect_addr(&at));
    !asked.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// The cores of the workers: first those that no other balancer has. The first core comes last, since it is
/// left to the control core where there are enough. `claim` says whether a core could be claimed, and
/// `is_claimed` whether another balancer has it.
fn choose(
    workers: usize,
    cores: &[usize],
    mut claim: impl FnMut(usize) -> bool,
    is_claimed: impl Fn(usize) -> bool,
) -> Cores {
    let spared = usize::from(cores.len() > workers);
    let order = cores.iter().cycle().skip(spared).take(cores.len()).copied();
    let (mut own, mut taken, mut left) = (Vec::new(), Vec::new(), Vec::new());
    for core in order {
        match own.len() == workers {
            true if is_claimed(core) => taken.push(core),
            true => left.push(core),
            false if claim(core) => own.push(core),
            false => taken.push(core),
        }
    }
    let lacking = workers.saturating_sub(own.len()).min(taken.len());
    let shared: Vec<usize> = taken.drain(..lacking).collect();
    own.extend(&shared);
    let control = [left, taken, cores.to_vec()].into_iter().find(|them| !them.is_empty());
    let mut control = control.unwrap_or_default();
    control.sort_unstable();
    // There may be more workers than cores.
    let workers = own.iter().cycle().take(if own.is_empty() { 0 } else { workers });
    Cores { workers: workers.copied().collect(), shared, control, claims: Vec::new() }
}

fn listed(cores: &[usize]) -> String {
    format!("[{}]", cores.iter().map(usize::to_string).collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cores where other balancers have `others`: of the workers, shared, of the control core.
    fn chosen(workers: usize, cores: &[usize], others: &[usize]) -> [Vec<usize>; 3] {
        let has = |core: usize| others.contains(&core);
        let Cores { workers, shared, control, .. } = choose(workers, cores, |core| !has(core), has);
        [workers, shared, control]
    }

    #[test]
    fn alone_workers_leave_the_first_core_to_control_when_they_can() {
        assert_eq!(chosen(1, &[4, 5], &[]), [vec![5], vec![], vec![4]]);
        assert_eq!(chosen(1, &[4, 5, 6, 7], &[]), [vec![5], vec![], vec![4, 6, 7]]);
        assert_eq!(chosen(2, &[4, 5], &[]), [vec![4, 5], vec![], vec![4, 5]]);
        assert_eq!(chosen(1, &[7], &[]), [vec![7], vec![], vec![7]]);
        assert_eq!(chosen(3, &[0, 1], &[]), [vec![0, 1, 0], vec![], vec![0, 1]]);
        assert_eq!(chosen(1, &[], &[]), [Vec::<usize>::new(), vec![], vec![]]);
    }

    #[test]
    fn workers_keep_off_the_cores_of_another_balancer_while_there_are_others() {
        assert_eq!(chosen(1, &[0, 1], &[1]), [vec![0], vec![], vec![1]]);
        assert_eq!(chosen(1, &[0, 1, 2, 3], &[1]), [vec![2], vec![], vec![0, 3]]);
        assert_eq!(chosen(2, &[0, 1, 2, 3], &[1]), [vec![2, 3], vec![], vec![0]]);
        assert_eq!(chosen(1, &[0, 1, 2, 3], &[1, 2]), [vec![3], vec![], vec![0]]);
        assert_eq!(
            chosen(1, &[0, 1, 2], &[0, 1]),
            [vec![2], vec![], vec![0, 1]],
            "only they are left"
        );
        assert_eq!(chosen(1, &[3], &[3]), [vec![3], vec![3], vec![3]], "there is but one");
        assert_eq!(chosen(3, &[0, 1, 2, 3], &[1, 2, 3]), [vec![0, 1, 2], vec![1, 2], vec![3]]);
        assert_eq!(chosen(2, &[5, 6], &[5, 6]), [vec![5, 6], vec![5, 6], vec![5, 6]]);
    }

    #[test]
    fn a_claim_that_was_inherited_is_kept_by_whoever_has_it_now() {
        let first = Cores::take(1, Vec::new()).into_claims();
        let Some((core, _)) = first.first() else { return };
        let core = *core;
        let next = Cores::take(1, first);
        assert_eq!(next.workers, [core]);
        assert!(next.shared.is_empty() && is_claimed(NAME, core));
        let claims = next.into_claims();
        assert_eq!(claims.len(), 1);
    }

    #[test]
    fn a_claim_lasts_until_it_is_given_back() {
        let name = format!("lb-test-{}-", std::process::id());
        assert!(!is_claimed(&name, 3));
        let held = claim(&name, 3).unwrap().expect("claims can be made here");
        assert!(is_claimed(&name, 3));
        assert_eq!(claim(&name, 3).map(drop), Err(Taken));
        assert!(claim(&name, 4).unwrap().is_some());
        drop(held);
        assert!(!is_claimed(&name, 3));
        assert!(claim(&name, 3).unwrap().is_some());
    }
}
