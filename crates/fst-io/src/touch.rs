//! Which pages fresh memory should have: huge ones, or the small ones that the system gives by default.
//!
//! Huge pages are touched first several times as fast as small ones, except on virtual machines whose
//! hypervisor takes free memory back (a balloon, a microVM): there a huge page is many pages of the host's
//! that must be found, and comes slower than as many small pages do as long as the guest has some of those
//! left. Measured on one such machine after a pause: 0.7 GB/s in huge pages, 2.7 in small ones; backed
//! memory, 15 and 4. What is left of either changes from one moment to the next: so the first pages of each
//! 32 MiB of a large buffer are timed, and decide on the rest of it.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Instant;

use crate::sys::Anonymous;

/// Bytes that have one kind of pages.
pub(crate) const REGION: usize = 32 << 20;

/// How much is touched to tell a rate.
const SAMPLE: usize = 2 << 20;

/// Bytes per second of one thread in huge pages at which there is nothing to gain by small ones.
const FAST: f64 = 1.5e9;

/// Bytes per second that no memory is touched first at.
const TOUCHED: f64 = 60e9;

/// How much faster small pages must be.
const WORTH: f64 = 1.25;

/// After how many regions of small pages huge ones are tried again.
const RETRY: u32 = 8;

/// Rates at which one thread touched fresh memory, when that was looked at last.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct FirstTouch {
    /// Bytes per second in huge pages.
    pub huge: f64,
    /// Bytes per second in small pages, where they were tried.
    pub small: Option<f64>,
    /// Whether small pages are taken.
    pub takes_small: bool,
}

/// What was found last, in this process.
static LAST: Mutex<Option<FirstTouch>> = Mutex::new(None);

/// Regions since the last look at huge pages.
static REGIONS: AtomicU32 = AtomicU32::new(0);

/// What the last look at fresh memory found; `None` if no buffer was large enough for one.
pub fn last() -> Option<FirstTouch> {
    *LAST.lock().unwrap_or_else(|e| e.into_inner())
}

/// Chooses the pages of a region of a mapping that nobody has touched, which touches some of it. Whether some
/// are small.
pub(crate) fn choose(map: &Anonymous, region: Range<usize>) -> bool {
    let advise = |from: usize, small: bool| {
        let advice = if small { libc::MADV_NOHUGEPAGE } else { libc::MADV_HUGEPAGE };
        map.advise(from, region.end - from, advice).is_ok()
    };
    let rate = |from: usize| rate(map, from);
    let before = last().unwrap_or_default();
    // What is short is as what came last.
    if region.len() < REGION {
        return before.takes_small && advise(region.start, true);
    }
    let again = REGIONS.fetch_add(1, Relaxed) % RETRY == RETRY - 1;
    if before.takes_small && !again {
        return advise(region.start, true);
    }
    // Whatever else goes on makes a rate lower, never higher.
    let Some(mut huge) = rate(region.start) else { return false };
    if huge < FAST {
        let Some(second) = rate(region.start + SAMPLE) else { return false };
        huge = huge.max(second);
    }
    let mut found = FirstTouch { huge, small: None, takes_small: false };
    let rest = region.start + 2 * SAMPLE;
    if huge < FAST && advise(rest, true) {
        let Some(small) = rate(rest) else { return true };
        (found.small, found.takes_small) = (Some(small), small > WORTH * huge);
        if !found.takes_small {
            advise(rest + SAMPLE, false);
        }
    }
    REGIONS.store(0, Relaxed);
    *LAST.lock().unwrap_or_else(|e| e.into_inner()) = Some(found);
    found.small.is_some()
}

/// Bytes per second at which a sample from here on is touched first; `None` where the system cannot
/// touch memory ahead, or that was done.
fn rate(map: &Anonymous, from: usize) -> Option<f64> {
    let began = Instant::now();
    map.advise(from, SAMPLE, libc::MADV_POPULATE_WRITE).ok()?;
    let rate = SAMPLE as f64 / began.elapsed().as_secs_f64().max(1e-9);
    // Nobody writes as fast: another thread has touched these already.
    (rate < TOUCHED).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostBuffer;

    #[test]
    fn memory_is_zero_and_writable_whatever_was_chosen() {
        let len = 2 * REGION + 5;
        let buffer = HostBuffer::new(len).unwrap();
        buffer.prepare(10, REGION);
        buffer.prepare(REGION + 9, 1 << 20);
        buffer.prepare(2 * REGION, 5);
        buffer.prepare(len + REGION, REGION);
        // SAFETY: nobody else has the buffer.
        let bytes = unsafe { buffer.slice_mut(0..len) }.unwrap();
        assert!(bytes.iter().step_by(1000).all(|byte| *byte == 0));
        bytes.fill(3);
        assert!(bytes.iter().step_by(1000).all(|byte| *byte == 3));
        // Where the kernel can touch memory ahead (Linux 5.14), there are rates now.
        if let Some(found) = last() {
            assert!(found.huge > 0.0 && (found.small.is_some() || found.huge >= FAST), "{found:?}");
        }
    }
}
