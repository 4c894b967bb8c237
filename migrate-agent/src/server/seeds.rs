//! The calls about copies of disks ahead of a migration: handed to the registry, as long as they last.
//!
//! Each copy is one open call at either end: whoever hangs up ends it, and there is no other state to
//! clean up.

use lifeboat_protocol::agent::{
    Command, ForgetSeedReply, ForgetSeedRequest, ReceiveSeedReply, ReceiveSeedRequest,
    SeedProgress, SendSeedRequest,
};
use lifeboat_protocol::ids::Term;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Service, status, vm_named};
use crate::source::seeding::Told;
use crate::tasks;

type Stream<T> = ReceiverStream<Result<T, Status>>;

impl Service {
    pub(super) async fn seed_received(
        &self,
        mut request: ReceiveSeedRequest,
    ) -> Result<Stream<ReceiveSeedReply>, Status> {
        self.admit(request.command.take())?;
        let expected = self.rooms.registry.receive_seed(&request).await;
        let (reply, arriving) = expected.map_err(|error| status::of_registry(&error))?;
        let (feed, answer) = mpsc::channel(1);
        tasks::spawn("a copy of disks arrives", async move {
            if feed.send(Ok(reply)).await.is_ok() {
                feed.closed().await;
            }
            drop(arriving);
        });
        Ok(ReceiverStream::new(answer))
    }

    pub(super) fn seed_sent(
        &self,
        mut request: SendSeedRequest,
    ) -> Result<Stream<SeedProgress>, Status> {
        self.admit(request.command.take())?;
        let vm = vm_named(request.vm.clone())?;
        self.rooms.vms.view(&vm).map_err(|error| status::of_vm(&error))?;
        let sending = self.rooms.registry.send_seed(&request);
        let sending = sending.map_err(|error| status::of_registry(&error))?;
        let (feed, answer) = mpsc::channel(4);
        let (told, mut news) = mpsc::channel(4);
        tasks::spawn("a copy of disks", async move {
            let sending = tasks::spawn("disks are copied ahead", sending.run(told));
            loop {
                tokio::select! {
                    told = news.recv() => match told {
                        Some(told) => if feed.send(Ok(progress(told))).await.is_err() { return },
                        None => break,
                    },
                    () = feed.closed() => return,
                }
            }
            if let Ok(Err(reason)) = sending.await {
                // Whoever has hung up does not want to know.
                let _ = feed.send(Err(Status::failed_precondition(reason))).await;
            }
        });
        Ok(ReceiverStream::new(answer))
    }

    pub(super) async fn seed_forgotten(
        &self,
        request: ForgetSeedRequest,
    ) -> Result<ForgetSeedReply, Status> {
        let vm = vm_named(request.vm)?;
        let was_there = self.rooms.registry.forget_seed(&vm).await;
        was_there
            .map(|was_there| ForgetSeedReply { was_there })
            .map_err(|error| status::of_registry(&error))
    }

    /// A command that is a call of its own length cannot be answered again from memory; its term counts.
    fn admit(&self, command: Option<Command>) -> Result<(), Status> {
        let command = command.ok_or_else(|| Status::invalid_argument("`command` is missing"))?;
        self.rooms.terms.admit(Term(command.term)).map_err(|error| status::of_term(&error))
    }
}

fn progress(told: Told) -> SeedProgress {
    SeedProgress {
        bytes_total: told.total,
        bytes_left: told.left,
        bytes_sent: told.sent,
        rate_bits_per_sec: told.rate,
        comparing: told.comparing,
        done: told.done,
    }
}
