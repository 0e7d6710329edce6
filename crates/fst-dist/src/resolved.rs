//! A specification fitted to one tensor shape and world size, answering with index ranges and bytes.

use std::ops::Range;

use crate::error::ShardError;
use crate::shard::{Kind, Remainder, Shard};

/// A specification fitted to one shape, element width and world size, and found sound: every
/// method answers without failing.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    kind: Kind,
    world: u64,
    bits: u64,
    shape: Box<[u64]>,
    /// The dimension that is cut; `None` for whole tensors.
    pub(crate) dim: Option<usize>,
    /// Rows: product of the dimensions before `dim`.
    pub(crate) outer: u64,
    /// Extent of `dim` (1 for whole tensors).
    extent: u64,
    /// Bits of one index along `dim`.
    inner_bits: u64,
}

impl Resolved {
    pub(crate) fn new(
        shard: &Shard,
        bits: u32,
        shape: &[u64],
        world: u32,
    ) -> Result<Self, ShardError> {
        let dim = match &shard.kind {
            Kind::Replicate | Kind::Keep(_) => None,
            Kind::Split(split) => Some(split.dim),
            Kind::VocabRows { .. } => Some(0),
            Kind::Ranges { dim, .. } => Some(*dim),
        };
        let bits = u64::from(bits);
        let product = |dims: &[u64]| dims.iter().try_fold(1u64, |p, &d| p.checked_mul(d));
        let overflow = ShardError::Overflow;
        let total = product(shape).and_then(|n| n.checked_mul(bits)).ok_or(overflow)?;
        let (outer, extent, inner_bits) = match dim {
            None => (1, 1, total),
            Some(dim) => {
                let Some(&extent) = shape.get(dim) else {
                    return Err(ShardError::Dim { dim, dims: shape.len() });
                };
                let outer = product(&shape[..dim]).ok_or(ShardError::Overflow)?;
                let inner = product(&shape[dim + 1..]).and_then(|n| n.checked_mul(bits));
                // With no rows the whole is empty, and one row may still be too long.
                let inner = inner.filter(|inner| inner.checked_mul(extent).is_some());
                (outer, extent, inner.ok_or(ShardError::Overflow)?)
            }
        };
        let resolved = Self {
            kind: shard.kind.clone(),
            world: u64::from(world),
            bits,
            shape: shape.into(),
            dim,
            outer,
            extent,
            inner_bits,
        };
        resolved.check(world)?;
        match resolved.all_bytes() <= i64::MAX as u64 {
            true => Ok(resolved),
            false => Err(ShardError::Overflow),
        }
    }

    fn check(&self, world: u32) -> Result<(), ShardError> {
        let extent = self.extent;
        match &self.kind {
            Kind::Replicate => {}
            Kind::VocabRows { multiple } => {
                let padded = extent.checked_next_multiple_of(*multiple);
                let padded = padded.and_then(|n| n.checked_add(self.world));
                // In the order of the shape, as users of an output's shape may do: a last dimension of
                // 0 does not undo an overflow before it.
                let mut padded_shape = self.shape.iter().skip(1).chain([&self.bits]);
                let bits = padded.and_then(|n| padded_shape.try_fold(n, |n, &d| n.checked_mul(d)));
                bits.ok_or(ShardError::Overflow)?;
            }
            Kind::Keep(ranks) => {
                if let Some(&rank) = ranks.iter().find(|&&rank| rank >= world) {
                    return Err(ShardError::Rank { rank, world });
                }
            }
            Kind::Split(split) => split.check(extent, self.world)?,
            Kind::Ranges { dim, per_rank } => {
                if per_rank.len() != world as usize {
                    return Err(ShardError::RangeLists { lists: per_rank.len(), world });
                }
                for (rank, ranges) in (0u32..).zip(per_rank.iter()) {
                    let mut sorted = ranges.clone();
                    sorted.sort_by_key(|range| (range.start, range.end));
                    for (i, range) in sorted.iter().enumerate() {
                        if range.start > range.end || range.end > extent {
                            let range = range.clone();
                            return Err(ShardError::Range { dim: *dim, rank, range, extent });
                        }
                        if i > 0 && sorted[i - 1].end > range.start {
                            let range = range.clone();
                            return Err(ShardError::Overlap { dim: *dim, rank, range });
                        }
                    }
                }
            }
        }
        // Cuts of sub-byte elements must fall on bytes.
        if let Some(dim) = self.dim
            && !self.inner_bits.is_multiple_of(8)
        {
            if !(self.inner_bits * extent).is_multiple_of(8) {
                return Err(ShardError::Bits { dim, index: extent, bits: self.bits });
            }
            for rank in 0..world {
                let mut bad = None;
                let mut see = |index: u64| {
                    if !(index * self.inner_bits).is_multiple_of(8) {
                        bad.get_or_insert(index);
                    }
                };
                self.ranges(rank, |range| {
                    if range.start < range.end {
                        see(range.start);
                        see(range.end);
                    }
                });
                see(self.padding(rank));
                if let Some(index) = bad {
                    return Err(ShardError::Bits { dim, index, bits: self.bits });
                }
            }
        }
        Ok(())
    }

    /// Bytes of one row on disk.
    pub(crate) fn row_bytes(&self) -> u64 {
        self.bytes_along(self.extent)
    }

    /// A bound on what all ranks together keep, in bytes, padding included: below 63 bits, once `new` has
    /// succeeded.
    pub(crate) fn all_bytes(&self) -> u64 {
        let indices = self.extent.max(self.vocab_block().saturating_mul(self.world));
        let whole = self.outer.saturating_mul(self.bytes_along(indices));
        whole.saturating_mul(self.world)
    }

    /// Bytes of `indices` indices along the cut dimension, within a row.
    pub(crate) fn bytes_along(&self, indices: u64) -> u64 {
        // `new` has found the bits of the whole tensor, and of all ranks' padded rows, within u64.
        (u128::from(indices) * u128::from(self.inner_bits) / 8) as u64
    }

    /// Calls `f` with each index range that `rank` keeps, in the order of the kept tensor; neighbours
    /// that follow one another are one range.
    pub(crate) fn ranges(&self, rank: u32, mut f: impl FnMut(Range<u64>)) {
        let mut last: Option<Range<u64>> = None;
        self.parts(rank, |range| match &mut last {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => last.replace(range).into_iter().for_each(&mut f),
        });
        last.into_iter().for_each(f);
    }

    fn parts(&self, rank: u32, mut f: impl FnMut(Range<u64>)) {
        let (r, world) = (u64::from(rank), self.world);
        match &self.kind {
            Kind::Replicate => f(0..self.extent),
            Kind::Keep(ranks) => {
                if ranks.binary_search(&rank).is_ok() {
                    f(0..self.extent);
                }
            }
            Kind::Split(split) => {
                let mut start = 0;
                for size in split.section_list(self.extent) {
                    let block = split.block(size / split.unit, r, world);
                    f(start + block.start * split.unit..start + block.end * split.unit);
                    start += size;
                }
            }
            Kind::VocabRows { .. } => {
                let block = self.vocab_block();
                f((r * block).min(self.extent)..((r + 1) * block).min(self.extent));
            }
            Kind::Ranges { per_rank, .. } => {
                per_rank[rank as usize].iter().cloned().for_each(f);
            }
        }
    }

    fn vocab_block(&self) -> u64 {
        let Kind::VocabRows { multiple } = self.kind else {
            return 0;
        };
        self.extent.next_multiple_of(multiple).div_ceil(self.world)
    }

    /// Indices that `rank` keeps, without padding.
    pub(crate) fn kept_extent(&self, rank: u32) -> u64 {
        let mut sum = 0;
        self.ranges(rank, |range| sum += range.end - range.start);
        sum
    }

    /// Zero-filled indices after those kept.
    pub(crate) fn padding(&self, rank: u32) -> u64 {
        match self.kind {
            Kind::VocabRows { .. } => self.vocab_block() - self.kept_extent(rank),
            _ => 0,
        }
    }

    /// Whether `rank` has the tensor at all (perhaps empty).
    pub(crate) fn is_present(&self, rank: u32) -> bool {
        match &self.kind {
            Kind::Replicate | Kind::VocabRows { .. } => true,
            Kind::Keep(ranks) => ranks.binary_search(&rank).is_ok(),
            Kind::Split(split) if split.remainder == Remainder::Chunk => {
                self.extent == 0 || self.kept_extent(rank) > 0
            }
            Kind::Split(_) => true,
            Kind::Ranges { per_rank, .. } => !per_rank[rank as usize].is_empty(),
        }
    }

    /// The shape that `rank` keeps, padding included.
    pub(crate) fn shape(&self, rank: u32) -> Vec<u64> {
        let mut shape = self.shape.to_vec();
        if let Some(dim) = self.dim {
            shape[dim] = self.kept_extent(rank) + self.padding(rank);
        }
        shape
    }

    /// The shape of the whole tensor.
    pub(crate) fn full_shape(&self) -> &[u64] {
        &self.shape
    }

    /// Writes a form that is equal for equal specifications only, and stable across builds.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let mut number = |n: u64| out.extend(n.to_le_bytes());
        number(self.bits);
        number(self.shape.len() as u64);
        self.shape.iter().for_each(|&extent| number(extent));
        match &self.kind {
            Kind::Replicate => number(0),
            Kind::Split(split) => {
                number(1);
                number(split.dim as u64);
                number(match split.remainder {
                    Remainder::CeilDiv => 0,
                    Remainder::Chunk => 1,
                    Remainder::Balanced => 2,
                    Remainder::Exact => 3,
                });
                number(split.unit);
                number(u64::from(split.share));
                let list: Vec<u64> = split.section_list(self.extent).collect();
                number(list.len() as u64);
                list.into_iter().for_each(number);
            }
            Kind::Keep(ranks) => {
                number(2);
                ranks.iter().for_each(|&rank| number(u64::from(rank)));
            }
            Kind::VocabRows { multiple } => {
                number(3);
                number(*multiple);
            }
            Kind::Ranges { dim, per_rank } => {
                number(4);
                number(*dim as u64);
                for ranges in per_rank.iter() {
                    number(ranges.len() as u64);
                    for range in ranges {
                        number(range.start);
                        number(range.end);
                    }
                }
            }
        }
    }

    /// Whether every rank keeps the whole tensor.
    pub(crate) fn is_replicated(&self) -> bool {
        match &self.kind {
            Kind::Replicate => true,
            Kind::Keep(ranks) => ranks.len() as u64 == self.world,
            _ => false,
        }
    }

    /// Ends of runs of ranks of which each keeps as much as the run's first, in equally long pieces.
    pub(crate) fn runs(&self) -> Vec<u32> {
        let world = self.world as u32;
        let mut ends = vec![world];
        match &self.kind {
            Kind::Replicate => {}
            Kind::Keep(ranks) => ends.extend(ranks.iter().flat_map(|&rank| [rank, rank + 1])),
            Kind::Split(split) => {
                for size in split.section_list(self.extent) {
                    ends.extend(split.steps(size / split.unit, self.world));
                }
                // Where ranks share heads, the part of one section that a rank keeps may meet that
                // of the next: one piece of this rank, two of its neighbour.
                if split.share && split.section_list(self.extent).nth(1).is_some() {
                    ends.extend(0..world);
                }
            }
            Kind::VocabRows { .. } => {
                let full = self.extent.checked_div(self.vocab_block()).unwrap_or(0) as u32;
                ends.extend([full, full + 1]);
            }
            Kind::Ranges { .. } => ends.extend(0..world),
        }
        ends.retain(|&end| 0 < end && end <= world);
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    /// On how many ranks the most wanted byte is kept.
    pub(crate) fn copies(&self) -> u64 {
        match &self.kind {
            Kind::Replicate => self.world,
            Kind::Keep(ranks) => ranks.len() as u64,
            Kind::VocabRows { .. } => 1,
            Kind::Split(split) if !split.share => 1,
            Kind::Split(split) => split
                .section_list(self.extent)
                .map(|size| self.world / (size / split.unit).clamp(1, self.world))
                .max()
                .unwrap_or(1),
            Kind::Ranges { per_rank, .. } => {
                let mut edges = Vec::new();
                for range in per_rank.iter().flatten().filter(|range| range.start < range.end) {
                    edges.push((range.start, 1i64));
                    edges.push((range.end, -1));
                }
                edges.sort_unstable();
                let mut depth = 0;
                edges.iter().fold(0, |most, (_, step)| {
                    depth += step;
                    most.max(depth)
                }) as u64
            }
        }
    }
}
