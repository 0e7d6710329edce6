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
//! - [`Loader::load_into`] fills memory that the caller has already, and [`Loader::update`] that of tensors loaded before.
//! - [`Loader::group`] makes a load one rank's part of several ranks' ([`dist`]): nothing is read
//!   more often than needed, and no rank receives what it does not keep.
//! - [`LoadReport`] says what was read, by which way, and what bound the load.
//!
//! # What this crate does not do
//!
//! It keeps no copies of checkpoints that it reads by URL (feature `object-store`), does not read formats other than safetensors, and does not
//! compute with tensors.

mod device;
#[cfg(feature = "dist")]
#[path = "ranks.rs"]
pub mod dist;
#[cfg(not(feature = "dist"))]
#[path = "no_ranks.rs"]
mod dist;
mod doctor;
mod error;
mod files;
mod into;
mod load;
mod loader;
mod loading;
mod mapped;
mod owned;
mod progress;
#[cfg_attr(not(feature = "object-store"), path = "no_remote.rs")]
mod remote;
mod report;
mod session;
mod stream;
mod sums;
mod tensor;
mod update;
mod verify;

pub use device::Device;
#[cfg(feature = "mpi")]
pub use dist::group::MpiGroup;
#[cfg(feature = "dist")]
pub use dist::group::{LaunchEnv, NcclGroup};
#[cfg(feature = "dist")]
pub use dist::{
    DistError, Experts, Group, Links, LocalGroup, Place, Plan, Preset, Remainder, Shard, Split,
    Storage, Topology,
};
pub use doctor::{CudaReport, Doctor, HugePages, Measurement, PathReport};
pub use error::{DeviceError, Error, Result};
pub use fst_format::{
    Checkpoint, Checksum, Digest, Dtype, Element, Manifest, ManifestError, Metadata, NotADigest,
    Notice, OpenOptions, Pattern, PatternError, Planned, Request, SelectError, Shard as ShardFile,
    Slice, SliceError, TensorInfo, VerifyError,
};
pub use fst_gpu::{CachedCopy, DeviceCopy};
pub use fst_io::available::{AvailableMemory, MemoryLimit};
pub use fst_io::{DirectIo, Engine, ResolvedEngine};
#[cfg(feature = "object-store")]
pub use fst_object::{Cache, CacheReport};
pub use into::Destination;
pub use loader::Loader;
pub use loading::Loading;
pub use owned::{Filled, OwnedMemory};
pub use progress::{CancelToken, Progress};
pub use report::{LoadReport, RankReport, RemoteReport, Stage};
pub use session::Reader;
pub use stream::TensorStream;
pub use tensor::{Tensor, TensorBytes, Tensors};
pub use update::{Difference, Reread};

/// The layer below, for pipelines of one's own: headers, checkpoints, slices, writing.
pub use fst_format as format;
/// The layer below, for pipelines of one's own: CUDA devices, arenas, the copy pipeline, kernels.
pub use fst_gpu as gpu;
/// The layer below, for pipelines of one's own: engines, plans and memory.
pub use fst_io as io;
/// The layer below, for pipelines of one's own: ranges of objects.
#[cfg(feature = "object-store")]
pub use fst_object as object;

/// The example of the README, compiled and run as a test.
#[cfg(all(doctest, feature = "dist"))]
#[doc = include_str!("../../../README.md")]
struct Readme;
