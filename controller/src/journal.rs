//! What must survive `kill -9`: the term, the evacuations, the cordoned hosts. An embedded database
//! (redb); every write is one transaction that is on the disk when the call returns.
//!
//! The driver writes an evacuation's new state here *before* it performs the actions which that
//! state wants. So a controller that died between the two finds an action that perhaps was not
//! performed, never a performed one of which it knows nothing. Deliberately not here: what the
//! agents know better (how far a migration is), and secrets.

use std::path::{Path, PathBuf};

use lifeboat_protocol::ids::{EvacuationId, HostId, Term};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::evacuation::Evacuation;

const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");
const EVACUATIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("evacuations");
const CORDONED: TableDefinition<'_, &str, ()> = TableDefinition::new("cordoned");

/// What went wrong with the journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file cannot be opened: another controller has it, or it is no journal.
    #[error(
        "the journal {path} cannot be opened: is another controller running on this state_dir?"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// What the database says.
        #[source]
        source: Box<redb::Error>,
    },
    /// Reading or writing failed.
    #[error("the journal could not {doing}")]
    Store {
        /// What was tried.
        doing: &'static str,
        /// What the database says.
        #[source]
        source: Box<redb::Error>,
    },
    /// A record that this version does not understand.
    #[error("evacuation {id} in the journal cannot be read; it was written by another version")]
    Record {
        /// Which.
        id: String,
        /// What does not fit.
        #[source]
        source: serde_json::Error,
    },
    /// An evacuation that cannot be written down.
    #[error("evacuation {id} cannot be written down")]
    Encode {
        /// Which.
        id: EvacuationId,
        /// What does not fit.
        #[source]
        source: serde_json::Error,
    },
}

/// Names what was tried in a database's error.
fn store<E: Into<redb::Error>>(doing: &'static str) -> impl Fn(E) -> JournalError {
    move |error| JournalError::Store { doing, source: Box::new(error.into()) }
}

/// The journal, open. Only one process can have it.
#[derive(Debug)]
pub struct Journal {
    database: Database,
}

impl Journal {
    /// Opens the journal in `state_dir`, or makes an empty one.
    ///
    /// # Errors
    /// When another process has it open, or it is not a journal.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let path = state_dir.join("controller.redb");
        let database = Database::create(&path)
            .map_err(|error| JournalError::Open { path, source: Box::new(error.into()) })?;
        let journal = Self { database };
        journal.make_tables()?;
        Ok(journal)
    }

    fn make_tables(&self) -> Result<(), JournalError> {
        let doing = "make its tables";
        let writing = self.database.begin_write().map_err(store(doing))?;
        writing.open_table(COUNTERS).map_err(store(doing))?;
        writing.open_table(EVACUATIONS).map_err(store(doing))?;
        writing.open_table(CORDONED).map_err(store(doing))?;
        writing.commit().map_err(store(doing))
    }

    /// The term of this start: one more than any before it, durable before it is used.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn next_term(&self) -> Result<Term, JournalError> {
        self.count("term", "count its term").map(Term)
    }

    /// A number for an evacuation that no other ever had.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn next_evacuation(&self) -> Result<u64, JournalError> {
        self.count("evacuation", "number an evacuation")
    }

    fn count(&self, counter: &str, doing: &'static str) -> Result<u64, JournalError> {
        let writing = self.database.begin_write().map_err(store(doing))?;
        let next = {
            let mut table = writing.open_table(COUNTERS).map_err(store(doing))?;
            let last = table.get(counter).map_err(store(doing))?.map_or(0, |value| value.value());
            let next = last.saturating_add(1);
            table.insert(counter, next).map_err(store(doing))?;
            next
        };
        writing.commit().map_err(store(doing))?;
        Ok(next)
    }

    /// Writes an evacuation's state. It is on the disk when this returns.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&self, evacuation: &Evacuation) -> Result<(), JournalError> {
        let doing = "write an evacuation";
        let bytes = serde_json::to_vec(evacuation)
            .map_err(|source| JournalError::Encode { id: evacuation.id.clone(), source })?;
        let writing = self.database.begin_write().map_err(store(doing))?;
        {
            let mut table = writing.open_table(EVACUATIONS).map_err(store(doing))?;
            table.insert(evacuation.id.as_str(), bytes.as_slice()).map_err(store(doing))?;
        }
        writing.commit().map_err(store(doing))
    }

    /// Every evacuation ever written, in no particular order.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn evacuations(&self) -> Result<Vec<Evacuation>, JournalError> {
        let doing = "read its evacuations";
        let reading = self.database.begin_read().map_err(store(doing))?;
        let table = reading.open_table(EVACUATIONS).map_err(store(doing))?;
        let mut found = Vec::new();
        for row in table.iter().map_err(store(doing))? {
            let (id, bytes) = row.map_err(store(doing))?;
            let evacuation = serde_json::from_slice(bytes.value())
                .map_err(|source| JournalError::Record { id: id.value().to_owned(), source })?;
            found.push(evacuation);
        }
        Ok(found)
    }

    /// Marks a host as one that takes no VMs, or takes the mark away.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set_cordoned(&self, host: &HostId, cordoned: bool) -> Result<(), JournalError> {
        let doing = "write a host's cordon";
        let writing = self.database.begin_write().map_err(store(doing))?;
        {
            let mut table = writing.open_table(CORDONED).map_err(store(doing))?;
            if cordoned {
                table.insert(host.as_str(), ()).map_err(store(doing))?;
            } else {
                table.remove(host.as_str()).map_err(store(doing))?;
            }
        }
        writing.commit().map_err(store(doing))
    }

    /// The hosts that take no VMs.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn cordoned(&self) -> Result<Vec<HostId>, JournalError> {
        let doing = "read the cordoned hosts";
        let reading = self.database.begin_read().map_err(store(doing))?;
        let table = reading.open_table(CORDONED).map_err(store(doing))?;
        let rows = table.iter().map_err(store(doing))?;
        let names = rows.filter_map(|row| HostId::new(row.ok()?.0.value()).ok());
        Ok(names.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMs;
    use crate::evacuation::testing::order;
    use crate::evacuation::{Event, Limits, Prediction, VmRecord};
    use lifeboat_protocol::ids::VmId;

    fn evacuation(n: u64) -> Evacuation {
        let id = EvacuationId::new(format!("e{n}")).unwrap();
        Evacuation::new(id, order("h1"), Limits::default(), UnixMs(1))
    }

    #[test]
    fn a_term_is_never_used_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = Term(0);
        for _ in 0..3 {
            let term = Journal::open(dir.path()).unwrap().next_term().unwrap();
            assert!(term > last);
            last = term;
        }
    }

    /// A process that is killed leaves the file as it was after its last commit; a copy of the
    /// file taken between any two writes is what the next process would find.
    #[test]
    fn whatever_was_written_is_there_after_a_kill_between_any_two_writes() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let mut evacuation = evacuation(1);
        let vm = VmId::new("a").unwrap();
        let record =
            VmRecord::waiting(vm, evacuation.order.hosts[0].clone(), Prediction::default());
        let events =
            [Event::Planned { vms: vec![record] }, Event::CancelRequested, Event::Restarted];
        for (step, event) in events.into_iter().enumerate() {
            evacuation.apply(UnixMs(2), event, &mut Vec::new());
            journal.put(&evacuation).unwrap();
            let killed = tempfile::tempdir().unwrap();
            std::fs::copy(
                dir.path().join("controller.redb"),
                killed.path().join("controller.redb"),
            )
            .unwrap();
            let found = Journal::open(killed.path()).unwrap().evacuations().unwrap();
            assert_eq!(found, [evacuation.clone()], "after write {step}");
        }
    }

    #[test]
    fn a_second_controller_on_the_same_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Journal::open(dir.path()).unwrap();
        let error = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("another controller"), "{error}");
    }

    #[test]
    fn a_cordon_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let h1 = HostId::new("h1").unwrap();
        Journal::open(dir.path()).unwrap().set_cordoned(&h1, true).unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert!(journal.cordoned().unwrap().contains(&h1));
        journal.set_cordoned(&h1, false).unwrap();
        assert!(journal.cordoned().unwrap().is_empty());
    }
}
