//! `lifeboat plan HOST..`: what an evacuation would do. Nothing is changed.

use lifeboat_protocol::controller::{Estimate, Plan};
use lifeboat_protocol::terms::Mode;

use super::CliError;
use super::client::Context;
use super::evacuate::Args;
use super::output::{clean, print, print_json, rate, size, table, time};

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let plan = context.client().await?.make_plan(args.request()).await?.into_inner();
    show(context, &plan)
}

pub(super) fn show(context: &Context, plan: &Plan) -> Result<u8, CliError> {
    if context.json {
        print_json(plan)?;
    } else {
        print(&text(plan))?;
    }
    Ok(0)
}

fn range(estimate: Option<&Estimate>, figure: impl Fn(u64) -> String) -> String {
    let Some(estimate) = estimate else { return "?".to_owned() };
    let [low, likely, high] =
        [estimate.low, estimate.likely, estimate.high].map(|value| figure(value as u64));
    if low == high { likely } else { format!("{likely} ({low} to {high})") }
}

/// The plan as a person reads it.
pub(super) fn text(plan: &Plan) -> String {
    let mut text = format!(
        "evacuation of {}: {} to move, {} stay; mode {}, urgency {} % ({}{}), {} at a time\n",
        plan.hosts.join(", "),
        plan.vms.len(),
        plan.left_behind.len(),
        plan.mode,
        plan.urgency,
        plan.reservation,
        if plan.fixed { ", fixed" } else { "" },
        plan.parallel,
    );
    if !plan.vms.is_empty() {
        text.push_str(&format!("expected time: {}\n\n", range(plan.total.as_ref(), time)));
        text.push_str(&moves(plan));
        for vm in &plan.vms {
            text.push_str(&clean(&format!("  {}: {}; {}", vm.vm, vm.why_now, vm.why_here)));
            if plan.mode == Mode::Auto.as_str() {
                text.push_str(&clean(&format!("; {}: {}", vm.mode, vm.why_mode)));
            }
            text.push_str(&clean(&format!("; {} > {}", vm.source, vm.path.join(" > "))));
            text.push_str(&format!(" > {}\n", clean(&vm.destination)));
        }
    }
    for stays in &plan.left_behind {
        text.push_str(&clean(&format!(
            "\nstays: {} at {}: {}",
            stays.vm, stays.host, stays.reason
        )));
        text.push('\n');
        for refusal in &stays.refusals {
            text.push_str(&format!("  {}\n", clean(refusal)));
        }
    }
    if !plan.reservations.is_empty() {
        text.push_str(&format!("\n{}", reservations(plan)));
    }
    for note in &plan.notes {
        text.push_str(&format!("note: {}\n", clean(note)));
    }
    text
}

fn moves(plan: &Plan) -> String {
    let rows = plan.vms.iter().map(|vm| {
        vec![
            vm.wave.to_string(),
            vm.vm.clone(),
            vm.source.clone(),
            vm.destination.clone(),
            vm.mode.clone(),
            range(vm.total_ms.as_ref(), time),
            range(vm.downtime_ms.as_ref(), time),
            range(vm.bytes.as_ref(), size),
            rate(vm.rate_bits_per_sec),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let head = ["WAVE", "VM", "FROM", "TO", "MODE", "TIME", "PAUSE", "BYTES", "RATE"];
    table(&head, &rows)
}

fn reservations(plan: &Plan) -> String {
    let rows = plan.reservations.iter().map(|hop| {
        vec![
            format!("{}:{}", hop.switch, hop.port),
            rate(hop.capacity_bits_per_sec),
            rate(hop.reserved_bits_per_sec),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    table(&["RESERVES ON", "CAPACITY", "SHARE"], &rows)
}
