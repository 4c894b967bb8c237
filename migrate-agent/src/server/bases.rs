//! Answers what lies beneath overlays: those of a VM here, or what another host's would lie on here.
//!
//! Used by the gRPC server. Only a hash of a file goes out, never its content. Whoever hangs up does
//! not stop the reading: the next one who asks finds the hash known.

use std::path::Path;
use std::sync::Arc;

use lifeboat_protocol::agent::{
    BaseChain, BaseFile, HashBasesReply, HashBasesRequest, VmDefinition,
};
use tonic::Status;

use super::{Service, status, vm_named};
use crate::disk::bases::{Bases, DEEPEST, beneath, placed};
use crate::disk::local::local_disks;
use crate::disk::rooms::place;
use crate::qemu::qcow2::Qcow2Error;
use crate::vms::chain;
use crate::{clock, tasks};

/// A VM has no more disks.
const CHAINS_MAX: usize = 64;

impl Service {
    pub(super) async fn bases_hashed(
        &self,
        request: HashBasesRequest,
    ) -> Result<HashBasesReply, Status> {
        let long = request.chains.iter().any(|chain| chain.files.len() > DEEPEST);
        if long || request.chains.len() > CHAINS_MAX {
            return Err(Status::invalid_argument("too many files at a time"));
        }
        let directories = self.rooms.vms.settings().disk_dirs.clone();
        let own = match request.vm.as_str() {
            "" => None,
            _ => {
                let view = self.rooms.vms.view(&vm_named(request.vm)?);
                Some(VmDefinition::from(&view.map_err(|error| status::of_vm(&error))?.definition))
            }
        };
        // One file at a time: a second reader would only make the disk seek.
        let mut bases = Arc::clone(&self.bases).lock_owned().await;
        let hashed = tasks::blocking(move || match own {
            Some(definition) => own_chains(&mut bases, &definition, &directories),
            None => Ok(request
                .chains
                .into_iter()
                .map(|chain| found(&mut bases, chain, &directories))
                .collect()),
        });
        let chains = hashed.await.map_err(|error| Status::failed_precondition(chain(&error)))?;
        Ok(HashBasesReply { chains })
    }
}

fn own_chains(
    bases: &mut Bases,
    definition: &VmDefinition,
    directories: &[std::path::PathBuf],
) -> Result<Vec<BaseChain>, Qcow2Error> {
    let mut chains = Vec::new();
    for disk in local_disks(definition, directories) {
        let files = match disk.format == "qcow2" {
            true => beneath(&disk.path)?,
            false => continue,
        };
        if files.is_empty() {
            continue;
        }
        let files = files.into_iter().map(|file| hashed(bases, file.name, &file.path, None));
        let called = definition.disks.get(disk.number).map(|disk| disk.path.clone());
        chains.push(BaseChain { disk: called.unwrap_or_default(), files: files.collect() });
    }
    Ok(chains)
}

/// The same chain, as it is here.
fn found(bases: &mut Bases, wanted: BaseChain, directories: &[std::path::PathBuf]) -> BaseChain {
    let overlay = place(directories, Path::new(&wanted.disk));
    let names: Vec<&str> = wanted.files.iter().map(|file| file.name.as_str()).collect();
    let paths: Vec<_> = placed(&overlay, names).collect();
    let files = wanted.files.into_iter().zip(paths);
    let files = files.map(|(file, path)| hashed(bases, file.name, &path, Some(file.bytes)));
    BaseChain { files: files.collect(), disk: wanted.disk }
}

fn hashed(bases: &mut Bases, name: String, path: &Path, wanted: Option<u64>) -> BaseFile {
    let named = BaseFile { name, path: path.display().to_string(), ..BaseFile::default() };
    match bases.content(path, wanted, clock::unix_now()) {
        Ok(content) => {
            let hash = content.hash.map(|hash| format!("{hash:032x}"));
            BaseFile { bytes: content.bytes, hash: hash.unwrap_or_default(), ..named }
        }
        Err(error) => BaseFile { detail: chain(&error), ..named },
    }
}
