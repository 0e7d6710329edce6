//! The ways in which a specification, a plan, a group or an exchange can fail.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use fst_gpu::LoadError;
use fst_gpu::cast::CastType;

use crate::memory::Space;

/// A shard specification that does not fit its tensor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// The tensor has no such dimension.
    #[error("dimension {dim} of a tensor with {dims}")]
    #[non_exhaustive]
    Dim {
        /// The dimension asked for.
        dim: usize,
        /// How many there are.
        dims: usize,
    },
    /// The dimension does not divide by the world size and the rule refuses a remainder.
    #[error("dimension {dim}: {extent} does not divide by {world} ranks")]
    #[non_exhaustive]
    NotDivisible {
        /// The dimension.
        dim: usize,
        /// What there is to divide.
        extent: u64,
        /// The world size.
        world: u64,
    },
    /// The dimension is no multiple of the elements that stay together.
    #[error("dimension {dim}: {extent} is no multiple of {unit}")]
    #[non_exhaustive]
    Unit {
        /// The dimension.
        dim: usize,
        /// Its extent, or that of a section.
        extent: u64,
        /// Elements that stay together.
        unit: u64,
    },
    /// Fewer heads than ranks, and the ranks do not divide by the heads.
    #[error("dimension {dim}: {heads} heads cannot be shared evenly by {world} ranks")]
    #[non_exhaustive]
    Heads {
        /// The dimension.
        dim: usize,
        /// Heads there are.
        heads: u64,
        /// The world size.
        world: u64,
    },
    /// Sections that do not add up to the dimension.
    #[error("dimension {dim}: sections add up to {total}, the extent is {extent}")]
    #[non_exhaustive]
    Sections {
        /// The dimension.
        dim: usize,
        /// Its extent.
        extent: u64,
        /// Sum of the sections.
        total: u64,
    },
    /// More equal sections than a plan takes.
    #[error("dimension {dim}: {sections} sections, and {most} are the most")]
    #[non_exhaustive]
    TooManySections {
        /// The dimension.
        dim: usize,
        /// How many were asked for.
        sections: u64,
        /// How many there may be.
        most: u64,
    },
    /// A cut of sub-byte elements that falls within a byte.
    #[error("dimension {dim}: index {index} of {bits}-bit elements does not fall on a byte")]
    #[non_exhaustive]
    Bits {
        /// The dimension.
        dim: usize,
        /// The index of the cut.
        index: u64,
        /// Bits of an element.
        bits: u64,
    },
    /// A rank that the world does not have.
    #[error("rank {rank} in a world of {world}")]
    #[non_exhaustive]
    Rank {
        /// The rank named.
        rank: u32,
        /// The world size.
        world: u32,
    },
    /// Not one list of ranges for each rank.
    #[error("{lists} lists of ranges for {world} ranks")]
    #[non_exhaustive]
    RangeLists {
        /// Lists given.
        lists: usize,
        /// The world size.
        world: u32,
    },
    /// A range that leaves the dimension or runs backwards.
    #[error("dimension {dim}: range {range:?} of rank {rank} leaves the extent {extent}")]
    #[non_exhaustive]
    Range {
        /// The dimension.
        dim: usize,
        /// The rank whose list holds the range.
        rank: u32,
        /// The range.
        range: Range<u64>,
        /// The dimension's extent.
        extent: u64,
    },
    /// Two ranges of one rank overlap.
    #[error("dimension {dim}: range {range:?} of rank {rank} overlaps another")]
    #[non_exhaustive]
    Overlap {
        /// The dimension.
        dim: usize,
        /// The rank whose list holds the range.
        rank: u32,
        /// The later of the two ranges.
        range: Range<u64>,
    },
    /// The sizes of what ranks keep, padding included, overflow 63 bits.
    #[error("what ranks keep of it, padding included, overflows 63 bits")]
    Overflow,
}

/// A plan that cannot be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A tensor's specification does not fit it.
    #[error("tensor {tensor}: {source}")]
    #[non_exhaustive]
    Shard {
        /// The tensor's name.
        tensor: String,
        /// What does not fit.
        source: ShardError,
    },
    /// A tensor's byte range is not what its shape asks for.
    #[error(
        "tensor {tensor}: bytes {range:?} of file {shard}, while its shape asks for {expected:?} bytes"
    )]
    #[non_exhaustive]
    ByteLength {
        /// The tensor's name.
        tensor: String,
        /// The file, as an index into the checkpoint's list.
        shard: u32,
        /// The byte range in the file.
        range: Range<u64>,
        /// Bytes that the shape asks for, if that is a whole number of bytes below 2^64.
        expected: Option<u64>,
    },
    /// A member of a fused tensor that does not go with the others.
    #[error("tensor {tensor} does not fit into the fused tensor {output}: {what} differs")]
    #[non_exhaustive]
    Fuse {
        /// The member's name.
        tensor: String,
        /// The fused tensor's name.
        output: String,
        /// What differs from the first member: the dtype's width, the dimension or the shape.
        what: &'static str,
    },
    /// The positions of a fused tensor's members are not 0, 1, 2 and so on.
    #[error("fused tensor {output}: position {position} is {found} times filled")]
    #[non_exhaustive]
    FusePosition {
        /// The fused tensor's name.
        output: String,
        /// The position.
        position: u32,
        /// How many tensors claim it.
        found: u32,
    },
    /// More than 2^32 - 2 tensors.
    #[error("{tensors} tensors are more than a plan can number")]
    #[non_exhaustive]
    TooManyTensors {
        /// How many were given.
        tensors: usize,
    },
    /// A budget in which no block fits.
    #[error("a staging budget of {budget} bytes per rank; the smallest that works is {smallest}")]
    #[non_exhaustive]
    Budget {
        /// Bytes allowed.
        budget: u64,
        /// Bytes needed at least.
        smallest: u64,
    },
    /// A topology without ranks.
    #[error("no ranks")]
    NoRanks,
    /// No rank can read the checkpoint.
    #[error("no rank has storage to read from")]
    NoReader,
    /// A rank that names a storage which is not there.
    #[error("rank {rank} reads from storage {storage} of {storages}")]
    #[non_exhaustive]
    UnknownStorage {
        /// The rank.
        rank: u32,
        /// The storage it names.
        storage: u32,
        /// How many there are.
        storages: usize,
    },
    /// A rate that is not a positive number.
    #[error("{what}: {rate}")]
    #[non_exhaustive]
    Rate {
        /// Which rate.
        what: &'static str,
        /// Its value.
        rate: f64,
    },
}

/// A failed operation of a group. After one the group is broken, on every rank.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// A rank aborted the group.
    #[error("rank {rank} failed: {cause}")]
    #[non_exhaustive]
    Aborted {
        /// The rank that aborted.
        rank: u32,
        /// The cause that it gave.
        cause: String,
    },
    /// A rank is gone.
    #[error("rank {rank} is lost: {cause}")]
    #[non_exhaustive]
    Lost {
        /// The rank that is gone.
        rank: u32,
        /// How that was noticed.
        cause: String,
    },
    /// Another load had the group when this one came, on this rank or on another.
    #[error(
        "rank {rank} had another load under way through this group: use one group for each load at a time"
    )]
    #[non_exhaustive]
    Busy {
        /// The rank that refused the load.
        rank: u32,
    },
    /// A rank that was waited for was silent for as long as the deadline: it neither moved bytes nor told
    /// that it is alive, as ranks do that read.
    #[error(
        "rank {rank} waited {waited:?} in {op}{}",
        .waiting_for.map(|rank| format!(", for rank {rank}")).unwrap_or_default()
    )]
    #[non_exhaustive]
    Deadline {
        /// The operation.
        op: &'static str,
        /// The rank that waited.
        rank: u32,
        /// The rank that it waited for, where that is known.
        waiting_for: Option<u32>,
        /// How long.
        waited: Duration,
    },
    /// Sender and receiver disagree on the size of a message.
    #[error("rank {from} sent {sent} bytes to rank {to}, which expects {expected}")]
    #[non_exhaustive]
    Size {
        /// The sender.
        from: u32,
        /// The receiver.
        to: u32,
        /// Bytes sent.
        sent: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// A peer that the world does not have, or the rank itself.
    #[error("rank {rank} names rank {peer} as its peer in a world of {world}")]
    #[non_exhaustive]
    Peer {
        /// The rank named.
        peer: u32,
        /// The rank that named it.
        rank: u32,
        /// The world size.
        world: u32,
    },
    /// Not one part for each rank.
    #[error("{found} parts for {expected} ranks")]
    #[non_exhaustive]
    Parts {
        /// The world size.
        expected: usize,
        /// Parts given.
        found: usize,
    },
    /// A copy between two ranks of a process failed.
    #[error("copy of {bytes} bytes from rank {from} to rank {to}: {source}")]
    #[non_exhaustive]
    Copy {
        /// The sender.
        from: u32,
        /// The receiver.
        to: u32,
        /// Bytes to copy.
        bytes: usize,
        /// What the copier said.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// One of several copies that were made at once failed; which, is not known.
    #[error(
        "copies of {bytes} bytes in all from ranks {} to rank {to}: one of them failed: {source}",
        .from.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
    )]
    #[non_exhaustive]
    Copies {
        /// The senders, of which it hit one.
        from: Vec<u32>,
        /// The receiver.
        to: u32,
        /// Bytes to copy.
        bytes: usize,
        /// What the copier said.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A rank's message in a gathering, or those of all ranks together, are too long to be sent.
    #[error("rank {rank} has {bytes} bytes to tell in one gathering, {most} at most can be sent")]
    #[non_exhaustive]
    MessageSize {
        /// The rank that was to send them: rank 0 sends those of all.
        rank: u32,
        /// Bytes to send.
        bytes: usize,
        /// Bytes that can be sent.
        most: usize,
    },
    /// Memory that this group does not reach.
    #[error("this group does not reach memory of {space:?}")]
    #[non_exhaustive]
    Memory {
        /// The memory's space.
        space: Space,
    },
    /// A variable of the launch environment is missing or not sound.
    #[error(
        "{variable} is {}",
        .value.as_ref().map_or("not set".to_owned(), |value| format!("{value:?}"))
    )]
    #[non_exhaustive]
    Environment {
        /// The variable.
        variable: &'static str,
        /// Its value; `None` if it is not set.
        value: Option<String>,
    },
    /// Ranks could not be met.
    #[error("cannot {what} {address}: {source}")]
    #[non_exhaustive]
    Network {
        /// What was tried.
        what: &'static str,
        /// Where.
        address: String,
        /// What the system said.
        source: Arc<std::io::Error>,
    },
    /// Who listens where rank 0 should be does not know this rank's job.
    #[error(
        "nobody at {address} took in rank {rank}: another job's rank 0, or another program, listens there; \
         use a port for each job at a time, and FST_JOB_ID of one value for all ranks of a job"
    )]
    #[non_exhaustive]
    Unwelcome {
        /// This rank.
        rank: u32,
        /// Where.
        address: String,
    },
    /// Two processes claim to be the same rank.
    #[error("two processes claim to be rank {rank}")]
    #[non_exhaustive]
    RankTaken {
        /// The rank.
        rank: u32,
    },
    /// A process was started with another world size.
    #[error("rank {rank} was started with world size {theirs}, rank 0 with {ours}")]
    #[non_exhaustive]
    WorldSizes {
        /// The rank that differs.
        rank: u32,
        /// Its world size.
        theirs: u32,
        /// That of rank 0.
        ours: u32,
    },
    /// A library is not there.
    #[error("looked for {}: {reason}", looked_for.join(", "))]
    #[non_exhaustive]
    Library {
        /// The names tried.
        looked_for: Vec<String>,
        /// The loader's words for each.
        reason: String,
    },
    /// A library lacks a function.
    #[error("{library} lacks {symbol}")]
    #[non_exhaustive]
    MissingSymbol {
        /// The library.
        library: String,
        /// The function.
        symbol: &'static str,
    },
    /// A call of NCCL failed.
    #[error("{call}: {text} (ncclResult_t {code})")]
    #[non_exhaustive]
    Nccl {
        /// The function, or what was under way.
        call: &'static str,
        /// The result code.
        code: i32,
        /// NCCL's words for it.
        text: String,
    },
    /// Work on the device's stream failed.
    #[error("device stream: {source}")]
    #[non_exhaustive]
    Stream {
        /// What the driver said.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// MPI could not be used.
    #[error("MPI: {why}")]
    #[non_exhaustive]
    MpiInit {
        /// Why not.
        why: &'static str,
    },
    /// A call of MPI failed.
    #[error("{call}: {text} (code {code})")]
    #[non_exhaustive]
    Mpi {
        /// The function.
        call: &'static str,
        /// What it returned.
        code: i32,
        /// MPI's words for the code.
        text: String,
    },
}

/// A load by several ranks that failed on this one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// Another rank failed, or the group did.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// A rank's plan is not that of rank 0: another checkpoint, specification, topology or budget.
    #[error("the plan of rank {rank} differs from that of rank 0")]
    #[non_exhaustive]
    PlanDiffers {
        /// The first such rank.
        rank: u32,
    },
    /// The plan's view and the group are of different ranks or world sizes.
    #[error("the plan is for rank {} of {}, the group has rank {} of {}", .plan.0, .plan.1, .group.0, .group.1)]
    #[non_exhaustive]
    World {
        /// Rank and world size of the plan's view.
        plan: (u32, u32),
        /// Rank and world size of the group.
        group: (u32, u32),
    },
    /// The group does not reach the memory that is to be loaded into.
    #[error("rank {rank}: its group does not reach memory of {space:?}")]
    #[non_exhaustive]
    Unreached {
        /// This rank.
        rank: u32,
        /// The memory's space.
        space: Space,
    },
    /// Not one piece of memory for each output.
    #[error("{found} outputs given, the plan has {expected}")]
    #[non_exhaustive]
    OutputCount {
        /// Outputs of the plan.
        expected: usize,
        /// Outputs given.
        found: usize,
    },
    /// Memory of the wrong size for an output.
    #[error("output {name}: {found} bytes given, the plan has {expected}")]
    #[non_exhaustive]
    OutputSize {
        /// The output's name.
        name: String,
        /// Bytes it has.
        expected: u64,
        /// Bytes given.
        found: u64,
    },
    /// This rank could not read.
    #[error("rank {rank}: reading tensor {tensor}, bytes {range:?} of file {shard}: {source}")]
    #[non_exhaustive]
    Read {
        /// This rank.
        rank: u32,
        /// The tensor in which the range starts.
        tensor: String,
        /// The file, as an index into the checkpoint's list.
        shard: u32,
        /// The byte range in the file.
        range: Range<u64>,
        /// What the reader said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No memory for staging.
    #[error("rank {rank}: {bytes} bytes of staging: {source}")]
    #[non_exhaustive]
    Memory {
        /// This rank.
        rank: u32,
        /// Bytes asked.
        bytes: u64,
        /// What the allocator said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A copy within this rank's memory failed.
    #[error("rank {rank}: copy: {source}")]
    #[non_exhaustive]
    Copy {
        /// This rank.
        rank: u32,
        /// What failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The system has no thread to read on.
    #[error(
        "rank {rank}: cannot start a thread to read on: {source}; raise the limit on processes (`ulimit -u`)"
    )]
    #[non_exhaustive]
    Thread {
        /// This rank.
        rank: u32,
        /// What the system said.
        source: std::io::Error,
    },
    /// The reading thread of this rank panicked.
    #[error("rank {rank}: the reading thread panicked")]
    #[non_exhaustive]
    ReaderPanicked {
        /// This rank.
        rank: u32,
    },
}

/// A rank's load of its shards out of files that failed on this rank.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// Reading or exchanging failed, on this rank or another.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// Memory could not be had, or a conversion in it failed. The largest piece is one of
    /// [`RankPlan::outputs`](crate::RankPlan::outputs).
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A conversion from elements of another size than the tensor's.
    #[error("{output}, which has elements of {bits} bits, cannot be converted from {from:?}")]
    #[non_exhaustive]
    Cast {
        /// The tensor, as it is kept.
        output: String,
        /// Bits of an element.
        bits: u32,
        /// What they were to be converted from.
        from: CastType,
    },
    /// Ranks that share a device need more of its memory together than is free.
    #[error(
        "out of memory on cuda:{device}: {needed} bytes needed by ranks {} together, {free} free; the \
         largest tensor is {largest:?} with {bytes} bytes",
        .ranks.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
    )]
    #[non_exhaustive]
    SharedDevice {
        /// The device, by the number that it has for this rank.
        device: usize,
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
}

impl From<GroupError> for RankError {
    fn from(error: GroupError) -> Self {
        Self::Exchange(error.into())
    }
}

impl From<fst_io::Error> for RankError {
    fn from(error: fst_io::Error) -> Self {
        Self::Load(error.into())
    }
}

#[cfg(feature = "cuda")]
impl From<fst_gpu::Error> for RankError {
    fn from(error: fst_gpu::Error) -> Self {
        Self::Load(error.into())
    }
}
