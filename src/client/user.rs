//! The user program: lines go to the balancer, replies come back. Owns one user's connection for
//! each of the protocols; the caller provides the lines and takes the replies.

use std::fmt;
use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket, lookup_host};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::cluster::Protocol;

/// What a gateway says in place of a backend that does not answer.
const NOBODY_SERVES: [StatusCode; 3] =
    [StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];
/// The largest datagram.
const DATAGRAM_BYTES_MAX: usize = 65_535;

/// Whether the service answered what the user said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answers {
    /// Every datagram and request had its reply; on a stream, something came back. True of a user
    /// who said nothing, too.
    Came,
    /// At least one did not come in time, or only the balancer's word that nobody serves.
    Missing,
}

/// Why a user's session ended before its lines did.
#[derive(Debug)]
pub struct Trouble(String);

impl fmt::Display for Trouble {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        Trouble(error.to_string())
    }
}

fn unreachable(to: &str, error: &dyn fmt::Display) -> Trouble {
    Trouble(format!("{to} cannot be reached: {error}; is the balancer running there?"))
}

/// Sends every line to `to` and writes the replies to `out`, until the lines end and the last reply
/// has come or is not to be expected after `patience`, or the other side closes.
///
/// # Errors
/// The balancer cannot be reached, the connection broke, or `out` takes no more.
pub async fn talk(
    protocol: Protocol,
    to: &str,
    patience: Duration,
    lines: mpsc::Receiver<String>,
    out: &mut impl Write,
) -> Result<Answers, Trouble> {
    match protocol {
        Protocol::Tcp => stream(to, patience, lines, out).await,
        Protocol::Udp => datagrams(to, patience, lines, out).await,
        Protocol::Api => requests(to, patience, lines, out).await,
    }
}

/// Opens a connection, or says why it cannot be had in time.
async fn reach(to: &str, patience: Duration) -> Result<TcpStream, Trouble> {
    match timeout(patience, TcpStream::connect(to)).await {
        Ok(opened) => opened.map_err(|error| unreachable(to, &error)),
        Err(_) => Err(unreachable(to, &format!("nothing was heard within {patience:?}"))),
    }
}

/// Lines and replies overlap freely; the end of the lines is a half-close.
async fn stream(
    to: &str,
    patience: Duration,
    mut lines: mpsc::Receiver<String>,
    out: &mut impl Write,
) -> Result<Answers, Trouble> {
    let (mut from, mut into) = reach(to, patience).await?.into_split();
    let mut sending = tokio::spawn(async move {
        let mut said = false;
        while let Some(line) = lines.recv().await {
            said = true;
            into.write_all(format!("{line}\n").as_bytes()).await?;
        }
        into.shutdown().await.map(|()| said)
    });
    let (mut said, mut heard) = (None, false);
    let mut bytes = [0; 16 * 1024];
    loop {
        let read = tokio::select! {
            // While the user is still typing, nothing is overdue.
            ended = &mut sending, if said.is_none() => {
                // Lines that could not be sent were said as well.
                said = Some(!matches!(ended, Ok(Ok(false))));
                continue;
            }
            read = from.read(&mut bytes) => Some(read),
            () = sleep(patience), if said.is_some() => None,
        };
        match read {
            Some(Ok(0)) => break,
            Some(Ok(length)) => {
                heard = true;
                out.write_all(&bytes[..length])?;
                out.flush()?;
            }
            Some(Err(error)) => {
                writeln!(out, "the connection broke: {error}")?;
                return Ok(Answers::Missing);
            }
            None => {
                writeln!(out, "nothing more was heard within {patience:?}")?;
                break;
            }
        }
    }
    if said.is_none() && !sending.is_finished() {
        sending.abort();
        writeln!(out, "the connection was closed by the other side")?;
        return Ok(answers(heard));
    }
    let silent = said.unwrap_or(true) && !heard;
    Ok(answers(!silent))
}

fn answers(came: bool) -> Answers {
    if came { Answers::Came } else { Answers::Missing }
}

/// One datagram per line, and its reply.
async fn datagrams(
    to: &str,
    patience: Duration,
    mut lines: mpsc::Receiver<String>,
    out: &mut impl Write,
) -> Result<Answers, Trouble> {
    let found = lookup_host(to).await.map_err(|error| unreachable(to, &error))?.next();
    let address = found.ok_or_else(|| unreachable(to, &"the name has no address"))?;
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(address).await?;
    let mut reply = vec![0; DATAGRAM_BYTES_MAX];
    let mut all_came = true;
    while let Some(line) = lines.recv().await {
        let answered = async {
            socket.send(line.as_bytes()).await?;
            socket.recv(&mut reply).await
        };
        let outcome = timeout(patience, answered).await;
        all_came &= matches!(outcome, Ok(Ok(_)));
        match outcome {
            Ok(Ok(length)) => {
                out.write_all(&reply[..length])?;
                writeln!(out)?;
            }
            Ok(Err(error)) => writeln!(out, "no reply: {error}")?,
            Err(_) => writeln!(out, "no reply within {patience:?}")?,
        }
        out.flush()?;
    }
    Ok(answers(all_came))
}

/// One request per line, on one connection for as long as the other side keeps it open.
async fn requests(
    to: &str,
    patience: Duration,
    mut lines: mpsc::Receiver<String>,
    out: &mut impl Write,
) -> Result<Answers, Trouble> {
    let mut connection: Option<SendRequest<Full<Bytes>>> = None;
    let mut all_came = true;
    while let Some(line) = lines.recv().await {
        let request = match request(to, &line) {
            Ok(request) => request,
            Err(said) => {
                all_came = false;
                writeln!(out, "{said}")?;
                continue;
            }
        };
        if connection.as_ref().is_none_or(SendRequest::is_closed) {
            connection = Some(connect(to, patience).await?);
        }
        let sender = connection.as_mut().expect("it was opened if it was not there");
        let answered = async {
            sender.ready().await?;
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok::<_, hyper::Error>(Response::from_parts(head, body))
        };
        let outcome = match timeout(patience, answered).await {
            Ok(outcome) => outcome.map_err(|error| format!("no answer: {error}")),
            Err(_) => Err(format!("no answer within {patience:?}")),
        };
        match outcome {
            Ok(response) => {
                all_came &= !NOBODY_SERVES.contains(&response.status());
                show(&response, out)?;
            }
            Err(said) => {
                all_came = false;
                connection = None;
                writeln!(out, "{said}")?;
            }
        }
        out.flush()?;
    }
    Ok(answers(all_came))
}

fn show(response: &Response<Bytes>, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{:?} {}", response.version(), response.status())?;
    out.write_all(response.body())?;
    if !response.body().ends_with(b"\n") {
        writeln!(out)?;
    }
    Ok(())
}

async fn connect(to: &str, patience: Duration) -> Result<SendRequest<Full<Bytes>>, Trouble> {
    let stream = reach(to, patience).await?;
    let (sender, connection) =
        handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(to, &error))?;
    // It ends with the sender, which reports its errors as well.
    tokio::spawn(connection);
    Ok(sender)
}

/// `/path`, `GET /path`, or `POST /path and the body`.
fn request(to: &str, line: &str) -> Result<Request<Full<Bytes>>, String> {
    let usage = "write a path such as /hello, GET /hello, or POST /hello and the body";
    let line = line.trim();
    let (method, rest) = match line.split_once(' ') {
        _ if line.starts_with('/') => ("GET", line),
        Some((method, rest)) => (method, rest.trim_start()),
        None => return Err(usage.to_owned()),
    };
    let (path, body) = rest.split_once(' ').unwrap_or((rest, ""));
    let method: Method = method.to_uppercase().parse().map_err(|_| usage.to_owned())?;
    if !path.starts_with('/') {
        return Err(usage.to_owned());
    }
    let mut request = Request::builder().method(method).uri(path).header(HOST, to);
    if !body.is_empty() {
        request = request.header(CONTENT_TYPE, "text/plain; charset=utf-8");
    }
    request.body(Full::from(body.to_owned())).map_err(|_| usage.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::echo::tests::{soon, started};
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    async fn talked(protocol: Protocol, to: &str, lines: &[&str]) -> String {
        let (say, said) = mpsc::channel(lines.len());
        for line in lines {
            say.send((*line).to_owned()).await.unwrap();
        }
        drop(say);
        let mut out = Vec::new();
        soon(talk(protocol, to, PATIENCE, said, &mut out)).await.unwrap();
        String::from_utf8(out).unwrap()
    }

    #[tokio::test]
    async fn lines_come_back_over_every_protocol() {
        let to = started(Protocol::Tcp).await.to_string();
        assert_eq!(talked(Protocol::Tcp, &to, &["hello", "", "bye"]).await, "hello\n\nbye\n");
        let to = started(Protocol::Udp).await.to_string();
        assert_eq!(talked(Protocol::Udp, &to, &["hello", "", "bye"]).await, "hello\n\nbye\n");
        let to = started(Protocol::Api).await.to_string();
        let said = talked(Protocol::Api, &to, &["/a", "post /b some text", "nonsense"]).await;
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines[0], "HTTP/1.1 200 OK");
        assert!(lines[1].contains(r#""method":"GET","target":"/a""#), "{said}");
        assert!(lines[3].contains(r#""method":"POST","target":"/b""#), "{said}");
        assert!(lines[3].contains(r#""body":"some text""#), "{said}");
        assert!(lines[4].starts_with("write a path"), "{said}");
    }

    #[tokio::test]
    async fn a_user_who_is_hung_up_on_is_told() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let (say, said) = mpsc::channel(1);
        let mut out = Vec::new();
        let hang_up = async { drop(listener.accept().await.unwrap()) };
        let (ended, ()) = soon(async {
            tokio::join!(talk(Protocol::Tcp, &to, PATIENCE, said, &mut out), hang_up)
        })
        .await;
        assert_eq!(ended.unwrap(), Answers::Missing);
        drop(say);
        assert_eq!(out, b"the connection was closed by the other side\n");
    }

    #[tokio::test]
    async fn a_balancer_that_is_not_there_is_one_sentence() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap().to_string();
        drop(listener);
        for (protocol, lines) in [(Protocol::Tcp, vec![]), (Protocol::Api, vec!["/a".to_owned()])] {
            let (say, said) = mpsc::channel(1);
            for line in lines {
                say.send(line).await.unwrap();
            }
            let told =
                soon(talk(protocol, &to, PATIENCE, said, &mut Vec::new())).await.unwrap_err();
            assert!(told.to_string().ends_with("is the balancer running there?"), "{told}");
        }
    }
}
