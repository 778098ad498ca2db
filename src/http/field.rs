//! The fields that mean something to a gateway. Owns the names, the reading of comma lists and which
//! names may never be removed, forged or sent as a trailer. Knows no message.

/// What a field name is to a gateway. Names compare without regard to case (RFC 9110 5.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Name {
    /// Passed on as it is.
    Other,
    Accept,
    Authorization,
    /// `Client-Cert` and `Client-Cert-Chain` (RFC 9440): who has shown a certificate here. Only the balancer
    /// says that.
    ClientCert,
    Connection,
    ContentLength,
    ContentType,
    Cookie,
    Date,
    Expect,
    Forwarded,
    Host,
    KeepAlive,
    MaxForwards,
    ProxyAuthenticate,
    ProxyAuthorization,
    ProxyConnection,
    RequestId,
    Te,
    Traceparent,
    TransferEncoding,
    Upgrade,
    /// Announces an upgrade to HTTP/2, which is never forwarded.
    Http2Settings,
    Via,
    WwwAuthenticate,
    XForwardedFor,
    XForwardedHost,
    XForwardedProto,
    /// Another field in which a proxy states who the user is: `X-Forwarded-*`, `X-Real-IP`.
    ProxyClaim,
    /// Becomes one of the names above when a backend maps `_` and `-` to the same character, as
    /// CGI (RFC 3875 4.1.18) does: a way past every rule for that name, so it is dropped.
    Disguised,
}

/// Maps to lower case, and `_` to `-`.
const FOLD: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = match byte as u8 {
            b'_' => b'-',
            other => other.to_ascii_lowercase(),
        };
        byte += 1;
    }
    table
};

const CLAIM_PREFIX: &[u8] = b"x-forwarded-";

impl Name {
    /// Classifies a field name. The length decides first, so an ordinary name costs one or two
    /// compared bytes.
    pub fn of(name: &str) -> Name {
        let name = name.as_bytes();
        let known = match name.len() {
            2 if folds_to(name, b"te") => Name::Te,
            3 if folds_to(name, b"via") => Name::Via,
            4 if folds_to(name, b"host") => Name::Host,
            4 if folds_to(name, b"date") => Name::Date,
            6 if folds_to(name, b"accept") => Name::Accept,
            6 if folds_to(name, b"cookie") => Name::Cookie,
            6 if folds_to(name, b"expect") => Name::Expect,
            7 if folds_to(name, b"upgrade") => Name::Upgrade,
            9 if folds_to(name, b"forwarded") => Name::Forwarded,
            9 if folds_to(name, b"x-real-ip") => Name::ProxyClaim,
            10 if folds_to(name, b"connection") => Name::Connection,
            10 if folds_to(name, b"keep-alive") => Name::KeepAlive,
            11 if folds_to(name, b"traceparent") => Name::Traceparent,
            11 if folds_to(name, b"client-cert") => Name::ClientCert,
            12 if folds_to(name, b"content-type") => Name::ContentType,
            12 if folds_to(name, b"max-forwards") => Name::MaxForwards,
            12 if folds_to(name, b"x-request-id") => Name::RequestId,
            13 if folds_to(name, b"authorization") => Name::Authorization,
            14 if folds_to(name, b"content-length") => Name::ContentLength,
            14 if folds_to(name, b"http2-settings") => Name::Http2Settings,
            15 if folds_to(name, b"x-forwarded-for") => Name::XForwardedFor,
            16 if folds_to(name, b"www-authenticate") => Name::WwwAuthenticate,
            16 if folds_to(name, b"proxy-connection") => Name::ProxyConnection,
            16 if folds_to(name, b"x-forwarded-host") => Name::XForwardedHost,
            17 if folds_to(name, b"transfer-encoding") => Name::TransferEncoding,
            17 if folds_to(name, b"x-forwarded-proto") => Name::XForwardedProto,
            17 if folds_to(name, b"client-cert-chain") => Name::ClientCert,
            18 if folds_to(name, b"proxy-authenticate") => Name::ProxyAuthenticate,
            19 if folds_to(name, b"proxy-authorization") => Name::ProxyAuthorization,
            12.. if folds_to(&name[..CLAIM_PREFIX.len()], CLAIM_PREFIX) => Name::ProxyClaim,
            _ => return Name::Other,
        };
        if name.contains(&b'_') { Name::Disguised } else { known }
    }

    /// Whether a field frames the message or describes the connection, and so is for this hop alone.
    pub const fn is_for_this_hop(self) -> bool {
        matches!(
            self,
            Name::Connection
                | Name::ContentLength
                | Name::Disguised
                | Name::KeepAlive
                | Name::ProxyConnection
                | Name::Te
                | Name::TransferEncoding
                | Name::Upgrade
        )
    }

    /// Whether `Connection` may name this field and so have it removed (RFC 9110 7.6.1). A user
    /// must not be able to remove what the framing, the routing or the backend's judgement of the
    /// user rests on.
    pub const fn may_be_removed(self) -> bool {
        matches!(self, Name::Other | Name::Accept | Name::RequestId | Name::Traceparent)
    }
}

fn folds_to(name: &[u8], lower: &[u8]) -> bool {
    name.len() == lower.len()
        && name.iter().zip(lower).all(|(byte, wanted)| FOLD[usize::from(*byte)] == *wanted)
}

/// The elements of a comma-separated list, trimmed. Empty elements are yielded as empty slices;
/// whoever reads the list decides whether they are harmless. Quoted strings are not interpreted.
pub fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(trim)
}

/// Without the spaces and tabs around it (OWS, RFC 9110 5.6.3).
pub fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = value {
        value = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// Replaces control bytes in field values with spaces, up to the empty line that ends the section,
/// as a recipient may (RFC 9110 5.5). Returns whether there were any. Fields that frame the message
/// or describe the connection are left alone: what is doubtful there is for the reader to refuse.
pub fn clean(lines: &mut [u8]) -> bool {
    let (mut any, mut start, mut in_value) = (false, 0, false);
    for at in 0..lines.len() {
        match (lines[at], lines.get(at + 1)) {
            // Whether it ends the line is not known yet.
            (b'\r', None) => {}
            (b'\r', Some(b'\n')) if at == start => break,
            (b'\r', Some(b'\n')) => {}
            (b'\n', _) => (start, in_value) = (at + 1, false),
            (b':', _) if !in_value => in_value = may_be_cleaned(&lines[start..at]),
            (b'\t', _) => {}
            (byte, _) if in_value && byte.is_ascii_control() => {
                lines[at] = b' ';
                any = true;
            }
            _ => {}
        }
    }
    any
}

fn may_be_cleaned(name: &[u8]) -> bool {
    std::str::from_utf8(name).is_ok_and(|name| !Name::of(name.trim_ascii_end()).is_for_this_hop())
}

/// Whether `name` may travel in a trailer section: nothing that frames, routes, authenticates,
/// modifies the request, controls the response or describes the content (RFC 9110 6.5.1).
pub fn may_be_trailer(name: &str) -> bool {
    const FORBIDDEN: [&str; 26] = [
        "age",
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-location",
        "content-range",
        "cookie",
        "expires",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "location",
        "pragma",
        "proxy-authentication-info",
        "range",
        "retry-after",
        "server",
        "set-cookie",
        "status",
        "strict-transport-security",
        "trailer",
        "vary",
        "warning",
    ];
    let forbidden = |lower: &&str| folds_to(name.as_bytes(), lower.as_bytes());
    Name::of(name) == Name::Other && !FORBIDDEN.iter().any(forbidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_known_in_any_case() {
        for (text, name) in [
            ("host", Name::Host),
            ("HOST", Name::Host),
            ("TE", Name::Te),
            ("Content-Length", Name::ContentLength),
            ("TRANSFER-encoding", Name::TransferEncoding),
            ("X-Forwarded-For", Name::XForwardedFor),
            ("X-Forwarded-Port", Name::ProxyClaim),
            ("X-Real-IP", Name::ProxyClaim),
            ("HTTP2-Settings", Name::Http2Settings),
            ("Www-Authenticate", Name::WwwAuthenticate),
            ("Proxy-Authenticate", Name::ProxyAuthenticate),
            ("proxy-authorization", Name::ProxyAuthorization),
            ("X-Request-ID", Name::RequestId),
            ("TraceParent", Name::Traceparent),
            ("client-CERT", Name::ClientCert),
            ("Client-Cert-Chain", Name::ClientCert),
            ("Client-Certs", Name::Other),
            ("Hosts", Name::Other),
            ("X-Forwarded", Name::Other),
            ("User-Agent", Name::Other),
            ("h", Name::Other),
        ] {
            assert_eq!(Name::of(text), name, "{text}");
        }
    }

    #[test]
    fn an_underscore_does_not_make_a_known_name_unknown() {
        for text in [
            "Content_Length",
            "transfer_ENCODING",
            "X_Forwarded-For",
            "x-forwarded_port",
            "Client_Cert",
            "client-cert_chain",
        ] {
            assert_eq!(Name::of(text), Name::Disguised, "{text}");
        }
        assert_eq!(Name::of("user_id"), Name::Other);
    }

    #[test]
    fn list_elements_are_trimmed_and_empty_ones_are_shown() {
        let all: Vec<_> = list(b" a ,\tb\t,, c d").collect();
        assert_eq!(all, [&b"a"[..], b"b", b"", b"c d"]);
    }

    #[test]
    fn control_bytes_in_values_become_spaces_and_nothing_else_changes() {
        for (text, wanted) in [
            ("A: b\x01c\0\r\nB: \x7f\x0b\r\n\r\n", "A: b c \r\nB:   \r\n\r\n"),
            ("A: b\rc\r\r\n\r\n", "A: b c \r\n\r\n"),
            ("A: b\tc\u{e4}\r\n\r\n", "A: b\tc\u{e4}\r\n\r\n"),
            ("A: b\x01\r", "A: b \r"),
            ("A\x01: b\x01\r\n\r\n", "A\x01: b \r\n\r\n"),
            ("A: b:\x01c\nD\x01: e\r\n\r\n", "A: b: c\nD\x01: e\r\n\r\n"),
            ("A: b\r\n\r\nC: \x01", "A: b\r\n\r\nC: \x01"),
            ("Content-Length: 5\0\r\n\r\n", "Content-Length: 5\0\r\n\r\n"),
            ("Content_Length: 5\0\r\n\r\n", "Content_Length: 5\0\r\n\r\n"),
            ("Upgrade : a\x01\r\n\r\n", "Upgrade : a\x01\r\n\r\n"),
            ("transfer-encoding: \x0bchunked\r\n", "transfer-encoding: \x0bchunked\r\n"),
            ("\u{e4}: \x01\r\n", "\u{e4}:  \r\n"),
            ("", ""),
        ] {
            let mut bytes = text.as_bytes().to_vec();
            let any = clean(&mut bytes);
            assert_eq!(std::str::from_utf8(&bytes), Ok(wanted), "{text:?}");
            assert_eq!(any, text != wanted, "{text:?}");
        }
    }

    #[test]
    fn a_trailer_can_neither_frame_nor_authenticate() {
        for name in [
            "Content-Length",
            "Transfer-Encoding",
            "Host",
            "Authorization",
            "Proxy-Authorization",
            "WWW-Authenticate",
            "Proxy-Authenticate",
            "Set-Cookie",
            "Set_Cookie",
            "X-Forwarded-For",
            "Connection",
            "Trailer",
            "Content_Length",
            "Client-Cert",
            "Client_Cert_Chain",
        ] {
            assert!(!may_be_trailer(name), "{name}");
        }
        for name in ["grpc-status", "Server-Timing", "ETag", "X-Checksum", "Digest"] {
            assert!(may_be_trailer(name), "{name}");
        }
    }
}
