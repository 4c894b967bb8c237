//! Every codec holds for every input of its corpus in `fuzz/corpus/`: seeds, and whatever `tests/fuzz`
//! once found. And the seeds are still what the captures of this checkout make.

#[allow(unreachable_pub, reason = "a library elsewhere, whole")]
#[path = "../../fuzz/src/lib.rs"]
mod fuzz;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

#[test]
fn every_codec_holds_for_its_corpus() {
    for (target, holds) in fuzz::CHECKS {
        let mut number = 0;
        for entry in fs::read_dir(root().join("fuzz/corpus").join(target)).unwrap() {
            let path = entry.unwrap().path();
            // A panic says which codec; this says which input.
            println!("{}", path.display());
            holds(&fs::read(path).unwrap());
            number += 1;
        }
        assert!(number > 0, "{target} has no corpus");
    }
}

/// Otherwise a corpus is of captures that nobody has any more; `lifeboat-seeds` makes them anew.
#[test]
fn the_seeds_are_those_that_the_captures_make() {
    let made = fuzz::seeds::all(&root()).unwrap();
    let mut known = BTreeSet::new();
    for seed in made {
        let path = root().join("fuzz/corpus").join(seed.target).join(&seed.name);
        let kept = fs::read(&path).unwrap_or_default();
        assert!(kept == seed.bytes, "{} is another one", path.display());
        known.insert(path);
    }
    for (target, _) in fuzz::CHECKS {
        for entry in fs::read_dir(root().join("fuzz/corpus").join(target)).unwrap() {
            let path = entry.unwrap().path();
            let is_seed = path.file_name().unwrap().to_string_lossy().starts_with("seed-");
            assert!(!is_seed || known.contains(&path), "{} is of nothing", path.display());
        }
    }
}

/// The seeds reach what they are about: a fuzzer that begins with refusals stays there.
#[test]
fn seeds_are_read_to_their_end() {
    use lifeboat_agent::qemu::stream::StreamReader;
    let mut whole = 0;
    for seed in fuzz::seeds::all(&root()).unwrap() {
        if seed.target == "stream" {
            let mut reader = StreamReader::new();
            reader.feed(seed.bytes[1..].to_vec().into());
            while let Ok(Some(_)) = reader.read() {}
            whole += usize::from(reader.finish().is_ok());
        }
    }
    // Pre-copy, with return path and post-copy, of two QEMUs, cut in two ways.
    assert_eq!(whole, 12);
}
