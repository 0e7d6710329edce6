//! What blocks of files become, on the host and on CUDA devices: cuts, casts, and memory that is filled.
//!
//! This crate knows nothing of file formats, tensors or ranks. The driver is opened at run time; its
//! absence is an error value, never a panic or a link failure.
//!
//! A [`Piece`] says which bytes of a file are wanted and what they are converted to. What [`load`] makes
//! plans the reads for many, carries them out, and delivers the memory of each when it is complete; a [`BorrowedLoad`] fills memory that is there. To a device, blocks go by a [`Pipeline`]:
//!
//! ```text
//! reader threads --fill--> pinned blocks --async copies, several streams--> device arena
//!        ^                      |                                              |
//!        +---- ring of blocks <-+ (event behind the copies is complete)        +-> kernels
//! ```
//!
//! All that needs CUDA is behind the feature `cuda`, which is on by default. Without it, the device's names
//! that a program can hardly do without stay, and [`CudaDevice::open`] is an error that says so.
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

#[cfg(all(feature = "cuda", not(target_os = "linux")))]
compile_error!(
    "the feature `cuda` is for Linux: depend on the crate with `default-features = false`"
);

pub mod cast;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "absent.rs"]
mod cuda;
pub mod cufile;
mod device_copy;
pub mod dlpack;
mod error;
mod host;
mod load;
mod memory;
mod piece;
mod small;
mod transform;

pub use cuda::*;
pub use device_copy::{CachedCopy, DeviceCopy, DeviceOptions, Preparation};
pub use error::{Code, CudaVersion, Error, LoadError, Result};
pub use host::{BorrowedLoad, HostLoad};
pub use load::{ArenaOptions, Deliver, Filled, PieceLoad, load};
pub use memory::OnFilled;
pub use piece::{HOST_ALIGN, Piece, PieceError, Runs};
pub use small::SMALL_PIECE;
