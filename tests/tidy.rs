//! The laws of the source, as a test. Owns what must never occur: an upward import, a circle of imports,
//! `unsafe` outside the ring, a clock in a pure module, a file without its opening line, a file or a
//! function that is too long, unfinished work. The checker is a function over (path, text) pairs, and its
//! own tests plant a violation of every law.

#[path = "tidy/size.rs"]
mod size;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::Path;

/// Modules that are passed the time and never read it: every file whose path starts like this.
const PURE: &[&str] = &[
    "src/base/",
    "src/cluster/",
    "src/http/",
    "src/balance/",
    "src/session/",
    "src/estate/",
    "src/proxy/",
    "src/worker/slots.rs",
    "src/worker/starved.rs",
    "src/worker/grace.rs",
    "src/worker/ends.rs",
    "src/worker/cx.rs",
    "src/worker/tcp/sessions",
    "src/worker/udp/sessions",
    "src/worker/http/sessions",
];

/// The one file in a pure module that reads the clock, on behalf of everyone.
const CLOCK: &str = "src/base/time.rs";

#[test]
fn the_source_keeps_its_laws() {
    let files = read_all(Path::new(env!("CARGO_MANIFEST_DIR")));
    assert!(files.iter().any(|file| file.path == "src/lib.rs"), "the source was not found");
    let found = check(&files);
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

struct File {
    path: String,
    text: String,
}

fn read_all(root: &Path) -> Vec<File> {
    let mut files = Vec::new();
    for top in ["src", "tests", "bench", "deploy", ".ci", "README.md", "Cargo.toml"] {
        walk(root, Path::new(top), &mut files);
    }
    files
}

/// Text files only; files that are not UTF-8, such as captured bytes, have no lines to check.
fn walk(root: &Path, place: &Path, files: &mut Vec<File>) {
    let full = root.join(place);
    if let Ok(entries) = fs::read_dir(&full) {
        for entry in entries {
            let entry = entry.expect("a directory that was just opened can be read");
            if entry.file_name() != "target" {
                walk(root, &place.join(entry.file_name()), files);
            }
        }
    } else if let Ok(text) = fs::read_to_string(&full) {
        files.push(File { path: place.to_string_lossy().into_owned(), text });
    }
}

/// Every violation, as `path:line: what`.
fn check(files: &[File]) -> Vec<String> {
    let lib = files.iter().find(|file| file.path == "src/lib.rs");
    let layers = lib.map(|lib| layers(&lib.text)).unwrap_or_default();
    let mut found = Vec::new();
    for file in files {
        let mut tell = |line: usize, what: String| {
            found.push(format!("{}:{line}: {what}", file.path));
        };
        left_open(&file.text, &mut tell);
        if is_sized(&file.path) {
            size::check(&file.text, &mut tell);
        }
        if file.path.starts_with("src/") && file.path.ends_with(".rs") {
            opening(file, &mut tell);
            if is_tests(&file.path) {
                continue;
            }
            let code = code_only(before_tests(&file.text));
            words(&file.path, &code, &mut tell);
            imports(&file.path, &code, &layers, &mut tell);
        }
    }
    found.extend(circles(files));
    found
}

type Tell<'a> = dyn FnMut(usize, String) + 'a;

fn opening(file: &File, tell: &mut Tell) {
    if !file.text.starts_with("//!") {
        tell(1, "does not open with //! saying what the file owns".to_owned());
    }
}

fn is_sized(path: &str) -> bool {
    (path.starts_with("src/") || path.starts_with("tests/")) && path.ends_with(".rs")
}

/// Words that mark unfinished work, and paths that exist on one machine only. Written in halves, so that
/// this file does not contain them itself.
fn left_open(text: &str, tell: &mut Tell) {
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("X", "XX"),
        concat!("todo", "!"),
        concat!("unimplemented", "!"),
        concat!("for ", "now"),
        concat!("place", "holder"),
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("/t", "mp/"),
    ];
    for (line, row) in text.lines().enumerate() {
        for word in words.iter().filter(|word| holds_word(row, word)) {
            tell(line + 1, format!("holds {word:?}"));
        }
    }
}

/// Words that must not occur in the code of some files.
fn words(path: &str, code: &str, tell: &mut Tell) {
    let pure = path != CLOCK && PURE.iter().any(|start| path.starts_with(start));
    for (line, row) in code.lines().enumerate() {
        if !path.starts_with("src/ring/") && holds_word(row, "unsafe") {
            tell(line + 1, "`unsafe` outside src/ring".to_owned());
        }
        for call in [".unwrap()", ".unwrap_err()"] {
            if row.contains(call) {
                tell(line + 1, format!("`{call}` outside tests"));
            }
        }
        for clock in ["Instant::now", "SystemTime::now", "Now::read"] {
            if pure && holds_word(row, clock) {
                tell(line + 1, format!("`{clock}` in a pure module"));
            }
        }
    }
}

/// Whether `row` contains `word` as a word of its own, not as part of a longer identifier.
fn holds_word(row: &str, word: &str) -> bool {
    let letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let (first, last) = (word.chars().next(), word.chars().next_back());
    row.match_indices(word).any(|(place, _)| {
        let before = row[..place].chars().next_back();
        let after = row[place + word.len()..].chars().next();
        !(letter(before) && letter(first) || letter(after) && letter(last))
    })
}

/// The modules in the layer table of lib.rs, from low to high: a module is below those to its right.
fn layers(lib: &str) -> Vec<String> {
    let table: Vec<&str> = lib
        .lines()
        .skip_while(|line| !line.starts_with("//! # Layers"))
        .skip(1)
        .skip_while(|line| line.trim() == "//!")
        .take_while(|line| line.starts_with("//! `"))
        .collect();
    table.join(" ").split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// A module's position in the table: its own entry, or that of the nearest enclosing module.
fn layer(module: &[String], layers: &[String]) -> Option<usize> {
    (1..=module.len()).rev().find_map(|length| {
        let name = module[..length].join("::");
        layers.iter().position(|layer| *layer == name)
    })
}

fn imports(path: &str, code: &str, layers: &[String], tell: &mut Tell) {
    let here = module_of(path);
    if here.is_empty() {
        return;
    }
    let Some(own) = layer(&here, layers) else {
        return tell(1, format!("`{}` has no place in the layer table of lib.rs", here[0]));
    };
    for (line, target) in references(code, &here) {
        if layer(&target, layers).is_some_and(|other| other > own) {
            let target = target.join("::");
            tell(line, format!("`{}` names `{target}`, which is above it", layers[own]));
        }
    }
}

type Module = Vec<String>;

/// What each module imports, and the line of the first import.
type Graph = BTreeMap<Module, BTreeMap<Module, usize>>;

/// Circles of imports, each reported once: for its alphabetically first module, the shortest circle.
fn circles(files: &[File]) -> Vec<String> {
    let graph = graph(files);
    let mut found = Vec::new();
    for (module, imports) in &graph {
        let Some(circle) = way_back(module, &graph) else { continue };
        if circle.iter().min() == Some(module) {
            let names: Vec<String> = circle.iter().map(|module| module.join("::")).collect();
            let line = imports[circle.get(1).unwrap_or(module)];
            let path =
                &files.iter().find(|file| is_module(file, module)).expect("it was read").path;
            found.push(format!("{path}:{line}: a circle of imports: {}", names.join(" -> ")));
        }
    }
    found
}

fn is_module(file: &File, module: &Module) -> bool {
    file.path.starts_with("src/") && file.path.ends_with(".rs") && module_of(&file.path) == *module
}

/// Which module imports which, file by file. Naming one's own submodules is not an import: a module is
/// made of them.
fn graph(files: &[File]) -> Graph {
    let is_source = |file: &&File| {
        file.path.starts_with("src/") && file.path.ends_with(".rs") && !is_tests(&file.path)
    };
    let sources: Vec<&File> = files.iter().filter(is_source).collect();
    let mut graph: Graph =
        sources.iter().map(|file| (module_of(&file.path), BTreeMap::new())).collect();
    let modules: Vec<Module> = graph.keys().cloned().collect();
    for file in sources {
        let here = module_of(&file.path);
        for (line, target) in references(&code_only(before_tests(&file.text)), &here) {
            let known = (1..=target.len()).rev().map(|length| &target[..length]);
            let Some(target) = known.into_iter().find(|name| modules.iter().any(|m| m == name))
            else {
                continue;
            };
            if !here.is_empty() && !target.starts_with(&here) {
                let imports = graph.entry(here.clone()).or_default();
                imports.entry(target.to_vec()).or_insert(line);
            }
        }
    }
    graph
}

/// The shortest path of imports from a module back to itself, if there is one.
fn way_back(module: &Module, graph: &Graph) -> Option<Vec<Module>> {
    let mut ways: VecDeque<Vec<Module>> = VecDeque::from([vec![module.clone()]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        for next in graph[way.last()?].keys() {
            let longer = || way.iter().cloned().chain([next.clone()]).collect();
            if next == module {
                return Some(longer());
            }
            if seen.insert(next) {
                ways.push_back(longer());
            }
        }
    }
    None
}

/// `src/worker/tcp/sessions.rs` is `worker::tcp::sessions`; lib.rs and main.rs are the root.
fn module_of(path: &str) -> Vec<String> {
    let path = path.trim_start_matches("src/").trim_end_matches(".rs");
    let mut parts: Vec<String> = path.split('/').map(str::to_owned).collect();
    if matches!(parts.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        parts.pop();
    }
    parts
}

/// Every path from `crate` or `super` in the code of the module `here`, written out from the root, with
/// its line.
fn references(code: &str, here: &[String]) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (place, _) in code.match_indices(start) {
            let before = code[..place].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let line = code[..place].matches('\n').count() + 1;
            let mut base = if start == "crate::" { Vec::new() } else { above(here) };
            let mut rest = &code[place + start.len()..];
            while let Some(further) = rest.strip_prefix("super::") {
                base = above(&base);
                rest = further;
            }
            let mut targets = Vec::new();
            spell_out(rest, &base, &mut targets);
            found.extend(targets.into_iter().map(|target| (line, target)));
        }
    }
    found
}

fn above(module: &[String]) -> Vec<String> {
    module[..module.len().saturating_sub(1)].to_vec()
}

/// Reads `a::b`, `a::{b, c::d}` or `{a, b}` from the start of `text`; returns what follows.
fn spell_out<'a>(text: &'a str, base: &[String], targets: &mut Vec<Vec<String>>) -> &'a str {
    let mut text = text.trim_start();
    let mut module = base.to_vec();
    while let Some(end) = Some(word_end(text)).filter(|end| *end > 0) {
        module.push(text[..end].to_owned());
        text = &text[end..];
        let Some(further) = text.strip_prefix("::") else { break };
        text = further.trim_start();
    }
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = spell_out(rest, &module, targets);
            match rest.strip_prefix(',') {
                Some(further) => rest = further,
                None => return rest.strip_prefix('}').unwrap_or(rest),
            }
        }
    }
    if module.len() > base.len() {
        targets.push(module);
    }
    // Skips what can stand between a name and the comma after it: `*`, or `as` and another name.
    text.find([',', '}', ';', '\n']).map_or("", |end| text[end..].trim_start())
}

fn word_end(text: &str) -> usize {
    text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())
}

/// Unit tests in a file of their own.
fn is_tests(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// The part of a file before its unit tests, which come last.
fn before_tests(text: &str) -> &str {
    let mark = "\n#[cfg(test)]\n";
    let opens_module = |place: &usize| {
        let next = text[place + mark.len()..].lines().next().unwrap_or_default();
        next.starts_with("mod ") || next.starts_with("pub") && next.contains(" mod ")
    };
    let place = text.match_indices(mark).map(|(place, _)| place).find(opens_module);
    &text[..place.map_or(text.len(), |place| place + 1)]
}

/// The text with comments, strings and character literals blanked out, lines kept.
fn code_only(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let literal = skipped(rest);
        // A word is taken whole, so that an `r` at its end does not open a raw string.
        let length = if literal > 0 { literal } else { word_end(rest).max(first.len_utf8()) };
        let (taken, further) = rest.split_at(length);
        match literal {
            0 => out.push_str(taken),
            _ => out.extend(taken.chars().filter(|c| *c == '\n')),
        }
        rest = further;
    }
    out
}

/// How many bytes at the start of `text` are a comment or a literal.
fn skipped(text: &str) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return text.find("*/").map_or(text.len(), |end| end + 2);
    }
    if let Some(length) = raw_string(text) {
        return length;
    }
    let quoted = text.strip_prefix('b').unwrap_or(text);
    let prefix = text.len() - quoted.len();
    match quoted.chars().next() {
        Some('"') => prefix + string(quoted),
        Some('\'') => {
            Some(character(quoted)).filter(|length| *length > 0).map_or(0, |l| l + prefix)
        }
        _ => 0,
    }
}

fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    let body = after[hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let end = body.find(&close).map_or(body.len(), |end| end + close.len());
    Some(text.len() - body.len() + end)
}

fn string(text: &str) -> usize {
    let mut escaped = false;
    for (place, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return place + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of a character literal; zero for a lifetime.
fn character(text: &str) -> usize {
    let mut inner = text.char_indices().skip(1);
    match (inner.next(), inner.next()) {
        (Some((_, '\\')), Some(_)) => text[3..].find('\'').map_or(text.len(), |end| end + 4),
        (Some(_), Some((place, '\''))) => place + 1,
        _ => 0,
    }
}

mod the_checker {
    use super::*;

    const LIB: &str = "//! The library.\n//!\n//! # Layers, low to high\n//!\n\
        //! `base` < `cluster`, `ring::pool` < `proxy` <\n//! `worker::tcp::sessions` < `ring` < `worker`.\n\
        //! A module names only what is below it.\n";

    fn found(path: &str, text: &str) -> Vec<String> {
        let lib = File { path: "src/lib.rs".to_owned(), text: LIB.to_owned() };
        let file = File { path: path.to_owned(), text: text.to_owned() };
        check(&[lib, file])
    }

    #[test]
    fn reads_the_layer_table() {
        let all =
            ["base", "cluster", "ring::pool", "proxy", "worker::tcp::sessions", "ring", "worker"];
        assert_eq!(layers(LIB), all);
    }

    #[test]
    fn sees_every_import_upward() {
        for (path, code) in [
            ("src/base/mod.rs", "use crate::cluster::Backend;"),
            ("src/base/time.rs", "fn f() -> crate::proxy::Leg {}"),
            ("src/cluster/mod.rs", "use crate::{base::time::Now, worker::link::Report};"),
            ("src/cluster/mod.rs", "use crate::{\n    base,\n    ring::{pool as p, op},\n};"),
            ("src/cluster/mod.rs", "use crate::{base::time::*, worker};"),
            ("src/ring/pool.rs", "use super::op::Tag;"),
            ("src/worker/tcp/sessions.rs", "use super::super::{link, shell};"),
            ("src/worker/tcp/sessions/parting.rs", "use super::super::shell::Shell;"),
            ("src/proxy/tcp.rs", "let leg: Option<crate::worker::tcp::sessions::Sessions> = None;"),
        ] {
            let found = found(path, &format!("//! A file.\n{code}\n"));
            let upward: Vec<&String> = found.iter().filter(|f| f.contains("above it")).collect();
            assert!(!upward.is_empty() && upward.len() == found.len(), "{path} {code} {found:?}");
        }
    }

    #[test]
    fn lets_imports_downward_pass() {
        for (path, code) in [
            (
                "src/worker/shell.rs",
                "use super::tcp::sessions::Sessions;\nuse crate::ring::{op, pool};",
            ),
            ("src/worker/tcp/sessions.rs", "use crate::{base::time::Now, ring::pool::Buf};"),
            ("src/proxy/tcp.rs", "use super::Leg;\nuse crate::cluster;"),
            ("src/base/time.rs", "// use crate::worker::link;\nconst S: &str = \"crate::worker\";"),
            ("src/base/time.rs", "\n#[cfg(test)]\nmod tests {\n    use crate::worker::link;\n}"),
            ("src/base/time.rs", "macro_rules! m { () => { $crate::base::time::Now } }"),
        ] {
            assert_eq!(found(path, &format!("//! A file.\n{code}\n")), [""; 0], "{path} {code}");
        }
    }

    /// The circles found in a source made of these files, each a path and its code.
    fn circles_of(files: &[(&str, &str)]) -> Vec<String> {
        let file = |(path, code): &(&str, &str)| File {
            path: (*path).to_owned(),
            text: format!("//! A file.\n{code}\n"),
        };
        circles(&files.iter().map(file).collect::<Vec<File>>())
    }

    #[test]
    fn sees_every_circle_of_imports() {
        let two =
            [("src/a/x.rs", "use super::y::Y;"), ("src/a/y.rs", "fn f(x: crate::a::x::X) {}")];
        let told = "src/a/x.rs:2: a circle of imports: a::x -> a::y -> a::x";
        assert_eq!(circles_of(&two), [told]);
        let three = [
            ("src/a/x.rs", "use super::{z, y::{self, Y}};"),
            ("src/a/y.rs", "use super::z::{p, q};"),
            ("src/a/z.rs", "\nuse super::x;"),
            ("src/a/w.rs", "use super::x;"),
        ];
        let told = "src/a/x.rs:2: a circle of imports: a::x -> a::z -> a::x";
        assert_eq!(circles_of(&three), [told], "who only leads into a circle is not in it");
        let over_the_parent = [
            ("src/a/mod.rs", "mod x;\nuse crate::b::B;"),
            ("src/a/x.rs", "use super::A;"),
            ("src/b.rs", "use crate::a::x;"),
        ];
        let told = "src/a/mod.rs:3: a circle of imports: a -> b -> a::x -> a";
        assert_eq!(circles_of(&over_the_parent), [told]);
    }

    #[test]
    fn lets_a_module_be_made_of_its_parts() {
        let files = [
            ("src/lib.rs", "mod a;"),
            ("src/a/mod.rs", "mod x;\nuse crate::a::x::X;"),
            ("src/a/x.rs", "use super::A;\nuse super::y::Y;"),
            ("src/a/y.rs", "#[cfg(test)]\nmod tests {\n    use crate::a::x;\n}"),
            ("src/a/tests.rs", "use super::x;"),
        ];
        assert_eq!(circles_of(&files), [""; 0]);
    }

    #[test]
    fn wants_every_module_in_the_table() {
        let found = found("src/novel/mod.rs", "//! A file.\n");
        assert!(found[0].contains("`novel` has no place"), "{found:?}");
    }

    #[test]
    fn sees_words_that_do_not_belong() {
        let left = concat!("TO", "DO");
        for (path, code, said) in [
            ("src/worker/shell.rs", "unsafe { f() }", "`unsafe` outside src/ring"),
            ("src/worker/shell.rs", "x.unwrap();", "`.unwrap()` outside tests"),
            ("src/worker/shell.rs", "x.unwrap();\n#[cfg(test)]\nfn f() {}", "`.unwrap()`"),
            ("src/worker/shell.rs", "fn f<'a>(x: &'a str) { x.unwrap(); }", "`.unwrap()`"),
            ("src/worker/shell.rs", "f(b'\"', '\\\\'); x.unwrap(); g('\"');", "`.unwrap()`"),
            ("src/proxy/tcp.rs", "let now = Now::read();", "`Now::read` in a pure module"),
            (
                "src/worker/tcp/sessions.rs",
                "std::time::Instant::now()",
                "`Instant::now` in a pure module",
            ),
            ("src/worker/udp/sessions.rs", "SystemTime::now()", "`SystemTime::now` in a pure"),
            ("src/worker/shell.rs", left, "holds"),
            ("tests/relay.rs", concat!("let x = unimplemented", "!();"), "holds"),
            ("README.md", concat!("It is so for ", "now."), "holds"),
            ("bench/compare", concat!("cd /wo", "rk/x"), "holds"),
        ] {
            let found = found(path, &format!("//! A file.\n{code}\n"));
            assert_eq!(found.len(), 1, "{path} {code} {found:?}");
            assert!(found[0].contains(said), "{found:?}");
            assert!(found[0].starts_with(&format!("{path}:2:")), "{found:?}");
        }
    }

    #[test]
    fn lets_words_pass_where_they_belong() {
        for (path, code) in [
            ("src/ring/sys.rs", "unsafe { f() }"),
            ("src/worker/shell.rs", "#![deny(unsafe_code)]\n// unsafe\nlet s = \"unsafe\";"),
            ("src/worker/shell.rs", "let c = '\"'; let d = '\\''; let e = r#\"unsafe\"#;"),
            ("src/worker/shell.rs", "/* unsafe\n unsafe */ let now = Now::read();"),
            ("src/base/time.rs", "let now = Instant::now();"),
            ("src/proxy/tcp.rs", "\n#[cfg(test)]\nmod tests { fn f() { x.unwrap(); } }"),
            ("src/proxy/tcp.rs", "\n#[cfg(test)]\npub(crate) mod tests { x.unwrap(); }"),
            ("tests/relay.rs", "x.unwrap();"),
            ("src/ring/tests.rs", "x.unwrap();"),
            ("README.md", "before nowhere"),
        ] {
            assert_eq!(found(path, &format!("//! A file.\n{code}\n")), [""; 0], "{path} {code}");
        }
    }

    #[test]
    fn wants_an_opening_line() {
        assert!(found("src/base/mod.rs", "use std::fmt;\n")[0].contains("does not open with"));
    }

    #[test]
    fn wants_short_files_and_functions_of_source_and_tests() {
        let file = "//! A file.\n".to_owned() + &"use std::fmt;\n".repeat(600);
        let function = format!("//! A file.\nfn f() {{\n{}}}\n", "    g();\n".repeat(59));
        for path in ["src/base/mod.rs", "src/ring/tests.rs", "tests/relay.rs", "tests/sim/net.rs"] {
            assert_eq!(found(path, &file), [format!("{path}:601: 601 lines; at most 600")]);
            assert_eq!(found(path, &function), [format!("{path}:2: `f` has 61 lines; at most 60")]);
        }
        assert_eq!(found("README.md", &file), [""; 0]);
    }
}
