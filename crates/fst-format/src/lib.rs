//! The safetensors format: dtypes, header parsing and validation, sharded checkpoints, slices as
//! byte runs, and writing files.
//!
//! This crate knows nothing of I/O engines or devices.
#![forbid(unsafe_code)]

mod checkpoint;
mod decoder;
mod dtype;
pub mod element;
mod error;
mod folder;
mod header;
mod index;
mod json;
mod names;
mod slice;
mod writer;

pub use checkpoint::{Checkpoint, Shard, TensorInfo};
pub use decoder::{Decoded, HeaderDecoder};
pub use dtype::{Dtype, UnknownDtype};
pub use element::Element;
pub use error::{Error, HeaderError, JsonError};
pub use header::{Header, HeaderTensor, MAX_HEADER_LEN};
pub use slice::{Runs, RunsIter, Slice, SliceError};
pub use writer::{
    DEFAULT_DATA_ALIGNMENT, Layout, WriteError, Writer, shard_file_name, write_index,
};
