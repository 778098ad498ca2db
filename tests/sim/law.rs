//! How a broken law is reported.

/// Names the laws; the name is what a failing run shows.
macro_rules! laws {
    ($($name:ident = $text:literal;)*) => {
        $(pub const $name: &str = $text;)*
    };
}

laws! {
    BYTES = "no byte is lost, doubled, reordered or given to the wrong peer";
    FIN = "a FIN is passed on after all bytes, and only for a true end";
    TRUNCATED = "a truncated stream never ends with a clean FIN";
    PARTS = "a session waits for what its peers have not got yet";
    VANISHED = "a host that owes an answer for a minute is given up";
    CLEAN = "two true ends are not turned into a reset";
    ONE_EACH = "one receive and one send are in flight per side at most";
    AFTER_END = "nothing is asked of a side that has ended";
    SETTLED = "every operation is over before Close";
    CANCEL = "a cancel is meant for something in flight, and asked once";
    BLOCKS = "every block comes back";
    BOUNDED = "a flow holds a bounded share of the blocks";
    SPARING = "while blocks are scarce, none is asked for before its bytes have somewhere to go";
    PIPES = "a flow that is spliced has one pipe, and every pipe comes back";
    BOOKS = "table, seats, gauges and reports agree with the sessions";
    COUNTED = "the bytes reported are the bytes delivered";
    STAYS = "a session stays on its backend, which was in the rotation";
    RETRY = "a retry offers a backend that was not tried, and none after three have failed";
    NEXT = "want of a port towards one backend leads to the next";
    REASON = "a session ends for the reason that is reported";
    DEADLINE = "deadlines are kept, not early and not late";
    PROGRESS = "who makes progress finishes";
    WAKE = "nothing that could move lies still";
    SPIN = "waiting for blocks costs no turns";
    ORDERS = "an order is carried out at once";
    STILL = "no byte moves in a worker that stands still";
    TURNED_AWAY = "a user is turned away only for want of a backend or a seat";
}

/// Stops the run unless the law holds.
#[track_caller]
pub fn check(holds: bool, law: &str, what: impl FnOnce() -> String) {
    if !holds {
        panic!("broken law: {law}: {}", what());
    }
}
