//! The seam to those who make the queues of a userspace datapath reachable.
//!
//! Open vSwitch builds HTB queues there, and sends every packet to the default one; a tc classifier
//! beside them sorts by DSCP. Only a process in the ports' own network namespace can install it:
//! the agent with the switch role, which also says what the kernel there can do at all. [`Agents`] is
//! what runs; tests play it.

use futures_util::future::BoxFuture;
use lifeboat_protocol::ids::HostId;

use crate::agents::Agents;
use crate::network::Shaping;

/// Who installs and removes classifiers.
pub trait Classifiers: Send + Sync + 'static {
    /// Makes sure that the classifier is at each of these ports. Idempotent.
    fn ensure<'a>(
        &'a self,
        agent: &'a HostId,
        ports: Vec<String>,
    ) -> BoxFuture<'a, Result<(), ClassifierError>>;

    /// Takes it away from each of these ports. Idempotent.
    fn remove<'a>(
        &'a self,
        agent: &'a HostId,
        ports: Vec<String>,
    ) -> BoxFuture<'a, Result<(), ClassifierError>>;

    /// What the kernel there can do with a port.
    fn shaping<'a>(&'a self, agent: &'a HostId) -> BoxFuture<'a, Result<Shaping, ClassifierError>>;
}

/// Why a classifier is not as it was wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClassifierError {
    /// The agent did not do it.
    #[error(transparent)]
    Agent(#[from] crate::agents::AgentError),
    /// It did, and could not at one port.
    #[error("the agent of {agent} says of port {port}: {detail}")]
    Port {
        /// Whose agent.
        agent: HostId,
        /// The first port where it did not work.
        port: String,
        /// Its words.
        detail: String,
    },
}

impl Classifiers for Agents {
    fn shaping<'a>(&'a self, agent: &'a HostId) -> BoxFuture<'a, Result<Shaping, ClassifierError>> {
        Box::pin(async move {
            let found = self.probe_shaping(agent).await?;
            let (htb, classifier, policing) = (found.htb, found.classifier, found.policing);
            Ok(Shaping { htb, classifier, policing })
        })
    }

    fn ensure<'a>(
        &'a self,
        agent: &'a HostId,
        ports: Vec<String>,
    ) -> BoxFuture<'a, Result<(), ClassifierError>> {
        Box::pin(async move {
            let answers = self.ensure_classifier(agent, ports).await?;
            match answers.into_iter().find(|answer| !answer.installed) {
                None => Ok(()),
                Some(bad) => Err(ClassifierError::Port {
                    agent: agent.clone(),
                    port: bad.port,
                    detail: bad.detail,
                }),
            }
        })
    }

    fn remove<'a>(
        &'a self,
        agent: &'a HostId,
        ports: Vec<String>,
    ) -> BoxFuture<'a, Result<(), ClassifierError>> {
        Box::pin(async move {
            let answers = self.remove_classifier(agent, ports).await?;
            match answers.into_iter().find(|answer| answer.installed) {
                None => Ok(()),
                Some(bad) => Err(ClassifierError::Port {
                    agent: agent.clone(),
                    port: bad.port,
                    detail: bad.detail,
                }),
            }
        })
    }
}
