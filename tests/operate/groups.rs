//! Groups of a service as an operator meets them: `lb shift`, what is shown, and the reload that ends it.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};

use super::harness::{Balancer, private};
use super::wait::{PATIENCE, wait_for};

/// An API server that answers every request with its letter, and keeps its connections.
fn lettered(letter: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut user in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut lines = BufReader::new(user.try_clone().unwrap()).lines();
                while let Some(Ok(line)) = lines.next() {
                    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{letter}\n");
                    if line.is_empty() && user.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Sends a request over a connection of its own, and returns the status and the letter.
fn get(door: SocketAddr) -> (String, String) {
    let mut user = TcpStream::connect(door).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = "GET / HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n";
    user.write_all(request.as_bytes()).unwrap();
    let lines: Vec<String> = BufReader::new(user).lines().map(Result::unwrap).collect();
    (lines[0][9..12].to_owned(), lines.last().unwrap().clone())
}

struct Shop {
    balancer: Balancer,
    settings: String,
    tokens: std::path::PathBuf,
    door: SocketAddr,
}

impl Shop {
    /// An API service with a backend in blue and one in green, and these shares.
    fn start(name: &str, shares: &str) -> Shop {
        let file = format!("lb-groups-{name}-{}", std::process::id());
        let tokens = std::env::temp_dir().join(file);
        private(&tokens, "a-token-for-those-who-shift");
        let (blue, green) = (lettered("b"), lettered("g"));
        let settings = format!(
            "admin.token_file = {tokens:?}\nlog.level = \"info\"\n\
             [service.shop]\nprotocol = \"api\"\nlisten = \"127.0.0.1:0\"\nregister = false\n\
             backends = [{{ address = \"{blue}\", group = \"blue\" }}, \
             {{ address = \"{green}\", group = \"green\" }}]\ngroups = {shares}\n"
        );
        let balancer = Balancer::ready(&settings);
        let line = balancer.wait_for_log("door of a service open");
        let word = line.split_whitespace().find_map(|word| word.strip_prefix("address="));
        let door = word.expect(&line).trim_matches('"').parse().expect(&line);
        Shop { balancer, settings, tokens, door }
    }

    fn shift(&self, arguments: &[&str]) -> Output {
        let mut command = self.balancer.command("shift");
        command.arg("--token-file").arg(&self.tokens).args(arguments).output().unwrap()
    }

    fn groups(&self) -> Value {
        let status = self.balancer.status();
        let all = status["services"].as_array().unwrap();
        all.iter().find(|it| it["name"] == "shop").unwrap()["groups"].clone()
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.tokens);
    }
}

fn group(name: &str, share: u8, file_share: u8) -> Value {
    json!({"name": name, "share": share, "file_share": file_share, "backends": 1, "serving": 1})
}

#[test]
fn rule_9_a_shift_under_load_fails_no_request_and_a_reload_ends_it() {
    let shop = Shop::start("load", "{ blue = 100, green = 0 }");
    let door = shop.door;
    assert_eq!(get(door), ("200".into(), "b".into()));
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::new(AtomicU64::new(0));
    let users: Vec<_> = (0..4)
        .map(|_| {
            let (stop, asked) = (Arc::clone(&stop), Arc::clone(&asked));
            std::thread::spawn(move || {
                let mut statuses = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    statuses.push(get(door).0);
                    asked.fetch_add(1, Ordering::Relaxed);
                }
                statuses
            })
        })
        .collect();
    let wait_for_requests = || {
        let before = asked.load(Ordering::Relaxed);
        wait_for("more requests", || (asked.load(Ordering::Relaxed) >= before + 40).then_some(()));
    };
    wait_for_requests();
    for shares in [["blue=0", "green=100"], ["blue=50", "green=50"], ["green=100", "blue=0"]] {
        let outcome = shop.shift(&["shop", shares[0], shares[1]]);
        assert!(outcome.status.success(), "{outcome:?}");
        wait_for_requests();
    }
    stop.store(true, Ordering::Relaxed);
    let statuses: Vec<String> = users.into_iter().flat_map(|user| user.join().unwrap()).collect();
    assert!(statuses.len() >= 160 && statuses.iter().all(|it| it == "200"), "{statuses:?}");
    assert!((0..20).all(|_| get(door).1 == "g"));
    assert_eq!(shop.groups(), json!([group("blue", 0, 100), group("green", 100, 0)]));
    let page = shop.balancer.command("status").output().unwrap();
    let page = String::from_utf8(page.stdout).unwrap();
    assert!(page.contains("blue=0 (file: 100), green=100 (file: 0)"), "{page}");
    assert!(page.contains("shop/green"), "{page}");

    let reload = shop.balancer.change(&shop.settings);
    assert!(reload.status.success(), "{reload:?}");
    let said = String::from_utf8(reload.stdout).unwrap();
    assert_eq!(said, "the shift of shop is over: blue=100 green=0\nreloaded\n");
    let again = shop.balancer.change(&shop.settings);
    assert_eq!(String::from_utf8(again.stdout).unwrap(), "reloaded, nothing had changed\n");
    assert_eq!(shop.groups(), json!([group("blue", 100, 100), group("green", 0, 0)]));
    assert!((0..20).all(|_| get(door).1 == "b"), "the file's shares are back");
    shop.balancer.wait_for_log("shares shifted service=shop ");
    shop.balancer.wait_for_log("reload: the shift is over");
}

#[test]
fn rule_9_a_shift_says_what_holds_now_or_why_it_was_refused() {
    let shop = Shop::start("said", "{ blue = 95, green = 5 }");
    let done = shop.shift(&["shop", "green=10"]);
    let said = String::from_utf8(done.stdout).unwrap();
    assert_eq!(
        said,
        "shop blue=95: 1 of 1 backends serve\n\
         shop green=10: 1 of 1 backends serve, 5 again after the next reload\n\
         0 sessions stay where they are\n"
    );
    for (arguments, part) in [
        (["shopp", "green=10"], "there is no service shopp; the nearest name"),
        (["shop", "red=10"], "service shop has no group red; its groups are blue=95 green=10"),
        (["tcp", "red=10"], "service tcp has no groups"),
        (["shop", "green=101"], "a share from 0 to 100"),
    ] {
        let refused = shop.shift(&arguments);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(refused.status.code() == Some(2) && said.contains(part), "{arguments:?}: {said}");
    }
    let nobody = shop.shift(&["shop", "green=0", "blue=0"]);
    let said = String::from_utf8(nobody.stderr).unwrap();
    assert!(said.contains("give one of its groups a share above 0"), "{said}");
    assert_eq!(shop.groups(), json!([group("blue", 95, 95), group("green", 10, 5)]));
    let stranger = shop.balancer.command("shift").args(["shop", "green=1"]).output().unwrap();
    let said = String::from_utf8(stranger.stderr).unwrap();
    assert!(
        said.contains("Authorization") && said.contains("--token-file"),
        "a shift needs a token: {said}"
    );
}
