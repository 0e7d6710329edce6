//! Block I/O for checkpoints: sources, engines, aligned memory, page-cache residency and the read
//! plan.
//!
//! This crate knows bytes and files; it knows nothing of tensors, dtypes or ranks.
//!
//! ```text
//! extents ──ReadPlan::new──▶ blocks ──engine──▶ memory lent by a Sink ──landed──▶ Sink
//! ```
//!
//! Large blocks, many in flight, each straight into its final place: that is what storage is fast
//! at. [`read`] carries a [`ReadPlan`](plan::ReadPlan) out with the engine that this machine
//! allows; cold ranges go around the page cache (`O_DIRECT`), resident ones are copied out of it.

#[cfg(not(target_os = "linux"))]
compile_error!("fst-io uses io_uring, O_DIRECT and statx: it runs on Linux only");

pub mod arenas;
pub mod budget;
pub mod buffer;
pub mod engine;
pub mod ledger;
pub mod lent;
pub mod mapping;
pub mod mount;
pub mod place;
pub mod plan;
pub mod residency;
pub mod scratch;
pub mod sink;
pub mod slots;
pub mod stats;
pub mod touch;

mod error;
mod extent;
mod file;
mod numa;
mod reuse;
mod sys;

pub use budget::Budget;
pub use buffer::{HostBuffer, Piece, SharedBuffer};
pub use engine::{CachePolicy, Control, Engine, ReadOptions, ResolvedEngine, read};
pub use error::{Change, Error};
pub use extent::Extent;
pub use file::{DirectIo, SourceFile};
pub use mapping::Mapping;
pub use stats::ReadStats;
