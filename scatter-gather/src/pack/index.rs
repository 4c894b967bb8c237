//! Where each page is, from the packs alone: for a destination that has lost what it was told. Pure.
//!
//! Of two copies of a page the one with the higher version counts, be it a slot or a run of zeroes: a page that
//! was packed while its guest still wrote to it is in a later pack again. That holds only once the source has
//! sent everything; before that the source is asked.

use std::collections::{BTreeMap, HashMap};

use super::{Contents, Width};
use crate::link::pages::{Note, runs};
use crate::page::{PackId, PageAt, Version};

/// What all packs of a migration hold.
#[derive(Debug, Default)]
pub struct Index {
    /// The newest copy of each page; `None`: it is zero.
    newest: HashMap<PageAt, (Version, Option<(PackId, u16)>)>,
    packs: BTreeMap<PackId, (Width, Vec<PageAt>)>,
}

impl Index {
    /// Takes in what a pack holds.
    pub fn add(&mut self, pack: PackId, contents: &Contents) {
        for page in &contents.pages {
            self.note(page.at, page.version, Some((pack, page.slot)));
        }
        for run in &contents.zeroes {
            for back in 0..run.count {
                let page = run.first.saturating_add(run.count - 1 - back);
                let version = Version(run.version.0.saturating_sub(back.into()));
                self.note(PageAt { block: run.block, page }, version, None);
            }
        }
        let pages = contents.pages.iter().map(|page| page.at).collect();
        self.packs.insert(pack, (contents.width, pages));
    }

    fn note(&mut self, at: PageAt, version: Version, place: Option<(PackId, u16)>) {
        let newest = self.newest.entry(at).or_insert((version, place));
        if newest.0 < version {
            *newest = (version, place);
        }
    }

    /// The pages that are zero.
    #[must_use]
    pub fn zeroes(&self) -> Vec<Note> {
        let zero = self.newest.iter().filter(|(_, (_, place))| place.is_none());
        let mut pages: Vec<PageAt> = zero.map(|(at, _)| *at).collect();
        pages.sort_unstable();
        runs(&pages).into_iter().map(|run| Note { run, zero: true }).collect()
    }

    /// Each pack in order, with the width of its slots, and its pages by slot; `None` for one that is newer
    /// elsewhere.
    pub fn packs(&self) -> impl Iterator<Item = (PackId, Width, Vec<Option<PageAt>>)> {
        self.packs.iter().map(|(pack, (width, pages))| {
            let counts = |(slot, at): (u16, &PageAt)| {
                let newest = self.newest.get(at).and_then(|(_, place)| *place);
                (newest == Some((*pack, slot))).then_some(*at)
            };
            (*pack, *width, (0..).zip(pages).map(counts).collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::link::pages::PageRun;
    use crate::pack::{OpenPage, ZeroRun};

    fn at(page: u32) -> PageAt {
        PageAt { block: 1, page }
    }

    fn contents(pages: &[(u32, u64)], zeroes: &[(u32, u32, u64)]) -> Contents {
        let page = |(slot, (page, version)): (u16, &(u32, u64))| OpenPage {
            at: at(*page),
            slot,
            version: Version(*version),
            data: Bytes::new(),
        };
        let run = |(first, count, version): &(u32, u32, u64)| ZeroRun {
            block: 1,
            first: *first,
            count: *count,
            version: Version(*version),
        };
        Contents {
            width: Width::WHOLE,
            pages: (0..).zip(pages).map(page).collect(),
            zeroes: zeroes.iter().map(run).collect(),
        }
    }

    #[test]
    fn the_newest_copy_of_a_page_counts_in_whatever_order_packs_are_read() {
        let packs = [
            (PackId(0), contents(&[(1, 0), (2, 1), (3, 2)], &[])),
            // Page 1 again, page 3 zero with 4 and 5.
            (PackId(1), contents(&[(1, 7), (9, 8)], &[(3, 3, 11)])),
        ];
        for order in [[0, 1], [1, 0]] {
            let mut index = Index::default();
            for number in order {
                index.add(packs[number].0, &packs[number].1);
            }
            let found: Vec<_> = index.packs().collect();
            let expected = [
                (PackId(0), Width::WHOLE, vec![None, Some(at(2)), None]),
                (PackId(1), Width::WHOLE, vec![Some(at(1)), Some(at(9))]),
            ];
            assert_eq!(found, expected);
            let run = PageRun { block: 1, first: 3, count: 3 };
            assert_eq!(index.zeroes(), [Note { run, zero: true }]);
        }
    }

    #[test]
    fn a_page_that_was_zero_when_a_later_pack_has_it_is_not() {
        let mut index = Index::default();
        // Versions 3, 4 and 5: page 6 has 4.
        index.add(PackId(0), &contents(&[], &[(5, 3, 5)]));
        index.add(PackId(1), &contents(&[(6, 5)], &[]));
        let page = |first| Note { run: PageRun { block: 1, first, count: 1 }, zero: true };
        assert_eq!(index.zeroes(), [page(5), page(7)]);
    }
}
