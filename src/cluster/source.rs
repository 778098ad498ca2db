//! Where backends come from. Owns the kinds of source and the words for each. A new kind is a new
//! variant here; the code that applies changes never asks for the kind of a source.

/// Every backend belongs to one source. Only that source, besides the operator, may change the backend or
/// take it out, and when the source is lost, so are all of its backends. One that other balancers have
/// registered, too, then goes on as theirs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Source {
    /// A control connection. Its number is never used again in the life of a process.
    Connection(u64),
    /// The configuration file, which is read at the start and by each reload.
    File,
    /// Other balancers of the cluster, however many: somebody has registered at them.
    Cluster,
}

impl Source {
    /// Whether one backend may be registered by both: what other balancers say never stands against what is
    /// said here.
    pub fn agrees_with(self, other: Source) -> bool {
        self == other || self == Source::Cluster || other == Source::Cluster
    }

    /// The number of the connection, if it is one.
    pub const fn connection(self) -> Option<u64> {
        match self {
            Source::Connection(number) => Some(number),
            Source::File | Source::Cluster => None,
        }
    }

    /// How its backends are registered, in the words of a message to the source itself.
    pub const fn own_way(self) -> &'static str {
        match self {
            Source::Connection(_) => "over this connection",
            Source::File => "in the configuration",
            Source::Cluster => "at another balancer",
        }
    }

    /// The same, in a message to any other source.
    pub const fn other_way(self) -> &'static str {
        match self {
            Source::Connection(_) => "over another connection",
            Source::File => "in the configuration",
            Source::Cluster => "at another balancer",
        }
    }

    /// Why a backend that its source took out has left, in the words of the log.
    pub const fn why_left(self) -> &'static str {
        match self {
            Source::Connection(_) => "unregistered",
            Source::File => "no longer in the configuration",
            Source::Cluster => "unregistered at another balancer",
        }
    }
}
