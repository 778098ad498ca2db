//! How a listed backend is reached.

use super::*;
use crate::config::kinds::Kind;
use crate::config::service_kinds::Backends;
use crate::tls::backends::BackendTls;

#[test]
fn a_listed_backend_says_how_it_is_verified() {
    let backend = |tls: &str| {
        let text = format!(
            "[service.s]\nprotocol = \"api\"\nbackends = [{{ address = \"10.0.0.1:443\", tls = {tls} }}]"
        );
        let config = file::read("f", &text).map_err(|fault| fault.to_string())?;
        Ok::<_, String>(config.services[0].backends[0].clone())
    };
    let shown = |tls: &str| Backends.show(&vec![backend(tls).unwrap()]);
    assert_eq!(backend("true").unwrap().tls, Some(BackendTls::default()));
    assert_eq!(backend("false").unwrap().tls, None);
    assert_eq!(shown("false"), "[\"10.0.0.1:443\"]");
    assert_eq!(shown("true"), "[{ address = \"10.0.0.1:443\", tls = true }]");
    let both = "{ name = \"a.example\", ca = \"/etc/lb/ca.pem\" }";
    assert_eq!(shown(both), format!("[{{ address = \"10.0.0.1:443\", tls = {both} }}]"));
    for (wrong, said) in [
        ("1", "tls = 1"),
        ("\"a.example\"", "tls = "),
        ("{ name = \"a b\" }", "tls with name"),
        ("{ ca = \"\" }", "tls with ca"),
        ("{ verify = \"off\" }", "tls with `verify`"),
    ] {
        let told = backend(wrong).unwrap_err();
        assert!(told.contains(said), "{wrong}: {told}");
    }
}

#[test]
fn a_listed_backend_says_which_http_it_speaks() {
    let backend = |http: &str| {
        let text = format!(
            "[service.s]\nprotocol = \"api\"\nbackends = [{{ address = \"10.0.0.1:80\", http = {http} }}]"
        );
        let config = file::read("f", &text).map_err(|fault| fault.to_string())?;
        Ok::<_, String>(config.services[0].backends[0].clone())
    };
    let shown = |http: &str| Backends.show(&vec![backend(http).unwrap()]);
    assert_eq!([backend("1").unwrap().http2, backend("2").unwrap().http2], [false, true]);
    assert_eq!(shown("1"), "[\"10.0.0.1:80\"]");
    assert_eq!(shown("2"), "[{ address = \"10.0.0.1:80\", http = 2 }]");
    for wrong in ["0", "3", "true", "\"2\""] {
        let told = backend(wrong).unwrap_err();
        assert!(told.contains("not http = "), "{wrong}: {told}");
    }
}
