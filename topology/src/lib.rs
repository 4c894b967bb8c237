//! The network as a graph: hosts, switches, links with a capacity per direction, and the ways
//! through it.
//!
//! The controller builds one [`Topology`] from its configuration (what veth pairs and OVS claim as
//! link speed is not true), keeps links and ports up or down as the switches report them, and asks
//! for ways from host to host; [`Sightings`] tell which ports really face each other; `policy/` counts with the result. Deliberately not here: sockets,
//! clocks, and any opinion about who may use how much of a link. The graph library underneath never
//! shows in a public signature.

pub mod error;
mod graph;
mod names;
mod sightings;
mod way;
mod yen;

pub use error::{CutLink, TopologyError};
pub use graph::Topology;
pub use names::{
    Attachment, DirectedLink, Direction, End, LinkId, LinkSpec, PORT_NAME_BYTES_MAX, PortName,
};
pub use sightings::{PROBES_LOST, Sighting, Sightings};
pub use way::{Egress, Hop, Way};
