//! The hot pieces one by one, each with its budget: what it may cost on an AMD EPYC core at 2.4
//! GHz, as the median that `cargo bench --bench micro` prints. A budget is about one and a half
//! times the cost measured when it was written. A commit that makes a piece outgrow its budget must
//! give the reason. What a whole request costs is measured by `bench/compare`.

mod buffers;
mod events;
mod http;
mod picks;
mod routes;
mod sessions;
mod stage;

fn main() {
    divan::main();
}
