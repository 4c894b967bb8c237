//! Migrations whose way went down, on another way.
//!
//! A switch tells of a port within milliseconds (PORT_STATUS), LLDP of a silent link after three
//! probes. For each migration whose pages leave by what went down, the topology is asked for the
//! best way that is left, and the reservation is moved there; where there is none, the migration
//! says which links cut it. Its page link is not touched: TCP sends again what was lost on the way,
//! and the agents decide by themselves when they have waited too long.
//!
//! Deliberately not here: flows and queues (`network`), and which way is best (`topology`).

use std::collections::BTreeSet;
use std::time::Duration;

use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId};
use lifeboat_protocol::terms::Urgency;

use crate::clock;
use crate::driver::Driver;
use crate::evacuation::{EvacuationOrder, Event};
use crate::network::{Hop, PortRef, ReservationRequest, Reserved};
use crate::planner::Planner;
use crate::reservations;

/// A way that is cut for longer is looked at again this often: a port may have come back, or room.
const AGAIN: Duration = Duration::from_secs(2);

/// A migration whose way is cut.
#[derive(Debug, Clone, PartialEq)]
struct Cut {
    evacuation: EvacuationId,
    order: EvacuationOrder,
    migration: MigrationId,
    source: HostId,
    destination: HostId,
    by: Vec<PortRef>,
}

/// Why a migration has no other way.
#[derive(Debug, thiserror::Error)]
enum NoOtherWay {
    #[error(transparent)]
    Topology(#[from] lifeboat_topology::TopologyError),
    #[error(transparent)]
    Packets(#[from] crate::planner::PageFlowError),
    #[error(transparent)]
    Network(#[from] crate::network::NetworkError),
}

/// Follows what happens to links, for ever.
pub async fn reroute_forever(planner: Planner, driver: Driver) {
    let mut news = planner.network.link_news();
    loop {
        let cut = reroute_all(&planner, &driver).await;
        let heard = match cut {
            0 => news.changed().await,
            // Whoever is still cut off is tried again, also without news.
            _ => tokio::time::timeout(AGAIN, news.changed()).await.unwrap_or(Ok(())),
        };
        if heard.is_err() {
            return;
        }
    }
}

/// Looks at every migration; answers how many stay cut off.
async fn reroute_all(planner: &Planner, driver: &Driver) -> usize {
    let rates = planner.network.rates().await;
    let down: BTreeSet<PortRef> =
        rates.iter().filter(|rate| !rate.up).map(|rate| rate.at.clone()).collect();
    if down.is_empty() {
        return 0;
    }
    let mut remain = 0;
    for cut in cuts(driver, &down) {
        let begun = clock::now();
        let by: Vec<String> = cut.by.iter().map(ToString::to_string).collect();
        let by = by.join(", ");
        let migration = cut.migration.clone();
        let event = match another_way(planner, &cut).await {
            Ok((hops, reserved)) => {
                let ms = clock::now().since(begun);
                tracing::warn!(%migration, down = by, ms, "its way is down; it takes another");
                Event::Rerouted { migration, hops, reserved }
            }
            Err(error) => {
                remain += 1;
                tracing::warn!(%migration, down = by, %error, "its way is down; it has no other");
                let reason = format!("its way is down at {by} and there is no other: {error}");
                Event::CutOff { migration, reason }
            }
        };
        if driver.tell(cut.evacuation, event).await.is_err() {
            return 0;
        }
    }
    remain
}

/// The migrations whose reserved way leads over one of these ports.
fn cuts(driver: &Driver, down: &BTreeSet<PortRef>) -> Vec<Cut> {
    let fleet = driver.fleet();
    let mut cuts = Vec::new();
    for evacuation in fleet.unfinished() {
        for (record, leg) in evacuation.live() {
            let by: Vec<PortRef> = leg
                .reserved
                .hops
                .iter()
                .map(|hop| hop.at.clone())
                .filter(|at| down.contains(at))
                .collect();
            if !by.is_empty() {
                cuts.push(Cut {
                    evacuation: evacuation.id.clone(),
                    order: evacuation.order.clone(),
                    migration: leg.migration.clone(),
                    source: record.source.clone(),
                    destination: leg.destination.clone(),
                    by,
                });
            }
        }
    }
    cuts
}

async fn another_way(planner: &Planner, cut: &Cut) -> Result<(Vec<Hop>, Reserved), NoOtherWay> {
    let urgency: Urgency = cut.order.urgency;
    let hops = planner.way_now(&cut.source, &cut.destination, urgency).await?;
    let traffic = planner.page_flow(&cut.source, &cut.destination)?;
    let wished = match cut.order.fixed {
        true => hops.clone(),
        false => {
            let (rules, rates) =
                (planner.site.config.policy.rules(), planner.network.rates().await);
            let terms = reservations::terms(&cut.order);
            reservations::opening(&rules, &cut.evacuation, terms, &hops, &rates)
        }
    };
    let request = ReservationRequest {
        evacuation: cut.evacuation.clone(),
        migration: cut.migration.clone(),
        urgency,
        kind: cut.order.reservation,
        hops: wished,
        traffic,
    };
    let reserved = planner.network.reroute(request).await?;
    Ok((hops, reserved))
}
