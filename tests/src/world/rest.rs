//! Where the world's guest is, and that it has come to rest: at one host, counting on, with no QEMU of
//! it left elsewhere. What the witness saw that must never be comes before everything else.
//!
//! Not here: what is done to the world before, and where the guest may be afterwards.

use std::time::Duration;

use super::{Host, World, host_name};
use crate::clock;

/// Why the world is not at rest.
#[derive(Debug, thiserror::Error)]
pub enum Unrest {
    /// Something that must come did not.
    #[error("{what} did not come within {} s; it looked like this: {seen}", within.as_secs())]
    Late {
        /// What was waited for.
        what: String,
        /// For so long.
        within: Duration,
        /// What was there instead.
        seen: String,
    },
    /// Something that must never be.
    #[error("{}", .0.join("; "))]
    Offence(Vec<String>),
}

impl World {
    /// Where the guest runs, which is at one host.
    ///
    /// # Errors
    /// When it runs at none, or at several.
    pub fn running(&self) -> Result<Host, Unrest> {
        let running = self.witness.look().running();
        match running[..] {
            [host] => Ok(host),
            _ => Err(Unrest::Offence(vec![format!("it runs at {} hosts", running.len())])),
        }
    }

    /// Waits until the guest runs at one host, has counted on there, and no other QEMU is left; says
    /// which host.
    ///
    /// # Errors
    /// When that does not come `within` this time, or the witness has seen an offence.
    pub fn at_rest(&self, within: Duration) -> Result<Host, Unrest> {
        let before = self.witness.look().last_tick().unwrap_or_default();
        let calm = || {
            let seen = self.witness.look();
            let (running, with_qemu) = (seen.running(), seen.with_qemu());
            let [at] = running[..] else { return None };
            let goes_on = seen.last_tick_at(at).is_some_and(|tick| tick > before);
            (with_qemu == [at] && goes_on).then_some(at)
        };
        let calm = clock::wait_for(within, calm);
        let offences = self.witness.look().offences();
        if !offences.is_empty() {
            return Err(Unrest::Offence(offences));
        }
        calm.ok_or_else(|| self.late("rest", within))
    }

    /// `what` did not come `within` this time; with what the witness, the agents and the controller
    /// say now.
    #[must_use]
    pub fn late(&self, what: &str, within: Duration) -> Unrest {
        let seen = {
            let seen = self.witness.look();
            format!("running at {:?}, QEMU at {:?}", seen.running(), seen.with_qemu())
        };
        let agents: Vec<String> = (0..self.agents.len()).map(|host| self.told_by(host)).collect();
        let status = self.control.ask("status").unwrap_or_default();
        let newest = status["evacuations"].as_array().and_then(|all| all.first()).cloned();
        let seen = format!("{seen}; {}; {}", agents.join("; "), newest.unwrap_or_default());
        Unrest::Late { what: what.to_owned(), within, seen }
    }

    /// What a host's agent says of the guest.
    fn told_by(&self, host: Host) -> String {
        let name = host_name(host);
        match self.agents[host].vm() {
            Ok(Some(status)) => format!(
                "{name}: {} g{} {}",
                status.state().as_str_name(),
                status.generation,
                status.detail
            ),
            Ok(None) => format!("{name}: no such VM"),
            Err(error) => format!("{name}: {error}"),
        }
    }
}
