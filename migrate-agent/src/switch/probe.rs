//! What this host's kernel can do with a port: asked by doing it, on the loopback of a network
//! namespace that exists for the length of the question.
//!
//! Used by the gRPC server for an agent in the role *switch*. A kernel without a scheduler or an action is
//! no error that anybody would hear of: Open vSwitch logs it, its database shows the wish as if it
//! were so, and nothing is shaped. What is found is told; what follows is the controller's.

use lifeboat_protocol::agent::ProbeShapingReply;

use super::program::bytecode;
use crate::programs::{self, ProgramError};

/// Each answer on a line of its own. Open vSwitch polices with `matchall`, and where that is missing
/// with `basic`.
const HTB: &str = "htb";
const CLASSIFIER: &str = "classifier";
const POLICING: &str = "policing";

fn script() -> String {
    let bytecode = bytecode();
    format!(
        "police='action police rate 1mbit burst 10k conform-exceed drop'\n\
         tc qdisc add dev lo root handle 1: htb default 1 && echo {HTB}\n\
         tc filter add dev lo parent 1:0 protocol all prio 1 handle 1 bpf bytecode '{bytecode}' && echo {CLASSIFIER}\n\
         tc qdisc add dev lo handle ffff: ingress || exit 0\n\
         tc filter add dev lo parent ffff: protocol all prio 1 matchall $police ||\n\
         tc filter add dev lo parent ffff: protocol all prio 1 basic $police || exit 0\n\
         echo {POLICING}\n"
    )
}

/// Asks.
///
/// # Errors
/// When no namespace can be made, or there is no `tc`.
pub async fn probe() -> Result<ProbeShapingReply, ProgramError> {
    programs::run("tc", &["-V"]).await?;
    let said = programs::run("unshare", &["--net", "sh", "-c", &script()]).await?;
    let found = read(&said);
    tracing::info!(?found, "what the kernel here can shape");
    Ok(found)
}

fn read(said: &str) -> ProbeShapingReply {
    let has = |word: &str| said.lines().any(|line| line == word);
    ProbeShapingReply { htb: has(HTB), classifier: has(CLASSIFIER), policing: has(POLICING) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_is_not_there() {
        let all = ProbeShapingReply { htb: true, classifier: true, policing: true };
        assert_eq!(read("htb\nclassifier\npolicing\n"), all);
        assert_eq!(read(""), ProbeShapingReply::default());
        assert_eq!(read("htbx\n"), ProbeShapingReply::default());
    }
}
