//! By which mode a VM moves when the operator leaves it to us, and why.
//!
//! `plan` asks for each VM, once it is known where it goes. Pre-copy is what loses nothing when
//! anything fails before the hand-over, and is kept unless it fails its purpose: where the
//! destination cannot take what the source may send, the source is free far sooner when the pages wait
//! at intermediaries (SOLive, figure 8); where a guest writes faster than its path carries, its pages
//! have to follow it. Never cold, which stops the guest: that has to be asked for by name. Not here:
//! which intermediaries ([`crate::intermediary`]), and the models ([`crate::predict`]).

use std::time::Duration;

use lifeboat_protocol::terms::Mode;

use crate::predict::Prediction;

/// Scattering costs memory and bandwidth of other hosts, and puts the only copy of pages there: it
/// has to free the source in less than this share of the time that the direct way takes.
const WORTH_SCATTERING: f64 = 0.7;

/// What one VM would take by each mode, or why it cannot.
#[derive(Debug, Clone, PartialEq)]
pub struct ModeFacts {
    /// By pre-copy.
    pub pre_copy: Prediction,
    /// By post-copy.
    pub post_copy: Result<Prediction, String>,
    /// Until all of it is off the source when its pages are scattered.
    pub eviction: Result<Duration, String>,
}

/// A mode, and what speaks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChosenMode {
    /// Which.
    pub mode: Mode,
    /// Why this one.
    pub why: String,
    /// Why not another one, where that cannot be.
    pub refusals: Vec<String>,
}

impl ChosenMode {
    /// What the operator named.
    #[must_use]
    pub fn asked_for(mode: Mode) -> Self {
        Self { mode, why: "asked for".to_owned(), refusals: Vec::new() }
    }
}

/// Chooses. The same facts give the same answer.
#[must_use]
pub fn choose(facts: &ModeFacts) -> ChosenMode {
    let ModeFacts { pre_copy, post_copy, eviction } = facts;
    // The best that there is without intermediaries.
    let (direct, by) = match post_copy {
        Ok(post_copy) if !pre_copy.converges => (post_copy, Mode::PostCopy),
        _ => (pre_copy, Mode::PreCopy),
    };
    let refusal = |mode: Mode, why: &String| format!("{mode}: {why}");
    let refusals = [
        eviction.as_ref().err().map(|why| refusal(Mode::ScatterGather, why)),
        post_copy.as_ref().err().map(|why| refusal(Mode::PostCopy, why)),
    ];
    let refusals = refusals.into_iter().flatten().collect();
    if let Ok(eviction) = eviction
        && eviction.as_secs_f64() < WORTH_SCATTERING * direct.total_time.as_secs_f64()
    {
        let why = format!(
            "its pages are off the source after {}; by {by} that takes {}",
            words(*eviction),
            words(direct.total_time)
        );
        return ChosenMode { mode: Mode::ScatterGather, why, refusals };
    }
    let why = match (pre_copy.converges, by) {
        (true, _) => "it gets there, and loses nothing if anything fails on the way".to_owned(),
        (false, Mode::PostCopy) => format!(
            "it writes faster than its path carries: by {} it would stand for {}",
            Mode::PreCopy,
            words(pre_copy.downtime)
        ),
        (false, _) => {
            "it writes faster than its path carries, and nothing else is possible".to_owned()
        }
    };
    ChosenMode { mode: by, why, refusals }
}

fn words(time: Duration) -> String {
    match time.as_secs() {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        seconds => format!("{seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_protocol::units::Bytes;

    fn takes(seconds: u64, converges: bool) -> Prediction {
        Prediction {
            iterations: 3,
            total_time: Duration::from_secs(seconds),
            downtime: Duration::from_millis(if converges { 100 } else { 4000 }),
            bytes: Bytes::from_mib(200),
            converges,
        }
    }

    fn facts(converges: bool) -> ModeFacts {
        ModeFacts {
            pre_copy: takes(20, converges),
            post_copy: Ok(takes(10, true)),
            eviction: Ok(Duration::from_secs(15)),
        }
    }

    #[test]
    fn what_gets_there_by_pre_copy_is_not_put_at_risk() {
        let chosen = choose(&facts(true));
        assert_eq!((chosen.mode, chosen.refusals.len()), (Mode::PreCopy, 0));
    }

    #[test]
    fn pages_wait_elsewhere_where_that_frees_the_source_much_sooner() {
        let narrow = ModeFacts { eviction: Ok(Duration::from_secs(6)), ..facts(true) };
        let chosen = choose(&narrow);
        assert_eq!(chosen.mode, Mode::ScatterGather);
        assert!(chosen.why.contains("6.0 s") && chosen.why.contains("20 s"), "{}", chosen.why);
        // Nearly as soon is not enough: others' memory and bandwidth pay for it.
        let hardly = ModeFacts { eviction: Ok(Duration::from_secs(14)), ..facts(true) };
        assert_eq!(choose(&hardly).mode, Mode::PreCopy);
    }

    #[test]
    fn a_guest_that_writes_too_fast_is_followed_by_its_pages_if_it_may() {
        let chosen = choose(&facts(false));
        assert_eq!(chosen.mode, Mode::PostCopy);
        assert!(chosen.why.contains("stand for 4.0 s"), "{}", chosen.why);
        let forbidden = "its owner forbids it".to_owned();
        let may_not = ModeFacts {
            post_copy: Err(forbidden.clone()),
            eviction: Err(forbidden),
            ..facts(false)
        };
        let chosen = choose(&may_not);
        assert_eq!((chosen.mode, chosen.refusals.len()), (Mode::PreCopy, 2));
        assert_eq!(chosen.refusals[1], "post-copy: its owner forbids it");
    }
}
