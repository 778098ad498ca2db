//! The balancer that runs on this host, found through its admin door and addressed by signal. Owns
//! the care not to signal anything else: the door must be on this host, and the process must be a balancer,
//! whatever the name of its program's file.

use std::fs;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Failure;
use crate::boot::WORKER_THREAD;
use crate::client::admin;
use crate::control::status::Status;

/// What the balancer behind the admin door says about itself, if it runs on this host.
pub async fn status(door: &str) -> Result<Status, Failure> {
    if admin::is_socket(door) {
        return Ok(admin::status(door).await?);
    }
    let mut addresses = tokio::net::lookup_host(door)
        .await
        .map_err(|error| format!("cannot find {door}: {error}; check --admin"))?;
    if !addresses.all(|address| address.ip().is_loopback()) {
        return Err(Failure(format!(
            "{door} is not on loopback, and only a balancer of this host can be told anything; run \
             this command there"
        )));
    }
    Ok(admin::status(door).await?)
}

/// Sends a signal to the balancer.
pub fn tell(status: &Status, signal: Signal) -> Result<(), Failure> {
    let pid = status.pid;
    if !is_balancer(pid) {
        return Err(Failure(format!(
            "the balancer's process {pid} is not on this host; run this command where it runs"
        )));
    }
    if signal == Signal::SIGUSR2 && !catches(pid, signal) {
        return Err(Failure(format!(
            "the running balancer (process {pid}) is older than `lb upgrade`: restart it instead"
        )));
    }
    let process = i32::try_from(pid).map_err(|_| format!("{pid} is no process"))?;
    kill(Pid::from_raw(process), signal).map_err(|errno| match errno {
        Errno::EPERM => Failure(format!(
            "may not signal the balancer (process {pid}); run this as root, with sudo"
        )),
        _ => Failure(format!(
            "cannot signal the balancer (process {pid}): {errno}; is it still there?"
        )),
    })
}

/// Whether a process of this host has a thread that is one of a balancer's workers. Anybody may ask for the names
/// of threads, but not for a process's file, which may have been replaced as well.
fn is_balancer(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let name = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("comm"));
    threads.flatten().filter_map(|it| name(it).ok()).any(|it| it.starts_with(WORKER_THREAD))
}

/// Whether a process handles a signal, which would end it otherwise (proc(5)).
fn catches(pid: u32, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    caught.is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::mpsc;

    use super::*;
    use crate::base::thread;

    #[test]
    fn a_balancer_is_known_by_its_workers_and_nothing_else_is_taken_for_one() {
        let (end, ended) = mpsc::channel::<()>();
        let (begin, begun) = mpsc::channel();
        let worker = thread::spawn(&format!("{WORKER_THREAD}0"), move || {
            begin.send(()).unwrap();
            let _ = ended.recv();
        });
        begun.recv().unwrap();
        assert!(is_balancer(std::process::id()), "whatever its file's name is");
        drop(end);
        worker.unwrap().join().unwrap();
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let is_one = is_balancer(other.id());
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(!is_one && !is_balancer(u32::MAX));
    }
}
