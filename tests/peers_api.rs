//! The API door between real clients and real servers: `lb serve` as a process of its own, curl,
//! wrk and h2load in front of it, nginx, Python's and Node's servers behind it. Needs Debian's
//! `curl`, `wrk`, `nghttp2-client`, `nginx`, `python3` and `nodejs`, so these tests run only on
//! request: `cargo test --release --test peers_api -- --ignored`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;

#[path = "common/process.rs"]
mod process;
#[path = "common/servers.rs"]
mod servers;
#[path = "common/wait.rs"]
mod wait;

use process::{Folder, Process, free_port};
use servers::listening;
use wait::PATIENCE;

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

/// The output of a program that ends by itself.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program}: {text}{output:?}");
    text
}

/// An nginx that answers `/small` with a few bytes and serves the files of its folder.
fn nginx(folder: &Folder) -> (Process, u16) {
    let port = free_port();
    let root = folder.path().display();
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

/// A Node server that answers with the length of what it received, in chunks.
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
    let root = folder.path().to_str().unwrap();
    let python = ["-m", "http.server", &python_port.to_string(), "--bind", "127.0.0.1", "-d", root];
    let _python = Process::start("python3", &python);
    let _node = Process::start("node", &[&script, &node_port.to_string()]);
    let (_nginx, nginx_port) = nginx(&folder);
    [python_port, node_port].into_iter().for_each(listening);
    for port in [nginx_port, python_port] {
        let balancer = Balancer::over(&[port]);
        let url = balancer.url("/file");
        let copy = folder.path().join("copy");
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

/// What a server says it was asked, in a field of its answer: method, target, length and FNV-1a
/// hash of the body, and the values of `X-A` as hexadecimal digits.
const NODE_REPORTS: &str = "
require('http').createServer((request, response) => {
  let bytes = 0, hash = 0x811c9dc5;
  request.on('data', part => {
    bytes += part.length;
    for (const byte of part) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  });
  request.on('end', () => {
    const said = (request.headers['x-a'] || '').replaceAll(', ', ',');
    const hex = Buffer.from(said, 'latin1').toString('hex');
    response.setHeader('X-Report', [request.method, request.url, bytes, hash, hex + '.'].join(' '));
    response.end('ok');
  });
}).listen(Number(process.argv[2]), '127.0.0.1');
";

const PYTHON_REPORTS: &str = "
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def __getattr__(self, name):
        if name.startswith('do_'):
            return self.report
        raise AttributeError(name)

    def body(self):
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b''.join(parts)

    def report(self):
        body, digest = self.body(), 0x811c9dc5
        for byte in body:
            digest = (digest ^ byte) * 0x01000193 & 0xffffffff
        said = ','.join(self.headers.get_all('X-A', [])).encode('latin-1').hex()
        self.send_response(200)
        self.send_header('X-Report', f'{self.command} {self.path} {len(body)} {digest} {said}.')
        self.send_header('Content-Length', '0' if self.command == 'HEAD' else '2')
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(b'ok')

    def log_message(self, *ignored):
        pass

ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
";

/// An nginx that passes on what it has read, as it read it.
fn passing_nginx(folder: &Folder, to: u16) -> (Process, u16) {
    let port = free_port();
    let root = folder.path().display();
    let file = folder.write(
        "passing.conf",
        format!(
            "daemon off; master_process off; pid {root}/passing.pid; error_log stderr;
             events {{ worker_connections 1024; }}
             http {{ access_log off; client_body_temp_path {root}; proxy_temp_path {root};
               fastcgi_temp_path {root}; uwsgi_temp_path {root}; scgi_temp_path {root};
               large_client_header_buffers 4 16k; proxy_buffer_size 32k; proxy_buffers 4 32k;
               server {{ listen 127.0.0.1:{port}; client_max_body_size 0;
                 location / {{ proxy_pass http://127.0.0.1:{to}; }} }} }}"
        ),
    );
    let process = Process::start("nginx", &["-p", &root.to_string(), "-c", &file]);
    listening(port);
    (process, port)
}

/// A request that is unusual and legal, and how every server must understand it.
struct Unusual {
    bytes: Vec<u8>,
    report: String,
}

fn unusual(
    method: &str,
    target: &str,
    fields: &[u8],
    framed: &[u8],
    seen: (&str, &[u8], &[u8]),
) -> Unusual {
    let (path, body, said) = seen;
    let start = format!("{method} {target} HTTP/1.1\r\nHost: x\r\n");
    let hash = body
        .iter()
        .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    let hex: String = said.iter().map(|byte| format!("{byte:02x}")).collect();
    Unusual {
        bytes: [start.as_bytes(), fields, b"\r\n", framed].concat(),
        report: format!("{method} {path} {} {hash} {hex}.", body.len()),
    }
}

fn unusual_requests() -> Vec<Unusual> {
    let mut all = unusual_heads();
    all.extend(unusual_bodies());
    all
}

fn unusual_heads() -> Vec<Unusual> {
    let long = vec![b'v'; 3_000];
    let plain = |method, target, path| unusual(method, target, b"", b"", (path, b"", b""));
    let with = |fields: &[u8], said: &[u8]| unusual("GET", "/", fields, b"", ("/", b"", said));
    vec![
        plain("GET", "http://other:81/a?b", "/a?b"),
        plain("GET", "HTTP://other", "/"),
        plain("GET", "http://other?q", "/?q"),
        plain(
            "GET",
            "/%01%2e%2E/%e4;p=1/a+b?x=%0d%0a&y=/../",
            "/%01%2e%2E/%e4;p=1/a+b?x=%0d%0a&y=/../",
        ),
        plain("GET", "/./a/../b//c", "/./a/../b//c"),
        plain("GET", "/?", "/?"),
        plain("GET", "/a?b?c:@!$&'()*,=", "/a?b?c:@!$&'()*,="),
        plain("OPTIONS", "/o", "/o"),
        plain("HEAD", "/h", "/h"),
        plain("DELETE", "/d", "/d"),
        plain("PROPFIND", "/w", "/w"),
        with(b"X-A:\r\n", b""),
        with(b"X-A: one\r\nX-A:\ttwo \r\nx-a:three\r\n", b"one,two,three"),
        with(b"X-A: \xe4\xff\x80x\r\n", b"\xe4\xff\x80x"),
        with(b"X-A: a\tb  c\r\n", b"a\tb  c"),
        with(&[b"X-A: ", &long[..], b"\r\n"].concat(), &long),
        with(b"!#$%&'*+-.^`|~9: odd\r\nX-A: 1\r\n", b"1"),
        with(b"X-A: gone\r\nConnection: x-a\r\n", b""),
        with(b"Content-Length: 0\r\n", b""),
    ]
}

fn unusual_bodies() -> Vec<Unusual> {
    let body: Vec<u8> = (0..70_000u32).map(|place| (place * 7 + place / 253) as u8).collect();
    let sized = |length: usize| format!("Content-Length: {length}\r\n").into_bytes();
    let tiny: Vec<u8> =
        b"chunks".iter().flat_map(|byte| [b"1\r\n", &[*byte][..], b"\r\n"].concat()).collect();
    let chunked = b"Transfer-Encoding: chunked\r\n".as_slice();
    let sent = |fields: &[u8], framed: &[u8], body: &[u8]| {
        unusual("POST", "/p", fields, framed, ("/p", body, b""))
    };
    vec![
        sent(&sized(70_000), &body, &body),
        sent(b"Content-Length: 0000000003\r\n", b"abc", b"abc"),
        sent(b"", b"", b""),
        sent(chunked, b"0\r\n\r\n", b""),
        sent(chunked, &[&tiny[..], b"0\r\n\r\n"].concat(), b"chunks"),
        sent(
            chunked,
            b"00003;a=\"b\";c\r\nabc\r\nA\r\n0123456789\r\n000;z\r\n\r\n",
            b"abc0123456789",
        ),
        sent(
            b"Trailer: X-T\r\nTransfer-Encoding: chunked\r\n",
            b"3\r\nabc\r\n0\r\nX-T: u\r\nContent-Length: 9\r\n\r\n",
            b"abc",
        ),
        sent(
            chunked,
            &[format!("{:X}\r\n", body.len()).as_bytes(), &body, b"\r\n0\r\n\r\n"].concat(),
            &body,
        ),
        sent(b"Expect: 100-continue\r\nContent-Length: 3\r\n", b"abc", b"abc"),
        sent(
            b"EXPECT: 100-CONTINUE\r\nTransfer-Encoding: Chunked\r\n",
            b"3\r\nabc\r\n0\r\n\r\n",
            b"abc",
        ),
        unusual("GET", "/g", b"Content-Length: 3\r\n", b"abc", ("/g", b"abc", b"")),
        unusual("DELETE", "/d", chunked, b"3\r\nabc\r\n0\r\n\r\n", ("/d", b"abc", b"")),
    ]
}

/// Reads final responses to the end, and returns what each reported; no body may look like a head.
fn reports(stream: &mut TcpStream) -> Vec<String> {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let text = String::from_utf8_lossy(&answer).into_owned();
    let heads = text.split("HTTP/1.1 ").skip(1).filter(|head| !head.starts_with('1'));
    let told = |head: &str| {
        let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with("x-report: "));
        line.map_or_else(|| head.to_string(), |line| line["x-report: ".len()..].to_string())
    };
    heads.map(told).collect()
}

#[test]
#[ignore = "needs nginx, python3 and nodejs"]
fn every_server_takes_a_forwarded_request_for_the_same() {
    let folder = Folder::new("alike");
    let (node, python) = (folder.write("r.js", NODE_REPORTS), folder.write("r.py", PYTHON_REPORTS));
    let (node_port, python_port) = (free_port(), free_port());
    let _node = Process::start("node", &[&node, &node_port.to_string()]);
    let _python = Process::start("python3", &[&python, &python_port.to_string()]);
    [python_port, node_port].into_iter().for_each(listening);
    let (_nginx, nginx_port) = passing_nginx(&folder, python_port);
    for (server, port) in [("node", node_port), ("python", python_port), ("nginx", nginx_port)] {
        let balancer = Balancer::over(&[port]);
        for request in unusual_requests() {
            // What is read as part of the first request is missing from the second.
            let next = "GET /next HTTP/1.1\r\nHost: x\r\nX-A: n\r\nConnection: close\r\n\r\n";
            let mut user = TcpStream::connect(("127.0.0.1", balancer.port)).unwrap();
            user.set_read_timeout(Some(PATIENCE)).unwrap();
            user.write_all(&[&request.bytes, next.as_bytes()].concat()).unwrap();
            let shown: String =
                request.bytes[..request.bytes.len().min(200)].escape_ascii().to_string();
            let wanted = [request.report, "GET /next 0 2166136261 6e.".to_string()];
            assert_eq!(reports(&mut user), wanted, "{server}: {shown}");
        }
    }
}
