//! Holding everybody else back where a migration cannot have a queue: a meter.
//!
//! Used by `reserve` and `release` for a host's own bridge whose kernel cannot shape its uplink, as
//! `abilities` has found. There is one meter on such a bridge, for whoever reserves there, and what it
//! lets pass is what a queue 0 would be guaranteed: the link less all that is reserved. Pages do not
//! pass it, and what comes in by the link does not (the flows are in `mark`).
//!
//! ```text
//!  VMs, host ──> pages of a migration ───────────────────> NORMAL ──> uplink
//!           '──> everything else ──> meter (drops above) ──> NORMAL
//!  uplink ───> NORMAL ──> VMs, host
//! ```
//!
//! A meter cannot lend: what a migration leaves unused nobody gets until it is released. And it cannot
//! see where NORMAL will lead a packet, so that what VMs of one host send each other passes it, too.
//! That is why it comes only where nothing better can be had. Deliberately not here: `ingress_policing`
//! of each VM's port, see docs/decisions/0035.

use lifeboat_ovs::openflow::Message;
use lifeboat_ovs::openflow::meter::{MeterCommand, MeterMod};
use lifeboat_protocol::ids::SwitchId;
use lifeboat_protocol::units::BitsPerSec;

use super::ledger::Shares;
use super::{Inner, WITHIN, locked, mark, of_openflow};
use crate::network::{Hop, NetworkError, PortRef, ReservedHop};

/// The number of our meter on every switch: "LB". Whoever else has one of it uses it in a flow, and a
/// switch with such a flow gets none of ours.
pub(super) const METER: u32 = 0x4c42;

/// How much may pass at once, as a part of a second: what a TCP connection over a few milliseconds
/// needs so that it is not held far below the rate.
const BURST_PART: u64 = 20;
/// And at least so many kbit: twelve full frames.
const LEAST_BURST: u32 = 148;

fn limit(command: MeterCommand, rate: BitsPerSec) -> Message {
    let rate = u32::try_from(rate.kbit()).unwrap_or(u32::MAX).max(1);
    let burst = u32::try_from(u64::from(rate) / BURST_PART).unwrap_or(u32::MAX).max(LEAST_BURST);
    Message::MeterMod(MeterMod::drop_above(command, METER, rate, burst))
}

/// Makes the meter anew, whatever was there. With the old one its flows go, and are to follow.
pub(super) fn renewed(shares: &Shares) -> [Message; 2] {
    [Message::MeterMod(MeterMod::delete(METER)), limit(MeterCommand::Add, shares.others)]
}

/// What an evacuation was given on a port with a meter.
pub(super) fn reserved(hop: &Hop, shares: Option<&Shares>, evacuation: &str) -> ReservedHop {
    let share = shares.and_then(|shares| {
        shares.queues.iter().find(|share| share.evacuation.as_str() == evacuation)
    });
    let rate = share.map_or(hop.rate, |share| share.rate);
    ReservedHop { at: hop.at.clone(), capacity: hop.capacity, rate, queue: 0 }
}

impl Inner {
    /// Has the meter of a port let pass what is left now.
    pub(super) async fn change_meter(&self, at: &PortRef) -> Result<(), NetworkError> {
        let shares = locked(&self.ledger).shares(at, BitsPerSec::ZERO);
        let Some(shares) = shares else { return Ok(()) };
        let handle = self.connections.openflow(&at.switch)?;
        let changed = handle.change(vec![limit(MeterCommand::Modify, shares.others)], WITHIN).await;
        changed.map_err(|error| of_openflow(&at.switch, "change its meter", error))
    }

    /// After a migration has gone: the meter lets pass what is left, or goes with its flows.
    pub(super) async fn settle_meter(&self, switch: &SwitchId) -> Result<(), NetworkError> {
        let metered = locked(&self.ledger).metered_on(switch);
        if let Some((at, _)) = metered {
            return self.change_meter(&at).await;
        }
        if !locked(&self.meters).contains(switch) {
            return Ok(());
        }
        self.remove_meter(switch).await
    }

    /// Takes the meter away, and everything that belongs to it.
    pub(super) async fn remove_meter(&self, switch: &SwitchId) -> Result<(), NetworkError> {
        let handle = self.connections.openflow(switch)?;
        // Flows first, so that none is left that names a meter which is gone.
        let changes =
            vec![Message::FlowMod(mark::delete_hold()), Message::MeterMod(MeterMod::delete(METER))];
        let removed = handle.change(changes, WITHIN).await;
        removed.map_err(|error| of_openflow(switch, "remove its meter", error))?;
        locked(&self.meters).remove(switch);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_lets_pass_the_rate_and_bursts_of_a_few_frames_at_least() {
        let band = |rate| match limit(MeterCommand::Add, rate) {
            Message::MeterMod(meter) => (meter.meter, meter.bands[0].rate, meter.bands[0].burst),
            other => panic!("{other:?}"),
        };
        assert_eq!(band(BitsPerSec::from_mbit(100)), (METER, 100_000, 5_000));
        assert_eq!(band(BitsPerSec::from_mbit(1)), (METER, 1_000, LEAST_BURST));
        // A meter of 0 is none.
        assert_eq!(band(BitsPerSec::ZERO), (METER, 1, LEAST_BURST));
    }
}
