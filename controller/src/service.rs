//! What operators can ask for, checked word by word, audited, and done.
//!
//! Transport-free: `grpc/` calls this and turns errors into status codes. Every command that changes
//! something is written to the audit log with its outcome before the caller hears of it. Deliberately
//! not here: what a reply looks like (`view`), and the machines.

mod error;
mod limits;
mod links;
mod request;
mod seeds;
mod view;

use std::collections::BTreeSet;
use std::sync::Arc;

use lifeboat_protocol::controller as wire;
use lifeboat_protocol::ids::{EvacuationId, HostId, MigrationId, Term, VmId};
use tokio::sync::watch as latest;

use crate::agents::Agents;
use crate::audit::{AuditEntry, AuditLog};
use crate::bases;
use crate::clock;
use crate::config::Site;
use crate::driver::Driver;
use crate::evacuation::{Evacuation, EvacuationOrder, Event, Limits, Settlement, VmPhase};
use crate::inventory::Inventory;
use crate::journal::Journal;
use crate::network::Network;
use crate::planner::{Planner, Promised};

pub use error::{CommandError, sentence};

/// Who asks, as the transport has recognised them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The name in the certificate, or the user of the socket.
    pub name: String,
    /// How they were recognised: `certificate`, `unix socket`, `loopback`.
    pub by: &'static str,
}

/// Everything that a command needs.
pub struct Service {
    /// The configuration.
    pub site: Arc<Site>,
    /// What the agents said last.
    pub inventory: Arc<Inventory>,
    /// The agents.
    pub agents: Arc<Agents>,
    /// The switches.
    pub network: Arc<dyn Network>,
    /// What survives.
    pub journal: Arc<Journal>,
    /// Who did what.
    pub audit: AuditLog,
    /// The machines.
    pub driver: Driver,
    /// The planner.
    pub planner: Planner,
    /// This start's term.
    pub term: Term,
}

impl Service {
    /// All hosts of the configuration.
    pub async fn hosts(&self) -> wire::HostsReply {
        let switches = self.network.switches().await;
        let promised = Promised::by(&self.driver.fleet());
        let emptied: BTreeSet<HostId> = {
            let fleet = self.driver.fleet();
            let all = fleet.all().into_iter().filter(|e| e.order.empties_hosts());
            all.filter(|e| e.state.is_final()).flat_map(|e| e.order.hosts.clone()).collect()
        };
        let entries = self.inventory.hosts();
        let hosts = self.site.config.hosts.iter().map(|host| {
            let entry = entries.get(&host.name).cloned().unwrap_or_default();
            let rack = self.site.rack(&host.name);
            view::host(host, &entry, rack, &promised.leaving, &emptied, &switches)
        });
        wire::HostsReply { hosts: hosts.collect() }
    }

    /// The VMs of one host or of all.
    ///
    /// # Errors
    /// For a host that is not known.
    pub fn vms(&self, request: &wire::VmsRequest) -> Result<wire::VmsReply, CommandError> {
        let only = match request.host.as_str() {
            "" => None,
            name => Some(self.known_host(name)?),
        };
        let hosts = self.inventory.hosts();
        let shown = hosts.iter().filter(|(host, _)| only.as_ref().is_none_or(|o| o == *host));
        let vms = shown.flat_map(|(host, entry)| view::vms(host, entry, &self.inventory));
        Ok(wire::VmsReply { vms: vms.collect() })
    }

    /// All switches of the configuration.
    pub async fn switches(&self) -> wire::SwitchesReply {
        let known = self.network.switches().await;
        wire::SwitchesReply { switches: known.into_iter().map(view::switch).collect() }
    }

    /// What passes on every link, and for whom.
    pub async fn links(&self) -> wire::LinksReply {
        let (rates, switches) = (self.network.rates().await, self.network.switches().await);
        links::links(rates, switches, self.network.pending().await)
    }

    /// The network as a graph.
    pub async fn topology(&self) -> wire::TopologyReply {
        let switches = self.network.switches().await;
        let connected = |host: &HostId| self.inventory.host(host).is_some_and(|e| e.connected);
        links::topology(&self.site, &switches, connected)
    }

    /// Where evacuations stand.
    ///
    /// # Errors
    /// For an evacuation that is not known.
    pub async fn status(&self, wanted: &str) -> Result<wire::StatusReply, CommandError> {
        let rates = self.network.rates().await;
        let now = clock::now();
        let fleet = self.driver.fleet();
        let shown: Vec<&Evacuation> = if wanted.is_empty() {
            view::recent(&fleet)
        } else {
            let id = EvacuationId::new(wanted)?;
            vec![fleet.get(&id).ok_or_else(|| CommandError::UnknownEvacuation {
                id: wanted.to_owned(),
                known: view::ids(&fleet),
            })?]
        };
        let evacuations = shown.into_iter().map(|e| view::status(e, &rates, now)).collect();
        Ok(wire::StatusReply { evacuations, term: self.term.0 })
    }

    /// Changes whenever a status may have.
    #[must_use]
    pub fn changes(&self) -> latest::Receiver<u64> {
        self.driver.changes()
    }

    /// What an order would do. Nothing is changed.
    ///
    /// # Errors
    /// When the order is not one, or cannot be planned.
    pub async fn plan(
        &self,
        request: &wire::EvacuateRequest,
        caller: &Caller,
    ) -> Result<wire::Plan, CommandError> {
        let order = self.order(request, Vec::new(), caller)?;
        self.driver.fleet().admit(&order)?;
        let promised = Promised::by(&self.driver.fleet());
        let plan = self.planner.plan(&order, &promised).await?;
        Ok(view::plan(&order, &plan))
    }

    /// Begins an evacuation; durable when this returns.
    ///
    /// # Errors
    /// When the order is not one, cannot be planned, or another evacuation stands in the way.
    pub async fn evacuate(
        &self,
        request: &wire::EvacuateRequest,
        caller: &Caller,
    ) -> Result<wire::EvacuateReply, CommandError> {
        let begun = match self.order(request, Vec::new(), caller) {
            Ok(order) => self.begin(order).await,
            Err(error) => Err(error),
        };
        let command = format!("evacuate {}", request::words(request));
        let id = begun.as_ref().map_or("", |reply| reply.evacuation.as_str()).to_owned();
        self.audited(caller, &command, &id, begun)
    }

    /// Moves one VM; durable when this returns.
    ///
    /// # Errors
    /// As [`Service::evacuate`].
    pub async fn migrate(
        &self,
        request: &wire::MigrateRequest,
        caller: &Caller,
    ) -> Result<wire::EvacuateReply, CommandError> {
        let begun = match self.migrate_order(request, caller) {
            Ok(order) => self.begin(order).await,
            Err(error) => Err(error),
        };
        let options = request.options.clone().unwrap_or_default();
        let command = format!("migrate {} {}", request.vm, request::words(&options));
        let id = begun.as_ref().map_or("", |reply| reply.evacuation.as_str()).to_owned();
        self.audited(caller, &command, &id, begun)
    }

    /// Tries again what an evacuation left behind, as a new evacuation.
    ///
    /// # Errors
    /// When it still runs, or nothing was left.
    pub async fn retry(
        &self,
        request: &wire::RetryRequest,
        caller: &Caller,
    ) -> Result<wire::EvacuateReply, CommandError> {
        let begun = match self.retry_order(request, caller) {
            Ok(order) => self.begin(order).await,
            Err(error) => Err(error),
        };
        let command = format!("retry {}", request.evacuation);
        self.audited(caller, &command, &request.evacuation, begun)
    }

    /// Cancels what can still be cancelled.
    ///
    /// # Errors
    /// When it is not known, or over.
    pub async fn cancel(
        &self,
        request: &wire::CancelRequest,
        caller: &Caller,
    ) -> Result<wire::StatusReply, CommandError> {
        let asked = self.try_cancel(&request.evacuation).await;
        let command = format!("cancel {}", request.evacuation);
        self.audited(caller, &command, &request.evacuation, asked)?;
        self.status(&request.evacuation).await
    }

    /// What an evacuation came to, so far.
    ///
    /// # Errors
    /// When it is not known.
    pub fn report(&self, request: &wire::ReportRequest) -> Result<wire::Report, CommandError> {
        self.known_evacuation(&request.evacuation).map(|e| crate::report::report(&e))
    }

    /// Says whether a host takes VMs.
    ///
    /// # Errors
    /// When it is not known, or the journal cannot be written.
    pub async fn cordon(
        &self,
        request: &wire::CordonRequest,
        caller: &Caller,
    ) -> Result<wire::HostsReply, CommandError> {
        let done = self.known_host(&request.host).and_then(|host| {
            self.journal.set_cordoned(&host, request.cordoned)?;
            self.inventory.set_cordoned(&host, request.cordoned);
            Ok(())
        });
        let verb = if request.cordoned { "cordon" } else { "uncordon" };
        self.audited(caller, &format!("{verb} {}", request.host), "", done)?;
        Ok(self.hosts().await)
    }

    /// Ends `uncertain` by an operator's word.
    ///
    /// # Errors
    /// Without the word, or when no agent can claim it.
    pub async fn claim(
        &self,
        request: &wire::ClaimRequest,
        caller: &Caller,
    ) -> Result<wire::ClaimReply, CommandError> {
        let claimed = self.try_claim(request).await;
        let command =
            format!("claim {} --host {} --fenced={}", request.vm, request.host, request.fenced);
        self.audited(caller, &command, "", claimed)
    }

    /// Whether other hosts have what a VM's overlays lie on. Nothing is changed.
    ///
    /// # Errors
    /// When the VM or the host is not known, or the VM's agent does not answer.
    pub async fn verify(
        &self,
        request: &wire::VerifyRequest,
    ) -> Result<wire::VerifyReply, CommandError> {
        let vm = VmId::new(request.vm.clone())?;
        let found = self.inventory.owner(&vm);
        let (at, _) = found.ok_or_else(|| CommandError::UnknownVm { vm: vm.clone() })?;
        let mut others: Vec<HostId> = match request.host.as_str() {
            "" => {
                let connected = self.inventory.hosts().into_iter().filter(|(_, it)| it.connected);
                connected.map(|(host, _)| host).collect()
            }
            name => vec![self.known_host(name)?],
        };
        others.retain(|host| *host != at);
        if others.is_empty() {
            // Not "the same": nothing was compared.
            return Err(CommandError::NoOtherHost { vm, host: at });
        }
        let files = bases::compare(&self.agents, &at, &vm, &others).await?;
        let same = !files.iter().any(bases::is_in_the_way);
        Ok(wire::VerifyReply { vm: vm.to_string(), host: at.to_string(), files, same })
    }

    /// Writes the audit line; a command whose line cannot be written has failed.
    fn audited<T>(
        &self,
        caller: &Caller,
        command: &str,
        evacuation: &str,
        result: Result<T, CommandError>,
    ) -> Result<T, CommandError> {
        let refusal = result.as_ref().err().map(sentence);
        let entry = AuditEntry {
            at_unix_ms: clock::now(),
            operator: &caller.name,
            by: caller.by,
            command: command.trim(),
            outcome: refusal.as_deref().unwrap_or("accepted"),
            evacuation,
            term: self.term.0,
        };
        self.audit.write(&entry)?;
        result
    }

    async fn begin(&self, order: EvacuationOrder) -> Result<wire::EvacuateReply, CommandError> {
        if let Some(same) = self.driver.fleet().by_operation(&order.operation) {
            let plan = view::plan_of_record(same);
            return Ok(wire::EvacuateReply { evacuation: same.id.to_string(), plan: Some(plan) });
        }
        self.driver.fleet().admit(&order)?;
        let promised = Promised::by(&self.driver.fleet());
        let plan = self.planner.plan(&order, &promised).await?;
        let records = plan.records();
        if let (Some(vm), true) = (order.vms.first(), records.is_empty()) {
            // It has left since it was looked up.
            return Err(CommandError::UnknownVm { vm: vm.clone() });
        }
        let number = self.journal.next_evacuation()?;
        let id = EvacuationId::new(format!("e{number}"))?;
        let limits = Limits { attempts: self.site.config.policy.attempts, ..Limits::default() };
        let mut evacuation = Evacuation::new(id, order.clone(), limits, clock::now());
        evacuation.predicted_ms = plan.likely_ms();
        let id = self.driver.begin(evacuation, records).await??;
        let plan = Some(view::plan(&order, &plan));
        Ok(wire::EvacuateReply { evacuation: id.to_string(), plan })
    }

    async fn try_cancel(&self, wanted: &str) -> Result<(), CommandError> {
        let evacuation = self.known_evacuation(wanted)?;
        if evacuation.state.is_final() {
            let state = evacuation.state.words();
            return Err(CommandError::Over { id: evacuation.id, state });
        }
        let mut changes = self.driver.changes();
        self.driver.tell(evacuation.id, Event::CancelRequested).await?;
        // The answer shows the state after the request; a second is long for one journal write.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(1), changes.changed()).await;
        Ok(())
    }

    async fn try_claim(
        &self,
        request: &wire::ClaimRequest,
    ) -> Result<wire::ClaimReply, CommandError> {
        let vm = VmId::new(request.vm.clone())?;
        if !request.fenced {
            return Err(CommandError::NotFenced { vm });
        }
        let (host, migration) = self.claimant_now(&vm, &request.host).await?;
        let operation = format!("claim-{vm}-{}", clock::now().0);
        let status = self.agents.claim(&host, &vm, &operation).await?.unwrap_or_default();
        if let Ok(migration) = MigrationId::new(migration) {
            self.settle_claimed(&host, migration).await?;
        }
        let shown = view::vm(&host, &status, &self.inventory);
        Ok(wire::ClaimReply { vm: Some(shown) })
    }

    /// The inventory may be a poll old, and "nothing is uncertain" must not be said from memory: a
    /// no stands only when two more polls have not changed it. Where this controller itself has lost
    /// sight of the VM, an agent may need its own silence limit (5 s) to come to the same view.
    async fn claimant_now(
        &self,
        vm: &VmId,
        wanted: &str,
    ) -> Result<(HostId, String), CommandError> {
        let lost_sight = self.driver.fleet().has_lost_sight_of(vm);
        for _ in 0..if lost_sight { 20 } else { 5 } {
            match self.claimant(vm, wanted) {
                Err(CommandError::NothingToClaim { .. }) => {
                    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                }
                known => return known,
            }
        }
        self.claimant(vm, wanted)
    }

    /// The evacuation that lost sight of the VM learns where it is now.
    async fn settle_claimed(
        &self,
        host: &HostId,
        migration: MigrationId,
    ) -> Result<(), CommandError> {
        let found = {
            let fleet = self.driver.fleet();
            let id = fleet.of_migration(&migration).cloned();
            let record = id
                .as_ref()
                .and_then(|id| fleet.get(id))
                .and_then(|e| e.vms.iter().find(|record| record.has_leg(&migration)).cloned());
            id.zip(record)
        };
        let Some((id, record)) = found else { return Ok(()) };
        let settlement = match record.source == *host {
            true => Settlement::Stayed { reason: "claimed at its source".to_owned(), store: None },
            false => Settlement::Moved(None),
        };
        Ok(self.driver.tell(id, Event::Settled { migration, settlement }).await?)
    }

    /// The evacuation behind an id, as it is now.
    fn known_evacuation(&self, wanted: &str) -> Result<Evacuation, CommandError> {
        let id = EvacuationId::new(wanted)?;
        let fleet = self.driver.fleet();
        fleet.get(&id).cloned().ok_or_else(|| CommandError::UnknownEvacuation {
            id: wanted.to_owned(),
            known: view::ids(&fleet),
        })
    }

    fn known_host(&self, name: &str) -> Result<HostId, CommandError> {
        let host = HostId::new(name)?;
        match self.site.host(&host) {
            Some(_) => Ok(host),
            None => Err(CommandError::UnknownHost { host, known: self.site.host_names() }),
        }
    }
}

/// Whether an evacuation has something that a retry could move.
fn left(evacuation: &Evacuation) -> bool {
    evacuation.vms.iter().any(|record| record.phase == VmPhase::LeftBehind)
}
