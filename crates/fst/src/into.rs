//! Loads into memory that the caller has: a model's own parameters, a shared segment, a pool.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::time::Instant;

#[cfg(feature = "cuda")]
use cudarc::driver::{CudaSlice, CudaStream, CudaViewMut, DevicePtrMut, DeviceSlice, DriverError};
use fst_format::{Checkpoint, Dtype, Element, Planned};
use fst_gpu::{CudaDevice, DeviceArena};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::converts;
use crate::load::{Goals, Load};
use crate::loader::Loader;
use crate::owned::{Filled, OwnedMemory};
use crate::report::LoadReport;

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

impl DevicePlace<'_> {
    /// Whether it may be memory of this device.
    fn is_of(&self, device: &CudaDevice) -> bool {
        self.context.is_none_or(|context| context == device.context() as usize)
    }
}

impl<'d> Place<'d> {
    /// The memory, which a load to the host fills with an item.
    fn on_host(self, item: &Planned) -> Result<Borrowed<'d>> {
        match self {
            Self::Host(memory) => Ok(memory.into()),
            Self::Device(_) => Err(elsewhere(item, &Device::host())),
        }
    }

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

    /// The host memory, if it suits an item.
    pub(crate) fn host_for(self, item: &Planned) -> Result<Borrowed<'d>> {
        self.check(item)?;
        self.memory.on_host(item)
    }

    /// Checks that type and length are those of an item.
    fn check(&self, item: &Planned) -> Result<()> {
        let tensor = || item.name().to_owned();
        if let Some(asked) = self.dtype.filter(|dtype| *dtype != item.dtype()) {
            return Err(Error::WrongDtype { tensor: tensor(), asked, found: item.dtype() });
        }
        let (expected, found) = (item.byte_len(), self.memory.len());
        if expected != found {
            return Err(Error::DestinationLength { tensor: tensor(), expected, found });
        }
        Ok(())
    }

    /// `len` bytes of device memory at `address`.
    ///
    /// # Safety
    ///
    /// The bytes are allocated on the device that the tensor is loaded to, in its primary context, and
    /// for `'d` nobody else uses them, work that is queued on them included.
    pub unsafe fn device_bytes(address: u64, len: u64) -> Self {
        let place = DevicePlace { address, len, context: None, memory: PhantomData };
        Self { memory: Place::Device(place), dtype: None }
    }
}

#[cfg(feature = "cuda")]
impl<'d> Destination<'d> {
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

    /// Elements that `stream` waits for.
    fn waited_for<T: Element>(stream: &CudaStream, address: u64, len: u64) -> Result<Self> {
        let ordinal = stream.context().ordinal();
        let failed =
            |e: DriverError| crate::error::DeviceError::Cuda(fst_gpu::Error::of_cudarc(e, ordinal));
        stream.synchronize().map_err(failed)?;
        let context = Some(stream.context().cu_ctx() as usize);
        let place = DevicePlace { address, len, context, memory: PhantomData };
        Ok(Self { memory: Place::Device(place), dtype: Some(T::DTYPE) })
    }
}

/// Memory of a caller's.
pub(crate) type Memory<'d> = &'d mut [MaybeUninit<u8>];

/// Memory that is the caller's again once the load is over.
pub(crate) struct Borrowed<'d> {
    start: NonNull<MaybeUninit<u8>>,
    len: usize,
    memory: PhantomData<Memory<'d>>,
}

impl<'d> From<Memory<'d>> for Borrowed<'d> {
    fn from(memory: Memory<'d>) -> Self {
        let len = memory.len();
        Self { start: NonNull::from(memory).cast(), len, memory: PhantomData }
    }
}

// SAFETY: it is a `&'d mut [MaybeUninit<u8>]`, kept as a pointer so that moving it claims nothing.
unsafe impl Send for Borrowed<'_> {}

// SAFETY: the memory is borrowed exclusively for `'d`, and stays where it is.
unsafe impl OwnedMemory for Borrowed<'_> {
    fn memory(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: as above; the slice that is returned keeps this value borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Loader {
    /// Loads tensors into memory that the caller has: each destination is the name of a tensor and
    /// the place for its bytes, on the [device](Self::device) that the loader, or its
    /// [request](fst_format::Request::device), loads it to: if these are host and device memory, the host's is read first. In host
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
        let mut report = self.begin(checkpoint)?;
        let began = Instant::now();
        let wanted = self.pair(checkpoint, destinations)?;
        let (items, places): (Vec<Planned>, Vec<Place<'d>>) = wanted.into_iter().unzip();
        let goals = Goals::new(self, &items)?;
        let (mut on_host, mut on_devices) = (Vec::new(), Vec::new());
        for (at, (item, place)) in items.into_iter().zip(places).enumerate() {
            match (goals.device(at).as_cuda(), place) {
                (None, Place::Host(memory)) => on_host.push((item, memory.into())),
                (Some(device), Place::Device(place)) if place.is_of(device) => {
                    on_devices.push((item, place, device.clone()));
                }
                _ => return Err(elsewhere(&item, goals.device(at))),
            }
        }
        if !on_host.is_empty() || on_devices.is_empty() {
            self.fill(checkpoint, on_host, began, &mut report, &|_, _: Filled<Borrowed<'d>>| {})?;
        }
        if !on_devices.is_empty() {
            self.load_into_devices(checkpoint, on_devices, Instant::now(), &mut report)?;
        }
        Ok(report)
    }

    /// Loads into device memory.
    fn load_into_devices(
        &self,
        checkpoint: &Checkpoint,
        wanted: Vec<(Planned, DevicePlace<'_>, CudaDevice)>,
        began: Instant,
        report: &mut LoadReport,
    ) -> Result<()> {
        let items: Vec<Planned> = wanted.iter().map(|(item, ..)| item.clone()).collect();
        self.check_manifest(checkpoint, &items)?;
        report.tensors += items.len();
        report.bytes += items.iter().map(Planned::byte_len).sum::<u64>();
        let mut given = Vec::with_capacity(wanted.len());
        for (item, DevicePlace { address, len, .. }, device) in &wanted {
            let align = item.dtype().alignment() as u64;
            if item.conversion().is_some() && !address.is_multiple_of(align) {
                let tensor = item.source().name().to_owned();
                return Err(Error::Misaligned { tensor, dtype: item.dtype() });
            }
            // SAFETY: whoever made the destination vouches for its memory as long as `wanted` lives.
            given.push(unsafe { DeviceArena::borrowed(device, *address, *len) });
        }
        let options = self.device_options;
        // SAFETY: as above.
        let load = unsafe { Load::into_memory(checkpoint, items, options, given) }?;
        load.check_memory(&self.read, !self.unchecked)?;
        report.add_files(load.pieces.files());
        report.push("plan", began.elapsed(), 0);
        // What is delivered is dropped here, or once it is found right.
        self.read_all(&load, None, &self.watch(), &|_, _| Ok(()), report)
    }

    /// The items that have destinations, each with its memory, in the checkpoint's order.
    fn pair<'d, N: AsRef<str>, D: Into<Destination<'d>>>(
        &self,
        checkpoint: &Checkpoint,
        destinations: impl IntoIterator<Item = (N, D)>,
    ) -> Result<Vec<(Planned, Place<'d>)>> {
        let mut by_name: HashMap<String, Destination<'d>> = HashMap::new();
        for (name, destination) in destinations {
            let tensor = name.as_ref();
            if by_name.insert(tensor.to_owned(), destination.into()).is_some() {
                return Err(Error::DuplicateDestination { tensor: tensor.to_owned() });
            }
        }
        let mut wanted = Vec::with_capacity(by_name.len());
        let selection = self.selection.clone().of_names(by_name.keys());
        for item in selection.resolve(checkpoint, &converts)? {
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

/// The memory for `item` is not that of the device that is loaded to.
pub(crate) fn elsewhere(item: &Planned, device: &Device) -> Error {
    Error::DestinationDevice { tensor: item.name().to_owned(), device: device.clone() }
}
