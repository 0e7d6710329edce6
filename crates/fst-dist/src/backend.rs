//! What the exchange asks of a rank's memory and storage, and the answer for host memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::fmt;

use crate::memory::Space;

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
        // Memory of a larger alignment is zeroed by the allocator byte by byte.
        const PAGE: u64 = 4096;
        let bytes = bytes.checked_add(PAGE).ok_or("the address space has no room for it")?;
        let layout = Layout::array::<u8>(usize::try_from(bytes)?)?;
        let pages = Pages::new(layout).ok_or("the address space has no room for it")?;
        Ok(Staging::new((pages.addr as u64).next_multiple_of(PAGE), pages))
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
        for copy in copies {
            for n in 0..copy.count {
                let src = (copy.src + n * copy.src_stride) as *const u8;
                let dst = (copy.dst + n * copy.dst_stride) as *mut u8;
                // SAFETY: initialised source and unshared, disjoint destination by contract.
                unsafe { std::ptr::copy_nonoverlapping(src, dst, copy.len as usize) };
            }
        }
        Ok(())
    }

    unsafe fn zero(&self, addr: u64, len: u64) -> Result<(), Cause> {
        // SAFETY: writable and unshared by contract.
        unsafe { std::ptr::write_bytes(addr as *mut u8, 0, len as usize) };
        Ok(())
    }
}

/// Zeroed pages: untouched ones cost no memory.
struct Pages {
    addr: *mut u8,
    layout: Layout,
}

impl Pages {
    /// `None` where there is no memory.
    fn new(layout: Layout) -> Option<Self> {
        // SAFETY: callers pass a layout of at least one byte.
        let addr = unsafe { alloc_zeroed(layout) };
        (!addr.is_null()).then_some(Self { addr, layout })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.addr, self.layout) };
    }
}

// SAFETY: the pages are plain memory; whoever uses the address answers for how.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}
