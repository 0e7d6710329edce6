//! Shard specifications: which part of a tensor each rank keeps.
//!
//! A [`Shard`] says it in the words of tensor parallelism (replicate, split, keep, vocabulary rows,
//! explicit ranges). Fitted to one shape and world size it becomes a `Resolved`.
//!
//! | fastsafetensors | here |
//! |---|---|
//! | `get_tensor` (broadcast) | [`Shard::replicate`] |
//! | `get_sharded(name, dim)` (scatter) | [`Shard::split`] |
//! | `push_tensor(name, rank)` | [`Shard::keep_on`] |
//! | `get_multi_cols(names, dim)` | [`Split::fused_into`] for each of the names |
//! | `as_dict(name -> dim)` | one closure `TensorDesc -> Shard` for the whole load, or a [`Preset`](crate::Preset) |

use std::ops::Range;
use std::sync::Arc;

use crate::error::ShardError;
use crate::resolved::Resolved;
use crate::tensor::TensorDesc;

/// How a split deals with a dimension that the world size does not divide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Remainder {
    /// Blocks of `ceil(n / world)`: rank `r` keeps `r * block .. (r + 1) * block`, clipped to the
    /// dimension; late ranks may keep an empty tensor. What text-generation-inference and
    /// fastsafetensors do, and the default; equal to all others where the world size divides.
    #[default]
    CeilDiv,
    /// The same blocks as `torch.chunk` returns them: there may be fewer chunks than ranks, and a rank
    /// without a chunk has no tensor at all.
    Chunk,
    /// As `torch.tensor_split` and NumPy's `array_split`: sizes differ by one at most, the larger
    /// first.
    Balanced,
    /// Refuse, as Megatron and vLLM do.
    Exact,
}

/// A split of one dimension over the ranks. Becomes a [`Shard`] by `into()`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Split {
    pub(crate) dim: usize,
    pub(crate) remainder: Remainder,
    pub(crate) unit: u64,
    pub(crate) share: bool,
    sections: Sections,
    fuse: Option<Fuse>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Sections {
    Equal(u64),
    Sizes(Arc<[u64]>),
}

/// Membership of a tensor that is concatenated with others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Fuse {
    pub(crate) name: Arc<str>,
    pub(crate) position: u32,
}

/// Most equal sections of a tensor: a specification of a few bytes must not make a plan of any length.
const MAX_SECTIONS: u64 = 1 << 16;

impl Split {
    /// A split along `dim`, by [`Remainder::CeilDiv`].
    #[must_use]
    pub fn along(dim: usize) -> Self {
        let sections = Sections::Equal(1);
        Self { dim, remainder: Remainder::default(), unit: 1, share: false, sections, fuse: None }
    }

    /// Choose the rule for dimensions that the world size does not divide.
    #[must_use]
    pub fn remainder(mut self, rule: Remainder) -> Self {
        self.remainder = rule;
        self
    }

    /// Elements along the dimension that stay together: a quantisation block, an interleaved group
    /// of heads.
    #[must_use]
    pub fn unit(mut self, elements: u64) -> Self {
        self.unit = elements.max(1);
        self.share = false;
        self
    }

    /// Attention heads of `head_dim` elements, which stay together. Where there are fewer heads than
    /// ranks (grouped-query key and value heads), neighbouring ranks keep the same head.
    #[must_use]
    pub fn heads(mut self, head_dim: u64) -> Self {
        self.unit = head_dim.max(1);
        self.share = true;
        self
    }

    /// The tensor is `n` equal tensors stored as one (GPT-2's `c_attn` holds query, key and value):
    /// each is split by itself and the rank keeps its parts concatenated. At most 65,536.
    #[must_use]
    pub fn sections(mut self, n: u64) -> Self {
        self.sections = Sections::Equal(n.max(1));
        self
    }

    /// As [`sections`](Self::sections), of unequal sizes along the dimension.
    #[must_use]
    pub fn section_sizes(mut self, sizes: impl Into<Arc<[u64]>>) -> Self {
        self.sections = Sections::Sizes(sizes.into());
        self
    }

    /// Concatenate this rank's part with those of the other tensors that name the same `output`,
    /// along the split dimension and in the order of `position` (from 0): one fused QKV from three
    /// projections, one gate+up from two.
    #[must_use]
    pub fn fused_into(mut self, output: impl Into<Arc<str>>, position: u32) -> Self {
        self.fuse = Some(Fuse { name: output.into(), position });
        self
    }

    /// The part of `count` units that `rank` keeps.
    pub(crate) fn block(&self, count: u64, rank: u64, world: u64) -> Range<u64> {
        if self.share && count < world {
            let head = rank * count / world;
            return head..head + 1;
        }
        if self.remainder == Remainder::Balanced {
            let (each, extra) = (count / world, count % world);
            let start = rank * each + rank.min(extra);
            return start..start + each + u64::from(rank < extra);
        }
        let block = count.div_ceil(world);
        // Of an empty tensor `count` may be all that fits: the last end is then beyond it.
        rank.saturating_mul(block).min(count)..(rank + 1).saturating_mul(block).min(count)
    }

    /// Ranks at which the size of the block of `count` units may change.
    pub(crate) fn steps(&self, count: u64, world: u64) -> [u32; 2] {
        if self.share && count < world {
            return [0, 0];
        }
        let full = match self.remainder {
            Remainder::Balanced => return [(count % world) as u32, 0],
            _ => count.checked_div(count.div_ceil(world)).unwrap_or(0) as u32,
        };
        [full, full + 1]
    }

    pub(crate) fn section_list(&self, extent: u64) -> impl Iterator<Item = u64> + '_ {
        let (equal, sizes) = match &self.sections {
            Sections::Equal(n) => (*n, [].as_slice()),
            Sections::Sizes(sizes) => (0, sizes.as_ref()),
        };
        (0..equal).map(move |_| extent / equal).chain(sizes.iter().copied())
    }

    pub(crate) fn check(&self, extent: u64, world: u64) -> Result<(), ShardError> {
        let (dim, unit) = (self.dim, self.unit);
        if let Sections::Equal(sections) = self.sections
            && sections > MAX_SECTIONS
        {
            return Err(ShardError::TooManySections { dim, sections, most: MAX_SECTIONS });
        }
        let total = match &self.sections {
            Sections::Equal(n) => extent / n * n,
            Sections::Sizes(sizes) => {
                sizes.iter().try_fold(0u64, |sum, &size| sum.checked_add(size)).unwrap_or(u64::MAX)
            }
        };
        if total != extent {
            return Err(ShardError::Sections { dim, extent, total });
        }
        for size in self.section_list(extent) {
            if !size.is_multiple_of(unit) {
                return Err(ShardError::Unit { dim, extent: size, unit });
            }
            let count = size / unit;
            let shared = self.share && count < world;
            if shared && (count == 0 || !world.is_multiple_of(count)) {
                return Err(ShardError::Heads { dim, heads: count, world });
            }
            if !shared && self.remainder == Remainder::Exact && !count.is_multiple_of(world) {
                return Err(ShardError::NotDivisible { dim, extent: count, world });
            }
        }
        Ok(())
    }
}

impl From<Split> for Shard {
    fn from(mut split: Split) -> Self {
        let fuse = split.fuse.take();
        Self { kind: Kind::Split(split), fuse }
    }
}

/// Which part of a tensor each rank keeps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    pub(crate) kind: Kind,
    pub(crate) fuse: Option<Fuse>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Replicate,
    Split(Split),
    /// Ranks in ascending order, none twice.
    Keep(Arc<[u32]>),
    VocabRows {
        multiple: u64,
    },
    Ranges {
        dim: usize,
        per_rank: Arc<[Vec<Range<u64>>]>,
    },
}

impl Shard {
    fn plain(kind: Kind) -> Self {
        Self { kind, fuse: None }
    }

    /// Every rank keeps the whole tensor.
    #[must_use]
    pub fn replicate() -> Self {
        Self::plain(Kind::Replicate)
    }

    /// Split along `dim`, by [`Remainder::CeilDiv`]. [`Split`] has the variants: other rules, heads,
    /// sections, fusing.
    #[must_use]
    pub fn split(dim: usize) -> Self {
        Split::along(dim).into()
    }

    /// Rank `rank` alone keeps the tensor.
    #[must_use]
    pub fn keep_on(rank: u32) -> Self {
        Self::keep_on_ranks([rank])
    }

    /// The given ranks keep the whole tensor each (an expert held by several ranks).
    #[must_use]
    pub fn keep_on_ranks(ranks: impl IntoIterator<Item = u32>) -> Self {
        let mut ranks: Vec<u32> = ranks.into_iter().collect();
        ranks.sort_unstable();
        ranks.dedup();
        Self::plain(Kind::Keep(ranks.into()))
    }

    /// No rank keeps the tensor; it is not read.
    #[must_use]
    pub fn skip() -> Self {
        Self::keep_on_ranks([])
    }

    /// Rows of a vocabulary-parallel embedding. The number of rows is rounded up to `multiple`, then to
    /// the world size, and split evenly; rows beyond the vocabulary are zero, so all ranks keep
    /// equal shapes. vLLM pads to 64, Megatron to 128 times the world size.
    #[must_use]
    pub fn vocab_rows(multiple: u64) -> Self {
        Self::plain(Kind::VocabRows { multiple: multiple.max(1) })
    }

    /// Rank `r` keeps the index ranges `per_rank[r]` along `dim`, concatenated in the order given
    /// (expert maps that are not linear). There is one list for each rank; ranges of one rank do not
    /// overlap, those of different ranks may.
    #[must_use]
    pub fn ranges(dim: usize, per_rank: impl Into<Arc<[Vec<Range<u64>>]>>) -> Self {
        Self::plain(Kind::Ranges { dim, per_rank: per_rank.into() })
    }

    /// What `rank` of `world` keeps of a tensor; `None` when it keeps none of it.
    ///
    /// # Errors
    /// The specification does not fit the tensor.
    pub fn kept(
        &self,
        tensor: &TensorDesc,
        rank: u32,
        world: u32,
    ) -> Result<Option<KeptPart>, ShardError> {
        let resolved = Resolved::new(self, tensor.bits, &tensor.shape, world)?;
        if rank >= world {
            return Err(ShardError::Rank { rank, world });
        }
        if !resolved.is_present(rank) {
            return Ok(None);
        }
        let mut ranges = Vec::new();
        match resolved.dim {
            Some(_) => resolved.ranges(rank, |range| ranges.push(range)),
            None => ranges.push(0..tensor.shape.first().copied().unwrap_or(1)),
        }
        let padding = resolved.padding(rank);
        let shape = resolved.shape(rank);
        Ok(Some(KeptPart { dim: resolved.dim.unwrap_or(0), ranges, padding, shape }))
    }
}

/// What one rank keeps of one tensor, in index terms.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeptPart {
    /// The dimension that is cut.
    pub dim: usize,
    /// Index ranges along it, concatenated in this order.
    pub ranges: Vec<Range<u64>>,
    /// Zero-filled indices after the last range.
    pub padding: u64,
    /// The shape kept, padding included.
    pub shape: Vec<u64>,
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    fn desc(shape: &[u64], bits: u32) -> TensorDesc {
        let len = shape.iter().product::<u64>() * u64::from(bits) / 8;
        TensorDesc { name: "t".into(), bits, shape: shape.to_vec(), shard: 0, file_range: 0..len }
    }

    fn ranges(shard: impl Into<Shard>, shape: &[u64], world: u32) -> Vec<Option<Vec<Range<u64>>>> {
        let shard = shard.into();
        let kept = |rank| shard.kept(&desc(shape, 16), rank, world).unwrap();
        (0..world).map(|rank| kept(rank).map(|part| part.ranges)).collect()
    }

    #[test]
    fn remainder_rules_cut_ten_and_six_by_four() {
        let split = |rule| Split::along(0).remainder(rule);
        let some = |list: &[Range<u64>]| list.iter().map(|r| Some(vec![r.clone()])).collect();
        let expect: Vec<_> = some(&[0..3, 3..6, 6..9, 9..10]);
        assert_eq!(ranges(split(Remainder::CeilDiv), &[10], 4), expect);
        assert_eq!(ranges(split(Remainder::Chunk), &[10], 4), expect);
        let expect: Vec<_> = some(&[0..3, 3..6, 6..8, 8..10]);
        assert_eq!(ranges(split(Remainder::Balanced), &[10], 4), expect);
        // Six by four leaves the last rank an empty tensor, or none.
        let mut expect: Vec<_> = some(&[0..2, 2..4, 4..6, 6..6]);
        assert_eq!(ranges(split(Remainder::CeilDiv), &[6], 4), expect);
        expect[3] = None;
        assert_eq!(ranges(split(Remainder::Chunk), &[6], 4), expect);
        let refused = Shard::from(split(Remainder::Exact)).kept(&desc(&[10], 16), 0, 4);
        assert_eq!(refused, Err(ShardError::NotDivisible { dim: 0, extent: 10, world: 4 }));
    }

    #[test]
    fn heads_are_shared_when_fewer_than_ranks() {
        let got = ranges(Split::along(0).heads(4), &[8], 4);
        let expect = [0..4, 0..4, 4..8, 4..8].map(|range| Some(vec![range]));
        assert_eq!(got, expect);
        let refused = Shard::from(Split::along(0).heads(4)).kept(&desc(&[8], 16), 0, 3);
        assert_eq!(refused, Err(ShardError::Heads { dim: 0, heads: 2, world: 3 }));
    }

    #[test]
    fn sections_are_split_each_by_itself() {
        let got = ranges(Split::along(0).sections(3), &[12], 2);
        assert_eq!(got[1], Some(vec![2..4, 6..8, 10..12]));
        let got = ranges(Split::along(0).section_sizes([8, 4]), &[12], 2);
        assert_eq!(got[0], Some(vec![0..4, 8..10]));
    }

    #[test]
    fn vocabulary_is_padded_to_equal_rows() {
        let part = |rank| Shard::vocab_rows(8).kept(&desc(&[13, 2], 16), rank, 4).unwrap().unwrap();
        assert_eq!(part(2).ranges, [8..12]);
        assert_eq!((part(3).ranges[0].clone(), part(3).padding), (12..13, 3));
        assert_eq!(part(3).shape, [4, 2]);
    }

    #[test]
    fn sub_byte_cuts_must_fall_on_bytes() {
        let kept = |shape: &[u64]| Shard::split(1).kept(&desc(shape, 4), 0, 2);
        assert!(kept(&[3, 8]).is_ok());
        assert_eq!(kept(&[3, 6]), Err(ShardError::Bits { dim: 1, index: 3, bits: 4 }));
    }

    #[test]
    fn overlapping_and_outlying_ranges_are_refused() {
        let check = |per_rank: Vec<Vec<Range<u64>>>| {
            Shard::ranges(0, per_rank).kept(&desc(&[10], 8), 0, 2).unwrap_err()
        };
        let lists = check(vec![vec![]]);
        assert_eq!(lists, ShardError::RangeLists { lists: 1, world: 2 });
        let overlap = check(vec![vec![0..4, 3..5], vec![]]);
        assert_eq!(overlap, ShardError::Overlap { dim: 0, rank: 0, range: 3..5 });
        let beyond = check(vec![vec![], vec![9..11]]);
        assert_eq!(beyond, ShardError::Range { dim: 0, rank: 1, range: 9..11, extent: 10 });
    }
}
