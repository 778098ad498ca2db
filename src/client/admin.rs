//! Reads the admin door of a running balancer, and requests changes over it. Owns the requests;
//! what the answers mean is `control::status`.

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::handshake;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::http::request::Builder;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::control::history::STEPS;
use crate::control::history::page::{Field, HistoryPage, ManyHistories};
use crate::control::status::{Changed, Problem, SessionStatus, SessionsPage, Status};

/// How long one answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Limit on one answer; the admin door says nothing longer.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// How many sessions are requested at a time.
const PAGE: usize = 10_000;

/// The balancer as a whole.
///
/// # Errors
/// One sentence with the cure.
pub async fn status(admin: &str) -> Result<Status, String> {
    read(admin, "/status", &get(admin, "/status").await?)
}

/// The same, as the text that the balancer sent.
///
/// # Errors
/// One sentence with the cure.
pub async fn status_text(admin: &str) -> Result<Bytes, String> {
    get(admin, "/status").await
}

/// Reads what [`status_text`] has returned.
///
/// # Errors
/// One sentence with the cure.
pub fn read_status(admin: &str, text: &[u8]) -> Result<Status, String> {
    read(admin, "/status", text)
}

/// Whether the balancer should be sent users.
///
/// # Errors
/// Why not, or that it does not answer.
pub async fn health(admin: &str) -> Result<(), String> {
    get(admin, "/healthz?users").await.map(drop)
}

/// Up to `most` sessions that pass these filters, page by page from `after` on, and where the rest begins if
/// there are more. The filters are those of `/sessions`.
///
/// # Errors
/// One sentence with the cure.
pub async fn sessions(
    admin: &str,
    filters: &[(&str, String)],
    after: Option<&str>,
    most: usize,
) -> Result<(Vec<SessionStatus>, Option<String>), String> {
    let filter = |(key, value): &(&str, String)| format!("&{key}={}", quoted(value));
    let of: String = filters.iter().map(filter).collect();
    let mut sessions = Vec::new();
    let mut after = after.map(|after| format!("&after={}", quoted(after))).unwrap_or_default();
    loop {
        let limit = PAGE.min(most - sessions.len());
        let path = format!("/sessions?limit={limit}{of}{after}");
        let page: SessionsPage = read(admin, "/sessions", &get(admin, &path).await?)?;
        sessions.extend(page.sessions);
        match page.next {
            Some(next) if sessions.len() < most => after = format!("&after={next}"),
            next => return Ok((sessions, next)),
        }
    }
}

fn quoted(name: &str) -> String {
    form_urlencoded::byte_serialize(name.as_bytes()).collect()
}

/// The first sessions of one backend or service (`key` says which), at most `most`, and whether there are more.
///
/// # Errors
/// One sentence with the cure.
pub async fn sessions_of(
    admin: &str,
    key: &str,
    name: &str,
    most: usize,
) -> Result<(Vec<SessionStatus>, bool), String> {
    let path = format!("/sessions?{key}={}&limit={most}", quoted(name));
    let page: SessionsPage = read(admin, "/sessions", &get(admin, &path).await?)?;
    Ok((page.sessions, page.next.is_some()))
}

/// The last 15 minutes, of one service or of the whole; these fields, or all.
///
/// # Errors
/// One sentence with the cure.
pub async fn history(
    admin: &str,
    service: Option<&str>,
    fields: Option<Field>,
) -> Result<HistoryPage, String> {
    let of = service.map(|name| format!("service={}", quoted(name)));
    let fields = fields.map(|field| format!("fields={}", field.name()));
    let query: Vec<String> = of.into_iter().chain(fields).collect();
    let path = format!("/history?{}", query.join("&"));
    read(admin, "/history", &get(admin, &path).await?)
}

/// One field of these services over the last 15 minutes.
///
/// # Errors
/// One sentence with the cure.
pub async fn histories(
    admin: &str,
    services: &[String],
    field: Field,
) -> Result<ManyHistories, String> {
    let of: String = services.iter().map(|name| format!("&service={}", quoted(name))).collect();
    let path = format!("/history/services?last={STEPS}&fields={}{of}", field.name());
    read(admin, "/history/services", &get(admin, &path).await?)
}

/// Requests a change (see `control::verbs`), with one of the balancer's tokens if there is one.
/// # Errors
/// One sentence with the cure.
pub async fn change(admin: &str, path: &str, token: Option<&str>) -> Result<Changed, String> {
    let request = Request::post(path);
    let request = match token {
        Some(token) => request.header(AUTHORIZATION, format!("Bearer {token}")),
        None => request,
    };
    read(admin, path, &ask(admin, request).await?)
}

async fn get(admin: &str, path: &str) -> Result<Bytes, String> {
    ask(admin, Request::get(path)).await
}

async fn ask(admin: &str, request: Builder) -> Result<Bytes, String> {
    match timeout(ANSWER_WITHIN, answer(admin, request)).await {
        Ok(answer) => answer,
        Err(_) => Err(format!(
            "the admin door at {admin} does not answer within {} s; is it another program's port?",
            ANSWER_WITHIN.as_secs()
        )),
    }
}

async fn answer(admin: &str, request: Builder) -> Result<Bytes, String> {
    let has_token = request.headers_ref().is_some_and(|them| them.contains_key(AUTHORIZATION));
    let stream = connect(admin).await?;
    let strange = |what: &dyn std::fmt::Display| match is_socket(admin) {
        true => format!(
            "{admin} lets in root and the balancer's own user only ({what}); use sudo, or check --admin"
        ),
        false => {
            format!("what listens at {admin} does not answer as a balancer's admin door: {what}")
        }
    };
    let (mut sender, connection) =
        handshake(TokioIo::new(stream)).await.map_err(|error| strange(&error))?;
    tokio::spawn(connection);
    let host = if is_socket(admin) { "localhost" } else { admin };
    let request =
        request.header(HOST, host).body(Empty::<Bytes>::new()).map_err(|error| strange(&error))?;
    let response = sender.send_request(request).await.map_err(|error| strange(&error))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
    let body = body.collect().await.map_err(|error| strange(&error))?.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    let problem = serde_json::from_slice(&body).map(|problem: Problem| problem.error);
    let problem = problem.unwrap_or(status.to_string());
    let cure = match (status, has_token) {
        (StatusCode::UNAUTHORIZED, true) => "; --token-file has another token than the balancer",
        (StatusCode::UNAUTHORIZED, false) => {
            "; name that file with --token-file, or as root the path of [admin] socket with --admin"
        }
        _ => "",
    };
    Err(format!("the admin door at {admin} refused: {problem}{cure}"))
}

/// Whether an admin door is the path of a unix socket.
pub fn is_socket(admin: &str) -> bool {
    admin.contains('/')
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Whether anybody is to be asked there, even if they do not answer.
pub async fn is_there(admin: &str) -> bool {
    let nobody = [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound];
    open(admin).await.err().is_none_or(|error| !nobody.contains(&error.kind()))
}

async fn open(admin: &str) -> io::Result<Box<dyn Stream>> {
    match is_socket(admin) {
        true => UnixStream::connect(admin).await.map(|it| Box::new(it) as _),
        false => TcpStream::connect(admin).await.map(|it| Box::new(it) as _),
    }
}

async fn connect(admin: &str) -> Result<Box<dyn Stream>, String> {
    open(admin).await.map_err(|error| match (is_socket(admin), error.kind()) {
        (true, io::ErrorKind::PermissionDenied) => {
            format!("the admin socket at {admin} is for root and the balancer's own user; use sudo")
        }
        (true, _) => format!(
            "the admin socket at {admin} cannot be reached: {error}; start `lb serve` with that as its \
             [admin] socket"
        ),
        _ => format!(
            "the admin door at {admin} cannot be reached: {error}; start `lb serve` or name its \
             door with --admin"
        ),
    })
}

fn read<T: DeserializeOwned>(admin: &str, path: &str, body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| {
        format!(
            "{path} of {admin} is not what this program expects ({error}); use the `lb` of the same \
             version as the balancer"
        )
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpListener;

    use super::*;
    use crate::control::status::SCHEMA;

    /// A door that gives these answers, one per connection, and reports what it was asked.
    async fn door(answers: Vec<String>) -> (String, tokio::task::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = tokio::spawn(async move {
            let mut asked = Vec::new();
            for answer in answers {
                let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                asked.push(line.trim_end().to_owned());
                while line.trim_end() != "" {
                    line.clear();
                    stream.read_line(&mut line).await.unwrap();
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            asked
        });
        (address, asked)
    }

    fn http(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    fn page(ids: &[&str], next: Option<&str>) -> String {
        let session = |id: &&str| SessionStatus::example(id, "tcp");
        let sessions = ids.iter().map(session).collect();
        let page = SessionsPage { schema: SCHEMA, sessions, next: next.map(str::to_owned) };
        http("200 OK", &serde_json::to_string(&page).unwrap())
    }

    #[tokio::test]
    async fn sessions_are_read_page_by_page() {
        let (door, asked) = door(vec![page(&["a", "b"], Some("0-1-1")), page(&["c"], None)]).await;
        let (read, more) =
            sessions(&door, &[("service", "shop".to_owned())], None, 5).await.unwrap();
        let ids: Vec<&str> = read.iter().map(|session| session.id.as_str()).collect();
        assert_eq!((ids, more), (vec!["a", "b", "c"], None));
        assert_eq!(
            asked.await.unwrap(),
            [
                "GET /sessions?limit=5&service=shop HTTP/1.1",
                "GET /sessions?limit=3&service=shop&after=0-1-1 HTTP/1.1"
            ]
        );
    }

    #[tokio::test]
    async fn no_more_sessions_are_read_than_asked_for() {
        let (door, _) = door(vec![page(&["a", "b"], Some("0-1-1"))]).await;
        let (read, more) = sessions(&door, &[], None, 2).await.unwrap();
        assert_eq!((read.len(), more.as_deref()), (2, Some("0-1-1")));
    }

    #[tokio::test]
    async fn every_way_in_which_it_can_fail_is_one_sentence() {
        for (answer, said) in [
            (http("404 Not Found", r#"{"error":"there is no /status"}"#), "there is no /status"),
            (http("500 Internal Server Error", "oh"), "500 Internal Server Error"),
            (http("200 OK", "{}"), "use the `lb` of the same version"),
            ("SSH-2.0-OpenSSH\r\n".to_owned(), "does not answer as a balancer's admin door"),
        ] {
            let (door, _) = door(vec![answer]).await;
            let told = status(&door).await.unwrap_err();
            assert!(told.contains(said) && !told.contains('\n'), "{told}");
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let nobody = listener.local_addr().unwrap().to_string();
        drop(listener);
        let told = status(&nobody).await.unwrap_err();
        assert!(told.contains("start `lb serve` or name its door with --admin"), "{told}");
    }
}
