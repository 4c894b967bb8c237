//! A date for the disks: how far the guest is held back for it, asked again each second with what is left
//! of both.
//!
//! Inequality (1) is `policy::disk`'s. Deliberately not here: what comes after both sides are in step.

use std::time::{Duration, Instant};

use lifeboat_policy::disk::{Need, SLOWEST, Verdict, Writes, verdict};
use lifeboat_protocol::units::{Bytes, BytesPerSec};

use super::{DiskFailure, Figures};
use crate::clock;
use crate::disk::process::client::{ANSWER_LIMIT, MoverClientError};
use crate::disk::process::control::Request;
use crate::source::SourceTask;

/// Blocks get dirty so much faster than the guest may write: another limit will not do.
const SPREAD_MOST: u64 = 2;
/// So often in a row, because writes come in bursts.
const SPREAD_TIMES: u32 = 3;

/// Whether a guest's writes make more dirty than they carry.
#[derive(Debug, Default)]
pub(super) struct Spread {
    /// When blocks were last counted: how many bytes of them had been sent, and were left.
    last: Option<(Instant, u64, u64)>,
    /// How often in a row it was too much.
    times: u32,
}

impl Spread {
    /// With the blocks' bytes that were sent so far and are left now, while the guest may write at
    /// `limit`: whether it is time to have its writes go to both sides.
    fn is_too_much(&mut self, now: Instant, sent: u64, left: u64, limit: BytesPerSec) -> bool {
        if let Some((then, sent_then, left_then)) = self.last.replace((now, sent, left)) {
            let dirtied = (left + sent).saturating_sub(left_then + sent_then);
            let written = limit.scale(now.saturating_duration_since(then).as_secs_f64());
            let too_much = dirtied > written.0.saturating_mul(SPREAD_MOST);
            self.times = if too_much { self.times + 1 } else { 0 };
        }
        self.times >= SPREAD_TIMES
    }
}

impl SourceTask {
    /// Asks inequality (1) again, with what is left of disks and time now: what was estimated wrongly
    /// before is corrected so. Where date and promise cannot both be kept, the promise is.
    ///
    /// It counts with bytes that are written. A guest whose small writes lie far apart makes more than
    /// that dirty, and no limit that it could live with would keep its date: its writes go to both sides
    /// from then on, as they are.
    pub(super) async fn keep_date(
        &mut self,
        figures: &Figures,
        window: Duration,
    ) -> Result<(), DiskFailure> {
        let definition = self.context.guests.definition(&self.order.vm).unwrap_or_default();
        let promised = BytesPerSec(definition.promised_disk_bytes_per_sec);
        let need = Need {
            left: Bytes(figures.left),
            network: self.limit.unwrap_or(figures.sent),
            vmm_time: Duration::ZERO,
            window,
            spread: 1.0,
        };
        if need.network == BytesPerSec::ZERO || figures.left == u64::MAX {
            // Nothing has been sent yet, or it is not known what is left.
            return Ok(());
        }
        let limit = match verdict(&need, Writes { wanted: None, promised }) {
            Verdict::Free => None,
            Verdict::Limit(rate) => Some(rate),
            Verdict::Conflict(_) => Some(promised.max(SLOWEST)),
        };
        let Some(leaving) = &mut self.disks else { return Ok(()) };
        let now = leaving.limit;
        if let Some(limit) = now
            && !figures.synchronous
            && leaving.spread.is_too_much(clock::now(), figures.blocks, figures.left, limit)
        {
            tracing::info!(limit = limit.0, "the guest's writes make more dirty than they carry");
            self.go_in_step().await?;
        }
        // A change of a twentieth is not worth telling.
        let near = |a: BytesPerSec, b: BytesPerSec| a.0.abs_diff(b.0) <= b.0 / 20;
        match (limit, now) {
            (Some(limit), Some(now)) if near(limit, now) => Ok(()),
            (limit, now) if limit == now => Ok(()),
            (limit, _) => self.limit_disks(limit).await,
        }
    }

    /// In step, nothing more is to be sent by the date but memory: the guest is held to what that was
    /// planned with.
    pub(super) async fn hold_to_the_plan(&mut self) -> Result<(), DiskFailure> {
        match self.order.disk_window {
            Some(_) => self.limit_disks(self.order.disk_limit).await,
            None => Ok(()),
        }
    }

    async fn go_in_step(&mut self) -> Result<(), DiskFailure> {
        let Some(leaving) = &mut self.disks else { return Ok(()) };
        match leaving.mover.ask(&Request::GoInStep, ANSWER_LIMIT).await {
            Ok(_) => Ok(()),
            // The next look replaces it.
            Err(MoverClientError::Gone(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// What `seconds` of a guest look like that may write 5 MB/s and makes `dirtied` MB dirty in each,
    /// while 25 MB are sent.
    fn told(dirtied: &[u64]) -> Vec<bool> {
        let (mut spread, begin) = (Spread::default(), clock::now());
        let (mut sent, mut left, limit) = (0, 1000 * MB, BytesPerSec(5 * MB));
        spread.is_too_much(begin, sent, left, limit);
        let after = |second: usize| begin + Duration::from_secs(second as u64 + 1);
        let tell = |(second, dirtied): (usize, &u64)| {
            (sent, left) = (sent + 25 * MB, left + dirtied * MB - 25 * MB);
            spread.is_too_much(after(second), sent, left, limit)
        };
        dirtied.iter().enumerate().map(tell).collect()
    }

    #[test]
    fn writes_that_make_no_more_dirty_than_they_carry_are_held_back_only() {
        assert_eq!(told(&[5, 9, 0, 6, 5]), [false; 5]);
    }

    #[test]
    fn a_burst_is_forgiven_and_a_habit_is_not() {
        assert_eq!(told(&[80, 80, 5, 80, 80, 80]), [false, false, false, false, false, true]);
    }
}
