//! Threads other than the main one. Owns the rule that only the main thread receives signals, so that
//! a SIGTERM always reaches the code that drains.

use std::io;
use std::thread::{Builder, JoinHandle};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// The signals this program handles.
const OURS: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR2];

/// Unblocks the signals this program handles on the calling thread, which must be the main one. A
/// parent may have blocked them, and a signal mask survives execve(2); the balancer could then
/// neither be stopped nor told to reload.
///
/// Signals that the parent ignored need nothing here, since installing a handler replaces that. Under
/// nohup(1) a hangup therefore reloads the settings, and the balancer lives on as intended. Rust's
/// runtime ignores SIGPIPE, so a reader that has gone away is a write error.
pub fn accept_signals() {
    let ours: SigSet = OURS.into_iter().collect();
    ours.thread_unblock().expect("a set of known signals is a valid mask");
}

/// Has those signals wait until [`accept_signals`] is called again: one that comes before anybody handles it would
/// end the program where it stands.
pub fn hold_signals() {
    let ours: SigSet = OURS.into_iter().collect();
    ours.thread_block().expect("a set of known signals is a valid mask");
}

/// Runs `start` with every signal blocked on this thread; threads created meanwhile inherit and keep
/// that mask. For libraries that start threads of their own.
pub fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    let before = SigSet::all()
        .thread_swap_mask(SigmaskHow::SIG_SETMASK)
        .expect("a full set is a valid mask");
    let started = start();
    before.thread_set_mask().expect("the mask was this thread's own");
    started
}

/// Starts a named thread that receives no signals.
///
/// # Errors
/// The system is out of threads.
pub fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    without_signals(|| Builder::new().name(name.to_owned()).spawn(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_born_without_signals_and_its_parent_keeps_its_own() {
        let before = SigSet::thread_get_mask().unwrap();
        let inside = spawn("quiet", || SigSet::thread_get_mask().unwrap()).unwrap();
        let inside = inside.join().unwrap();
        for signal in OURS {
            assert!(inside.contains(signal));
        }
        assert_eq!(SigSet::thread_get_mask().unwrap(), before);
    }

    #[test]
    fn a_thread_that_accepts_signals_has_ours_unblocked_and_leaves_the_others() {
        let mask = spawn("accepting", || {
            accept_signals();
            SigSet::thread_get_mask().unwrap()
        });
        let mask = mask.unwrap().join().unwrap();
        assert!(OURS.into_iter().all(|signal| !mask.contains(signal)));
        assert!(mask.contains(Signal::SIGUSR1));
    }
}
