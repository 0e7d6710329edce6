//! The table of tensors: what is read ahead by a thread in the background, what is there, and what the
//! thread that asks reads by itself.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use candle_core::{DType, Device, Error, Tensor};
use fst::{CancelToken, Checkpoint, Loader, Reader, Request, TensorInfo};

use crate::dtype::Way;
use crate::error::{self, wrapped};
use crate::memory;
use crate::weights::{OnProgress, Progress, Repeats};

/// Bytes that one load in the background reads: enough that its beginning and end cost little, and few
/// enough that whoever waits for a tensor does not wait for many others.
const BATCH: u64 = 128 << 20;

/// Up to this many bytes of a file are read by the thread that asks for them.
const SMALL: u64 = 1 << 20;

/// The part of a tensor that is loaded: positions of a dimension.
pub(crate) type Part = Option<(usize, std::ops::Range<usize>)>;

/// A tensor of the checkpoint, as it is read ahead.
#[derive(Debug)]
struct Entry {
    info: TensorInfo,
    /// How it becomes one of candle's of the type that the builder is for; `None` if it cannot.
    way: Option<Way>,
    /// Read before somebody asks.
    ahead: bool,
}

#[derive(Debug)]
enum Slot {
    /// Nobody reads it.
    Waiting,
    /// Somebody reads it.
    Reading,
    Here(Tensor),
    /// It was handed over.
    Gone,
}

struct State {
    slots: Vec<Slot>,
    /// Which tensors `unasked` counts.
    counted: Vec<bool>,
    /// Asked for, and to be read before others.
    wanted: VecDeque<usize>,
    /// Where reading goes on.
    next: usize,
    /// Tensors to read ahead that nobody has begun to read.
    waiting: usize,
    /// Bytes that are read, or are being read, and that nobody has asked for.
    unasked: u64,
    /// Why reading in the background ended early.
    failed: Option<Arc<str>>,
}

/// A tensor, or a part of it, to be read.
pub(crate) struct Want<'n> {
    pub(crate) name: &'n str,
    pub(crate) way: Way,
    pub(crate) part: Part,
    /// Its shape and its bytes once it is read.
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: usize,
}

/// What to read, and how.
pub(crate) struct Plan {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) loader: Loader,
    /// The type that tensors are asked for in; `None` for that of each in the files.
    pub(crate) dtype: Option<DType>,
    pub(crate) device: Device,
    pub(crate) budget: Option<u64>,
    pub(crate) repeats: Repeats,
    pub(crate) on_progress: Option<OnProgress>,
}

/// Of the tensors that are read ahead, what is done and what there is to do.
#[derive(Debug)]
struct Done {
    bytes: AtomicU64,
    bytes_total: u64,
    tensors: AtomicUsize,
    tensors_total: usize,
}

impl Done {
    /// How far reading is, with so many bytes of tensors that are not complete.
    fn progress(&self, more: u64) -> Progress {
        Progress {
            bytes_done: self.bytes.load(Relaxed) + more,
            bytes_total: self.bytes_total,
            tensors_done: self.tensors.load(Relaxed),
            tensors_total: self.tensors_total,
        }
    }
}

/// What the thread and those who ask share.
struct Table {
    plan: Plan,
    reader: Reader,
    cancel: CancelToken,
    entries: Vec<Entry>,
    by_name: HashMap<Box<str>, usize>,
    done: Arc<Done>,
    state: Mutex<State>,
    /// Something landed, or reading ended.
    landed: Condvar,
    /// There is something to read.
    wake: Condvar,
}

/// Tensors that are read in the background. Dropping it ends reading.
pub(crate) struct Background {
    table: Arc<Table>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = &self.table;
        f.debug_struct("Background")
            .field("checkpoint", &table.plan.checkpoint)
            .finish_non_exhaustive()
    }
}

impl Background {
    /// Starts to read what `ahead` says yes to.
    pub(crate) fn start(plan: Plan, ahead: &dyn Fn(&TensorInfo) -> bool) -> fst::Result<Self> {
        let table = Table::new(plan, ahead);
        table.check_memory()?;
        let table = Arc::new(table);
        let mut thread = None;
        if table.done.tensors_total > 0 {
            let own = table.clone();
            let read = move || own.read_ahead();
            let spawned = std::thread::Builder::new().name("fst-candle".to_owned()).spawn(read);
            let failed = |source| fst::io::Error::Setup { what: "the reader thread", source };
            thread = Some(spawned.map_err(failed)?);
        }
        Ok(Self { table, thread })
    }

    /// Whether the checkpoint has a tensor of this name.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.table.by_name.contains_key(name)
    }

    /// The shape of a tensor in the checkpoint.
    pub(crate) fn shape(&self, name: &str) -> candle_core::Result<&[usize]> {
        Ok(self.table.entry(name)?.1.info.shape())
    }

    /// A tensor, or a part of it, once it is there.
    pub(crate) fn get(
        &self,
        name: &str,
        part: Part,
        dtype: Option<DType>,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.table.get(name, part, dtype, device)
    }
}

impl Drop for Background {
    /// Waits until no read is in flight.
    fn drop(&mut self) {
        self.table.cancel.cancel();
        // Between its look at the token and its wait, the thread holds the state.
        drop(self.table.state());
        self.table.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            // A progress hook may own the last handle.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Table {
    fn new(plan: Plan, ahead: &dyn Fn(&TensorInfo) -> bool) -> Self {
        let entries: Vec<Entry> = plan
            .checkpoint
            .tensors()
            .iter()
            .map(|info| {
                let way = Way::new(info.dtype(), plan.dtype);
                Entry { way, ahead: way.is_some() && ahead(info), info: info.clone() }
            })
            .collect();
        let by_name = entries.iter().enumerate();
        let by_name = by_name.map(|(index, entry)| (entry.info.name().into(), index)).collect();
        let of_ahead = || entries.iter().filter(|entry| entry.ahead);
        let cancel = CancelToken::new();
        let loader = plan.loader.clone().cancel(cancel.clone());
        Self {
            reader: loader.reader(&plan.checkpoint),
            cancel,
            by_name,
            done: Arc::new(Done {
                bytes: AtomicU64::new(0),
                bytes_total: of_ahead().map(|entry| entry.info.byte_len()).sum(),
                tensors: AtomicUsize::new(0),
                tensors_total: of_ahead().count(),
            }),
            state: Mutex::new(State {
                slots: entries.iter().map(|_| Slot::Waiting).collect(),
                counted: vec![false; entries.len()],
                wanted: VecDeque::new(),
                next: 0,
                waiting: of_ahead().count(),
                unasked: 0,
                failed: None,
            }),
            landed: Condvar::new(),
            wake: Condvar::new(),
            plan: Plan { loader, ..plan },
            entries,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn entry(&self, name: &str) -> candle_core::Result<(usize, &Entry)> {
        let found =
            self.by_name.get(name).and_then(|index| Some((*index, self.entries.get(*index)?)));
        found.ok_or_else(|| error::unknown(name))
    }

    /// Refuses to read ahead more than there is memory for, unless a budget bounds it.
    fn check_memory(&self) -> fst::Result<()> {
        if self.plan.budget.is_some() || !matches!(self.plan.device, Device::Cpu) {
            return Ok(());
        }
        let needed = self.entries.iter().filter(|entry| entry.ahead).map(Entry::loaded_bytes).sum();
        Ok(fst::io::available::check(true, needed, false)?)
    }

    /// Reads ahead until all is read, nobody asks any more, or reading fails.
    fn read_ahead(&self) {
        let mut batch = Vec::new();
        while self.next_batch(&mut batch) {
            let read = catch_unwind(AssertUnwindSafe(|| self.read(&batch)));
            let read = read.unwrap_or_else(|panic| Err(wrapped(error::panicked(&*panic))));
            let mut state = self.state();
            match read {
                Ok(tensors) => {
                    for (index, tensor) in tensors {
                        if let Some(slot) = state.slots.get_mut(index) {
                            *slot = Slot::Here(tensor);
                        }
                    }
                }
                Err(error) => {
                    for index in &batch {
                        if let Some(slot) = state.slots.get_mut(*index) {
                            *slot = Slot::Waiting;
                        }
                    }
                    state.failed = Some(error::text(error).into());
                }
            }
            let failed = state.failed.is_some();
            drop(state);
            self.landed.notify_all();
            if failed {
                return;
            }
        }
    }

    /// Chooses what is read next, and marks it as being read: what is asked for and what lies behind it,
    /// within the budget. `false` when there is nothing more to do.
    fn next_batch(&self, batch: &mut Vec<usize>) -> bool {
        batch.clear();
        let mut bytes = 0;
        let mut state = self.state();
        loop {
            if self.cancel.is_cancelled() || state.waiting == 0 {
                return false;
            }
            while let Some(index) = state.wanted.pop_front() {
                if matches!(state.slots.get(index), Some(Slot::Waiting)) {
                    bytes += self.begin(&mut state, index, batch);
                    state.next = index + 1;
                }
            }
            let (count, mut left) = (self.entries.len(), self.entries.len());
            while left > 0 && bytes < BATCH {
                let index = state.next % count;
                let entry = &self.entries[index];
                if entry.ahead && matches!(state.slots[index], Slot::Waiting) {
                    let held = state.unasked + entry.loaded_bytes();
                    if self.plan.budget.is_some_and(|budget| held > budget) {
                        break;
                    }
                    (state.unasked, state.counted[index]) = (held, true);
                    bytes += self.begin(&mut state, index, batch);
                }
                state.next = index + 1;
                left -= 1;
            }
            if !batch.is_empty() {
                return true;
            }
            state = self.wake.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Marks a tensor as being read. Its bytes in the file.
    fn begin(&self, state: &mut State, index: usize, batch: &mut Vec<usize>) -> u64 {
        state.slots[index] = Slot::Reading;
        state.waiting -= usize::from(self.entries[index].ahead);
        batch.push(index);
        self.entries[index].info.byte_len()
    }

    /// Reads tensors as they are read ahead. They are given out only once the files are known not to have
    /// changed meanwhile.
    fn read(&self, batch: &[usize]) -> candle_core::Result<Vec<(usize, Tensor)>> {
        let want = |index: &usize| {
            let Entry { info, way, .. } = &self.entries[*index];
            let bytes = self.entries[*index].loaded_bytes() as usize;
            let (name, shape, part) = (info.name(), info.shape().to_vec(), None);
            way.map(|way| (*index, Want { name, way, part, shape, bytes }))
        };
        let (indices, wants): (Vec<_>, Vec<_>) = batch.iter().filter_map(want).unzip();
        let mut loader = self.plan.loader.clone();
        if let Some(hook) = &self.plan.on_progress {
            let (hook, done) = (hook.clone(), self.done.clone());
            let most: u64 = batch.iter().map(|index| self.entries[*index].info.byte_len()).sum();
            // Aligned reads bring more than the tensors have.
            loader =
                loader.on_progress(move |read| hook(&done.progress(read.bytes_done.min(most))));
        }
        let tensors = self.read_wants(loader, &wants)?;
        self.count(batch);
        Ok(indices.into_iter().zip(tensors).collect())
    }

    /// Reads tensors, in their order, to the device where candle's memory there can be filled, else to the
    /// host.
    fn read_wants(&self, loader: Loader, wants: &[Want<'_>]) -> candle_core::Result<Vec<Tensor>> {
        let loader = loader.request(wants.iter().map(Want::request));
        let checkpoint = &self.plan.checkpoint;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.plan.device
            && wants.iter().all(|want| !want.way.widen)
        {
            return crate::cuda::read(loader, checkpoint, device, wants);
        }
        memory::read(&loader, checkpoint, wants).map_err(wrapped)
    }

    /// Counts tensors as read.
    fn count(&self, batch: &[usize]) {
        for entry in batch.iter().map(|index| &self.entries[*index]).filter(|entry| entry.ahead) {
            self.done.bytes.fetch_add(entry.info.byte_len(), Relaxed);
            self.done.tensors.fetch_add(1, Relaxed);
        }
        if let Some(hook) = &self.plan.on_progress {
            hook(&self.done.progress(0));
        }
    }

    fn get(
        &self,
        name: &str,
        part: Part,
        dtype: Option<DType>,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let (index, entry) = self.entry(name)?;
        let way = Way::new(entry.info.dtype(), dtype);
        let way = way.ok_or_else(|| error::no_dtype(entry.info.dtype(), name, dtype))?;
        let dtype = dtype.unwrap_or(way.read);
        let read_now = |part| {
            let tensor = self.read_now(entry, way, part)?;
            tensor.to_dtype(dtype)?.to_device(device)
        };
        let Some(kept) = entry.way.filter(|kept| part.is_none() && kept.serves(way)) else {
            return read_now(part);
        };
        let tensor = self.whole(index, entry)?;
        if tensor.dtype() == dtype && tensor.device().same_device(device) {
            return Ok(tensor);
        }
        // It was converted for somebody else, and may have lost what this one would see.
        if tensor.dtype() != dtype && tensor.dtype() != kept.read {
            return read_now(None);
        }
        let made = tensor.to_dtype(dtype)?.to_device(device)?;
        // Kept in the form that others will ask for, and in one form only.
        if self.plan.dtype == Some(dtype) && device.same_device(&self.plan.device) {
            let mut state = self.state();
            if let Slot::Here(kept) = &mut state.slots[index] {
                *kept = made.clone();
            }
        }
        Ok(made)
    }

    /// A tensor as it is read ahead.
    fn whole(&self, index: usize, entry: &Entry) -> candle_core::Result<Tensor> {
        let mut asked = false;
        let mut state = self.state();
        loop {
            match &state.slots[index] {
                Slot::Here(tensor) => {
                    let tensor = tensor.clone();
                    if std::mem::replace(&mut state.counted[index], false) {
                        state.unasked = state.unasked.saturating_sub(entry.loaded_bytes());
                        self.wake.notify_all();
                    }
                    if self.plan.repeats == Repeats::ReadAgain {
                        state.slots[index] = Slot::Gone;
                    }
                    return Ok(tensor);
                }
                Slot::Reading => {}
                Slot::Waiting if entry.ahead && entry.info.byte_len() > SMALL => {
                    if let Some(error) = &state.failed {
                        return Err(Error::msg(error));
                    }
                    if !asked {
                        asked = true;
                        state.wanted.push_back(index);
                        self.wake.notify_all();
                    }
                }
                Slot::Waiting | Slot::Gone => {
                    if let Some(error) = &state.failed {
                        return Err(Error::msg(error));
                    }
                    let first = matches!(state.slots[index], Slot::Waiting);
                    state.waiting -= usize::from(first && entry.ahead);
                    state.slots[index] = Slot::Reading;
                    drop(state);
                    let read = match entry.way {
                        Some(way) => self.read_now(entry, way, None),
                        None => Err(error::no_dtype(
                            entry.info.dtype(),
                            entry.info.name(),
                            self.plan.dtype,
                        )),
                    };
                    let keep = self.plan.repeats == Repeats::Share;
                    self.state().slots[index] = match &read {
                        Ok(tensor) if keep => Slot::Here(tensor.clone()),
                        // Whoever asks again tries again.
                        _ => Slot::Gone,
                    };
                    self.landed.notify_all();
                    self.wake.notify_all();
                    if first && read.is_ok() {
                        self.count(&[index]);
                    }
                    return read;
                }
            }
            state = self.landed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Reads a tensor, or a part of it, by the thread that asks: what is small by itself, to the host.
    fn read_now(&self, entry: &Entry, way: Way, part: Part) -> candle_core::Result<Tensor> {
        let name = entry.info.name();
        let request = request(name, way, part.clone());
        let planned = self.reader.planned(request.clone()).map_err(wrapped)?;
        let (shape, bytes) = (planned.shape().to_vec(), planned.byte_len() as usize);
        if planned.byte_len() > SMALL {
            let want = Want { name, way, part, shape, bytes };
            let mut read = self.read_wants(self.plan.loader.clone(), &[want])?;
            return read.pop().ok_or_else(|| error::unknown(name));
        }
        memory::read_small(&self.reader, request, way, &shape, bytes).map_err(wrapped)
    }
}

impl Entry {
    /// Bytes once it is read.
    fn loaded_bytes(&self) -> u64 {
        match self.way.and_then(|way| way.cast) {
            Some(cast) => self.info.elements() * u64::from(cast.bits()) / 8,
            None => self.info.byte_len(),
        }
    }
}

impl Want<'_> {
    /// What it is read by.
    fn request(&self) -> Request {
        request(self.name, self.way, self.part.clone())
    }
}

/// What a tensor is read by.
fn request(name: &str, way: Way, part: Part) -> Request {
    let mut request = Request::new(name);
    if let Some(dtype) = way.cast {
        request = request.dtype(dtype);
    }
    if let Some((dim, range)) = part {
        request = request.slice(dim, range);
    }
    request
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use fst::Dtype;
    use fst::format::Layout;

    use super::*;

    /// A table of six tensors of 60 MiB, which nobody reads.
    fn table(budget: Option<u64>) -> (tempfile::TempDir, Table) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let mut layout = Layout::new();
        for index in 0..6 {
            layout.tensor(format!("t{index}"), Dtype::U8, &[60 << 20]).unwrap();
        }
        let (header, data) = (layout.header_bytes().unwrap(), layout.data_len());
        std::fs::write(&path, &header).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(header.len() as u64 + data).unwrap();
        let plan = Plan {
            checkpoint: Checkpoint::open(&path).unwrap(),
            loader: Loader::new(),
            dtype: Some(DType::U8),
            device: Device::Cpu,
            budget,
            repeats: Repeats::Share,
            on_progress: None,
        };
        (folder, Table::new(plan, &|info| info.name() != "t5"))
    }

    /// The tensors that are read next, while one is asked for.
    fn next(table: &Table, wanted: Option<usize>) -> Vec<usize> {
        let mut batch = Vec::new();
        table.state().wanted.extend(wanted);
        if table.next_batch(&mut batch) { batch } else { Vec::new() }
    }

    #[test]
    fn what_is_asked_for_comes_first_and_then_what_lies_behind_it() {
        let (_folder, waiting) = table(None);
        assert_eq!(next(&waiting, None), [0, 1, 2]);
        assert_eq!(next(&waiting, Some(1)), [3, 4]);
        assert!(next(&waiting, None).is_empty());
        let (_folder, waiting) = table(None);
        assert_eq!(next(&waiting, Some(3)), [3, 4, 0]);
        assert_eq!(next(&waiting, None), [1, 2]);
        assert!(next(&waiting, None).is_empty());
    }

    #[test]
    fn a_budget_bounds_what_nobody_asked_for() {
        let (_folder, table) = table(Some(100 << 20));
        assert_eq!(next(&table, None), [0]);
        assert_eq!(next(&table, Some(3)), [3]);
        // What is given out makes room.
        let byte = candle_core::Tensor::zeros(1, DType::U8, &Device::Cpu).unwrap();
        table.state().slots[0] = Slot::Here(byte);
        table.whole(0, &table.entries[0]).unwrap();
        assert_eq!(next(&table, None), [4]);
    }
}
