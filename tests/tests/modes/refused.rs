//! What cannot move by post-copy or scatter-gather stays, and `plan` says why before anything has been
//! touched: a destination whose QEMU may not use userfaultfd, and VMs whose pages cannot follow them.
//!
//! Real QEMUs with virtio-mem, with memory in huge pages, with a dirty bitmap on a disk. A device that
//! is passed through (vfio) no machine of this test has: its QEMU is started without it, and the
//! definition is what is looked at. None of them has a guest: their firmware runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_agent::qemu::qmp::Qmp;
use lifeboat_tests::rig::RigError;
use lifeboat_tests::rig::private;
use lifeboat_tests::rig::program::{run, words};
use lifeboat_tests::world::inside;
use serde_json::{Value, json};

use super::site::{Begin, Site};

const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";
const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

/// Each VM, and what a plan says of it: when the mode is named, which is looked at first in its
/// definition, and when it is not, by what its QEMU has said. Nothing of the first one.
const VMS: [(&str, &str, &str); 5] = [
    ("plain", "", ""),
    ("grows", "virtio-mem", "virtio-mem"),
    ("huge", "lies in a file", "huge pages of 2 MiB"),
    ("noted", "dirty bitmap `backup`", "dirty bitmap `backup`"),
    ("passed", "vfio", "vfio"),
];

/// Memory of a VM, in pages of 2 MiB: 64 MiB, and 8 KiB more under TCG (docs/decisions/0006).
const HUGE_PAGES: u64 = 33;

/// Huge pages of the machine's, reserved until this is dropped. No namespace has its own.
struct Reserved(u64);

impl Reserved {
    fn more(pages: u64) -> Self {
        let now = || fs::read_to_string(RESERVED).unwrap().trim().parse::<u64>().unwrap();
        let before = now();
        fs::write(RESERVED, (before + pages).to_string()).expect("needs root");
        let reserved = Self(before);
        assert_eq!(now(), before + pages, "the machine has not so many huge pages in one piece");
        reserved
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        fs::write(RESERVED, self.0.to_string()).unwrap();
    }
}

/// Memory in huge pages as a folder, until this is dropped: a folder with a mount in it cannot be
/// removed.
struct HugePages(PathBuf);

impl HugePages {
    fn at(folder: PathBuf) -> Self {
        fs::create_dir(&folder).unwrap();
        let mount =
            format!("mount -t hugetlbfs -o mode=1777,pagesize=2M none {}", folder.display());
        run(&mut words(&mount)).unwrap();
        Self(folder)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // A QEMU may still have a file open there; it ends with the namespace.
        if let Err(error) = run(&mut words(&format!("umount --lazy {}", self.0.display()))) {
            eprintln!("{error}");
        }
    }
}

/// Shows all programs of this mount namespace another setting than the machine's, which stays.
fn show_sysctl(file: &Path) -> Result<(), RigError> {
    run(&mut words(&format!("mount --bind {} {SYSCTL}", file.display()))).map(drop)
}

/// A QEMU that is started without what is passed through to it.
fn without_vfio(folder: &Path) -> PathBuf {
    let program = folder.join("qemu-without-vfio");
    let text = "#!/bin/bash\n\
        kept=()\n\
        while [ $# -gt 0 ]; do\n\
        if [ \"$1\" = -device ] && [[ $2 = vfio-* ]]; then shift 2; continue; fi\n\
        kept+=(\"$1\"); shift\n\
        done\n\
        exec qemu-system-x86_64 \"${kept[@]}\"\n";
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

fn definition(name: &str) -> String {
    let profile = match name {
        "plain" => String::new(),
        name => format!("profile = \"{name}\"\n"),
    };
    format!(
        "name = \"{name}\"\nmemory = \"64 MiB\"\nvcpus = 1\nmachine = \"pc-i440fx-7.2\"\n\
         cpu_model = \"qemu64\"\nautostart = true\n{profile}"
    )
}

/// `-mem-path` could be any file: only QEMU's process tells that it is one of huge pages.
fn profiles(folder: &Path) -> Vec<(&'static str, String)> {
    let args = |words: &[&str]| format!("args = {words:?}\n");
    let memory = folder.join("hugepages").display().to_string();
    let grows = [
        ["-m", "maxmem=512M,slots=2"],
        ["-object", "memory-backend-ram,id=more,size=256M"],
        ["-device", "virtio-mem-pci,id=grows,memdev=more"],
    ];
    vec![
        ("grows", args(grows.as_flattened())),
        ("huge", args(&["-mem-path", &memory])),
        ("noted", args(&["-blockdev", "driver=null-co,size=1048576,node-name=disk"])),
        ("passed", args(&["-device", "vfio-pci,host=01:00.0"])),
    ]
}

/// As a backup program does, by a monitor that the agent leaves alone.
fn add_bitmap(site: &Site) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let qmp = Qmp::connect(&site.run_dir("h1", "noted").rescue_socket()).await.unwrap();
        let bitmap = json!({"node": "disk", "name": "backup"});
        let added = qmp.execute("block-dirty-bitmap-add", bitmap, Duration::from_secs(5)).await;
        added.unwrap();
    });
}

/// What a plan says of the VMs that it leaves, by name.
fn left_behind(plan: &Value) -> Vec<(&str, String)> {
    let left = plan["left_behind"].as_array().unwrap_or_else(|| panic!("no plan: {plan}"));
    let said = |one: &Value| format!("{} {}", one["reason"], one["refusals"]);
    left.iter().map(|one| (one["vm"].as_str().unwrap(), said(one))).collect()
}

fn going(plan: &Value) -> Vec<&str> {
    let vms = plan["vms"].as_array().unwrap();
    vms.iter().map(|vm| vm["vm"].as_str().unwrap()).collect()
}

#[test]
fn a_plan_refuses_what_could_not_fetch_its_pages() {
    if !inside::is_inside() {
        let name = "refused::a_plan_refuses_what_could_not_fetch_its_pages";
        assert!(inside::run_inside(name).unwrap().success(), "see above");
        return;
    }
    private::settle().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let _mounted = HugePages::at(folder.path().join("hugepages"));
    let _reserved = Reserved::more(HUGE_PAGES);
    let setting = folder.path().join("unprivileged_userfaultfd");
    fs::write(&setting, "0\n").unwrap();
    show_sysctl(&setting).unwrap();

    let vms = VMS.map(|(name, ..)| (name, definition(name)));
    let profiles = profiles(folder.path());
    let qemu = without_vfio(folder.path());
    let begin = Begin { qemu: Some(&qemu), profiles: &profiles, ..Begin::of(4, &vms) };
    let site = Site::start(folder.path(), folder.path(), &begin);
    site.await_running("h1", VMS.len());
    add_bitmap(&site);

    let elsewhere = ["post-copy", "scatter-gather"];
    for mode in elsewhere {
        let plan = site.ask(&format!("plan h1 --urgency 50 --mode {mode}")).unwrap();
        let left = left_behind(&plan);
        assert_eq!((left.len(), going(&plan).len()), (VMS.len(), 0), "{plan}");
        let (_, plain) = left.iter().find(|(vm, _)| *vm == "plain").unwrap();
        for host in ["h2", "h3", "h4"] {
            let why = format!("{host}: guests cannot run there before their pages are there");
            assert!(plain.contains(&why), "{plain}");
        }
        assert!(plain.contains("sysctl -w vm.unprivileged_userfaultfd=1"), "{plain}");
    }
    fs::write(&setting, "1\n").unwrap();
    for mode in elsewhere {
        let plan = site.ask(&format!("plan h1 --urgency 50 --mode {mode}")).unwrap();
        // Where its pages would wait in stores depends on how busy this machine is.
        assert!(mode == "scatter-gather" || going(&plan) == ["plain"], "{plan}");
        assert!(left_behind(&plan).len() >= VMS.len() - 1, "{plan}");
        for (vm, why) in left_behind(&plan) {
            let (_, wanted, _) = VMS.iter().find(|(name, ..)| *name == vm).unwrap();
            assert!(why.contains(wanted) && why.contains(mode), "{vm}: {why}");
        }
    }
    // Nobody named a mode: they go by pre-copy, and it is said why not otherwise.
    let plan = site.ask("plan h1 --urgency 50").unwrap();
    assert_eq!(going(&plan).len(), VMS.len(), "{plan}");
    for vm in plan["vms"].as_array().unwrap() {
        let (_, _, wanted) = VMS.iter().find(|(name, ..)| vm["vm"] == *name).unwrap();
        let refusals = vm["mode_refusals"].to_string();
        let said =
            elsewhere.map(|mode| refusals.contains(&format!("{mode}: {mode} is not possible")));
        assert_eq!(said, [!wanted.is_empty(); 2], "{vm}");
        assert!(vm["mode"] == "pre-copy" && refusals.contains(wanted), "{vm}");
    }
}
