//! The health call of gRPC (`grpc.health.v1.Health/Check`), over a connection that has been made. Owns its two messages,
//! what goes around them, and what an answer says. HTTP/2 is the `h2` crate's, driven over memory: it has no task, so a
//! call that is abandoned leaves nothing behind. For how long it may take is up to whoever makes it.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{Reason, RecvStream};
use http::{HeaderMap, Request, StatusCode, Uri};
use prost::Message;

use super::contact::{AGENT, Broken, Contact, Missed};
use crate::base::bells::Flag;
use crate::proxy::http2::pipe::{Mouth, Pipe, pipe};

const PATH: &str = "/grpc.health.v1.Health/Check";
/// What is before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;
/// Bytes of an answer with its prefix, at most; a good one has 7.
pub const ANSWER_BYTES_MAX: usize = 1 << 10;
/// Bytes of its fields, and of its trailers, counted as RFC 9113 section 6.5.2 does.
pub const FIELDS_BYTES_MAX: u32 = 16 << 10;
/// Bytes that are received before what follows from them is sent.
const RECEIVE_BYTES: usize = 16 << 10;
/// Bytes that are sent at once, which rustls holds.
const SEND_BYTES_MAX: usize = 64 << 10;

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
struct HealthCheckResponse {
    /// A `ServingStatus`: a number, so that one which is added later can be told.
    #[prost(int32, tag = "1")]
    status: i32,
}

/// A call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthCall {
    /// The service that is asked about; empty: the whole server.
    pub service: String,
    pub host: String,
    /// Whatever the backend answers is good, also that it knows no such call.
    pub takes_any: bool,
}

/// What a backend has answered to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Health {
    /// Its `ServingStatus`.
    Told(i32),
    /// Another `grpc-status` than 0.
    Refused(u32),
    /// Another status than 200, without a `grpc-status`.
    NoCall(StatusCode),
}

impl Health {
    pub const SERVING: Health = Health::Told(1);
}

impl fmt::Display for Health {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"];
        let nth = |number: i32| told.get(usize::try_from(number).ok()?);
        match *self {
            Health::Told(status) => match nth(status) {
                Some(name) => out.write_str(name),
                None => write!(out, "the unknown serving status {status}"),
            },
            Health::Refused(code) => {
                write!(out, "grpc-status {code}")?;
                CODES.get(code as usize).map_or(Ok(()), |name| write!(out, " ({name})"))
            }
            Health::NoCall(status) => write!(out, "status {}", status.as_u16()),
        }
    }
}

/// The codes of gRPC, by their numbers.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Makes the call over this connection. The backend is told that it is not waited for any longer than `timeout`.
///
/// # Errors
/// Why there is no answer.
pub async fn ask(
    mut contact: Contact,
    call: &HealthCall,
    timeout: Duration,
) -> Result<Health, Broken> {
    let scheme = if contact.is_tls() { "https" } else { "http" };
    let request = request(call, scheme, timeout)?;
    let message = prefixed(&HealthCheckRequest { service: call.service.clone() });
    let (ours, mouth) = pipe();
    carry(&mut contact, &mouth, speak(ours, request, message, call.takes_any)).await
}

fn request(call: &HealthCall, scheme: &str, timeout: Duration) -> Result<Request<()>, Broken> {
    let host = call.host.as_str();
    let uri = Uri::builder().scheme(scheme).authority(host).path_and_query(PATH).build();
    let uri = uri.map_err(|_| format!("nobody can be asked for as {host}: is that a host?"))?;
    let request = Request::post(uri)
        .header("te", "trailers")
        .header("content-type", "application/grpc")
        .header("user-agent", AGENT)
        .header("grpc-timeout", format!("{}m", timeout.as_millis()));
    Ok(request.body(()).expect("these fields are valid"))
}

fn prefixed(message: &HealthCheckRequest) -> Bytes {
    let encoded = message.encode_to_vec();
    let length = u32::try_from(encoded.len()).expect("the name of a service is short");
    [&[0], &length.to_be_bytes()[..], &encoded].concat().into()
}

/// Lets `talk` speak through `mouth` with the other end of this connection, in turns: what it has written is sent, and
/// what has come is given to it, since it says nothing more of its own accord.
async fn carry<T>(
    contact: &mut Contact,
    mouth: &Mouth,
    talk: impl Future<Output = Result<T, Broken>>,
) -> Result<T, Broken> {
    let mut talk = pin!(talk);
    let flag = Arc::<Flag>::default();
    let waker = Waker::from(Arc::clone(&flag));
    let (mut heard, mut has_ended) = (Vec::new(), false);
    loop {
        flag.take();
        mouth.lend(Vec::new(), SEND_BYTES_MAX);
        let outcome = talk.as_mut().poll(&mut Context::from_waker(&waker));
        let written = mouth.take();
        let sent = contact.send(&written).await;
        if let Poll::Ready(outcome) = outcome {
            return outcome;
        }
        sent.map_err(Missed::Wire)?;
        if flag.take() || !written.is_empty() {
            continue;
        }
        if has_ended {
            return Err(closed().into());
        }
        heard.clear();
        match contact.receive(&mut heard, RECEIVE_BYTES).await? {
            0 => {
                mouth.end();
                has_ended = true;
            }
            _ => mouth.push(&heard),
        }
    }
}

/// The call as HTTP/2 has it, and the farewell that ends the connection. Selects by hand: `select!` would count as work
/// that the runtime limits, and this is polled outside it.
async fn speak(
    ours: Pipe,
    request: Request<()>,
    message: Bytes,
    takes_any: bool,
) -> Result<Health, Broken> {
    let (sender, connection) = client::Builder::new()
        .enable_push(false)
        .max_header_list_size(FIELDS_BYTES_MAX)
        .handshake(ours)
        .await
        .map_err(|error| told(&error))?;
    let mut connection = pin!(connection);
    let mut exchange = Box::pin(exchange(sender, request, message, takes_any));
    let outcome = poll_fn(|context| {
        let ended = connection.as_mut().poll(context);
        match (exchange.as_mut().poll(context), ended) {
            (Poll::Ready(outcome), _) => Poll::Ready(outcome),
            (Poll::Pending, Poll::Ready(Ok(()))) => Poll::Ready(Err(closed().into())),
            (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Err(told(&error).into())),
            (Poll::Pending, Poll::Pending) => Poll::Pending,
        }
    })
    .await;
    drop(exchange);
    // The other side may be gone, and the answer is known.
    let _ = poll_fn(|context| Poll::Ready(connection.as_mut().poll(context))).await;
    outcome
}

async fn exchange(
    sender: SendRequest<Bytes>,
    request: Request<()>,
    message: Bytes,
    takes_any: bool,
) -> Result<Health, Broken> {
    let told = |error: h2::Error| told(&error);
    let mut sender = sender.ready().await.map_err(told)?;
    let (answer, mut stream) = sender.send_request(request, false).map_err(told)?;
    stream.send_data(message, true).map_err(told)?;
    let (head, mut body) = answer.await.map_err(told)?.into_parts();
    if takes_any {
        return Ok(Health::NoCall(head.status));
    }
    // An answer without a message has its trailers in the head.
    match status(&head.headers)? {
        Some(0) => return Err("its answer has no message".to_owned().into()),
        Some(code) => return Ok(Health::Refused(code)),
        None if head.status != StatusCode::OK => return Ok(Health::NoCall(head.status)),
        None => {}
    }
    let message = read(&mut body).await?;
    let trailers = body.trailers().await.map_err(told)?.unwrap_or_default();
    match status(&trailers)? {
        Some(0) => Ok(health(&message)?),
        Some(code) => Ok(Health::Refused(code)),
        None => Err("its answer has no grpc-status: does it speak gRPC there?".to_owned().into()),
    }
}

async fn read(body: &mut RecvStream) -> Result<Vec<u8>, String> {
    let mut message = Vec::new();
    while let Some(chunk) = body.data().await {
        message.extend_from_slice(&chunk.map_err(|error| told(&error))?);
        if message.len() > ANSWER_BYTES_MAX {
            return Err(format!("its answer is longer than {ANSWER_BYTES_MAX} bytes"));
        }
    }
    Ok(message)
}

fn status(fields: &HeaderMap) -> Result<Option<u32>, String> {
    let Some(value) = fields.get("grpc-status") else { return Ok(None) };
    let code = value.to_str().ok().and_then(|text| text.parse().ok());
    code.map(Some).ok_or_else(|| "its grpc-status is no number".to_owned())
}

/// What the one message of an answer says.
fn health(answer: &[u8]) -> Result<Health, String> {
    let odd = || "what it sent is no answer to the health call".to_owned();
    let (prefix, message) = answer.split_first_chunk::<PREFIX_BYTES>().ok_or_else(odd)?;
    // No compression is agreed on.
    let [0, length @ ..] = *prefix else { return Err(odd()) };
    if u32::from_be_bytes(length) as usize != message.len() {
        return Err(odd());
    }
    let response = HealthCheckResponse::decode(message).map_err(|_| odd())?;
    Ok(Health::Told(response.status))
}

fn closed() -> String {
    "it closed the connection before it had answered".to_owned()
}

/// What ended the call.
fn told(error: &h2::Error) -> String {
    match error.reason() {
        _ if error.is_io() => closed(),
        Some(reason) if error.is_remote() && error.is_reset() => {
            format!("it reset the call ({})", named(reason))
        }
        Some(reason) if error.is_remote() => {
            format!("it ended the connection ({})", named(reason))
        }
        Some(reason) => format!("what it sent is no HTTP/2 ({})", named(reason)),
        None => format!("what it sent is no HTTP/2: {error}"),
    }
}

fn named(reason: Reason) -> String {
    format!("{reason:?}")
}

#[cfg(test)]
mod tests;
