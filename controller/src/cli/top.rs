//! `lifeboat top`: every link with what passes, what is reserved, and for whom; once a second.

use std::io::IsTerminal;
use std::time::Duration;

use lifeboat_protocol::controller::{LinkLoad, LinksReply, LinksRequest, QueueLoad, SwitchLoad};

use super::CliError;
use super::client::Context;
use super::output::{clean, print, print_json, rate, table, time};
use crate::clock;

/// Between two pictures.
const EVERY: Duration = Duration::from_secs(1);
/// A controller that has just started does not know all rates yet: one picture waits for them, for
/// so many seconds.
const PATIENCE: u32 = 5;
/// Clears a terminal and goes to its first line (ECMA-48: ED, CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print it once and end.
    #[arg(long)]
    once: bool,
    /// Only links that are hot spots or carry a reservation.
    #[arg(long)]
    busy: bool,
}

/// With `--json` one reply after the other, each second until interrupted; on no terminal, or with
/// `--once`, one picture.
pub(super) async fn run(context: &Context, args: Args) -> Result<u8, CliError> {
    let mut client = context.client().await?;
    let forever = !args.once && (context.json || std::io::stdout().is_terminal());
    let mut patience = PATIENCE;
    loop {
        let mut reply = client.links(LinksRequest {}).await?.into_inner();
        let blank = reply.links.iter().any(|link| link.up && !link.rate_known);
        if !forever && blank && patience > 0 {
            patience -= 1;
            tokio::time::sleep(EVERY).await;
            continue;
        }
        if args.busy {
            reply.links.retain(|link| link.hot_spot || !link.queues.is_empty());
        }
        match (context.json, forever) {
            (true, _) => print_json(&reply)?,
            (false, false) => print(&text(&reply, clock::now().0))?,
            (false, true) => print(&format!("{CLEAR}{}", text(&reply, clock::now().0)))?,
        }
        if !forever {
            return Ok(0);
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// The picture at `now` (milliseconds since 1970).
pub(super) fn text(reply: &LinksReply, now: u64) -> String {
    let rows: Vec<Vec<String>> = reply.links.iter().map(link).collect();
    let head = ["LINK", "TO", "CARRIES", "SENDS", "FULL", "RESERVED", "USED BY"];
    let mut text = table(&head, &rows);
    let budgeted = reply.switches.iter().filter(|s| s.migration_budget_bits_per_sec > 0);
    let rows: Vec<Vec<String>> = budgeted.map(budget).collect();
    if !rows.is_empty() {
        let head = ["SWITCH", "FULL", "MIGRATIONS", "BUDGET", "RATIO"];
        text.push_str(&format!("\n{}", table(&head, &rows)));
    }
    for pending in &reply.pending {
        let whose =
            if pending.migration.is_empty() { &pending.evacuation } else { &pending.migration };
        text.push_str(&format!(
            "\nnot released yet: {} at {}, for {} and {} tries; it goes on: {}\n",
            clean(whose),
            clean(&pending.switches.join(", ")),
            time(now.saturating_sub(pending.since_unix_ms)),
            pending.tries,
            clean(&pending.reason),
        ));
    }
    text
}

fn link(link: &LinkLoad) -> Vec<String> {
    let full = match (link.up, link.saturation_known, link.hot_spot) {
        (false, ..) => "down".to_owned(),
        (_, false, _) => "?".to_owned(),
        (_, _, hot) => format!("{}{}", share(link.saturation), if hot { " hot" } else { "" }),
    };
    let users: Vec<String> = link.queues.iter().map(user).collect();
    vec![
        format!("{}:{}", link.switch, link.port),
        link.peer.clone(),
        rate(link.capacity_bits_per_sec),
        known(link.rate_bits_per_sec, link.rate_known),
        full,
        if link.queues.is_empty() { "-".to_owned() } else { rate(link.reserved_bits_per_sec) },
        users.join("; "),
    ]
}

fn user(queue: &QueueLoad) -> String {
    let whose = match queue.migrations.as_slice() {
        [] => queue.evacuation.clone(),
        migrations => migrations.join(" "),
    };
    let (used, reserved) =
        (known(queue.rate_bits_per_sec, queue.rate_known), rate(queue.reserved_bits_per_sec));
    format!("{whose} {used} of {reserved} ({} %, {})", queue.urgency, queue.kind)
}

fn budget(switch: &SwitchLoad) -> Vec<String> {
    let full = if switch.saturation_known { share(switch.saturation) } else { "?".to_owned() };
    let hot = if switch.hot_spot { " hot" } else { "" };
    let ratio = format!("{:.2}", switch.migration_ratio);
    vec![
        switch.name.clone(),
        format!("{full}{hot}"),
        known(switch.migration_bits_per_sec, switch.migration_rate_known),
        rate(switch.migration_budget_bits_per_sec),
        if switch.migration_ratio_known { ratio } else { "?".to_owned() },
    ]
}

fn share(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// A rate, or a question mark: what is not known is not idle.
fn known(bits: u64, known: bool) -> String {
    if known { rate(bits) } else { "?".to_owned() }
}

#[cfg(test)]
mod tests {
    use lifeboat_protocol::controller::PendingRelease;

    use super::*;

    #[test]
    fn a_picture_says_who_uses_what_and_never_calls_the_unknown_idle() {
        let queue = QueueLoad {
            evacuation: "e1".to_owned(),
            migrations: vec!["e1-m2".to_owned()],
            queue: 3,
            reserved_bits_per_sec: 75_000_000,
            rate_bits_per_sec: 70_000_000,
            rate_known: true,
            urgency: 75,
            kind: "borrow".to_owned(),
        };
        let busy = LinkLoad {
            switch: "s1".to_owned(),
            port: "d2".to_owned(),
            peer: "h2.br0:u2".to_owned(),
            capacity_bits_per_sec: 100_000_000,
            rate_bits_per_sec: 95_000_000,
            rate_known: true,
            reserved_bits_per_sec: 75_000_000,
            saturation: 0.95,
            saturation_known: true,
            hot_spot: true,
            up: true,
            queues: vec![queue],
        };
        let unknown = LinkLoad {
            port: "d1".to_owned(),
            rate_known: false,
            saturation_known: false,
            hot_spot: false,
            queues: Vec::new(),
            ..busy.clone()
        };
        let down = LinkLoad { port: "d3".to_owned(), up: false, ..unknown.clone() };
        let pending = PendingRelease {
            evacuation: "e1".to_owned(),
            switches: vec!["s2".to_owned()],
            reason: "no answer".to_owned(),
            since_unix_ms: 1000,
            tries: 3,
            ..PendingRelease::default()
        };
        let reply = LinksReply {
            links: vec![busy, unknown, down],
            switches: Vec::new(),
            pending: vec![pending],
        };
        let shown = text(&reply, 61_000);
        let lines: Vec<&str> = shown.lines().collect();
        let busy = "95 % hot  75 Mbit/s  e1-m2 70 Mbit/s of 75 Mbit/s (75 %, borrow)";
        assert!(lines[1].contains(busy), "{shown}");
        assert!(lines[2].contains('?') && !lines[2].contains("0 %"), "{shown}");
        assert!(lines[3].contains("down"), "{shown}");
        let owed = "not released yet: e1 at s2, for 1 min 00 s and 3 tries";
        assert!(lines[5].starts_with(owed), "{shown}");
    }
}
