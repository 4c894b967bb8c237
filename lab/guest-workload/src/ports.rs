//! The ports on which guests and client meet. Nothing else.

/// Guest, UDP: heartbeats.
pub(crate) const HEARTBEAT: u16 = 7001;
/// Guest, TCP: the checked stream.
pub(crate) const STREAM: u16 = 7002;
/// Guest (role NI) and client (for role NO), UDP and TCP: traffic that is counted and dropped.
pub(crate) const SINK: u16 = 7003;
