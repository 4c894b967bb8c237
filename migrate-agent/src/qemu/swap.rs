//! Swaps a running QEMU's disk from its native path onto another one (the FUSE mount) and back.
//!
//! `source.rs` and `destination.rs` use it around a migration. Idle, a VM has its image open
//! natively and pays nothing for being movable; only while it migrates do its reads and writes pass
//! through our process.
//!
//! ```text
//!   blockdev-add     a file node on the new path
//!   blockdev-reopen  the format node, with `file` naming the new node     the one moment that counts
//!   blockdev-del     the old file node
//! ```
//!
//! `blockdev-reopen` drains the node, so no request is between the two paths. It takes QEMU 7.0. All
//! options of the format node have to be repeated; what is left out gets its default.
//!
//! An agent may die between two of these commands. QEMU has both file nodes then, and does not say
//! in 7.2 which of them the format node uses, so a swap does again what has not been done, and only that: it
//! may be begun again from any point, in either direction.
//!
//! Deliberately not here: the mount and its locks. Whoever swaps tells the server before and after
//! (`disk::fuse::Server::begin_swap`), because for a moment QEMU has both paths open.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::launch::DISCARD;
use super::qmp::{Qmp, QmpError};
use crate::clock;

/// A disk's drain waits for its writes: as long as a reply's deadline on the mount, and then some.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why a disk is not where it should be.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// The new path cannot be opened, or QEMU stays on the old one. The guest has noticed nothing.
    #[error("QEMU did not move disk {disk} to {path}; the guest runs on, on its old path")]
    Refused {
        /// The disk's number.
        disk: usize,
        /// Where it should have gone.
        path: String,
        /// QEMU's words.
        #[source]
        source: QmpError,
    },
    /// It is on the new path, and the old one is still open, too.
    #[error("QEMU moved disk {disk} to {path} and keeps the old path open as well")]
    StillOpen {
        /// The disk's number.
        disk: usize,
        /// Where it is.
        path: String,
        /// QEMU's words.
        #[source]
        source: QmpError,
    },
    /// Whether it moved cannot be told.
    #[error("QEMU did not say whether it moved disk {disk} to {path}")]
    Unknown {
        /// The disk's number.
        disk: usize,
        /// Where it should have gone.
        path: String,
        /// What happened instead.
        #[source]
        source: QmpError,
    },
}

/// Which of its two paths a disk uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The image itself.
    Native,
    /// The FUSE mount.
    Mount,
}

/// The block nodes of one disk, as `launch` names them: `diskN` over `fileN`, and `mountN` while it
/// is on the mount.
#[derive(Debug, Clone)]
pub struct DiskNodes {
    number: usize,
    format: Map<String, Value>,
    file: Map<String, Value>,
}

impl DiskNodes {
    /// Disk `number`, a writable one of `format` (`raw`, `qcow2`), with the options that `launch`
    /// gives it.
    #[must_use]
    pub fn launched(number: usize, format: &str) -> Self {
        let object = |value: Value| value.as_object().cloned().unwrap_or_default();
        let node = format!("disk{number}");
        Self {
            number,
            format: object(json!({"driver": format, "node-name": node, "read-only": false,
                                  "discard": DISCARD})),
            file: object(json!({"driver": "file", "read-only": false, "discard": DISCARD})),
        }
    }

    /// With further options of the file node (`aio`, `cache`, `discard`), the same on both paths.
    #[must_use]
    pub fn with_file_option(mut self, name: &str, value: Value) -> Self {
        self.file.insert(name.to_owned(), value);
        self
    }

    /// With further options of the format node.
    #[must_use]
    pub fn with_format_option(mut self, name: &str, value: Value) -> Self {
        self.format.insert(name.to_owned(), value);
        self
    }

    /// With the backing node that `launch` gave it, if it has one: a reopen has to name it again.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn with_its_backing(self, qmp: &Qmp) -> Result<Self, QmpError> {
        let backing = backing_node(self.number);
        match nodes(qmp).await?.contains(&backing) {
            true => Ok(self.with_format_option("backing", backing.into())),
            false => Ok(self),
        }
    }

    fn file_node(&self, side: Side) -> String {
        match side {
            Side::Native => format!("file{}", self.number),
            Side::Mount => format!("mount{}", self.number),
        }
    }

    async fn has(&self, qmp: &Qmp, side: Side) -> Result<bool, QmpError> {
        Ok(nodes(qmp).await?.contains(&self.file_node(side)))
    }

    /// Where the disk is; `None` in the middle of a swap, which an agent before us may have begun.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn side(&self, qmp: &Qmp) -> Result<Option<Side>, QmpError> {
        let nodes = nodes(qmp).await?;
        let has = |side| nodes.contains(&self.file_node(side));
        Ok(match (has(Side::Native), has(Side::Mount)) {
            (true, true) => None,
            (_, on_mount) => Some(if on_mount { Side::Mount } else { Side::Native }),
        })
    }

    /// Moves the disk to `to`, where its image is `path`. Returns how long QEMU took, all
    /// commands together. Also ends a swap that was begun and not ended, whatever its direction.
    ///
    /// # Errors
    /// After [`SwapError::Refused`] the disk is where it was.
    pub async fn swap(&self, qmp: &Qmp, to: Side, path: &Path) -> Result<Duration, SwapError> {
        let begin = clock::now();
        let from = match to {
            Side::Native => Side::Mount,
            Side::Mount => Side::Native,
        };
        let (disk, shown) = (self.number, path.display().to_string());
        let refused = |source| SwapError::Refused { disk, path: shown.clone(), source };
        let execute = |command, options| qmp.execute(command, options, DEADLINE);
        // A QEMU that is busy with its disks takes milliseconds to answer each: what there is already is asked only
        // where it objects.
        let added = match execute("blockdev-add", self.file_options(to, &shown)).await {
            Ok(_) => true,
            Err(source) => match self.has(qmp, to).await.map_err(refused)? {
                true => false,
                false => return Err(refused(source)),
            },
        };
        if let Err(source) = execute("blockdev-reopen", self.reopen_options(to)).await {
            if !matches!(source, QmpError::Refused { .. }) {
                return Err(SwapError::Unknown { disk, path: shown, source });
            }
            let undo = json!({"node-name": self.file_node(to)});
            if added && let Err(error) = execute("blockdev-del", undo).await {
                tracing::warn!(%error, "a node that was added in vain stays");
            }
            return Err(refused(source));
        }
        let old = json!({"node-name": self.file_node(from)});
        if let Err(source) = execute("blockdev-del", old).await
            && self.has(qmp, from).await.unwrap_or(true)
        {
            return Err(SwapError::StillOpen { disk, path: shown, source });
        }
        Ok(begin.elapsed())
    }

    fn file_options(&self, side: Side, path: &str) -> Value {
        let mut options = self.file.clone();
        options.insert("node-name".to_owned(), self.file_node(side).into());
        options.insert("filename".to_owned(), path.into());
        Value::Object(options)
    }

    fn reopen_options(&self, side: Side) -> Value {
        let mut options = self.format.clone();
        options.insert("file".to_owned(), self.file_node(side).into());
        json!({"options": [options]})
    }
}

/// What `launch` calls the node that disk `number` is an overlay of.
#[must_use]
pub fn backing_node(number: usize) -> String {
    format!("backing{number}")
}

/// The names of all nodes.
async fn nodes(qmp: &Qmp) -> Result<HashSet<String>, QmpError> {
    let arguments = json!({"flat": true});
    let nodes = qmp.execute("query-named-block-nodes", arguments, DEADLINE).await?;
    let names = nodes.as_array().into_iter().flatten();
    Ok(names.filter_map(|node| node["node-name"].as_str().map(str::to_owned)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_nodes_keep_their_options_on_either_path() {
        let nodes = DiskNodes::launched(1, "qcow2")
            .with_file_option("aio", "native".into())
            .with_format_option("detect-zeroes", "unmap".into());
        assert_eq!(
            nodes.file_options(Side::Mount, "/m/a"),
            json!({"driver": "file", "read-only": false, "discard": "unmap", "aio": "native",
                   "node-name": "mount1", "filename": "/m/a"})
        );
        assert_eq!(
            nodes.reopen_options(Side::Native)["options"][0],
            json!({"driver": "qcow2", "node-name": "disk1", "read-only": false,
                   "discard": "unmap", "detect-zeroes": "unmap", "file": "file1"})
        );
    }
}
