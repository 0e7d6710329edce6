//! The memory of a rank's shards: arenas, each shard's place in them, and the tensors at the end.

use std::sync::Arc;

use fst_dist::{Output, RankPlan, Region};
use fst_format::Dtype;
use fst_gpu::cast;
use fst_io::plan::Limits;
use fst_io::{HostBuffer, SharedBuffer};

use super::DistError;
use crate::error::Result;
use crate::loader::ARENA;
use crate::options::{Item, cast_type};
use crate::tensor::{Data, Tensor};
use crate::transform::HOST_ALIGN;

/// From this length on a shard starts at its file offset modulo a page, so that it can be read in
/// place.
const CONGRUENT: u64 = 1 << 20;

/// Where a shard lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    arena: usize,
    offset: u64,
}

/// The lengths of the arenas and the place of each output. Pure.
fn lay_out(view: &RankPlan<'_>, limit: u64) -> (Vec<u64>, Vec<Place>) {
    let mut arenas: Vec<u64> = Vec::new();
    let mut places = Vec::with_capacity(view.outputs().len());
    let phases = phases(view);
    for (output, phase) in view.outputs().iter().zip(phases) {
        let at = |end: u64| match phase {
            Some(phase) => end.saturating_sub(phase).next_multiple_of(Limits::MIN_ALIGN) + phase,
            None => end.next_multiple_of(HOST_ALIGN),
        };
        let place = match arenas.last() {
            Some(&end) if at(end).saturating_add(output.bytes) <= limit => {
                Place { arena: arenas.len() - 1, offset: at(end) }
            }
            _ => {
                arenas.push(0);
                Place { arena: arenas.len() - 1, offset: at(0) }
            }
        };
        arenas[place.arena] = place.offset + output.bytes;
        places.push(place);
    }
    (arenas, places)
}

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
        view.outputs().iter().try_for_each(|output| check_dtypes(output, items))?;
        let (lens, places) = lay_out(view, ARENA);
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
    ) -> Result<(Vec<Tensor>, u64)> {
        let mut tensors = Vec::with_capacity(self.places.len());
        let mut converted = 0;
        let mut outputs = view.outputs().iter().zip(&self.places).peekable();
        for (index, arena) in self.arenas.into_iter().enumerate() {
            // SAFETY: passed on from the caller.
            let arena = unsafe { SharedBuffer::new(Arc::new(arena)) };
            let mut here = Vec::new();
            while let Some(next) = outputs.next_if(|(_, place)| place.arena == index) {
                here.push(next);
            }
            converted += convert(&arena, &here, items, &mut tensors)?;
        }
        Ok((tensors, converted))
    }
}

/// The item that an output's type, and name unless it is fused, are of.
fn first<'i>(output: &Output<'_>, items: &'i [Item]) -> Option<&'i Item> {
    output.tensors.first().and_then(|&tensor| items.get(tensor as usize))
}

fn check_dtypes(output: &Output<'_>, items: &[Item]) -> Result<(), DistError> {
    let Some(head) = first(output, items) else { return Ok(()) };
    let expected = head.info.dtype();
    for item in output.tensors.iter().filter_map(|&tensor| items.get(tensor as usize)) {
        let found = item.info.dtype();
        if found != expected {
            let (output, tensor) = (output.name.to_owned(), item.info.name().to_owned());
            return Err(DistError::FusedDtypes { output, expected, tensor, found });
        }
    }
    Ok(())
}

/// Makes the tensors of one arena. Those to be converted move to an arena of their own, so that the
/// old one goes when nothing else is in it.
fn convert(
    arena: &SharedBuffer,
    outputs: &[(&Output<'_>, &Place)],
    items: &[Item],
    tensors: &mut Vec<Tensor>,
) -> Result<u64> {
    struct Made<'a> {
        output: &'a Output<'a>,
        item: &'a Item,
        /// The new place, if it moves.
        moved: Option<(usize, usize)>,
        offset: usize,
    }
    let mut len = 0usize;
    let mut made = Vec::with_capacity(outputs.len());
    for (output, place) in outputs {
        let Some(item) = first(output, items) else { continue };
        let moved = (item.dtype != item.info.dtype()).then(|| {
            let elements: u64 = output.shape.iter().product();
            let bytes = (elements * u64::from(item.dtype.bits()) / 8) as usize;
            let offset = len.next_multiple_of(HOST_ALIGN as usize);
            len = offset + bytes;
            (offset, bytes)
        });
        made.push(Made { output, item, moved, offset: place.offset as usize });
    }
    let new = SharedBuffer::filled(len, |out| {
        for Made { output, item, moved, offset } in &made {
            let Some((to, bytes)) = *moved else { continue };
            // Zeros at the end stay zeros, whatever a zero byte means to the old type.
            let from = arena.get(*offset..*offset + (output.bytes - output.padding) as usize);
            let kept = scaled(output.bytes - output.padding, item.info.dtype(), item.dtype);
            let out = out.get_mut(to..to + bytes).and_then(|out| out.get_mut(..kept));
            let (Some(from), Some(out)) = (from, out) else { continue };
            if let Some((a, b)) = cast_type(item.info.dtype()).zip(cast_type(item.dtype)) {
                cast::cast(from, a, out, b).map_err(|e| fst_io::Error::Sink(Box::new(e)))?;
            }
        }
        Ok::<(), crate::error::Error>(())
    })?;
    for Made { output, item, moved, offset } in made {
        let data = match moved {
            Some((offset, len)) => Data::Host { arena: new.clone(), offset, len },
            None => Data::Host { arena: arena.clone(), offset, len: output.bytes as usize },
        };
        let shape: Vec<usize> = output.shape.iter().map(|&extent| extent as usize).collect();
        let tensor = Tensor::new(item.info.clone(), item.dtype, Some(&shape), data);
        tensors.push(tensor.named(output.name));
    }
    Ok(len as u64)
}

/// Bytes that `bytes` of one type become in another.
fn scaled(bytes: u64, from: Dtype, to: Dtype) -> usize {
    (bytes * 8 / u64::from(from.bits()) * u64::from(to.bits()) / 8) as usize
}
