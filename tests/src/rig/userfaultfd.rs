//! Whether an unprivileged QEMU may use userfaultfd, without which it cannot run in post-copy.
//!
//! Used by everything that moves memory after the guest. It is a setting of the whole machine (no
//! namespace has its own), so whoever allows it puts it back: the last of those that do so at a time, in
//! whatever process each is.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use super::RigError;

const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";
/// Locked by everyone who needs it, and says what it was before the first of them.
const HELD: &str = "lifeboat-userfaultfd-held";
/// Locked while somebody comes or goes.
const DOOR: &str = "lifeboat-userfaultfd-door";

/// Allowed until this is dropped; then, if nobody else holds it, as it was before.
#[derive(Debug)]
pub struct Allowed {
    setting: PathBuf,
    held: File,
    door: File,
}

impl Allowed {
    /// Allows it.
    ///
    /// # Errors
    /// Without root, or on a kernel without userfaultfd.
    pub fn now() -> Result<Self, RigError> {
        let allowed = Self::at(SYSCTL.into(), &std::env::temp_dir());
        allowed.map_err(RigError::io(format!("cannot set {SYSCTL}")))
    }

    fn at(setting: PathBuf, locks: &Path) -> io::Result<Self> {
        let open = |name| {
            let mut options = File::options();
            options.create(true).truncate(false).read(true).write(true).open(locks.join(name))
        };
        let (mut held, door) = (open(HELD)?, open(DOOR)?);
        door.lock()?;
        if held.try_lock().is_ok() {
            // Nobody else holds it.
            let before = fs::read_to_string(&setting)?;
            held.set_len(0)?;
            held.write_all(before.trim().as_bytes())?;
        }
        fs::write(&setting, "1")?;
        held.lock_shared()?;
        door.unlock()?;
        Ok(Self { setting, held, door })
    }

    fn give_back(&mut self) -> io::Result<()> {
        self.door.lock()?;
        if self.held.try_lock().is_ok() {
            let mut before = String::new();
            self.held.rewind()?;
            self.held.read_to_string(&mut before)?;
            fs::write(&self.setting, before)?;
        }
        self.held.unlock()?;
        self.door.unlock()
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        if let Err(error) = self.give_back() {
            eprintln!("{} may stay 1: {error}", self.setting.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_to_go_puts_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let setting = folder.path().join("setting");
        let allow = || Allowed::at(setting.clone(), folder.path()).unwrap();
        let read = || fs::read_to_string(&setting).unwrap();
        for before in ["0", "1"] {
            fs::write(&setting, format!("{before}\n")).unwrap();
            let (first, second) = (allow(), allow());
            drop(first);
            assert_eq!(read(), "1");
            let third = allow();
            drop(second);
            assert_eq!(read(), "1");
            drop(third);
            assert_eq!(read(), before);
        }
    }
}
