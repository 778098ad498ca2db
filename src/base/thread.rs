//! Threads beside the main one. Owns the rule that only the main thread is sent signals, so that a
//! SIGTERM always reaches the code that drains.

use std::io;
use std::thread::{Builder, JoinHandle};

use nix::sys::signal::{SigSet, SigmaskHow};

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
    use nix::sys::signal::Signal;

    use super::*;

    #[test]
    fn a_thread_is_born_without_signals_and_its_parent_keeps_its_own() {
        let before = SigSet::thread_get_mask().unwrap();
        let inside = spawn("quiet", || SigSet::thread_get_mask().unwrap()).unwrap();
        let inside = inside.join().unwrap();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            assert!(inside.contains(signal));
        }
        assert_eq!(SigSet::thread_get_mask().unwrap(), before);
    }
}
