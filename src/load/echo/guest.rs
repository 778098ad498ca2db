//! One connection to an echo backend, without its socket: what becomes of received bytes. Knows the
//! pool, but no ring.

use super::Gone;
use super::web::WebGuest;
use crate::load::blocks;
use crate::load::message::{Content, HEAD_BYTES, Head, Kind};
use crate::ring::pool::{Buf, Chain, Pool};

/// A first message up to this length is copied behind its new head, so that the answer is one block
/// and not a gathered send.
const SHORT_BYTES: usize = 512;

/// What a connection has turned out to be.
pub enum Guest {
    /// Nothing has arrived yet.
    New,
    /// Everything goes back.
    Echo,
    /// Endless content is sent.
    Source,
    /// Content is received and checked; the count goes back at the end.
    Sink { head: Head, received: u64 },
    /// HTTP/1.1.
    Web(Box<WebGuest>),
}

impl Guest {
    /// Takes received bytes, and appends to `out` what to send. True if the connection ends once
    /// that is sent.
    pub fn received(
        &mut self,
        buf: Buf,
        backend: u32,
        content: &Content,
        pool: &mut Pool,
        out: &mut Chain,
    ) -> Result<bool, Gone> {
        match self {
            Guest::New => self.first(buf, backend, content, pool, out),
            Guest::Echo => {
                blocks::push_or_return(pool, out, buf);
                Ok(false)
            }
            Guest::Source => {
                pool.give_back(buf);
                Ok(false)
            }
            Guest::Sink { received, .. } => {
                let bytes = pool.bytes(&buf);
                let same = content.matches(*received, bytes);
                *received += bytes.len() as u64;
                pool.give_back(buf);
                if same { Ok(false) } else { Err(Gone::Corrupt) }
            }
            Guest::Web(web) => web.received(buf, backend, content, pool, out),
        }
    }

    /// The peer has finished; says what is left to say.
    pub fn finish(&mut self, pool: &mut Pool, out: &mut Chain) -> Result<(), Gone> {
        if let Guest::Sink { head, received } = self {
            let count = Head { sequence: *received, ..*head };
            blocks::write(pool, out, &count.encode())?;
        }
        Ok(())
    }

    /// The first bytes of a stream decide what it is. They are in one piece unless someone splits
    /// them, and then it is a plain echo.
    fn first(
        &mut self,
        mut buf: Buf,
        backend: u32,
        content: &Content,
        pool: &mut Pool,
        out: &mut Chain,
    ) -> Result<bool, Gone> {
        let Some(head) = Head::decode(pool.bytes(&buf)) else {
            *self = Guest::Echo;
            return self.received(buf, backend, content, pool, out);
        };
        let head = Head { backend, ..head };
        *self = match head.kind {
            Kind::Echo => Guest::Echo,
            Kind::Source => Guest::Source,
            Kind::Sink => Guest::Sink { head, received: 0 },
        };
        if head.kind == Kind::Echo && buf.len() <= SHORT_BYTES {
            let mut short = [0; SHORT_BYTES];
            let message = &mut short[..buf.len()];
            message.copy_from_slice(pool.bytes(&buf));
            message[..HEAD_BYTES].copy_from_slice(&head.encode());
            pool.give_back(buf);
            blocks::write(pool, out, message)?;
            return Ok(false);
        }
        if head.kind != Kind::Sink {
            blocks::write(pool, out, &head.encode())?;
        }
        pool.skip(&mut buf, HEAD_BYTES);
        if buf.is_empty() {
            pool.give_back(buf);
            return Ok(false);
        }
        self.received(buf, backend, content, pool, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::pool::Class;

    fn take(pool: &mut Pool, bytes: &[u8]) -> Buf {
        let mut buf = pool.take(Class::Small).unwrap();
        pool.append(&mut buf, bytes);
        buf
    }

    /// What a guest answers to these pieces, and whether it has ended the connection.
    fn said(pieces: &[&[u8]]) -> (Vec<u8>, Result<(), Gone>) {
        let content = Content::new();
        let mut pool = Pool::new(64, 0);
        let mut guest = Guest::New;
        let mut out = Chain::EMPTY;
        let mut verdict = Ok(false);
        for piece in pieces {
            let buf = take(&mut pool, piece);
            verdict = verdict.and(guest.received(buf, 77, &content, &mut pool, &mut out));
        }
        let verdict = verdict.and_then(|_| guest.finish(&mut pool, &mut out));
        let bytes = pool.pieces(out.outgoing()).flatten().copied().collect();
        pool.give_back_chain(out);
        assert_eq!(pool.free(Class::Small), 64, "every block came back");
        (bytes, verdict)
    }

    fn head(kind: Kind) -> Head {
        Head { kind, connection: 4, backend: 0, sequence: 1 }
    }

    #[test]
    fn strangers_get_their_own_bytes_back() {
        assert_eq!(said(&[b"hello", b" there"]), (b"hello there".to_vec(), Ok(())));
        let cut = head(Kind::Echo).encode();
        assert_eq!(said(&[&cut[..5], &cut[5..]]), (cut.to_vec(), Ok(())));
    }

    #[test]
    fn the_generator_is_told_who_answers() {
        let mut message = head(Kind::Echo).encode().to_vec();
        message.extend_from_slice(b"content");
        let (bytes, verdict) = said(&[&message, b" and more"]);
        assert_eq!(verdict, Ok(()));
        assert_eq!(Head::decode(&bytes), Some(Head { backend: 77, ..head(Kind::Echo) }));
        assert_eq!(&bytes[HEAD_BYTES..], b"content and more");
    }

    #[test]
    fn a_sink_counts_and_checks() {
        let content = Content::new();
        let first = [&head(Kind::Sink).encode()[..], content.from(0, 100)].concat();
        let (bytes, verdict) = said(&[&first, content.from(100, 900)]);
        assert_eq!(verdict, Ok(()));
        let count = Head { backend: 77, sequence: 1_000, ..head(Kind::Sink) };
        assert_eq!(Head::decode(&bytes), Some(count));
        let (_, verdict) = said(&[&first, content.from(101, 900)]);
        assert_eq!(verdict, Err(Gone::Corrupt));
    }

    #[test]
    fn a_source_opens_with_its_head() {
        let (bytes, verdict) = said(&[&head(Kind::Source).encode(), b"ignored"]);
        assert_eq!(verdict, Ok(()));
        assert_eq!(bytes, Head { backend: 77, ..head(Kind::Source) }.encode());
    }
}
