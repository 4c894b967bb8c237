//! QoS rows.
