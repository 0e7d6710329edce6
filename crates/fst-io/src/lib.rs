//! Block I/O for checkpoints: sources, engines, aligned memory, page-cache residency and the read
//! plan.
//!
//! This crate knows bytes and files; it knows nothing of tensors, dtypes or ranks.
