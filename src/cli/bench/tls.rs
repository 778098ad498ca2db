//! The flags of `lb bench` about TLS. Owns what they mean together; connections are made elsewhere.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::tls::client::{Alpn, Group, Terms, Trust, Wishes};
use crate::tls::keys::Files;

/// TLS with what is measured.
#[derive(Args, Debug)]
pub struct Flags {
    /// Speak TLS: HTTPS as an API user, else TLS over TCP. The report tells of the handshakes too.
    #[arg(long)]
    tls: bool,
    /// The host to ask for (SNI), which the certificate must be for; otherwise the one in --to.
    #[arg(long, value_name = "HOST", requires = "tls", requires = "to")]
    tls_name: Option<String>,
    /// Trust the authorities in this file (PEM), instead of those that this host trusts.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls",
        requires = "to",
        conflicts_with = "insecure"
    )]
    tls_ca: Option<PathBuf>,
    /// Trust anybody. Neither the certificate nor the signature made with it is looked at, which takes
    /// less of the generator's time.
    #[arg(long, requires = "tls")]
    insecure: bool,
    /// Take up earlier sessions, as users who come back do; without it every handshake is made in full.
    #[arg(long, requires = "tls")]
    tls_resume: bool,
    /// Agree on keys in this way only; otherwise in the first of them that the server knows.
    #[arg(long, value_name = "GROUP", requires = "tls", value_parser = group())]
    tls_group: Option<Group>,
}

fn group() -> impl TypedValueParser<Value = Group> {
    PossibleValuesParser::new(Group::ALL.map(Group::name)).map(|word| {
        let found = Group::ALL.into_iter().find(|group| group.name() == word);
        found.expect("clap lets only these names through")
    })
}

impl Flags {
    pub fn is_on(&self) -> bool {
        self.tls
    }

    /// The host to ask for, if it was named.
    pub fn name(&self) -> Option<&str> {
        self.tls_name.as_deref()
    }

    /// How to connect to a server at this address, if under TLS.
    ///
    /// # Errors
    /// One sentence on what cannot be used.
    pub fn terms(&self, to: &str, alpn: Option<Alpn>) -> Result<Option<Terms>, String> {
        let host = to.rsplit_once(':').map_or(to, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let trust = match (&self.tls_ca, self.insecure) {
            (Some(path), _) => Trust::File(path.clone()),
            (None, true) => Trust::Anybody,
            (None, false) => Trust::Host,
        };
        self.agreed(self.name().unwrap_or(host), trust, alpn)
    }

    /// The same for a balancer of one's own, with this certificate.
    ///
    /// # Errors
    /// As [`Flags::terms`].
    pub fn own_terms(&self, files: &Files, alpn: Option<Alpn>) -> Result<Option<Terms>, String> {
        let trust = match self.insecure {
            true => Trust::Anybody,
            false => Trust::File(files.certificate.clone()),
        };
        self.agreed("localhost", trust, alpn)
    }

    fn agreed(
        &self,
        name: &str,
        trust: Trust,
        alpn: Option<Alpn>,
    ) -> Result<Option<Terms>, String> {
        let (name, resumes, group) = (name.to_owned(), self.tls_resume, self.tls_group);
        let wishes = Wishes { name, trust, resumes, group, alpn };
        self.tls.then(|| Terms::new(&wishes)).transpose()
    }
}
