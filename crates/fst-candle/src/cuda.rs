//! Device memory that is candle's, filled by fst.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtrMut, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape, Storage, Tensor};
use fst::{Checkpoint, Destination, Loader};

use crate::background::Want;
use crate::error::wrapped;

/// Reads tensors into memory that candle allocates: no copy on the device, and one wait for all of them.
pub(crate) fn read(
    loader: Loader,
    checkpoint: &Checkpoint,
    device: &CudaDevice,
    wants: &[Want<'_>],
) -> Result<Vec<Tensor>> {
    let mut slices = Vec::with_capacity(wants.len());
    let mut destinations = Vec::with_capacity(wants.len());
    for want in wants {
        let mut slice = alloc(device, want.way.read, want.bytes)?;
        let address = address(&mut slice, device);
        // SAFETY: candle allocated so many bytes on this device, in its primary context. What is queued
        // (the allocation) is waited for below, and nobody else has the slice before the load is over.
        let destination = unsafe { Destination::device_bytes(address, want.bytes as u64) };
        destinations.push((want.name, destination));
        slices.push(slice);
    }
    device.synchronize()?;
    let ordinal = device.cuda_stream().context().ordinal();
    let loader = loader.device(fst::Device::cuda(ordinal).map_err(wrapped)?);
    loader.load_into(checkpoint, destinations).map_err(wrapped)?;
    let tensor = |(slice, want): (CudaStorageSlice, &Want<'_>)| {
        let storage = Storage::Cuda(CudaStorage { slice, device: device.clone() });
        Tensor::from_storage(storage, Shape::from(&*want.shape), BackpropOp::none(), false)
    };
    Ok(slices.into_iter().zip(wants).map(tensor).collect())
}

/// Memory for `bytes` bytes of elements.
fn alloc(device: &CudaDevice, dtype: DType, bytes: usize) -> Result<CudaStorageSlice> {
    fn slice<T: DeviceRepr>(device: &CudaDevice, bytes: usize) -> Result<CudaSlice<T>> {
        // SAFETY: nobody reads it before the load has filled it.
        unsafe { device.alloc::<T>(bytes / size_of::<T>()) }
    }
    macro_rules! of {
        ($($kind:ident)*) => {
            match dtype {
                $(DType::$kind => CudaStorageSlice::$kind(slice(device, bytes)?),)*
                // Nobody asks for a type that candle has only later (`dtype::to_candle`).
                _ => CudaStorageSlice::U8(slice(device, bytes)?),
            }
        };
    }
    Ok(of!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0))
}

/// Where the memory is.
fn address(slice: &mut CudaStorageSlice, device: &CudaDevice) -> u64 {
    fn of<T>(slice: &mut CudaSlice<T>, device: &CudaDevice) -> u64 {
        slice.device_ptr_mut(&device.cuda_stream()).0
    }
    macro_rules! of {
        ($($kind:ident)*) => {
            match slice { $(CudaStorageSlice::$kind(slice) => of(slice, device),)* }
        };
    }
    of!(U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0)
}
