//! What does a page cost on its way to a store and back, by the size of the batches?
//!
//! ```text
//!   source ── Open vSwitch ── intermediary: redis-server, TLS
//! ```
//!
//! For each batch size, the same pages: packed, sealed and put with one pack under way (each waits for
//! the answer to the one before, as the paper's prototype does) and with eight (as we do); fetched back
//! and opened, eight under way; and meanwhile single pages fetched over a connection of their own, as a
//! guest's faults are. Nothing is shaped: what is asked for is the cost of asking.
//!
//! What others show: SOLive figure 5 has the time per page fall steeply from single pages to batches and
//! then stay.
//!
//! Then a real guest of 192 MiB is scattered in batches of each size (`guests`): how often it asks for a page that is in
//! the store, and how long it takes until it has left and until all of it is there.

mod guests;
mod store;

use std::collections::BTreeMap;
use std::time::Duration;

use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use lifeboat_scatter_gather::pack::Batch;
use serde_json::json;

use self::store::{Pages, Rig};
use super::Setting;
use super::machine::machine;
use super::plot::{Ground, Plot, Series, Shape};
use crate::clock;
use crate::rig::RigError;

/// Its name.
pub const NAME: &str = "solive-5";

/// Pages per pack: one by one, the paper's range, our default (63), and beyond.
const BATCHES: [u16; 7] = [1, 4, 16, 32, 63, 256, 1024];
/// Packs that are under way at once where more than one is.
const UNDER_WAY: usize = 8;
/// Single pages asked for while packs are fetched.
const DEMANDS: usize = 1000;

const PUT_ONE: &str = "put_one_under_way_us_per_page";
const PUT_MANY: &str = "put_eight_under_way_us_per_page";
const GET: &str = "get_eight_under_way_us_per_page";
const DEMAND_MEDIAN: &str = "single_page_beside_it_p50_us";
const DEMAND_WORST: &str = "single_page_beside_it_p99_us";
const BARE_WORST: &str = "single_page_alone_p99_us";

fn case(batch: u16) -> String {
    format!("{batch} per pack")
}

/// Raises store and network, measures every batch size in turn, judges.
///
/// # Errors
/// When the rig cannot be raised, or the store fails.
pub async fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let runs = setting.runs.unwrap_or(if setting.quick { 3 } else { 9 });
    let pages = if setting.quick { 4096 } else { 16_384 };
    let moves = if setting.quick { 1 } else { 5 };
    let rig = Rig::raise(setting.folder).await?;
    let mut record = blank(&setting, [runs, moves], pages);
    for run in 0..runs {
        for batch in BATCHES {
            let figures = measure(&rig, batch, pages).await?;
            record.samples.push(Sample { case: case(batch), run, figures });
        }
        setting.keep(&record, run + 1, runs + moves);
    }
    rig.end().await?;
    guests::measure(&setting, &mut record, (moves, runs, runs + moves)).await?;
    record.checks = checks(&record);
    Ok(record)
}

async fn measure(
    rig: &Rig,
    batch: u16,
    pages: u32,
) -> Result<BTreeMap<&'static str, f64>, RigError> {
    let batch =
        Batch::new(batch).ok_or_else(|| RigError::refused("a batch")(format!("{batch} pages")))?;
    // One by one takes long, and is judged by the page: a part of the pages tells as much.
    let few = if batch.pages() < 16 { pages / 4 } else { pages };
    let per_page = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(few);
    let pages = Pages { count: few, batch };
    let one = rig.put(pages, 1).await?;
    rig.clear(pages).await?;
    let many = rig.put(pages, UNDER_WAY).await?;
    let bare = rig.single_pages(pages, DEMANDS).await?;
    let (got, beside) = rig.get_with_demands(pages, UNDER_WAY, DEMANDS).await?;
    rig.clear(pages).await?;
    Ok(BTreeMap::from([
        (PUT_ONE, per_page(one)),
        (PUT_MANY, per_page(many)),
        (GET, per_page(got)),
        (DEMAND_MEDIAN, at(&beside, 50)),
        (DEMAND_WORST, at(&beside, 99)),
        (BARE_WORST, at(&bare, 99)),
    ]))
}

/// The wait that `percent` of all do not exceed, in microseconds. `waits` ascend.
fn at(waits: &[Duration], percent: usize) -> f64 {
    let place = waits.len().saturating_sub(1) * percent / 100;
    waits.get(place).map_or(f64::NAN, |wait| wait.as_secs_f64() * 1e6)
}

fn blank(setting: &Setting<'_>, [runs, moves]: [usize; 2], pages: u32) -> Record {
    Record {
        name: NAME.to_owned(),
        question: "what does a page cost on its way to a store and back, by batch size?".to_owned(),
        others_show:
            "SOLive figure 5: time per page falls steeply from single pages to batches of \
                      some dozens, and then stays"
                .to_owned(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "pages": pages,
            "pages_of_batches_below_16": pages / 4,
            "page_bytes": 4096,
            "sealed": "AES-256-GCM",
            "link": "TLS 1.3 over one userspace Open vSwitch bridge, unshaped",
            "under_way": UNDER_WAY,
            "single_pages": DEMANDS,
            "runs": runs,
            "guest_moves_by_batch": moves,
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

/// How often cheaper a page is in the default batch than by itself, run by run.
fn times_cheaper(record: &Record, figure: &str) -> Vec<f64> {
    let usual = case(Batch::default().pages());
    let pairs = record.pairs(&case(1), &usual, figure);
    pairs.into_iter().map(|(single, batched)| single / batched).collect()
}

fn checks(record: &Record) -> Vec<Check> {
    let cheaper = |how: &str, figure: &str| {
        let claim = format!("how often cheaper a page is in a batch of 63, {how} under way");
        Check::median(&claim, Bound::AtLeast(5.0), &times_cheaper(record, figure))
    };
    let wrong =
        BATCHES.iter().flat_map(|batch| record.figures(&guests::case(*batch), guests::WRONG));
    let wrong: Vec<f64> = wrong.collect();
    vec![
        cheaper("one pack", PUT_ONE),
        Check::worst("wrong bytes reported by the guest", Bound::AtMost(0.0), &wrong),
    ]
}

/// Microseconds per page, and what a fault waits, over the batch size.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    let cases: Vec<(f64, String)> = (0_u32..).map(f64::from).zip(BATCHES.map(case)).collect();
    let cases: Vec<(f64, &str)> = cases.iter().map(|(at, name)| (*at, name.as_str())).collect();
    let names = BATCHES.map(|batch| batch.to_string());
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let moves: Vec<(f64, String)> =
        (0_u32..).map(f64::from).zip(BATCHES.map(guests::case)).collect();
    let moves: Vec<(f64, &str)> = moves.iter().map(|(at, name)| (*at, name.as_str())).collect();
    let plot =
        |(name, title): (&str, &str), height: &str, cases: &[_], series: &[(&str, &str)]| Plot {
            name: format!("{NAME}-{name}"),
            title: title.to_owned(),
            others_show: record.others_show.clone(),
            ground: Ground::names("pages per pack", &names),
            height: height.to_owned(),
            series: series
                .iter()
                .map(|(name, figure)| Series::of(record, name, Shape::Line, figure, cases))
                .collect(),
        };
    vec![
        plot(
            ("pages", "A page's cost by batch size"),
            "us per page",
            &cases,
            &[("put, one under way", PUT_ONE), ("put, eight", PUT_MANY), ("get, eight", GET)],
        ),
        plot(
            ("faults", "What one page waits while packs are fetched"),
            "us",
            &cases,
            &[("half of them at most", DEMAND_MEDIAN), ("99 % at most", DEMAND_WORST)],
        ),
        plot(
            ("guest-faults", "How often a guest asks for a page in the store"),
            "pages asked for",
            &moves,
            &[("pages", guests::FAULTS)],
        ),
        plot(
            ("guest-waits", "What a guest waits for them"),
            "us",
            &moves,
            &[("99 % at most", guests::WAIT)],
        ),
        plot(
            ("guest-times", "How long a guest's migration takes"),
            "s",
            &moves,
            &[("until it has left", guests::EVICTED), ("until all is there", guests::GATHERED)],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_99th_of_a_hundred_waits_is_the_last_but_one() {
        let waits: Vec<Duration> = (1..=100).map(Duration::from_micros).collect();
        assert!((at(&waits, 99) - 99.0).abs() < 1e-9);
        assert!((at(&waits, 50) - 50.0).abs() < 1e-9);
        assert!(at(&[], 50).is_nan());
    }
}
