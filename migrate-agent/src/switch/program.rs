//! The classifier's program: which HTB class a frame belongs to, as classic BPF.
//!
//! Used by `switch` only. Classic BPF, because `tc` takes it as numbers: no compiler, no object
//! file, no map. The kernel calls it for each frame that leaves the port; what it returns is the
//! class (cls_bpf without direct action: 0 is no match, which leaves the frame to HTB's default).
//!
//! ```text
//!   DSCP q of an IPv4 packet, bare or behind one 802.1Q tag  ->  class 1:(q+1)
//!   DSCP 0, anything else, and a frame too short to tell     ->  default, class 1:1
//! ```
//!
//! Deliberately only this, because a mark is believed: the controller's flows clear the marks of
//! everybody who may not set them, and those flows see IPv4 behind at most one tag (OVS' own
//! `vlan-limit`). A program that looked deeper, or at IPv6, would believe marks that nobody clears.

use std::fmt;

/// One instruction of classic BPF (`struct sock_filter` of `linux/filter.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    /// What to do.
    pub(super) code: u16,
    /// Instructions to skip when the comparison holds.
    pub(super) jump_true: u8,
    /// Instructions to skip when it does not.
    pub(super) jump_false: u8,
    /// The operand.
    pub(super) k: u32,
}

/// The operations that the program uses, by their names in the kernel's BPF assembler. Class,
/// size, mode and source are put together as in `linux/bpf_common.h`.
mod op {
    /// X = k
    pub(super) const LDX: u16 = 0x01;
    /// A = the 16 bits of the frame at k, in network order; past its end: return 0
    pub(super) const LDH: u16 = 0x28;
    /// A = the byte of the frame at X + k; past its end: return 0
    pub(super) const LDB_X: u16 = 0x50;
    /// A = A + k
    pub(super) const ADD: u16 = 0x04;
    /// A = A | k
    pub(super) const OR: u16 = 0x44;
    /// A = A >> k
    pub(super) const RSH: u16 = 0x74;
    /// A == k?
    pub(super) const JEQ: u16 = 0x15;
    /// return k
    pub(super) const RET: u16 = 0x06;
    /// return A
    pub(super) const RET_A: u16 = 0x16;
}

const fn instruction(code: u16, jump_true: u8, jump_false: u8, k: u32) -> Instruction {
    Instruction { code, jump_true, jump_false, k }
}

/// The program. A tag may also have been taken out of the frame by the kernel (VLAN offload, as on
/// the kernel datapath): then the frame looks bare, and is read as such.
pub(super) const PROGRAM: [Instruction; 13] = [
    instruction(op::LDX, 0, 0, 0),          //  0: X = 0: no tag so far
    instruction(op::LDH, 0, 0, 12),         //  1: A = EtherType
    instruction(op::JEQ, 0, 2, 0x8100),     //  2: an 802.1Q tag? if not, to 5
    instruction(op::LDX, 0, 0, 4),          //  3: X = 4: all that follows is behind the tag
    instruction(op::LDH, 0, 0, 16),         //  4: A = the EtherType in the tag
    instruction(op::JEQ, 0, 6, 0x0800),     //  5: IPv4? if not, to 12
    instruction(op::LDB_X, 0, 0, 15),       //  6: A = the second byte of IPv4: DSCP, ECN
    instruction(op::RSH, 0, 0, 2),          //  7: A = DSCP
    instruction(op::JEQ, 3, 0, 0),          //  8: not marked? to 12
    instruction(op::ADD, 0, 0, 1),          //  9: A = q + 1, as OVS numbers the classes
    instruction(op::OR, 0, 0, 0x0001_0000), // 10: A = 1:(q+1)
    instruction(op::RET_A, 0, 0, 0),        // 11: that class; HTB's default where it is missing
    instruction(op::RET, 0, 0, 0),          // 12: no match: HTB's default
];

/// The program as `tc`'s `bytecode` argument: `13,1 0 0 0,40 0 0 12,...`.
pub(super) fn bytecode() -> String {
    let mut text = PROGRAM.len().to_string();
    for instruction in PROGRAM {
        text.push_str(&format!(",{instruction}"));
    }
    text
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, jump_true, jump_false, k } = self;
        write!(f, "{code} {jump_true} {jump_false} {k}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program over a frame as the kernel does (Documentation/networking/filter.rst), as
    /// far as the program goes; anything else panics.
    fn classify(frame: &[u8]) -> u32 {
        let (mut a, mut x, mut next) = (0_u32, 0_u32, 0_usize);
        loop {
            let Instruction { code, jump_true, jump_false, k } = PROGRAM[next];
            next += 1;
            match code {
                op::LDX => x = k,
                op::LDH => match frame.get(k as usize..k as usize + 2) {
                    Some(bytes) => a = u32::from(u16::from_be_bytes([bytes[0], bytes[1]])),
                    None => return 0,
                },
                op::LDB_X => match frame.get((x + k) as usize) {
                    Some(&byte) => a = u32::from(byte),
                    None => return 0,
                },
                op::ADD => a = a.wrapping_add(k),
                op::OR => a |= k,
                op::RSH => a >>= k,
                op::JEQ => next += usize::from(if a == k { jump_true } else { jump_false }),
                op::RET => return k,
                op::RET_A => return a,
                other => panic!("instruction {other:#x} is not used"),
            }
        }
    }

    /// A frame: addresses, then the given 16-bit words, then an IP header's first two bytes and
    /// a little more.
    fn frame(types: &[u16], ip: [u8; 2]) -> Vec<u8> {
        let mut frame = vec![0x02; 12];
        frame.extend(types.iter().flat_map(|word| word.to_be_bytes()));
        frame.extend(ip);
        frame.extend([0; 40]);
        frame
    }

    fn ipv4(dscp: u8) -> [u8; 2] {
        // With both ECN bits set: they are not part of the mark.
        [0x45, dscp << 2 | 3]
    }

    #[test]
    fn each_mark_has_the_class_of_its_queue() {
        for queue in 1..=63_u8 {
            let class = 0x0001_0000 + u32::from(queue) + 1;
            assert_eq!(classify(&frame(&[0x0800], ipv4(queue))), class);
            assert_eq!(classify(&frame(&[0x8100, 0xe005, 0x0800], ipv4(queue))), class);
        }
    }

    #[test]
    fn whatever_bears_no_mark_that_is_cleared_is_left_to_the_default() {
        let arp = [0, 1];
        // Traffic class 0x1c: DSCP 7.
        let ipv6 = [0x61, 0xc0];
        let frames = [
            frame(&[0x0800], ipv4(0)),
            frame(&[0x8100, 5, 0x0800], ipv4(0)),
            frame(&[0x0806], arp),
            frame(&[0x8100, 5, 0x0806], arp),
            frame(&[0x86dd], ipv6),
            frame(&[0x8100, 5, 0x86dd], ipv6),
            frame(&[0x88a8, 5, 0x0800], ipv4(7)),
            frame(&[0x88a8, 5, 0x8100, 6, 0x0800], ipv4(7)),
            frame(&[0x8100, 5, 0x8100, 6, 0x0800], ipv4(7)),
        ];
        for frame in frames {
            assert_eq!(classify(&frame), 0, "{frame:02x?}");
        }
    }

    #[test]
    fn a_frame_cut_short_anywhere_is_left_to_the_default_or_told_in_full() {
        for (types, enough) in [(&[0x0800][..], 16), (&[0x8100, 5, 0x0800][..], 20)] {
            let whole = frame(types, ipv4(7));
            for length in 0..whole.len() {
                let expected = if length < enough { 0 } else { 0x0001_0008 };
                assert_eq!(classify(&whole[..length]), expected, "{length} bytes");
            }
        }
    }

    #[test]
    fn every_jump_stays_inside_and_the_last_instruction_returns() {
        for (index, instruction) in PROGRAM.iter().enumerate() {
            let furthest = instruction.jump_true.max(instruction.jump_false);
            assert!(index + 1 + usize::from(furthest) < PROGRAM.len() + usize::from(furthest == 0));
        }
        assert_eq!(PROGRAM.last().unwrap().code, op::RET);
    }

    #[test]
    fn tc_is_given_the_number_of_instructions_and_each_of_them() {
        let text = bytecode();
        assert!(text.starts_with("13,1 0 0 0,40 0 0 12,21 0 2 33024,"), "{text}");
        assert_eq!(text.split(',').count(), 14);
    }
}
