//! Which segment is next in a pass over everything: the one that was written least, lately.
//!
//! `passes` asks while a pass goes on. What is written after it was sent goes twice, so what is written
//! most goes last; but when the pass begins the mount is moments old, and knows nothing of that yet. An
//! order that was settled then would be that of the disk.
//!
//! A segment's heat are its writes, and those of [`HALF_LIFE`] ago count half. Each has one turn in a pass,
//! however hot it is. Pure. Deliberately not here: disks that follow their VM (`rank`), and which blocks of a
//! segment are dirty.

use std::time::{Duration, Instant};

use super::rank::Weights;
use crate::disk::track::Traffic;

/// Some segments' worth of sending at 1 Gbit/s, and shorter than a pass.
const HALF_LIFE: Duration = Duration::from_secs(10);

/// A disk's number, and a segment's on it.
pub type Place = (u16, u64);

/// How hot each segment of a VM's disks is.
#[derive(Debug, Clone, PartialEq)]
pub struct Heat {
    weights: Weights,
    looked: Option<Instant>,
    disks: Vec<Vec<Segment>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Segment {
    heat: f64,
    /// The writes that it had when it was last looked at.
    seen: u32,
}

impl Heat {
    /// Nothing is hot. Where writes weigh nothing, nothing becomes hot.
    #[must_use]
    pub fn new(weights: Weights) -> Self {
        Self { weights, looked: None, disks: Vec::new() }
    }

    /// Takes in what each segment of each disk has seen by `now`, since it is counted.
    pub fn look(&mut self, now: Instant, traffic: &[Vec<Traffic>]) {
        let before = self.looked.replace(now).unwrap_or(now);
        let age = now.saturating_duration_since(before).as_secs_f64();
        let kept = 0.5_f64.powf(age / HALF_LIFE.as_secs_f64());
        self.disks.resize_with(self.disks.len().max(traffic.len()), Vec::new);
        for (disk, traffic) in self.disks.iter_mut().zip(traffic) {
            disk.resize(disk.len().max(traffic.len()), Segment::default());
            for (segment, now) in disk.iter_mut().zip(traffic) {
                let writes = now.writes.saturating_sub(segment.seen);
                let new = self.weights.rank(Traffic { reads: 0, writes });
                *segment = Segment { heat: segment.heat * kept + new, seen: now.writes };
            }
        }
    }

    /// Orders `waiting` so that the next one is at its end. Those that are equally hot have the order that
    /// they have on disk: that reads fastest.
    pub fn order(&self, waiting: &mut [Place]) {
        waiting.sort_unstable_by(|a, b| self.of(*b).total_cmp(&self.of(*a)).then(b.cmp(a)));
    }

    fn of(&self, (disk, segment): Place) -> f64 {
        let segments = self.disks.get(usize::from(disk));
        let segment = usize::try_from(segment).ok().and_then(|at| segments?.get(at));
        segment.map_or(0.0, |segment| segment.heat)
    }

    /// The memory that it takes, bytes.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.disks.iter().map(|disk| disk.len() * size_of::<Segment>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn written(writes: &[u32]) -> Vec<Traffic> {
        writes.iter().map(|writes| Traffic { reads: 9, writes: *writes }).collect()
    }

    /// All of two disks of four segments and one, as they have their turns.
    fn turns(heat: &Heat) -> Vec<Place> {
        let mut waiting = vec![(1, 0), (0, 2), (0, 0), (0, 3), (0, 1)];
        heat.order(&mut waiting);
        waiting.reverse();
        waiting
    }

    #[test]
    fn what_was_written_most_goes_last_and_the_rest_in_the_order_of_the_disks() {
        let mut heat = Heat::new(Weights::default());
        assert_eq!(turns(&heat), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]);
        heat.look(clock::now(), &[written(&[7, 0, 50, 0]), written(&[1])]);
        assert_eq!(turns(&heat), [(0, 1), (0, 3), (1, 0), (0, 0), (0, 2)]);
    }

    #[test]
    fn what_was_written_just_now_is_hotter_than_what_was_written_more_before() {
        let mut heat = Heat::new(Weights::default());
        let began = clock::now();
        heat.look(began, &[written(&[100, 0])]);
        heat.look(began + HALF_LIFE, &[written(&[100, 49])]);
        assert_eq!(turns(&heat)[3..], [(0, 1), (0, 0)]);
        // 25 of what was, and 49 of which half has gone, too.
        heat.look(began + 2 * HALF_LIFE, &[written(&[100, 50])]);
        assert_eq!(turns(&heat)[3..], [(0, 0), (0, 1)]);
    }

    #[test]
    fn looking_twice_counts_a_write_once() {
        let (mut once, now) = (Heat::new(Weights::default()), clock::now());
        once.look(now, &[written(&[3, 5])]);
        let mut twice = once.clone();
        twice.look(now, &[written(&[3, 5])]);
        assert_eq!(once, twice);
    }

    #[test]
    fn where_writes_weigh_nothing_the_order_is_that_of_the_disk() {
        let mut heat = Heat::new(Weights::of_reads(1.0));
        heat.look(clock::now(), &[written(&[7, 0, 50, 0]), written(&[1])]);
        assert_eq!(turns(&heat), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]);
    }
}
