//! What the QEMU program of this host offers, asked of itself.
//!
//! Used by `host::gather`. QEMU runs without a machine, as the user and with the accelerator that
//! VMs get, and talks QMP over its standard input and output: no file, no socket in a directory.
//! It is ended before the answer is given, and killed if it does not end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::{HostError, QemuProgram};
use crate::qemu::process::ends_with_us;
use crate::qemu::qmp::{CpuModel, MachineType, Qmp, QmpError};

/// How long QEMU may take to end after it was asked to.
const END: Duration = Duration::from_secs(5);
/// Bytes of its complaints that are read.
const SAID_BYTES_MAX: u64 = 400;

/// What a QEMU offers. All lists are sorted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QemuFacts {
    /// `7.2.22`.
    pub version: String,
    /// Machine types, with their versions and with their aliases.
    pub machine_types: Vec<String>,
    /// CPU models that can run here.
    pub cpu_models: Vec<String>,
    /// Device types.
    pub devices: Vec<String>,
}

/// Runs QEMU and asks it.
pub(super) async fn ask(qemu: QemuProgram<'_>) -> Result<QemuFacts, HostError> {
    let start_error = |source| HostError::QemuStart { program: qemu.program.into(), source };
    let (mut child, socket) = start(qemu).map_err(start_error)?;
    match questions(socket).await {
        Ok(facts) => {
            end(child).await;
            Ok(facts)
        }
        Err(source) => {
            let said = last_words(&mut child).await;
            end(child).await;
            Err(HostError::QemuSilent { program: qemu.program.into(), said, source })
        }
    }
}

fn start(qemu: QemuProgram<'_>) -> io::Result<(Child, UnixStream)> {
    let (ours, its) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    let output: OwnedFd = its.try_clone()?.into();
    let mut command = Command::new(qemu.program);
    command
        .args(["-machine", "none", "-accel", qemu.accelerator.as_str(), "-S"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"])
        .args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny"])
        .current_dir("/")
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::from(OwnedFd::from(its)))
        .stdout(Stdio::from(output))
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if rustix::process::geteuid().is_root() {
        command.gid(qemu.user.gid).uid(qemu.user.uid);
    }
    ends_with_us(command.as_std_mut());
    Ok((command.spawn()?, UnixStream::from_std(ours)?))
}

async fn questions(socket: UnixStream) -> Result<QemuFacts, QmpError> {
    let qmp = Qmp::over(socket, "the QEMU that tells what it offers").await?;
    let facts = QemuFacts {
        version: qmp.version().to_string(),
        machine_types: machine_types(qmp.query_machines().await?),
        cpu_models: usable_models(qmp.query_cpu_definitions().await?),
        devices: sorted(qmp.qom_list_types("device").await?),
    };
    qmp.quit().await?;
    Ok(facts)
}

/// An alias stands beside what it stands for: a definition may name either.
fn machine_types(machines: Vec<MachineType>) -> Vec<String> {
    let both = |machine: MachineType| [Some(machine.name), machine.alias];
    sorted(machines.into_iter().flat_map(both).flatten().collect())
}

/// Models with nothing known in their way. What QEMU cannot tell is left for the start of a VM to
/// find out.
fn usable_models(models: Vec<CpuModel>) -> Vec<String> {
    let usable = |model: &CpuModel| model.unavailable_features.iter().flatten().next().is_none();
    sorted(models.into_iter().filter(usable).map(|model| model.name).collect())
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names.dedup();
    names
}

/// What QEMU complained of, if it does so soon.
async fn last_words(child: &mut Child) -> String {
    let Some(errors) = child.stderr.take() else { return String::new() };
    let mut said = vec![];
    let mut errors = errors.take(SAID_BYTES_MAX);
    let reading = errors.read_to_end(&mut said);
    // What was read before the time was up is told all the same.
    let _ = tokio::time::timeout(Duration::from_secs(1), reading).await;
    String::from_utf8_lossy(&said).trim().replace('\n', "; ")
}

async fn end(mut child: Child) {
    if tokio::time::timeout(END, child.wait()).await.is_err()
        && let Err(error) = child.kill().await
    {
        tracing::warn!(%error, "a QEMU that was only asked what it offers could not be ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str, in_the_way: Option<&[&str]>) -> CpuModel {
        let list = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        CpuModel { name: name.to_owned(), unavailable_features: in_the_way.map(list) }
    }

    #[test]
    fn a_model_that_lacks_something_is_left_out() {
        let models = [
            model("qemu64", Some(&[])),
            model("EPYC", Some(&["sha-ni"])),
            model("Broadwell", None),
        ];
        assert_eq!(usable_models(models.to_vec()), ["Broadwell", "qemu64"]);
    }

    #[test]
    fn a_machine_has_its_name_and_its_alias() {
        let machine = |name: &str, alias: Option<&str>| MachineType {
            name: name.to_owned(),
            alias: alias.map(str::to_owned),
        };
        let machines = vec![machine("pc-q35-7.2", Some("q35")), machine("microvm", None)];
        assert_eq!(machine_types(machines), ["microvm", "pc-q35-7.2", "q35"]);
    }
}
