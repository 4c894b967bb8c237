//! The date: `lifeboat evacuate --by`, by real agents, of a real guest that writes its disk.
//!
//! What the guest wrote is its own count, which it says each second and takes along in its memory; what
//! it might write is what the controller says of it; when it runs at the destination is QEMU's word.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lifeboat_agent::tasks;
use lifeboat_lab::experiment::{Record, Sample};
use serde_json::{Value, json};

use super::MIB;
use crate::clock;
use crate::experiments::Setting;
use crate::rig::RigError;
use crate::world::{Busy, Disk, Host, World, host_name};

/// The case of a whole migration.
pub(super) const CASE: &str = "by a date";
/// What the guest wrote in each second of a run, and what it might.
pub(super) const TRACE_GUEST: &str = "by a date: written, each second";
pub(super) const TRACE_LIMIT: &str = "by a date: limit, each look";
/// Seconds since the order, of a trace.
pub(super) const AT: &str = "at_seconds";
/// MB/s, of a trace.
pub(super) const RATE: &str = "mb_per_sec";

/// What the link carries.
const LINK_BITS: u64 = 200_000_000;
/// What the date leaves the guest, of the link's 25 MB/s, and what it wants.
const LEFT_TO_IT: u64 = 5_000_000;
const WANTED: u64 = 4 * LEFT_TO_IT;
/// One write.
const BLOCK: u64 = 64 << 10;
/// For memory, for what comes before the first block, and for the margin that a plan keeps.
const REST_SECS: u64 = 13;
const LOOK: Duration = Duration::from_millis(200);
/// After the date, a migration that has not ended is given up.
const PATIENCE: Duration = Duration::from_secs(120);

const fn image(quick: bool) -> u64 {
    if quick { 256 * MIB } else { 1024 * MIB }
}

/// Until the date: what the disk takes at the link's rate less what is left to the guest, and the rest.
const fn window(quick: bool) -> Duration {
    // With the headers that a plan counts with.
    let copying = image(quick) / 1448 * 1514 / (LINK_BITS / 8 - LEFT_TO_IT);
    Duration::from_secs(copying + REST_SECS)
}

pub(super) fn parameters(quick: bool) -> Value {
    json!({
        "image_bytes": image(quick),
        "window_seconds": window(quick).as_secs(),
        "link_bits_per_sec": LINK_BITS,
        "link": "what the agents hold to",
        "guest_wants_bytes_per_sec": WANTED,
        "guest_write_bytes": BLOCK,
        "guest_writes": "anywhere in the image, one at a time, a flush after 64",
        "guest_memory_mib": 128,
        "accelerator": "tcg",
        "page_link": "plain",
    })
}

/// Raises a world and moves its guest to and fro.
pub(super) async fn measure(
    setting: &Setting<'_>,
    runs: usize,
    record: &mut Record,
) -> Result<(), RigError> {
    let (images, quick) = (setting.images.to_owned(), setting.quick);
    let busy =
        Busy { image: image(quick), block: BLOCK, rate: WANTED, check_percent: 25, promised: 0 };
    let raise = move || World::make_on(1, &images, Disk::Busy(busy), LINK_BITS);
    let mut world = tasks::blocking(raise).await?;
    for run in 0..runs {
        let of_run = tasks::blocking(move || {
            let samples = migrate(&world, run, window(quick), image(quick));
            (world, samples)
        });
        let (given_back, samples) = of_run.await;
        world = given_back;
        match samples {
            Ok(samples) => record.samples.extend(samples),
            Err(error) => {
                eprintln!("{}the world is kept in {}", world.story(), world.keep().display());
                return Err(error);
            }
        }
        setting.keep(record, run + 1, runs);
    }
    // Its processes end with it, which takes its time.
    tasks::blocking(move || drop(world)).await;
    Ok(())
}

/// What is known of a moment.
struct Look {
    at: Duration,
    /// Bytes that the guest has written, as it last said, and when it said so.
    limit: Option<f64>,
    phase: String,
}

/// The guest's count, each time that it said a new one.
struct Said {
    at: Duration,
    writes: u64,
}

fn migrate(
    world: &World,
    run: usize,
    window: Duration,
    image: u64,
) -> Result<Vec<Sample>, RigError> {
    let (from, to) = (run % 2, (run + 1) % 2);
    world.control.await_sight(from)?;
    // The guest has filled its image and goes at its own pace.
    if run == 0 {
        settled(world, image)?;
    }
    let (began, began_unix) = (clock::now(), clock::unix_now());
    let order = format!(
        "evacuate {} --to {} --urgency 0 --yes --by {}s",
        host_name(from),
        host_name(to),
        window.as_secs()
    );
    let id = world.control.detached(&order)?;
    let (looks, said) = watch(world, &id, began, window)?;
    let status = world.control.status(&id)?;
    if status["state"] != "done" {
        return Err(RigError::refused("an evacuation")(status.to_string()));
    }
    let resumed = resumed(world, to, began_unix)?;
    Ok(samples(run, window, resumed, &looks, &said, world))
}

/// Waits until the guest has filled its image and writes at its own pace.
fn settled(world: &World, image: u64) -> Result<(), RigError> {
    // Three seconds of it.
    let filled = image / BLOCK + 3 * WANTED / BLOCK;
    let goes_on = || newest(world).filter(|now| *now > filled);
    let what = "a guest that writes".to_owned();
    let late = RigError::TooLate { what, seconds: PATIENCE.as_secs() };
    clock::wait_for(PATIENCE, goes_on).map(drop).ok_or(late)
}

/// How often the guest has written, as it last said anywhere.
fn newest(world: &World) -> Option<u64> {
    let seen = world.witness.look();
    let lines = seen.lives().iter().flat_map(|life| life.said().lines().rev().take(4));
    let ticks = lines.filter(|line| line.starts_with("LIFEBOAT-TICK"));
    let count = |line: &str| {
        let mut words = line.split_whitespace();
        // The last word of a line that is still on its way may be cut off.
        line.contains(" disk_checks=").then(|| {
            words.find_map(|word| word.strip_prefix("disk_writes=")?.parse::<u64>().ok())
        })?
    };
    ticks.filter_map(count).max()
}

fn watch(
    world: &World,
    id: &str,
    began: Instant,
    window: Duration,
) -> Result<(Vec<Look>, Vec<Said>), RigError> {
    let (mut looks, mut said, mut next) = (Vec::new(), Vec::<Said>::new(), began);
    loop {
        if let Some(writes) = newest(world)
            && said.last().is_none_or(|last| writes > last.writes)
        {
            said.push(Said { at: began.elapsed(), writes });
        }
        if clock::now() >= next {
            next = clock::now() + LOOK;
            let status = world.control.status(id)?;
            let migration = &status["migrations"][0];
            let limit = migration["disk_limit_bytes_per_sec"].as_u64();
            let phase = migration["phase"].as_str().unwrap_or_default().to_owned();
            let limit = limit.filter(|limit| *limit > 0).map(|limit| limit as f64);
            looks.push(Look { at: began.elapsed(), limit, phase });
            if status["state"] != "running" {
                return Ok((looks, said));
            }
        }
        if began.elapsed() > window + PATIENCE {
            let what = "the end of an evacuation".to_owned();
            return Err(RigError::TooLate { what, seconds: (window + PATIENCE).as_secs() });
        }
        clock::rest(Duration::from_millis(20));
    }
}

/// When the guest ran at the destination, since the order.
fn resumed(world: &World, to: Host, began: Duration) -> Result<Duration, RigError> {
    let seen = world.witness.look();
    let began = u64::try_from(began.as_micros()).unwrap_or(0);
    let there = seen.lives().iter().filter(|life| life.host == to).flat_map(|life| &life.ran);
    let first = there.map(|(resume, _)| *resume).filter(|resume| *resume > began).min();
    let first =
        first.ok_or_else(|| RigError::refused("an evacuation")("its guest never ran there"))?;
    Ok(Duration::from_micros(first - began))
}

fn samples(
    run: usize,
    window: Duration,
    resumed: Duration,
    looks: &[Look],
    said: &[Said],
    world: &World,
) -> Vec<Sample> {
    let is_disk = |look: &&Look| look.phase.contains("disk");
    let held = looks.iter().filter(is_disk).filter(|look| look.limit.is_some());
    let (from, until) = (held.clone().next(), held.clone().next_back());
    let (from, until) =
        (from.map_or(Duration::MAX, |l| l.at), until.map_or(Duration::ZERO, |l| l.at));
    let (mut written, mut allowed, mut near, mut seconds) = (0.0, 0.0, 0.0, 0.0);
    let mut samples = Vec::new();
    for pair in said.windows(2) {
        let [one, other] = pair else { continue };
        let took = (other.at - one.at).as_secs_f64();
        let bytes = ((other.writes - one.writes) * BLOCK) as f64;
        samples.push(trace(TRACE_GUEST, run, other.at, bytes / took / 1e6));
        if one.at < from || other.at > until {
            continue;
        }
        let may = limit_between(looks, one.at, other.at) * took;
        (written, allowed, seconds) = (written + bytes, allowed + may, seconds + 1.0);
        near += f64::from(u8::from((bytes / may - 1.0).abs() <= 0.2));
    }
    for look in looks {
        if let Some(limit) = look.limit {
            samples.push(trace(TRACE_LIMIT, run, look.at, limit / 1e6));
        }
    }
    let first = held.clone().next().and_then(|look| look.limit).unwrap_or(f64::NAN);
    let figures = BTreeMap::from([
        ("window_used", resumed.as_secs_f64() / window.as_secs_f64()),
        ("total_seconds", resumed.as_secs_f64()),
        ("until_in_step_seconds", until.as_secs_f64()),
        ("first_limit_mb_per_sec", first / 1e6),
        ("wanted_by_first_limit", WANTED as f64 / first),
        ("written_by_limit", written / allowed),
        ("seconds_near_limit", near / seconds),
        ("written_mb_per_sec", written / 1e6 / (until - from.min(until)).as_secs_f64()),
        ("offences", world.witness.look().offences().len() as f64),
    ]);
    samples.push(Sample { case: CASE.to_owned(), run, figures });
    samples
}

fn trace(case: &str, run: usize, at: Duration, rate: f64) -> Sample {
    let figures = BTreeMap::from([(AT, at.as_secs_f64()), (RATE, rate)]);
    Sample { case: format!("{case}{}", if run == 0 { "" } else { ", later runs" }), run, figures }
}

/// The mean limit between two moments, bytes/s: each look's holds until the next.
fn limit_between(looks: &[Look], from: Duration, until: Duration) -> f64 {
    let mut sum = 0.0;
    for (number, look) in looks.iter().enumerate() {
        let ends = looks.get(number + 1).map_or(Duration::MAX, |next| next.at);
        let overlap = ends.min(until).saturating_sub(look.at.max(from));
        sum += look.limit.unwrap_or(0.0) * overlap.as_secs_f64();
    }
    sum / (until - from).as_secs_f64()
}
