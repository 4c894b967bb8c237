//! Changing flows, and hearing that one is gone (sections A.3.4.1 and A.4.2).
//!
//! Used through [`crate::Message`]. Flow statistics are in [`crate::multipart`].

use std::time::Duration;

use bytes::{BufMut, BytesMut};

use crate::instruction::Instruction;
use crate::matching::Match;
use crate::types::{NO_BUFFER, PortNo};
use crate::wire::{BodyError, Reader, Wire, put_all, wire_enum, wire_struct};

/// All tables, in deletions and in statistics requests (`OFPTT_ALL`).
pub const ALL_TABLES: u8 = 0xff;
/// Any group, in deletions and in statistics requests (`OFPG_ANY`).
pub const ANY_GROUP: u32 = u32::MAX;
/// Flag of a flow: say so when it is removed.
pub const SEND_FLOW_REMOVED: u16 = 1;
/// Flag of a flow: refuse it when it overlaps one of the same priority.
pub const CHECK_OVERLAP: u16 = 1 << 1;
/// Flag of a flow: modify and add start its counters again.
pub const RESET_COUNTS: u16 = 1 << 2;

wire_enum! {
    /// What a flow mod does.
    pub enum FlowCommand: u8 {
        /// Add, or replace the one with the same match and priority.
        Add = 0,
        /// Change the instructions of all that the match includes.
        Modify = 1,
        /// Change those of the one with exactly this match and priority.
        ModifyStrict = 2,
        /// Delete all that the match includes.
        Delete = 3,
        /// Delete the one with exactly this match and priority.
        DeleteStrict = 4,
    }
}

wire_enum! {
    /// Why a flow is gone.
    pub enum FlowRemovedReason: u8 {
        /// Nothing matched it for its idle time.
        IdleTimeout = 0,
        /// Its hard time is over.
        HardTimeout = 1,
        /// A flow mod deleted it.
        Delete = 2,
        /// Its group was deleted.
        GroupDelete = 3,
        /// Its meter was deleted (Open vSwitch, and 1.4).
        MeterDelete = 4,
    }
}

/// A change of the flow tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowMod {
    /// Whose flow it is, as its owner likes to write it.
    pub cookie: u64,
    /// For modify and delete: which bits of the cookie must agree; 0 is no restriction.
    pub cookie_mask: u64,
    /// Which table; [`ALL_TABLES`] only in deletions.
    pub table: u8,
    /// What to do.
    pub command: FlowCommand,
    /// Seconds without a packet after which it goes; 0 is never.
    pub idle_timeout: u16,
    /// Seconds after which it goes in any case; 0 is never.
    pub hard_timeout: u16,
    /// The highest that matches wins.
    pub priority: u16,
    /// A buffered packet to send through it, or [`NO_BUFFER`].
    pub buffer: u32,
    /// Deletions only: that output to this port.
    pub out_port: PortNo,
    /// Deletions only: that use this group.
    pub out_group: u32,
    /// [`SEND_FLOW_REMOVED`] and the others.
    pub flags: u16,
    /// Which packets.
    pub matching: Match,
    /// What with them.
    pub instructions: Vec<Instruction>,
}

impl FlowMod {
    /// Adds a flow to table 0 that stays until it is deleted.
    pub fn add(
        cookie: u64,
        priority: u16,
        matching: Match,
        instructions: Vec<Instruction>,
    ) -> Self {
        let command = FlowCommand::Add;
        Self { cookie, command, priority, matching, instructions, ..Self::nothing() }
    }

    /// Deletes, in all tables, the flows whose cookie agrees with `cookie` in the bits of `mask`.
    pub fn delete_by_cookie(cookie: u64, mask: u64) -> Self {
        Self { cookie, cookie_mask: mask, table: ALL_TABLES, ..Self::nothing() }
    }

    /// Deletes one flow of table 0.
    pub fn delete_strict(cookie: u64, mask: u64, priority: u16, matching: Match) -> Self {
        let command = FlowCommand::DeleteStrict;
        Self { cookie, cookie_mask: mask, command, priority, matching, ..Self::nothing() }
    }

    fn nothing() -> Self {
        Self {
            cookie: 0,
            cookie_mask: 0,
            table: 0,
            command: FlowCommand::Delete,
            idle_timeout: 0,
            hard_timeout: 0,
            priority: 0,
            buffer: NO_BUFFER,
            out_port: PortNo::ANY,
            out_group: ANY_GROUP,
            flags: 0,
            matching: Match::any(),
            instructions: Vec::new(),
        }
    }
}

impl Wire for FlowMod {
    fn get(reader: &mut Reader<'_>) -> Result<Self, BodyError> {
        Ok(Self {
            cookie: reader.get()?,
            cookie_mask: reader.get()?,
            table: reader.get()?,
            command: reader.get()?,
            idle_timeout: reader.get()?,
            hard_timeout: reader.get()?,
            priority: reader.get()?,
            buffer: reader.get()?,
            out_port: reader.get()?,
            out_group: reader.get()?,
            flags: reader.get()?,
            matching: {
                reader.skip(2)?;
                reader.get()?
            },
            instructions: reader.all()?,
        })
    }

    fn put(&self, out: &mut BytesMut) {
        out.put_u64(self.cookie);
        out.put_u64(self.cookie_mask);
        out.put_u8(self.table);
        self.command.put(out);
        out.put_u16(self.idle_timeout);
        out.put_u16(self.hard_timeout);
        out.put_u16(self.priority);
        out.put_u32(self.buffer);
        self.out_port.put(out);
        out.put_u32(self.out_group);
        out.put_u16(self.flags);
        out.put_u16(0);
        self.matching.put(out);
        put_all(&self.instructions, out);
    }
}

wire_struct! {
    /// A flow is gone that had [`SEND_FLOW_REMOVED`].
    pub struct FlowRemoved {
        /// Its cookie.
        cookie: u64,
        /// Its priority.
        priority: u16,
        /// Why.
        reason: FlowRemovedReason,
        /// Its table.
        table: u8,
        /// How long it was there.
        age: Duration,
        /// Its idle timeout in seconds.
        idle_timeout: u16,
        /// Its hard timeout in seconds.
        hard_timeout: u16,
        /// Packets that it matched.
        packets: u64,
        /// Bytes that it matched.
        bytes: u64,
        /// Its match.
        matching: Match,
    }
}
