//! Logins that a backend ties to a connection rather than to a request (NTLM, Negotiate with NTLM
//! or Kerberos inside, and their kin): once a user is challenged or authenticates in this way, its
//! connection identifies it. Owns how such logins are recognised; the consequences are
//! `proxy::http`'s.
//!
//! When in doubt, a message counts as part of such a login: a comma in a quoted string may look
//! like the next challenge. That costs a connection which could have been shared, and nothing else.

use super::field::{self, Name};
use super::head::Fields;

const SCHEMES: [&[u8]; 5] = [b"ntlm", b"negotiate", b"nego2", b"kerberos", b"credssp"];

/// Whether a request authenticates the user of its connection, or begins to.
pub fn in_request(fields: &Fields<'_, '_>) -> bool {
    named(fields, Name::Authorization) || named(fields, Name::ProxyAuthorization)
}

/// Whether a response challenges the user, continues the login or reports that it succeeded,
/// whatever its status.
pub fn in_response(fields: &Fields<'_, '_>) -> bool {
    named(fields, Name::WwwAuthenticate) || named(fields, Name::ProxyAuthenticate)
}

fn named(fields: &Fields<'_, '_>, name: Name) -> bool {
    let bound = |element: &[u8]| {
        let scheme = element.split(|byte| matches!(byte, b' ' | b'\t')).next().unwrap_or_default();
        SCHEMES.iter().any(|known| scheme.eq_ignore_ascii_case(known))
    };
    fields.has(name) && fields.values(name).flat_map(field::list).any(bound)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Limits;
    use crate::http::head::{self, Space};

    fn request(lines: &str) -> bool {
        let text = format!("GET / HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n");
        let mut space = Space::new();
        let head = head::request(text.as_bytes(), 0, &Limits::default(), &mut space);
        in_request(&head.unwrap().unwrap().fields)
    }

    fn response(status: u16, lines: &str) -> bool {
        let text = format!("HTTP/1.1 {status} x\r\n{lines}\r\n\r\n");
        let mut space = Space::new();
        let head = head::response(text.as_bytes(), 0, &Limits::default(), &mut space);
        in_response(&head.unwrap().unwrap().fields)
    }

    #[test]
    fn a_login_that_holds_for_a_connection_is_known_in_any_case_and_place() {
        for (value, wanted) in [
            ("NTLM", true),
            ("ntlm TlRMTVNTUAAB", true),
            ("Negotiate YIIKhgYGKwYBBQUCoIIKejCC", true),
            ("NEGOTIATE\tx", true),
            ("Basic realm=\"x\", NTLM", true),
            ("Negotiate,NTLM", true),
            ("Kerberos", true),
            ("CredSSP x", true),
            ("Basic realm=\"x\"\r\nWWW-Authenticate: Negotiate\r\nAuthorization: Negotiate", true),
            ("Basic TlRMTQ==", false),
            ("Bearer NTLM", false),
            ("Digest username=\"NTLM\", realm=\"Negotiate\"", false),
            ("NTLMx", false),
            ("", false),
        ] {
            for name in ["Authorization", "PROXY-authorization"] {
                assert_eq!(request(&format!("{name}: {value}")), wanted, "{name} {value}");
            }
            for name in ["WWW-Authenticate", "proxy-authenticate"] {
                for status in [200, 401, 407] {
                    assert_eq!(response(status, &format!("{name}: {value}")), wanted, "{value}");
                }
            }
        }
        assert!(!request("Cookie: NTLM") && !response(401, "X-Authenticate: NTLM"));
    }
}
