//! `preseed`: a copy of a VM's disks on another host, ahead of a migration.
//!
//! The copy is two open calls, one to each agent; this joins them and passes on how far it is. Whoever
//! hangs up ends both, and what has arrived stays. Nothing is reserved for it: it keeps to a fifth of
//! its way unless told otherwise.

use lifeboat_protocol::agent::{ReceiveSeedRequest, SeedProgress, SendSeedRequest};
use lifeboat_protocol::controller as wire;
use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::units::BitsPerSec;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tonic::Streaming;

use super::{Caller, CommandError, Service};
use crate::agents::AgentError;
use crate::{clock, tasks};

/// One part in so many of the way is used where no limit is given.
const SHARE: u64 = 5;

/// How far a copy is; an error ends it.
pub(super) type Told = Result<wire::PreseedReply, CommandError>;

impl Service {
    /// Begins to copy, and tells how far it is for as long as somebody listens.
    ///
    /// # Errors
    /// When one of the two agents refuses.
    pub async fn preseed(
        &self,
        request: &wire::PreseedRequest,
        caller: &Caller,
    ) -> Result<mpsc::Receiver<Told>, CommandError> {
        let command = format!("preseed {} --to {}", request.vm, request.to);
        let begun = self.begin_preseed(request).await;
        self.audited(caller, &command, "", begun)
    }

    async fn begin_preseed(
        &self,
        request: &wire::PreseedRequest,
    ) -> Result<mpsc::Receiver<Told>, CommandError> {
        let vm = VmId::new(request.vm.clone())?;
        let to = self.known_host(&request.to)?;
        let owner = self.inventory.owner(&vm);
        let (from, status) = owner.ok_or_else(|| CommandError::UnknownVm { vm: vm.clone() })?;
        if from == to {
            return Err(CommandError::AlreadyThere { vm, host: from });
        }
        let limit = match request.limit_bits_per_sec {
            0 => BitsPerSec(self.narrowest(&from, &to).await.0 / SHARE),
            limit => BitsPerSec(limit),
        };
        let seed = format!("seed-{vm}-{}", clock::now().0);
        let expected = ReceiveSeedRequest {
            command: None,
            seed: seed.clone(),
            definition: status.definition,
            source_host: from.to_string(),
        };
        let mut expected = self.agents.receive_seed(&to, expected).await?;
        let ticket = match expected.next().await {
            Some(Ok(ticket)) => ticket,
            Some(Err(status)) => return Err(AgentError::of_stream(&to, TAKE, &status).into()),
            None => return Err(ended(&to, TAKE).into()),
        };
        let sent = SendSeedRequest {
            command: None,
            seed,
            vm: vm.to_string(),
            destination_host: to.to_string(),
            page_address: ticket.page_address,
            token: ticket.token,
            network_limit_bits_per_sec: limit.0,
        };
        let news = self.agents.send_seed(&from, sent).await?;
        let (feed, told) = mpsc::channel(4);
        let first = wire::PreseedReply {
            vm: vm.to_string(),
            host: from.to_string(),
            to: to.to_string(),
            limit_bits_per_sec: limit.0,
            ..wire::PreseedReply::default()
        };
        tasks::spawn(async move {
            pass_on(&from, news, first, feed).await;
            // Until here: its end is the end of the copy at the destination.
            drop(expected);
        });
        Ok(told)
    }

    /// What the narrowest link between two hosts carries; 0 where there is no way.
    async fn narrowest(&self, from: &HostId, to: &HostId) -> BitsPerSec {
        self.planner.narrowest(from, to).await
    }

    /// Deletes a copy.
    ///
    /// # Errors
    /// When there is none, or it is being made.
    pub async fn forget_seed(
        &self,
        request: &wire::ForgetPreseedRequest,
        caller: &Caller,
    ) -> Result<wire::ForgetPreseedReply, CommandError> {
        let command = format!("preseed {} --to {} --forget", request.vm, request.host);
        let forgotten = self.forget(request).await;
        self.audited(caller, &command, "", forgotten)
    }

    async fn forget(
        &self,
        request: &wire::ForgetPreseedRequest,
    ) -> Result<wire::ForgetPreseedReply, CommandError> {
        let (vm, host) = (VmId::new(request.vm.clone())?, self.known_host(&request.host)?);
        if !self.agents.forget_seed(&host, &vm).await? {
            return Err(CommandError::NoSeed { vm, host });
        }
        Ok(wire::ForgetPreseedReply { vm: vm.to_string(), host: host.to_string() })
    }

    /// Every copy that agents have told of.
    pub fn seeds(&self) -> wire::SeedsReply {
        let mut seeds = Vec::new();
        for (host, entry) in self.inventory.hosts() {
            let known = entry.description.iter().flat_map(|said| &said.seeds);
            seeds.extend(known.map(|seed| wire::SeedCopy {
                vm: seed.vm.clone(),
                host: host.to_string(),
                bytes: seed.bytes,
                age_ms: seed.age_ms,
            }));
        }
        wire::SeedsReply { seeds }
    }
}

const TAKE: &str = "take a copy of disks";
const SEND: &str = "send a copy of disks";

async fn pass_on(
    from: &HostId,
    mut news: Streaming<SeedProgress>,
    first: wire::PreseedReply,
    feed: mpsc::Sender<Told>,
) {
    loop {
        let said = tokio::select! {
            said = news.next() => said,
            () = feed.closed() => return,
        };
        let (told, is_last) = match said {
            Some(Ok(said)) => (Ok(reply(&first, &said)), said.done),
            Some(Err(status)) => (Err(AgentError::of_stream(from, SEND, &status).into()), true),
            None => (Err(ended(from, SEND).into()), true),
        };
        if feed.send(told).await.is_err() || is_last {
            return;
        }
    }
}

fn ended(host: &HostId, doing: &'static str) -> AgentError {
    let detail = "it hung up before the end".to_owned();
    AgentError::Unreachable { host: host.clone(), doing, detail }
}

fn reply(first: &wire::PreseedReply, said: &SeedProgress) -> wire::PreseedReply {
    let phase = match (said.done, said.comparing) {
        (true, _) => "done",
        (false, true) => "comparing",
        (false, false) => "copying",
    };
    let known = said.done || (!said.comparing && said.rate_bits_per_sec > 0);
    let to_go = said.bytes_left.saturating_mul(8_000).checked_div(said.rate_bits_per_sec);
    wire::PreseedReply {
        phase: phase.to_owned(),
        bytes_total: said.bytes_total,
        bytes_left: said.bytes_left,
        bytes_sent: said.bytes_sent,
        rate_bits_per_sec: said.rate_bits_per_sec,
        time_to_go_known: known,
        time_to_go_ms: if known { to_go.unwrap_or(0) } else { 0 },
        ..first.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_to_go_is_stated_when_it_is_known() {
        let first = wire::PreseedReply { vm: "web".to_owned(), ..Default::default() };
        let said = |comparing, rate, done| SeedProgress {
            bytes_total: 4_000_000,
            bytes_left: if done { 0 } else { 1_000_000 },
            rate_bits_per_sec: rate,
            comparing,
            done,
            ..Default::default()
        };
        let of = |said| {
            let reply = reply(&first, &said);
            (reply.phase, reply.time_to_go_known, reply.time_to_go_ms)
        };
        assert_eq!(of(said(true, 8_000_000, false)), ("comparing".to_owned(), false, 0));
        assert_eq!(of(said(false, 0, false)), ("copying".to_owned(), false, 0));
        assert_eq!(of(said(false, 8_000_000, false)), ("copying".to_owned(), true, 1_000));
        assert_eq!(of(said(false, 0, true)), ("done".to_owned(), true, 0));
    }
}
