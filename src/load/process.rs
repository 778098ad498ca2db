//! CPU time of processes and threads, read from /proc: the balancer's if it runs on this host, and
//! the generator's own.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use crate::cluster::Protocol;

/// CPU time of all living threads of a process; `None` if it is gone or hidden.
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

/// The process on this host that listens where a load goes; `None` if it is elsewhere or hidden.
pub fn listener(protocol: Protocol, at: SocketAddr) -> Option<u32> {
    // An address that this host does not have is another host's.
    UdpSocket::bind((at.ip(), 0)).ok()?;
    let tables: [&str; 2] = match protocol {
        Protocol::Udp => ["/proc/net/udp", "/proc/net/udp6"],
        Protocol::Tcp | Protocol::Api => ["/proc/net/tcp", "/proc/net/tcp6"],
    };
    let inodes: Vec<String> = tables
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| inodes(&table, at.port()))
        .collect();
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let holds = fs::read_dir(process.path().join("fd")).ok()?.flatten().any(|descriptor| {
            fs::read_link(descriptor.path())
                .is_ok_and(|to| inodes.iter().any(|inode| to.as_os_str() == inode.as_str()))
        });
        holds.then_some(pid)
    })
}

/// The names that sockets waiting for any peer on a port have among a process's descriptors, from a
/// table of `/proc/net`.
fn inodes(table: &str, port: u16) -> Vec<String> {
    let waiting = |line: &str| {
        let mut cells = line.split_whitespace().skip(1);
        let (local, peer) = (cells.next()?, cells.next()?);
        let here = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
        let anyone = peer.bytes().all(|byte| matches!(byte, b'0' | b':'));
        let inode = cells.nth(6)?;
        (here == port && anyone).then(|| format!("socket:[{inode}]"))
    };
    table.lines().filter_map(waiting).collect()
}

/// The first number of a `schedstat` file: nanoseconds on a CPU.
fn on_cpu(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn work_shows_in_the_cpu_time_of_thread_and_process() {
        let before = cpu_of_this_thread().unwrap();
        let mut sum = 0u64;
        while cpu_of_this_thread().unwrap() <= before {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        // Not compared with an earlier sum: threads that have ended since are missing from this one.
        let worked = cpu_of_this_thread().unwrap();
        assert!(cpu_of(std::process::id()).unwrap() >= worked);
    }

    #[test]
    fn a_listener_is_found_by_its_port() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("[::1]:0").unwrap();
        let (tcp_at, udp_at) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
        assert_eq!(listener(Protocol::Tcp, tcp_at), Some(std::process::id()));
        assert_eq!(listener(Protocol::Udp, udp_at), Some(std::process::id()));
        drop(tcp);
        assert_eq!(listener(Protocol::Tcp, tcp_at), None);
        assert_eq!(listener(Protocol::Tcp, ([192, 0, 2, 1], 80).into()), None);
    }

    #[test]
    fn a_connection_is_no_listener() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n\
            1: 0100007F:1F91 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4712 1\n\
            2: 0100007F:1F92 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1";
        assert_eq!(inodes(table, 8081), ["socket:[4711]"]);
    }

    #[test]
    fn a_process_that_is_not_there_has_no_cpu_time() {
        assert_eq!(cpu_of(u32::MAX), None);
    }
}
