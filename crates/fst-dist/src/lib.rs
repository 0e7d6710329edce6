//! Loading a checkpoint together: ranks, shard specifications, the plan of who reads which bytes, and
//! the exchange.
//!
//! Ranks that each keep a part of every tensor could all read everything, or one could read and
//! broadcast everything. This crate plans instead: nothing is read from storage more often than
//! needed, and no rank receives bytes that it will not keep.
//!
//! ```text
//! TensorDesc + Shard + Topology --Planner--> Plan --rank(r)--> RankPlan --load over a Group--> outputs
//!                     (pure, the same on every rank)                      (threads, memory, links)
//! ```
//!
//! * [`Shard`] says per tensor what each rank keeps; [`Preset`] says it for known model families.
//! * [`Topology`] says which ranks share nodes and storage, and the rates of both.
//! * [`Planner`] decides per class of equal tensors whether ranks read their parts, or each byte is read
//!   once and scattered or broadcast; it spreads the reading by bytes and predicts the time.
//! * [`load`] carries a plan out over any [`Group`] (within a process, MPI, NCCL), [`Backend`] memory and
//!   storage. A rank's failure fails all, by name, within the group's deadline.
//!
//! Four ranks of one process load a checkpoint of two tensors:
//!
//! ```
//! use fst_dist::{Cause, LocalGroup, Planner, ReadInto, Reader, Shard, TensorDesc, Topology, load_host};
//!
//! /// A file whose bytes count up.
//! struct Counting;
//! impl Reader for Counting {
//!     fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
//!         for range in ranges {
//!             let start = range.offset;
//!             (start..).zip(range.into.iter_mut()).for_each(|(at, byte)| *byte = at as u8);
//!         }
//!         Ok(())
//!     }
//! }
//!
//! let tensor = |name: &str, shape: [u64; 2], start: u64| TensorDesc {
//!     name: name.into(),
//!     bits: 8,
//!     shape: shape.to_vec(),
//!     shard: 0,
//!     file_range: start..start + 64,
//! };
//! let tensors = vec![tensor("q_proj", [8, 8], 0), tensor("o_proj", [8, 8], 64)];
//! let plan = Planner::new(Topology::one_node(4)).plan(tensors, |tensor| match &tensor.name[..] {
//!     "q_proj" => Shard::split(0),
//!     _ => Shard::split(1),
//! })?;
//!
//! let kept: Vec<Vec<Vec<u8>>> = std::thread::scope(|scope| {
//!     let ranks: Vec<_> = (0..)
//!         .zip(LocalGroup::host(4))
//!         .map(|(rank, group)| {
//!             let view = plan.rank(rank);
//!             scope.spawn(move || {
//!                 let mut outputs: Vec<Vec<u8>> =
//!                     view.outputs().iter().map(|output| vec![0; output.bytes as usize]).collect();
//!                 let mut memory: Vec<&mut [u8]> = outputs.iter_mut().map(|o| &mut o[..]).collect();
//!                 load_host(&view, &group, Counting, &mut memory).map(|_report| outputs)
//!             })
//!         })
//!         .collect();
//!     ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Result<_, _>>()
//! })?;
//! assert_eq!(kept[1][0], (16..32).collect::<Vec<u8>>());
//! assert_eq!(kept[1][1][..4], [66, 67, 74, 75]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`ShardLoad`] is a rank's load out of files, by fst-io, into memory of the host or of a CUDA device.
//!
//! It does not open checkpoints or own tensors: the facade `fst` brings these together.

#[cfg(not(target_os = "linux"))]
compile_error!("ranks are for Linux: depend on fst with `default-features = false`");

mod backend;
mod coverage;
mod error;
mod exchange;
pub mod group;
mod load;
mod measure;
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

pub use backend::{
    ArrivedShards, Arriving, Backend, Cast, Cause, CopyAt, Fingerprint, HostBackend, LoadTarget,
    OnShard, RankFiles, ReadAt, ReadInto, Reader, ShardLoad, Staging,
};
#[cfg(feature = "cuda")]
pub use backend::{DeviceCopier, NcclStream};
pub use coverage::Coverage;
pub use error::{ExchangeError, GroupError, PlanError, RankError, ShardError};
pub use exchange::{ExchangeReport, Region, load, load_host, load_in};
pub use group::{Group, LocalGroup, Occupied};
pub use load::{Prediction, RankLoad};
pub use measure::CopyRate;
pub use memory::{Dst, Space, Src};
pub use partition::{Choice, Costs};
pub use plan::{ClassPlan, DEFAULT_BUDGET, Digest, Plan, Planner};
pub use preset::{Experts, Preset, PresetRules};
pub use rank::{DirectRead, Output, RankPlan, Round};
pub use schedule::{Buffers, LineKind, Piece};
pub use shard::{KeptPart, Remainder, Shard, Split};
pub use tensor::{Geometry, Strided, TensorDesc};
pub use topology::{Links, Place, Storage, Topology};
