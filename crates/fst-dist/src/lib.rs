//! Ranks, process groups, shard specifications, which rank reads which bytes, and the exchange.
//!
//! This crate knows nothing of the I/O engines' internals.

mod backend;
mod error;
mod exchange;
pub mod group;
mod load;
mod memory;
mod partition;
mod plan;
mod preset;
mod rank;
mod resolved;
mod schedule;
mod shard;
mod tensor;
mod topology;

pub use backend::{Backend, Cause, CopyAt, HostBackend, ReadAt, ReadInto, Reader, Staging};
pub use error::{ExchangeError, GroupError, PlanError, ShardError};
pub use exchange::{ExchangeReport, Region, load, load_host};
pub use group::{Group, LocalGroup};
pub use load::{Prediction, RankLoad};
pub use memory::{Dst, Space, Src};
pub use partition::{Choice, Costs};
pub use plan::{ClassPlan, DEFAULT_BUDGET, Digest, Plan, Planner};
pub use preset::{Experts, Preset, PresetRules};
pub use rank::{DirectRead, Output, RankPlan, Round};
pub use schedule::{Buffers, LineKind, Piece};
pub use shard::{KeptPart, Remainder, Shard, Split};
pub use tensor::{Geometry, Strided, TensorDesc};
pub use topology::{Links, Place, Storage, Topology};
