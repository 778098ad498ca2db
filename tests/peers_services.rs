//! One balancer for a host's whole set of services: two Redis servers that join by `lb backend`, a
//! PostgreSQL pair of which only the primary serves, two web hosts with a path of its own each, DNS over
//! UDP and TCP, and a UDP game, each asked by its real client. Needs Debian's `redis-server`,
//! `redis-tools`, `postgresql`, `nginx`, `curl`, `knot`, `knot-dnsutils`, `cube2-server` and `qstat`, so it
//! runs only on request: `cargo test --test peers_services -- --ignored`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[path = "common/process.rs"]
mod process;
#[path = "common/servers.rs"]
mod servers;
#[path = "common/wait.rs"]
mod wait;

use process::{Folder, Process, free_port};
use servers::{free_udp_port, knot, listening};
use wait::wait_for;

/// What a program says that ends by itself; `None` if it fails.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

fn lb(arguments: &[&str]) -> Process {
    Process::start(env!("CARGO_BIN_EXE_lb"), arguments)
}

fn redis() -> (Process, u16) {
    let port = free_port();
    let flags = ["--port", &port.to_string(), "--save", "", "--appendonly", "no"];
    let server = Process::start("redis-server", &flags);
    listening(port);
    (server, port)
}

/// One of a pair of PostgreSQL servers, which share a port on addresses of their own.
struct Postgres {
    _server: Process,
    role: Arc<Role>,
}

/// What a member of the pair answers when it is asked whether it is the primary, as Patroni would.
struct Role {
    status: AtomicU16,
    asked: AtomicUsize,
}

impl Role {
    fn answering(at: SocketAddrV4, status: u16) -> Arc<Role> {
        let listener = TcpListener::bind(at).unwrap();
        let role = Arc::new(Role { status: status.into(), asked: 0.into() });
        let shown = Arc::clone(&role);
        thread::spawn(move || {
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                let mut head = [0; 1024];
                let read = connection.read(&mut head).unwrap();
                let asked = String::from_utf8_lossy(&head[..read]).into_owned();
                assert!(asked.starts_with("GET /primary HTTP/1.1\r\n"), "{asked}");
                let status = shown.status.load(Ordering::SeqCst);
                let answer = format!("HTTP/1.1 {status} -\r\nContent-Length: 0\r\n\r\n");
                shown.asked.fetch_add(1, Ordering::SeqCst);
                let _ = connection.write_all(answer.as_bytes());
            }
        });
        role
    }

    fn becomes(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }
}

/// Where Debian keeps the programs of the newest PostgreSQL.
fn postgres_programs() -> String {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("postgresql is installed");
    let newest = versions.map(|it| it.unwrap().path()).max().unwrap();
    text(&newest.join("bin")).to_owned()
}

impl Postgres {
    /// As a user of its own, because it refuses to run as root.
    fn start(folder: &Folder, at: SocketAddrV4, check: u16, status: u16) -> Postgres {
        let (programs, host) = (postgres_programs(), at.ip().to_string());
        let data = folder.path().join(&host);
        fs::create_dir(&data).unwrap();
        said("chown", &["postgres", text(&data)]).unwrap();
        let as_postgres = ["--reuid=postgres", "--regid=postgres", "--init-groups"];
        let initdb = format!("{programs}/initdb");
        let made = ["-D", text(&data), "-A", "trust", "--no-sync", "--no-instructions"];
        said("setpriv", &[&as_postgres[..], &[&initdb], &made].concat()).expect("a database");
        let (server, port) = (format!("{programs}/postgres"), at.port().to_string());
        let flags = ["-D", text(&data), "-p", &port, "-k", "", "-h", &host, "-F"];
        let server = Process::start("setpriv", &[&as_postgres[..], &[&server], &flags].concat());
        wait_for("PostgreSQL answers", || database_behind(at));
        let check = SocketAddrV4::new(*at.ip(), check);
        Postgres { _server: server, role: Role::answering(check, status) }
    }
}

/// The address of the server that answers a query.
fn database_behind(at: SocketAddrV4) -> Option<Ipv4Addr> {
    let at = format!("postgres://postgres@{at}/postgres?connect_timeout=5");
    said("psql", &[&at, "-Atc", "select host(inet_server_addr())"])?.parse().ok()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An nginx that says its name and the path of each request.
fn web(folder: &Folder, name: &str) -> (Process, u16) {
    // It gives the folder of its files to a user of its own.
    let (port, root) = (free_port(), folder.path().join(name));
    let root = text(&root);
    let file = folder.write(
        &format!("{name}/nginx.conf"),
        format!(
            "daemon off; master_process off; pid {root}/nginx.pid; error_log stderr; events {{}}
             http {{ access_log off; client_body_temp_path {root}; proxy_temp_path {root};
               fastcgi_temp_path {root}; uwsgi_temp_path {root}; scgi_temp_path {root};
               server {{ listen 127.0.0.1:{port};
                 location / {{ return 200 \"{name} $uri\"; }} }} }}"
        ),
    );
    let process = Process::start("nginx", &["-p", root, "-c", &file]);
    listening(port);
    (process, port)
}

/// What a web server said to a request for this host and path, and the status.
fn asked(port: u16, host: &str, path: &str) -> String {
    let (url, host) = (format!("http://127.0.0.1:{port}{path}"), format!("Host: {host}"));
    said("curl", &["-s", "--path-as-is", "-w", " %{http_code}", "-H", &host, &url]).unwrap()
}

/// The address of `www.example`, asked for at this port.
fn resolved(port: u16, transport: &str) -> Option<String> {
    let at = port.to_string();
    let how = [transport, "+short", "+timeout=1", "+retry=0"];
    said("kdig", &[&["@127.0.0.1", "-p", &at, "www.example", "A"][..], &how].concat())
        .filter(|said| !said.is_empty())
}

/// A game server that goes by this name, and the port at which it tells about itself.
fn game(folder: &Folder, name: &str) -> (Process, u16) {
    // It takes the next port as well.
    let port = free_port();
    let (home, at) = (format!("-q{}", text(folder.path())), format!("-j{port}"));
    let flags = [&home, "-ilocalhost", "-mlocalhost", &at, &format!("-n{name}")];
    let server = Process::start("/usr/games/cube2-server", &flags);
    wait_for("the game answers", || game_behind(port + 1));
    (server, port + 1)
}

/// The name of the game server that answers at this port.
fn game_behind(port: u16) -> Option<String> {
    // Players are given the port before the one that tells.
    let at = format!("127.0.0.1:{}", port - 1);
    let said = said("quakestat", &["-raw", ",", "-timeout", "2", "-retry", "1", "-cubes", &at])?;
    said.split(',').nth(2).filter(|name| !["DOWN", "TIMEOUT"].contains(name)).map(str::to_owned)
}

const LOCAL: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// The addresses of the PostgreSQL servers.
const PAIR: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3)];
const CHECK_MS: u64 = 100;
const FALL: u64 = 2;

/// A service with a door of its own and backends that do not register.
fn table(name: &str, protocol: &str, door: u16, backends: &[u16]) -> String {
    let backends: Vec<_> = backends.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
    format!(
        "[service.{name}]\nprotocol = \"{protocol}\"\nlisten = \"127.0.0.1:{door}\"\n\
         register = false\nbackends = [{}]\n",
        backends.join(", ")
    )
}

/// Two hosts, each with a path that is another service's, at the door of `listen.api`.
fn sites_table([shop, shop_api, blog, feed]: [u16; 4]) -> String {
    let sites = [
        ("shop", "shop.example", "", shop),
        ("shop-api", "shop.example", "\"/api\"", shop_api),
        ("blog", "*.blog.example", "", blog),
        ("blog-feed", "*.blog.example", "\"/feed\"", feed),
    ];
    let table = |(name, host, paths, backend): (&str, &str, &str, u16)| {
        format!(
            "[service.{name}]\nprotocol = \"api\"\nhosts = [\"{host}\"]\npaths = [{paths}]\n\
             register = false\nbackends = [\"127.0.0.1:{backend}\"]\n"
        )
    };
    sites.map(table).concat()
}

/// Every server, the balancer before them, and where its doors are.
struct Host {
    redis: u16,
    pg: u16,
    web: u16,
    dns: u16,
    game: u16,
    stores: [u16; 2],
    pair: [Postgres; 2],
    balancer: Process,
    _others: Vec<Process>,
    _folder: Folder,
}

impl Host {
    fn start() -> Host {
        let folder = Folder::new("host");
        let [redis, pg, web, dns, control, postgres, check] = [(); 7].map(|()| free_port());
        let game_door = free_udp_port();
        let primary = |at: &Ipv4Addr| if *at == PAIR[0] { 200 } else { 503 };
        let pair = PAIR.map(|at| {
            Postgres::start(&folder, SocketAddrV4::new(at, postgres), check, primary(&at))
        });
        let stores = [(); 2].map(|()| self::redis());
        let sites = ["shop", "shop-api", "blog", "blog-feed"].map(|name| self::web(&folder, name));
        let answers = |port| (0..20).any(|_| resolved(port, "+notcp").is_some());
        let names = knot(&folder, "www A 198.51.100.7\n", answers);
        let games = ["north", "south"].map(|name| game(&folder, name));
        let mut settings = format!(
            "listen = {{ tcp = \"off\", udp = \"off\", admin = \"off\", api = \"127.0.0.1:{web}\", \
             control = \"127.0.0.1:{control}\" }}\n\
             [service.redis]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:{redis}\"\n\
             [service.pg]\nprotocol = \"tcp\"\nlisten = \"127.0.0.1:{pg}\"\nregister = false\n\
             backends = [\"{}:{postgres}\", \"{}:{postgres}\"]\n\
             check = {{ kind = \"http\", port = {check}, path = \"/primary\", expect = \"200\", \
             interval_ms = {CHECK_MS}, timeout_ms = {CHECK_MS}, rise = 1, fall = {FALL}, \
             on_fail = \"close\" }}\n",
            PAIR[0], PAIR[1]
        );
        settings += &sites_table(sites.each_ref().map(|it| it.1));
        let games_at: Vec<u16> = games.iter().map(|it| it.1).collect();
        settings += &table("dns", "udp", dns, &[names.1]);
        settings += &table("dns-tcp", "tcp", dns, &[names.1]);
        settings += &table("game", "udp", game_door, &games_at);
        let balancer = lb(&["serve", "--config", &folder.write("lb.toml", settings)]);
        let control = format!("127.0.0.1:{control}");
        let joined = stores.each_ref().map(|it| {
            lb(&["backend", "--lb", &control, "--service", "redis", "--port", &it.1.to_string()])
        });
        let store_ports = stores.each_ref().map(|it| it.1);
        let servers = stores.into_iter().chain(sites).chain(games).chain([names]);
        Host {
            redis,
            pg,
            web,
            dns,
            game: game_door,
            stores: store_ports,
            pair,
            balancer,
            _others: servers.map(|it| it.0).chain(joined).collect(),
            _folder: folder,
        }
    }

    /// The port of the Redis server that a new client is sent to.
    fn store(&self) -> Option<u16> {
        let port = self.redis.to_string();
        let said = said("redis-cli", &["-p", &port, "config", "get", "port"])?;
        said.lines().nth(1)?.parse().ok()
    }

    fn primary(&self) -> Option<Ipv4Addr> {
        database_behind(SocketAddrV4::new(LOCAL, self.pg))
    }
}

#[test]
#[ignore = "needs redis, postgresql, nginx, curl, knot, kdig, cube2-server and qstat"]
fn one_balancer_serves_a_whole_host_and_each_client_finds_its_own_service() {
    let host = Host::start();
    let both: BTreeSet<u16> = host.stores.into();
    wait_for("both Redis servers have joined", || {
        let turns = [host.store()?, host.store()?];
        (BTreeSet::from(turns) == both).then_some(())
    });
    wait_for("the primary passes its check", || host.primary());
    for _ in 0..4 {
        assert_eq!(host.primary(), Some(PAIR[0]), "the other one is not the primary");
    }

    for (site, path, answer) in [
        ("shop.example", "/", "shop / 200"),
        ("SHOP.example.:80", "/apix", "shop /apix 200"),
        ("shop.example", "/api", "shop-api /api 200"),
        ("shop.example", "/api/cart?id=1", "shop-api /api/cart 200"),
        ("de.blog.example", "/", "blog / 200"),
        ("a.b.blog.example", "/feed/atom", "blog-feed /feed/atom 200"),
    ] {
        assert_eq!(asked(host.web, site, path), answer, "{site}{path}");
    }
    for (site, path, status) in
        // The built-in service of that door takes what nobody else claims, and has no backend.
        [("blog.example", "/", "503"), ("shop.example", "/api/../cart", "400")]
    {
        let answer = asked(host.web, site, path);
        assert!(answer.ends_with(status), "{site}{path}: {answer}");
    }

    for transport in ["+notcp", "+tcp"] {
        assert_eq!(resolved(host.dns, transport).as_deref(), Some("198.51.100.7"), "{transport}");
    }
    let games = [game_behind(host.game), game_behind(host.game)].map(Option::unwrap);
    assert_eq!(BTreeSet::from(games), ["north", "south"].map(str::to_owned).into());
    assert_eq!(host.balancer.terminate(), Some(0));
}

#[test]
#[ignore = "needs postgresql and the others"]
fn a_role_change_takes_new_sessions_along_and_ends_those_on_the_old_primary() {
    let host = Host::start();
    wait_for("the primary passes its check", || host.primary());
    let at = format!("postgres://postgres@127.0.0.1:{}/postgres", host.pg);
    let mut old = Command::new("psql");
    let old = old.args([&at, "-c", "select pg_sleep(600)"]).stderr(Stdio::null());
    let mut old = Process(old.stdout(Stdio::null()).spawn().unwrap());
    wait_for("the old session runs", || {
        let running = "select count(*) from pg_stat_activity where query like 'select pg_sleep%'";
        said("psql", &[&at, "-Atc", running]).filter(|count| count == "1")
    });

    host.pair[1].role.becomes(200);
    let asked_before = host.pair[1].role.asked.load(Ordering::SeqCst);
    wait_for("the new primary has passed", || {
        (host.pair[1].role.asked.load(Ordering::SeqCst) > asked_before + 1).then_some(())
    });
    host.pair[0].role.becomes(503);
    let changed = Instant::now();
    // New sessions go in turn, so two in a row at the new primary say that the old one gets none.
    let within = wait_for("new sessions go to the new primary", || {
        let at = changed.elapsed();
        let two = [host.primary()?, host.primary()?];
        (two == [PAIR[1]; 2]).then_some(at)
    });
    let limit = Duration::from_millis(FALL * CHECK_MS + 50);
    println!("new sessions moved within {within:?} of the change (wanted: {limit:?})");
    assert_ne!(old.0.wait().unwrap().code(), Some(0), "on_fail = \"close\" ends it");
    for _ in 0..4 {
        assert_eq!(host.primary(), Some(PAIR[1]));
    }
    assert_eq!(host.balancer.terminate(), Some(0));
}
