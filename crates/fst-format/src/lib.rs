//! The safetensors format: dtypes, header parsing and validation, sharded checkpoints, slices as
//! byte runs, and writing files.
//!
//! This crate knows nothing of I/O engines or devices.
#![forbid(unsafe_code)]
