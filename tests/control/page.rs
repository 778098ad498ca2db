//! The page in a real browser. Owns what must be visible there: that the script runs under the policy,
//! and that the figures arrive. Screenshots go to a directory outside the repository.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use lb::base::time::Now;
use lb::cluster::{BackendId, Protocol, ServiceId};
use lb::config::services::ServiceConfig;
use serde_json::json;

use crate::harness::Core;

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

/// The page as rendered after some seconds of the browser's own time.
fn seen(core: &Core, into: &Path, dark: bool) -> String {
    let look = if dark { "dark" } else { "light" };
    let profile = format!("--user-data-dir={}", into.join(look).display());
    let shot = format!("--screenshot={}", into.join(format!("{look}.png")).display());
    let scheme = if dark { "--blink-settings=preferredColorScheme=0" } else { "--hide-scrollbars" };
    let outcome = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000"])
        .args(["--window-size=1280,1500", "--enable-logging=stderr", "--dump-dom"])
        .args([profile, shot, scheme.to_owned(), format!("http://{}/", core.admin)])
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
        assert_eq!(dom.contains("<td>resolvers</td>"), named, "{dom}");
        assert_eq!(dom.contains("id=\"services-part\" hidden"), !named, "{dom}");
        assert_eq!(dom.contains("<button>service</button>"), named, "{dom}");
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
