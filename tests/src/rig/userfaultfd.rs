//! Whether an unprivileged QEMU may use userfaultfd, without which it cannot run in post-copy.
//!
//! Used by everything that moves memory after the guest. It is a setting of the whole machine (no
//! namespace has its own), so whoever allows it puts it back.

use std::fs;

use super::RigError;

const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// Allowed until this is dropped; then as it was before.
#[derive(Debug)]
pub struct Allowed(String);

impl Allowed {
    /// Allows it.
    ///
    /// # Errors
    /// Without root, or on a kernel without userfaultfd.
    pub fn now() -> Result<Self, RigError> {
        let cannot = |doing| RigError::io(format!("cannot {doing} {SYSCTL}"));
        let before = fs::read_to_string(SYSCTL).map_err(cannot("read"))?;
        fs::write(SYSCTL, "1").map_err(cannot("set"))?;
        Ok(Self(before))
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SYSCTL, self.0.trim()) {
            eprintln!("{SYSCTL} stays 1 and was {}: {error}", self.0.trim());
        }
    }
}
