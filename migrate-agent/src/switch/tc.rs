//! What is asked of `tc`, and what its answers mean. Pure; `switch` runs it.
//!
//! The filter is recognised as ours by three things together: preference, handle, and the very
//! program. OVS' HTB is recognised by the layout that OVS gives it: handle `1:`, default class 1,
//! root class `1:fffe` (`lib/netdev-linux.c`). What `tc` prints beyond what is looked for is
//! passed over.

use serde::Deserialize;

use super::ClassifierError;
use super::program::{Instruction, PROGRAM, bytecode};

/// Decides where filters are tried one after the other, and names ours: nobody counts so far by
/// accident.
const PREFERENCE: u16 = 0x4c42;
const HANDLE: &str = "0x1";
/// The root class that OVS makes, and nobody else.
const OVS_ROOT_CLASS: &str = "class htb 1:fffe root";

type Words = Vec<String>;

fn words(text: &str) -> Words {
    text.split(' ').map(str::to_owned).collect()
}

pub(super) fn show_qdiscs(port: &str) -> Words {
    words(&format!("-j qdisc show dev {port}"))
}

/// Without `-j`, which `tc` 6.1 does not know for classes.
pub(super) fn show_classes(port: &str) -> Words {
    words(&format!("class show dev {port}"))
}

pub(super) fn show_filters(port: &str) -> Words {
    words(&format!("-j filter show dev {port} parent 1:"))
}

pub(super) fn add(port: &str) -> Words {
    let mut call = filter("add", port);
    call.push("bytecode".to_owned());
    call.push(bytecode());
    call
}

pub(super) fn delete(port: &str) -> Words {
    filter("del", port)
}

fn filter(verb: &str, port: &str) -> Words {
    words(&format!(
        "filter {verb} dev {port} parent 1:0 protocol all prio {PREFERENCE} handle {HANDLE} bpf"
    ))
}

/// What shapes a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Shaper {
    /// Nothing: OVS has no QoS there.
    Nothing,
    /// HTB with OVS' handle and default; whether it has OVS' classes too is asked next.
    PerhapsOvs,
    /// Somebody else's.
    Foreign { kind: String, handle: String },
}

#[derive(Deserialize)]
struct Qdisc {
    kind: String,
    #[serde(default)]
    handle: String,
    #[serde(default)]
    root: bool,
    #[serde(default)]
    options: QdiscOptions,
}

#[derive(Deserialize, Default)]
struct QdiscOptions {
    #[serde(default)]
    default: serde_json::Value,
}

/// What `tc` attaches when nobody has asked for anything (`net.core.default_qdisc`, and what it
/// comes to on devices with many queues or none).
const UNASKED: [&str; 6] = ["noqueue", "pfifo_fast", "fq_codel", "fq", "mq", "sfq"];

/// Reads the answer to [`show_qdiscs`].
pub(super) fn shaper(answer: &str) -> Result<Shaper, ClassifierError> {
    let qdiscs: Vec<Qdisc> = read(answer)?;
    let Some(root) = qdiscs.into_iter().find(|qdisc| qdisc.root) else {
        return Ok(Shaper::Nothing);
    };
    // `0:` is what the kernel put there by itself, which nobody can have configured.
    if root.handle == "0:" && UNASKED.contains(&root.kind.as_str()) {
        return Ok(Shaper::Nothing);
    }
    let ovs_like = root.kind == "htb" && root.handle == "1:" && root.options.default == "0x1";
    Ok(match ovs_like {
        true => Shaper::PerhapsOvs,
        false => Shaper::Foreign { kind: root.kind, handle: root.handle },
    })
}

/// Reads the answer to [`show_classes`].
pub(super) fn has_ovs_classes(answer: &str) -> bool {
    answer.lines().any(|line| line.starts_with(OVS_ROOT_CLASS))
}

#[derive(Deserialize)]
struct Filter {
    kind: String,
    pref: u64,
    options: Option<FilterOptions>,
}

#[derive(Deserialize)]
struct FilterOptions {
    #[serde(default)]
    handle: serde_json::Value,
    bytecode: Option<Bytecode>,
}

#[derive(Deserialize)]
struct Bytecode {
    #[serde(default)]
    insns: Vec<RawInstruction>,
}

#[derive(Deserialize)]
struct RawInstruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

/// The filters of a port's HTB.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Filters {
    /// Ours is there.
    pub(super) ours: bool,
    /// Kind and preference of the first that is not ours.
    pub(super) foreign: Option<(String, u64)>,
}

/// Reads the answer to [`show_filters`]. `tc` lists a head without options for each preference,
/// then the filters under it; what belongs to nobody is not counted.
pub(super) fn filters(answer: &str) -> Result<Filters, ClassifierError> {
    let mut found = Filters::default();
    for filter in read::<Vec<Filter>>(answer)? {
        let Some(options) = &filter.options else { continue };
        if is_ours(&filter, options) {
            found.ours = true;
        } else if found.foreign.is_none() {
            found.foreign = Some((filter.kind, filter.pref));
        }
    }
    Ok(found)
}

fn is_ours(filter: &Filter, options: &FilterOptions) -> bool {
    let same = |raw: &RawInstruction, instruction: &Instruction| {
        let RawInstruction { code, jt, jf, k } = *raw;
        *instruction == Instruction { code, jump_true: jt, jump_false: jf, k }
    };
    let program = options.bytecode.as_ref().map(|bytecode| bytecode.insns.as_slice());
    filter.kind == "bpf"
        && filter.pref == u64::from(PREFERENCE)
        && options.handle == HANDLE
        && program.is_some_and(|program| {
            program.len() == PROGRAM.len()
                && program.iter().zip(&PROGRAM).all(|(raw, ours)| same(raw, ours))
        })
}

/// `tc` prints nothing at all where there is nothing to tell.
fn read<T: for<'de> Deserialize<'de> + Default>(answer: &str) -> Result<T, ClassifierError> {
    if answer.trim().is_empty() {
        return Ok(T::default());
    }
    serde_json::from_str(answer).map_err(ClassifierError::Answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shaper_is_told_apart_by_its_layout() {
        // As iproute2 6.1 prints them.
        let ovs = r#"[{"kind":"htb","handle":"1:","root":true,"refcnt":3,"options":{"r2q":10,"default":"0x1","direct_packets_stat":0,"direct_qlen":1000}},
            {"kind":"ingress","handle":"ffff:","parent":"ffff:fff1","options":{}}]"#;
        assert_eq!(shaper(ovs).unwrap(), Shaper::PerhapsOvs);
        let none = r#"[{"kind":"noqueue","handle":"0:","root":true,"refcnt":2,"options":{}}]"#;
        assert_eq!(shaper(none).unwrap(), Shaper::Nothing);
        assert_eq!(shaper("[]").unwrap(), Shaper::Nothing);
        assert_eq!(shaper("").unwrap(), Shaper::Nothing);
        for (kind, handle, default) in
            [("htb", "5:", "0x1"), ("htb", "1:", "0"), ("pfifo", "80c3:", ""), ("sfq", "7:", "")]
        {
            let answer = format!(
                r#"[{{"kind":"{kind}","handle":"{handle}","root":true,"options":{{"default":"{default}"}}}}]"#
            );
            let foreign = Shaper::Foreign { kind: kind.to_owned(), handle: handle.to_owned() };
            assert_eq!(shaper(&answer).unwrap(), foreign);
        }
    }

    #[test]
    fn ovs_classes_are_known_by_their_root() {
        let classes = "class htb 1:8 parent 1:fffe prio 0 rate 50Mbit\n\
                       class htb 1:fffe root rate 100Mbit ceil 100Mbit\n";
        assert!(has_ovs_classes(classes));
        assert!(!has_ovs_classes("class htb 1:1 root rate 100Mbit\n"));
    }

    fn listed(pref: u64, handle: &str, program: &[Instruction]) -> String {
        let insns: Vec<String> = program
            .iter()
            .map(|i| {
                let Instruction { code, jump_true, jump_false, k } = i;
                format!(r#"{{"code":{code},"jt":{jump_true},"jf":{jump_false},"k":{k}}}"#)
            })
            .collect();
        let insns = insns.join(",");
        format!(
            r#"[{{"protocol":"all","pref":{pref},"kind":"bpf","chain":0}},
            {{"protocol":"all","pref":{pref},"kind":"bpf","chain":0,"options":{{"handle":"{handle}","not_in_hw":true,"bytecode":{{"length":13,"insns":[{insns}]}}}}}}]"#
        )
    }

    #[test]
    fn our_filter_is_known_by_preference_handle_and_program_together() {
        let preference = u64::from(PREFERENCE);
        let ours = filters(&listed(preference, HANDLE, &PROGRAM)).unwrap();
        assert_eq!(ours, Filters { ours: true, foreign: None });
        let mut other = PROGRAM;
        other[7].k += 1;
        for answer in [
            listed(1, HANDLE, &PROGRAM),
            listed(preference, "0x2", &PROGRAM),
            listed(preference, HANDLE, &PROGRAM[..12]),
            listed(preference, HANDLE, &other),
        ] {
            let found = filters(&answer).unwrap();
            assert!(!found.ours && found.foreign.is_some(), "{answer}");
        }
        let u32_filter = r#"[{"protocol":"ip","pref":5,"kind":"u32","chain":0},{"protocol":"ip","pref":5,"kind":"u32","chain":0,"options":{"fh":"800:","ht_divisor":1}}]"#;
        assert_eq!(filters(u32_filter).unwrap().foreign, Some(("u32".to_owned(), 5)));
        assert_eq!(filters("[]").unwrap(), Filters::default());
    }

    #[test]
    fn an_answer_that_is_no_list_is_an_error() {
        for answer in ["{", "{}", "[{\"kind\":1}]", "qdisc htb 1: root"] {
            assert!(shaper(answer).is_err() && filters(answer).is_err(), "{answer}");
        }
    }

    #[test]
    fn tc_is_told_where_and_what() {
        let call = add("v1");
        let at = "filter add dev v1 parent 1:0 protocol all prio 19522 handle 0x1 bpf bytecode";
        assert_eq!(call[..call.len() - 1].join(" "), at);
        assert_eq!(call.last(), Some(&bytecode()));
        assert_eq!(delete("v1").join(" "), at.replace("add", "del").replace(" bytecode", ""));
    }
}
