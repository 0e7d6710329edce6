//! CUDA devices, device arenas, the pinned ring and copy pipeline, and cast and gather kernels.
//!
//! This crate knows nothing of file formats or ranks. The driver is opened at run time; its
//! absence is an error value, never a panic or a link failure.
//!
//! ```text
//! reader threads --fill--> pinned blocks --async copies, several streams--> device arena
//!        ^                      |                                              |
//!        +---- ring of blocks <-+ (event behind the copies is complete)        +-> kernels
//! ```
//!
//! ```no_run
//! use fst_gpu::{CopyOp, CudaDevice, DeviceArena, Pipeline, PipelineOptions};
//!
//! # fn main() -> Result<(), fst_gpu::Error> {
//! let device = CudaDevice::open(0)?; // Err, with what was looked for, on a machine without one
//! let arena = DeviceArena::new(&device, 1 << 20)?;
//! let pipeline = Pipeline::new(&device, PipelineOptions::default())?;
//! let mut block = pipeline.acquire()?;
//! block.as_mut_slice()[..4].copy_from_slice(b"data");
//! let copy = CopyOp::Linear { source: 0, destination: arena.range(0, 4)?, len: 4 };
//! // SAFETY: the arena outlives the flush, and nothing else uses its bytes.
//! unsafe { pipeline.submit(block, &[copy])? };
//! pipeline.flush()?;
//! # Ok(())
//! # }
//! ```

pub mod buffer;
mod cached;
pub mod cast;
pub mod cufile;
mod device;
pub mod dlpack;
mod error;
pub mod kernel;
pub mod measure;
mod modules;
mod pipeline;
mod sink;
mod stream;
mod sys;
mod transfer;
mod view;

pub use buffer::device::{DEVICE_ALIGN, DeviceArena};
pub use buffer::pinned::{
    Afterwards, PinnedBlock, PinnedRing, RingOptions, kept_bytes, release_kept,
};
pub use buffer::registered::{HostAccess, RegisteredHost};
pub use cached::{CachedOptions, CachedStats, copy_cached};
pub use device::{CudaDevice, CurrentContext, DeviceMemory};
pub use error::{Code, CudaVersion, Error, Result};
pub use pipeline::{CopyOp, Done, Pipeline, PipelineOptions, PipelineStats};
pub use sink::{Admit, Landing, PipelineSink, Route};
pub use stream::{Event, Stream};
pub use sys::{DRIVER_LIBRARIES, LEAST_CUDA};
pub use transfer::{Transfer, Transfers};
pub use view::ArenaView;
