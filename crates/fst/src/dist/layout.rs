//! Where a rank's shards lie: arenas, places in them, and those that a conversion moves. Pure.

use fst_dist::{Output, RankPlan};
use fst_format::Dtype;
use fst_gpu::cast::CastType;

use super::DistError;
use crate::options::Item;
use crate::tensor::{Data, Tensor};

/// Where a shard lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) arena: usize,
    pub(super) offset: u64,
}

/// The lengths of the arenas, at most `limit` unless one shard is longer, and the place of each
/// output. `at` says for an output where it can start from a position on.
pub(super) fn lay_out(
    view: &RankPlan<'_>,
    limit: u64,
    at: impl Fn(usize, u64) -> u64,
) -> (Vec<u64>, Vec<Place>) {
    let mut arenas: Vec<u64> = Vec::new();
    let mut places = Vec::with_capacity(view.outputs().len());
    for (index, output) in view.outputs().iter().enumerate() {
        let place = match arenas.last() {
            Some(&end) if at(index, end).saturating_add(output.bytes) <= limit => {
                Place { arena: arenas.len() - 1, offset: at(index, end) }
            }
            _ => {
                arenas.push(0);
                Place { arena: arenas.len() - 1, offset: at(index, 0) }
            }
        };
        arenas[place.arena] = place.offset + output.bytes;
        places.push(place);
    }
    (arenas, places)
}

/// Refuses outputs that are made of tensors of different types.
pub(super) fn check_dtypes(view: &RankPlan<'_>, items: &[Item]) -> Result<(), DistError> {
    view.outputs().iter().try_for_each(|output| check_dtype(output, items))
}

fn check_dtype(output: &Output<'_>, items: &[Item]) -> Result<(), DistError> {
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

/// The item that an output's type, and name unless it is fused, are of.
fn first<'i>(output: &Output<'_>, items: &'i [Item]) -> Option<&'i Item> {
    output.tensors.first().and_then(|&tensor| items.get(tensor as usize))
}

/// A shard that has arrived in an arena.
#[derive(Debug)]
pub(super) struct Arrived<'a> {
    pub(super) output: &'a Output<'a>,
    item: &'a Item,
    /// Where it starts in its arena.
    pub(super) offset: u64,
    /// Start and length of its place in the arena of converted shards, if it is converted.
    pub(super) moved: Option<(u64, u64)>,
}

/// The shards of an arena, and the length of a second one for those that are converted, each starting at
/// a multiple of `align` there.
pub(super) fn arrived<'a>(
    arena: usize,
    view: &'a RankPlan<'_>,
    places: &[Place],
    items: &'a [Item],
    align: u64,
) -> (Vec<Arrived<'a>>, u64) {
    let mut len = 0u64;
    // Outputs are placed in order.
    let start = places.partition_point(|place| place.arena < arena);
    let here = view.outputs().iter().zip(places).skip(start);
    let arrived =
        here.take_while(|(_, place)| place.arena == arena).filter_map(|(output, place)| {
            let item = first(output, items)?;
            let moved = (item.dtype != item.info.dtype()).then(|| {
                let elements: u64 = output.shape.iter().product();
                let bytes = elements * u64::from(item.dtype.bits()) / 8;
                let offset = len.next_multiple_of(align);
                len = offset + bytes;
                (offset, bytes)
            });
            Some(Arrived { output, item, offset: place.offset, moved })
        });
    (arrived.collect(), len)
}

impl Arrived<'_> {
    /// How its elements are converted.
    pub(super) fn cast(&self) -> Option<(CastType, CastType)> {
        self.item.cast()
    }

    /// Bytes without padding, as they arrive and as they are converted. Zeros at the end stay zeros,
    /// whatever a zero byte means to the old type.
    pub(super) fn kept(&self) -> (u64, u64) {
        let (from, to): (Dtype, Dtype) = (self.item.info.dtype(), self.item.dtype);
        let bytes = self.output.bytes - self.output.padding;
        (bytes, bytes * 8 / u64::from(from.bits()) * u64::from(to.bits()) / 8)
    }

    /// The tensor, whose bytes are `data`.
    pub(super) fn tensor(&self, data: Data) -> Tensor {
        let shape: Vec<usize> = self.output.shape.iter().map(|&extent| extent as usize).collect();
        let tensor = Tensor::new(self.item.info.clone(), self.item.dtype, Some(&shape), data);
        tensor.named(self.output.name)
    }
}
