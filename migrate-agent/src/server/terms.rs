//! The highest controller term: obeyed, remembered durably; lower ones are refused.
//!
//! Used by the gRPC server for every command. Two controllers may believe to be the one for a
//! while (a restarted one, and its predecessor in a partition); the agents settle it.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use lifeboat_protocol::ids::Term;

/// Why a term was not obeyed.
#[derive(Debug, thiserror::Error)]
pub enum TermError {
    /// A newer controller has been here.
    #[error(
        "this agent obeys the controller of term {}, and the command is of term {}: another controller has taken over; restart this one if that was not meant", highest.0, given.0
    )]
    Stale {
        /// Obeyed.
        highest: Term,
        /// Of the command.
        given: Term,
    },
    /// It could not be remembered: nothing is done that could not be defended after a crash.
    #[error("cannot keep the controller's term in {}", path.display())]
    Store {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file does not hold a term.
    #[error("{} does not hold a term; remove it if no controller older than the present one still runs", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
    },
}

/// The highest term seen, kept in a file.
#[derive(Debug)]
pub struct Terms {
    path: PathBuf,
    highest: Mutex<Term>,
}

impl Terms {
    /// Reads the file at `path`; no file is term 0.
    ///
    /// # Errors
    /// When it cannot be read, or holds something else.
    pub fn open(path: PathBuf) -> Result<Self, TermError> {
        let highest = match std::fs::read_to_string(&path) {
            Ok(text) => match text.trim().parse() {
                Ok(term) => Term(term),
                Err(_) => return Err(TermError::Corrupt { path }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Term(0),
            Err(source) => return Err(TermError::Store { path, source }),
        };
        Ok(Self { path, highest: Mutex::new(highest) })
    }

    /// The highest term seen.
    #[must_use]
    pub fn highest(&self) -> Term {
        *self.highest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Obeys a command of term `given`, or refuses it. A new highest term is on the disk when
    /// this returns. It blocks for an fsync, a few times in a controller's life.
    ///
    /// # Errors
    /// When a higher term has been seen, or the new one cannot be kept.
    pub fn admit(&self, given: Term) -> Result<(), TermError> {
        let mut highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        if given < *highest {
            return Err(TermError::Stale { highest: *highest, given });
        }
        if given > *highest {
            let failed = |source| TermError::Store { path: self.path.clone(), source };
            self.write(given).map_err(failed)?;
            tracing::info!(term = given.0, "obeying a controller of a new term");
            *highest = given;
        }
        Ok(())
    }

    fn write(&self, term: Term) -> io::Result<()> {
        let partial = self.path.with_extension("partial");
        let mut file = File::create(&partial)?;
        writeln!(file, "{}", term.0)?;
        file.sync_all()?;
        std::fs::rename(&partial, &self.path)?;
        match self.path.parent() {
            Some(directory) => File::open(directory)?.sync_all(),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_term_is_obeyed_also_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("term");
        let terms = Terms::open(path.clone()).unwrap();
        terms.admit(Term(3)).unwrap();
        terms.admit(Term(3)).unwrap();
        let terms = Terms::open(path.clone()).unwrap();
        assert_eq!(terms.highest(), Term(3));
        let error = terms.admit(Term(2)).unwrap_err().to_string();
        assert!(error.contains("term 3") && error.contains("term 2"), "{error}");
        terms.admit(Term(4)).unwrap();
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(Terms::open(path), Err(TermError::Corrupt { .. })));
    }
}
