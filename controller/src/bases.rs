//! Whether another host has what a VM's overlays lie on, and its images that nobody writes to: asked of
//! both agents, and compared by hash.
//!
//! Used by the planner, which lets no overlay go to another base, by `lifeboat verify`, and before a
//! migration, which sends no image that is there. An overlay is nothing without its base: on other
//! content the guest would read blocks of two disks, without an error. So what is not proven is
//! refused. Deliberately not here: the hashing, which is the agents'.

use futures_util::future::join_all;
use lifeboat_protocol::agent::{BaseChain, BaseFile, Disk, VmDefinition};
use lifeboat_protocol::controller::VerifiedFile;
use lifeboat_protocol::ids::{HostId, VmId};

use crate::agents::{AgentError, Agents};

/// The word for a file that is the same.
pub const SAME: &str = "same";
/// The word for an image that is not there and is sent.
pub const ABSENT: &str = "absent";

/// Whether a file in this state keeps the VM from that host.
#[must_use]
pub fn is_in_the_way(file: &VerifiedFile) -> bool {
    file.state != SAME && file.state != ABSENT
}

/// Whether any disk that goes along may be an overlay, or is one that nobody writes to: then its agent
/// is asked.
#[must_use]
pub fn may_be_compared(definition: &VmDefinition) -> bool {
    let mut local = definition.disks.iter().filter(|disk| disk.shared_storage.is_empty());
    local.any(|disk| disk.format == "qcow2" || disk.read_only)
}

/// Which disks of the VM nobody writes to and `host` has: their places in its `definition`.
///
/// # Errors
/// As [`compare`].
pub async fn there_already(
    agents: &Agents,
    at: &HostId,
    vm: &VmId,
    host: &HostId,
    definition: &VmDefinition,
) -> Result<Vec<u32>, AgentError> {
    let is_kept = |disk: &Disk| disk.read_only && disk.shared_storage.is_empty();
    if !definition.disks.iter().any(is_kept) {
        return Ok(vec![]);
    }
    let files = compare(agents, at, vm, std::slice::from_ref(host)).await?;
    let is_there = |disk: &Disk| {
        let is_it = |file: &&VerifiedFile| file.image && file.disk == disk.path;
        is_kept(disk) && files.iter().find(is_it).is_some_and(|file| file.state == SAME)
    };
    let there = definition.disks.iter().zip(0..).filter(|(disk, _)| is_there(disk));
    Ok(there.map(|(_, number)| number).collect())
}

/// Every file beneath a VM's overlays and every image of it that nobody writes to, compared at each of
/// these hosts.
///
/// # Errors
/// When the VM's own agent does not say which files these are. One of the others that does not answer
/// has files that are `unreadable`.
pub async fn compare(
    agents: &Agents,
    at: &HostId,
    vm: &VmId,
    hosts: &[HostId],
) -> Result<Vec<VerifiedFile>, AgentError> {
    let wanted = agents.bases_of(at, vm).await?;
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let asked = hosts.iter().map(|host| {
        let wanted = &wanted;
        async move { verdicts(host, wanted, agents.bases_at(host, wanted.clone()).await) }
    });
    Ok(join_all(asked).await.concat())
}

fn verdicts(
    host: &HostId,
    wanted: &[BaseChain],
    found: Result<Vec<BaseChain>, AgentError>,
) -> Vec<VerifiedFile> {
    let (found, silence) = match found {
        Ok(found) => (found, "its agent said nothing of it".to_owned()),
        Err(error) => (Vec::new(), error.to_string()),
    };
    let mut verdicts = Vec::new();
    for (number, chain) in wanted.iter().enumerate() {
        for (depth, file) in chain.files.iter().enumerate() {
            let there = found.get(number).and_then(|chain| chain.files.get(depth));
            let (state, detail) = match there {
                Some(there) => verdict(file, there),
                None => ("unreadable", silence.clone()),
            };
            verdicts.push(VerifiedFile {
                host: host.to_string(),
                disk: chain.disk.clone(),
                path: there.map_or(&file.path, |there| &there.path).clone(),
                state: state.to_owned(),
                detail,
                bytes: file.bytes,
                hash: file.hash.clone(),
                image: chain.image,
            });
        }
    }
    verdicts
}

fn verdict(here: &BaseFile, there: &BaseFile) -> (&'static str, String) {
    match () {
        () if !here.detail.is_empty() => {
            ("unreadable", format!("at the VM's host {}", here.detail))
        }
        () if there.absent => (ABSENT, "it is sent along".to_owned()),
        () if !there.detail.is_empty() => ("unreadable", there.detail.clone()),
        () if here.bytes != there.bytes => {
            let detail = format!("it has {} bytes, at the VM's host {}", there.bytes, here.bytes);
            ("differs", detail)
        }
        () if here.hash.is_empty() || there.hash.is_empty() => {
            ("unreadable", "its agent did not hash it".to_owned())
        }
        () if here.hash != there.hash => ("differs", "the same size, other content".to_owned()),
        () => (SAME, String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64, hash: &str, detail: &str) -> BaseFile {
        let (hash, detail) = (hash.to_owned(), detail.to_owned());
        let (name, path, absent) = ("b".to_owned(), "/d/b".to_owned(), false);
        BaseFile { name, path, bytes, hash, detail, absent }
    }

    #[test]
    fn only_what_is_proven_is_the_same() {
        let here = file(5, "aa", "");
        let state = |there: &BaseFile| verdict(&here, there).0;
        assert_eq!(state(&here), SAME);
        assert_eq!(state(&file(5, "bb", "")), "differs");
        assert_eq!(state(&file(6, "", "")), "differs");
        assert_eq!(state(&file(5, "", "")), "unreadable");
        assert_eq!(state(&file(0, "", "it cannot be read")), "unreadable");
        // Two hosts that both cannot say have not agreed.
        assert_eq!(verdict(&file(5, "", ""), &file(5, "", "")).0, "unreadable");
        // Nothing but an image is sent, and only one that can be read where it is.
        let absent = BaseFile { absent: true, ..file(0, "", "No such file") };
        assert_eq!(state(&absent), ABSENT);
        assert_eq!(verdict(&file(5, "", "it cannot be read"), &absent).0, "unreadable");
    }

    #[test]
    fn an_agent_that_answers_for_fewer_files_proves_nothing() {
        let (disk, files) = ("disk".to_owned(), vec![file(5, "aa", "")]);
        let chain = BaseChain { disk, files, image: false };
        let host = HostId::new("h2").unwrap();
        let wanted = [chain.clone()];
        let states = |found| {
            let verdicts = verdicts(&host, &wanted, found);
            verdicts.into_iter().map(|file| file.state).collect::<Vec<_>>()
        };
        assert_eq!(states(Ok(vec![chain])), [SAME]);
        assert_eq!(states(Ok(vec![])), ["unreadable"]);
        assert_eq!(states(Ok(vec![BaseChain::default()])), ["unreadable"]);
        let silent = AgentError::UnknownHost { host: host.clone() };
        assert_eq!(states(Err(silent)), ["unreadable"]);
    }

    #[test]
    fn only_local_qcow2_disks_may_be_overlays_and_only_what_nobody_writes_to_may_stay() {
        let with = |format: &str, storage: &str| VmDefinition {
            disks: vec![Disk {
                format: format.to_owned(),
                shared_storage: storage.to_owned(),
                ..Disk::default()
            }],
            ..VmDefinition::default()
        };
        assert!(may_be_compared(&with("qcow2", "")));
        assert!(!may_be_compared(&with("raw", "")) && !may_be_compared(&with("qcow2", "san")));
        let mut cd = with("raw", "");
        cd.disks[0].read_only = true;
        assert!(may_be_compared(&cd));
    }
}
