//! A real guest that is scattered in batches of each size: how often it asks for a page, and how long all of
//! it takes.
//!
//! The hosts, the guest and the store are those of `faults`; the background fetches as fast as it goes, as an
//! operator has it.

use lifeboat_lab::experiment::{Record, Sample};

use super::{BATCHES, Setting};
use crate::experiments::faults::{self, Asked};
use crate::rig::RigError;
use crate::rig::userfaultfd::Allowed;

pub(super) const FAULTS: &str = faults::SERVED;
pub(super) const WAIT: &str = faults::FAULT;
pub(super) const EVICTED: &str = faults::EVICTED;
pub(super) const GATHERED: &str = faults::GATHERED;
pub(super) const WRONG: &str = faults::WRONG;

pub(super) fn case(batch: u16) -> String {
    format!("a guest, {batch} per pack")
}

/// Moves the guest to and fro, `runs` times by each size; `before` rounds of `of` have been.
///
/// # Errors
/// When the rig cannot be raised, or a migration fails.
pub(super) async fn measure(
    setting: &Setting<'_>,
    record: &mut Record,
    (runs, before, of): (usize, usize, usize),
) -> Result<(), RigError> {
    let folder = setting.folder.join("g");
    std::fs::create_dir(&folder).map_err(RigError::io("cannot make a folder"))?;
    let _allowed = Allowed::now()?;
    let mut rig = faults::Rig::raise(&Setting { folder: &folder, ..*setting }).await?;
    let mut moves = 0;
    for run in 0..runs {
        for batch in BATCHES {
            let asked = Asked { batch_pages: batch.into(), ..Asked::default() };
            let figures = rig.measure(moves, asked).await?;
            record.samples.push(Sample { case: case(batch), run, figures });
            moves += 1;
        }
        setting.keep(record, before + run + 1, of);
    }
    Ok(())
}
