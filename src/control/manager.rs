//! The service manager that started the balancer, if one did: systemd's protocol of sd_notify(3), with
//! the watchdog of systemd.service(5). Owns what it is told and when. A manager that does not read misses
//! meals of the watchdog and status lines; only changes of the state
//! wait for it, for a moment.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use sd_notify::NotifyState;

use super::drain::Stop;
use super::hub::Hub;
use super::view;
use super::workers::Mark;
use crate::base::time::Now;

/// How often the status line that the manager shows is updated.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// How long a manager may take to make room for a message about the state.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often the watchdog is fed within its timeout, so that one late tick does no harm.
const MEALS: u32 = 4;

/// When to feed the watchdog: a fraction of its timeout after the last meal, and only once every worker
/// has turned since. A single hanging worker starves it, and the manager restarts the balancer.
#[derive(Clone, Copy, Debug)]
pub struct Watchdog {
    every: Duration,
    fed: Now,
}

impl Watchdog {
    /// A watchdog with a timeout of `time`.
    pub fn new(time: Duration, now: Now) -> Watchdog {
        Watchdog { every: time / MEALS, fed: now }
    }

    /// Whether to feed it now. `turned` says whether every worker has turned since the last meal.
    pub fn is_due(&mut self, now: Now, turned: bool) -> bool {
        let due = turned && now.since(self.fed) >= self.every;
        if due {
            self.fed = now;
        }
        due
    }
}

/// The service manager. Without one, every call does nothing.
pub struct Manager {
    watchdog: Option<Watchdog>,
    mark: Mark,
    line: String,
    next_line: Now,
    stopping: bool,
    /// The manager hears this process: not before its predecessor has said that it is the main one, and not once
    /// it has a successor.
    is_heard: bool,
}

impl Manager {
    pub fn new(hub: &Hub, now: Now) -> Manager {
        Manager {
            watchdog: sd_notify::watchdog_enabled().map(|time| Watchdog::new(time, now)),
            mark: hub.workers.mark(),
            line: String::new(),
            next_line: now,
            stopping: false,
            is_heard: hub.handover.taken.is_none(),
        }
    }

    /// Every door is open.
    pub fn ready(&self) {
        if self.is_heard {
            tell(&[NotifyState::Ready]);
        }
    }

    /// The predecessor has made this process the main one, or has ended.
    pub fn is_main(&mut self, hub: &Hub) {
        if !std::mem::replace(&mut self.is_heard, true) {
            self.mark = hub.workers.mark();
            tell(&[NotifyState::Ready]);
        }
    }

    /// Another process is the main one from now on.
    pub fn is_succeeded_by(&mut self, pid: u32) {
        if std::mem::take(&mut self.is_heard) {
            tell(&[NotifyState::MainPid(pid)]);
        }
    }

    /// The settings are being reread; [`Manager::ready`] marks the end.
    pub fn reloading(&self) {
        if self.is_heard
            && let Ok(time) = NotifyState::monotonic_usec_now()
        {
            tell(&[NotifyState::Reloading, time]);
        }
    }

    /// Sends what is due: a meal for the watchdog, the state, the status line.
    pub fn tick(&mut self, hub: &Hub, now: Now) {
        if !self.is_heard {
            return;
        }
        let turned = hub.workers.have_turned(&self.mark);
        if self.watchdog.as_mut().is_some_and(|watchdog| watchdog.is_due(now, turned)) {
            self.mark = hub.workers.mark();
            tell_if_read(&[NotifyState::Watchdog]);
        }
        if hub.stop != Stop::Serving && !self.stopping {
            self.stopping = true;
            self.next_line = now;
            tell(&[NotifyState::Stopping]);
        }
        if now >= self.next_line {
            self.next_line = now.plus(STATUS_EVERY);
            self.show(line(hub, now));
        }
    }

    fn show(&mut self, line: String) {
        if line != self.line && tell_if_read(&[NotifyState::Status(&line)]) {
            self.line = line;
        }
    }
}

fn line(hub: &Hub, now: Now) -> String {
    let (sessions, backends) = (hub.workers.sessions(), hub.snapshot.backends().count() as u64);
    match hub.stop {
        Stop::Serving => {
            let udp = view::udp_sessions(hub).min(sessions);
            let limits = &hub.config.limits;
            let of_udp = match udp {
                0 => String::new(),
                udp => format!(", udp {udp} of {}", limits.udp_sessions),
            };
            let (all, on) = (many(sessions, "session"), many(backends, "backend"));
            format!("{all} on {on} (sessions {} of {}{of_udp})", sessions - udp, limits.sessions)
        }
        Stop::Draining { until, .. } => {
            let left = until.since(now).as_secs();
            format!("draining: {} left, {left} s to end by themselves", many(sessions, "session"))
        }
        Stop::Stopping { .. } => format!("stopping: ending {}", many(sessions, "session")),
    }
}

/// A number of things in words: `1 session`, `2 sessions`.
fn many(number: u64, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        number => format!("{number} {thing}s"),
    }
}

/// Says what the manager acts upon, and waits for it to have room.
fn tell(states: &[NotifyState]) {
    // A manager we cannot reach cannot be told so either; its own timeouts alert the operator.
    let _ = send(states, true);
}

/// Tells what will soon be told again. Returns whether there was room for it.
fn tell_if_read(states: &[NotifyState]) -> bool {
    send(states, false).is_ok()
}

fn send(states: &[NotifyState], patiently: bool) -> io::Result<()> {
    let Some(named) = env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let message: String = states.iter().map(|state| format!("{state}\n")).collect();
    let socket = UnixDatagram::unbound()?;
    match patiently {
        true => socket.set_write_timeout(Some(PATIENCE))?,
        false => socket.set_nonblocking(true)?,
    }
    socket.send_to_addr(message.as_bytes(), &place(&named)?).map(drop)
}

/// Where the manager listens: at a path or, after `@`, under a name in the abstract namespace, which
/// belongs to a network namespace and not to the file system (unix(7)).
fn place(named: &OsStr) -> io::Result<SocketAddr> {
    match named.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(named),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn a_manager_listens_at_a_path_or_under_an_abstract_name() {
        let at = |named: &str| place(OsStr::new(named)).unwrap();
        let path = at("/run/systemd/notify");
        assert_eq!(path.as_pathname().unwrap().to_str(), Some("/run/systemd/notify"));
        assert_eq!(at("@machine/notify").as_abstract_name(), Some(&b"machine/notify"[..]));
        assert!(place(OsStr::new(&"@".repeat(200))).is_err(), "longer than an address may be");
    }

    #[test]
    fn the_watchdog_is_fed_four_times_per_timeout_while_all_workers_turn() {
        let mut watchdog = Watchdog::new(Duration::from_secs(10), at(0));
        let meals = (0..=100).filter(|tick| watchdog.is_due(at(tick * 100), true)).count();
        assert_eq!(meals, 4);
    }

    #[test]
    fn a_worker_that_hangs_starves_the_watchdog_and_one_that_was_late_does_not() {
        let mut watchdog = Watchdog::new(Duration::from_secs(4), at(0));
        assert!(watchdog.is_due(at(1000), true));
        for tick in 11..=30 {
            assert!(!watchdog.is_due(at(tick * 100), false), "a worker has not turned");
        }
        assert!(watchdog.is_due(at(3100), true), "it turns again, and the meal is overdue");
        assert!(!watchdog.is_due(at(3200), true));
    }
}
