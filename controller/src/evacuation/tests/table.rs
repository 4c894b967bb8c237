//! Every phase with every event: where the VM stands afterwards.

use super::*;

/// An evacuation of one VM, `a`, on its first leg (to h2), standing in `phase`.
pub(super) fn standing_at(phase: VmPhase) -> Evacuation {
    let (mut evacuation, _) = begun(&["a"], order("h1"));
    let going = if phase == VmPhase::Gathering { scattered } else { choice };
    let chosen = Event::Chosen { choice: Some(going("a", "h2")), no_place: vec![] };
    let reserved = Event::Reserved { migration: migration(1), reserved: Reserved::default() };
    let prepared = Event::Prepared { migration: migration(1), ticket: ticket() };
    let failed = Event::StartFailed { migration: migration(1), reason: "no".to_owned() };
    let released = Event::Released { migration: migration(1), failures: vec![] };
    let unsure = Event::Settled {
        migration: migration(1),
        settlement: Settlement::Uncertain { reason: "silent".to_owned() },
    };
    let sending = vec![chosen.clone(), reserved.clone(), prepared];
    let with = |more: Vec<Event>| sending.iter().cloned().chain(more).collect();
    let way: Vec<Event> = match phase {
        VmPhase::Measuring => vec![],
        VmPhase::Reserving => vec![chosen],
        VmPhase::Preparing => vec![chosen, reserved],
        VmPhase::Sending => sending,
        VmPhase::Committing => with(vec![progress(1, Phase::Committing)]),
        VmPhase::Settling => with(vec![failed]),
        VmPhase::Releasing => with(vec![progress(1, Phase::Completed)]),
        VmPhase::Gathering | VmPhase::Moved => with(vec![progress(1, Phase::Completed), released]),
        VmPhase::Lost => with(vec![progress(1, Phase::Lost), released]),
        VmPhase::Uncertain => with(vec![failed, unsure, released]),
        VmPhase::LeftBehind => vec![Event::CancelRequested],
        // Only while another VM has the slot.
        VmPhase::Waiting => {
            let (mut evacuation, _) = begun(&["b", "a"], order("h1"));
            let chosen = Event::Chosen { choice: Some(choice("b", "h2")), no_place: vec![] };
            evacuation.apply(UnixMs(1), chosen, &mut Vec::new());
            return evacuation;
        }
    };
    for event in way {
        evacuation.apply(UnixMs(1), event, &mut Vec::new());
    }
    assert_eq!(evacuation.record(&vm("a")).unwrap().phase, phase);
    evacuation
}

/// The events, named; all about migration `n`.
fn events(n: u32) -> Vec<(&'static str, Event)> {
    let migration = migration(n);
    let no = || "no".to_owned();
    let settled = |settlement| Event::Settled { migration: migration.clone(), settlement };
    vec![
        ("planned", Event::Planned { vms: vec![] }),
        ("chosen", Event::Chosen { choice: Some(choice("a", "h3")), no_place: vec![] }),
        ("none fits", Event::Chosen { choice: None, no_place: vec![(vm("a"), no())] }),
        (
            "reserved",
            Event::Reserved { migration: migration.clone(), reserved: Reserved::default() },
        ),
        ("reserve failed", Event::ReserveFailed { migration: migration.clone(), reason: no() }),
        (
            "rerouted",
            Event::Rerouted {
                migration: migration.clone(),
                hops: vec![],
                reserved: Reserved::default(),
            },
        ),
        ("cut off", Event::CutOff { migration: migration.clone(), reason: no() }),
        ("prepared", Event::Prepared { migration: migration.clone(), ticket: ticket() }),
        (
            "prepare failed",
            Event::PrepareFailed { migration: migration.clone(), reason: no(), store: None },
        ),
        ("started", Event::Started { migration: migration.clone() }),
        ("start failed", Event::StartFailed { migration: migration.clone(), reason: no() }),
        ("copying", progress(n, Phase::MemoryCopy)),
        ("committing", progress(n, Phase::Committing)),
        ("completed", progress(n, Phase::Completed)),
        ("failed", progress(n, Phase::Failed)),
        ("uncertain", progress(n, Phase::Uncertain)),
        ("lost", progress(n, Phase::Lost)),
        ("watch lost", Event::WatchLost { migration: migration.clone(), reason: no() }),
        ("settled: moved", settled(Settlement::Moved(None))),
        ("settled: stayed", settled(Settlement::Stayed { reason: no(), store: None })),
        ("settled: lost", settled(Settlement::Lost { reason: no() })),
        ("settled: uncertain", settled(Settlement::Uncertain { reason: no() })),
        ("released", Event::Released { migration: migration.clone(), failures: vec![] }),
        (
            "gathering",
            Event::Gathering(Box::new(MigrationProgress {
                migration: migration.to_string(),
                pages_total: 10,
                pages_arrived: 5,
                ..MigrationProgress::default()
            })),
        ),
        ("gathered", Event::Gathered { migration: migration.clone(), lost: None }),
        ("gathered: lost", Event::Gathered { migration: migration.clone(), lost: Some(no()) }),
        ("stores released", Event::StoresReleased { migration: migration.clone() }),
        ("cancel", Event::CancelRequested),
        ("restart", Event::Restarted),
        ("tick", Event::Tick),
    ]
}

/// Where the VM stands after `event` in `phase`; whatever is not named here changes nothing.
fn expected(phase: VmPhase, event: &str) -> VmPhase {
    use VmPhase::*;
    match (phase, event) {
        (Waiting | Measuring, "cancel") => LeftBehind,
        (Measuring, "chosen") => Reserving,
        (Measuring, "none fits") => LeftBehind,
        (Reserving, "reserved") => Preparing,
        (Reserving, "reserve failed") => Releasing,
        (Preparing, "prepared") => Sending,
        (Preparing, "prepare failed") => Settling,
        // After a restart what had not begun is settled first.
        (Reserving | Preparing, "restart") => Settling,
        (Sending, "start failed") => Settling,
        (Sending | Committing, "watch lost" | "failed") => Settling,
        (Sending, "committing" | "uncertain") => Committing,
        (Sending | Committing, "completed" | "lost") => Releasing,
        (Committing | Settling, settled) if settled.starts_with("settled") => Releasing,
        (Releasing, "released") => Moved,
        (Gathering, "gathered") => Moved,
        (Gathering, "gathered: lost") => Lost,
        (Uncertain, "completed" | "settled: moved") => Moved,
        (Uncertain, "failed" | "settled: stayed") => LeftBehind,
        (Uncertain, "lost" | "settled: lost") => Lost,
        (same, _) => same,
    }
}

#[test]
fn every_event_in_every_phase_leads_where_the_picture_says() {
    for phase in VmPhase::ALL {
        for (name, event) in events(1) {
            let mut evacuation = standing_at(phase);
            let mut actions = Vec::new();
            let change = evacuation.apply(UnixMs(2), event, &mut actions);
            let found = evacuation.record(&vm("a")).unwrap().phase;
            // A VM that waits is chosen among at once; measuring is waiting with the question asked.
            assert_eq!(found, expected(phase, name), "{phase:?} + {name}");
            if change != Change::State {
                assert!(actions.is_empty(), "{phase:?} + {name}: acts without a durable state");
            }
        }
    }
}

#[test]
fn a_late_word_about_an_older_attempt_changes_nothing() {
    let about_a_migration =
        |name: &str| !matches!(name, "chosen" | "none fits" | "cancel" | "restart" | "planned");
    for phase in VmPhase::ALL {
        for (name, event) in events(99).into_iter().filter(|(name, _)| about_a_migration(name)) {
            let mut evacuation = standing_at(phase);
            let before = evacuation.clone();
            let change = evacuation.apply(UnixMs(2), event, &mut Vec::new());
            assert_eq!(change, Change::Nothing, "{phase:?} + {name}");
            assert_eq!(evacuation, before, "{phase:?} + {name}");
        }
    }
}
