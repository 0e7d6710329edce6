//! A rank's host memory: what reads and copies fill, and arenas for its shards.

use std::mem::MaybeUninit;
use std::sync::Arc;

use fst_gpu::{HOST_ALIGN, cast};
use fst_io::plan::Limits;
use fst_io::ranges::{self, RangeInto, Ranges};
use fst_io::slots::Slots;
use fst_io::{HostBuffer, ReadStats, SharedBuffer};

use super::files::{Part, RankFiles, Reads};
use super::layout::{Arrived, Cast, Place, converted, lay_out};
use super::shards::ARENA;
use super::{Backend, Cause, CopyAt, ReadAt, Staging, copy_host, stage_host};
use crate::error::RankError;
use crate::memory::Space;
use crate::rank::RankPlan;

/// A rank's memory on the host, with staging on huge pages, and fresh outputs.
pub(super) struct HostRank<'a> {
    reads: Reads<'a>,
    /// For what cannot be read in place; kept for all reads of the load.
    slots: Slots,
}

impl<'a> HostRank<'a> {
    pub(super) fn new(reads: Reads<'a>) -> Result<Self, fst_io::Error> {
        Ok(Self { slots: ranges::slots(reads.align())?, reads })
    }

    /// What the reads did.
    pub(super) fn into_stats(self) -> Vec<ReadStats> {
        self.reads.into_stats()
    }
}

// SAFETY: reads and copies write the ranges given only, and are over when they return; outputs start as
// zeros; staging is memory of the asked length, aligned to huge pages or at least pages, zeroed, and kept
// by its owner.
unsafe impl Backend for HostRank<'_> {
    fn space(&self) -> Space {
        Space::Host
    }

    fn stage(&self, bytes: u64) -> Result<Staging, Cause> {
        stage_host(bytes)
    }

    unsafe fn read(&self, ranges: &[ReadAt]) -> Result<(), (usize, Cause)> {
        let parts = self.reads.parts(ranges)?;
        let first = parts.first().map_or(0, |part| part.range);
        let into = parts.iter().map(|&Part { file, start, end, addr, .. }| {
            // SAFETY: writable and nobody else's meanwhile, by this function's contract.
            let into = unsafe {
                std::slice::from_raw_parts_mut(addr as *mut MaybeUninit<u8>, (end - start) as usize)
            };
            RangeInto { file, start, into }
        });
        let RankFiles { files, options, watch, .. } = &self.reads.of;
        let gap = self.reads.gap.max(self.reads.align());
        let ranges = Ranges::new(files, into, gap).map_err(|e| (first, e.into()))?;
        let read = ranges.read(files, options, &self.slots, &|| watch.next(), &|_, _| Ok(()));
        self.reads.done(&parts, read)
    }

    unsafe fn copy(&self, copies: &[CopyAt]) -> Result<(), Cause> {
        // SAFETY: passed on from the caller.
        unsafe { copy_host(copies) };
        Ok(())
    }

    /// Padding ends an output, and nobody has written there: outputs are fresh memory, zeros already, and
    /// writing zeros would put pages behind them.
    unsafe fn zero(&self, _addr: u64, _len: u64) -> Result<(), Cause> {
        Ok(())
    }
}

/// From this length on a shard starts at its file offset modulo a page, so that it can be read in
/// place.
const CONGRUENT: u64 = 1 << 20;

/// For each output, where in a page the first of its bytes is that is read directly, if that is
/// worth heeding and keeps elements aligned.
fn phases(view: &RankPlan<'_>) -> Vec<Option<u64>> {
    let mut phases = vec![None; view.outputs().len()];
    for read in view.direct_reads() {
        let (output, phase) =
            (&view.outputs()[read.output as usize], &mut phases[read.output as usize]);
        let Some(copy) = read.copies.iter().max_by_key(|copy| copy.len) else { continue };
        if phase.is_some() || copy.len < CONGRUENT {
            continue;
        }
        let offset = view.plan().tensors()[read.tensor as usize].file_range.start + copy.src;
        let start = offset.wrapping_sub(copy.dst) % Limits::MIN_ALIGN;
        // 16 bytes are the longest element.
        let element = u64::from(output.bits).div_ceil(8).next_power_of_two().max(16);
        *phase = start.is_multiple_of(element).then_some(start);
    }
    phases
}

/// The lengths of the arenas of a rank's shards, and the places of these.
pub(super) fn lay_out_host(view: &RankPlan<'_>) -> (Vec<u64>, Vec<Place>) {
    let phases = phases(view);
    let at = |index: usize, end: u64| match phases.get(index).copied().flatten() {
        Some(phase) => end.saturating_sub(phase).next_multiple_of(Limits::MIN_ALIGN) + phase,
        None => end.next_multiple_of(HOST_ALIGN),
    };
    lay_out(view, ARENA, at)
}

/// Bytes of host memory that a rank fills: its shards as they arrive or as they are converted, an arena
/// at a time, and its staging memory.
pub(super) fn needed(view: &RankPlan<'_>, casts: &[Option<Cast>]) -> u64 {
    let (mut arrived, mut made, mut moved) = (0u64, 0u64, 0u64);
    for (output, converted) in view.outputs().iter().zip(converted(view, casts)) {
        moved = moved.max(converted.map_or(0, |_| output.bytes.max(ARENA)));
        arrived = arrived.saturating_add(output.bytes);
        made = made.saturating_add(converted.map_or(output.bytes, |(_, bytes)| bytes));
    }
    let beside = moved.min(arrived).saturating_add(view.staging_bytes());
    arrived.max(made).saturating_add(beside)
}

/// Memory for each arena.
pub(super) fn reserve(lens: &[u64]) -> Result<Vec<Arc<HostBuffer>>, RankError> {
    let arena = |&len| HostBuffer::new(usize::try_from(len).unwrap_or(usize::MAX)).map(Arc::new);
    Ok(lens.iter().map(arena).collect::<Result<_, _>>()?)
}

/// Converts shards of an arena into another of `len` bytes.
pub(super) fn convert(
    arena: &SharedBuffer,
    shards: &[Arrived],
    len: u64,
    alive: &dyn Fn(),
) -> Result<SharedBuffer, RankError> {
    SharedBuffer::filled(len as usize, |out| {
        for shard in shards {
            let Some((cast, to, _)) = shard.moved else { continue };
            alive();
            let (to, offset) = (to as usize, shard.offset as usize);
            let (kept, converted) = shard.kept(cast);
            let from = arena.bytes(offset..offset + kept as usize);
            let out = out.get_mut(to..).and_then(|out| out.get_mut(..converted as usize));
            let (Some(from), Some(out)) = (from, out) else { continue };
            cast::cast(from, cast.0, out, cast.1).map_err(|e| fst_io::Error::Sink(Box::new(e)))?;
        }
        Ok(())
    })
}
