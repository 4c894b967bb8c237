//! A guest that is lost, or that nothing has happened to after all: which of both, and whether it was said.

use lifeboat_tests::clock;
use lifeboat_tests::world::rest::Unrest;
use lifeboat_tests::world::{VM, World};
use serde_json::Value;

use super::{Blow, Case, END_LIMIT, Failure, REST_LIMIT, migration};

/// What has become of it.
enum Fate {
    /// It has moved, or stays: nothing of it was where it was struck.
    Lives,
    /// It is lost, in these words.
    Lost(String),
}

/// Waits until its fate is known. What was said of a guest that is lost; `None` for one that is not.
pub(super) fn of(world: &World, case: Case, id: &str) -> Result<Option<String>, Failure> {
    let known = clock::wait_for(END_LIMIT, || fate(case, &migration(world, id)?));
    let said = match known.ok_or_else(|| world.late("what has become of it", END_LIMIT))? {
        Fate::Lives => return Ok(None),
        Fate::Lost(said) => said,
    };
    let said = match said.contains("lifeboat claim") {
        true => format!("{said}; {}", claimed(world)?),
        false => said,
    };
    no_wrong_byte(world)?;
    Ok(Some(said))
}

fn fate(case: Case, vm: &Value) -> Option<Fate> {
    let reason = vm["reason"].as_str().unwrap_or_default();
    let told = match case.blow {
        // Nobody has started them again, so they may come back for all that anybody knows.
        Blow::TwoStores => "wait for stores that do not answer",
        _ => "died",
    };
    match vm["phase"].as_str()? {
        "moved" | "left-behind" => Some(Fate::Lives),
        _ if reason.contains(told) => Some(Fate::Lost(reason.to_owned())),
        _ => None,
    }
}

/// By an operator's word: it runs where the last QEMU that has it is, if there is one.
fn claimed(world: &World) -> Result<String, Failure> {
    let left = world.witness.look().with_qemu();
    let [source] = left[..] else { return Ok("nobody has it any more".to_owned()) };
    let host = lifeboat_tests::world::host_name(source);
    let line = format!("claim {VM} --fenced --host {host}");
    // A source that has not heard of it yet refuses: nothing is uncertain there.
    let claimed = clock::wait_for(REST_LIMIT, || world.control.order(&line).ok());
    claimed.ok_or_else(|| world.late("the claim", REST_LIMIT))?;
    let before = world.witness.look().last_tick_at(source).unwrap_or_default();
    let goes_on = || {
        let seen = world.witness.look();
        (seen.running() == [source] && seen.last_tick_at(source) > Some(before)).then_some(())
    };
    let goes_on = clock::wait_for(REST_LIMIT, goes_on);
    goes_on.ok_or_else(|| world.late("the guest that was claimed", REST_LIMIT))?;
    Ok(format!("claimed at {host}"))
}

/// What it did since the switchover it may do once more; nothing else is forgiven.
fn no_wrong_byte(world: &World) -> Result<(), Failure> {
    let offences = world.witness.look().offences();
    let others: Vec<String> =
        offences.into_iter().filter(|said| !said.contains("counted a second twice")).collect();
    if others.is_empty() { Ok(()) } else { Err(Unrest::Offence(others).into()) }
}
