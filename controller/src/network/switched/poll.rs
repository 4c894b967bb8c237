//! What is done all the time: counters each second, switches that have come back put right, leases
//! renewed, debts paid.
//!
//! Used by [`super::SwitchNetwork`], which starts and ends both tasks. Counters are asked for over
//! OpenFlow: those of the database are five seconds old.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use lifeboat_ovs::openflow::PortNo;
use lifeboat_policy::saturation::Gauge;
use lifeboat_protocol::ids::SwitchId;

use super::counters::Counter;
use super::{Inner, locked, queues};
use crate::clock::{self, UnixMs};
use crate::network::{NetworkError, PortRef};

/// How often counters are read.
const PERIOD: Duration = Duration::from_secs(1);
/// How often a release that could not reach every switch is tried again.
const DEBTS: Duration = Duration::from_secs(2);
/// How often leases are renewed: many times before they expire.
const RENEWAL: Duration = Duration::from_secs(60);

/// Counters by switch, port number and, for queues, queue number.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// What left by a port.
    pub(super) ports: BTreeMap<(SwitchId, u32), Counter>,
    /// How full each port's link is.
    pub(super) gauges: BTreeMap<PortRef, Gauge>,
    /// What left by a queue.
    pub(super) queues: BTreeMap<(SwitchId, u32, u32), Counter>,
}

/// Reads counters and puts switches right, for ever.
pub(super) async fn tend(inner: Arc<Inner>) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let switches = inner.connections.switches();
                join_all(switches.map(|(switch, _)| inner.sample(switch))).await;
            }
            () = inner.connections.news.notified() => {}
        }
        for switch in inner.connections.take_fresh() {
            inner.forget_pipeline(&switch);
            inner.mend(&switch).await;
        }
    }
}

/// Renews leases, pays debts and looks whose flows decide, for ever.
pub(super) async fn renew(inner: Arc<Inner>) {
    loop {
        for _ in 0..RENEWAL.as_secs() / DEBTS.as_secs() {
            tokio::time::sleep(DEBTS).await;
            inner.look_at_pipelines().await;
            if !locked(&inner.debts).is_empty() {
                let _changing = inner.changing.lock().await;
                inner.pay_debts().await;
            }
        }
        inner.renew_leases().await;
    }
}

impl Inner {
    async fn sample(&self, switch: &SwitchId) {
        let Ok(handle) = self.connections.openflow(switch) else { return };
        let (ports, queues) = tokio::join!(
            handle.port_stats(PortNo::ANY, PERIOD),
            handle.queue_stats(PortNo::ANY, PERIOD),
        );
        let now = clock::now();
        let mut counters = locked(&self.counters);
        // No answer leaves the last sample to grow stale: unknown, not idle.
        for port in ports.unwrap_or_default() {
            let counter = counters.ports.entry((switch.clone(), port.port.0)).or_default();
            counter.sample(now, port.tx_bytes);
        }
        self.observe(&mut counters, switch, now);
        let Ok(queues) = queues else { return };
        counters.queues.retain(|(whose, port, queue), _| {
            whose != switch || queues.iter().any(|q| (q.port.0, q.queue) == (*port, *queue))
        });
        for queue in queues {
            let key = (switch.clone(), queue.port.0, queue.queue);
            counters.queues.entry(key).or_default().sample(now, queue.tx_bytes);
        }
    }

    /// Moves the gauges of a switch's links to what the counters say now. Of a link that they say
    /// nothing of, nothing is observed.
    fn observe(&self, counters: &mut Counters, switch: &SwitchId, now: UnixMs) {
        for (at, link) in self.links.iter().filter(|(at, _)| at.switch == *switch) {
            let number = self.connections.port_number(at);
            let counter = number.and_then(|n| counters.ports.get(&(switch.clone(), n)));
            if let Some(used) = counter.and_then(|counter| counter.fresh_rate(now)) {
                let gauge = counters.gauges.entry(at.clone()).or_default();
                gauge.observe(&self.saturation, now.time(), used, link.capacity);
            }
        }
    }

    /// Gives a switch that has connected (again) the flows that it should have: a restart of its
    /// daemon loses them, while queue rows stay.
    async fn mend(&self, switch: &SwitchId) {
        let _changing = self.changing.lock().await;
        let ports = locked(&self.ledger).ports();
        let ports: Vec<_> = ports.into_iter().filter(|at| at.switch == *switch).collect();
        if !ports.is_empty() {
            // Where others are held back there is no queue to classify for.
            let queued = ports.into_iter().filter(|at| !locked(&self.ledger).is_metered(at));
            let ports = queued.map(|at| at.port).collect();
            let mended: Result<(), NetworkError> = async {
                self.install_flows(switch).await?;
                self.classify(switch, ports).await
            }
            .await;
            match mended {
                Ok(()) => tracing::info!(%switch, "flows put back"),
                Err(error) => {
                    tracing::warn!(%switch, %error, "flows not put back; trying again");
                    self.connections.not_mended(switch);
                }
            }
        }
        self.pay_debts().await;
    }

    async fn renew_leases(&self) {
        for database in self.connections.databases() {
            let lives = |id: &_| locked(&self.ledger).queue(id).is_some();
            if let Err(error) = queues::renew(&database.client, Self::expiry(), lives).await {
                tracing::debug!(%error, "leases not renewed");
            }
        }
    }
}
