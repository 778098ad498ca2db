//! The health call against a server of the `h2` crate that answers anything, and against what is no such server.

use std::sync::Arc;

use http::{HeaderValue, Response};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::*;
use crate::config::services::{CheckConfig, CheckKind};
use crate::control::checker::{self, Target};
use crate::control::contact::Port;

const PATIENCE: Duration = Duration::from_secs(30);

/// What a server answers.
#[derive(Default)]
struct Answer {
    status: u16,
    /// Of the head.
    code: Option<&'static str>,
    content: Vec<u8>,
    /// Of the trailers.
    last_code: Option<&'static str>,
}

/// The message of a good answer, as protocol buffers are written by hand.
fn message(status: u8) -> Vec<u8> {
    vec![0, 0, 0, 0, 2, 0x08, status]
}

fn told(status: u8) -> Answer {
    Answer { status: 200, content: message(status), last_code: Some("0"), ..Answer::default() }
}

/// An answer in the head alone.
fn refused(status: u16, code: &'static str) -> Answer {
    Answer { status, code: Some(code), ..Answer::default() }
}

/// Answers the calls on one connection, and tells what was asked, until the other side ends it.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    answer: Answer,
    asked: mpsc::UnboundedSender<(http::request::Parts, Vec<u8>)>,
) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(stream).await?;
    let answer = Arc::new(answer);
    while let Some(call) = connection.accept().await {
        let (request, mut respond) = call?;
        let (answer, asked) = (Arc::clone(&answer), asked.clone());
        tokio::spawn(async move {
            let (head, mut body) = request.into_parts();
            let mut message = Vec::new();
            while let Some(chunk) = body.data().await {
                message.extend_from_slice(&chunk.unwrap());
            }
            asked.send((head, message)).unwrap();
            let mut head = Response::builder().status(answer.status);
            if let Some(code) = answer.code {
                head = head.header("grpc-status", code);
            }
            let is_all = answer.content.is_empty() && answer.last_code.is_none();
            let mut stream = respond.send_response(head.body(()).unwrap(), is_all).unwrap();
            if !is_all {
                stream.send_data(answer.content.clone().into(), answer.last_code.is_none())?;
            }
            if let Some(code) = answer.last_code {
                let code = HeaderValue::from_static(code);
                stream.send_trailers(
                    [("grpc-status".parse().unwrap(), code)].into_iter().collect(),
                )?;
            }
            Ok::<(), h2::Error>(())
        });
    }
    Ok(())
}

fn check() -> CheckConfig {
    CheckConfig { kind: CheckKind::Grpc, timeout: Some(PATIENCE), ..CheckConfig::default() }
}

/// Checks a backend to which one connection is made, and says why that has not passed.
async fn checked<T>(
    check: &CheckConfig,
    backend: impl AsyncFnOnce(TcpStream) -> T,
) -> (Result<(), String>, T) {
    tried(|port| Target::of(check, port), backend).await
}

/// The same of whatever is tried of the backend at this port.
async fn tried<T>(
    target: impl FnOnce(Port) -> Target,
    backend: impl AsyncFnOnce(TcpStream) -> T,
) -> (Result<(), String>, T) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let target = target(Port { address, proxy: false, tls: None });
    let served = async { backend(listener.accept().await.unwrap().0).await };
    let (outcome, served) = tokio::join!(checker::check(&target), served);
    let said = outcome.map_err(|failure| {
        assert!(!failure.is_ours, "{failure:?}");
        failure.sentence.replace(&address.to_string(), "it")
    });
    (said, served)
}

/// How a backend that answers this comes out of a check, and what it was asked.
async fn answering(
    check: &CheckConfig,
    answer: Answer,
) -> (Result<(), String>, http::request::Parts, Vec<u8>) {
    let (asked, mut all) = mpsc::unbounded_channel();
    let backend = async |stream| serve(stream, answer, asked).await;
    let (said, served) = checked(check, backend).await;
    assert!(served.is_ok(), "{served:?}");
    let (head, message) = all.recv().await.expect("it was asked");
    assert!(all.recv().await.is_none(), "it was asked twice");
    (said, head, message)
}

#[tokio::test]
async fn it_asks_for_the_health_of_a_service_or_of_the_server() {
    let (said, head, message) = answering(&check(), told(1)).await;
    assert_eq!(said, Ok(()));
    assert_eq!((head.method.as_str(), head.uri.path()), ("POST", "/grpc.health.v1.Health/Check"));
    assert!(head.uri.authority().unwrap().as_str().starts_with("127.0.0.1:"), "{head:?}");
    for (name, value) in [
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", AGENT),
        ("grpc-timeout", "30000m"),
    ] {
        assert_eq!(head.headers[name], value);
    }
    assert_eq!(message, [0, 0, 0, 0, 0], "the empty name is the default, which is not written");

    let (service, host) = ("shop.Orders".to_owned(), Some("shop.example".to_owned()));
    let named = CheckConfig { grpc_service: service, host, ..check() };
    let (said, head, message) = answering(&named, told(1)).await;
    assert_eq!((said, head.uri.authority().unwrap().as_str()), (Ok(()), "shop.example"));
    assert_eq!(message, b"\0\0\0\0\x0d\x0a\x0bshop.Orders");
}

#[tokio::test]
async fn serving_is_good_and_nothing_else_is() {
    let later = Answer { content: vec![0, 0, 0, 0, 3, 0x08, 0xac, 0x02], ..told(0) };
    // A field that is not known is passed over.
    let more = Answer { content: vec![0, 0, 0, 0, 5, 0x08, 1, 0x12, 1, b'x'], ..told(0) };
    let failed = |code| Answer { last_code: Some(code), ..told(1) };
    let unset = Answer { content: vec![0; PREFIX_BYTES], ..told(0) };
    for (answer, words) in [
        (told(1), ""),
        (more, ""),
        (told(2), "it answered NOT_SERVING instead of SERVING"),
        (told(3), "it answered SERVICE_UNKNOWN instead of SERVING"),
        (unset, "it answered UNKNOWN instead of SERVING"),
        (later, "it answered the unknown serving status 300 instead of SERVING"),
        (refused(200, "5"), "it answered grpc-status 5 (NOT_FOUND) instead of SERVING"),
        (refused(200, "12"), "it answered grpc-status 12 (UNIMPLEMENTED) instead of SERVING"),
        (refused(503, "14"), "it answered grpc-status 14 (UNAVAILABLE) instead of SERVING"),
        (failed("13"), "it answered grpc-status 13 (INTERNAL) instead of SERVING"),
        (failed("99"), "it answered grpc-status 99 instead of SERVING"),
        (Answer { status: 404, ..Answer::default() }, "it answered status 404 instead of SERVING"),
    ] {
        match answering(&check(), answer).await.0 {
            Ok(()) => assert_eq!(words, ""),
            Err(said) => assert_eq!(said, words),
        }
    }
}

#[tokio::test]
async fn an_answer_that_is_none_is_told_from_one_that_is_bad() {
    let content = |content: &[u8]| Answer { content: content.to_vec(), ..told(1) };
    let odd = "what it sent is no answer to the health call";
    let silent = Answer { last_code: None, ..told(1) };
    for (answer, words) in [
        (silent, "its answer has no grpc-status: does it speak gRPC there?"),
        (Answer { last_code: Some("ok"), ..told(1) }, "its grpc-status is no number"),
        (refused(200, "0"), "its answer has no message"),
        (content(&[0, 0, 0, 0]), odd),
        (content(&[1, 0, 0, 0, 2, 0x08, 1]), odd),
        (content(&[0, 0, 0, 0, 2, 0x08, 1, 0]), odd),
        (content(&[0, 0, 0, 0, 2, 0x08, 0x81]), odd),
        (content(&[0, 0xff, 0xff, 0xff, 0xff]), odd),
        (content(&[0; ANSWER_BYTES_MAX + 1]), "its answer is longer than 1024 bytes"),
    ] {
        let said = answering(&check(), answer).await.0;
        assert_eq!(said, Err(format!("no answer from it: {words}")));
    }
}

#[tokio::test]
async fn who_speaks_something_else_hangs_up_or_is_silent_fails() {
    let bad = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n";
    let (said, ()) = checked(&check(), async |mut stream| {
        stream.write_all(bad.as_bytes()).await.unwrap();
        while stream.read(&mut [0; 1024]).await.is_ok_and(|count| count > 0) {}
    })
    .await;
    assert_eq!(
        said.unwrap_err(),
        "no answer from it: what it sent is no HTTP/2 (FRAME_SIZE_ERROR)"
    );

    let (said, ()) = checked(&check(), async |mut stream| {
        // Both the preface and the call, which come together.
        assert!(stream.read(&mut [0; 1024]).await.unwrap() > 24);
        stream.shutdown().await.unwrap();
        while stream.read(&mut [0; 1024]).await.is_ok_and(|count| count > 0) {}
    })
    .await;
    let closed = "no answer from it: it closed the connection before it had answered";
    assert_eq!(said.unwrap_err(), closed);

    let brief = CheckConfig { timeout: Some(Duration::from_millis(50)), ..check() };
    let (said, heard) = checked(&brief, async |mut stream| {
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        heard
    })
    .await;
    assert_eq!(said.unwrap_err(), "no answer from it within 50 ms");
    assert!(heard.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "{heard:?}");
}

#[tokio::test]
async fn a_call_that_is_reset_says_why_and_one_that_pings_without_end_ends_in_time() {
    let (said, _) = checked(&check(), async |stream| {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (_, mut respond) = connection.accept().await.unwrap().unwrap();
        respond.send_reset(Reason::REFUSED_STREAM);
        connection.accept().await.map(drop)
    })
    .await;
    assert_eq!(said.unwrap_err(), "no answer from it: it reset the call (REFUSED_STREAM)");

    let brief = CheckConfig { timeout: Some(Duration::from_millis(100)), ..check() };
    let (said, ()) = checked(&brief, async |stream| {
        let (mut from, mut to) = stream.into_split();
        let drain = async { while from.read(&mut [0; 4096]).await.is_ok_and(|it| it > 0) {} };
        let flood = async {
            let mut sent = to.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
            let pings = b"\0\0\x08\x06\0\0\0\0\0abcdefgh".repeat(1_000);
            while sent.is_ok() {
                sent = to.write_all(&pings).await;
            }
        };
        tokio::join!(drain, flood);
    })
    .await;
    assert!(said.unwrap_err().starts_with("no answer from it"));
}

#[tokio::test]
async fn a_connection_is_ended_in_good_order() {
    let settings = b"\0\0\0\x04\0\0\0\0\0";
    // `:status: 200` and `grpc-status: 12`, after which the stream ends.
    let head = b"\0\0\x11\x01\x05\0\0\0\x01\x88\0\x0bgrpc-status\x0212";
    let (said, heard) = checked(&check(), async |mut stream| {
        stream.write_all(&[&settings[..], head].concat()).await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        heard
    })
    .await;
    let why = "it answered grpc-status 12 (UNIMPLEMENTED) instead of SERVING";
    assert_eq!(said.unwrap_err(), why);
    let goaway = b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\0";
    assert!(heard.ends_with(goaway), "{heard:?}");
}

#[tokio::test]
async fn to_a_trial_any_answer_is_good_and_none_is_not() {
    let target = |port| Target::any_answer(port, true, PATIENCE);
    let content = b"hello".to_vec();
    let page = Answer { status: 200, content, last_code: None, code: None };
    for answer in [refused(200, "12"), Answer { status: 404, ..Answer::default() }, page] {
        let (asked, _all) = mpsc::unbounded_channel();
        let backend = async |stream| serve(stream, answer, asked).await;
        assert_eq!(tried(target, backend).await.0, Ok(()));
    }
    let (said, ()) = tried(target, async |stream| drop(stream)).await;
    said.unwrap_err();
}

#[tokio::test]
async fn a_host_that_is_none_is_told() {
    let check = CheckConfig { host: Some("a/b".to_owned()), ..check() };
    let (said, _) = checked(&check, async |stream| drop(stream)).await;
    let why = "no answer from it: nobody can be asked for as a/b: is that a host?";
    assert_eq!(said.unwrap_err(), why);
}
