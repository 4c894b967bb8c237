//! Who leaves in which way, for which destination: the cases of figure 8.
//!
//! Used by its experiment and by its pictures. How a case is measured is not known here.

use lifeboat_protocol::units::BitsPerSec;

use super::super::Arm;

/// Who moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mover {
    /// The controller, as the arm's words say.
    Lifeboat,
    /// QEMU alone, by its own post-copy, a guest that is the other's twin.
    Qemu,
}

/// A case: how a guest leaves, and the host where it goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case {
    pub(super) arm: Arm,
    pub(super) mover: Mover,
    pub(super) to: &'static str,
    /// At most so many times its floor; `None` where the destination decides, or what is compared is
    /// only drawn.
    pub(super) bound: Option<f64>,
    /// Measured in every round; the others in the first one only.
    pub(super) each_round: bool,
}

impl Case {
    const fn ours(
        name: &'static str,
        to: &'static str,
        words: &'static [&'static str],
        bound: Option<f64>,
    ) -> Self {
        Self { arm: Arm::new(name, words), mover: Mover::Lifeboat, to, bound, each_round: true }
    }

    const fn qemu(name: &'static str, to: &'static str) -> Self {
        Self { arm: Arm::new(name, &[]), mover: Mover::Qemu, to, bound: None, each_round: true }
    }

    const fn once(self) -> Self {
        Self { each_round: false, ..self }
    }

    /// About how long it takes with all that belongs to it, in seconds, for a guest of so many `bits` and
    /// a destination that takes them in at `rate`.
    pub(super) fn about_seconds(&self, bits: u64, rate: BitsPerSec) -> u64 {
        // A guest of ours comes back, between two tests of iperf3; QEMU's is booted and ended.
        let (back, beside) = match self.mover {
            Mover::Lifeboat => (bits / super::RESERVED, 40),
            Mover::Qemu => (0, 60),
        };
        bits / rate.0.max(1) + back + beside
    }
}

const POST_COPY: &[&str] = &["--mode", "post-copy"];

macro_rules! scatter {
    ($hosts:literal, $redundancy:literal) => {
        &["--mode", "scatter-gather", "--intermediaries", $hosts, "--redundancy", $redundancy]
    };
}

pub(super) const POST_COPY_5: &str = "post-copy, destination 5/9";
pub(super) const POST_COPY_1: &str = "post-copy, destination 1/8";
pub(super) const QEMU_5: &str = "QEMU alone, post-copy, destination 5/9";
pub(super) const QEMU_1: &str = "QEMU alone, post-copy, destination 1/8";
pub(super) const THREE: &str = "scatter, 3 intermediaries";
pub(super) const THREE_1: &str = "scatter, 3, destination 1/8";

/// The first [`QUICK`] are those of a first look. Where a destination only fills the line between two that are
/// measured in every round, one run draws it.
pub(super) const CASES: [Case; 26] = [
    Case::ours(POST_COPY_5, "d5", POST_COPY, None),
    Case::ours(THREE, "d5", scatter!("i1,i2,i3", "none"), Some(1.10)),
    Case::ours("scatter, 3, parity", "d5", scatter!("i1,i2,i3", "parity"), Some(1.10)),
    Case::ours("scatter, 2, mirror", "d5", scatter!("i1,i2", "mirror"), Some(1.10)),
    Case::ours("scatter, 2 intermediaries", "d5", scatter!("i1,i2", "none"), Some(1.10)),
    Case::ours("scatter, 1 intermediary", "d5", scatter!("i1", "none"), Some(1.15)),
    Case::ours("scatter, 3 at 1/3 each", "d5", scatter!("t1,t2,t3", "none"), None),
    Case::qemu(QEMU_5, "d5"),
    Case::ours("post-copy, destination 9/9", "d9", POST_COPY, None),
    Case::qemu("QEMU alone, post-copy, destination 9/9", "d9"),
    Case::ours(POST_COPY_1, "d1", POST_COPY, None),
    Case::ours(THREE_1, "d1", scatter!("i1,i2,i3", "none"), Some(1.10)),
    Case::qemu(QEMU_1, "d1"),
    Case::ours("post-copy, destination 6/9", "d6", POST_COPY, None).once(),
    Case::ours("post-copy, destination 7/9", "d7", POST_COPY, None).once(),
    Case::ours("post-copy, destination 8/9", "d8", POST_COPY, None).once(),
    Case::qemu("QEMU alone, post-copy, destination 6/9", "d6").once(),
    Case::qemu("QEMU alone, post-copy, destination 7/9", "d7").once(),
    Case::qemu("QEMU alone, post-copy, destination 8/9", "d8").once(),
    Case::ours("scatter, 3, destination 6/9", "d6", scatter!("i1,i2,i3", "none"), Some(1.10))
        .once(),
    Case::ours("scatter, 3, destination 7/9", "d7", scatter!("i1,i2,i3", "none"), Some(1.10))
        .once(),
    Case::ours("scatter, 3, destination 8/9", "d8", scatter!("i1,i2,i3", "none"), Some(1.10))
        .once(),
    Case::ours("scatter, 3, destination 9/9", "d9", scatter!("i1,i2,i3", "none"), Some(1.10))
        .once(),
    Case::ours("scatter, 2, destination 9/9", "d9", scatter!("i1,i2", "none"), Some(1.10)).once(),
    Case::ours("scatter, 1, destination 9/9", "d9", scatter!("i1", "none"), Some(1.15)).once(),
    Case::ours("scatter, 3 at 1/3 each, destination 9/9", "d9", scatter!("t1,t2,t3", "none"), None)
        .once(),
];
/// How many of them are those of a first look.
pub(super) const QUICK: usize = 3;

/// What the lines of the picture by destination go through: who, from which cases.
pub(super) const LINES: [(&str, Mover, &[&str]); 3] = [
    ("QEMU's own post-copy", Mover::Qemu, &[]),
    ("post-copy", Mover::Lifeboat, POST_COPY),
    ("scatter, 3 intermediaries", Mover::Lifeboat, scatter!("i1,i2,i3", "none")),
];
/// What destinations have reserved, in % of a link of 200 Mbit/s.
pub(super) const DESTINATIONS: [(f64, &str); 6] =
    [(11.25, "d1"), (50.0, "d5"), (60.0, "d6"), (70.0, "d7"), (80.0, "d8"), (90.0, "d9")];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_case_is_named_once_and_each_line_has_all_destinations() {
        let names: BTreeSet<&str> = CASES.iter().map(|case| case.arm.name).collect();
        assert_eq!(names.len(), CASES.len());
        for (line, mover, words) in LINES {
            for (_, host) in DESTINATIONS {
                let on_it =
                    |case: &&Case| (case.mover, case.arm.words, case.to) == (mover, words, host);
                assert_eq!(CASES.iter().filter(on_it).count(), 1, "{line} to {host}");
            }
        }
    }
}
