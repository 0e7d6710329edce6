//! What the crate asks of the system, by the standard library and memmap2: for systems other than Linux. The
//! functions have the signatures of those in `../sys.rs`, and refuse what there is no portable call for.
//!
//! On Linux it is compiled and tested under `--cfg fst_portable`. What is marked `not(unix)` is not run there.

use std::ffi::c_int;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::Duration;

use memmap2::{MmapMut, MmapOptions, MmapRaw};

use crate::file::no_file;

fn unsupported<T>() -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

/// What the system says of direct I/O on an open file: that there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(dead_code, reason = "the other systems' answers")]
pub(crate) enum DioAlign {
    Unsupported,
    Bytes { memory: u64, offset: u64 },
}

pub(crate) fn dio_align(_: &File) -> io::Result<DioAlign> {
    Ok(DioAlign::Unsupported)
}

/// Has calls on an open file wait: files opened by the standard library do.
pub(crate) fn set_blocking(_file: &File) -> io::Result<()> {
    Ok(())
}

/// Opens a regular file. The look at the name comes first: opening something else may wait for ever. Where a named
/// pipe may take the name meanwhile, it is opened without waiting.
pub(crate) fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(no_file());
    }
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.read(true).open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() { Ok((file, metadata)) } else { Err(no_file()) }
}

pub(crate) fn open_direct(_: &File) -> io::Result<File> {
    unsupported()
}

/// How many descriptors this process may have, if an error says that it has that many.
pub(crate) fn descriptors_used_up(error: &io::Error) -> Option<u64> {
    #[cfg(unix)]
    if error.raw_os_error() == Some(libc::EMFILE) {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the call fills a live struct of its own type.
        let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
        return Some(if known { limit.rlim_cur } else { u64::MAX });
    }
    let _ = error;
    None
}

/// The longest single read: what is zeroed for it stays in the processor's cache.
const READ: usize = 512 << 10;

/// Reads at an offset into raw memory, once.
///
/// # Safety
///
/// `ptr` must be valid for writes of `len` bytes, and nobody else may touch them meanwhile.
pub(crate) unsafe fn pread(
    file: &File,
    ptr: *mut u8,
    len: usize,
    offset: u64,
) -> io::Result<usize> {
    let len = len.min(READ);
    // SAFETY: the caller vouches for `ptr` and `len`; zeros initialise the bytes, which the standard library
    // demands of memory that it reads into.
    let bytes = unsafe {
        ptr.write_bytes(0, len);
        std::slice::from_raw_parts_mut(ptr, len)
    };
    read_at(file, bytes, offset)
}

/// Reads at an offset, once.
#[cfg(unix)]
pub(crate) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, bytes, offset)
}

/// Reads at an offset, once. Moves the file's own position, which nothing here relies on.
#[cfg(windows)]
pub(crate) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    match std::os::windows::fs::FileExt::seek_read(file, bytes, offset) {
        // Behind the end this is an error here: ERROR_HANDLE_EOF.
        Err(error) if error.raw_os_error() == Some(38) => Ok(0),
        read => read,
    }
}

/// A path of these bytes, as far as they are text.
pub(crate) fn path_of_bytes(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(String::from_utf8_lossy(&bytes).into_owned())
}

/// Copies from this process's own memory. A source page that cannot be had is a signal here.
///
/// # Safety
///
/// `dst` must be valid for writes of `len` bytes, and nobody else may touch them meanwhile; `src` for reads of
/// as many.
pub(crate) unsafe fn copy_fallible(src: *const u8, dst: *mut u8, len: usize) -> io::Result<usize> {
    // SAFETY: passed on from the caller. Volatile: the bytes are read for the pages behind them.
    (0..len).for_each(|at| unsafe { dst.add(at).write(src.add(at).read_volatile()) });
    Ok(len)
}

/// Whether an error says that a page of a mapping cannot be had.
pub(crate) fn is_fault(_: &io::Error) -> bool {
    false
}

/// Asks for a mapping of a file in huge pages.
pub(crate) fn map_huge(_: &MmapRaw) -> io::Result<()> {
    unsupported()
}

/// Brings pages of a mapping of a file into memory.
pub(crate) fn populate_mapped(_: &MmapRaw, _: Range<usize>) -> io::Result<()> {
    unsupported()
}

/// Backs the whole pages of a range with memory.
///
/// # Safety
///
/// None is needed here.
pub(crate) unsafe fn populate(_: NonNull<u8>, _: usize) -> io::Result<()> {
    unsupported()
}

/// Time that this thread has been running for.
pub(crate) fn thread_time() -> Option<Duration> {
    None
}

/// Whether memory stands behind the page of an address; `None` where the system does not say.
///
/// # Safety
///
/// None is needed here.
pub(crate) unsafe fn is_resident(_: *mut u8) -> Option<bool> {
    None
}

// Advice for `advise`, which takes none here.
pub(crate) const MADV_HUGEPAGE: c_int = 0;
pub(crate) const MADV_NOHUGEPAGE: c_int = 1;
pub(crate) const MADV_POPULATE_WRITE: c_int = 2;

/// Advises pages of anonymous memory.
///
/// # Safety
///
/// None is needed here.
pub(crate) unsafe fn advise(_: *mut u8, _: usize, _: c_int) -> io::Result<()> {
    unsupported()
}

/// The system's page size in bytes.
#[cfg(unix)]
pub(crate) fn page_size() -> usize {
    // SAFETY: no memory is involved.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// The system's page size in bytes: that of Windows on x86-64 and AArch64.
#[cfg(not(unix))]
pub(crate) fn page_size() -> usize {
    4096
}

/// An anonymous private mapping, unmapped on drop.
#[derive(Debug)]
pub(crate) struct Anonymous {
    /// Longer than asked for, so that some address in it is aligned.
    map: MmapRaw,
    head: usize,
    len: usize,
}

impl Anonymous {
    /// Whether [`discard`](Self::discard) gives pages back.
    pub(crate) const DISCARDS: bool = cfg!(unix);

    /// Maps `len` zero bytes (a multiple of the page size, not zero) at a multiple of `align` (a
    /// power of two and at least a page). Nothing is backed by memory yet.
    pub(crate) fn new(len: usize, align: usize) -> io::Result<Self> {
        let padded = len.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
        let map: MmapMut = MmapOptions::new().no_reserve_swap().len(padded).map_anon()?;
        let map = MmapRaw::from(map);
        let head = map.as_mut_ptr().align_offset(align);
        Ok(Self { map, head, len })
    }

    pub(crate) fn ptr(&self) -> NonNull<u8> {
        let start = self.map.as_mut_ptr().wrapping_add(self.head);
        // A mapping does not start at null.
        NonNull::new(start).unwrap_or(NonNull::dangling())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Gives the pages of a page-aligned part back to the system; they are zeros from then on.
    ///
    /// # Safety
    ///
    /// Nobody reads or writes these bytes any more, but for those who expect zeros.
    #[cfg(unix)]
    pub(crate) unsafe fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = self.ptr().as_ptr().wrapping_add(offset);
        // What `madvise(2)` does to the bytes differs from system to system; a new mapping is zeros on all.
        // SAFETY: the range is inside the mapping, and the caller vouches that its bytes are unused.
        let mapped = unsafe {
            libc::mmap(
                start.cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The standard library has no call for it.
    ///
    /// # Safety
    ///
    /// None is needed here.
    #[cfg(not(unix))]
    pub(crate) unsafe fn discard(&self, _: usize, _: usize) -> io::Result<()> {
        unsupported()
    }

    /// Advises a page-aligned part of the mapping.
    pub(crate) fn advise(&self, _: usize, _: usize, _: c_int) -> io::Result<()> {
        unsupported()
    }
}
