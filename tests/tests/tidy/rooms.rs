//! The dependency table of ARCHITECTURE.md as data, and the checker that holds manifests and code
//! to it.
//!
//! Only direct dependencies count. Deliberately not here: which external crate is good; `deny`
//! lists only what would break a room's promise (I/O in a pure room, a store's client in the
//! controller).

use crate::source::File;

/// One room: where it lies, which rooms it may use, and what must never appear in it.
pub(crate) struct Room {
    pub(crate) package: &'static str,
    pub(crate) folder: &'static str,
    pub(crate) may_use: &'static [&'static str],
    pub(crate) deny: &'static [&'static str],
}

/// What a pure room never touches: tasks, chance, sockets, files, processes.
const IMPURE: &[&str] =
    &["tokio", "rand", "redis", "rustix", "libc", "std::fs", "std::process", "std::thread"];

/// The table. A new package needs a line here, or `every_package_has_a_room` fails.
pub(crate) const ROOMS: [Room; 12] = [
    Room {
        package: "lifeboat-protocol",
        folder: "protocol",
        may_use: &[],
        deny: &["rand", "redis", "rustix", "libc", "std::fs", "std::thread", "tokio::spawn"],
    },
    Room {
        package: "lifeboat-topology",
        folder: "topology",
        may_use: &["lifeboat-protocol"],
        deny: IMPURE,
    },
    Room {
        package: "lifeboat-policy",
        folder: "policy",
        may_use: &["lifeboat-protocol", "lifeboat-topology"],
        deny: IMPURE,
    },
    Room {
        package: "lifeboat-ovs",
        folder: "ovs",
        may_use: &["rust-openflow"],
        deny: &["redis", "redb", "tonic", "prost"],
    },
    Room {
        package: "rust-openflow",
        folder: "ovs/rust-openflow",
        may_use: &[],
        deny: &["tokio", "serde_json", "std::net::Tcp", "std::fs", "std::thread"],
    },
    Room {
        package: "lifeboat-scatter-gather",
        folder: "scatter-gather",
        may_use: &["lifeboat-protocol"],
        deny: &["qapi", "fuser", "redb"],
    },
    Room {
        package: "lifeboat-agent",
        folder: "migrate-agent",
        may_use: &["lifeboat-protocol", "lifeboat-policy", "lifeboat-scatter-gather"],
        deny: &["redb", "petgraph"],
    },
    Room {
        package: "lifeboat-controller",
        folder: "controller",
        may_use: &[
            "lifeboat-protocol",
            "lifeboat-topology",
            "lifeboat-policy",
            "lifeboat-ovs",
            "rust-openflow",
        ],
        deny: &["redis", "fuser", "qapi", "petgraph"],
    },
    Room {
        package: "lifeboat-lab",
        folder: "lab",
        may_use: &["lifeboat-protocol", "lifeboat-topology", "lifeboat-policy"],
        deny: &[],
    },
    Room { package: "guest-workload", folder: "lab/guest-workload", may_use: &[], deny: &[] },
    Room {
        package: "lifeboat-tests",
        folder: "tests",
        may_use: &[
            "lifeboat-protocol",
            "lifeboat-topology",
            "lifeboat-policy",
            "lifeboat-ovs",
            "rust-openflow",
            "lifeboat-scatter-gather",
            "lifeboat-agent",
            "lifeboat-controller",
            "lifeboat-lab",
        ],
        deny: &[],
    },
    Room {
        package: "lifeboat-fuzz",
        folder: "fuzz",
        may_use: &[
            "lifeboat-protocol",
            "lifeboat-ovs",
            "rust-openflow",
            "lifeboat-scatter-gather",
            "lifeboat-agent",
        ],
        deny: &["tokio", "redis", "std::thread"],
    },
];

/// The room that a file lies in: the one with the longest matching folder.
pub(crate) fn room_of(path: &str) -> Option<&'static Room> {
    let inside =
        |room: &&Room| path.strip_prefix(room.folder).is_some_and(|rest| rest.starts_with('/'));
    ROOMS.iter().filter(inside).max_by_key(|room| room.folder.len())
}

/// What the manifest at `file` depends on that its room may not use, one sentence each.
pub(crate) fn manifest_offences(file: &File) -> Vec<String> {
    let Some(room) = room_of(&file.path) else {
        return vec![format!("{}: no room has this folder", file.path)];
    };
    let manifest: toml::Table = match file.text.parse() {
        Ok(manifest) => manifest,
        Err(error) => return vec![format!("{}: {error}", file.path)],
    };
    let mut offences = Vec::new();
    let name = manifest.get("package").and_then(|p| p.get("name")).and_then(|n| n.as_str());
    if name != Some(room.package) {
        offences.push(format!("{}: the room's package is {}", file.path, room.package));
    }
    for dependency in dependencies(&manifest) {
        let is_room = ROOMS.iter().any(|other| other.package == dependency);
        if is_room && !room.may_use.contains(&dependency.as_str()) {
            offences.push(format!("{}: {} may not use {dependency}", file.path, room.package));
        }
        if room.deny.contains(&dependency.as_str()) {
            offences.push(format!("{}: {} never uses {dependency}", file.path, room.package));
        }
    }
    offences
}

/// The names in every dependency table of a manifest, renamed ones by their real name.
fn dependencies(manifest: &toml::Table) -> Vec<String> {
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    let per_platform = manifest.get("target").and_then(toml::Value::as_table);
    let tables = per_platform.into_iter().flat_map(|t| t.values()).filter_map(|v| v.as_table());
    let mut names = Vec::new();
    for table in tables.chain([manifest]) {
        for (name, value) in
            kinds.iter().filter_map(|kind| table.get(*kind)?.as_table()).flat_map(|t| t.iter())
        {
            let real = value.get("package").and_then(toml::Value::as_str).unwrap_or(name);
            names.push(real.to_owned());
        }
    }
    names
}

/// Paths in the code of `file` that its room may not use. Catches what a manifest can't: `std::fs`
/// in a pure room, or a crate that came in through a re-export.
pub(crate) fn code_offences(file: &File) -> Vec<String> {
    let Some(room) = room_of(&file.path) else { return Vec::new() };
    let mut offences = Vec::new();
    for (number, line) in file.code().lines().enumerate() {
        let line = format!(" {line}");
        let denied = room.deny.iter().map(|path| path.to_string());
        let foreign = ROOMS.iter().filter(|other| {
            other.package != room.package && !room.may_use.contains(&other.package)
        });
        for path in denied.chain(foreign.map(|other| other.package.replace('-', "_"))) {
            if mentions(&line, &path) {
                offences.push(format!(
                    "{}:{}: {} never uses {path}",
                    file.path,
                    number + 1,
                    room.package
                ));
            }
        }
    }
    offences
}

/// Does a line of code name the path `path`, as `use path`, `path::x` or `extern crate path`?
fn mentions(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().last();
        let after = &line[at + path.len()..];
        let starts =
            before.is_none_or(|c| !(c.is_alphanumeric() || c == '_' || c == ':' || c == '.'));
        let used = line.trim_start().starts_with("use ")
            && after.trim_start().starts_with(['{', ';', ' ']);
        let longer =
            path.contains("::") && !after.starts_with(|c: char| c.is_lowercase() || c == '_');
        starts && (after.starts_with("::") || used || longer)
    })
}

#[test]
fn a_forbidden_dependency_is_found_in_every_kind_of_table() {
    for table in ["dependencies", "dev-dependencies", "target.'cfg(unix)'.dependencies"] {
        let text = format!("[package]\nname = \"lifeboat-policy\"\n[{table}]\ntokio = \"1\"\n");
        assert_eq!(manifest_offences(&File::new("policy/Cargo.toml", &text)).len(), 1, "{table}");
    }
    let renamed = "[package]\nname = \"lifeboat-ovs\"\n[dependencies]\nwords = { package = \"lifeboat-protocol\" }";
    assert_eq!(manifest_offences(&File::new("ovs/Cargo.toml", renamed)).len(), 1);
    let fine = "[package]\nname = \"lifeboat-ovs\"\n[dependencies]\nbytes = \"1\"";
    assert!(manifest_offences(&File::new("ovs/Cargo.toml", fine)).is_empty());
}

#[test]
fn a_package_outside_every_room_is_found() {
    assert_eq!(manifest_offences(&File::new("helpers/Cargo.toml", "")).len(), 1);
}

#[test]
fn forbidden_paths_are_found_in_code_and_not_in_prose() {
    let found = |path: &str, text: &str| code_offences(&File::new(path, text)).len();
    assert_eq!(found("policy/src/x.rs", "use std::fs;\nfn f() { tokio::spawn(x); }"), 2);
    assert_eq!(found("policy/src/x.rs", "use std::fs::File;\n"), 1);
    assert_eq!(found("controller/src/x.rs", "use lifeboat_agent::Handover;"), 1);
    assert_eq!(found("ovs/src/x.rs", "fn f(x: lifeboat_protocol::VmId) {}"), 1);
    assert_eq!(found("policy/src/x.rs", "// tokio::spawn is forbidden\nlet a = \"std::fs\";"), 0);
    assert_eq!(found("policy/src/x.rs", "let operand::rand = my_tokio::x;"), 0);
    assert_eq!(found("ovs/rust-openflow/src/x.rs", "use tokio::net;"), 1);
    assert_eq!(found("ovs/src/io.rs", "use tokio::net::TcpStream;"), 0);
}
