//! Host memory that becomes candle's: a vector of its storage, filled by fst.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::sync::Mutex;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Shape, Storage, Tensor};
use fst::{Checkpoint, Destination, Dtype, Filled, Loader, OwnedMemory, Reader, Request};

use crate::background::Want;
use crate::dtype::Way;

/// An expression of the vector in a storage, whatever its elements.
macro_rules! with_vec {
    ($storage:expr, $vec:ident => $what:expr) => {
        match $storage {
            candle_core::CpuStorage::U8($vec) => $what,
            candle_core::CpuStorage::U32($vec) => $what,
            candle_core::CpuStorage::I16($vec) => $what,
            candle_core::CpuStorage::I32($vec) => $what,
            candle_core::CpuStorage::I64($vec) => $what,
            candle_core::CpuStorage::BF16($vec) => $what,
            candle_core::CpuStorage::F16($vec) => $what,
            candle_core::CpuStorage::F32($vec) => $what,
            candle_core::CpuStorage::F64($vec) => $what,
            candle_core::CpuStorage::F8E4M3($vec) => $what,
            candle_core::CpuStorage::F6E2M3($vec) => $what,
            candle_core::CpuStorage::F6E3M2($vec) => $what,
            candle_core::CpuStorage::F4($vec) => $what,
            candle_core::CpuStorage::F8E8M0($vec) => $what,
        }
    };
}
pub(crate) use with_vec;

/// Room for a tensor's elements.
struct HostMemory {
    /// An empty vector of at least the tensor's capacity.
    storage: CpuStorage,
    /// The tensor's place among those that are read.
    index: usize,
    widen: bool,
}

/// An empty vector with room for so many bytes of elements.
fn room<T>(bytes: usize) -> Result<Vec<T>, std::collections::TryReserveError> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(bytes.div_ceil(size_of::<T>()))?;
    Ok(vec)
}

impl HostMemory {
    /// Room for `bytes` bytes of elements of `dtype`; for 16-bit ones where they are to be widened.
    fn new(index: usize, dtype: DType, widen: bool, bytes: usize) -> Result<Self, fst::io::Error> {
        let storage = storage(if widen { DType::I16 } else { dtype }, bytes)?;
        Ok(Self { storage, index, widen })
    }

    /// No room.
    fn empty() -> Self {
        Self { storage: CpuStorage::U8(Vec::new()), index: 0, widen: false }
    }

    /// The room, as a place to read to.
    fn destination(&mut self, bytes: usize) -> Destination<'_> {
        (&mut self.memory()[..bytes]).into()
    }

    /// The storage, whose first `bytes` bytes are initialised.
    ///
    /// # Safety
    ///
    /// They are.
    unsafe fn into_storage(self, bytes: usize) -> CpuStorage {
        let mut storage = self.storage;
        // SAFETY: the capacity is at least as much, the caller says that it is initialised, and any bytes
        // are elements of these types (numbers, or bits of floats).
        with_vec!(&mut storage, vec => unsafe { vec.set_len(bytes / element_size(vec)) });
        match (storage, self.widen) {
            (CpuStorage::I16(vec), true) => {
                CpuStorage::U32(vec.into_iter().map(|value| u32::from(value as u16)).collect())
            }
            (storage, _) => storage,
        }
    }

    /// The storage of a tensor that has landed.
    fn landed(mut filled: Filled<Self>) -> (usize, CpuStorage) {
        let bytes = filled.bytes().len();
        let memory = filled.into_inner();
        // SAFETY: `Filled` vouches for so many bytes.
        (memory.index, unsafe { memory.into_storage(bytes) })
    }
}

/// Size of a vector's elements.
fn element_size<T>(_: &Vec<T>) -> usize {
    size_of::<T>()
}

/// An empty vector of elements of `dtype` with room for `bytes` bytes.
fn storage(dtype: DType, bytes: usize) -> Result<CpuStorage, fst::io::Error> {
    let full = |_| fst::io::Error::Memory {
        bytes: bytes as u64,
        source: std::io::ErrorKind::OutOfMemory.into(),
    };
    macro_rules! of {
        ($($kind:ident)*) => {
            match dtype {
                $(DType::$kind => room(bytes).map(CpuStorage::$kind),)*
                // Nobody asks for a type that candle has only later (`dtype::to_candle`).
                _ => room(bytes).map(CpuStorage::U8),
            }
        };
    }
    of!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0).map_err(full)
}

// SAFETY: a vector's memory stays where it is when the vector is moved, and is its own.
unsafe impl OwnedMemory for HostMemory {
    fn memory(&mut self) -> &mut [MaybeUninit<u8>] {
        with_vec!(&mut self.storage, vec => {
            let spare = vec.spare_capacity_mut();
            // SAFETY: the same memory, as the bytes that it is of; no more is promised of either.
            unsafe { std::slice::from_raw_parts_mut(spare.as_mut_ptr().cast(), size_of_val(spare)) }
        })
    }

    fn dtype(&self) -> Option<Dtype> {
        None
    }
}

/// Reads tensors, in their order, each into a vector that becomes candle's.
pub(crate) fn read(
    loader: &Loader,
    checkpoint: &Checkpoint,
    wants: &[Want<'_>],
) -> fst::Result<Vec<Tensor>> {
    let mut rooms = HashMap::with_capacity(wants.len());
    for (index, Want { name, way, bytes, .. }) in wants.iter().enumerate() {
        rooms.insert(*name, HostMemory::new(index, way.read, way.widen, *bytes)?);
    }
    let landed = Mutex::new(Vec::with_capacity(wants.len()));
    loader.load_owned(
        checkpoint,
        |planned| rooms.remove(planned.name()).unwrap_or_else(HostMemory::empty),
        |_, filled| {
            let storage = HostMemory::landed(filled);
            landed.lock().unwrap_or_else(|e| e.into_inner()).push(storage);
        },
    )?;
    let mut landed = landed.into_inner().unwrap_or_else(|e| e.into_inner());
    landed.sort_by_key(|(index, _)| *index);
    let shapes = wants.iter().map(|want| &want.shape);
    Ok(landed.into_iter().zip(shapes).map(|((_, storage), shape)| tensor(storage, shape)).collect())
}

/// Reads a small tensor by the thread that asks.
pub(crate) fn read_small(
    reader: &Reader,
    request: Request,
    way: Way,
    shape: &[usize],
    bytes: usize,
) -> fst::Result<Tensor> {
    let mut memory = HostMemory::new(0, way.read, way.widen, bytes)?;
    reader.read(request, memory.destination(bytes))?;
    // SAFETY: the read succeeded, and with it every byte of the destination was written.
    let storage = unsafe { memory.into_storage(bytes) };
    Ok(tensor(storage, shape))
}

/// A tensor of a storage's elements.
fn tensor(storage: CpuStorage, shape: &[usize]) -> Tensor {
    Tensor::from_storage(Storage::Cpu(storage), Shape::from(shape), BackpropOp::none(), false)
}
