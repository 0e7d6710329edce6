//! Tensors that are read in the background and handed out by name, or as they land.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
#[cfg(feature = "dist")]
use std::sync::OnceLock;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fst_format::{Checkpoint, Planned};
use fst_io::Budget;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::locate;
use crate::load::{Goals, Load};
use crate::loader::{ARENA, Loader};
use crate::progress::CancelToken;
use crate::report::LoadReport;
use crate::tensor::Tensor;
use crate::verify::VERIFY_ARENA;
use fst_io::available::{self, AvailableMemory};
use fst_io::watch::Watch;

/// The budget of a stream when none was set, in bytes: 2 GiB, or half of what there is where that is
/// less.
pub(crate) fn default_budget(devices: &[Device]) -> u64 {
    let available = devices.iter().filter_map(|device| match device.as_cuda() {
        None => AvailableMemory::now().map(|available| available.bytes),
        Some(cuda) => cuda.memory().ok().map(|memory| memory.free),
    });
    (2 << 30).min(available.min().unwrap_or(u64::MAX) / 2)
}

/// Bytes of an arena where the budget is tight, or tensors are asked for by name.
const SHORT_ARENA: u64 = 1 << 20;

/// How long nothing may be read, while a reader waits for memory that held tensors occupy, before
/// that is said, unless the loader was told otherwise.
pub(crate) const STALL: Duration = Duration::from_secs(10);

/// How often one who waits looks at the cancel token and for a stall.
const TICK: Duration = Duration::from_millis(50);
const SHORTEST_TICK: Duration = Duration::from_millis(1);

/// A load that goes on in the background; see [`Loader::start`].
///
/// Tensors are read in the order of the files, except that one that somebody waits for is read before all
/// others: within a [budget](Loader::memory_budget) as soon as that has room for it, and not where tensors keep to
/// [an order](Loader::in_order). Clones are handles of one load, for any thread. When the last of them is dropped
/// the load ends; tensors that were handed out stay.
///
/// ```no_run
/// use fst::{Checkpoint, Loader};
///
/// let checkpoint = Checkpoint::open("model")?;
/// let loading = Loader::new().start(&checkpoint)?;
/// // Each as soon as it is there, in the order in which the model is built:
/// let embedding = loading.take("model.embed_tokens.weight")?;
/// let norm = loading.take("model.norm.weight")?;
/// println!("{:?} {:?}", embedding.shape(), norm.shape());
/// let report = loading.finish()?; // all is read, and no file changed meanwhile
/// # Ok::<(), fst::Error>(())
/// ```
#[derive(Clone)]
pub struct Loading {
    reading: Arc<Reading>,
}

/// What the handles of a load share. Dropping it ends the load.
struct Reading {
    table: Arc<Table>,
    thread: Option<JoinHandle<()>>,
}

/// Asks for a tensor, by its place among the items, to be read before others.
type Prefer = Box<dyn Fn(usize) + Send + Sync>;

/// What has landed, and who waits for it.
struct Table {
    by_name: HashMap<Box<str>, usize>,
    byte_len: u64,
    /// Where tensors keep to the order of the items.
    in_order: bool,
    budget: Option<Budget>,
    watch: Arc<Watch>,
    cancel: CancelToken,
    stall_timeout: Duration,
    prefer: Prefer,
    /// Bytes of the budget for what nobody has asked for by name, where that is less than all.
    ahead: Option<u64>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    slots: Vec<Slot>,
    /// Those that landed, in that order; some of them are taken.
    landed: VecDeque<usize>,
    /// Tensors that nobody has taken yet, and the first that may be left.
    left: usize,
    first: usize,
    /// How reading ended, once it has.
    end: Option<Result<LoadReport, Arc<Error>>>,
}

enum Slot {
    Coming { preferred: bool },
    Here(Tensor),
    Taken,
}

impl State {
    /// Takes a tensor out, if it is there.
    fn take(&mut self, index: usize) -> Option<Tensor> {
        let slot = self.slots.get_mut(index)?;
        if !matches!(slot, Slot::Here(_)) {
            return None;
        }
        self.left -= 1;
        match std::mem::replace(slot, Slot::Taken) {
            Slot::Here(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// Takes the next tensor out: the one that landed first, or the first of all.
    fn take_next(&mut self, in_order: bool) -> Option<Tensor> {
        if in_order {
            while let Some(Slot::Taken) = self.slots.get(self.first) {
                self.first += 1;
            }
            return self.take(self.first);
        }
        while let Some(index) = self.landed.pop_front() {
            if let Some(tensor) = self.take(index) {
                return Some(tensor);
            }
        }
        None
    }
}

impl Table {
    /// Of tensors with these names and bytes, none of which has landed.
    fn new(loader: &Loader, watch: Arc<Watch>, tensors: Vec<(Box<str>, u64)>) -> Self {
        let left = tensors.len();
        let byte_len = tensors.iter().map(|(_, bytes)| *bytes).sum();
        let by_name = tensors.into_iter().enumerate().map(|(index, (name, _))| (name, index));
        Self {
            by_name: by_name.collect(),
            byte_len,
            in_order: loader.in_order,
            budget: None,
            watch,
            cancel: loader.cancel.clone(),
            stall_timeout: loader.stall_timeout.unwrap_or(STALL),
            prefer: Box::new(|_| {}),
            ahead: None,
            state: Mutex::new(State {
                slots: (0..left).map(|_| Slot::Coming { preferred: false }).collect(),
                landed: VecDeque::new(),
                left,
                first: 0,
                end: None,
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Has the tensor at `index` read before others, once.
    fn prefer(&self, index: usize) {
        let mut wanted = false;
        if let Some(Slot::Coming { preferred }) = self.state().slots.get_mut(index) {
            wanted = !std::mem::replace(preferred, true);
        }
        if !wanted {
            return;
        }
        (self.prefer)(index);
        if let Some(budget) = &self.budget {
            budget.set_ahead(self.ahead.unwrap_or(budget.limit()));
            // Who waits for memory looks for what is preferred.
            budget.wake();
        }
    }

    /// Takes out what `ready` finds, as for [`wait`](Self::wait), by whatever name: all of the budget is for
    /// what is read in order.
    fn wait_for_any<T>(
        &self,
        until: Option<Instant>,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<Option<T>> {
        self.wait(until, |state| {
            let found = ready(state);
            if let Some(budget) = self.budget.as_ref().filter(|_| found.is_none()) {
                budget.set_ahead(budget.limit());
            }
            found
        })
    }

    /// A tensor has landed.
    fn put(&self, index: usize, tensor: Tensor) {
        let mut state = self.state();
        if let Some(slot @ Slot::Coming { .. }) = state.slots.get_mut(index) {
            *slot = Slot::Here(tensor);
            state.landed.push_back(index);
        }
        drop(state);
        self.changed.notify_all();
    }

    fn end(&self, end: Result<LoadReport>) {
        self.state().end = Some(end.map_err(Arc::new));
        self.changed.notify_all();
    }

    /// Waits until `ready` has something, reading has ended, or it is `until`. `None` in the latter two
    /// cases, unless reading ended with an error.
    fn wait<T>(
        &self,
        until: Option<Instant>,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<Option<T>> {
        let (mut bytes, mut since) = (self.watch.bytes(), Instant::now());
        let mut state = self.state();
        loop {
            if self.cancel.is_cancelled() && !matches!(state.end, Some(Ok(_))) {
                return Err(Error::Cancelled);
            }
            if let Some(found) = ready(&mut state) {
                return Ok(Some(found));
            }
            if let Some(end) = &state.end {
                return end.as_ref().map(|_| None).map_err(|error| match **error {
                    Error::Cancelled => Error::Cancelled,
                    _ => Error::Failed(error.clone()),
                });
            }
            let now = Instant::now();
            let left = until.map_or(TICK, |until| until.saturating_duration_since(now));
            if left.is_zero() {
                return Ok(None);
            }
            let tick = TICK.min(self.stall_timeout.max(SHORTEST_TICK)).min(left);
            state = match self.changed.wait_timeout(state, tick) {
                Ok((state, _)) => state,
                Err(poison) => poison.into_inner().0,
            };
            // One reader may wait for memory while another waits for slow storage, or while what fills
            // the memory is hashed.
            let now = self.watch.bytes();
            if now != bytes || self.watch.is_working() {
                (bytes, since) = (now, Instant::now());
            }
            let waited = since.elapsed();
            if let Some(budget) = &self.budget
                && waited > self.stall_timeout
                && budget.waiting() > 0
            {
                // What `ready` takes out is nowhere else.
                return match ready(&mut state) {
                    Some(found) => Ok(Some(found)),
                    None => Err(Error::Stalled { budget: budget.limit(), waited }),
                };
            }
        }
    }

    /// The tensor at `index`, once it is there, as `found` takes it.
    fn get(
        &self,
        name: &str,
        index: usize,
        mut found: impl FnMut(&mut State) -> Option<Tensor>,
    ) -> Result<Tensor> {
        self.prefer(index);
        let taken = || Error::Taken { tensor: name.to_owned() };
        let tensor = self.wait(None, |state| match state.slots.get(index) {
            Some(Slot::Here(_)) => found(state).map(Ok),
            Some(Slot::Coming { .. }) => None,
            Some(Slot::Taken) | None => Some(Err(taken())),
        })?;
        // Every tensor lands in a read that succeeds.
        tensor.unwrap_or(Err(Error::Cancelled))
    }

    /// Ends reading as soon as may be, and forgets what has landed.
    fn close(&self) {
        self.watch.stop();
        if let Some(budget) = &self.budget {
            budget.close();
        }
        let mut state = self.state();
        let slots = std::mem::take(&mut state.slots);
        (state.left, state.landed) = (0, VecDeque::new());
        drop(state);
        drop(slots);
    }
}

impl Reading {
    /// Has `run` read on a thread of its own.
    fn start(
        table: Arc<Table>,
        run: impl FnOnce(&Table) -> Result<LoadReport> + Send + 'static,
    ) -> Result<Self> {
        let own = table.clone();
        let thread = spawn(move || {
            let _own = own.watch.enter();
            let end = caught(|| run(&own));
            // Nothing more is asked for: what tensors leave behind is of no use any more.
            if let Some(budget) = &own.budget {
                budget.close();
            }
            own.end(end);
        })?;
        Ok(Self { table, thread: Some(thread) })
    }
}

/// Starts the thread of a load.
fn spawn(read: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name("fst-loading".to_owned()).spawn(read);
    thread
        .map_err(|source| fst_io::Error::Setup { what: "the reader thread", source })
        .map_err(|e| locate(e, &[]))
}

/// What `run` returns; a panic is an error.
fn caught<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(Error::Panicked { message: message_of(&*panic) }))
}

impl Drop for Reading {
    /// Waits until no read is in flight; unless a closure of the user's drops the last handle, on a thread
    /// of this very load, which then ends by itself.
    fn drop(&mut self) {
        self.table.close();
        if let Some(thread) = self.thread.take()
            && !self.table.watch.is_entered()
        {
            let _ = thread.join();
        }
    }
}

impl Loading {
    /// Starts loading `items` to `goals` as `loader` says, within a budget if there is one. With `by_name`, those
    /// that somebody waits for are read first.
    pub(crate) fn of_items(
        loader: &Loader,
        checkpoint: &Checkpoint,
        items: Vec<Planned>,
        goals: &Goals,
        budget: Option<u64>,
        by_name: bool,
    ) -> Result<Self> {
        let began = Instant::now();
        let mut report = loader.begin(checkpoint)?;
        loader.check_manifest(checkpoint, &items)?;
        let may_prefer = by_name && (budget.is_none() || !loader.in_order);
        let (load, budget, ahead) = match budget {
            None => {
                let load = Load::new(loader, checkpoint, items, goals, VERIFY_ARENA, None)?;
                load.check_memory(&loader.read, !loader.unchecked)?;
                (load, None, None)
            }
            Some(limit) => {
                let (load, left) = within(loader, checkpoint, &items, goals, limit, may_prefer)?;
                let ahead = may_prefer.then(|| read_ahead(&load, left)).flatten();
                let budget = Budget::keeping(left, loader.keep);
                budget.set_ahead(ahead.unwrap_or(left));
                (load, Some(budget), ahead)
            }
        };
        report.add_files(load.pieces.files());
        report.push("plan", began.elapsed(), 0);

        let load = Arc::new(load);
        let watch = Arc::new(Watch::background(loader.cancel.flag(), may_prefer));
        let prefer = {
            // Files are open as long as they are read.
            let (load, watch) = (Arc::downgrade(&load), watch.clone());
            move |index| {
                if let Some(load) = load.upgrade().filter(|_| may_prefer) {
                    load.pieces.prefer(index, &watch);
                }
            }
        };
        let tensors = load.items().iter().map(|item| (item.name().into(), item.byte_len()));
        let table = Table::new(loader, watch, tensors.collect());
        let table = Arc::new(Table { budget, ahead, prefer: Box::new(prefer), ..table });
        let loader = loader.clone();
        let run = move |table: &Table| {
            let deliver = |index: usize, tensor: Tensor| {
                table.put(index, tensor);
                Ok(())
            };
            let budget = table.budget.as_ref();
            loader.read_all(&load, budget, &table.watch, &deliver, &mut report)?;
            (report.tensors, report.bytes) = (load.items().len(), table.byte_len);
            Ok(report)
        };
        let reading = Reading::start(table, run)?;
        Ok(Self { reading: Arc::new(reading) })
    }

    /// Starts a load whose own thread finds out which tensors it brings: `read` is given what follows it, takes
    /// their names and bytes first, and delivers each by its place among these.
    #[cfg(feature = "dist")]
    pub(crate) fn planned_by(
        loader: &Loader,
        read: impl FnOnce(
            &Watch,
            &dyn Fn(Vec<(String, u64)>),
            &(dyn Fn(usize, Tensor) + Sync),
        ) -> Result<LoadReport>
        + Send
        + 'static,
    ) -> Result<Self> {
        let watch = Arc::new(Watch::background(loader.cancel.flag(), false));
        let (tell, told) = std::sync::mpsc::channel::<Result<Arc<Table>>>();
        let loader = loader.clone();
        let thread = spawn(move || {
            let _own = watch.enter();
            let table: OnceLock<Arc<Table>> = OnceLock::new();
            let planned = |tensors: Vec<(String, u64)>| {
                let tensors = tensors.into_iter().map(|(name, bytes)| (name.into(), bytes));
                let new = Arc::new(Table::new(&loader, watch.clone(), tensors.collect()));
                // Who started the load waits for this.
                let _ = tell.send(Ok(table.get_or_init(|| new).clone()));
            };
            let deliver = |index: usize, tensor: Tensor| {
                if let Some(table) = table.get() {
                    table.put(index, tensor);
                }
            };
            let end = caught(|| read(&watch, &planned, &deliver));
            match (table.get(), end) {
                (Some(table), end) => table.end(end),
                (None, end) => drop(tell.send(end.and(Err(Error::Cancelled)))),
            }
        })?;
        match told.recv().unwrap_or(Err(Error::Cancelled)) {
            Ok(table) => Ok(Self { reading: Arc::new(Reading { table, thread: Some(thread) }) }),
            Err(error) => {
                let _ = thread.join();
                Err(error)
            }
        }
    }

    fn table(&self) -> &Table {
        &self.reading.table
    }

    fn index(&self, name: &str) -> Result<usize> {
        let index = self.table().by_name.get(name).copied();
        index.ok_or_else(|| Error::UnknownTensor { name: name.to_owned() })
    }

    /// The tensor of this name, as soon as it is there; shared with those who ask again. It stays in
    /// memory as long as a handle of this load lives: [`take`](Self::take) what nobody asks for twice.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTensor`], [`Error::Taken`], [`Error::Stalled`] where tensors that nobody takes fill
    /// the budget, or why the load ended ([`Error::Failed`]).
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let index = self.index(name)?;
        self.table().get(name, index, |state| match state.slots.get(index) {
            Some(Slot::Here(tensor)) => Some(tensor.clone()),
            _ => None,
        })
    }

    /// As [`get`](Self::get), and hands the tensor over: nobody gets it again.
    ///
    /// # Errors
    ///
    /// As for [`get`](Self::get).
    pub fn take(&self, name: &str) -> Result<Tensor> {
        let index = self.index(name)?;
        self.table().get(name, index, |state| state.take(index))
    }

    /// The tensor of this name if it is there already, as by [`get`](Self::get); if not, it is read before
    /// others.
    ///
    /// # Errors
    ///
    /// As for [`get`](Self::get).
    pub fn try_get(&self, name: &str) -> Result<Option<Tensor>> {
        let index = self.index(name)?;
        self.table().prefer(index);
        let now = Some(Instant::now());
        let found = self.table().wait(now, |state| match state.slots.get(index) {
            Some(Slot::Here(tensor)) => Some(Ok(tensor.clone())),
            Some(Slot::Coming { .. }) => None,
            Some(Slot::Taken) | None => Some(Err(Error::Taken { tensor: name.to_owned() })),
        })?;
        found.transpose()
    }

    /// Takes the tensor that landed first of those that nobody took, or with
    /// [`in_order`](Loader::in_order) the first in the checkpoint's order; waits for one. `None` when all
    /// are taken and the load has ended well: that files did not change meanwhile is known only behind
    /// the last tensor.
    ///
    /// After [`Error::Stalled`] the load goes on where it was; any other error is its end.
    #[allow(clippy::should_implement_trait, reason = "many threads may ask one load")]
    pub fn next(&self) -> Option<Result<Tensor>> {
        let table = self.table();
        table.wait_for_any(None, |state| state.take_next(table.in_order)).transpose()
    }

    /// As [`next`](Self::next), but waits no longer than `timeout`: `None` also when nothing landed until
    /// then, while tensors [remain](Self::remaining).
    ///
    /// # Errors
    ///
    /// As for [`get`](Self::get).
    pub fn next_timeout(&self, timeout: Duration) -> Result<Option<Tensor>> {
        let table = self.table();
        let until = Instant::now().checked_add(timeout);
        table.wait_for_any(until, |state| state.take_next(table.in_order))
    }

    /// Waits until all is read and the files are known not to have changed meanwhile. Tensors that were
    /// not taken stay here. Where a [budget](Loader::memory_budget) holds less than all of them, others
    /// must take them meanwhile.
    ///
    /// # Errors
    ///
    /// As for [`get`](Self::get).
    pub fn finish(&self) -> Result<LoadReport> {
        let ended = |state: &mut State| match &state.end {
            Some(Ok(report)) => Some(report.clone()),
            _ => None,
        };
        self.table().wait(None, ended)?.ok_or(Error::Cancelled)
    }

    /// What the load did: `None` until it has ended well.
    pub fn report(&self) -> Option<LoadReport> {
        match &self.table().state().end {
            Some(Ok(report)) => Some(report.clone()),
            _ => None,
        }
    }

    /// Ends the load; whoever waits for a tensor gets [`Error::Cancelled`]. What has landed stays here.
    pub fn cancel(&self) {
        self.table().watch.stop();
        if let Some(budget) = &self.table().budget {
            budget.close();
        }
    }

    /// Whether a tensor of this name is loaded.
    pub fn contains(&self, name: &str) -> bool {
        self.table().by_name.contains_key(name)
    }

    /// Tensors that nobody has taken, those to come included.
    pub fn remaining(&self) -> usize {
        self.table().state().left
    }

    /// Bytes of all its tensors, those that are taken included.
    pub fn byte_len(&self) -> u64 {
        self.table().byte_len
    }

    /// The most bytes of tensor memory that were in use at once within the budget, so far; 0 without one.
    /// What dropped tensors left for the next ones is not in use.
    pub fn peak_bytes(&self) -> u64 {
        self.table().budget.as_ref().map_or(0, Budget::peak)
    }

    /// Ends the load, and forgets what has landed.
    pub(crate) fn close(&self) {
        self.table().close();
    }

    /// Gives up this load's own hold on the error that ended it.
    pub(crate) fn forget_error(&self) {
        let end = &mut self.table().state().end;
        if let Some(Err(_)) = end {
            *end = Some(Err(Arc::new(Error::Cancelled)));
        }
    }
}

impl fmt::Debug for Loading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loading").field("remaining", &self.remaining()).finish_non_exhaustive()
    }
}

impl Loader {
    /// Starts loading the selected tensors in the background, and returns at once: they are there to
    /// [get](Loading::get) by name, in any order and from any thread, while later ones are read. Without
    /// a [budget](Self::memory_budget) all of them are read, whether somebody asks for them or not. With
    /// one, half of it is for tensors that nobody has asked for yet, if that holds the largest, and the
    /// rest for those that somebody waits for; short ones bring neighbours with them, of a mebibyte in host
    /// memory, and of an eighth of the budget on a device. Reading stops where tensors that are held, or were read and not taken, leave
    /// no room: whoever asks for another then waits until some are dropped, or gets [`Error::Stalled`]. Who
    /// takes tensors by [`next`](Loading::next) has all of the budget read ahead.
    ///
    /// # Errors
    ///
    /// What is wrong with the request, and what of the files shows before they are read; the rest is told
    /// to those who ask for tensors.
    pub fn start(&self, checkpoint: &Checkpoint) -> Result<Loading> {
        #[cfg(feature = "dist")]
        if let Some(group) = self.ranks.group()? {
            return self.start_rank(checkpoint, group);
        }
        let items = self.planned(checkpoint)?;
        let goals = Goals::new(self, &items)?;
        Loading::of_items(self, checkpoint, items, &goals, self.budget, true)
    }
}

/// A load within `limit` bytes, and what of these is left for tensors. What is asked for by name brings few
/// neighbours into host memory.
fn within(
    loader: &Loader,
    checkpoint: &Checkpoint,
    items: &[Planned],
    goals: &Goals,
    limit: u64,
    by_name: bool,
) -> Result<(Load, u64)> {
    let plan = |arena| -> Result<(Load, u64)> {
        let (items, in_order) = (items.to_vec(), loader.in_order);
        let mut load = Load::new(loader, checkpoint, items, goals, arena, Some(in_order))?;
        load.pieces.keep_within(limit, in_order);
        let needed = load.pieces.least_memory(in_order) + load.pieces.scratch(&loader.read, true);
        Ok((load, needed))
    };
    let arena = (limit / 8).clamp(SHORT_ARENA, ARENA / 4);
    // Giving memory of a device back makes it wait: there tensors share more of it.
    let to_host = goals.devices.iter().all(Device::is_host);
    let arena = if by_name && to_host { SHORT_ARENA } else { arena };
    let (mut load, mut needed) = plan(arena)?;
    if limit < needed {
        // The shortest arenas need the least.
        (load, needed) = plan(SHORT_ARENA)?;
    }
    if limit < needed {
        return Err(Error::Budget { budget: limit, needed });
    }
    let memory = load.pieces.host_memory(&loader.read, Some(limit));
    available::check(!loader.unchecked, memory, loader.keep > 0)?;
    let left = limit - load.pieces.scratch(&loader.read, true);
    Ok((load, left))
}

/// Bytes of a budget that are for what nobody has asked for: half, so that who asks for a tensor finds room for
/// it. `None` where there is room for all, or none for two arenas.
fn read_ahead(load: &Load, budget: u64) -> Option<u64> {
    let largest = load.pieces.least_memory(false);
    let all: u64 = load.items().iter().map(Planned::byte_len).sum();
    let ahead = (budget / 2).max(largest);
    (all > budget && budget - ahead.min(budget) >= largest).then_some(ahead)
}

/// What a panic said.
fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

    use super::*;

    /// A load of so many tensors, whose reader does this.
    fn loading_of(
        tensors: usize,
        run: impl FnOnce(&Table) -> Result<LoadReport> + Send + 'static,
    ) -> Loading {
        let tensors = (0..tensors).map(|index| (format!("t{index}").into(), 0)).collect();
        let table = Table::new(&Loader::new(), Arc::default(), tensors);
        Loading { reading: Arc::new(Reading::start(Arc::new(table), run).unwrap()) }
    }

    #[test]
    fn a_panic_of_the_reader_is_not_a_cancelled_load() {
        // Before the last tensor, and behind it.
        for tensors in [1, 0] {
            let loading = loading_of(tensors, |_| panic!("out of {}", "paper"));
            let Error::Failed(error) = loading.next().unwrap().unwrap_err() else { panic!() };
            assert!(matches!(&*error, Error::Panicked { message } if message == "out of paper"));
        }
    }

    #[test]
    fn all_who_wait_get_the_error() {
        let loading = loading_of(2, |_| Err(Error::UnknownTensor { name: "x".to_owned() }));
        std::thread::scope(|scope| {
            for name in ["t0", "t1", "t0"] {
                let loading = loading.clone();
                scope.spawn(move || {
                    let error = loading.get(name).unwrap_err();
                    assert!(matches!(&error, Error::Failed(_)), "{error}");
                    assert_eq!(error.to_string(), "no tensor named \"x\"");
                });
            }
        });
        assert!(loading.finish().is_err() && loading.try_get("t1").is_err());
        assert!(matches!(loading.get("t2"), Err(Error::UnknownTensor { .. })));
    }
}
