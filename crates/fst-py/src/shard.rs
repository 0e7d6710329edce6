//! What each rank keeps of a tensor.

use std::ops::Range;

use fst::{Remainder, Split};
use pyo3::prelude::*;

use crate::errors;

/// What each rank of a group keeps of a tensor. Dimensions and sizes are those of the file's shape.
#[pyclass(frozen, module = "fst")]
pub(crate) struct Shard {
    pub(crate) shard: fst::Shard,
    /// The name of the tensor that this is part of, with others.
    #[pyo3(get)]
    fused_into: Option<String>,
}

impl Shard {
    fn of(shard: fst::Shard) -> Self {
        Self { shard, fused_into: None }
    }
}

#[pymethods]
impl Shard {
    /// Every rank keeps all of it.
    #[staticmethod]
    fn replicate() -> Self {
        Self::of(fst::Shard::replicate())
    }

    /// No rank keeps it, and it is not read.
    #[staticmethod]
    fn skip() -> Self {
        Self::of(fst::Shard::skip())
    }

    /// These ranks keep all of it, the others nothing.
    #[staticmethod]
    #[pyo3(signature = (*ranks))]
    fn keep_on(ranks: Vec<u32>) -> Self {
        Self::of(fst::Shard::keep_on_ranks(ranks))
    }

    /// Each rank keeps its part of a dimension. `remainder` says what becomes of one that the ranks do not divide:
    /// "ceil" (blocks of the size rounded up), "chunk" (as torch.chunk), "balanced" (as torch.tensor_split) or
    /// "exact" (an error). `unit` elements stay together; heads of `head_dim` too, and ranks share them where there
    /// are fewer. A tensor of several `sections` is divided one by one. With `fused_into`, the parts of all tensors
    /// that name the same output are one tensor of this name, in the order of `position`.
    #[staticmethod]
    #[pyo3(signature = (
        dim, *, remainder="ceil", unit=None, head_dim=None, sections=None, fused_into=None, position=0
    ))]
    #[expect(clippy::too_many_arguments)]
    fn split(
        py: Python<'_>,
        dim: usize,
        remainder: &str,
        unit: Option<u64>,
        head_dim: Option<u64>,
        sections: Option<Sections>,
        fused_into: Option<String>,
        position: u32,
    ) -> PyResult<Self> {
        let mut split = Split::along(dim).remainder(match remainder {
            "ceil" => Remainder::CeilDiv,
            "chunk" => Remainder::Chunk,
            "balanced" => Remainder::Balanced,
            "exact" => Remainder::Exact,
            _ => return Err(errors::invalid(py, &format!("unknown remainder {remainder:?}"))),
        });
        split = match (unit, head_dim) {
            (None, None) => split,
            (Some(unit), None) => split.unit(unit),
            (None, Some(head_dim)) => split.heads(head_dim),
            (Some(_), Some(_)) => return Err(errors::invalid(py, "either unit or head_dim")),
        };
        split = match sections {
            None => split,
            Some(Sections::Equal(number)) => split.sections(number),
            Some(Sections::Sizes(sizes)) => split.section_sizes(sizes),
        };
        if let Some(output) = &fused_into {
            split = split.fused_into(&**output, position);
        }
        Ok(Self { shard: split.into(), fused_into })
    }

    /// Rows of a vocabulary: their number is rounded up to a multiple and to the number of ranks, and rows beyond
    /// the vocabulary are zero.
    #[staticmethod]
    #[pyo3(signature = (multiple=64))]
    fn vocab_rows(multiple: u64) -> Self {
        Self::of(fst::Shard::vocab_rows(multiple))
    }

    /// Each rank keeps its ranges `(start, end)` of a dimension, one after the other: a list of them for each rank.
    #[staticmethod]
    fn ranges(dim: usize, per_rank: Vec<Vec<(u64, u64)>>) -> Self {
        let own = |ranges: Vec<(u64, u64)>| -> Vec<Range<u64>> {
            ranges.into_iter().map(|(start, end)| start..end).collect()
        };
        let per_rank: Vec<Vec<Range<u64>>> = per_rank.into_iter().map(own).collect();
        Self::of(fst::Shard::ranges(dim, per_rank))
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.shard)
    }
}

/// A number of equal sections, or their sizes.
#[derive(FromPyObject)]
enum Sections {
    Equal(u64),
    Sizes(Vec<u64>),
}
