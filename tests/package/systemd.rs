//! The unit under a real systemd: what an operator sees from `systemctl`, `journalctl` and the balancer
//! between boot and purge.

use std::fs;
use std::process::Stdio;

use crate::machine::{Machine, skipped};
use crate::wait::wait_for;
use crate::{Running, package, run};

/// A drop-in for the unit: a watchdog timeout short enough to wait for.
const OVERRIDE: &str = "[Service]\nWatchdogSec=2\n";

fn installed(name: &str) -> Option<Machine> {
    let machine = match Machine::boot(name) {
        Ok(machine) => machine,
        Err(reason) => {
            skipped(&reason);
            return None;
        }
    };
    fs::create_dir_all(machine.path("/etc/systemd/system/lb.service.d")).unwrap();
    fs::write(machine.path("/etc/systemd/system/lb.service.d/test.conf"), OVERRIDE).unwrap();
    fs::copy(package(), machine.path("/lb.deb")).unwrap();
    run(machine.command("dpkg").args(["-i", "/lb.deb"]));
    Some(machine)
}

/// Changes one setting and leaves the others at their defaults.
fn set(machine: &Machine, key: &str, value: &str) {
    let path = machine.path("/etc/lb/lb.toml");
    let text = fs::read_to_string(&path).unwrap();
    let is_set = |line: &&str| line.trim_start_matches('#').starts_with(&format!("{key} = "));
    let line = text.lines().find(is_set).expect(key);
    fs::write(&path, text.replacen(line, &format!("{key} = {value}"), 1)).unwrap();
}

fn backend(machine: &Machine) -> Running {
    let mut command = machine.command("lb");
    command.args(["backend", "--protocol", "tcp", "--port", "0", "--echo"]);
    command.args(["--secret-file", "/etc/lb/control.secret"]);
    Running(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
}

#[track_caller]
fn relays(machine: &Machine) {
    wait_for("a backend", || {
        // A balancer that has just restarted does not answer yet.
        let said = machine.command("lb").args(["status", "--json"]).output().unwrap();
        let status: serde_json::Value = serde_json::from_slice(&said.stdout).ok()?;
        (status["backends"][0]["state"] == "serving").then_some(())
    });
    let heard = machine.shell("echo hello | lb user --protocol tcp");
    assert_eq!(heard, "hello\n");
}

fn wait_for_unit(machine: &Machine, property: &str, wanted: &str) {
    wait_for(&format!("{property} to begin with {wanted}"), || {
        machine.unit(property).starts_with(wanted).then_some(())
    });
}

/// The unit's lines in the journal at this priority and above.
fn journal(machine: &Machine, priority: &str) -> String {
    run(machine.command("journalctl").args(["--sync"]));
    run(machine.command("journalctl").args(["-u", "lb", "-o", "cat", "-p", priority]))
}

#[test]
#[ignore = "needs root, systemd, cgroup2, cargo-deb, dpkg-dev and iproute2"]
fn under_systemd_it_is_ready_reloads_and_ends_its_sessions_before_it_stops() {
    let Some(machine) = installed("stop") else { return };
    // Installing the package has started it and waited until it was ready.
    assert_eq!(machine.unit("ActiveState"), "active");
    let exposure = machine.shell("systemd-analyze security --no-pager lb | tail -n 1");
    let exposure = exposure.split_whitespace().find_map(|word| word.parse::<f64>().ok());
    assert!(exposure.is_some_and(|exposure| exposure <= 2.0), "{exposure:?}");

    set(&machine, "secret_file", r#""/run/credentials/lb.service/control.secret""#);
    set(&machine, "socket", r#""/run/lb/admin.sock""#);
    machine.shell("systemctl restart lb");
    let _backend = backend(&machine);
    relays(&machine);
    let changed = machine.shell(
        "curl -s --unix-socket /run/lb/admin.sock -X POST 'http://localhost/backends/b1/weight?to=3'",
    );
    assert!(!changed.contains("error"), "{changed}");

    set(&machine, "level", r#""debug""#);
    machine.shell("systemctl reload lb");
    wait_for("the reload", || journal(&machine, "info").contains("reloaded now=1").then_some(()));
    set(&machine, "level", r#""loud""#);
    machine.shell("systemctl reload lb");
    wait_for("its refusal", || {
        let errors = journal(&machine, "err");
        errors.contains("ERROR reload refused, nothing was changed").then_some(())
    });

    let mut user = machine.command("lb");
    user.args(["user", "--protocol", "tcp"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let user = Running(user.spawn().unwrap());
    wait_for_unit(&machine, "StatusText", "1 session");
    machine.shell("systemctl stop --no-block lb");
    wait_for_unit(&machine, "StatusText", "draining: 1 session");
    assert_eq!(machine.unit("ActiveState"), "deactivating");
    drop(user);
    wait_for_unit(&machine, "ActiveState", "inactive");
    assert_eq!(machine.unit("Result"), "success");
}

#[test]
#[ignore = "needs root, systemd, cgroup2, cargo-deb, dpkg-dev and iproute2"]
fn under_systemd_it_comes_back_from_a_crash_and_a_hang_and_not_from_wrong_settings() {
    let Some(machine) = installed("return") else { return };
    set(&machine, "secret_file", r#""/run/credentials/lb.service/control.secret""#);
    // An operator who tries one thing after another is not stopped for restarting too often.
    for _ in 0..7 {
        machine.shell("systemctl restart lb");
    }
    let _backend = backend(&machine);
    relays(&machine);
    machine.shell("kill -KILL $(systemctl show lb --value -p MainPID)");
    wait_for_unit(&machine, "NRestarts", "1");
    relays(&machine);
    machine.shell("kill -STOP $(systemctl show lb --value -p MainPID)");
    wait_for_unit(&machine, "NRestarts", "2");
    relays(&machine);

    set(&machine, "level", r#""loud""#);
    machine.shell("! systemctl restart lb");
    assert_eq!(machine.unit("ExecMainStatus"), "2");
    assert_eq!(machine.unit("ActiveState"), "failed", "systemd does not retry");
    assert!(journal(&machine, "err").contains("log.level takes one of"));

    run(machine.command("dpkg").args(["--purge", "lb"]));
    assert_eq!(machine.unit("LoadState"), "not-found");
}

#[test]
#[ignore = "needs root, systemd, cgroup2, cargo-deb, dpkg-dev and iproute2"]
fn under_systemd_several_balancers_run_side_by_side_until_the_package_goes() {
    let Some(machine) = installed("several") else { return };
    for (name, tens) in [("one", 908), ("two", 918)] {
        let settings = format!(
            "[listen]\ncontrol = \"127.0.0.1:{tens}0\"\ntcp = {tens}1\nudp = {tens}2\napi = {tens}3\n\
             admin = \"127.0.0.1:{tens}4\"\n[admin]\nsocket = \"/run/lb-{name}/admin.sock\"\n\
             [control]\nsecret_file = \"/run/credentials/lb@{name}.service/control.secret\"\n"
        );
        fs::write(machine.path(&format!("/etc/lb/{name}.toml")), settings).unwrap();
    }
    machine.shell("systemctl enable --now lb@one lb@two");
    // What goes with lb.service is its own.
    machine.shell("systemctl stop lb");
    machine.shell("test ! -e /run/lb && test -S /run/lb-one/admin.sock");
    for tens in [908, 918] {
        let said = machine.shell(&format!("lb status --json --admin 127.0.0.1:{tens}4"));
        let status: serde_json::Value = serde_json::from_str(&said).expect(&said);
        let door = status["doors"]["tcp"].as_str().unwrap();
        assert!(door.ends_with(&format!(":{tens}1")), "{door}");
    }
    machine.shell("systemctl reload lb@one && systemctl is-active lb@one lb@two");
    let wanted = "/etc/systemd/system/multi-user.target.wants/lb@one.service";
    machine.shell(&format!("test -L {wanted}"));
    run(machine.command("dpkg").args(["--remove", "lb"]));
    machine.shell("! systemctl is-active lb@one && ! systemctl is-active lb@two");
    run(machine.command("dpkg").args(["--purge", "lb"]));
    machine.shell(&format!("test ! -L {wanted} && test -e /etc/lb/one.toml"));
}
