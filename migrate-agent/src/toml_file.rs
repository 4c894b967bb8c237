//! TOML files with errors that name file, line and key. Used by `config.rs` and `vms/`.
//!
//! A file is read twice: once into its type by serde, once into a table whose values know where
//! they stand. The second finds the key of an error that serde reports by position, and the line
//! of an error that a check reports by key.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Largest file that is read, in bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// A file that cannot be used, and where.
#[derive(Debug, thiserror::Error)]
#[error("{}{}: {}{problem}", file.display(), Shown(":", line), Key(key))]
pub struct FileError<P: std::error::Error + 'static> {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1, where it is known.
    pub line: Option<usize>,
    /// The key: `nic[1].mac`; empty where it is about the whole file.
    pub key: String,
    /// What is wrong with it.
    pub problem: P,
}

struct Shown<'a>(&'static str, &'a Option<usize>);
impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.1.map_or(Ok(()), |line| write!(f, "{}{line}", self.0))
    }
}

struct Key<'a>(&'a str);
impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "`{}`: ", self.0) }
    }
}

/// What can be wrong with any TOML file.
#[derive(Debug, thiserror::Error)]
pub enum SyntaxError {
    /// It cannot be read.
    #[error("cannot read it: {0}")]
    Read(std::io::Error),
    /// It is far larger than such a file is.
    #[error("it is larger than {FILE_BYTES_MAX} bytes")]
    TooLarge,
    /// Not TOML, or not of the expected type.
    #[error("{0}")]
    Toml(String),
}

/// Reads the text of `file`.
///
/// # Errors
/// When it cannot be read, or is too large.
pub fn read(file: &Path) -> Result<String, FileError<SyntaxError>> {
    let error = |problem| FileError { file: file.into(), line: None, key: String::new(), problem };
    let size = std::fs::metadata(file).map_err(|e| error(SyntaxError::Read(e)))?.len();
    if size > FILE_BYTES_MAX {
        return Err(error(SyntaxError::TooLarge));
    }
    std::fs::read_to_string(file).map_err(|e| error(SyntaxError::Read(e)))
}

/// Reads `text` as a `T`; `file` is for error texts.
///
/// # Errors
/// When it is not TOML, or not a `T`: with line, key, and what was expected.
pub fn parse<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, FileError<SyntaxError>> {
    toml::from_str(text).map_err(|error| {
        let span = error.span();
        FileError {
            file: file.into(),
            line: span.as_ref().map(|span| line_of(text, span.start)),
            key: span.and_then(|span| key_at(text, &span)).unwrap_or_default(),
            problem: SyntaxError::Toml(error.message().replace('\n', "; ")),
        }
    })
}

/// The line, from 1, on which `key` (`nic[1].mac`) is set; that of its nearest parent where it
/// is not set itself; `None` where that is not in the file either.
#[must_use]
pub fn line_of_key(text: &str, key: &str) -> Option<usize> {
    let table = DeTable::parse(text).ok()?;
    let mut found = None;
    let mut here: Option<&Spanned<DeValue<'_>>> = None;
    for part in key.split('.') {
        let (name, index) = match part.split_once('[') {
            Some((name, rest)) => (name, rest.trim_end_matches(']').parse::<usize>().ok()),
            None => (part, None),
        };
        let entries = match here {
            None => table.get_ref(),
            Some(value) => match value.get_ref().as_table() {
                Some(entries) => entries,
                None => break,
            },
        };
        let Some(mut value) = entries.get(name) else { break };
        if let Some(element) = index.and_then(|i| value.get_ref().as_array()?.get(i)) {
            value = element;
        }
        found = Some(line_of(text, value.span().start));
        here = Some(value);
    }
    found
}

fn line_of(text: &str, position: usize) -> usize {
    text.bytes().take(position).filter(|&b| b == b'\n').count() + 1
}

/// The key whose value, or whose name, is at `span`. Every branch is looked into: the span of a
/// table under a header is that of its header.
fn key_at(text: &str, span: &Range<usize>) -> Option<String> {
    in_table(DeTable::parse(text).ok()?.get_ref(), span)
}

fn in_table(table: &DeTable<'_>, span: &Range<usize>) -> Option<String> {
    table.iter().find_map(|(name, value)| {
        let rest = in_value(value, span).or_else(|| holds(&name.span(), span).then(String::new))?;
        let dot = if rest.is_empty() || rest.starts_with('[') { "" } else { "." };
        Some(format!("{}{dot}{rest}", name.get_ref()))
    })
}

fn in_value(value: &Spanned<DeValue<'_>>, span: &Range<usize>) -> Option<String> {
    let inside = match value.get_ref() {
        DeValue::Table(table) => in_table(table, span),
        DeValue::Array(elements) => elements.iter().enumerate().find_map(|(index, element)| {
            let rest = in_value(element, span)?;
            let dot = if rest.is_empty() { "" } else { "." };
            Some(format!("[{index}]{dot}{rest}"))
        }),
        _ => None,
    };
    inside.or_else(|| holds(&value.span(), span).then(String::new))
}

fn holds(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only whether it can be read is tested")]
    struct Sample {
        name: String,
        #[serde(default)]
        nic: Vec<Nic>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only whether it can be read is tested")]
    struct Nic {
        mtu: u32,
    }

    fn error(text: &str) -> String {
        parse::<Sample>(Path::new("x.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_wrong_type_is_told_with_file_line_key_and_what_was_expected() {
        let text = "name = \"a\"\n\n[[nic]]\nmtu = 1500\n[[nic]]\nmtu = \"big\"\n";
        let said = error(text);
        assert!(said.starts_with("x.toml:6: `nic[1].mtu`: "), "{said}");
        assert!(said.contains("expected u32"), "{said}");
    }

    #[test]
    fn an_unknown_key_and_broken_syntax_name_their_line() {
        let said = error("name = \"a\"\ncolour = 1\n");
        assert!(said.starts_with("x.toml:2: `colour`: unknown field"), "{said}");
        let said = error("name = \"a\nnic = 1\n");
        assert!(said.starts_with("x.toml:1: "), "{said}");
        let said = error("nic = []");
        assert!(said.contains("missing field `name`"), "{said}");
    }

    #[test]
    fn the_line_of_a_key_is_found_and_that_of_its_parent_when_it_is_not_set() {
        let text = "a = 1\n[[nic]]\nmtu = 1\n\n[[nic]]\nmac = \"x\"\nmtu = 2\n";
        assert_eq!(line_of_key(text, "a"), Some(1));
        assert_eq!(line_of_key(text, "nic[1].mtu"), Some(7));
        assert_eq!(line_of_key(text, "nic[1].vlan"), Some(5));
        assert_eq!(line_of_key(text, "zzz"), None);
    }
}
