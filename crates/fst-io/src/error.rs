//! What can go wrong between a file and memory.

use std::io;
use std::path::PathBuf;

use crate::engine::Engine;
use crate::plan::PlanError;
use crate::sink::SinkError;

/// Why a read failed. Always says which file, and where in it when there is a place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be opened.
    #[error("{}: cannot open: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be opened, since the process has as many files open as it may.
    #[error(
        "{}: cannot open: this process may have no more than {limit} files open at once; raise the \
         limit, as with `ulimit -n`",
        path.display()
    )]
    TooManyFiles {
        /// The file.
        path: PathBuf,
        /// The soft limit of the process on descriptors.
        limit: u64,
    },
    /// The file cannot be mapped into memory.
    #[error("{}: cannot map: {source}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A read failed: a device error, or an error of the file system or network behind it.
    #[error("{}: reading {len} bytes at offset {offset}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// First byte of the failed read.
        offset: u64,
        /// Bytes that were still to come.
        len: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file ends before the bytes that its header promised.
    #[error(
        "{}: file ends at offset {end}, {} bytes before the end of what was to be read ({needed}); \
         it is truncated or shrank during the load",
        path.display(), needed.saturating_sub(*end)
    )]
    EarlyEnd {
        /// The file.
        path: PathBuf,
        /// Where the data ended.
        end: u64,
        /// Where the wanted bytes end.
        needed: u64,
    },
    /// The file is not the one whose header was read any more.
    #[error("{}: file changed during the load: {change}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What is different.
        change: Change,
    },
    /// An engine was asked for by name and cannot run here.
    #[error("engine {engine} cannot be used here: {reason}")]
    EngineUnavailable {
        /// The engine.
        engine: Engine,
        /// What was tried and what the system answered.
        reason: String,
    },
    /// Memory for the data cannot be had.
    #[error("cannot allocate {bytes} bytes of host memory: {source}")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// A thread or a ring could not be set up.
    #[error("cannot set up {what}: {source}")]
    Setup {
        /// What was being made.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel stopped working on a ring while reads were under way on it.
    #[error("io_uring failed in mid-read: io_uring_enter: {source}")]
    Ring {
        /// What the system said.
        source: io::Error,
    },
    /// The extents cannot be planned.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The taker of the blocks failed.
    #[error(transparent)]
    Sink(SinkError),
    /// The load was cancelled by its owner.
    #[error("cancelled")]
    Cancelled,
}

/// How a file differs from what it was when its header was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Change {
    /// Its length is another.
    #[error("its length was {was} bytes and is {now}")]
    Length {
        /// Length in bytes when the header was read.
        was: u64,
        /// Length in bytes now.
        now: u64,
    },
    /// It was written to.
    #[error("it was written to")]
    Written,
    /// Its status changed (`ctime`), its length and modification time did not, and no other name,
    /// mode or owner explains it.
    #[error(
        "its status change time is another while its modification time is not: it was written to and \
         the time was set back, or its attributes were set"
    )]
    Status,
    /// Its name leads to another file now.
    #[error("another file took its name")]
    Replaced,
    /// The ETag, the version or the time of an object is another.
    #[error("another version of the object took its place")]
    Version,
}
