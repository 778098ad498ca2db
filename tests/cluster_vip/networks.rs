//! Hosts as network namespaces without names: each is gone with the last process and descriptor in it, however the
//! test ends.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

/// One host.
pub struct Network(File);

impl Network {
    pub fn new() -> Network {
        let open = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("only root may");
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        let network = thread::scope(|scope| Network(scope.spawn(open).join().unwrap()));
        network.ip("link set lo up");
        network
    }

    /// Runs there, as do the programs that it starts, and sockets it opens stay there.
    pub fn within<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        let run = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
            run()
        };
        thread::scope(|scope| scope.spawn(run).join().unwrap())
    }

    /// What iproute2 says.
    pub fn ip(&self, what: &str) -> String {
        let done = self.within(|| Command::new("ip").args(what.split(' ')).output());
        let done = done.expect("iproute2 is installed");
        let complaint = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "ip {what}: {complaint}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// A switch, with an address of this host's own on it.
    pub fn switch(&self, address: &str) {
        self.ip("link add br0 type bridge");
        self.ip("link set br0 up");
        self.ip(&format!("addr add {address} dev br0"));
    }

    /// A cable from the switch here, where its end is called so, to `eth0` of a host.
    pub fn plug(&self, name: &str, host: &Network, address: &str) {
        self.cable(name, host, "eth0", address);
        self.ip(&format!("link set {name} master br0"));
    }

    pub fn cable(&self, name: &str, host: &Network, far: &str, address: &str) {
        let there = format!("/proc/{}/fd/{}", std::process::id(), host.0.as_raw_fd());
        self.ip(&format!("link add {name} type veth peer name {far} netns {there}"));
        host.ip(&format!("addr add {address} dev {far}"));
        host.ip(&format!("link set {far} up"));
        self.ip(&format!("link set {name} up"));
    }
}
