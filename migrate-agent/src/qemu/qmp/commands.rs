//! The QMP commands that the agent uses, one method each.
//!
//! Each waits at most [`DEADLINE`]; use [`Qmp::execute`] where another deadline is meant.
//! `calc-dirty-rate` is not here on purpose: two of its modes kill a QEMU 7.2 without KVM, and
//! its sampling mode scatters too widely; `measure/` looks from outside instead.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::types::{
    BlockStats, CpuModel, CpuThread, MachineType, MigrateInfo, MigrateParameters, Slowing,
    StatusInfo, VersionInfo,
};
use super::{DEADLINE, Qmp, QmpError};

impl Qmp {
    /// Whether the guest runs.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; so for every method here.
    pub async fn query_status(&self) -> Result<StatusInfo, QmpError> {
        self.ask("query-status").await
    }

    /// How far the migration is.
    pub async fn query_migrate(&self) -> Result<MigrateInfo, QmpError> {
        self.ask("query-migrate").await
    }

    /// QEMU's version, asked anew ([`Qmp::version`] is what the greeting said).
    pub async fn query_version(&self) -> Result<VersionInfo, QmpError> {
        self.ask("query-version").await
    }

    /// The VM's name as given by `-name`; empty when none was.
    pub async fn query_name(&self) -> Result<String, QmpError> {
        #[derive(Deserialize)]
        struct NameInfo {
            #[serde(default)]
            name: String,
        }
        Ok(self.ask::<NameInfo>("query-name").await?.name)
    }

    /// The threads that run the virtual CPUs.
    pub async fn query_cpus_fast(&self) -> Result<Vec<CpuThread>, QmpError> {
        self.ask("query-cpus-fast").await
    }

    /// Whether this VM runs with KVM (and not in emulation).
    pub async fn query_kvm(&self) -> Result<bool, QmpError> {
        #[derive(Deserialize)]
        struct KvmInfo {
            enabled: bool,
        }
        Ok(self.ask::<KvmInfo>("query-kvm").await?.enabled)
    }

    /// Counters of the disks that the guest sees.
    pub async fn query_blockstats(&self) -> Result<Vec<BlockStats>, QmpError> {
        let stats: Vec<RawBlockStats> = self.ask("query-blockstats").await?;
        Ok(stats.into_iter().map(BlockStats::from).collect())
    }

    /// The migration capabilities that this QEMU knows, and whether each is on.
    pub async fn query_migrate_capabilities(&self) -> Result<Vec<(String, bool)>, QmpError> {
        #[derive(Deserialize)]
        struct Capability {
            capability: String,
            state: bool,
        }
        let list: Vec<Capability> = self.ask("query-migrate-capabilities").await?;
        Ok(list.into_iter().map(|c| (c.capability, c.state)).collect())
    }

    /// The machine types that this QEMU offers.
    pub async fn query_machines(&self) -> Result<Vec<MachineType>, QmpError> {
        self.ask("query-machines").await
    }

    /// The CPU models that this QEMU offers.
    pub async fn query_cpu_definitions(&self) -> Result<Vec<CpuModel>, QmpError> {
        self.ask("query-cpu-definitions").await
    }

    /// The types that implement `parent`, abstract ones left out.
    pub async fn qom_list_types(&self, parent: &str) -> Result<Vec<String>, QmpError> {
        #[derive(Deserialize)]
        struct Type {
            name: String,
        }
        let arguments = json!({"implements": parent, "abstract": false});
        let list: Vec<Type> = self.ask_with("qom-list-types", arguments).await?;
        Ok(list.into_iter().map(|t| t.name).collect())
    }

    /// The types of what lies at `path` of QEMU's tree of objects, such as `/machine/peripheral`, where
    /// each device with an id is.
    pub async fn qom_children(&self, path: &str) -> Result<Vec<String>, QmpError> {
        #[derive(Deserialize)]
        struct Property {
            r#type: String,
        }
        let list: Vec<Property> = self.ask_with("qom-list", json!({"path": path})).await?;
        let child =
            |p: Property| Some(p.r#type.strip_prefix("child<")?.strip_suffix('>')?.to_owned());
        Ok(list.into_iter().filter_map(child).collect())
    }

    /// The kinds of its memory devices: `dimm`, `virtio-mem` ...
    pub async fn query_memory_devices(&self) -> Result<Vec<String>, QmpError> {
        #[derive(Deserialize)]
        struct Device {
            r#type: String,
        }
        let list: Vec<Device> = self.ask("query-memory-devices").await?;
        Ok(list.into_iter().map(|device| device.r#type).collect())
    }

    /// The names of the dirty bitmaps that somebody keeps of its disks: those that a job of QEMU's
    /// keeps for itself have none.
    pub async fn query_dirty_bitmaps(&self) -> Result<Vec<String>, QmpError> {
        #[derive(Deserialize)]
        struct Node {
            #[serde(default, rename = "dirty-bitmaps")]
            bitmaps: Vec<Bitmap>,
        }
        #[derive(Deserialize)]
        struct Bitmap {
            name: Option<String>,
        }
        let nodes: Vec<Node> =
            self.ask_with("query-named-block-nodes", json!({"flat": true})).await?;
        Ok(nodes.into_iter().flat_map(|node| node.bitmaps).filter_map(|b| b.name).collect())
    }

    /// Switches migration capabilities. QEMU takes nearly every combination; whether it makes
    /// sense is the caller's to know.
    pub async fn migrate_set_capabilities(
        &self,
        capabilities: &[(&str, bool)],
    ) -> Result<(), QmpError> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(name, on)| json!({"capability": name, "state": on}))
            .collect();
        self.order("migrate-set-capabilities", json!({"capabilities": list})).await
    }

    /// Switches on those of the `wanted` capabilities that this QEMU offers, and all others off,
    /// whatever an earlier user of it left on.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn migrate_set_only(&self, wanted: &[&str]) -> Result<(), QmpError> {
        let offered = self.query_migrate_capabilities().await?;
        let changes: Vec<(&str, bool)> = offered
            .iter()
            .filter_map(|(name, on)| {
                let want = wanted.contains(&name.as_str());
                (want != *on).then_some((name.as_str(), want))
            })
            .collect();
        if changes.is_empty() { Ok(()) } else { self.migrate_set_capabilities(&changes).await }
    }

    /// Sets migration parameters; also while a migration runs.
    pub async fn migrate_set_parameters(
        &self,
        parameters: MigrateParameters,
    ) -> Result<(), QmpError> {
        let mut arguments = serde_json::Map::new();
        if let Some(limit) = parameters.downtime_limit_ms {
            arguments.insert("downtime-limit".to_owned(), limit.into());
        }
        if let Some(rate) = parameters.max_bandwidth_bytes {
            arguments.insert("max-bandwidth".to_owned(), rate.into());
        }
        self.order("migrate-set-parameters", Value::Object(arguments)).await
    }

    /// Sets how a guest is slowed down that outruns its migration.
    pub async fn migrate_set_slowing(&self, slowing: Slowing) -> Result<(), QmpError> {
        let arguments = json!({
            "throttle-trigger-threshold": slowing.threshold,
            "cpu-throttle-initial": slowing.first,
            "cpu-throttle-increment": slowing.more,
            "max-cpu-throttle": slowing.most,
        });
        self.order("migrate-set-parameters", arguments).await
    }

    /// Begins to migrate away, to `unix:PATH` or `tcp:HOST:PORT`.
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate", json!({"uri": uri})).await
    }

    /// Begins to take a migration in; QEMU must have been started with `-incoming defer`.
    pub async fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate-incoming", json!({"uri": uri})).await
    }

    /// Takes a post-copy up again whose stream has ended; QEMU listens there.
    pub async fn migrate_recover(&self, uri: &str) -> Result<(), QmpError> {
        self.order("migrate-recover", json!({"uri": uri})).await
    }

    /// Lets a migration go on that waits in `pre-switchover`.
    pub async fn migrate_continue(&self) -> Result<(), QmpError> {
        self.order("migrate-continue", json!({"state": "pre-switchover"})).await
    }

    /// Wakes a cancelled migration that waits all the same (`cancel`).
    pub(super) async fn migrate_wake_cancelled(&self) -> Result<(), QmpError> {
        self.order("migrate-continue", json!({"state": "cancelling"})).await
    }

    /// Cancels: the guest stays.
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.order("migrate_cancel", Value::Null).await
    }

    /// Lets the guest run.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.order("cont", Value::Null).await
    }

    /// Pauses the guest.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.order("stop", Value::Null).await
    }

    /// Presses the power button; whether the guest obeys is its own affair.
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.order("system_powerdown", Value::Null).await
    }

    /// Resets the machine, as its reset button would.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn system_reset(&self) -> Result<(), QmpError> {
        self.order("system_reset", Value::Null).await
    }

    /// Ends QEMU. That it ended before it answered is success.
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.order("quit", Value::Null).await {
            Err(QmpError::Disconnected { .. }) => Ok(()),
            outcome => outcome,
        }
    }

    /// Announces the guest's addresses (RARP on every NIC), so that switches learn its new place.
    /// 5 rounds from 50 ms apart to 550 ms: QEMU's own defaults after a migration.
    pub async fn announce_self(&self) -> Result<(), QmpError> {
        let rounds = json!({"initial": 50, "max": 550, "rounds": 5, "step": 100});
        self.order("announce-self", rounds).await
    }

    async fn ask<T: DeserializeOwned>(&self, command: &str) -> Result<T, QmpError> {
        self.ask_with(command, Value::Null).await
    }

    async fn ask_with<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let value = self.execute(command, arguments, DEADLINE).await?;
        serde_json::from_value(value)
            .map_err(|source| QmpError::Unexpected { command: command.to_owned(), source })
    }

    async fn order(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.execute(command, arguments, DEADLINE).await.map(drop)
    }
}

#[derive(Deserialize)]
struct RawBlockStats {
    device: Option<String>,
    #[serde(rename = "node-name")]
    node: Option<String>,
    qdev: Option<String>,
    stats: RawCounters,
}

#[derive(Deserialize)]
struct RawCounters {
    #[serde(default)]
    rd_bytes: u64,
    #[serde(default)]
    wr_bytes: u64,
}

impl From<RawBlockStats> for BlockStats {
    fn from(raw: RawBlockStats) -> Self {
        let names = [raw.qdev, raw.device, raw.node];
        let device = names.into_iter().flatten().find(|name| !name.is_empty());
        Self {
            device: device.unwrap_or_default(),
            read_bytes: raw.stats.rd_bytes,
            written_bytes: raw.stats.wr_bytes,
        }
    }
}
