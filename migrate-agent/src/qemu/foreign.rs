//! QEMUs on this host that somebody else manages: recognised, named, and left alone.
//!
//! Used by `host.rs`. [`classify`] is pure: it judges a process by its command line and control
//! group; [`find`] reads `/proc`. Moving a VM behind its manager's back would end with two of
//! them, for the manager starts it again where it thinks it belongs.

use super::procfs;

/// What is looked at of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessView {
    /// Its arguments, the program first.
    pub arguments: Vec<String>,
    /// Its control groups, as `/proc/PID/cgroup` lists them.
    pub cgroup: String,
}

/// A QEMU that is not ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// The VM's name, as its manager calls it.
    pub name: String,
    /// Who manages it.
    pub owner: &'static str,
    /// Its process.
    pub pid: u32,
}

/// Owner of a QEMU that carries no mark that we know.
pub const UNKNOWN_OWNER: &str = "an unknown manager";

/// The foreign QEMUs of this network namespace; `ours` are the processes that are not foreign.
#[must_use]
pub fn find(ours: &[u32]) -> Vec<Foreign> {
    let candidates = procfs::all().into_iter().filter(|pid| !ours.contains(pid));
    candidates
        .filter_map(|pid| {
            let view = ProcessView { arguments: procfs::cmdline(pid), cgroup: String::new() };
            if !is_qemu(&view) || !procfs::shares_our_network(pid) {
                return None;
            }
            let view = ProcessView { cgroup: procfs::cgroup(pid), ..view };
            let (name, owner) = classify(&view)?;
            Some(Foreign { name, owner, pid })
        })
        .collect()
}

fn is_qemu(view: &ProcessView) -> bool {
    let program = view.arguments.first().map_or("", |path| path.rsplit('/').next().unwrap_or(""));
    program.starts_with("qemu-system-") || matches!(program, "kvm" | "qemu-kvm")
}

/// The VM's name and its manager; `None` for a process that is no QEMU with a guest.
#[must_use]
pub fn classify(view: &ProcessView) -> Option<(String, &'static str)> {
    if !is_qemu(view) || asks_only(view) {
        return None;
    }
    let name = name(view).unwrap_or_else(|| "unnamed".to_owned());
    Some((name, owner(view)))
}

/// A QEMU that is asked what it can do, as every manager does: no guest.
fn asks_only(view: &ProcessView) -> bool {
    let none = |pair: &[String]| pair[0] == "-machine" && pair[1].split(',').next() == Some("none");
    view.arguments.windows(2).any(none)
}

fn owner(view: &ProcessView) -> &'static str {
    let any = |marks: &[&str]| {
        let has = |text: &String| marks.iter().any(|mark| text.contains(mark));
        view.arguments.iter().any(has) || has(&view.cgroup)
    };
    // More particular ones first: oVirt and OpenStack VMs are libvirt's too.
    if any(&["/var/lib/nova/", "manufacturer=OpenStack"]) {
        "OpenStack (libvirt)"
    } else if any(&["/rhev/data-center/", "manufacturer=oVirt"]) {
        "oVirt (libvirt)"
    } else if any(&["/var/run/qemu-server/", "/run/qemu-server/", "qemu.slice"]) {
        "Proxmox VE"
    } else if any(&["/run/ganeti/", "/var/run/ganeti/"]) {
        "Ganeti"
    } else if any(&["pacemaker.service", "corosync.service"]) {
        "an HA manager (Pacemaker)"
    } else if any(&["/run/libvirt/", "/var/lib/libvirt/", "machine.slice/machine-qemu"]) {
        "libvirt"
    } else if any(&["incus.service", "/run/incus/"]) {
        "Incus"
    } else if any(&["snap.lxd", "/var/snap/lxd/"]) {
        "LXD"
    } else {
        UNKNOWN_OWNER
    }
}

fn name(view: &ProcessView) -> Option<String> {
    let value = view.arguments.windows(2).find(|pair| pair[0] == "-name").map(|pair| &pair[1])?;
    let first = value.split(',').find(|part| part.starts_with("guest=") || !part.contains('='))?;
    let name = first.strip_prefix("guest=").unwrap_or(first);
    Some(name.chars().filter(|c| !c.is_control()).take(100).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(line: &str, cgroup: &str) -> ProcessView {
        let arguments = line.split(' ').map(str::to_owned).collect();
        ProcessView { arguments, cgroup: cgroup.to_owned() }
    }

    #[test]
    fn each_manager_is_known_by_its_marks() {
        let cases = [
            (
                "/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on -S -object \
                 secret,id=masterKey0,file=/var/lib/libvirt/qemu/domain-1-web/master-key.aes",
                "0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator",
                "web",
                "libvirt",
            ),
            (
                "/usr/bin/kvm -id 100 -name db,debug-threads=on -chardev \
                 socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off",
                "0::/qemu.slice/100.scope",
                "db",
                "Proxmox VE",
            ),
            (
                "/usr/bin/qemu-system-x86_64 -name guest=instance-0001,x=y -smbios \
                 type=1,manufacturer=OpenStack Foundation -drive file=/var/lib/libvirt/x",
                "0::/machine.slice/machine-qemu.scope",
                "instance-0001",
                "OpenStack (libvirt)",
            ),
            (
                "/usr/bin/kvm -name inst1 -pidfile /var/run/ganeti/kvm-hypervisor/pid/inst1",
                "0::/",
                "inst1",
                "Ganeti",
            ),
            (
                "qemu-system-x86_64 -name guest=ha1",
                "0::/system.slice/pacemaker.service",
                "ha1",
                "an HA manager (Pacemaker)",
            ),
            ("qemu-system-x86_64 -m 64", "0::/user.slice", "unnamed", UNKNOWN_OWNER),
        ];
        for (line, cgroup, name, owner) in cases {
            let found = classify(&view(line, cgroup));
            assert_eq!(found, Some((name.to_owned(), owner)), "{line}");
        }
    }

    #[test]
    fn what_is_no_guest_is_passed_over() {
        for line in [
            "/usr/bin/less /var/lib/libvirt/qemu-system-x86_64.log",
            "/usr/sbin/libvirtd",
            "qemu-img convert a b",
            "/usr/bin/qemu-system-x86_64 -S -machine none,accel=kvm -name guest=probe",
            "",
        ] {
            assert_eq!(classify(&view(line, "")), None, "{line}");
        }
    }
}
