//! Makes the seeds of every corpus in `fuzz/corpus/` anew, of the captures in this checkout:
//! `cargo run -p lifeboat-tests --bin lifeboat-seeds`. What was found (`found-*`) stays.

#[allow(unreachable_pub, reason = "a library elsewhere, whole")]
#[path = "../../../../fuzz/src/lib.rs"]
mod fuzz;

use std::fs;
use std::path::Path;

use fuzz::{CHECKS, seeds};

fn main() -> std::io::Result<()> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = tests.parent().unwrap_or(tests);
    let made = seeds::all(root)?;
    for (target, _) in CHECKS {
        let corpus = root.join("fuzz/corpus").join(target);
        fs::create_dir_all(&corpus)?;
        for entry in fs::read_dir(&corpus)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("seed-") {
                fs::remove_file(entry.path())?;
            }
        }
        let own = made.iter().filter(|seed| seed.target == target);
        let (mut number, mut bytes) = (0, 0);
        for seed in own {
            fs::write(corpus.join(&seed.name), &seed.bytes)?;
            (number, bytes) = (number + 1, bytes + seed.bytes.len());
        }
        println!("{target}: {number} seeds, {bytes} bytes");
    }
    Ok(())
}
