//! Live handover: a running balancer starts its successor and leaves it everything, and no session ends. Owns
//! what the two processes say to each other, and how; `estate` is what is left, `control::succession` the
//! order of the steps in both of them.
//!
//! ```text
//! old  serving --asked--> starting --offer--> frozen ----------- token gone --> lingering --> exit
//!                 ^          |                   |                   ^
//!                 +--- no ---+ <-- takes token --+                   |
//! new           born --hello, settings, rings, doors--> offered --state--> checked --token--> serving
//! ```
//!
//! Until the new process has taken the token, the old one can take it instead and go on as if nothing had
//! been; the kernel gives it to one of them, whoever dies when. Only a process that this program has started
//! itself is left anything: it is a child whose standard input is one end of the [`channel`], and nobody can
//! connect to that.

pub mod channel;
pub mod predecessor;
pub mod rehearsal;
pub mod successor;
pub mod words;

/// Why descriptors could not be made or passed on, and the cure.
pub fn out_of_descriptors(error: &std::io::Error) -> String {
    format!("out of descriptors ({error}): raise `ulimit -n` or LimitNOFILE")
}
