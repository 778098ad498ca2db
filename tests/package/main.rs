//! The Debian package as an operator uses it: built by `deploy/package`, installed, run, upgraded and
//! purged. Owns a root directory for each test: this machine's files under an overlay, with a network
//! of its own, so that nothing outlives the test and the default ports are free.

mod machine;
mod systemd;
#[path = "../common/wait.rs"]
mod wait;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use wait::wait_for;

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[track_caller]
fn succeeded(output: Output) -> String {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{complained}");
    said
}

#[track_caller]
fn run(command: &mut Command) -> String {
    succeeded(command.output().expect("the program is installed"))
}

/// The package with the program these tests were built with; built once.
fn package() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let into = Path::new(env!("CARGO_TARGET_TMPDIR")).join("package");
        let said = run(Command::new(project().join("deploy/package"))
            .args(["--binary", env!("CARGO_BIN_EXE_lb"), "--output"])
            .arg(&into));
        let path = said.lines().last().expect("the package's path");
        project().join(path)
    })
}

/// A root directory with this machine's files, where changes stay in memory. It lasts as long as the
/// process that holds its namespaces.
struct Root {
    holder: Child,
    folder: PathBuf,
}

const HOLD: &str = r#"
set -e
mount -t tmpfs none "$1"
mkdir "$1/changes" "$1/work" "$1/system"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/changes,workdir=$1/work" "$1/system"
mount -t proc proc "$1/system/proc"
mount --rbind /dev "$1/system/dev"
ip link set lo up
echo held
exec cat
"#;

impl Root {
    fn new(name: &str) -> Root {
        let name = format!("lb-package-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        let mut holder = Command::new("unshare")
            .args(["--mount", "--net", "--propagation", "private", "sh", "-c", HOLD, "sh"])
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare, of util-linux");
        let mut line = String::new();
        BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "held\n", "a root of its own takes root's rights, overlayfs and iproute2");
        Root { holder, folder }
    }

    /// A command inside. Nothing forks on the way, so the process started is that of the program itself.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.holder.id())).args(["--mount", "--net", "chroot"]);
        command
            .arg(self.folder.join("system"))
            .arg(program)
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// The path of a file inside, as seen from outside.
    fn path(&self, name: &str) -> PathBuf {
        let inside = self.folder.join("system").join(name.trim_start_matches('/'));
        let inside = inside.strip_prefix("/").unwrap();
        Path::new(&format!("/proc/{}/root", self.holder.id())).join(inside)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect(name)
    }

    /// Installs a package, or upgrades to it, as a non-interactive apt-get does.
    fn install(&self, package: &Path) {
        fs::copy(package, self.path("/lb.deb")).unwrap();
        run(self.command("dpkg").args(["--force-confdef", "--force-confold", "-i", "/lb.deb"]));
        fs::remove_file(self.path("/lb.deb")).unwrap();
    }

    /// Starts what the unit would start, as its user and within its limits, or within this machine's own
    /// limits where those are lower and cannot be raised.
    fn serve(&self) -> Balancer<'_> {
        let unit = self.text("/usr/lib/systemd/system/lb.service");
        let files = limit(Resource::RLIMIT_NOFILE, &setting(&unit, "LimitNOFILE"));
        let locked = limit(Resource::RLIMIT_MEMLOCK, &setting(&unit, "LimitMEMLOCK"));
        let (user, group) = (setting(&unit, "User"), setting(&unit, "Group"));
        assert_eq!(
            (setting(&unit, "CapabilityBoundingSet"), setting(&unit, "NoNewPrivileges")),
            (String::new(), "yes".to_owned())
        );
        let started = setting(&unit, "ExecStart");
        let process = self
            .command("prlimit")
            .args([format!("--nofile={files}"), format!("--memlock={locked}")])
            .args(["setpriv", "--clear-groups", "--no-new-privs", "--inh-caps=-all"])
            .args(["--bounding-set=-all", "--reuid", &user, "--regid", &group])
            .args(started.split(' '))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let balancer = Balancer { root: self, process: Running(process) };
        wait_for("the balancer to answer", || {
            self.command("lb").arg("status").output().unwrap().status.success().then_some(())
        });
        balancer
    }

    /// Files of the package, or created for it, that are still there.
    fn left_behind(&self) -> String {
        let mut find = Command::new("nsenter");
        find.arg(format!("--target={}", self.holder.id())).args(["--mount", "find"]);
        find.arg(self.folder.join("changes")).args(["!", "-type", "c", "("]);
        let names = ["lb", "lb[.-]*", "*-lb.*", "_lb", "control.secret*", "lb.service*"];
        find.args(["-name", names[0]]);
        find.args(names[1..].iter().flat_map(|name| ["-o", "-name", name]));
        run(find.arg(")"))
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // The mounts and the network vanish with the last process that uses them.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        let _ = fs::remove_dir(&self.folder);
    }
}

/// A process that ends with its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The balancer as the unit starts it.
struct Balancer<'a> {
    root: &'a Root,
    process: Running,
}

impl Balancer<'_> {
    fn status(&self) -> serde_json::Value {
        let said = run(self.root.command("lb").args(["status", "--json"]));
        serde_json::from_str(&said).expect(&said)
    }

    /// An echo backend that has registered; `arguments` are further ones for `lb backend`.
    fn backend(&self, arguments: &[&str]) -> Running {
        let mut command = self.root.command("lb");
        command.args(["backend", "--protocol", "tcp", "--port", "0", "--echo"]).args(arguments);
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        wait_for("the backend to register", || {
            (self.status()["backends"].as_array()?.len() == 1).then_some(())
        });
        Running(process)
    }

    fn user(&self) -> User {
        let mut command = self.root.command("lb");
        command.args(["user", "--protocol", "tcp"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        User(Running(command.spawn().unwrap()))
    }

    /// Sends SIGTERM, as systemd does; returns the exit code.
    fn stop(mut self) -> Option<i32> {
        kill(Pid::from_raw(self.process.0.id() as i32), Signal::SIGTERM).unwrap();
        wait_for("the balancer to exit", || self.process.0.try_wait().unwrap()).code()
    }
}

/// A running `lb user`.
struct User(Running);

impl User {
    #[track_caller]
    fn hears_back(&mut self, line: &str) {
        writeln!(self.0.0.stdin.as_mut().unwrap(), "{line}").unwrap();
        let mut heard = vec![0; line.len()];
        self.0.0.stdout.as_mut().unwrap().read_exact(&mut heard).unwrap();
        assert_eq!(String::from_utf8_lossy(&heard).trim_end(), line);
        let mut end = [0];
        self.0.0.stdout.as_mut().unwrap().read_exact(&mut end).unwrap();
    }
}

/// The value of a setting in the unit.
#[track_caller]
fn setting(unit: &str, name: &str) -> String {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix('=').map(str::to_owned);
    unit.lines().find_map(value).unwrap_or_else(|| panic!("the unit has no {name}"))
}

/// A limit from the unit, or this machine's if that is lower.
fn limit(resource: Resource, wanted: &str) -> u64 {
    let wanted = match wanted.strip_suffix('M') {
        Some(mebibytes) => mebibytes.parse::<u64>().unwrap() << 20,
        None => wanted.parse().unwrap(),
    };
    let (_, most) = getrlimit(resource).unwrap();
    wanted.min(most)
}

/// The same package with a newer version, after `change` has altered the unpacked files.
fn newer(name: &str, change: impl FnOnce(&Path)) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    run(Command::new("dpkg-deb").arg("--raw-extract").arg(package()).arg(&folder));
    let control = fs::read_to_string(folder.join("DEBIAN/control")).unwrap();
    let is_version = |line: &&str| line.starts_with("Version: ");
    let version = control.lines().find(is_version).expect("a version");
    fs::write(folder.join("DEBIAN/control"), control.replace(version, "Version: 99-1")).unwrap();
    change(&folder);
    let built = folder.with_extension("deb");
    run(Command::new("dpkg-deb")
        .args(["-Zgzip", "--root-owner-group", "--build"])
        .arg(&folder)
        .arg(&built));
    built
}

fn append(path: &Path, text: &str) {
    let mut file = fs::OpenOptions::new().append(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// The package's metadata in Cargo.toml.
fn metadata() -> toml::Table {
    let manifest = fs::read_to_string(project().join("Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    manifest["package"]["metadata"]["deb"].as_table().unwrap().clone()
}

#[test]
fn every_file_to_deploy_is_packaged() {
    let metadata = metadata();
    let assets = metadata["assets"].as_array().unwrap();
    let packed: BTreeSet<&str> = assets.iter().filter_map(|asset| asset[0].as_str()).collect();
    // By name, or along with all documents in its folder.
    let is_packed = |name: &str| {
        let folder = name.strip_suffix(".md").and_then(|stem| stem.rsplit_once('/'));
        let all = folder.map(|(folder, _)| format!("{folder}/*.md"));
        packed.contains(name) || all.is_some_and(|all| packed.contains(&*all))
    };
    // The units and the scripts are found by their directories; `package` builds the package, and
    // Containerfile the image, as the compose file does from the sources.
    let otherwise = [
        "deploy/lb.service",
        "deploy/lb@.service",
        "deploy/package",
        "deploy/debian",
        "deploy/Containerfile",
        "deploy/cluster/compose.yaml",
        "deploy/cluster/compose.toml",
    ];
    assert_eq!(metadata["systemd-units"]["unit-scripts"].as_str(), Some("deploy"));
    assert_eq!(metadata["maintainer-scripts"].as_str(), Some("deploy/debian"));
    let mut folders = vec![project().join("deploy")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(project()).unwrap().to_str().unwrap().to_owned();
            match path.is_dir() {
                _ if otherwise.contains(&name.as_str()) => {}
                true => folders.push(path),
                false => assert!(is_packed(&name), "{name} is not in the package"),
            }
        }
    }
}

#[test]
#[ignore = "needs cargo-deb, dpkg-dev and binutils"]
fn the_package_holds_the_program_its_documents_and_its_settings() {
    let listed = run(Command::new("dpkg-deb").arg("--contents").arg(package()));
    let row = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.last()?.strip_prefix('.')?.to_owned()))
    };
    let files: BTreeSet<(String, String)> =
        listed.lines().filter_map(row).filter(|(mode, _)| mode.starts_with('-')).collect();
    let manuals =
        ["", "-serve", "-check", "-backend", "-user", "-status", "-top", "-reload", "-drain"];
    let manuals = manuals.map(|name| format!("/usr/share/man/man1/lb{name}.1.gz"));
    let others = [
        "/usr/lib/systemd/system/lb.service",
        "/usr/lib/systemd/system/lb@.service",
        "/usr/share/man/man5/lb.toml.5.gz",
        "/usr/lib/sysctl.d/60-lb.conf",
        "/etc/lb/lb.toml",
        "/etc/ufw/applications.d/lb",
        "/usr/share/bash-completion/completions/lb",
        "/usr/share/zsh/vendor-completions/_lb",
        "/usr/share/fish/vendor_completions.d/lb.fish",
        "/usr/share/lb/grafana-lb.json",
        "/usr/share/lb/alerts-lb.yml",
        "/usr/share/lb/seccomp-lb.json",
        "/usr/share/lb/keepalived.conf",
        "/usr/share/doc/lb/CHANGELOG.md",
        "/usr/share/doc/lb/containers.md",
        "/usr/share/doc/lb/README.md",
        "/usr/share/doc/lb/operating.md",
        "/usr/share/doc/lb/settings.md",
        "/usr/share/doc/lb/joining.md",
        "/usr/share/doc/lb/relaying.md",
        "/usr/share/doc/lb/http.md",
        "/usr/share/doc/lb/log.md",
        "/usr/share/doc/lb/metrics.md",
        "/usr/share/doc/lb/schema.md",
        "/usr/share/doc/lb/copyright",
    ];
    for name in manuals.into_iter().chain(others.map(str::to_owned)) {
        assert!(files.contains(&("-rw-r--r--".to_owned(), name.clone())), "{name} in\n{listed}");
    }
    for name in ["/usr/bin/lb", "/usr/share/lb/ecmp"] {
        assert!(files.contains(&("-rwxr-xr-x".to_owned(), name.to_owned())), "{listed}");
    }
    let conffiles = run(Command::new("dpkg-deb").arg("--info").arg(package()).arg("conffiles"));
    assert_eq!(conffiles, "/etc/lb/lb.toml\n/etc/ufw/applications.d/lb\n");
    let field = |name| run(Command::new("dpkg-deb").arg("--field").arg(package()).arg(name));
    assert!(field("Depends").contains("libc6 (>= "), "{}", field("Depends"));
    assert_eq!(field("Version").trim_end(), format!("{}-1", env!("CARGO_PKG_VERSION")));
    for script in ["postinst", "prerm", "postrm"] {
        let text = run(Command::new("dpkg-deb").arg("--info").arg(package()).arg(script));
        assert!(text.contains("lb.service"), "{script} does nothing for the unit");
        assert!(!text.contains("#DEBHELPER#"), "{script}");
    }
}

#[test]
#[ignore = "needs root, cargo-deb, dpkg-dev, iproute2 and systemd"]
fn installed_it_serves_as_its_own_user_within_the_limits_of_its_unit() {
    let root = Root::new("serve");
    root.install(package());
    run(root.command("systemd-analyze").args([
        "verify",
        "--man=no",
        "lb.service",
        "lb@two.service",
    ]));
    let secret = root.text("/etc/lb/control.secret");
    assert!(secret.trim_end().len() == 64 && secret.ends_with('\n'), "{secret:?}");
    let owner = run(root.command("stat").args(["--format=%U %a", "/etc/lb/control.secret"]));
    assert_eq!(owner, "root 600\n");
    let enabled = "/etc/systemd/system/multi-user.target.wants/lb.service";
    assert!(root.path(enabled).symlink_metadata().is_ok(), "it starts at boot");

    let balancer = root.serve();
    let about = fs::read_to_string(format!("/proc/{}/status", balancer.process.0.id())).unwrap();
    let uid = run(root.command("id").args(["-u", "lb"]));
    let line = |name: &str| {
        let found = about.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        found.expect(name).to_owned()
    };
    assert_eq!(line("Uid").split('\t').next(), Some(uid.trim_end()));
    assert!(line("CapEff") == line("CapBnd") && line("CapEff") == "0".repeat(16), "{about}");
    assert_eq!(line("NoNewPrivs"), "1");
    let _backend = balancer.backend(&[]);
    let mut user = balancer.user();
    user.hears_back("through the package");
    let status = balancer.status();
    assert_eq!(status["doors"]["tcp"].as_str().and_then(|at| at.rsplit(':').next()), Some("8081"));
    assert_eq!(status["sessions"]["active"], 1);
    drop(user);
    assert_eq!(balancer.stop(), Some(0));
}

#[test]
#[ignore = "needs root, cargo-deb, dpkg-dev and iproute2"]
fn the_secret_of_the_package_opens_the_control_door_and_nothing_else_does() {
    let root = Root::new("secret");
    root.install(package());
    // What LoadCredential does: a copy the account can read, in the unit's own directory.
    let credentials = "/run/credentials/lb.service";
    run(root.command("install").args(["-d", credentials]));
    let install = ["-o", "lb", "-m", "400", "/etc/lb/control.secret"];
    run(root.command("install").args(install).arg(credentials));
    let setting = format!("\n[control]\nsecret_file = \"{credentials}/control.secret\"\n");
    let shipped = root.text("/etc/lb/lb.toml").replacen("\n[control]\n", &setting, 1);
    fs::write(root.path("/etc/lb/lb.toml"), shipped).unwrap();
    let balancer = root.serve();
    let mut stranger = root.command("lb");
    stranger.args(["backend", "--protocol", "tcp", "--port", "0", "--echo"]);
    let stranger = stranger.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stranger = Running(stranger);
    let mut said = BufReader::new(stranger.0.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("give it with --secret-file")), "it ended");
    assert_eq!(balancer.status()["backends"].as_array().map(Vec::len), Some(0));
    drop(stranger);
    let _backend = balancer.backend(&["--secret-file", "/etc/lb/control.secret"]);
    balancer.user().hears_back("proved");
}

#[test]
#[ignore = "needs root, cargo-deb, dpkg-dev and iproute2"]
fn an_upgrade_keeps_what_the_operator_changed_and_a_purge_leaves_nothing() {
    let root = Root::new("upgrade");
    root.install(package());
    let changed = root.text("/etc/lb/lb.toml").replacen("#sessions = \"auto\"", "sessions = 77", 1);
    fs::write(root.path("/etc/lb/lb.toml"), &changed).unwrap();
    let secret = root.text("/etc/lb/control.secret");
    let balancer = root.serve();
    let _backend = balancer.backend(&[]);
    let mut user = balancer.user();
    user.hears_back("before");

    root.install(&newer("newer", |files| {
        append(&files.join("etc/lb/lb.toml"), "\n# A setting of the newer version.\n");
        append(&files.join("etc/ufw/applications.d/lb"), "\n# A newer profile.\n");
    }));
    user.hears_back("the upgrade ended no session");
    assert_eq!(root.text("/etc/lb/lb.toml"), changed, "the operator's file stays");
    assert!(
        root.text("/etc/lb/lb.toml.dpkg-dist").contains("newer version"),
        "and the new one is beside it"
    );
    assert!(
        root.text("/etc/ufw/applications.d/lb").contains("newer profile"),
        "unchanged: replaced"
    );
    assert_eq!(root.text("/etc/lb/control.secret"), secret);
    drop(user);
    assert_eq!(balancer.stop(), Some(0));
    let balancer = root.serve();
    assert_eq!(balancer.status()["sessions"]["limit"], 77, "the newer one reads the kept file");
    assert_eq!(balancer.stop(), Some(0));

    run(root.command("dpkg").args(["--remove", "lb"]));
    assert_eq!(root.text("/etc/lb/lb.toml"), changed, "a removed package keeps its settings");
    assert_eq!(root.text("/etc/lb/control.secret"), secret);
    run(root.command("dpkg").args(["--purge", "lb"]));
    assert_eq!(root.left_behind(), "");
    for account in ["passwd", "group"] {
        let found = root.command("getent").args([account, "lb"]).output().unwrap();
        assert_eq!(found.status.code(), Some(2), "the {account} entry is still there");
    }
}
