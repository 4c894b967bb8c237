//! Page links that other agents open: checked, and handed to the task that they are for.

use lifeboat_protocol::agent::Phase;
use lifeboat_protocol::ids::Generation;
use lifeboat_scatter_gather::link::{Frame, Hello, Purpose, Standing};
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::disk_stores::ALL_HERE;
use super::{Entry, Registry, Task};
use crate::destination;
use crate::destination::disk::TakenBy;
use crate::disk::sync::receive::receive;
use crate::handover::{Here, Record};
use crate::link::io::frame_name;
use crate::link::{FrameReader, FrameWriter, LinkError, Listener};

/// The first frame must come within this time.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// A connection that asked and heard "loaded" may deliver COMMIT within this time.
const COMMIT_LIMIT: Duration = Duration::from_secs(10);

impl Registry {
    /// Takes page links for as long as the agent lives.
    ///
    /// # Errors
    /// When the listening socket fails.
    pub async fn serve_links(self, listener: Listener) -> Result<(), LinkError> {
        loop {
            let (socket, address) = listener.accept().await?;
            let (registry, identity) = (self.clone(), listener.identity());
            crate::tasks::spawn("page link", async move {
                let served = async {
                    let (reader, writer, peer) =
                        Listener::establish(identity, socket, address).await?;
                    registry.welcome(reader, writer, peer.name).await
                };
                if let Err(error) = served.await {
                    tracing::warn!(%address, %error, "page link turned away");
                }
            });
        }
    }

    async fn welcome(
        &self,
        mut reader: FrameReader,
        mut writer: FrameWriter,
        certified: Option<String>,
    ) -> Result<(), LinkError> {
        let hello = match reader.next_within(HELLO_LIMIT).await? {
            Frame::Hello(hello) => hello,
            other => {
                let got = frame_name(&other);
                return Err(LinkError::Unexpected { got, wanted: "HELLO" });
            }
        };
        if let Some(name) = certified.filter(|name| *name != hello.host.as_str()) {
            let reason = format!("`{name}` says that it is `{}`", hello.host);
            let _ = writer.send(&Frame::Refused(reason.clone())).await;
            return Err(LinkError::Role(reason));
        }
        match hello.purpose {
            Purpose::Migrate => self.take_migration(hello, reader, writer).await,
            Purpose::AskDestination => self.answer_source(hello, reader, writer).await,
            Purpose::AskSource => self.answer_destination(&hello, writer).await,
            Purpose::Disk => self.take_disks(&hello, reader, writer).await,
            Purpose::ServeDemands | Purpose::ServeBackground => {
                self.take_lane(&hello, reader, writer).await
            }
        }
    }

    /// The source of a migration offers pages. That it is that source is what its certificate says;
    /// after a restart it has no token to show any more.
    async fn take_lane(
        &self,
        hello: &Hello,
        reader: FrameReader,
        mut writer: FrameWriter,
    ) -> Result<(), LinkError> {
        let Some(inputs) = self.served(hello) else {
            let reason = "no pages of this migration are wanted here".to_owned();
            return writer.send(&Frame::Refused(reason)).await;
        };
        writer.send(&Frame::Welcome).await?;
        let _ = inputs.send(destination::Input::Lane(hello.purpose, reader, writer)).await;
        Ok(())
    }

    fn served(&self, hello: &Hello) -> Option<tokio::sync::mpsc::Sender<destination::Input>> {
        let entries = self.entries();
        let entry = entries.by_id.get(&hello.migration)?;
        let from = entry.progress.borrow().source_host == hello.host.as_str();
        match &entry.task {
            Task::Destination { inputs, generation, .. }
                if from
                    && entry.vm == hello.vm
                    && entry.is_open()
                    && *generation == hello.generation =>
            {
                Some(inputs.clone())
            }
            _ => None,
        }
    }

    async fn take_migration(
        &self,
        hello: Hello,
        reader: FrameReader,
        mut writer: FrameWriter,
    ) -> Result<(), LinkError> {
        let Some(inputs) = self.expected(&hello) else {
            // One sentence for every way of being wrong: a guesser learns nothing.
            let reason = "no such migration is expected here".to_owned();
            tracing::warn!(migration = %hello.migration, host = %hello.host, "unexpected link");
            return writer.send(&Frame::Refused(reason)).await;
        };
        let _ = inputs.send(destination::Input::Link(reader, writer)).await;
        Ok(())
    }

    /// A connection about the disks of a VM that arrives; served to its end.
    async fn take_disks(
        &self,
        hello: &Hello,
        reader: FrameReader,
        mut writer: FrameWriter,
    ) -> Result<(), LinkError> {
        if let Some(None) = self.expected_disk_store(hello) {
            return writer.send(&Frame::Refused(ALL_HERE.to_owned())).await;
        }
        let Some(to) = self.expected_disks(hello) else {
            let reason = "no disks of such a migration are expected here".to_owned();
            tracing::warn!(migration = %hello.migration, host = %hello.host, "unexpected disks");
            return writer.send(&Frame::Refused(reason)).await;
        };
        let received = match to {
            TakenBy::Agent(received) => received,
            TakenBy::Process(socket) => return pass_on(&socket, reader, writer).await,
        };
        writer.send(&Frame::Welcome).await?;
        let stream = (reader.into_stream(), writer.into_stream());
        if let Err(error) = receive(received, stream).await {
            let error = crate::vms::chain(&error);
            tracing::warn!(migration = %hello.migration, error, "a connection about disks ends");
        }
        Ok(())
    }

    fn expected_disks(&self, hello: &Hello) -> Option<TakenBy> {
        let kept = self.expected_seed(hello).or_else(|| self.expected_disk_store(hello).flatten());
        if let Some(received) = kept {
            return Some(TakenBy::Agent(received));
        }
        let entries = self.entries();
        let entry = entries.by_id.get(&hello.migration)?;
        let is_from = entry.progress.borrow().source_host == hello.host.as_str();
        // As with pages that follow: after a restart it has no token to show, or this side to compare.
        let rests = entry.is_open() && entry.phase() == Phase::DiskRest;
        let Task::Destination { token, generation, disks, disk_store, inputs, .. } = &entry.task
        else {
            return None;
        };
        if entry.vm != hello.vm || *generation != hello.generation {
            return None;
        }
        if rests && disk_store.as_ref() == Some(&hello.host) {
            // It comes only once it has all. Where the task is too busy to hear of it, it comes again.
            inputs.try_send(destination::Input::Stored).ok()?;
            return disks.clone();
        }
        disks.clone().filter(|_| is_from && (rests || same(token, &hello.token)))
    }

    fn expected(&self, hello: &Hello) -> Option<tokio::sync::mpsc::Sender<destination::Input>> {
        let mut entries = self.entries();
        let entry = entries.by_id.get_mut(&hello.migration)?;
        if entry.vm != hello.vm || entry.progress.borrow().source_host != hello.host.as_str() {
            return None;
        }
        match &mut entry.task {
            Task::Destination { inputs, token, generation, linked, .. }
                if !*linked && *generation == hello.generation && same(token, &hello.token) =>
            {
                *linked = true;
                Some(inputs.clone())
            }
            _ => None,
        }
    }

    /// The source of a hand-over asks what became of it; it may deliver a lost COMMIT here.
    async fn answer_source(
        &self,
        hello: Hello,
        mut reader: FrameReader,
        mut writer: FrameWriter,
    ) -> Result<(), LinkError> {
        let standing = self.standing_as_destination(&hello);
        tracing::info!(vm = %hello.vm, asked_by = %hello.host, ?standing, "asked");
        writer.send(&Frame::Standing(standing)).await?;
        if standing != Standing::Loaded {
            return Ok(());
        }
        match reader.next_within(COMMIT_LIMIT).await {
            Ok(Frame::Commit(generation)) => {
                let outcome = self.deliver_commit(&hello, generation).await;
                writer.send(&outcome).await
            }
            Ok(other) => Err(LinkError::Unexpected { got: frame_name(&other), wanted: "COMMIT" }),
            Err(error) => Err(error),
        }
    }

    async fn deliver_commit(&self, hello: &Hello, generation: Generation) -> Frame {
        let inputs = {
            let entries = self.entries();
            match entries.by_id.get(&hello.migration).map(|entry| &entry.task) {
                Some(Task::Destination { inputs, .. }) => Some(inputs.clone()),
                _ => None,
            }
        };
        let (answer, answered) = oneshot::channel();
        if let Some(inputs) = inputs
            && inputs.send(destination::Input::Commit(generation, answer)).await.is_ok()
            && let Ok(frame) = answered.await
        {
            return frame;
        }
        // No word of what happened: the source asks again and reads it off the record.
        Frame::Standing(Standing::Pending)
    }

    async fn answer_destination(
        &self,
        hello: &Hello,
        mut writer: FrameWriter,
    ) -> Result<(), LinkError> {
        let standing = match self.context.store.read(&hello.vm) {
            Ok(record) => {
                Record::standing_as_source(record.as_ref(), &hello.migration, hello.generation)
            }
            Err(error) => {
                tracing::error!(%error, "asked, and cannot answer");
                Standing::Unknown
            }
        };
        tracing::info!(vm = %hello.vm, asked_by = %hello.host, ?standing, "asked");
        writer.send(&Frame::Standing(standing)).await
    }

    /// A guest that ended here while its disks followed it, or after, is no reason to go back to the
    /// source's copy: what it wrote is in them, and they go on arriving.
    fn disks_stand_for_it(&self, hello: &Hello) -> bool {
        let (store, vm) = (&self.context.store, &hello.vm);
        if store.has_rested(vm, &hello.migration).unwrap_or(false) {
            return true;
        }
        let rests = store.rest(vm).ok().flatten();
        let entries = self.entries();
        // After a power cut nobody sees them in.
        rests.is_some_and(|rest| rest.migration == hello.migration)
            && entries.by_id.get(&hello.migration).is_some_and(Entry::is_open)
    }

    fn standing_as_destination(&self, hello: &Hello) -> Standing {
        match self.context.store.read(&hello.vm) {
            Ok(record) => {
                let guest_lives =
                    self.context.guests.lives(&hello.vm) || self.disks_stand_for_it(hello);
                let gathering = self.context.store.wants_source(&hello.vm);
                Record::standing_as_destination(
                    record.as_ref(),
                    &hello.migration,
                    hello.generation,
                    Here { guest_lives, gathering },
                )
            }
            Err(error) => {
                tracing::error!(%error, "asked, and cannot answer");
                Standing::Unknown
            }
        }
    }
}

/// Passes a connection about disks on to the process in which they arrive, to the end of either.
async fn pass_on(
    socket: &Path,
    reader: FrameReader,
    mut writer: FrameWriter,
) -> Result<(), LinkError> {
    let Ok(process) = UnixStream::connect(socket).await else {
        let reason = "what takes these disks in does not answer here".to_owned();
        return writer.send(&Frame::Refused(reason)).await;
    };
    writer.send(&Frame::Welcome).await?;
    let (mut from_process, mut to_process) = process.into_split();
    let (mut from_source, mut to_source) = (reader.into_stream(), writer.into_stream());
    tokio::select! {
        passed = tokio::io::copy(&mut from_source, &mut to_process) => passed?,
        passed = tokio::io::copy(&mut from_process, &mut to_source) => passed?,
    };
    Ok(())
}

/// Compares in a time that does not depend on where the difference is.
pub(super) fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |different, (x, y)| different | (x ^ y)) == 0
}
