//! Carries a read plan out through cuFile: aligned blocks into a few registered slots of device
//! memory, and from there, at the speed of the device, to their places.
//!
//! Tensors start where headers let them start, which suits neither cuFile's alignment nor the
//! device's. Reading aligned blocks and moving their parts on the device costs a pass over device
//! memory, some fifty times faster than storage, and no second pass over the data on the way in.

use super::{CuFile, GdsArena, GdsFile};
use crate::cuda::buffer::device::DeviceArena;
use crate::cuda::device::CudaDevice;
use crate::cuda::pipeline::{Done, TABLE_BYTES, Tables, enqueue_on_device};
use crate::cuda::sink::{Admit, Landing, Route};
use crate::cuda::stream::{Event, Stream};
use crate::cufile::{CuFileError, GdsError};
use fst_io::plan::{Block, ReadPlan};
use fst_io::{Control, Engine, SourceFile};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Slots start at multiples of this in their arena: cuFile bounces what does not suit the device's
/// pages of 4 KiB.
const SLOT_ALIGN: u64 = 4096;

/// How to read through cuFile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GdsOptions {
    /// Threads, each with one read in flight.
    pub workers: usize,
    /// Slots of device memory for each worker.
    pub slots: usize,
}

impl Default for GdsOptions {
    /// 16 workers with 2 slots each.
    fn default() -> Self {
        Self { workers: 16, slots: 2 }
    }
}

impl GdsOptions {
    /// Bytes of device memory that a read of `blocks` blocks of at most `block` bytes takes for its
    /// slots, beside the destinations.
    #[must_use]
    pub fn device_bytes(&self, blocks: usize, block: u64) -> u64 {
        self.workers.clamp(1, blocks.max(1)) as u64 * worker_bytes(pitch(block), self.slots.max(1))
    }
}

impl GdsOptions {
    /// No more workers and slots than `bytes` of device memory hold for blocks of at most `block` bytes,
    /// but one of each.
    #[must_use]
    pub fn within(self, bytes: u64, block: u64) -> Self {
        let fits = |slots| (bytes / worker_bytes(pitch(block), slots)) as usize;
        let slots = if fits(self.slots) > 0 { self.slots } else { 1 };
        Self { workers: self.workers.min(fits(slots)).max(1), slots }
    }
}

/// Bytes from slot to slot.
fn pitch(block: u64) -> u64 {
    block.next_multiple_of(SLOT_ALIGN) + SLOT_ALIGN
}

/// Bytes of a worker's device memory. Kernels may read a few bytes around their source: there is a
/// margin before and behind. The table of jobs lies behind the slots.
fn worker_bytes(pitch: u64, slots: usize) -> u64 {
    2 * SLOT_ALIGN + pitch * slots as u64 + TABLE_BYTES
}

/// What a read through cuFile did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct GdsStats {
    /// Bytes that came from files.
    pub bytes_read: u64,
    /// Reads made.
    pub reads: u64,
    /// Worker threads.
    pub workers: usize,
}

/// Shared by the workers of one read.
struct Job<'a> {
    cufile: &'static CuFile,
    device: &'a CudaDevice,
    files: &'a [SourceFile],
    handles: Vec<GdsFile<'a>>,
    plan: &'a ReadPlan,
    route: Route<'a>,
    admit: Option<Admit<'a>>,
    control: &'a Control,
    slots: usize,
    next: AtomicUsize,
    failure: Mutex<Option<GdsError>>,
}

/// Reads every block of `plan` and does with it what `route` says; returns when all is done.
///
/// `admit` is asked before a block is read. Told to wait, it returns after a short while: whether
/// there is room by then.
///
/// # Errors
///
/// The first that any worker met.
///
/// # Safety
///
/// What [`Pipeline::submit`](crate::Pipeline::submit) asks of destinations holds, until this
/// returns, for all that `route` names.
#[expect(clippy::too_many_arguments)]
pub unsafe fn read<'a>(
    cufile: &'static CuFile,
    device: &'a CudaDevice,
    files: &'a [SourceFile],
    plan: &'a ReadPlan,
    route: Route<'a>,
    admit: Option<Admit<'a>>,
    options: GdsOptions,
    control: &'a Control,
) -> Result<GdsStats, GdsError> {
    let handles = files
        .iter()
        .map(|file| {
            let local = file.direct().or_else(|| file.buffered()).ok_or_else(not_local)?;
            Ok(cufile.register_file(local)?)
        })
        .collect::<Result<_, GdsError>>()?;
    let workers = options.workers.clamp(1, plan.blocks().len().max(1));
    let job = Job {
        cufile,
        device,
        files,
        handles,
        plan,
        route,
        admit,
        control,
        slots: options.slots.max(1),
        next: AtomicUsize::new(0),
        failure: Mutex::new(None),
    };
    let mut stats = GdsStats { workers, ..GdsStats::default() };
    let totals = Mutex::new((0, 0));
    let work = || match job.work() {
        Ok((bytes, reads)) => {
            let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
            totals.0 += bytes;
            totals.1 += reads;
        }
        Err(error) => job.fail(error),
    };
    std::thread::scope(|scope| {
        for worker in 1..workers {
            let thread = std::thread::Builder::new().name(format!("fst-gds-{worker}"));
            // Fewer threads are slower and still right.
            let _ = thread.spawn_scoped(scope, work);
        }
        work();
    });
    if let Some(error) = job.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    for file in files {
        file.verify_unchanged()?;
    }
    (stats.bytes_read, stats.reads) = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(stats)
}

/// Device memory for one block, and the event behind the work that reads it.
struct Slot {
    place: u64,
    event: Event,
    busy: bool,
    done: Option<Done>,
}

impl Slot {
    /// Waits until the slot's work is done, and says so to whoever asked.
    fn settle(&mut self) -> Result<(), crate::Error> {
        if self.busy {
            self.event.synchronize()?;
            self.busy = false;
            if let Some(done) = self.done.take() {
                done();
            }
        }
        Ok(())
    }
}

/// Ends the read when a worker unwinds: the others would otherwise wait for room that its block was
/// to make.
struct EndOnUnwind<'j, 'a>(&'j Job<'a>);

impl Drop for EndOnUnwind<'_, '_> {
    fn drop(&mut self) {
        self.0.fail(GdsError::Cancelled);
    }
}

impl Job<'_> {
    fn fail(&self, error: GdsError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn work(&self) -> Result<(u64, u64), GdsError> {
        let unwinding = EndOnUnwind(self);
        let result = self.work_off();
        std::mem::forget(unwinding);
        result
    }

    fn work_off(&self) -> Result<(u64, u64), GdsError> {
        let stream = Stream::new(self.device)?;
        let pitch = pitch(self.plan.limits().block);
        let arena = DeviceArena::new(self.device, worker_bytes(pitch, self.slots))?;
        let start = arena.address().next_multiple_of(SLOT_ALIGN) - arena.address() + SLOT_ALIGN;
        let registered = self.cufile.lend_arena(&arena)?;
        let mut slots: Vec<Slot> = (0..self.slots as u64)
            .map(|i| {
                let place = start + i * pitch;
                Ok(Slot { place, event: Event::new(self.device)?, busy: false, done: None })
            })
            .collect::<Result<_, crate::Error>>()?;
        let mut tables = None;
        let result = self.run(&stream, &registered, &mut slots, &mut tables);
        // Whatever happened, nothing may run on the slots when they are freed.
        let drained = stream.synchronize();
        if let Some(tables) = tables.filter(|_| drained.is_err()) {
            tables.leak();
        }
        let totals = result?;
        drained?;
        for slot in &mut slots {
            slot.settle()?;
        }
        Ok(totals)
    }

    fn run(
        &self,
        stream: &Stream,
        registered: &GdsArena,
        slots: &mut [Slot],
        tables: &mut Option<Tables>,
    ) -> Result<(u64, u64), GdsError> {
        let (mut bytes, mut reads) = (0, 0);
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(block) = self.plan.blocks().get(index) else { return Ok((bytes, reads)) };
            if self.failed() {
                return Ok((bytes, reads));
            }
            if self.control.is_cancelled() {
                return Err(GdsError::Cancelled);
            }
            if let Some(admit) = self.admit
                && !self.admitted(admit, block, slots)?
            {
                return Ok((bytes, reads));
            }
            let turn = reads as usize % slots.len();
            let slot = &mut slots[turn];
            slot.settle()?;
            bytes += self
                .read_block(block, registered, slot.place)
                .map_err(|source| self.located(block, source))?;
            self.control.add_landed(block.need);
            reads += 1;
            let Landing { ops, done, .. } = (self.route)(block).map_err(GdsError::Consumer)?;
            let base = registered.arena().address() + slot.place;
            let table = registered.arena().address() + registered.arena().len() - TABLE_BYTES;
            slot.busy = true;
            // SAFETY: the contract of `read`; the slot is settled before it is used again, and the
            // stream is waited for before the slots are freed.
            unsafe { enqueue_on_device(stream, (base, block.len), table, tables, &ops) }
                .and_then(|()| slot.event.record(stream))
                .map_err(|e| self.located(block, e.into()))?;
            slot.done = done;
        }
    }

    /// Waits for room; `false` when the read ends for another reason. Settles this worker's own
    /// slots before it waits, since what they hold may be what is to make room.
    fn admitted(
        &self,
        admit: Admit<'_>,
        block: &Block,
        slots: &mut [Slot],
    ) -> Result<bool, GdsError> {
        if admit(block, false).map_err(GdsError::Consumer)? {
            return Ok(true);
        }
        for slot in slots {
            slot.settle()?;
        }
        while !admit(block, true).map_err(GdsError::Consumer)? {
            if self.failed() {
                return Ok(false);
            }
            if self.control.is_cancelled() {
                return Err(GdsError::Cancelled);
            }
        }
        Ok(true)
    }

    fn read_block(
        &self,
        block: &Block,
        registered: &GdsArena,
        place: u64,
    ) -> Result<u64, CuFileError> {
        let Some(handle) = self.handles.get(block.file as usize) else { return Ok(0) };
        let (offset, len, need) = (block.offset, block.len, block.need);
        let read = handle.read_needed(registered, place, offset, len, need);
        // A block behind the end says nothing about where that is, and what cuFile says of such a read
        // is its own affair.
        let end = || {
            let file = self.files.get(block.file as usize);
            file.and_then(|file| file.buffered()?.metadata().ok()).map(|metadata| metadata.len())
        };
        match read {
            Ok(got) if got >= need => Ok(got),
            Ok(got) => {
                let end = end().unwrap_or(offset + got);
                Err(CuFileError::Short { end, wanted: block.need_end() })
            }
            Err(error) => Err(match end().filter(|end| *end < block.need_end()) {
                Some(end) => CuFileError::Short { end, wanted: block.need_end() },
                None => error,
            }),
        }
    }

    fn located(&self, block: &Block, source: CuFileError) -> GdsError {
        match self.files.get(block.file as usize) {
            Some(file) => {
                GdsError::File { path: file.path().to_owned(), offset: block.offset, source }
            }
            None => source.into(),
        }
    }
}

fn not_local() -> GdsError {
    let reason = "it reads local files only; use auto for others".to_owned();
    fst_io::Error::EngineUnavailable { engine: Engine::Gds, reason }.into()
}
