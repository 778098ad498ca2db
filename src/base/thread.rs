//! Threads beside the main one. Owns the rule that only the main thread is sent signals, so that a
//! SIGTERM always reaches the code that drains.

use std::io;
use std::thread::{Builder, JoinHandle};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// The signals that this program acts on.
const OURS: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// Lets the calling thread, the main one, be sent the signals that this program acts on. A parent may
/// have blocked them, and a mask outlives execve(2): a balancer that nobody could stop, or make read
/// its settings again.
///
/// A signal that the parent had ignored needs nothing here, since a handler takes the place of that.
/// Under nohup(1) a hangup then makes the balancer read its settings, and it lives on as was wished.
/// SIGPIPE is ignored by Rust's runtime, so that a reader who has gone is an error of the write.
pub fn accept_signals() {
    let ours: SigSet = OURS.into_iter().collect();
    ours.thread_unblock().expect("a set of known signals is a valid mask");
}

/// Runs `start` while this thread has every signal blocked: threads born meanwhile inherit that and
/// keep it. For libraries that start threads of their own.
pub fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    let before = SigSet::all()
        .thread_swap_mask(SigmaskHow::SIG_SETMASK)
        .expect("a full set is a valid mask");
    let started = start();
    before.thread_set_mask().expect("the mask was this thread's own");
    started
}

/// Starts a named thread that is sent no signals.
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
