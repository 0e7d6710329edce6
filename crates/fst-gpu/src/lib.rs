//! CUDA devices, device arenas, the pinned ring and copy pipeline, and cast and gather kernels.
//!
//! This crate knows nothing of file formats or ranks. The driver is opened at run time; its
//! absence is an error value, never a panic or a link failure.

pub mod cast;
pub mod kernel;
