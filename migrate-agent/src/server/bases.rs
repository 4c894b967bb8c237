//! Answers what lies beneath overlays, and which images nobody writes to: those of a VM here, or what
//! another host's VM would find here.
//!
//! Used by the gRPC server. Only a hash of a file goes out, never its content. Whoever hangs up does
//! not stop the reading: the next one who asks finds the hash known.

use std::sync::Arc;

use lifeboat_protocol::agent::{HashBasesReply, HashBasesRequest, VmDefinition};
use tonic::Status;

use super::{Service, status, vm_named};
use crate::tasks;
use crate::vms::bases::{DEEPEST, as_it_is_here, files_of};
use crate::vms::chain;

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
            Some(definition) => files_of(&mut bases, &definition, &directories),
            None => Ok(request
                .chains
                .into_iter()
                .map(|chain| as_it_is_here(&mut bases, chain, &directories))
                .collect()),
        });
        let chains = hashed.await.map_err(|error| Status::failed_precondition(chain(&error)))?;
        Ok(HashBasesReply { chains })
    }
}
