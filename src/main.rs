//! The `lb` program: parses, runs, exits. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    lb::cli::run(std::env::args_os())
}
