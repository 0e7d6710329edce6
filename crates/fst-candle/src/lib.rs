#![doc = include_str!("../README.md")]

#[cfg(target_endian = "big")]
compile_error!("the format is little-endian, and its bytes become candle's numbers as they are");

mod backend;
mod background;
#[cfg(feature = "cuda")]
mod cuda;
mod dtype;
mod error;
mod memory;
mod paths;
mod save;
mod weights;

pub use backend::Sharded;
pub use dtype::native_dtype;
pub use paths::Paths;
pub use save::{Save, save};
pub use weights::{Progress, Repeats, Weights};

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::VarBuilderArgs;

/// A `VarBuilder` over a checkpoint, which is read in the background from now on. Floating-point tensors are
/// converted to `dtype` while they are read. [`Weights`] has more to say about it.
///
/// What `get` gives out was read from files that had not changed up to then. Names that are not there and
/// shapes that differ are candle's own errors; all others have fst's text.
///
/// # Errors
///
/// What is wrong with the files, or too little memory.
pub fn var_builder(
    paths: impl Paths,
    dtype: DType,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    Weights::open(paths)?.var_builder(dtype, device)
}

/// A `VarBuilder` of which each tensor can be asked for in part; see [`Weights::sharded`].
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use candle_nn::var_builder::Shard;
///
/// let vb = fst_candle::sharded("path/to/model", DType::BF16, &Device::Cpu)?;
/// let hint = Shard { dim: 1, rank: 0, world_size: 4 };
/// let part = vb.pp("model.layers.0.self_attn.o_proj").get_with_hints((4096, 4096), "weight", hint)?;
/// assert_eq!(part.dims(), [4096, 1024]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
///
/// What is wrong with the files.
pub fn sharded(
    paths: impl Paths,
    dtype: DType,
    device: &Device,
) -> Result<VarBuilderArgs<'static, Sharded>> {
    Weights::open(paths)?.sharded(dtype, device)
}

/// All tensors of a checkpoint, as they are: `candle_core::safetensors::load`, for folders and shards too,
/// and without holding anything twice.
///
/// # Errors
///
/// What is wrong with the files, elements that candle has no type for, or too little memory.
pub fn load(paths: impl Paths, device: &Device) -> Result<HashMap<String, Tensor>> {
    Weights::open(paths)?.load(device)
}
