//! Watching a load, and ending it early.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

/// How far a load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes that have been read.
    pub bytes_done: u64,
    /// Bytes to read in all.
    pub bytes_total: u64,
    /// Tensors to load in all.
    pub tensors_total: usize,
    /// Since the load began.
    pub elapsed: Duration,
}

/// Ends loads from outside: from another thread, or from a signal handler (cancelling is one atomic
/// store). Clones are one token.
///
/// A load that was given the token by [`Loader::cancel`](crate::Loader::cancel) starts no more
/// reads, waits for those in flight, frees its memory and returns
/// [`Error::Cancelled`](crate::Error::Cancelled); other ranks of its group end with an error that
/// names it. A used token stays used: loads that get it later end at once. A stream looks
/// at its token when it is asked for a tensor; what it reads between two calls stays within its
/// budget. Tensors that were handed out before are not affected.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that has not been used.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the loads that were given this token, now and later. Returns at once.
    pub fn cancel(&self) {
        self.0.store(true, Relaxed);
    }

    /// Whether the token was used.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Relaxed)
    }

    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }
}
