//! One method per command, each three lines: who, what, and the error as a status.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::BoxStream;
use lifeboat_protocol::controller as wire;
use lifeboat_protocol::controller::controller_server::Controller;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::caller::caller;
use crate::service::{CommandError, Service};
use crate::tasks;

/// Between two status messages of a watch, at least.
const WATCH_EVERY: Duration = Duration::from_millis(250);

/// The service behind gRPC.
pub(super) struct Methods(pub(super) Arc<Service>);

/// The status that an error is: its sentence goes to the operator as it stands.
fn status(error: CommandError) -> Status {
    let text = crate::service::sentence(&error);
    match error {
        CommandError::UnknownHost { .. }
        | CommandError::UnknownVm { .. }
        | CommandError::UnknownEvacuation { .. } => Status::not_found(text),
        CommandError::NoHost
        | CommandError::Name(_)
        | CommandError::Word(_)
        | CommandError::OnDemand { .. }
        | CommandError::Urgency(_) => Status::invalid_argument(text),
        CommandError::AlreadyThere { .. }
        | CommandError::NoOtherHost { .. }
        | CommandError::NoSeed { .. }
        | CommandError::Plan(_)
        | CommandError::Admission(_)
        | CommandError::Over { .. }
        | CommandError::StillRunning { .. }
        | CommandError::NotUnderWay { .. }
        | CommandError::NotLimited { .. }
        | CommandError::NothingLeft { .. }
        | CommandError::NotFenced { .. }
        | CommandError::NothingToClaim { .. }
        | CommandError::WhichSide { .. }
        | CommandError::Agent(_) => Status::failed_precondition(text),
        CommandError::Journal(_) | CommandError::Audit(_) => Status::internal(text),
        CommandError::Stopped(_) => Status::unavailable(text),
    }
}

fn reply<T>(result: Result<T, CommandError>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(status)
}

#[tonic::async_trait]
impl Controller for Methods {
    async fn hosts(
        &self,
        request: Request<wire::HostsRequest>,
    ) -> Result<Response<wire::HostsReply>, Status> {
        caller(&request)?;
        Ok(Response::new(self.0.hosts().await))
    }

    async fn vms(
        &self,
        request: Request<wire::VmsRequest>,
    ) -> Result<Response<wire::VmsReply>, Status> {
        caller(&request)?;
        reply(self.0.vms(request.get_ref()))
    }

    async fn switches(
        &self,
        request: Request<wire::SwitchesRequest>,
    ) -> Result<Response<wire::SwitchesReply>, Status> {
        caller(&request)?;
        Ok(Response::new(self.0.switches().await))
    }

    async fn links(
        &self,
        request: Request<wire::LinksRequest>,
    ) -> Result<Response<wire::LinksReply>, Status> {
        caller(&request)?;
        Ok(Response::new(self.0.links().await))
    }

    async fn topology(
        &self,
        request: Request<wire::TopologyRequest>,
    ) -> Result<Response<wire::TopologyReply>, Status> {
        caller(&request)?;
        Ok(Response::new(self.0.topology().await))
    }

    async fn status(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusReply>, Status> {
        caller(&request)?;
        reply(self.0.status(&request.get_ref().evacuation).await)
    }

    type WatchStream = BoxStream<'static, Result<wire::StatusReply, Status>>;
    type PreseedStream = BoxStream<'static, Result<wire::PreseedReply, Status>>;

    async fn watch(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        caller(&request)?;
        let wanted = request.into_inner().evacuation;
        self.0.status(&wanted).await.map_err(status)?;
        let (feed, news) = mpsc::channel(4);
        tasks::spawn(watch(Arc::clone(&self.0), wanted, feed));
        Ok(Response::new(Box::pin(ReceiverStream::new(news).map(|item| item))))
    }

    async fn make_plan(
        &self,
        request: Request<wire::EvacuateRequest>,
    ) -> Result<Response<wire::Plan>, Status> {
        let who = caller(&request)?;
        reply(self.0.plan(request.get_ref(), &who).await)
    }

    async fn evacuate(
        &self,
        request: Request<wire::EvacuateRequest>,
    ) -> Result<Response<wire::EvacuateReply>, Status> {
        let who = caller(&request)?;
        reply(self.0.evacuate(request.get_ref(), &who).await)
    }

    async fn migrate(
        &self,
        request: Request<wire::MigrateRequest>,
    ) -> Result<Response<wire::EvacuateReply>, Status> {
        let who = caller(&request)?;
        reply(self.0.migrate(request.get_ref(), &who).await)
    }

    async fn cordon(
        &self,
        request: Request<wire::CordonRequest>,
    ) -> Result<Response<wire::HostsReply>, Status> {
        let who = caller(&request)?;
        reply(self.0.cordon(request.get_ref(), &who).await)
    }

    async fn retry(
        &self,
        request: Request<wire::RetryRequest>,
    ) -> Result<Response<wire::EvacuateReply>, Status> {
        let who = caller(&request)?;
        reply(self.0.retry(request.get_ref(), &who).await)
    }

    async fn cancel(
        &self,
        request: Request<wire::CancelRequest>,
    ) -> Result<Response<wire::StatusReply>, Status> {
        let who = caller(&request)?;
        reply(self.0.cancel(request.get_ref(), &who).await)
    }

    async fn limit(
        &self,
        request: Request<wire::LimitRequest>,
    ) -> Result<Response<wire::LimitReply>, Status> {
        let who = caller(&request)?;
        reply(self.0.limit(request.get_ref(), &who).await)
    }

    async fn get_report(
        &self,
        request: Request<wire::ReportRequest>,
    ) -> Result<Response<wire::Report>, Status> {
        caller(&request)?;
        reply(self.0.report(request.get_ref()))
    }

    async fn claim(
        &self,
        request: Request<wire::ClaimRequest>,
    ) -> Result<Response<wire::ClaimReply>, Status> {
        let who = caller(&request)?;
        reply(self.0.claim(request.get_ref(), &who).await)
    }

    async fn preseed(
        &self,
        request: Request<wire::PreseedRequest>,
    ) -> Result<Response<Self::PreseedStream>, Status> {
        let who = caller(&request)?;
        let told = self.0.preseed(request.get_ref(), &who).await.map_err(status)?;
        let told = ReceiverStream::new(told).map(|told| told.map_err(status));
        Ok(Response::new(Box::pin(told)))
    }

    async fn forget_seed(
        &self,
        request: Request<wire::ForgetPreseedRequest>,
    ) -> Result<Response<wire::ForgetPreseedReply>, Status> {
        let who = caller(&request)?;
        reply(self.0.forget_seed(request.get_ref(), &who).await)
    }

    async fn seeds(
        &self,
        request: Request<wire::SeedsRequest>,
    ) -> Result<Response<wire::SeedsReply>, Status> {
        caller(&request)?;
        Ok(Response::new(self.0.seeds()))
    }

    async fn verify(
        &self,
        request: Request<wire::VerifyRequest>,
    ) -> Result<Response<wire::VerifyReply>, Status> {
        caller(&request)?;
        reply(self.0.verify(request.get_ref()).await)
    }
}

/// Feeds a watch until what it watches is over or nobody listens any more.
async fn watch(
    service: Arc<Service>,
    wanted: String,
    feed: mpsc::Sender<Result<wire::StatusReply, Status>>,
) {
    let mut changes = service.changes();
    loop {
        changes.mark_unchanged();
        let now = service.status(&wanted).await.map_err(status);
        let over = now.as_ref().map_or(true, is_over);
        if feed.send(now).await.is_err() || over {
            return;
        }
        tokio::time::sleep(WATCH_EVERY).await;
        // Figures age also when nothing changes: a silent agent's elapsed time goes on.
        let _ = tokio::time::timeout(WATCH_EVERY * 4, changes.changed()).await;
    }
}

fn is_over(reply: &wire::StatusReply) -> bool {
    let ends = ["done", "partial", "cancelled", "failed"];
    reply.evacuations.iter().all(|evacuation| ends.contains(&evacuation.state.as_str()))
}
