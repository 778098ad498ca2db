//! A reload: what it changes, what it leaves alone, and what it refuses whole.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use lb::control::auth::mac;

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
    assert!(said.contains("needs a restart: limits.buffer_bytes = \"1MiB\"\n"), "{said}");
    let status = balancer.status();
    assert_eq!(status["policy"], "source_hash");
    assert_eq!(status["sessions"]["limit"], 1);
    let policy = r#"in use from now on setting="balance.policy = \"source_hash\"""#;
    balancer.wait_for_log(policy);
    balancer.wait_for_log("needs a restart setting=\"limits.buffer_bytes = \\\"1MiB\\\"\"");
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
    // Those who came before the demo backends.
    let refused = || balancer.status()["sessions"]["refused"].as_u64().unwrap();
    let refused_before = refused();
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
    assert_eq!(refused() - refused_before, 1);
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
fn a_reload_changes_fallbacks_and_the_limits_of_requests() {
    let settings = |bytes: u32, fallback: &str| {
        format!(
            "[service.shop]\nprotocol = \"api\"\nhosts = [\"shop.example\"]\nbody_bytes = {bytes}\n\
             fallback = \"{fallback}\""
        )
    };
    let balancer = Balancer::start_on_loopback(&settings(3, ""), |_| {});
    balancer.wait_until_told("READY=1");
    let door = balancer.door("api");
    let said = |host: &str| {
        let request = format!(
            "PUT / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbody"
        );
        asked(door, request.as_bytes())
    };
    wait_for("the demo backend", || said("x").starts_with("HTTP/1.1 200 ").then_some(()));
    assert!(said("shop.example").starts_with("HTTP/1.1 413 "));
    assert!(balancer.change(&settings(4, "")).status.success());
    wait_for("the higher limit", || {
        said("shop.example").contains("no backend is registered").then_some(())
    });
    assert!(balancer.change(&settings(4, "api")).status.success());
    wait_for("the fallback", || said("shop.example").starts_with("HTTP/1.1 200 ").then_some(()));
    let refused = balancer.change(&settings(4, "gone"));
    assert!(!refused.status.success());
    let said_why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said_why.contains("service.shop.fallback is gone, which does not exist"), "{said_why}");
    assert!(said("shop.example").starts_with("HTTP/1.1 200 "), "nothing has changed");
    assert_eq!(balancer.status()["services"][3]["terms"][1], "fallback = \"api\"");
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

/// A control connection that has answered the challenge with this secret, and the answer to that.
fn prove(door: SocketAddr, secret: &str) -> (BufReader<TcpStream>, String) {
    let stream = TcpStream::connect(door).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = BufReader::new(stream);
    let mut challenge = String::new();
    lines.read_line(&mut challenge).unwrap();
    let challenge: serde_json::Value = serde_json::from_str(&challenge).expect(&challenge);
    let mac = mac(secret.as_bytes(), challenge["nonce"].as_str().unwrap(), "web");
    let answer = tell(&mut lines, &format!(r#"{{"cmd":"auth","id":"web","mac":"{mac}"}}"#));
    (lines, answer)
}

/// Says something on a control connection; the answer to it.
fn tell(lines: &mut BufReader<TcpStream>, words: &str) -> String {
    lines.get_mut().write_all(words.as_bytes()).unwrap();
    loop {
        let mut answer = String::new();
        lines.read_line(&mut answer).unwrap();
        if !answer.contains(r#"{"cmd":"hello""#) {
            return answer;
        }
        lines.get_mut().write_all(br#"{"ack":"hello"}"#).unwrap();
    }
}

#[test]
fn rule_12_a_reload_reads_the_secrets_and_networks_of_services_again() {
    let folder = std::env::temp_dir().join(format!("lb-secrets-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join("redis");
    let (old, new) = ("an old secret of redis", "a new secret of redis");
    private(&file, old);
    let settings = |more: &str| {
        format!("[service.redis]\nprotocol = \"udp\"\nlisten = \"127.0.0.1:0\"\n{more}")
    };
    let guarded = settings(&format!("secret_file = {file:?}"));
    let balancer = Balancer::ready(&guarded);
    let control = balancer.door("control");
    let register = |port: u16| format!(r#"{{"cmd":"register","service":"redis","port":{port}}}"#);
    let (mut member, answer) = prove(control, old);
    assert!(answer.contains("successful"), "{answer}");
    assert!(tell(&mut member, &register(9001)).contains("successful"));
    private(&file, new);
    assert!(balancer.change(&guarded).status.success());
    assert!(prove(control, old).1.contains("the mac is wrong"));
    let (mut newcomer, answer) = prove(control, new);
    assert!(answer.contains("successful"), "{answer}");
    assert!(tell(&mut newcomer, &register(9002)).contains("successful"));
    let answer = tell(&mut member, &register(9003));
    assert!(answer.contains("successful"), "whoever is in stays in: {answer}");
    let listed = settings("allow = [\"10.0.0.0/8\"]");
    assert!(balancer.change(&listed).status.success());
    let answer = tell(&mut member, &register(9004));
    assert!(answer.contains("service redis takes no registrations from 127.0.0.1"), "{answer}");
    let answer = tell(&mut member, r#"{"cmd":"list"}"#);
    assert!(answer.contains(":9001") && answer.contains(":9003"), "its backends stay: {answer}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_reload_with_a_fault_changes_nothing_and_says_why() {
    let balancer = Balancer::ready("balance.policy = \"least_sessions\"");
    for (settings, reason) in [
        ("balance.policy = \"random\"", "balance.policy takes one of"),
        (
            "health = { interval_ms = 1000, timeout_ms = 2000 }",
            "health.timeout_ms (2s) must be less",
        ),
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
