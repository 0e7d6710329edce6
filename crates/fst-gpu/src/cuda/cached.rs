//! Cached files copied to the device by the copy engine itself: windows of a file are mapped and
//! registered, and what their blocks lead to is queued straight out of the page cache, with no
//! pass through staging memory.
//!
//! Nobody touches the mappings on this side. Registration pins their pages or is refused, and only runs
//! that are long enough to be left to the copy engine are taken from there (see [`short`]), so that a
//! file that is truncated meanwhile ends the load with an error and not the process with a signal.

mod short;

use crate::cuda::buffer::registered::{HostAccess, RegisteredHost};
use crate::cuda::pipeline::{CopyOp, Pipeline, shared};
use crate::cuda::sink::{Admit, Landing, Route};
use crate::error::Error;
use fst_io::plan::Block;
use fst_io::{Control, Error as ReadError, SourceFile};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// How to copy out of registered mappings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachedOptions {
    /// Threads that map and register: both cost time for every page.
    pub threads: usize,
    /// Bytes of a window, which is registered at once.
    pub window: u64,
    /// Bytes of all windows that are registered at once (at least one is).
    pub in_flight: u64,
}

impl Default for CachedOptions {
    /// As many threads as there are cores, up to 4; windows of 16 MiB, 256 MiB of them at once.
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads: cores.min(4), window: 16 << 20, in_flight: 256 << 20 }
    }
}

/// What was copied out of registered mappings.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct CachedStats {
    /// Bytes of files that were copied out of mappings, gaps between extents included.
    pub bytes: u64,
    /// Bytes of files in short runs, that were read into pinned memory and copied from there.
    pub short_bytes: u64,
    /// Windows that were registered.
    pub windows: u64,
    /// Threads.
    pub threads: usize,
    /// Numbers ([`Block::index`]) of the blocks that nothing was done with, in order.
    pub left: Vec<u32>,
    /// Why there are such, if registration was refused.
    pub refused: Option<Error>,
}

/// A share of what may be registered at once, given back when dropped.
struct Share {
    bytes: u64,
    registered: Arc<AtomicU64>,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.registered.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A mapping of a part of a file, for the copy engine alone.
struct Window {
    start: NonNull<u8>,
    len: usize,
    /// Given back when the window is no longer registered, which is when it is dropped.
    _share: Share,
}

// SAFETY: an address range that is unmapped once; nobody reads it through this value.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Maps bytes `range` of a file; the start lies on a page.
    fn new(file: &SourceFile, range: Range<u64>, share: Share) -> io::Result<Self> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let file = file.buffered().ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: a new mapping, that is only read, and by the driver alone.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                range.start as libc::off_t,
            )
        };
        match NonNull::new(start.cast::<u8>()) {
            Some(at) if start != libc::MAP_FAILED => Ok(Self { start: at, len, _share: share }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unmapped once. A registration keeps this value.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

fn page_size() -> u64 {
    // SAFETY: asks for a constant of the system.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Parts a list of blocks into windows of at most `most` bytes (or of one block): runs of adjacent
/// blocks of a file.
fn windows(blocks: &[Block], most: u64) -> Vec<Range<usize>> {
    let mut windows: Vec<Range<usize>> = Vec::new();
    for (i, block) in blocks.iter().enumerate() {
        if let Some(window) = windows.last_mut() {
            let (first, last) = (&blocks[window.start], &blocks[window.end - 1]);
            let adjacent = last.file == block.file && last.offset + last.len == block.offset;
            if adjacent && block.offset + block.len - first.offset <= most {
                window.end = i + 1;
                continue;
            }
        }
        windows.push(i..i + 1);
    }
    windows
}

/// Shared by the threads of one run.
struct Job<'a> {
    pipeline: &'a Pipeline,
    files: &'a [SourceFile],
    blocks: &'a [Block],
    windows: Vec<Range<usize>>,
    route: Route<'a>,
    admit: Option<Admit<'a>>,
    options: CachedOptions,
    control: &'a Control,
    page: u64,
    next: AtomicUsize,
    /// Bytes that are registered now, or about to be.
    registered: Arc<AtomicU64>,
    bytes: AtomicU64,
    short_bytes: AtomicU64,
    count: AtomicU64,
    left: Mutex<Vec<u32>>,
    refused: OnceLock<Error>,
    failure: OnceLock<()>,
}

/// Copies `blocks` (in the order of the plan, of files that the page cache holds) to where `route`
/// says, and returns when the copies are done. The first refusal to register ends the run, without
/// an error: what is [left](CachedStats::left) then is for another way, though `route` may have been
/// asked about it.
///
/// Short runs are read into blocks of the pipeline's ring, each thread with one at a time.
///
/// # Errors
///
/// The consumer's and the device's as [`ReadError::Sink`], [`ReadError::Changed`],
/// [`ReadError::Cancelled`].
///
/// # Safety
///
/// What [`Pipeline::submit`] asks of destinations holds for all that `route` names.
pub unsafe fn copy_cached<'a>(
    pipeline: &'a Pipeline,
    files: &'a [SourceFile],
    blocks: &'a [Block],
    route: Route<'a>,
    admit: Option<Admit<'a>>,
    options: CachedOptions,
    control: &'a Control,
) -> Result<CachedStats, ReadError> {
    let windows = windows(blocks, options.window);
    let threads = options.threads.clamp(1, windows.len().max(1));
    let job = Job {
        pipeline,
        files,
        blocks,
        windows,
        route,
        admit,
        options,
        control,
        page: page_size(),
        next: AtomicUsize::new(0),
        registered: Arc::default(),
        bytes: AtomicU64::new(0),
        short_bytes: AtomicU64::new(0),
        count: AtomicU64::new(0),
        left: Mutex::default(),
        refused: OnceLock::new(),
        failure: OnceLock::new(),
    };
    let work = || {
        let result = job.work();
        if result.is_err() {
            let _ = job.failure.set(());
        }
        result
    };
    std::thread::scope(|scope| {
        let started: Vec<_> = (1..threads)
            .filter_map(|i| {
                let thread = std::thread::Builder::new().name(format!("fst-map-{i}"));
                // Fewer threads are slower and still right.
                thread.spawn_scoped(scope, work).ok()
            })
            .collect();
        let mut result = work();
        for thread in started {
            result = result.and(match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
        }
        result
    })?;
    pipeline.flush().map_err(sunk)?;
    let mut last = None;
    for block in blocks.iter().filter(|block| last.replace(block.file) != Some(block.file)) {
        files.get(block.file as usize).map_or(Ok(()), SourceFile::verify_unchanged)?;
    }
    let mut left = job.left.into_inner().unwrap_or_else(PoisonError::into_inner);
    left.sort_unstable();
    Ok(CachedStats {
        bytes: job.bytes.into_inner(),
        short_bytes: job.short_bytes.into_inner(),
        windows: job.count.into_inner(),
        threads,
        left,
        refused: job.refused.into_inner(),
    })
}

fn sunk(error: Error) -> ReadError {
    ReadError::Sink(Box::new(error))
}

impl Job<'_> {
    fn work(&self) -> Result<(), ReadError> {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(window) = self.windows.get(index) else { return Ok(()) };
            if self.failure.get().is_some() {
                return Ok(());
            }
            if self.control.is_cancelled() {
                return Err(ReadError::Cancelled);
            }
            let blocks = &self.blocks[window.clone()];
            if self.refused.get().is_some() || !self.copy(blocks)? {
                let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
                left.extend(blocks.iter().map(|block| block.index));
            }
        }
    }

    /// Queues the copies of a window; `false` when its blocks are for another way.
    fn copy(&self, blocks: &[Block]) -> Result<bool, ReadError> {
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else { return Ok(true) };
        let Some(file) = self.files.get(first.file as usize) else { return Ok(false) };
        for block in blocks {
            if let Some(admit) = self.admit
                && !admit(block, false).map_err(ReadError::Sink)?
            {
                return Ok(false);
            }
        }
        let start = first.offset / self.page * self.page;
        let bytes = last.need_end() - start;
        // Before, since pages behind the end cannot be pinned; after, since pages that were cut off
        // in between may have been.
        file.verify_unchanged()?;
        let (mut ops, mut dones) = (Vec::new(), Vec::new());
        for block in blocks {
            let landing = (self.route)(block).map_err(ReadError::Sink)?;
            let Landing { ops: of_block, done, .. } = landing;
            ops.extend(of_block.into_iter().map(|op| op.shifted(block.offset - start)));
            dones.extend(done);
        }
        // What no block of the ring holds (nobody asks for such) is for another way.
        let Ok((ops, clusters)) = short::part(&ops, self.pipeline.block_bytes() as u64) else {
            return Ok(false);
        };
        let mapping = match ops.is_empty() {
            true => None,
            false => {
                let Some(share) = self.share(bytes)? else { return Ok(false) };
                match self.register(file, start..last.need_end(), share) {
                    Ok(mapping) => Some(mapping),
                    Err(error) => {
                        let _ = self.refused.set(error);
                        return Ok(false);
                    }
                }
            }
        };
        file.verify_unchanged()?;
        let short = clusters.iter().map(|cluster| cluster.len).sum();
        let mut dones = shared(dones, usize::from(mapping.is_some()) + clusters.len());
        if let Some(mapping) = &mapping {
            // SAFETY: the contract of `copy_cached`.
            unsafe { self.pipeline.submit_registered(mapping, &ops, dones.pop()) }.map_err(sunk)?;
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        for cluster in clusters {
            let mut block = self.pipeline.acquire().map_err(sunk)?;
            let into = block.as_mut_slice().get_mut(..cluster.len as usize).unwrap_or_default();
            file.read_exact_at(into, start + cluster.start)?;
            // SAFETY: as above.
            unsafe { self.pipeline.submit_then(block, &cluster.ops, dones.pop()) }.map_err(sunk)?;
        }
        let needed: u64 = blocks.iter().map(|block| block.need).sum();
        let short = if mapping.is_some() { needed.min(short) } else { needed };
        self.control.add_landed(needed);
        self.bytes.fetch_add(needed - short, Ordering::Relaxed);
        self.short_bytes.fetch_add(short, Ordering::Relaxed);
        Ok(true)
    }

    /// Waits until `bytes` more may be registered; `None` if another thread has failed.
    fn share(&self, bytes: u64) -> Result<Option<Share>, ReadError> {
        loop {
            let before = self.registered.fetch_add(bytes, Ordering::Relaxed);
            let share = Share { bytes, registered: Arc::clone(&self.registered) };
            if before == 0 || before + bytes <= self.options.in_flight {
                return Ok(Some(share));
            }
            drop(share);
            if self.failure.get().is_some() {
                return Ok(None);
            }
            if !self.pipeline.wait().map_err(sunk)? {
                // Others are about to submit, or to unregister.
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    fn register(
        &self,
        file: &SourceFile,
        range: Range<u64>,
        share: Share,
    ) -> Result<Arc<RegisteredHost>, Error> {
        let window = Window::new(file, range, share)
            .map_err(|e| Error::System { call: "mmap", reason: e.to_string() })?;
        let (start, len) = (window.start, window.len);
        let (device, access) = (self.pipeline.device(), HostAccess::ReadOnly);
        // SAFETY: the window is mapped as long as the registration keeps it; pages that are not
        // there any more when they are to be pinned make the driver refuse.
        unsafe { RegisteredHost::new(device, start, len, access, Arc::new(window)) }
    }
}

impl CopyOp {
    /// The same operation for a source that starts `by` bytes later.
    #[must_use]
    pub(crate) fn earlier(self, by: u64) -> Self {
        self.with_source(|source| source.saturating_sub(by))
    }

    /// The same operation for a source that starts `by` bytes earlier.
    #[must_use]
    pub fn shifted(self, by: u64) -> Self {
        self.with_source(|source| source.saturating_add(by))
    }

    fn with_source(mut self, place: impl Fn(u64) -> u64) -> Self {
        let source = match &mut self {
            Self::Linear { source, .. } | Self::Strided { source, .. } => source,
            Self::Transform { job, .. } => &mut job.src,
        };
        *source = place(*source);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_runs_of_adjacent_blocks() {
        let block = |index, file, offset, len| Block {
            index,
            file,
            segment: 0,
            offset,
            len,
            need: len,
            extents: 0..1,
        };
        let blocks = [
            block(0, 0, 0, 10),
            block(1, 0, 10, 10),
            block(2, 0, 20, 10),
            block(4, 0, 40, 10),
            block(5, 1, 50, 100),
            block(6, 1, 150, 1),
        ];
        assert_eq!(windows(&blocks, 25), [0..2, 2..3, 3..4, 4..5, 5..6]);
        assert_eq!(windows(&blocks, 1000), [0..3, 3..4, 4..6]);
        assert!(windows(&[], 5).is_empty());
    }
}
