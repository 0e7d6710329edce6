//! What tests of streams with short stall timeouts share.

use fst::{Error, Result, Tensor, TensorStream};

/// What comes next but for stalls, of which there are few: even where there is memory, a stream stalls
/// if its reader is slow to notice.
pub(crate) fn arrival(stream: &mut TensorStream) -> Option<Result<Tensor>> {
    stream.take(500).find(|next| !matches!(next, Err(Error::Stalled { .. })))
}
