//! What a switch is: features, configuration, ports, and the controller's role towards it
//! (sections A.3.1, A.3.2, A.2.1, A.4.3 and A.3.9).
//!
//! Used through [`crate::Message`]; [`Port`] also by the port description.

use crate::types::{FixedText, MacAddr, PortNo};
use crate::wire::{wire_enum, wire_struct};

/// Bit of [`Port::config`]: administratively down.
pub const PORT_DOWN: u32 = 1;
/// Bit of [`Port::state`]: no link.
pub const LINK_DOWN: u32 = 1;
/// Bit of [`Features::capabilities`]: keeps queue statistics.
pub const QUEUE_STATS: u32 = 1 << 6;

wire_struct! {
    /// Who the switch is and what it can.
    pub struct Features {
        /// The lower 48 bits are usually a MAC address.
        datapath_id: u64,
        /// Packets that it can buffer.
        buffers: u32,
        /// Number of its flow tables.
        tables: u8,
        /// 0 for the main connection.
        auxiliary: u8 => pad 2,
        /// Bits such as [`QUEUE_STATS`].
        capabilities: u32,
        /// Not used in 1.3.
        reserved: u32,
    }
}

wire_struct! {
    /// How the switch treats fragments and how much of a packet it sends up.
    pub struct Config {
        /// Fragment handling.
        flags: u16,
        /// Bytes of a packet that goes to the controller on a miss.
        miss_send_length: u16,
    }
}

wire_struct! {
    /// A port of the switch.
    pub struct Port {
        /// Its number.
        port: PortNo => pad 4,
        /// Its own address.
        address: MacAddr => pad 2,
        /// Its name: the network interface.
        name: FixedText<16>,
        /// What the operator wants: [`PORT_DOWN`] and more.
        config: u32,
        /// What is: [`LINK_DOWN`] and more.
        state: u32,
        /// Current link features, as bits.
        current: u32,
        /// Advertised link features.
        advertised: u32,
        /// Supported link features.
        supported: u32,
        /// What the other end advertises.
        peer: u32,
        /// In kbit/s. A claim of the driver; veth says 10 Gbit/s whatever the link behind it.
        current_speed: u32,
        /// In kbit/s; 0 when not known.
        max_speed: u32,
    }
}

impl Port {
    /// Whether it is up for packets: administratively and by link.
    pub fn is_up(&self) -> bool {
        self.config & PORT_DOWN == 0 && self.state & LINK_DOWN == 0
    }
}

wire_enum! {
    /// What has happened to a port.
    pub enum PortReason: u8 {
        /// It is new.
        Add = 0,
        /// It is gone.
        Delete = 1,
        /// It has changed.
        Modify = 2,
    }
}

wire_struct! {
    /// A port has come, gone or changed.
    pub struct PortStatus {
        /// Which of these.
        reason: PortReason => pad 7,
        /// The port as it is now, or as it was.
        port: Port,
    }
}

wire_enum! {
    /// What a controller is to a switch.
    pub enum RoleKind: u32 {
        /// Only ask.
        NoChange = 0,
        /// One of several with equal rights; the default.
        Equal = 1,
        /// The one that may change things.
        Master = 2,
        /// May only look.
        Slave = 3,
    }
}

wire_struct! {
    /// A request for a role, and the answer to it.
    pub struct Role {
        /// Which role.
        role: RoleKind => pad 4,
        /// Grows with every election, so that a switch recognises a stale master.
        generation: u64,
    }
}
