//! The taps of a VM's NICs: made before its QEMU starts, and taken away after it.
//!
//! Used by `vms/`. Which commands are run is decided by pure functions; [`create`] and [`remove`]
//! run them. A tap belongs to QEMU's user, who can open this one and make none; its port on the
//! bridge carries the VM's VLAN tag, and external-ids that mark it as ours. Taking away never
//! stops at the first error, and succeeds where nothing is left.

use lifeboat_protocol::ids::VmId;
use xxhash_rust::xxh3::xxh3_64;

use super::definition::{Definition, Nic};
use crate::programs::{self, ProgramError};

/// The Open vSwitch of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ovs {
    /// OVSDB, as `ovs-vsctl --db` takes it: `unix:/run/openvswitch/db.sock`.
    pub database: String,
}

/// One tap to be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tap<'a> {
    name: String,
    vm: &'a VmId,
    nic: &'a Nic,
}

/// The tap's interface name: the same on every host and after every restart, and within the 15
/// characters that Linux allows. Two VMs whose names hash alike cannot both run on one host: the
/// second is refused when its tap is made.
#[must_use]
pub fn name(vm: &VmId, index: usize) -> String {
    // The upper half; a shift so far leaves 32 bits.
    format!("lb{:08x}n{index}", xxh3_64(vm.as_str().as_bytes()) >> 32)
}

/// The names of all taps of a VM.
#[must_use]
pub fn names(definition: &Definition) -> Vec<String> {
    (0..definition.nics.len()).map(|index| name(&definition.name, index)).collect()
}

/// Makes every tap of the VM and plugs it into its bridge. Nothing is left when it fails.
///
/// # Errors
/// The first command that failed.
pub async fn create(definition: &Definition, ovs: &Ovs, uid: u32) -> Result<(), ProgramError> {
    for (index, nic) in definition.nics.iter().enumerate() {
        let tap = Tap { name: name(&definition.name, index), vm: &definition.name, nic };
        for (program, arguments) in creation(&tap, ovs, uid) {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            if let Err(error) = programs::run(program, &arguments).await {
                for leftover in remove(definition, ovs).await {
                    tracing::warn!(%leftover, "a tap's undo failed too");
                }
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Takes every tap of the VM away, as far as it can. Returns what could not be done.
pub async fn remove(definition: &Definition, ovs: &Ovs) -> Vec<ProgramError> {
    let mut errors = vec![];
    for tap in names(definition) {
        let database = format!("--db={}", ovs.database);
        let port = [&database, "--timeout=10", "--", "--if-exists", "del-port", &tap];
        if let Err(error) = programs::run("ovs-vsctl", &port).await {
            errors.push(error);
        }
        // Of this process's own network namespace, which `/sys` need not be.
        let there = counters(&tap).is_some();
        if there && let Err(error) = programs::run("ip", &["link", "del", "dev", &tap]).await {
            errors.push(error);
        }
    }
    errors
}

/// Bytes that a tap has carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// What the tap received: what the VM sent.
    pub from_vm: u64,
    /// What the tap sent: what the VM received.
    pub to_vm: u64,
}

/// The counters of an interface; `None` where there is none of that name.
#[must_use]
pub fn counters(interface: &str) -> Option<Counters> {
    counters_in(&std::fs::read_to_string("/proc/self/net/dev").ok()?, interface)
}

/// From the text of `/proc/net/dev` (proc(5)): received bytes first, sent bytes ninth.
fn counters_in(text: &str, interface: &str) -> Option<Counters> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, figures) = lines.find(|(name, _)| name.trim() == interface)?;
    let figures: Vec<&str> = figures.split_ascii_whitespace().collect();
    let figure = |at: usize| figures.get(at)?.parse().ok();
    Some(Counters { from_vm: figure(0)?, to_vm: figure(8)? })
}

type Call = (&'static str, Vec<String>);

fn creation(tap: &Tap<'_>, ovs: &Ovs, uid: u32) -> Vec<Call> {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<String>>();
    let name = &tap.name;
    let mut calls: Vec<Call> =
        vec![("ip", words(&format!("tuntap add dev {name} mode tap user {uid}")))];
    if let Some(mtu) = tap.nic.mtu {
        calls.push(("ip", words(&format!("link set dev {name} mtu {mtu}"))));
    }
    // The host shall not speak through a guest's cable: no address of its own.
    calls.push(("ip", words(&format!("link set dev {name} addrgenmode none"))));
    calls.push(("ovs-vsctl", plugging(tap, ovs)));
    calls.push(("ip", words(&format!("link set dev {name} up"))));
    calls
}

fn plugging(tap: &Tap<'_>, ovs: &Ovs) -> Vec<String> {
    let mut call = vec![
        format!("--db={}", ovs.database),
        "--timeout=10".to_owned(),
        "--".to_owned(),
        "add-port".to_owned(),
        tap.nic.bridge.clone(),
        tap.name.clone(),
    ];
    call.extend(tap.nic.vlan_tag.map(|tag| format!("tag={tag}")));
    for word in ["--", "set", "Interface"] {
        call.push(word.to_owned());
    }
    call.push(tap.name.clone());
    call.push("external_ids:lifeboat=tap".to_owned());
    call.push(format!("external_ids:lifeboat-vm={}", tap.vm));
    // What libvirt and OpenStack set too, so that other tools know the NIC behind the port.
    call.push(format!("external_ids:attached-mac=\"{}\"", tap.nic.mac));
    call.extend(tap.nic.mtu.map(|mtu| format!("mtu_request={mtu}")));
    call
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taps_name_fits_and_stays() {
        let longest = VmId::new("x".repeat(63)).unwrap();
        assert!(name(&longest, 7).len() <= 15);
        let web = VmId::new("web-1").unwrap();
        assert_eq!(name(&web, 0), name(&web, 0));
        assert_ne!(name(&web, 0), name(&VmId::new("web-2").unwrap(), 0));
    }

    #[test]
    fn a_taps_counters_are_the_vms_turned_round() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n\
                    lb0n0:700 7 0 0 0 0 0 0 900 9 0 0 0 0 0 0\n";
        assert_eq!(counters_in(text, "lb0n0"), Some(Counters { from_vm: 700, to_vm: 900 }));
        assert_eq!(counters_in(text, "lb0n1"), None);
        assert!(counters("lo").is_some());
    }

    #[test]
    fn a_tap_is_plugged_in_with_its_tag_and_marked_as_ours() {
        let vm = VmId::new("web").unwrap();
        let nic = Nic {
            mac: "52:54:00:00:00:01".to_owned(),
            bridge: "br0".to_owned(),
            vlan_tag: Some(10),
            mtu: Some(1400),
        };
        let tap = Tap { name: "lb0".to_owned(), vm: &vm, nic: &nic };
        let ovs = Ovs { database: "unix:/x".to_owned() };
        let calls: Vec<String> = creation(&tap, &ovs, 99)
            .into_iter()
            .map(|(program, words)| format!("{program} {}", words.join(" ")))
            .collect();
        assert_eq!(
            calls,
            [
                "ip tuntap add dev lb0 mode tap user 99",
                "ip link set dev lb0 mtu 1400",
                "ip link set dev lb0 addrgenmode none",
                "ovs-vsctl --db=unix:/x --timeout=10 -- add-port br0 lb0 tag=10 -- set Interface lb0 \
                 external_ids:lifeboat=tap external_ids:lifeboat-vm=web \
                 external_ids:attached-mac=\"52:54:00:00:00:01\" mtu_request=1400",
                "ip link set dev lb0 up",
            ]
        );
    }
}
