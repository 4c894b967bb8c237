//! The house rules as tests: the dependency table, the shape of files, words and siblings, error
//! sentences.
//!
//! Run with `cargo test -p lifeboat-tests --test tidy`. Every checker is also tested on a bad
//! sample beside its definition, so that none of them can pass by finding nothing. What rustfmt and
//! clippy hold is not repeated.

mod rooms;
mod source;
mod words;

use source::{File, files, root};

/// Fails with every offence on a line of its own.
fn hold(offences: Vec<String>) {
    assert!(offences.is_empty(), "{} offences:\n{}", offences.len(), offences.join("\n"));
}

fn rust_files() -> Vec<File> {
    let found = files(&root(), &[".rs"]);
    assert!(found.len() > 10, "only {} Rust files were found: is this the checkout?", found.len());
    found
}

fn each(files: &[File], check: impl Fn(&File) -> Vec<String>) -> Vec<String> {
    files.iter().flat_map(check).collect()
}

#[test]
fn manifests_hold_the_dependency_table() {
    let manifests = files(&root(), &["Cargo.toml"]);
    let packages: Vec<File> = manifests.into_iter().filter(|m| m.path != "Cargo.toml").collect();
    assert_eq!(packages.len(), rooms::ROOMS.len(), "a package has no room, or a room no package");
    hold(each(&packages, rooms::manifest_offences));
}

#[test]
fn code_holds_the_dependency_table() {
    hold(each(&rust_files(), rooms::code_offences));
}

#[test]
fn every_file_says_what_it_is_and_stays_short() {
    hold(each(&rust_files(), words::shape_offences));
}

#[test]
fn nothing_is_put_off_or_switched_off() {
    hold(each(&rust_files(), words::postponed_offences));
}

#[test]
fn switches_do_not_know_what_they_carry() {
    hold(each(&rust_files(), words::switch_room_offences));
}

#[test]
fn sibling_modules_do_not_import_each_other() {
    hold(each(&rust_files(), words::sibling_offences));
}

#[test]
fn every_file_belongs_to_a_module() {
    hold(words::orphans(&rust_files()));
}

#[test]
fn petgraph_stays_inside_topology() {
    hold(each(&rust_files(), words::petgraph_offences));
}

#[test]
fn no_two_errors_of_a_package_say_the_same() {
    hold(words::repeated_sentences(&rust_files()));
}

#[test]
fn no_path_of_one_machine_is_written_down() {
    let endings = [".rs", ".toml", ".md", ".py", ".sh", ".proto", ".json", ".yml"];
    hold(each(&files(&root(), &endings), words::machine_path_offences));
}
