//! Progress of an evacuation until its end: bars on a terminal, lines elsewhere, replies with
//! `--json`. Ctrl-C cancels what has not been committed; a second one leaves it alone.

use std::collections::BTreeMap;
use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use lifeboat_protocol::controller::{
    CancelRequest, EvacuationStatus, MigrationStatus, StatusReply, StatusRequest,
};
use tokio_stream::StreamExt;
use tonic::Streaming;

use super::CliError;
use super::client::{Context, operation_id};
use super::interrupts::Interrupts;
use super::output::{clean, rate, size, time, to_go};

/// Steps of a bar.
const STEPS: u64 = 1000;

/// Shows an evacuation until it ends. False when the operator has detached.
pub(super) async fn follow(
    context: &Context,
    id: &str,
    interrupts: &mut Interrupts,
) -> Result<bool, CliError> {
    let request = StatusRequest { evacuation: id.to_owned() };
    let mut stream = context.client().await?.watch(request).await?.into_inner();
    let mut display = Display::new(context);
    if interrupts.heard() > 0 {
        cancel(context, id, &display).await?;
    }
    loop {
        tokio::select! {
            next = stream.next() => match next {
                Some(Ok(reply)) => display.update(&reply)?,
                Some(Err(status)) => return Err(status.into()),
                None if display.is_over() => break,
                None => return Err(CliError::Broken { doing: "watching the evacuation" }),
            },
            heard = interrupts.next() => {
                if heard > 1 {
                    return Ok(false);
                }
                cancel(context, id, &display).await?;
            }
        }
    }
    display.finish();
    Ok(true)
}

/// Shows whatever a watch brings, until it ends.
pub(super) async fn show(
    context: &Context,
    mut stream: Streaming<StatusReply>,
) -> Result<(), CliError> {
    let mut display = Display::new(context);
    while let Some(reply) = stream.next().await {
        display.update(&reply?)?;
    }
    display.finish();
    Ok(())
}

async fn cancel(context: &Context, id: &str, display: &Display) -> Result<(), CliError> {
    display.say(&format!(
        "cancelling {id}: VMs that have not been committed stay where they are, one that has been arrives; Ctrl-C again leaves it alone"
    ));
    let request = CancelRequest { evacuation: id.to_owned(), operation_id: operation_id() };
    if let Err(status) = context.client().await?.cancel(request).await {
        display.say(&clean(status.message()));
    }
    Ok(())
}

/// What is on the screen.
struct Display {
    json: bool,
    bars: Option<MultiProgress>,
    by_vm: BTreeMap<String, ProgressBar>,
    phases: BTreeMap<String, String>,
    over: bool,
}

impl Display {
    fn new(context: &Context) -> Self {
        let bars = (!context.json && std::io::stderr().is_terminal()).then(MultiProgress::new);
        let (by_vm, phases) = (BTreeMap::new(), BTreeMap::new());
        Self { json: context.json, bars, by_vm, phases, over: false }
    }

    fn is_over(&self) -> bool {
        self.over
    }

    fn update(&mut self, reply: &StatusReply) -> Result<(), CliError> {
        let ends = ["done", "partial", "cancelled", "failed"];
        self.over = reply.evacuations.iter().all(|e| ends.contains(&e.state.as_str()));
        if self.json {
            let line = serde_json::to_string(reply).map_err(CliError::Json)?;
            eprintln!("{line}");
            return Ok(());
        }
        for evacuation in &reply.evacuations {
            for migration in &evacuation.migrations {
                let key = format!("{} {}", evacuation.evacuation, migration.vm);
                self.one(&key, migration.done, &migration_line(migration), &migration.phase);
            }
            let key = evacuation.evacuation.clone();
            self.one(&key, total_done(evacuation), &total_line(evacuation), &evacuation.state);
        }
        Ok(())
    }

    fn one(&mut self, key: &str, done: f64, line: &str, phase: &str) {
        if let Some(bars) = &self.bars {
            let bar = self.by_vm.entry(key.to_owned()).or_insert_with(|| bars.add(bar()));
            bar.set_position((done.clamp(0.0, 1.0) * STEPS as f64) as u64);
            bar.set_message(line.to_owned());
        } else if self.phases.insert(key.to_owned(), phase.to_owned()).as_deref() != Some(phase) {
            // Without a terminal a line per change is what a log can use.
            eprintln!("{line}");
        }
    }

    fn say(&self, text: &str) {
        match &self.bars {
            Some(bars) => {
                // A line that does not reach the terminal changes nothing.
                let _ = bars.println(text);
            }
            None => eprintln!("{text}"),
        }
    }

    fn finish(&self) {
        for bar in self.by_vm.values() {
            bar.abandon();
        }
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:28} {percent:>3} %  {msg}");
    let bar = ProgressBar::new(STEPS);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// One VM in one line.
pub(super) fn migration_line(migration: &MigrationStatus) -> String {
    let mut line = format!("{} {}", migration.vm, migration.phase);
    if !migration.destination.is_empty() {
        line = format!("{line} {} > {}", migration.source, migration.destination);
    }
    if migration.rate_bits_per_sec > 0 {
        line = format!("{line}, {}", rate(migration.rate_bits_per_sec));
        if migration.iteration > 0 {
            let left = size(migration.bytes_remaining);
            line = format!("{line}, {left} left, iteration {}", migration.iteration);
        }
    }
    if migration.disk_bytes_left > 0 {
        line = format!("{line}, {} of disks left", size(migration.disk_bytes_left));
    }
    if migration.disk_limit_bytes_per_sec > 0 {
        let limit = migration.disk_limit_bytes_per_sec.saturating_mul(8);
        line = format!("{line}, its writes held to {}", rate(limit));
    }
    if migration.throttle_percent > 0 {
        line = format!("{line}, its CPUs slowed by {} %", migration.throttle_percent);
    }
    if !matches!(migration.phase.as_str(), "moved" | "left-behind" | "lost" | "uncertain") {
        let left = to_go(migration.time_to_go_ms, migration.time_to_go_known);
        line = format!("{line}, {left} to go");
    }
    match migration.reason.is_empty() {
        true => clean(&line),
        false => clean(&format!("{line} ({})", migration.reason)),
    }
}

/// The whole evacuation in one line, with what is reserved on each link.
pub(super) fn total_line(status: &EvacuationStatus) -> String {
    let held: Vec<String> = status
        .reservations
        .iter()
        .map(|held| {
            let share = rate(held.reserved_bits_per_sec);
            format!("{}:{} {share} of {}", held.switch, held.port, rate(held.capacity_bits_per_sec))
        })
        .collect();
    let mut line = format!(
        "{} {}, {} so far, {} to go",
        status.evacuation,
        status.state,
        time(status.elapsed_ms),
        to_go(status.time_to_go_ms, status.time_to_go_known)
    );
    if !held.is_empty() {
        line = format!("{line}; reserved: {}", held.join(", "));
    }
    clean(&line)
}

/// The mean of all VMs; one that has ended counts as done.
fn total_done(status: &EvacuationStatus) -> f64 {
    let ended = ["moved", "left-behind", "lost", "uncertain"];
    let done = |migration: &MigrationStatus| match ended.contains(&migration.phase.as_str()) {
        true => 1.0,
        false => migration.done,
    };
    let count = status.migrations.len().max(1) as f64;
    status.migrations.iter().map(done).sum::<f64>() / count
}
