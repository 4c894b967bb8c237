//! Two bridges with one contested link, and hosts at both ends.
//!
//! ```text
//!   source      ─┐                       ┌─ destination
//!   application ─┼─ rack ═ contested ═ core ─┘     (Open vSwitch; no cable limits it: queues do)
//!   bystander   ─┘
//! ```
//!
//! The hosts are in a VLAN: frames bear its tag between the bridges, and none on the last port, so that
//! both kinds are classified on the way.
//!
//! Used by the experiments on what a queue is worth. Queue rows, flows and the classifier go through
//! `lifeboat-ovs` and the agent's switch role, as an evacuation's do; which and how much is the
//! experiment's.

use std::net::Ipv4Addr;
use std::path::Path;

use lifeboat_agent::switch;
use lifeboat_ovs::openflow::flow::FlowMod;
use lifeboat_ovs::openflow::{Message, SwitchHandle};
use lifeboat_ovs::ovsdb::Client;
use lifeboat_ovs::qos::{self, Mark, Rates, Reservation};

use super::network::{self, Namespace};
use super::program::run;
use super::switch::{Datapath, PATIENCE, Switch};
use super::{RigError, private};

/// The source's address.
pub const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The application's address.
pub const APPLICATION: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// The bystander's address.
pub const BYSTANDER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);
/// The destination's address.
pub const DESTINATION: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
const VLAN: u16 = 5;
/// The ports of the way, in its order.
const PORTS: [&str; 2] = ["rack-core", "core-dest"];

/// It is up.
#[derive(Debug)]
pub struct Rack {
    /// Where migrations come from.
    pub source: Namespace,
    /// Where an application sends from.
    pub application: Namespace,
    /// Where everybody else sends from: a flood that shared the application's own cable would lose it
    /// packets before any queue.
    pub bystander: Namespace,
    /// Where all of it goes.
    pub destination: Namespace,
    bridges: [SwitchHandle; 2],
    database: Client,
    _switch: Switch,
}

impl Rack {
    /// Raises it. Both bridges forward as plain switches do.
    ///
    /// # Errors
    /// When Open vSwitch or the namespaces are not to be had.
    pub async fn raise(folder: &Path) -> Result<Self, RigError> {
        let at = Namespace::own();
        let source = Namespace::make("source")?;
        let application = Namespace::make("application")?;
        let bystander = Namespace::make("bystander")?;
        let destination = Namespace::make("destination")?;
        network::plug(&source, SOURCE, &at, "rack-source")?;
        network::plug(&application, APPLICATION, &at, "rack-app")?;
        network::plug(&bystander, BYSTANDER, &at, "rack-other")?;
        network::plug(&destination, DESTINATION, &at, "core-dest")?;
        network::join(&at, "rack-core", "core-rack")?;
        let switch = Switch::start(&at, folder)?;
        let rack =
            switch.bridge("rack", &["rack-source", "rack-app", "rack-other", "rack-core"]).await?;
        let core = switch.bridge("core", &["core-rack", "core-dest"]).await?;
        switch.tag(&["rack-source", "rack-app", "rack-other", "core-dest"], VLAN)?;
        for host in [&source, &application, &bystander] {
            run(&mut host.command(&format!("ping -q -c2 -i0.2 -W2 {DESTINATION}")))?;
        }
        private::switches_are_up()?;
        let database = switch.database().await?;
        let bridges = [rack, core];
        Ok(Self { source, application, bystander, destination, bridges, database, _switch: switch })
    }

    /// A queue on every port of the way; what is left of `link` is everybody else's minimum, as far
    /// as the port has no queue 0 yet. All rates in bit/s.
    ///
    /// # Errors
    /// When the switch refuses.
    pub async fn queue(
        &self,
        owner: &str,
        queue: u32,
        minimum: u64,
        others: u64,
        link: u64,
    ) -> Result<(), RigError> {
        for port in PORTS {
            let wanted = Reservation {
                port: port.to_owned(),
                queue,
                rates: Rates { min: minimum, max: Some(link) },
                mark: Mark {
                    owner: owner.to_owned(),
                    reservation: format!("{owner}-{queue}"),
                    expires: u64::MAX >> 1,
                },
                others: Rates { min: others, max: Some(link) },
                capacity: link,
            };
            let made = qos::reserve(&self.database, &wanted, PATIENCE).await;
            made.map_err(RigError::refused("a queue"))?;
        }
        Ok(())
    }

    /// The classifier beside the queues; the kernel's datapath needs none.
    ///
    /// # Errors
    /// With the agent's words.
    pub async fn classify(&self) -> Result<(), RigError> {
        if Datapath::here() == Datapath::Kernel {
            return Ok(());
        }
        let ports = PORTS.map(str::to_owned);
        let answers = switch::ensure(&ports).await;
        match answers.into_iter().find_map(|answer| answer.problem) {
            Some(problem) => Err(RigError::refused("the classifier")(problem)),
            None => Ok(()),
        }
    }

    /// These flows, instead of all that carry this cookie, on both bridges.
    ///
    /// # Errors
    /// When a switch refuses.
    pub async fn flows(&self, cookie: u64, flows: &[FlowMod]) -> Result<(), RigError> {
        for bridge in &self.bridges {
            let mut changes = vec![FlowMod::delete_by_cookie(cookie, u64::MAX)];
            changes.extend(flows.iter().cloned());
            let changes = changes.into_iter().map(Message::FlowMod).collect();
            bridge.change(changes, PATIENCE).await.map_err(RigError::refused("a flow"))?;
        }
        Ok(())
    }
}
