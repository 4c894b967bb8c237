//! `limit`: what a VM that is under way may send, and what its guest may change on its disks meanwhile.
//!
//! MigrateFS Table 1, for an operator. It lasts until the VM's migration ends, or until the next word. Deliberately
//! not here: limits that follow from an order, a strict reservation's (`reservations`) and a date's (the source's
//! agent). An operator's word would not outlast the next second there, so it is refused.

use lifeboat_protocol::controller as wire;
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::ReservationKind;
use lifeboat_protocol::units::{BitsPerSec, BytesPerSec};

use super::{Caller, CommandError, Service};
use crate::evacuation::{EvacuationOrder, Leg, VmPhase};
use crate::reservations::sending_limit;

impl Service {
    /// Sets either limit, or both.
    ///
    /// # Errors
    /// When the VM is not under way, its order sets that limit, or its agent does not take it.
    pub async fn limit(
        &self,
        request: &wire::LimitRequest,
        caller: &Caller,
    ) -> Result<wire::LimitReply, CommandError> {
        let word = |name: &str, limit: Option<u64>, unit: &str| match limit {
            Some(0) => format!(" --{name} none"),
            Some(limit) => format!(" --{name} {limit} {unit}"),
            None => String::new(),
        };
        let network = word("network", request.network_bits_per_sec, "bit/s");
        let disk = word("disk", request.disk_bytes_per_sec, "byte/s");
        let command = format!("limit {}{network}{disk}", request.vm);
        let limited = self.try_limit(request).await;
        self.audited(caller, &command, "", limited)
    }

    async fn try_limit(
        &self,
        request: &wire::LimitRequest,
    ) -> Result<wire::LimitReply, CommandError> {
        let vm = VmId::new(request.vm.clone())?;
        let (source, order, leg) =
            self.under_way(&vm).ok_or_else(|| CommandError::NotUnderWay { vm: vm.clone() })?;
        let refused = |why| CommandError::NotLimited { vm: vm.clone(), why };
        if request.network_bits_per_sec.is_some() && order.reservation == ReservationKind::Strict {
            return Err(refused(
                "its reservation is strict, which is what it may send; use --reservation borrow",
            ));
        }
        if request.disk_bytes_per_sec.is_some() && leg.disk_date.is_some() {
            return Err(refused("it has a date (--by), and its disks are limited as that takes"));
        }
        if request.disk_bytes_per_sec.is_some() {
            self.may_limit_disks(&vm).map_err(refused)?;
        }
        let mut reply = wire::LimitReply {
            vm: vm.to_string(),
            migration: leg.migration.to_string(),
            host: source.to_string(),
            ..wire::LimitReply::default()
        };
        if let Some(wanted) = request.network_bits_per_sec {
            let carried =
                sending_limit(order.reservation, &leg.reserved_for_sending(), leg.narrowest());
            let limit = match wanted {
                0 => carried,
                // Less than a byte a second would be none.
                wanted => BitsPerSec(wanted.clamp(8, carried.0.max(8))),
            };
            self.agents.set_network_limit(&source, &leg.migration, limit).await?;
            reply.network_bits_per_sec = Some(limit.0);
        }
        if let Some(wanted) = request.disk_bytes_per_sec {
            self.agents.set_disk_limit(&source, &leg.migration, BytesPerSec(wanted)).await?;
            reply.disk_bytes_per_sec = Some(wanted);
        }
        Ok(reply)
    }

    /// The VM's source and leg, while its source sends.
    fn under_way(&self, vm: &VmId) -> Option<(HostId, EvacuationOrder, Leg)> {
        let fleet = self.driver.fleet();
        fleet.unfinished().find_map(|evacuation| {
            let record = evacuation.record(vm).filter(|record| record.phase == VmPhase::Sending)?;
            Some((record.source.clone(), evacuation.order.clone(), record.leg.clone()?))
        })
    }

    fn may_limit_disks(&self, vm: &VmId) -> Result<(), &'static str> {
        let known = self.inventory.owner(vm).and_then(|(_, status)| status.definition);
        let definition = known.unwrap_or_default();
        if definition.disks.iter().all(|disk| !disk.shared_storage.is_empty()) {
            return Err("it has no disk that only its host has, and others are not limited");
        }
        match definition.forbid_throttling {
            true => Err("its owner forbids that it is slowed down (forbid_throttling)"),
            false => Ok(()),
        }
    }
}
