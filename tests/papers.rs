//! The generated manual: a page for each command, each with its exit codes, and one for the settings
//! file. Owns what groff says about them.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use lb::config::keys::KEYS;
use lb::config::services::SERVICE_KEYS;

#[path = "common/process.rs"]
mod process;

use process::Folder;

fn lb(arguments: &[&str]) -> String {
    let done = Command::new(env!("CARGO_BIN_EXE_lb")).args(arguments).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// The manual, written into a folder.
fn manual() -> (Folder, BTreeSet<String>) {
    let folder = Folder::new("man");
    lb(&["man", folder.path().to_str().unwrap()]);
    let entries = fs::read_dir(folder.path()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    (folder, names)
}

/// The names of the commands in the help.
fn commands() -> Vec<String> {
    let help = lb(&["help"]);
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = lines.take_while(|line| !line.is_empty());
    let names = names.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names.filter(|name| !name.is_empty() && *name != "help").map(str::to_owned).collect()
}

#[test]
fn every_command_has_a_page_with_its_exit_codes() {
    let (folder, names) = manual();
    let mut pages = vec!["lb.1".to_owned()];
    pages.extend(commands().iter().map(|command| format!("lb-{command}.1")));
    assert!(pages.len() > 10, "{pages:?}");
    for page in pages {
        assert!(names.contains(&page), "{page} in {names:?}");
        let text = fs::read_to_string(folder.path().join(&page)).unwrap();
        let (before, exits) = text.split_once(".SH \"EXIT STATUS\"").expect(&page);
        let has = |code| exits.contains(&format!(".TP\n\\fB{code}\\fR\n"));
        assert!(has("0") && has("2"), "{page}: {exits}");
        assert!(has("1") || !before.contains("1 if "), "{page} tells of a code 1: {exits}");
        assert!(exits.contains("\\fBlb.toml\\fR(5)"), "{page}: {exits}");
    }
    let bench = fs::read_to_string(folder.path().join("lb-bench.1")).unwrap();
    assert!(bench.contains("INVALID and its figures mean nothing"), "{bench}");
    assert!(names.contains("lb.toml.5") && names.contains("lb-bench-plot.1"), "{names:?}");
}

#[test]
#[ignore = "needs groff, which man-db brings"]
fn groff_formats_every_page_without_a_complaint_and_shows_every_key() {
    let (folder, names) = manual();
    for name in names {
        let page = folder.path().join(&name);
        let mut groff = Command::new("groff");
        groff
            .args(["-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=200n"])
            .arg(&page)
            .stdin(Stdio::null());
        let done = groff.output().expect("groff is installed");
        let complaints = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && complaints.is_empty(), "{name}: {complaints}");
        if name == "lb.toml.5" {
            let text = String::from_utf8_lossy(&done.stdout).replace('\u{2010}', "-");
            for key in KEYS {
                let line = |line: &str| line.trim_start().starts_with(key.name);
                assert!(text.lines().any(line), "{}", key.path());
            }
            for key in SERVICE_KEYS {
                let line = |line: &str| line.trim_start().starts_with(&key.path());
                assert!(text.lines().any(line), "{}", key.path());
            }
        }
    }
}
