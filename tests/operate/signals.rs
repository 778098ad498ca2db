//! Signals are heard, whatever state the parent left them in.

use std::os::unix::process::CommandExt;

use nix::sys::signal::{SigHandler, SigSet, Signal};

use crate::harness::Balancer;

/// A balancer whose main thread began with signals in a state that its parent chose.
fn start_with_signals(choose: fn()) -> Balancer {
    let balancer = Balancer::start_on_loopback("", |lb| {
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            lb.pre_exec(move || {
                choose();
                Ok(())
            })
        };
    });
    balancer.wait_until_told("READY=1");
    balancer
}

#[test]
fn signals_that_the_parent_blocked_are_heard() {
    fn block() {
        SigSet::all().thread_block().unwrap();
    }
    for end in [Signal::SIGTERM, Signal::SIGINT] {
        let mut balancer = start_with_signals(block);
        balancer.signal(Signal::SIGHUP);
        balancer.wait_for_log("reloaded now=0");
        balancer.signal(end);
        assert_eq!(balancer.wait_for_exit(), Some(0), "{end}");
    }
}

#[test]
fn signals_that_the_parent_ignored_are_heard() {
    fn ignore() {
        for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT] {
            // SAFETY: no handler is installed, so none can be wrong.
            unsafe { nix::sys::signal::signal(signal, SigHandler::SigIgn) }.unwrap();
        }
    }
    for end in [Signal::SIGTERM, Signal::SIGINT] {
        let mut balancer = start_with_signals(ignore);
        balancer.signal(Signal::SIGHUP);
        balancer.wait_for_log("reloaded now=0");
        balancer.signal(end);
        assert_eq!(balancer.wait_for_exit(), Some(0), "{end}");
    }
}

#[test]
fn signals_that_come_before_it_runs_are_heeded_once_it_does() {
    for _ in 0..10 {
        let mut balancer = Balancer::start_on_loopback("", |_| {});
        balancer.wait_for_log("pinned to cores");
        balancer.signal(Signal::SIGTERM);
        assert_eq!(balancer.wait_for_exit(), Some(0));
    }
}
