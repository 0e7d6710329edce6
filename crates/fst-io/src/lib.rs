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
//!
//! Elsewhere than on Linux, and on Linux under `--cfg fst_portable`, threads read through the page cache by the
//! standard library alone: the folder `portable` has the siblings of the modules that ask Linux for more.

pub mod arenas;
pub mod available;
pub mod budget;
pub mod buffer;
pub mod engine;
pub mod ledger;
pub mod mapping;
pub mod mount;
pub mod place;
pub mod plan;
pub mod ranges;
#[cfg_attr(any(not(target_os = "linux"), fst_portable), path = "portable/residency.rs")]
pub mod residency;
pub mod scratch;
pub mod sink;
pub mod slots;
pub mod source;
pub mod stats;
pub mod touch;
pub mod watch;

mod error;
mod extent;
mod file;
mod kept;
#[cfg_attr(any(not(target_os = "linux"), fst_portable), path = "portable/numa.rs")]
mod numa;
mod reuse;
#[cfg_attr(any(not(target_os = "linux"), fst_portable), path = "portable/sys.rs")]
mod sys;

pub use budget::Budget;
pub use buffer::{HostBuffer, Piece, SharedBuffer};
pub use engine::{CachePolicy, Control, Engine, ReadOptions, ResolvedEngine, read};
pub use error::{Change, Error};
pub use extent::Extent;
pub use file::{DirectIo, SourceFile};
pub use kept::{kept_bytes, release_kept};
pub use mapping::Mapping;
pub use stats::ReadStats;
