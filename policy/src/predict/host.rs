//! How long a whole host takes: its VMs in order, with the network that each departure leaves
//! behind.
//!
//! `plan` asks with the order and the destinations that it chose. Two links are counted: the
//! source's, which gets emptier as VMs that send leave, and each destination's, which gets fuller
//! as VMs that receive arrive; what lies between is a constant of each way. VMs of the host that
//! speak with each other are counted as if they spoke with others.

use std::collections::BTreeMap;
use std::time::Duration;

use lifeboat_protocol::ids::{HostId, VmId};
use lifeboat_protocol::terms::{Mode, Urgency};
use lifeboat_protocol::units::{BitsPerSec, Bytes};
use serde::Serialize;

use super::{ColdTimes, Experience, Prediction, Range, cold, post_copy, pre_copy, range};
use crate::measured::MeasuredVm;
use crate::reserve::{Floor, ReserveParameters, initial};
use crate::stop::StopCriteria;

/// One direction of a host's link: what it carries and what passes now, bit/s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkUse {
    /// What it carries.
    pub capacity: BitsPerSec,
    /// What passes, the VMs that are to leave included.
    pub used: BitsPerSec,
}

/// One VM about to leave.
#[derive(Debug, Clone)]
pub struct Departure<'a> {
    /// The VM.
    pub vm: &'a MeasuredVm,
    /// How it moves.
    pub mode: Mode,
    /// Where to.
    pub destination: &'a HostId,
    /// What lies between the two hosts' own links can give it, bit/s; `None` where nothing does.
    pub between: Option<BitsPerSec>,
}

/// One VM's place in the evacuation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VmPrediction {
    /// The VM.
    pub vm: VmId,
    /// What its path has for the migration, bit/s on the wire.
    pub path: BitsPerSec,
    /// What the migration is expected to get of that, bit/s on the wire.
    pub bandwidth: BitsPerSec,
    /// When it starts, counted from the evacuation's start.
    pub starts: Range<Duration>,
    /// What it takes.
    pub prediction: Range<Prediction>,
}

/// The whole evacuation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostPrediction {
    /// The VMs in the order in which they were given.
    pub vms: Vec<VmPrediction>,
    /// Until the last one has nothing left to transfer.
    pub total_time: Range<Duration>,
    /// Bytes on the wire of all of them.
    pub bytes: Range<Bytes>,
}

/// What a migration can get of a link: what nobody uses, or its urgency's share if that is more;
/// the floor of everybody else stays (Algorithm 1 begins so, and over time comes back to it).
#[must_use]
pub fn available(link: LinkUse, urgency: Urgency, floor: Floor) -> BitsPerSec {
    initial(&ReserveParameters::alone(link.capacity, urgency, floor), link.used)
}

/// What holds for the whole evacuation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostTerms {
    /// The share of each link that it is entitled to.
    pub urgency: Urgency,
    /// What everybody else keeps of a link.
    pub floor: Floor,
    /// When pre-copy stops.
    pub criteria: StopCriteria,
    /// What stopping and starting a guest takes.
    pub cold: ColdTimes,
    /// How many migrations at a time; 0 counts as 1.
    pub parallel: usize,
    /// What earlier migrations made of their paths.
    pub experience: Experience,
    /// Between one wave's end and the next one's first page: measuring, reserving, preparing.
    pub between: Duration,
}

/// Predicts `departures` in their order. A wave of `parallel` migrations begins when the one before
/// has ended, and its migrations share what there is evenly. A destination that is not in
/// `destinations` is taken to have a link as the source's, unused.
#[must_use]
pub fn predict_host(
    departures: &[Departure<'_>],
    source: LinkUse,
    destinations: &BTreeMap<HostId, LinkUse>,
    terms: &HostTerms,
) -> HostPrediction {
    let unused = LinkUse { used: BitsPerSec::ZERO, ..source };
    let mut links = Links { source, destinations: destinations.clone(), unused };
    let zero = Range { low: Duration::ZERO, likely: Duration::ZERO, high: Duration::ZERO };
    let none = Range { low: Bytes::ZERO, likely: Bytes::ZERO, high: Bytes::ZERO };
    let mut all = HostPrediction { vms: Vec::new(), total_time: zero, bytes: none };
    for (number, wave) in departures.chunks(terms.parallel.max(1)).enumerate() {
        let handling = if number == 0 { Duration::ZERO } else { terms.between };
        let starts = all.total_time.map(|time| time.saturating_add(handling));
        for departure in wave {
            let path = links.bandwidth(departure, terms).scale(1.0 / wave.len() as f64);
            let bandwidth = path.scale(terms.experience.share);
            let prediction = predict(departure, bandwidth, terms);
            let ended = starts.join(&prediction, |start, one| start.saturating_add(one.total_time));
            all.total_time = all.total_time.join(&ended, |a, b| *a.max(b));
            all.bytes = all.bytes.join(&prediction, |sum, one| *sum + one.bytes);
            let vm = departure.vm.id.clone();
            all.vms.push(VmPrediction { vm, path, bandwidth, starts, prediction });
        }
        for departure in wave {
            links.arrived(departure);
        }
    }
    all
}

/// The hosts' links as the evacuation changes them.
struct Links {
    source: LinkUse,
    destinations: BTreeMap<HostId, LinkUse>,
    unused: LinkUse,
}

impl Links {
    fn bandwidth(&self, departure: &Departure<'_>, terms: &HostTerms) -> BitsPerSec {
        let mut source = self.source;
        let mut into = self.destinations.get(departure.destination).copied().unwrap_or(self.unused);
        // Pages that follow their guest come when it sends and receives at the other end already.
        if matches!(departure.mode, Mode::PostCopy | Mode::ScatterGather) {
            source.used = source.used - departure.vm.network_out;
            into.used += departure.vm.network_in;
        }
        let of = |link| available(link, terms.urgency, terms.floor);
        let ends = of(source).min(of(into));
        departure.between.map_or(ends, |between| between.min(ends))
    }

    /// From now on the VM's traffic passes the destination's link and no longer the source's.
    fn arrived(&mut self, departure: &Departure<'_>) {
        self.source.used = self.source.used - departure.vm.network_out;
        let into = self.destinations.entry(departure.destination.clone()).or_insert(self.unused);
        into.used += departure.vm.network_in;
    }
}

fn predict(
    departure: &Departure<'_>,
    bandwidth: BitsPerSec,
    terms: &HostTerms,
) -> Range<Prediction> {
    match departure.mode {
        Mode::Cold => cold(terms.cold, departure.vm, bandwidth.bytes_per_sec()),
        mode => {
            let model = match mode {
                Mode::PostCopy | Mode::ScatterGather => post_copy,
                _ => pre_copy,
            };
            let rate = bandwidth.bytes_per_sec();
            range(model, departure.vm, rate, terms.experience.error, &terms.criteria)
        }
    }
}
