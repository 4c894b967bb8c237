//! Reservations that follow what passes on the links: SOLive's Algorithm 1, once a second.
//!
//! A thin driver around `lifeboat_policy::reserve`: it reads the counters, asks the policy, has the
//! switches changed, and tells a strict migration's agent what it may send now, so that its pages
//! do not pile up before a queue with a ceiling. What to begin with is asked by the driver's hands
//! ([`opening`]); here is what follows. Deliberately not here: the algorithm, admission (the switches'
//! ledger clamps every wish), and any queue.
//!
//! Only migrations that send are followed: one whose destination still makes room uses nothing, and
//! would lose a second when it begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_policy::reserve::{Held, Readings, Rules, Terms, adapt, begin};
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId};
use lifeboat_protocol::terms::ReservationKind;
use lifeboat_protocol::units::BitsPerSec;

use crate::agents::Agents;
use crate::driver::Driver;
use crate::evacuation::{Evacuation, EvacuationOrder, VmPhase};
use crate::network::{Adjustment, Hop, Network, PortRate, PortRef, Reserved};

/// SOLive's second (Algorithm 1, line 16).
const PERIOD: Duration = Duration::from_secs(1);

/// What to ask of each port at the beginning: max(available, urgency), and the same along the whole
/// way. A port on which the evacuation holds a queue already keeps what that has.
#[must_use]
pub fn opening(
    rules: &Rules,
    evacuation: &EvacuationId,
    terms: Terms,
    hops: &[Hop],
    rates: &[PortRate],
) -> Vec<Hop> {
    let at = |hop: &Hop| rates.iter().find(|rate| rate.at == hop.at);
    let wanted = hops.iter().filter(|hop| hop.rate > BitsPerSec::ZERO);
    let most = |hop: &Hop| {
        let used = at(hop).and_then(|rate| rate.transmitted);
        begin(rules, terms, hop.capacity, used)
    };
    let narrowest = wanted.map(most).min().unwrap_or_default();
    let opened = hops.iter().map(|hop| {
        let queues = at(hop).into_iter().flat_map(|rate| &rate.queues);
        let held = queues.into_iter().find(|queue| queue.evacuation == *evacuation);
        let rate = match held {
            Some(queue) => queue.reserved,
            None if hop.rate == BitsPerSec::ZERO => hop.rate,
            None => narrowest,
        };
        Hop { rate, ..hop.clone() }
    });
    opened.collect()
}

/// The same wishes, except where the evacuation has a queue already: that stays as it is.
#[must_use]
pub fn beside(evacuation: &EvacuationId, mut hops: Vec<Hop>, rates: &[PortRate]) -> Vec<Hop> {
    for hop in &mut hops {
        let at = rates.iter().filter(|rate| rate.at == hop.at).flat_map(|rate| &rate.queues);
        if let Some(held) = at.into_iter().find(|queue| queue.evacuation == *evacuation) {
            hop.rate = held.reserved;
        }
    }
    hops
}

/// What an order asks for.
#[must_use]
pub fn terms(order: &EvacuationOrder) -> Terms {
    Terms { urgency: order.urgency, kind: order.reservation }
}

/// What the source of a migration may send at most: what is reserved strictly, or else `capacity`;
/// and never more than is wanted of a port that can do nothing itself.
#[must_use]
pub fn sending_limit(
    kind: ReservationKind,
    reserved: &Reserved,
    capacity: BitsPerSec,
) -> BitsPerSec {
    let most = match kind {
        ReservationKind::Strict if !reserved.hops.is_empty() => reserved.rate(),
        _ => capacity,
    };
    reserved.paced_rate().map_or(most, |paced| most.min(paced))
}

/// A migration that sends, and the ports that its pages leave by.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sending {
    migration: MigrationId,
    source: HostId,
    way: Vec<PortRef>,
    /// What the source keeps to for ports that can do nothing themselves.
    paced: Option<BitsPerSec>,
}

/// An evacuation whose reservations are looked at.
#[derive(Debug, Clone, PartialEq)]
struct Followed {
    id: EvacuationId,
    order: EvacuationOrder,
    sending: Vec<Sending>,
}

fn followed(evacuation: &Evacuation) -> Followed {
    let sends = |phase| matches!(phase, VmPhase::Sending | VmPhase::Committing);
    let sending = evacuation.live().filter(|(record, _)| sends(record.phase));
    let sending = sending.filter(|(_, leg)| !leg.reserved.hops.is_empty());
    let sending = sending.map(|(record, leg)| Sending {
        migration: leg.migration.clone(),
        source: record.source.clone(),
        way: leg.reserved_for_sending().hops.iter().map(|hop| hop.at.clone()).collect(),
        paced: leg.reserved_for_sending().paced_rate(),
    });
    Followed {
        id: evacuation.id.clone(),
        order: evacuation.order.clone(),
        sending: sending.collect(),
    }
}

/// The evacuation's ports as the counters have them.
fn held(followed: &Followed, rates: &[PortRate]) -> BTreeMap<PortRef, Held> {
    let mut ports = BTreeMap::new();
    for rate in rates {
        let mine = rate.queues.iter().find(|queue| queue.evacuation == followed.id);
        let on_a_way = followed.sending.iter().any(|sending| sending.way.contains(&rate.at));
        let Some(queue) = mine.filter(|_| on_a_way) else { continue };
        let readings = rate.transmitted.zip(queue.transmitted);
        let readings = readings.map(|(used, migration)| Readings { used, migration });
        let (capacity, reserved) = (rate.capacity, queue.reserved);
        ports.insert(rate.at.clone(), Held { capacity, reserved, readings });
    }
    ports
}

/// What to change on the evacuation's ports; empty when all is well, or the order was for a fixed
/// reservation.
fn adjustment(rules: &Rules, followed: &Followed, rates: &[PortRate]) -> Adjustment {
    let evacuation = followed.id.clone();
    if followed.order.fixed {
        return Adjustment { evacuation, ports: Vec::new() };
    }
    let ways: Vec<Vec<PortRef>> = followed.sending.iter().map(|s| s.way.clone()).collect();
    let changed = adapt(rules, terms(&followed.order), &held(followed, rates), &ways);
    for (at, (rate, step)) in &changed {
        tracing::debug!(%evacuation, %at, %rate, ?step, "reservation adapted");
    }
    let ports = changed.into_iter().map(|(at, (rate, _))| (at, rate)).collect();
    Adjustment { evacuation, ports }
}

/// What a strict migration may send: the least of what its queues have, and of what it is paced to.
fn strict_limit(followed: &Followed, sending: &Sending, rates: &[PortRate]) -> Option<BitsPerSec> {
    if followed.order.reservation != ReservationKind::Strict {
        return None;
    }
    let on_way = rates.iter().filter(|rate| sending.way.contains(&rate.at));
    let queues = on_way.flat_map(|rate| &rate.queues);
    let mine = queues.filter(|queue| queue.evacuation == followed.id);
    let least = mine.map(|queue| queue.reserved).min()?;
    Some(sending.paced.map_or(least, |paced| least.min(paced)))
}

/// Follows the counters with all reservations, for ever.
pub async fn adapt_forever(
    rules: Rules,
    network: Arc<dyn Network>,
    agents: Arc<Agents>,
    driver: Driver,
) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = BTreeMap::new();
    loop {
        ticks.tick().await;
        let all: Vec<Followed> = driver.fleet().unfinished().map(followed).collect();
        let sending = all.into_iter().filter(|followed| !followed.sending.is_empty());
        let sending: Vec<Followed> = sending.collect();
        if sending.is_empty() {
            told.clear();
            continue;
        }
        let rates = network.rates().await;
        for followed in &sending {
            let adjustment = adjustment(&rules, followed, &rates);
            if !adjustment.ports.is_empty()
                && let Err(error) = network.adjust(adjustment).await
            {
                tracing::warn!(evacuation = %followed.id, %error, "reservation not adapted");
            }
        }
        let rates = network.rates().await;
        for followed in &sending {
            tell_limits(&agents, followed, &rates, &mut told).await;
        }
    }
}

/// Tells the agents of strict migrations what they may send, where that has changed.
async fn tell_limits(
    agents: &Agents,
    followed: &Followed,
    rates: &[PortRate],
    told: &mut BTreeMap<MigrationId, BitsPerSec>,
) {
    for sending in &followed.sending {
        let Some(limit) = strict_limit(followed, sending, rates) else { continue };
        if told.get(&sending.migration) == Some(&limit) {
            continue;
        }
        let (source, migration) = (&sending.source, &sending.migration);
        match agents.set_network_limit(source, migration, limit).await {
            Ok(()) => drop(told.insert(migration.clone(), limit)),
            // The queue holds the pages back meanwhile; the next second tries again.
            Err(error) => tracing::debug!(%migration, %error, "limit not told"),
        }
    }
}

#[cfg(test)]
mod tests;
