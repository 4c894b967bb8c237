//! Proves that two hosts reach the same storage: one writes a probe file, the other reads it.
//!
//! Used by the gRPC server. A probe's name is checked, and it is opened beneath the storage's own
//! directory, no links followed; it is small, and never overwrites another file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use lifeboat_protocol::agent::{
    ProbeStorageReply, ProbeStorageRequest, probe_storage_request::Action,
};
use lifeboat_protocol::ids::OperationId;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};

use crate::vms::host_files::Storage;

/// Largest probe.
const PROBE_BYTES_MAX: usize = 4096;

/// Why a storage could not be probed.
#[derive(Debug, thiserror::Error)]
pub(super) enum StorageError {
    /// Not declared.
    #[error("this host declares no storage `{given}`; add it as [[storage]] to its agent.toml")]
    Unknown {
        /// As asked.
        given: String,
    },
    /// Not a name.
    #[error("`{given}` is no name for a probe")]
    Name {
        /// As asked.
        given: String,
    },
    /// Not a probe any more.
    #[error("a probe of {given} bytes is too large; {PROBE_BYTES_MAX} are allowed")]
    TooLarge {
        /// As asked.
        given: usize,
    },
    /// Neither write, read nor remove.
    #[error("the probe's action is missing or not known")]
    Action,
    /// The storage said no.
    #[error("storage at {} cannot be used", path.display())]
    Io {
        /// The storage.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Does what the request asks. It blocks: a network storage may take its time.
///
/// # Errors
/// When the storage or the name is not known here, or the storage says no. A probe that is not
/// there is not an error: `found` is false.
pub(super) fn probe(
    storages: &[Storage],
    request: &ProbeStorageRequest,
) -> Result<ProbeStorageReply, StorageError> {
    let given = || request.storage.clone();
    let storage = storages.iter().find(|storage| storage.name == request.storage);
    let storage = storage.ok_or_else(|| StorageError::Unknown { given: given() })?;
    let name = OperationId::new(request.name.clone())
        .map_err(|_| StorageError::Name { given: request.name.chars().take(80).collect() })?;
    let name = format!(".lifeboat-probe-{name}");
    let failed = |source: io::Error| StorageError::Io { path: storage.path.clone(), source };
    let directory = rustix::fs::openat(
        CWD,
        &storage.path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| failed(errno.into()))?;
    let open = |flags| {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let mode = if flags == OFlags::RDONLY { Mode::empty() } else { Mode::RUSR | Mode::WUSR };
        rustix::fs::openat2(&directory, &name, flags | OFlags::CLOEXEC, mode, resolve)
            .map(File::from)
    };
    let absent = ProbeStorageReply::default();
    match request.action() {
        Action::Unspecified => Err(StorageError::Action),
        Action::Write if request.content.len() > PROBE_BYTES_MAX => {
            Err(StorageError::TooLarge { given: request.content.len() })
        }
        Action::Write => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let mut file = open(flags).map_err(|errno| failed(errno.into()))?;
            file.write_all(&request.content).and_then(|()| file.sync_all()).map_err(failed)?;
            Ok(ProbeStorageReply { found: true, content: vec![] })
        }
        Action::Read => match open(OFlags::RDONLY) {
            Ok(file) => {
                let mut content = vec![];
                file.take(PROBE_BYTES_MAX as u64).read_to_end(&mut content).map_err(failed)?;
                Ok(ProbeStorageReply { found: true, content })
            }
            Err(rustix::io::Errno::NOENT) => Ok(absent),
            Err(errno) => Err(failed(errno.into())),
        },
        Action::Remove => match rustix::fs::unlinkat(&directory, &name, AtFlags::empty()) {
            Ok(()) => Ok(ProbeStorageReply { found: true, content: vec![] }),
            Err(rustix::io::Errno::NOENT) => Ok(absent),
            Err(errno) => Err(failed(errno.into())),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_is_written_read_and_removed_and_leads_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        let storages = [Storage { name: "nfs".to_owned(), path: directory.path().into() }];
        let ask = |action: Action, storage: &str, name: &str, content: &[u8]| {
            let request = ProbeStorageRequest {
                action: action.into(),
                storage: storage.to_owned(),
                name: name.to_owned(),
                content: content.to_vec(),
            };
            probe(&storages, &request)
        };
        assert!(!ask(Action::Read, "nfs", "p1", b"").unwrap().found);
        assert!(ask(Action::Write, "nfs", "p1", b"hello").unwrap().found);
        assert!(ask(Action::Write, "nfs", "p1", b"again").is_err());
        assert_eq!(ask(Action::Read, "nfs", "p1", b"").unwrap().content, b"hello");
        assert!(ask(Action::Remove, "nfs", "p1", b"").unwrap().found);
        assert!(!ask(Action::Remove, "nfs", "p1", b"").unwrap().found);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(matches!(ask(Action::Read, "san", "p", b""), Err(StorageError::Unknown { .. })));
        assert!(matches!(ask(Action::Read, "nfs", "../p", b""), Err(StorageError::Name { .. })));
        let large = ask(Action::Write, "nfs", "p", &[0; 5000]);
        assert!(matches!(large, Err(StorageError::TooLarge { .. })));
        std::os::unix::fs::symlink("/etc/hostname", directory.path().join(".lifeboat-probe-l"))
            .unwrap();
        assert!(ask(Action::Read, "nfs", "l", b"").is_err());
    }
}
