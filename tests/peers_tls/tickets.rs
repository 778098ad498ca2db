//! Tickets over a restart, with OpenSSL's s_client.

use rcgen::{CertificateParams, KeyPair};

use super::process::{Folder, Process, free_port};
use super::servers::listening;
use super::{GET, HOST, run};

struct Setup {
    folder: Folder,
    port: u16,
    flags: Vec<String>,
}

impl Setup {
    fn new() -> Setup {
        let folder = Folder::new("peers-tickets");
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![HOST.to_owned()]).unwrap();
        let certificate = certificate.self_signed(&key).unwrap().pem();
        let certificate = folder.write("ca.pem", certificate);
        let key = folder.write("a.key", key.serialize_pem());
        let [port, control] = [free_port(), free_port()];
        let settings = format!(
            "workers = 2\n[listen]\ntcp = \"off\"\nudp = \"off\"\napi = \"off\"\nadmin = \"off\"\n\
             api_tls = \"127.0.0.1:{port}\"\ncontrol = \"127.0.0.1:{control}\"\n\
             [[tls.certificate]]\ncertificate = \"{certificate}\"\nkey = \"{key}\"\n"
        );
        let file = folder.write("lb.toml", settings);
        let flags = ["serve", "--config", &file].map(str::to_owned).to_vec();
        Setup { folder, port, flags }
    }

    /// The balancer, with or without a folder that outlasts it.
    fn start(&self, is_kept: bool) -> Process {
        let runtime = match is_kept {
            true => format!("RUNTIME_DIRECTORY={}", self.folder.path().display()),
            false => "RUNTIME_DIRECTORY=".to_owned(),
        };
        let before = [runtime.as_str(), env!("CARGO_BIN_EXE_lb")];
        let flags = self.flags.iter().map(String::as_str);
        let all: Vec<&str> = before.into_iter().chain(flags).collect();
        let process = Process::start("env", &all);
        listening(self.port);
        process
    }

    fn s_client(&self, version: &str, how: &str, session: &str) -> String {
        let (to, session) = (format!("127.0.0.1:{}", self.port), self.folder.path().join(session));
        let session = session.display().to_string();
        let arguments = ["s_client", "-connect", &to, "-servername", HOST, "-ign_eof"];
        run("openssl", &[&arguments[..], &[version, how, &session]].concat(), &[GET])
    }
}

#[test]
#[ignore = "needs openssl"]
fn a_session_is_taken_up_again_after_a_restart_where_the_keys_are_kept() {
    let setup = Setup::new();
    for version in ["-tls1_2", "-tls1_3"] {
        let lb = setup.start(true);
        let first = setup.s_client(version, "-sess_out", version);
        assert!(first.contains("\nNew, TLSv1."), "{first}");
        assert_eq!(lb.terminate(), Some(0));
        let lb = setup.start(true);
        for _ in 0..3 {
            let next = setup.s_client(version, "-sess_in", version);
            assert!(next.contains("\nReused, TLSv1.") && next.contains("HTTP/1.1 503"), "{next}");
        }
        assert_eq!(lb.terminate(), Some(0));
        let lb = setup.start(false);
        let next = setup.s_client(version, "-sess_in", version);
        assert!(next.contains("\nNew, TLSv1."), "its keys are its own: {next}");
        assert_eq!(lb.terminate(), Some(0));
    }
}
