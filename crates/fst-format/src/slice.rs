//! Parts of tensors, as runs of bytes.
//!
//! Tensors are stored densely with the last dimension innermost. A range of one dimension is therefore one
//! run for each index of the dimensions before it, all of one length and at equal distances: four numbers
//! say it all. Ranges of several dimensions, or several of one, are a short list of such runs.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use crate::{Dtype, TensorInfo};

/// Positions of one dimension of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cut {
    /// The dimension, counted from 0.
    pub dim: usize,
    /// The positions.
    pub range: Range<usize>,
    /// Of these, the first and every `step`-th behind it.
    pub step: NonZeroUsize,
}

impl Cut {
    /// Number of positions.
    #[allow(clippy::len_without_is_empty, reason = "a cut is no container")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.range.len().div_ceil(self.step.get())
    }
}

impl From<(usize, Range<usize>)> for Cut {
    /// All positions of a range of a dimension.
    fn from((dim, range): (usize, Range<usize>)) -> Self {
        Self { dim, range, step: NonZeroUsize::MIN }
    }
}

/// Positions of some dimensions of a tensor, and all of the others.
///
/// ```no_run
/// let checkpoint = fst_format::Checkpoint::open("model.safetensors")?;
/// let weight = checkpoint.get("o_proj.weight").ok_or("no such tensor")?;
/// let slice = weight.slice(1, 0..2048)?; // the first half of every row
/// let start = weight.file_range().start;
/// for range in slice.ranges() {
///     let bytes_of_file = start + range.start..start + range.end;
/// #   let _ = bytes_of_file;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Slice {
    shape: Arc<[usize]>,
    runs: Arc<[Runs]>,
}

/// Runs of bytes of one length at equal distances, from the start of the tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Runs {
    /// Offset of the first run.
    pub first: u64,
    /// Bytes of each run.
    pub len: u64,
    /// Bytes from the start of a run to the start of the next; `len` where there is only one.
    pub stride: u64,
    /// Number of runs.
    pub count: u64,
}

/// The longest list of runs that a slice may be.
const MAX_RUNS: u64 = 1 << 20;

/// Why a tensor has no such slice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SliceError {
    /// The tensor has fewer dimensions.
    #[error("tensor {tensor:?}: no dimension {dim}: it has {rank}, counted from 0")]
    NoSuchDim {
        /// The tensor.
        tensor: String,
        /// The dimension, counted from 0.
        dim: usize,
        /// How many the tensor has.
        rank: usize,
    },
    /// The range is not inside the dimension, or ends before it begins.
    #[error(
        "tensor {tensor:?}: {}..{} is no range of dimension {dim} of length {len}",
        range.start, range.end
    )]
    OutOfRange {
        /// The tensor.
        tensor: String,
        /// The dimension, counted from 0.
        dim: usize,
        /// The range asked for.
        range: Range<usize>,
        /// Length of the dimension.
        len: usize,
    },
    /// A cut would fall between the bits of a byte.
    #[error("tensor {tensor:?}: the slice cuts {dtype} elements at bit {bit}, inside a byte")]
    PartialByte {
        /// The tensor.
        tensor: String,
        /// Its dtype, a packed one.
        dtype: Dtype,
        /// The first cut that is not on a byte, in bits from the start of the tensor.
        bit: u64,
    },
    /// The slice is too scattered to be handled at once.
    #[error(
        "tensor {tensor:?}: the slice is a list of more than {most} runs of bytes; take fewer ranges, or \
         rows, at a time"
    )]
    TooManyRuns {
        /// The tensor.
        tensor: String,
        /// The longest list that can be handled.
        most: u64,
    },
    /// Positions are repeated so often that no memory holds them.
    #[error("tensor {tensor:?}: the slice is longer than any memory")]
    TooLong {
        /// The tensor.
        tensor: String,
    },
}

impl Slice {
    /// These positions of `tensor`: of each dimension that is cut, those of its cuts one behind the other in
    /// the order given, which may name a position more than once; of other dimensions, all.
    ///
    /// # Errors
    ///
    /// A dimension or range that the tensor does not have, or cuts inside a byte of a packed dtype. An empty
    /// slice cuts nothing and is always on a byte. [`SliceError::TooManyRuns`] for one that is scattered over
    /// a million places.
    pub fn new<C: Into<Cut>>(
        tensor: &TensorInfo,
        cuts: impl IntoIterator<Item = C>,
    ) -> Result<Slice, SliceError> {
        let name = || tensor.name().to_owned();
        let whole = tensor.shape();
        let mut by_dim: Vec<Vec<Cut>> = vec![Vec::new(); whole.len()];
        for cut in cuts {
            let cut: Cut = cut.into();
            let (dim, range) = (cut.dim, cut.range.clone());
            let Some(&len) = whole.get(dim) else {
                return Err(SliceError::NoSuchDim { tensor: name(), dim, rank: whole.len() });
            };
            if range.start > range.end || range.end > len {
                return Err(SliceError::OutOfRange { tensor: name(), dim, range, len });
            }
            by_dim[dim].push(cut);
        }
        let extent = |(&len, cuts): (&usize, &Vec<Cut>)| match &cuts[..] {
            [] => Some(len),
            cuts => cuts.iter().map(Cut::len).try_fold(0, usize::checked_add),
        };
        let shape: Option<Arc<[usize]>> = whole.iter().zip(&by_dim).map(extent).collect();
        let shape = shape.ok_or_else(|| SliceError::TooLong { tensor: name() })?;
        if shape.contains(&0) {
            return Ok(Slice { shape, runs: Arc::default() });
        }
        let too_many = || SliceError::TooManyRuns { tensor: name(), most: MAX_RUNS };
        let dtype = tensor.dtype();
        let mut runs = bit_runs(dtype, whole, &by_dim).ok_or_else(too_many)?;
        for run in &mut runs {
            *run = run.in_bytes().map_err(|bit| {
                let tensor = name();
                SliceError::PartialByte { tensor, dtype, bit }
            })?;
        }
        let bytes = runs.iter().map(|runs| runs.len.checked_mul(runs.count));
        let fits = bytes.into_iter().try_fold(0u64, |sum, bytes| sum.checked_add(bytes?));
        match fits.filter(|bytes| *bytes <= i64::MAX as u64) {
            Some(_) => Ok(Slice { shape, runs: runs.into() }),
            None => Err(SliceError::TooLong { tensor: name() }),
        }
    }

    /// Dimensions of the slice, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes of the slice.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.runs.iter().map(Runs::byte_len).sum()
    }

    /// Where in the tensor the slice's bytes are, in its order. A slice that is one range is one run, an
    /// empty one is none.
    #[must_use]
    pub fn runs(&self) -> &[Runs] {
        &self.runs
    }

    /// The same as byte ranges from the start of the tensor.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs.iter().flat_map(Runs::iter)
    }

    /// The same shape, of these bytes only.
    pub(crate) fn with_runs(&self, runs: Vec<Runs>) -> Self {
        Self { shape: self.shape.clone(), runs: runs.into() }
    }

    /// All of a tensor.
    pub(crate) fn whole(tensor: &TensorInfo) -> Self {
        let runs = Runs::one(tensor.byte_len());
        Self {
            shape: tensor.shape().into(),
            runs: [runs].into_iter().filter(|r| r.len > 0).collect(),
        }
    }
}

impl TensorInfo {
    /// The elements `range` of dimension `dim`, counted from 0; [`Slice::new`] cuts several.
    ///
    /// # Errors
    ///
    /// As [`Slice::new`].
    pub fn slice(&self, dim: usize, range: Range<usize>) -> Result<Slice, SliceError> {
        Slice::new(self, [(dim, range)])
    }
}

/// The runs of the cuts of `shape`, in bits; `None` if there are too many. The tensor's size in bits fits
/// `u64`, no dimension is empty and each cut is inside its own.
fn bit_runs(dtype: Dtype, shape: &[usize], cuts: &[Vec<Cut>]) -> Option<Vec<Runs>> {
    let mut unit = u64::from(dtype.bits());
    let mut runs = vec![Runs::one(unit)];
    for (&len, cuts) in shape.iter().zip(cuts).rev() {
        let mut outer = Vec::new();
        if cuts.is_empty() {
            repeat(&runs, 0, len as u64, unit, &mut outer)?;
        }
        for cut in cuts {
            let (first, stride) = (cut.range.start as u64 * unit, cut.step.get() as u64);
            repeat(&runs, first, cut.len() as u64, stride.saturating_mul(unit), &mut outer)?;
        }
        (runs, unit) = (outer, unit * len as u64);
    }
    Some(runs)
}

/// Adds `count` copies of `runs`, the first moved by `first`, each `stride` behind the one before.
fn repeat(runs: &[Runs], first: u64, count: u64, stride: u64, all: &mut Vec<Runs>) -> Option<()> {
    if let [run] = *runs
        && count > 1
        && (run.count == 1 || run.count * run.stride == stride)
    {
        let stride = if run.count == 1 { stride } else { run.stride };
        push(all, Runs { first: first + run.first, count: run.count * count, stride, ..run });
        return Some(());
    }
    let added = count.checked_mul(runs.len() as u64)?;
    if added + all.len() as u64 > MAX_RUNS {
        return None;
    }
    for copy in 0..count {
        for run in runs {
            push(all, Runs { first: first + copy * stride + run.first, ..*run });
        }
    }
    Some(())
}

/// Adds runs behind the others; they become part of the last ones where they go on like these.
fn push(all: &mut Vec<Runs>, mut runs: Runs) {
    if runs.stride == runs.len {
        runs = Runs { first: runs.first, ..Runs::one(runs.len * runs.count) };
    }
    if let Some(last) = all.last_mut() {
        if (last.count, runs.count) == (1, 1) && last.first + last.len == runs.first {
            *last = Runs { first: last.first, ..Runs::one(last.len + runs.len) };
            return;
        }
        let stride = match last.count {
            1 => runs.first.saturating_sub(last.first),
            _ => last.stride,
        };
        if last.len == runs.len
            && stride > runs.len
            && last.first + last.count * stride == runs.first
            && (runs.count == 1 || runs.stride == stride)
        {
            (last.stride, last.count) = (stride, last.count + runs.count);
            return;
        }
    }
    all.push(runs);
}

impl Runs {
    /// One run from the start on.
    pub(crate) fn one(len: u64) -> Self {
        Self { first: 0, len, stride: len, count: 1 }
    }

    /// Bytes of all runs together.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.len * self.count
    }

    /// First byte behind all of them.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first + self.count.saturating_sub(1) * self.stride + self.len
    }

    /// The runs as byte ranges from the start of the tensor, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let runs = *self;
        (0..runs.count).map(move |run| {
            let start = runs.first + run * runs.stride;
            start..start + runs.len
        })
    }

    /// These runs of bits as runs of bytes, or the first cut that is not on one.
    fn in_bytes(self) -> Result<Self, u64> {
        // Where the first run starts and ends, then where the second starts.
        let cuts = [self.first, self.first + self.len, self.first + self.stride];
        match cuts.into_iter().find(|bit| bit % 8 != 0) {
            Some(bit) => Err(bit),
            None => {
                let Self { first, len, stride, count } = self;
                Ok(Self { first: first / 8, len: len / 8, stride: stride / 8, count })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(shape: &[usize], cuts: &[(usize, Range<usize>)]) -> Vec<Vec<Cut>> {
        let mut by_dim = vec![Vec::new(); shape.len()];
        cuts.iter().for_each(|cut| by_dim[cut.0].push(cut.clone().into()));
        by_dim
    }

    fn runs(
        dtype: Dtype,
        shape: &[usize],
        all: &[(usize, Range<usize>)],
    ) -> Result<Vec<Runs>, u64> {
        let runs = bit_runs(dtype, shape, &cuts(shape, all)).unwrap_or_default();
        runs.into_iter().map(Runs::in_bytes).collect()
    }

    fn run(first: u64, len: u64, stride: u64, count: u64) -> Runs {
        Runs { first, len, stride, count }
    }

    #[test]
    fn contiguous_slices_are_one_run() {
        let one = |first, len| Ok(vec![Runs { first, ..Runs::one(len) }]);
        assert_eq!(runs(Dtype::F32, &[4, 5], &[(0, 1..3)]), one(20, 40));
        assert_eq!(runs(Dtype::F32, &[4, 5], &[(1, 0..5)]), one(0, 80));
        assert_eq!(runs(Dtype::F32, &[1, 1, 5, 2], &[(2, 1..3)]), one(8, 16));
        assert_eq!(runs(Dtype::F32, &[7], &[(0, 6..7)]), one(24, 4));
        // However it is put together.
        assert_eq!(runs(Dtype::F32, &[4, 5], &[(0, 1..2), (1, 0..3), (1, 3..5)]), one(20, 20));
        assert_eq!(runs(Dtype::F32, &[4, 5], &[(1, 0..5), (0, 0..1), (0, 1..4)]), one(0, 80));
        assert_eq!(runs(Dtype::F4, &[2, 4], &[(1, 0..1), (1, 1..4)]), one(0, 4));
    }

    #[test]
    fn strided_slices_are_few_numbers() {
        let expected = run(2, 4, 10, 4);
        assert_eq!(runs(Dtype::BF16, &[2, 2, 5], &[(2, 1..3)]), Ok(vec![expected]));
        let ranges: Vec<_> = expected.iter().collect();
        assert_eq!((ranges, expected.end()), (vec![2..6, 12..16, 22..26, 32..36], 36));
        // Rows and columns of a matrix, and of each of a stack.
        let of = |shape: &[usize], cuts: &[_]| runs(Dtype::U8, shape, cuts).unwrap();
        assert_eq!(of(&[9, 8], &[(1, 2..5), (0, 4..7)]), [run(34, 3, 8, 3)]);
        let stack = [(0, 1..3), (1, 4..7), (2, 2..5)];
        assert_eq!(of(&[5, 9, 8], &stack), [run(106, 3, 8, 3), run(178, 3, 8, 3)]);
        assert_eq!(of(&[5, 9, 8], &[(0, 1..3), (2, 2..5)]), [run(74, 3, 8, 18)]);
        // Several ranges of a dimension, in the order given.
        let swapped = of(&[1000, 8], &[(0, 500..1000), (0, 0..500)]);
        assert_eq!(swapped, [run(4000, 4000, 4000, 1), run(0, 4000, 4000, 1)]);
        assert_eq!(of(&[1000, 8], &[(1, 1..2), (1, 5..6)]), [run(1, 1, 4, 2000)]);
        assert_eq!(of(&[2, 8], &[(1, 0..3), (1, 5..6)]).len(), 4);
        // Every third position.
        let third = [Cut { dim: 0, range: 1..9, step: NonZeroUsize::new(3).unwrap() }];
        assert_eq!(
            bit_runs(Dtype::U8, &[9, 2], &[third.to_vec(), vec![]]),
            Some(vec![run(16, 16, 48, 3)])
        );
        // A billion rows cost nothing where one number counts them.
        assert_eq!(of(&[1 << 30, 8], &[(1, 0..3), (1, 4..7)]), [run(0, 3, 4, 2 << 30)]);
        let scattered = cuts(&[1 << 30, 8], &[(1, 0..3), (1, 4..6)]);
        assert_eq!(bit_runs(Dtype::U8, &[1 << 30, 8], &scattered), None);
    }

    #[test]
    fn packed_elements_are_cut_on_bytes_only() {
        let one = |dtype, shape: &[usize], dim, range| runs(dtype, shape, &[(dim, range)]);
        assert_eq!(one(Dtype::F4, &[3, 4], 1, 2..4), Ok(vec![run(1, 1, 2, 3)]));
        assert_eq!(one(Dtype::F4, &[3, 4], 1, 1..3), Err(4));
        assert_eq!(one(Dtype::F4, &[3, 4], 1, 0..1), Err(4));
        assert_eq!(one(Dtype::F6E2M3, &[8], 0, 4..8).unwrap()[0].first, 3);
        assert_eq!(one(Dtype::F6E2M3, &[8], 0, 2..6), Err(12));
        // The first row is cut on bytes, the second is not.
        assert_eq!(one(Dtype::F4, &[2, 3], 1, 0..2), Err(12));
        // Rows that end inside bytes are no cuts where all of them are taken.
        assert_eq!(one(Dtype::F4, &[2, 3], 1, 0..3).unwrap()[0].len, 3);
    }
}
