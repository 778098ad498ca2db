//! The context of a decision about a session. Owns the one type for it, which TCP's and HTTP's
//! sessions share; their commands differ, and are the type's parameter.

use super::books::Books;
use crate::base::time::Now;
use crate::ring::pool::Pool;

/// The time, the resources of a decision, and the list that takes its commands.
pub struct Cx<'a, C> {
    pub now: Now,
    pub pool: &'a mut Pool,
    pub books: &'a mut Books,
    /// Commands for the driver, which carries them out in this order.
    pub out: &'a mut Vec<C>,
}
