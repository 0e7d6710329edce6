//! Loads into memory that a caller makes for each tensor and gets back as soon as the tensor is there.

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel};
use std::time::Instant;

use fst_format::{Checkpoint, Dtype, Element};
use fst_io::SourceFile;
use fst_io::plan::Limits;
use fst_io::sink::SinkError;

use crate::error::{Error, Result};
use crate::host::{from_sink, open_files};
use crate::into::{Memory, Ways};
use crate::load::resolve_engine;
use crate::loader::Loader;
use crate::options::Item;
use crate::report::LoadReport;
use crate::request::Planned;

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
    planned: Planned,
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
    ///     |tensor| Vec::<f32>::with_capacity(tensor.shape.iter().product()),
    ///     |tensor, filled| {
    ///         model.lock().expect("no thread panicked").push((tensor.name.clone(), filled.into_vec()));
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
        let engine = resolve_engine(self.read.engine, self.target())?;
        let mut report = LoadReport::new(engine, self.target().clone());
        report.push("open", checkpoint.open_time(), 0);
        let began = Instant::now();
        let items = self.selection.resolve(checkpoint)?;
        if let Some(item) = items.first().filter(|_| !self.target().is_host()) {
            return Err(self.elsewhere(item));
        }
        if let Some(manifest) = &self.manifest {
            manifest.check(checkpoint, &items)?;
        }
        let (files, number) = open_files(checkpoint, &items)?;
        report.add_files(&files);
        let align = files.iter().map(SourceFile::align).max().unwrap_or(Limits::MIN_ALIGN);
        let mut ways = Ways::default();
        let mut coming = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let planned = Planned::of(item);
            let mut owner = allocate(&planned);
            let memory = memory_for(item, &mut owner)?;
            if let Some(file) = number[item.info.shard()].filter(|_| item.source_len() > 0) {
                ways.sort((index, item), file, &files[file as usize], align, memory);
            }
            let (memory, missing) = (Mutex::new(Some(owner)), AtomicU64::new(item.source_len()));
            coming.push(Coming { planned, memory, missing });
        }
        let hand_back = |one: &Coming<M>| -> Result<(), SinkError> {
            let memory = one.memory.lock().unwrap_or_else(|e| e.into_inner()).take();
            let Some(memory) = memory else { return Ok(()) };
            let mut filled = Filled { memory, bytes: one.planned.bytes as usize };
            if let Some(manifest) = &self.manifest {
                let checked = manifest.check_bytes(&one.planned.source, filled.bytes());
                checked.map_err(Error::from)?;
            }
            landed(&one.planned, filled);
            Ok(())
        };
        let arrived = |index: usize, bytes: u64| match coming.get(index) {
            // The last of them sees what the others wrote.
            Some(one) if one.missing.fetch_sub(bytes, AcqRel) == bytes => hand_back(one),
            _ => Ok(()),
        };
        for one in coming.iter().filter(|one| one.planned.bytes == 0) {
            hand_back(one).map_err(from_sink)?;
        }
        self.fill(&items, &files, ways, align, began, &arrived, &mut report)?;
        Ok(report)
    }
}

/// The part of `owner`'s memory that `item` is loaded to.
fn memory_for<'d>(item: &Item, owner: &mut impl OwnedMemory) -> Result<Memory<'d>> {
    let tensor = || item.name().to_owned();
    if let Some(asked) = owner.dtype().filter(|dtype| *dtype != item.dtype && *dtype != Dtype::U8) {
        return Err(Error::WrongDtype { tensor: tensor(), asked, found: item.dtype });
    }
    let (expected, memory) = (item.len(), owner.memory());
    let found = memory.len() as u64;
    let Some(memory) = usize::try_from(expected).ok().and_then(|len| memory.get_mut(..len)) else {
        return Err(Error::DestinationLength { tensor: tensor(), expected, found });
    };
    // SAFETY: the owner's contract: these bytes stay where they are as long as it lives, for nobody else.
    // It lives until all of them have landed and the reads are done with them, or until the reads are over:
    // it is kept by `coming`, which is dropped behind the reads.
    Ok(unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr(), memory.len()) })
}
