//! Tests of `tls::backends`, and handshakes with backends for those of others.

use super::*;
use crate::base::time::Now;
use crate::tls::keys::tests::identities_and_pem;
use crate::tls::keys::{Identities, Speech, Terms as UserTerms};

const AT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// A file with this text, which is gone with it.
struct Authorities(PathBuf);

impl Authorities {
    fn new(test: &str, text: &str) -> Authorities {
        let path = std::env::temp_dir().join(format!("lb-ca-{test}-{}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Authorities(path)
    }

    fn read(&self, verifies: bool) -> Backends {
        Backends::read(Some(&self.0), verifies, std::iter::empty()).unwrap()
    }
}

impl Drop for Authorities {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Hands the bytes of either end to the other until neither says any more. Returns the backend's end, and why
/// the handshake has failed if it has.
pub(crate) fn shake(ours: &mut Engine, backend: &UserTerms) -> Result<Engine, Fault> {
    let (mut hello, mut bytes) = (Vec::new(), Vec::new());
    ours.flush(&mut hello).unwrap();
    let mut theirs = Engine::accept(&hello, backend).map_err(|refused| refused.fault)?;
    loop {
        bytes.clear();
        theirs.flush(&mut bytes).unwrap();
        ours.take(&mut bytes.as_slice(), Now::default())?;
        bytes.clear();
        if ours.flush(&mut bytes).unwrap() == 0 {
            return Ok(theirs);
        }
        theirs.take(&mut bytes.as_slice(), Now::default())?;
    }
}

/// How a backend that is wanted under this name may be connected to, by one that trusts `a.example`.
pub(crate) fn client_for(name: Option<&str>) -> Client {
    let (_, pem) = identities_and_pem();
    let name = name.map(Arc::from);
    let test = format!("{}-{:?}", name.as_deref().unwrap_or("-"), std::thread::current().id());
    let authorities = Authorities::new(&test, pem);
    authorities.read(true).client(&BackendTls { name, ca: None }, AT, BackendSpeech::Anything)
}

fn identities() -> &'static Identities {
    identities_and_pem().0
}

fn outcome(client: &Client) -> Result<(), Fault> {
    let mut ours = client.begin().unwrap();
    shake(&mut ours, identities().terms(Speech::Stream, None).unwrap())?;
    assert!(!ours.is_handshaking());
    Ok(())
}

#[test]
fn a_backend_shows_a_certificate_for_its_name_from_an_authority_that_is_trusted() {
    assert_eq!(outcome(&client_for(Some("a.example"))), Ok(()));
    let other = Err(Fault::Distrusted(Distrust::OtherName));
    assert_eq!(outcome(&client_for(Some("b.example"))), other);
    assert_eq!(outcome(&client_for(None)), other, "it is for no address");
    assert_eq!(client_for(None).name(), "127.0.0.1");
    assert_eq!(client_for(Some("a.example")).name(), "a.example");

    let stranger = rcgen::KeyPair::generate().unwrap();
    let stranger = rcgen::CertificateParams::new(["a.example".to_owned()])
        .unwrap()
        .self_signed(&stranger)
        .unwrap();
    let authorities = Authorities::new("stranger", &stranger.pem());
    let wanted = BackendTls { name: Some("a.example".into()), ca: None };
    let unknown = Err(Fault::Distrusted(Distrust::UnknownAuthority));
    for backends in [authorities.read(true), Backends::default()] {
        let failed = outcome(&backends.client(&wanted, AT, BackendSpeech::Anything));
        // The same subject, signed by another key, is no less unknown.
        let damaged = Err(Fault::Distrusted(Distrust::Unreadable));
        assert!(failed == unknown || failed == damaged, "{failed:?}");
    }
    let off = authorities.read(false);
    assert_eq!(outcome(&off.client(&wanted, AT, BackendSpeech::Anything)), Ok(()));
    assert_eq!(outcome(&off.client(&BackendTls::default(), AT, BackendSpeech::Anything)), Ok(()));
    assert_eq!((off.lack(), Backends::default().lack().is_some()), (None, true));
}

#[test]
fn one_backend_may_have_authorities_of_its_own() {
    let (_, pem) = identities_and_pem();
    let authorities = Authorities::new("own", pem);
    let own = [&*authorities.0];
    let missing = Path::new("/nonexistent/ca.pem");
    let backends = Backends::read(None, true, own.into_iter()).unwrap();
    let with = |ca: Option<&Path>| {
        let wanted = BackendTls { name: Some("a.example".into()), ca: ca.map(Arc::from) };
        outcome(&backends.client(&wanted, AT, BackendSpeech::Anything))
    };
    let unknown = Err(Fault::Distrusted(Distrust::UnknownAuthority));
    assert_eq!([with(None), with(Some(missing)), with(Some(own[0]))], [unknown, unknown, Ok(())]);
    let told = Backends::read(None, true, [missing].into_iter()).unwrap_err();
    assert!(told.starts_with("cannot read /nonexistent/ca.pem: "), "{told}");
    for text in ["", "no PEM", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
        let empty = Authorities::new("empty", text);
        let told = Backends::read(Some(&empty.0), true, std::iter::empty()).unwrap_err();
        assert!(told.contains("holds no certificate in PEM"), "{told}");
    }
}

#[test]
fn a_session_is_taken_up_with_the_same_backend_by_the_same_name_and_terms_alone() {
    let (_, pem) = identities_and_pem();
    let authorities = Authorities::new("memory", pem);
    let backends = authorities.read(true);
    let wanted = BackendTls { name: Some("a.example".into()), ca: None };
    let client = backends.client(&wanted, AT, BackendSpeech::Anything);
    let mut memory = Memory::default();
    let mut is_resumed = |backend: u32, client: &Client| {
        let mut ours = memory.recall(backend, client).begin().unwrap();
        shake(&mut ours, identities().terms(Speech::Stream, None).unwrap())
            .map(|_| ours.is_resumed())
    };
    assert_eq!(is_resumed(1, &client), Ok(false));
    assert_eq!(is_resumed(1, &client), Ok(true));
    assert_eq!(is_resumed(2, &client), Ok(false), "another backend of the same name");
    let by_address = backends.client(&BackendTls::default(), AT, BackendSpeech::Anything);
    assert!(is_resumed(1, &by_address).is_err(), "it is verified by its other name");
    let reloaded = authorities.read(true).client(&wanted, AT, BackendSpeech::Anything);
    assert_eq!(is_resumed(1, &reloaded), Ok(false), "by other terms");
    assert_eq!(is_resumed(1, &reloaded), Ok(true));
    for number in 3..3 + REMEMBERED_MAX as u32 {
        memory.recall(number, &client);
        assert!(memory.all.len() <= REMEMBERED_MAX);
    }
}

#[test]
fn a_backend_is_asked_for_the_protocol_that_its_users_speak() {
    let (_, pem) = identities_and_pem();
    let backends = Authorities::new("alpn", pem).read(true);
    for (speech, protocols) in [
        (BackendSpeech::Http1, vec![b"http/1.1".to_vec()]),
        (BackendSpeech::Http2, vec![b"h2".to_vec()]),
        (BackendSpeech::Anything, vec![]),
    ] {
        let client = backends.client(&BackendTls::default(), AT, speech);
        assert_eq!(client.config.alpn_protocols, protocols);
    }
    for (name, is_one) in
        [("a.example", true), ("10.0.0.1", true), ("::1", true), ("", false), ("a b", false)]
    {
        assert_eq!(is_name(name), is_one, "{name}");
    }
}
