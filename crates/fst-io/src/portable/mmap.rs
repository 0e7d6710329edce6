//! No copies out of a mapping: only Linux has a call that copies from one whose file may shrink.

use super::job::Job;
use crate::stats::WorkerStats;

/// Why this engine cannot run here.
pub(super) fn refusal() -> Option<String> {
    Some("a mapping can be copied from safely on Linux only, and this build is portable".to_owned())
}

/// Reads nothing: no read resolves to this engine.
pub(super) fn work(_: &Job<'_>, _: usize) -> WorkerStats {
    WorkerStats::default()
}
