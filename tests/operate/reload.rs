//! A reload: what it changes, what it leaves alone, and what it refuses whole.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;

use crate::harness::{Balancer, asked, echoes, private};
use crate::wait::{PATIENCE, wait_for};

#[test]
fn a_reload_changes_settings_and_leaves_a_running_session_alone() {
    let balancer = Balancer::ready("limits.sessions = 5");
    let mut user = balancer.user();
    let done = balancer.change(
        "balance.policy = \"source_hash\"\nlimits.sessions = 1\nlog.level = \"debug\"\n\
         limits.buffer_bytes = 1048576",
    );
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(said.contains("in use from now on: balance.policy = \"source_hash\"\n"), "{said}");
    assert!(said.contains("needs a restart: limits.buffer_bytes = 1048576\n"), "{said}");
    let status = balancer.status();
    assert_eq!(status["policy"], "source_hash");
    assert_eq!(status["sessions"]["limit"], 1);
    balancer.wait_for_log("in use from now on setting=balance.policy = \"source_hash\"");
    balancer.wait_for_log("needs a restart setting=limits.buffer_bytes = 1048576");
    balancer.wait_for_log("reloaded now=3 after_restart=1");
    assert!(echoes(&mut user), "the session that ran goes on");
    let mut other = TcpStream::connect(balancer.door("tcp")).unwrap();
    other.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(!echoes(&mut other), "the lower limit holds for the next user");
    let more = balancer.change("limits.sessions = 50");
    assert!(more.status.success(), "{}", String::from_utf8_lossy(&more.stderr));
    let mut users: Vec<TcpStream> = (0..20).map(|_| balancer.user()).collect();
    assert!(users.iter_mut().all(echoes), "the limit may be raised beyond the first one");
}

#[test]
fn a_reload_changes_which_proxies_tell_their_users_addresses() {
    let balancer = Balancer::ready("");
    let mut before = balancer.user();
    let own = "listen.proxy_from = [\"127.0.0.0/8\"]";
    let done = balancer.change(own);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(said.contains("in use from now on: listen.proxy_from = "), "{said}");
    let connect = || {
        let user = TcpStream::connect(balancer.door("tcp")).unwrap();
        user.set_read_timeout(Some(PATIENCE)).unwrap();
        user
    };
    assert!(!echoes(&mut connect()), "it must begin with a header now");
    balancer.wait_for_log("it is in proxy_from and sent no valid PROXY header");
    let mut told = connect();
    told.write_all(b"PROXY TCP4 192.0.2.1 192.0.2.2 123 5678\r\n").unwrap();
    assert!(echoes(&mut told));
    balancer.wait_for_log("client=192.0.2.1:123");
    assert!(echoes(&mut before), "a session that ran goes on");
    assert_eq!(balancer.status()["sessions"]["refused"], 1);
    assert!(balancer.change("").status.success());
    assert!(echoes(&mut connect()), "and need not any more");
}

#[test]
fn a_reload_changes_the_rule_of_health_for_backends_that_are_there() {
    let patient = "health.interval_ms = 200\nhealth.timeout_ms = 100\nhealth.misses = ";
    let balancer = Balancer::ready(&format!("{patient} 100"));
    let mut silent = TcpStream::connect(balancer.door("control")).unwrap();
    write!(silent, r#"{{"cmd":"register","protocol":"udp","port":9}}"#).unwrap();
    balancer.wait_for_log("misses=1 of=100");
    let done = balancer.change(&format!("{patient} 20"));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    balancer.wait_for_log("it did not answer hello");
    balancer.wait_for_log("misses=20 of=20");
    assert!(
        !balancer.log.lock().unwrap().contains("misses=21 "),
        "the new limit is the one that held"
    );
}

#[test]
fn a_reload_ends_maintenance() {
    let settings = |maintenance: bool| {
        format!(
            "[service.shop]\nprotocol = \"api\"\nhosts = [\"shop.example\"]\nmaintenance = {maintenance}"
        )
    };
    let balancer = Balancer::start_on_loopback(&settings(true), |_| {});
    balancer.wait_until_told("READY=1");
    let door = balancer.door("api");
    let said = |host: &str| {
        let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        asked(door, head.as_bytes())
    };
    let shop = said("shop.example");
    assert!(shop.contains("503 Service Unavailable: the service is under maintenance"), "{shop}");
    wait_for("the demo backend to serve every other host", || {
        said("other.example").starts_with("HTTP/1.1 200 ").then_some(())
    });
    assert!(balancer.change(&settings(false)).status.success());
    wait_for("the end of maintenance", || {
        said("shop.example").contains("no backend is registered").then_some(())
    });
}

#[test]
fn a_reload_reads_the_tokens_and_secrets_again() {
    let folder = std::env::temp_dir().join(format!("lb-tokens-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let (tokens, others) = (folder.join("tokens"), folder.join("others"));
    let (old, new) = ("an-old-token-of-the-admin-door", "a-new-token-of-the-admin-door");
    private(&tokens, old);
    private(&others, "a-third-token-of-the-admin-door");
    let settings = |file: &Path| format!("admin.token_file = {file:?}");
    let balancer = Balancer::ready(&settings(&tokens));
    let admin = balancer.door("admin");
    let may = |token: &str| {
        let answer = asked(
            admin,
            format!(
                "POST /backends/b999/drain HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\
                 Authorization: Bearer {token}\r\n\r\n"
            )
            .as_bytes(),
        );
        match answer.split(' ').nth(1) {
            Some("404") => true,
            Some("401") => false,
            _ => panic!("{answer}"),
        }
    };
    assert!(may(old) && !may(new));
    private(&tokens, new);
    assert!(balancer.change(&settings(&tokens)).status.success());
    assert!(!may(old), "a token that was taken out");
    assert!(may(new), "a token that was put in");
    private(&tokens, "short");
    let refused = balancer.change(&settings(&tokens));
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("nothing was changed: ") && said.contains("is shorter than"), "{said}");
    assert!(may(new), "a file with a fault changes nothing");
    assert!(balancer.change(&settings(&others)).status.success());
    assert!(!may(new) && may("a-third-token-of-the-admin-door"), "another file");
    assert!(balancer.change("").status.success());
    let answer = asked(
        admin,
        format!("POST /backends/b9/drain HTTP/1.0\r\nHost: {admin}\r\n\r\n").as_bytes(),
    );
    assert!(answer.contains("changes over TCP are off"), "{answer}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_reload_with_a_fault_changes_nothing_and_says_why() {
    let balancer = Balancer::ready("balance.policy = \"least_sessions\"");
    for (settings, reason) in [
        ("balance.policy = \"random\"", "balance.policy takes one of"),
        ("health.interval_ms = 1000", "health.timeout_ms (2000) must be less"),
        ("control.secret_file = \"no/such/file\"", "cannot read the secret file"),
        ("limits.sessions = 16777216", "raise LimitNOFILE"),
    ] {
        let refused = balancer.change(settings);
        assert_eq!(refused.status.code(), Some(2), "{settings}");
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(said.contains("nothing was changed: ") && said.contains(reason), "{said}");
        let line = balancer.wait_for_log(reason);
        assert!(line.contains("reload refused, nothing was changed"), "{line}");
        assert_eq!(balancer.status()["policy"], "least_sessions");
    }
}
