//! Landing in memory that somebody else owns and lends for the time of one read.

use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use crate::ledger::{Ledger, NoPlace};
use crate::plan::{Block, ReadPlan};
use crate::sink::{Sink, SinkError, Target};

/// The memory for a segment does not suit it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// There are more or fewer pieces of memory than segments.
    #[error("{found} pieces of memory for {expected} segments")]
    Count {
        /// Segments of the plan.
        expected: usize,
        /// Pieces of memory.
        found: usize,
    },
    /// A piece is shorter or longer than its segment.
    #[error("{found} bytes of memory for segment {segment} of {expected} bytes")]
    Length {
        /// Index of the segment.
        segment: usize,
        /// Its length in bytes.
        expected: u64,
        /// Length of the memory in bytes.
        found: u64,
    },
}

/// The sink of loads into a caller's memory: each segment of the plan lands in one piece of it.
///
/// Once the read has succeeded, every byte of every piece has been written.
pub struct Lent<'d> {
    ledger: Ledger<'d>,
    /// Per segment, the start of its memory: exclusively this value's for `'d`, and as long as the
    /// segment.
    pieces: Vec<NonNull<u8>>,
    memory: PhantomData<&'d mut [MaybeUninit<u8>]>,
    on_landed: Option<OnBlock<'d>>,
}

/// Told when a block is in place, from the thread that read it; its error ends the read.
pub type OnBlock<'a> = &'a (dyn Fn(&Block) -> Result<(), SinkError> + Send + Sync);

// SAFETY: it is a set of `&mut [MaybeUninit<u8>]`, which may go to another thread.
unsafe impl Send for Lent<'_> {}
// SAFETY: shared references hand out disjoint parts of the memory, each once (see `Sink` below).
unsafe impl Sync for Lent<'_> {}

impl fmt::Debug for Lent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").field("pieces", &self.pieces.len()).finish_non_exhaustive()
    }
}

impl<'d> Lent<'d> {
    /// A sink for `plan`, with a piece of memory for each of its segments, in their order and of
    /// their length: the plan's extents start and end at multiples of its alignment.
    ///
    /// # Errors
    ///
    /// [`Misfit`].
    pub fn new(
        plan: &'d ReadPlan,
        memory: impl IntoIterator<Item = &'d mut [MaybeUninit<u8>]>,
    ) -> Result<Self, Misfit> {
        let pieces: Vec<_> = memory.into_iter().collect();
        let (expected, found) = (plan.segments().len(), pieces.len());
        if expected != found {
            return Err(Misfit::Count { expected, found });
        }
        for (index, (segment, piece)) in plan.segments().iter().zip(&pieces).enumerate() {
            let (expected, found) = (segment.len(), piece.len() as u64);
            if expected != found {
                return Err(Misfit::Length { segment: index, expected, found });
            }
        }
        let start = |piece: &'d mut [MaybeUninit<u8>]| NonNull::from(piece).cast::<u8>();
        Ok(Self {
            ledger: Ledger::new(plan),
            pieces: pieces.into_iter().map(start).collect(),
            memory: PhantomData,
            on_landed: None,
        })
    }

    /// Calls `hook` for each block that has landed. Nothing touches the memory of a segment any more once
    /// all its blocks have.
    pub fn on_landed(self, hook: OnBlock<'d>) -> Self {
        Self { on_landed: Some(hook), ..self }
    }
}

// SAFETY: every target is the place of one block of the plan in the piece of its segment. The piece
// is as long as the segment (checked by `new`), so that the block's whole length lies in it; blocks
// lie apart in their segment, and pieces apart from each other. The memory is borrowed exclusively
// for `'d`, which outlives this value and so the readers that borrow it. A block's place is lent
// once: the ledger checks that the block is the plan's own and free.
unsafe impl Sink for Lent<'_> {
    fn reserve(&self, block: &Block, _wait: bool) -> Result<Option<Target>, SinkError> {
        self.ledger.free(block)?;
        let segment = self.ledger.plan().segments().get(block.segment as usize);
        let piece = self.pieces.get(block.segment as usize);
        let (Some(segment), Some(piece)) = (segment, piece) else {
            return Err(NoPlace::of(block).into());
        };
        // SAFETY: the block lies in its segment, and the piece is as long as that.
        let ptr = unsafe { piece.add((block.offset - segment.start) as usize) };
        // SAFETY: see the comment on the implementation.
        Ok(Some(unsafe { self.ledger.lend(block, ptr, block.len as usize, 0) }?))
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        self.ledger.landed(block, &target)?;
        self.on_landed.map_or(Ok(()), |hook| hook(block))
    }

    fn abandoned(&self, _block: &Block, _target: Target) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Control, Engine, ReadOptions, read};
    use crate::extent::Extent;
    use crate::file::SourceFile;
    use crate::plan::Limits;

    #[test]
    fn bytes_land_in_the_memory_that_was_lent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let bytes: Vec<u8> = (0..300_000u32).map(|i| (i / 3) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let files = [SourceFile::open(&path, None).unwrap()];
        let limits = Limits { align: 1, block: 10_000, gap: 0, segment: 1 };
        let ranges = [5..90_001, 90_001..90_002, 200_000..300_000];
        let extents = ranges.iter().map(|range| Extent::new(0, range.clone())).collect();
        let plan = ReadPlan::new(extents, limits).unwrap();
        for engine in [Engine::Auto, Engine::Pread, Engine::Mmap] {
            let mut memory: Vec<Vec<_>> = ranges
                .iter()
                .map(|range| vec![MaybeUninit::new(0); (range.end - range.start) as usize])
                .collect();
            let sink = Lent::new(&plan, memory.iter_mut().map(Vec::as_mut_slice)).unwrap();
            let cache = crate::engine::CachePolicy::Buffered;
            let options = ReadOptions { engine, cache, ..ReadOptions::default() };
            read(&files, &plan, &sink, &options, &Control::new()).unwrap();
            for (range, memory) in ranges.iter().zip(memory) {
                // SAFETY: it was made of zeros.
                let got: Vec<u8> = memory.iter().map(|b| unsafe { b.assume_init() }).collect();
                assert!(got == bytes[range.start as usize..range.end as usize], "{engine}");
            }
        }
    }

    #[test]
    fn memory_must_fit_and_is_lent_once() {
        let extents = vec![Extent::new(0, 0..4096), Extent::new(0, 8192..12_288)];
        let plan = ReadPlan::new(extents, Limits { gap: 0, ..Limits::default() }).unwrap();
        let (mut a, mut b) = ([MaybeUninit::new(0); 4096], [MaybeUninit::new(0); 4095]);
        let count = Lent::new(&plan, [&mut a[..]]).unwrap_err();
        assert_eq!(count, Misfit::Count { expected: 2, found: 1 });
        let length = Lent::new(&plan, [&mut a[..], &mut b]).unwrap_err();
        assert_eq!(length, Misfit::Length { segment: 1, expected: 4096, found: 4095 });
        let mut b = [MaybeUninit::new(0); 4096];
        let sink = Lent::new(&plan, [&mut a[..], &mut b]).unwrap();
        let block = &plan.blocks()[0];
        assert!(sink.reserve(block, false).unwrap().is_some());
        assert!(sink.reserve(block, false).is_err());
        let mut foreign = plan.blocks()[1].clone();
        foreign.len *= 1000;
        assert!(sink.reserve(&foreign, false).is_err());
    }
}
