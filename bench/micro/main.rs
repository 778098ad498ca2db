//! The hot pieces one by one, each with its budget: what it may cost on an AMD EPYC core at 2.4 GHz, as
//! the median that `cargo bench --bench micro` prints; about half as much again as it cost there when the
//! budget was written. A piece that outgrows its budget needs a reason in the commit that makes it so.
//! What a whole request costs is measured by `bench/compare`.

mod buffers;
mod events;
mod http;
mod picks;
mod sessions;
mod stage;

fn main() {
    divan::main();
}
