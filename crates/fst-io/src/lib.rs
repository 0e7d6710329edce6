//! Block I/O for checkpoints: sources, engines, aligned memory, page-cache residency and the read
//! plan.
//!
//! This crate knows bytes and files; it knows nothing of tensors, dtypes or ranks.
//!
//! ```text
//! extents ──ReadPlan::new──▶ blocks ──engine──▶ memory lent by a Sink ──landed──▶ Sink
//! ```

pub mod plan;
pub mod sink;

mod extent;

pub use extent::Extent;
