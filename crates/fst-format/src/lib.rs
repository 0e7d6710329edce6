//! The safetensors format: dtypes, header parsing and validation, sharded checkpoints, selection of
//! tensors and of parts of them as byte runs, and writing files.
//!
//! A safetensors file is the length of its header (eight bytes, little-endian), the header (JSON),
//! and the tensors' bytes one after another. Large models are several such files and an index.
//!
//! ```text
//! paths --Checkpoint::open--> Checkpoint: shards, tensors --Selection::resolve--> Planned: byte runs
//!            |  reads 8 bytes + header of each file
//!            v
//!         HeaderDecoder: "these bytes, please" ... Header (exists only if sound)
//!
//! declarations --Layout--> header --Writer--> file,  write_index --> model.safetensors.index.json
//! ```
//!
//! ```no_run
//! let checkpoint = fst_format::Checkpoint::open("Llama-2-7b-hf")?; // folder, index.json or file
//! for tensor in checkpoint.tensors() {
//!     let file = checkpoint.shards()[tensor.shard()].path();
//!     println!("{} {} {:?}", tensor.name(), tensor.dtype(), tensor.shape());
//!     println!("  {} {:?}", file.display(), tensor.file_range());
//! }
//! # Ok::<(), fst_format::Error>(())
//! ```
//!
//! Files are not to be trusted. [`Header`] accepts what the official parser 0.8.0 accepts, but for
//! tensor names that appear twice, and refuses all else with an error that names the tensor, the
//! bytes and the rule; nothing in here panics on input or follows an index out of its folder.
//!
//! This crate does not load tensors: it reads headers, and knows nothing of I/O engines or devices.
//! Its public types contain types of `bytemuck` and `half` ([`element`]), and with the feature `object-store` of
//! `fst-object`, and of no other crate.
#![forbid(unsafe_code)]

mod checkpoint;
mod decoder;
mod dtype;
pub mod element;
mod error;
mod folder;
mod header;
pub mod hub;
mod index;
mod json;
#[cfg(feature = "manifest")]
mod manifest;
mod metadata;
mod names;
#[cfg_attr(any(not(target_os = "linux"), fst_portable), path = "portable/open.rs")]
mod open;
mod overlay;
mod pattern;
mod planned;
mod reading;
#[cfg_attr(not(feature = "object-store"), path = "no_remote.rs")]
mod remote;
mod request;
mod select;
mod slice;
mod sniff;
mod writer;

pub use checkpoint::{Checkpoint, Notice, OpenOptions, Shard, TensorInfo};
pub use decoder::{Decoded, HeaderDecoder};
pub use dtype::{Dtype, UnknownDtype};
pub use element::Element;
pub use error::{Error, HeaderError, JsonError, SizeError};
#[cfg(feature = "object-store")]
pub use fst_object as object;
pub use header::{Header, HeaderTensor, MAX_HEADER_LEN};
#[cfg(feature = "manifest")]
pub use manifest::{
    Checksum, Digest, Manifest, ManifestError, ManifestFileError, NotADigest, VerifyError,
};
pub use metadata::Metadata;
pub use pattern::{Pattern, PatternError};
pub use planned::Planned;
pub use request::Request;
pub use select::{Converts, SelectError, Selection};
pub use slice::{Cut, Runs, Slice, SliceError};
pub use writer::{
    DEFAULT_DATA_ALIGNMENT, Layout, WriteError, Writer, shard_file_name, write_index,
};
