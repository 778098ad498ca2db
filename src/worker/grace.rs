//! How long a finished connection is kept open for bytes that the kernel has not delivered yet. Owns
//! the pauses between looks at its send queue, and the time that an order leaves it.

use std::time::Duration;

use crate::session::EndReason;

/// The pause after the first look at a queue that is not empty; it doubles from look to look …
const PAUSE_FIRST: Duration = Duration::from_millis(10);
/// … up to this.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// What an order to end a session leaves for the queue …
pub const ORDERED: Duration = Duration::from_secs(5);
/// … and the order to stop; a worker waits two seconds for all of them (`worker::shell`).
pub const STOP: Duration = Duration::from_secs(1);

/// The pause before the next look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pause(Duration);

impl Pause {
    pub const FIRST: Pause = Pause(PAUSE_FIRST);

    /// How long to pause now; the next pause is longer.
    pub fn take(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (2 * pause).min(PAUSE_MAX);
        pause
    }
}

/// Whether this reason is an order, which ends a session whatever is passing through it.
pub fn is_order(reason: EndReason) -> bool {
    matches!(reason, EndReason::Operator | EndReason::BackendLeft | EndReason::Stopping)
}

/// What an order for this reason leaves for the queue.
pub fn of(order: EndReason) -> Duration {
    if order == EndReason::Stopping { STOP } else { ORDERED }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_half_a_second() {
        let mut pause = Pause::FIRST;
        let pauses = [(); 8].map(|()| pause.take().as_millis());
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 500, 500]);
    }
}
