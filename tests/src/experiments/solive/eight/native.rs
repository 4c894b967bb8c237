//! QEMU's own post-copy out of the same host, by a queue of the rate that its destination has reserved.
//!
//! The guest is a twin of the one that the controller moves, without a network card. It is booted before
//! each run and ended behind it, so that it takes nothing from the other cases. Its time ends, as ours does, when
//! the source's QEMU has gone.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lifeboat_agent::qemu::launch::LaunchSpec;

use super::cases::Case;
use super::{EVICTION, Figures, LIMIT, SOURCE, Shaped, WIRE, reserved_at, sent_by};
use crate::clock;
use crate::experiments::solive::WRONG;
use crate::experiments::twins::{Twins, lives, made};
use crate::rig::RigError;
use crate::rig::cloud::Cloud;
use crate::rig::direct::{Direct, Leaving, Place};
use crate::rig::network::Namespace;

/// As the lab's own guests.
const KERNEL_WORDS: &str =
    "console=ttyS0 quiet panic=-1 nokaslr tsc=unstable no_timer_check mitigations=off";
/// It boots and fills its memory.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// So often a guest says that it lives before that is believed.
const SIGNS: usize = 2;

/// Boots the twin at the source and has its QEMU bring it to the case's destination.
pub(super) async fn measured(
    cloud: &Cloud,
    (folder, images): (&Path, &Path),
    case: &Case,
) -> Result<Figures, RigError> {
    let spec = twin(cloud, images)?;
    let (here, there) = (Side::of(cloud, SOURCE, folder)?, Side::of(cloud, case.to, folder)?);
    let running = Direct::boot(&spec, here.place()).await?;
    let leash = Leash::on(running.pid())?;
    let said = || fs::read_to_string(running.serial_log()).unwrap_or_default();
    let ready = || said().contains("LIFEBOAT-READY").then_some(());
    let late = || RigError::TooLate {
        what: "that QEMU's own guest has booted".to_owned(),
        seconds: BOOT_LIMIT.as_secs(),
    };
    clock::wait_for(BOOT_LIMIT, ready).ok_or_else(late)?;
    lives(&running.serial_log(), SIGNS)?;
    let shaped = Shaped::to(cloud, reserved_at(cloud, case.to)?)?;
    let sent = sent_by(cloud)?;
    let waiting = Direct::listen_for(&spec, there.place(), Leaving::PostCopy).await?;
    let other_leash = Leash::on(waiting.pid())?;
    let took = running.leave(there.address, Leaving::PostCopy, LIMIT).await?;
    leash.off();
    let bytes = sent_by(cloud)? - sent;
    drop(shaped);
    let wrong = lives(&waiting.serial_log(), SIGNS)?;
    waiting.end().await?;
    other_leash.off();
    Ok(BTreeMap::from([
        (EVICTION, took.as_secs_f64()),
        (WIRE, bytes / 1_048_576.0),
        (WRONG, wrong),
    ]))
}

/// A QEMU stays when this program ends, and here is no namespace around it that would take it along: a shell
/// that waits for our end kills it then.
struct Leash(Child);

impl Leash {
    fn on(pid: u32) -> Result<Self, RigError> {
        // In a session of its own, which a terminal's Ctrl-C does not reach.
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", &format!("read -r _; kill -KILL {pid}")]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let cannot = |source| RigError::Start { program: "setsid".to_owned(), source };
        command.spawn().map(Self).map_err(cannot)
    }

    /// QEMU has ended by itself.
    fn off(mut self) {
        // It waits for nothing else.
        let _ = self.0.kill();
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A host of the cloud, and where QEMU's files are there.
struct Side {
    namespace: Namespace,
    address: Ipv4Addr,
    folder: PathBuf,
}

impl Side {
    fn of(cloud: &Cloud, host: &str, folder: &Path) -> Result<Self, RigError> {
        let address = cloud.address(host)?;
        let address = address.parse().map_err(RigError::refused("an address"))?;
        Ok(Self { namespace: cloud.namespace(host)?, address, folder: made(folder, host)? })
    }

    fn place(&self) -> Place<'_> {
        Place { namespace: &self.namespace, address: self.address, folder: &self.folder }
    }
}

/// What the scenario's guest is, but for its network card.
fn twin(cloud: &Cloud, images: &Path) -> Result<LaunchSpec, RigError> {
    let [vm] = &cloud.scenario().vms[..] else {
        return Err(RigError::refused("a scenario")("it has not one guest"));
    };
    let twins = Twins { memory: vm.memory, kernel_arguments: "" };
    let kernel_arguments = format!("{KERNEL_WORDS} {}", without_network(&vm.arguments));
    Ok(LaunchSpec { kernel_arguments, ..twins.direct(images) })
}

fn without_network(arguments: &str) -> String {
    let of_network = |word: &&str| !["lb.ip", "lb.mtu"].iter().any(|key| word.starts_with(key));
    arguments.split_whitespace().filter(of_network).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_twin_has_the_guests_memory_and_no_network() {
        let arguments = "lb.name=vm lb.region=64MiB lb.ip=10.0.0.101/24 lb.mtu=9000 lb.check=5";
        assert_eq!(without_network(arguments), "lb.name=vm lb.region=64MiB lb.check=5");
    }
}
