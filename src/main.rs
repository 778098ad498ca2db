//! The `lb` program: parses, runs, exits. Everything else is in the library.

fn main() {}
