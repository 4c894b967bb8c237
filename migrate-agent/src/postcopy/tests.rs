//! Gathering over random orders of events, with what must always hold checked after each; and a
//! driver that answers everything, which must come to the end.

use std::collections::BTreeSet;

use lifeboat_scatter_gather::page::PackId;
use proptest::prelude::*;

use super::service::{Batch, SOURCE_AHEAD};
use super::*;

const PAGES: u32 = 40;

fn page(page: u32) -> PageAt {
    PageAt { block: 0, page }
}

/// Where the test's guest has its pages: packs of four, the source, zeroes.
fn home(number: u32) -> Where {
    match number % 5 {
        0 => Where::Zero,
        1 => Where::AtSource,
        _ => Where::InPack { pack: PackId(u64::from(number / 8)), slot: (number % 8) as u16 },
    }
}

/// A gather whose guest is complete, or that still absorbs.
fn gather(complete: bool) -> Gather {
    let mut gather = Gather::new(Ledger::new(&[PAGES], PAGES.into()).unwrap(), 3);
    if complete {
        let mut actions = Vec::new();
        for number in 0..PAGES {
            gather.apply(Event::Noted(page(number), home(number)), &mut actions).unwrap();
        }
        gather.apply(Event::Complete, &mut actions).unwrap();
        assert_eq!(actions, [Action::Load]);
    }
    gather
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let at = || (0..PAGES + 2).prop_map(page);
    let event = prop_oneof![
        4 => at().prop_map(Event::Fault),
        4 => at().prop_map(Event::Came),
        2 => at().prop_map(Event::Failed),
        1 => at().prop_map(Event::Gone),
        4 => at().prop_map(Event::BatchCame),
        4 => (0..PAGES).prop_map(|n| Event::PackCame(page(n), home(n))),
        2 => (0..PAGES, 0..PAGES).prop_map(|(n, m)| Event::PackCame(page(n), home(m))),
        2 => Just(Event::BatchEnded),
        4 => Just(Event::Turn),
        2 => (0..PAGES).prop_map(|n| Event::Noted(page(n), home(n))),
        1 => Just(Event::Complete),
        2 => Just(Event::Loaded),
        2 => Just(Event::Committed),
        1 => Just(Event::Shut),
        1 => prop::bool::weighted(0.1).prop_map(|abort| if abort { Event::Abort } else { Event::Turn }),
    ];
    prop::collection::vec(event, 0..300)
}

/// What must hold whatever happens.
#[derive(Default)]
struct Watch {
    placed: BTreeSet<PageAt>,
    wanted: BTreeSet<(PageAt, String)>,
    /// Under way, in the order in which they end.
    batches: Vec<Batch>,
    resumed: u32,
    closed: u32,
}

impl Watch {
    fn event(&mut self, event: Event) {
        match event {
            Event::BatchEnded if !self.batches.is_empty() => drop(self.batches.remove(0)),
            Event::Came(at) | Event::Failed(at) | Event::Gone(at) | Event::BatchCame(at) => {
                self.wanted.retain(|(wanted, _)| *wanted != at);
            }
            _ => {}
        }
    }

    fn action(&mut self, action: &Action) {
        match action {
            Action::Place(at) => assert!(self.placed.insert(*at), "{at} was placed twice"),
            Action::Zeroes(pages) => pages.iter().for_each(|at| {
                assert!(self.placed.insert(*at), "{at} was placed twice");
            }),
            Action::Fetch { at, place } => {
                assert!(!self.placed.contains(at), "{at} is fetched though it is here");
                let new = self.wanted.insert((*at, format!("{place:?}")));
                assert!(new, "{at} is fetched twice from one place");
            }
            Action::FetchBatch(batch) => {
                self.batches.push(batch.clone());
                let asked: Vec<PageAt> = self.batches.iter().flat_map(pages_of).collect();
                let different: BTreeSet<PageAt> = asked.iter().copied().collect();
                assert_eq!(asked.len(), different.len(), "a page is under way twice");
                match batch {
                    Batch::Pack(_) => assert_eq!(self.batches.len(), 1, "a pack is not alone"),
                    Batch::Source(_) => assert!(self.batches.len() <= SOURCE_AHEAD),
                }
            }
            Action::Resume => self.resumed += 1,
            Action::Close => {
                self.closed += 1;
                assert_eq!(self.placed.len(), PAGES as usize, "closed with pages missing");
            }
            Action::Load | Action::Finish => {}
        }
        assert!(self.resumed <= 1 && self.closed <= self.resumed, "not in this order");
    }
}

proptest! {
    #[test]
    fn what_must_hold_holds_in_any_order(complete in any::<bool>(), events in events()) {
        let mut gather = gather(complete);
        let mut watch = Watch::default();
        for event in events {
            let mut actions = Vec::new();
            let (before, stuck) = (gather.phase(), gather.stuck());
            if gather.apply(event, &mut actions).is_err() {
                prop_assert_eq!(actions, [], "a refused event does nothing");
                prop_assert_eq!((gather.phase(), gather.stuck()), (before, stuck));
                continue;
            }
            watch.event(event);
            actions.iter().for_each(|action| watch.action(action));
            prop_assert_eq!(gather.ledger().self_check(), Ok(()));
            prop_assert_eq!(gather.counts().placed as usize, watch.placed.len());
            if !gather.phase().is_serving() && gather.phase() == before {
                prop_assert!(!actions.iter().any(|a| matches!(a, Action::Place(_) | Action::Zeroes(_))));
            }
        }
    }

    #[test]
    fn a_driver_that_answers_comes_to_the_end(
        faults in prop::collection::vec(0..PAGES, 0..60),
        lose_batch in 0_usize..6,
    ) {
        let mut gather = gather(true);
        let mut watch = Watch::default();
        let mut todo: Vec<Event> = vec![Event::Loaded, Event::Committed];
        let (mut faults, mut batches) = (faults.into_iter(), 0);
        for _ in 0..2000 {
            let event = todo.pop_first().or_else(|| faults.next().map(|n| Event::Fault(page(n))));
            let event = event.unwrap_or(Event::Turn);
            let mut actions = Vec::new();
            gather.apply(event, &mut actions).unwrap();
            watch.event(event);
            for action in &actions {
                watch.action(action);
                match action {
                    Action::Fetch { at, .. } => todo.push(Event::Came(*at)),
                    Action::FetchBatch(batch) => {
                        batches += 1;
                        let came = if batches == lose_batch { Vec::new() } else { pages_of(batch) };
                        let place = |at: PageAt| gather.ledger().find(at).unwrap();
                        todo.extend(came.into_iter().map(|at| match batch {
                            Batch::Pack(_) => Event::PackCame(at, place(at)),
                            Batch::Source(_) => Event::BatchCame(at),
                        }));
                        todo.push(Event::BatchEnded);
                    }
                    Action::Close => todo.push(Event::Shut),
                    _ => {}
                }
            }
            if gather.phase() == Phase::Done {
                break;
            }
        }
        prop_assert_eq!(gather.phase(), Phase::Done);
        prop_assert_eq!(watch.placed.len(), PAGES as usize);
    }
}

/// Takes from the front: events are answered in the order in which they came about.
trait PopFirst {
    fn pop_first(&mut self) -> Option<Event>;
}

impl PopFirst for Vec<Event> {
    fn pop_first(&mut self) -> Option<Event> {
        (!self.is_empty()).then(|| self.remove(0))
    }
}

fn pages_of(batch: &Batch) -> Vec<PageAt> {
    match batch {
        Batch::Source(pages) => pages.clone(),
        Batch::Pack(pack) => (0..PAGES)
            .filter(|n| matches!(home(*n), Where::InPack { pack: of, .. } if of == *pack))
            .map(page)
            .collect(),
    }
}

fn does(gather: &mut Gather, event: Event) -> Vec<Action> {
    let mut actions = Vec::new();
    gather.apply(event, &mut actions).unwrap();
    actions
}

#[test]
fn a_demand_goes_ahead_of_the_background_and_draws_it_near() {
    let mut gather = gather(true);
    assert_eq!(does(&mut gather, Event::Turn), [Action::FetchBatch(Batch::Pack(PackId(0)))]);
    let place = home(34);
    assert_eq!(does(&mut gather, Event::Fault(page(34))), [Action::Fetch { at: page(34), place }]);
    assert_eq!(does(&mut gather, Event::Fault(page(34))), [], "once is enough");
    assert_eq!(does(&mut gather, Event::Turn), [], "one batch at a time");
    does(&mut gather, Event::BatchEnded);
    assert_eq!(does(&mut gather, Event::Turn), [Action::FetchBatch(Batch::Pack(PackId(4)))]);
}

#[test]
fn the_source_is_asked_for_the_next_batch_while_one_is_on_its_way() {
    let mut gather = gather(true);
    let stored = (0..PAGES).filter(|n| matches!(home(*n), Where::InPack { .. }));
    for number in stored {
        does(&mut gather, Event::BatchCame(page(number)));
    }
    let batch = |numbers: &[u32]| {
        [Action::FetchBatch(Batch::Source(numbers.iter().map(|n| page(*n)).collect()))]
    };
    assert_eq!(does(&mut gather, Event::Turn), batch(&[1, 6, 11]));
    assert_eq!(does(&mut gather, Event::Turn), batch(&[16, 21, 26]));
    assert_eq!(does(&mut gather, Event::Turn), [], "two are enough");
    // It did not come.
    does(&mut gather, Event::BatchEnded);
    assert_eq!(does(&mut gather, Event::Turn), batch(&[31, 36]));
    does(&mut gather, Event::BatchCame(page(16)));
    does(&mut gather, Event::BatchEnded);
    assert_eq!(does(&mut gather, Event::Turn), batch(&[1, 6, 11]), "what did not come, again");
    does(&mut gather, Event::BatchEnded);
    assert_eq!(does(&mut gather, Event::Turn), batch(&[21, 26, 31]));
}

#[test]
fn a_page_of_zeroes_is_placed_on_the_spot() {
    let mut gather = gather(true);
    assert_eq!(does(&mut gather, Event::Fault(page(5))), [Action::Zeroes(vec![page(5)])]);
    assert_eq!(does(&mut gather, Event::Fault(page(5))), []);
}

#[test]
fn a_demand_that_the_background_answers_is_not_placed_again() {
    let mut gather = gather(true);
    does(&mut gather, Event::Fault(page(2)));
    assert_eq!(does(&mut gather, Event::BatchCame(page(2))), [Action::Place(page(2))]);
    assert_eq!(does(&mut gather, Event::Came(page(2))), []);
}

#[test]
fn what_is_in_a_pack_counts_only_where_the_page_is_said_to_be_there() {
    let mut gather = gather(true);
    let old = home(2);
    let new = Where::InPack { pack: PackId(9), slot: 0 };
    assert!(matches!(old, Where::InPack { .. }));
    does(&mut gather, Event::Noted(page(2), new));
    assert_eq!(does(&mut gather, Event::PackCame(page(2), old)), [], "it was written to since");
    assert_eq!(does(&mut gather, Event::PackCame(page(2), new)), [Action::Place(page(2))]);
    assert_eq!(does(&mut gather, Event::PackCame(page(2), new)), []);
}

#[test]
fn a_page_without_a_way_is_fetched_when_the_source_tells_another() {
    let mut gather = gather(true);
    does(&mut gather, Event::Fault(page(2)));
    does(&mut gather, Event::Gone(page(2)));
    assert_eq!(gather.stuck(), 1);
    does(&mut gather, Event::Loaded);
    let refused = gather.apply(Event::Committed, &mut Vec::new());
    assert_eq!(refused, Err(GatherError::Stuck(1)), "COMMIT would lose the guest");
    assert_eq!(does(&mut gather, Event::Fault(page(2))), []);
    let place = Where::InPack { pack: PackId(9), slot: 0 };
    let actions = does(&mut gather, Event::Noted(page(2), place));
    assert_eq!(actions, [Action::Fetch { at: page(2), place }]);
    assert_eq!(gather.stuck(), 0);
}

#[test]
fn nothing_is_served_before_every_page_is_known() {
    let mut gather = gather(false);
    let early = gather.apply(Event::Fault(page(0)), &mut Vec::new());
    assert_eq!(early, Err(GatherError::TooEarly(page(0))));
    let incomplete = gather.apply(Event::Complete, &mut Vec::new());
    let error = LedgerError::Incomplete { missing: PAGES.into(), first: page(0) };
    assert_eq!(incomplete, Err(GatherError::Pages(error)));
    assert_eq!(gather.phase(), Phase::Absorbing);
}
