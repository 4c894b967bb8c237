//! SOLive's experiments on the lab's cloud: figure 3 on the order in which guests leave (section IV-A),
//! figures 6 and 7 on reservations (section V-C), and figure 8 on scatter-gather, which has a picture
//! of its own in `eight`.
//!
//! ```text
//!   NO, M, C, NI on h1 ── 60 Mbit/s ── s1 ── 60 Mbit/s ── h2          (lab/scenarios/solive.toml)
//!                                        '─── client: takes what NO sends, sends what NI takes
//! ```
//!
//! A run moves all four guests from one host to the other, in the order that the planner finds; the
//! next one moves them back; who is left behind follows at urgency 95, and is waited for. The network
//! is the same in both directions. The arms of a round take
//! turns in who begins, so that each goes both ways. NO sends 67 % of the link all the time, which is
//! what the migration contends with until NO has gone; in some arms an application of the source
//! itself sends 44 % besides, and does not leave. Reservations are read once in 0.4 s from the
//! controller; a guest's pace is what it has done per second of its own clock, so that its pause,
//! which is a figure of its own, is not counted twice. C's QEMU has precedence over everything else
//! on the machine: what is asked is what a reservation does to C, not what four emulators and two
//! agents on two cores do to each other.

pub mod eight;
pub mod seven;
pub mod six;
pub mod three;

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use lifeboat_lab::experiment::statistics::median;
use lifeboat_lab::experiment::{Record, Sample};
use serde_json::{Value, json};

use super::Setting;
use super::machine::{CpuTime, machine};
use crate::clock;
use crate::rig::RigError;
use crate::rig::cloud::{Cloud, Kept, Listener};

const SCENARIO: &str = "solive";
const HOSTS: [&str; 2] = ["h1", "h2"];
/// The guests, in the order that the paper and our planner find for them.
const GUESTS: [&str; 4] = ["no", "m", "c", "ni"];
const LOOK: Duration = Duration::from_millis(400);
/// More than any run takes on a busy machine.
const RUN_LIMIT: Duration = Duration::from_secs(300);
/// What a run takes on a quiet machine: with less time left, none is begun.
const RUN_USUAL: Duration = Duration::from_secs(100);
/// Between two runs: guests settle, and counters forget.
const REST: Duration = Duration::from_secs(3);
/// How often a host is evacuated until nobody is left on it.
const ATTEMPTS: usize = 4;

const TOTAL: &str = "total_seconds";
const DOWNTIME: &str = "downtime_seconds";
const M_PACE: &str = "m_writes_per_second";
const C_PACE: &str = "c_rounds_per_second";
const NO_PACE: &str = "no_bytes_sent_per_second";
const WRONG: &str = "wrong_bytes_reported";
const USED: &str = "sent_percent_of_link_while_sending";
const LEFT: &str = "left_behind_at_first";

/// What an application of the source sends, in Mbit/s: 44 % of the link, beside which an evacuation that
/// has nothing reserved still comes to an end.
const APPLICATION: &str = "26M";
/// Longer than any run.
const APPLICATION_SECONDS: u64 = 600;

/// One of the compared ways to evacuate.
#[derive(Debug, Clone, Copy)]
struct Arm {
    /// Its name in the record.
    name: &'static str,
    /// What is said on the command line.
    words: &'static [&'static str],
    /// Whether an application of the source itself sends all the while, which does not leave.
    beside: bool,
}

impl Arm {
    const fn new(name: &'static str, words: &'static [&'static str]) -> Self {
        Self { name, words, beside: false }
    }

    const fn beside_an_application(self) -> Self {
        Self { beside: true, ..self }
    }
}

/// Raises the cloud and takes turns with the arms; fills in the samples.
fn measure(
    setting: &Setting<'_>,
    record: &mut Record,
    arms: &[Arm],
    rounds: usize,
) -> Result<(), RigError> {
    let lab = setting.images.parent().unwrap_or(setting.images);
    let end = setting.minutes.map(|minutes| clock::now() + Duration::from_secs(minutes * 60));
    let cloud = Cloud::raise(lab, SCENARIO, &setting.folder.join("up.log"))?;
    // The agents have measured by then, and NO has filled its link.
    clock::rest(REST * 2);
    let mut at = 0;
    for round in 0..rounds {
        for turn in 0..arms.len() {
            if end.is_some_and(|end| clock::now() + RUN_USUAL > end) {
                return Ok(());
            }
            let arm = arms[(turn + round) % arms.len()];
            let figures = evacuation(&cloud, at, arm)?;
            record.samples.push(Sample { case: arm.name.to_owned(), run: round, figures });
            at = 1 - at;
            setting.keep(record, record.samples.len(), rounds * arms.len());
            clock::rest(REST);
        }
    }
    Ok(())
}

fn blank(
    setting: &Setting<'_>,
    (name, scenario): (&str, &str),
    rounds: usize,
    arms: &[Arm],
) -> Record {
    let arms: Vec<Value> =
        arms.iter().map(|arm| json!({"case": arm.name, "words": arm.words})).collect();
    let lab = setting.images.parent().unwrap_or(setting.images);
    let scenario = fs::read_to_string(lab.join(format!("scenarios/{scenario}.toml")));
    Record {
        name: name.to_owned(),
        question: String::new(),
        others_show: String::new(),
        quick: setting.quick,
        began_unix: clock::unix_now().as_secs(),
        machine: machine(),
        parameters: json!({
            "rounds": rounds,
            "arms": arms,
            "scenario": scenario.unwrap_or_default(),
        }),
        samples: Vec::new(),
        checks: Vec::new(),
    }
}

type Figures = BTreeMap<&'static str, f64>;

/// Moves everybody from the host `at` to the other one.
fn evacuation(cloud: &Cloud, at: usize, arm: Arm) -> Result<Figures, RigError> {
    let (from, to) = (HOSTS[at], HOSTS[1 - at]);
    let _application = if arm.beside { Some(application(cloud, from)?) } else { None };
    let listeners: Vec<Listener> =
        GUESTS.iter().map(|vm| cloud.listen(from, vm)).collect::<Result<_, _>>()?;
    let (began, cpu) = (clock::now(), CpuTime::now());
    let (report, watched) = evacuated(cloud, from, to, arm.words)?;
    let idle = CpuTime::now().idle_percent_since(cpu);
    let mut figures = reported(&report);
    figures.extend(watched.figures());
    figures.insert("machine_idle_percent", idle);
    finish_moving(cloud, from, to)?;
    if figures.get(LEFT).is_some_and(|left| *left > 0.0) {
        // Whoever was left behind was waited for, too: the host was not empty before.
        figures.insert(TOTAL, clock::now().duration_since(began).as_secs_f64());
    }
    let mut wrong = 0;
    for (vm, listener) in GUESTS.iter().zip(listeners) {
        let said = listener.heard(&cloud.serial(to, vm))?;
        wrong += said.matches("LIFEBOAT-CORRUPT").count();
        if let Some((name, counter)) = pace_of(vm) {
            figures.extend(pace(&said, counter).map(|pace| (name, pace)));
        }
    }
    figures.insert(WRONG, wrong as f64);
    Ok(figures)
}

/// An application of a host that sends to the client until it is dropped, and its other end.
fn application(cloud: &Cloud, host: &str) -> Result<[Kept; 2], RigError> {
    let sink = cloud.keep_on("client", "iperf3 -s -1")?;
    clock::rest(Duration::from_millis(500));
    let client = &cloud.scenario().client;
    let address = client.networks.first().map_or("", |network| network.address.as_str());
    let address = address.split('/').next().unwrap_or_default();
    let line = format!("iperf3 -u -c {address} -b {APPLICATION} -l 8000 -t {APPLICATION_SECONDS}");
    let mut source = cloud.keep_on(host, &line)?;
    clock::rest(REST);
    // It ends at once where its other end is busy with another one.
    match source.runs() {
        true => Ok([source, sink]),
        false => Err(RigError::refused("an application")(format!("`{line}` has ended"))),
    }
}

/// Who was left behind follows at urgency 95: the next run begins with an empty host.
fn finish_moving(cloud: &Cloud, from: &str, to: &str) -> Result<(), RigError> {
    for _ in 0..ATTEMPTS {
        let vms = cloud.ask(&["vms"])?;
        // A guest that has left stays in the list as one that has moved.
        let on_it = |vm: &Value| vm["host"] == from && vm["state"] == "running";
        if !vms["vms"].as_array().into_iter().flatten().any(on_it) {
            return Ok(());
        }
        clock::rest(REST);
        evacuated(cloud, from, to, &["--mode", "pre-copy", "--urgency", "95"])?;
    }
    Err(RigError::refused("an evacuation")(format!("guests stay on {from}")))
}

fn evacuated(
    cloud: &Cloud,
    from: &str,
    to: &str,
    words: &[&str],
) -> Result<(Value, Watched), RigError> {
    let mut watched = Watched::of(from);
    let report = reported_at_the_end(cloud, from, to, words, RUN_LIMIT, |evacuation| {
        watched.look(evacuation);
        // Emulated, C shares two cores with everybody; it has one of its own wherever pace matters.
        HOSTS.iter().for_each(|host| cloud.favour(host, "c"));
    })?;
    Ok((report, watched))
}

/// Orders an evacuation and looks at it until it has ended; what the controller reports then.
fn reported_at_the_end(
    cloud: &Cloud,
    from: &str,
    to: &str,
    words: &[&str],
    limit: Duration,
    mut look: impl FnMut(&Value),
) -> Result<Value, RigError> {
    let order = ["evacuate", from, "--to", to];
    carried_out(cloud, &[&order[..], words].concat(), limit, &mut look)
}

/// Gives an order to the controller and looks at what comes of it until it has ended; what the
/// controller reports then.
pub(super) fn carried_out(
    cloud: &Cloud,
    order: &[&str],
    limit: Duration,
    look: &mut dyn FnMut(&Value),
) -> Result<Value, RigError> {
    let begun = cloud.ask(&[order, &["--yes", "--detach"]].concat())?;
    let id = begun["evacuation"].as_str().unwrap_or_default().to_owned();
    let deadline = clock::now() + limit;
    while clock::now() < deadline {
        let status = cloud.ask(&["status", &id])?;
        let evacuation = &status["evacuations"][0];
        look(evacuation);
        let state = evacuation["state"].as_str().unwrap_or_default();
        if ["done", "partial", "failed", "cancelled"].contains(&state) {
            return cloud.ask(&["report", &id]);
        }
        clock::rest(LOOK);
    }
    let what = format!("the end of {} ({id})", order.join(" "));
    Err(RigError::TooLate { what, seconds: limit.as_secs() })
}

/// What the controller's report says: seconds of all, of each guest, and of all pauses.
fn reported(report: &Value) -> Figures {
    let seconds = |ms: &Value| ms.as_u64().unwrap_or_default() as f64 / 1e3;
    let vms: Vec<&Value> = report["vms"].as_array().into_iter().flatten().collect();
    let pauses = vms.iter().map(|vm| vm["downtime_us"].as_u64().unwrap_or_default() as f64 / 1e6);
    let moved = vms.iter().filter(|vm| vm["outcome"] == "moved").count();
    let mut figures = BTreeMap::from([
        (TOTAL, seconds(&report["total_ms"])),
        ("predicted_seconds", seconds(&report["predicted_total_ms"])),
        (DOWNTIME, pauses.sum()),
        ("sent_mib", report["bytes_sent"].as_u64().unwrap_or_default() as f64 / 1_048_576.0),
        (LEFT, (GUESTS.len() - moved.min(GUESTS.len())) as f64),
    ]);
    for vm in vms {
        let name = match vm["vm"].as_str() {
            Some("no") => "no_seconds",
            Some("m") => "m_seconds",
            Some("c") => "c_seconds",
            Some("ni") => "ni_seconds",
            _ => continue,
        };
        figures.insert(name, seconds(&vm["total_ms"]));
    }
    figures
}

/// What was reserved at the source's uplink, by how many guests were still on the source.
#[derive(Debug)]
struct Watched {
    uplink: String,
    reserved: [Vec<f64>; GUESTS.len()],
    /// What left by the queue, while something did.
    used: Vec<f64>,
}

/// Their names by how many guests are left, from 1.
const RESERVED: [&str; GUESTS.len()] = [
    "reserved_percent_with_1_left",
    "reserved_percent_with_2_left",
    "reserved_percent_with_3_left",
    "reserved_percent_with_4_left",
];

impl Watched {
    fn of(source: &str) -> Self {
        Self { uplink: format!("{source}-up"), reserved: Default::default(), used: Vec::new() }
    }

    fn look(&mut self, evacuation: &Value) {
        let migrations = evacuation["migrations"].as_array().into_iter().flatten();
        let gone = migrations.filter(|one| one["phase"] == "moved").count();
        let left = GUESTS.len().saturating_sub(gone);
        let mut rows = evacuation["reservations"].as_array().into_iter().flatten();
        let row = rows.find(|row| row["port"] == self.uplink.as_str());
        let bits = |row: &Value, key: &str| row[key].as_u64().unwrap_or_default() as f64;
        if let (Some(row), Some(kept)) = (row, self.reserved.get_mut(left.wrapping_sub(1))) {
            let capacity = bits(row, "capacity_bits_per_sec").max(1.0);
            kept.push(bits(row, "reserved_bits_per_sec") / capacity * 100.0);
            let used = bits(row, "used_bits_per_sec") / capacity * 100.0;
            self.used.extend((used > 1.0).then_some(used));
        }
    }

    fn figures(&self) -> Figures {
        let medians = self.reserved.iter().map(|seen| median(seen));
        let reserved = RESERVED.into_iter().zip(medians);
        let used = (USED, median(&self.used));
        reserved.chain([used]).filter_map(|(name, seen)| Some((name, seen?))).collect()
    }
}

/// Which guest's pace is a figure, and by which counter of its own.
fn pace_of(vm: &str) -> Option<(&'static str, &'static str)> {
    match vm {
        "no" => Some((NO_PACE, "traffic_out=")),
        "m" => Some((M_PACE, "writes=")),
        "c" => Some((C_PACE, "rounds=")),
        _ => None,
    }
}

/// How much a guest's counter grew per second of the guest's clock, from its first to its last tick.
fn pace(said: &str, counter: &str) -> Option<f64> {
    let tick = |line: &str| -> Option<(f64, f64)> {
        let rest = line.split_once("LIFEBOAT-TICK ")?.1;
        let second = rest.split_whitespace().next()?.parse().ok()?;
        let value = rest.split_whitespace().find_map(|word| word.strip_prefix(counter))?;
        Some((second, value.parse().ok()?))
    };
    let ticks: Vec<(f64, f64)> = said.lines().filter_map(tick).collect();
    let ((from, before), (to, after)) = (ticks.first()?, ticks.last()?);
    (to > from).then(|| (after - before) / (to - from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_counted_in_the_guest_s_own_seconds_across_its_move() {
        let said = "LIFEBOAT-TICK 7 ok pages=9 version=1 writes=100 rounds=5\nnoise\n\
                    LIFEBOAT-TICK 8 ok pages=9 version=1 writes=150 rounds=5\n\
                    LIFEBOAT-TICK 11 ok pages=9 version=1 writes=300 rounds=9\n";
        assert_eq!(pace(said, "writes="), Some(50.0));
        assert_eq!(pace(said, "rounds="), Some(1.0));
        assert_eq!(pace("LIFEBOAT-TICK 7 ok writes=100", "writes="), None);
        assert_eq!(pace("", "writes="), None);
    }

    #[test]
    fn a_reservation_counts_for_those_who_are_left() {
        let mut watched = Watched::of("h1");
        let row = |port, reserved| {
            let used = if reserved == 95 { 90 } else { 0 };
            json!({"port": port, "capacity_bits_per_sec": 100, "used_bits_per_sec": used,
                   "reserved_bits_per_sec": reserved})
        };
        let look = |gone: usize, reserved| {
            let mut migrations = vec![json!({"phase": "moved"}); gone];
            migrations.push(json!({"phase": "sending"}));
            json!({"migrations": migrations,
                   "reservations": [row("s1-h1", 1), row("h1-up", reserved)]})
        };
        for (gone, reserved) in [(0, 25), (0, 75), (0, 50), (1, 95), (9, 1)] {
            watched.look(&look(gone, reserved));
        }
        watched.look(&json!({}));
        assert_eq!(
            watched.figures(),
            BTreeMap::from([(RESERVED[3], 50.0), (RESERVED[2], 95.0), (USED, 90.0)])
        );
    }

    #[test]
    fn a_report_is_read_in_seconds() {
        let report = json!({"total_ms": 30_000, "predicted_total_ms": 28_000, "bytes_sent": 1_048_576,
            "vms": [{"vm": "no", "outcome": "moved", "downtime_us": 200_000, "total_ms": 9_000},
                    {"vm": "m", "outcome": "left-behind", "downtime_us": 0, "total_ms": 100}]});
        let figures = reported(&report);
        assert_eq!((figures[TOTAL], figures[DOWNTIME], figures[LEFT]), (30.0, 0.2, 3.0));
        assert_eq!((figures["no_seconds"], figures["sent_mib"]), (9.0, 1.0));
    }
}
