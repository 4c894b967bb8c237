//! From an operator's request to a checked order. Every word that is wrong is answered with the
//! words that are right.

use lifeboat_protocol::agent::VmState;
use lifeboat_protocol::controller as wire;
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::{DiskMode, Mode, Reason, UnknownTermError, Urgency};

use super::{Caller, CommandError, Service, left};
use crate::clock::{self, UnixMs};
use crate::evacuation::{EvacuationOrder, VmPhase};
use crate::inventory::is;

impl Service {
    pub(super) fn order(
        &self,
        request: &wire::EvacuateRequest,
        vms: Vec<VmId>,
        caller: &Caller,
    ) -> Result<EvacuationOrder, CommandError> {
        let hosts = self.known_hosts(&request.hosts)?;
        if hosts.is_empty() {
            return Err(CommandError::NoHost);
        }
        let reason = reason(&request.reason)?;
        let disk = disk(request, reason)?;
        let default_downtime = self.site.config.policy.downtime_limit_ms;
        Ok(EvacuationOrder {
            hosts,
            vms,
            urgency: request.urgency.map_or(Ok(reason.urgency()), Urgency::new)?,
            reservation: match request.reservation.as_str() {
                "" => self.site.config.policy.reservation,
                given => given.parse()?,
            },
            fixed: request.fixed.unwrap_or(!self.site.config.policy.adaptive),
            mode: match mode(&request.mode)? {
                // The one that goes with it.
                Mode::Auto if disk.follows() => Mode::PreCopy,
                mode => mode,
            },
            disk,
            handover_size: request.handover_size_bytes,
            disk_watch_ms: request.disk_watch_ms,
            intermediaries: self.known_hosts(&request.intermediaries)?,
            intermediary_count: request.intermediary_count.min(64),
            redundancy: match request.redundancy.as_str() {
                "" => None,
                given => Some(given.parse()?),
            },
            to: self.known_hosts(&request.to)?,
            parallel: request.parallel.clamp(1, 64),
            reason,
            deadline: (request.deadline_ms > 0)
                .then(|| UnixMs(clock::now().0.saturating_add(request.deadline_ms))),
            downtime_limit_ms: match request.downtime_limit_ms {
                0 => default_downtime,
                given => given,
            },
            operation: request.operation_id.chars().take(200).collect(),
            operator: caller.name.clone(),
        })
    }

    pub(super) fn migrate_order(
        &self,
        request: &wire::MigrateRequest,
        caller: &Caller,
    ) -> Result<EvacuationOrder, CommandError> {
        let vm = VmId::new(request.vm.clone())?;
        let found = self.inventory.owner(&vm);
        let (at, _) = found.ok_or_else(|| CommandError::UnknownVm { vm: vm.clone() })?;
        let mut options = request.options.clone().unwrap_or_default();
        if options.to.iter().any(|to| to == at.as_str()) {
            return Err(CommandError::AlreadyThere { vm, host: at });
        }
        options.hosts = vec![at.to_string()];
        self.order(&options, vec![vm], caller)
    }

    pub(super) fn retry_order(
        &self,
        request: &wire::RetryRequest,
        caller: &Caller,
    ) -> Result<EvacuationOrder, CommandError> {
        let before = self.known_evacuation(&request.evacuation)?;
        if !before.state.is_final() {
            return Err(CommandError::StillRunning { id: before.id });
        }
        if !left(&before) {
            return Err(CommandError::NothingLeft { id: before.id });
        }
        let stayed = before.vms.iter().filter(|record| record.phase == VmPhase::LeftBehind);
        let stayed = stayed.map(|record| record.vm.clone()).collect();
        // An evacuation stays one: what has arrived since is to leave, too.
        let vms = if before.order.empties_hosts() { Vec::new() } else { stayed };
        Ok(EvacuationOrder {
            vms,
            deadline: None,
            operation: request.operation_id.chars().take(200).collect(),
            operator: caller.name.clone(),
            ..before.order
        })
    }

    fn known_hosts(&self, names: &[String]) -> Result<Vec<HostId>, CommandError> {
        names.iter().map(|name| self.known_host(name)).collect()
    }

    /// The host whose agent can claim a VM, and the migration that left it so.
    pub(super) fn claimant(
        &self,
        vm: &VmId,
        wanted: &str,
    ) -> Result<(HostId, String), CommandError> {
        let wanted = if wanted.is_empty() { None } else { Some(self.known_host(wanted)?) };
        let hosts = self.inventory.hosts();
        let mut can: Vec<(HostId, String)> = Vec::new();
        for (host, entry) in hosts.iter().filter(|(_, entry)| entry.connected) {
            let doubtful = entry
                .vms
                .iter()
                .filter(|status| is(status, vm))
                .find(|status| matches!(status.state(), VmState::Uncertain | VmState::InDoubt));
            can.extend(doubtful.map(|status| (host.clone(), status.migration.clone())));
        }
        if let Some(wanted) = wanted {
            can.retain(|(host, _)| *host == wanted);
        }
        match can.len() {
            0 => Err(CommandError::NothingToClaim { vm: vm.clone() }),
            1 => Ok(can.remove(0)),
            _ => {
                let hosts: Vec<String> = can.iter().map(|(host, _)| host.to_string()).collect();
                Err(CommandError::WhichSide { vm: vm.clone(), hosts: hosts.join(" and ") })
            }
        }
    }
}

fn mode(text: &str) -> Result<Mode, CommandError> {
    Ok(if text.is_empty() { Mode::Auto } else { text.parse()? })
}

/// Disks that follow leave the VM without some of its blocks until its source, or an intermediary, has
/// sent them.
fn disk(request: &wire::EvacuateRequest, reason: Reason) -> Result<DiskMode, CommandError> {
    let disk: DiskMode = match request.disk.as_str() {
        "" => DiskMode::Copy,
        given => given.parse()?,
    };
    let why = match mode(&request.mode)? {
        _ if disk == DiskMode::Copy => return Ok(disk),
        _ if reason == Reason::Failing && disk == DiskMode::OnDemand => {
            "with --reason failing nothing may depend on the source after its eviction, and the rest of the disks \
             would; use --disk copy, or --disk scatter"
        }
        _ if request.deadline_ms > 0 => {
            "a date is kept for the whole of a VM, and its disks are whole later than it; leave out --by, or use \
             --disk copy"
        }
        Mode::Auto | Mode::PreCopy => return Ok(disk),
        Mode::PostCopy | Mode::ScatterGather | Mode::Cold => {
            "it goes with --mode pre-copy only; leave out --mode, or use --disk copy"
        }
    };
    Err(CommandError::OnDemand { why })
}

fn reason(text: &str) -> Result<Reason, CommandError> {
    match text {
        "" | "maintenance" => Ok(Reason::Maintenance),
        "failing" => Ok(Reason::Failing),
        given => Err(CommandError::Word(UnknownTermError {
            given: given.chars().take(80).collect(),
            kind: "reason",
            choices: "maintenance, failing",
        })),
    }
}

/// A request as the audit log shows it.
pub(super) fn words(request: &wire::EvacuateRequest) -> String {
    let mut text = request.hosts.join(" ");
    let mut add = |flag: &str, value: String| {
        if !value.is_empty() {
            text = format!("{text} --{flag} {value}");
        }
    };
    add("urgency", request.urgency.map(|urgency| urgency.to_string()).unwrap_or_default());
    add("mode", request.mode.clone());
    add("disk", request.disk.clone());
    add("reservation", request.reservation.clone());
    add("to", request.to.join(","));
    add("intermediaries", request.intermediaries.join(","));
    add("redundancy", request.redundancy.clone());
    add("reason", request.reason.clone());
    if request.parallel > 1 {
        add("parallel", request.parallel.to_string());
    }
    if request.fixed == Some(true) {
        text.push_str(" --fixed");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_mode_names_what_there_is() {
        assert_eq!(mode("post-copy").unwrap(), Mode::PostCopy);
        let said = mode("warm").unwrap_err().to_string();
        assert!(said.contains("`warm` is not a mode"), "{said}");
        assert_eq!(mode("").unwrap(), Mode::Auto);
    }

    #[test]
    fn disks_follow_their_vm_only_where_it_can_do_without_them_for_a_while() {
        let asked = |reason, mode: &str, deadline_ms| {
            let (mode, on_demand) = (mode.to_owned(), "on-demand".to_owned());
            let request =
                wire::EvacuateRequest { disk: on_demand, mode, deadline_ms, ..Default::default() };
            disk(&request, reason).map_err(|error| error.to_string())
        };
        let (maintenance, failing) = (Reason::Maintenance, Reason::Failing);
        assert_eq!(asked(maintenance, "", 0), Ok(DiskMode::OnDemand));
        assert_eq!(asked(maintenance, "pre-copy", 0), Ok(DiskMode::OnDemand));
        assert!(asked(failing, "", 0).unwrap_err().contains("--reason failing"));
        assert!(asked(maintenance, "", 9).unwrap_err().contains("--by"));
        for mode in ["post-copy", "scatter-gather", "cold"] {
            assert!(asked(maintenance, mode, 0).unwrap_err().contains("pre-copy only"), "{mode}");
        }
        let request = wire::EvacuateRequest { disk: "later".to_owned(), ..Default::default() };
        assert!(disk(&request, maintenance).unwrap_err().to_string().contains("copy, on-demand"));
    }

    #[test]
    fn an_unknown_reason_names_the_known_ones() {
        let said = reason("boredom").unwrap_err().to_string();
        assert!(said.contains("`boredom`") && said.contains("maintenance, failing"), "{said}");
    }

    #[test]
    fn the_audit_log_reads_as_it_was_typed() {
        let request = wire::EvacuateRequest {
            hosts: vec!["h1".to_owned()],
            urgency: Some(90),
            to: vec!["h2".to_owned(), "h3".to_owned()],
            ..wire::EvacuateRequest::default()
        };
        assert_eq!(words(&request), "h1 --urgency 90 --to h2,h3");
    }
}
