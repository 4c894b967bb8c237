//! A plain pre-copy becomes a post-copy: a captured stream is read, and given to a real QEMU page by
//! page, as its guest asks for them. Codec, composer, return path and the order of pages against the
//! one judge that counts.

mod converted;

use bytes::Bytes;
use converted::{Absorbed, Pages, absorb, convert, moves};
use lifeboat_agent::postcopy::service::Batch;
use lifeboat_agent::qemu::stream::PageAt;
use lifeboat_scatter_gather::ledger::Where;

/// Everything is still at the source.
struct AtSource<'a>(&'a Absorbed);

impl AtSource<'_> {
    fn page(&self, at: PageAt) -> Bytes {
        self.0.pages[&at].clone().expect("pages of zeroes are not fetched")
    }
}

impl Pages for AtSource<'_> {
    fn place(&self, at: PageAt) -> Where {
        if self.0.pages[&at].is_some() { Where::AtSource } else { Where::Zero }
    }

    fn fetch(&mut self, at: PageAt, place: Where) -> Bytes {
        assert_eq!(place, Where::AtSource);
        self.page(at)
    }

    fn fetch_batch(&mut self, batch: Batch) -> Vec<(PageAt, Bytes)> {
        match batch {
            Batch::Source(pages) => pages.into_iter().map(|at| (at, self.page(at))).collect(),
            Batch::Pack(pack) => panic!("{pack} of a guest without stores"),
        }
    }
}

#[test]
fn a_pre_copy_becomes_a_post_copy_at_a_real_qemu() {
    for (stream, qemu) in moves() {
        let absorbed = absorb(stream);
        convert(&qemu, &absorbed, AtSource(&absorbed));
    }
}
