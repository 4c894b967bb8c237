//! What the host's administrator provides, by name: boot images, argument profiles, storages.
//!
//! Used by `vms/`. A name from a definition is looked up *beneath* its directory by the kernel
//! (openat2, no links followed), so that not even a hostile name leads out of it; a disk's path
//! must lie beneath the storage that it names; a profile, whose arguments go to QEMU as they are,
//! must be root's alone.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use serde::Deserialize;
use xxhash_rust::xxh3::Xxh3;

use super::definition::{Disk, Image};
use crate::toml_file::{self, FileError, SyntaxError};

/// A directory that several hosts reach, as this host declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// The same on every host.
    pub name: String,
    /// Where it is mounted here.
    pub path: PathBuf,
}

/// Why something that a definition names cannot be had here.
#[derive(Debug, thiserror::Error)]
pub enum HostFileError {
    /// No such image.
    #[error("image `{name}` is not in {}: copy it there", directory.display())]
    Image {
        /// Its name.
        name: String,
        /// Where it should be.
        directory: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The image is another one than the definition means.
    #[error(
        "image `{name}` differs from the one that the VM was started with (digest {found:016x}, not {wanted:016x}): copy the right one"
    )]
    Digest {
        /// Its name.
        name: String,
        /// Of this host's.
        found: u64,
        /// As the definition has it.
        wanted: u64,
    },
    /// No such profile.
    #[error("profile `{name}` is not in {}: the host's administrator makes it", directory.display())]
    Profile {
        /// Its name.
        name: String,
        /// Where it should be.
        directory: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others than root could write it.
    #[error(
        "profile {} is not root's alone; run `chown root: FILE` and `chmod go-w FILE` on it, and on its directory", path.display()
    )]
    ProfileNotRoots {
        /// The file or its directory.
        path: PathBuf,
    },
    /// The profile cannot be read.
    #[error(transparent)]
    ProfileSyntax(#[from] FileError<SyntaxError>),
    /// The disk is not on the storage that it names.
    #[error("disk {} is not on a storage `{storage}` that this host declares: add it to [[storage]]", path.display())]
    Storage {
        /// The disk.
        path: PathBuf,
        /// The storage.
        storage: String,
    },
}

/// The path of an image, after its digest has been compared.
///
/// # Errors
/// When it is not there, or is another one.
pub fn image(directory: &Path, image: &Image) -> Result<PathBuf, HostFileError> {
    let failed = |source| HostFileError::Image {
        name: image.name.clone(),
        directory: directory.into(),
        source,
    };
    let file = open_beneath(directory, &image.name).map_err(failed)?;
    if let Some(wanted) = image.digest {
        let found = digest(file).map_err(failed)?;
        if found != wanted {
            return Err(HostFileError::Digest { name: image.name.clone(), found, wanted });
        }
    }
    Ok(directory.join(&image.name))
}

/// The xxh3-64 digest of an image.
///
/// # Errors
/// When it is not there or cannot be read.
pub fn image_digest(directory: &Path, name: &str) -> Result<u64, HostFileError> {
    let failed =
        |source| HostFileError::Image { name: name.into(), directory: directory.into(), source };
    digest(open_beneath(directory, name).map_err(failed)?).map_err(failed)
}

fn open_beneath(directory: &Path, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let parent = rustix::fs::openat(CWD, directory, flags | OFlags::DIRECTORY, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::from(io::ErrorKind::InvalidInput)),
    }
}

fn digest(mut file: File) -> io::Result<u64> {
    let mut state = Xxh3::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(state.digest()),
            length => state.update(&buffer[..length]),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    args: Vec<String>,
}

/// The extra QEMU arguments of a profile.
///
/// # Errors
/// When it is not there, is not root's alone, or cannot be read.
pub fn profile(directory: &Path, name: &str) -> Result<Vec<String>, HostFileError> {
    let path = directory.join(format!("{name}.toml"));
    for path in [directory, &path] {
        let found = fs::symlink_metadata(path).map_err(|source| HostFileError::Profile {
            name: name.to_owned(),
            directory: directory.into(),
            source,
        })?;
        if found.uid() != 0 || found.mode() & 0o022 != 0 || found.is_symlink() {
            return Err(HostFileError::ProfileNotRoots { path: path.into() });
        }
    }
    let profile: Profile = toml_file::parse(&path, &toml_file::read(&path)?)?;
    Ok(profile.args)
}

/// The names of the profiles of this host, in order.
#[must_use]
pub fn profiles(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let name =
        |entry: fs::DirEntry| entry.file_name().to_str()?.strip_suffix(".toml").map(str::to_owned);
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    names
}

/// Checks that a disk on a shared storage lies where this host has that storage.
///
/// # Errors
/// When it does not, or the storage is not declared.
pub fn on_its_storage(disk: &Disk, storages: &[Storage]) -> Result<(), HostFileError> {
    let Some(name) = &disk.shared_storage else { return Ok(()) };
    let there = |storage: &&Storage| storage.name == *name && disk.path.starts_with(&storage.path);
    match storages.iter().find(there) {
        Some(_) => Ok(()),
        None => Err(HostFileError::Storage { path: disk.path.clone(), storage: name.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vms::definition::DiskFormat;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_image_is_found_by_name_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let images = directory.path().join("images");
        fs::create_dir(&images).unwrap();
        fs::write(images.join("vmlinuz"), "kernel").unwrap();
        fs::write(directory.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink("../secret", images.join("link")).unwrap();
        let found = image_digest(&images, "vmlinuz").unwrap();
        let named = |name: &str, digest| Image { name: name.to_owned(), digest };
        assert!(image(&images, &named("vmlinuz", Some(found))).is_ok());
        let wrong = image(&images, &named("vmlinuz", Some(found ^ 1)));
        assert!(matches!(wrong, Err(HostFileError::Digest { .. })));
        for bad in ["../secret", "link", ".", "none", "/etc/hostname"] {
            assert!(image(&images, &named(bad, None)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_profile_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = directory.path().join("fast.toml");
        fs::write(&path, "args = [\"-overcommit\", \"mem-lock=off\"]").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let root = rustix::process::geteuid().is_root();
        assert_eq!(profile(directory.path(), "fast").is_ok(), root);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
        let refused = profile(directory.path(), "fast");
        assert!(matches!(refused, Err(HostFileError::ProfileNotRoots { .. })));
        assert_eq!(profiles(directory.path()), ["fast"]);
        assert!(matches!(profile(directory.path(), "no"), Err(HostFileError::Profile { .. })));
    }

    #[test]
    fn a_disk_lies_beneath_the_storage_that_it_names() {
        let storages = [Storage { name: "nfs".to_owned(), path: "/srv/nfs".into() }];
        let disk = |path: &str, storage: Option<&str>| Disk {
            path: path.into(),
            format: DiskFormat::Raw,
            read_only: false,
            nvram: false,
            cdrom: false,
            shared_storage: storage.map(str::to_owned),
        };
        assert!(on_its_storage(&disk("/srv/nfs/a", Some("nfs")), &storages).is_ok());
        assert!(on_its_storage(&disk("/local/a", None), &storages).is_ok());
        assert!(on_its_storage(&disk("/srv/nfs2/a", Some("nfs")), &storages).is_err());
        assert!(on_its_storage(&disk("/srv/nfs/a", Some("san")), &storages).is_err());
    }
}
