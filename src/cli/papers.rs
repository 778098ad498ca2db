//! `lb man` and `lb completions`: files that a package installs beside the program, generated from
//! the same description of the command line that parses it, and from the tables of settings. Hidden:
//! packagers use these commands, operators need not know them.

mod settings;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

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

/// Exit codes and what they mean.
type Exits = &'static [(&'static str, &'static str)];

const REFUSED: &str = "It did not do it. One sentence on standard error says why, and what to do.";

/// What the exit codes of a command mean, by its name in the manual.
fn exits(page: &str) -> Exits {
    match page {
        "lb" => &[
            ("0", "The command did what it was asked to."),
            ("1", "Some commands: what was asked about is not so. Their own pages say more."),
            ("2", REFUSED),
        ],
        "lb-serve" => &[
            ("0", "It was told to stop, and has stopped."),
            (
                "2",
                "The settings or the host are at fault. One sentence on standard error says how to \
                   put it right; starting it again without that is of no use.",
            ),
            ("134", "A fault of the program itself (SIGABRT). Please report it, with the log."),
        ],
        "lb-check" => &[
            ("0", "serve would start here."),
            ("2", "It would not; the lines marked \"bad\" say why and what to do."),
        ],
        "lb-backend" => &[
            ("0", "It was told to end, and has unregistered."),
            ("1", "It was told to end twice, and ended without waiting for the balancer's answer."),
            (
                "2",
                "It can never be registered there. One sentence on standard error says why, and \
                   what to do.",
            ),
        ],
        "lb-user" => &[
            ("0", "The answers came."),
            ("1", "An answer is missing, or says that no backend answered."),
            ("2", "The balancer cannot be reached. One sentence on standard error says why."),
        ],
        "lb-drain" => &[
            ("0", "The backends drain; with --wait, they have no session any more."),
            ("1", "With --wait: some sessions had to be ended at the deadline."),
            (
                "2",
                "They do not drain, or with --wait it cannot tell how the drain ended. One sentence \
                   on standard error says why, and what to do.",
            ),
        ],
        "lb-bench" => &[
            ("0", "The run was measured, and everything expected of it was met."),
            (
                "1",
                "Something expected was not met, or the run is INVALID and its figures mean nothing.",
            ),
            ("2", "Nothing was measured. One sentence on standard error says why, and what to do."),
        ],
        _ => &[("0", "It did what it was asked to."), ("2", REFUSED)],
    }
}

pub fn pages(command: clap::Command, arguments: Pages) -> Result<(), Failure> {
    let folder = arguments.folder.display();
    // What is hidden from the help is hidden from the manual as well.
    let mut command = command.disable_help_subcommand(true);
    command.build();
    page(&command, &arguments.folder)
        .and_then(|()| fs::write(arguments.folder.join("lb.toml.5"), settings::page()))
        .map_err(|error| format!("cannot write the manual pages to {folder}: {error}").into())
}

/// Writes the page of a command, and those of its subcommands.
fn page(command: &clap::Command, folder: &Path) -> io::Result<()> {
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        page(inner, folder)?;
    }
    let name = command.get_display_name().unwrap_or(command.get_name());
    let mut text = Vec::new();
    let source = concat!("lb ", env!("CARGO_PKG_VERSION"));
    Man::new(command.clone()).source(source).render(&mut text)?;
    let mut end = Roff::default();
    end.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in exits(name) {
        end.control("TP", []).text([bold(*code)]).text([roman(*meaning)]);
    }
    end.control("SH", ["SEE ALSO"]);
    end.text([bold("lb"), roman("(1), "), bold("lb.toml"), roman("(5)")]);
    end.to_writer(&mut text)?;
    fs::write(folder.join(format!("{name}.1")), text)
}

pub fn completions(mut command: clap::Command, arguments: Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "lb", &mut script);
    super::print(&String::from_utf8_lossy(&script))
}
