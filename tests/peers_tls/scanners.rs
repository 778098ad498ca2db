//! Users who bend TLS as far as it goes, and programs that look for what is wrong with a server.

use serde_json::Value;

use super::*;

const PACKAGES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/python");

#[test]
#[ignore = "needs python3 and its package tlslite-ng in target/python"]
fn who_bends_tls_is_served_or_ended_and_harms_nobody() {
    let balancer = Balancer::start(&PKCS_ECDSA_P256_SHA256);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hostile_tls.py");
    let said = run_within("120", "python3", &[script, &balancer.port.to_string()], &[]);
    let is_well = |line: &str| line.ends_with(" ok");
    assert!(said.lines().count() == 8 && said.lines().all(is_well), "{said}");
    assert!(balancer.curl(&[]).status.success());
}

/// What testssl has found: each finding's name, how bad it is, and what it says.
fn testssl(balancer: &Balancer) -> Vec<[String; 3]> {
    let (authority, file) = (balancer.file("ca.pem"), balancer.file("testssl.json"));
    let (port, options) = (balancer.port, ["--quiet", "--color", "0", "--warnings", "off"]);
    let more = ["--add-ca", &authority, "--ip", "127.0.0.1", "--jsonfile", &file];
    let target = format!("{HOST}:{port}");
    // Protocols, and every attack that it knows.
    let arguments = [&options[..], &more, &["-p", "-U", &target]].concat();
    let said = run_within("400", "testssl", &arguments, &[]);
    let found = std::fs::read_to_string(file).unwrap_or_else(|_| panic!("{said}"));
    let found: Vec<Value> = serde_json::from_str(&found).unwrap();
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let keys = ["id", "severity", "finding"];
    found.iter().map(|finding| keys.map(|key| text(finding, key))).collect()
}

#[test]
#[ignore = "needs testssl.sh"]
fn testssl_finds_nothing_old_and_nothing_from_medium_up() {
    let balancer = Balancer::start(&PKCS_ECDSA_P256_SHA256);
    let found = testssl(&balancer);
    let is_bad = |it: &&[String; 3]| matches!(&*it[1], "MEDIUM" | "HIGH" | "CRITICAL" | "FATAL");
    let bad: Vec<_> = found.iter().filter(is_bad).collect();
    assert!(bad.is_empty(), "{bad:?}");
    let says = |name: &str, word: &str| {
        found.iter().any(|[id, _, finding]| id == name && finding.contains(word))
    };
    for old in ["SSLv2", "SSLv3", "TLS1", "TLS1_1"] {
        assert!(says(old, "not offered"), "{old}: {found:?}");
    }
    for new in ["TLS1_2", "TLS1_3"] {
        assert!(says(new, "offered") && !says(new, "not offered"), "{new}: {found:?}");
    }
    for attack in ["heartbleed", "CCS", "ROBOT", "secure_client_renego", "POODLE_SSL", "SWEET32"] {
        assert!(says(attack, "not vulnerable"), "{attack}: {found:?}");
    }
}

/// What sslyze has found, by the names of its scans.
fn sslyze(balancer: &Balancer) -> Value {
    let (file, port) = (balancer.file("sslyze.json"), balancer.port);
    let (target, into) = (format!("{HOST}:{port}{{127.0.0.1}}"), format!("--json_out={file}"));
    let scans = "--sslv2 --sslv3 --tlsv1 --tlsv1_1 --tlsv1_2 --tlsv1_3 --heartbleed --openssl_ccs --robot \
                 --reneg --compression --fallback --early_data --ems";
    let path = format!("PYTHONPATH={PACKAGES}");
    let mut arguments = vec![path.as_str(), "python3", "-m", "sslyze", &target, &into];
    arguments.extend(scans.split_whitespace());
    let said = run_within("120", "env", &arguments, &[]);
    let found = std::fs::read_to_string(file).unwrap_or_else(|_| panic!("{said}"));
    let found: Value = serde_json::from_str(&found).unwrap();
    found["server_scan_results"][0]["scan_result"].clone()
}

#[test]
#[ignore = "needs python3 and its package sslyze in target/python"]
fn sslyze_finds_two_versions_and_no_weakness() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_RSA_SHA256] {
        let found = sslyze(&Balancer::start(algorithm));
        let result = |scan: &str, key: &str| found[scan]["result"][key].clone();
        for (version, is_spoken) in [
            ("ssl_2_0", false),
            ("ssl_3_0", false),
            ("tls_1_0", false),
            ("tls_1_1", false),
            ("tls_1_2", true),
            ("tls_1_3", true),
        ] {
            let scan = format!("{version}_cipher_suites");
            let spoken = result(&scan, "is_tls_version_supported");
            assert_eq!(spoken, is_spoken, "{version}: {}", found[&scan]);
        }
        for (scan, key, wanted) in [
            ("heartbleed", "is_vulnerable_to_heartbleed", false),
            ("openssl_ccs_injection", "is_vulnerable_to_ccs_injection", false),
            ("tls_compression", "supports_compression", false),
            ("tls_1_3_early_data", "supports_early_data", false),
            ("session_renegotiation", "is_vulnerable_to_client_renegotiation_dos", false),
            ("session_renegotiation", "supports_secure_renegotiation", true),
            ("tls_fallback_scsv", "supports_fallback_scsv", true),
            ("tls_extended_master_secret", "supports_ems_extension", true),
        ] {
            assert_eq!(result(scan, key), wanted, "{scan}: {}", found[scan]);
        }
        let robot = result("robot", "robot_result");
        assert!(robot.as_str().is_some_and(|it| it.starts_with("NOT_VULNERABLE")), "{robot}");
    }
}
