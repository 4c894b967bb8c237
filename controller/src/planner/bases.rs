//! Where a VM's overlays would lie on something else, or another file has the name of an image that
//! nobody writes to: those hosts cannot take it.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use lifeboat_protocol::agent::VmStatus;
use lifeboat_protocol::ids::{HostId, VmId};

use super::Planner;
use crate::bases;
use crate::inventory::HostEntry;

/// Per host and VM why not.
pub(super) type BaseObstacles = BTreeMap<HostId, BTreeMap<VmId, String>>;

impl Planner {
    /// Asked only for VMs that may have such disks; each file is read once, then its hash is known.
    pub(super) async fn base_obstacles(
        &self,
        source: &HostId,
        vms: &[(VmId, VmStatus)],
        hosts: &BTreeMap<HostId, HostEntry>,
    ) -> BaseObstacles {
        let others = hosts.iter().filter(|(host, entry)| *host != source && entry.connected);
        let others: Vec<HostId> = others.map(|(host, _)| host.clone()).collect();
        let overlays = vms
            .iter()
            .filter(|(_, status)| status.definition.as_ref().is_some_and(bases::may_be_compared));
        let others = &others;
        let asked = overlays.map(|(vm, _)| async move {
            (vm, bases::compare(&self.agents, source, vm, others).await)
        });
        let mut obstacles = BaseObstacles::new();
        let mut add = |host: &HostId, vm: &VmId, why: String| {
            obstacles.entry(host.clone()).or_default().entry(vm.clone()).or_insert(why);
        };
        for (vm, compared) in join_all(asked).await {
            match compared {
                Ok(files) => {
                    for file in files.iter().filter(|file| bases::is_in_the_way(file)) {
                        if let Some(host) = others.iter().find(|host| host.as_str() == file.host) {
                            let why = format!("{} {} ({})", file.path, file.state, file.detail);
                            add(host, vm, why);
                        }
                    }
                }
                Err(error) => {
                    others.iter().for_each(|host| add(host, vm, error.to_string()));
                }
            }
        }
        obstacles
    }
}
