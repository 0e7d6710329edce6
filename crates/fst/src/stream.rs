//! Tensors as they land, within a memory budget.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fst_format::Checkpoint;
use fst_io::Budget;

use crate::available::{self, AvailableMemory};
use crate::error::{Error, Result};
use crate::host::{Deliver, Watch, locate};
use crate::load::{Load, resolve_engine};
use crate::loader::{ARENA, Loader};
use crate::options::Item;
use crate::progress::CancelToken;
use crate::report::LoadReport;
use crate::tensor::Tensor;
use crate::verify::{Hashed, verified};

/// The budget when none was set, in bytes: 2 GiB, or half of what there is where that is less.
fn default_budget() -> u64 {
    let available = AvailableMemory::now().map_or(u64::MAX, |available| available.bytes);
    (2 << 30).min(available / 2)
}

/// Bytes of an arena where the budget is tight.
const SHORT_ARENA: u64 = 1 << 20;

/// How long nothing may be read, while a reader waits for memory that held tensors occupy, before
/// the stream says so, unless the loader was told otherwise.
const STALL: Duration = Duration::from_secs(10);

/// How often a waiting stream looks at its cancel token.
const TICK: Duration = Duration::from_millis(50);

/// Yields tensors as they land; see [`Loader::stream`]. Dropping it ends the load.
pub struct TensorStream {
    arrivals: Option<Receiver<Result<(usize, Tensor)>>>,
    reader: Option<JoinHandle<()>>,
    budget: Budget,
    watch: Arc<Watch>,
    stall_timeout: Duration,
    stop: Arc<AtomicBool>,
    cancel: CancelToken,
    report: Arc<Mutex<Option<LoadReport>>>,
    remaining: usize,
    byte_len: u64,
    /// For streams in order: what came early, and which item is next.
    early: Option<(BTreeMap<usize, Tensor>, usize)>,
}

impl fmt::Debug for TensorStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorStream").field("remaining", &self.remaining).finish_non_exhaustive()
    }
}

impl TensorStream {
    pub(crate) fn start(loader: &Loader, checkpoint: &Checkpoint) -> Result<Self> {
        Self::start_items(loader, checkpoint, loader.selection.resolve(checkpoint)?)
    }

    /// As [`start`](Self::start), of `items`.
    pub(crate) fn start_items(
        loader: &Loader,
        checkpoint: &Checkpoint,
        items: Vec<Item>,
    ) -> Result<Self> {
        let began = Instant::now();
        let device = loader.target();
        let engine = resolve_engine(loader.read.engine, device)?;
        let mut report = LoadReport::new(engine, device.clone());
        report.push("open", checkpoint.open_time(), 0);
        let manifest = loader.manifest.clone();
        if let Some(manifest) = &manifest {
            manifest.check(checkpoint, &items)?;
        }
        let limit = loader.budget.unwrap_or_else(default_budget);
        let plan = |arena| -> Result<(Load, u64)> {
            let load = Load::new(device, checkpoint, items.clone(), arena, Some(loader.in_order))?;
            let load = load.with_options(loader.device_options).within(limit, loader.in_order);
            let needed = load.least_memory(loader.in_order) + load.scratch(&loader.read);
            Ok((load, needed))
        };
        let (mut load, mut needed) = plan((limit / 8).clamp(SHORT_ARENA, ARENA / 4))?;
        if limit < needed {
            // The shortest arenas need the least.
            (load, needed) = plan(SHORT_ARENA)?;
        }
        if limit < needed {
            return Err(Error::Budget { budget: limit, needed });
        }
        let scratch = load.scratch(&loader.read);
        let most = load.items().iter().fold(scratch, |sum, item| sum.saturating_add(item.len()));
        available::check(!loader.unchecked && device.is_host(), limit.min(most))?;
        report.add_files(load.files());
        report.push("plan", began.elapsed(), 0);

        let budget = Budget::new(limit - scratch);
        let stop = Arc::new(AtomicBool::new(false));
        let watch = Arc::new(Watch::new(stop.clone()));
        let done = Arc::new(Mutex::new(None));
        let (sender, arrivals) = mpsc::channel();
        let remaining = load.items().len();
        let byte_len = load.items().iter().map(|item| item.len()).sum();
        let reader = {
            let (budget, watch, done) = (budget.clone(), watch.clone(), done.clone());
            let options = loader.read.clone();
            move || {
                let began = Instant::now();
                let deliver = |index: usize, tensor: Tensor| {
                    report_gone(sender.send(Ok((index, tensor))).is_err())
                };
                let run = |deliver: Deliver<'_>| {
                    let reads = load.run(&options, Some(&budget), &watch, deliver)?;
                    Ok((reads, began.elapsed()))
                };
                let hashed = Hashed::default();
                let result = match &manifest {
                    Some(manifest) => verified(manifest, &hashed, &deliver, run),
                    None => run(&deliver),
                };
                // Nothing more is asked for: what tensors leave behind is of no use any more.
                budget.close();
                match result {
                    Ok((reads, took)) => {
                        report.push("read", took, load.bytes_read());
                        report.add_reads(&reads);
                        report.device_copy = load.device_copy();
                        if manifest.is_some() {
                            hashed.report(&mut report);
                        }
                        report.tensors = load.items().len();
                        report.bytes = byte_len;
                        *done.lock().unwrap_or_else(|e| e.into_inner()) = Some(report);
                    }
                    // If nobody listens any more, nobody misses the error.
                    Err(error) => drop(sender.send(Err(error))),
                }
            }
        };
        let reader = std::thread::Builder::new()
            .name("fst-stream".to_owned())
            .spawn(reader)
            .map_err(|source| fst_io::Error::Setup { what: "the reader thread", source })
            .map_err(|e| locate(e, &[]))?;
        Ok(Self {
            arrivals: Some(arrivals),
            reader: Some(reader),
            budget,
            watch,
            stall_timeout: loader.stall_timeout.unwrap_or(STALL),
            stop,
            cancel: loader.cancel.clone(),
            report: done,
            remaining,
            byte_len,
            early: loader.in_order.then(|| (BTreeMap::new(), 0)),
        })
    }

    /// Tensors that are still to come.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// Bytes of all its tensors, those that are out and those to come.
    pub fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// The most bytes of tensor memory that were in use at once, so far. What dropped tensors left for
    /// the next ones is not in use.
    pub fn peak_bytes(&self) -> u64 {
        self.budget.peak()
    }

    /// What the load did: `None` until the stream has ended well, which is when
    /// [`next`](Iterator::next) has returned `None` after the last tensor.
    pub fn report(&self) -> Option<LoadReport> {
        self.report.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Ends the load, waits until no read is in flight, and forgets what has arrived.
    fn close(&mut self) {
        self.stop.store(true, Relaxed);
        self.budget.close();
        self.arrivals = None;
        self.remaining = 0;
        if let Some((early, _)) = &mut self.early {
            early.clear();
        }
        if let Some(reader) = self.reader.take() {
            // A panic of the reader was its own end; nothing is in flight any more.
            let _ = reader.join();
        }
    }

    /// The last tensor is out: the reader is about to check its files, write its report and end.
    /// Says what it found, such as a file that changed while it was read.
    fn end(&mut self) -> Option<Error> {
        let found = self.arrivals.take();
        let panicked = self.join()?;
        found?.try_iter().find_map(Result::err).or(panicked)
    }

    /// Waits for the end of the reader; says so if it panicked. `None` if that was asked before.
    fn join(&mut self) -> Option<Option<Error>> {
        let panic = self.reader.take()?.join().err();
        Some(panic.map(|panic| Error::Panicked { message: message_of(&*panic) }))
    }

    /// The next arrival, in whatever order.
    fn receive(&mut self) -> Result<(usize, Tensor)> {
        let (mut bytes, mut since) = (self.watch.bytes(), Instant::now());
        loop {
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let Some(arrivals) = &self.arrivals else { return Err(Error::Cancelled) };
            match arrivals.recv_timeout(TICK.min(self.stall_timeout)) {
                Ok(arrival) => return arrival,
                // The reader ends early with an error, or by a panic.
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.join().flatten().unwrap_or(Error::Cancelled));
                }
                Err(RecvTimeoutError::Timeout) => {
                    // One reader may wait for memory while another waits for slow storage.
                    let now = self.watch.bytes();
                    if now != bytes {
                        (bytes, since) = (now, Instant::now());
                    }
                    let waited = since.elapsed();
                    if waited > self.stall_timeout && self.budget.waiting() > 0 {
                        return Err(Error::Stalled { budget: self.budget.limit(), waited });
                    }
                }
            }
        }
    }

    fn next_tensor(&mut self) -> Result<Tensor> {
        loop {
            if let Some((early, next)) = &mut self.early
                && let Some(tensor) = early.remove(next)
            {
                *next += 1;
                return Ok(tensor);
            }
            let (index, tensor) = self.receive()?;
            match &mut self.early {
                Some((early, _)) => drop(early.insert(index, tensor)),
                None => return Ok(tensor),
            }
        }
    }
}

/// What a panic said.
fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".to_owned())
}

fn report_gone(gone: bool) -> Result<(), fst_io::sink::SinkError> {
    if gone { Err(Error::Cancelled.into()) } else { Ok(()) }
}

impl Iterator for TensorStream {
    type Item = Result<Tensor>;

    /// The next tensor, or the error that ended the load. After [`Error::Stalled`] the stream goes
    /// on where it was; after any other error it is over. That files did not change meanwhile is
    /// known only behind the last tensor: an error can follow it.
    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            return self.end().map(Err);
        }
        let next = self.next_tensor();
        match &next {
            Ok(_) => self.remaining -= 1,
            Err(Error::Stalled { .. }) => {}
            Err(_) => self.close(),
        }
        Some(next)
    }
}

impl Drop for TensorStream {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

    use super::*;

    /// A stream with so many tensors to come, whose reader does this with the sending end.
    fn stream_of(
        remaining: usize,
        reader: impl FnOnce(mpsc::Sender<Result<(usize, Tensor)>>) + Send + 'static,
    ) -> TensorStream {
        let (sender, arrivals) = mpsc::channel();
        TensorStream {
            arrivals: Some(arrivals),
            reader: Some(std::thread::spawn(move || reader(sender))),
            budget: Budget::new(1),
            watch: Arc::default(),
            stall_timeout: STALL,
            stop: Arc::default(),
            cancel: CancelToken::new(),
            report: Arc::default(),
            remaining,
            byte_len: 0,
            early: None,
        }
    }

    #[test]
    fn a_panic_of_the_reader_is_not_a_cancelled_load() {
        // Before the last tensor, and behind it.
        for remaining in [1, 0] {
            let mut stream = stream_of(remaining, |_sender| panic!("out of {}", "paper"));
            let error = stream.next().unwrap().unwrap_err();
            assert!(matches!(&error, Error::Panicked { message } if message == "out of paper"));
            assert!(stream.next().is_none());
        }
    }

    #[test]
    fn an_error_sent_before_the_end_comes_first() {
        for remaining in [1, 0] {
            let mut stream = stream_of(remaining, |sender| {
                let name = "x".to_owned();
                sender.send(Err(Error::UnknownTensor { name })).unwrap();
                panic!("later");
            });
            let error = stream.next().unwrap().unwrap_err();
            assert!(matches!(error, Error::UnknownTensor { .. }), "{error}");
            assert!(stream.next().is_none());
        }
    }
}
