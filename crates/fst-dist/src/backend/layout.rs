//! Where a rank's shards lie: arenas, places in them, and those that a conversion moves. Pure.

use fst_gpu::cast::CastType;

use crate::rank::RankPlan;

/// What the elements of a tensor are converted from and to, by the rank that keeps them.
pub type Cast = (CastType, CastType);

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

/// A shard that has arrived in an arena.
#[derive(Debug)]
pub(super) struct Arrived {
    /// Which of the outputs it is.
    pub(super) output: usize,
    /// Where it starts in its arena, and its bytes.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// Of these, zeros at the end.
    padding: u64,
    /// How it is converted, and start and length of its place in the arena of converted shards.
    pub(super) moved: Option<(Cast, u64, u64)>,
}

impl Arrived {
    /// Bytes without padding, as they arrive and as they are converted. Zeros at the end stay zeros,
    /// whatever a zero byte means to the old type.
    pub(super) fn kept(&self, (from, to): Cast) -> (u64, u64) {
        let bytes = self.bytes - self.padding;
        (bytes, bytes / from.size() as u64 * to.size() as u64)
    }
}

/// The conversion of each output that has one, and its bytes then. `casts` are by tensor.
pub(super) fn converted<'v>(
    view: &'v RankPlan<'_>,
    casts: &'v [Option<Cast>],
) -> impl Iterator<Item = Option<(Cast, u64)>> + Clone + 'v {
    view.outputs().iter().map(|output| {
        let cast = output.tensors.first().and_then(|&tensor| casts.get(tensor as usize));
        let (from, to) = (*cast?)?;
        let elements = output.shape.iter().fold(1, |all: u64, dim| all.saturating_mul(*dim));
        Some(((from, to), elements.saturating_mul(to.size() as u64)))
    })
}

/// The shards of an arena, and the length of a second one for those that are converted, each starting at
/// a multiple of `align` there.
pub(super) fn arrived(
    arena: usize,
    view: &RankPlan<'_>,
    places: &[Place],
    casts: &[Option<Cast>],
    align: u64,
) -> (Vec<Arrived>, u64) {
    let mut len = 0u64;
    // Outputs are placed in order.
    let start = places.partition_point(|place| place.arena < arena);
    let outputs = view.outputs().iter().zip(converted(view, casts));
    let here = outputs.zip(places).skip(start).take_while(|(_, place)| place.arena == arena);
    let arrived = (start..).zip(here).map(|(index, ((output, converted), place))| {
        let moved = converted.map(|(cast, bytes)| {
            let offset = len.next_multiple_of(align);
            len = offset + bytes;
            (cast, offset, bytes)
        });
        let (bytes, padding) = (output.bytes, output.padding);
        Arrived { output: index, offset: place.offset, bytes, padding, moved }
    });
    (arrived.collect(), len)
}
