//! The page in a real browser. Owns what must be visible there: that the script runs under the policy,
//! and that the figures arrive. Screenshots go to a directory outside the repository.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use lb::base::time::Now;
use lb::cluster::{BackendId, Protocol, ServiceId};
use lb::config::file;
use lb::config::services::ServiceConfig;
use serde_json::json;

use crate::harness::Core;
use crate::process::{Folder, Process, free_port};
use crate::wait::wait_for;

const BACKENDS: u16 = 200;
const SESSIONS: u32 = 100_000;

fn crowded() -> (Core, crate::harness::Backend) {
    let core = Core::start(|config| {
        // These backends answer no hello, and a browser may be slow.
        config.health.interval = Duration::from_secs(3600);
        config.limits.sessions = SESSIONS as usize;
    });
    let mut backend = core.connect();
    for port in 1..=BACKENDS {
        let wanted = json!({"cmd": "register", "protocol": "udp", "port": port, "name": format!("dns-{port}")});
        assert_eq!(backend.ask(&wanted)["ack"], "successful");
    }
    core.worker.with_shard(|shard| {
        for number in 0..SESSIONS {
            let ip = std::net::Ipv4Addr::from(0x0a00_0000 + number);
            let client = std::net::SocketAddr::from((ip, 7));
            let place =
                shard.open(ServiceId::built_in(Protocol::Udp), client, Now::read()).unwrap();
            shard.set_backend(&place, BackendId(1 + number % u32::from(BACKENDS)));
        }
    });
    for backend in &core.worker.metrics.backends[..usize::from(BACKENDS)] {
        backend.active.set(u64::from(SESSIONS) / u64::from(BACKENDS));
    }
    core.worker.metrics.counters.sessions_active.set(u64::from(SESSIONS));
    (core, backend)
}

/// 200 services with five backends each, one of which has failed.
fn services() -> (Core, crate::harness::Backend) {
    let name = |n: u16| format!("shop-frontend-of-the-european-west-region-{n:03}");
    let core = Core::start(|config| {
        config.health.interval = Duration::from_secs(3600);
        let service = |n| ServiceConfig::new(&name(n), Protocol::Udp);
        config.set_services((0..200).map(service).collect());
    });
    let mut backend = core.connect();
    for n in 0..1000 {
        let wanted = json!({"cmd": "register", "service": name(n / 5), "port": n + 1});
        assert_eq!(backend.ask(&wanted)["ack"], "successful");
    }
    (core, backend)
}

/// A member of etcd on loopback that ends with its owner, and its address.
fn etcd(folder: &Folder) -> (Process, String) {
    let [store, peer] = [free_port(), free_port()].map(|port| format!("http://127.0.0.1:{port}"));
    let data = folder.path().join("etcd").display().to_string();
    let all = format!("m={peer}");
    let arguments = ["--name", "m", "--data-dir", &data, "--initial-cluster", &all];
    let client = ["--listen-client-urls", &store, "--advertise-client-urls", &store];
    let peer = ["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer];
    (Process::start("etcd", &[&arguments[..], &client, &peer].concat()), store)
}

/// The page as rendered after some seconds of the browser's own time.
fn seen(core: &Core, into: &Path, dark: bool) -> String {
    seen_at(core, "", into, dark)
}

/// The same with a fragment in its address.
fn seen_at(core: &Core, fragment: &str, into: &Path, dark: bool) -> String {
    let look = if dark { "dark" } else { "light" };
    let profile = format!("--user-data-dir={}", into.join(look).display());
    let shot = format!("--screenshot={}", into.join(format!("{look}.png")).display());
    let scheme = if dark { "--blink-settings=preferredColorScheme=0" } else { "--hide-scrollbars" };
    let outcome = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000"])
        .args(["--window-size=1280,1500", "--enable-logging=stderr", "--dump-dom"])
        .args([profile, shot, scheme.to_owned(), format!("http://{}/{fragment}", core.admin)])
        .stdin(Stdio::null())
        .output()
        .expect("chromium; install the package of that name");
    let said = String::from_utf8_lossy(&outcome.stderr);
    let complaint = said.lines().find(|line| line.contains("CONSOLE"));
    assert_eq!(complaint, None, "the page complains");
    String::from_utf8_lossy(&outcome.stdout).into_owned()
}

#[test]
#[ignore = "needs the Debian package chromium"]
fn a_browser_shows_named_services_where_there_are_any() {
    let into = std::env::temp_dir().join(format!("lb-services-{}", std::process::id()));
    std::fs::create_dir_all(&into).unwrap();
    for named in [false, true] {
        let core = Core::start(|config| {
            if named {
                config.set_services(vec![ServiceConfig::new("resolvers", Protocol::Udp)]);
            }
        });
        let mut backend = core.connect();
        let service = if named { "resolvers" } else { "udp" };
        let wanted = json!({"cmd": "register", "service": service, "port": 9});
        assert_eq!(backend.ask(&wanted)["ack"], "successful");
        let dom = seen(&core, &into, false);
        assert_eq!(dom.contains(">resolvers</a></td>"), named, "{dom}");
        assert_eq!(dom.contains("id=\"services-part\" hidden"), !named, "{dom}");
        assert_eq!(dom.contains("data-key=\"backend-headservice\""), named, "{dom}");
        assert!(dom.contains("1 of 1 serving"), "{dom}");
    }
    println!("screenshots are in {}", into.display());
}

#[test]
#[ignore = "needs the Debian package chromium"]
fn a_browser_shows_two_hundred_backends_and_a_page_of_a_hundred_thousand_sessions() {
    let (core, _backend) = crowded();
    let into = std::env::temp_dir().join(format!("lb-page-{}", std::process::id()));
    std::fs::create_dir_all(&into).unwrap();
    for dark in [false, true] {
        let dom = seen(&core, &into, dark);
        assert!(dom.contains("200 of 200 serving"), "{dom}");
        assert!(dom.contains("100,000") && dom.contains("50 shown, and maybe more"), "{dom}");
        assert!(dom.matches(">500<").count() >= 200, "each has its sessions: {dom}");
        assert!(dom.contains("dns-7<") && dom.contains("dns-200<"), "{dom}");
        assert!(dom.matches("<tr>").count() < 400, "only one page of sessions is drawn");
    }
    println!("screenshots are in {}", into.display());
}

#[test]
#[ignore = "needs the Debian package chromium"]
fn a_browser_draws_the_last_minutes_with_what_changed_in_them_and_no_line_where_nothing_is_known() {
    let core = Core::start(|config| {
        config.health.interval = Duration::from_secs(3600);
        config.set_services(vec![ServiceConfig::new("resolvers", Protocol::Udp)]);
    });
    let mut backend = core.connect();
    let wanted = json!({"cmd": "register", "service": "resolvers", "port": 9});
    assert_eq!(backend.ask(&wanted)["ack"], "successful");
    core.worker.metrics.backends[0].total.add(30);
    core.worker.metrics.counters.sessions_started.add(30);
    let of_the_service = || core.get("/history?service=resolvers").1;
    wait_for("two steps", || of_the_service().contains("\"new\":[30,0]").then_some(()));
    core.worker.metrics.backends[0].active.add(2);
    let drain =
        json!({"cmd": "drain", "service": "resolvers", "port": 9, "deadline_ms": 3_600_000});
    assert_eq!(backend.ask(&drain)["ack"], "successful");
    let into = std::env::temp_dir().join(format!("lb-charts-{}", std::process::id()));
    std::fs::create_dir_all(&into).unwrap();
    let dom = seen_at(&core, "#service=resolvers", &into, true);
    let charts =
        dom.split("<figcaption").skip(1).map(|chart| chart.split("</figure>").next().unwrap());
    let charts: Vec<&str> = charts.collect();
    let titles = charts.iter().map(|chart| chart.split(['>', '<']).nth(1).unwrap());
    let expected = ["Sessions", "New sessions", "Turned away", "Bytes", "First byte, within"];
    assert_eq!(titles.collect::<Vec<_>>(), expected);
    // 30 within the first five seconds, which end two steps ago at most.
    let line = charts[1].split("class=\"s0\" d=\"").nth(1).unwrap().split('"').next().unwrap();
    assert!(line.starts_with("M17") && line.contains('L'), "{line}");
    assert_eq!(line.matches('M').count(), 1, "{line}");
    assert!(charts[2].contains(">none<"), "nobody was turned away: {}", charts[2]);
    assert!(charts[4].contains("class=\"s0\" d=\"\"") && charts[4].contains("nothing known"));
    assert!(dom.contains(">b1 joined \u{b7} resolvers<"), "{dom}");
    let told = "Asked for by its owner: no new sessions; the 2 it has are ended in 59 min ";
    assert!(dom.contains(told), "{dom}");
    assert!(charts.iter().all(|chart| chart.contains("class=\"mark\" d=\"M")), "{dom}");
    println!("screenshots are in {}", into.display());
}

#[test]
#[ignore = "needs the Debian package chromium"]
fn a_browser_lists_two_hundred_services_and_draws_no_thousand_backends_unasked() {
    let (core, _backend) = services();
    let into = std::env::temp_dir().join(format!("lb-many-{}", std::process::id()));
    std::fs::create_dir_all(&into).unwrap();
    let dom = seen(&core, &into, true);
    assert!(dom.contains("1,000 of 1,000 serving"), "{dom}");
    assert!(dom.contains("200 of 203 are shown: show all"), "{dom}");
    assert!(dom.contains("50 of 1,000 are shown: show all"), "{dom}");
    assert!(dom.matches("<tr>").count() < 400, "no more is drawn than that");
    let short = ">shop-frontend-of-the-e\u{2026}opean-west-region-190</a>";
    assert!(dom.contains(short), "long names keep both ends: {dom}");
    let one = "#service=shop-frontend-of-the-european-west-region-199";
    let dom = seen_at(&core, one, &into, false);
    assert!(dom.contains("5 of 5 serving") && dom.contains(">b1000</button>"), "{dom}");
    assert!(dom.contains("id=\"services-part\" hidden"), "{dom}");
    assert!(dom.matches("class=\"badge serving\"").count() == 6, "its own backends alone: {dom}");
    println!("screenshots are in {}", into.display());
}

#[test]
#[ignore = "needs the Debian packages chromium and etcd-server"]
fn a_browser_shows_the_balancers_of_a_cluster_its_store_and_what_differs() {
    let folder = Folder::new("clustered");
    let (etcd, store) = etcd(&folder);
    let start = |node: &str, named: bool| {
        let text =
            format!("[cluster]\nname = \"shop\"\nnode = \"{node}\"\nendpoints = [\"{store}\"]\n");
        let cluster = file::read("lb.toml", &text).unwrap().cluster;
        Core::start(|config| {
            config.health.interval = Duration::from_secs(3600);
            config.cluster = cluster;
            if named {
                config.set_services(vec![ServiceConfig::new("resolvers", Protocol::Udp)]);
            }
        })
    };
    let (here, there) = (start("lb-a", false), start("lb-b", true));
    let mut backend = there.connect();
    for (service, port) in [("udp", 9), ("resolvers", 10)] {
        let wanted = json!({"cmd": "register", "service": service, "port": port});
        assert_eq!(backend.ask(&wanted)["ack"], "successful");
    }
    let cluster = || {
        let (_, status) = here.get("/status");
        serde_json::from_str::<serde_json::Value>(&status).unwrap()["cluster"].clone()
    };
    wait_for("what the other one knows", || {
        let known = cluster();
        let is_told = known["nodes"][1]["backends"] == 2 && known["left_out"][0].is_object();
        (is_told && known["nodes"][1]["chooses_alike"] == false).then_some(())
    });
    let into = std::env::temp_dir().join(format!("lb-cluster-{}", std::process::id()));
    std::fs::create_dir_all(&into).unwrap();
    let part = |dom: &str| {
        let part = dom.split("id=\"cluster-part\"").nth(1).unwrap();
        part.split("</section>").next().unwrap().to_owned()
    };
    let live = part(&seen(&here, &into, false));
    for words in [">Cluster shop<", "2 of 2 balancers", ">store live<", ">lb-a~", ">this one<"] {
        assert!(live.contains(words), "{words}: {live}");
    }
    let other = live.split(">lb-b~").nth(1).unwrap();
    let told = ">serving</span></td><td class=\"n\">2</td>";
    assert!(other.contains(told) && other.contains("class=\"late\">differs<"), "{live}");
    for words in [">balancers choose differently: ", ">left out: resolvers/udp/127.0.0.1:10: "] {
        assert!(live.contains(words), "{words}: {live}");
    }
    drop(etcd);
    wait_for("the store to be missed", || (cluster()["store"] != "live").then_some(()));
    let dom = seen(&here, &into, true);
    assert!(part(&dom).contains("class=\"late\">store "), "{}", part(&dom));
    assert!(dom.contains("1 of 1 serving"), "its backend is served all the same");
    println!("screenshots are in {}", into.display());
}
