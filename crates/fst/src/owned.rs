//! Loads into memory that a caller makes for each tensor and gets back as soon as the tensor is there.

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel};
use std::time::Instant;

use fst_format::{Checkpoint, Dtype, Element, Planned};
use fst_gpu::BorrowedLoad;
use fst_io::available;
use fst_io::sink::SinkError;

use crate::error::{Error, Result};
use crate::files::{from_sink, locate, open_pieces};
use crate::into::{Memory, elsewhere};
use crate::loader::Loader;
use crate::progress::Progress;
use crate::remote;
use crate::report::LoadReport;
use crate::verify::Hashed;

/// Host memory of a caller's own kind for one tensor, which need not be initialised: a `Vec`, a pool's
/// block, a tensor of an engine's.
///
/// # Safety
///
/// [`memory`](Self::memory) gives the same bytes whenever it is called, also after the value was moved to
/// another thread, and nobody else reads or writes them as long as the value lives. (A `Box` moved is a
/// promise that nobody else has its address: keep such memory by a pointer.)
pub unsafe trait OwnedMemory: Send {
    /// The bytes: at least as many as the tensor has once it is loaded.
    fn memory(&mut self) -> &mut [MaybeUninit<u8>];

    /// The type of element that the memory is for, if it is for one: the tensor must be loaded as that.
    fn dtype(&self) -> Option<Dtype> {
        None
    }
}

// SAFETY: a vector's memory stays where it is when the vector is moved, and is its own.
unsafe impl<T: Element + Send> OwnedMemory for Vec<T> {
    /// The memory for elements that the vector has not got yet: make it by `Vec::with_capacity`.
    fn memory(&mut self) -> &mut [MaybeUninit<u8>] {
        let spare = self.spare_capacity_mut();
        // SAFETY: the same memory, as the bytes that it is of; no more is promised of either.
        unsafe { std::slice::from_raw_parts_mut(spare.as_mut_ptr().cast(), size_of_val(spare)) }
    }

    fn dtype(&self) -> Option<Dtype> {
        Some(T::DTYPE)
    }
}

/// Memory that holds a loaded tensor.
pub struct Filled<M> {
    memory: M,
    bytes: usize,
}

impl<M: OwnedMemory> Filled<M> {
    /// The tensor's bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        let memory = &mut self.memory.memory()[..self.bytes];
        // SAFETY: the same bytes; this value is made once all of them have been written.
        unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), memory.len()) }
    }

    /// The memory, of which the first [`bytes`](Self::bytes) are initialised.
    pub fn into_inner(self) -> M {
        self.memory
    }
}

impl<T: Element + Send> Filled<Vec<T>> {
    /// The vector, with the tensor's elements behind those that it had.
    pub fn into_vec(self) -> Vec<T> {
        let mut vec = self.memory;
        let len = vec.len() + self.bytes / size_of::<T>();
        // SAFETY: these bytes were written, they lie in the capacity, and any bytes are elements.
        unsafe { vec.set_len(len) };
        vec
    }
}

impl<M> fmt::Debug for Filled<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filled").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// Memory on its way.
struct Coming<M> {
    memory: Mutex<Option<M>>,
    /// Bytes of the file that are still to come.
    missing: AtomicU64,
}

impl Loader {
    /// Loads into host memory that `allocate` makes, once for each tensor before reading begins, and that
    /// `landed` takes back as soon as the tensor is there: from reader threads, several at a time, in the
    /// order in which tensors become complete. What it does there is done while others are read, so that
    /// weights can be quantised or handed on, and let go, before the next ones are in memory.
    ///
    /// Memory that was never touched costs nothing until its tensor arrives.
    ///
    /// ```no_run
    /// use std::sync::Mutex;
    ///
    /// use fst::{Checkpoint, Dtype, Loader};
    ///
    /// let checkpoint = Checkpoint::open("model")?;
    /// let model = Mutex::new(Vec::<(String, Vec<f32>)>::new());
    /// Loader::new().dtype(Dtype::F32).load_owned(
    ///     &checkpoint,
    ///     |tensor| Vec::<f32>::with_capacity(tensor.shape().iter().product()),
    ///     |tensor, filled| {
    ///         model.lock().expect("no thread panicked").push((tensor.name().to_owned(), filled.into_vec()));
    ///     },
    /// )?;
    /// # Ok::<(), fst::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::DestinationLength`] and [`Error::WrongDtype`] for memory that does not suit its tensor,
    /// [`Error::DestinationDevice`] for a loader to a device; then what is wrong with the files or the
    /// machine. What was not given to `landed` by then is dropped.
    pub fn load_owned<M: OwnedMemory>(
        &self,
        checkpoint: &Checkpoint,
        mut allocate: impl FnMut(&Planned) -> M,
        landed: impl Fn(&Planned, Filled<M>) + Sync,
    ) -> Result<LoadReport> {
        self.ranks.refuse("memory of the caller's")?;
        let mut report = self.begin(checkpoint)?;
        let began = Instant::now();
        let items = self.planned(checkpoint)?;
        if let Some(item) = items.iter().find(|item| !self.is_to_host(item)) {
            return Err(elsewhere(item, &self.device_of(item)?));
        }
        let allocated = |item| {
            let memory = allocate(&item);
            (item, memory)
        };
        let wanted = items.into_iter().map(allocated).collect();
        self.fill(checkpoint, wanted, began, &mut report, &landed)?;
        Ok(report)
    }

    /// Reads tensors into the host memory beside them, which `landed` takes back as soon as it is filled, and
    /// right by the manifest if there is one. Planning has been going on since `began`.
    pub(crate) fn fill<M: OwnedMemory>(
        &self,
        checkpoint: &Checkpoint,
        wanted: Vec<(Planned, M)>,
        began: Instant,
        report: &mut LoadReport,
        landed: &(dyn Fn(&Planned, Filled<M>) + Sync),
    ) -> Result<()> {
        let (items, owners): (Vec<Planned>, Vec<M>) = wanted.into_iter().unzip();
        self.check_manifest(checkpoint, &items)?;
        let (files, pieces) = open_pieces(checkpoint, &items)?;
        report.add_files(&files);
        let mut places = Vec::with_capacity(items.len());
        let mut coming = Vec::with_capacity(items.len());
        for (item, mut owner) in items.iter().zip(owners) {
            places.push(memory_for(item, &mut owner)?);
            let (memory, missing) = (Mutex::new(Some(owner)), AtomicU64::new(item.source_len()));
            coming.push(Coming { memory, missing });
        }
        let located = |error| locate(error, &items);
        let load = BorrowedLoad::new(&files, pieces.into_iter().zip(places)).map_err(located)?;
        let (scratch, bytes_total) = (load.scratch(), load.bytes_read());
        available::check(!self.unchecked && scratch > 0, scratch, false)?;
        report.tensors += items.len();
        report.bytes += items.iter().map(Planned::byte_len).sum::<u64>();
        report.push("plan", began.elapsed(), 0);

        let began = Instant::now();
        let hashed = Hashed::default();
        let hand_back = |item: &Planned, one: &Coming<M>| -> Result<(), SinkError> {
            let memory = one.memory.lock().unwrap_or_else(|e| e.into_inner()).take();
            let Some(memory) = memory else { return Ok(()) };
            let mut filled = Filled { memory, bytes: item.byte_len() as usize };
            if let Some(manifest) = &self.manifest {
                let checked = hashed.check(manifest, item.source().name(), filled.bytes());
                checked.map_err(Error::from)?;
            }
            landed(item, filled);
            Ok(())
        };
        let arrived = |index: usize, bytes: u64| match items.get(index).zip(coming.get(index)) {
            // The last of them sees what the others wrote.
            Some((item, one)) if one.missing.fetch_sub(bytes, AcqRel) == bytes => {
                hand_back(item, one)
            }
            _ => Ok(()),
        };
        for (item, one) in items.iter().zip(&coming).filter(|(item, _)| item.source_len() == 0) {
            hand_back(item, one).map_err(from_sink)?;
        }
        let watch = self.watch();
        let progress = |bytes_done| Progress {
            bytes_done,
            bytes_total,
            tensors_total: items.len(),
            elapsed: began.elapsed(),
        };
        let reads = self.watched(&watch, &progress, || {
            load.run(&files, &self.read, &watch, &arrived).map_err(located)
        })?;
        report.push("read", began.elapsed(), bytes_total);
        report.add_reads(&reads);
        if self.manifest.is_some() {
            hashed.report(report);
        }
        remote::loaded(checkpoint, report);
        Ok(())
    }
}

/// The part of `owner`'s memory that `item` is loaded to.
fn memory_for<'d>(item: &Planned, owner: &mut impl OwnedMemory) -> Result<Memory<'d>> {
    let tensor = || item.name().to_owned();
    if let Some(asked) = owner.dtype().filter(|dtype| *dtype != item.dtype() && *dtype != Dtype::U8)
    {
        return Err(Error::WrongDtype { tensor: tensor(), asked, found: item.dtype() });
    }
    let (expected, memory) = (item.byte_len(), owner.memory());
    let found = memory.len() as u64;
    let Some(memory) = usize::try_from(expected).ok().and_then(|len| memory.get_mut(..len)) else {
        return Err(Error::DestinationLength { tensor: tensor(), expected, found });
    };
    // SAFETY: the owner's contract: these bytes stay where they are as long as it lives, for nobody else.
    // It lives until all of them have landed and the reads are done with them, or until the reads are over:
    // it is kept by `coming`, which is dropped behind the reads.
    Ok(unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr(), memory.len()) })
}
