//! `lifeboat evacuate HOST..`: shows the plan, asks, begins, and shows progress to the end.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use lifeboat_protocol::controller::{EvacuateReply, EvacuateRequest, Plan};

use super::client::{Context, operation_id};
use super::interrupts::Interrupts;
use super::output::print_json;
use super::{CliError, plan, progress, report};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The hosts to empty.
    #[arg(required = true, value_name = "HOST")]
    hosts: Vec<String>,
    #[command(flatten)]
    pub(super) options: Options,
    /// Only show the plan.
    #[arg(long)]
    dry_run: bool,
}

/// What `evacuate`, `plan` and `migrate` have in common.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The share of each link that it is entitled to, in percent (0 to 100); by default from --reason.
    #[arg(long, value_name = "PERCENT")]
    urgency: Option<u32>,
    /// How memory moves.
    #[arg(long, default_value = "auto", value_parser = PossibleValuesParser::new(
        ["auto", "pre-copy", "post-copy", "scatter-gather", "cold"]))]
    mode: String,
    /// When local disks move: `copy` has all of a disk at the destination before its VM runs there,
    /// `on-demand` what is busy; the rest follows, and what the guest reads of it goes first. `scatter` is
    /// the same, and all of it goes on to an intermediary meanwhile, so that the host is rid of the VM
    /// before the destination has everything.
    #[arg(long, default_value = "copy",
          value_parser = PossibleValuesParser::new(["copy", "on-demand", "scatter"]))]
    disk: String,
    /// With `--disk on-demand` and `scatter`: what of the busy part may be left when writes go to both sides, in MiB; by
    /// default 4.
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "MIB")]
    handover_size: u64,
    /// With `--disk on-demand` and `scatter`: for how long it is watched which part is busy (3s, at most 30s).
    #[arg(long, value_parser = duration, value_name = "TIME")]
    disk_watch: Option<Duration>,
    /// What is reserved: `borrow` guarantees a minimum and lends the rest, `strict` is a ceiling too
    /// and holds the applications to the remainder; by default the controller's.
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(["borrow", "strict"]))]
    reservation: Option<String>,
    /// Keep the reservation that the urgency gives, whatever the links carry.
    #[arg(long)]
    fixed: bool,
    /// The only hosts that may take the VMs.
    #[arg(long, value_delimiter = ',', value_name = "HOST,..")]
    pub(super) to: Vec<String>,
    /// The only hosts that may keep pages in scatter-gather, or disks; by default any that can.
    #[arg(long, value_delimiter = ',', value_name = "HOST,..")]
    intermediaries: Vec<String>,
    /// How many hosts keep pages in scatter-gather; by default as many as the reservation needs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64),
          conflicts_with = "intermediaries")]
    intermediary_count: Option<u32>,
    /// How a lost intermediary is made up for; by default parity with three, mirror with two.
    #[arg(long, value_name = "KIND",
          value_parser = PossibleValuesParser::new(["parity", "mirror", "none"]))]
    redundancy: Option<String>,
    /// How many VMs move at a time.
    #[arg(long, default_value_t = 1, value_name = "N")]
    parallel: u32,
    /// Why: sets the urgency unless that is given.
    #[arg(long, default_value = "maintenance",
          value_parser = PossibleValuesParser::new(["maintenance", "failing"]))]
    reason: String,
    /// When it should be over, from now: 90s, 10m, 2h.
    #[arg(long, value_parser = duration, value_name = "TIME")]
    by: Option<Duration>,
    /// The pause to aim for at the switchover, in milliseconds; by default the controller's.
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "MS")]
    downtime_limit: u32,
    /// Begin without asking.
    #[arg(long, short)]
    yes: bool,
    /// Return as soon as it has begun.
    #[arg(long)]
    detach: bool,
}

/// `90s`, `10m`, `2h`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time: write 90s, 10m or 2h");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(seconds).filter(|n| *n > 0).map(Duration::from_secs).ok_or_else(wrong)
}

impl Options {
    pub(super) fn request(&self, hosts: &[String]) -> EvacuateRequest {
        EvacuateRequest {
            hosts: hosts.to_vec(),
            urgency: self.urgency,
            mode: self.mode.clone(),
            to: self.to.clone(),
            parallel: self.parallel,
            reason: self.reason.clone(),
            deadline_ms: self.by.map_or(0, crate::planner::millis),
            downtime_limit_ms: self.downtime_limit,
            operation_id: operation_id(),
            reservation: self.reservation.clone().unwrap_or_default(),
            fixed: self.fixed.then_some(true),
            intermediaries: self.intermediaries.clone(),
            intermediary_count: self.intermediary_count.unwrap_or(0),
            redundancy: self.redundancy.clone().unwrap_or_default(),
            disk: self.disk.clone(),
            handover_size_bytes: self.handover_size.saturating_mul(1 << 20),
            disk_watch_ms: self.disk_watch.map_or(0, |watch| {
                u32::try_from(crate::planner::millis(watch)).unwrap_or(u32::MAX)
            }),
        }
    }

    /// Whether the operator says yes to a plan. Nothing is asked with `--yes`.
    pub(super) async fn agreed(&self, context: &Context, plan: &Plan) -> Result<(), CliError> {
        if self.yes {
            return Ok(());
        }
        if !std::io::stdin().is_terminal() {
            return Err(CliError::NoTerminal);
        }
        if context.json {
            eprintln!("{}", plan::text(plan));
        }
        ask(&format!("move {} VMs? [y/N] ", plan.vms.len())).await
    }
}

impl Args {
    pub(super) fn request(&self) -> EvacuateRequest {
        self.options.request(&self.hosts)
    }
}

async fn ask(question: &str) -> Result<(), CliError> {
    eprint!("{question}");
    // A question that cannot be seen is answered with no.
    let _ = std::io::stderr().flush();
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map(|_| line)
    });
    let line = answer.await.ok().and_then(Result::ok).unwrap_or_default();
    match line.trim().to_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(CliError::Declined),
    }
}

pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    if args.dry_run {
        return plan::run(context, args).await;
    }
    let mut client = context.client().await?;
    let request = args.request();
    if !args.options.yes {
        let plan = client.make_plan(request.clone()).await?.into_inner();
        if !context.json {
            plan::show(context, &plan)?;
        }
        args.options.agreed(context, &plan).await?;
    }
    let mut interrupts = Interrupts::listen()?;
    match interrupts.through(client.evacuate(request)).await {
        Some(begun) => follow(context, begun?.into_inner(), &args.options, interrupts).await,
        None => Ok(left_alone()),
    }
}

/// Ctrl-C twice before anything was heard of the beginning.
pub(super) fn left_alone() -> u8 {
    eprintln!("detached; it may have begun: `lifeboat status` shows it");
    super::DETACHED
}

/// Shows a begun evacuation to its end, unless the operator wants to be elsewhere.
pub(super) async fn follow(
    context: &Context,
    begun: EvacuateReply,
    options: &Options,
    mut interrupts: Interrupts,
) -> Result<u8, CliError> {
    if options.yes
        && !context.json
        && let Some(plan) = &begun.plan
    {
        plan::show(context, plan)?;
    }
    if options.detach && interrupts.heard() == 0 {
        return detached(context, &begun);
    }
    if !progress::follow(context, &begun.evacuation, &mut interrupts).await? {
        eprintln!(
            "detached; {0} goes on: `lifeboat status {0} --watch`, `lifeboat cancel {0}`",
            begun.evacuation
        );
        return Ok(super::DETACHED);
    }
    report::show_and_rate(context, &begun.evacuation).await
}

fn detached(context: &Context, begun: &EvacuateReply) -> Result<u8, CliError> {
    if context.json {
        print_json(begun)?;
    } else {
        let id = &begun.evacuation;
        super::output::print(&format!(
            "{id} has begun; `lifeboat status {id} --watch` shows it\n"
        ))?;
    }
    Ok(0)
}
