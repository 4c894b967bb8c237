//! After a restart of the agent: every record that is not settled is taken up again, before any
//! command or link is served.

use std::collections::BTreeMap;

use lifeboat_protocol::agent::{MigrationProgress, Side, VmDefinition};
use lifeboat_protocol::ids::{Generation, HostId, VmId};
use lifeboat_protocol::terms::Mode;
use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use tokio::sync::mpsc;

use super::{DOWNTIME_DEFAULT, Entry, Registry, RegistryError, Task};
use crate::destination::DestinationTask;
use crate::destination::disk::TakenBy;
use crate::destination::resting::bring_arrival_home;
use crate::handover::Record;
use crate::handover::destination::Destination;
use crate::handover::gathering::Gathering;
use crate::handover::source::Source;
use crate::handover::store::StoreError;
use crate::progress::Progress;
use crate::source::disk::bring_home;
use crate::source::{Order, SourceTask};

impl Registry {
    /// Takes up what the records say. Guests have been adopted before.
    ///
    /// # Errors
    /// When the records cannot be read: then nothing may be served.
    pub async fn recover(&self) -> Result<(), RegistryError> {
        let records = self.context.store.read_all()?;
        // Also one that only left its definition: an arrival that was never promised to the source
        // is not this host's, and without a record nothing would keep it from being started.
        for vm in self.context.guests.present() {
            let keep = records.get(&vm).is_some_and(|record| match record {
                Record::Owner { .. } | Record::Sending { .. } | Record::Loaded { .. } => true,
                // Until the destination has confirmed, this is the other copy.
                Record::Ceded { confirmed, .. } => !confirmed,
                Record::Refused { .. } => false,
            });
            if !keep {
                tracing::warn!(%vm, "taking away a guest that no record of this host covers");
                if let Err(error) = self.context.guests.end(&vm, true).await {
                    tracing::error!(%vm, %error, "it could not be taken away");
                }
            }
        }
        self.recover_disks(&records);
        self.recover_disk_stores(&records);
        for (vm, record) in records {
            self.take_up(vm, &record);
        }
        Ok(())
    }

    /// Unfinished images without a promise go; movers without a hand-over are brought to their end.
    /// A hand-over that is taken up brings its own.
    fn recover_disks(&self, records: &BTreeMap<VmId, Record>) {
        let promised =
            |record: &Record| matches!(record, Record::Loaded { .. } | Record::Owner { .. });
        self.context.rooms.sweep(|vm| records.get(vm).is_some_and(promised));
        self.recover_arrivals(records);
        for vm in self.context.movers.all() {
            let (context, record) = (self.context.clone(), records.get(&vm).cloned());
            match record {
                Some(Record::Owner { resumed: true, .. }) => {
                    crate::tasks::spawn("disks of before", async move {
                        if let Err(error) = bring_home(&context, &vm).await {
                            let error = crate::vms::chain(&error);
                            tracing::error!(%vm, error, "its disks stay on their mount");
                        }
                    });
                }
                Some(_) => {}
                None => tracing::warn!(%vm, "a disk process of a VM that no record covers"),
            }
        }
    }

    /// Processes in which disks arrived that may follow their VM. A hand-over, or a rest, that is taken up
    /// brings its own; one whose disks are whole is ended with QEMU on the images themselves.
    fn recover_arrivals(&self, records: &BTreeMap<VmId, Record>) {
        for vm in self.context.movers.of_arrivals().all() {
            let context = self.context.clone();
            let rests = !context.store.rest(&vm).is_ok_and(|rest| rest.is_none());
            match records.get(&vm) {
                Some(_) if rests && self.has_stayed_up(&vm) => {}
                Some(Record::Owner { resumed: true, .. }) => {
                    crate::tasks::spawn("arrived disks of before", async move {
                        if let Err(error) = bring_arrival_home(&context, &vm).await {
                            let error = crate::vms::chain(&error);
                            tracing::error!(%vm, error, "its disks stay on their mount");
                        }
                    });
                }
                // Never sealed, or refused, or lost with its host: its guest has been taken away.
                _ => {
                    crate::tasks::spawn("disks that did not arrive", async move {
                        if let Err(error) = context.movers.of_arrivals().give_up(&vm).await {
                            tracing::error!(%vm, %error, "what was to take its disks in stays");
                        }
                    });
                }
            }
        }
    }

    /// Whether all that the VM has written to disks that are not all here is there: its QEMU lives, or
    /// has ended while this host was up.
    fn has_stayed_up(&self, vm: &VmId) -> bool {
        self.context.guests.lives(vm) || self.context.movers.of_arrivals().are_held(vm)
    }

    fn arriving_disks(&self, vm: &VmId) -> Option<TakenBy> {
        let movers = self.context.movers.of_arrivals();
        movers.setting(vm).map(|_| TakenBy::Process(movers.blocks(vm)))
    }

    fn take_up(&self, vm: VmId, record: &Record) {
        let mut actions = Vec::new();
        let lives = self.context.guests.lives(&vm);
        if let Some(machine) = Source::resume(record, lives, &mut actions) {
            if !actions.is_empty() {
                self.take_up_source(vm, machine, actions);
            }
            return;
        }
        let mut actions = Vec::new();
        if let Some(machine) = Destination::resume(record, lives, &mut actions) {
            self.take_up_destination(vm, machine, Some(actions));
            return;
        }
        if !self.take_up_rest(&vm, record) {
            self.take_up_gathering(vm, record, lives);
        }
    }

    /// A guest that runs here, or has ended here, and whose disks were on their way. Whether it is one.
    fn take_up_rest(&self, vm: &VmId, record: &Record) -> bool {
        let Ok(Some(rest)) = self.context.store.rest(vm) else { return false };
        match record {
            Record::Owner { generation, via: Some(via), from: Some(from), resumed: true }
                if *via == rest.migration && self.has_stayed_up(vm) =>
            {
                let machine = Destination::running(*generation, via.clone(), from.clone());
                self.take_up_destination(vm.clone(), machine, None);
                true
            }
            _ => false,
        }
    }

    /// A guest that runs here and whose pages were on their way.
    fn take_up_gathering(&self, vm: VmId, record: &Record, lives: bool) {
        let Ok(Some(kept)) = self.context.store.gathering(&vm) else { return };
        match record {
            Record::Owner { generation, via: Some(via), from: Some(from), resumed: true }
                if *via == kept.migration && lives =>
            {
                let machine = Destination::running(*generation, via.clone(), from.clone());
                self.take_up_destination(vm, machine, None);
            }
            Record::Owner { generation, via: Some(via), from: Some(from), resumed: true }
                if *via == kept.migration =>
            {
                self.say_if_kept(&vm, self.context.store.end_dead(&vm, *generation, from));
            }
            _ => self.say_if_kept(&vm, self.context.store.end_gathering(&vm)),
        }
    }

    fn say_if_kept(&self, vm: &VmId, ended: Result<(), StoreError>) {
        if let Err(error) = ended {
            tracing::error!(%vm, %error, "what was remembered of a guest that went stays");
        }
    }

    fn take_up_source(
        &self,
        vm: VmId,
        machine: Source,
        actions: Vec<crate::handover::source::Action>,
    ) {
        let (destination, page_address) = machine.destination();
        let (destination, page_address) = (destination.clone(), page_address.to_owned());
        let migration = machine.migration().clone();
        tracing::warn!(%vm, %migration, state = ?machine.state(), "hand-over taken up again");
        let first = self.first(&vm, Side::Source, &destination, machine.next_generation());
        let first = MigrationProgress { migration: migration.to_string(), ..first };
        let follow = self.context.movers.setting(&vm).is_some_and(|setting| setting.follow);
        let storing = self.context.store.storing(&vm).ok().flatten();
        let order = Order {
            migration: migration.clone(),
            vm: vm.clone(),
            mode: Mode::PreCopy,
            destination,
            page_address,
            token: [0; TOKEN_BYTES],
            limit: None,
            disk_limit: None,
            // Whatever the destination has by now.
            compare_disks: true,
            disks_there: vec![],
            disk_window: None,
            downtime_limit: DOWNTIME_DEFAULT,
            iterations_max: None,
            deadline: None,
            scatter: None,
            absorb_budget: lifeboat_protocol::units::Bytes(0),
            generation: Generation(machine.next_generation().0.saturating_sub(1)),
            disks_follow: follow,
            disk_store: storing.filter(|storing| storing.migration == migration),
            handover_size: lifeboat_protocol::units::Bytes(0),
            disk_watch: std::time::Duration::ZERO,
        };
        let (progress, watching) = Progress::new(first);
        let (to, inputs) = mpsc::channel(16);
        let task = SourceTask::with_machine(self.context.clone(), order, inputs, progress, machine);
        self.enlist(migration, Entry { vm, progress: watching, task: Task::Source(to) });
        crate::tasks::spawn("migration, source", async move { task.take_up(actions).await });
    }

    fn take_up_destination(
        &self,
        vm: VmId,
        machine: Destination,
        actions: Option<Vec<crate::handover::destination::Action>>,
    ) {
        let (source, _) = machine.source();
        let migration = machine.migration().clone();
        tracing::warn!(%vm, %migration, state = ?machine.state(), "hand-over taken up again");
        let first = self.first(&vm, Side::Destination, source, machine.generation());
        let mode = match self.context.store.gathering(&vm) {
            Ok(Some(Gathering { scattered: Some(_), .. })) => Mode::ScatterGather,
            Ok(Some(_)) => Mode::PostCopy,
            _ => Mode::PreCopy,
        };
        let mode_told = lifeboat_protocol::agent::Mode::from(mode).into();
        let first =
            MigrationProgress { migration: migration.to_string(), mode: mode_told, ..first };
        let generation = machine.generation();
        let definition = self
            .context
            .guests
            .definition(&vm)
            .unwrap_or_else(|| VmDefinition { name: vm.to_string(), ..VmDefinition::default() });
        let (progress, watching) = Progress::new(first);
        let (to, inputs) = mpsc::channel(16);
        let task = DestinationTask::new(
            self.context.clone(),
            vm.clone(),
            definition,
            mode,
            inputs,
            progress,
            machine,
        );
        let task_entry = Task::Destination {
            inputs: to,
            token: [0; TOKEN_BYTES],
            generation,
            linked: true,
            disks: self.arriving_disks(&vm),
            disk_store: self.context.store.rest(&vm).ok().flatten().and_then(|rest| rest.store),
        };
        self.enlist(migration, Entry { vm, progress: watching, task: task_entry });
        crate::tasks::spawn("migration, destination", async move {
            match actions {
                Some(actions) => task.take_up(actions).await,
                None => task.take_up_running().await,
            }
        });
    }

    fn first(
        &self,
        vm: &VmId,
        side: Side,
        peer: &HostId,
        generation: Generation,
    ) -> MigrationProgress {
        let (here, peer) = (self.context.host.to_string(), peer.to_string());
        let (source_host, destination_host) = match side {
            Side::Source => (here, peer),
            _ => (peer, here),
        };
        MigrationProgress {
            vm: vm.to_string(),
            side: side.into(),
            source_host,
            destination_host,
            generation: generation.0,
            ..MigrationProgress::default()
        }
    }
}
