//! Copies a VM's disks to another host while the VM stays, so that a later migration has to send only
//! what differs.
//!
//! The same mover as in a migration reads them and sends them, but QEMU is not swapped onto it: the
//! guest pays nothing, and what it writes meanwhile is simply older at the other end. Hashes are
//! compared first, and again by the migration, so that nothing depends on when or how this ended.
//! Used by the registry. Deliberately not here: who may ask for it, and where the copy lies.

use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use lifeboat_protocol::ids::{Generation, HostId, MigrationId, VmId};
use lifeboat_protocol::units::BytesPerSec;
use lifeboat_scatter_gather::link::frame::TOKEN_BYTES;
use tokio::sync::mpsc;

use super::Context;
use super::disk::DiskFailure;
use crate::clock;
use crate::disk::local::{LocalDisk, written_disks};
use crate::disk::process::client::{ANSWER_LIMIT, Mover};
use crate::disk::process::control::{Destination, Limits, Report, Request, Stage};
use crate::progress::RateMeter;

/// How often it is told how far it is.
const POLL: Duration = Duration::from_millis(250);
/// The destination makes all of it durable within this time: nobody waits for it.
const SEAL_LIMIT: Duration = Duration::from_secs(120);
/// From a migration's first step at the destination to its first one here.
const HEARD_WITHIN: Duration = Duration::from_secs(3);

/// What was ordered.
#[derive(Debug, Clone)]
pub struct Order {
    /// Names it, as a migration's id would.
    pub seed: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// Where to.
    pub destination: HostId,
    /// The destination's page listener.
    pub page_address: String,
    /// The destination's proof that the controller sent us.
    pub token: [u8; TOKEN_BYTES],
    /// What may be sent; `None`: whatever the link takes.
    pub limit: Option<BytesPerSec>,
    /// Of a migration's disks the one that its destination will own; 0 of a copy ahead.
    pub generation: Generation,
    /// Something of them may be there: hashes are compared first.
    pub compares: bool,
}

/// How far it is; all but the rate in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Told {
    /// What the images take here.
    pub total: u64,
    /// What is known to differ and has not arrived.
    pub left: u64,
    /// What was sent.
    pub sent: u64,
    /// Bit/s, now.
    pub rate: u64,
    /// Hashes are being compared: what is left is not known yet.
    pub comparing: bool,
    /// It has all arrived.
    pub done: bool,
}

/// Sends until all has arrived durably, `stopped` comes true, or nobody listens to `told` any more.
///
/// # Errors
/// When it cannot be sent. What has arrived stays, and is of use.
pub(crate) async fn send(
    context: &Context,
    order: &Order,
    told: &mpsc::Sender<Told>,
    stopped: impl Future<Output = ()>,
) -> Result<(), DiskFailure> {
    let definition = context.guests.definition(&order.vm);
    let directories = &context.rooms.directories;
    let disks = definition.map_or_else(Vec::new, |known| written_disks(&known, directories));
    if disks.is_empty() {
        return Err(DiskFailure::NoDisks);
    }
    let mut mover = context.movers.start(&order.vm, &disks).await?;
    tokio::pin!(stopped);
    let sent = tokio::select! {
        sent = until_sent(context, order, &disks, &mut mover, told) => sent,
        () = &mut stopped => Err(DiskFailure::Moves),
        () = told.closed() => Ok(()),
    };
    let sent = match sent {
        // A migration is heard of at the destination first, which turns the copy away.
        Err(DiskFailure::Transfer(why)) => {
            let moves = tokio::time::timeout(HEARD_WITHIN, stopped).await.is_ok();
            Err(if moves { DiskFailure::Moves } else { DiskFailure::Transfer(why) })
        }
        sent => sent,
    };
    // By a connection of its own: on the other one an answer may be under way.
    let ended = super::disk::bring_home(context, &order.vm).await;
    sent.and(ended)
}

/// The same of the disks of a VM that runs elsewhere: nothing changes them here any more, so what has
/// arrived is whole.
///
/// # Errors
/// When they cannot be sent. What has arrived can be gone on with by an order that compares.
pub(super) async fn send_whole(
    context: &Context,
    order: &Order,
    disks: &[LocalDisk],
    told: &mpsc::Sender<Told>,
) -> Result<(), DiskFailure> {
    let movers = context.movers.of_stores();
    // Another one may have been broken off.
    movers.give_up(&order.vm).await?;
    let mut mover = movers.start(&order.vm, disks).await?;
    let sent = until_sent(context, order, disks, &mut mover, told).await;
    let ended = movers.give_up(&order.vm).await;
    sent.and(ended.map_err(DiskFailure::from))
}

async fn until_sent(
    context: &Context,
    order: &Order,
    disks: &[LocalDisk],
    mover: &mut Mover,
    told: &mpsc::Sender<Told>,
) -> Result<(), DiskFailure> {
    let to = Destination {
        page_address: order.page_address.clone(),
        host: order.destination.clone(),
        own_host: context.host.clone(),
        migration: order.seed.clone(),
        vm: order.vm.clone(),
        generation: order.generation,
        token: order.token.to_vec(),
        compares: order.compares,
        handover_size: 0,
        rests: false,
    };
    let limits = Limits { network: order.limit.map(|limit| limit.0), ..Limits::default() };
    mover.ask(&Request::Limit(limits), ANSWER_LIMIT).await?;
    mover.ask(&Request::Send(to), ANSWER_LIMIT).await?;
    let taken = |disk: &LocalDisk| std::fs::metadata(&disk.path).map_or(0, |it| it.blocks() * 512);
    let total = disks.iter().map(taken).sum();
    let mut meter = RateMeter::default();
    loop {
        tokio::time::sleep(POLL).await;
        let report = mover.report().await?;
        if let Some(reason) = report.failed {
            return Err(DiskFailure::Transfer(reason));
        }
        let rate = meter.read(clock::now(), report.sent);
        let Report { left, sent, comparing, .. } = report;
        let is_there = report.stage == Stage::Synchronous && report.left == 0;
        // Slow listeners miss some of it.
        let _ = told.try_send(Told { total, left, sent, rate, comparing, done: false });
        if is_there {
            mover.ask(&Request::Seal, SEAL_LIMIT).await?;
            let last = Told { total, left: 0, sent, rate: 0, comparing: false, done: true };
            // Whoever has gone meanwhile does not need it.
            let _ = told.send(last).await;
            return Ok(());
        }
    }
}
