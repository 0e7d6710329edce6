//! A part of a tensor along one dimension, as runs of bytes.
//!
//! Tensors are stored densely with the last dimension innermost. A range of dimension `d` is
//! therefore one run for each index of the dimensions before `d`, all of one length and at equal
//! distances: four numbers say it all.

use std::ops::Range;

use crate::{Dtype, TensorInfo};

/// The elements `start..end` of one dimension of a tensor, and all of the others.
///
/// ```no_run
/// let checkpoint = fst_format::Checkpoint::open("model.safetensors")?;
/// let weight = checkpoint.get("o_proj.weight").ok_or("no such tensor")?;
/// let slice = weight.slice(1, 0..2048)?; // the first half of every row
/// let start = weight.file_range().start;
/// for run in slice.runs() {
///     let bytes_of_file = start + run.start..start + run.end;
/// #   let _ = bytes_of_file;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Slice {
    tensor: TensorInfo,
    dim: usize,
    range: Range<usize>,
    shape: Box<[usize]>,
    runs: Runs,
}

/// Runs of bytes of one length at equal distances, from the start of the tensor.
///
/// Runs do not touch each other: a slice that is contiguous is one run, an empty one is none.
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
    #[error(
        "tensor {tensor:?}: {}..{} of dimension {dim} cuts {dtype} elements at bit {bit}, inside \
         a byte",
        range.start, range.end
    )]
    PartialByte {
        /// The tensor.
        tensor: String,
        /// Its dtype, a packed one.
        dtype: Dtype,
        /// The dimension, counted from 0.
        dim: usize,
        /// The range asked for.
        range: Range<usize>,
        /// The first cut that is not on a byte, in bits from the start of the tensor.
        bit: u64,
    },
}

impl Slice {
    /// The elements `range` of dimension `dim`, counted from 0, of `tensor`.
    ///
    /// # Errors
    ///
    /// A dimension or range that the tensor does not have, or cuts inside a byte of a packed
    /// dtype. An empty slice cuts nothing and is always on a byte.
    pub fn new(tensor: &TensorInfo, dim: usize, range: Range<usize>) -> Result<Slice, SliceError> {
        let name = || tensor.name().to_owned();
        let mut shape: Box<[usize]> = tensor.shape().into();
        let rank = shape.len();
        let Some(slot) = shape.get_mut(dim) else {
            return Err(SliceError::NoSuchDim { tensor: name(), dim, rank });
        };
        let len = *slot;
        if range.start > range.end || range.end > len {
            return Err(SliceError::OutOfRange { tensor: name(), dim, range, len });
        }
        *slot = range.len();
        let runs = byte_runs(tensor.dtype(), tensor.shape(), dim, &range).map_err(|bit| {
            let (dtype, range) = (tensor.dtype(), range.clone());
            SliceError::PartialByte { tensor: name(), dtype, dim, range, bit }
        })?;
        Ok(Slice { tensor: tensor.clone(), dim, range, shape, runs })
    }

    /// The tensor that this is a part of.
    #[must_use]
    pub fn tensor(&self) -> &TensorInfo {
        &self.tensor
    }

    /// The dimension that is cut, counted from 0.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The elements of that dimension.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Dimensions of the slice: the tensor's, but for the one that is cut.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes of the slice.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.runs.byte_len()
    }

    /// Where in the tensor the slice's bytes are.
    #[must_use]
    pub fn runs(&self) -> Runs {
        self.runs
    }
}

impl TensorInfo {
    /// The elements `range` of dimension `dim`: [`Slice::new`].
    ///
    /// # Errors
    ///
    /// As [`Slice::new`].
    pub fn slice(&self, dim: usize, range: Range<usize>) -> Result<Slice, SliceError> {
        Slice::new(self, dim, range)
    }
}

/// The runs of `range` of `shape[dim]`, or the first bit cut that is not on a byte. The tensor's
/// size in bits fits `u64` and `range` is inside its dimension.
fn byte_runs(dtype: Dtype, shape: &[usize], dim: usize, range: &Range<usize>) -> Result<Runs, u64> {
    if range.is_empty() || shape.contains(&0) {
        return Ok(Runs::default());
    }
    // With no dimension empty, each product below divides the tensor's size: none overflows.
    let product = |dims: &[usize]| dims.iter().map(|&dim| dim as u64).product::<u64>();
    let outer = product(&shape[..dim]);
    let step = product(&shape[dim + 1..]) * u64::from(dtype.bits());
    let row = shape[dim] as u64 * step;
    let len = range.len() as u64 * step;
    let runs = if len == row {
        // Every row ends where the next begins.
        Runs { first: 0, len: outer * row, stride: outer * row, count: 1 }
    } else {
        let stride = if outer == 1 { len } else { row };
        Runs { first: range.start as u64 * step, len, stride, count: outer }
    };
    // The first cuts are at the start and end of the first run, then at the start of the second.
    let cuts = [runs.first, runs.first + runs.len, runs.first + runs.stride];
    if let Some(&bit) = cuts.iter().find(|&&bit| bit % 8 != 0) {
        return Err(bit);
    }
    let Runs { first, len, stride, count } = runs;
    Ok(Runs { first: first / 8, len: len / 8, stride: stride / 8, count })
}

impl Runs {
    /// Bytes of all runs together.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.len * self.count
    }

    /// The runs as byte ranges from the start of the tensor, in order.
    #[must_use]
    pub fn iter(&self) -> RunsIter {
        RunsIter { runs: *self, next: 0 }
    }
}

impl IntoIterator for Runs {
    type Item = Range<u64>;
    type IntoIter = RunsIter;

    fn into_iter(self) -> RunsIter {
        self.iter()
    }
}

impl IntoIterator for &Runs {
    type Item = Range<u64>;
    type IntoIter = RunsIter;

    fn into_iter(self) -> RunsIter {
        self.iter()
    }
}

/// The byte ranges of [`Runs`].
#[derive(Clone, Debug)]
pub struct RunsIter {
    runs: Runs,
    next: u64,
}

impl Iterator for RunsIter {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        if self.next >= self.runs.count {
            return None;
        }
        let start = self.runs.first + self.next * self.runs.stride;
        self.next += 1;
        Some(start..start + self.runs.len)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = usize::try_from(self.runs.count - self.next);
        (left.unwrap_or(usize::MAX), left.ok())
    }
}

impl ExactSizeIterator for RunsIter {}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(dtype: Dtype, shape: &[usize], dim: usize, range: Range<usize>) -> Result<Runs, u64> {
        byte_runs(dtype, shape, dim, &range)
    }

    #[test]
    fn contiguous_slices_are_one_run() {
        let one = |first, len| Ok(Runs { first, len, stride: len, count: 1 });
        assert_eq!(runs(Dtype::F32, &[4, 5], 0, 1..3), one(20, 40));
        assert_eq!(runs(Dtype::F32, &[4, 5], 1, 0..5), one(0, 80));
        assert_eq!(runs(Dtype::F32, &[1, 1, 5, 2], 2, 1..3), one(8, 16));
        assert_eq!(runs(Dtype::F32, &[7], 0, 6..7), one(24, 4));
    }

    #[test]
    fn inner_slices_are_strided() {
        let expected = Runs { first: 2, len: 4, stride: 10, count: 4 };
        assert_eq!(runs(Dtype::BF16, &[2, 2, 5], 2, 1..3), Ok(expected));
        let ranges: Vec<_> = expected.iter().collect();
        assert_eq!(ranges, [2..6, 12..16, 22..26, 32..36]);
        assert_eq!(expected.iter().len(), 4);
    }

    #[test]
    fn empty_slices_have_no_runs_and_overflow_nothing() {
        let huge = usize::MAX;
        for (shape, dim, range) in
            [(&[3, 4][..], 0, 2..2), (&[3, 0], 0, 0..3), (&[0, huge, huge], 1, 1..huge)]
        {
            let runs = runs(Dtype::F64, shape, dim, range).unwrap();
            assert_eq!((runs.count, runs.byte_len(), runs.iter().count()), (0, 0, 0));
        }
        // An odd cut of nothing cuts nothing.
        assert_eq!(runs(Dtype::F4, &[4], 0, 1..1), Ok(Runs::default()));
    }

    #[test]
    fn packed_elements_are_cut_on_bytes_only() {
        let two = Runs { first: 1, len: 1, stride: 2, count: 3 };
        assert_eq!(runs(Dtype::F4, &[3, 4], 1, 2..4), Ok(two));
        assert_eq!(runs(Dtype::F4, &[3, 4], 1, 1..3), Err(4));
        assert_eq!(runs(Dtype::F4, &[3, 4], 1, 0..1), Err(4));
        assert_eq!(runs(Dtype::F6E2M3, &[8], 0, 4..8).unwrap().first, 3);
        assert_eq!(runs(Dtype::F6E2M3, &[8], 0, 2..6), Err(12));
        // The first row is cut on bytes, the second is not.
        assert_eq!(runs(Dtype::F4, &[2, 3], 1, 0..2), Err(12));
        // Rows that end inside bytes are no cuts where all of them are taken.
        assert_eq!(runs(Dtype::F4, &[2, 3], 1, 0..3).unwrap().len, 3);
    }
}
