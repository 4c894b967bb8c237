//! The experiments: each asks one question and answers it with a [`Record`].
//!
//! Used by the program `lifeboat-experiment`, inside private namespaces. A new one is a file here
//! and a line in [`EXPERIMENTS`]; one that redraws a figure has a line in [`plots`], too. The
//! convention (samples, checks, spread) is `lifeboat_lab::experiment`.

pub mod ahead;
pub mod disk_baseline;
pub mod downtime;
pub mod eviction;
pub mod faults;
pub mod livefs;
mod machine;
pub mod migratefs_3;
pub mod migratefs_4;
pub mod overhead;
pub mod plot;
pub mod reservation;
pub mod solive;
pub mod solive_5;
pub mod tenant;
mod twins;

use std::path::Path;

pub use lifeboat_lab::experiment::Record;

use crate::rig::RigError;

/// What an experiment is given.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// A first look with few runs.
    pub quick: bool,
    /// An empty folder; short, because sockets lie in it.
    pub folder: &'a Path,
    /// Where the guest image is (`lab/build`).
    pub images: &'a Path,
    /// How often each case is measured, where that is said.
    pub runs: Option<usize>,
    /// After about how many minutes it ends with what it has by then, where that is said.
    pub minutes: Option<u64>,
    /// What the contested link carries, in Mbit/s, where that is said: less for a slow machine.
    pub link_mbit: Option<u64>,
    /// Of its cases those in whose name one of these stands, where that is said; empty: all.
    pub only: &'a [String],
    /// Where the samples go while it runs, so that a broken run has not been for nothing.
    pub partial: &'a Path,
}

impl Setting<'_> {
    /// Whether this case is one of those that are wanted.
    fn wants(&self, case: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| case.contains(part))
    }

    /// Says how far it is (`done` of `of` rounds), and keeps what was sampled.
    fn keep(&self, record: &Record, done: usize, of: usize) {
        eprintln!("{}: {done} of {of} rounds", record.name);
        let kept = serde_json::to_vec_pretty(record)
            .map_err(std::io::Error::other)
            .and_then(|text| std::fs::write(self.partial, text));
        if let Err(error) = kept {
            eprintln!("{}: cannot keep the samples so far: {error}", record.name);
        }
    }
}

/// An experiment's name and what it asks, in one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: &'static str,
    /// What it asks.
    pub about: &'static str,
}

/// All of them.
pub const EXPERIMENTS: &[Entry] = &[
    Entry {
        name: reservation::NAME,
        about: "does a migration get the share of a full link that is reserved for it, and no more?",
    },
    Entry {
        name: overhead::NAME,
        about: "what does a migration through two agents cost, against QEMU migrating by itself?",
    },
    Entry {
        name: solive_5::NAME,
        about: "what does a page cost on its way to a store and back, by batch size?",
    },
    Entry {
        name: faults::NAME,
        about: "what does a guest wait for a page that is in a store, against one bare GET?",
    },
    Entry {
        name: ahead::NAME,
        about: "how much sooner is a host rid of a guest whose pages go to stores while it runs?",
    },
    Entry {
        name: eviction::NAME,
        about: "how soon is a guest off its host by our ways, and by QEMU's own?",
    },
    Entry {
        name: downtime::NAME,
        about: "how long do guests stand still, by the mode in which they move?",
    },
    Entry {
        name: tenant::NAME,
        about: "what does a migration do to an application that has a queue of its own?",
    },
    Entry {
        name: solive::three::NAME,
        about: "does the order in which guests leave matter, and is ours among the best?",
    },
    Entry {
        name: solive::six::NAME,
        about: "what is reserved while four guests leave, and are they gone sooner for it?",
    },
    Entry {
        name: solive::seven::NAME,
        about: "does a reservation that follows the link beat one that stays?",
    },
    Entry {
        name: solive::eight::NAME,
        about: "how much sooner is a host empty whose pages wait at others, not at a slow destination?",
    },
    Entry {
        name: livefs::five::NAME,
        about: "how long does a disk take if all, some or nothing of it goes before its VM?",
    },
    Entry {
        name: livefs::six::NAME,
        about: "how long until a VM runs elsewhere whose disk is watched first?",
    },
    Entry {
        name: livefs::seven::NAME,
        about: "what do reads wait for after an early hand-over, by how long the disk was watched?",
    },
    Entry {
        name: livefs::order::NAME,
        about: "what does it bring to send the busy segments last, or first where a guest moves before?",
    },
    Entry {
        name: migratefs_3::NAME,
        about: "what does a disk cost that is open through our mount, and is a limit kept?",
    },
    Entry {
        name: migratefs_4::NAME,
        about: "does a disk leave by its date, and what does that leave its guest?",
    },
    Entry {
        name: disk_baseline::NAME,
        about: "what does a VM take that goes with its disk, against QEMU's own mirror?",
    },
];

/// Whether an experiment stands on `lab/up`, which makes namespaces of its own; the others are run
/// inside private ones.
#[must_use]
pub fn raises_a_cloud(name: &str) -> bool {
    let own = [solive::three::NAME, solive::six::NAME, solive::seven::NAME, solive::eight::NAME];
    own.contains(&name) || name == downtime::NAME
}

/// Runs one; `None` when there is none of that name.
///
/// # Errors
/// When the rig cannot be raised. A bound that does not hold is no error: it is in the record.
pub async fn run(name: &str, setting: Setting<'_>) -> Option<Result<Record, RigError>> {
    match name {
        reservation::NAME => Some(reservation::run(setting).await),
        overhead::NAME => Some(overhead::run(setting).await),
        solive_5::NAME => Some(solive_5::run(setting).await),
        faults::NAME => Some(faults::run(setting).await),
        ahead::NAME => Some(ahead::run(setting).await),
        eviction::NAME => Some(eviction::run(setting).await),
        downtime::NAME => Some(downtime::run(setting)),
        tenant::NAME => Some(tenant::run(setting).await),
        solive::three::NAME => Some(solive::three::run(setting)),
        solive::six::NAME => Some(solive::six::run(setting)),
        solive::seven::NAME => Some(solive::seven::run(setting)),
        solive::eight::NAME => Some(solive::eight::run(setting).await),
        livefs::five::NAME => Some(livefs::five::run(setting).await),
        livefs::six::NAME => Some(livefs::six::run(setting).await),
        livefs::seven::NAME => Some(livefs::seven::run(setting).await),
        livefs::order::NAME => Some(livefs::order::run(setting).await),
        migratefs_3::NAME => Some(migratefs_3::run(setting).await),
        migratefs_4::NAME => Some(migratefs_4::run(setting).await),
        disk_baseline::NAME => Some(disk_baseline::run(setting).await),
        _ => None,
    }
}

/// The figures of a record; most experiments have none.
#[must_use]
pub fn plots(record: &Record) -> Vec<plot::Plot> {
    match record.name.as_str() {
        reservation::NAME => vec![reservation::plot(record)],
        solive_5::NAME => solive_5::plots(record),
        eviction::NAME => eviction::plots(record),
        tenant::NAME => vec![tenant::plot(record)],
        solive::three::NAME => solive::three::plots(record),
        solive::six::NAME => solive::six::plots(record),
        solive::seven::NAME => solive::seven::plots(record),
        solive::eight::NAME => solive::eight::plots(record),
        livefs::five::NAME => livefs::five::plots(record),
        livefs::six::NAME => livefs::six::plots(record),
        livefs::seven::NAME => livefs::seven::plots(record),
        migratefs_3::NAME => migratefs_3::plots(record),
        migratefs_4::NAME => migratefs_4::plots(record),
        disk_baseline::NAME => disk_baseline::plots(record),
        _ => vec![],
    }
}
