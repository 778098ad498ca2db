//! Steps of a handover at which a test may end or stop a process. Owns nothing in a program that is not built
//! for debugging.

use std::time::Duration;

use tracing::info;

/// For how long.
const PAUSE: Duration = Duration::from_secs(2);

/// Waits here if the environment says so, in a build for debugging.
pub fn pause_at(step: &str) {
    if cfg!(debug_assertions) && std::env::var("LB_PAUSE_AT").is_ok_and(|at| at == step) {
        info!(at = step, "pausing");
        std::thread::sleep(PAUSE);
    }
}
