//! Users who leave the workers for another process one by one, or come from one, while everybody else goes on. Owns
//! which worker they come to.

use std::os::fd::OwnedFd;

use super::Workers;
use crate::estate::Estate;

impl Workers {
    /// Whether users may leave from now on.
    pub fn let_depart(&self, may: bool) {
        self.ends.iter().for_each(|end| end.link.late.set_open(may));
        self.wake();
    }

    /// Whether they may.
    pub fn lets_depart(&self) -> bool {
        self.ends.iter().any(|end| end.link.late.is_open())
    }

    /// Those who have left.
    pub fn departed(&self) -> Vec<Estate<OwnedFd>> {
        self.ends.iter().flat_map(|end| end.link.late.take_leaving()).collect()
    }

    /// Gives users to the worker of their number, or to another if there is none.
    ///
    /// # Errors
    /// The users: it has yet to take up others.
    pub fn take_in(&self, estate: Estate<OwnedFd>) -> Result<(), Box<Estate<OwnedFd>>> {
        let end = &self.ends[usize::from(estate.worker) % self.ends.len()];
        end.link.late.give(estate)?;
        let _ = end.link.wake.write(1);
        Ok(())
    }
}
