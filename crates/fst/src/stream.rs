//! Tensors as they land, within a memory budget.

use std::fmt;
use std::sync::Arc;

use fst_format::{Checkpoint, Planned};

use crate::error::{Error, Result};
use crate::load::Goals;
use crate::loader::Loader;
use crate::loading::{Loading, default_budget};
use crate::report::LoadReport;
use crate::tensor::Tensor;

/// Yields tensors as they land; see [`Loader::stream`]. Dropping it ends the load.
pub struct TensorStream {
    loading: Loading,
    remaining: usize,
    /// Whether an error or the end was told.
    over: bool,
}

impl fmt::Debug for TensorStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorStream").field("remaining", &self.remaining).finish_non_exhaustive()
    }
}

impl TensorStream {
    /// Starts to load `items`.
    pub(crate) fn start(
        loader: &Loader,
        checkpoint: &Checkpoint,
        items: Vec<Planned>,
    ) -> Result<Self> {
        let goals = Goals::new(loader, &items)?;
        let budget = loader.budget.unwrap_or_else(|| default_budget(&goals.devices));
        Loading::of_items(loader, checkpoint, items, &goals, Some(budget), false).map(Self::of)
    }

    pub(crate) fn of(loading: Loading) -> Self {
        Self { remaining: loading.remaining(), loading, over: false }
    }

    /// Tensors that are still to come.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// Bytes of all its tensors, those that are out and those to come.
    pub fn byte_len(&self) -> u64 {
        self.loading.byte_len()
    }

    /// The most bytes of tensor memory that were in use at once, so far. What dropped tensors left for
    /// the next ones is not in use.
    pub fn peak_bytes(&self) -> u64 {
        self.loading.peak_bytes()
    }

    /// What the load did: `None` until the stream has ended well, which is when
    /// [`next`](Iterator::next) has returned `None` after the last tensor.
    pub fn report(&self) -> Option<LoadReport> {
        self.loading.report()
    }
}

impl Iterator for TensorStream {
    type Item = Result<Tensor>;

    /// The next tensor, or the error that ended the load. After [`Error::Stalled`] the stream goes
    /// on where it was; after any other error it is over. That files did not change meanwhile is
    /// known only behind the last tensor: an error can follow it.
    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let next = self.loading.next();
        match &next {
            Some(Ok(_)) => self.remaining -= 1,
            Some(Err(Error::Stalled { .. })) => {}
            Some(Err(_)) | None => (self.over, self.remaining) = (true, 0),
        }
        Some(next?.map_err(|error| {
            if let Error::Stalled { .. } = error {
                return error;
            }
            self.loading.close();
            // The only handle of its load needs no share of the error.
            self.loading.forget_error();
            match error {
                Error::Failed(error) => Arc::try_unwrap(error).unwrap_or_else(Error::Failed),
                error => error,
            }
        }))
    }
}
