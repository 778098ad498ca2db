//! What the first bytes of a connection mean. The waiting is tested with sockets, in `tests/services`.

use super::*;

#[test]
fn a_listed_proxy_must_send_a_header_and_a_stranger_must_not() {
    const MISSING: Verdict = Verdict::Refused(Refusal::NoProxyHeader);
    const FORBIDDEN: Verdict = Verdict::Refused(Refusal::ProxyHeader);
    let unknown = Verdict::Greeted(Hello { bytes: 15, ends: None });
    for (bytes, of_listed, of_stranger) in [
        (&b""[..], Verdict::More, Verdict::Ordinary),
        (b"PROX", Verdict::More, Verdict::Ordinary),
        (b"PROXY UNKNOWN\r", Verdict::More, FORBIDDEN),
        (b"PROXY UNKNOWN\r\nGET /", unknown, FORBIDDEN),
        (b"PROXY nonsense\r\n", MISSING, FORBIDDEN),
        (b"\r\n\r\n\0\r\nQUIT\n", Verdict::More, FORBIDDEN),
        (b"GET / HTTP/1.1\r\n", MISSING, Verdict::Ordinary),
    ] {
        assert_eq!(judge(true, bytes), of_listed, "{bytes:?}");
        assert_eq!(judge(false, bytes), of_stranger, "{bytes:?}");
    }
}
