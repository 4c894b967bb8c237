//! What a qcow2 image is an overlay of: its header, bytes to values. Pure but for [`backing_of`].
//!
//! `vms/` asks before QEMU is started, so that the backing image is a node of its own with a name:
//! whoever swaps the overlay to another path has to name it. The format is QEMU's
//! `docs/interop/qcow2.txt`. Deliberately not here: everything else about qcow2.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8] = b"QFI\xfb";
/// The first cluster holds all of the header; the smallest cluster has 512 bytes, usual ones 64 KiB.
const HEAD: usize = 64 << 10;
/// QEMU's own limit.
const LONGEST_NAME: usize = 1023;
/// The extension that names the backing image's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// An image beneath an overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// What the overlay calls it.
    pub name: String,
    /// Where that is.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// Why it cannot be told what is beneath an image.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// The file.
    #[error("cannot read the head of {}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No qcow2.
    #[error("{} is no qcow2 image", .0.display())]
    Foreign(PathBuf),
    /// Cut off, or it contradicts itself.
    #[error("the head of the qcow2 image {} is damaged", .0.display())]
    Damaged(PathBuf),
    /// Then QEMU would guess it from what the guest has written.
    #[error(
        "{} does not say which format its backing image has; set it: qemu-img rebase -u -b BASE -F raw IMAGE",
        .0.display()
    )]
    NoFormat(PathBuf),
}

/// What the qcow2 image at `path` is an overlay of; `None` when of nothing.
///
/// # Errors
/// When it cannot be told.
pub fn backing_of(path: &Path) -> Result<Option<Backing>, Qcow2Error> {
    let failed = |source| Qcow2Error::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let mut head = vec![0; HEAD];
    let length = file.read_at(&mut head, 0).map_err(failed)?;
    match decode(&head[..length]) {
        Ok(None) => Ok(None),
        Ok(Some((name, Some(format)))) => {
            // Relative to the overlay, as QEMU takes it.
            let folder = path.parent().unwrap_or(Path::new("/"));
            Ok(Some(Backing { path: folder.join(&name), name, format }))
        }
        Ok(Some((_, None))) => Err(Qcow2Error::NoFormat(path.to_owned())),
        Err(Bad::Foreign) => Err(Qcow2Error::Foreign(path.to_owned())),
        Err(Bad::Damaged) => Err(Qcow2Error::Damaged(path.to_owned())),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Bad {
    Foreign,
    Damaged,
}

fn number(head: &[u8], at: usize) -> Result<u32, Bad> {
    let bytes = at.checked_add(4).and_then(|end| head.get(at..end)).ok_or(Bad::Damaged)?;
    Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// Name and format of what is beneath.
fn decode(head: &[u8]) -> Result<Option<(String, Option<String>)>, Bad> {
    if !head.starts_with(MAGIC) {
        return Err(Bad::Foreign);
    }
    let offset = u64::from(number(head, 8)?) << 32 | u64::from(number(head, 12)?);
    if offset == 0 {
        return Ok(None);
    }
    let length = number(head, 16)? as usize;
    let start = usize::try_from(offset).map_err(|_| Bad::Damaged)?;
    let end = start.checked_add(length).filter(|_| length <= LONGEST_NAME).ok_or(Bad::Damaged)?;
    let name = head.get(start..end).ok_or(Bad::Damaged)?;
    let name = String::from_utf8(name.to_vec()).map_err(|_| Bad::Damaged)?;
    Ok(Some((name, backing_format(head)?)))
}

/// Extensions follow the header: type and length, 4 bytes each, then the value, padded to 8.
fn backing_format(head: &[u8]) -> Result<Option<String>, Bad> {
    // Version 2 has a header of 72 bytes and does not say so.
    let mut at = if number(head, 4)? < 3 { 72 } else { number(head, 100)? as usize };
    loop {
        let (kind, length) = (number(head, at)?, number(head, at.saturating_add(4))? as usize);
        if kind == 0 {
            return Ok(None);
        }
        let start = at.checked_add(8).ok_or(Bad::Damaged)?;
        let end = start.checked_add(length).ok_or(Bad::Damaged)?;
        let value = head.get(start..end).ok_or(Bad::Damaged)?;
        if kind == BACKING_FORMAT {
            return String::from_utf8(value.to_vec()).map(Some).map_err(|_| Bad::Damaged);
        }
        at = end.checked_next_multiple_of(8).ok_or(Bad::Damaged)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As `qemu-img create -f qcow2 -b base.raw -F raw` writes it, the middle left zero.
    fn overlay() -> Vec<u8> {
        let mut head = vec![0; 512];
        head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        head[12..20].copy_from_slice(&[0, 0, 0, 200, 0, 0, 0, 8]);
        head[100..104].copy_from_slice(&[0, 0, 0, 112]);
        head[112..120].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3]);
        head[120..123].copy_from_slice(b"raw");
        head[200..208].copy_from_slice(b"base.raw");
        head
    }

    #[test]
    fn an_overlay_names_its_base_and_the_bases_format() {
        let found = decode(&overlay()).unwrap();
        assert_eq!(found, Some(("base.raw".to_owned(), Some("raw".to_owned()))));
        let mut alone = overlay();
        alone[12..16].fill(0);
        assert_eq!(decode(&alone), Ok(None));
        let mut unsaid = overlay();
        unsaid[112..116].fill(0);
        assert_eq!(decode(&unsaid), Ok(Some(("base.raw".to_owned(), None))));
        assert_eq!(decode(b"raw bytes"), Err(Bad::Foreign));
        assert_eq!(decode(&overlay()[..150]), Err(Bad::Damaged));
    }

    #[test]
    fn a_relative_base_lies_beside_its_overlay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("overlay");
        std::fs::write(&path, overlay()).unwrap();
        let path_of_base = folder.path().join("base.raw");
        let backing = Backing { name: "base.raw".into(), path: path_of_base, format: "raw".into() };
        assert_eq!(backing_of(&path).unwrap(), Some(backing));
    }

    proptest! {
        #[test]
        fn any_bytes_behind_the_magic_are_read_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let _ = decode(&[MAGIC, &bytes].concat());
        }
    }
}
