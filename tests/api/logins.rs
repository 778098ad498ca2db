//! Logins that hold for a connection: a user who logged in on a connection to a backend has it
//! alone, as long as both last.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::harness::{Backend, Balancer, User, ok};
use crate::wait::{PATIENCE, wait_for};

/// Answers each request with the number of its connection, and asks for a login where the path says so.
fn numbered() -> Backend {
    let next = AtomicUsize::new(0);
    Backend::run(move |own, mut wire| {
        let number = next.fetch_add(1, Ordering::Relaxed);
        while let Some(request) = own.request(&mut wire) {
            let number = number.to_string();
            let (status, line) = match request.path() {
                "/401" => ("401 Unauthorized", "WWW-Authenticate: Basic realm=x, ntlm\r\n"),
                "/407" => {
                    ("407 Proxy", "Proxy-Authenticate: Basic\r\nPROXY-AUTHENTICATE: NEGOTIATE\r\n")
                }
                "/200" => {
                    ("200 OK", "WWW-Authenticate: Negotiate oRQw\r\nPersistent-Auth: true\r\n")
                }
                "/basic" => ("401 Unauthorized", "WWW-Authenticate: Basic realm=x\r\n"),
                _ => ("200 OK", ""),
            };
            let length = number.len();
            wire.write(format!(
                "HTTP/1.1 {status}\r\n{line}Content-Length: {length}\r\n\r\n{number}"
            ));
            if request.path() == "/leave" {
                return;
            }
        }
    })
}

/// Makes a request and returns which connection it went over.
fn ask(user: &mut User, path: &str, lines: &str) -> usize {
    user.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n"));
    user.answer().text().parse().unwrap()
}

#[test]
fn whoever_logs_in_on_a_connection_has_it_alone_whoever_gives_the_sign() {
    for (path, lines) in [
        ("/", "Authorization: NTLM TlRMTVNTUAAB\r\n"),
        ("/", "AUTHORIZATION: negotiate YIIKhg\r\n"),
        ("/", "Proxy-Authorization: Negotiate YIIKhg\r\n"),
        ("/", "Authorization: Kerberos YIIKhg\r\n"),
        ("/401", ""),
        ("/407", ""),
        ("/200", ""),
    ] {
        let balancer = Balancer::over(&[numbered().address], |_| {});
        let (mut first, mut second) = (balancer.user(), balancer.user());
        let own = ask(&mut first, path, lines);
        balancer.expect(path, 1, |it| it.api_upstream_private.get());
        for _ in 0..3 {
            assert_ne!(ask(&mut second, "/", ""), own, "{path} {lines}");
            assert_eq!(ask(&mut first, "/", ""), own, "{path} {lines}");
        }
        assert_eq!(balancer.count(|it| it.api_upstream_private_shed.get()), 0);
        balancer.stop();
    }
}

#[test]
fn a_login_that_each_request_brings_leaves_the_connection_to_everybody() {
    let backend = numbered();
    let balancer = Balancer::over(&[backend.address], |config| {
        config.api.upstream_idle = PATIENCE;
    });
    for (path, lines) in [
        ("/basic", ""),
        ("/", "Authorization: Basic TlRMTQ==\r\n"),
        ("/", "Authorization: Bearer NTLM\r\nCookie: NTLM\r\n"),
    ] {
        assert_eq!(ask(&mut balancer.user(), path, lines), 0, "{path} {lines}");
        balancer.expect("kept for everybody", 1, |it| it.api_upstream_idle.get());
    }
    assert_eq!(backend.connections(), 1);
    balancer.stop();
}

#[test]
fn a_users_own_connection_is_closed_with_the_user() {
    let closed = std::sync::Arc::new(AtomicUsize::new(0));
    let count = std::sync::Arc::clone(&closed);
    let backend = Backend::run(move |own, mut wire| {
        while own.request(&mut wire).is_some() {
            wire.write(ok("0"));
        }
        count.fetch_add(1, Ordering::Relaxed);
    });
    let balancer = Balancer::over(&[backend.address], |_| {});
    for (number, close) in [(1, ""), (2, "Connection: close\r\n")] {
        let mut user = balancer.user();
        ask(&mut user, "/", &format!("Authorization: NTLM a\r\n{close}"));
        if close.is_empty() {
            drop(user);
        }
        wait_for("the connection to be closed", || {
            (closed.load(Ordering::Relaxed) == number).then_some(())
        });
    }
    balancer.expect("kept for users", 0, |it| it.api_upstream_private.get());
    balancer.stop();
}

#[test]
fn beyond_the_limit_whoever_was_idle_longest_logs_in_again() {
    let balancer =
        Balancer::over(&[numbered().address], |config| config.api.upstream_private_max = 2);
    let mut users: Vec<User> = (0..3).map(|_| balancer.user()).collect();
    let own: Vec<usize> =
        users.iter_mut().map(|user| ask(user, "/", "Authorization: NTLM a\r\n")).collect();
    balancer.expect("closed for others", 1, |it| it.api_upstream_private_shed.get());
    for place in [1, 2] {
        assert_eq!(ask(&mut users[place], "/", ""), own[place]);
    }
    assert!(!own.contains(&ask(&mut users[0], "/", "")));
    balancer.stop();
}

#[test]
fn a_user_whose_own_connection_is_gone_goes_on_over_another() {
    let backend = numbered();
    let mut balancer = Balancer::over(&[backend.address], |_| {});
    let mut user = balancer.user();
    let own = ask(&mut user, "/leave", "Authorization: NTLM a\r\n");
    balancer.expect("kept for users", 0, |it| it.api_upstream_private.get());
    assert_ne!(ask(&mut user, "/", ""), own);
    ask(&mut user, "/", "Authorization: NTLM a\r\n");
    let other = Backend::named("77");
    balancer.register(&[]);
    balancer.expect("kept for users", 0, |it| it.api_upstream_private.get());
    balancer.register(&[other.address]);
    assert_eq!(ask(&mut user, "/", ""), 77);
    balancer.stop();
}
