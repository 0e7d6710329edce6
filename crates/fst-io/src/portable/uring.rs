//! No io_uring: it is Linux's.

use super::job::Job;
use crate::stats::WorkerStats;

/// Why io_uring cannot be used here.
pub fn uring_refusal() -> Option<String> {
    Some("io_uring is Linux's, and this build is portable".to_owned())
}

/// Reads nothing: no read resolves to this engine.
pub(super) fn work(_: &Job<'_>, _: usize) -> WorkerStats {
    WorkerStats::default()
}
