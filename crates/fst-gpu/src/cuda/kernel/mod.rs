//! The kernels that copy, slice, cast and sum on a device: which exist, what they take and how to
//! launch them. Nothing here touches a device; loading a module and launching is the caller's part.
//!
//! ```text
//! kernels/*.cu --tools/kernels/build.sh--> kernels/fatbin/*.fatbin --include--> Kernel::fatbin()
//!      \--kernels/host/kernels.cpp--> the same code for the host, run by tests and the simulated driver
//! ```
//!
//! | kernel | one launch | parameters, all 64 bits wide |
//! |---|---|---|
//! | [`Kernel::Gather`], [`Kernel::Cast`] | one [`StridedJob`], shared by the grid | its five fields: [`StridedJob::params`] |
//! | [`Kernel::GatherBatch`], [`Kernel::CastBatch`] | many jobs, one per block at a time | device address of a [`StridedJob`] array, its length |
//! | [`Kernel::Checksum`] | many [`ChecksumJob`]s, one per block at a time | device address of the array, its length, device address of the sums |
//!
//! A job's source may be at any address, its destination is dense and is written fastest when 16-byte
//! aligned; the two must not overlap. Addresses are device addresses (or mapped host ones). Kernels
//! may read up to three bytes before and after a source, within its first and last aligned 4-byte
//! word, and ignore them. Nothing depends on the launch's size but speed: [`Launch`] gives a good
//! one. There is no shared memory.

mod image;
mod job;
mod launch;

pub use image::{Kernel, kernels};
pub use job::{ChecksumJob, StridedJob};
pub use launch::{BLOCK_THREADS, Launch, PIECE_BYTES};
