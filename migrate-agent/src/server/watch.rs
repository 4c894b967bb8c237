//! What DescribeHost looks at anew, and not more often than it changes: load and bridges.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lifeboat_protocol::agent::BridgeDescription;

use crate::clock;
use crate::host::{self, proc};
use crate::programs::{self, ProgramError};
use crate::vms::chain;
use crate::vms::taps::Ovs;

/// How old an answer about bridges may be.
const BRIDGES_AGE_MAX: Duration = Duration::from_secs(5);
/// The shortest time over which a load is worth stating.
const LOAD_SPAN_MIN: Duration = Duration::from_millis(500);
/// Ethernet's own, where the kernel does not know a bridge's.
const MTU_DEFAULT: u32 = 1500;

/// The last looks.
#[derive(Default)]
pub(super) struct Watch {
    load: Mutex<Option<Load>>,
    /// The last answer; none after a question that failed.
    bridges: Mutex<Option<(Instant, Option<Vec<BridgeDescription>>)>>,
}

#[derive(Clone, Copy)]
struct Load {
    taken: Instant,
    times: proc::CpuTimes,
    cores: f64,
}

impl Watch {
    /// Cores in use since this was last asked (half a second ago at the least); 0 the first time.
    pub(super) fn cpu_load(&self) -> f64 {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let Ok(times) = proc::cpu_times(&stat) else { return 0.0 };
        let taken = clock::now();
        let mut last = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        let cores = match *last {
            None => 0.0,
            Some(before) if taken.saturating_duration_since(before.taken) < LOAD_SPAN_MIN => {
                return before.cores;
            }
            Some(before) => proc::cores_in_use(before.times, times),
        };
        *last = Some(Load { taken, times, cores });
        cores
    }

    /// The bridges of this host with their MTU; none where Open vSwitch does not answer, which is said
    /// once.
    pub(super) async fn bridges(&self, ovs: &Ovs) -> Vec<BridgeDescription> {
        let held = self.bridges.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let now = clock::now();
        if let Some((asked, bridges)) = &held
            && now.saturating_duration_since(*asked) < BRIDGES_AGE_MAX
        {
            return bridges.clone().unwrap_or_default();
        }
        let answered_before = held.is_none_or(|(_, bridges)| bridges.is_some());
        let bridges = match Self::ask_for_bridges(ovs).await {
            Ok(bridges) => Some(bridges),
            Err(error) => {
                if answered_before {
                    let error = chain(&error);
                    tracing::warn!(error, "Open vSwitch cannot be asked for bridges");
                }
                None
            }
        };
        if !answered_before && bridges.is_some() {
            tracing::info!("Open vSwitch answers about its bridges again");
        }
        *self.bridges.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, bridges.clone()));
        bridges.unwrap_or_default()
    }

    async fn ask_for_bridges(ovs: &Ovs) -> Result<Vec<BridgeDescription>, ProgramError> {
        let database = format!("--db={}", ovs.database);
        let listed = programs::run("ovs-vsctl", &[&database, "--timeout=5", "list-br"]).await?;
        let describe = |name: &str| BridgeDescription {
            name: name.to_owned(),
            mtu: host::bridge_mtu(name).unwrap_or(MTU_DEFAULT),
        };
        Ok(listed.lines().map(describe).collect())
    }
}
