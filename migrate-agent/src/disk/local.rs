//! Which disks of a VM go along with it: those that only its host has.
//!
//! Both sides of a migration ask, of the same definition, so that they number the disks alike.
//! Deliberately not here: what a disk's storage is called (`vms/`), and QEMU's nodes (`qemu/`).

use std::path::{Path, PathBuf};

use lifeboat_protocol::agent::{Disk, VmDefinition};

use super::rooms::place;

/// A disk that goes along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalDisk {
    /// Its number among all disks of the VM, as QEMU's nodes have it.
    pub number: usize,
    /// Its image on this host.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
    /// The guest cannot write to it.
    pub read_only: bool,
}

/// The local disks of a VM, in their order; their places here are their numbers in `sync/`. A plain
/// name is in the first of this host's `directories` for disks. One that nobody writes to and that is
/// there already does not go along.
#[must_use]
pub fn local_disks(definition: &VmDefinition, directories: &[PathBuf]) -> Vec<LocalDisk> {
    let disks = definition.disks.iter().enumerate();
    let stays = |disk: &Disk| disk.read_only && disk.is_there;
    let local = disks.filter(|(_, disk)| disk.shared_storage.is_empty() && !stays(disk));
    let known = local.map(|(number, disk)| LocalDisk {
        number,
        path: place(directories, Path::new(&disk.path)),
        format: disk.format.clone(),
        read_only: disk.read_only,
    });
    known.collect()
}

/// Those of them that the guest can write to: what is copied ahead. The others are not sent where they
/// are already, which a migration asks when it comes.
#[must_use]
pub fn written_disks(definition: &VmDefinition, directories: &[PathBuf]) -> Vec<LocalDisk> {
    let mut disks = local_disks(definition, directories);
    disks.retain(|disk| !disk.read_only);
    disks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_disks_stay_where_they_are_and_the_others_keep_their_numbers() {
        let disk = |path: &str, storage: &str| Disk {
            path: path.into(),
            shared_storage: storage.into(),
            format: "raw".into(),
            ..Disk::default()
        };
        let definition = VmDefinition {
            disks: vec![disk("/san/a", "san"), disk("/d/b", ""), disk("c", "")],
            ..VmDefinition::default()
        };
        let local = local_disks(&definition, &["/d".into(), "/e".into()]);
        let found: Vec<_> = local.iter().map(|disk| (disk.number, disk.path.as_path())).collect();
        assert_eq!(found, [(1, Path::new("/d/b")), (2, Path::new("/d/c"))]);
    }

    #[test]
    fn an_image_that_is_there_already_stays_out_unless_it_could_be_written() {
        let disk = |path: &str, read_only: bool, is_there: bool| Disk {
            path: path.into(),
            read_only,
            is_there,
            ..Disk::default()
        };
        let definition = VmDefinition {
            disks: vec![disk("a", true, true), disk("b", false, true), disk("c", true, false)],
            ..VmDefinition::default()
        };
        let local = local_disks(&definition, &["/d".into()]);
        assert_eq!(local.iter().map(|disk| disk.number).collect::<Vec<_>>(), [1, 2]);
    }
}
