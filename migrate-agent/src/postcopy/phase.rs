//! The phases of a destination's memory, and which follows which. Used by [`super::Gather`].
//!
//! ```text
//!  Absorbing --Complete--> Loading --Loaded--> Standing --Committed--> Running
//!      |                      |                    |                      | every page placed
//!      '------- Abort --------+------ Abort -------'                      v
//!                  v                                        Done <-Shut- Closing
//!              Abandoned
//! ```
//!
//! There is no way back from Running: the guest belongs to this host from COMMIT on.

use thiserror::Error;

/// Where a destination's memory stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Records come in.
    Absorbing,
    /// QEMU loads the devices.
    Loading,
    /// QEMU stands paused, loaded.
    Standing,
    /// The guest runs here.
    Running,
    /// Every page is placed and RAM END is written.
    Closing,
    /// QEMU has confirmed.
    Done,
    /// Given up before COMMIT; the VM runs at the source.
    Abandoned,
}

/// What leads from a phase to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Every page was told.
    Complete,
    /// The devices are loaded.
    Loaded,
    /// COMMIT is durable.
    Committed,
    /// QEMU has said SHUT.
    Shut,
    /// Given up.
    Abort,
}

/// A step that the phase does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{step:?} cannot follow in phase {phase:?}")]
pub struct WrongStep {
    /// The phase.
    pub phase: Phase,
    /// The step.
    pub step: Step,
}

impl Phase {
    /// The phase after `step`.
    ///
    /// # Errors
    /// [`WrongStep`].
    pub fn next(self, step: Step) -> Result<Self, WrongStep> {
        match (self, step) {
            (Self::Absorbing, Step::Complete) => Ok(Self::Loading),
            (Self::Loading, Step::Loaded) => Ok(Self::Standing),
            (Self::Standing, Step::Committed) => Ok(Self::Running),
            (Self::Closing, Step::Shut) => Ok(Self::Done),
            (Self::Absorbing | Self::Loading | Self::Standing, Step::Abort) => Ok(Self::Abandoned),
            (phase, step) => Err(WrongStep { phase, step }),
        }
    }

    /// Are pages served?
    #[must_use]
    pub fn is_serving(self) -> bool {
        matches!(self, Self::Loading | Self::Standing | Self::Running)
    }
}

#[test]
fn every_pair_of_phase_and_step() {
    use Phase::{Abandoned, Absorbing, Closing, Done, Loading, Running, Standing};
    use Step::{Abort, Committed, Complete, Loaded, Shut};
    let allowed = [
        (Absorbing, Complete, Loading),
        (Absorbing, Abort, Abandoned),
        (Loading, Loaded, Standing),
        (Loading, Abort, Abandoned),
        (Standing, Committed, Running),
        (Standing, Abort, Abandoned),
        (Closing, Shut, Done),
    ];
    for phase in [Absorbing, Loading, Standing, Running, Closing, Done, Abandoned] {
        for step in [Complete, Loaded, Committed, Shut, Abort] {
            let found = allowed.iter().find(|(from, by, _)| (*from, *by) == (phase, step));
            let expected = found.map(|(_, _, to)| *to).ok_or(WrongStep { phase, step });
            assert_eq!(phase.next(step), expected);
        }
    }
}
