//! What is wanted of one tensor.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use crate::{Cut, Dtype};

/// What is wanted of one tensor; see [`Selection::request`](crate::Selection::request). What it does not say is
/// as the selection says.
///
/// ```
/// use fst_format::{Dtype, Request};
///
/// let whole = Request::from("lm_head.weight");
/// let part = Request::new("embed_tokens.weight").slice(0, 0..1000).dtype(Dtype::F32).named("embed");
/// // Two heads of a fused projection, half of the columns each.
/// let heads = Request::new("qkv.weight").slice(0, 0..64).slice(0, 512..576).slice(1, 0..2048);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub(crate) tensor: String,
    pub(crate) name: Option<String>,
    pub(crate) dtype: Option<Dtype>,
    pub(crate) device: Option<Arc<str>>,
    pub(crate) cuts: Vec<Cut>,
}

impl Request {
    /// The tensor of this name in the checkpoint.
    pub fn new(tensor: impl Into<String>) -> Self {
        Self { tensor: tensor.into(), name: None, dtype: None, device: None, cuts: Vec::new() }
    }

    /// Calls the loaded tensor so.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Converts it to this type of element, if it is of a floating-point type.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Loads it to this device, by a name that whoever loads it knows (in the crate `fst`, a `Device` or what
    /// one is parsed from, such as `cuda:1`).
    #[must_use]
    pub fn device(mut self, device: impl fmt::Display) -> Self {
        self.device = Some(device.to_string().into());
        self
    }

    /// Loads only positions `range` of dimension `dim`. Several dimensions may be sliced; several ranges of one
    /// come one behind the other in the order of the calls, as `torch.cat` joins slices.
    #[must_use]
    pub fn slice(mut self, dim: usize, range: Range<usize>) -> Self {
        self.cuts.push((dim, range).into());
        self
    }

    /// As [`slice`](Self::slice), of the first position and every `step`-th behind it.
    #[must_use]
    pub fn slice_by(mut self, dim: usize, range: Range<usize>, step: NonZeroUsize) -> Self {
        self.cuts.push(Cut { dim, range, step });
        self
    }
}

impl<S: Into<String>> From<S> for Request {
    fn from(tensor: S) -> Self {
        Self::new(tensor)
    }
}
