//! Proves which hosts reach a shared storage: a file written at the source must be read with the
//! same bytes elsewhere. A declaration alone is not believed.

use std::collections::{BTreeMap, BTreeSet};

use lifeboat_policy::placement::DiskNeed;
use lifeboat_policy::plan::PlannedVm;
use lifeboat_protocol::agent::ProbeStorageRequest;
use lifeboat_protocol::agent::probe_storage_request::Action;
use lifeboat_protocol::ids::HostId;

use super::Planner;
use crate::clock;
use crate::inventory::HostEntry;

impl Planner {
    /// Per host the storages that were proven. Asked only when a VM needs one.
    pub(super) async fn prove_storage(
        &self,
        source: &HostId,
        vms: &[PlannedVm],
        hosts: &BTreeMap<HostId, HostEntry>,
    ) -> BTreeMap<HostId, BTreeSet<String>> {
        let mut proven: BTreeMap<HostId, BTreeSet<String>> = BTreeMap::new();
        for storage in needed(vms) {
            for host in self.reached_by(source, &storage, hosts).await {
                proven.entry(host).or_default().insert(storage.clone());
            }
        }
        proven
    }

    async fn reached_by(
        &self,
        source: &HostId,
        storage: &str,
        hosts: &BTreeMap<HostId, HostEntry>,
    ) -> Vec<HostId> {
        let name = format!("lifeboat-probe-{source}-{}", clock::now().0);
        let content = format!("{name} of {storage}").into_bytes();
        let request = |action: Action, content: Vec<u8>| ProbeStorageRequest {
            action: action.into(),
            storage: storage.to_owned(),
            name: name.clone(),
            content,
        };
        let mut found = Vec::new();
        if self.agents.probe(source, request(Action::Write, content.clone())).await.is_ok() {
            for (host, _) in hosts.iter().filter(|(host, e)| *host != source && e.connected) {
                let read = self.agents.probe(host, request(Action::Read, Vec::new())).await;
                if read.is_ok_and(|said| said.found && said.content == content) {
                    found.push(host.clone());
                }
            }
        }
        // Also after a failed write: it may have been written all the same.
        if let Err(error) = self.agents.probe(source, request(Action::Remove, Vec::new())).await {
            tracing::warn!(%source, storage, %error, "probe file not removed");
        }
        found
    }
}

fn needed(vms: &[PlannedVm]) -> BTreeSet<String> {
    let shared = vms.iter().filter_map(|vm| match &vm.needs.disk {
        DiskNeed::Shared(names) => Some(names.clone()),
        DiskNeed::None => None,
    });
    shared.flatten().collect()
}
