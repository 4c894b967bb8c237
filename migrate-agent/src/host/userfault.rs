//! Whether a QEMU of this host may fetch its guest's pages while the guest runs: userfaultfd(2).
//!
//! Used by the host's description, so that a plan refuses post-copy and scatter-gather before a VM
//! has moved. QEMU does not run as root here, and a kernel lets others use userfaultfd for faults
//! inside the kernel only where it is told to: by the sysctl, for everybody, or by the device's
//! mode, for those who may open it (QEMU 8.1 and later look for that).

use std::path::Path;

use crate::qemu::process::User;

const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";
const DEVICE: &str = "/dev/userfaultfd";

/// Why not, and what would help; `None` where it may. `qemu` is its version as it says it.
#[must_use]
pub fn obstacle(user: User, qemu: &str) -> Option<String> {
    let sysctl = std::fs::read_to_string(SYSCTL).unwrap_or_default();
    let opens = rustix::fs::stat(DEVICE)
        .is_ok_and(|stat| super::opens(stat.st_mode, (stat.st_uid, stat.st_gid), user));
    judge(user, qemu, sysctl.trim(), opens, Path::new(SYSCTL).exists())
}

fn judge(user: User, qemu: &str, sysctl: &str, opens: bool, has_sysctl: bool) -> Option<String> {
    let uses_device = version(qemu) >= (8, 1);
    // A kernel without the sysctl (before 5.2) lets everybody.
    if user.uid == 0 || sysctl == "1" || !has_sysctl || (opens && uses_device) {
        return None;
    }
    let device = match uses_device {
        true => " or let its group open /dev/userfaultfd",
        false => "",
    };
    Some(format!(
        "its QEMU may not use userfaultfd; run `sysctl -w vm.unprivileged_userfaultfd=1` there{device}"
    ))
}

fn version(text: &str) -> (u32, u32) {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
    let mut next = || numbers.next().and_then(|part| part.parse().ok()).unwrap_or(0);
    (next(), next())
}

#[test]
fn an_unprivileged_qemu_needs_the_sysctl_or_a_device_that_it_looks_for() {
    let nobody = User { uid: 65534, gid: 36 };
    let may = |qemu, sysctl, opens| judge(nobody, qemu, sysctl, opens, true).is_none();
    assert!(may("7.2.22", "1", false));
    assert!(!may("7.2.22", "0", true), "it does not look for the device");
    assert!(may("10.0.2 (Debian)", "0", true));
    assert!(!may("10.0.2", "0", false));
    assert!(judge(nobody, "7.2", "", false, false).is_none());
    assert!(judge(User { uid: 0, gid: 0 }, "7.2", "0", false, true).is_none());
    let said = judge(nobody, "10.0", "0", false, true).unwrap();
    assert!(said.contains("sysctl -w") && said.contains("/dev/userfaultfd"), "{said}");
}
