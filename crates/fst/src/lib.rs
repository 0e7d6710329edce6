//! Loads safetensors checkpoints from storage into host or GPU memory, as fast as the hardware
//! allows, and hands them out as typed tensors that own their memory.
//!
//! ```no_run
//! use fst::{Checkpoint, Loader};
//!
//! let checkpoint = Checkpoint::open("Llama-2-7b-hf")?; // folder, index.json or file
//! let tensors = Loader::new().load(&checkpoint)?;
//! let embedding = tensors.get("model.embed_tokens.weight")?; // outlives everything above
//! println!("{:?} {}", embedding.shape(), embedding.dtype());
//! println!("{:.1} GB/s", tensors.report().gb_per_s());
//! # Ok::<(), fst::Error>(())
//! ```
//!
//! # The way of the data
//!
//! ```text
//! path(s) ─▶ Checkpoint ─▶ Loader (selection, slices, dtype) ─▶ plan ─▶ engine ─▶ Tensors
//! ```
//!
//! - [`Checkpoint`] reads headers only. It is refused when anything in it is unsound.
//! - [`Loader`] says what to load and where to. Large blocks are read in parallel, straight into
//!   the memory of the tensors; what the page cache holds is copied, the rest read around it.
//! - [`Tensor`]s own their memory: each is a reference-counted part of an arena. They stay valid
//!   after the loader, the checkpoint and all other tensors are gone. No clone is needed to keep
//!   one; in host memory a tensor's own pages are freed with it, the rest
//!   of an arena with the last tensor in it.
//! - [`Loader::map`] backs tensors by a mapping of their files instead, without a copy, for whoever
//!   can promise that nobody changes the files.
//! - [`Loader::load_into`] fills memory that the caller has already.
//! - [`Loader::group`] makes a load one rank's part of several ranks' ([`dist`]): nothing is read
//!   more often than needed, and no rank receives what it does not keep.
//! - [`LoadReport`] says what was read, by which way, and what bound the load.
//!
//! # What this crate does not do
//!
//! It does not download checkpoints, does not read formats other than safetensors, and does not
//! compute with tensors.

mod available;
mod cached;
mod cuda;
mod device;
pub mod dist;
mod doctor;
mod error;
mod host;
mod into;
mod load;
mod loader;
mod loading;
mod manifest;
mod mapped;
mod memory;
mod options;
mod owned;
mod pattern;
mod progress;
mod report;
mod request;
mod session;
mod stream;
mod sums;
mod tensor;
mod transform;
mod verify;

pub use available::{AvailableMemory, MemoryLimit};
pub use cached::{CachedCopy, DeviceCopy};
pub use device::Device;
#[cfg(feature = "mpi")]
pub use dist::group::MpiGroup;
pub use dist::group::{LaunchEnv, NcclGroup};
pub use dist::{
    DistError, Experts, Group, Links, LocalGroup, Place, Plan, Preset, Remainder, Shard, Split,
    Storage, Topology,
};
pub use doctor::{CudaReport, Doctor, HugePages, Measurement, PathReport};
pub use error::{DeviceError, Error, Result};
pub use fst_format::{
    Checkpoint, Dtype, Element, Metadata, Notice, OpenOptions, Shard as ShardFile, Slice,
    TensorInfo,
};
pub use fst_io::{DirectIo, Engine, ResolvedEngine};
pub use into::Destination;
pub use loader::Loader;
pub use loading::Loading;
pub use manifest::{Checksum, Digest, Manifest, ManifestError, NotADigest, VerifyError};
pub use owned::{Filled, OwnedMemory};
pub use pattern::{Pattern, PatternError};
pub use progress::{CancelToken, Progress};
pub use report::{LoadReport, RankReport, Stage};
pub use request::{Planned, Request};
pub use session::Reader;
pub use stream::TensorStream;
pub use tensor::{Tensor, TensorBytes, Tensors};

/// The layer below, for pipelines of one's own: headers, checkpoints, slices, writing.
pub use fst_format as format;
/// The layer below, for pipelines of one's own: CUDA devices, arenas, the copy pipeline, kernels.
pub use fst_gpu as gpu;
/// The layer below, for pipelines of one's own: engines, plans and memory.
pub use fst_io as io;

/// The example of the README, compiled and run as a test.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
