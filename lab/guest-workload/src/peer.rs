//! One guest as the client has seen it: heartbeats, gaps, stream, verdict. Pure accounting.
//!
//! The client's loop tells it what came and when; the report reads it. No sockets here, so that
//! every judgement ("the ticks went backwards", "it was born again") is tested as a value.

use std::time::Duration;

use crate::gaps::Gaps;
use crate::heartbeat::Answer;

/// Boot ids that are kept: one is right, two are already the finding.
const BOOT_IDS: usize = 8;

/// What is known of one guest.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Heartbeats sent.
    pub(crate) asked: u64,
    /// Heartbeats answered (each sequence number counts once).
    pub(crate) answered: u64,
    /// Questions from before the guest first answered: it was still booting.
    pub(crate) before_first: u64,
    /// Answers that came a second time: a duplicated datagram, or **two guests alive**.
    pub(crate) repeated: u64,
    /// Times that the guest's own counters fell although the question was newer: it was set
    /// back to an earlier state, or two copies of it answer in turn.
    pub(crate) went_back: u64,
    /// Wrong pages and bytes that the guest itself has reported.
    pub(crate) guest_errors: u64,
    /// Wrong bytes that the client found on the checked stream.
    pub(crate) stream_errors: u64,
    /// Connections of the checked stream that were lost after they had carried data.
    pub(crate) stream_lost: u64,
    /// Bytes checked by the client on all streams.
    pub(crate) stream_bytes: u64,
    /// When the stream last brought something.
    pub(crate) stream_last: Option<Duration>,
    /// Boot ids in the order in which they were first seen.
    pub(crate) boot_ids: Vec<[u8; 16]>,
    /// The stretches without an answer.
    pub(crate) gaps: Gaps,
    last: Option<Answer>,
    seen: Seen,
}

impl Peer {
    /// Nothing is known yet; gaps over `threshold` will be kept.
    pub(crate) fn new(threshold: Duration) -> Self {
        Self {
            asked: 0,
            answered: 0,
            before_first: 0,
            repeated: 0,
            went_back: 0,
            guest_errors: 0,
            stream_errors: 0,
            stream_lost: 0,
            stream_bytes: 0,
            stream_last: None,
            boot_ids: Vec::new(),
            gaps: Gaps::new(threshold),
            last: None,
            seen: Seen::default(),
        }
    }

    /// The sequence number of the next question.
    pub(crate) fn next_question(&mut self) -> u64 {
        self.asked += 1;
        self.asked
    }

    /// An answer came.
    pub(crate) fn answered(&mut self, now: Duration, answer: Answer) {
        if answer.sequence == 0 || answer.sequence > self.asked {
            return; // not to a question of this run
        }
        if !self.seen.first_time(answer.sequence) {
            self.repeated += 1;
            return;
        }
        if self.answered == 0 {
            self.before_first = answer.sequence - 1;
        }
        self.answered += 1;
        self.gaps.answered(now);
        self.guest_errors = self.guest_errors.max(answer.errors);
        if !self.boot_ids.contains(&answer.boot_id) && self.boot_ids.len() < BOOT_IDS {
            self.boot_ids.push(answer.boot_id);
        }
        self.judge_order(answer);
    }

    /// A guest answers questions in the order in which they arrive, and the network may swap
    /// neighbours; so counters are compared only with the newest question's answer so far.
    fn judge_order(&mut self, answer: Answer) {
        match self.last {
            Some(last) if answer.sequence < last.sequence => return,
            Some(last) if fell(&last, &answer) => self.went_back += 1,
            _ => {}
        }
        self.last = Some(answer);
    }

    /// The checked stream brought `bytes` more.
    pub(crate) fn streamed(&mut self, now: Duration, bytes: u64) {
        if bytes > 0 {
            self.stream_bytes += bytes;
            self.stream_last = Some(now);
        }
    }

    /// Questions without an answer since the guest first answered; all, if it never did.
    pub(crate) fn lost(&self) -> u64 {
        (self.asked - self.answered).saturating_sub(self.before_first)
    }

    /// True when anything was found wrong in memory or on the stream.
    pub(crate) fn corrupt(&self) -> bool {
        self.guest_errors + self.stream_errors > 0
    }

    /// The newest answer.
    pub(crate) fn last(&self) -> Option<&Answer> {
        self.last.as_ref()
    }
}

fn fell(last: &Answer, answer: &Answer) -> bool {
    answer.boot_id == last.boot_id
        && (answer.tick <= last.tick
            || answer.writes < last.writes
            || answer.checked < last.checked)
}

/// Which of the newest 64 sequence numbers were seen. Older ones count as seen: an answer that
/// is 64 questions late has already been counted as lost time.
#[derive(Debug, Default)]
struct Seen {
    newest: u64,
    bits: u64,
}

impl Seen {
    fn first_time(&mut self, sequence: u64) -> bool {
        if sequence > self.newest {
            let step = sequence - self.newest;
            self.bits = if step < 64 { self.bits << step } else { 0 } | 1;
            self.newest = sequence;
            return true;
        }
        let age = self.newest - sequence;
        let bit = if age < 64 { 1 << age } else { return false };
        let first = self.bits & bit == 0;
        self.bits |= bit;
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(sequence: u64, tick: u64) -> Answer {
        Answer { sequence, tick, writes: tick, checked: tick, ..Answer::default() }
    }

    fn asked(count: u64) -> Peer {
        let mut peer = Peer::new(Duration::from_millis(50));
        (0..count).for_each(|_| {
            peer.next_question();
        });
        peer
    }

    #[test]
    fn answers_in_order_are_a_healthy_guest() {
        let mut peer = asked(3);
        (1..=3).for_each(|n| peer.answered(Duration::from_millis(n * 10), answer(n, n)));
        assert_eq!((peer.answered, peer.lost(), peer.went_back, peer.repeated), (3, 0, 0, 0));
        assert!(!peer.corrupt());
        assert_eq!(peer.boot_ids.len(), 1);
    }

    #[test]
    fn a_guest_that_runs_twice_is_seen() {
        // Two copies answer every question: the second answer is a repetition.
        let mut peer = asked(2);
        peer.answered(Duration::ZERO, answer(1, 100));
        peer.answered(Duration::ZERO, answer(1, 90));
        assert_eq!((peer.answered, peer.repeated), (1, 1));
        // Or they answer in turn, each with its own counter.
        peer.answered(Duration::ZERO, answer(2, 91));
        assert_eq!(peer.went_back, 1);
    }

    #[test]
    fn a_guest_born_again_shows_two_boot_ids() {
        let mut peer = asked(2);
        peer.answered(Duration::ZERO, answer(1, 100));
        peer.answered(Duration::ZERO, Answer { boot_id: [1; 16], ..answer(2, 1) });
        assert_eq!((peer.boot_ids.len(), peer.went_back), (2, 0));
    }

    #[test]
    fn swapped_datagrams_are_no_setback() {
        let mut peer = asked(3);
        for n in [1, 3, 2] {
            peer.answered(Duration::ZERO, answer(n, n));
        }
        assert_eq!((peer.answered, peer.went_back), (3, 0));
    }

    #[test]
    fn an_answer_to_no_question_of_ours_is_ignored() {
        let mut peer = asked(1);
        peer.answered(Duration::ZERO, answer(77, 1));
        assert_eq!((peer.answered, peer.lost()), (0, 1));
    }

    #[test]
    fn questions_to_a_booting_guest_are_not_lost() {
        let mut peer = asked(10);
        assert_eq!(peer.lost(), 10, "a guest that never answers has lost them all");
        peer.answered(Duration::ZERO, answer(7, 1));
        peer.answered(Duration::ZERO, answer(9, 2));
        assert_eq!((peer.before_first, peer.lost()), (6, 2));
    }

    #[test]
    fn a_guests_own_verdict_sticks() {
        let mut peer = asked(2);
        peer.answered(Duration::ZERO, Answer { errors: 1, ..answer(1, 1) });
        peer.answered(Duration::ZERO, answer(2, 2));
        assert!(peer.corrupt());
    }

    proptest! {
        #[test]
        fn any_answers_keep_the_sums_right(
            all in proptest::collection::vec((0u64..120, any::<u64>()), 0..300),
        ) {
            let mut peer = asked(100);
            for (sequence, tick) in all {
                peer.answered(Duration::ZERO, answer(sequence, tick));
                prop_assert!(peer.answered <= peer.asked);
            }
        }
    }
}
