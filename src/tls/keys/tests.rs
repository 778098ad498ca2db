//! Tests of `tls::keys`, and certificates for those of others.

use std::sync::OnceLock;

use rcgen::{
    CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, SignatureAlgorithm,
};

use super::*;
use crate::tls::{Agreed, Tls};

/// A self-signed certificate in PEM, and its key.
fn pem(names: &[&str], algorithm: &'static SignatureAlgorithm) -> (String, String) {
    let key = KeyPair::generate_for(algorithm).unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
    (certificate.pem(), key.serialize_pem())
}

fn files(name: &str) -> Files {
    let at = |end: &str| PathBuf::from(format!("{name}.{end}"));
    Files { certificate: at("pem"), key: at("key"), ocsp: None }
}

fn identity(names: &[&str]) -> Arc<Identity> {
    identity_of(names, &PKCS_ECDSA_P256_SHA256)
}

fn identity_of(names: &[&str], algorithm: &'static SignatureAlgorithm) -> Arc<Identity> {
    let (certificate, key) = pem(names, algorithm);
    let files = files(names.first().unwrap_or(&"none"));
    Arc::new(Identity::from_pem(&files, certificate.as_bytes(), key.as_bytes(), None).unwrap())
}

/// One certificate for `a.example`, and itself in PEM.
pub(crate) fn identities_and_pem() -> (&'static Identities, &'static str) {
    static ALL: OnceLock<(Identities, String)> = OnceLock::new();
    let (identities, pem) = ALL.get_or_init(|| {
        let (certificate, key) = pem(&["a.example"], &PKCS_ECDSA_P256_SHA256);
        let (files, chain) = (files("a"), certificate.as_bytes());
        let one = Identity::from_pem(&files, chain, key.as_bytes(), None).unwrap();
        let tickets = Arc::new(Keyring::own(None, 0).unwrap());
        let all = Identities::new(vec![Arc::new(one)], false, Vec::new(), &tickets).unwrap();
        (all, certificate)
    });
    (identities, pem)
}

/// Both versions of TLS, or one of them.
pub(crate) fn versions(which: usize) -> &'static [&'static rustls::SupportedProtocolVersion] {
    use rustls::version::{TLS12, TLS13};
    const ALL: [&[&rustls::SupportedProtocolVersion]; 3] =
        [&[&TLS13, &TLS12], &[&TLS12], &[&TLS13]];
    ALL[which]
}

#[test]
fn a_certificate_tells_its_names_its_key_and_its_end() {
    let identity = identity_of(&["Shop.example", "*.Shop.example"], &PKCS_RSA_SHA256);
    assert_eq!(identity.names, ["shop.example", "*.shop.example"]);
    assert_eq!((identity.kind, identity.kind.cost()), (KeyKind::Rsa(2048), 4));
    assert_eq!(identity.kind.to_string(), "RSA-2048");
    let end = identity.not_after;
    assert_eq!(identity.days_left(end - 86_400), 1);
    assert_eq!((identity.days_left(end - 1), identity.days_left(end + 1)), (0, -1));
}

#[test]
fn a_host_gets_its_own_certificate_before_a_wildcard_and_others_the_first() {
    let all = [&["a.example"][..], &["*.example", "b.example"], &["x.b.example"]];
    let all: Vec<_> = all.iter().map(|names| identity(names)).collect();
    let choice = Choice::new(all.clone(), false);
    for (host, places) in [
        (Some("a.example"), &[0][..]),
        (Some("b.example"), &[1]),
        (Some("c.example"), &[1]),
        (Some("x.b.example"), &[2]),
        // A wildcard is for one label.
        (Some("y.b.example"), &[0]),
        (Some("example"), &[0]),
        (Some("other.test"), &[0]),
        (None, &[0]),
    ] {
        assert_eq!(choice.of(host), places, "{host:?}");
    }
    let strict = Choice::new(all, true);
    assert!(strict.of(Some("other.test")).is_empty() && strict.of(Some("y.b.example")).is_empty());
    assert_eq!((strict.of(None), strict.of(Some("c.example"))), (&[0][..], &[1][..]));
}

#[test]
fn keys_of_two_kinds_stand_side_by_side() {
    let all = vec![identity_of(&["a.example"], &PKCS_RSA_SHA256), identity(&["a.example"])];
    let choice = Choice::new(all, false);
    assert_eq!((choice.of(None), choice.of(Some("a.example"))), (&[0, 1][..], &[0, 1][..]));
}

#[test]
fn what_is_wrong_with_files_is_said_with_their_names() {
    let (certificate, key) = pem(&["a.example"], &PKCS_ECDSA_P256_SHA256);
    let (_, other) = pem(&["a.example"], &PKCS_ECDSA_P256_SHA256);
    let at = files("a");
    let read = |chain: &str, key: &str| {
        Identity::from_pem(&at, chain.as_bytes(), key.as_bytes(), None).unwrap_err()
    };
    assert_eq!(read(&certificate, &other), "the key in a.key is not that of a.pem");
    assert_eq!(read("", &key), "a.pem holds no certificate in PEM");
    assert_eq!(read(&key, &key), "a.pem holds no certificate in PEM");
    let no_key = "a.key holds no private key in PEM without a password: ";
    assert!(read(&certificate, &certificate).starts_with(no_key));
    let broken = certificate.replace("MII", "AAA");
    assert!(read(&broken, &key).starts_with("a.pem holds a certificate that cannot be read"));
    let missing = Identity::read(&at).unwrap_err();
    assert_eq!(missing, "cannot read a.pem: No such file or directory (os error 2)");
    let tickets = Arc::new(Keyring::own(None, 0).unwrap());
    let none = Identities::new(Vec::new(), false, Vec::new(), &tickets).unwrap_err();
    assert_eq!(none, "TLS needs a [[tls.certificate]] with its key");
}

#[test]
fn tickets_turn_with_their_keys_and_whoever_is_asked_for_a_certificate_gets_none() {
    let now = 1_800_000_000;
    let tickets = Arc::new(Keyring::own(None, now).unwrap());
    let required = super::super::clients::tests::required("keys");
    let policy = Arc::clone(&required.policy);
    let all = vec![identity(&["a.example"])];
    let identities = Identities::new(all, false, vec![required], &tickets).unwrap();
    let agreed = Some(Agreed { identities, tickets });
    let before = Tls { agreed, takes_ragged_ends: true, ..Tls::default() };
    assert!(before.turned(now + 1).unwrap().is_none());
    let after = before.turned(now + 7 * 60 * 60).unwrap().unwrap();
    assert!(after.takes_ragged_ends && after.limits == before.limits);
    let config = |tls: &Tls, speech, clients: Option<&ClientPolicy>| {
        tls.agreed.as_ref().unwrap().identities.terms(speech, clients).unwrap().config()
    };
    for speech in [Speech::Http, Speech::Stream] {
        let [old, new] = [&before, &after].map(|tls| config(tls, speech, None).ticketer.clone());
        let [ticket, newer] = [&old, &new].map(|it| it.encrypt(b"state").unwrap());
        assert!(new.decrypt(&ticket).is_some() && old.decrypt(&newer).is_none());
        for tls in [&before, &after] {
            let asking = config(tls, speech, Some(&policy));
            assert!(!asking.ticketer.enabled() && asking.send_tls13_tickets == 0);
            assert!(!asking.session_storage.can_cache());
            assert_eq!(asking.ticketer.decrypt(&ticket), None);
        }
    }
    let [http, stream] =
        [Speech::Http, Speech::Stream].map(|it| config(&after, it, None).ticketer.clone());
    assert_eq!(stream.decrypt(&http.encrypt(b"state").unwrap()), None);
    let cost = |clients| {
        let identities = &after.agreed.as_ref().unwrap().identities;
        identities.terms(Speech::Http, clients).unwrap().cost(Some("a.example"))
    };
    assert_eq!((cost(None), cost(Some(&policy))), (1, 2), "its signatures are checked as well");
    let other = ClientPolicy { is_required: false, ..(*policy).clone() };
    let identities = &after.agreed.as_ref().unwrap().identities;
    assert!(identities.terms(Speech::Http, Some(&other)).is_none(), "its files were not read");
}
