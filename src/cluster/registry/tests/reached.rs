//! How a backend is reached.

use super::*;
use crate::tls::backends::BackendTls;

#[test]
fn how_a_backend_is_reached_stays_as_long_as_it_is_registered() {
    let mut registry = registry(4);
    let sealed = |name: Option<&str>| {
        let Change::Register(wanted) = join(1, TCP, 80, 1) else { panic!() };
        let tls = BackendTls { name: name.map(Into::into), ca: None };
        Change::Register(Registration { tls: Some(tls), ..wanted })
    };
    registry.apply(sealed(None), Now::default()).unwrap();
    assert!(registry.freeze(true).backends().all(|backend| backend.tls.is_some()));
    assert!(registry.apply(sealed(None), Now::default()).is_ok(), "it says the same again");
    for other in [sealed(Some("a.example")), join(1, TCP, 80, 1)] {
        let fault = registry.apply(other, Now::default()).unwrap_err();
        assert_eq!(fault, Fault::TlsChanges { address: address(80) });
        assert!(fault.to_string().ends_with("unregister it first"), "{fault}");
    }
    registry.apply(unregister(1, TCP, 80), Now::default()).unwrap();
    assert!(registry.apply(join(1, TCP, 80, 1), Now::default()).is_ok());
}

#[test]
fn which_http_a_backend_speaks_stays_as_long_as_it_is_registered() {
    let mut registry = registry(4);
    let speaks = |http2| match join(1, API, 80, 1) {
        Change::Register(wanted) => Change::Register(Registration { http2, ..wanted }),
        other => panic!("{other:?}"),
    };
    for http2 in [true, false] {
        registry.apply(speaks(http2), Now::default()).unwrap();
        assert!(registry.freeze(true).backends().all(|backend| backend.http2 == http2));
        assert!(registry.apply(speaks(http2), Now::default()).is_ok(), "it says the same again");
        let fault = registry.apply(speaks(!http2), Now::default()).unwrap_err();
        assert_eq!(fault, Fault::HttpChanges { address: address(80) });
        assert!(fault.to_string().ends_with("unregister it first"), "{fault}");
        registry.apply(unregister(1, API, 80), Now::default()).unwrap();
    }
}
