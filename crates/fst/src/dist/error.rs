//! What can end a load by several ranks, beside what can end any.

use fst_dist::{ExchangeError, GroupError, PlanError};
use fst_format::Dtype;

use crate::device::Device;

/// Why ranks could not load together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DistError {
    /// The plan cannot be made.
    #[error(transparent)]
    Plan(Box<PlanError>),
    /// Reading or exchanging failed, on this rank or another.
    #[error(transparent)]
    Exchange(Box<ExchangeError>),
    /// The group failed: says which rank and why.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// Shards were asked for, and there are no ranks.
    #[error("shards need a group of ranks, or at least a topology to plan for")]
    NoGroup,
    /// Only whole loads are shared by ranks.
    #[error("{what} is for a single rank; ranks of a group load everything at once")]
    LoadOnly {
        /// What was asked for.
        what: &'static str,
    },
    /// A tensor is sliced as well as sharded.
    #[error("tensor {tensor:?} cannot be sliced in a load by ranks; shard it by ranges instead")]
    Sliced {
        /// The tensor.
        tensor: String,
    },
    /// A loaded tensor was given a name of its own, and ranks go by those of the checkpoint.
    #[error("tensor {tensor:?} is given another name; name the shards that ranks loaded")]
    Renamed {
        /// The tensor.
        tensor: String,
    },
    /// The topology has another number of ranks than the group.
    #[error("the topology has {topology} ranks, the group {group}")]
    World {
        /// Ranks of the topology.
        topology: u32,
        /// Ranks of the group.
        group: u32,
    },
    /// Tensors of different types are to be fused.
    #[error("tensor {tensor:?} of {found} cannot be part of {output:?}, which holds {expected}")]
    FusedDtypes {
        /// The fused tensor.
        output: String,
        /// Type of the elements of its first part.
        expected: Dtype,
        /// The part that differs.
        tensor: String,
        /// Its type.
        found: Dtype,
    },
    /// The group does not reach the memory of the loader's device.
    #[error(
        "rank {rank}: its group does not reach {device}; {}",
        match .device.is_host() {
            true => "load to the group's device, or use LocalGroup or MpiGroup",
            false => "make the group for this device: local_groups, or nccl_group with one process a rank",
        }
    )]
    Unreached {
        /// The rank.
        rank: u32,
        /// Its loader's device.
        device: Device,
    },
    /// Ranks that share a device need more of its memory together than is free.
    #[error(
        "out of memory on {device}: {needed} bytes needed by ranks {} together, {free} free; the \
         largest tensor is {largest:?} with {bytes} bytes",
        .ranks.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
    )]
    Crowded {
        /// The device, by the number that it has for this rank.
        device: Device,
        /// The ranks on it.
        ranks: Vec<u32>,
        /// Bytes that they need together.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// Name of the largest tensor that one of them keeps.
        largest: String,
        /// Its bytes.
        bytes: u64,
    },
    /// NCCL moves bytes between CUDA devices.
    #[error("a group over NCCL needs a CUDA device, not {device}")]
    NotCuda {
        /// The device given.
        device: Device,
    },
}

impl From<PlanError> for DistError {
    fn from(error: PlanError) -> Self {
        Self::Plan(Box::new(error))
    }
}

impl From<ExchangeError> for DistError {
    fn from(error: ExchangeError) -> Self {
        match error {
            ExchangeError::Group(error) => Self::Group(error),
            error => Self::Exchange(Box::new(error)),
        }
    }
}
