//! The facts about this host, with the QEMU that is installed.

use std::path::Path;

use lifeboat_agent::host::{HostError, QemuProgram, gather};
use lifeboat_agent::qemu::launch::Accelerator;
use lifeboat_agent::qemu::process::User;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const NOBODY: User = User { uid: 65534, gid: 65534 };

fn emulating(program: &Path) -> QemuProgram<'_> {
    QemuProgram { program, user: NOBODY, accelerator: Accelerator::Tcg }
}

#[tokio::test]
async fn qemu_tells_what_it_offers() {
    let facts = gather(Some(emulating(Path::new(QEMU)))).await.unwrap();
    let qemu = facts.qemu.unwrap();
    let has = |list: &[String], name: &str| list.iter().any(|entry| entry == name);
    assert!(qemu.version.split('.').count() == 3, "{}", qemu.version);
    assert!(has(&qemu.machine_types, "q35") && has(&qemu.machine_types, "pc-i440fx-7.2"));
    assert!(has(&qemu.cpu_models, "qemu64"));
    // Emulation has no AMX: a model that needs it is not offered.
    assert!(!has(&qemu.cpu_models, "SapphireRapids-v1"));
    assert!(has(&qemu.devices, "virtio-net-pci") && !has(&qemu.devices, "device"));
    assert!(!facts.cpu_flags.is_empty());
}

#[tokio::test]
async fn a_qemu_that_is_none_is_named_with_its_own_words() {
    let error = gather(Some(emulating(Path::new("/no/such/qemu")))).await.unwrap_err();
    assert!(matches!(error, HostError::QemuStart { .. }), "{error}");
    let error = gather(Some(emulating(Path::new("/usr/bin/ls")))).await.unwrap_err();
    assert!(error.to_string().starts_with("/usr/bin/ls was asked what it offers and said: "));
}
