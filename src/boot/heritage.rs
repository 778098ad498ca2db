//! What a start takes from a balancer that runs already and is to be succeeded, and leaves for a successor of its
//! own: the doors of the control core, the numbers of services, the way to start again. The sockets of users come
//! later, when both stand still.

use std::os::fd::{AsFd, OwnedFd};

use super::{Trouble, doors};
use crate::config::Config;
use crate::control::legacy::Prelude;
use crate::control::{Listeners, socket};
use crate::handover::out_of_descriptors;
use crate::handover::predecessor::Predecessor;
use crate::handover::successor::Program;
use crate::handover::words::OwnDoor;

/// Gives services the numbers that they have in the balancer that is succeeded, if there is one.
///
/// # Errors
/// One of them cannot go on as what it is now.
pub fn number(config: &mut Config, old: Option<&Predecessor>) -> Result<(), Trouble> {
    let Some(old) = old else { return Ok(()) };
    let prelude = serde_json::from_value(old.hello.prelude.clone());
    // One that makes no sense leaves the numbers as they are, and what follows will not fit them.
    let prelude: Prelude = prelude.unwrap_or_default();
    prelude.number(config).map_err(Trouble)
}

/// What could keep a balancer from having a successor.
pub struct Heirs {
    pub program: Option<Program>,
    pub is_demo: bool,
    /// It has a predecessor, which started it.
    pub is_successor: bool,
    /// This kernel leaves what arrives in its socket while workers stand still.
    pub withdrawal: bool,
}

/// How this balancer is started again; or why it can have no successor.
pub fn heirs(heirs: Heirs) -> Result<Program, String> {
    let is_told = std::env::var_os("NOTIFY_SOCKET").is_some();
    let why = match heirs.program {
        _ if heirs.is_demo => {
            "a demo's backends would end with it: upgrade a balancer without --demo"
        }
        // Whoever ends with it ends everything in its container, and so would its end.
        _ if std::process::id() == 1 => {
            "this is process 1, whose end would end its successor: restart the container instead"
        }
        _ if !is_told && !heirs.is_successor && nix::unistd::getppid().as_raw() == 1 => {
            "process 1 started this process, and would take its end for the end of the balancer: restart \
             instead, or run it under systemd with Type=notify"
        }
        _ if !heirs.withdrawal => {
            "this kernel takes bytes for receives that have no buffers (see `lb check`): restart instead, or \
             run a newer kernel"
        }
        Some(program) => return Ok(program),
        None => "the kernel does not say where this program's file is: restart it instead",
    };
    Err(why.to_owned())
}

/// The control core's listeners, and each once more for a successor.
pub type Own = (Listeners, Vec<(OwnDoor, OwnedFd)>);

/// Opens the doors of the control core that a predecessor does not have. From then on the configuration has the
/// real addresses, including ports that the kernel chose.
pub fn open_own(config: &mut Config, mut old: Option<&mut Predecessor>) -> Result<Own, Trouble> {
    let (control, admin) = (config.listen.control, config.listen.admin);
    let socket = config.admin.socket.clone();
    let mut known = |find: &dyn Fn(&mut Predecessor) -> Option<OwnedFd>| find(old.as_deref_mut()?);
    let listeners = Listeners {
        control: match control.and_then(|at| known(&|old| old.control(at))) {
            Some(there) => Some(there.into()),
            None => doors::open(control, "control")?,
        },
        admin: match admin.and_then(|at| known(&|old| old.admin(at))) {
            Some(there) => Some(there.into()),
            None => doors::open(admin, "admin")?,
        },
        socket: match socket.as_deref().and_then(|path| known(&|old| old.socket(path))) {
            Some(there) => Some(there.into()),
            None => socket.as_deref().map(socket::open).transpose().map_err(Trouble)?,
        },
    };
    config.listen.control = listeners.control.as_ref().and_then(|door| door.local_addr().ok());
    config.listen.admin = listeners.admin.as_ref().and_then(|door| door.local_addr().ok());
    let own = [
        control.map(|asked| OwnDoor::Control { asked }).zip(again(listeners.control.as_ref())),
        admin.map(|asked| OwnDoor::Admin { asked }).zip(again(listeners.admin.as_ref())),
        socket.map(|path| OwnDoor::Socket { path }).zip(again(listeners.socket.as_ref())),
    ];
    let own = own.into_iter().flatten().map(|(door, again)| Ok((door, again?)));
    let own = own
        .collect::<Result<_, std::io::Error>>()
        .map_err(|error| Trouble(out_of_descriptors(&error)))?;
    Ok((listeners, own))
}

fn again(listener: Option<&impl AsFd>) -> Option<std::io::Result<OwnedFd>> {
    listener.map(|it| it.as_fd().try_clone_to_owned())
}
