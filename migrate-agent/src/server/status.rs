//! Our errors as gRPC statuses: the one place where a code is chosen.
//!
//! `INVALID_ARGUMENT`: never ask that again. `FAILED_PRECONDITION`: something must change first,
//! and the text says what. `UNAVAILABLE`: ask again. `INTERNAL`: this host has a problem. The text
//! is the whole chain of causes, for an operator.

use lifeboat_protocol::FAILED_STORE;
use lifeboat_protocol::ids::NameError;
use tonic::{Code, Status};

use super::storage::StorageError;
use super::terms::TermError;
use crate::disk::store::DiskStoreError;
use crate::intermediary::IntermediaryError;
use crate::measure::MeasureError;
use crate::registry::RegistryError;
use crate::vms::{VmError, chain};

fn status(code: Code, error: &dyn std::error::Error) -> Status {
    Status::new(code, chain(error))
}

pub(super) fn of_name(error: &NameError) -> Status {
    status(Code::InvalidArgument, error)
}

pub(super) fn of_term(error: &TermError) -> Status {
    let code = match error {
        TermError::Stale { .. } => Code::FailedPrecondition,
        TermError::Store { .. } | TermError::Corrupt { .. } => Code::Internal,
    };
    status(code, error)
}

pub(super) fn of_vm(error: &VmError) -> Status {
    let code = match error {
        VmError::Unknown(_) => Code::NotFound,
        VmError::Runs { .. } => Code::AlreadyExists,
        VmError::Busy(_) => Code::Unavailable,
        VmError::Memory { .. } => Code::ResourceExhausted,
        VmError::Definition(_) => Code::InvalidArgument,
        VmError::DoesNotRun(_)
        | VmError::Ownership(_)
        | VmError::File(_)
        | VmError::HostFile(_)
        | VmError::Overlay(_)
        | VmError::SocketPath { .. } => Code::FailedPrecondition,
        VmError::Directory { .. }
        | VmError::Tap(_)
        | VmError::OpenTap { .. }
        | VmError::Process(_)
        | VmError::Monitor(_) => Code::Internal,
    };
    status(code, error)
}

pub(super) fn of_registry(error: &RegistryError) -> Status {
    let code = match error {
        RegistryError::Name(_) | RegistryError::Invalid { .. } | RegistryError::Plan(_) => {
            Code::InvalidArgument
        }
        RegistryError::UnknownMigration(_) | RegistryError::UnknownVm(_) => Code::NotFound,
        RegistryError::Busy { .. }
        | RegistryError::Record { .. }
        | RegistryError::TooLate(_)
        | RegistryError::NotClaimable { .. }
        | RegistryError::Failed(_)
        | RegistryError::DiskStore(DiskStoreError::NoRoom { .. }) => Code::FailedPrecondition,
        RegistryError::Store(_) | RegistryError::DiskStore(DiskStoreError::File { .. }) => {
            Code::Internal
        }
    };
    let mut status = status(code, error);
    // For the controller, which then takes another intermediary and not another destination.
    if let RegistryError::Failed(failure) = error
        && let Ok(host) = failure.store_host().parse()
        && !failure.store_host().is_empty()
    {
        status.metadata_mut().insert(FAILED_STORE, host);
    }
    status
}

pub(super) fn of_measure(error: &MeasureError) -> Status {
    let code = match error {
        MeasureError::Vm(error) => return of_vm(error),
        MeasureError::Window { .. } => Code::InvalidArgument,
        MeasureError::Ram(_) | MeasureError::Gone { .. } => Code::FailedPrecondition,
    };
    status(code, error)
}

pub(super) fn of_intermediary(error: &IntermediaryError) -> Status {
    use IntermediaryError as E;
    let code = match error {
        E::Name(_) => Code::InvalidArgument,
        E::Other(_) => Code::AlreadyExists,
        E::Full { .. } | E::VmsFirst { .. } | E::Machine { .. } | E::Ports { .. } => {
            Code::ResourceExhausted
        }
        E::Unable(_) | E::Unsuitable(..) => Code::FailedPrecondition,
        E::Store(_) | E::Survives(_) => Code::Unavailable,
        E::Server(_) | E::File { .. } => Code::Internal,
    };
    status(code, error)
}

pub(super) fn of_storage(error: &StorageError) -> Status {
    let code = match error {
        StorageError::Unknown { .. } => Code::NotFound,
        StorageError::Name { .. } | StorageError::TooLarge { .. } | StorageError::Action => {
            Code::InvalidArgument
        }
        StorageError::Io { .. } => Code::FailedPrecondition,
    };
    status(code, error)
}
