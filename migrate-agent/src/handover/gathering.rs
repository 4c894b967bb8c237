//! What a destination must remember of a guest whose memory is still elsewhere, beside the record of
//! who owns it. Written before LOADED and removed when the last page is here; its presence is what
//! "gathering" means. Used by `destination.rs` and by the answer to the source's question.
//!
//! Where its guest dies before the source has nothing of it any more, that it died is written down first
//! (docs/decisions/0054).
//!
//! It holds what opens the pages in stores, so its file is the agent's alone. Which page is where is
//! not in it: QEMU knows what it has, and the gather's journal keeps what the source has told of the rest.

use std::fs;
use std::path::PathBuf;

use lifeboat_protocol::agent::PageStore;
use lifeboat_protocol::ids::{Generation, HostId, MigrationId, VmId};
use serde::{Deserialize, Serialize};

use super::Record;
use super::store::{Store, StoreError};

/// A RAM block of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// QEMU's name.
    pub name: String,
    /// Pages of 4 KiB.
    pub pages: u32,
}

/// A store that holds pages of the guest.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreAt {
    /// The intermediary's host; empty for a store named by its address.
    pub host: String,
    /// `host:port`.
    pub address: String,
    /// Who comes in.
    pub user: String,
    /// With what.
    pub secret: String,
    /// Without TLS.
    pub plain: bool,
    /// The run of it that pages are put into: another one has lost them. `None` where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// The name in its certificate; empty: the host's, or, without one, that of its address.
    #[serde(default)]
    pub certificate: String,
}

impl std::fmt::Debug for StoreAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StoreAt({} at {})", self.host, self.address)
    }
}

impl From<&PageStore> for StoreAt {
    fn from(store: &PageStore) -> Self {
        Self {
            host: store.host.clone(),
            address: store.address.clone(),
            user: store.user.clone(),
            secret: store.secret.clone(),
            plain: store.plain,
            run: None,
            certificate: store.certificate.clone(),
        }
    }
}

/// Where the pages of a scattered guest are.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InStores {
    /// The stores, in the order that both agents count them in.
    pub stores: Vec<StoreAt>,
    /// The key of its pages, in hex.
    pub key: String,
}

impl std::fmt::Debug for InStores {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InStores({:?})", self.stores)
    }
}

/// A guest that runs, or is about to, without all of its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gathering {
    /// The migration.
    pub migration: MigrationId,
    /// The guest's RAM blocks, in the order of the stream.
    pub layout: Vec<Block>,
    /// The block of them whose pages are elsewhere.
    pub ram: u16,
    /// Of scatter-gather; `None`: all of it is at the source.
    pub scattered: Option<InStores>,
    /// Nothing is wanted of the source any more: what is missing is in stores.
    pub released: bool,
}

impl Store {
    fn gathering_path(&self, vm: &VmId) -> PathBuf {
        self.file(&format!("{vm}.gathering"))
    }

    /// Whether pages of the VM, or blocks of its disks, are wanted from its source. Where that cannot be seen, they may be:
    /// whoever asks is about to end the QEMU that holds them.
    #[must_use]
    pub fn wants_source(&self, vm: &VmId) -> bool {
        let pages = || {
            Ok::<_, StoreError>(self.gathering(vm)?.is_some_and(|gathering| !gathering.released))
        };
        let blocks = || Ok::<_, StoreError>(self.rest(vm)?.is_some_and(|rest| !rest.stored));
        match pages().and_then(|pages| Ok(pages || blocks()?)) {
            Ok(wants) => wants,
            Err(error) => {
                tracing::error!(%vm, %error, "the source has to wait");
                true
            }
        }
    }

    /// What is remembered of a VM whose pages are elsewhere; `None` where none are.
    ///
    /// # Errors
    /// When it is there and cannot be read or is damaged.
    pub fn gathering(&self, vm: &VmId) -> Result<Option<Gathering>, StoreError> {
        self.recall(self.gathering_path(vm))
    }

    /// Remembers, durably.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write_gathering(&self, vm: &VmId, gathering: &Gathering) -> Result<(), StoreError> {
        self.remember(&self.gathering_path(vm), &format!(".{vm}.gathering.new"), gathering)
    }

    /// Where what was told of the VM's pages is kept, for as long as something is remembered of it.
    #[must_use]
    pub fn journal_path(&self, vm: &VmId) -> PathBuf {
        self.file(&format!("{vm}.pages"))
    }

    /// Nothing of the VM is elsewhere any more, or the VM is not this host's. No error where nothing
    /// was remembered.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn end_gathering(&self, vm: &VmId) -> Result<(), StoreError> {
        // Of no use without the other, and written anew with the next.
        let _ = fs::remove_file(self.journal_path(vm));
        self.forget(&self.gathering_path(vm))
    }

    /// The VM's guest has died here. While `source` still has all of it, it is that host's to bring back: until an
    /// operator says which of both, it is not started here, as one that vanished before it was seen to run.
    /// What is elsewhere is of no use to anybody else.
    ///
    /// # Errors
    /// As [`Self::end_gathering`], and [`Store::write`].
    pub fn end_dead(
        &self,
        vm: &VmId,
        generation: Generation,
        source: &HostId,
    ) -> Result<(), StoreError> {
        if let Some(kept) = self.gathering(vm)?.filter(|kept| !kept.released) {
            let (via, from) = (Some(kept.migration), Some(source.clone()));
            self.write(vm, &Record::Owner { generation, via, from, resumed: false })?;
        }
        self.end_gathering(vm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_gathers_from_when_it_is_written_until_it_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let vm = VmId::new("web").unwrap();
        assert!(!store.wants_source(&vm));
        let mut gathering = Gathering {
            migration: MigrationId::new("m1").unwrap(),
            layout: vec![Block { name: "pc.ram".into(), pages: 9 }],
            ram: 0,
            scattered: Some(InStores { stores: vec![], key: "00".repeat(32) }),
            released: false,
        };
        store.write_gathering(&vm, &gathering).unwrap();
        assert!(store.wants_source(&vm));
        assert_eq!(store.gathering(&vm).unwrap(), Some(gathering.clone()));
        assert!(store.read_all().unwrap().is_empty(), "it is no record of ownership");
        assert!(!format!("{gathering:?}").contains("0000"), "the key is printed");
        gathering.released = true;
        store.write_gathering(&vm, &gathering).unwrap();
        assert!(!store.wants_source(&vm));
        store.end_gathering(&vm).unwrap();
        store.end_gathering(&vm).unwrap();
        assert_eq!(store.gathering(&vm).unwrap(), None);
    }

    #[test]
    fn one_that_dies_is_started_here_only_once_its_source_has_nothing_of_it() {
        use crate::vms::ownership::Ownership;
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (vm, source) = (VmId::new("web").unwrap(), HostId::new("h1").unwrap());
        let migration = MigrationId::new("m1").unwrap();
        for released in [false, true] {
            let (generation, via) = (Generation(2), Some(migration.clone()));
            let from = Some(source.clone());
            store.write(&vm, &Record::Owner { generation, via, from, resumed: true }).unwrap();
            let gathering = Gathering {
                migration: migration.clone(),
                layout: vec![],
                ram: 0,
                scattered: None,
                released,
            };
            store.write_gathering(&vm, &gathering).unwrap();
            store.end_dead(&vm, generation, &source).unwrap();
            assert_eq!(store.gathering(&vm).unwrap(), None);
            let may = store.may_start(&vm).map_err(|refusal| refusal.to_string());
            assert_eq!(may.is_ok(), released, "{may:?}");
            assert!(released || may.unwrap_err().contains("claim web --fenced --host h1"));
        }
    }
}
