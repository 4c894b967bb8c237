//! fio and bonnie++: started, and what they say read.
//!
//! Not here: which of them runs when, and by which way.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::little_memory::LittleMemory;
use crate::clock;
use crate::rig::RigError;
use crate::rig::program::{run, words};

/// How long fio loads an image, ms.
pub(super) const RUNTIME_MS: u64 = 700;
/// What bonnie++ writes, rewrites and reads, MiB. It gives no figure for what takes less than half a second.
pub(super) const BONNIE_MIB: u64 = 2560;
/// How much of that may be in memory when it is read, MiB.
pub(super) const BONNIE_MEMORY_MIB: u64 = 128;
/// Of bonnie++'s requests, bytes. A guest's kernel gathers what its programs write.
const BONNIE_CHUNK: u64 = 64 << 10;

/// How long one thread waits for the answer of another that sleeps until it is asked, in microseconds:
/// the median of many.
///
/// # Errors
/// When the system has no socket left.
pub(super) fn round_trip_us() -> Result<f64, RigError> {
    const TIMES: usize = 1000;
    let failed = || RigError::io("cannot time a round trip between threads");
    let (mut here, mut there) = UnixStream::pair().map_err(failed())?;
    let mut times = std::thread::scope(|scope| -> io::Result<Vec<f64>> {
        scope.spawn(move || {
            let mut word = [0];
            while there.read_exact(&mut word).is_ok() && there.write_all(&word).is_ok() {}
        });
        let mut round = || {
            let begin = clock::now();
            here.write_all(&[1])?;
            here.read_exact(&mut [0])?;
            Ok(begin.elapsed().as_secs_f64() * 1e6)
        };
        let times = (0..TIMES).map(|_| round()).collect();
        // The other one ends with it.
        here.shutdown(std::net::Shutdown::Both)?;
        times
    })
    .map_err(failed())?;
    times.sort_by(f64::total_cmp);
    Ok(times[TIMES / 2])
}

/// How long 4 KiB take that are in this machine's page cache, in microseconds: the median of many.
///
/// # Errors
/// When `image` cannot be read.
pub(super) fn hot_read_us(image: &Path) -> Result<f64, RigError> {
    const TIMES: usize = 2000;
    let failed = || RigError::io("cannot time reads of an image");
    let file = File::open(image).map_err(failed())?;
    let read = || {
        let begin = clock::now();
        file.read_exact_at(&mut [0; 4096], 0)?;
        Ok(begin.elapsed().as_secs_f64() * 1e6)
    };
    let times = (0..TIMES).map(|_| read()).collect::<io::Result<Vec<f64>>>();
    let mut times = times.map_err(failed())?;
    times.sort_by(f64::total_cmp);
    Ok(times[TIMES / 2])
}

/// What fio does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fio {
    engine: &'static str,
    depth: u32,
    pattern: &'static str,
    block: &'static str,
}

impl Fio {
    pub(super) const fn new(
        engine: &'static str,
        depth: u32,
        pattern: &'static str,
        block: &'static str,
    ) -> Self {
        Self { engine, depth, pattern, block }
    }
}

/// Loads `image` and says how many MB/s it gave. `seed` chooses the places.
///
/// # Errors
/// When fio is missing or fails.
pub(super) fn fio(image: &Path, load: Fio, runtime_ms: u64, seed: u64) -> Result<f64, RigError> {
    let Fio { engine, depth, pattern, block } = load;
    let mut command = words(&format!(
        "fio --name=x --direct=1 --ioengine={engine} --iodepth={depth} --rw={pattern} --bs={block} \
         --time_based --runtime={runtime_ms}ms --randseed={seed} --norandommap \
         --allow_file_create=0 --output-format=json"
    ));
    let said = run(command.arg("--filename").arg(image))?;
    bytes_per_sec(&said).map(|rate| rate / 1e6).ok_or_else(|| unreadable("fio", &said))
}

/// What fio moved a second, in either direction.
fn bytes_per_sec(said: &str) -> Option<f64> {
    // It may say something before its figures.
    let report: Value = serde_json::from_str(said.get(said.find('{')?..)?).ok()?;
    let job = report.get("jobs")?.get(0)?;
    let rate = |what: &str| job.get(what)?.get("bw_bytes")?.as_f64();
    Some(rate("read")? + rate("write")?)
}

/// Runs bonnie++ in the file system that `image` holds, by way of a loop device, as a guest's kernel
/// would, and gives MB/s by what it does.
///
/// # Errors
/// When a program is missing or fails.
pub(super) fn bonnie(image: &Path, folder: &Path) -> Result<Vec<(&'static str, f64)>, RigError> {
    let at = folder.join("bonnie");
    std::fs::create_dir_all(&at).map_err(RigError::io("cannot make a mount point"))?;
    let device = run(words("losetup --show --find --direct-io=on").arg(image))?;
    let device = device.trim();
    let mounted = run(words("mount").arg(device).arg(&at));
    // From now on it goes with its mount, which goes with this namespace.
    let detached = run(words("losetup --detach").arg(device));
    mounted?;
    let said = LittleMemory::of(BONNIE_MEMORY_MIB << 20)
        .and_then(|memory| run(&mut memory.holding(&bonnie_command(&at))));
    run(words("umount").arg(&at))?;
    detached?;
    let said = said?;
    let rates = block_rates(&said).ok_or_else(|| unreadable("bonnie++", &said))?;
    Ok(rates)
}

fn bonnie_command(at: &Path) -> Command {
    let mut command = words(&format!(
        "bonnie++ -D -q -f -n 0 -r 0 -m disk -u root -s {BONNIE_MIB}:{BONNIE_CHUNK}"
    ));
    command.arg("-d").arg(at);
    command
}

/// The KiB/s of its block tests; one that was over too soon to be timed has none.
fn block_rates(said: &str) -> Option<Vec<(&'static str, f64)>> {
    // bon_csv2html(1), format 2: put_block, rewrite, get_block.
    const FIELDS: [(&str, usize); 3] = [("write", 11), ("rewrite", 13), ("read", 17)];
    let line = said.lines().rfind(|line| line.matches(',').count() > 20)?;
    let fields: Vec<&str> = line.split(',').collect();
    let rate = |(name, field): (&'static str, usize)| {
        let kib: f64 = fields.get(field)?.parse().ok()?;
        Some((name, kib * 1024.0 / 1e6))
    };
    Some(FIELDS.into_iter().filter_map(rate).collect())
}

fn unreadable(program: &str, said: &str) -> RigError {
    let said: String = said.chars().take(300).collect();
    RigError::refused("figures")(format!("{program} says: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_trip_takes_time_and_ends() {
        let time = round_trip_us().unwrap();
        assert!(time > 0.1 && time < 1e6, "{time}");
    }

    #[test]
    fn a_read_without_a_disk_takes_moments() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let time = hot_read_us(file.path()).unwrap();
        assert!(time > 0.01 && time < 1e5, "{time}");
        assert!(hot_read_us(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn fio_s_rate_is_that_of_both_directions_whatever_stands_before() {
        let said = "fio: a note\n{\"jobs\": [{\"read\": {\"bw_bytes\": 7}, \
                    \"write\": {\"bw_bytes\": 5.0}}]}";
        assert_eq!(bytes_per_sec(said), Some(12.0));
        assert_eq!(bytes_per_sec("{\"jobs\": []}"), None);
        assert_eq!(bytes_per_sec("nothing"), None);
    }

    #[test]
    fn bonnie_s_fields_are_where_its_manual_says_and_pluses_are_no_figure() {
        let said = "1.98,2.00a,vm,1,1795725403,512M,,8192,5,,,250000,11,500000,51,,,+++++,+++,\
                    +++++,+++,,,,,,,,,,,,,,,,,,,39818us,7940us,,13930us,32128us,,,,,,\n";
        assert_eq!(block_rates(said), Some(vec![("write", 256.0), ("rewrite", 512.0)]));
        assert_eq!(block_rates("Cannot write\n"), None);
    }
}
