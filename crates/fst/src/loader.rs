//! The loader: says what to load and where to, and carries it out.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Release},
};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fst_format::{Checkpoint, Dtype, Planned, Request, Selection, TensorInfo};
use fst_gpu::{CachedCopy, DeviceOptions};
use fst_io::{Budget, Engine, ReadOptions};

use crate::device::Device;
use crate::dist::RankOptions;
use crate::error::{Error, Result};
use crate::files::converts;
use crate::load::{Deliver, Goals, Load, resolve_engine};
use crate::progress::{CancelToken, Progress};
use crate::remote;
use crate::report::LoadReport;
use crate::stream::TensorStream;
use crate::tensor::{Tensor, Tensors};
use crate::verify::{Hashed, VERIFY_ARENA, verified};
use fst_format::Manifest;
use fst_io::watch::Watch;

type OnProgress = Arc<dyn Fn(&Progress) + Send + Sync>;

/// How often a load reports its progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// Bytes of an arena: enough for large reads and few mappings, small enough that dropping a part of
/// a model gives memory back.
pub(crate) const ARENA: u64 = 1 << 30;

/// Says what to load and where to, and loads it.
///
/// ```no_run
/// use fst::{Checkpoint, Dtype, Loader};
///
/// let checkpoint = Checkpoint::open("model")?;
/// let tensors = Loader::new()
///     .select("model.layers.0.*")
///     .dtype(Dtype::F32)
///     .load(&checkpoint)?;
/// # Ok::<(), fst::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Loader {
    device: Device,
    pub(crate) selection: Selection,
    pub(crate) read: ReadOptions,
    pub(crate) budget: Option<u64>,
    pub(crate) in_order: bool,
    /// Memory is filled without asking how much there is.
    pub(crate) unchecked: bool,
    pub(crate) stall_timeout: Option<Duration>,
    timeout: Option<Duration>,
    /// Mappings are left to those who touch them.
    pub(crate) lazy: bool,
    pub(crate) manifest: Option<Arc<Manifest>>,
    on_progress: Option<OnProgress>,
    pub(crate) cancel: CancelToken,
    pub(crate) ranks: RankOptions,
    pub(crate) device_options: DeviceOptions,
    /// Bytes of host memory that the process keeps at most.
    pub(crate) keep: u64,
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loader")
            .field("device", &self.device)
            .field("selection", &self.selection)
            .field("read", &self.read)
            .field("budget", &self.budget)
            .field("ranks", &self.ranks)
            .finish_non_exhaustive()
    }
}

impl Loader {
    /// A loader that loads every tensor, as it is, into host memory, by the fastest engine.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where the tensors go, but for those whose [request](fst_format::Request::device) names another device: a load may be
    /// to several, and reads the files once for all of them.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// How bytes get from the files into memory.
    #[must_use]
    pub fn engine(mut self, engine: Engine) -> Self {
        self.read.engine = engine;
        self
    }

    /// Loads only tensors whose name matches a [pattern](crate::Pattern) (`*`, `?`, `[a-z]`,
    /// `{a,b}`, `{0..11}`); with several calls, those that match any. A pattern that is malformed
    /// or matches nothing is an error of the load.
    #[must_use]
    pub fn select(mut self, pattern: impl Into<String>) -> Self {
        self.selection = self.selection.select(pattern);
        self
    }

    /// As [`select`](Self::select), for tensors that need not be there: such a pattern may match nothing.
    #[must_use]
    pub fn select_optional(mut self, pattern: impl Into<String>) -> Self {
        self.selection = self.selection.select_optional(pattern);
        self
    }

    /// Loads only tensors that `wanted` says yes to (and a pattern matches, if there are any).
    #[must_use]
    pub fn select_with(
        mut self,
        wanted: impl Fn(&TensorInfo) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.selection = self.selection.select_with(wanted);
        self
    }

    /// Of tensor `name`, loads only positions `range` of dimension `dim`, unless its
    /// [request](Self::request) has slices of its own. Several calls for one tensor are as several of
    /// [`Request::slice`].
    #[must_use]
    pub fn slice(mut self, name: impl Into<String>, dim: usize, range: Range<usize>) -> Self {
        self.selection = self.selection.slice(name, dim, range);
        self
    }

    /// Converts floating-point tensors to this type of element while they are loaded, as PyTorch's
    /// `Tensor.to(dtype)` does. Tensors of other types stay as they are.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.selection = self.selection.dtype(dtype);
        self
    }

    /// Loads exactly these tensors, each as its request says; with [patterns](Self::select), besides those
    /// that the patterns select. A name is looked up, not searched for. Each tensor may be asked for once,
    /// and names of loaded tensors must differ.
    ///
    /// ```no_run
    /// use fst::{Checkpoint, Dtype, Loader, Request};
    ///
    /// let checkpoint = Checkpoint::open("model")?;
    /// let tensors = Loader::new()
    ///     .dtype(Dtype::BF16)
    ///     .request([
    ///         Request::new("model.norm.weight").dtype(Dtype::F32).named("norm"),
    ///         Request::from("lm_head.weight"),
    ///     ])
    ///     .load(&checkpoint)?;
    /// println!("{:?}", tensors.get("norm")?.dtype());
    /// # Ok::<(), fst::Error>(())
    /// ```
    #[must_use]
    pub fn request<R: Into<Request>>(mut self, requests: impl IntoIterator<Item = R>) -> Self {
        self.selection = self.selection.request(requests);
        self
    }

    /// What would be loaded: after selection, slices, conversion and new names, in the order of the files.
    /// Reads nothing.
    ///
    /// # Errors
    ///
    /// What is wrong with the request.
    pub fn planned(&self, checkpoint: &Checkpoint) -> Result<Vec<Planned>> {
        Ok(self.selection.resolve(checkpoint, &converts)?)
    }

    /// How bytes that the page cache holds get to a device; the
    /// [report](LoadReport::device_copy) says how they did. [Streams](Self::stream) and
    /// [groups](Self::group) stage them.
    #[must_use]
    pub fn cached_copy(mut self, way: CachedCopy) -> Self {
        self.device_options.cached = way;
        self
    }

    /// Whether the pinned memory of a load to a device stays pinned for later loads of the process,
    /// which then start with it; by default it is given back. At most 256 MiB stay, of all ranks of
    /// the process together, until [`fst::gpu::release_kept`](fst_gpu::release_kept).
    #[must_use]
    pub fn keep_pinned(mut self, keep: bool) -> Self {
        self.device_options.keep_pinned = keep;
        self
    }

    /// Has the process keep host memory of the loaded tensors when they are dropped, for the next load that
    /// keeps memory, too: its pages are there already, and are not zeroed again. By default, and with 0, it
    /// goes back to the system.
    ///
    /// No more than `bytes` are kept, of all loads of the process together, until
    /// [`fst::io::release_kept`](fst_io::release_kept); how much a process can spare, its owner knows. Memory
    /// checks count what is kept as available. Loads by [ranks](Self::group) and memory of the caller's use
    /// none of it.
    #[must_use]
    pub fn keep_memory(mut self, bytes: u64) -> Self {
        self.keep = bytes;
        self
    }

    /// Calls `hook` about twenty times a second while a load runs, and once at its end, from a
    /// thread of its own.
    #[must_use]
    pub fn on_progress(mut self, hook: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        self.on_progress = Some(Arc::new(hook));
        self
    }

    /// Ends loads when the token is used.
    #[must_use]
    pub fn cancel(mut self, token: CancelToken) -> Self {
        self.cancel = token;
        self
    }

    /// Records the time of every read, for [`LoadReport::events`].
    #[must_use]
    pub fn trace(mut self, trace: bool) -> Self {
        self.read.trace = trace;
        self
    }

    /// Number of reader threads, instead of one that suits the machine.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.read.workers = Some(workers);
        self
    }

    /// Bounds the memory of a [`stream`](Self::stream), in bytes: tensors that are still held count, and
    /// so does the scratch memory of conversions (on a device also that of cuFile's reads). Host memory of
    /// tensors that are dropped is kept for the next ones until all are read, within the same bound.
    #[must_use]
    pub fn memory_budget(mut self, bytes: u64) -> Self {
        self.budget = Some(bytes);
        self
    }

    /// Whether a load is refused ([`Error::Memory`]) that would fill or pin more host memory than there is,
    /// by [what the system tells](crate::AvailableMemory); it is unless told otherwise. Say no where the
    /// system's figures are known to be wrong: it ends a process that takes too much, without a word.
    #[must_use]
    pub fn check_memory(mut self, check: bool) -> Self {
        self.unchecked = !check;
        self
    }

    /// How long a [`stream`](Self::stream) waits, when nothing is read because tensors that are
    /// still held fill its budget, before it says so ([`Error::Stalled`]); by default 10 s.
    #[must_use]
    pub fn stall_timeout(mut self, timeout: Duration) -> Self {
        self.stall_timeout = Some(timeout);
        self
    }

    /// How long a load may read; one that takes longer ends with [`Error::TimedOut`], whatever it waits for.
    /// Without it, what is not local is asked for again and again within the bounds of
    /// `fst::object::Settings`, which count from the last progress.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Makes a [`stream`](Self::stream) yield tensors in the checkpoint's order.
    #[must_use]
    pub fn in_order(mut self, in_order: bool) -> Self {
        self.in_order = in_order;
        self
    }

    /// Loads the selected tensors and returns when all are usable. In a [group](Self::group), these
    /// are this rank's shards.
    ///
    /// # Errors
    ///
    /// What is wrong with the request, the files or the machine; see [`Error`].
    pub fn load(&self, checkpoint: &Checkpoint) -> Result<Tensors> {
        #[cfg(feature = "dist")]
        if let Some(group) = self.ranks.group()? {
            return self.load_rank(checkpoint, group);
        }
        let began = Instant::now();
        let mut report = self.begin(checkpoint)?;
        let items = self.planned(checkpoint)?;
        let tensors = self.load_items(checkpoint, items, began, &mut report)?;
        report.tensors = tensors.len();
        report.bytes = tensors.iter().map(|t| t.byte_len() as u64).sum();
        Ok(Tensors::new(tensors, report))
    }

    /// The report of a load that begins.
    pub(crate) fn begin(&self, checkpoint: &Checkpoint) -> Result<LoadReport> {
        let engine = resolve_engine(self.read.engine, checkpoint, &self.device)?;
        let mut report = LoadReport::new(engine, self.device.clone());
        report.push("open", checkpoint.open_time(), 0);
        Ok(report)
    }

    /// Loads `items` into memory of their own; the tensors come in the items' order. Planning has
    /// been going on since `began`.
    pub(crate) fn load_items(
        &self,
        checkpoint: &Checkpoint,
        items: Vec<Planned>,
        began: Instant,
        report: &mut LoadReport,
    ) -> Result<Vec<Tensor>> {
        self.check_manifest(checkpoint, &items)?;
        let arena = if self.manifest.is_some() { VERIFY_ARENA } else { ARENA };
        let goals = Goals::new(self, &items)?;
        let load = Load::new(self, checkpoint, items, &goals, arena, None)?;
        load.check_memory(&self.read, !self.unchecked)?;
        report.add_files(load.pieces.files());
        report.push("plan", began.elapsed(), 0);

        let slots: Mutex<Vec<Option<Tensor>>> = Mutex::new(vec![None; load.items().len()]);
        let deliver = |index, tensor| {
            let mut slots = slots.lock().unwrap_or_else(|e| e.into_inner());
            if let Some(slot) = slots.get_mut(index) {
                *slot = Some(tensor);
            }
            Ok(())
        };
        self.read_all(&load, None, &self.watch(), &deliver, report)?;
        let slots = slots.into_inner().unwrap_or_else(|e| e.into_inner());
        let tensors: Option<Vec<Tensor>> = slots.into_iter().collect();
        // Every item is delivered by a read that succeeds; an incomplete set is never handed out.
        tensors.ok_or(Error::Cancelled)
    }

    /// Reads everything, holds it to the manifest if there is one, and adds what it took to `report`.
    pub(crate) fn read_all(
        &self,
        load: &Load,
        budget: Option<&Budget>,
        watch: &Watch,
        deliver: Deliver<'_>,
        report: &mut LoadReport,
    ) -> Result<()> {
        let began = Instant::now();
        let progress = |bytes_done| Progress {
            bytes_done,
            bytes_total: load.pieces.bytes_read(),
            tensors_total: load.items().len(),
            elapsed: began.elapsed(),
        };
        let run = |deliver: Deliver<'_>| {
            self.watched(watch, &progress, || {
                let reads = load.run(&self.read, budget, watch, deliver)?;
                Ok((reads, began.elapsed()))
            })
        };
        let hashed = Hashed::default();
        let (reads, took) = match &self.manifest {
            Some(manifest) => verified(manifest, &hashed, watch, deliver, run)?,
            None => run(deliver)?,
        };
        report.push("read", took, load.pieces.bytes_read());
        report.add_reads(&reads);
        report.add_device_copy(load.pieces.device_copy());
        if self.manifest.is_some() {
            hashed.report(report);
        }
        remote::loaded(&load.checkpoint, report);
        Ok(())
    }

    /// Loads the selected tensors and hands each out as soon as it is complete, keeping what is in
    /// memory within the [budget](Self::memory_budget) (by default 2 GiB, or half of what is available
    /// on the host or the device that it loads to, where that is less).
    ///
    /// Tensors come in no particular order unless [`in_order`](Self::in_order) is set. Those that
    /// are still held count against the budget, so holding them holds the reader back. Dropping the
    /// stream ends the load.
    ///
    /// # Errors
    ///
    /// What is wrong with the request; [`Error::Budget`] names the smallest budget that works.
    pub fn stream(&self, checkpoint: &Checkpoint) -> Result<TensorStream> {
        #[cfg(feature = "dist")]
        if let Some(group) = self.ranks.group()? {
            return self.start_rank(checkpoint, group).map(TensorStream::of);
        }
        TensorStream::start(self, checkpoint, self.planned(checkpoint)?)
    }

    /// A loader into host memory, as this one would, of what it is asked for.
    pub(crate) fn to_host(&self) -> Self {
        Self {
            selection: self.selection.clone(),
            read: self.read.clone(),
            unchecked: self.unchecked,
            cancel: self.cancel.clone(),
            ..Self::default()
        }
    }

    pub(crate) fn target(&self) -> &Device {
        &self.device
    }

    /// What follows a load on the caller's thread.
    pub(crate) fn watch(&self) -> Watch {
        Watch::background(self.cancel.flag(), false)
    }

    /// Runs `load` while another thread reports progress, and ends it when it takes too long.
    pub(crate) fn watched<T>(
        &self,
        watch: &Watch,
        progress: &(dyn Fn(u64) -> Progress + Sync),
        load: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if self.on_progress.is_none() && self.timeout.is_none() {
            return load();
        }
        let (done, late) = (AtomicBool::new(false), AtomicBool::new(false));
        let until = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        std::thread::scope(|scope| {
            let reporter = std::thread::Builder::new().name("fst-progress".to_owned());
            let reporter = reporter.spawn_scoped(scope, || {
                let _own = watch.enter();
                loop {
                    std::thread::park_timeout(PROGRESS_INTERVAL);
                    // Asked first, so that the last call sees all that was done.
                    let last = done.load(Acquire);
                    if let Some(hook) = &self.on_progress {
                        hook(&progress(watch.bytes()));
                    }
                    if last {
                        break;
                    }
                    if until.is_some_and(|until| Instant::now() >= until) {
                        late.store(true, Release);
                        watch.stop();
                    }
                }
            });
            // Also when `load` panics: the scope waits for the reporter.
            let stop = Stop(&done, reporter.as_ref().ok().map(|reporter| reporter.thread()));
            let loaded = load();
            drop(stop);
            if let Ok(reporter) = reporter
                && let Err(panic) = reporter.join()
            {
                std::panic::resume_unwind(panic);
            }
            match (loaded, self.timeout) {
                (Err(Error::Cancelled), Some(after)) if late.load(Acquire) => {
                    Err(Error::TimedOut { after })
                }
                (loaded, _) => loaded,
            }
        })
    }
}

/// Ends the progress reporter when dropped.
struct Stop<'a>(&'a AtomicBool, Option<&'a std::thread::Thread>);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Release);
        if let Some(reporter) = self.1 {
            reporter.unpark();
        }
    }
}
