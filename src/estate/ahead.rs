//! Sockets of TCP sessions that travel before everything else, while the sessions still move bytes where they are:
//! most of the time that a handover takes goes into sockets. Owns the form and its bounds; what is said of such a
//! session later names it by its number.

/// The most sessions whose sockets travel together: as many as one message's descriptors. The sender has that many
/// duplicates for a moment.
pub const SESSIONS_MAX: usize = 126;

/// Some sessions of one worker.
#[derive(Debug)]
pub struct Ahead<S> {
    /// Its number.
    pub worker: u8,
    /// The number of the first of these sessions; those of a worker are numbered from zero.
    pub first: u32,
    /// The two sockets of each, the client's and then the backend's.
    pub sockets: Vec<[S; 2]>,
}
