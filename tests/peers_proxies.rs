//! PROXY headers between real programs: HAProxy and nginx in front of `lb serve` tell their users'
//! addresses, and HAProxy and nginx behind it are told them. Needs Debian's `haproxy`, `nginx` and
//! `libnginx-mod-stream`, so these tests run only on request: `cargo test --test peers_proxies -- --ignored`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use socket2::{Domain, Socket, Type};

#[path = "common/process.rs"]
mod process;
#[path = "common/servers.rs"]
mod servers;
#[path = "common/wait.rs"]
mod wait;

use process::{Folder, Process, free_port};
use servers::listening;
use wait::PATIENCE;

/// A balancer that believes everybody on this host, and whose one backend wants headers.
struct Balancer {
    _process: Process,
    _control: TcpStream,
    tcp: u16,
    api: u16,
}

impl Balancer {
    fn over(folder: &Folder, backend: u16) -> Balancer {
        let [tcp, api, control] = [free_port(), free_port(), free_port()];
        let settings = "[listen]\nproxy_from = [\"127.0.0.0/8\"]\nudp = \"off\"\nadmin = \"off\"\n";
        let file = folder.write(&format!("lb-{tcp}.toml"), settings);
        let at = |port| format!("127.0.0.1:{port}");
        let doors = ["--tcp", &at(tcp), "--api", &at(api), "--control", &at(control)];
        let flags = [&["serve", "--workers", "1", "--config", &file][..], &doors].concat();
        let process = Process::start(env!("CARGO_BIN_EXE_lb"), &flags);
        listening(control);
        let mut control = TcpStream::connect(at(control)).unwrap();
        let mut answers = BufReader::new(control.try_clone().unwrap());
        for protocol in ["tcp", "api"] {
            let message = format!(
                "{{\"cmd\":\"register\",\"protocol\":\"{protocol}\",\"port\":{backend},\"proxy\":2}}\n"
            );
            control.write_all(message.as_bytes()).unwrap();
            let mut answer = String::new();
            answers.read_line(&mut answer).unwrap();
            assert!(answer.contains("\"successful\""), "{answer}");
        }
        Balancer { _process: process, _control: control, tcp, api }
    }
}

fn nginx(folder: &Folder, name: &str, rest: &str) -> Process {
    let root = folder.path().display();
    let file = folder.write(
        name,
        format!(
            "daemon off; master_process off; pid {root}/{name}.pid; error_log {root}/{name}.log;
             load_module /usr/lib/nginx/modules/ngx_stream_module.so;
             events {{ worker_connections 256; }}
             {rest}"
        ),
    );
    Process::start("nginx", &["-p", &root.to_string(), "-c", &file])
}

fn haproxy(folder: &Folder, name: &str, rest: &str) -> Process {
    let defaults = "defaults\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n";
    let file = folder.write(name, format!("{defaults}{rest}"));
    Process::start("haproxy", &["-db", "-f", &file])
}

/// An nginx that answers with what a header told it, and with what the balancer says of the user.
fn nginx_behind(folder: &Folder) -> (Process, u16) {
    let (root, port) = (folder.path().display(), free_port());
    let process = nginx(
        folder,
        "behind",
        &format!(
            "http {{ access_log off; client_body_temp_path {root}; proxy_temp_path {root};
               fastcgi_temp_path {root}; uwsgi_temp_path {root}; scgi_temp_path {root};
               server {{ listen 127.0.0.1:{port} proxy_protocol; location / {{ return 200
                 \"$proxy_protocol_addr:$proxy_protocol_port \
                  $proxy_protocol_server_addr:$proxy_protocol_server_port \
                  $http_x_forwarded_for.\"; }} }} }}"
        ),
    );
    listening(port);
    (process, port)
}

/// The same by HAProxy.
fn haproxy_behind(folder: &Folder) -> (Process, u16) {
    let port = free_port();
    let process = haproxy(
        folder,
        "behind",
        &format!(
            "frontend behind\n mode http\n bind 127.0.0.1:{port} accept-proxy\n \
             http-request return status 200 content-type text/plain lf-string \
             \"%[src]:%[src_port] %[dst]:%[dst_port] %[req.hdr(x-forwarded-for)].\"\n"
        ),
    );
    listening(port);
    (process, port)
}

/// The three kinds of proxy in front, each of which relays to this port and tells its users' addresses.
fn in_front(folder: &Folder, to: u16) -> (Vec<Process>, [u16; 3]) {
    let ports = [free_port(), free_port(), free_port()];
    let by_haproxy = |version: &str, port: u16| {
        format!(
            "listen {version}\n mode tcp\n bind 127.0.0.1:{port}\n server lb 127.0.0.1:{to} {version}\n"
        )
    };
    let both = by_haproxy("send-proxy", ports[0]) + &by_haproxy("send-proxy-v2", ports[1]);
    let processes = vec![
        haproxy(folder, &format!("front-haproxy-{to}"), &both),
        nginx(
            folder,
            &format!("front-nginx-{to}"),
            &format!(
                "stream {{ server {{ listen 127.0.0.1:{}; proxy_pass 127.0.0.1:{to};
                   proxy_protocol on; }} }}",
                ports[2]
            ),
        ),
    ];
    ports.into_iter().for_each(listening);
    (processes, ports)
}

/// A user of this host under an address that is not the proxies' own.
fn user(door: u16) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 9], 0)).into()).unwrap();
    socket.connect(&SocketAddr::from(([127, 0, 0, 1], door)).into()).unwrap();
    let user = TcpStream::from(socket);
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    user
}

/// What the backend answers to two requests on this user's connection.
fn told(user: &mut TcpStream) -> [String; 2] {
    let mut ask = || {
        user.write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").unwrap();
        let mut reader = BufReader::new(&*user);
        let (mut head, mut length) = (String::new(), 0);
        while !head.ends_with("\r\n\r\n") {
            let start = head.len();
            assert_ne!(reader.read_line(&mut head).unwrap(), 0, "{head}");
            let line = head[start..].to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap();
            }
        }
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        String::from_utf8(body).unwrap()
    };
    [ask(), ask()]
}

fn users_are_known_from_end_to_end(behind: impl Fn(&Folder) -> (Process, u16)) {
    let folder = Folder::new("proxies");
    let (_backend, port) = behind(&folder);
    let balancer = Balancer::over(&folder, port);
    for (door, forwarded) in [(balancer.tcp, ""), (balancer.api, "127.0.0.9")] {
        let (_proxies, fronts) = in_front(&folder, door);
        for (number, front) in fronts.into_iter().enumerate() {
            for _ in 0..3 {
                let mut user = user(front);
                let own = user.local_addr().unwrap();
                let wanted = format!("{own} 127.0.0.1:{front} {forwarded}.");
                assert_eq!(told(&mut user), [wanted.clone(), wanted], "front {number}");
            }
        }
        // Without a header, nobody of this host gets in.
        let mut liar = user(door);
        liar.write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").unwrap();
        assert!(matches!(liar.read(&mut [0; 64]), Ok(0) | Err(_)));
    }
}

#[test]
#[ignore = "needs haproxy, nginx and its stream module"]
fn nginx_behind_the_balancer_knows_the_users_of_haproxy_and_nginx_in_front() {
    users_are_known_from_end_to_end(nginx_behind);
}

#[test]
#[ignore = "needs haproxy, nginx and its stream module"]
fn haproxy_behind_the_balancer_knows_the_users_of_haproxy_and_nginx_in_front() {
    users_are_known_from_end_to_end(haproxy_behind);
}
