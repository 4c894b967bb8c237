//! Plays one kill point in a world: brings the hand-over to the moment, strikes, repairs, and looks
//! whether the VM runs exactly once, unharmed, and where it may.

use std::time::Duration;

use lifeboat_tests::chance::Chance;
use lifeboat_tests::clock;
use lifeboat_tests::rig::RigError;
use lifeboat_tests::world::control::Attended;
use lifeboat_tests::world::relay::State;
use lifeboat_tests::world::rest::Unrest;
use lifeboat_tests::world::{Host, VM, World, host_name};

use crate::cases::{Blow, Case, End, Moment, Side};

/// A moment comes within this time, on a busy machine.
const MOMENT_LIMIT: Duration = Duration::from_secs(60);
/// An evacuation ends within this time once everything is repaired.
const END_LIMIT: Duration = Duration::from_secs(150);
/// All is at rest within this time after that.
const REST_LIMIT: Duration = Duration::from_secs(60);

/// Why a kill point did not end as it must.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The rig.
    #[error("{}", chain(.0))]
    Rig(#[from] RigError),
    /// The VM is not where it must be, or not yet.
    #[error(transparent)]
    Unrest(#[from] Unrest),
    /// It ended elsewhere than it may.
    #[error(
        "the VM runs at {at}, which is {found:?}; allowed is {allowed:?}; the evacuation said: {said}"
    )]
    WrongEnd { at: String, found: End, allowed: &'static [End], said: String },
    /// The evacuation said something else than what is.
    #[error("{what}; the evacuation said: {said}")]
    Untrue { what: &'static str, said: String },
}

fn chain(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(|cause| format!(": {}", chain(cause)));
    format!("{error}{}", cause.unwrap_or_default())
}

/// Who is who.
#[derive(Debug, Clone, Copy)]
struct Roles {
    source: Host,
    destination: Host,
}

impl Roles {
    fn host(self, side: Side) -> Host {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }
}

/// An evacuation that was begun.
enum Order {
    /// By its id.
    Detached(String),
    /// The newest one, once that is no longer the one that was it before.
    Attended(Attended, Option<String>),
}

/// Plays `case` and says how it ended.
pub(crate) fn play(world: &mut World, case: &Case, chance: &mut Chance) -> Result<String, Failure> {
    let roles = prepare(world, case)?;
    let order = begin(world, case, roles)?;
    reach(world, case, roles, &order)?;
    if matches!(case.moment, Moment::Copying) {
        clock::rest(chance.up_to(Duration::from_millis(400)));
    }
    strike(world, case.blow, roles, &order)?;
    clock::rest(chance.up_to(Duration::from_millis(60)));
    world.agents.iter().for_each(|agent| agent.let_go());
    if case.uncertain {
        await_uncertain(world)?;
    }
    if let Some(side) = case.claim {
        let host = host_name(roles.host(side));
        world.control.order(&format!("claim {VM} --fenced --host {host}"))?;
    }
    let first_ends = may_end_first(case) && chance.coin();
    if first_ends {
        await_end(world, &order)?;
    }
    clock::rest(chance.up_to(Duration::from_millis(1200)));
    if case.claim.is_some() {
        // Whoever comes back shall find the VM running.
        world.running()?;
    }
    repair(world, roles)?;
    finish(world, case, roles, order)
}

/// Everybody lives, one host has the VM; the agent that shall stay at a mark is told so.
fn prepare(world: &mut World, case: &Case) -> Result<Roles, Failure> {
    let source = world.running()?;
    world.control.await_sight(source)?;
    let destination = world.control.planned_destination(source)?;
    let roles = Roles { source, destination };
    let (side, mark) = match case.moment {
        Moment::At(side, mark) | Moment::GivingUp(side, mark) => (side, mark),
        Moment::TakingBack(mark) => (Side::Source, mark),
        Moment::Asked | Moment::Phase(_) | Moment::Copying => return Ok(roles),
    };
    world.agents[roles.host(side)].start(Some(&marked(side, mark)))?;
    if matches!(case.moment, Moment::TakingBack(_)) {
        let mark = marked(Side::Destination, "before/start-guest");
        world.agents[destination].start(Some(&mark))?;
    }
    world.control.await_sight(source)?;
    Ok(roles)
}

fn marked(side: Side, mark: &str) -> String {
    match side {
        Side::Source => format!("source/{mark}"),
        Side::Destination => format!("destination/{mark}"),
    }
}

fn begin(world: &World, case: &Case, roles: Roles) -> Result<Order, Failure> {
    let source = host_name(roles.source);
    let mut line = format!("evacuate {source} --urgency 0 --yes");
    if case.only_there {
        line.push_str(&format!(" --to {}", host_name(roles.destination)));
    }
    Ok(match (case.blow, case.moment) {
        (Blow::CtrlC, _) | (_, Moment::Asked) => {
            let before = world.control.newest().ok();
            Order::Attended(world.control.begin(&line)?, before)
        }
        _ => Order::Detached(world.control.detached(&line)?),
    })
}

fn id(world: &World, order: &Order) -> Result<String, Failure> {
    match order {
        Order::Detached(id) => Ok(id.clone()),
        Order::Attended(_, before) => {
            let newest = world.control.newest()?;
            let none = || RigError::refused("an evacuation")("it has not begun");
            let new = Some(newest).filter(|newest| Some(newest) != before.as_ref());
            Ok(new.ok_or_else(none)?)
        }
    }
}

/// Waits for the moment.
fn reach(world: &World, case: &Case, roles: Roles, order: &Order) -> Result<(), Failure> {
    match case.moment {
        Moment::Asked => Ok(()),
        Moment::Phase(phase) => await_phase(world, order, phase),
        Moment::Copying => await_copying(world, order),
        Moment::At(side, _) => await_hold(world, roles.host(side)),
        Moment::GivingUp(side, _) => {
            await_copying(world, order)?;
            // It is not waited for: it waits for those whom we hold.
            let _cancel = world.control.begin(&format!("cancel {}", id(world, order)?))?;
            await_hold(world, roles.host(side))
        }
        Moment::TakingBack(_) => {
            await_hold(world, roles.destination)?;
            world.agents[roles.destination].kill_qemu();
            clock::rest(Duration::from_millis(100));
            world.agents[roles.destination].let_go();
            await_hold(world, roles.source)
        }
    }
}

fn await_hold(world: &World, host: Host) -> Result<(), Failure> {
    let holds = || world.agents[host].holds().then_some(());
    let held = clock::wait_for(MOMENT_LIMIT, holds);
    held.ok_or_else(|| world.late("the mark", MOMENT_LIMIT).into())
}

fn await_phase(world: &World, order: &Order, phase: &str) -> Result<(), Failure> {
    let is_there = || {
        let status = world.control.status(&id(world, order).ok()?).ok()?;
        (status["migrations"][0]["phase"] == phase).then_some(())
    };
    let there = clock::wait_for(MOMENT_LIMIT, is_there);
    there.ok_or_else(|| world.late(phase, MOMENT_LIMIT).into())
}

fn await_copying(world: &World, order: &Order) -> Result<(), Failure> {
    let copies = || {
        let status = world.control.status(&id(world, order).ok()?).ok()?;
        (status["migrations"][0]["bytes_sent"].as_u64()? > 0).then_some(())
    };
    clock::wait_for(MOMENT_LIMIT, copies).ok_or_else(|| world.late("pages", MOMENT_LIMIT).into())
}

fn strike(world: &mut World, blow: Blow, roles: Roles, order: &Order) -> Result<(), Failure> {
    let Roles { source, destination } = roles;
    match blow {
        Blow::Agent(side) => world.agents[roles.host(side)].kill(),
        Blow::BothAgents => {
            world.agents[source].kill();
            world.agents[destination].kill();
        }
        Blow::Qemu => {
            world.agents[destination].kill_qemu();
            // Its agent is to find it dead.
            clock::rest(Duration::from_millis(100));
        }
        Blow::Controller => world.control.kill(),
        Blow::Power(side) => world.agents[roles.host(side)].lose_power()?,
        Blow::LinkClosed => world.link(source, destination, State::Closed),
        Blow::LinkSilent => world.link(source, destination, State::Silent),
        Blow::CtrlC => {
            if let Order::Attended(command, _) = order {
                command.interrupt();
            }
            // The cancellation is to be on its way before the agents go on.
            clock::rest(Duration::from_millis(300));
        }
    }
    Ok(())
}

/// Nothing that is broken keeps the evacuation from its end, and it may come first.
fn may_end_first(case: &Case) -> bool {
    let elsewhere = case.ends == [End::Elsewhere];
    let struck_apart =
        matches!(case.blow, Blow::Agent(Side::Destination) | Blow::LinkClosed | Blow::LinkSilent);
    elsewhere && struck_apart
}

fn await_uncertain(world: &World) -> Result<(), Failure> {
    let shown = || {
        let vms = world.control.ask("vms").ok()?;
        let states = vms["vms"].as_array()?.iter().map(|vm| vm["state"].as_str());
        states.flatten().any(|state| matches!(state, "uncertain" | "in doubt")).then_some(())
    };
    let shown = clock::wait_for(MOMENT_LIMIT, shown);
    shown.ok_or_else(|| world.late("`uncertain` in `lifeboat vms`", MOMENT_LIMIT).into())
}

/// The dead rise, the cut is healed.
fn repair(world: &mut World, roles: Roles) -> Result<(), Failure> {
    world.link(roles.source, roles.destination, State::Whole);
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

fn await_end(world: &World, order: &Order) -> Result<serde_json::Value, Failure> {
    let ended = || {
        let status = world.control.status(&id(world, order).ok()?).ok()?;
        let state = status["state"].as_str()?;
        matches!(state, "done" | "partial" | "cancelled" | "failed").then_some(status)
    };
    let ended = clock::wait_for(END_LIMIT, ended);
    ended.ok_or_else(|| world.late("the evacuation's end", END_LIMIT).into())
}

fn finish(world: &mut World, case: &Case, roles: Roles, order: Order) -> Result<String, Failure> {
    let ended = await_end(world, &order);
    let at = world.at_rest(REST_LIMIT)?;
    let found = match at {
        at if at == roles.source => End::Stayed,
        at if at == roles.destination => End::Arrived,
        _ => End::Elsewhere,
    };
    nobody_else_may_start_it(world, at)?;
    let status = match ended {
        Ok(status) => status,
        // Killed before the order was durable: there is no evacuation, and the VM never left.
        Err(_) if matches!(case.moment, Moment::Asked) && found == End::Stayed => {
            return Ok("nothing was begun".to_owned());
        }
        Err(late) => return Err(late),
    };
    let said = status.to_string();
    if !case.ends.contains(&found) {
        let (at, allowed) = (host_name(at), case.ends);
        return Err(Failure::WrongEnd { at, found, allowed, said });
    }
    if let Some(what) = untrue(case, found, &status) {
        return Err(Failure::Untrue { what, said });
    }
    match order {
        Order::Attended(command, _) if case.blow == Blow::CtrlC => check_exit(command, found)?,
        _ => {}
    }
    Ok(format!("{found:?}"))
}

/// What the evacuation says of its end that is not so.
fn untrue(case: &Case, found: End, status: &serde_json::Value) -> Option<&'static str> {
    let state = status["state"].as_str().unwrap_or_default();
    let moved = status["migrations"][0]["phase"] == "moved";
    if moved == (found == End::Stayed) {
        return Some("where the VM is said to be, it is not");
    }
    let left = &status["left_behind"][0]["reason"];
    if case.only_there && left.as_str().is_none_or(str::is_empty) {
        return Some("the VM was left behind without a reason");
    }
    // One that was cancelled too late has moved its VM all the same.
    let cancelled = case.blow == Blow::CtrlC && state == "cancelled";
    let done = state == "done";
    (moved && !done && !cancelled).then_some("all VMs have moved, and it is not done")
}

fn check_exit(command: Attended, found: End) -> Result<(), Failure> {
    let (code, said) = command.end(REST_LIMIT)?;
    match (found, code) {
        (End::Stayed, Some(4)) | (End::Arrived | End::Elsewhere, Some(0 | 4)) => Ok(()),
        _ => Err(Failure::Untrue { what: "the exit code is wrong", said }),
    }
}

/// Every host that does not own the VM refuses to start it.
fn nobody_else_may_start_it(world: &mut World, owner: Host) -> Result<(), Failure> {
    for (host, agent) in world.agents.iter_mut().enumerate().filter(|(host, _)| *host != owner) {
        if agent.start_vm().is_ok() {
            let what = format!("{} started it, which is {}'s", host_name(host), host_name(owner));
            return Err(Unrest::Offence(vec![what]).into());
        }
    }
    Ok(())
}
