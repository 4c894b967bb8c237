//! One migration with one thing that breaks: begun, struck, repaired, and looked at.
//!
//! What breaks does so at a moment that chance decides within the phase where the docs promise that
//! nothing is lost. Before COMMIT that promise is that the guest runs on where it was. What may be lost
//! in some cases has to be said to be at the time ([`lost`]).

mod lost;

use std::fmt;
use std::time::Duration;

use lifeboat_tests::chance::Chance;
use lifeboat_tests::clock;
use lifeboat_tests::rig::RigError;
use lifeboat_tests::world::relay::State;
use lifeboat_tests::world::rest::Unrest;
use lifeboat_tests::world::{HOSTS_WITH_STORES, Host, VM, World, host_name};
use serde_json::Value;

/// A migration gets under way, and its source empty, within this time on a busy machine.
const MOMENT_LIMIT: Duration = Duration::from_secs(60);
/// It ends within this time once everything is repaired.
const END_LIMIT: Duration = Duration::from_secs(180);
/// All is at rest within this time after that.
const REST_LIMIT: Duration = Duration::from_secs(90);
/// As long as a link is cut (the issue of a cable pulled and plugged in again).
const CUT: Duration = Duration::from_secs(5);
/// A copy of this guest takes about so long here.
const COPY: Duration = Duration::from_millis(1500);

/// Where the destination's agent stays until it is let go: it has COMMIT, and tells QEMU next.
const STARTING: &str = "destination/before/start-guest";
/// About so long a guest takes from there to its first steps.
const STEPS: Duration = Duration::from_millis(80);

/// How the guest goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    PostCopy,
    Parity,
    Mirror,
    /// Over one store, which holds the only copy.
    Alone,
}

impl Way {
    /// How many stores it uses.
    const fn stores(self) -> usize {
        match self {
            Self::PostCopy | Self::Parity => 3,
            Self::Mirror => 2,
            Self::Alone => 1,
        }
    }
}

/// What breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blow {
    Nothing,
    /// The source's agent, at any moment.
    SourceAgent,
    /// The source, once it is empty: agent and QEMU, and what a reboot clears.
    SourcePower,
    /// One store, at any moment.
    Store,
    /// Two stores at once, at any moment. Once the source has gone what both held is lost, and has to be said
    /// to be.
    TwoStores,
    /// The destination's agent, at any moment.
    DestinationAgent,
    /// The destination's agent while the guest begins to run there: a device may hold QEMU's main loop
    /// at a page that is not there yet.
    StartingAgent,
    /// The destination's QEMU, while pages are elsewhere. The guest is lost, and has to be said to be; as it was
    /// at the switchover it is brought back by a claim while its source still has it.
    DestinationQemu,
    /// The link between source and destination, for five seconds.
    Link,
    /// The link between the destination and a store.
    StoreLink,
    /// The controller, at any moment.
    Controller,
}

/// A turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Case {
    way: Way,
    blow: Blow,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {:?}", self.way, self.blow)
    }
}

impl Case {
    /// Each once.
    fn all() -> Vec<Self> {
        use Blow::{
            Controller, DestinationAgent, Link, Nothing, SourceAgent, SourcePower, StartingAgent,
            Store, StoreLink,
        };
        let anywhere = [Nothing, SourceAgent, DestinationAgent, StartingAgent, Link, Controller];
        let with_stores = [SourcePower, Store, StoreLink];
        let mut all: Vec<Self> = anywhere.map(|blow| Self { way: Way::PostCopy, blow }).to_vec();
        for way in [Way::Parity, Way::Mirror] {
            let blows = anywhere.into_iter().chain(with_stores);
            all.extend(blows.map(|blow| Self { way, blow }));
        }
        let alone = anywhere.into_iter().chain([SourcePower, StoreLink]);
        all.extend(alone.map(|blow| Self { way: Way::Alone, blow }));
        all
    }

    /// Those in which the guest may be lost, as docs/elsewhere.md says; each once.
    fn losing() -> Vec<Self> {
        let two = [Way::Parity, Way::Mirror].map(|way| Self { way, blow: Blow::TwoStores });
        let ways = [Way::PostCopy, Way::Parity, Way::Mirror, Way::Alone];
        let died = ways.map(|way| Self { way, blow: Blow::DestinationQemu });
        two.into_iter().chain(died).collect()
    }

    /// Whether the guest may be lost in it.
    pub(crate) fn may_lose(self) -> bool {
        matches!(self.blow, Blow::TwoStores | Blow::DestinationQemu)
    }

    /// One for each blow that may lose nothing.
    pub(crate) fn few(chance: &mut Chance) -> Vec<Self> {
        let mut all = Self::all();
        chance.shuffle(&mut all);
        let mut few: Vec<Self> = Vec::new();
        for case in all {
            if few.iter().all(|chosen| chosen.blow != case.blow) {
                few.push(case);
            }
        }
        few
    }

    /// One of those whose name has `part` in it; of all where none has.
    pub(crate) fn by(chance: &mut Chance, part: &str) -> Self {
        let mut all = Self::all();
        all.extend(Self::losing());
        if all.iter().any(|case| case.to_string().contains(part)) {
            all.retain(|case| case.to_string().contains(part));
        }
        all[chance.below(all.len())]
    }
}

/// Why a turn did not end as it must.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The rig.
    #[error(transparent)]
    Rig(#[from] RigError),
    /// The guest is not where it must be, or not yet.
    #[error(transparent)]
    Unrest(#[from] Unrest),
    /// The controller says something else than what is.
    #[error("the guest is at {at}, and the controller says: {said}")]
    Untrue { at: String, said: String },
}

/// Who is who.
struct Roles {
    source: Host,
    destination: Host,
    stores: Vec<Host>,
}

/// How a turn ended as it may.
pub(crate) enum End {
    /// The guest lives where it is said to live.
    Lives(String),
    /// It is lost, and that was said in these words: its world has ended.
    Lost(String),
}

/// Plays `case` and says how it ended.
pub(crate) fn play(world: &mut World, case: Case, chance: &mut Chance) -> Result<End, Failure> {
    let source = world.running()?;
    world.control.await_sight(source)?;
    let mut others: Vec<Host> = (0..HOSTS_WITH_STORES).filter(|&host| host != source).collect();
    chance.shuffle(&mut others);
    let Some(destination) = others.pop() else {
        return Err(Unrest::Offence(vec!["there is one host".to_owned()]).into());
    };
    let roles = Roles { source, destination, stores: others };
    if case.blow == Blow::StartingAgent {
        world.agents[destination].start(Some(STARTING))?;
        world.control.await_sight(source)?;
    }
    let id = world.control.detached(&order(&roles, case.way))?;
    strike(world, case, &roles, &id, chance)?;
    if case.may_lose()
        && let Some(said) = lost::of(world, case, &id)?
    {
        return Ok(End::Lost(said));
    }
    repair(world, &roles, chance)?;
    let status = ended(world, &id)?;
    let at = world.at_rest(REST_LIMIT)?;
    let moved = status["migrations"][0]["phase"] == "moved";
    if moved != (at == destination) || (!moved && at != source) {
        return Err(Failure::Untrue { at: host_name(at), said: status.to_string() });
    }
    // Without a blow nothing may keep it.
    if case.blow == Blow::Nothing && !moved {
        return Err(Failure::Untrue { at: host_name(at), said: status.to_string() });
    }
    emptied(world)?;
    let said = format!("{} -> {}, {}", host_name(source), host_name(destination), outcome(&status));
    Ok(End::Lives(said))
}

fn outcome(status: &Value) -> String {
    let vm = &status["migrations"][0];
    match vm["phase"].as_str() {
        Some("moved") => format!("moved, empty after {} ms", vm["eviction_ms"]),
        _ => format!("stayed: {}", vm["reason"].as_str().unwrap_or_default()),
    }
}

fn order(roles: &Roles, way: Way) -> String {
    let to = host_name(roles.destination);
    let line = format!("migrate {VM} --to {to} --urgency 0 --yes");
    let stores = |count: usize| {
        let names: Vec<String> = roles.stores.iter().take(count).copied().map(host_name).collect();
        names.join(",")
    };
    let scatter = |count, redundancy| {
        let stores = stores(count);
        format!("{line} --mode scatter-gather --intermediaries {stores} --redundancy {redundancy}")
    };
    match way {
        Way::PostCopy => format!("{line} --mode post-copy"),
        Way::Parity => scatter(3, "parity"),
        Way::Mirror => scatter(2, "mirror"),
        Way::Alone => scatter(1, "none"),
    }
}

/// Waits for the moment and strikes.
fn strike(
    world: &mut World,
    case: Case,
    roles: &Roles,
    id: &str,
    chance: &mut Chance,
) -> Result<(), Failure> {
    if case.blow == Blow::Nothing {
        return Ok(());
    }
    if case.blow == Blow::StartingAgent {
        let agent = &world.agents[roles.destination];
        let held = clock::wait_for(MOMENT_LIMIT, || agent.holds().then_some(()));
        held.ok_or_else(|| world.late("the mark", MOMENT_LIMIT))?;
        agent.let_go();
        clock::rest(chance.up_to(STEPS));
        world.agents[roles.destination].kill();
        return Ok(());
    }
    if case.blow == Blow::SourcePower {
        let empty = |vm: &Value| vm["evicted"] == true;
        await_moment(world, id, "the source's end", empty)?;
        // One that stayed has not left its source: that must not be struck.
        if !migration(world, id).is_some_and(|vm| empty(&vm)) {
            return Ok(());
        }
        world.agents[roles.source].lose_power()?;
        return Ok(());
    }
    if case.blow == Blow::DestinationQemu {
        // Nothing of its pages leaves its source before it runs there.
        let share = |vm: &Value| vm["pages_total"].as_u64().filter(|pages| *pages > 0);
        await_moment(world, id, "pages there", |vm| {
            share(vm).is_some_and(|pages| vm["bytes_sent"].as_u64() > Some(pages * 4096 / 10))
        })?;
        // One that has everything is not between two hosts any more.
        if migration(world, id).is_some_and(|vm| vm["phase"] != "moved") {
            world.agents[roles.destination].kill_qemu();
        }
        return Ok(());
    }
    await_moment(world, id, "pages", |vm| vm["bytes_sent"].as_u64() > Some(0))?;
    clock::rest(chance.up_to(COPY));
    let (source, destination) = (roles.source, roles.destination);
    let used = case.way.stores();
    let first = chance.below(used.min(roles.stores.len()).max(1));
    let store = roles.stores[first];
    match case.blow {
        Blow::Nothing | Blow::SourcePower | Blow::StartingAgent | Blow::DestinationQemu => {}
        Blow::SourceAgent => world.agents[source].kill(),
        Blow::DestinationAgent => world.agents[destination].kill(),
        Blow::Store => world.agents[store].kill_stores(),
        Blow::TwoStores => {
            world.agents[store].kill_stores();
            world.agents[roles.stores[(first + 1) % used]].kill_stores();
        }
        Blow::Controller => world.control.kill(),
        Blow::Link => cut(world, source, destination),
        Blow::StoreLink => cut(world, destination, store),
    }
    Ok(())
}

fn cut(world: &World, one: Host, other: Host) {
    world.link(one, other, State::Silent);
    clock::rest(CUT);
}

/// The dead rise after a while, and the cut is healed.
fn repair(world: &mut World, roles: &Roles, chance: &mut Chance) -> Result<(), Failure> {
    for host in 0..HOSTS_WITH_STORES {
        for other in [roles.source, roles.destination] {
            world.link(host, other, State::Whole);
        }
    }
    clock::rest(chance.up_to(COPY));
    for agent in &mut world.agents {
        if !agent.lives() {
            agent.start(None)?;
        }
    }
    if !world.control.lives() {
        world.control.restart()?;
    }
    Ok(())
}

fn migration(world: &World, id: &str) -> Option<Value> {
    let mut status = world.control.status(id).ok()?;
    status.pointer_mut("/migrations/0").map(Value::take)
}

/// Waits until the migration has come so far, or has ended.
fn await_moment(
    world: &World,
    id: &str,
    what: &'static str,
    is_there: impl Fn(&Value) -> bool,
) -> Result<(), Failure> {
    let there = || {
        let vm = migration(world, id)?;
        let over =
            ["moved", "left-behind", "lost", "uncertain"].map(Value::from).contains(&vm["phase"]);
        (over || is_there(&vm)).then_some(())
    };
    let there = clock::wait_for(MOMENT_LIMIT, there);
    there.ok_or_else(|| world.late(what, MOMENT_LIMIT).into())
}

fn ended(world: &World, id: &str) -> Result<Value, Failure> {
    let ended = || {
        let status = world.control.status(id).ok()?;
        let state = status["state"].as_str()?;
        matches!(state, "done" | "partial" | "cancelled" | "failed").then_some(status)
    };
    let ended = clock::wait_for(END_LIMIT, ended);
    ended.ok_or_else(|| world.late("the migration's end", END_LIMIT).into())
}

/// No store is left anywhere once the guest has everything.
fn emptied(world: &World) -> Result<(), Failure> {
    let empty = || world.agents.iter().all(|agent| agent.stores().is_empty()).then_some(());
    let empty = clock::wait_for(REST_LIMIT, empty);
    empty.ok_or_else(|| world.late("the end of the stores", REST_LIMIT).into())
}
