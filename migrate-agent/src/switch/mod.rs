//! The classifier beside OVS' HTB: makes a port's queues reachable on the userspace datapath.
//!
//! Used by the gRPC server for an agent in the role *switch*, which runs where the port is. On the
//! userspace datapath `set_queue` has no effect: OVS makes the HTB class of each queue, and then
//! sends every frame through a socket on which the queue is lost, so that all of them end in the
//! default class. What survives is the frame itself. The controller's flows therefore write the
//! queue's number into the DSCP field too, and one filter per port (`program`) finds the class
//! by it:
//!
//! ```text
//!   flow: set_queue:q, set_field:q->ip_dscp  ->  HTB 1: -> filter: DSCP q -> class 1:(q+1)
//!                                                       '-> no mark -> default class 1:1
//! ```
//!
//! The filter is one per port and never changes: not for a migration, not for a queue. It outlives
//! a restart of OVS, and dies with the qdisc, which OVS makes anew when a QoS is attached: so the
//! caller ensures it again after each time that it attached one. On the kernel datapath HTB goes
//! by the queue before it asks any filter: there it is not needed, and does no harm as long as
//! marks are cleared where they must be anyway.
//!
//! What the kernel here has of all this is asked in `probe`. A qdisc or a filter that is not of OVS or
//! ours is refused, never changed. Queues, flows, and
//! clearing the marks of those who may not set them are the controller's.

pub mod probe;
mod program;
mod tc;

use lifeboat_protocol::agent;

use crate::programs::{self, ProgramError};
use tc::{Filters, Shaper};

/// Why a port's classifier is not as it was asked to be.
#[derive(Debug, thiserror::Error)]
pub enum ClassifierError {
    /// No interface can have that name.
    #[error("{shown:?} cannot be an interface: 1 to 15 characters without space, `/` or `:`")]
    Name {
        /// Its beginning.
        shown: String,
    },
    /// There is no such interface.
    #[error("there is no interface `{port}` where this agent runs; ask the agent of its switch")]
    NoSuchPort {
        /// The port.
        port: String,
    },
    /// OVS has no HTB there.
    #[error("port `{port}` has no QoS, so there are no queues; reserve on it first")]
    NoQos {
        /// The port.
        port: String,
    },
    /// Somebody else shapes it.
    #[error(
        "port `{port}` is shaped by {kind} {handle}, which is not Open vSwitch's HTB; remove it, \
         or leave this port out of reservations"
    )]
    ForeignQdisc {
        /// The port.
        port: String,
        /// `htb`, `tbf`, ...
        kind: String,
        /// `5:`.
        handle: String,
    },
    /// Somebody else classifies there.
    #[error(
        "port `{port}` has a filter that is not ours ({kind}, preference {preference}), which \
         could lead reserved traffic elsewhere; remove it with `tc filter del dev {port} parent \
         1: prio {preference}`, or leave this port out of reservations"
    )]
    ForeignFilter {
        /// The port.
        port: String,
        /// `u32`, `flower`, `bpf`, ...
        kind: String,
        /// Its preference.
        preference: u64,
    },
    /// `tc` said that it did it, and it is not so.
    #[error("port `{port}` has changed meanwhile: the classifier is not as it was set; ask again")]
    Overtaken {
        /// The port.
        port: String,
    },
    /// `tc` failed.
    #[error(transparent)]
    Tc(#[from] ProgramError),
    /// `tc` answered what we do not understand.
    #[error("cannot understand tc's answer: {0}")]
    Answer(serde_json::Error),
}

/// How a port stands after it was asked for.
#[derive(Debug)]
pub struct PortClassifier {
    /// The port, as it was given.
    pub port: String,
    /// Our filter is there.
    pub installed: bool,
    /// Why it is not as asked.
    pub problem: Option<ClassifierError>,
}

impl From<PortClassifier> for agent::PortClassifier {
    fn from(from: PortClassifier) -> Self {
        let detail = from.problem.map(|problem| problem.to_string()).unwrap_or_default();
        Self { port: from.port, installed: from.installed, detail }
    }
}

/// Sees to it that each of the ports has the classifier, once. One that cannot have it does not
/// keep the others from it.
pub async fn ensure(ports: &[impl AsRef<str>]) -> Vec<PortClassifier> {
    let mut answers = vec![];
    for port in ports.iter().map(AsRef::as_ref) {
        let problem = ensure_one(port).await.err();
        if let Some(error) = &problem {
            tracing::warn!(port, %error, "no classifier");
        }
        answers.push(PortClassifier {
            port: port.to_owned(),
            installed: problem.is_none(),
            problem,
        });
    }
    answers
}

/// Takes our classifier away from each of the ports, and nothing else. Where none is, nothing is
/// to be done.
pub async fn remove(ports: &[impl AsRef<str>]) -> Vec<PortClassifier> {
    let mut answers = vec![];
    for port in ports.iter().map(AsRef::as_ref) {
        let (installed, problem) = match remove_one(port).await {
            Ok(()) => (false, None),
            // What cannot be an interface has no filter; elsewhere it may be there still.
            Err(error @ ClassifierError::Name { .. }) => (false, Some(error)),
            Err(error) => (true, Some(error)),
        };
        if let Some(error) = &problem {
            tracing::warn!(port, %error, "the classifier could not be taken away");
        }
        answers.push(PortClassifier { port: port.to_owned(), installed, problem });
    }
    answers
}

async fn ensure_one(port: &str) -> Result<(), ClassifierError> {
    check_name(port)?;
    if is_installed(port).await? {
        return Ok(());
    }
    // Whether it failed or not: what counts is what is there then. Another request of the same may
    // have come first, or OVS may have made the qdisc anew.
    let added = call(port, &tc::add(port)).await;
    match is_installed(port).await? {
        true => Ok(()),
        false => Err(added.err().unwrap_or_else(|| overtaken(port))),
    }
}

async fn is_installed(port: &str) -> Result<bool, ClassifierError> {
    match inspect(port).await? {
        Filters { foreign: Some((kind, preference)), .. } => {
            Err(ClassifierError::ForeignFilter { port: port.to_owned(), kind, preference })
        }
        Filters { ours, foreign: None } => Ok(ours),
    }
}

async fn remove_one(port: &str) -> Result<(), ClassifierError> {
    check_name(port)?;
    if !is_left(port).await? {
        return Ok(());
    }
    let deleted = call(port, &tc::delete(port)).await;
    match is_left(port).await? {
        false => Ok(()),
        true => Err(deleted.err().unwrap_or_else(|| overtaken(port))),
    }
}

/// Our filter lives in OVS' HTB only: without the one there is not the other.
async fn is_left(port: &str) -> Result<bool, ClassifierError> {
    use ClassifierError::{ForeignQdisc, NoQos, NoSuchPort};
    match inspect(port).await {
        Ok(filters) => Ok(filters.ours),
        Err(NoSuchPort { .. } | NoQos { .. } | ForeignQdisc { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn overtaken(port: &str) -> ClassifierError {
    ClassifierError::Overtaken { port: port.to_owned() }
}

/// The filters of the port's HTB, once it is known to be OVS'.
async fn inspect(port: &str) -> Result<Filters, ClassifierError> {
    let foreign = |kind: String, handle| {
        Err(ClassifierError::ForeignQdisc { port: port.to_owned(), kind, handle })
    };
    match tc::shaper(&call(port, &tc::show_qdiscs(port)).await?)? {
        Shaper::PerhapsOvs => (),
        Shaper::Nothing => return Err(ClassifierError::NoQos { port: port.to_owned() }),
        Shaper::Foreign { kind, handle } => return foreign(kind, handle),
    }
    if !tc::has_ovs_classes(&call(port, &tc::show_classes(port)).await?) {
        return foreign("htb".to_owned(), "1:".to_owned());
    }
    tc::filters(&call(port, &tc::show_filters(port)).await?)
}

async fn call(port: &str, arguments: &[String]) -> Result<String, ClassifierError> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match programs::run("tc", &arguments).await {
        Err(ProgramError::Failed { said, .. }) if said.contains("Cannot find device") => {
            Err(ClassifierError::NoSuchPort { port: port.to_owned() })
        }
        outcome => Ok(outcome?),
    }
}

/// The kernel's rule for names, and no more than ASCII: a name comes from another machine and
/// becomes an argument of a program.
fn check_name(port: &str) -> Result<(), ClassifierError> {
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    let ok = (1..=15).contains(&port.len())
        && port.bytes().all(plain)
        && !port.starts_with('-')
        && port != "."
        && port != "..";
    if ok { Ok(()) } else { Err(ClassifierError::Name { shown: port.chars().take(40).collect() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_an_interface_reaches_tc() {
        for name in ["v1", "s1-eth2", "tap_0", "enp3s0f1.100", "123456789012345"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        let bad = ["", "1234567890123456", "a b", "a/b", "a:1", "..", "-j", "a\n", "vé", "a\0"];
        for name in bad {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        let long = check_name(&"x".repeat(1 << 20)).unwrap_err().to_string();
        assert!(long.len() < 200);
    }

    #[tokio::test]
    async fn a_port_that_is_not_there_is_told_and_has_nothing_to_remove() {
        let answers = ensure(&["no-such-port", "a b"]).await;
        assert!(matches!(answers[0].problem, Some(ClassifierError::NoSuchPort { .. })));
        assert!(matches!(answers[1].problem, Some(ClassifierError::Name { .. })));
        let removed = remove(&["no-such-port", "a b"]).await;
        assert!(!removed[0].installed && removed[0].problem.is_none());
        assert!(!removed[1].installed && removed[1].problem.is_some());
    }
}
