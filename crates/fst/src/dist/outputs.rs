//! A rank's shards in host memory: arenas to be filled, and the tensors at the end.

use std::sync::Arc;

use fst_dist::{Output, RankPlan, Region};
use fst_gpu::cast;
use fst_io::plan::Limits;
use fst_io::{HostBuffer, SharedBuffer};

use super::layout::{Arrived, Place, arrived, check_dtypes, lay_out};
use crate::error::Result;
use crate::loader::ARENA;
use crate::options::Item;
use crate::tensor::{Data, Tensor};
use crate::transform::HOST_ALIGN;

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

/// A rank's shards in host memory, to be filled by the exchange.
#[derive(Debug)]
pub(super) struct HostOutputs {
    arenas: Vec<HostBuffer>,
    places: Vec<Place>,
    regions: Vec<Region>,
}

impl HostOutputs {
    /// Reserves the memory for what the rank keeps of `items`.
    pub(super) fn new(view: &RankPlan<'_>, items: &[Item]) -> Result<Self> {
        check_dtypes(view, items)?;
        let phases = phases(view);
        let at = |index: usize, end: u64| match phases.get(index).copied().flatten() {
            Some(phase) => end.saturating_sub(phase).next_multiple_of(Limits::MIN_ALIGN) + phase,
            None => end.next_multiple_of(HOST_ALIGN),
        };
        let (lens, places) = lay_out(view, ARENA, at);
        let arenas: Vec<HostBuffer> = lens
            .iter()
            .map(|&len| HostBuffer::new(usize::try_from(len).unwrap_or(usize::MAX)))
            .collect::<Result<_, _>>()?;
        let region = |(output, place): (&Output<'_>, &Place)| Region {
            addr: arenas[place.arena].as_ptr().as_ptr() as u64 + place.offset,
            len: output.bytes,
        };
        let regions = view.outputs().iter().zip(&places).map(region).collect();
        Ok(Self { arenas, places, regions })
    }

    /// The memory of each output, apart from each other.
    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The tensors, converted where that is asked for, and the bytes that conversions made.
    ///
    /// # Safety
    ///
    /// Nobody writes to the regions any more.
    pub(super) unsafe fn finish(
        self,
        view: &RankPlan<'_>,
        items: &[Item],
        alive: &dyn Fn(),
    ) -> Result<(Vec<Tensor>, u64)> {
        let mut tensors = Vec::with_capacity(self.places.len());
        let mut converted = 0;
        for (index, arena) in self.arenas.into_iter().enumerate() {
            // SAFETY: passed on from the caller.
            let arena = unsafe { SharedBuffer::new(Arc::new(arena)) };
            let (shards, len) = arrived(index, view, &self.places, items, HOST_ALIGN);
            converted += len;
            convert(&arena, &shards, len as usize, &mut tensors, alive)?;
        }
        Ok((tensors, converted))
    }
}

/// Makes the tensors of one arena. Those to be converted move to an arena of their own, of `len`
/// bytes, so that the old one goes when nothing else is in it.
fn convert(
    arena: &SharedBuffer,
    shards: &[Arrived<'_>],
    len: usize,
    tensors: &mut Vec<Tensor>,
    alive: &dyn Fn(),
) -> Result<()> {
    let new = SharedBuffer::filled(len, |out| {
        for shard in shards {
            let Some((to, bytes)) = shard.moved else { continue };
            alive();
            let (to, offset) = (to as usize, shard.offset as usize);
            let (kept, converted) = shard.kept();
            let from = arena.get(offset..offset + kept as usize);
            let out = out
                .get_mut(to..to + bytes as usize)
                .and_then(|out| out.get_mut(..converted as usize));
            let (Some(from), Some(out)) = (from, out) else { continue };
            if let Some((a, b)) = shard.cast() {
                cast::cast(from, a, out, b).map_err(|e| fst_io::Error::Sink(Box::new(e)))?;
            }
        }
        Ok::<(), crate::error::Error>(())
    })?;
    for shard in shards {
        let (arena, offset, len) = match shard.moved {
            Some((offset, len)) => (&new, offset, len),
            None => (arena, shard.offset, shard.output.bytes),
        };
        let (offset, len) = (offset as usize, len as usize);
        // SAFETY: places are apart, and conversions out of the arena are over.
        tensors.push(shard.tensor(unsafe { Data::host(arena.clone(), offset, len) }));
    }
    Ok(())
}
