//! Asks the agents and the switches what `policy/` needs to know, asks `policy/`, and says the
//! answer in the controller's words: the plan that an operator sees, and the choice of who goes
//! next.
//!
//! Used by the driver (each choice is made from fresh measurements, SOLive IV-B) and by the
//! operator's `plan`. Deliberately not here: the decisions themselves (`policy/`), and acting on
//! them.

mod bases;
mod deadline;
mod disks_elsewhere;
mod elsewhere;
mod experience;
mod facts;
mod measure;
mod modes;
mod notes;
mod probe;
mod ways;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use lifeboat_policy::intermediary::ChosenStores;
use lifeboat_policy::measured::MeasuredVm;
use lifeboat_policy::mode::ChosenMode;
use lifeboat_policy::plan::{Move, Plan, PlanError, PlanRequest, plan};
use lifeboat_policy::predict::Range;
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::Mode;

use crate::agents::Agents;
use crate::clock::{self, UnixMs};
use crate::config::Site;
use crate::evacuation::{
    Choice, ChosenDiskStore, DiskDate, EvacuationOrder, Fleet, PlannedLeg, Prediction, VmRecord,
    Waiting,
};
use crate::inventory::Inventory;
use crate::network::{Hop, Network};

use elsewhere::FailedStores;

pub use deadline::DiskPromise;
pub use ways::PageFlowError;

/// The modes that the agents can carry out.
pub const MODES: [Mode; 4] = [Mode::PreCopy, Mode::PostCopy, Mode::ScatterGather, Mode::Cold];

/// Why there is no plan at all.
#[derive(Debug, thiserror::Error)]
pub enum PlannerError {
    /// The host to be emptied cannot be asked.
    #[error(
        "host {host} cannot be planned for: its agent is not connected ({detail}); see `lifeboat hosts`"
    )]
    SourceSilent {
        /// The host.
        host: HostId,
        /// What the last poll said.
        detail: String,
    },
    /// The policy says that the request cannot be met.
    #[error(transparent)]
    Policy(#[from] PlanError),
}

/// What other evacuations have promised already, and what they taught.
#[derive(Debug, Clone, Default)]
pub struct Promised {
    /// Hosts that are being emptied.
    pub leaving: BTreeSet<HostId>,
    /// VMs on their way, and where to.
    pub arrivals: Vec<(VmId, HostId)>,
    /// What migrations made of the bandwidth of their paths, from which host, newest first.
    pub shares: Vec<(HostId, f64)>,
    /// When the newest migration began.
    pub last_began: Option<UnixMs>,
}

impl Promised {
    /// What the fleet has promised.
    #[must_use]
    pub fn by(fleet: &Fleet) -> Self {
        let emptying = fleet.unfinished().filter(|e| e.order.empties_hosts());
        let leaving = emptying.flat_map(|e| e.order.hosts.iter().cloned()).collect();
        let legs = fleet.all().into_iter().flat_map(|evacuation| &evacuation.vms);
        let last_began = legs.filter_map(|record| Some(record.leg.as_ref()?.started)).max();
        let shares = experience::shares(fleet);
        Self { leaving, arrivals: fleet.arrivals(), shares, last_began }
    }

    /// What the forecast's bandwidths rest on.
    fn forecast_note(&self, sources: &[HostId]) -> Option<String> {
        let experience = experience::of(sources.first()?, &self.shares);
        Some(match experience.migrations {
            0 => {
                "no migration has been measured here yet: the times assume that hosts and switches \
                  keep up with their links; they are corrected after each VM"
                    .to_owned()
            }
            count => format!(
                "the times count with {:.0} % of what the paths have, as the last {count} migration(s) got",
                experience.share * 100.0
            ),
        })
    }
}

/// A VM that stays, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stays {
    /// Which.
    pub vm: VmId,
    /// Where.
    pub host: HostId,
    /// Why, in one sentence.
    pub reason: String,
    /// What speaks against each host that was looked at.
    pub refusals: Vec<String>,
}

impl Stays {
    /// Reason and refusals in one line, for the record of the evacuation.
    #[must_use]
    pub fn sentence(&self) -> String {
        match self.refusals.is_empty() {
            true => self.reason.clone(),
            false => format!("{}: {}", self.reason, self.refusals.join("; ")),
        }
    }
}

/// A VM that will move.
#[derive(Debug, Clone)]
pub struct Goes {
    /// From where.
    pub source: HostId,
    /// The policy's word.
    pub step: Move,
    /// What is wanted on each port of its way.
    pub hops: Vec<Hop>,
    /// What was measured, for the operator: non-zero bytes and pages dirtied per second.
    pub measured: (u64, u64),
    /// Why this destination.
    pub why_here: String,
    /// Why at this place in the order.
    pub why_now: String,
    /// Why by this mode.
    pub why_mode: ChosenMode,
    /// From the end of the one before it to its first page.
    pub between: Duration,
    /// All that was measured.
    pub figures: MeasuredVm,
    /// What its owner was promised for its disks.
    pub disk_promise: DiskPromise,
    /// Its destination has a copy of its disks.
    pub seeded: bool,
    /// How its guest is held back for the date; `None`: not at all.
    pub disk_date: Option<DiskDate>,
    /// Where its pages wait; `None`: nowhere.
    pub stores: Option<ChosenStores>,
    /// Where its disks go on to; `None`: nowhere.
    pub disk_store: Option<ChosenDiskStore>,
    /// They have no room beside the stores of those that go before it.
    pub after_stores: bool,
    /// What is wanted on each port of the ways to them.
    pub store_hops: Vec<Hop>,
    /// Until all of it is off its host, where that is before all of it has arrived.
    pub eviction: Option<Duration>,
}

impl Goes {
    /// What it will take, as the record of the evacuation keeps it.
    #[must_use]
    pub fn prediction(&self) -> Prediction {
        let likely = &self.step.predicted.prediction.likely;
        Prediction {
            total_ms: millis(likely.total_time),
            downtime_ms: millis(likely.downtime),
            bytes: likely.bytes.0,
            eviction_ms: millis(self.eviction.unwrap_or(likely.total_time)),
            path: self.step.predicted.path.0,
            between_ms: millis(self.between),
        }
    }
}

/// The plan of an evacuation, over all its hosts.
#[derive(Debug, Clone, Default)]
pub struct FullPlan {
    /// Who moves, in order.
    pub goes: Vec<Goes>,
    /// Who stays.
    pub stays: Vec<Stays>,
    /// How long all of it takes; hosts are emptied one after the other.
    pub total: Option<Range<Duration>>,
    /// What the operator should know before saying yes.
    pub notes: Vec<String>,
}

impl FullPlan {
    /// The records that an evacuation of this plan begins with.
    #[must_use]
    pub fn records(&self) -> Vec<VmRecord> {
        let goes = self.goes.iter().map(|goes| {
            VmRecord::waiting(goes.step.vm.clone(), goes.source.clone(), goes.prediction())
        });
        let stays = self.stays.iter().map(|stays| {
            VmRecord::left_behind(stays.vm.clone(), stays.host.clone(), stays.sentence())
        });
        goes.chain(stays).collect()
    }

    /// How long all of it likely takes, in milliseconds; 0 where nothing moves.
    #[must_use]
    pub fn likely_ms(&self) -> u64 {
        self.total.as_ref().map_or(0, |total| millis(total.likely))
    }
}

/// Whole milliseconds of a duration.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What the planner asks.
#[derive(Clone)]
pub struct Planner {
    /// The configuration and the network that it describes.
    pub site: Arc<Site>,
    /// What the agents said last.
    pub inventory: Arc<Inventory>,
    /// The agents, to measure.
    pub agents: Arc<Agents>,
    /// The switches, for what passes on the links.
    pub network: Arc<dyn Network>,
}

/// One host's plan with what it was made from.
struct HostPlan {
    plan: Plan,
    modes: BTreeMap<VmId, ChosenMode>,
    stuck: Vec<Stays>,
    facts: measure::Gathered,
}

impl Planner {
    /// The whole plan of an order.
    ///
    /// # Errors
    /// When a host cannot be asked, or the request itself cannot be met.
    pub async fn plan(
        &self,
        order: &EvacuationOrder,
        promised: &Promised,
    ) -> Result<FullPlan, PlannerError> {
        let mut full = FullPlan::default();
        let mut promised = promised.clone();
        promised.leaving.extend(order.hosts.iter().filter(|_| order.empties_hosts()).cloned());
        for source in &order.hosts {
            let wanted = |vm: &VmId| order.wants(vm);
            let made = self
                .plan_host(order, source, &promised, &wanted, &order.to, &FailedStores::new())
                .await?;
            for step in &made.plan.moves {
                promised.arrivals.push((step.vm.clone(), step.destination.clone()));
            }
            full.add(self, source, made);
        }
        self.choose_stores(order, &mut full, &FailedStores::new()).await;
        self.choose_disk_stores(order, &mut full, &FailedStores::new()).await;
        let held_back = full.keep_date(order);
        full.notes = notes::notes(order, &full);
        full.notes.extend(self.paced_notes(&full).await);
        full.notes.extend(held_back);
        full.notes.extend(self.kept_disks_notes(order));
        full.notes.extend(promised.forecast_note(&order.hosts).filter(|_| !full.goes.is_empty()));
        Ok(full)
    }

    /// Who of those that wait goes next, measured and ordered afresh; and for whom there is no
    /// place now.
    pub async fn choose(
        &self,
        order: &EvacuationOrder,
        promised: &Promised,
        waiting: &[Waiting],
    ) -> (Option<Box<Choice>>, Vec<(VmId, String)>) {
        let mut no_place = Vec::new();
        let sources: BTreeSet<&HostId> = waiting.iter().map(|one| &one.source).collect();
        let failed = waiting.iter().map(|one| (one.vm.clone(), one.failed_stores.clone()));
        let failed: FailedStores = failed.collect();
        for source in order.hosts.iter().filter(|host| sources.contains(host)) {
            let here: BTreeMap<&VmId, &Vec<HostId>> = waiting
                .iter()
                .filter(|one| one.source == *source)
                .map(|one| (&one.vm, &one.tried))
                .collect();
            let wanted = |vm: &VmId| here.contains_key(vm);
            let made = self.plan_host(order, source, promised, &wanted, &order.to, &failed).await;
            let made = match made {
                Ok(made) => made,
                Err(error) => {
                    let why = error.to_string();
                    no_place.extend(here.keys().map(|vm| (VmId::clone(vm), why.clone())));
                    continue;
                }
            };
            let mut full = FullPlan::default();
            full.add(self, source, made);
            self.choose_stores(order, &mut full, &failed).await;
            self.choose_disk_stores(order, &mut full, &failed).await;
            full.keep_date(order);
            for goes in &full.goes {
                let tried = here.get(&goes.step.vm).map_or(&[][..], |tried| tried.as_slice());
                match self.untried(order, promised, goes, tried, &failed).await {
                    Ok(goes) => return (Some(Box::new(chosen(&goes))), no_place),
                    Err(why) => no_place.push((goes.step.vm.clone(), why)),
                }
            }
            no_place.extend(full.stays.iter().map(|stays| (stays.vm.clone(), stays.sentence())));
            for vm in here.keys().filter(|vm| !full.speaks_of(vm)) {
                no_place.push((VmId::clone(vm), format!("it is no longer at {source}")));
            }
        }
        (None, no_place)
    }

    /// The same VM with a destination that has not failed it yet.
    async fn untried(
        &self,
        order: &EvacuationOrder,
        promised: &Promised,
        goes: &Goes,
        tried: &[HostId],
        failed: &FailedStores,
    ) -> Result<Goes, String> {
        let source = &goes.source;
        if !tried.contains(&goes.step.destination) {
            return Ok(goes.clone());
        }
        let allowed: Vec<HostId> = match order.to.is_empty() {
            true => self.site.config.hosts.iter().map(|host| host.name.clone()).collect(),
            false => order.to.clone(),
        };
        let left: Vec<HostId> =
            allowed.into_iter().filter(|host| host != source && !tried.contains(host)).collect();
        if left.is_empty() {
            return Err("every destination that is allowed has failed it".to_owned());
        }
        let only = |vm: &VmId| *vm == goes.step.vm;
        let made = self.plan_host(order, source, promised, &only, &left, failed).await;
        let mut full = FullPlan::default();
        full.add(self, source, made.map_err(|error| error.to_string())?);
        self.choose_stores(order, &mut full, failed).await;
        self.choose_disk_stores(order, &mut full, failed).await;
        full.keep_date(order);
        let stays = full.stays.first().map(Stays::sentence);
        full.goes.into_iter().next().ok_or_else(|| stays.unwrap_or_default())
    }

    async fn plan_host(
        &self,
        order: &EvacuationOrder,
        source: &HostId,
        promised: &Promised,
        wanted: &(dyn Fn(&VmId) -> bool + Sync),
        allowed: &[HostId],
        failed: &FailedStores,
    ) -> Result<HostPlan, PlannerError> {
        let (mut facts, mut stuck) = self.gather(order, source, promised, wanted).await?;
        let topology = self.fresh_topology().await;
        facts.inventory.experience = experience::of(source, &promised.shares);
        for host in &mut facts.inventory.hosts {
            host.spare_in = self.spare_in(&topology, &host.id);
        }
        let mut request = PlanRequest {
            source: source.clone(),
            only: BTreeSet::new(),
            allowed: allowed.iter().cloned().collect(),
            urgency: order.urgency,
            mode: order.mode,
            modes: BTreeMap::new(),
            parallel: order.parallel as usize,
        };
        let mut made = plan(&request, &facts.inventory, &topology)?;
        let first = modes::First {
            planner: self,
            order,
            failed,
            source,
            facts: &facts,
            plan: &made,
            topology: &topology,
        };
        let mut modes = BTreeMap::new();
        match order.mode {
            Mode::ScatterGather => {
                let homeless = first.without_stores();
                if !homeless.is_empty() {
                    // Nobody waits for them: neither the forecast nor the others' places count with them.
                    let goes = |vm: &VmId| homeless.iter().all(|stays| stays.vm != *vm);
                    facts.inventory.vms.retain(|planned| goes(&planned.needs.id));
                    stuck.extend(homeless);
                    made = plan(&request, &facts.inventory, &topology)?;
                }
            }
            Mode::Auto => {
                modes = first.modes();
                request.modes =
                    modes.iter().map(|(vm, chosen)| (vm.clone(), chosen.mode)).collect();
                made = plan(&request, &facts.inventory, &topology)?;
            }
            Mode::PreCopy | Mode::PostCopy | Mode::Cold => {}
        }
        Ok(HostPlan { plan: made, modes, stuck, facts })
    }
}

impl FullPlan {
    fn add(&mut self, planner: &Planner, source: &HostId, made: HostPlan) {
        let HostPlan { plan, mut modes, stuck, facts } = made;
        for step in plan.moves {
            let why_mode =
                modes.remove(&step.vm).unwrap_or_else(|| ChosenMode::asked_for(step.mode));
            let hops = planner.hops(&step.way, plan.urgency);
            let measured = facts.figures(&step.vm);
            let why_here = facts.why_here(&step.destination);
            let why_now = facts.why_now(&step.vm, step.way.capacity());
            let (source, between) = (source.clone(), facts.inventory.between);
            // What the plan speaks of was measured for it.
            let Some((figures, disk_promise)) = facts.of(&step.vm) else { continue };
            let seeded = facts.is_seeded(&step.destination, &step.vm);
            self.goes.push(Goes {
                source,
                step,
                hops,
                measured,
                why_here,
                why_now,
                why_mode,
                between,
                figures,
                disk_promise,
                seeded,
                disk_date: None,
                stores: None,
                disk_store: None,
                after_stores: false,
                store_hops: Vec::new(),
                eviction: None,
            });
        }
        self.stays.extend(stuck);
        self.stays.extend(plan.left_behind.into_iter().map(|left| facts::stays(source, &left)));
        let own = plan.predicted.total_time;
        self.total = Some(match self.total.take() {
            Some(before) => before.join(&own, |a, b| a.saturating_add(*b)),
            None => own,
        });
    }

    /// Holds guests that write to disks back as far as the order's date demands it.
    fn keep_date(&mut self, order: &EvacuationOrder) -> Vec<String> {
        let Some(deadline) = order.deadline else { return Vec::new() };
        let total = self.total.as_ref().map_or(Duration::ZERO, |total| total.likely);
        deadline::keep(&mut self.goes, total, clock::now(), deadline)
    }

    fn speaks_of(&self, vm: &VmId) -> bool {
        self.goes.iter().any(|goes| goes.step.vm == *vm)
            || self.stays.iter().any(|stays| stays.vm == *vm)
    }
}

fn chosen(goes: &Goes) -> Choice {
    let leg = PlannedLeg {
        destination: goes.step.destination.clone(),
        mode: goes.step.mode,
        hops: goes.hops.clone(),
        prediction: goes.prediction(),
        disk_date: goes.disk_date,
        stores: goes.stores.clone(),
        disk_store: goes.disk_store.clone(),
    };
    Choice { vm: goes.step.vm.clone(), source: goes.source.clone(), leg }
}
