//! Checkers that read one file at a time: how it begins, how long it is, which words it may not
//! hold, which sibling modules it may not import, what its public signatures may not show.
//!
//! Each returns one sentence per offence, so that a failing test lists all of them at once.

use std::collections::BTreeMap;

use crate::rooms::room_of;
use crate::source::{File, error_sentences};

/// The most lines that a source file may have (a file is thought about at 500).
const MOST_LINES: usize = 800;

/// `//!` first (a `#!` line of a script-like file aside), and not too long.
pub(crate) fn shape_offences(file: &File) -> Vec<String> {
    let mut offences = Vec::new();
    if !file.text.starts_with("//!") {
        offences.push(format!("{}: begins without a //! doc", file.path));
    }
    let lines = file.text.lines().count();
    if lines > MOST_LINES {
        offences.push(format!("{}: {lines} lines, {MOST_LINES} are the most", file.path));
    }
    offences
}

/// How a test is marked that takes long: `tests/full` runs it.
const LEFT_TO_FULL: &str = concat!("#[", "ignore = \"takes long: tests/full\"]");

/// Work that was put off, or tests that are switched off, but for those that `tests/full` runs. The words are put together here so that
/// this file passes its own check.
pub(crate) fn postponed_offences(file: &File) -> Vec<String> {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:")];
    let code_marks =
        [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[", "ignore")];
    let run = File::new(&file.path, &file.text.replace(LEFT_TO_FULL, ""));
    let mut offences = lines_with(file, &file.text, &marks);
    offences.extend(lines_with(file, &run.code(), &code_marks));
    offences
}

/// Paths that exist only on the machine of whoever wrote them.
pub(crate) fn machine_path_offences(file: &File) -> Vec<String> {
    let paths = [
        concat!("/wo", "rk/"),
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
        concat!("/tm", "p/bash_jobs"),
        concat!("/tm", "p/w/"),
    ];
    let mut offences = Vec::new();
    for (number, line) in file.text.lines().enumerate() {
        for path in paths.iter().filter(|path| begins_a_path(line, path)) {
            offences.push(format!("{}:{}: names {path}", file.path, number + 1));
        }
    }
    offences
}

/// Is `path` in `line` as the beginning of a path, not inside a longer one or an address?
fn begins_a_path(line: &str, path: &str) -> bool {
    // Also what a shell variable or a URL's host ends with.
    let inside = |c: char| c.is_alphanumeric() || "/._-}".contains(c);
    line.match_indices(path).any(|(at, _)| !line[..at].ends_with(inside))
}

fn lines_with(file: &File, text: &str, needles: &[&str]) -> Vec<String> {
    let mut offences = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for needle in needles.iter().filter(|needle| line.contains(**needle)) {
            offences.push(format!("{}:{}: holds {needle}", file.path, number + 1));
        }
    }
    offences
}

/// `ovs/` speaks with switches and does not know what they carry.
pub(crate) fn switch_room_offences(file: &File) -> Vec<String> {
    if !file.path.starts_with("ovs/") {
        return Vec::new();
    }
    let mut offences = Vec::new();
    for (number, line) in file.text.lines().enumerate() {
        let words = line.split(|c: char| !c.is_alphanumeric());
        for word in words.filter(|word| is_foreign_to_switches(word)) {
            offences.push(format!("{}:{}: says {word}", file.path, number + 1));
        }
    }
    offences
}

fn is_foreign_to_switches(word: &str) -> bool {
    let lower = word.to_lowercase();
    matches!(lower.as_str(), "vm" | "vms" | "hypervisor" | "hypervisors" | "qemu" | "evacuation")
        || lower.starts_with("migrat")
        || word.contains("Vm") && word.starts_with("Vm")
}

/// Modules of one package that never import each other, and the files that may know them all.
struct Siblings {
    folder: &'static str,
    modules: &'static [&'static str],
    know_all: &'static [&'static str],
}

const SIBLINGS: [Siblings; 2] = [
    Siblings { folder: "ovs/src/", modules: &["openflow", "ovsdb", "lldp"], know_all: &["lib.rs"] },
    Siblings {
        folder: "migrate-agent/src/",
        modules: &["qemu", "disk", "broker"],
        know_all: &["source", "destination", "main", "lib", "run", "agent", "vms"],
    },
];

/// A sibling that imports a sibling, or another file that knows more than one of them.
pub(crate) fn sibling_offences(file: &File) -> Vec<String> {
    let Some((rule, inside)) = SIBLINGS
        .iter()
        .find_map(|rule| file.path.strip_prefix(rule.folder).map(|inside| (rule, inside)))
    else {
        return Vec::new();
    };
    let own = inside.split('/').next().unwrap_or(inside).trim_end_matches(".rs");
    if rule.know_all.contains(&own) {
        return Vec::new();
    }
    let code = file.code();
    let known: Vec<&str> =
        rule.modules.iter().copied().filter(|m| *m != own && imports(&code, m)).collect();
    let limit = usize::from(!rule.modules.contains(&own));
    if known.len() > limit {
        return vec![format!("{}: knows {}", file.path, known.join(" and "))];
    }
    Vec::new()
}

fn imports(code: &str, module: &str) -> bool {
    let grouped = |line: &str| {
        let group = line.trim_start().strip_prefix("use crate::{");
        group.is_some_and(|g| {
            g.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == module)
        })
    };
    let direct = format!("crate::{module}");
    let follows = |at: usize| code[at + direct.len()..].starts_with([':', ';', ' ', '}', ',']);
    code.match_indices(&direct).any(|(at, _)| follows(at)) || code.lines().any(grouped)
}

/// petgraph is how `topology/` works inside; whoever uses `topology/` never sees it.
pub(crate) fn petgraph_offences(file: &File) -> Vec<String> {
    if !file.path.starts_with("topology/src/") {
        return Vec::new();
    }
    let inner = ["petgraph", "NodeIndex", "EdgeIndex", "DiGraph", "UnGraph", "GraphMap"];
    let mut offences = Vec::new();
    for signature in public_signatures(&file.code()) {
        for name in inner.iter().filter(|name| signature.contains(**name)) {
            offences.push(format!("{}: `{signature}` shows {name}", file.path));
        }
    }
    offences
}

/// Everything from a `pub` (not `pub(crate)`) to where its body or value begins, one line each.
fn public_signatures(code: &str) -> Vec<String> {
    let starts = code.match_indices("pub ").filter(|(at, _)| {
        !code[..*at].chars().last().is_some_and(|c| c.is_alphanumeric() || c == '_')
    });
    let until = |rest: &str| rest.find(['{', ';', '=']).unwrap_or(rest.len());
    starts
        .map(|(at, _)| {
            code[at..at + until(&code[at..])].split_whitespace().collect::<Vec<_>>().join(" ")
        })
        .collect()
}

/// Files that no `mod` leads to: rustc, clippy and the tests never see them.
pub(crate) fn orphans(files: &[File]) -> Vec<String> {
    let code: BTreeMap<&str, String> = files.iter().map(|f| (f.path.as_str(), f.code())).collect();
    let is_declared = |parents: &[String], module: &str| {
        let found = parents.iter().filter_map(|parent| code.get(parent.as_str()));
        found.into_iter().any(|code: &String| declares(code, module))
    };
    let belongs = |file: &&File| match parents_of(&file.path) {
        None => true,
        Some((parents, module)) => {
            is_declared(&parents, &module) || is_shared(file, files) || is_named(file, files)
        }
    };
    let lost = files.iter().filter(|file| !belongs(file));
    lost.map(|file| format!("{}: no module declares it", file.path)).collect()
}

/// A folder with a `mod.rs` beside integration tests: each test is a crate root that may declare it.
fn is_shared(file: &File, files: &[File]) -> bool {
    let Some((tests, module)) =
        file.path.strip_suffix("/mod.rs").and_then(|folder| folder.rsplit_once('/'))
    else {
        return false;
    };
    let beside = |other: &&File| other.path.rsplit_once('/').is_some_and(|(at, _)| at == tests);
    files.iter().filter(beside).any(|other| declares(&other.code(), module))
}

/// Is it named by a `#[path]` in a file of its folder?
fn is_named(file: &File, files: &[File]) -> bool {
    let Some((folder, name)) = file.path.rsplit_once('/') else { return false };
    let attribute = format!("path = \"{name}\"");
    let beside = |other: &&File| other.path.rsplit_once('/').is_some_and(|(at, _)| at == folder);
    files.iter().filter(beside).any(|other| other.text.contains(&attribute))
}

fn declares(code: &str, module: &str) -> bool {
    code.match_indices(&format!("mod {module}")).any(|(at, found)| {
        let after = code[at + found.len()..].trim_start();
        after.starts_with(';') || after.starts_with('{')
    })
}

/// Where a file's `mod` line may be, and the module's name; `None` for a crate's root.
fn parents_of(path: &str) -> Option<(Vec<String>, String)> {
    let (folder, name) = path.rsplit_once('/')?;
    let stem = name.strip_suffix(".rs")?;
    let crate_folder = |folder: &str| {
        ["src", "tests", "benches", "examples", "bin"]
            .contains(&folder.rsplit('/').next().unwrap_or(folder))
    };
    let is_root = matches!(stem, "lib" | "main" | "build")
        || crate_folder(folder) && !folder.ends_with("src");
    if is_root {
        return None;
    }
    let (folder, module) = match stem {
        "mod" => folder.rsplit_once('/')?,
        _ => (folder, stem),
    };
    let beside = ["mod.rs", "lib.rs", "main.rs"].map(|file| format!("{folder}/{file}"));
    let parents = beside.into_iter().chain([format!("{folder}.rs")]).collect();
    Some((parents, module.to_owned()))
}

/// Two variants of one package that print the same sentence: a log line would not say which one
/// happened.
pub(crate) fn repeated_sentences(files: &[File]) -> Vec<String> {
    let mut seen: BTreeMap<(&str, String), &str> = BTreeMap::new();
    let mut offences = Vec::new();
    for file in files {
        let Some(room) = room_of(&file.path) else { continue };
        for sentence in error_sentences(&file.text) {
            // A single word or `{0}` only hands on what another error says.
            if !sentence.contains(' ') {
                continue;
            }
            if let Some(first) = seen.insert((room.package, sentence.clone()), &file.path) {
                offences.push(format!("{first} and {}: both say `{sentence}`", file.path));
            }
        }
    }
    offences
}

#[test]
fn a_file_without_its_doc_or_too_long_is_found() {
    assert_eq!(shape_offences(&File::new("a.rs", "use x;\n")).len(), 1);
    let long = format!("//! Doc.\n{}", "\n".repeat(800));
    assert_eq!(shape_offences(&File::new("a.rs", &long)).len(), 1);
    assert!(shape_offences(&File::new("a.rs", "//! Doc.\n")).is_empty());
}

#[test]
fn postponed_work_is_found() {
    for bad in [concat!("// TO", "DO later"), concat!("todo", "!()"), concat!("#[", "ignore]")] {
        assert_eq!(postponed_offences(&File::new("a.rs", bad)).len(), 1, "{bad}");
    }
    for fine in ["let mastodon = 1;", LEFT_TO_FULL] {
        assert!(postponed_offences(&File::new("a.rs", fine)).is_empty(), "{fine}");
    }
}

#[test]
fn paths_of_one_machine_are_found() {
    let bad = concat!("cat /wo", "rk/x");
    assert_eq!(machine_path_offences(&File::new("a.md", bad)).len(), 1);
    for fine in ["cat /var/lib/lifeboat", concat!("x://ro", "ot/a"), concat!("$D/ho", "me/")] {
        assert!(machine_path_offences(&File::new("a.md", fine)).is_empty(), "{fine}");
    }
}

#[test]
fn words_that_switches_do_not_know_are_found_only_in_their_room() {
    let found = |path, text| switch_room_offences(&File::new(path, text)).len();
    assert_eq!(found("ovs/src/x.rs", "/// Moves a VM."), 1);
    assert_eq!(found("ovs/src/x.rs", "struct VmId; fn migrate_flow() {}"), 2);
    assert_eq!(found("ovs/src/x.rs", "/// The switch's port, by its virtual name."), 0);
    assert_eq!(found("controller/src/x.rs", "/// Moves a VM."), 0);
}

#[test]
fn siblings_that_know_each_other_are_found() {
    let found = |path, text| sibling_offences(&File::new(path, text)).len();
    assert_eq!(found("ovs/src/ovsdb/io.rs", "use crate::openflow::Session;"), 1);
    assert_eq!(found("ovs/src/ovsdb/io.rs", "use crate::{ovsdb, openflow};"), 1);
    assert_eq!(found("ovs/src/ovsdb/io.rs", "use crate::ovsdb::Row;"), 0);
    assert_eq!(found("migrate-agent/src/qemu/qmp.rs", "use crate::disk::Seal;"), 1);
    assert_eq!(found("migrate-agent/src/report.rs", "use crate::disk::A; use crate::qemu::B;"), 1);
    assert_eq!(found("migrate-agent/src/report.rs", "use crate::qemu::B;"), 0);
    assert_eq!(found("migrate-agent/src/source.rs", "use crate::disk::A; use crate::qemu::B;"), 0);
}

#[test]
fn a_file_without_a_module_is_found() {
    let at = |path, text| File::new(path, text);
    let whole = [
        at("policy/src/lib.rs", "pub mod a; // mod c;"),
        at("policy/src/a.rs", "mod b;\nmod tests;"),
        at("policy/src/a/b.rs", ""),
        at("policy/src/a/tests.rs", ""),
        at("tests/tests/tidy/main.rs", "mod words;"),
        at("tests/tests/tidy/words.rs", ""),
        at("tests/tests/real.rs", "mod shared;"),
        at("tests/tests/shared/mod.rs", ""),
        at("lab/src/lib.rs", "#[path = \"a_tests.rs\"] mod tests;"),
        at("lab/src/a_tests.rs", ""),
    ];
    assert_eq!(orphans(&whole), [] as [String; 0]);
    let lost = [at("policy/src/lib.rs", "pub mod a; // mod c;"), at("policy/src/c.rs", "")];
    assert_eq!(orphans(&lost).len(), 1);
    let prefix = [at("policy/src/lib.rs", "mod cab;"), at("policy/src/c.rs", "")];
    assert_eq!(orphans(&prefix).len(), 1);
}

#[test]
fn petgraph_in_a_public_signature_is_found() {
    let found = |text| petgraph_offences(&File::new("topology/src/x.rs", text)).len();
    assert_eq!(found("pub fn graph(\n    &self,\n) -> &petgraph::Graph<A, B> { x }"), 1);
    assert_eq!(found("pub struct A(pub NodeIndex);"), 2);
    assert_eq!(found("pub(crate) fn at(&self) -> NodeIndex { x }"), 0);
    assert_eq!(found("pub fn f() -> u8 { petgraph::x() }"), 0);
}

#[test]
fn two_errors_with_one_sentence_are_found_per_package() {
    let text = concat!("#[", "error(\"no path\")]");
    let twice = [File::new("policy/src/a.rs", text), File::new("policy/src/b.rs", text)];
    assert_eq!(repeated_sentences(&twice).len(), 1);
    let apart = [File::new("policy/src/a.rs", text), File::new("topology/src/b.rs", text)];
    assert!(repeated_sentences(&apart).is_empty());
}
