//! Host memory that stays with the process when its buffers are gone, for those of the next loads.
//!
//! It is anonymous memory that this process filled itself. A buffer made of it holds what was left there, so
//! that only who overwrites all of a range may hand that out.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::reuse::{Region, Reuse};
use crate::sys::Anonymous;

static KEPT: Mutex<Reuse> = Mutex::new(Reuse::new());

fn kept() -> MutexGuard<'static, Reuse> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of host memory that nobody uses and that the process keeps, at most.
pub fn kept_bytes() -> u64 {
    kept().idle()
}

/// Gives the host memory that the process keeps back to the system; says how many bytes it was.
pub fn release_kept() -> u64 {
    release(u64::MAX)
}

/// Gives about `bytes` of it back, as far as there are so many.
pub(crate) fn release(bytes: u64) -> u64 {
    if bytes == 0 {
        return 0;
    }
    let mut kept = kept();
    let before = kept.idle();
    kept.trim(before.saturating_sub(bytes));
    before - kept.idle().min(before)
}

/// Memory for a buffer of `len` bytes (whole pages), and how many from its start are backed. Where none
/// suits, as much goes back to the system as a new mapping takes: both together grow no further.
pub(crate) fn take(len: usize) -> Option<(Arc<Anonymous>, usize)> {
    let mut kept = kept();
    let found = kept.take(len);
    if found.is_none() {
        let most = kept.idle().saturating_sub(len as u64);
        kept.trim(most);
    }
    found
}

/// As [`take`], but the memory is not followed here any more.
pub(crate) fn take_out(len: usize) -> Option<(Region, usize)> {
    kept().take_out(len)
}

/// Follows mappings from here on, and keeps at most `most` bytes of all that nobody uses.
pub(crate) fn follow(regions: Vec<Region>, most: u64) {
    let mut kept = kept();
    kept.follow(regions);
    kept.trim(most);
}

/// Follows a mapping of which a buffer has `len` bytes.
pub(crate) fn add(map: &Arc<Anonymous>, len: usize) {
    kept().add(map.clone(), len);
}

/// Takes whole pages of a buffer's mapping back, to keep at most `most` bytes; `false` if it is not followed.
///
/// # Safety
///
/// Nobody reads or writes these bytes any more.
pub(crate) unsafe fn retire(map: &Arc<Anonymous>, pages: Range<usize>, most: u64) -> bool {
    let mut kept = kept();
    // SAFETY: passed on from the caller.
    let followed = unsafe { kept.retire(map, pages) };
    kept.trim(most);
    followed
}

/// The buffer of a mapping is gone; at most `most` bytes stay.
pub(crate) fn leave(map: &Arc<Anonymous>, filled: bool, most: u64) {
    let mut kept = kept();
    kept.leave(map, filled);
    kept.trim(most);
}
