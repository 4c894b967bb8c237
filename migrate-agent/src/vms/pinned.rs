//! Which VMs' pages cannot follow them after the hand-over: those whose memory is held in place or
//! lies in huge pages, by the QEMU arguments of their profile.
//!
//! Used by the VMs' description, so that a plan refuses post-copy and scatter-gather for them. Such a
//! VM still moves by pre-copy where everything else allows it.

use super::Vms;
use super::definition::Definition;
use super::host_files;

/// What in an argument stands for what.
const SIGNS: [(&str, &str); 7] = [
    ("vfio-", "a device is passed through to it (vfio)"),
    ("vhost-vdpa", "a device is passed through to it (vdpa)"),
    ("hugetlb=on", "its memory lies in huge pages"),
    ("-mem-path", "its memory lies in a file"),
    ("memory-backend-file", "its memory lies in a file"),
    ("mem-lock=on", "its memory is locked"),
    ("virtio-mem", "its memory grows and shrinks (virtio-mem)"),
];

impl Vms {
    /// Why pages of this VM cannot be fetched while it runs, in a few words; `None` where they can.
    #[must_use]
    pub fn post_copy_obstacle(&self, definition: &Definition) -> Option<String> {
        let name = definition.profile.as_ref()?;
        match host_files::profile(&self.settings.profiles_dir, name) {
            Ok(arguments) => sign(&arguments).map(str::to_owned),
            // Without its profile it would not start anywhere; the source's is what counts.
            Err(error) => Some(format!("its profile cannot be read: {error}")),
        }
    }
}

fn sign(arguments: &[String]) -> Option<&'static str> {
    let stands = |(text, _): &&(&str, &str)| arguments.iter().any(|word| word.contains(text));
    SIGNS.iter().find(stands).map(|(_, words)| *words)
}

#[test]
fn what_holds_memory_in_place_is_seen_in_the_arguments() {
    let sign = |words: &[&str]| sign(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
    assert_eq!(sign(&["-device", "vfio-pci,host=01:00.0"]), Some(SIGNS[0].1));
    let huge = sign(&["-object", "memory-backend-memfd,id=m,size=1G,hugetlb=on"]);
    assert_eq!(huge, Some("its memory lies in huge pages"));
    assert_eq!(sign(&["-device", "virtio-balloon-pci"]), None);
    assert_eq!(sign(&[]), None);
}
