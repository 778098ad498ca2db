//! Certificates and doors that change while users come.

use std::time::Instant;

use super::*;

/// How long users come.
const SECONDS: u64 = 8;
const SWAPS: usize = 4;

/// Makes another certificate and key, and puts them into the files of the first.
fn renew(balancer: &Balancer) -> String {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![HOST.to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap().pem();
    balancer.folder.write("ca.pem", &certificate);
    balancer.folder.write("a.key", key.serialize_pem());
    certificate
}

impl Balancer {
    fn reload(&self) -> String {
        let at = format!("127.0.0.1:{}", self.admin);
        run(env!("CARGO_BIN_EXE_lb"), &["reload", "--admin", &at], &[])
    }
}

/// Comes again and again, each time with a handshake of its own, and trusts every one of the certificates.
fn keep_coming(balancer: &Balancer, until: Instant) -> usize {
    let (all, url) = (balancer.file("all.pem"), format!("https://{HOST}:{}/", balancer.port));
    let resolve = format!("{HOST}:{}:127.0.0.1", balancer.port);
    let arguments =
        ["-sS", "--fail", "--max-time", "10", "--cacert", &all, "--resolve", &resolve, &url];
    let mut served = 0;
    while Instant::now() < until {
        let answer = Command::new("curl").args(arguments).output().unwrap();
        assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
        served += 1;
    }
    served
}

#[test]
#[ignore = "needs wrk, curl and openssl"]
fn a_certificate_is_swapped_under_load_without_a_failed_request() {
    let balancer = Balancer::start(&PKCS_ECDSA_P256_SHA256);
    let mut all = std::fs::read_to_string(balancer.file("ca.pem")).unwrap();
    balancer.folder.write("all.pem", &all);
    let until = Instant::now() + Duration::from_secs(SECONDS);
    let url = format!("https://127.0.0.1:{}/", balancer.port);
    let load = ["-t1", "-c16", &format!("-d{SECONDS}s"), &url];
    std::thread::scope(|scope| {
        let standing = scope.spawn(|| run("wrk", &load, &[]));
        let coming = scope.spawn(|| keep_coming(&balancer, until));
        for _ in 0..SWAPS {
            let certificate = renew(&balancer);
            all += &certificate;
            // Whoever looks for it meanwhile finds the old file or the new one.
            let new = balancer.folder.write("all.new", &all);
            std::fs::rename(new, balancer.file("all.pem")).unwrap();
            let outcome = balancer.reload();
            assert!(outcome.contains("reloaded"), "{outcome}");
            let next = balancer.s_client(&["-ign_eof"], GET);
            assert!(next.contains("Verify return code: 0 (ok)"), "the new one is shown: {next}");
            assert!(next.contains("HTTP/1.1 200 OK"), "{next}");
        }
        assert!(Instant::now() < until, "the load has ended before the last swap");
        let standing = standing.join().unwrap();
        let is_sound = !standing.contains("Non-2xx") && !standing.contains("Socket errors");
        assert!(is_sound && standing.contains("Requests/sec"), "{standing}");
        assert!(coming.join().unwrap() > SWAPS);
    });
}

#[test]
#[ignore = "needs curl and openssl"]
fn a_reload_turns_a_door_in_the_clear_into_one_for_https_and_back() {
    let balancer = Balancer::start(&PKCS_ECDSA_P256_SHA256);
    let (port, settings) =
        (free_port(), std::fs::read_to_string(balancer.file("lb.toml")).unwrap());
    let is_tls = || balancer.s_client_at(port).contains("BEGIN CERTIFICATE");
    let is_plain = || {
        let answer = run("curl", &["-si", &format!("http://127.0.0.1:{port}/")], &[]);
        answer.starts_with("HTTP/1.1 503 ")
    };
    for (key, sealed) in [("listen", false), ("listen_tls", true), ("listen", false)] {
        let service = format!(
            "[service.shop]\nprotocol = \"api\"\n{key} = \"127.0.0.1:{port}\"\nmaintenance = true\n"
        );
        balancer.folder.write("lb.toml", format!("{settings}{service}"));
        let outcome = balancer.reload();
        assert!(outcome.contains("reloaded"), "{outcome}");
        assert_eq!((is_tls(), is_plain()), (sealed, !sealed), "{key}");
    }
}

impl Balancer {
    fn s_client_at(&self, port: u16) -> String {
        let (authority, to) = (self.file("ca.pem"), format!("127.0.0.1:{port}"));
        run(
            "openssl",
            &["s_client", "-connect", &to, "-servername", HOST, "-CAfile", &authority],
            &[],
        )
    }
}
