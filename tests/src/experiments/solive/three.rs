//! SOLive's figure 3: how long four guests need to leave by post-copy, one after the other, by the
//! order in which they go.
//!
//! The paper's finding (IV-A): orders that begin with NO and end with NI are the quickest (53 s), the
//! opposite takes 116 s, because NO's traffic leaves the source's link with NO and NI's comes to the
//! destination's with NI; C and M may change places. Nothing is reserved here, as in that section.
//! Six of the 24 orders are measured: the two that the paper finds best, the two that it finds close
//! to them, and the two that it finds worst. Which of them is ours, the program asks `lifeboat plan`.

use std::collections::BTreeMap;

use lifeboat_lab::experiment::statistics::{median, ratios};
use lifeboat_lab::experiment::{Bound, Check, Record, Sample};
use serde_json::Value;

use super::{
    Arm, Figures, GUESTS, HOSTS, REST, RUN_LIMIT, RUN_USUAL, SCENARIO, TOTAL, WRONG, blank,
    carried_out,
};
use crate::clock;
use crate::experiments::Setting;
use crate::experiments::plot::{Ground, Plot, Series, Shape};
use crate::rig::RigError;
use crate::rig::cloud::Cloud;
use crate::rig::userfaultfd::Allowed;

/// Its name.
pub const NAME: &str = "solive-3";

/// From the paper's best to its worst; a case is named by its order.
const ORDERS: [&str; 6] =
    ["no/m/c/ni", "no/c/m/ni", "c/no/m/ni", "no/m/ni/c", "ni/m/c/no", "ni/c/m/no"];
const WORST: &str = ORDERS[5];
/// Which of [`ORDERS`] the controller has chosen, as its place in them.
const OURS: &str = "order_of_the_plan";
/// At most so much longer than the best of the six: what one of them differs by from run to run.
const AMONG_THE_BEST: f64 = 1.05;

/// Runs it.
///
/// # Errors
/// When the cloud cannot be raised, a guest does not arrive, or the plan has an order that is not
/// measured.
pub fn run(setting: Setting<'_>) -> Result<Record, RigError> {
    let rounds = setting.runs.unwrap_or(if setting.quick { 1 } else { 3 });
    let orders = if setting.quick { &[ORDERS[0], WORST][..] } else { &ORDERS[..] };
    let arms: Vec<Arm> =
        orders.iter().map(|name| Arm::new(name, &["--mode", "post-copy"])).collect();
    let _allowed = Allowed::now()?;
    let mut record = blank(&setting, (NAME, SCENARIO), rounds, &arms);
    record.question =
        "how long do NO, M, C and NI take to leave by post-copy, by the order in which they go?"
            .to_owned();
    record.others_show =
        "SOLive Fig. 3: NO/M/C/NI and NO/C/M/NI 53 s, NI/C/M/NO 116 s (2.2 times as long)"
            .to_owned();
    let end =
        setting.minutes.map(|minutes| clock::now() + std::time::Duration::from_secs(minutes * 60));
    let lab = setting.images.parent().unwrap_or(setting.images);
    let cloud = Cloud::raise(lab, SCENARIO, &setting.folder.join("up.log"))?;
    clock::rest(REST * 2);
    let ours = planned(&cloud)?;
    let mut at = 0;
    for round in 0..rounds {
        for turn in 0..arms.len() {
            if end.is_some_and(|end| clock::now() + RUN_USUAL > end) {
                break;
            }
            let order = arms[(turn + round) % arms.len()].name;
            let mut figures = all_gone(&cloud, at, order)?;
            figures.insert(OURS, ours as f64);
            record.samples.push(Sample { case: order.to_owned(), run: round, figures });
            at = 1 - at;
            setting.keep(&record, record.samples.len(), rounds * arms.len());
            clock::rest(REST);
        }
    }
    record.checks = checks(&record);
    Ok(record)
}

/// The order that the controller would choose, as its place in [`ORDERS`].
fn planned(cloud: &Cloud) -> Result<usize, RigError> {
    let plan = cloud.ask(&[
        "plan",
        HOSTS[0],
        "--to",
        HOSTS[1],
        "--mode",
        "post-copy",
        "--urgency",
        "0",
    ])?;
    let order = order_of(&plan);
    ORDERS.iter().position(|one| *one == order).ok_or_else(|| {
        RigError::refused("a plan")(format!("its order is not among those measured: {plan}"))
    })
}

/// `no/m/c/ni`, from a plan.
fn order_of(plan: &Value) -> String {
    let moves = plan["vms"].as_array().into_iter().flatten();
    moves.filter_map(|one| one["vm"].as_str()).collect::<Vec<_>>().join("/")
}

/// Moves everybody from the host `at` to the other one, each when the one before it is whole there.
fn all_gone(cloud: &Cloud, at: usize, order: &str) -> Result<Figures, RigError> {
    let (from, to) = (HOSTS[at], HOSTS[1 - at]);
    let listeners =
        GUESTS.iter().map(|vm| cloud.listen(from, vm)).collect::<Result<Vec<_>, _>>()?;
    let began = clock::now();
    let mut figures = BTreeMap::new();
    let mut downtime = 0.0;
    for vm in order.split('/') {
        let words = ["migrate", vm, "--to", to, "--mode", "post-copy", "--urgency", "0"];
        let report = carried_out(cloud, &words, RUN_LIMIT, &mut |_| ())?;
        let said = &report["vms"][0];
        if said["outcome"] != "moved" {
            return Err(RigError::refused("a migration")(format!("{vm} did not move: {said}")));
        }
        downtime += said["downtime_us"].as_u64().unwrap_or_default() as f64 / 1e6;
        if let Some(name) = seconds_of(vm) {
            figures.insert(name, said["total_ms"].as_u64().unwrap_or_default() as f64 / 1e3);
        }
    }
    figures.insert(TOTAL, clock::now().duration_since(began).as_secs_f64());
    figures.insert(super::DOWNTIME, downtime);
    let mut wrong = 0;
    for (vm, listener) in GUESTS.iter().zip(listeners) {
        wrong += listener.heard(&cloud.serial(to, vm))?.matches("LIFEBOAT-CORRUPT").count();
    }
    figures.insert(WRONG, wrong as f64);
    Ok(figures)
}

fn seconds_of(vm: &str) -> Option<&'static str> {
    match vm {
        "no" => Some("no_seconds"),
        "m" => Some("m_seconds"),
        "c" => Some("c_seconds"),
        "ni" => Some("ni_seconds"),
        _ => None,
    }
}

fn checks(record: &Record) -> Vec<Check> {
    let total = |order: &str| record.figures(order, TOTAL);
    let chosen = ORDERS.iter().flat_map(|order| record.figures(order, OURS)).next();
    let ours = ORDERS[chosen.map_or(0, |place| place as usize).min(ORDERS.len() - 1)];
    let measured = ORDERS.iter().copied().filter(|order| !total(order).is_empty());
    let best = measured
        .filter_map(|order| Some((median(&total(order))?, order)))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(ours, |(_, order)| order);
    let claim = format!("{ours}, which the plan has: total time, ratio to the best ({best})");
    let mut checks = vec![Check::median(
        &claim,
        Bound::AtMost(AMONG_THE_BEST),
        &ratios(&record.pairs(ours, best, TOTAL)),
    )];
    let claim = format!("{ours}: total time, ratio to the paper's worst ({WORST})");
    checks.push(Check::median(
        &claim,
        Bound::AtMost(1.0),
        &ratios(&record.pairs(ours, WORST, TOTAL)),
    ));
    let wrong: Vec<f64> = ORDERS.iter().flat_map(|order| record.figures(order, WRONG)).collect();
    checks.push(Check::worst("wrong bytes reported by a guest", Bound::AtMost(0.0), &wrong));
    checks
}

/// The paper's picture: total time by order.
#[must_use]
pub fn plots(record: &Record) -> Vec<Plot> {
    let names: Vec<&str> =
        ORDERS.iter().copied().filter(|order| !record.figures(order, TOTAL).is_empty()).collect();
    let places: Vec<(f64, &str)> = (0_u32..).map(f64::from).zip(names.iter().copied()).collect();
    vec![Plot {
        name: format!("{NAME}-time"),
        title: "Time for four guests to leave by post-copy, one after the other".to_owned(),
        others_show: record.others_show.clone(),
        ground: Ground::names("order", &names),
        height: "seconds".to_owned(),
        series: vec![Series::of(record, "total time", Shape::Bars, TOTAL, &places)],
    }]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_order_is_read_from_a_plan() {
        let plan = json!({"vms": [{"vm": "no"}, {"vm": "m"}, {"vm": "c"}, {"vm": "ni"}]});
        assert_eq!(order_of(&plan), ORDERS[0]);
        assert_eq!(order_of(&json!({})), "");
    }
}
