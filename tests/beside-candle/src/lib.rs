//! fst and candle in one build, in each other's hands: what a user of both would write. It is
//! type-checked only (see `tools/beside-candle`): candle's kernels need NVIDIA's compiler, and
//! nothing here runs.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaDType;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Shape, Storage, Tensor};
use cudarc::driver::CudaView;
use std::error::Error;

/// The fst device that a candle device is.
///
/// # Errors
///
/// fst's, where that device cannot be opened.
pub fn device_of(device: &CudaDevice) -> fst::Result<fst::Device> {
    fst::Device::cuda(device.cuda_stream().context().ordinal())
}

/// A tensor that fst loaded, as cudarc sees it on candle's stream, handed to a candle function
/// without a copy; then as a candle tensor, by one copy on the device.
///
/// # Errors
///
/// Elements that are no bf16, another device, or an error of the driver.
pub fn to_candle(tensor: &fst::Tensor, device: &CudaDevice) -> Result<Tensor, Box<dyn Error>> {
    // One cudarc in the build: the stream, the view and the slice below are of the same types.
    let loaded = tensor.cuda_view::<half::bf16>(&device.cuda_stream())?;
    let view: CudaView<'_, half::bf16> = loaded.view();
    // SAFETY: all of it is written by the copy before anything reads it.
    let mut slice = unsafe { device.alloc::<half::bf16>(tensor.elements()) }?;
    device.memcpy_dtod(&view, &mut slice)?;
    device.synchronize()?;
    let storage: CudaStorage = half::bf16::wrap_cuda_slice(slice, device.clone());
    let shape = Shape::from(tensor.shape().to_vec());
    let tensor = Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false);
    debug_assert!(tensor.dtype() == DType::BF16 && matches!(tensor.device(), Device::Cuda(_)));
    Ok(tensor)
}

/// Loads a checkpoint onto candle's device.
///
/// # Errors
///
/// What is wrong with the files, the device or the tensors.
pub fn load(path: &str, ordinal: usize) -> Result<Vec<(String, Tensor)>, Box<dyn Error>> {
    let device = CudaDevice::new(ordinal)?;
    let checkpoint = fst::Checkpoint::open(path)?;
    let tensors = fst::Loader::new().device(device_of(&device)?).load(&checkpoint)?;
    tensors.iter().map(|t| Ok((t.name().to_owned(), to_candle(t, &device)?))).collect()
}

/// A `VarBuilder` whose tensors fst reads straight to candle's device.
///
/// # Errors
///
/// What is wrong with the files or the device.
pub fn var_builder(
    path: &str,
    ordinal: usize,
) -> candle_core::Result<candle_nn::VarBuilder<'static>> {
    fst_candle::var_builder(path, DType::BF16, &Device::new_cuda(ordinal)?)
}
