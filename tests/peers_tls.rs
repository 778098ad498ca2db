//! TLS with programs that share nothing with rustls: curl, OpenSSL's s_client, GnuTLS, Python and Node in
//! front of `lb serve`; users who bend it, and scanners. Needs Debian's `curl`, `openssl`, `gnutls-bin`,
//! `python3`, `nodejs`, `wrk` and `testssl.sh`, and PyPI's tlslite-ng and sslyze, which `.ci/run` installs into
//! `target/python`; so these tests run only on request: `cargo test --test peers_tls -- --ignored`.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rcgen::{
    CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, SignatureAlgorithm,
};

#[path = "common/authority.rs"]
mod authority;
#[path = "peers_tls/clients.rs"]
mod clients;
#[path = "peers_tls/scanners.rs"]
mod scanners;
#[path = "peers_tls/swaps.rs"]
mod swaps;

#[path = "common/process.rs"]
mod process;
#[path = "common/servers.rs"]
mod servers;
#[path = "peers_tls/tickets.rs"]
mod tickets;
#[path = "common/wait.rs"]
mod wait;

use process::{Folder, Process, free_port};
use servers::listening;
use wait::wait_for;

/// A balancer with an HTTPS door, and echo backends behind it.
struct Balancer {
    _process: Process,
    folder: Folder,
    port: u16,
    admin: u16,
}

const HOST: &str = "a.example";

impl Balancer {
    /// The certificate's is RSA if so asked for, else ECDSA; in `ca.pem`.
    fn start(algorithm: &'static SignatureAlgorithm) -> Balancer {
        let folder = Folder::new("peers-tls");
        let key = KeyPair::generate_for(algorithm).unwrap();
        let certificate = CertificateParams::new(vec![HOST.to_owned()]).unwrap();
        let certificate = certificate.self_signed(&key).unwrap().pem();
        let (at, key) =
            (folder.write("ca.pem", certificate), folder.write("a.key", key.serialize_pem()));
        let [port, api, control, admin] = [(); 4].map(|()| free_port());
        let settings = format!(
            "workers = 2\n[listen]\ntcp = \"off\"\nudp = \"off\"\nadmin = \"127.0.0.1:{admin}\"\n\
             [[tls.certificate]]\ncertificate = \"{at}\"\nkey = \"{key}\"\n"
        );
        let file = folder.write("lb.toml", settings);
        let at = |port| format!("127.0.0.1:{port}");
        let doors = ["--api-tls", &at(port), "--api", &at(api), "--control", &at(control)];
        let flags = [&["serve", "--demo", "1", "--config", &file][..], &doors].concat();
        let process = Process::start(env!("CARGO_BIN_EXE_lb"), &flags);
        listening(port);
        let balancer = Balancer { _process: process, folder, port, admin };
        wait_for("the backend", || {
            let answer = balancer.curl(&[]);
            answer.status.success().then_some(())
        });
        balancer
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn curl(&self, more: &[&str]) -> Output {
        let (authority, resolve) = (self.file("ca.pem"), format!("{HOST}:{}:127.0.0.1", self.port));
        let mut command = Command::new("curl");
        command.args(["-sS", "--fail", "--max-time", "10", "--cacert", &authority]);
        command.args(["--resolve", &resolve]).args(more);
        command.arg(format!("https://{HOST}:{}/", self.port)).output().unwrap()
    }

    /// What s_client says of a connection on which it sends this.
    fn s_client(&self, more: &[&str], input: &[u8]) -> String {
        let (authority, to) = (self.file("ca.pem"), format!("127.0.0.1:{}", self.port));
        let arguments = ["s_client", "-connect", &to, "-servername", HOST, "-CAfile", &authority];
        run("openssl", &[&arguments, more].concat(), &[input])
    }

    /// The same, on which it sends these one after the other, and then waits a little.
    fn s_client_paused(&self, more: &[&str], inputs: &[&[u8]]) -> String {
        let (authority, to) = (self.file("ca.pem"), format!("127.0.0.1:{}", self.port));
        let arguments = ["s_client", "-connect", &to, "-servername", HOST, "-CAfile", &authority];
        run("openssl", &[&arguments, more].concat(), &[inputs, &[b""]].concat())
    }
}

/// Between two inputs that a program is to read separately.
const PAUSE: Duration = Duration::from_millis(300);

/// Runs a program on this input; what it has said on both of its outputs.
fn run(program: &str, arguments: &[&str], inputs: &[&[u8]]) -> String {
    run_within("20", program, arguments, inputs)
}

/// The same for one that may take so many seconds.
fn run_within(seconds: &str, program: &str, arguments: &[&str], inputs: &[&[u8]]) -> String {
    let mut command = Command::new("timeout");
    command.arg(seconds).arg(program).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    for (number, part) in inputs.iter().enumerate() {
        if number > 0 {
            std::thread::sleep(PAUSE);
        }
        // It may have ended before it has read everything.
        let _ = input.write_all(part);
    }
    drop(input);
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n";

#[test]
#[ignore = "needs curl"]
fn curl_is_served_with_both_versions_and_by_both_kinds_of_key() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_RSA_SHA256] {
        let balancer = Balancer::start(algorithm);
        for version in [&["--tlsv1.3"][..], &["--tls-max", "1.2"]] {
            let answer = balancer.curl(version);
            assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
        }
        let body = vec![b'x'; 3_000_000];
        let file = balancer.folder.write("body", &body);
        let answer = balancer.curl(&["--data-binary", &format!("@{file}"), "-H", "Expect:"]);
        let answer = String::from_utf8_lossy(&answer.stdout).into_owned();
        assert!(answer.contains("\"body_bytes\":3000000,"), "{answer}");
        let old = balancer.curl(&["--tls-max", "1.1"]);
        assert!(!old.status.success(), "an old version");
    }
}

#[test]
#[ignore = "needs openssl"]
fn s_client_resumes_across_workers_and_changes_its_keys() {
    let balancer = Balancer::start(&PKCS_ECDSA_P256_SHA256);
    for version in ["-tls1_2", "-tls1_3"] {
        let kept = balancer.file(version);
        let first = balancer.s_client(&[version, "-ign_eof", "-sess_out", &kept], GET);
        assert!(first.contains("HTTP/1.1 200 OK") && first.contains("\nNew, TLSv1."), "{first}");
        assert!(first.contains("Verify return code: 0 (ok)"), "{first}");
        for _ in 0..6 {
            let next = balancer.s_client(&[version, "-ign_eof", "-sess_in", &kept], GET);
            assert!(next.contains("\nReused, TLSv1.") && next.contains("HTTP/1.1 200"), "{next}");
        }
    }
    // A read that begins with a K has it change its keys, and ask us to change ours.
    let answer = balancer.s_client_paused(&["-tls1_3"], &[b"K\n", GET]);
    assert!(answer.contains("KEYUPDATE") && answer.contains("HTTP/1.1 200 OK"), "{answer}");
    let old = balancer.s_client(&["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], b"");
    assert!(old.contains("alert") && old.contains("Cipher is (NONE)"), "{old}");
    let neither = balancer.s_client(&["-alpn", "h3"], b"");
    assert!(neither.contains("alert no application protocol"), "{neither}");
    for (offered, agreed) in [("http/1.1,h2", "h2"), ("h2", "h2"), ("http/1.1", "http/1.1")] {
        let both = balancer.s_client(&["-alpn", offered], b"");
        assert!(both.contains(&format!("ALPN protocol: {agreed}\n")), "{both}");
    }
    // Renegotiation, which only TLS 1.2 has.
    let again = balancer.s_client_paused(&["-tls1_2"], &[b"R\n", GET]);
    assert!(again.contains("RENEGOTIATING") && !again.contains("HTTP/1.1"), "{again}");
}

#[test]
#[ignore = "needs gnutls-cli"]
fn gnutls_is_served() {
    let balancer = Balancer::start(&PKCS_RSA_SHA256);
    let (port, authority) = (balancer.port.to_string(), balancer.file("ca.pem"));
    for priority in ["NORMAL:-VERS-ALL:+VERS-TLS1.2", "NORMAL:-VERS-ALL:+VERS-TLS1.3"] {
        let arguments =
            ["--x509cafile", &authority, "--sni-hostname", HOST, "--verify-hostname", HOST];
        let more = ["--priority", priority, "-p", &port, "127.0.0.1"];
        let answer = run("gnutls-cli", &[&arguments[..], &more].concat(), &[GET]);
        assert!(answer.contains("HTTP/1.1 200 OK"), "{answer}");
    }
}

#[test]
#[ignore = "needs python3 and nodejs"]
fn python_and_node_are_served() {
    let balancer = Balancer::start(&PKCS_ECDSA_P256_SHA256);
    let (port, authority) = (balancer.port, balancer.file("ca.pem"));
    let python = format!(
        "import socket, ssl\n\
         context = ssl.create_default_context(cafile='{authority}')\n\
         session = None\n\
         for round in range(3):\n\
         \x20   with socket.create_connection(('127.0.0.1', {port})) as raw:\n\
         \x20       with context.wrap_socket(raw, server_hostname='{HOST}', session=session) as tls:\n\
         \x20           tls.sendall(b'GET / HTTP/1.1\\r\\nHost: {HOST}\\r\\nConnection: close\\r\\n\\r\\n')\n\
         \x20           said = b''.join(iter(lambda: tls.recv(4096), b''))\n\
         \x20           print(said[:15], tls.session_reused)\n\
         \x20           session = tls.session\n\
         \x20           tls.unwrap()\n"
    );
    let answer = run("python3", &["-c", &python], &[]);
    let lines: Vec<&str> = answer.lines().collect();
    assert_eq!(lines.len(), 3, "{answer}");
    assert!(lines.iter().all(|line| line.starts_with("b'HTTP/1.1 200 OK'")), "{answer}");
    assert!(lines[1..].iter().all(|line| line.ends_with("True")), "{answer}");
    let node = format!(
        "const ca = require('fs').readFileSync('{authority}');\
         const agent = new (require('https').Agent)({{ ca, keepAlive: true, maxSockets: 1 }});\
         const lookup = (_, how, then) => how.all ? then(null, [{{ address: '127.0.0.1', family: 4 }}]) \
             : then(null, '127.0.0.1', 4);\
         let left = 5;\
         const ask = () => require('https').get({{ host: '{HOST}', port: {port}, agent, lookup }}, it => {{\
             it.resume().on('end', () => {{ console.log(it.statusCode); \
                 --left ? ask() : agent.destroy(); }}); }});\
         ask();"
    );
    assert_eq!(run("node", &["-e", &node], &[]), "200\n".repeat(5));
}
