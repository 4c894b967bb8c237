//! How wide the slots of a pack are: a whole page's bytes, or some eighths of them where pages are
//! compressed (LZ4) and fit. Pure. Used by the pack's builder and reader.
//!
//! ```text
//!  body of a slot:  8 eighths: page 4096        fewer: length be16 | LZ4 block | zeroes, to n x 512
//! ```
//!
//! All slots of a pack are equally wide, so that one page is still fetched by its place alone, and a
//! stripe's packs are about equally long whatever is in them. How many eighths a page takes is all that
//! its slot tells of it (docs/decisions/0046).

use super::{Batch, HEADER_BYTES, SLOT_HEAD_BYTES};
use crate::page::PAGE_BYTES;
use crate::seal::TAG_BYTES;

const LENGTH_BYTES: usize = 2;
/// What LZ4 may need for a page, however it looks.
const SCRATCH_BYTES: usize = lz4_flex::block::get_maximum_output_size(PAGE_BYTES);

/// How many bytes of its slot a page takes: eighths of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Width(u8);

impl Default for Width {
    fn default() -> Self {
        Self::WHOLE
    }
}

impl Width {
    /// How many widths there are.
    pub const NUMBER: usize = 8;
    /// All of a page, as it is.
    pub const WHOLE: Self = Self(Self::NUMBER as u8);
    /// Where compressed pages are that hardly have anything in them.
    pub const LEAST: Self = Self(1);

    /// The width with this number of eighths.
    #[must_use]
    pub fn eighths(number: u8) -> Option<Self> {
        (1..=Self::WHOLE.0).contains(&number).then_some(Self(number))
    }

    /// Its eighths.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// All of them, the narrowest first.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> {
        (1..=Self::WHOLE.0).map(Self)
    }

    /// Bytes of a slot's body, tag not included.
    #[must_use]
    pub const fn body_bytes(self) -> usize {
        PAGE_BYTES / Self::NUMBER * self.0 as usize
    }

    /// Bytes of one slot.
    #[must_use]
    pub const fn slot_bytes(self, sealed: bool) -> usize {
        SLOT_HEAD_BYTES + self.body_bytes() + if sealed { TAG_BYTES } else { 0 }
    }

    /// Where slot `slot` begins in its pack, in bytes.
    #[must_use]
    pub fn slot_offset(self, slot: u16, sealed: bool) -> usize {
        HEADER_BYTES + usize::from(slot) * self.slot_bytes(sealed)
    }

    /// How many slots a pack has at most: as many as are no longer than a batch of whole pages.
    #[must_use]
    pub fn slots_most(self, batch: Batch, sealed: bool) -> u16 {
        let room = usize::from(batch.pages()) * Self::WHOLE.slot_bytes(sealed);
        let slots = room / self.slot_bytes(sealed);
        u16::try_from(slots).unwrap_or(Batch::MOST).min(Batch::MOST)
    }
}

/// Compresses pages for slots; keeps the memory for it.
pub(super) struct Squeezer {
    scratch: Vec<u8>,
}

impl Squeezer {
    pub(super) fn new() -> Self {
        Self { scratch: vec![0; LENGTH_BYTES + SCRATCH_BYTES] }
    }

    /// `page` as the body of the narrowest slot that it fits, padding left out.
    pub(super) fn squeeze<'a>(&'a mut self, page: &'a [u8]) -> (Width, &'a [u8]) {
        let Ok(length) = lz4_flex::block::compress_into(page, &mut self.scratch[LENGTH_BYTES..])
        else {
            return (Width::WHOLE, page);
        };
        let bytes = LENGTH_BYTES + length;
        match Width::all().find(|width| bytes <= width.body_bytes()) {
            Some(width) if width != Width::WHOLE => {
                self.scratch[..LENGTH_BYTES].copy_from_slice(&(length as u16).to_be_bytes());
                (width, &self.scratch[..bytes])
            }
            _ => (Width::WHOLE, page),
        }
    }
}

/// The page in a body of a narrow slot; `None` where there is none.
pub(super) fn unsqueezed(body: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = body.split_first_chunk()?;
    let block = rest.get(..u16::from_be_bytes(*length).into())?;
    let mut page = vec![0; PAGE_BYTES];
    let found = lz4_flex::block::decompress_into(block, &mut page).ok()?;
    (found == PAGE_BYTES).then_some(page)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_page_comes_out_of_its_slot_as_it_went_in(
            seed in proptest::collection::vec(any::<u8>(), 1..600),
            random in 0_usize..PAGE_BYTES,
        ) {
            let mut state = 1_u32;
            let noise = std::iter::repeat_with(move || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            });
            let page: Vec<u8> =
                noise.take(random).chain(seed.into_iter().cycle()).take(PAGE_BYTES).collect();
            let mut squeezer = Squeezer::new();
            let (width, body) = squeezer.squeeze(&page);
            prop_assert!(body.len() <= width.body_bytes());
            if width == Width::WHOLE {
                prop_assert_eq!(body, &page[..]);
            } else {
                let mut body = body.to_vec();
                body.resize(width.body_bytes(), 0);
                prop_assert_eq!(unsqueezed(&body), Some(page));
            }
        }

        #[test]
        fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..2048)) {
            if let Some(page) = unsqueezed(&body) {
                prop_assert_eq!(page.len(), PAGE_BYTES);
            }
        }
    }

    #[test]
    fn packs_of_every_width_are_about_equally_long() {
        for sealed in [false, true] {
            let bytes = |width: Width| {
                width.slot_offset(width.slots_most(Batch::default(), sealed), sealed)
            };
            for width in Width::all() {
                let share = bytes(width) as f64 / bytes(Width::WHOLE) as f64;
                assert!((0.97..=1.0).contains(&share), "{width:?}: {share}");
            }
        }
    }

    #[test]
    fn a_body_that_is_more_or_less_than_a_page_is_none() {
        for bytes in [PAGE_BYTES - 1, PAGE_BYTES + 1, 60_000] {
            let block = lz4_flex::block::compress(&vec![7; bytes]);
            let mut body = (block.len() as u16).to_be_bytes().to_vec();
            body.extend_from_slice(&block);
            assert_eq!(unsqueezed(&body), None, "{bytes} bytes");
        }
    }
}
