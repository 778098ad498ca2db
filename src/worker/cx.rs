//! What a decision about a session is handed. Owns the one type for it, which TCP's and HTTP's sessions
//! share; what they want done differs, and is the type's parameter.

use super::books::Books;
use crate::base::time::Now;
use crate::ring::pool::Pool;

/// The time, what a decision draws on, and where it puts what is to be done.
pub struct Cx<'a, C> {
    pub now: Now,
    pub pool: &'a mut Pool,
    pub books: &'a mut Books,
    /// Commands for the driver, which carries them out in this order.
    pub out: &'a mut Vec<C>,
}
