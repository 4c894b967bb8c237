//! `lifeboat report ID`: what an evacuation came to, prediction beside measurement.

use lifeboat_protocol::controller::{Report, ReportRequest};

use super::CliError;
use super::client::Context;
use super::output::{clean, print, print_json, size, table, time};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The evacuation.
    id: String,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    show_and_rate(context, &args.id).await?;
    Ok(0)
}

/// Prints the report; the exit code says how the evacuation ended.
pub(super) async fn show_and_rate(context: &Context, id: &str) -> Result<u8, CliError> {
    let request = ReportRequest { evacuation: id.to_owned() };
    let report = context.client().await?.get_report(request).await?.into_inner();
    if context.json {
        print_json(&report)?;
    } else {
        print(&text(&report))?;
    }
    Ok(code(&report.state))
}

/// The exit code that a state stands for.
pub(super) fn code(state: &str) -> u8 {
    match state {
        "done" => 0,
        "partial" => super::PARTIAL,
        "failed" => super::FAILED,
        "cancelled" => super::CANCELLED,
        _ => super::DETACHED,
    }
}

/// The report as a person reads it.
pub(super) fn text(report: &Report) -> String {
    let mut text = format!(
        "{} of {}: {} in {} (predicted {}), {} on the wire, urgency {} %\n\n",
        report.evacuation,
        report.hosts.join(", "),
        report.state,
        time(report.total_ms),
        time(report.predicted_total_ms),
        size(report.bytes_sent),
        report.urgency,
    );
    let rows = report.vms.iter().map(|vm| {
        let beside = |measured: String, predicted: String| format!("{measured} / {predicted}");
        vec![
            vm.vm.clone(),
            vm.source.clone(),
            vm.destination.clone(),
            vm.mode.clone(),
            vm.outcome.clone(),
            time(vm.eviction_ms),
            beside(time(vm.total_ms), time(vm.predicted_total_ms)),
            beside(pause(vm.downtime_us), time(vm.predicted_downtime_ms)),
            beside(size(vm.bytes_sent), size(vm.predicted_bytes)),
            vm.iterations.to_string(),
            vm.attempts.to_string(),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let head = [
        "VM",
        "FROM",
        "TO",
        "MODE",
        "OUTCOME",
        "EVICTED",
        "TOTAL / PREDICTED",
        "PAUSE / PREDICTED",
        "BYTES / PREDICTED",
        "ITERATIONS",
        "ATTEMPTS",
    ];
    text.push_str(&table(&head, &rows));
    text.push('\n');
    let hosts = report.host_reports.iter().map(|host| {
        vec![
            host.host.clone(),
            time(host.eviction_ms),
            host.moved.to_string(),
            host.left_behind.to_string(),
        ]
    });
    let rows: Vec<Vec<String>> = hosts.collect();
    text.push_str(&table(&["HOST", "EVICTED", "MOVED", "LEFT BEHIND"], &rows));
    for vm in report.vms.iter().filter(|vm| !vm.stores.is_empty()) {
        let (stores, kind) = (vm.stores.join(", "), &vm.redundancy);
        text.push_str(&clean(&match kind.as_str() {
            "" => format!("{}: the way of its disks was by {stores}", vm.vm),
            kind => format!("{}: its pages waited at {stores}; redundancy {kind}", vm.vm),
        }));
        text.push('\n');
    }
    for vm in report.vms.iter().filter(|vm| !vm.reason.is_empty()) {
        text.push_str(&clean(&format!("{}: {}: {}", vm.vm, vm.outcome, vm.reason)));
        text.push('\n');
    }
    text
}

/// Microseconds as milliseconds with one decimal.
fn pause(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}
