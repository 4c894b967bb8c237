//! Finds the project's files and takes Rust text apart just far enough for the other checkers: code
//! without comments and strings, and the strings of `#[error("...")]`.
//!
//! Used by every checker of `tidy`. Deliberately not a Rust parser: a checker that needs types
//! belongs in clippy.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders that hold nothing of ours: build output, version control, results of experiments.
const SKIPPED: [&str; 5] = ["target", ".git", "out", "node_modules", "__pycache__"];

/// What the lab makes and git ignores, by path.
const MADE: [&str; 2] = ["lab/build", "lab/run"];

/// One file of the project: its path relative to the root, with `/`, and its text.
pub(crate) struct File {
    pub(crate) path: String,
    pub(crate) text: String,
}

impl File {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// The text with comments and the insides of strings blanked out; line numbers stay.
    pub(crate) fn code(&self) -> String {
        code_only(&self.text)
    }
}

/// The checkout that this package lies in.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the checkout").to_owned()
}

/// Every file below `root` whose name ends with one of `endings`, sorted, as UTF-8 text.
pub(crate) fn files(root: &Path, endings: &[&str]) -> Vec<File> {
    let mut found = Vec::new();
    walk(root, root, endings, &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn walk(root: &Path, folder: &Path, endings: &[&str], found: &mut Vec<File>) {
    for entry in fs::read_dir(folder).expect("a folder of the checkout can be read").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(kind) = entry.file_type() else { continue };
        let made = MADE.iter().any(|path| entry.path() == root.join(path));
        if kind.is_dir() && !made && !SKIPPED.contains(&name.as_str()) {
            walk(root, &entry.path(), endings, found);
        } else if kind.is_file() && endings.iter().any(|ending| name.ends_with(ending)) {
            let Ok(text) = fs::read_to_string(entry.path()) else { continue };
            let path = entry.path();
            let path = path.strip_prefix(root).expect("walked below the root");
            found.push(File { path: path.to_string_lossy().into_owned(), text });
        }
    }
}

/// Blanks comments and the insides of string and character literals, keeping every line break.
pub(crate) fn code_only(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let literal = opaque_length(rest, out.chars().last());
        let taken = literal.unwrap_or(first.len_utf8());
        let (head, tail) = rest.split_at(taken);
        if literal.is_some() {
            out.extend(head.chars().filter(|c| *c == '\n'));
            out.push(' ');
        } else {
            out.push_str(head);
        }
        rest = tail;
    }
    out
}

/// The length in bytes of the comment or literal that `text` begins with, if it begins with one.
fn opaque_length(text: &str, before: Option<char>) -> Option<usize> {
    let end = |found: Option<usize>| Some(found.unwrap_or(text.len()));
    if text.starts_with("//") {
        return end(text.find('\n'));
    }
    if text.starts_with("/*") {
        return end(text.find("*/").map(|at| at + 2));
    }
    if text.starts_with('"') {
        return end(closing_quote(text));
    }
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if let Some(raw) = text.strip_prefix('r').filter(|_| !in_word) {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let inside = hashes + 2;
            return end(text[inside..].find(&close).map(|at| inside + at + close.len()));
        }
    }
    char_literal_length(text)
}

/// The end of the string literal that `text` begins with, escapes respected.
fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// `'x'`, `'\n'`, `'"'`; a lifetime (`'a`) is not a literal.
fn char_literal_length(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('\'')?;
    let first = inside.chars().next()?;
    if first == '\\' {
        return inside[2..].find('\'').map(|at| at + 4);
    }
    inside[first.len_utf8()..].starts_with('\'').then(|| first.len_utf8() + 2)
}

/// The sentences of all `#[error("...")]` attributes in `text`, in order.
pub(crate) fn error_sentences(text: &str) -> Vec<String> {
    let mut sentences = Vec::new();
    for (at, opening) in text.match_indices("#[error(") {
        let inside = text[at + opening.len()..].trim_start();
        if let Some(end) = inside.starts_with('"').then(|| closing_quote(inside)).flatten() {
            sentences.push(inside[1..end - 1].split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    sentences
}

#[test]
fn code_loses_comments_and_strings_and_keeps_lines() {
    let text = "let a = \"use tokio\"; // tokio\n/* x\ny */ let b = '\"'; fn f<'a>() {} r#\"tokio \" x\"#;";
    let code = code_only(text);
    assert!(!code.contains("tokio"), "{code}");
    assert_eq!(code.lines().count(), text.lines().count());
    assert!(code.contains("fn f<'a>()") && code.contains("let b ="), "{code}");
}

#[test]
fn escaped_quotes_do_not_end_a_string() {
    assert_eq!(code_only(r#"f("a\"b", c)"#), "f( , c)");
    assert_eq!(code_only(r"g('\'', d)"), "g( , d)");
}

#[test]
fn error_sentences_are_read_across_lines() {
    let attribute = concat!("#[", "error(");
    let text = format!("{attribute}\n  \"no {{host}} \\\"x\\\"\"\n)]\n{attribute}transparent)]");
    assert_eq!(error_sentences(&text), ["no {host} \\\"x\\\""]);
}
