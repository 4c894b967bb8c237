//! What the source's agent makes of QEMU's plain pre-copy in post-copy and scatter-gather: notes of
//! what each page holds, and the rest of the stream. Pure; driven by `source/absorbing.rs`.
//!
//! ```text
//!  QEMU's stream --> [Absorber] --> the same stream without the pages of the guest's RAM
//!                        '--------> per page of it: unknown, zero, or not zero
//! ```
//!
//! The bytes of RAM are dropped: once the guest stands still they are read from the stopped QEMU,
//! so a guest of 64 GiB costs 16 MiB here. What cannot be read from there (firmware, video memory)
//! stays in the stream. Some pages are remembered by their hash, so that a mapping that is not the
//! guest's RAM is noticed before COMMIT.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use lifeboat_scatter_gather::link::pages::{Note, PageRun};
use lifeboat_scatter_gather::page::PageAt;
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

use super::contents::Contents;
use crate::qemu::stream::{
    PAGE_BYTES, RamLayout, RamRecord, Record, StreamError, StreamReader, StreamWriter,
};

/// One page in so many is remembered by its hash: a prime, so that no structure of a guest's memory
/// is always missed.
const SAMPLE_EVERY: u32 = 61;
/// Of the remembered pages so many per cent may differ. Under TCG a store may come after QEMU has
/// copied its page (docs/decisions/0006), on a saturated machine in 3 of 91 pages; the memory that is
/// read later is then the right one. Of another mapping nearly every page differs.
const DIFFER_MOST_PERCENT: usize = 20;

/// So many pages are compared at most: two milliseconds.
const COMPARED_MOST: usize = 1000;

/// Why a stream cannot be carried page by page.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AbsorbError {
    /// The stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// RAM in several blocks, or of another size than QEMU's process shows.
    #[error("the guest's RAM of {pages} pages is {found} of its blocks, not one; use pre-copy")]
    Blocks {
        /// Pages of the memory that was found in the process.
        pages: u64,
        /// Blocks of that size.
        found: usize,
    },
    /// The stream ended before every page was in it.
    #[error("QEMU's stream ended and {0} pages were not in it (is multifd on?)")]
    Incomplete(usize),
    /// What was found in the process is not what was sent.
    #[error("{differing} of {looked} pages that were compared are not those that QEMU sent")]
    OtherMemory {
        /// How many differ.
        differing: usize,
        /// How many were compared.
        looked: usize,
    },
}

/// Bytes of QEMU in, what is to be passed on out.
#[derive(Debug)]
pub struct Absorber {
    reader: StreamReader,
    writer: StreamWriter,
    /// Pages of the RAM that can be read from outside.
    pages: u64,
    /// Known once the stream has named its blocks.
    contents: Arc<OnceLock<Arc<Contents>>>,
    /// Hash of every [`SAMPLE_EVERY`]th page that is not zero.
    samples: Vec<u64>,
}

impl Absorber {
    /// An absorber for a guest whose RAM has this many pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self {
            reader: StreamReader::new(),
            writer: StreamWriter::new(),
            pages,
            contents: Arc::default(),
            samples: Vec::new(),
        }
    }

    /// What is known of the pages while they are absorbed; empty until the stream has named its blocks.
    #[must_use]
    pub fn contents(&self) -> Arc<OnceLock<Arc<Contents>>> {
        Arc::clone(&self.contents)
    }

    /// Takes in what arrived; gives what is to be passed on.
    ///
    /// # Errors
    /// [`AbsorbError`]; the migration ends then, and the guest runs on.
    pub fn feed(&mut self, bytes: Bytes) -> Result<Vec<Bytes>, AbsorbError> {
        self.reader.feed(bytes);
        while let Some(record) = self.reader.read()? {
            self.take(record)?;
        }
        Ok(self.writer.take())
    }

    fn take(&mut self, record: Record) -> Result<(), AbsorbError> {
        let contents = self.contents.get();
        let ram = contents.map(|contents| contents.block());
        match (record, contents) {
            (Record::Ram(RamRecord::Page { at, data, .. }), Some(contents))
                if Some(at.block) == ram =>
            {
                // The reader has checked that the page is of its block.
                contents.note(at.page, false);
                if at.page.is_multiple_of(SAMPLE_EVERY)
                    && let Some(sample) = self.samples.get_mut((at.page / SAMPLE_EVERY) as usize)
                {
                    *sample = xxh3_64(&data);
                }
            }
            (Record::Ram(RamRecord::Zero { at, .. }), Some(contents)) if Some(at.block) == ram => {
                contents.note(at.page, true);
            }
            // Names of blocks are written anew: those before may have been left out.
            (Record::Ram(RamRecord::Page { at, data, .. }), _) => self.writer.page(at, data),
            (Record::Ram(RamRecord::Zero { at, .. }), _) => self.writer.zero(at),
            (record, _) => {
                if let Record::RamStart { layout, .. } = &record {
                    self.find_ram(layout)?;
                }
                self.writer.write(&record);
            }
        }
        Ok(())
    }

    fn find_ram(&mut self, layout: &RamLayout) -> Result<(), AbsorbError> {
        let blocks = layout.blocks().iter().enumerate();
        let fits: Vec<usize> = blocks
            .filter(|(_, block)| u64::from(block.pages) == self.pages)
            .map(|(at, _)| at)
            .collect();
        let [block] = fits[..] else {
            return Err(AbsorbError::Blocks { pages: self.pages, found: fits.len() });
        };
        let pages = layout.blocks()[block].pages;
        if self.contents.set(Arc::new(Contents::new(block as u16, pages))).is_ok() {
            self.samples = vec![0; pages.div_ceil(SAMPLE_EVERY) as usize];
        }
        Ok(())
    }

    /// QEMU has ended its stream.
    ///
    /// # Errors
    /// [`AbsorbError::Incomplete`], and what the stream's end lacks.
    pub fn finish(self) -> Result<Absorbed, AbsorbError> {
        self.reader.finish()?;
        let missing = self.contents.get().map_or(0, |contents| contents.unknown() as usize);
        let Some(contents) = self.contents.get().filter(|_| missing == 0) else {
            return Err(AbsorbError::Incomplete(missing));
        };
        Ok(Absorbed { contents: Arc::clone(contents), samples: self.samples })
    }
}

/// What a guest's RAM held when it was stopped.
#[derive(Debug)]
pub struct Absorbed {
    contents: Arc<Contents>,
    samples: Vec<u64>,
}

impl Absorbed {
    /// The block that is RAM.
    #[must_use]
    pub fn block(&self) -> u16 {
        self.contents.block()
    }

    /// What each page holds.
    #[must_use]
    pub fn contents(&self) -> &Arc<Contents> {
        &self.contents
    }

    /// All pages, in order, and whether each is zero.
    pub fn all(&self) -> impl Iterator<Item = (PageAt, bool)> {
        self.contents.all()
    }

    /// Pages that are not zero, in order.
    pub fn data(&self) -> impl Iterator<Item = PageAt> {
        self.all().filter(|(_, zero)| !zero).map(|(at, _)| at)
    }

    /// Pages of zeroes, in order.
    pub fn zeroes(&self) -> impl Iterator<Item = PageAt> {
        self.all().filter(|(_, zero)| *zero).map(|(at, _)| at)
    }

    /// All pages as notes.
    #[must_use]
    pub fn notes(&self) -> Vec<Note> {
        let mut notes: Vec<Note> = Vec::new();
        for (PageAt { block, page }, zero) in self.all() {
            match notes.last_mut() {
                Some(note) if note.zero == zero => note.run.count += 1,
                _ => {
                    let run = PageRun { block, first: page, count: 1 };
                    notes.push(Note { run, zero });
                }
            }
        }
        notes
    }

    /// Compares what `read` finds with what QEMU sent.
    ///
    /// # Errors
    /// [`AbsorbError::OtherMemory`], or what `read` says.
    pub fn compare<E: From<AbsorbError>>(
        &self,
        mut read: impl FnMut(u32, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut page = [0; PAGE_BYTES];
        let (mut looked, mut differing) = (0, 0);
        let numbered = (0_u32..).step_by(SAMPLE_EVERY as usize).zip(&self.samples);
        // The guest stands still meanwhile.
        for (at, hash) in numbered.step_by(1 + self.samples.len() / COMPARED_MOST) {
            if self.contents.is_data(at) {
                read(at, &mut page)?;
                looked += 1;
                differing += usize::from(xxh3_64(&page) != *hash);
            }
        }
        if differing * 100 > looked * DIFFER_MOST_PERCENT {
            return Err(AbsorbError::OtherMemory { differing, looked }.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::stream::{RamBlock, compose};

    const RAM: u32 = 200;

    fn layout() -> RamLayout {
        let block = |name: &str, pages| RamBlock { name: name.to_owned(), pages };
        RamLayout::new(vec![block("pc.bios", 2), block("pc.ram", RAM)], 0).unwrap()
    }

    fn at(block: u16, page: u32) -> PageAt {
        PageAt { block, page }
    }

    fn page(byte: u8) -> Bytes {
        Bytes::from(vec![byte; PAGE_BYTES])
    }

    /// A pre-copy of a guest: firmware, pages 0..100 of RAM with data, the rest zero, page 7 twice.
    fn stream() -> Bytes {
        let mut writer = StreamWriter::new();
        compose::opening(&mut writer, "pc-i440fx-7.2", &[], &layout());
        compose::part(&mut writer, |writer| {
            writer.page(at(0, 0), page(1));
            writer.zero(at(0, 1));
            for number in 0..RAM {
                match number {
                    0..100 => writer.page(at(1, number), page(number as u8 + 1)),
                    _ => writer.zero(at(1, number)),
                }
            }
        });
        compose::part(&mut writer, |writer| writer.zero(at(1, 7)));
        writer.write(&Record::RamSection { section: compose::RAM_SECTION, kind: END });
        writer.write(&Record::Ram(RamRecord::EndOfBody));
        writer.write(&Record::Footer { section: compose::RAM_SECTION });
        writer.write(&Record::DeviceState(Bytes::from_static(b"devices")));
        compose::joined(&writer.take())
    }

    const END: crate::qemu::stream::Kind = crate::qemu::stream::Kind::End;

    fn absorbed(cut: usize) -> (Absorbed, Bytes) {
        let (mut absorber, mut rest) = (Absorber::new(RAM.into()), Vec::new());
        let mut stream = stream();
        while !stream.is_empty() {
            let piece = stream.split_to(cut.min(stream.len()));
            rest.extend(absorber.feed(piece).unwrap());
        }
        (absorber.finish().unwrap(), compose::joined(&rest))
    }

    #[test]
    fn the_rest_of_the_stream_is_a_stream_without_ram() {
        for cut in [1 << 20, 4096, 777] {
            let (_, rest) = absorbed(cut);
            let mut reader = StreamReader::new();
            reader.feed(rest);
            let (mut pages, mut tail) = (Vec::new(), Vec::new());
            while let Some(record) = reader.read().unwrap() {
                match record {
                    Record::Ram(RamRecord::Page { at, .. } | RamRecord::Zero { at, .. }) => {
                        pages.push(at);
                    }
                    Record::DeviceState(bytes) => tail.extend_from_slice(&bytes),
                    _ => {}
                }
            }
            assert_eq!(pages, [at(0, 0), at(0, 1)]);
            assert_eq!(tail, b"devices");
        }
    }

    #[test]
    fn the_last_version_of_each_page_is_noted() {
        let (absorbed, _) = absorbed(5000);
        let run = |first, count| PageRun { block: 1, first, count };
        let expected = [
            Note { run: run(0, 7), zero: false },
            Note { run: run(7, 1), zero: true },
            Note { run: run(8, 92), zero: false },
            Note { run: run(100, 100), zero: true },
        ];
        assert_eq!(absorbed.notes(), expected);
        assert_eq!(absorbed.data().count(), 99);
        assert_eq!(absorbed.zeroes().count(), 101);
    }

    #[test]
    fn memory_that_is_not_the_guests_is_noticed() {
        let (absorbed, _) = absorbed(5000);
        let right = |page: u32, buffer: &mut [u8]| {
            buffer.fill(page as u8 + 1);
            Ok::<(), AbsorbError>(())
        };
        absorbed.compare(right).unwrap();
        let wrong = |_: u32, buffer: &mut [u8]| {
            buffer.fill(9);
            Ok::<(), AbsorbError>(())
        };
        let error = absorbed.compare(wrong).unwrap_err();
        assert_eq!(error, AbsorbError::OtherMemory { differing: 2, looked: 2 });
    }

    #[test]
    fn what_cannot_be_read_from_outside_is_refused_by_name() {
        let mut absorber = Absorber::new(999);
        let error = absorber.feed(stream()).unwrap_err();
        assert_eq!(error, AbsorbError::Blocks { pages: 999, found: 0 });
        let mut cut = Absorber::new(RAM.into());
        let whole = stream();
        cut.feed(whole.slice(..whole.len() / 3)).unwrap();
        assert!(matches!(cut.finish(), Err(AbsorbError::Stream(StreamError::Cut { .. }))));
    }
}
