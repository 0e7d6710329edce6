//! Tensors that own their memory, and the set that a load returns.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use cudarc::driver::CudaStream;
use fst_format::{Dtype, Element, Planned, TensorInfo};
#[cfg(feature = "cuda")]
use fst_gpu::ArenaView;
use fst_gpu::dlpack::{DlDataType, DlDevice, DlSource};
use fst_gpu::{CudaMemory, Filled};
use fst_io::{Mapping, Piece, SharedBuffer};

use crate::device::Device;
use crate::error::{DeviceError, Error, Result};
use crate::into::Destination;
use crate::report::LoadReport;

/// A loaded tensor: a name, a shape, a dtype, and a counted reference to the memory that holds its
/// elements, in row-major order without gaps.
///
/// Cloning is cheap and shares the memory. The memory is freed with the last clone:
/// in host memory the pages that no other tensor of the same arena shares, on a device with the last
/// tensor of the arena. While a [stream](crate::Loader::stream) runs, what its tensors free in host memory
/// is used for the next ones.
#[derive(Clone)]
pub struct Tensor {
    info: TensorInfo,
    /// The name, where it is not the one in the checkpoint.
    name: Option<Arc<str>>,
    dtype: Dtype,
    /// The shape, where it is not the one in the checkpoint.
    shape: Option<Box<[usize]>>,
    data: Data,
}

/// Why mapped tensors are not written to.
const MAPPED: &str = "its bytes are those of a file; load it instead of mapping it";

/// Where the elements are.
#[derive(Clone)]
pub(crate) enum Data {
    /// A part of an arena in host memory.
    Host(Piece),
    /// `offset..offset + len` of an arena on a CUDA device, and what all share that may look at these
    /// elements.
    Cuda { memory: Arc<CudaMemory>, offset: u64, len: u64, owners: Arc<()> },
    /// `offset..offset + len` of a mapped file.
    Mapped { map: Arc<Mapping>, offset: usize, len: usize },
}

impl Data {
    /// Whether nobody else may look at the elements.
    fn is_owned(&mut self) -> bool {
        match self {
            Self::Host(piece) => piece.is_owned(),
            Self::Cuda { owners, .. } => Arc::get_mut(owners).is_some(),
            Self::Mapped { .. } => false,
        }
    }

    /// `len` bytes that a load made.
    pub(crate) fn of(filled: Filled, len: u64) -> Self {
        match filled {
            Filled::Host(bytes) => Self::Host(bytes),
            Filled::Cuda { memory, offset } => {
                Self::Cuda { memory, offset, len, owners: Arc::default() }
            }
        }
    }

    /// Bytes `offset..offset + len` of an arena in host memory, which go when nobody holds them.
    ///
    /// # Safety
    ///
    /// They are read through this value and its clones only from here on.
    pub(crate) unsafe fn host(arena: SharedBuffer, offset: usize, len: usize) -> Self {
        // SAFETY: passed on from the caller.
        Self::Host(unsafe { arena.piece(offset..offset + len) })
    }
}

impl Tensor {
    pub(crate) fn new(info: TensorInfo, dtype: Dtype, shape: Option<&[usize]>, data: Data) -> Self {
        let shape = shape.map(Into::into);
        Self { info, name: None, dtype, shape, data }
    }

    /// The tensor that an item was loaded as.
    pub(crate) fn of(item: &Planned, data: Data) -> Self {
        let shape = item.slice().map(|slice| slice.shape());
        let tensor = Self::new(item.source().clone(), item.dtype(), shape, data);
        Self { name: item.new_name().cloned(), ..tensor }
    }

    /// The same tensor by another name.
    #[cfg(feature = "dist")]
    pub(crate) fn named(self, name: &str) -> Self {
        let name = (name != self.info.name()).then(|| name.into());
        Self { name, ..self }
    }

    /// Its name: the one in the checkpoint, or that of the tensor that several are
    /// [fused](crate::Split::fused_into) into.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.info.name())
    }

    /// Type of its elements, as loaded.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        self.shape.as_deref().unwrap_or_else(|| self.info.shape())
    }

    /// Number of its elements.
    pub fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// Number of its bytes.
    pub fn byte_len(&self) -> usize {
        match &self.data {
            Data::Host(piece) => piece.len(),
            Data::Mapped { len, .. } => *len,
            Data::Cuda { len, .. } => *len as usize,
        }
    }

    /// What the checkpoint says of it: the tensor before slicing, sharding and conversion; of several
    /// that are fused, the first.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// Where its elements are.
    pub fn device(&self) -> Device {
        match &self.data {
            Data::Host(_) | Data::Mapped { .. } => Device::host(),
            Data::Cuda { memory, .. } => Device::of_cuda(memory.arena().device()),
        }
    }

    /// Whether its bytes are those of a [mapped](crate::Loader::map) file.
    pub fn is_mapped(&self) -> bool {
        self.mapping().is_some()
    }

    /// Its place in a mapped file.
    pub(crate) fn mapping(&self) -> Option<(&Arc<Mapping>, Range<usize>)> {
        match &self.data {
            Data::Mapped { map, offset, len } => Some((map, *offset..*offset + *len)),
            Data::Host(_) | Data::Cuda { .. } => None,
        }
    }

    /// Its bytes: little-endian elements in row-major order.
    ///
    /// # Errors
    ///
    /// [`Error::NotOnHost`] when they are in a device's memory.
    pub fn bytes(&self) -> Result<&[u8]> {
        let bytes = match &self.data {
            Data::Host(piece) => Some(&**piece),
            Data::Cuda { .. } => None,
            Data::Mapped { map, offset, len } => map.get(*offset..*offset + *len),
        };
        bytes.ok_or_else(|| Error::NotOnHost {
            tensor: self.name().to_owned(),
            device: self.device(),
        })
    }

    /// The tensor in host memory: itself if it is there already, else a copy.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] when the copy fails, [`Error::Io`] when there is no memory for it.
    pub fn to_host(&self) -> Result<Self> {
        let Data::Cuda { memory, offset, len, .. } = &self.data else { return Ok(self.clone()) };
        let arena = SharedBuffer::filled(*len as usize, |bytes| {
            memory.arena().copy_to_host(*offset, bytes).map_err(DeviceError::Cuda)?;
            Ok::<(), Error>(())
        })?;
        // SAFETY: the buffer is new and this is all of it.
        let data = unsafe { Data::host(arena, 0, *len as usize) };
        Ok(Self { data, ..self.clone() })
    }

    /// Address of the first element in the memory of its CUDA device; `None` for tensors in host
    /// memory. Valid as long as a tensor of the same arena lives.
    pub fn device_ptr(&self) -> Option<u64> {
        match &self.data {
            Data::Cuda { memory, offset, .. } => Some(memory.arena().address() + offset),
            Data::Host(_) | Data::Mapped { .. } => None,
        }
    }

    /// The elements as a cudarc view, without a copy, for use on `stream`. The view keeps the
    /// memory alive.
    ///
    /// # Errors
    ///
    /// [`Error::WrongDtype`], or [`Error::Device`] when the tensor is not on the stream's device.
    #[cfg(feature = "cuda")]
    pub fn cuda_view<T: Element>(&self, stream: &Arc<CudaStream>) -> Result<ArenaView<T>> {
        let Data::Cuda { memory, offset, .. } = &self.data else {
            return Err(DeviceError::NotOnDevice { tensor: self.name().to_owned() }.into());
        };
        self.check_dtype::<T>()?;
        let view = ArenaView::new(memory.arena(), stream, *offset, self.elements())
            .map_err(DeviceError::Cuda)?;
        // The memory counts against a stream's budget as long as the view uses it, and the elements
        // have another reader.
        Ok(view.keeping(Arc::new(self.clone())))
    }

    /// The tensor for export through DLPack, without a copy, to be read only; whoever takes it keeps
    /// the memory alive until it calls the deleter. This tensor, its clones and other exports share
    /// the elements: export it as [`Writes::Forbidden`](fst_gpu::dlpack::Writes), and give it to
    /// consumers that heed the flag. Some do not (PyTorch writes to what it was told is read-only), and
    /// the unversioned form has none: a write through such an export while anyone reads the tensor is
    /// undefined behaviour, the consumer's. [`into_dlpack`](Self::into_dlpack) is for them.
    ///
    /// # Errors
    ///
    /// [`DeviceError::NoCounterpart`] for elements that DLPack has no code for.
    pub fn dlpack(&self) -> Result<DlSource> {
        self.clone().export()
    }

    /// As [`dlpack`](Self::dlpack), but of its bytes: one dimension of `uint8`, for elements that DLPack's
    /// consumers do not know, such as packed ones of fewer than 8 bits.
    ///
    /// # Errors
    ///
    /// None today.
    pub fn dlpack_bytes(&self) -> Result<DlSource> {
        let bytes = self.byte_len() as i64;
        self.clone().export_as(DlDataType::new(DlDataType::UINT, 8), vec![bytes])
    }

    /// As [`into_dlpack`](Self::into_dlpack), of its [bytes](Self::dlpack_bytes).
    ///
    /// # Errors
    ///
    /// [`Error::NotWritable`] as for [`into_dlpack`](Self::into_dlpack).
    pub fn into_dlpack_bytes(mut self) -> Result<DlSource> {
        self.check_writable()?;
        let bytes = self.byte_len() as i64;
        self.export_as(DlDataType::new(DlDataType::UINT, 8), vec![bytes])
    }

    /// The tensor's bytes as a value of its own, which keeps them alive: for what takes any owner of bytes,
    /// such as `bytes::Bytes::from_owner`. Copied to the host if they are on a device.
    ///
    /// # Errors
    ///
    /// As for [`to_host`](Self::to_host).
    pub fn into_bytes(self) -> Result<TensorBytes> {
        self.to_host().map(TensorBytes)
    }

    /// Hands the tensor over to whoever takes the export, without a copy, who may write to it
    /// ([`Writes::Allowed`](fst_gpu::dlpack::Writes)): nobody else can look at its elements any more.
    /// Other tensors of the arena are not affected.
    ///
    /// # Errors
    ///
    /// [`Error::NotWritable`] when a clone, a view or another export of it lives, or when it is
    /// [mapped](crate::Loader::map); otherwise as for [`dlpack`](Self::dlpack).
    pub fn into_dlpack(mut self) -> Result<DlSource> {
        self.check_writable()?;
        self.export()
    }

    /// Its memory, for writing, if nobody else may look at the elements.
    pub(crate) fn destination(&mut self) -> Option<Destination<'_>> {
        if !self.data.is_owned() {
            return None;
        }
        match &mut self.data {
            Data::Host(piece) => piece.get_mut().map(Into::into),
            Data::Cuda { memory, offset, len, .. } => {
                let address = memory.arena().address() + *offset;
                // SAFETY: nobody else has these bytes, by the check above, as long as this borrow lasts.
                Some(unsafe { Destination::device_bytes(address, *len) })
            }
            Data::Mapped { .. } => None,
        }
    }

    /// Its memory, for writing, whoever else has the tensor.
    ///
    /// # Safety
    ///
    /// As long as the result lives nobody else reads or writes the elements, nor holds references to them.
    pub(crate) unsafe fn shared_destination(&self) -> Result<Destination<'_>> {
        match &self.data {
            Data::Host(piece) => {
                let Some(start) = piece.address() else { return Ok(<&mut [u8]>::default().into()) };
                // SAFETY: the piece's bytes, which nobody else uses, by the caller's word.
                let bytes =
                    unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.byte_len()) };
                Ok(bytes.into())
            }
            Data::Cuda { memory, offset, len, .. } => {
                let address = memory.arena().address() + offset;
                // SAFETY: passed on from the caller.
                Ok(unsafe { Destination::device_bytes(address, *len) })
            }
            Data::Mapped { .. } => Err(self.not_writable(MAPPED)),
        }
    }

    /// The tensor once an item of its kind was read into it.
    pub(crate) fn updated(self, item: &Planned) -> Self {
        Self::of(item, self.data)
    }

    /// Whether it is all of a tensor of a checkpoint, in its shape.
    pub(crate) fn is_whole(&self) -> bool {
        self.shape.is_none()
    }

    fn not_writable(&self, reason: &'static str) -> Error {
        Error::NotWritable { tensor: self.name().to_owned(), reason }
    }

    /// Refuses to let anyone write to what others look at.
    pub(crate) fn check_writable(&mut self) -> Result<()> {
        let reason = if self.is_mapped() {
            MAPPED
        } else if !self.data.is_owned() {
            "a clone, a view or another export of it is in use; drop these first"
        } else {
            return Ok(());
        };
        Err(self.not_writable(reason))
    }

    /// An export that owns `self`.
    fn export(self) -> Result<DlSource> {
        let dtype = dl_dtype(self.dtype)
            .ok_or(DeviceError::NoCounterpart { dtype: self.dtype, as_what: "DLPack" })?;
        let shape = self.shape().iter().map(|dim| *dim as i64).collect();
        self.export_as(dtype, shape)
    }

    fn export_as(self, dtype: DlDataType, shape: Vec<i64>) -> Result<DlSource> {
        let (address, device) = match &self.data {
            Data::Host(piece) => {
                (piece.address().map_or(0, |address| address.as_ptr() as u64), DlDevice::CPU)
            }
            Data::Mapped { .. } => (self.bytes()?.as_ptr() as u64, DlDevice::CPU),
            Data::Cuda { memory, offset, .. } => {
                let arena = memory.arena();
                (arena.address() + offset, DlDevice::cuda(arena.device().ordinal()))
            }
        };
        Ok(DlSource { owner: Arc::new(self), address, device, dtype, shape })
    }

    fn check_dtype<T: Element>(&self) -> Result<()> {
        if T::DTYPE == self.dtype {
            return Ok(());
        }
        let tensor = self.name().to_owned();
        Err(Error::WrongDtype { tensor, asked: T::DTYPE, found: self.dtype })
    }

    /// Its elements, typed. On a big-endian machine this is refused for elements of more than one
    /// byte, since the format is little-endian.
    ///
    /// # Errors
    ///
    /// [`Error::WrongDtype`] when the tensor holds another type, [`Error::NotOnHost`] when it is in
    /// a device's memory.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.check_dtype::<T>()?;
        let bytes = self.bytes()?;
        if bytes.is_empty() {
            // No memory stands behind it, and its address is not aligned for anything.
            return Ok(&[]);
        }
        bytemuck::try_cast_slice(bytes)
            .ok()
            .filter(|_| cfg!(target_endian = "little") || size_of::<T>() == 1)
            .ok_or_else(|| Error::Misaligned { tensor: self.name().to_owned(), dtype: self.dtype })
    }
}

/// The bytes of a tensor in host memory, which live as long as this value; see [`Tensor::into_bytes`].
#[derive(Debug, Clone)]
pub struct TensorBytes(Tensor);

impl AsRef<[u8]> for TensorBytes {
    fn as_ref(&self) -> &[u8] {
        // It is on the host.
        self.0.bytes().unwrap_or_default()
    }
}

/// What DLPack calls a type of element. Packed types of fewer than 8 bits are left out: DLPack's
/// consumers do not agree on how they are packed.
fn dl_dtype(dtype: Dtype) -> Option<DlDataType> {
    let (code, bits) = match dtype {
        Dtype::Bool => (DlDataType::BOOL, 8),
        Dtype::U8 => (DlDataType::UINT, 8),
        Dtype::U16 => (DlDataType::UINT, 16),
        Dtype::U32 => (DlDataType::UINT, 32),
        Dtype::U64 => (DlDataType::UINT, 64),
        Dtype::I8 => (DlDataType::INT, 8),
        Dtype::I16 => (DlDataType::INT, 16),
        Dtype::I32 => (DlDataType::INT, 32),
        Dtype::I64 => (DlDataType::INT, 64),
        Dtype::F16 => (DlDataType::FLOAT, 16),
        Dtype::BF16 => (DlDataType::BFLOAT, 16),
        Dtype::F32 => (DlDataType::FLOAT, 32),
        Dtype::F64 => (DlDataType::FLOAT, 64),
        Dtype::C64 => (DlDataType::COMPLEX, 64),
        Dtype::F8E4M3 => (DlDataType::FLOAT8_E4M3FN, 8),
        Dtype::F8E5M2 => (DlDataType::FLOAT8_E5M2, 8),
        Dtype::F8E4M3Fnuz => (DlDataType::FLOAT8_E4M3FNUZ, 8),
        Dtype::F8E5M2Fnuz => (DlDataType::FLOAT8_E5M2FNUZ, 8),
        Dtype::F8E8M0 => (DlDataType::FLOAT8_E8M0FNU, 8),
        _ => return None,
    };
    Some(DlDataType::new(code, bits))
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor")
            .field("name", &self.name())
            .field("dtype", &self.dtype)
            .field("shape", &self.shape())
            .field("device", &self.device())
            .finish_non_exhaustive()
    }
}

/// The tensors of a load, in the checkpoint's order (by shard, then by place in it), and its
/// report.
#[derive(Debug, Clone)]
pub struct Tensors {
    tensors: Vec<Tensor>,
    by_name: HashMap<Box<str>, usize>,
    report: LoadReport,
}

impl Tensors {
    pub(crate) fn new(tensors: Vec<Tensor>, report: LoadReport) -> Self {
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name().into(), i)).collect();
        Self { tensors, by_name, report }
    }

    /// The tensor of this name.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTensor`] when none was loaded.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.by_name
            .get(name)
            .and_then(|index| self.tensors.get(*index))
            .ok_or_else(|| Error::UnknownTensor { name: name.to_owned() })
    }

    /// All tensors.
    pub fn iter(&self) -> std::slice::Iter<'_, Tensor> {
        self.tensors.iter()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether nothing was loaded.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [Tensor] {
        &mut self.tensors
    }

    /// Takes all tensors out.
    pub(crate) fn take(&mut self) -> Vec<Tensor> {
        self.by_name.clear();
        std::mem::take(&mut self.tensors)
    }

    pub(crate) fn report_mut(&mut self) -> &mut LoadReport {
        &mut self.report
    }

    /// What the load did.
    pub fn report(&self) -> &LoadReport {
        &self.report
    }
}

impl<'a> IntoIterator for &'a Tensors {
    type Item = &'a Tensor;
    type IntoIter = std::slice::Iter<'a, Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl IntoIterator for Tensors {
    type Item = Tensor;
    type IntoIter = std::vec::IntoIter<Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.tensors.into_iter()
    }
}
