//! The API door between real clients and real servers: `lb serve` as a process of its own, curl, wrk and
//! h2load before it, nginx, Python's and Node's servers behind it. Needs Debian's `curl`, `wrk`,
//! `nghttp2-client`, `nginx`, `python3` and `nodejs`, so these run only when asked for:
//! `cargo test --release --test peers_api -- --ignored`.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

/// A process that ends with its owner.
struct Process(Child);

impl Process {
    fn start(program: &str, arguments: &[&str]) -> Process {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Process(command.spawn().unwrap_or_else(|error| panic!("{program}: {error}")))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder that goes with its owner.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("lb-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn listening(port: u16) {
    let end = Instant::now() + PATIENCE;
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "nobody listens on {port}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A balancer with these backends, which stay registered as long as it lives.
struct Balancer {
    _process: Process,
    _control: TcpStream,
    port: u16,
}

impl Balancer {
    fn over(backends: &[u16]) -> Balancer {
        let (port, control) = (free_port(), free_port());
        let (api, at) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{control}"));
        let off = ["--tcp", "off", "--udp", "off", "--admin", "off", "--workers", "1"];
        let flags = [&["serve", "--api", &api, "--control", &at][..], &off].concat();
        let process = Process::start(env!("CARGO_BIN_EXE_lb"), &flags);
        listening(control);
        let mut control = TcpStream::connect(at).unwrap();
        let mut answers = BufReader::new(control.try_clone().unwrap());
        for port in backends {
            let message =
                format!("{{\"cmd\":\"register\",\"protocol\":\"api\",\"port\":{port}}}\n");
            control.write_all(message.as_bytes()).unwrap();
            let mut answer = String::new();
            answers.read_line(&mut answer).unwrap();
            assert!(answer.contains("\"successful\""), "{answer}");
        }
        Balancer { _process: process, _control: control, port }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

/// What a program that ends by itself wrote.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program}: {text}{output:?}");
    text
}

/// An nginx that answers `/small` with a few bytes and serves the files of its folder.
fn nginx(folder: &Folder) -> (Process, u16) {
    let port = free_port();
    let root = folder.0.display();
    let file = folder.write(
        &format!("nginx-{port}.conf"),
        format!(
            "daemon off; master_process off; pid {root}/nginx-{port}.pid; error_log stderr;
             events {{ worker_connections 1024; }}
             http {{ access_log off; keepalive_requests 1000000; client_body_temp_path {root};
               proxy_temp_path {root}; fastcgi_temp_path {root}; uwsgi_temp_path {root};
               scgi_temp_path {root};
               server {{ listen 127.0.0.1:{port}; root {root};
                 location /small {{ return 200 \"small\\n\"; }} }} }}"
        ),
    );
    let process = Process::start("nginx", &["-p", &root.to_string(), "-c", &file]);
    listening(port);
    (process, port)
}

/// A server of Node's that answers with the length of what it was sent, in chunks.
const NODE: &str = "
require('http').createServer((request, response) => {
  let bytes = 0;
  request.on('data', part => bytes += part.length);
  request.on('end', () => { response.write('got '); response.end(String(bytes)); });
}).listen(Number(process.argv[2]), '127.0.0.1');
";

#[test]
#[ignore = "needs wrk, nghttp2-client and nginx"]
fn under_load_no_request_fails() {
    let folder = Folder::new("load");
    let (one, two) = (nginx(&folder), nginx(&folder));
    let balancer = Balancer::over(&[one.1, two.1]);
    let url = balancer.url("/small");
    let wrk = output("wrk", &["-t1", "-c64", "-d3s", &url]);
    assert!(wrk.contains("Requests/sec") && !wrk.contains("Socket errors"), "{wrk}");
    assert!(!wrk.contains("Non-2xx"), "{wrk}");
    let load = output("h2load", &["--h1", "-n20000", "-c64", "-t1", &url]);
    assert!(load.contains("20000 succeeded, 0 failed, 0 errored, 0 timeout"), "{load}");
    assert!(load.contains("status codes: 20000 2xx"), "{load}");
    eprintln!("{wrk}{load}");
}

#[test]
#[ignore = "needs curl, nginx, python3 and nodejs"]
fn curl_reads_every_server_through_the_door_as_it_is() {
    let folder = Folder::new("curl");
    let bytes: Vec<u8> = (0..3_000_000u32).map(|place| (place * 31 + place / 251) as u8).collect();
    let file = folder.write("file", &bytes);
    let script = folder.write("server.js", NODE);
    let (python_port, node_port) = (free_port(), free_port());
    let root = folder.0.to_str().unwrap();
    let python = ["-m", "http.server", &python_port.to_string(), "--bind", "127.0.0.1", "-d", root];
    let _python = Process::start("python3", &python);
    let _node = Process::start("node", &[&script, &node_port.to_string()]);
    let (_nginx, nginx_port) = nginx(&folder);
    [python_port, node_port].into_iter().for_each(listening);
    for port in [nginx_port, python_port] {
        let balancer = Balancer::over(&[port]);
        let url = balancer.url("/file");
        let copy = folder.0.join("copy");
        let to = copy.to_str().unwrap();
        for shape in [&[][..], &["-0"], &["--raw"], &["-H", "Connection: close"]] {
            output("curl", &[&["-sSf", "-o", to, &url], shape].concat());
            assert!(fs::read(&copy).unwrap() == bytes, "{shape:?}");
        }
        let head = output("curl", &["-sSfI", &url]);
        assert!(head.contains("200") && head.contains("3000000"), "{head}");
        let twice =
            output("curl", &["-sSf", "-w", "%{num_connects} ", "-o", to, &url, "-o", to, &url]);
        assert_eq!(twice, "1 0 ");
        let missing = ["-sS", "-o", to, "-w", "%{http_code}", &balancer.url("/missing")];
        assert_eq!(output("curl", &missing), "404");
    }
    let balancer = Balancer::over(&[node_port]);
    let (url, upload) = (balancer.url("/"), format!("@{file}"));
    for shape in [
        &["--data-binary", &upload][..],
        &["--data-binary", &upload, "-H", "Transfer-Encoding: chunked"],
        &["--data-binary", &upload, "-H", "Expect: 100-continue"],
        &["-T", &file],
        &["-X", "PUT", "--data-binary", &upload, "-0"],
    ] {
        let answer = output("curl", &[&["-sSf", &url], shape].concat());
        assert_eq!(answer, "got 3000000", "{shape:?}");
    }
}
