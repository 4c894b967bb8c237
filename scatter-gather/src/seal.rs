//! Encryption of pages at rest, so that an intermediary holds nothing that it could read or change
//! unseen. Used by `pack/`.
//!
//! AES-256-GCM (NIST SP 800-38D) with a key per migration. What a page is and which version it has
//! is authenticated beside its bytes, so no page can be served in another's place.
//!
//! ```text
//!  nonce, 12 bytes:  lane be32 | version be64        used once: a key is taken apart into lanes
//!  authenticated:    migration 16 | lane be32 | block be16 | page be32 | version be64
//! ```
//!
//! A nonce that is used twice under one key gives the plain text away. Therefore a key is made into
//! its sealers at once and is gone then; sealers cannot be copied, count their versions themselves
//! and are never restored. After a restart there is a new key. Where keys come from and how they
//! reach the destination (never by way of an intermediary) is the agent's.

use std::fmt;
use std::sync::Arc;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_128;

use lifeboat_protocol::ids::MigrationId;

use crate::page::{PageAt, Version};

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes that sealing adds to a page.
pub const TAG_BYTES: usize = 16;
/// Bytes that are authenticated beside a page.
const BESIDE_BYTES: usize = 34;

/// What may go wrong with sealed pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SealError {
    /// The bytes are not what was sealed for this page of this migration.
    #[error("{0} was changed where it waited, or belongs to another migration")]
    Forged(PageAt),
    /// All versions of a lane are used up.
    #[error("a lane has no versions left; begin another migration")]
    Spent,
}

/// A migration, in 16 bytes that are no secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigrationTag(pub(crate) [u8; 16]);

impl MigrationTag {
    /// The tag of a migration.
    #[must_use]
    pub fn new(migration: &MigrationId) -> Self {
        Self(xxh3_128(migration.as_str().as_bytes()).to_be_bytes())
    }
}

/// The secret of one migration. It is made into its sealers once.
pub struct MigrationKey {
    secret: [u8; KEY_BYTES],
}

impl fmt::Debug for MigrationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MigrationKey(..)")
    }
}

impl MigrationKey {
    /// A key of bytes that the caller has drawn for this migration alone.
    #[must_use]
    pub fn new(secret: [u8; KEY_BYTES]) -> Self {
        Self { secret }
    }

    /// What opens the pages that this key seals.
    #[must_use]
    pub fn opener(&self, migration: MigrationTag) -> Opener {
        Opener { key: key(&self.secret), migration }
    }

    /// Takes the key apart into `lanes` sealers that never use the same nonce.
    #[must_use]
    pub fn into_sealers(self, migration: MigrationTag, lanes: u32) -> Vec<Sealer> {
        let shared = Arc::new(key(&self.secret));
        let sealer = |lane| Sealer { key: Arc::clone(&shared), migration, lane, next: 0 };
        (0..lanes).map(sealer).collect()
    }
}

fn key(secret: &[u8; KEY_BYTES]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, secret).expect("the key has AES-256's length"))
}

/// Seals pages of one lane. All versions of one page go through one lane, so that they can be
/// compared.
pub struct Sealer {
    key: Arc<LessSafeKey>,
    migration: MigrationTag,
    lane: u32,
    next: u64,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealer(lane {}, next {})", self.lane, self.next)
    }
}

impl Sealer {
    /// Which lane this is.
    #[must_use]
    pub fn lane(&self) -> u32 {
        self.lane
    }

    /// Encrypts `page` where it lies. Returns its version and its tag.
    ///
    /// # Errors
    /// [`SealError::Spent`] after 2^64 pages.
    pub fn seal(
        &mut self,
        at: PageAt,
        page: &mut [u8],
    ) -> Result<(Version, [u8; TAG_BYTES]), SealError> {
        let version = self.version()?;
        let nonce = nonce(self.lane, version);
        let aad = Aad::from(beside(self.migration, self.lane, at, version));
        let tag = self.key.seal_in_place_separate_tag(nonce, aad, page);
        let tag = tag.expect("a page is shorter than what GCM can seal");
        let mut bytes = [0; TAG_BYTES];
        bytes.copy_from_slice(tag.as_ref());
        Ok((version, bytes))
    }

    /// A version for a page of zeroes, which has no bytes to seal.
    pub(crate) fn version(&mut self) -> Result<Version, SealError> {
        let version = Version(self.next);
        self.next = self.next.checked_add(1).ok_or(SealError::Spent)?;
        Ok(version)
    }
}

/// Opens what the sealers of one migration sealed.
pub struct Opener {
    key: LessSafeKey,
    migration: MigrationTag,
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opener(..)")
    }
}

impl Opener {
    /// Decrypts `sealed`, a page with its tag behind it, where it lies.
    ///
    /// # Errors
    /// [`SealError::Forged`] unless it is exactly what was sealed for this page and version.
    pub fn open<'a>(
        &self,
        lane: u32,
        at: PageAt,
        version: Version,
        sealed: &'a mut [u8],
    ) -> Result<&'a [u8], SealError> {
        let aad = Aad::from(beside(self.migration, lane, at, version));
        let opened = self.key.open_in_place(nonce(lane, version), aad, sealed);
        opened.map(|page| &*page).map_err(|_| SealError::Forged(at))
    }
}

fn nonce(lane: u32, version: Version) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&lane.to_be_bytes());
    bytes[4..].copy_from_slice(&version.0.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn beside(migration: MigrationTag, lane: u32, at: PageAt, version: Version) -> [u8; BESIDE_BYTES] {
    let mut bytes = [0; BESIDE_BYTES];
    bytes[..16].copy_from_slice(&migration.0);
    bytes[16..20].copy_from_slice(&lane.to_be_bytes());
    bytes[20..22].copy_from_slice(&at.block.to_be_bytes());
    bytes[22..26].copy_from_slice(&at.page.to_be_bytes());
    bytes[26..].copy_from_slice(&version.0.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: PageAt = PageAt { block: 1, page: 7 };

    fn tag(name: &str) -> MigrationTag {
        MigrationTag::new(&MigrationId::new(name).unwrap())
    }

    fn sealed(sealer: &mut Sealer, byte: u8) -> (Version, Vec<u8>) {
        let mut page = vec![byte; 64];
        let (version, tag) = sealer.seal(AT, &mut page).unwrap();
        page.extend_from_slice(&tag);
        (version, page)
    }

    #[test]
    fn what_was_sealed_opens_as_it_was() {
        let key = MigrationKey::new([3; KEY_BYTES]);
        let opener = key.opener(tag("m1"));
        let mut sealer = key.into_sealers(tag("m1"), 1).remove(0);
        let (version, mut bytes) = sealed(&mut sealer, 9);
        assert_ne!(bytes[..64], [9; 64]);
        assert_eq!(opener.open(0, AT, version, &mut bytes).unwrap(), [9; 64]);
    }

    #[test]
    fn equal_pages_never_look_alike() {
        let mut sealers = MigrationKey::new([3; KEY_BYTES]).into_sealers(tag("m1"), 2);
        let mut seen = Vec::new();
        for sealer in &mut sealers {
            seen.push(sealed(sealer, 0).1);
            seen.push(sealed(sealer, 0).1);
        }
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 4, "a nonce was used twice");
    }

    #[test]
    fn nothing_opens_in_anothers_place() {
        let key = MigrationKey::new([3; KEY_BYTES]);
        let (right, other) = (key.opener(tag("m1")), key.opener(tag("m2")));
        let mut sealer = key.into_sealers(tag("m1"), 1).remove(0);
        let (version, bytes) = sealed(&mut sealer, 9);
        let opens = |opener: &Opener, lane, at, version, change: usize| {
            let mut bytes = bytes.clone();
            bytes[change] ^= u8::from(change > 0);
            opener.open(lane, at, version, &mut bytes).is_ok()
        };
        assert!(opens(&right, 0, AT, version, 0));
        assert!(!opens(&other, 0, AT, version, 0), "another migration");
        assert!(!opens(&right, 1, AT, version, 0), "another lane");
        assert!(!opens(&right, 0, PageAt { page: 8, ..AT }, version, 0), "another page");
        assert!(!opens(&right, 0, PageAt { block: 2, ..AT }, version, 0), "another block");
        assert!(!opens(&right, 0, AT, Version(1), 0), "another version");
        assert!(!opens(&right, 0, AT, version, 5), "a changed byte");
        assert!(!opens(&right, 0, AT, version, 79), "a changed tag");
        assert!(right.open(0, AT, version, &mut [0; 15]).is_err(), "less than a tag");
    }

    #[test]
    fn secrets_are_not_printed() {
        let key = MigrationKey::new([0x41; KEY_BYTES]);
        let text = format!("{key:?} {:?}", key.opener(tag("m1")));
        assert_eq!(text, "MigrationKey(..) Opener(..)");
    }

    #[test]
    fn a_lane_ends_before_it_would_repeat() {
        let mut sealer = MigrationKey::new([3; KEY_BYTES]).into_sealers(tag("m1"), 1).remove(0);
        sealer.next = u64::MAX;
        assert_eq!(sealer.seal(AT, &mut [0; 8]), Err(SealError::Spent));
    }
}
