//! How a backend is reached that a session was given, as far as a worker has to look it up.

use nix::errno::Errno;

use super::{Books, Choice};
use crate::cluster::{Protocol, ServiceId};
use crate::tls::backends::BackendSpeech;
use crate::worker::opening::Opening;

impl Books {
    /// How TLS is spoken with a backend that was picked, if it is reached by that. One that has left meanwhile
    /// is refused.
    ///
    /// # Errors
    /// It is not known any more how.
    pub fn opening(
        &self,
        service: ServiceId,
        choice: Choice,
        is_late: bool,
    ) -> Result<Option<Opening>, Errno> {
        if !choice.tls {
            return Ok(None);
        }
        let found = self.snapshot.service(service).ok_or(Errno::ECONNABORTED)?;
        let backend = found.pool.get(choice.backend).ok_or(Errno::ECONNABORTED)?;
        let tls = backend.tls.as_ref().ok_or(Errno::ECONNABORTED)?;
        let speech = match (found.kind, choice.http2) {
            (Protocol::Api, true) => BackendSpeech::Http2,
            (Protocol::Api, false) => BackendSpeech::Http1,
            _ => BackendSpeech::Anything,
        };
        let client = self.tls().backends.client(tls, backend.address.ip(), speech);
        Ok(Some(Opening { backend: choice.backend.0, client, is_late }))
    }
}
