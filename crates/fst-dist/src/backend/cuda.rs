//! A rank's memory on a CUDA device and the way there: reads through one pinned ring that is kept for
//! the whole load, copies and fills on streams of their own. The copies of a read go on while the next one
//! runs.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fst_gpu::{
    Afterwards, CopyOp, CudaDevice, DeviceArena, Landing, Pipeline, PipelineOptions, PipelineSink,
    RingOptions, Transfer, Transfers,
};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::{Extent, ReadStats};

use super::files::{Part, RankFiles, Reads};
use super::{Arriving, Backend, Cause, CopyAt, ReadAt, Staging};
use crate::memory::Space;
use crate::rank::RankPlan;

/// Copy streams of a rank: several ranks may share a device.
const STREAMS: usize = 2;

/// Blocks of the pinned ring: these at least, and all ranks of a machine together about as many.
const BLOCKS: Range<u64> = 4..64;

/// Alignment of staging memory, which takes as many bytes more.
pub(super) const STAGE_ALIGN: u64 = 4096;

/// What a rank's memory and reads are made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Bytes of staging memory.
    pub(super) staging: u64,
    /// The most bytes that are read at a time.
    pub(super) read: u64,
    /// Ranks that share this machine, this one included.
    pub(super) neighbours: u64,
    /// Whether pinned memory stays for later loads.
    pub(super) keep_pinned: bool,
}

impl Sizes {
    /// Those of the rank of `view`.
    pub(super) fn of(view: &RankPlan<'_>, keep_pinned: bool) -> Self {
        let plan = view.plan();
        let load = plan.loads().get(view.rank() as usize).copied().unwrap_or_default();
        // The exchange reads a block at a time, or more for the rank itself.
        let read = load.read().min(plan.buffers().direct);
        let neighbours = u64::from(plan.topology().neighbours(view.rank()));
        Self { staging: view.staging_bytes(), read, neighbours, keep_pinned }
    }

    /// The pinned ring that suits them, and the streams.
    fn pipeline(&self) -> PipelineOptions {
        PipelineOptions { ring: self.ring(), streams: STREAMS }
    }

    /// Bytes of host memory that are pinned, at most.
    pub(super) fn pinned_bytes(&self) -> u64 {
        self.pipeline().pinned_bytes()
    }

    fn ring(&self) -> RingOptions {
        let ring = RingOptions::default();
        // Ragged edges take a block of their own.
        let wanted = self.read.div_ceil(ring.block_bytes as u64) + 2;
        let share = BLOCKS.end / self.neighbours.max(1);
        let blocks = wanted.min(share).clamp(BLOCKS.start, BLOCKS.end);
        let afterwards = if self.keep_pinned { Afterwards::Keep } else { ring.afterwards };
        RingOptions { blocks: blocks as usize, afterwards, ..ring }
    }
}

/// A rank's memory on a device.
pub(super) struct CudaRank<'a> {
    /// Dropped first: this waits for copies, of which some may go to the staging memory.
    pipeline: Pipeline,
    transfers: Transfers,
    reads: Reads<'a>,
    staging: DeviceArena,
}

impl<'a> CudaRank<'a> {
    /// Reserves staging memory and starts pinning the ring.
    pub(super) fn new(
        device: &CudaDevice,
        reads: Reads<'a>,
        sizes: Sizes,
    ) -> fst_gpu::Result<Self> {
        let staging = DeviceArena::new(device, sizes.staging + STAGE_ALIGN)?;
        let pipeline = Pipeline::new(device, sizes.pipeline())?;
        Ok(Self { pipeline, transfers: Transfers::new(device)?, reads, staging })
    }

    /// Waits until no block of a read is on its way any more.
    fn wait(&self, on_the_way: &AtomicUsize) -> fst_gpu::Result<()> {
        while on_the_way.load(Ordering::Acquire) > 0 {
            // Where nothing is in flight, another thread has seen the end of it and will say so.
            match self.pipeline.wait() {
                Ok(true) => {}
                Ok(false) => std::thread::yield_now(),
                Err(error) => {
                    let _ = self.pipeline.flush();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// What the reads did.
    pub(super) fn into_stats(self) -> Vec<ReadStats> {
        self.reads.into_stats()
    }
}

/// What to read for sorted parts: parts that overlap share an extent. Pure.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    extents: Vec<Extent>,
    /// For each extent, its parts.
    parts: Vec<Range<usize>>,
}

impl Wanted {
    fn of(parts: &[Part]) -> Self {
        let mut wanted = Self::default();
        for (index, part) in parts.iter().enumerate() {
            if let (Some(extent), Some(of)) = (wanted.extents.last_mut(), wanted.parts.last_mut())
                && extent.file == part.file
                && part.start < extent.end()
            {
                extent.len = extent.len.max(part.end - extent.offset);
                of.end = index + 1;
                continue;
            }
            wanted.extents.push(Extent::new(part.file, part.start..part.end));
            wanted.parts.push(index..index + 1);
        }
        wanted
    }

    /// The copies from a block to the parts that have bytes in it.
    fn copies(&self, block: &Block, parts: &[Part]) -> Vec<CopyOp> {
        let extents = block.extents.start as usize..block.extents.end as usize;
        let of = self.parts.get(extents).unwrap_or_default().iter();
        let parts = of.flat_map(|of| parts.get(of.clone()).unwrap_or_default());
        let copy = |part: &Part| {
            let (start, end) = (part.start.max(block.offset), part.end.min(block.need_end()));
            (start < end).then(|| CopyOp::Linear {
                source: start - block.offset,
                destination: part.addr + (start - part.start),
                len: end - start,
            })
        };
        parts.filter_map(copy).collect()
    }
}

// SAFETY: copies from blocks go to the parts of the ranges only, transfers to the addresses given; each
// is waited for before its call returns, or what that gave has been waited for, after an error too. The context is made current by whoever
// calls the driver, on any thread. Staging has the length asked for, or is allocated with it.
unsafe impl Backend for CudaRank<'_> {
    fn space(&self) -> Space {
        Space::Device(self.pipeline.device().ordinal() as u32)
    }

    fn stage(&self, bytes: u64) -> Result<Staging, Cause> {
        let arena = match self.staging.len() {
            len if len >= bytes + STAGE_ALIGN => self.staging.clone(),
            _ => DeviceArena::new(self.pipeline.device(), bytes + STAGE_ALIGN)?,
        };
        Ok(Staging::new(arena.address().next_multiple_of(STAGE_ALIGN), arena))
    }

    unsafe fn read(&self, ranges: &[ReadAt]) -> Result<(), (usize, Cause)> {
        // SAFETY: passed on from the caller.
        unsafe { self.read_ahead(ranges) }?.wait().map_err(|error| (0, error))
    }

    unsafe fn read_ahead<'b>(&'b self, ranges: &[ReadAt]) -> Result<Arriving<'b>, (usize, Cause)> {
        let parts = self.reads.parts(ranges)?;
        let first = parts.first().map_or(0, |part| part.range);
        let block = self.pipeline.block_bytes() as u64;
        let (align, gap) = (self.reads.align(), self.reads.gap);
        let limits = Limits { align, block, gap, ..Limits::default() };
        let wanted = Wanted::of(&parts);
        let plan = ReadPlan::new(wanted.extents.clone(), limits).map_err(|e| (first, e.into()))?;
        let on_the_way = Arc::new(AtomicUsize::new(0));
        let route = |block: &Block| {
            on_the_way.fetch_add(1, Ordering::Relaxed);
            let ended = on_the_way.clone();
            let done = move || {
                ended.fetch_sub(1, Ordering::Release);
            };
            let (ops, done) = (wanted.copies(block, &parts), Some(Box::new(done) as _));
            Ok(Landing { ops, done, ..Landing::default() })
        };
        // SAFETY: the ranges' memory is writable and nobody else's by this function's contract, until
        // all copies to it have been waited for.
        let sink = unsafe { PipelineSink::new(&self.pipeline, &route) };
        let RankFiles { files, options, watch, .. } = &self.reads.of;
        let read = fst_io::read(files, &plan, &sink, options, &watch.next());
        if read.is_err() {
            // Copies may be on their way.
            let _ = self.pipeline.flush();
        }
        self.reads.done(&parts, read.map(|stats| vec![stats]))?;
        Ok(Arriving::new(move || Ok(self.wait(&on_the_way)?)))
    }

    unsafe fn copy(&self, copies: &[CopyAt]) -> Result<(), Cause> {
        let rows = |copy: &CopyAt| Transfer::Rows {
            source: copy.src,
            source_pitch: copy.src_stride,
            destination: copy.dst,
            destination_pitch: copy.dst_stride,
            width: copy.len,
            rows: copy.count,
        };
        let batch: Vec<Transfer<'_>> = copies.iter().map(rows).collect();
        // SAFETY: passed on from the caller.
        Ok(unsafe { self.transfers.run(&batch) }?)
    }

    unsafe fn zero(&self, addr: u64, len: u64) -> Result<(), Cause> {
        // SAFETY: passed on from the caller.
        Ok(unsafe { self.transfers.run(&[Transfer::Zero { destination: addr, len }]) }?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(file: u32, start: u64, end: u64, addr: u64) -> Part {
        Part { file, start, end, addr, range: 0 }
    }

    #[test]
    fn parts_that_overlap_share_an_extent_and_have_copies_of_their_own() {
        let parts = [
            part(0, 0, 100, 1000),
            part(0, 100, 200, 5000),
            part(0, 150, 9000, 20000),
            part(1, 9000, 9001, 1),
        ];
        let wanted = Wanted::of(&parts);
        assert_eq!(wanted.parts, [0..1, 1..3, 3..4]);
        let limits = Limits { block: 8192, ..Limits::default() };
        let plan = ReadPlan::new(wanted.extents.clone(), limits).unwrap();
        let copies: Vec<_> =
            plan.blocks().iter().map(|block| wanted.copies(block, &parts)).collect();
        let linear = |source, destination, len| CopyOp::Linear { source, destination, len };
        assert_eq!(
            copies,
            [
                vec![linear(0, 1000, 100), linear(100, 5000, 100), linear(150, 20000, 8192 - 150)],
                vec![linear(0, 20000 + 8192 - 150, 9000 - 8192)],
                vec![linear(9000 - 8192, 1, 1)],
            ]
        );
    }

    #[test]
    fn rings_are_shared_by_the_ranks_of_a_machine() {
        let blocks = |read: u64, neighbours| {
            let read = read << 20;
            Sizes { staging: 0, read, neighbours, keep_pinned: false }.ring().blocks
        };
        assert_eq!(blocks(0, 1), 4);
        assert_eq!(blocks(40, 1), 22);
        assert_eq!(blocks(10_000, 1), 64);
        assert_eq!(blocks(10_000, 4), 16);
        assert_eq!(blocks(10_000, 64), 4);
    }
}
