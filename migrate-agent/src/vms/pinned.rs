//! Which VMs' pages cannot follow them after the hand-over: those whose memory is held in place, lies
//! in huge pages or comes and goes, and those whose disks have dirty bitmaps.
//!
//! Looked for in two places. The QEMU arguments of a VM's profile are known before it runs
//! ([`Vms::post_copy_obstacle`], part of its description). Its QEMU itself tells the rest, as part of
//! a measurement ([`asked`]): what was plugged in since, and which pages the kernel gave it. A plan
//! refuses post-copy and scatter-gather for either reason. Such a VM still moves by pre-copy where
//! everything else allows it.

use lifeboat_protocol::ids::VmId;

use super::Vms;
use super::definition::Definition;
use super::host_files;
use crate::guests::Guests;
use crate::qemu::qmp::{Qmp, QmpError};
use crate::qemu::ram::Behind;

const PASSED_THROUGH: &str = "a device is passed through to it (vfio)";
const IN_HUGE_PAGES: &str = "its memory lies in huge pages";
const IN_A_FILE: &str = "its memory lies in a file";
const CHANGES_ITS_SIZE: &str = "its memory grows and shrinks (virtio-mem)";

/// What in an argument stands for what.
const SIGNS: [(&str, &str); 7] = [
    ("vfio-", PASSED_THROUGH),
    ("vhost-vdpa", "a device is passed through to it (vdpa)"),
    ("hugetlb=on", IN_HUGE_PAGES),
    ("-mem-path", IN_A_FILE),
    ("memory-backend-file", IN_A_FILE),
    ("mem-lock=on", "its memory is locked"),
    ("virtio-mem", CHANGES_ITS_SIZE),
];

/// Where QEMU keeps the devices that were asked for, with and without an id.
const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

impl Vms {
    /// Why pages of this VM cannot be fetched while it runs, in a few words; `None` where its definition
    /// does not say so.
    #[must_use]
    pub fn post_copy_obstacle(&self, definition: &Definition) -> Option<String> {
        let name = definition.profile.as_ref()?;
        match host_files::profile(&self.settings.profiles_dir, name) {
            Ok(arguments) => sign(&arguments).map(str::to_owned),
            // Without its profile it would not start anywhere; the source's is what counts.
            Err(error) => Some(format!("its profile cannot be read: {error}")),
        }
    }
}

fn sign(arguments: &[String]) -> Option<&'static str> {
    let stands = |(text, _): &&(&str, &str)| arguments.iter().any(|word| word.contains(text));
    SIGNS.iter().find(stands).map(|(_, words)| *words)
}

/// Why pages of a VM that runs cannot be fetched, in a few words; `None` where they can. `behind` is
/// what its memory was seen to lie in.
pub async fn asked(vms: &Vms, vm: &VmId, behind: Behind) -> Option<String> {
    match behind {
        Behind::Nothing => {}
        Behind::File => return Some(IN_A_FILE.to_owned()),
        Behind::HugePages(page) => return Some(format!("{IN_HUGE_PAGES} of {page}")),
    }
    let said = match vms.qmp(vm).await {
        Ok(qmp) => Said::by(&qmp).await.map_err(|error| super::chain(&error)),
        Err(error) => Err(super::chain(&error)),
    };
    match said {
        Ok(said) => said.obstacle(),
        Err(error) => Some(format!("its QEMU does not say what it has: {error}")),
    }
}

/// What a QEMU says that it has.
#[derive(Default)]
struct Said {
    devices: Vec<String>,
    memory_devices: Vec<String>,
    bitmaps: Vec<String>,
}

impl Said {
    async fn by(qmp: &Qmp) -> Result<Self, QmpError> {
        let mut said = Self::default();
        for path in DEVICES {
            said.devices.extend(qmp.qom_children(path).await?);
        }
        said.memory_devices = qmp.query_memory_devices().await?;
        said.bitmaps = qmp.query_dirty_bitmaps().await?;
        Ok(said)
    }

    fn obstacle(self) -> Option<String> {
        if self.devices.iter().any(|device| device.starts_with("vfio-")) {
            return Some(PASSED_THROUGH.to_owned());
        }
        if self.memory_devices.iter().any(|kind| kind == "virtio-mem") {
            return Some(CHANGES_ITS_SIZE.to_owned());
        }
        let bitmap = self.bitmaps.into_iter().next()?;
        Some(format!("a disk of it has the dirty bitmap `{bitmap}`; remove it first"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_memory_in_place_is_seen_in_the_arguments() {
        let sign =
            |words: &[&str]| sign(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(sign(&["-device", "vfio-pci,host=01:00.0"]), Some(PASSED_THROUGH));
        let huge = sign(&["-object", "memory-backend-memfd,id=m,size=1G,hugetlb=on"]);
        assert_eq!(huge, Some(IN_HUGE_PAGES));
        assert_eq!(sign(&["-device", "virtio-balloon-pci"]), None);
        assert_eq!(sign(&[]), None);
    }

    /// No machine without such hardware has a QEMU that would say it: these are its words.
    #[test]
    fn a_device_that_was_passed_through_later_is_seen_among_the_devices() {
        let said = |device: &str| Said { devices: vec![device.to_owned()], ..Said::default() };
        assert_eq!(said("vfio-pci").obstacle().as_deref(), Some(PASSED_THROUGH));
        assert_eq!(said("vfio-pci-nohotplug").obstacle().as_deref(), Some(PASSED_THROUGH));
        assert_eq!(said("virtio-net-pci").obstacle(), None);
    }
}
