//! Loads into memory that the caller has: a model's own parameters, a shared segment, a pool.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::time::Instant;

use cudarc::driver::{CudaSlice, CudaStream, CudaViewMut, DevicePtrMut, DeviceSlice, DriverError};
use fst_format::{Checkpoint, Dtype, Element};
use fst_gpu::{CudaDevice, DeviceArena};
use fst_io::lent::Lent;
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::scratch::Scratch;
use fst_io::{CachePolicy, Extent, ReadOptions, ReadStats, SourceFile, residency};

use crate::available;
use crate::cuda::CudaLoad;
use crate::device::Device;
use crate::error::{DeviceError, Error, Result};
use crate::host::{SCRATCH, SCRATCH_BLOCK, Watch, locate, open_files};
use crate::load::resolve_engine;
use crate::loader::Loader;
use crate::memory::{Borrowed, OnFilled};
use crate::options::Item;
use crate::progress::Progress;
use crate::report::LoadReport;
use crate::tensor::Tensor;
use crate::transform::{Piece, Sharing, Transform, TransformPlan};
use crate::verify::{Hashed, verify_all};

/// Memory for one tensor, on the host or on a CUDA device: bytes, or elements of the type that is
/// expected.
pub struct Destination<'d> {
    memory: Place<'d>,
    /// The type that the memory is of, if it is of any.
    dtype: Option<Dtype>,
}

enum Place<'d> {
    Host(Memory<'d>),
    Device(DevicePlace<'d>),
}

/// Device memory that nobody else uses for `'d`.
struct DevicePlace<'d> {
    address: u64,
    len: u64,
    /// Address of the context that it is of, where that is known.
    context: Option<usize>,
    memory: PhantomData<&'d mut [MaybeUninit<u8>]>,
}

impl Place<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.len() as u64,
            Self::Device(place) => place.len,
        }
    }
}

impl fmt::Debug for Destination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination")
            .field("bytes", &self.memory.len())
            .field("on_device", &matches!(self.memory, Place::Device(_)))
            .field("dtype", &self.dtype)
            .finish()
    }
}

impl<'d> From<&'d mut [u8]> for Destination<'d> {
    fn from(bytes: &'d mut [u8]) -> Self {
        let (start, len) = (bytes.as_mut_ptr().cast(), bytes.len());
        // SAFETY: the same memory, borrowed as long. Only bytes that a file or a conversion gives
        // are ever written through it, so that the owner finds all of it initialised.
        let memory = unsafe { std::slice::from_raw_parts_mut(start, len) };
        Self { memory: Place::Host(memory), dtype: None }
    }
}

impl<'d> From<&'d mut Vec<u8>> for Destination<'d> {
    fn from(bytes: &'d mut Vec<u8>) -> Self {
        bytes.as_mut_slice().into()
    }
}

impl<'d> From<&'d mut [MaybeUninit<u8>]> for Destination<'d> {
    /// Memory that need not be initialised, such as `Vec::spare_capacity_mut`. After a load that
    /// succeeded all of it is; after one that failed, count on nothing.
    fn from(memory: &'d mut [MaybeUninit<u8>]) -> Self {
        Self { memory: Place::Host(memory), dtype: None }
    }
}

impl<'d> Destination<'d> {
    /// Elements of a type: the tensor must hold, or be [converted](Loader::dtype) to, the same.
    pub fn elements<T: Element>(elements: &'d mut [T]) -> Self {
        Self { dtype: Some(T::DTYPE), ..bytemuck::cast_slice_mut::<T, u8>(elements).into() }
    }

    /// Elements in device memory that cudarc owns. Work that is queued on them is waited for.
    ///
    /// # Errors
    ///
    /// The device's, should that work fail.
    pub fn cuda<T: Element>(slice: &'d mut CudaSlice<T>) -> Result<Self> {
        let stream = slice.stream().clone();
        let len = slice.num_bytes() as u64;
        let address = slice.device_ptr_mut(&stream).0;
        Self::waited_for::<T>(&stream, address, len)
    }

    /// As [`cuda`](Self::cuda), of a part of such memory.
    ///
    /// # Errors
    ///
    /// As for [`cuda`](Self::cuda).
    pub fn cuda_view<T: Element>(view: &'d mut CudaViewMut<'_, T>) -> Result<Self> {
        let stream = view.stream().clone();
        let len = view.num_bytes() as u64;
        let address = view.device_ptr_mut(&stream).0;
        Self::waited_for::<T>(&stream, address, len)
    }

    /// The memory, if it suits an item.
    pub(crate) fn host_for(self, item: &Item) -> Result<Memory<'d>> {
        self.check(item)?;
        match self.memory {
            Place::Host(memory) => Ok(memory),
            Place::Device(_) => {
                let tensor = item.name().to_owned();
                Err(Error::DestinationDevice { tensor, device: Device::host() })
            }
        }
    }

    /// Checks that type and length are those of an item.
    fn check(&self, item: &Item) -> Result<()> {
        let tensor = || item.name().to_owned();
        if let Some(asked) = self.dtype.filter(|dtype| *dtype != item.dtype) {
            return Err(Error::WrongDtype { tensor: tensor(), asked, found: item.dtype });
        }
        let (expected, found) = (item.len(), self.memory.len());
        if expected != found {
            return Err(Error::DestinationLength { tensor: tensor(), expected, found });
        }
        Ok(())
    }

    /// Elements that `stream` has been told to wait for.
    fn waited_for<T: Element>(stream: &CudaStream, address: u64, len: u64) -> Result<Self> {
        let ordinal = stream.context().ordinal();
        let failed = |e: DriverError| DeviceError::Cuda(fst_gpu::Error::of_cudarc(e, ordinal));
        stream.synchronize().map_err(failed)?;
        let context = Some(stream.context().cu_ctx() as usize);
        let place = DevicePlace { address, len, context, memory: PhantomData };
        Ok(Self { memory: Place::Device(place), dtype: Some(T::DTYPE) })
    }

    /// `len` bytes of device memory at `address`.
    ///
    /// # Safety
    ///
    /// The bytes are allocated on the device that the loader loads to, in its primary context, and
    /// for `'d` nobody else uses them, work that is queued on them included.
    pub unsafe fn device_bytes(address: u64, len: u64) -> Self {
        let place = DevicePlace { address, len, context: None, memory: PhantomData };
        Self { memory: Place::Device(place), dtype: None }
    }
}

/// From this length on a tensor that suits it is read in place; shorter ones are read together with
/// their neighbours and copied.
const IN_PLACE: u64 = 1 << 20;

/// From this length on a copy out of the page cache goes in place.
const COPY_IN_PLACE: u64 = 256 << 10;

/// The share of a tensor, in eighths, that counts as cached.
const CACHED: u64 = 7;

pub(crate) type Memory<'d> = &'d mut [MaybeUninit<u8>];

/// What is to be read, by the way that it takes, and the number of the item that it is of.
#[derive(Default)]
pub(crate) struct Ways<'d> {
    /// Aligned with its memory: by direct I/O into place.
    aligned: Vec<(Extent, (usize, Memory<'d>))>,
    /// Through the page cache into place.
    cached: Vec<(Extent, (usize, Memory<'d>))>,
    /// Through scratch memory: the rest.
    scratch: Vec<(Piece, (usize, Memory<'d>))>,
}

impl<'d> Ways<'d> {
    pub(crate) fn sort(
        &mut self,
        (index, item): (usize, &Item),
        number: u32,
        source: &SourceFile,
        align: u64,
        memory: Memory<'d>,
    ) {
        let runs = item.runs();
        let plain = runs.count == 1 && item.dtype == item.info.dtype();
        if !plain {
            return self.scratch.push((Piece::of(item, number), (index, memory)));
        }
        let start = item.info.file_range().start + runs.first;
        let end = start + runs.len;
        if source.may_be_direct() {
            // What lies in whole aligned blocks of the file.
            let inner = start.next_multiple_of(align)..end / align * align;
            let address = (memory.as_ptr() as u64).wrapping_add(inner.start - start);
            let suits = address.is_multiple_of(source.memory_align());
            if suits && inner.end.saturating_sub(inner.start) >= IN_PLACE {
                let (head, rest) = memory.split_at_mut((inner.start - start) as usize);
                let (body, tail) = rest.split_at_mut((inner.end - inner.start) as usize);
                for (range, memory) in [(start..inner.start, head), (inner.end..end, tail)] {
                    if !range.is_empty() {
                        self.scratch.push((Piece::bytes(number, range), (index, memory)));
                    }
                }
                return self.aligned.push((Extent::new(number, inner), (index, body)));
            }
        }
        // Without direct I/O all goes through the page cache; what that holds is copied once.
        let cached = || {
            residency::resident_bytes(source.buffered(), start, end - start)
                .is_ok_and(|bytes| bytes >= (end - start) / 8 * CACHED)
        };
        if end - start >= COPY_IN_PLACE && (!source.may_be_direct() || cached()) {
            self.cached.push((Extent::new(number, start..end), (index, memory)));
        } else {
            self.scratch.push((Piece::bytes(number, start..end), (index, memory)));
        }
    }
}

impl Loader {
    /// Loads tensors into memory that the caller has: each destination is the name of a tensor and
    /// the place for its bytes, on the [device](Self::device) that the loader loads to. In host
    /// memory, nothing is allocated but for 12 MiB of scratch; on a device, nothing but what
    /// [conversions](Self::dtype), small tensors and cuFile pass through.
    ///
    /// The destinations say what is loaded: a selected tensor without one is left out. A
    /// destination is exactly as long as its tensor is once [sliced](Self::slice) and
    /// [converted](Self::dtype). Its alignment is the caller's affair; bytes that start at an
    /// address that equals their file offset ([`TensorInfo::file_range`](fst_format::TensorInfo))
    /// modulo a page are read in place from cold storage, all others pass through scratch memory,
    /// which costs a copy. What the page cache holds is copied once either way.
    ///
    /// When the load fails, destinations hold anything.
    ///
    /// ```no_run
    /// use fst::{Checkpoint, Destination, Loader};
    ///
    /// let checkpoint = Checkpoint::open("model")?;
    /// let mut norm = vec![0f32; 4096];
    /// let mut raw = vec![0u8; 32000 * 4096 * 2];
    /// Loader::new().load_into(
    ///     &checkpoint,
    ///     [
    ///         ("model.norm.weight", Destination::elements(&mut norm)),
    ///         ("lm_head.weight", Destination::from(&mut raw)),
    ///     ],
    /// )?;
    /// # Ok::<(), fst::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Before anything is read: [`Error::UnknownTensor`], [`Error::NotSelected`],
    /// [`Error::DuplicateDestination`], [`Error::DestinationLength`], [`Error::WrongDtype`] for
    /// typed destinations, [`Error::DestinationDevice`], and [`Error::Misaligned`] for device memory
    /// that a conversion cannot write to. Then what is wrong with the files or the machine.
    pub fn load_into<'d, N, D>(
        &self,
        checkpoint: &Checkpoint,
        destinations: impl IntoIterator<Item = (N, D)>,
    ) -> Result<LoadReport>
    where
        N: AsRef<str>,
        D: Into<Destination<'d>>,
    {
        self.ranks.refuse("memory of the caller's")?;
        let engine = resolve_engine(self.read.engine, self.target())?;
        let mut report = LoadReport::new(engine, self.target().clone());
        report.push("open", checkpoint.open_time(), 0);
        let began = Instant::now();
        let wanted = self.pair(checkpoint, destinations)?;
        report.tensors = wanted.len();
        report.bytes = wanted.iter().map(|(item, _)| item.len()).sum();
        let (items, places): (Vec<Item>, Vec<Place<'d>>) = wanted.into_iter().unzip();
        if let Some(manifest) = &self.manifest {
            manifest.check(checkpoint, &items)?;
        }
        if let Some(device) = self.target().as_cuda() {
            self.load_into_device(checkpoint, items, places, device, began, &mut report)?;
            return Ok(report);
        }
        let mut memory = Vec::with_capacity(places.len());
        for (item, place) in items.iter().zip(places) {
            match place {
                Place::Host(bytes) => memory.push(bytes),
                Place::Device(_) => return Err(self.elsewhere(item)),
            }
        }
        let (files, number) = open_files(checkpoint, &items)?;
        report.add_files(&files);
        let align = files.iter().map(SourceFile::align).max().unwrap_or(Limits::MIN_ALIGN);
        let mut ways = Ways::default();
        for (item, memory) in items.iter().enumerate().zip(&mut memory) {
            if let Some(file) = number[item.1.info.shard()].filter(|_| item.1.source_len() > 0) {
                ways.sort(item, file, &files[file as usize], align, memory);
            }
        }
        self.fill(&items, &files, ways, align, began, &|_, _| Ok(()), &mut report)?;
        if let Some(manifest) = &self.manifest {
            let named = items.iter().zip(&memory).map(|(item, memory)| {
                let (start, len) = (memory.as_ptr().cast::<u8>(), memory.len());
                // SAFETY: the reads succeeded, and with them every byte was written.
                (item.info.name(), unsafe { std::slice::from_raw_parts(start, len) })
            });
            let hashed = Hashed::default();
            verify_all(manifest, &hashed, &named.collect::<Vec<_>>())?;
            hashed.report(&mut report);
        }
        Ok(report)
    }

    /// Reads `items` out of `files` by the ways that they were sorted into; see [`Reads::run`] for `landed`.
    /// Planning has been going on since `began`.
    #[allow(clippy::too_many_arguments, reason = "what two kinds of load have in common")]
    pub(crate) fn fill(
        &self,
        items: &[Item],
        files: &[SourceFile],
        ways: Ways<'_>,
        align: u64,
        began: Instant,
        landed: OnFilled<'_>,
        report: &mut LoadReport,
    ) -> Result<()> {
        let load = Reads::new(ways, align).map_err(|e| locate(e, items))?;
        available::check(!self.unchecked && load.uses_scratch(), SCRATCH)?;
        report.tensors = items.len();
        report.bytes = items.iter().map(Item::len).sum();
        report.push("plan", began.elapsed(), 0);

        let began = Instant::now();
        let bytes_total = load.bytes_read();
        let watch = Watch::new(self.cancel.flag());
        let progress = |bytes_done| Progress {
            bytes_done,
            bytes_total,
            tensors_total: items.len(),
            elapsed: began.elapsed(),
        };
        let reads = self.watched(&watch, &progress, || {
            load.run(files, &self.read, &watch, landed).map_err(|e| locate(e, items))
        })?;
        report.push("read", began.elapsed(), bytes_total);
        report.add_reads(&reads);
        Ok(())
    }

    /// The destination of `item` is not where this loader loads to.
    pub(crate) fn elsewhere(&self, item: &Item) -> Error {
        let tensor = item.info.name().to_owned();
        Error::DestinationDevice { tensor, device: self.target().clone() }
    }

    /// Loads into device memory.
    fn load_into_device(
        &self,
        checkpoint: &Checkpoint,
        items: Vec<Item>,
        places: Vec<Place<'_>>,
        device: &CudaDevice,
        began: Instant,
        report: &mut LoadReport,
    ) -> Result<()> {
        let mut given = Vec::with_capacity(places.len());
        for (item, place) in items.iter().zip(&places) {
            let Place::Device(DevicePlace { address, len, context, .. }) = *place else {
                return Err(self.elsewhere(item));
            };
            if context.is_some_and(|context| context != device.context() as usize) {
                return Err(self.elsewhere(item));
            }
            if item.cast().is_some() && !address.is_multiple_of(item.align()) {
                let tensor = item.info.name().to_owned();
                return Err(Error::Misaligned { tensor, dtype: item.dtype });
            }
            // SAFETY: whoever made the destination vouches for its memory as long as `places` live.
            given.push(unsafe { DeviceArena::lent(device, address, len) });
        }
        let load = CudaLoad::new(checkpoint, items, device, 0, 0)?;
        // SAFETY: as above.
        let load = unsafe { load.with_options(self.device_options).into_memory(given.clone()) };
        load.check_memory(&self.read, !self.unchecked)?;
        report.add_files(load.files());
        report.push("plan", began.elapsed(), 0);

        let began = Instant::now();
        let bytes_total = load.bytes_read();
        let watch = Watch::new(self.cancel.flag());
        let progress = |bytes_done| Progress {
            bytes_done,
            bytes_total,
            tensors_total: load.items().len(),
            elapsed: began.elapsed(),
        };
        let nothing = |_: usize, _: Tensor| Ok(());
        let reads =
            self.watched(&watch, &progress, || load.run(&self.read, None, &watch, &nothing))?;
        report.push("read", began.elapsed(), bytes_total);
        report.add_reads(&reads);
        report.device_copy = load.copy();
        if let Some(manifest) = &self.manifest {
            let hashed = Hashed::default();
            for (item, arena) in load.items().iter().zip(&given) {
                let mut bytes = vec![0; arena.len() as usize];
                arena.copy_to_host(0, &mut bytes).map_err(DeviceError::Cuda)?;
                verify_all(manifest, &hashed, &[(item.info.name(), &bytes)])?;
            }
            hashed.report(report);
        }
        Ok(())
    }

    /// The items that have destinations, each with its memory, in the checkpoint's order.
    fn pair<'d, N: AsRef<str>, D: Into<Destination<'d>>>(
        &self,
        checkpoint: &Checkpoint,
        destinations: impl IntoIterator<Item = (N, D)>,
    ) -> Result<Vec<(Item, Place<'d>)>> {
        let mut by_name: HashMap<String, Destination<'d>> = HashMap::new();
        for (name, destination) in destinations {
            let tensor = name.as_ref();
            if by_name.insert(tensor.to_owned(), destination.into()).is_some() {
                return Err(Error::DuplicateDestination { tensor: tensor.to_owned() });
            }
        }
        let mut wanted = Vec::with_capacity(by_name.len());
        let selection = self.selection.clone().of_names(by_name.keys());
        for item in selection.resolve(checkpoint)? {
            let Some(destination) = by_name.remove(item.name()) else { continue };
            destination.check(&item)?;
            wanted.push((item, destination.memory));
        }
        match by_name.into_keys().min() {
            Some(name) if checkpoint.get(&name).is_none() => Err(Error::UnknownTensor { name }),
            Some(tensor) => Err(Error::NotSelected { tensor }),
            None => Ok(wanted),
        }
    }
}

/// The reads of one load, one after the other.
struct Reads<'d> {
    aligned: (ReadPlan, Vec<(usize, Memory<'d>)>),
    cached: (ReadPlan, Vec<(usize, Memory<'d>)>),
    scratch: (TransformPlan, Vec<(usize, Memory<'d>)>),
}

impl<'d> Reads<'d> {
    fn new(ways: Ways<'d>, align: u64) -> Result<Self, fst_io::Error> {
        // Every extent is a segment of its own, for each has its own memory.
        let apart = Limits { align, gap: 0, segment: 1, ..Limits::default() };
        let (extents, memory) = ways.aligned.into_iter().unzip();
        let aligned = (ReadPlan::new(extents, apart)?, memory);
        let (extents, memory) = ways.cached.into_iter().unzip();
        let cached = (ReadPlan::new(extents, Limits { align: 1, ..apart })?, memory);
        let (pieces, memory): (Vec<Piece>, Vec<_>) = ways.scratch.into_iter().unzip();
        let limits = Limits { align, block: SCRATCH_BLOCK, ..Limits::default() };
        let sharing = Sharing { arena: 0, align: 1, apart: 0 };
        let scratch = (TransformPlan::of_pieces(&pieces, limits, sharing)?, memory);
        Ok(Self { aligned, cached, scratch })
    }

    /// Whether scratch memory is used.
    fn uses_scratch(&self) -> bool {
        !self.scratch.1.is_empty()
    }

    fn bytes_read(&self) -> u64 {
        let plans = [&self.aligned.0, &self.cached.0, &self.scratch.0.plan];
        plans.into_iter().map(ReadPlan::bytes_read).sum()
    }

    /// Reads everything. `landed` is told of bytes of the file that are in place, with the number of the
    /// item that they are of: once it was told of all, nothing touches the item's memory any more.
    fn run(
        self,
        files: &[SourceFile],
        options: &ReadOptions,
        watch: &Watch,
        landed: OnFilled<'_>,
    ) -> Result<Vec<ReadStats>, fst_io::Error> {
        let mut reads = Vec::new();
        let mut buffered = options.clone();
        buffered.cache = CachePolicy::Buffered;
        for ((plan, memory), options) in [(self.aligned, options), (self.cached, &buffered)] {
            if !plan.blocks().is_empty() {
                let (of, memory): (Vec<usize>, Vec<Memory<'d>>) = memory.into_iter().unzip();
                let block = |block: &Block| {
                    let item = of.get(block.segment as usize);
                    item.map_or(Ok(()), |item| landed(*item, block.need))
                };
                let sink = Lent::new(&plan, memory);
                let sink = sink.map_err(|e| fst_io::Error::Sink(e.into()))?.on_landed(&block);
                reads.push(fst_io::read(files, &plan, &sink, options, &watch.next())?);
            }
        }
        let (plan, memory) = self.scratch;
        if !plan.plan.blocks().is_empty() {
            let (of, memory): (Vec<usize>, Vec<Memory<'d>>) = memory.into_iter().unzip();
            let filled =
                |piece: usize, bytes| of.get(piece).map_or(Ok(()), |item| landed(*item, bytes));
            let transform = Transform::new(&plan, Borrowed::new(memory, &filled));
            let admit = |block: &_, wait| transform.admit(block, wait);
            let take = |block: &_, bytes: &[u8]| transform.take(block, bytes);
            let slots = (SCRATCH / plan.plan.limits().block).max(1) as usize;
            let sink = Scratch::new(&plan.plan, slots, &admit, &take)?;
            reads.push(fst_io::read(files, &plan.plan, &sink, options, &watch.next())?);
        }
        Ok(reads)
    }
}
