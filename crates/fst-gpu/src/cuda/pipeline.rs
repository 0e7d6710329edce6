//! The copy pipeline: filled blocks leave for the device on several streams and come back to the
//! ring when their copies are done.
//!
//! Any thread takes a block with [`Pipeline::acquire`], fills it and hands it to
//! [`Pipeline::submit`]. No lock spans the pipeline: free blocks are a lock-free stack, and each
//! stream has a lock of its own that a submitting thread passes by when it is taken. A block is
//! reused only after the event recorded behind its copies is complete, and memory is released only
//! after its stream has been waited for; where the driver will not even say so (a dead context),
//! the memory is given up rather than reused.
//!
//! A pipeline may lead to several devices: pinned memory is read by all of them, and a block comes back when
//! the last is done with it.

mod enqueue;
mod jobs;
mod tables;

pub use enqueue::CopyOp;
pub(crate) use enqueue::{
    From, copy_rows, copy_within, enqueue_on_device, joined, push_run, source_range,
};
pub(crate) use tables::{TABLE_BYTES, Tables};

use crate::cuda::buffer::device::{DEVICE_ALIGN, DeviceArena};
use crate::cuda::buffer::pinned::{PinnedBlock, PinnedRing, RingOptions, Shared};
use crate::cuda::buffer::registered::RegisteredHost;
use crate::cuda::device::CudaDevice;
use crate::cuda::stream::{Event, Stream};
use crate::error::{Error, Result};
use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

/// Sizes of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PipelineOptions {
    /// The pinned blocks.
    pub ring: RingOptions,
    /// Copy streams to a device, 1 to 16. One keeps a copy engine busy with large blocks; a few hide the gaps
    /// between small ones and let kernels overlap with copies.
    pub streams: usize,
}

impl PipelineOptions {
    /// Bytes of a device's memory that gathers and casts take beside their destinations, at most: a
    /// stream takes its part when it first has some.
    #[must_use]
    pub fn device_bytes(&self) -> u64 {
        self.streams as u64 * lane_bytes(self.ring.block_bytes as u64)
    }

    /// Bytes of host memory that are pinned, at most: the ring, and tables on their way to kernels.
    #[must_use]
    pub fn pinned_bytes(&self) -> u64 {
        let ring = (self.ring.blocks as u64).saturating_mul(self.ring.block_bytes as u64);
        ring.saturating_add(self.streams as u64 * tables::SLOTS_BYTES)
    }
}

/// Bytes of the scratch memory of a stream whose blocks are so long. Kernels may read a few bytes around
/// their source; the table of jobs lies behind.
fn lane_bytes(block: u64) -> u64 {
    block + 2 * DEVICE_ALIGN + TABLE_BYTES
}

impl Default for PipelineOptions {
    fn default() -> Self {
        Self { ring: RingOptions::default(), streams: 4 }
    }
}

/// What a pipeline has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PipelineStats {
    /// Bytes queued for copying to the device.
    pub bytes: u64,
    /// Driver calls that queued copies.
    pub copy_calls: u64,
    /// Kernels launched.
    pub launches: u64,
    /// Copies asked for, before neighbours were joined.
    pub copies: u64,
    /// Blocks and mapped ranges submitted.
    pub blocks: u64,
    /// Times that a thread found no free block and waited.
    pub ring_waits: u64,
}

/// What a copy in flight reads from, and the event behind it.
enum Held {
    Block(Arc<SharedBlock>),
    Mapping { event: Arc<Event>, mapping: Arc<RegisteredHost> },
}

/// A block that streams of several devices may read.
struct SharedBlock {
    block: Option<PinnedBlock>,
    index: u32,
    /// Whether a copy engine may still read it when all say that they are done.
    lost: AtomicBool,
}

impl Drop for SharedBlock {
    fn drop(&mut self) {
        if let Some(block) = self.block.take().filter(|_| *self.lost.get_mut()) {
            block.into_index();
        }
    }
}

/// Called once when the copies and kernels of a submission are done; never if they fail. It runs on
/// whichever thread notices, with no lock held, and should be short.
pub type Done = Box<dyn FnOnce() + Send>;

struct InFlight {
    held: Held,
    done: Option<Done>,
}

struct Lane {
    /// Number of the device.
    device: usize,
    stream: Stream,
    state: Mutex<LaneState>,
}

#[derive(Default)]
struct LaneState {
    /// In the order of submission, so the front completes first.
    in_flight: VecDeque<InFlight>,
    /// Where bytes wait on the device for a kernel; made when first needed.
    scratch: Option<DeviceArena>,
    /// The way there of tables for kernels; made when first needed.
    tables: Option<Tables>,
}

#[derive(Default)]
struct Counters {
    bytes: AtomicU64,
    copy_calls: AtomicU64,
    launches: AtomicU64,
    copies: AtomicU64,
    blocks: AtomicU64,
    ring_waits: AtomicU64,
}

/// One of the devices.
struct Goal {
    device: CudaDevice,
    /// One per block of the ring.
    events: Vec<Event>,
    /// The device takes the kernel that scatters small copies; known once it was needed.
    packs: OnceLock<bool>,
    /// The lane that the next submission tries first.
    next: AtomicUsize,
}

/// A copy pipeline to a device, or several. `Send + Sync`; share it by reference or `Arc`.
///
/// Dropping it waits for the copies in flight.
pub struct Pipeline {
    goals: Vec<Goal>,
    /// Device by device, as many for each.
    lanes: Vec<Lane>,
    /// The lane that the next one who waits tries first.
    next_wait: AtomicUsize,
    in_flight: AtomicUsize,
    /// The first error; everything after it is refused.
    failure: OnceLock<Error>,
    /// The driver has no call for many copies, or refused it.
    no_batch: AtomicBool,
    counters: Counters,
    kept: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
    ring: PinnedRing,
}

impl Pipeline {
    /// Makes streams and events, and starts pinning the ring in the background.
    ///
    /// # Errors
    ///
    /// [`Error::BadSetting`], or the driver's.
    pub fn new(device: &CudaDevice, options: PipelineOptions) -> Result<Self> {
        Self::to(device, &[], options)
    }

    /// As [`new`](Self::new), to a device, number 0, and others, in this order.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn to(first: &CudaDevice, more: &[CudaDevice], options: PipelineOptions) -> Result<Self> {
        if !(1..=16).contains(&options.streams) {
            return Err(Error::BadSetting {
                what: "copy streams",
                value: options.streams as u64,
                least: 1,
                most: 16,
            });
        }
        let ring = PinnedRing::new(first, options.ring)?;
        let devices = || std::iter::once(first).chain(more);
        let mut lanes = Vec::new();
        for (number, device) in devices().enumerate() {
            for _ in 0..options.streams {
                let stream = Stream::new(device)?;
                lanes.push(Lane { device: number, stream, state: Mutex::default() });
            }
        }
        let goal = |device: &CudaDevice| {
            let events =
                (0..options.ring.blocks).map(|_| Event::new(device)).collect::<Result<_>>()?;
            let (packs, next) = (OnceLock::new(), AtomicUsize::new(0));
            Ok(Goal { device: device.clone(), events, packs, next })
        };
        Ok(Self {
            goals: devices().map(goal).collect::<Result<_>>()?,
            lanes,
            next_wait: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            failure: OnceLock::new(),
            no_batch: AtomicBool::new(!first.copies_in_batches()),
            counters: Counters::default(),
            kept: Mutex::default(),
            ring,
        })
    }

    /// The device that copies go to; of several, the first.
    pub fn device(&self) -> &CudaDevice {
        &self.goals[0].device
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.ring.options().block_bytes
    }

    /// The ring of pinned blocks.
    pub fn ring(&self) -> &PinnedRing {
        &self.ring
    }

    /// Copy streams, of all devices.
    pub fn streams(&self) -> usize {
        self.lanes.len()
    }

    /// Bytes of host memory that are pinned now: blocks, and tables on their way to kernels.
    pub fn pinned_bytes(&self) -> u64 {
        let tables = |lane: &Lane| {
            let state = lane.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.tables.as_ref().map_or(0, Tables::bytes)
        };
        self.ring.pinned_bytes() as u64 + self.lanes.iter().map(tables).sum::<u64>()
    }

    /// Keeps `owner` (an arena, a caller's buffer) alive until the pipeline is dropped and its
    /// copies are done.
    pub fn keep(&self, owner: Arc<dyn Any + Send + Sync>) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(owner);
    }

    /// What was done so far.
    pub fn stats(&self) -> PipelineStats {
        let c = &self.counters;
        PipelineStats {
            bytes: c.bytes.load(Ordering::Relaxed),
            copy_calls: c.copy_calls.load(Ordering::Relaxed),
            launches: c.launches.load(Ordering::Relaxed),
            copies: c.copies.load(Ordering::Relaxed),
            blocks: c.blocks.load(Ordering::Relaxed),
            ring_waits: c.ring_waits.load(Ordering::Relaxed),
        }
    }

    /// A free block, or `None` when all are filled or on their way.
    ///
    /// # Errors
    ///
    /// The pipeline's first error, whichever thread met it.
    pub fn try_acquire(&self) -> Result<Option<PinnedBlock>> {
        self.check()?;
        if let Some(block) = Shared::try_acquire(self.ring.shared())? {
            return Ok(Some(block));
        }
        self.reap()?;
        Shared::try_acquire(self.ring.shared())
    }

    /// A free block; waits for one.
    ///
    /// A thread that holds every block of the ring itself waits for ever: blocks come back by
    /// [`submit`](Self::submit) or by being dropped.
    ///
    /// # Errors
    ///
    /// As for [`try_acquire`](Self::try_acquire).
    pub fn acquire(&self) -> Result<PinnedBlock> {
        loop {
            if let Some(block) = self.acquire_soon()? {
                return Ok(block);
            }
        }
    }

    /// A free block. Without one, waits for the oldest submission, or for a short while (50 ms) if
    /// there is none; `None` when no block has come back by then.
    ///
    /// # Errors
    ///
    /// As for [`try_acquire`](Self::try_acquire).
    pub fn acquire_soon(&self) -> Result<Option<PinnedBlock>> {
        if let Some(block) = self.try_acquire()? {
            return Ok(Some(block));
        }
        self.counters.ring_waits.fetch_add(1, Ordering::Relaxed);
        if !self.wait_for_oldest()? {
            let shared = self.ring.shared();
            shared.sleep(|| {
                shared.has_free()
                    || self.in_flight.load(Ordering::SeqCst) > 0
                    || self.failure.get().is_some()
            });
        }
        self.try_acquire()
    }

    /// Takes back a block that was given up for its number by [`PinnedBlock::into_index`].
    ///
    /// # Safety
    ///
    /// `index` came from a block of this pipeline, and nobody took it back before.
    pub unsafe fn block(&self, index: u32) -> Option<PinnedBlock> {
        // SAFETY: the caller's contract.
        unsafe { PinnedBlock::from_index(self.ring.shared(), index) }
    }

    /// Queues the copies of a filled block and returns; the block goes back to the ring when they
    /// are done. Offsets of the operations count from the block's first byte.
    ///
    /// # Errors
    ///
    /// A range outside the block refuses this block only. A failure of the driver is remembered:
    /// every later call of any thread returns it, and nothing is lost or reused too early.
    ///
    /// # Safety
    ///
    /// Every destination lies in memory of this device that stays allocated until
    /// [`flush`](Self::flush) returns or the pipeline is dropped ([`keep`](Self::keep) sees to
    /// it), and nothing else uses those bytes in the meantime.
    pub unsafe fn submit(&self, block: PinnedBlock, ops: &[CopyOp]) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.submit_then(block, ops, None) }
    }

    /// [`submit`](Self::submit), with a call when the block's work is done. Somebody must look:
    /// [`try_acquire`](Self::try_acquire), [`acquire`](Self::acquire), [`poll`](Self::poll) and
    /// [`flush`](Self::flush) do.
    ///
    /// # Errors
    ///
    /// As for [`submit`](Self::submit).
    ///
    /// # Safety
    ///
    /// As for [`submit`](Self::submit).
    pub unsafe fn submit_then(
        &self,
        block: PinnedBlock,
        ops: &[CopyOp],
        done: Option<Done>,
    ) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.submit_to(block, &[(0, ops)], done) }
    }

    /// As [`submit_then`](Self::submit_then), to several devices, by their numbers.
    ///
    /// # Errors
    ///
    /// As for [`submit`](Self::submit); [`Error::OutOfRange`] where there is no such device.
    ///
    /// # Safety
    ///
    /// As for [`submit`](Self::submit), of each device.
    pub unsafe fn submit_to(
        &self,
        block: PinnedBlock,
        ops: &[(usize, &[CopyOp])],
        done: Option<Done>,
    ) -> Result<()> {
        self.check()?;
        debug_assert!(block.is_of(self.ring.shared()));
        for &(device, ops) in ops {
            enqueue::check_ranges(ops, block.capacity() as u64)?;
            let (start, len) = (device as u64, self.goals.len() as u64);
            if start >= len {
                let what = "devices of a pipeline";
                return Err(Error::OutOfRange { what, start, end: start.saturating_add(1), len });
            }
        }
        let (start, index) = (block.as_ptr(), block.index());
        let block = Arc::new(SharedBlock { block: Some(block), index, lost: false.into() });
        let mut dones = shared(done.into_iter().collect(), ops.len());
        for &(device, ops) in ops {
            let Some(event) = self.goals[device].events.get(index as usize) else {
                return Ok(());
            };
            let (lane, mut state) = self.lane(device);
            // SAFETY: the caller's contract for destinations; the block is held until its event.
            let queued = unsafe { self.queue(lane, &mut state, start, ops, event) };
            let (held, done) = (Held::Block(block.clone()), dones.pop());
            self.hold(lane, &mut state, InFlight { held, done }, queued)?;
        }
        Ok(())
    }

    /// Queues copies to the first device straight from registered memory, with no staging. Offsets of the operations
    /// count from the first registered byte.
    ///
    /// # Errors
    ///
    /// As for [`submit`](Self::submit).
    ///
    /// # Safety
    ///
    /// As for [`submit`](Self::submit).
    pub unsafe fn submit_registered(
        &self,
        mapping: &Arc<RegisteredHost>,
        ops: &[CopyOp],
        done: Option<Done>,
    ) -> Result<()> {
        self.check()?;
        enqueue::check_ranges(ops, mapping.len() as u64)?;
        let event = Arc::new(Event::new(self.device())?);
        let (lane, mut state) = self.lane(0);
        // SAFETY: as in `submit`; the mapping is held until its event.
        let queued = unsafe { self.queue(lane, &mut state, mapping.as_ptr(), ops, &event) };
        let held = Held::Mapping { event, mapping: Arc::clone(mapping) };
        self.hold(lane, &mut state, InFlight { held, done }, queued)
    }

    /// Looks whether submissions are done, without waiting: returns their blocks to the ring and
    /// makes the calls that were asked for.
    ///
    /// # Errors
    ///
    /// The pipeline's first error.
    pub fn poll(&self) -> Result<()> {
        self.check()?;
        self.reap()
    }

    /// Waits until one of the submissions in flight is done, and does what [`poll`](Self::poll)
    /// does; `false` when nothing is in flight.
    ///
    /// # Errors
    ///
    /// The pipeline's first error.
    pub fn wait(&self) -> Result<bool> {
        self.check()?;
        let any = self.wait_for_oldest()?;
        self.reap()?;
        Ok(any)
    }

    /// Waits until everything submitted before has arrived.
    ///
    /// # Errors
    ///
    /// The pipeline's first error; then what has arrived is unknown.
    pub fn flush(&self) -> Result<()> {
        for lane in &self.lanes {
            let waited = lane.stream.synchronize();
            self.note(waited);
        }
        self.check()?;
        for lane in &self.lanes {
            self.reap_lane(lane, lane.state.lock().unwrap_or_else(PoisonError::into_inner))?;
        }
        self.check()
    }

    /// Records a failure met elsewhere (a reader's, say) so that all threads stop.
    pub fn fail(&self, error: Error) {
        let _ = self.failure.set(error);
        self.ring.shared().ring();
    }

    fn note<T>(&self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    fn check(&self) -> Result<()> {
        self.failure.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    /// A lane to a device whose lock is free, else the next one's turn.
    fn lane(&self, device: usize) -> (&Lane, MutexGuard<'_, LaneState>) {
        let first = self.goals[device].next.fetch_add(1, Ordering::Relaxed);
        let count = self.lanes.len() / self.goals.len();
        let lanes = &self.lanes[device * count..][..count];
        for i in 0..count {
            let lane = &lanes[first.wrapping_add(i) % count];
            match lane.state.try_lock() {
                Ok(state) => return (lane, state),
                Err(TryLockError::Poisoned(e)) => return (lane, e.into_inner()),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        let lane = &lanes[first % count];
        (lane, lane.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Queues operations and the event behind them. `Err` with whether the source may still be
    /// read by work that was queued and could not be marked.
    ///
    /// # Safety
    ///
    /// As for [`submit`](Self::submit), with `start` kept as long as copies may read it.
    unsafe fn queue(
        &self,
        lane: &Lane,
        state: &mut LaneState,
        start: NonNull<u8>,
        ops: &[CopyOp],
        event: &Event,
    ) -> Queued {
        let current = match lane.stream.device().make_current() {
            Ok(current) => current,
            Err(error) => {
                return Queued { copies: Err(error), marked: Ok(()), any: false };
            }
        };
        // SAFETY: the caller's contract; the context is current.
        let copies = unsafe { self.enqueue(lane, state, start, ops) };
        let marked = event.record_current(&lane.stream);
        drop(current);
        Queued { copies, marked, any: true }
    }

    /// Files what a submission holds, according to how queueing went.
    fn hold(
        &self,
        lane: &Lane,
        state: &mut LaneState,
        entry: InFlight,
        queued: Queued,
    ) -> Result<()> {
        let Queued { copies, marked, any } = queued;
        if let Err(error) = copies.and(marked.clone()) {
            self.fail(error.clone());
            // Copies may be on their way with no event behind them: wait for the whole stream.
            let unmarked = any && marked.is_err();
            if unmarked && !wait_stubbornly(&lane.stream) {
                self.ring.shared().set_stuck();
                give_up(entry.held);
            } else if any && !unmarked {
                self.push(state, InFlight { done: None, ..entry });
            }
            return Err(error);
        }
        self.push(state, entry);
        self.counters.blocks.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn push(&self, state: &mut LaneState, entry: InFlight) {
        state.in_flight.push_back(entry);
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        self.ring.shared().ring();
    }

    fn event<'a>(&'a self, lane: &Lane, held: &'a Held) -> Option<&'a Event> {
        match held {
            Held::Block(block) => self.goals[lane.device].events.get(block.index as usize),
            Held::Mapping { event, .. } => Some(event),
        }
    }

    /// Returns completed blocks to the ring, from lanes that nobody else is busy with.
    fn reap(&self) -> Result<()> {
        self.lanes.iter().try_for_each(|lane| match lane.state.try_lock() {
            Ok(state) => self.reap_lane(lane, state),
            Err(TryLockError::Poisoned(e)) => self.reap_lane(lane, e.into_inner()),
            Err(TryLockError::WouldBlock) => Ok(()),
        })
    }

    /// Takes what is complete off a lane, gives blocks and mappings back, and says so to whoever asked.
    fn reap_lane(&self, lane: &Lane, mut state: MutexGuard<'_, LaneState>) -> Result<()> {
        let (mut ended, mut result) = (Vec::new(), Ok(()));
        while let Some(front) = state.in_flight.front() {
            match self.event(lane, &front.held).map_or(Ok(true), Event::is_complete) {
                Ok(false) => break,
                Ok(true) => {
                    ended.extend(state.in_flight.pop_front());
                    self.in_flight.fetch_sub(1, Ordering::SeqCst);
                }
                Err(error) => {
                    self.fail(error.clone());
                    result = Err(error);
                    break;
                }
            }
        }
        // No lock is held from here on: to unregister a mapping takes the driver a while.
        drop(state);
        for InFlight { held, done } in ended {
            drop(held);
            if let Some(done) = done {
                done();
            }
        }
        result
    }

    /// Waits for the front of some lane, those who wait at the same time for different ones; `false` when
    /// nothing is in flight.
    ///
    /// The lane's lock is not held meanwhile. If another thread reaps the block and its event is
    /// recorded anew before the wait begins, the wait is for a later copy: longer, never wrong.
    fn wait_for_oldest(&self) -> Result<bool> {
        let first = self.next_wait.fetch_add(1, Ordering::Relaxed);
        for i in 0..self.lanes.len() {
            let lane = &self.lanes[first.wrapping_add(i) % self.lanes.len()];
            let (of_block, of_mapping) = {
                let state = lane.state.lock().unwrap_or_else(PoisonError::into_inner);
                match state.in_flight.front().map(|entry| &entry.held) {
                    Some(Held::Block(block)) => {
                        (self.goals[lane.device].events.get(block.index as usize), None)
                    }
                    Some(Held::Mapping { event, .. }) => (None, Some(Arc::clone(event))),
                    None => continue,
                }
            };
            let waited = match of_block.or(of_mapping.as_deref()) {
                Some(event) => event.synchronize(),
                None => lane.stream.synchronize(),
            };
            if let Err(error) = waited {
                self.fail(error.clone());
                return Err(error);
            }
            return Ok(true);
        }
        Ok(false)
    }
}

struct Queued {
    copies: Result<()>,
    marked: Result<()>,
    /// Whether anything may have been queued.
    any: bool,
}

/// Calls for so many submissions, the last of which makes all of `dones`.
pub(super) fn shared(dones: Vec<Done>, submissions: usize) -> Vec<Done> {
    if submissions == 0 {
        // There was nothing to copy.
        dones.into_iter().for_each(|done| done());
        return Vec::new();
    }
    if submissions == 1 && dones.len() < 2 {
        return dones;
    }
    let (left, dones) = (AtomicUsize::new(submissions), Mutex::new(dones));
    let all = Arc::new((left, dones));
    let one = || {
        let all = Arc::clone(&all);
        Box::new(move || {
            if all.0.fetch_sub(1, Ordering::AcqRel) == 1 {
                let dones = std::mem::take(&mut *all.1.lock().unwrap_or_else(|e| e.into_inner()));
                dones.into_iter().for_each(|done| done());
            }
        }) as Done
    };
    (0..submissions).map(|_| one()).collect()
}

/// Waits for a stream, once more if the first wait reports an error that came from earlier work.
fn wait_stubbornly(stream: &Stream) -> bool {
    stream.synchronize().is_ok() || stream.synchronize().is_ok()
}

/// Gives up what a copy engine may still read.
fn give_up(held: Held) {
    match held {
        Held::Block(block) => block.lost.store(true, Ordering::Relaxed),
        Held::Mapping { mapping, .. } => mapping.set_stuck(),
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        for lane in &self.lanes {
            let mut state = lane.state.lock().unwrap_or_else(PoisonError::into_inner);
            if wait_stubbornly(&lane.stream) {
                state.in_flight.clear();
            } else {
                if !state.in_flight.is_empty() {
                    self.ring.shared().set_stuck();
                }
                state.in_flight.drain(..).for_each(|entry| give_up(entry.held));
                if let Some(tables) = state.tables.take() {
                    tables.leak();
                }
            }
        }
    }
}

impl fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipeline")
            .field("device", self.device())
            .field("streams", &self.lanes.len())
            .field("ring", &self.ring)
            .field("stats", &self.stats())
            .field("failure", &self.failure.get())
            .finish_non_exhaustive()
    }
}
