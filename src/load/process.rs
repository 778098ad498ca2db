//! CPU time of processes and threads, read from /proc: the balancer's when it runs on this host, and
//! the generator's own.

use std::fs;
use std::time::Duration;

/// CPU time of all living threads of a process; `None` when it is gone or hidden.
pub fn cpu_of(pid: u32) -> Option<Duration> {
    let mut nanos = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        nanos += on_cpu(&task.path().join("schedstat").to_string_lossy()).unwrap_or(0);
    }
    Some(Duration::from_nanos(nanos))
}

/// CPU time of the calling thread.
pub fn cpu_of_this_thread() -> Option<Duration> {
    on_cpu("/proc/thread-self/schedstat").map(Duration::from_nanos)
}

/// The first number of a `schedstat` file: nanoseconds on a CPU.
fn on_cpu(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_in_the_cpu_time_of_thread_and_process() {
        let (thread, process) =
            (cpu_of_this_thread().unwrap(), cpu_of(std::process::id()).unwrap());
        let mut sum = 0u64;
        while cpu_of_this_thread().unwrap() <= thread {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_of(std::process::id()).unwrap() > process);
    }

    #[test]
    fn a_process_that_is_not_there_has_no_cpu_time() {
        assert_eq!(cpu_of(u32::MAX), None);
    }
}
