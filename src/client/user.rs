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
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket, lookup_host};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::cluster::Protocol;

/// How long to wait for the reply to a datagram before telling the user that there is none.
const REPLY_WITHIN: Duration = Duration::from_secs(2);
/// The largest datagram.
const DATAGRAM_BYTES_MAX: usize = 65_535;

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
/// has come, or the other side closes.
///
/// # Errors
/// The balancer cannot be reached, the connection broke, or `out` takes no more.
pub async fn talk(
    protocol: Protocol,
    to: &str,
    lines: mpsc::Receiver<String>,
    out: &mut impl Write,
) -> Result<(), Trouble> {
    match protocol {
        Protocol::Tcp => stream(to, lines, out).await,
        Protocol::Udp => datagrams(to, lines, out).await,
        Protocol::Api => requests(to, lines, out).await,
    }
}

/// Lines and replies overlap freely; the end of the lines is a half-close.
async fn stream(
    to: &str,
    mut lines: mpsc::Receiver<String>,
    out: &mut impl Write,
) -> Result<(), Trouble> {
    let stream = TcpStream::connect(to).await.map_err(|error| unreachable(to, &error))?;
    let (mut from, mut into) = stream.into_split();
    let sending = tokio::spawn(async move {
        while let Some(line) = lines.recv().await {
            into.write_all(format!("{line}\n").as_bytes()).await?;
        }
        into.shutdown().await
    });
    let mut bytes = [0; 16 * 1024];
    let ended = loop {
        match from.read(&mut bytes).await {
            Ok(0) => break Ok(()),
            Ok(length) => {
                out.write_all(&bytes[..length])?;
                out.flush()?;
            }
            Err(error) => break Err(Trouble(format!("the connection broke: {error}"))),
        }
    };
    if !sending.is_finished() {
        sending.abort();
        writeln!(out, "the connection was closed by the other side")?;
    }
    ended
}

/// One datagram per line, and its reply.
async fn datagrams(
    to: &str,
    mut lines: mpsc::Receiver<String>,
    out: &mut impl Write,
) -> Result<(), Trouble> {
    let found = lookup_host(to).await.map_err(|error| unreachable(to, &error))?.next();
    let address = found.ok_or_else(|| unreachable(to, &"the name has no address"))?;
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(address).await?;
    let mut reply = vec![0; DATAGRAM_BYTES_MAX];
    while let Some(line) = lines.recv().await {
        let answered = async {
            socket.send(line.as_bytes()).await?;
            socket.recv(&mut reply).await
        };
        match timeout(REPLY_WITHIN, answered).await {
            Ok(Ok(length)) => {
                out.write_all(&reply[..length])?;
                writeln!(out)?;
            }
            Ok(Err(error)) => writeln!(out, "no reply: {error}")?,
            Err(_) => writeln!(out, "no reply within {} s", REPLY_WITHIN.as_secs())?,
        }
        out.flush()?;
    }
    Ok(())
}

/// One request per line, on one connection for as long as the other side keeps it open.
async fn requests(
    to: &str,
    mut lines: mpsc::Receiver<String>,
    out: &mut impl Write,
) -> Result<(), Trouble> {
    let mut connection: Option<SendRequest<Full<Bytes>>> = None;
    while let Some(line) = lines.recv().await {
        let request = match request(to, &line) {
            Ok(request) => request,
            Err(said) => {
                writeln!(out, "{said}")?;
                continue;
            }
        };
        if connection.as_ref().is_none_or(SendRequest::is_closed) {
            connection = Some(connect(to).await?);
        }
        let sender = connection.as_mut().expect("it was opened if it was not there");
        let answered = async {
            sender.ready().await?;
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok::<_, hyper::Error>(Response::from_parts(head, body))
        };
        match answered.await {
            Ok(response) => {
                writeln!(out, "{:?} {}", response.version(), response.status())?;
                out.write_all(response.body())?;
                if !response.body().ends_with(b"\n") {
                    writeln!(out)?;
                }
            }
            Err(error) => {
                writeln!(out, "no answer: {error}")?;
                connection = None;
            }
        }
        out.flush()?;
    }
    Ok(())
}

async fn connect(to: &str) -> Result<SendRequest<Full<Bytes>>, Trouble> {
    let stream = TcpStream::connect(to).await.map_err(|error| unreachable(to, &error))?;
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

    async fn talked(protocol: Protocol, to: &str, lines: &[&str]) -> String {
        let (say, said) = mpsc::channel(lines.len());
        for line in lines {
            say.send((*line).to_owned()).await.unwrap();
        }
        drop(say);
        let mut out = Vec::new();
        soon(talk(protocol, to, said, &mut out)).await.unwrap();
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
        let (ended, ()) =
            soon(async { tokio::join!(talk(Protocol::Tcp, &to, said, &mut out), hang_up) }).await;
        ended.unwrap();
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
            let told = soon(talk(protocol, &to, said, &mut Vec::new())).await.unwrap_err();
            assert!(told.to_string().ends_with("is the balancer running there?"), "{told}");
        }
    }
}
