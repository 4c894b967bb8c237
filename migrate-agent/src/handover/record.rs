//! The durable record of how this host stands to one VM. Written by [`super::store`]; read at
//! start, before any guest is touched. No I/O here.

use lifeboat_protocol::ids::{Generation, HostId, MigrationId};
use serde::{Deserialize, Serialize};

use super::Standing;

/// One VM's record on one host. No record: this host has never had to do with the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Record {
    /// This host owns the VM.
    Owner {
        /// The generation that it owns.
        generation: Generation,
        /// The migration that brought it here; `None` for a VM first started here, or claimed.
        via: Option<MigrationId>,
        /// The host that it came from, by that migration.
        from: Option<HostId>,
        /// Whether the guest has been seen to run since it came; until then a paused guest is one
        /// that a crash kept from being resumed, afterwards one that somebody paused.
        resumed: bool,
    },
    /// Owned, and being sent away; not ceded.
    Sending {
        /// The generation that this host owns.
        generation: Generation,
        /// The migration.
        migration: MigrationId,
        /// Where to.
        destination: HostId,
        /// Where that host answers ([`Standing`]).
        page_address: String,
    },
    /// Ceded: the point of no return has been passed. This host may neither start nor resume it.
    Ceded {
        /// The generation that the destination owns.
        generation: Generation,
        /// The migration.
        migration: MigrationId,
        /// Where to.
        destination: HostId,
        /// Where that host answers.
        page_address: String,
        /// Whether the destination has said that the guest runs.
        confirmed: bool,
    },
    /// Loaded and paused here, and the source told so: it may have ceded.
    Loaded {
        /// The generation that this host will own.
        generation: Generation,
        /// The migration.
        migration: MigrationId,
        /// Where from.
        source: HostId,
        /// Where that host answers.
        page_address: String,
    },
    /// This host will never own the VM by this migration; its guest never ran here.
    Refused {
        /// The generation that it would have owned.
        generation: Generation,
        /// The migration.
        migration: MigrationId,
        /// Where from.
        source: HostId,
    },
}

/// What became of a guest on the host that received it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Here {
    /// Its QEMU is there; or has ended, and what it wrote is in disks that follow it.
    pub guest_lives: bool,
    /// Pages of it are still wanted from the source.
    pub gathering: bool,
}

impl Record {
    /// Whether a guest of this VM may be started or resumed here, now, without a hand-over.
    #[must_use]
    pub const fn may_run(&self) -> bool {
        matches!(self, Self::Owner { .. } | Self::Sending { .. })
    }

    /// Writing it, as a name in logs and marks.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Owner { resumed: false, .. } => "persist-owner",
            Self::Owner { .. } => "persist-resumed",
            Self::Sending { .. } => "persist-sending",
            Self::Ceded { confirmed: false, .. } => "persist-ceded",
            Self::Ceded { .. } => "persist-confirmed",
            Self::Loaded { .. } => "persist-loaded",
            Self::Refused { .. } => "persist-refused",
        }
    }

    /// The generation that the record speaks of.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        match self {
            Self::Owner { generation, .. }
            | Self::Sending { generation, .. }
            | Self::Ceded { generation, .. }
            | Self::Loaded { generation, .. }
            | Self::Refused { generation, .. } => *generation,
        }
    }

    /// What this host answers when the *destination* of `migration` asks it, the source.
    #[must_use]
    pub fn standing_as_source(
        record: Option<&Self>,
        migration: &MigrationId,
        asked: Generation,
    ) -> Standing {
        match record {
            Some(Self::Sending { migration: ours, .. }) if ours == migration => Standing::Pending,
            Some(Self::Ceded { migration: ours, .. }) if ours == migration => Standing::Ceded,
            // Owned again, by an abort (a lower generation than asked for), by the destination's
            // refusal, or by a claim (a higher one); in each case that migration is over.
            Some(Self::Owner { generation, via, .. })
                if via.as_ref() != Some(migration) && *generation != asked =>
            {
                Standing::Aborted
            }
            // Sent again, or ceded, by another migration: that one could begin only when this host
            // owned again, so the one asked about is over, whatever generation was given since.
            Some(Self::Sending { .. }) => Standing::Aborted,
            Some(Self::Ceded { generation, .. }) if *generation >= asked => Standing::Aborted,
            _ => Standing::Unknown,
        }
    }

    /// What this host answers when the *source* of `migration` asks it, the destination.
    /// `here`: what became of the guest on this host.
    #[must_use]
    pub fn standing_as_destination(
        record: Option<&Self>,
        migration: &MigrationId,
        asked: Generation,
        here: Here,
    ) -> Standing {
        match record {
            Some(Self::Loaded { migration: ours, .. }) if ours == migration => Standing::Loaded,
            Some(Self::Refused { migration: ours, .. }) if ours == migration => Standing::Refused,
            // The source ends its guest when it hears "owned": said only once the guest has been
            // seen to run, so that a QEMU which cannot resume does not cost the other copy; and only
            // once no page of it is wanted from there any more.
            Some(Self::Owner { via: Some(ours), resumed, .. })
                if ours == migration && here.guest_lives =>
            {
                match (resumed, here.gathering) {
                    (false, _) => Standing::Pending,
                    (true, true) => Standing::Gathering,
                    (true, false) => Standing::Owned,
                }
            }
            Some(Self::Owner { via: Some(ours), .. }) if ours == migration => Standing::Died,
            // It came by that migration, or must have, and has gone on from here since: it ran.
            Some(Self::Sending { generation, .. }) if *generation == asked => Standing::Owned,
            Some(Self::Owner { generation, .. } | Self::Ceded { generation, .. })
                if *generation > asked =>
            {
                Standing::Owned
            }
            _ => Standing::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migration(name: &str) -> MigrationId {
        MigrationId::new(name).unwrap()
    }

    fn owner(generation: u64, via: Option<&str>) -> Record {
        Record::Owner {
            generation: Generation(generation),
            via: via.map(migration),
            from: None,
            resumed: true,
        }
    }

    const HERE: Here = Here { guest_lives: true, gathering: false };

    fn host() -> HostId {
        HostId::new("h2").unwrap()
    }

    #[test]
    fn only_an_owner_may_run_a_guest() {
        let (generation, page_address) = (Generation(2), "10.0.0.2:7000".to_owned());
        let m = migration("m1");
        let ceded = |confirmed| Record::Ceded {
            generation,
            migration: m.clone(),
            destination: host(),
            page_address: page_address.clone(),
            confirmed,
        };
        let refused = Record::Refused { generation, migration: m.clone(), source: host() };
        let loaded = Record::Loaded {
            generation,
            migration: m.clone(),
            source: host(),
            page_address: page_address.clone(),
        };
        assert!(owner(1, None).may_run());
        for record in [ceded(false), ceded(true), refused, loaded] {
            assert!(!record.may_run(), "{record:?}");
        }
    }

    #[test]
    fn nothing_recorded_proves_nothing() {
        let m = migration("m1");
        assert_eq!(Record::standing_as_source(None, &m, Generation(2)), Standing::Unknown);
        assert_eq!(
            Record::standing_as_destination(None, &m, Generation(2), HERE),
            Standing::Unknown
        );
    }

    #[test]
    fn a_source_that_owns_again_says_aborted() {
        let m = migration("m1");
        let standing =
            |record: Record| Record::standing_as_source(Some(&record), &m, Generation(2));
        assert_eq!(standing(owner(1, None)), Standing::Aborted);
        assert_eq!(standing(owner(3, None)), Standing::Aborted);
        // The very generation asked about cannot be owned by the source: no proof in that.
        assert_eq!(standing(owner(2, None)), Standing::Unknown);
    }

    #[test]
    fn a_source_that_ceded_by_another_migration_says_aborted() {
        let ceded = Record::Ceded {
            generation: Generation(2),
            migration: migration("m2"),
            destination: host(),
            page_address: String::new(),
            confirmed: true,
        };
        let standing =
            |m: &str| Record::standing_as_source(Some(&ceded), &migration(m), Generation(2));
        assert_eq!(standing("m1"), Standing::Aborted);
        assert_eq!(standing("m2"), Standing::Ceded);
    }

    #[test]
    fn a_destination_that_has_passed_it_on_did_own_it() {
        let m = migration("m1");
        let passed_on = Record::Ceded {
            generation: Generation(3),
            migration: migration("m2"),
            destination: host(),
            page_address: String::new(),
            confirmed: true,
        };
        let standing = |record: &Record| {
            Record::standing_as_destination(Some(record), &m, Generation(2), HERE)
        };
        assert_eq!(standing(&passed_on), Standing::Owned);
        assert_eq!(standing(&owner(2, Some("m1"))), Standing::Owned);
        assert_eq!(standing(&owner(1, None)), Standing::Unknown);
    }

    #[test]
    fn an_owner_without_its_qemu_is_dead_not_unknown() {
        let m = migration("m1");
        let record = owner(2, Some("m1"));
        assert_eq!(
            Record::standing_as_destination(
                Some(&record),
                &m,
                Generation(2),
                Here { guest_lives: false, gathering: true }
            ),
            Standing::Died
        );
    }

    #[test]
    fn the_source_may_go_only_when_nothing_is_wanted_of_it() {
        let m = migration("m1");
        let standing = |resumed, gathering| {
            let record = Record::Owner {
                generation: Generation(2),
                via: Some(migration("m1")),
                from: None,
                resumed,
            };
            let here = Here { guest_lives: true, gathering };
            Record::standing_as_destination(Some(&record), &m, Generation(2), here)
        };
        assert_eq!(standing(true, false), Standing::Owned);
        assert_eq!(standing(true, true), Standing::Gathering);
        assert_eq!(standing(false, true), Standing::Pending);
    }
}
