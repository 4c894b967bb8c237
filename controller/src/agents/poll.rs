//! One task per agent: asks every second who is there, and slows down while nobody answers.

use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::ids::HostId;

use super::Agents;
use crate::clock;
use crate::inventory::Inventory;

/// Between two polls of an agent that answers.
const EVERY: Duration = Duration::from_secs(1);
/// Between two polls of one that does not, at most.
const SLOWEST: Duration = Duration::from_secs(8);

/// Keeps one host's entry of the inventory fresh, for as long as the task lives. An agent that
/// claims to be another host's is not believed.
pub async fn poll_forever(agents: Arc<Agents>, inventory: Arc<Inventory>, host: HostId) {
    let mut pause = EVERY;
    loop {
        match agents.describe(&host).await {
            Ok((description, _)) if description.host != host.as_str() => {
                let said: String = description.host.chars().take(63).collect();
                let detail = format!(
                    "the agent at this address says that it is host `{said}`; correct [[host]] in the configuration"
                );
                note_silence(&inventory, &host, detail);
                pause = slower(pause);
            }
            Ok((description, vms)) => {
                if inventory.heard(&host, description, vms, clock::now()) {
                    tracing::info!(%host, "agent connected");
                }
                pause = EVERY;
            }
            Err(error) => {
                note_silence(&inventory, &host, error.to_string());
                pause = slower(pause);
            }
        }
        tokio::time::sleep(pause).await;
    }
}

fn slower(pause: Duration) -> Duration {
    (pause * 2).min(SLOWEST)
}

fn note_silence(inventory: &Inventory, host: &HostId, detail: String) {
    if inventory.silent(host, detail.clone(), clock::now()) {
        tracing::warn!(%host, detail, "agent lost");
    }
}
