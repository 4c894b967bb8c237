//! Looks after VMs that an evacuation has given up as uncertain: once an agent proves where such a
//! VM is, its record says so, also long after the evacuation has ended.
//!
//! It only asks; nothing is cancelled here.

use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId};
use tokio::sync::mpsc;

use super::hands::{Hands, Wiring};
use super::settle::judge;
use super::{Input, lock, report};
use crate::evacuation::{Event, VmPhase};

/// Between two rounds of questions.
const EVERY: Duration = Duration::from_secs(5);

/// One VM in doubt.
struct Doubt {
    evacuation: EvacuationId,
    migration: MigrationId,
    source: HostId,
    destination: HostId,
}

/// Asks about every uncertain VM, for as long as the loop lives.
pub(super) async fn prove_forever(hands: Arc<Hands>, inputs: mpsc::Sender<Input>) {
    while !inputs.is_closed() {
        tokio::time::sleep(EVERY).await;
        let Some(wiring) = &hands.wiring else { return };
        for doubt in doubts(wiring) {
            let at_source = hands.ask(&doubt.source, &doubt.migration).await;
            let at_destination = hands.ask(&doubt.destination, &doubt.migration).await;
            let Some(settlement) = judge(&at_source, &at_destination, true) else { continue };
            tracing::info!(migration = %doubt.migration, ?settlement, "no longer uncertain");
            let event = Event::Settled { migration: doubt.migration, settlement };
            report(&inputs, &doubt.evacuation, event).await;
        }
    }
}

fn doubts(wiring: &Wiring) -> Vec<Doubt> {
    let fleet = lock(&wiring.fleet);
    let mut found = Vec::new();
    for evacuation in fleet.all() {
        for record in evacuation.vms.iter().filter(|record| record.phase == VmPhase::Uncertain) {
            found.extend(record.leg.as_ref().map(|leg| Doubt {
                evacuation: evacuation.id.clone(),
                migration: leg.migration.clone(),
                source: record.source.clone(),
                destination: leg.destination.clone(),
            }));
        }
    }
    found
}
