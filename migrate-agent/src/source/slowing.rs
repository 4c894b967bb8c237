//! A guest that dirties its memory faster than its own host takes it in is slowed down, unless its owner
//! forbids that (`forbid_throttling`): post-copy and scatter-gather have no other limit, because what is
//! absorbed never waits for the link.
//!
//! QEMU does it (capability `auto-converge`), step by step, and no longer than the copying lasts. When to
//! begin is decided here: QEMU takes a guest that waits for its disks to be in step, and of which it sends just
//! what is dirtied meanwhile, for one that outruns it. Used by `copying.rs`; why this and not QEMU's own
//! post-copy is in docs/decisions/0047.

use lifeboat_policy::stop::{GiveUpReason, StopCriteria};

use super::{Failure, SourceTask};
use crate::qemu::qmp::{MigrateInfo, Qmp, QmpError, Slowing};

/// Capabilities that a relayed, plain pre-copy needs; all others are switched off, whatever an
/// earlier user of this QEMU left on.
const CAPABILITIES: [&str; 2] = ["events", "pause-before-switchover"];
/// It can only be switched on before QEMU begins.
const SLOWING: &str = "auto-converge";
/// Until it is known that it has to be: next to nothing.
const HELD: Slowing = Slowing { threshold: 100, first: 1, more: 1, most: 1 };
/// Large steps: each is tried for two passes of a second, and the host may be failing. A guest that dirties
/// less than the threshold leaves less after each pass.
const STEPS: Slowing = Slowing { threshold: 80, first: 40, more: 20, most: 99 };
/// So many passes at the last step in a row that leave no less than those before show that it is not
/// enough.
const LAST_PASSES: u32 = 4;

/// How far a guest is slowed down.
#[derive(Debug, Default)]
pub(super) struct Slowed {
    begun: bool,
    /// The least that a pass at the last step left, bytes; `None` before the first one.
    least: Option<u64>,
    /// Passes since then.
    in_vain: u32,
}

impl Slowed {
    /// The criteria by which a pass is judged that was slowed down so far, and left so much.
    pub(super) fn judged_by(
        &mut self,
        criteria: &StopCriteria,
        percent: u32,
        left: u64,
    ) -> StopCriteria {
        if percent >= STEPS.most {
            let progress = |least| (left as f64) < least as f64 * (1.0 - criteria.margin);
            if self.least.is_none_or(progress) {
                (self.least, self.in_vain) = (Some(left), 0);
            } else {
                self.in_vain += 1;
            }
        }
        StopCriteria { slows: self.begun && self.in_vain < LAST_PASSES, ..*criteria }
    }
}

impl SourceTask {
    /// Whether its guest may be slowed down. One whose pages go over the link first is not: it has other
    /// modes to move by.
    fn may_slow(&self) -> bool {
        let definition = self.context.guests.definition(&self.order.vm);
        self.memory.is_some() && !definition.is_some_and(|vm| vm.forbid_throttling)
    }

    /// Sets how its QEMU copies, before it begins.
    pub(super) async fn set_capabilities(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let [events, pause] = CAPABILITIES;
        if !self.may_slow() {
            return qmp.migrate_set_only(&CAPABILITIES).await;
        }
        qmp.migrate_set_only(&[events, pause, SLOWING]).await?;
        qmp.migrate_set_slowing(HELD).await
    }

    /// The copying does not come to an end: slows the guest down, where that is left to try.
    pub(super) async fn slow_down(
        &self,
        qmp: &Qmp,
        slowed: &mut Slowed,
        because: GiveUpReason,
    ) -> Result<(), Failure> {
        match self.memory {
            None => Err(Failure::NotConverging(because)),
            Some(_) if slowed.begun || !self.may_slow() => {
                Err(Failure::Outrun { slowed: slowed.begun })
            }
            Some(_) => {
                tracing::warn!(
                    "the guest dirties its memory faster than it is taken in: it is slowed down"
                );
                slowed.begun = true;
                Ok(qmp.migrate_set_slowing(STEPS).await?)
            }
        }
    }

    /// By how much, for whoever watches. QEMU tells a paused guest's last step on and on.
    pub(super) fn show_slowing(&mut self, info: &MigrateInfo, slowed: &Slowed) {
        let slows = slowed.begun && self.stop_seen.is_none();
        let percent = if slows { info.cpu_throttle_percentage } else { 0 };
        if percent != self.progress.now().throttle_percent {
            self.progress.update(|progress| progress.throttle_percent = percent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_step_is_given_up_when_it_brings_nothing_and_not_while_it_does() {
        let criteria = StopCriteria::default();
        let mut slowed = Slowed::default();
        assert!(!slowed.judged_by(&criteria, 0, 80 << 20).slows, "it is at its own speed");
        slowed.begun = true;
        let mut slows = |percent, mib: u64| slowed.judged_by(&criteria, percent, mib << 20).slows;
        assert!((0..9).all(|_| slows(80, 80)), "there is a step left");
        // The first one that is seen at the last step ran at the step before it.
        assert!([80, 40, 20, 10, 5, 4, 4, 4, 4].into_iter().all(|mib| slows(99, mib)));
        assert!(!slows(99, 4), "four brought nothing");
    }
}
