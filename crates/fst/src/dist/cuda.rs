//! A rank's memory on a CUDA device and the way there: reads through one pinned ring that is kept for
//! the whole load, copies and fills on streams of their own.

use std::ops::Range;
use std::sync::Mutex;

use fst_dist::{Backend, Cause, CopyAt, ReadAt, Space, Staging};
use fst_gpu::{
    Afterwards, CopyOp, CudaDevice, DeviceArena, Landing, Pipeline, PipelineOptions, PipelineSink,
    RingOptions, Transfer, Transfers,
};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::{Extent, ReadOptions, ReadStats, SourceFile};

use super::reader::blame;
use crate::error::{DeviceError, Result};
use crate::host::Watch;

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
    /// The pinned ring that suits them.
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

/// Files that a rank reads from.
#[derive(Debug)]
pub(super) struct Sources<'a> {
    pub(super) files: &'a [SourceFile],
    /// For each shard file of the checkpoint, which of `files` it is.
    pub(super) number: &'a [Option<u32>],
    pub(super) options: ReadOptions,
    /// Unwanted bytes that are read over.
    pub(super) gap: u64,
    pub(super) watch: &'a Watch,
}

/// A rank's memory on a device.
pub(super) struct CudaRank<'a> {
    /// Dropped first: this waits for copies, of which some may go to the staging memory.
    pipeline: Pipeline,
    transfers: Transfers,
    sources: Sources<'a>,
    staging: DeviceArena,
    stats: Mutex<Vec<ReadStats>>,
}

impl<'a> CudaRank<'a> {
    /// Reserves staging memory and starts pinning the ring.
    pub(super) fn new(device: &CudaDevice, sources: Sources<'a>, sizes: Sizes) -> Result<Self> {
        let make = || {
            let staging = DeviceArena::new(device, sizes.staging + STAGE_ALIGN)?;
            let options = PipelineOptions { ring: sizes.ring(), streams: STREAMS };
            let (pipeline, transfers) = (Pipeline::new(device, options)?, Transfers::new(device)?);
            Ok(Self { pipeline, transfers, sources, staging, stats: Mutex::default() })
        };
        make().map_err(|error| DeviceError::Cuda(error).into())
    }

    /// What the reads did.
    pub(super) fn into_stats(self) -> Vec<ReadStats> {
        self.stats.into_inner().unwrap_or_else(|e| e.into_inner())
    }

    /// The ranges as parts of files, sorted.
    fn parts(&self, ranges: &[ReadAt]) -> Result<Vec<Part>, (usize, Cause)> {
        let mut parts = Vec::with_capacity(ranges.len());
        for (index, range) in ranges.iter().enumerate() {
            let file = self.sources.number.get(range.shard as usize).copied().flatten();
            let Some(file) = file else {
                return Err((index, format!("file {} is not open", range.shard).into()));
            };
            let ReadAt { offset, len, addr, .. } = *range;
            if len > 0 {
                parts.push(Part { file, start: offset, end: offset + len, addr, range: index });
            }
        }
        parts.sort_unstable_by_key(|part| (part.file, part.start));
        Ok(parts)
    }
}

/// A part of a file and the device address of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    file: u32,
    start: u64,
    end: u64,
    addr: u64,
    /// The range asked for that it is.
    range: usize,
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
// call waits for its own before it returns, after an error too. The context is made current by whoever
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
        let parts = self.parts(ranges)?;
        let first = parts.first().map_or(0, |part| part.range);
        let Sources { files, options, gap, watch, .. } = &self.sources;
        let align = files.iter().map(SourceFile::align).max().unwrap_or(Limits::MIN_ALIGN);
        let block = self.pipeline.block_bytes() as u64;
        let limits = Limits { align, block, gap: *gap, ..Limits::default() };
        let wanted = Wanted::of(&parts);
        let plan = ReadPlan::new(wanted.extents.clone(), limits).map_err(|e| (first, e.into()))?;
        let route = |block: &Block| Ok(Landing { ops: wanted.copies(block, &parts), done: None });
        // SAFETY: the ranges' memory is writable and nobody else's by this function's contract, and
        // the flush below waits for all copies to it.
        let sink = unsafe { PipelineSink::new(&self.pipeline, &route) };
        let read = fst_io::read(files, &plan, &sink, options, &watch.next());
        // Also when reading failed: copies may be on their way.
        let flushed = self.pipeline.flush();
        let stats = read.map_err(|error| {
            let ranges = parts.iter().map(|part| (part.file, part.start, part.end, part.range));
            let hit = blame(&error, self.sources.files, ranges);
            (hit.unwrap_or(first), Cause::from(error))
        })?;
        flushed.map_err(|error| (first, error.into()))?;
        self.stats.lock().unwrap_or_else(|e| e.into_inner()).push(stats);
        Ok(())
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
        assert_eq!(blocks(40, 1), 12);
        assert_eq!(blocks(10_000, 1), 64);
        assert_eq!(blocks(10_000, 4), 16);
        assert_eq!(blocks(10_000, 64), 4);
    }
}
