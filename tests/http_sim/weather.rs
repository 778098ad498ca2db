//! What a run is like, drawn from its seed.

use crate::dice::Dice;

/// Small blocks of a pool that never runs short.
pub const SMALL: usize = 512;

/// What a run is like.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Nothing goes wrong: every request must be served.
    pub calm: bool,
    /// Most users never read anything, and there are hardly any blocks: those who read are served.
    pub stalled: bool,
    /// Both sides send bytes that are wrong. What they mean is anyone's guess, so only the laws
    /// about what is plain, held and left over are checked.
    pub noisy: bool,
    /// At some point the operator drains, ends what runs on a backend, or takes one away.
    pub upheaval: bool,
    pub clients: usize,
    /// How many services share the door. With more than one, each request names its own by its host.
    pub services: usize,
    pub backends: usize,
    /// Which of them speak HTTP/2: one bit for each.
    pub http2: u32,
    /// Limit on the content bytes of a message.
    pub longest: usize,
    pub small_blocks: usize,
    pub receive_cap: bool,
    /// Limit on what heads under way may occupy. In calm weather it must not turn anybody away.
    pub held_max: usize,
    /// How many users there may be at once; others are turned away.
    pub seats: usize,
    /// How users log in; backends take every scheme to hold for the connection.
    pub scheme: &'static str,
}

pub fn weather(seed: u64) -> Weather {
    let mut dice = Dice::new(seed ^ 0xabcdef);
    Weather {
        calm: seed.is_multiple_of(3),
        stalled: false,
        noisy: seed % 6 == 1,
        upheaval: seed % 4 == 2,
        clients: 1 + dice.below(8),
        services: 1,
        backends: 1 + dice.below(3),
        http2: 0,
        longest: dice.pick(&[50, 3_000, 300_000]),
        // Hardly any blocks, or plenty. In calm weather a lack of them must not turn anybody away.
        small_blocks: if seed.is_multiple_of(5) && !seed.is_multiple_of(3) { 96 } else { SMALL },
        receive_cap: dice.one_in(2),
        held_max: if seed % 3 == 1 && dice.one_in(2) { 8 << 10 } else { 6 << 20 },
        scheme: "NTLM",
        seats: if !seed.is_multiple_of(3) && dice.one_in(8) { 2 } else { 1000 },
    }
}

/// Nothing is wrong, except that most users read nothing.
pub fn stalled(seed: u64) -> Weather {
    let mut dice = Dice::new(seed ^ 0xfedcba);
    Weather {
        calm: true,
        stalled: true,
        noisy: false,
        upheaval: false,
        clients: 40,
        services: 1,
        backends: 1 + dice.below(3),
        http2: 0,
        longest: 300_000,
        small_blocks: 32 + dice.below(16),
        receive_cap: dice.one_in(2),
        held_max: 6 << 20,
        scheme: "NTLM",
        seats: 1000,
    }
}

/// The same with two services, each of which has as many backends.
pub fn shared(weather: Weather) -> Weather {
    Weather { services: 2, backends: 2 * weather.backends, ..weather }
}
