//! Certificates of users, with curl and OpenSSL's s_client.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output};
use std::thread;

use rcgen::{CertificateParams, KeyPair};

use super::authority::{Authority, Client};
use super::process::{Folder, Process, free_port};
use super::run;
use super::servers::listening;
use super::wait::wait_for;

const OPEN: &str = "open.example";
const STRICT: &str = "strict.example";

/// Serves each request with the head that it came with; the port.
fn telling() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && connection.read(&mut byte).is_ok_and(|it| it > 0)
            {
                head.push(byte[0]);
            }
            let length = head.len();
            let start = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}");
            let _ = connection.write_all(&[start.as_bytes(), b"\r\n\r\n", &head].concat());
        }
    });
    port
}

/// A balancer with a service that requires a certificate and one that does not ask.
struct Setup {
    lb: Process,
    folder: Folder,
    authority: Authority,
    ports: [u16; 2],
}

impl Setup {
    fn new() -> Setup {
        let (folder, authority) = (Folder::new("peers-clients"), Authority::new("users"));
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([OPEN, STRICT].map(str::to_owned)).unwrap();
        let own = folder.write("server.pem", params.self_signed(&key).unwrap().pem());
        let key = folder.write("server.key", key.serialize_pem());
        let ca = folder.write("ca.pem", authority.pem());
        let crl = folder.write("ca.crl", authority.revokes(&[], 2040));
        let [https, plain, control, admin] = [0; 4].map(|_| free_port());
        let backend = telling();
        let service = |name: &str, clients: &str| {
            format!(
                "[service.{name}]\nprotocol = \"api\"\nhosts = [\"{name}.example\"]\n\
                 backends = [\"127.0.0.1:{backend}\"]\ntls_clients = \"{clients}\"\n"
            )
        };
        let settings = format!(
            "workers = 2\n[listen]\ntcp = \"off\"\nudp = \"off\"\n\
             api = \"127.0.0.1:{plain}\"\napi_tls = \"127.0.0.1:{https}\"\n\
             control = \"127.0.0.1:{control}\"\nadmin = \"127.0.0.1:{admin}\"\n\
             [tls]\nclient_ca = \"{ca}\"\nclient_crl = [\"{crl}\"]\n\
             [[tls.certificate]]\ncertificate = \"{own}\"\nkey = \"{key}\"\n{}{}",
            service("open", "none"),
            service("strict", "required")
        );
        let file = folder.write("lb.toml", settings);
        let lb = Process::start(env!("CARGO_BIN_EXE_lb"), &["serve", "--config", &file]);
        listening(https);
        listening(admin);
        Setup { lb, folder, authority, ports: [https, admin] }
    }

    fn at(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Where its certificate and its key are.
    fn keep(&self, name: &str, client: &Client) -> [String; 2] {
        let certificate = self.folder.write(&format!("{name}.pem"), client.pem());
        [certificate, self.folder.write(&format!("{name}.key"), client.key.serialize_pem())]
    }

    fn curl(&self, host: &str, own: Option<&[String; 2]>, more: &[&str]) -> Output {
        let port = self.ports[0];
        let (authority, resolve) = (self.at("server.pem"), format!("{host}:{port}:127.0.0.1"));
        let mut command = Command::new("curl");
        command.args(["-sS", "-i", "--max-time", "10", "--cacert", &authority]);
        command.args(["--resolve", &resolve]).args(more);
        if let Some([certificate, key]) = own {
            command.args(["--cert", certificate, "--key", key]);
        }
        command.arg(format!("https://{host}:{port}/")).output().unwrap()
    }

    fn reload(&self) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
        command.args(["reload", "--admin", &format!("127.0.0.1:{}", self.ports[1])]);
        command.output().unwrap()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

#[test]
#[ignore = "needs curl"]
fn curl_is_let_in_by_its_certificate_until_that_is_revoked() {
    let setup = Setup::new();
    let own = setup.keep("own", &setup.authority.client(7));
    for version in [&["--tlsv1.3"][..], &["--tls-max", "1.2"]] {
        let answer = said(&setup.curl(STRICT, Some(&own), version));
        assert!(answer.starts_with("HTTP/2 200"), "{answer}");
        assert!(answer.contains("\r\nClient-Cert: :MII"), "{answer}");
        let lie = [version, &["-H", "Client-Cert: :AAAA:", "-H", "client_cert: :AAAA:"]].concat();
        for (host, own, count) in [(STRICT, Some(&own), 1), (OPEN, None, 0), (OPEN, Some(&own), 0)]
        {
            let answer = said(&setup.curl(host, own, &lie));
            assert!(answer.starts_with("HTTP/2 200") && !answer.contains("AAAA:"), "{answer}");
            assert_eq!(answer.to_lowercase().matches("client-cert").count(), count, "{answer}");
        }
        let none = setup.curl(STRICT, None, version);
        assert!(!none.status.success() && said(&none).contains("alert"), "{}", said(&none));
        let other = said(&setup.curl(OPEN, Some(&own), &["-H", "Host: strict.example"]));
        assert!(other.starts_with("HTTP/2 421"), "{other}");
    }
    // A list that nobody can read changes nothing.
    setup.folder.write("ca.crl", "torn");
    let refused = setup.reload();
    let wanted = format!("{} holds no certificate list", setup.at("ca.crl"));
    assert!(!refused.status.success() && said(&refused).contains(&wanted), "{}", said(&refused));
    let answer = said(&setup.curl(STRICT, Some(&own), &[]));
    assert!(answer.starts_with("HTTP/2 200"), "{answer}");
    setup.folder.write("ca.crl", setup.authority.revokes(&[7], 2040));
    assert!(setup.reload().status.success());
    wait_for("the list to count", || {
        let refused = setup.curl(STRICT, Some(&own), &[]);
        (!refused.status.success() && said(&refused).contains("revoked")).then_some(())
    });
    assert_eq!(setup.lb.terminate(), Some(0));
}

#[test]
#[ignore = "needs openssl"]
fn a_session_of_s_client_leads_nowhere_else() {
    let setup = Setup::new();
    let [certificate, key] = setup.keep("own", &setup.authority.client(7));
    let to = format!("127.0.0.1:{}", setup.ports[0]);
    let kept = setup.at("session");
    let s_client = |host: &str, more: &[&str]| {
        let get = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let arguments = ["s_client", "-connect", &to, "-servername", host, "-ign_eof"];
        run("openssl", &[&arguments, more].concat(), &[get.as_bytes()])
    };
    let own = ["-cert", &certificate, "-key", &key];
    for version in ["-tls1_2", "-tls1_3"] {
        let first = s_client(OPEN, &[version, "-sess_out", &kept]);
        assert!(first.contains("\nNew, TLSv1.") && first.contains("HTTP/1.1 200"), "{first}");
        let again = s_client(OPEN, &[version, "-sess_in", &kept]);
        assert!(again.contains("\nReused, TLSv1."), "{again}");
        // Without a certificate, a session of the open host opens nothing.
        let other = s_client(STRICT, &[version, "-sess_in", &kept]);
        assert!(other.contains("alert") && !other.contains("HTTP/1.1"), "{other}");
        let whole = [&[version, "-sess_in", &kept][..], &own].concat();
        let other = s_client(STRICT, &whole);
        assert!(other.contains("\nNew, TLSv1.") && other.contains("HTTP/1.1 200"), "{other}");
        // And with one, there is no session to be taken elsewhere.
        let path = setup.folder.path().join("strict");
        let strict = path.display().to_string();
        let first = s_client(STRICT, &[&[version, "-sess_out", &strict][..], &own].concat());
        assert!(first.contains("HTTP/1.1 200"), "{first}");
        if path.exists() {
            let again = s_client(STRICT, &[version, "-sess_in", &strict]);
            assert!(again.contains("alert") && !again.contains("HTTP/1.1"), "{again}");
            std::fs::remove_file(path).unwrap();
        }
    }
    assert_eq!(setup.lb.terminate(), Some(0));
}
