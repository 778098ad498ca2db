//! HTTP/1.1 as the echo backends speak it, without the socket. Paths: `/bytes/N` answers with
//! content, `/count` with the length of the request's body (which must be content if a generator of
//! ours sent it), `/echo` with the body; all others with a line of text.

use std::io::Write;

use super::Gone;
use crate::http::Limits;
use crate::http::body::{self, Body, Framing};
use crate::http::head::{self, RequestHead, Space, Target};
use crate::load::blocks;
use crate::load::message::Content;
use crate::load::web::{BACKEND, BODY_BYTES_MAX, BYTES_PATH, COUNT_PATH, ECHO_PATH, IDENTITY};
use crate::ring::pool::{Buf, Chain, Pool};

/// How to answer a request once its body has arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Plan {
    Content(usize),
    Count,
    Echo,
    Line,
    TooLong,
}

#[derive(Debug)]
enum State {
    Head,
    Body { body: Body, plan: Plan },
}

/// One HTTP connection.
#[derive(Debug)]
pub struct WebGuest {
    state: State,
    /// The beginning of an incomplete head.
    part: Vec<u8>,
    /// The answer's head, and with `/echo` the body.
    text: Vec<u8>,
    echoed: Vec<u8>,
    /// The generator's name for this request; empty for other users.
    identity: Vec<u8>,
    /// A working copy of the last bytes received.
    copy: Vec<u8>,
    no_body: bool,
    last: bool,
    received: u64,
    corrupt: bool,
}

impl Default for WebGuest {
    fn default() -> WebGuest {
        WebGuest {
            state: State::Head,
            part: Vec::new(),
            text: Vec::new(),
            echoed: Vec::new(),
            identity: Vec::new(),
            copy: Vec::new(),
            no_body: false,
            last: false,
            received: 0,
            corrupt: false,
        }
    }
}

impl WebGuest {
    /// Takes received bytes. True if the connection must end once `out` is sent.
    pub fn received(
        &mut self,
        buf: Buf,
        backend: u32,
        content: &Content,
        pool: &mut Pool,
        out: &mut Chain,
    ) -> Result<bool, Gone> {
        // A body's framing is removed in place, which the pool does not allow.
        let mut bytes = std::mem::take(&mut self.copy);
        bytes.clear();
        bytes.extend_from_slice(pool.bytes(&buf));
        pool.give_back(buf);
        let ends = self.take(&mut bytes, backend, content, pool, out);
        self.copy = bytes;
        ends
    }

    fn take(
        &mut self,
        bytes: &mut [u8],
        backend: u32,
        content: &Content,
        pool: &mut Pool,
        out: &mut Chain,
    ) -> Result<bool, Gone> {
        let mut at = 0;
        loop {
            if let State::Head = self.state {
                if at == bytes.len() {
                    return Ok(false);
                }
                let Some(count) = self.head(&bytes[at..], pool, out)? else { return Ok(false) };
                at += count;
            }
            at += self.body(&mut bytes[at..], content)?;
            let State::Body { body: Body::Length(0), plan } = self.state else { return Ok(false) };
            self.answer(plan, backend, content, pool, out)?;
            self.state = State::Head;
            if self.last {
                return Ok(true);
            }
        }
    }

    fn head(
        &mut self,
        bytes: &[u8],
        pool: &mut Pool,
        out: &mut Chain,
    ) -> Result<Option<usize>, Gone> {
        let mut part = std::mem::take(&mut self.part);
        let before = part.len();
        let whole = if before == 0 {
            bytes
        } else {
            part.extend_from_slice(bytes);
            &part
        };
        let mut space = Space::new();
        let read = head::request(whole, 0, &Limits::default(), &mut space);
        let Some(head) = read.map_err(|_| Gone::Malformed)? else {
            if before == 0 {
                part.extend_from_slice(bytes);
            }
            self.part = part;
            return Ok(None);
        };
        let framing = self.begin(&head)?;
        if head.expects_continue && framing != Framing::None {
            blocks::write(pool, out, b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let length = head.length;
        Ok(Some(length - before))
    }

    fn begin(&mut self, head: &RequestHead<'_, '_>) -> Result<Framing, Gone> {
        let framing = body::of_request(head).map_err(|_| Gone::Malformed)?;
        let path = match head.target {
            Target::Origin(path) | Target::Absolute { path, .. } => path,
            Target::Asterisk => "*",
        };
        let path = path.split('?').next().unwrap_or(path);
        let plan = match path.strip_prefix(BYTES_PATH).map(str::parse::<usize>) {
            Some(Ok(count)) if count <= BODY_BYTES_MAX => Plan::Content(count),
            Some(_) => Plan::TooLong,
            None if path == COUNT_PATH => Plan::Count,
            None if path == ECHO_PATH => Plan::Echo,
            None => Plan::Line,
        };
        self.identity.clear();
        for (_, field) in head.fields.iter() {
            if field.name.eq_ignore_ascii_case(IDENTITY) {
                self.identity.extend_from_slice(field.value);
            }
        }
        self.no_body = head.method == "HEAD";
        self.last = head.connection.close
            || head.version == crate::http::Version::Http10 && !head.connection.keep_alive;
        (self.received, self.corrupt) = (0, false);
        self.echoed.clear();
        self.state = State::Body { body: Body::new(framing, false, u64::MAX), plan };
        Ok(framing)
    }

    /// Takes bytes of the request's body; returns how many belonged to it.
    fn body(&mut self, bytes: &mut [u8], content: &Content) -> Result<usize, Gone> {
        let State::Body { body, plan } = &mut self.state else { return Ok(0) };
        let passed = body.pass(bytes).map_err(|_| Gone::Malformed)?;
        let bytes = &bytes[passed.output.clone()];
        match plan {
            Plan::Count if !self.identity.is_empty() => {
                self.corrupt |= !content.matches(self.received, bytes);
            }
            Plan::Echo if self.echoed.len() + bytes.len() > BODY_BYTES_MAX => {
                *plan = Plan::TooLong;
            }
            Plan::Echo => self.echoed.extend_from_slice(bytes),
            _ => {}
        }
        self.received += bytes.len() as u64;
        if passed.finished {
            *body = Body::Length(0);
        }
        Ok(passed.consumed)
    }

    fn answer(
        &mut self,
        plan: Plan,
        backend: u32,
        content: &Content,
        pool: &mut Pool,
        out: &mut Chain,
    ) -> Result<(), Gone> {
        let mut body = std::mem::take(&mut self.echoed);
        let mut content_bytes = 0;
        let status = match plan {
            Plan::TooLong => "413 Content Too Large",
            Plan::Count if self.corrupt => "422 Unprocessable Content",
            _ => "200 OK",
        };
        match plan {
            Plan::Content(count) => content_bytes = count,
            Plan::Echo => {}
            Plan::Count => writeln!(body, "{}", self.received).expect("memory takes all bytes"),
            Plan::Line => writeln!(body, "backend {backend}").expect("memory takes all bytes"),
            Plan::TooLong => body.clear(),
        }
        let length = body.len() + content_bytes;
        self.text.clear();
        write!(
            self.text,
            "HTTP/1.1 {status}\r\n{BACKEND}: {backend}\r\ncontent-length: {length}\r\n"
        )
        .expect("memory takes all bytes");
        if !self.identity.is_empty() {
            self.text.extend_from_slice(IDENTITY.as_bytes());
            self.text.extend_from_slice(b": ");
            self.text.extend_from_slice(&self.identity);
            self.text.extend_from_slice(b"\r\n");
        }
        if self.last {
            self.text.extend_from_slice(b"connection: close\r\n");
        }
        self.text.extend_from_slice(b"\r\n");
        if self.no_body {
            content_bytes = 0;
            body.clear();
        }
        if body.len() > 512 {
            blocks::write(pool, out, &self.text)?;
            blocks::write(pool, out, &body)?;
        } else {
            self.text.extend_from_slice(&body);
            blocks::write_with_content(pool, out, &self.text, content, 0, content_bytes)?;
        }
        body.clear();
        self.echoed = body;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::pool::Class;

    /// What is answered to these bytes in pieces of every size, and whether the connection ends.
    fn said(request: &str) -> (String, Result<bool, Gone>) {
        let request = request.replace('\n', "\r\n").into_bytes();
        let content = Content::new();
        let mut first = None;
        for piece in [request.len(), 1, 5] {
            let mut pool = Pool::new(256, 64);
            let mut out = Chain::EMPTY;
            let mut guest = WebGuest::default();
            let mut verdict = Ok(false);
            for part in request.chunks(piece) {
                verdict = guest.take(&mut part.to_vec(), 77, &content, &mut pool, &mut out);
                if verdict != Ok(false) {
                    break;
                }
            }
            let bytes: Vec<u8> = pool.pieces(out.outgoing()).flatten().copied().collect();
            pool.give_back_chain(out);
            assert_eq!((pool.free(Class::Small), pool.free(Class::Large)), (256, 64));
            let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
            assert_eq!(*first.get_or_insert((text.clone(), verdict)), (text, verdict));
        }
        first.expect("three ways were tried")
    }

    #[test]
    fn every_path_has_its_answer() {
        for (request, answer) in [
            (
                "GET / HTTP/1.1\nhost: x\n\n",
                "HTTP/1.1 200 OK\nx-lb-backend: 77\ncontent-length: 11\n\nbackend 77\n",
            ),
            (
                "POST /count HTTP/1.1\nhost: x\ncontent-length: 5\n\nhello",
                "HTTP/1.1 200 OK\nx-lb-backend: 77\ncontent-length: 2\n\n5\n",
            ),
            (
                "POST /count HTTP/1.1\nhost: x\ntransfer-encoding: chunked\n\n5\nhello\n0\n\n",
                "HTTP/1.1 200 OK\nx-lb-backend: 77\ncontent-length: 2\n\n5\n",
            ),
            (
                "POST /count HTTP/1.1\nhost: x\nx-lb-bench: 1-1\ncontent-length: 5\n\nhello",
                "HTTP/1.1 422 Unprocessable Content\nx-lb-backend: 77\ncontent-length: 2\n\
                 x-lb-bench: 1-1\n\n5\n",
            ),
            (
                "PUT /echo?a HTTP/1.1\nhost: x\ncontent-length: 5\n\nhello",
                "HTTP/1.1 200 OK\nx-lb-backend: 77\ncontent-length: 5\n\nhello",
            ),
            (
                "HEAD /bytes/9000 HTTP/1.1\nhost: x\n\n",
                "HTTP/1.1 200 OK\nx-lb-backend: 77\ncontent-length: 9000\n\n",
            ),
            (
                "GET /bytes/99999999999 HTTP/1.1\nhost: x\n\n",
                "HTTP/1.1 413 Content Too Large\nx-lb-backend: 77\ncontent-length: 0\n\n",
            ),
        ] {
            assert_eq!(said(request), (answer.to_owned(), Ok(false)), "{request}");
        }
    }

    #[test]
    fn requests_may_follow_without_waiting() {
        let one = "GET / HTTP/1.1\nhost: x\n\n";
        let (text, verdict) = said(&one.repeat(3));
        assert_eq!((text.matches("HTTP/1.1 200 OK").count(), verdict), (3, Ok(false)));
    }

    #[test]
    fn content_is_what_the_generator_expects() {
        let content = Content::new();
        let mut pool = Pool::new(16, 16);
        let mut out = Chain::EMPTY;
        let mut request = b"GET /bytes/100000 HTTP/1.1\r\nhost: x\r\n\r\n".to_vec();
        let mut guest = WebGuest::default();
        assert_eq!(guest.take(&mut request, 1, &content, &mut pool, &mut out), Ok(false));
        let bytes: Vec<u8> = pool.pieces(out.outgoing()).flatten().copied().collect();
        assert!(content.matches(0, &bytes[bytes.len() - 100_000..]));
        pool.give_back_chain(out);
    }

    #[test]
    fn the_peer_decides_when_it_is_the_last_and_nonsense_ends_it() {
        let (text, verdict) = said("GET / HTTP/1.1\nhost: x\nconnection: close\n\n");
        assert!(text.contains("connection: close\n"));
        assert_eq!(verdict, Ok(true));
        assert_eq!(said("GET / HTTP/1.0\n\n").1, Ok(true));
        assert_eq!(said("hello\n\n").1, Err(Gone::Malformed));
    }
}
