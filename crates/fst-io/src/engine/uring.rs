//! io_uring: each worker keeps several large reads in flight on a ring of its own. While they are
//! under way it gets the next blocks ready (their memory is faulted in), and copies resident
//! blocks itself, looking at the ring between two steps.
//!
//! Files are registered with each ring, and so is memory that the sink lends again and again: the
//! kernel then looks neither up for each request, and handing over requests of 512 KiB takes 3.6 ms
//! of one processor per GB, not 6. Arenas are not registered: their pages would all have to be there
//! before the first read. Into 4 KiB pages a request takes 110 us to hand over, and reading is a
//! tenth slower besides: memory that is lent again should be on huge pages, too.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

use super::job::{Hand, Job, REQUEST, Route};
use super::pread;
use crate::error::Error;
use crate::file::SourceFile;
use crate::plan::Block;
use crate::sink::Target;
use crate::stats::{Stage, WorkerStats};

/// How many blocks a worker makes ready beyond those in flight: what a completion frees is taken
/// at once, without a wait for memory.
const AHEAD: usize = 2;
/// How many bytes all workers together make ready where memory is fresh and the sink's last word on
/// where a block lies: what faults cost varies tenfold (under a hypervisor that takes free memory
/// back, most of all), and what was done while they were cheap is there while they are not.
const FRESH_AHEAD: u64 = 256 << 20;
/// How long the kernel may say that it is short of resources, while nothing completes, before that
/// counts as a failure of the ring.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// The descriptor of a file; of what is no local file -1, which the system refuses.
fn descriptor(file: &SourceFile) -> RawFd {
    file.buffered().map_or(-1, AsRawFd::as_raw_fd)
}

/// Why io_uring cannot be used here, or `None` when it can.
///
/// It may be absent (before Linux 5.6), switched off (`kernel.io_uring_disabled`) or filtered by
/// seccomp, as most container runtimes do.
pub fn uring_refusal() -> Option<String> {
    let refused = |e: io::Error| {
        let hint = match e.raw_os_error() {
            Some(libc::ENOSYS) => " (not in this kernel, or filtered by seccomp)",
            Some(libc::EPERM) => " (filtered by seccomp, or off by kernel.io_uring_disabled)",
            _ => "",
        };
        Some(format!("io_uring is refused: {e}{hint}"))
    };
    let probed = new_ring(2).and_then(|ring| {
        // Filters name system calls one by one: this is the one that a read cannot do without.
        ring.submit()?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        Ok(probe.is_supported(opcode::Read::CODE))
    });
    match probed {
        Ok(true) => None,
        Ok(false) => Some("io_uring here has no read operation".to_owned()),
        Err(e) => refused(e),
    }
}

/// A ring for one thread. Completions are processed when that thread asks (Linux 6.1), which
/// spares interrupts; older kernels get a plain ring.
fn new_ring(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(entries)
        .or_else(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => IoUring::new(entries),
            _ => Err(e),
        })
}

/// What a ring knows before the first request.
#[derive(Debug, Default)]
struct Registered {
    /// The descriptors of all files of the job: that through the page cache, and the one around it
    /// if it was open.
    files: Vec<RawFd>,
    /// Addresses of the only buffer.
    buffer: Option<Range<usize>>,
}

impl Registered {
    /// Registers what there is. A kernel that refuses, as for want of memory that may be locked, gets
    /// requests that name all they need.
    fn with(ring: &IoUring, job: &Job<'_>) -> Self {
        let submitter = ring.submitter();
        let both = |file: &SourceFile| {
            // -1 leaves a place empty.
            [descriptor(file), file.direct_if_open().map_or(-1, AsRawFd::as_raw_fd)]
        };
        let mut files: Vec<RawFd> = job.files.iter().flat_map(both).collect();
        if submitter.register_files(&files).is_err() {
            files.clear();
        }
        let buffer = job.reused().and_then(|(start, len)| {
            let vec = libc::iovec { iov_base: start.as_ptr().cast(), iov_len: len };
            // SAFETY: the sink keeps the range allocated for longer than the job, hence the ring. Only
            // requests write to it, and these only into targets that are on loan.
            unsafe { submitter.register_buffers(&[vec]) }.ok()?;
            let start = start.as_ptr() as usize;
            Some(start..start + len)
        });
        Self { files, buffer }
    }

    /// A read of this block's file into memory.
    fn read(&self, flight: &Flight<'_>, at: *mut u8, len: u32, offset: u64) -> squeue::Entry {
        let Flight { block, fd, direct, .. } = *flight;
        let place = block.file as usize * 2 + usize::from(direct);
        let registered = self.files.get(place) == Some(&fd);
        let fd = types::Fd(if registered { place as i32 } else { fd });
        let start = at as usize;
        let entry = match &self.buffer {
            Some(buffer) if buffer.start <= start && start + len as usize <= buffer.end => {
                opcode::ReadFixed::new(fd, at, len, 0).offset(offset).build()
            }
            _ => opcode::Read::new(fd, at, len).offset(offset).build(),
        };
        if registered { entry.flags(squeue::Flags::FIXED_FILE) } else { entry }
    }
}

pub(super) fn work(job: &Job<'_>, id: usize) -> WorkerStats {
    let depth = job.depth.max_share();
    match new_ring(depth as u32) {
        Ok(ring) => Worker::new(job, id, ring, depth).run(),
        // Locked-memory limits of older kernels can refuse the n-th ring.
        Err(_) => pread::work(job, id),
    }
}

/// A read that the kernel is busy with.
struct Flight<'a> {
    block: &'a Block,
    target: Target,
    fd: RawFd,
    /// Whether `fd` reads around the page cache, in whole aligned pieces.
    direct: bool,
    done: u64,
    retries: u32,
    began: Instant,
}

/// One thread's ring. Invariant: for every `Some` in `slots`, one request is queued or in the
/// kernel's hands, with the slot's index as its user data; the slot's target stays on loan until
/// its completion is seen, on every path including drop. If the ring breaks, completions may never
/// be seen: such targets are lost (see [`Worker::settle`]).
struct Worker<'j, 'a> {
    job: &'j Job<'a>,
    id: usize,
    ring: IoUring,
    registered: Registered,
    slots: Vec<Option<Flight<'a>>>,
    free: Vec<usize>,
    /// Slots in the order in which their requests were queued; the kernel takes requests in this
    /// order, and those at the end that the ring's own queue still holds were not taken.
    queued: VecDeque<usize>,
    /// Whether the kernel refuses to work on the ring.
    broken: bool,
    /// Blocks whose memory is there, not yet handed to the kernel.
    ready: VecDeque<Flight<'a>>,
    hand: Hand<'a>,
    stats: WorkerStats,
}

impl<'j, 'a> Worker<'j, 'a> {
    fn new(job: &'j Job<'a>, id: usize, ring: IoUring, depth: usize) -> Self {
        let slots = (0..depth).map(|_| None).collect();
        Self {
            job,
            id,
            registered: Registered::with(&ring, job),
            ring,
            slots,
            free: (0..depth).collect(),
            queued: VecDeque::with_capacity(depth),
            broken: false,
            ready: VecDeque::with_capacity(AHEAD),
            hand: Hand::default(),
            stats: WorkerStats::default(),
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn run(mut self) -> WorkerStats {
        loop {
            self.reap();
            self.issue();
            if self.may_prepare() && self.prepare() {
                continue;
            }
            // With none in flight, `issue` left nothing ready and `prepare` has waited for memory:
            // there is nothing left to do.
            if self.in_flight() == 0 {
                break;
            }
            self.wait();
            if self.broken {
                break;
            }
        }
        self.job.depth.leave();
        std::mem::take(&mut self.stats)
    }

    fn may_prepare(&self) -> bool {
        let Some(last) = self.ready.back() else { return true };
        let bytes = self.ready.len() as u64 * last.block.len;
        self.ready.len() < AHEAD
            || last.target.is_fresh() && bytes < FRESH_AHEAD / self.job.depth.workers() as u64
    }

    /// Makes the next block ready to be read: gets memory for it and faults that in. Resident
    /// blocks are copied at once. False when there are no more blocks, or no memory now.
    fn prepare(&mut self) -> bool {
        // With requests in flight, waiting for them is waiting for memory too; without, the sink
        // must block, or the loop would spin.
        let wait = self.in_flight() == 0;
        let Some((block, target)) = self.job.next(&mut self.hand, wait, &mut self.stats) else {
            return false;
        };
        let began = Instant::now();
        let (fd, direct) = match self.job.route(block) {
            Route::Direct(file) => (file.as_raw_fd(), true),
            // Files that are not local are read by another engine: the system refuses their descriptor.
            Route::Buffered | Route::Remote => (descriptor(self.job.file(block)), false),
            Route::Cached => {
                self.copy(block, target, began);
                return true;
            }
        };
        // Touched for direct reads only: see `Job::touch`.
        let mut touched = 0;
        while direct && let Some(next) = self.job.touch(block, &target, touched, &mut self.stats) {
            touched = next;
            // A fault can take as long as a read. The device must not go idle meanwhile.
            self.reap();
            self.issue();
        }
        self.ready.push_back(Flight { block, target, fd, direct, done: 0, retries: 0, began });
        true
    }

    /// Hands blocks that are ready to the kernel, as many as may be in flight.
    fn issue(&mut self) {
        if self.job.is_stopped() {
            for flight in self.ready.drain(..) {
                self.job.abandoned(flight.block, flight.target);
            }
            return;
        }
        while self.in_flight() < self.job.depth.share().min(self.slots.len())
            && let Some(flight) = self.ready.pop_front()
        {
            self.push(Flight { began: Instant::now(), ..flight });
        }
        if !self.ring.submission().is_empty() {
            self.submit();
        }
    }

    /// Copies a resident block out of the page cache.
    fn copy(&mut self, block: &'a Block, target: Target, began: Instant) {
        // SAFETY: the target was just lent for this block, and no request was made into it.
        let result = unsafe { self.job.read_buffered(block, &target, 0) };
        self.complete(block, target, result, Stage::Cached, began);
    }

    fn complete(
        &mut self,
        block: &'a Block,
        target: Target,
        result: Result<(), Error>,
        stage: Stage,
        began: Instant,
    ) {
        match result {
            Ok(()) => {
                self.job.record(&mut self.stats, stage, block, began, self.id);
                self.job.landed(block, target, &mut self.stats);
            }
            Err(error) => {
                self.job.abandoned(block, target);
                self.job.fail(error);
            }
        }
    }

    /// Queues the rest of a flight. There is a free slot.
    fn push(&mut self, flight: Flight<'a>) {
        let Some(slot) = self.free.pop() else {
            return self.give_up(flight);
        };
        let Flight { block, ref target, direct, done, .. } = flight;
        let end = if direct { block.len } else { block.need };
        let len = (end - done).min(REQUEST) as u32;
        let at = target.ptr().as_ptr().wrapping_add(done as usize);
        let entry = self.registered.read(&flight, at, len, block.offset + done);
        let entry = entry.user_data(slot as u64);
        // SAFETY: `at..at + len` lies in the target (`done <= end <= block.len <= capacity`),
        // which stays on loan until this slot's completion is seen (invariant of `Worker`); the
        // descriptor, which may be a registered one, belongs to a source that outlives the job.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_ok() {
            self.slots[slot] = Some(flight);
            self.queued.push_back(slot);
        } else {
            self.free.push(slot);
            self.give_up(flight);
        }
    }

    /// The ring has as many entries as slots, so this is for a ring that broke its word.
    fn give_up(&mut self, flight: Flight<'a>) {
        self.job.abandoned(flight.block, flight.target);
        let source = io::Error::other("submission queue full");
        self.job.fail(Error::Setup { what: "a read on the ring", source });
    }

    /// Hands queued requests to the kernel, and lets it run what it deferred.
    fn submit(&mut self) {
        let began = Instant::now();
        // What was not taken stays queued for the next call; an error that lasts is met by `wait`.
        let _ = self.ring.submit();
        self.forget_taken();
        self.stats.issue += began.elapsed();
    }

    /// Forgets the order of requests that the kernel has taken out of the queue.
    fn forget_taken(&mut self) {
        let left = self.ring.submission().len();
        self.queued.drain(..self.queued.len().saturating_sub(left));
    }

    /// Waits for at least one completion, or breaks the ring.
    fn wait(&mut self) {
        let began = Instant::now();
        let mut short_since = None;
        while self.ring.completion().is_empty() {
            let result = self.ring.submit_and_wait(1);
            self.forget_taken();
            let Err(error) = result else {
                short_since = None;
                continue;
            };
            match error.raw_os_error() {
                // There were as many signals as this was met.
                Some(libc::EINTR) => {}
                // Short of resources for the moment: completions free some.
                Some(libc::EAGAIN | libc::EBUSY)
                    if short_since.get_or_insert_with(Instant::now).elapsed() < PATIENCE =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                _ => {
                    self.broken = true;
                    self.job.fail(Error::Ring { source: error });
                    break;
                }
            }
        }
        self.stats.wait += began.elapsed();
    }

    /// Takes all completions that are there.
    fn reap(&mut self) {
        if self.in_flight() > 0 && self.ring.submission().taskrun() {
            self.submit();
        }
        loop {
            let Some(entry) = self.ring.completion().next() else {
                break;
            };
            let slot = entry.user_data() as usize;
            let Some(flight) = self.slots.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            self.arrived(flight, entry.result());
        }
    }

    /// Decides what a completion means: done, more to come, again, another way, or an error.
    fn arrived(&mut self, mut flight: Flight<'a>, result: i32) {
        let (job, block) = (self.job, flight.block);
        let align = job.file(block).align();
        if let Ok(read @ 1..) = u64::try_from(result) {
            flight.done += read;
            flight.retries = 0;
            if flight.done >= block.need {
                let stage = if flight.direct { Stage::Direct } else { Stage::Buffered };
                return self.complete(block, flight.target, Ok(()), stage, flight.began);
            }
            if !flight.direct || flight.done.is_multiple_of(align) {
                return self.push(flight);
            }
            return self.finish_buffered(flight);
        }
        if result == 0 {
            return if flight.direct {
                self.finish_buffered(flight)
            } else {
                let error = job.early_end(block, block.offset + flight.done);
                self.complete(block, flight.target, Err(error), Stage::Buffered, flight.began)
            };
        }
        let error = io::Error::from_raw_os_error(result.saturating_neg());
        match error.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) if flight.direct => {
                job.file(block).refuse_direct();
                self.finish_buffered(flight);
            }
            _ if job.retry(&error, flight.retries) => {
                flight.retries += 1;
                self.push(flight);
            }
            _ => {
                let error = job.read_error(block, flight.done, error);
                self.complete(block, flight.target, Err(error), Stage::Direct, flight.began);
            }
        }
    }

    /// Gets the rest of a block through the page cache: an end that is not aligned, or a file
    /// system that accepted `O_DIRECT` at open and refuses it now.
    fn finish_buffered(&mut self, flight: Flight<'a>) {
        let Flight { block, target, done, began, .. } = flight;
        // SAFETY: the flight's completion was seen, so that no request into its target is left.
        let result = unsafe { self.job.read_buffered(block, &target, done) };
        self.complete(block, target, result, Stage::Buffered, began);
    }

    /// Gives all memory back, once the kernel is done with it.
    ///
    /// With a broken ring that may be never: what the kernel has not taken goes back, the rest is
    /// lost to sinks whose memory may be lost. For those that lent memory of others, all that is
    /// left is to wait for the kernel.
    fn settle(&mut self) {
        for flight in self.ready.drain(..) {
            self.job.abandoned(flight.block, flight.target);
        }
        while self.in_flight() > 0 && !self.broken {
            self.wait();
            self.abandon_arrived();
        }
        self.abandon_arrived();
        // Nothing is submitted any more: these are not the kernel's.
        self.forget_taken();
        while let Some(slot) = self.queued.pop_front() {
            self.abandon(slot);
        }
        for slot in 0..self.slots.len() {
            let Some(flight) = self.slots[slot].take() else { continue };
            match self.job.lost(flight.block, flight.target) {
                None => self.free.push(slot),
                Some(target) => self.slots[slot] = Some(Flight { target, ..flight }),
            }
        }
        while self.in_flight() > 0 {
            std::thread::sleep(Duration::from_millis(10));
            const GETEVENTS: u32 = 1; // IORING_ENTER_GETEVENTS: run what was deferred
            // SAFETY: nothing is submitted, and no argument is given.
            let _ = unsafe { self.ring.submitter().enter::<()>(0, 0, GETEVENTS, None) };
            self.abandon_arrived();
        }
    }

    /// Gives back the memory of all completions that are there.
    fn abandon_arrived(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                break;
            };
            self.abandon(entry.user_data() as usize);
        }
    }

    fn abandon(&mut self, slot: usize) {
        if let Some(flight) = self.slots.get_mut(slot).and_then(Option::take) {
            self.free.push(slot);
            self.job.abandoned(flight.block, flight.target);
        }
    }
}

impl Drop for Worker<'_, '_> {
    /// After a panic of the sink, or with a broken ring, requests are still under way.
    fn drop(&mut self) {
        self.settle();
    }
}
