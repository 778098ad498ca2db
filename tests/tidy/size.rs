//! The unit of size: how long a file and a function may be, tests included.

use super::{Tell, code_only, word_end};

/// Lines of a file, with the tests in it.
pub const FILE_LINES_MAX: usize = 600;

/// Lines of a function, from `fn` to its closing brace.
pub const FUNCTION_LINES_MAX: usize = 60;

pub fn check(text: &str, tell: &mut Tell) {
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        tell(lines, format!("{lines} lines; at most {FILE_LINES_MAX}"));
    }
    for function in functions(&code_only(text)) {
        if function.lines > FUNCTION_LINES_MAX {
            let Function { name, lines, .. } = function;
            tell(
                function.line,
                format!("`{name}` has {lines} lines; at most {FUNCTION_LINES_MAX}"),
            );
        }
    }
}

struct Function<'a> {
    name: &'a str,
    line: usize,
    lines: usize,
}

/// Every function that has a body. A function within another is also part of that one.
fn functions(code: &str) -> Vec<Function<'_>> {
    let mut found = Vec::new();
    let (mut line, mut counted) = (1, 0);
    for (place, word) in code.match_indices("fn ") {
        line += newlines(&code[counted..place]);
        counted = place;
        let joined =
            code[..place].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
        let rest = &code[place + word.len()..];
        let name = &rest[..word_end(rest)];
        // The type of a function pointer has no name, and one that a macro makes none yet.
        if joined || name.is_empty() {
            continue;
        }
        if let Some(end) = body_end(rest) {
            found.push(Function { name, line, lines: newlines(&rest[..end]) + 1 });
        }
    }
    found
}

fn newlines(text: &str) -> usize {
    text.bytes().filter(|byte| *byte == b'\n').count()
}

/// Where the body of a function ends whose name `text` begins with; `None` if it has none.
fn body_end(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (place, byte) in text.bytes().enumerate() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' => depth -= 1,
            b'}' if depth == 1 => return Some(place),
            b'}' => depth -= 1,
            b';' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

#[test]
fn a_file_may_be_600_lines_long_with_its_tests() {
    let said = |text: &str| {
        let mut said = Vec::new();
        check(text, &mut |line, what| said.push(format!("{line}: {what}")));
        said
    };
    assert_eq!(said(&"use a;\n".repeat(FILE_LINES_MAX)), [""; 0]);
    let tested = format!("use a;\n#[cfg(test)]\nmod tests {{\n{}}}\n", "\n".repeat(597));
    assert_eq!(said(&tested), ["601: 601 lines; at most 600"]);
    let long = format!("\n    fn f() {{\n{}    }}\n", "        g();\n".repeat(58));
    assert_eq!(said(&long), [""; 0]);
    let long = format!("\n    fn f() {{\n{}    }}\n", "        g();\n".repeat(59));
    assert_eq!(said(&long), ["2: `f` has 61 lines; at most 60"]);
}

#[test]
fn a_function_is_measured_from_its_name_to_its_last_brace() {
    let measured = |code: &str| {
        let code = code_only(code);
        let all = functions(&code);
        all.iter().map(|it| format!("{}:{} {}", it.line, it.name, it.lines)).collect::<Vec<_>>()
    };
    assert_eq!(
        measured("fn a() {}\nfn b(\n    x: [u8; 3],\n) -> [u8; 3] {\n    x\n}\n"),
        ["1:a 1", "2:b 5"]
    );
    assert_eq!(measured("trait T {\n    fn a(&self);\n    fn b(&self) {\n    }\n}\n"), ["3:b 2"]);
    assert_eq!(measured("fn a() {\n    fn b() {\n    }\n}\n"), ["1:a 4", "2:b 2"]);
    assert_eq!(measured("fn a() {\n    let s = \"}\"; // }\n    let c = '}';\n}\n"), ["1:a 4"]);
    assert_eq!(
        measured("type F = fn (u8);\nlet often = 1;\nfn a(f: fn(u8) -> u8) {\n}\n"),
        ["3:a 2"]
    );
}
