//! The echo backend for API users: answers any request with JSON that says what was received, so
//! that curl shows which backend served it and what a balancer did to the head. Owns that JSON;
//! HTTP itself is hyper's.

use std::convert::Infallible;
use std::sync::Arc;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;

/// A text body up to this size is included in the answer.
const BODY_SHOWN_MAX: usize = 4096;

/// What the backend received.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Received {
    /// Which backend this is.
    pub name: String,
    pub method: String,
    /// As it was in the request line.
    pub target: String,
    pub version: String,
    /// Names in lower case, in order of arrival, with the values of one name together.
    pub headers: Vec<(String, String)>,
    pub body_bytes: u64,
    /// In hex digits.
    pub body_sha256: String,
    /// The body itself, if it is short and text.
    pub body: Option<String>,
}

/// Answers one connection's requests until it ends.
pub async fn serve(stream: TcpStream, name: Arc<str>) {
    let _ = stream.set_nodelay(true);
    let answer = service_fn(move |request| answer(request, Arc::clone(&name)));
    // An error is the peer's, and hyper has answered it as well as it could.
    let _ =
        http1::Builder::new().half_close(true).serve_connection(TokioIo::new(stream), answer).await;
}

async fn answer(
    request: Request<Incoming>,
    name: Arc<str>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let mut answer = Response::new(Full::default());
    match Body::read(body).await {
        Ok(body) => {
            let received = Received {
                name: name.to_string(),
                method: head.method.to_string(),
                target: head.uri.to_string(),
                version: format!("{:?}", head.version),
                headers: head.headers.iter().map(shown).collect(),
                body_bytes: body.bytes,
                body_sha256: body.sha256,
                body: body.text,
            };
            let text = serde_json::to_string(&received).expect("strings and numbers are JSON");
            *answer.body_mut() = Full::from(text + "\n");
            let json = HeaderValue::from_static("application/json");
            answer.headers_mut().insert(CONTENT_TYPE, json);
        }
        Err(_) => *answer.status_mut() = StatusCode::BAD_REQUEST,
    }
    Ok(answer)
}

fn shown((name, value): (&hyper::header::HeaderName, &HeaderValue)) -> (String, String) {
    (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// A body, hashed as it arrives and kept only if it is short.
struct Body {
    bytes: u64,
    sha256: String,
    text: Option<String>,
}

impl Body {
    async fn read(mut body: Incoming) -> Result<Body, hyper::Error> {
        let (mut bytes, mut hash, mut start) = (0, Sha256::new(), Vec::new());
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                bytes += data.len() as u64;
                hash.update(&data);
                let room = (BODY_SHOWN_MAX + 1).saturating_sub(start.len()).min(data.len());
                start.extend_from_slice(&data[..room]);
            }
        }
        let digits = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let short = start.len() <= BODY_SHOWN_MAX;
        let text = String::from_utf8(start).ok().filter(|_| short);
        Ok(Body { bytes, sha256: digits, text })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::echo::tests::{soon, started};
    use super::*;
    use crate::cluster::Protocol;

    async fn asked(request: &[u8]) -> (String, Option<Received>) {
        let address = started(Protocol::Api).await;
        soon(async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            (head.to_owned(), serde_json::from_str(body).ok())
        })
        .await
    }

    #[tokio::test]
    async fn a_request_comes_back_as_json() {
        let request = b"POST /a?b=c HTTP/1.1\r\nHost: lb\r\nX-Two: 1\r\nA: 2\r\nx-two: 3\r\n\
            Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        let (head, received) = asked(request).await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.to_lowercase().contains("content-type: application/json"), "{head}");
        let received = received.unwrap();
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let expected = Received {
            name: "echo-1".into(),
            method: "POST".into(),
            target: "/a?b=c".into(),
            version: "HTTP/1.1".into(),
            headers: vec![
                header("host", "lb"),
                header("x-two", "1"),
                header("x-two", "3"),
                header("a", "2"),
                header("transfer-encoding", "chunked"),
            ],
            body_bytes: 3,
            body_sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".into(),
            body: Some("abc".into()),
        };
        assert_eq!(received, expected);
    }

    #[tokio::test]
    async fn a_long_body_and_one_that_is_no_text_are_hashed_only() {
        for (body, shown) in
            [(vec![b'x'; 4096], true), (vec![b'x'; 4097], false), (vec![255; 9], false)]
        {
            let mut request =
                format!("PUT / HTTP/1.1\r\nHost: lb\r\nContent-Length: {}\r\n\r\n", body.len())
                    .into_bytes();
            request.extend_from_slice(&body);
            let received = asked(&request).await.1.unwrap();
            assert_eq!(received.body_bytes, body.len() as u64);
            assert_eq!(received.body.is_some(), shown, "{} bytes", body.len());
        }
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused() {
        let (head, received) = asked(b"nonsense\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 400"), "{head}");
        assert_eq!(received, None);
    }
}
