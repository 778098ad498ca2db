//! One request on a stream of its own: its body goes out as far as the server's windows allow, and what
//! comes back is checked. Owns what is known of one response; its connection polls it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};

use super::super::message::{Content, PERIOD};
use super::super::tally::RequestFailure;
use super::super::web::{self, BACKEND, IDENTITY, Payload, Response};
use super::template::Template;
use crate::base::time::Now;

/// The most of a body that is handed to h2 at once: a frame of the length that every server takes.
const PIECE_BYTES: usize = 16 << 10;
const _: () = assert!(PIECE_BYTES <= PERIOD);

#[derive(Debug)]
pub struct Stream {
    connection: u32,
    sequence: u64,
    /// When the request was sent or due, and when it was sent.
    pub since: Now,
    pub sent: Now,
    /// What is still to be sent of its body goes here.
    outgoing: Option<SendStream<Bytes>>,
    outgoing_bytes: usize,
    incoming: Incoming,
    response: Response,
    /// Bytes of the body so far.
    position: u64,
}

#[derive(Debug)]
enum Incoming {
    Head(ResponseFuture),
    Body(RecvStream),
}

impl Stream {
    /// A request whose head is under way; `outgoing` if its body follows.
    pub fn new(
        (connection, sequence): (u32, u64),
        (since, sent): (Now, Now),
        response: ResponseFuture,
        outgoing: Option<SendStream<Bytes>>,
    ) -> Stream {
        Stream {
            connection,
            sequence,
            since,
            sent,
            outgoing,
            outgoing_bytes: 0,
            incoming: Incoming::Head(response),
            response: Response { backend: 0, status: 0, bytes: 0, last: false },
            position: 0,
        }
    }

    /// Sends and takes what can be; ready once the response is complete or cannot become so. A stream that
    /// is dropped before its end is cancelled.
    pub fn advance(
        &mut self,
        template: &Template,
        content: &Content,
        context: &mut Context<'_>,
    ) -> Poll<Result<Response, RequestFailure>> {
        self.send(&template.request.payload, content, context);
        loop {
            match &mut self.incoming {
                Incoming::Head(response) => match Pin::new(response).poll(context) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(failure(&error))),
                    Poll::Ready(Ok(response)) => self.head(response)?,
                },
                Incoming::Body(body) => match body.poll_data(context) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(failure(&error))),
                    Poll::Ready(Some(Ok(bytes))) => self.body(template, content, &bytes)?,
                    Poll::Ready(None) => return Poll::Ready(self.end(template)),
                },
            }
        }
    }

    /// Sends of the body what the windows allow. If the server wants no more of it, its response says why.
    fn send(&mut self, payload: &Payload, content: &Content, context: &mut Context<'_>) {
        while let Some(outgoing) = &mut self.outgoing {
            let left = payload.len() - self.outgoing_bytes;
            outgoing.reserve_capacity(left.min(PIECE_BYTES));
            let room = outgoing.capacity();
            if room == 0 {
                match outgoing.poll_capacity(context) {
                    Poll::Pending => return,
                    Poll::Ready(Some(Ok(_))) => continue,
                    Poll::Ready(None | Some(Err(_))) => return self.outgoing = None,
                }
            }
            let count = left.min(room).min(PIECE_BYTES);
            let piece = match payload {
                Payload::Bytes(bytes) => &bytes[self.outgoing_bytes..self.outgoing_bytes + count],
                _ => content.from(self.outgoing_bytes as u64, count),
            };
            let sent = outgoing.send_data(Bytes::copy_from_slice(piece), count == left);
            self.outgoing_bytes += count;
            if sent.is_err() || count == left {
                self.outgoing = None;
            }
        }
    }

    fn head(&mut self, head: http::Response<RecvStream>) -> Result<(), RequestFailure> {
        self.response.status = head.status().as_u16();
        if let Some(identity) = head.headers().get(IDENTITY) {
            web::check_identity(identity.as_bytes(), self.connection, self.sequence)?;
        }
        let backend = head.headers().get(BACKEND);
        self.response.backend = backend.map_or(0, |value| web::backend(value.as_bytes()));
        self.incoming = Incoming::Body(head.into_body());
        Ok(())
    }

    fn body(
        &mut self,
        template: &Template,
        content: &Content,
        bytes: &Bytes,
    ) -> Result<(), RequestFailure> {
        if self.is_known() && !template.request.allows(content, self.position, bytes) {
            return Err(RequestFailure::Corrupt);
        }
        self.position += bytes.len() as u64;
        self.response.bytes += bytes.len() as u64;
        match &mut self.incoming {
            Incoming::Body(body) => {
                let released = body.flow_control().release_capacity(bytes.len());
                released.map_err(|error| failure(&error))
            }
            Incoming::Head(_) => Ok(()),
        }
    }

    fn end(&self, template: &Template) -> Result<Response, RequestFailure> {
        if self.is_known() && !template.request.is_whole(self.position) {
            return Err(RequestFailure::Corrupt);
        }
        Ok(self.response)
    }

    /// Whether it comes from a backend of ours, whose body is known.
    fn is_known(&self) -> bool {
        self.response.backend != 0 && self.response.status < 300
    }
}

/// What an error of h2 means for a request.
pub fn failure(error: &h2::Error) -> RequestFailure {
    match (error.is_remote(), error.reason()) {
        (true, _) if error.is_go_away() => RequestFailure::GoAway,
        (true, Some(Reason::REFUSED_STREAM)) => RequestFailure::StreamRefused,
        (true, _) => RequestFailure::StreamReset,
        _ if error.is_io() => RequestFailure::Closed,
        // h2 has found something that HTTP/2 forbids.
        _ => RequestFailure::Malformed,
    }
}
