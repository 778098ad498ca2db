//! `lb man` and `lb completions`: files that a package installs beside the program, generated from
//! the same description of the command line that parses it. Hidden: packagers use these commands,
//! operators need not know them.

use std::path::PathBuf;

use clap::Args;

use super::Failure;

/// Write the manual pages into a directory
#[derive(Args)]
pub struct Pages {
    /// An existing directory
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Print the completion script of a shell
#[derive(Args)]
pub struct Completions {
    /// Which shell
    #[arg(value_name = "SHELL")]
    shell: clap_complete::Shell,
}

pub fn pages(command: clap::Command, arguments: Pages) -> Result<(), Failure> {
    let folder = arguments.folder.display();
    // What is hidden from the help is hidden from the manual as well.
    clap_mangen::generate_to(command.disable_help_subcommand(true), &arguments.folder)
        .map_err(|error| format!("cannot write the manual pages to {folder}: {error}").into())
}

pub fn completions(mut command: clap::Command, arguments: Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "lb", &mut script);
    super::print(&String::from_utf8_lossy(&script))
}
