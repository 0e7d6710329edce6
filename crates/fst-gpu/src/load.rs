//! What loads of pieces have in common, wherever the pieces go.

use std::fmt;
use std::sync::Arc;

use fst_io::sink::SinkError;
use fst_io::watch::Watch;
use fst_io::{Budget, ReadOptions, ReadStats, SharedBuffer, SourceFile};

use crate::cuda::{CudaDevice, CudaMemory, load_to_devices};
use crate::device_copy::{DeviceCopy, DeviceOptions};
use crate::error::LoadError;
use crate::host::HostLoad;
use crate::piece::Piece;

/// What a piece became.
#[derive(Debug)]
pub enum Filled {
    /// Bytes in host memory.
    Host(fst_io::Piece),
    /// Bytes in the memory of a CUDA device.
    Cuda {
        /// The memory, of which other pieces may have a part.
        memory: Arc<CudaMemory>,
        /// First byte of the piece there.
        offset: u64,
    },
}

impl Filled {
    /// No byte, in host memory.
    #[cfg(feature = "cuda")]
    pub(crate) fn empty() -> Self {
        // SAFETY: nobody reads or writes nothing.
        unsafe { Self::on_host(&SharedBuffer::empty(), 0, 0) }
    }

    /// `len` bytes of an arena in host memory.
    ///
    /// # Safety
    ///
    /// As for [`SharedBuffer::piece`].
    pub(crate) unsafe fn on_host(arena: &SharedBuffer, offset: u64, len: u64) -> Self {
        let (start, end) = (offset as usize, (offset + len) as usize);
        // SAFETY: passed on from the caller.
        Self::Host(unsafe { arena.clone().piece(start..end) })
    }
}

/// How pieces share memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct ArenaOptions {
    /// Bytes of an arena, about; with 0, each piece on a device has one of its own.
    pub bytes: u64,
    /// Pieces on a device that are shorter than this share no arena with others: who keeps a few of them keeps
    /// little memory. Above 0 only without a budget.
    pub apart: u64,
    /// Whether pieces in host memory become complete in their order.
    pub in_order: bool,
    /// Bytes of host memory that the process keeps at most when nobody has the pieces any more.
    pub keep: u64,
}

/// Plans the loading of `pieces`, sorted by file and offset, into memory of `devices`, each to that of its
/// [number](Piece::on); `None` is the host. Blocks are read once, however many devices want parts of them.
///
/// cuFile reads for one device; to several, its blocks are staged.
///
/// # Errors
///
/// [`LoadError::Io`] where pieces overlap or are not sorted.
pub fn load(
    files: Arc<Vec<SourceFile>>,
    pieces: Vec<Piece>,
    devices: &[Option<CudaDevice>],
    arenas: ArenaOptions,
    options: DeviceOptions,
) -> Result<Box<dyn PieceLoad>, LoadError> {
    if devices.iter().any(Option::is_some) {
        return load_to_devices(files, pieces, devices, arenas, options);
    }
    let load = HostLoad::new(files, pieces, arenas.bytes, arenas.in_order)?;
    Ok(Box::new(load.keeping(arenas.keep)))
}

/// Takes what a piece became, once it is complete, with its place in the list of pieces; from reader
/// threads.
pub type Deliver<'a> = &'a (dyn Fn(usize, Filled) -> Result<(), SinkError> + Send + Sync);

/// A planned load of pieces, whose files are open.
pub trait PieceLoad: fmt::Debug + Send + Sync {
    /// The files that are read.
    fn files(&self) -> &[SourceFile];

    /// Bytes that will be read.
    fn bytes_read(&self) -> u64;

    /// Bytes of arenas that must be in memory at once; with `in_order`, where somebody takes the pieces in
    /// their order.
    fn least_memory(&self, in_order: bool) -> u64;

    /// Bytes of the pieces' kind of memory that are needed beside the arenas, at most, within a budget or
    /// without one.
    fn scratch(&self, read: &ReadOptions, budget: bool) -> u64;

    /// Keeps what is needed beside the arenas small, for a load within `budget` bytes.
    fn keep_within(&mut self, budget: u64, in_order: bool) {
        let _ = (budget, in_order);
    }

    /// Bytes of host memory that the load fills or pins, at most; within a budget of so many bytes for its
    /// pieces, if there is one.
    fn host_memory(&self, read: &ReadOptions, budget: Option<u64>) -> u64;

    /// Refuses a load, before anything is read, that the device has no room for; with `host`, also one that
    /// host memory has none for.
    ///
    /// # Errors
    ///
    /// [`LoadError::Memory`] and [`LoadError::TooLarge`].
    fn check_memory(&self, read: &ReadOptions, host: bool) -> Result<(), LoadError>;

    /// Has a piece read before others; for loads whose arenas may all be in memory at once.
    fn prefer(&self, index: usize, watch: &Watch);

    /// How bytes got to a device, once the load is done.
    fn device_copy(&self) -> Option<DeviceCopy> {
        None
    }

    /// Reads everything; every piece is delivered once, unless there is an error.
    ///
    /// # Errors
    ///
    /// The reads' and the device's, and those of `deliver` as [`fst_io::Error::Sink`].
    fn run(
        &self,
        options: &ReadOptions,
        budget: Option<&Budget>,
        watch: &Watch,
        deliver: Deliver<'_>,
    ) -> Result<Vec<ReadStats>, LoadError>;
}
