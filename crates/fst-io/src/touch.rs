//! Which pages fresh memory should have: huge ones, or the small ones that the system gives by default.
//!
//! Huge pages are touched first several times as fast as small ones, except on virtual machines whose
//! hypervisor takes free memory back (a balloon, a microVM): there a huge page is many pages of the host's
//! that must be found, and comes slower than as many small pages do as long as the guest has some of those
//! left. Measured on one such machine after a pause: 0.7 GB/s in huge pages, 2.7 in small ones; backed
//! memory, 15 and 4. On another, with most of its memory full of cached files and other programs at work, loads of 1.3 GB
//! took 1.4 to 3.5 s, and 0.9 to 1.4 with huge pages off for the process; whether by the hypervisor or by the system's making
//! room for huge pages was not told apart. What is left of either changes from one moment to the next: so the first pages of each
//! 32 MiB of a large buffer are timed, and decide on the rest of it.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed};

use crate::buffer::HUGE_PAGE;
use crate::sys::{self, Anonymous};

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
    /// Whether small pages are taken, as these come faster.
    pub takes_small: bool,
    /// Whether small pages are taken as the system has few huge ones left: what it caches of files, or how that
    /// lies in memory, would have to be moved first.
    pub scarce: bool,
}

/// The shortest piece of memory that is looked at: its samples are a part of it.
const SHORTEST: usize = 4 * SAMPLE;

/// What was found last, in this process.
static LAST: Mutex<Option<FirstTouch>> = Mutex::new(None);

/// Regions since the last look at huge pages.
static REGIONS: AtomicU32 = AtomicU32::new(0);

/// Bytes of others' memory since it was looked at.
static SINCE: AtomicUsize = AtomicUsize::new(REGION);

/// What the last look at fresh memory found; `None` if no buffer was large enough for one.
pub fn last() -> Option<FirstTouch> {
    *LAST.lock().unwrap_or_else(|e| e.into_inner())
}

/// A caller's memory that nobody has touched. What an allocator gives is in small pages unless huge ones are asked
/// for.
#[derive(Debug)]
pub struct Untouched {
    /// The first huge page wholly inside.
    start: NonNull<u8>,
    /// For each part of [`REGION`] bytes, whether its pages have been chosen.
    chosen: Box<[AtomicBool]>,
    len: usize,
}

// SAFETY: the address is used by `prepare` only, whose callers vouch for the memory on any thread.
unsafe impl Send for Untouched {}
// SAFETY: as for `Send`; what is shared is atomic.
unsafe impl Sync for Untouched {}

impl Untouched {
    /// The memory, if it is large enough for huge pages and untouched, as far as one look at it tells.
    pub fn new(memory: &mut [MaybeUninit<u8>]) -> Option<Self> {
        let start = memory.as_mut_ptr().align_offset(HUGE_PAGE).min(memory.len());
        let len = (memory.len() - start) / HUGE_PAGE * HUGE_PAGE;
        let start = NonNull::from(memory.get_mut(start..start + len)?).cast::<u8>();
        // SAFETY: a page of the memory, which is mapped.
        let untouched =
            len > 0 && unsafe { sys::is_resident(start.as_ptr().add(len / 2)) } == Some(false);
        let chosen = (0..len.div_ceil(REGION)).map(|_| AtomicBool::new(false)).collect();
        untouched.then_some(Self { start, chosen, len })
    }

    /// Chooses the pages of the parts that have bytes in `ptr..ptr + len`, before they are written to. Best
    /// effort; what the memory holds stays.
    ///
    /// # Safety
    ///
    /// The memory given to [`new`](Self::new) is still mapped.
    pub unsafe fn prepare(&self, ptr: NonNull<u8>, len: usize) {
        let offset = (ptr.as_ptr() as usize).saturating_sub(self.start.as_ptr() as usize);
        let last = (ptr.as_ptr() as usize + len).saturating_sub(self.start.as_ptr() as usize);
        for index in offset / REGION..last.div_ceil(REGION).min(self.chosen.len()) {
            if !self.chosen[index].load(Relaxed) && !self.chosen[index].swap(true, Relaxed) {
                let region = index * REGION..self.len.min((index + 1) * REGION);
                // SAFETY: whole pages of the memory, which is mapped. None of the advice that is given here
                // changes what they hold.
                let advise = |from: usize, len: usize, advice| unsafe {
                    sys::advise(self.start.as_ptr().add(from), len, advice)
                };
                if advise(region.start, region.len(), sys::MADV_HUGEPAGE).is_ok() {
                    // Many short pieces are as one long one.
                    let since = SINCE.fetch_add(region.len(), Relaxed) + region.len();
                    let look = since >= REGION && region.len() >= SHORTEST;
                    if look {
                        SINCE.store(0, Relaxed);
                    }
                    choose_by(&advise, region, look);
                }
            }
        }
    }
}

/// Chooses the pages of a region of a mapping that nobody has touched, which touches some of it. Whether some
/// are small.
pub(crate) fn choose(map: &Anonymous, region: Range<usize>) -> bool {
    // What is short is as what came last.
    let look = region.len() >= REGION;
    choose_by(&|from, len, advice| map.advise(from, len, advice), region, look)
}

/// Gives the system advice on so many bytes from a place on.
type Advise<'a> = &'a dyn Fn(usize, usize, std::ffi::c_int) -> io::Result<()>;

/// Looks at a region first, or takes what came last.
fn choose_by(to: Advise<'_>, region: Range<usize>, look: bool) -> bool {
    let advise = |from: usize, small: bool| {
        let advice = if small { sys::MADV_NOHUGEPAGE } else { sys::MADV_HUGEPAGE };
        to(from, region.end - from, advice).is_ok()
    };
    let rate = |from: usize| rate(to, from);
    let before = last().unwrap_or_default();
    // One thread after the other would wait for the system to make room for each huge page.
    let free = fs::read_to_string("/proc/buddyinfo").ok().and_then(|text| free_huge_pages(&text));
    let scarce = free.is_some_and(|free| free < 2 * region.len() as u64);
    if scarce || before.scarce {
        *LAST.lock().unwrap_or_else(|e| e.into_inner()) = Some(FirstTouch { scarce, ..before });
    }
    if scarce {
        return advise(region.start, true);
    }
    if !look {
        return before.takes_small && advise(region.start, true);
    }
    let again = REGIONS.fetch_add(1, Relaxed) % RETRY == RETRY - 1;
    if before.takes_small && !again {
        return advise(region.start, true);
    }
    let Some(huge) = rate(region.start) else { return false };
    let mut found = FirstTouch { huge: mean(Some(before.huge), huge), ..before };
    let rest = region.start + SAMPLE;
    let mut small = false;
    if found.huge < FAST && advise(rest, true) {
        small = true;
        let Some(rate) = rate(rest) else { return true };
        let rate = mean(before.small, rate);
        (found.small, found.takes_small) = (Some(rate), rate > WORTH * found.huge);
        if !found.takes_small {
            advise(rest + SAMPLE, false);
        }
    } else {
        found.takes_small = false;
    }
    REGIONS.store(0, Relaxed);
    *LAST.lock().unwrap_or_else(|e| e.into_inner()) = Some(found);
    small
}

/// The rate at which as many bytes come at either of two rates: free memory is a mixture of what comes fast and
/// what comes slowly, and one look may meet either.
fn mean(before: Option<f64>, now: f64) -> f64 {
    match before.filter(|before| *before > 0.0) {
        Some(before) => 2.0 / (1.0 / before + 1.0 / now),
        None => now,
    }
}

/// Bytes of free memory in pieces of a huge page or more, as `/proc/buddyinfo` tells for each zone and power of
/// two of pages (`proc_buddyinfo(5)`).
fn free_huge_pages(buddyinfo: &str) -> Option<u64> {
    let page = sys::page_size() as u64;
    let of_zone = |line: &str| {
        let counts = line.split_once("zone")?.1.split_whitespace().skip(1);
        let bytes =
            counts.zip(0..).map(|(count, order)| Some((page << order, count.parse().ok()?)));
        let pieces = bytes.collect::<Option<Vec<(u64, u64)>>>()?;
        let huge = pieces.iter().filter(|(len, _)| *len >= HUGE_PAGE as u64);
        Some(huge.map(|(len, count)| len * count).sum::<u64>())
    };
    // Where nothing is told, nothing is known.
    let mut zones = buddyinfo.lines().map(of_zone).peekable();
    zones.peek().is_some().then(|| zones.sum()).flatten()
}

/// Bytes per second at which a sample from here on is touched first; `None` where the system cannot
/// touch memory ahead, or that was done.
fn rate(advise: Advise<'_>, from: usize) -> Option<f64> {
    // Of this thread alone: what else goes on is not the memory's.
    let began = sys::thread_time()?;
    advise(from, SAMPLE, sys::MADV_POPULATE_WRITE).ok()?;
    let took = sys::thread_time()?.saturating_sub(began);
    let rate = SAMPLE as f64 / took.as_secs_f64().max(1e-9);
    // Nobody writes as fast: another thread has touched these already.
    (rate < TOUCHED).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostBuffer;

    #[cfg(all(target_os = "linux", not(fst_portable)))] // Elsewhere nothing is known of memory.
    #[test]
    fn memory_of_a_caller_keeps_what_it_holds() {
        for len in [0, 5, HUGE_PAGE, 3 * HUGE_PAGE + 7, 2 * REGION + 5] {
            let mut bytes: Vec<u8> = (0..len).map(|index| (index / 1000) as u8).collect();
            let spare = len / 2 + REGION;
            bytes.reserve_exact(spare);
            let fresh = bytes.spare_capacity_mut();
            let untouched = Untouched::new(fresh).unwrap();
            let start = NonNull::from(fresh).cast::<u8>();
            for at in (0..spare).step_by(HUGE_PAGE) {
                // SAFETY: the vector is there.
                unsafe { untouched.prepare(start.add(at), HUGE_PAGE.min(spare - at)) };
            }
            // SAFETY: bytes are written, and only with what may be in memory that is initialised.
            let used = unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), len) };
            assert!(Untouched::new(used).is_none());
            bytes.resize(len + spare, 3);
            assert!(bytes[..len].iter().enumerate().all(|(i, byte)| *byte == (i / 1000) as u8));
            assert!(bytes[len..].iter().all(|byte| *byte == 3));
        }
    }

    #[test]
    fn free_huge_pages_are_those_of_all_zones() {
        let text = "Node 0, zone      DMA      0      0      0      0      0      0      0      0      0      1      2\n\
                    Node 1, zone   Normal  42253  24732  29350   7837   3684   1275    826    354    261     12      1\n";
        if sys::page_size() == 4096 {
            assert_eq!(free_huge_pages(text), Some((1 + 2 * 2 + 12 + 2) << 21));
        }
        assert_eq!(free_huge_pages(""), None);
        assert_eq!(free_huge_pages("Node 0, zone Normal x"), None);
        assert_eq!(free_huge_pages("something else"), None);
        let now = fs::read_to_string("/proc/buddyinfo").unwrap();
        assert!(free_huge_pages(&now).is_some(), "{now}");
    }

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
        if let Some(found) = last().filter(|found| !found.scarce) {
            assert!(found.huge > 0.0 && (found.small.is_some() || found.huge >= FAST), "{found:?}");
        }
    }
}
