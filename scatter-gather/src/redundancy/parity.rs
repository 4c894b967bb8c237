//! Parity: of the packs of a stripe any one is the XOR of the others. Used by the source to make it
//! and by the destination to get back what a lost store held.
//!
//! ```text
//!  "LBXR" | format 1 | members u8 | 0 be16 | stripe be64 | body be32 | 0 be32 | check of the body be64
//!  member: pack be64 | length be32 | 0 be32      (x members)
//!  check of all before it, be64
//!  body: as long as the longest member; shorter ones count as if zeroes followed
//! ```
//!
//! The arithmetic works on any part of the packs: for one page that the guest waits for, the same
//! bytes of the others are enough ([`body_offset`], [`restore`]).

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

use crate::page::PackId;

const MAGIC: [u8; 4] = *b"LBXR";
const FORMAT: u8 = 1;
const HEAD_BYTES: usize = 32;
const MEMBER_BYTES: usize = 16;
const CHECK_BYTES: usize = 8;
/// The most packs of a stripe: more would make a loss slow to mend.
pub const MEMBERS_MOST: usize = 16;

/// Why a parity can't be made or used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ParityError {
    /// A stripe has no room for another pack.
    #[error("a stripe holds at most {MEMBERS_MOST} packs")]
    Full,
    /// A pack of 4 GiB or more.
    #[error("a pack too long for a stripe")]
    TooLong,
    /// Bytes that are no parity, or not this one.
    #[error("no parity of stripe {0}")]
    NotThis(u64),
    /// The parity was changed where it waited.
    #[error("the parity of stripe {0} was changed where it waited")]
    Changed(u64),
    /// A pack that is not in the stripe.
    #[error("{pack} is not in stripe {stripe}")]
    NoMember {
        /// The stripe.
        stripe: u64,
        /// The pack.
        pack: PackId,
    },
    /// Some of the others are nowhere: the source gave the stripe up, and sent all of it again.
    #[error("of the {members} packs of stripe {stripe} only {known} others are known")]
    GivenUp {
        /// The stripe.
        stripe: u64,
        /// Its packs.
        members: usize,
        /// Those that there are, without the one that is wanted.
        known: usize,
    },
}

/// One pack of a stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Its number.
    pub pack: PackId,
    /// Its bytes.
    pub length: u32,
}

/// A stripe that is being filled.
#[derive(Debug, Clone)]
pub struct Stripe {
    number: u64,
    members: Vec<Member>,
    body: BytesMut,
}

impl Stripe {
    /// An empty stripe.
    #[must_use]
    pub fn new(number: u64) -> Self {
        Self { number, members: Vec::new(), body: BytesMut::new() }
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The packs that it has.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Adds a pack.
    ///
    /// # Errors
    /// [`ParityError::Full`] and [`ParityError::TooLong`].
    pub fn add(&mut self, pack: PackId, bytes: &[u8]) -> Result<(), ParityError> {
        if self.members.len() == MEMBERS_MOST {
            return Err(ParityError::Full);
        }
        let length = u32::try_from(bytes.len()).map_err(|_| ParityError::TooLong)?;
        self.members.push(Member { pack, length });
        if self.body.len() < bytes.len() {
            self.body.resize(bytes.len(), 0);
        }
        xor(&mut self.body, bytes);
        Ok(())
    }

    /// Ends the stripe: what is to be stored.
    #[must_use]
    pub fn finish(self) -> Bytes {
        let mut out = BytesMut::with_capacity(body_offset(self.members.len()) + self.body.len());
        out.put_slice(&MAGIC);
        out.put_u8(FORMAT);
        out.put_u8(self.members.len() as u8);
        out.put_u16(0);
        out.put_u64(self.number);
        out.put_u32(self.body.len() as u32);
        out.put_u32(0);
        out.put_u64(xxh3_64(&self.body));
        for member in &self.members {
            out.put_u64(member.pack.0);
            out.put_u32(member.length);
            out.put_u32(0);
        }
        let check = xxh3_64(&out);
        out.put_u64(check);
        out.put_slice(&self.body);
        out.freeze()
    }
}

/// Where the body begins in the parity of a stripe of so many packs: byte n of it is the XOR of
/// byte n of each pack.
#[must_use]
pub fn body_offset(members: usize) -> usize {
    HEAD_BYTES + members * MEMBER_BYTES + CHECK_BYTES
}

/// A parity that was read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parity {
    /// The packs of the stripe.
    pub members: Vec<Member>,
    body: Bytes,
}

impl Parity {
    /// Reads the parity of stripe `stripe`.
    ///
    /// # Errors
    /// [`ParityError::NotThis`] and [`ParityError::Changed`].
    pub fn decode(stripe: u64, bytes: &Bytes) -> Result<Self, ParityError> {
        let not_this = ParityError::NotThis(stripe);
        let (mut head, _) = bytes.split_at_checked(HEAD_BYTES).ok_or(not_this)?;
        if head[..4] != MAGIC || head[4] != FORMAT {
            return Err(not_this);
        }
        head.advance(5);
        let count = usize::from(head.get_u8());
        head.advance(2);
        let number = head.get_u64();
        let length = u64::from(head.get_u32());
        head.advance(4);
        let body_check = head.get_u64();
        let start = body_offset(count);
        let whole = bytes.len() as u64 == start as u64 + length;
        if number != stripe || count > MEMBERS_MOST || !whole {
            return Err(not_this);
        }
        let body = bytes.slice(start..);
        let check = (&bytes[start - CHECK_BYTES..]).get_u64();
        if check != xxh3_64(&bytes[..start - CHECK_BYTES]) || body_check != xxh3_64(&body) {
            return Err(ParityError::Changed(stripe));
        }
        let members = bytes[HEAD_BYTES..start - CHECK_BYTES].chunks_exact(MEMBER_BYTES);
        let member = |mut bytes: &[u8]| {
            let pack = PackId(bytes.get_u64());
            Member { pack, length: bytes.get_u32() }
        };
        Ok(Self { members: members.map(member).collect(), body })
    }

    /// The pack `lost`, from all others of its stripe.
    ///
    /// # Errors
    /// [`ParityError::NoMember`] for a pack that is not in the stripe, [`ParityError::GivenUp`]. Whether the result is what
    /// was lost is for the pack's own checks to say.
    pub fn rebuild(
        &self,
        stripe: u64,
        lost: PackId,
        others: &[Bytes],
    ) -> Result<BytesMut, ParityError> {
        let member = self.members.iter().find(|member| member.pack == lost);
        let member = member.ok_or(ParityError::NoMember { stripe, pack: lost })?;
        let (members, known) = (self.members.len(), others.len());
        if known + 1 != members {
            return Err(ParityError::GivenUp { stripe, members, known });
        }
        let mut bytes = restore(&self.body, others);
        bytes.truncate(member.length as usize);
        Ok(bytes)
    }
}

/// Bytes of a lost pack: the same bytes of the parity's body, XOR those of all other packs. Others
/// that end earlier count as if zeroes followed.
#[must_use]
pub fn restore(parity: &[u8], others: &[Bytes]) -> BytesMut {
    let mut bytes = BytesMut::from(parity);
    others.iter().for_each(|other| xor(&mut bytes, other));
    bytes
}

/// `into ^= other`, as far as both reach. Written so that the compiler uses the widest registers.
fn xor(into: &mut [u8], other: &[u8]) {
    into.iter_mut().zip(other).for_each(|(into, other)| *into ^= other);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stripe(packs: &[Vec<u8>]) -> Bytes {
        let mut stripe = Stripe::new(4);
        for (id, pack) in (0..).zip(packs) {
            stripe.add(PackId(id), pack).unwrap();
        }
        assert_eq!(stripe.members().len(), packs.len());
        stripe.finish()
    }

    proptest! {
        #[test]
        fn any_one_pack_comes_back_from_the_others(
            packs in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..8),
            lost in any::<prop::sample::Index>(),
            (from, to) in (0_usize..300, 0_usize..300),
        ) {
            let bytes = stripe(&packs);
            let parity = Parity::decode(4, &bytes).unwrap();
            let lost = lost.index(packs.len());
            let others: Vec<Bytes> = packs
                .iter()
                .enumerate()
                .filter(|(id, _)| *id != lost)
                .map(|(_, pack)| Bytes::from(pack.clone()))
                .collect();
            let rebuilt = parity.rebuild(4, PackId(lost as u64), &others).unwrap();
            prop_assert_eq!(&rebuilt[..], &packs[lost][..]);

            let whole = &packs[lost];
            let (from, to) = (from.min(to).min(whole.len()), from.max(to).min(whole.len()));
            let part = |bytes: &Bytes| bytes.slice(from.min(bytes.len())..to.min(bytes.len()));
            let start = body_offset(packs.len());
            let parts: Vec<Bytes> = others.iter().map(part).collect();
            let restored = restore(&bytes[start + from..start + to], &parts);
            prop_assert_eq!(&restored[..], &whole[from..to]);
        }

        #[test]
        fn a_changed_parity_is_noticed_and_no_bytes_panic(
            packs in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 1..4),
            at in any::<prop::sample::Index>(),
            change in 1_u8..=255,
            noise in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let bytes = stripe(&packs);
            let mut changed = BytesMut::from(&bytes[..]);
            let at = at.index(changed.len());
            changed[at] ^= change;
            prop_assert!(Parity::decode(4, &changed.freeze()).is_err());
            prop_assert_eq!(Parity::decode(5, &bytes), Err(ParityError::NotThis(5)));
            let headed = [&MAGIC[..], &[FORMAT], &noise].concat();
            prop_assert!(Parity::decode(4, &headed.into()).is_err());
        }
    }

    #[test]
    fn a_stripe_has_an_end() {
        let mut stripe = Stripe::new(0);
        for id in 0..MEMBERS_MOST as u64 {
            stripe.add(PackId(id), b"x").unwrap();
        }
        assert_eq!(stripe.add(PackId(99), b"x"), Err(ParityError::Full));
        let parity = Parity::decode(0, &stripe.finish()).unwrap();
        let missing = parity.rebuild(0, PackId(99), &[]);
        assert_eq!(missing, Err(ParityError::NoMember { stripe: 0, pack: PackId(99) }));
    }
}
