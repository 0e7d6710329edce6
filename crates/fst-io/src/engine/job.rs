//! What the workers of one read share: the cursor over the blocks, the first error, and the rules
//! of when a block is complete.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use super::depth::Depth;
use crate::buffer::HUGE_PAGE;
use crate::engine::{CachePolicy, Control, Pick, ReadOptions};
use crate::error::Error;
use crate::file::SourceFile;
use crate::plan::{Block, ReadPlan};
use crate::sink::{Sink, SinkError, Target};
use crate::source::Unfilled;
use crate::stats::{Event, Stage, WorkerStats};
use crate::sys;

/// The way of one block.
#[derive(Debug, Clone, Copy)]
pub(super) enum Route<'a> {
    /// Around the page cache, by this handle.
    Direct(&'a File),
    /// Copied out of the page cache, which holds (nearly) all of it.
    Cached,
    /// Through the page cache, which must first be filled from storage.
    Buffered,
    /// From a source that is no local file.
    Remote,
}

/// Blocks that a worker has taken, and has no memory for yet.
#[derive(Debug, Default)]
pub(super) struct Hand<'a> {
    ordered: Option<&'a Block>,
    /// It had memory of the sink's, and lacks what comes back by itself.
    preferred: Option<&'a Block>,
}

#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) files: &'a [SourceFile],
    pub(super) depth: Depth,
    plan: &'a ReadPlan,
    sink: SinkRef<'a>,
    control: &'a Control,
    cache: CachePolicy,
    trace: bool,
    started: Instant,
    cursor: AtomicUsize,
    /// For each block, whether somebody reads it, or has.
    taken: Vec<AtomicBool>,
    stopped: AtomicBool,
    failure: Mutex<Option<Error>>,
    /// Set when the system refuses to fault memory in ahead of its use.
    no_populate: AtomicBool,
}

struct SinkRef<'a>(&'a dyn Sink);

impl std::fmt::Debug for SinkRef<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sink")
    }
}

/// The longest single direct read; a block is read by several, one after the other. With as many
/// of them in flight, a virtual disk read a sixth faster by 512 KiB than by 4 MiB: what is under
/// way then fits into the cache of the processor that copies it. No device needs longer ones, as
/// the kernel cuts them to what the device takes. In this crate's own tests blocks take several,
/// too.
pub(super) const REQUEST: u64 = if cfg!(test) { 20 << 10 } else { 512 << 10 };

/// How often a read that the system asks to repeat is repeated without progress.
const MAX_RETRIES: u32 = 1000;

impl<'a> Job<'a> {
    pub(super) fn new(
        files: &'a [SourceFile],
        plan: &'a ReadPlan,
        sink: &'a dyn Sink,
        options: &ReadOptions,
        control: &'a Control,
        started: Instant,
        depth: Depth,
    ) -> Result<Self, Error> {
        for segment in plan.segments() {
            let Some(file) = files.get(segment.file as usize) else {
                let message = format!("the plan reads file number {}", segment.file);
                return Err(Error::Setup {
                    what: "the read: there is no such source",
                    source: io::Error::other(message),
                });
            };
            // A part of a plan may have no block of a segment.
            let blocks = segment.blocks.start as usize..segment.blocks.end as usize;
            let Some(last) = plan.blocks().get(blocks).and_then(<[_]>::last) else { continue };
            let needed = last.need_end();
            if needed > file.len() {
                let path = file.path().to_owned();
                return Err(Error::EarlyEnd { path, end: file.len(), needed });
            }
        }
        Ok(Self {
            files,
            plan,
            sink: SinkRef(sink),
            control,
            cache: options.cache,
            trace: options.trace,
            started,
            depth,
            cursor: AtomicUsize::new(0),
            taken: plan.blocks().iter().map(|_| AtomicBool::new(false)).collect(),
            stopped: AtomicBool::new(false),
            failure: Mutex::new(None),
            no_populate: AtomicBool::new(false),
        })
    }

    /// The next block that nobody reads yet, with memory for it. `None` when there is no memory now, or the read
    /// is over; with `wait`, only when the read is over.
    ///
    /// Who waits for memory does so with the first block of the plan that nobody has, and leaves that in
    /// `hand` for blocks that are preferred and have memory. So a block of memory that is there never
    /// waits for one of memory that is not.
    pub(super) fn next(
        &self,
        hand: &mut Hand<'a>,
        wait: bool,
        stats: &mut WorkerStats,
    ) -> Option<(&'a Block, Target)> {
        let began = Instant::now();
        let next = loop {
            if self.is_stopped() {
                break None;
            }
            let preferred = hand.preferred.or_else(|| self.preferred());
            hand.preferred = preferred;
            let ordered =
                if preferred.is_none() { hand.ordered.or_else(|| self.ordered()) } else { None };
            let Some(block) = preferred.or(ordered) else { break None };
            if preferred.is_none() {
                hand.ordered = ordered;
            }
            match self.sink.0.reserve(block, wait) {
                Ok(Some(target)) => {
                    let taken =
                        if preferred.is_some() { &mut hand.preferred } else { &mut hand.ordered };
                    *taken = None;
                    break Some((block, target));
                }
                // Sinks wait for a short while at a time: the read may have ended meanwhile.
                Ok(None) if wait => {}
                Ok(None) => break None,
                Err(error) => {
                    self.refused(error);
                    break None;
                }
            }
        };
        stats.reserve += began.elapsed();
        next
    }

    fn take(&self, block: &Block) -> bool {
        self.taken.get(block.index as usize).is_some_and(|taken| !taken.swap(true, Relaxed))
    }

    /// The next block in the order of the plan.
    fn ordered(&self) -> Option<&'a Block> {
        loop {
            let block = self.plan.blocks().get(self.cursor.fetch_add(1, Relaxed))?;
            if self.take(block) {
                return Some(block);
            }
        }
    }

    /// The next block that is preferred and has memory.
    fn preferred(&self) -> Option<&'a Block> {
        let blocks = self.plan.blocks();
        self.control.pick(|extents| {
            // Blocks have the order of their extents.
            let from = blocks.partition_point(|block| block.extents.end <= extents.start);
            let wanted =
                blocks[from..].iter().take_while(|block| block.extents.start < extents.end);
            for block in wanted {
                // Those that others hold may wait for memory, too.
                match self.sink.0.prefer(block) {
                    Ok(true) if self.take(block) => return Pick::Found(block),
                    Ok(true) => {}
                    Ok(false) => return Pick::Later,
                    Err(error) => {
                        self.refused(error);
                        return Pick::Later;
                    }
                }
            }
            Pick::Nothing
        })
    }

    /// Ends the read by what a sink said.
    fn refused(&self, error: SinkError) {
        let cancelled = matches!(error.downcast_ref(), Some(Error::Cancelled));
        self.fail(if cancelled { Error::Cancelled } else { Error::Sink(error) });
    }

    pub(super) fn is_stopped(&self) -> bool {
        if self.control.is_cancelled() {
            self.fail(Error::Cancelled);
        }
        self.stopped.load(Relaxed)
    }

    /// Ends the read. The first error is the one reported.
    pub(super) fn fail(&self, error: Error) {
        let mut failure = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        if failure.is_some() {
            return;
        }
        *failure = Some(error);
        self.stopped.store(true, Relaxed);
        drop(failure);
        self.sink.0.end();
    }

    pub(super) fn finish(self) -> Result<(), Error> {
        match self.failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    pub(super) fn file(&self, block: &Block) -> &'a SourceFile {
        &self.files[block.file as usize]
    }

    /// Faults in a piece of a target's memory, from `done` on, if it is fresh, so that the kernel
    /// need not while it takes a direct read: its way costs three times as much, and keeps the
    /// worker from its ring. Says where the next piece starts; `None` when there is nothing (more)
    /// to do.
    ///
    /// A piece ends where a huge page does, since that is what one fault brings. Copies out of the
    /// page cache are better off without: they fault the pages in as they go, and find them in the
    /// processor's cache then.
    pub(super) fn touch(
        &self,
        block: &Block,
        target: &Target,
        done: usize,
        stats: &mut WorkerStats,
    ) -> Option<usize> {
        let left = (block.len as usize).min(target.capacity()).checked_sub(done)?;
        if left == 0 || !target.is_fresh() || self.no_populate.load(Relaxed) {
            return None;
        }
        let began = Instant::now();
        let start = target.ptr().as_ptr() as usize + done;
        let len = (HUGE_PAGE - start % HUGE_PAGE).min(left);
        // SAFETY: `done < block.len <= capacity`.
        let ptr = unsafe { target.ptr().add(done) };
        // SAFETY: the range lies in the target, which is on loan to this worker.
        if unsafe { sys::populate(ptr, len) }.is_err() {
            // An older kernel. Whoever writes first takes the faults, as ever.
            self.no_populate.store(true, Relaxed);
            return None;
        }
        stats.touch += began.elapsed();
        stats.touch_bytes += len as u64;
        Some(done + len)
    }

    pub(super) fn landed(&self, block: &Block, target: Target, stats: &mut WorkerStats) {
        let began = Instant::now();
        if let Err(error) = self.sink.0.landed(block, target) {
            self.fail(Error::Sink(error));
        } else {
            self.control.add_landed(block.need);
        }
        stats.deliver += began.elapsed();
    }

    pub(super) fn abandoned(&self, block: &Block, target: Target) {
        self.sink.0.abandoned(block, target);
    }

    /// Memory that the sink lends again and again.
    pub(super) fn reused(&self) -> Option<(NonNull<u8>, usize)> {
        self.sink.0.reused()
    }

    /// Leaves memory to a kernel that may write to it for ever; returns it where the sink cannot.
    pub(super) fn lost(&self, block: &Block, target: Target) -> Option<Target> {
        self.sink.0.lost(block, target)
    }

    /// Chooses the way of a block by what the page cache holds of it.
    pub(super) fn route(&self, block: &Block) -> Route<'a> {
        let file = self.file(block);
        let direct = || file.direct().map_or(Route::Buffered, Route::Direct);
        let resident = |part: u64| {
            file.resident_bytes_of(block.offset, block.need)
                .is_ok_and(|bytes| bytes >= block.need / 8 * part)
        };
        match self.cache {
            _ if file.source().is_some() => Route::Remote,
            CachePolicy::Direct => direct(),
            // A few missing pages cost less than reading all of the block again.
            CachePolicy::Residency if resident(7) => Route::Cached,
            CachePolicy::Residency => direct(),
            CachePolicy::Buffered if resident(7) => Route::Cached,
            CachePolicy::Buffered => Route::Buffered,
        }
    }

    pub(super) fn early_end(&self, block: &Block, end: u64) -> Error {
        let path = self.file(block).path().to_owned();
        Error::EarlyEnd { path, end, needed: block.need_end() }
    }

    pub(super) fn read_error(&self, block: &Block, done: u64, source: io::Error) -> Error {
        Error::Read {
            path: self.file(block).path().to_owned(),
            offset: block.offset + done,
            len: block.need.saturating_sub(done),
            source,
        }
    }

    /// Reads the rest of a block, from `done` on, by blocking reads through the page cache.
    ///
    /// # Safety
    ///
    /// `target` is on loan from the sink for this block, and no other read into it is in flight.
    pub(super) unsafe fn read_buffered(
        &self,
        block: &Block,
        target: &Target,
        mut done: u64,
    ) -> Result<(), Error> {
        let unsupported = || self.read_error(block, done, io::ErrorKind::Unsupported.into());
        let file = self.file(block).buffered().ok_or_else(unsupported)?;
        let mut retries = 0;
        while done < block.need {
            let len = (block.need - done) as usize;
            // SAFETY: the sink lends at least `block.len >= need` bytes from `ptr`, to this
            // worker alone.
            let read = unsafe {
                sys::pread(file, target.ptr().as_ptr().add(done as usize), len, block.offset + done)
            };
            match read {
                Ok(0) => return Err(self.early_end(block, block.offset + done)),
                Ok(n) => (done, retries) = (done + n as u64, 0),
                Err(e) => match self.retry(&e, retries) {
                    true => retries += 1,
                    false => return Err(self.read_error(block, done, e)),
                },
            }
        }
        Ok(())
    }

    /// Reads a block from a source that is no local file: from its first wanted byte on, for alignment gains
    /// nothing there.
    ///
    /// # Safety
    ///
    /// As for [`read_buffered`](Self::read_buffered).
    pub(super) unsafe fn read_remote(&self, block: &Block, target: &Target) -> Result<(), Error> {
        let Some(source) = self.file(block).source() else { return Ok(()) };
        let first = self.plan.extents().get(block.extents.start as usize);
        let skip = first.map_or(0, |extent| extent.offset.saturating_sub(block.offset));
        let skip = skip.min(block.need);
        // SAFETY: the sink lends at least `block.len >= need >= skip` bytes from `ptr`, to this worker alone.
        let memory = unsafe {
            let start = target.ptr().as_ptr().add(skip as usize).cast::<MaybeUninit<u8>>();
            std::slice::from_raw_parts_mut(start, (block.need - skip) as usize)
        };
        let cancelled = || self.is_stopped();
        let mut into = Unfilled::new(memory, &cancelled);
        source.read(block.offset + skip, &mut into)?;
        match into.missing() as u64 {
            0 => Ok(()),
            missing => Err(self.early_end(block, block.need_end() - missing)),
        }
    }

    /// Whether a failed read is worth repeating.
    pub(super) fn retry(&self, error: &io::Error, retries: u32) -> bool {
        let again = matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
        if again && retries > 16 {
            std::thread::yield_now();
        }
        again && retries < MAX_RETRIES && !self.stopped.load(Relaxed)
    }

    pub(super) fn record(
        &self,
        stats: &mut WorkerStats,
        stage: Stage,
        block: &Block,
        began: Instant,
        worker: usize,
    ) {
        let took = began.elapsed();
        stats.count(stage, block.need, took);
        if stage == Stage::Direct {
            self.depth.arrived(block.need, self.started.elapsed());
        }
        if self.trace {
            stats.events.push(Event {
                worker: worker as u32,
                stage,
                file: block.file,
                offset: block.offset,
                bytes: block.need,
                start: began.duration_since(self.started),
                duration: took,
            });
        }
    }
}
