//! Backends under TLS that share nothing with rustls: nginx and HAProxy with OpenSSL behind `lb serve`. Needs
//! Debian's `curl`, `nginx`, `haproxy` and `libnginx-mod-stream`, so these tests run only on request:
//! `cargo test --test peers_tls_backends -- --ignored`.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::Command;

use rcgen::{
    CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, SignatureAlgorithm,
};

#[path = "common/process.rs"]
mod process;
#[path = "common/servers.rs"]
mod servers;
#[path = "common/wait.rs"]
mod wait;

use process::{Folder, Process, free_port};
use servers::listening;
use wait::{PATIENCE, wait_for};

/// Programs that terminate TLS in front of plain servers, all with one certificate.
struct Stage {
    folder: Folder,
    certificate: String,
    key: String,
    running: Vec<Process>,
}

const HOST: &str = "b.example";

impl Stage {
    fn new(algorithm: &'static SignatureAlgorithm) -> Stage {
        let folder = Folder::new("peers-tls-backends");
        let key = KeyPair::generate_for(algorithm).unwrap();
        let certificate = CertificateParams::new(vec![HOST.to_owned()]).unwrap();
        let certificate = certificate.self_signed(&key).unwrap().pem();
        // HAProxy reads both from one file.
        folder.write("both.pem", certificate.clone() + &key.serialize_pem());
        let certificate = folder.write("b.pem", certificate);
        let key = folder.write("b.key", key.serialize_pem());
        Stage { folder, certificate, key, running: Vec::new() }
    }

    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// A balancer with an API and a TCP service, each with this backend and checks of it. `ragged_end` is what an
    /// end without a close_notify means.
    fn balancer(&mut self, [api, tcp]: [u16; 2], ragged_end: &str) -> [u16; 3] {
        let ports = [free_port(), free_port(), free_port()];
        let [api_door, tcp_door, admin] = ports.map(|port| format!("\"127.0.0.1:{port}\""));
        let backend = |port: u16| {
            format!(
                "backends = [{{ address = \"127.0.0.1:{port}\", tls = {{ name = \"{HOST}\" }} }}]"
            )
        };
        let settings = format!(
            "workers = 1\nbackend_tls.ca = {:?}\ntls.ragged_end = \"{ragged_end}\"\n\
             [listen]\ntcp = \"off\"\nudp = \"off\"\napi = \"off\"\ncontrol = \"127.0.0.1:0\"\n\
             admin = {admin}\n\
             [service.web]\nprotocol = \"api\"\nlisten = {api_door}\n{}\n\
             [service.web.check]\nkind = \"http\"\npath = \"/small\"\ninterval_ms = \"2s\"\ntimeout_ms = \"2s\"\n\
             [service.raw]\nprotocol = \"tcp\"\nlisten = {tcp_door}\n{}\n\
             [service.raw.check]\nkind = \"tcp\"\ninterval_ms = \"2s\"\ntimeout_ms = \"2s\"\n",
            self.certificate,
            backend(api),
            backend(tcp)
        );
        let file = self.folder.write("lb.toml", settings);
        let lb = Process::start(env!("CARGO_BIN_EXE_lb"), &["serve", "--config", &file]);
        self.running.push(lb);
        let [api, _, admin] = ports;
        wait_for("both backends to pass their checks", || {
            let status = curl(&[&format!("http://127.0.0.1:{admin}/status")]);
            // It serves itself as well.
            (status.matches("\"state\":\"serving\"").count() == 3).then_some(())
        });
        listening(api);
        ports
    }

    /// An nginx that answers requests and takes bodies under TLS, and one that passes bytes on to `echo`.
    fn nginx(&mut self, echo: u16) -> [u16; 2] {
        let [web, raw] = [free_port(), free_port()];
        let root = self.folder.path().display().to_string();
        let tls =
            format!("ssl_certificate {}; ssl_certificate_key {};", self.certificate, self.key);
        let file = self.folder.write(
            "nginx.conf",
            format!(
                "load_module /usr/lib/nginx/modules/ngx_stream_module.so;
                 daemon off; master_process off; pid {root}/nginx.pid; error_log {root}/error.log info;
                 events {{ }}
                 stream {{ server {{ listen 127.0.0.1:{raw} ssl; {tls} proxy_pass 127.0.0.1:{echo}; }} }}
                 http {{
                     access_log {root}/access.log; client_body_temp_path {root};
                     proxy_temp_path {root}; fastcgi_temp_path {root}; uwsgi_temp_path {root};
                     scgi_temp_path {root}; client_max_body_size 8m; keepalive_requests 100000;
                     log_format own '$connection $ssl_session_reused $ssl_server_name $ssl_alpn_protocol';
                     access_log {root}/own.log own;
                     server {{
                         listen 127.0.0.1:{web} ssl; {tls}
                         location /small {{ return 200 \"small\\n\"; }}
                         location /big {{ root {root}; }}
                         location /took {{
                             client_body_buffer_size 8m;
                             proxy_pass https://127.0.0.1:{web}/length;
                         }}
                         location /length {{ return 200 \"$content_length\\n\"; }}
                     }}
                 }}"
            ),
        );
        self.running.push(Process::start("nginx", &["-p", &root, "-c", &file]));
        listening(web);
        listening(raw);
        [web, raw]
    }

    /// An HAProxy that does the same.
    fn haproxy(&mut self, echo: u16) -> [u16; 2] {
        let [web, raw] = [free_port(), free_port()];
        let both = self.at("both.pem");
        let big = self.at("big");
        let file = self.folder.write(
            "haproxy.cfg",
            format!(
                "defaults\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
                 frontend web\n mode http\n bind 127.0.0.1:{web} ssl crt {both} alpn h2,http/1.1\n\
                 option http-buffer-request\n\
                 http-request return status 200 content-type text/plain lf-string \"%[req.body_size]\\n\" if {{ path /took }}\n\
                 http-request return status 200 content-type text/plain string small if {{ path /small }}\n\
                 http-request return status 200 content-type text/plain file {big}/part if {{ path /big/part }}\n\
                 listen raw\n mode tcp\n bind 127.0.0.1:{raw} ssl crt {both}\n server echo 127.0.0.1:{echo}\n"
            ),
        );
        self.running.push(Process::start("haproxy", &["-db", "-f", &file]));
        listening(web);
        listening(raw);
        [web, raw]
    }
}

fn curl(arguments: &[&str]) -> String {
    let mut command = Command::new("curl");
    let output = command.args(["-sS", "--fail", "--max-time", "20"]).args(arguments).output();
    let output = output.unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// A server of plain TCP that sends back what it gets, and ends when its user does.
fn echo() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = connection.try_clone().unwrap();
                let _ = std::io::copy(&mut reader, &mut connection);
                let _ = connection.shutdown(Shutdown::Write);
            });
        }
    });
    port
}

/// Requests with and without bodies over kept connections.
fn requests_are_answered(api: u16, admin: u16) {
    let at = |path: &str| format!("http://127.0.0.1:{api}{path}");
    let many: Vec<String> = (0..50).map(|_| at("/small")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let answers = curl(&many);
    assert_eq!(answers.matches("small").count(), 50, "{answers}");
    let metrics = curl(&[&format!("http://127.0.0.1:{admin}/metrics")]);
    let counted = |name: &str| {
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum::<u64>()
    };
    let handshakes = counted("lb_tls_upstream_handshakes_total");
    assert!((1..10).contains(&handshakes), "{handshakes} for 50 requests");
    assert!(counted("lb_api_upstream_reused_total") >= 40, "{metrics}");
    assert_eq!(counted("lb_tls_upstream_failed_total"), 0);
}

fn bytes_come_back(tcp: u16) {
    let sent: Vec<u8> = (0..1_000_000u32).map(|at| (at % 251) as u8).collect();
    let mut user = TcpStream::connect(("127.0.0.1", tcp)).unwrap();
    user.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut writer, all) = (user.try_clone().unwrap(), sent.clone());
    let writing = std::thread::spawn(move || writer.write_all(&all).unwrap());
    let mut back = vec![0; sent.len()];
    user.read_exact(&mut back).unwrap();
    writing.join().unwrap();
    assert!(back == sent, "bytes were changed");
    user.shutdown(Shutdown::Write).unwrap();
    assert_eq!(user.read(&mut [0]).unwrap(), 0, "an end in good order");
}

/// Those of requests, and that of the part, which has so many bytes.
fn bodies_pass(stage: &Stage, api: u16, part: usize) {
    let body = stage.folder.write("body", vec![b'y'; 1 << 20]);
    let sent = format!("@{body}");
    let took = curl(&["--data-binary", &sent, &format!("http://127.0.0.1:{api}/took")]);
    assert_eq!(took, "1048576\n");
    let big = curl(&[&format!("http://127.0.0.1:{api}/big/part")]);
    assert!(big.len() == part && big.bytes().all(|byte| byte == b'x'));
}

#[test]
#[ignore = "needs curl, nginx and its stream module"]
fn nginx_serves_requests_bodies_and_streams_with_both_kinds_of_key() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_RSA_SHA256] {
        let mut stage = Stage::new(algorithm);
        stage.folder.write("big/part", vec![b'x'; 1 << 20]);
        let both = stage.nginx(echo());
        // Once its user has ended, its stream module ends without a close_notify.
        let [api, tcp, admin] = stage.balancer(both, "end");
        requests_are_answered(api, admin);
        bodies_pass(&stage, api, 1 << 20);
        let log = std::fs::read_to_string(stage.at("own.log")).unwrap();
        assert!(log.contains(&format!("{HOST} http/1.1")), "{log}");
        bytes_come_back(tcp);
    }
}

#[test]
#[ignore = "needs curl and haproxy"]
fn haproxy_serves_requests_bodies_and_streams_with_both_kinds_of_key() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_RSA_SHA256] {
        let mut stage = Stage::new(algorithm);
        stage.folder.write("big/part", vec![b'x'; 8 << 10]);
        let both = stage.haproxy(echo());
        let [api, tcp, admin] = stage.balancer(both, "reset");
        requests_are_answered(api, admin);
        bodies_pass(&stage, api, 8 << 10);
        bytes_come_back(tcp);
    }
}
