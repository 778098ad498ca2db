//! The documents against the program: the tables of settings and metrics match the code, every command,
//! flag, key, reason and log line is documented, and the messages quoted for each symptom exist. With
//! `LB_WRITE_DOCS=1` it rewrites the generated tables.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lb::cluster::Protocol;
use lb::config::Config;
use lb::config::keys::{Effect, KEYS, Key};
use lb::config::services::{SERVICE_KEYS, ServiceConfig};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The README and the reference: every document checked against the program.
const DOCUMENTS: [&str; 11] = [
    "README.md",
    "deploy/doc/operating.md",
    "deploy/doc/upgrading.md",
    "deploy/doc/containers.md",
    "deploy/doc/cluster.md",
    "deploy/doc/settings.md",
    "deploy/doc/joining.md",
    "deploy/doc/relaying.md",
    "deploy/doc/http.md",
    "deploy/doc/log.md",
    "deploy/doc/metrics.md",
];

fn document(name: &str) -> String {
    fs::read_to_string(root().join(name)).expect(name)
}

/// Most lines in the README, which holds what a person needs on the first day.
const README_LINES_MAX: usize = 250;

#[test]
fn the_readme_is_short_and_leads_to_every_document() {
    let readme = document("README.md");
    let lines = readme.lines().count();
    assert!(lines <= README_LINES_MAX, "{lines} lines");
    for name in DOCUMENTS.into_iter().skip(1).chain(["src/control/schema.md"]) {
        assert!(readme.contains(&format!("]({name})")), "README.md does not link {name}");
    }
    let links = readme.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    for link in links.filter(|link| !link.starts_with("http")) {
        assert!(root().join(link).exists(), "README.md links {link}, which is not there");
    }
    let manifest = document("Cargo.toml");
    assert!(
        manifest.contains("\"deploy/doc/*.md\", \"usr/share/doc/lb/\""),
        "the package lacks them"
    );
}

#[test]
fn the_changelog_keeps_its_form_and_begins_with_what_is_unreleased() {
    let text = document("CHANGELOG.md");
    let versions: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    assert_eq!(versions.first(), Some(&"[Unreleased]"), "{versions:?}");
    for version in &versions[1..] {
        let (number, day) = version.split_once("] - ").expect("## [1.2.3] - 2026-01-31");
        let numbers = number.trim_start_matches('[').split('.').map(str::parse::<u32>);
        assert_eq!(numbers.filter(Result::is_ok).count(), 3, "{version}");
        let is_day = |(place, c): (usize, char)| {
            if place % 5 == 4 || place == 7 { c == '-' } else { c.is_ascii_digit() }
        };
        assert!(day.len() == 10 && day.char_indices().all(is_day), "{version}");
    }
    let kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"];
    for heading in text.lines().filter_map(|line| line.strip_prefix("### ")) {
        assert!(kinds.contains(&heading), "{heading}");
    }
    let (_, unreleased) = text.split_once("## [Unreleased]").unwrap();
    assert!(unreleased.lines().filter(|line| line.starts_with("- ")).count() > 5, "{unreleased}");
    assert!(document("README.md").contains("](CHANGELOG.md)"), "and the README leads to it");
}

/// The document with `rows` between the marks called `name`.
fn with_block(text: &str, name: &str, rows: &str) -> String {
    let start = format!("<!-- {name} -->\n");
    let end = "<!-- end -->";
    let (before, rest) = text.split_once(&start).expect("the block's first mark");
    let (_, after) = rest.split_once(end).expect("the block's last mark");
    format!("{before}{start}{rows}{end}{after}")
}

#[track_caller]
fn holds_block(document_name: &str, name: &str, rows: &str) {
    let text = document(document_name);
    let wanted = with_block(&text, name, rows);
    if std::env::var_os("LB_WRITE_DOCS").is_some() && text != wanted {
        fs::write(root().join(document_name), &wanted).unwrap();
        return;
    }
    assert!(
        text == wanted,
        "the table of {name} in {document_name} differs from the program; run `LB_WRITE_DOCS=1 cargo \
         test --test readme`"
    );
}

#[test]
fn the_settings_are_those_of_the_program() {
    holds_block("deploy/doc/settings.md", "settings", &table_of(KEYS, &Config::default()));
    let service = ServiceConfig::new("example", Protocol::Tcp);
    holds_block("deploy/doc/settings.md", "service settings", &table_of(SERVICE_KEYS, &service));
}

/// The rows of a table of keys with their defaults.
fn table_of<T>(keys: &[Key<T>], defaults: &T) -> String {
    let mut rows = "| key | default | after | |\n|---|---|---|---|\n".to_owned();
    for key in keys {
        let default = key.show(defaults);
        let effect = match key.effect {
            Effect::Now => "reload",
            Effect::Restart => "restart",
        };
        rows += &format!("| `{}` | `{default}` | {effect} | {} |\n", key.path(), key.help);
    }
    rows
}

/// A balancer that ends with its test.
struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The answer of a running balancer at `/metrics`.
fn metrics() -> String {
    let off = ["--tcp", "127.0.0.1:0", "--udp", "off", "--api", "off"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_lb"));
    command.args(["serve", "--control", "127.0.0.1:0", "--admin", "127.0.0.1:0"]).args(off);
    let mut serving = Serving(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut log = BufReader::new(serving.0.stdout.take().unwrap()).lines();
    let opened =
        log.find_map(|line| line.unwrap().split_once("admin=\"").map(|it| it.1.to_owned()));
    let admin = opened.unwrap().split('"').next().unwrap().to_owned();
    let mut door = TcpStream::connect(&admin).unwrap();
    door.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    door.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    door.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

#[test]
fn the_metrics_are_those_of_the_program() {
    let answer = metrics();
    let mut rows = "| metric | |\n|---|---|\n".to_owned();
    for line in answer.lines().filter_map(|line| line.strip_prefix("# HELP ")) {
        let (name, help) = line.split_once(' ').unwrap();
        rows += &format!("| `{name}` | {} |\n", help.trim_end());
    }
    assert!(rows.lines().count() > 40, "{answer}");
    holds_block("deploy/doc/metrics.md", "metrics", &rows);
}

#[test]
fn every_reason_for_the_end_of_a_session_is_documented() {
    let source = include_str!("../src/session/mod.rs");
    let log = document("deploy/doc/log.md");
    let names: Vec<&str> = source
        .lines()
        .filter_map(|line| line.trim().strip_prefix("EndReason::")?.split('"').nth(1))
        .collect();
    assert!(names.len() >= 9, "{names:?}");
    for name in names {
        assert!(log.contains(&format!("`{name}`")), "{name}");
    }
}

/// The source files in these folders, with strings continued over several lines joined into one.
fn source(folders: &[&str]) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut texts = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "rs") {
                texts.push(joined(&fs::read_to_string(path).unwrap()));
            }
        }
    }
    texts
}

/// A backslash at the end of a line swallows the next line's indentation.
fn joined(text: &str) -> String {
    let mut parts = text.split("\\\n");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |all, part| all + part.trim_start())
}

/// The log lines in a source file: the last string of each call, outside tests.
fn log_lines(text: &str) -> Vec<&str> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let calls = ["info!(", "warn!(", "error!(", "line!("];
    let starts = calls.iter().flat_map(|call| code.match_indices(call));
    starts.filter_map(|(at, call)| last_string(&code[at + call.len()..])).collect()
}

/// The last string before the closing parenthesis of a call.
fn last_string(arguments: &str) -> Option<&str> {
    let (mut depth, mut began, mut last) = (1, None, None);
    for (at, character) in arguments.char_indices() {
        match (character, began) {
            ('"', None) => began = Some(at + 1),
            ('"', Some(start)) => {
                last = Some(&arguments[start..at]);
                began = None;
            }
            ('(', None) => depth += 1,
            (')', None) => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    last
}

#[test]
fn every_line_of_the_log_is_documented() {
    let log = document("deploy/doc/log.md");
    let mut count = 0;
    // The balancer's own log; `lb backend` documents its own.
    for text in source(&["src/boot", "src/control"]) {
        for line in log_lines(&text) {
            count += 1;
            assert!(log.contains(&format!("`{line}`")), "the log line {line:?}");
        }
    }
    assert!(count >= 35, "{count} lines were found");
}

#[test]
fn every_symptom_quotes_what_the_program_says() {
    let operating = document("deploy/doc/operating.md");
    let (_, rest) = operating.split_once("<!-- symptoms -->\n").expect("the table of symptoms");
    let rows = rest.split("<!-- end -->").next().unwrap().lines().skip(2);
    let source = source(&["src"]);
    let mut said = 0;
    for row in rows {
        let cell = row.split(" | ").nth(1).expect(row);
        for phrase in cell.split('`').skip(1).step_by(2) {
            said += 1;
            assert!(source.iter().any(|text| text.contains(phrase)), "nothing says {phrase:?}");
        }
    }
    assert!(said >= 20, "{said} phrases were found");
}

fn help(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_lb")).args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_command_and_flag_is_documented() {
    let readme = document("README.md");
    let commands = help(&["help"]);
    let commands: Vec<&str> = commands
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !name.is_empty() && *name != "help")
        .collect();
    assert!(commands.contains(&"serve"), "{commands:?}");
    for command in commands {
        assert!(readme.contains(&format!("`lb {command}")), "lb {command}");
        // The load generator has too many flags for a table in a README.
        if command == "bench" {
            continue;
        }
        let help = help(&["help", command]);
        let flags = help.lines().map(str::trim).filter(|line| line.starts_with('-'));
        for flag in flags.filter_map(|line| line.split(' ').find(|word| word.starts_with("--"))) {
            if !matches!(flag, "--help" | "--version") {
                assert!(readme.contains(&format!("`{flag}")), "lb {command} {flag}");
            }
        }
    }
}
