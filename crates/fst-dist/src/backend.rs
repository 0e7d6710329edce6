//! What the exchange asks of a rank's memory and storage, and the answers: for host memory and any reader, and
//! for files read by fst-io into memory of the host or of a CUDA device.

mod attend;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_outputs;
#[cfg(feature = "cuda")]
mod devices;
mod files;
mod fingerprint;
mod host;
mod layout;
mod room;
mod shards;

use std::any::Any;
use std::fmt;

use fst_io::HostBuffer;

use crate::memory::Space;

#[cfg(feature = "cuda")]
pub use devices::{DeviceCopier, NcclStream};
pub use files::RankFiles;
pub use fingerprint::Fingerprint;
pub use layout::Cast;
pub use shards::{ArrivedShards, LoadTarget, OnShard, ShardLoad};

/// The cause of a failed read, copy or allocation.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A byte range of a file and the address that its bytes go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadAt {
    /// The tensor that it starts in (reads of neighbours in a file are joined), to name in errors.
    pub tensor: u32,
    /// The file, as an index into the checkpoint's list.
    pub shard: u32,
    /// Where it starts in the file.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// Where they go.
    pub addr: u64,
}

/// A copy of equally spaced pieces between two addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyAt {
    /// The first piece.
    pub src: u64,
    /// Where it goes.
    pub dst: u64,
    /// Bytes of one piece.
    pub len: u64,
    /// How many pieces.
    pub count: u64,
    /// From one piece to the next at the source.
    pub src_stride: u64,
    /// The same at the destination.
    pub dst_stride: u64,
}

/// Staging memory; freed when dropped.
pub struct Staging {
    addr: u64,
    _owner: Box<dyn Any + Send + Sync>,
}

impl Staging {
    /// Staging at `addr`, which stays valid and in place as long as `owner` lives.
    #[must_use]
    pub fn new(addr: u64, owner: impl Any + Send + Sync) -> Self {
        Self { addr, _owner: Box::new(owner) }
    }

    /// Its first byte.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }
}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Staging({:#x})", self.addr)
    }
}

/// Bytes that were read and are still on their way to a rank's memory. Dropping it waits for them.
#[must_use = "the bytes are there once this has been waited for"]
pub struct Arriving<'b>(Option<Box<dyn FnOnce() -> Result<(), Cause> + Send + 'b>>);

impl<'b> Arriving<'b> {
    /// Bytes that are there.
    pub fn done() -> Self {
        Self(None)
    }

    /// Bytes that are there once `wait` has returned without error; after an error nothing writes to their
    /// memory any more.
    pub fn new(wait: impl FnOnce() -> Result<(), Cause> + Send + 'b) -> Self {
        Self(Some(Box::new(wait)))
    }

    /// Waits until the bytes are there.
    ///
    /// # Errors
    /// They do not come.
    pub fn wait(mut self) -> Result<(), Cause> {
        self.0.take().map_or(Ok(()), |wait| wait())
    }
}

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        // Whoever drops it has no use for the bytes.
        let _ = self.0.take().map(|wait| wait());
    }
}

impl fmt::Debug for Arriving<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arriving({})", if self.0.is_some() { "on the way" } else { "there" })
    }
}

/// The memory that a rank loads into and the way there from storage.
///
/// # Safety
/// Implementations write exactly the addresses that they are told to, and when they return without
/// error these bytes are initialised and visible to the group. `stage` gives memory of `space` that is
/// valid for the bytes asked.
pub unsafe trait Backend: Sync {
    /// The memory that addresses are of.
    fn space(&self) -> Space;

    /// Allocates staging, aligned to 4096 bytes.
    ///
    /// # Errors
    /// Out of memory.
    fn stage(&self, bytes: u64) -> Result<Staging, Cause>;

    /// Reads every range, in whatever order, and returns when all have arrived.
    ///
    /// # Errors
    /// The first range that cannot be read: its index and the cause.
    ///
    /// # Safety
    /// The ranges' memory is writable and nobody else uses it meanwhile.
    unsafe fn read(&self, ranges: &[ReadAt]) -> Result<(), (usize, Cause)>;

    /// As [`read`](Self::read), but returns once the next read may begin: the bytes have arrived when the
    /// value that it gives has been waited for.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    ///
    /// # Safety
    /// As for [`read`](Self::read), until the value is waited for or dropped.
    unsafe fn read_ahead<'b>(&'b self, ranges: &[ReadAt]) -> Result<Arriving<'b>, (usize, Cause)> {
        // SAFETY: passed on from the caller.
        unsafe { self.read(ranges) }.map(|()| Arriving::done())
    }

    /// Makes every copy and returns when all are done.
    ///
    /// # Errors
    /// A copy failed.
    ///
    /// # Safety
    /// Sources are initialised and unwritten meanwhile; destinations are writable, overlap nothing and
    /// nobody else uses them.
    unsafe fn copy(&self, copies: &[CopyAt]) -> Result<(), Cause>;

    /// Sets bytes to zero.
    ///
    /// # Errors
    /// The memory cannot be written.
    ///
    /// # Safety
    /// The memory is writable and nobody else uses it meanwhile.
    unsafe fn zero(&self, addr: u64, len: u64) -> Result<(), Cause>;
}

/// A byte range of a file and the memory that it goes to.
#[derive(Debug)]
#[non_exhaustive]
pub struct ReadInto<'a> {
    /// The file, as an index into the checkpoint's list.
    pub shard: u32,
    /// Where the range starts in the file.
    pub offset: u64,
    /// Where its bytes go; the range is as long.
    pub into: &'a mut [u8],
}

/// Reads files into host memory.
pub trait Reader: Sync {
    /// Reads every range, in whatever order, filling its slice.
    ///
    /// # Errors
    /// The first range that cannot be read: its index and the cause.
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)>;
}

/// Host memory, read into by a [`Reader`].
#[derive(Debug)]
pub struct HostBackend<R> {
    reader: R,
}

impl<R: Reader> HostBackend<R> {
    /// Host memory that `reader` fills.
    #[must_use]
    pub fn new(reader: R) -> Self {
        Self { reader }
    }
}

// SAFETY: reads and copies go through slices and pointers of exactly the ranges given.
unsafe impl<R: Reader> Backend for HostBackend<R> {
    fn space(&self) -> Space {
        Space::Host
    }

    fn stage(&self, bytes: u64) -> Result<Staging, Cause> {
        stage_host(bytes)
    }

    unsafe fn read(&self, ranges: &[ReadAt]) -> Result<(), (usize, Cause)> {
        let into = |range: &ReadAt| {
            // SAFETY: writable and unshared by this function's contract; the exchange hands out
            // staging (zeroed) and the caller's slices only, so the bytes are initialised.
            let into = unsafe {
                std::slice::from_raw_parts_mut(range.addr as *mut u8, range.len as usize)
            };
            ReadInto { shard: range.shard, offset: range.offset, into }
        };
        let mut ranges: Vec<ReadInto<'_>> =
            ranges.iter().filter(|range| range.len > 0).map(into).collect();
        self.reader.read(&mut ranges)
    }

    unsafe fn copy(&self, copies: &[CopyAt]) -> Result<(), Cause> {
        // SAFETY: by this function's contract.
        unsafe { copy_host(copies) };
        Ok(())
    }

    unsafe fn zero(&self, addr: u64, len: u64) -> Result<(), Cause> {
        // SAFETY: writable and unshared by contract.
        unsafe { std::ptr::write_bytes(addr as *mut u8, 0, len as usize) };
        Ok(())
    }
}

/// Makes copies within host memory.
///
/// # Safety
/// As for [`Backend::copy`].
unsafe fn copy_host(copies: &[CopyAt]) {
    for copy in copies {
        for n in 0..copy.count {
            let src = (copy.src + n * copy.src_stride) as *const u8;
            let dst = (copy.dst + n * copy.dst_stride) as *mut u8;
            // SAFETY: initialised source and unshared, disjoint destination by contract.
            unsafe { std::ptr::copy_nonoverlapping(src, dst, copy.len as usize) };
        }
    }
}

/// Staging in host memory, zeroed, of which untouched pages cost none.
fn stage_host(bytes: u64) -> Result<Staging, Cause> {
    let buffer = HostBuffer::new(usize::try_from(bytes)?)?;
    Ok(Staging::new(buffer.as_ptr().as_ptr() as u64, buffer))
}
