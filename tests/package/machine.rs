//! A machine for a test: systemd as the first process in namespaces of its own, on an overlay over this
//! machine's files. Owns its processes, cgroups and mounts; all of them end with it. It cannot touch this
//! machine: modules, the clock, devices, and kernel settings beyond its own network are out of its reach.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::wait::wait_for;
use crate::{Running, run, succeeded};

/// Makes the root directory, leaves everything else behind, and becomes systemd. Of the units, only those
/// that `basic.target` needs and those a test installs are started.
const BOOT: &str = r#"
set -e
mount -t tmpfs none "$1"
mkdir "$1/changes" "$1/work" "$1/system"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/changes,workdir=$1/work" "$1/system"
cd "$1/system"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
    touch dev/$name
    mount --bind /dev/$name dev/$name
done
mkdir dev/shm dev/pts
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
rm -rf etc/systemd/system usr/sbin/policy-rc.d
mkdir etc/systemd/system .before
: > etc/fstab
for name in networkd timesyncd resolved logind journald-audit; do
    for kind in service socket; do ln -s /dev/null etc/systemd/system/systemd-$name.$kind; done
done
ip link set lo up
pivot_root . .before
umount -l .before
# Credentials come into a service's directory by way of a shared mount.
mount --make-rshared /
echo booting
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin setpriv \
    --bounding-set=-sys_module,-sys_time,-sys_boot,-sys_rawio,-syslog \
    /lib/systemd/systemd --system --unit=basic.target --log-target=null --show-status=no
"#;

/// The running machine.
pub struct Machine {
    /// `unshare`, which is the parent of the first process and kills it when it ends.
    holder: Option<Running>,
    first: u32,
    folder: PathBuf,
    cgroup: PathBuf,
}

impl Machine {
    /// Boots it.
    ///
    /// # Errors
    /// Why it cannot be booted here, in the words of the program that failed.
    pub fn boot(name: &str) -> Result<Machine, String> {
        let name = format!("lb-machine-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(&name);
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let cgroup = own_cgroup()?.join(&name);
        fs::create_dir(&cgroup).map_err(|error| format!("{}: {error}", cgroup.display()))?;
        let mut machine = Machine { holder: None, first: 0, folder, cgroup };
        machine.start()?;
        Ok(machine)
    }

    fn start(&mut self) -> Result<(), String> {
        let members = self.cgroup.join("cgroup.procs");
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$1\" && shift && exec \"$@\"", "sh"])
            .arg(members)
            .args(["unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc"])
            .args(["--net", "--cgroup", "--propagation", "private", "sh", "-c", BOOT, "sh"])
            .arg(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A signal to this test from a terminal is not for the machine.
            .process_group(0);
        let mut holder = command.spawn().map_err(|error| error.to_string())?;
        let said = holder.stdout.take().expect("it was asked for");
        let complaints = holder.stderr.take().expect("it was asked for");
        let pid = holder.id();
        self.holder = Some(Running(holder));
        let mut line = String::new();
        let _ = BufReader::new(said).read_line(&mut line);
        if line != "booting\n" {
            let complaint = BufReader::new(complaints).lines().map_while(Result::ok).next();
            return Err(complaint.unwrap_or_else(|| "it ended without a word".into()));
        }
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.map_err(|error| error.to_string())?;
        self.first = children.trim().parse().expect("unshare has one child");
        wait_for("systemd to have booted", || {
            let state = self.command("systemctl").arg("is-system-running").output().unwrap();
            let state = String::from_utf8_lossy(&state.stdout);
            ["running", "degraded"].contains(&state.trim_end()).then_some(())
        });
        Ok(())
    }

    /// A command inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.first)).args(["--all", "--", "env", "-i"]);
        command.args(["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive"]);
        command.args(["HOME=/root", "TERM=dumb"]).arg(program);
        command
    }

    /// Runs a line of shell inside and expects success.
    #[track_caller]
    pub fn shell(&self, line: &str) -> String {
        succeeded(self.command("sh").args(["-c", line]).output().unwrap())
    }

    /// A property of the unit, as systemd reports it.
    pub fn unit(&self, property: &str) -> String {
        let said = run(self.command("systemctl").args(["show", "lb", "--value", "-p", property]));
        said.trim_end().to_owned()
    }

    /// The path of a file inside, as seen from outside.
    pub fn path(&self, name: &str) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.first)).join(name.trim_start_matches('/'))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // When the first process ends, everything inside ends, and the mounts vanish.
        drop(self.holder.take());
        wait_for("the machine's cgroups to be empty", || remove_cgroups(&self.cgroup).ok());
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Where this test can make a cgroup of its own: below the one it is in, in the version 2 hierarchy.
fn own_cgroup() -> Result<PathBuf, String> {
    let mounts = fs::read_to_string("/proc/mounts").map_err(|error| error.to_string())?;
    let is_second = |line: &&str| line.split(' ').nth(2) == Some("cgroup2");
    let mounted = mounts.lines().find(is_second).and_then(|line| line.split(' ').nth(1));
    let mounted = mounted.ok_or("there is no cgroup2 hierarchy")?;
    let mine = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
    let mine = mine.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
    Ok(Path::new(mounted).join(mine))
}

fn remove_cgroups(cgroup: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroups(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

/// Reports why a test was not run, bypassing the harness, which swallows the output of passing tests.
pub fn skipped(reason: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: a machine of its own cannot be booted: {reason}");
}
