//! The system calls that the standard library lacks, as functions that return `io::Result`.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, OsString, c_int};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::time::Duration;

pub(crate) use libc::{MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_POPULATE_WRITE};
use memmap2::{Advice, MmapRaw};

use crate::file::no_file;

fn check(result: c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// What `statx(2)` says of direct I/O on an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DioAlign {
    /// The kernel or file system does not tell (before Linux 6.1, and many network file systems).
    Unknown,
    /// Direct I/O is not to be had on this file.
    Unsupported,
    /// Alignments of memory and of file offset and length, in bytes.
    Bytes {
        /// Of the buffer's address.
        memory: u64,
        /// Of the file offset and the length.
        offset: u64,
    },
}

/// Asks for `STATX_DIOALIGN`.
pub(crate) fn dio_align(file: &File) -> io::Result<DioAlign> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let empty: &CStr = c"";
    // SAFETY: the path is a valid C string, `AT_EMPTY_PATH` makes the call speak of the open file,
    // and `stat` is memory of the size that the call fills.
    check(unsafe {
        libc::statx(
            file.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            stat.as_mut_ptr(),
        )
    })?;
    // SAFETY: all-zero bytes are a valid `statx`, and the call succeeded in filling it.
    let stat = unsafe { stat.assume_init() };
    if stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(DioAlign::Unknown);
    }
    Ok(match (stat.stx_dio_mem_align, stat.stx_dio_offset_align) {
        (0, _) | (_, 0) => DioAlign::Unsupported,
        (memory, offset) => DioAlign::Bytes { memory: memory.into(), offset: offset.into() },
    })
}

/// Opens a regular file; what else the path leads to is an error.
///
/// A check of the name before opening would say nothing of what is opened then. So what it leads to is
/// opened without waiting (a named pipe would otherwise wait for a writer, perhaps for ever), and
/// looked at by its handle.
pub(crate) fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
    let open = |flags| OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = match open(libc::O_NONBLOCK) {
        Ok(file) => file,
        // Another process holds a lease on the file, which is waited for, but only if it is a file.
        Err(error) if error.raw_os_error() == Some(libc::EWOULDBLOCK) => {
            let place = open(libc::O_PATH)?;
            if !place.metadata()?.is_file() {
                return Err(no_file());
            }
            File::open(path_of(&place))?
        }
        // Sockets cannot be opened, nor can devices without a driver.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
            return Err(no_file());
        }
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(no_file());
    }
    // io_uring fails a read that would wait, where the file system cannot say so and the flag is set.
    set_blocking(&file)?;
    Ok((file, metadata))
}

/// Opens a file that is open once more, to be read around the page cache.
pub(crate) fn open_direct(buffered: &File) -> io::Result<File> {
    // Through the handle: the name may lead elsewhere by now.
    let same = path_of(buffered);
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(same)?;
    // The system takes the lowest number that is free.
    let limit = descriptor_limit();
    if direct.as_raw_fd() as u64 >= limit - limit / 4 {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(direct)
}

/// Has calls on an open file wait, if it was opened with `O_NONBLOCK`.
pub(crate) fn set_blocking(file: &File) -> io::Result<()> {
    // SAFETY: no memory is involved.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) })
}

/// How many descriptors this process may have, if an error says that it has that many.
pub(crate) fn descriptors_used_up(error: &io::Error) -> Option<u64> {
    (error.raw_os_error() == Some(libc::EMFILE)).then(descriptor_limit)
}

/// How many descriptors this process may have: each of them is a smaller number.
fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call fills a live struct of its own type.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } {
        0 => limit.rlim_cur,
        _ => u64::MAX,
    }
}

/// A path that leads to an open file, whatever became of its name.
fn path_of(file: &File) -> String {
    // Not `self`: its table of files is empty when the main thread has ended before others.
    format!("/proc/thread-self/fd/{}", file.as_raw_fd())
}

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
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the caller vouches for `ptr` and `len`.
    count(unsafe { libc::pread(file.as_raw_fd(), ptr.cast(), len, offset) })
}

/// Reads at an offset, once.
pub(crate) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, bytes, offset)
}

/// A path of these bytes.
pub(crate) fn path_of_bytes(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

/// Copies from this process's own memory through the kernel, so that a source page that cannot be
/// had (a mapping whose file shrank) is an error and not a signal.
///
/// # Safety
///
/// `dst` must be valid for writes of `len` bytes, and nobody else may touch them meanwhile. `src`
/// may be any address.
pub(crate) unsafe fn copy_fallible(src: *const u8, dst: *mut u8, len: usize) -> io::Result<usize> {
    let local = libc::iovec { iov_base: dst.cast(), iov_len: len };
    let remote = libc::iovec { iov_base: src.cast_mut().cast(), iov_len: len };
    // SAFETY: one vector each; the kernel checks `remote`, and the caller vouches for `local`.
    count(unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) })
}

/// Whether an error says that a page of a mapping cannot be had.
pub(crate) fn is_fault(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// Asks for a mapping of a file in huge pages.
pub(crate) fn map_huge(map: &MmapRaw) -> io::Result<()> {
    map.advise(Advice::HugePage)
}

/// Brings pages of a mapping of a file into memory (Linux 5.14).
pub(crate) fn populate_mapped(map: &MmapRaw, range: Range<usize>) -> io::Result<()> {
    map.advise_range(Advice::PopulateRead, range.start, range.len())
}

/// Backs the whole pages of a range with memory, as first writes would (Linux 5.14).
///
/// # Safety
///
/// `ptr..ptr + len` is mapped memory. Its contents stay as they are.
pub(crate) unsafe fn populate(ptr: NonNull<u8>, len: usize) -> io::Result<()> {
    let page = page_size();
    let head = ptr.as_ptr().align_offset(page);
    let whole = len.saturating_sub(head) / page * page;
    if whole == 0 {
        return Ok(());
    }
    let start = ptr.as_ptr().wrapping_add(head);
    // SAFETY: the caller vouches for the range, and this advice changes no byte of it.
    unsafe { advise(start, whole, libc::MADV_POPULATE_WRITE) }
}

/// Time that this thread has been running for.
pub(crate) fn thread_time() -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to `time` only.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    (status == 0).then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// Whether memory stands behind the page of an address; `None` where the system does not say.
///
/// # Safety
///
/// The page is mapped.
pub(crate) unsafe fn is_resident(address: *mut u8) -> Option<bool> {
    let page = page_size();
    let start = address.map_addr(|address| address / page * page);
    let mut pages = 0u8;
    // SAFETY: the call looks at no byte of the page, and answers with one byte.
    let status = unsafe { libc::mincore(start.cast(), page, &mut pages) };
    (status == 0).then_some(pages & 1 == 1)
}

/// Advises pages of anonymous memory.
///
/// # Safety
///
/// The range is mapped, and the advice changes no byte of it.
pub(crate) unsafe fn advise(start: *mut u8, len: usize, advice: c_int) -> io::Result<()> {
    // SAFETY: passed on from the caller.
    check(unsafe { libc::madvise(start.cast(), len, advice) })
}

/// Pages of a file range in the page cache, by `cachestat(2)` (Linux 6.5).
pub(crate) fn cachestat(fd: RawFd, offset: u64, len: u64) -> io::Result<u64> {
    #[repr(C)]
    struct Range {
        off: u64,
        len: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Stat {
        cache: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    const SYS_CACHESTAT: libc::c_long = 451; // the same number on every architecture
    let range = Range { off: offset, len };
    let mut stat = Stat::default();
    // SAFETY: both pointers are to live structs of the layout that the call's manual page gives.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd, &raw const range, &raw mut stat, 0u32) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(stat.cache) }
}

/// Pages of a mapped range in the page cache, by `mincore(2)`.
pub(crate) fn mincore(mapping: &[u8], page: usize) -> io::Result<u64> {
    let mut present = vec![0u8; mapping.len().div_ceil(page)];
    // SAFETY: the range is a live mapping, page-aligned as the callers' maps are, and `present`
    // has one byte per page.
    check(unsafe {
        libc::mincore(mapping.as_ptr().cast_mut().cast(), mapping.len(), present.as_mut_ptr())
    })?;
    Ok(present.iter().filter(|p| *p & 1 == 1).count() as u64)
}

/// Whether this process owns a file (of user `owner`) or may write to it.
pub(crate) fn may_write(file: &File, owner: u32) -> bool {
    // SAFETY: no memory is involved.
    let user = unsafe { libc::geteuid() };
    if user == owner || user == 0 {
        return true;
    }
    let Ok(path) = CString::new(path_of(file)) else {
        return false;
    };
    // SAFETY: the path is a valid C string.
    unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::W_OK, libc::AT_EACCESS) == 0 }
}

/// The processors that the calling thread may run on.
pub(crate) fn affinity() -> io::Result<BTreeSet<usize>> {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: the call fills at most the size given, which is that of `set`.
    check(unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()) })?;
    // SAFETY: all-zero bytes are a valid set, and the call succeeded in filling it.
    let set = unsafe { set.assume_init() };
    // SAFETY: the numbers are within the set's size.
    Ok((0..libc::CPU_SETSIZE as usize)
        .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
        .collect())
}

/// Lets the calling thread run on these processors only.
pub(crate) fn set_affinity(processors: &BTreeSet<usize>) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid set: the empty one.
    let mut set = unsafe { MaybeUninit::<libc::cpu_set_t>::zeroed().assume_init() };
    for cpu in processors.iter().filter(|cpu| **cpu < libc::CPU_SETSIZE as usize) {
        // SAFETY: the number is within the set's size.
        unsafe { libc::CPU_SET(*cpu, &mut set) };
    }
    // SAFETY: the call reads the size given, which is that of `set`.
    check(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) })
}

/// The system's page size in bytes.
pub(crate) fn page_size() -> usize {
    // SAFETY: no memory is involved.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// An anonymous private mapping, unmapped on drop.
#[derive(Debug)]
pub(crate) struct Anonymous {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, whichever thread holds it; access to its bytes
// goes through methods whose contracts say who may do so.
unsafe impl Send for Anonymous {}
// SAFETY: as above; the value itself has no interior mutability.
unsafe impl Sync for Anonymous {}

impl Anonymous {
    /// Whether [`discard`](Self::discard) gives pages back.
    pub(crate) const DISCARDS: bool = true;

    /// Maps `len` zero bytes (a multiple of the page size, not zero) at a multiple of `align` (a
    /// power of two and at least a page). Nothing is backed by memory yet.
    pub(crate) fn new(len: usize, align: usize) -> io::Result<Self> {
        let padded = len.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh anonymous mapping touches no existing memory.
        let raw = unsafe {
            libc::mmap(
                ptr::null_mut(),
                padded,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let raw = raw.cast::<u8>();
        let head = raw.align_offset(align);
        let tail = padded - head - len;
        // SAFETY: head and tail lie inside the mapping just made, are page-aligned (its start,
        // `align` and `len` are), and nothing refers to them.
        unsafe {
            if head > 0 {
                libc::munmap(raw.cast(), head);
            }
            if tail > 0 {
                libc::munmap(raw.add(head + len).cast(), tail);
            }
        }
        // SAFETY: `head < padded`, so the address is inside the mapping, hence not null.
        let ptr = unsafe { NonNull::new_unchecked(raw.add(head)) };
        Ok(Self { ptr, len })
    }

    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Gives the pages of a page-aligned part back to the system; they are zeros from then on.
    ///
    /// # Safety
    ///
    /// Nobody reads or writes these bytes any more, but for those who expect zeros.
    pub(crate) unsafe fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range is inside the mapping, and the caller vouches that its bytes are unused.
        let status = unsafe {
            libc::madvise(self.ptr.as_ptr().add(offset).cast(), len, libc::MADV_DONTNEED)
        };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Advises a page-aligned part of the mapping.
    pub(crate) fn advise(&self, offset: usize, len: usize, advice: c_int) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        debug_assert!(
            [MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_POPULATE_WRITE].contains(&advice),
            "advice that throws pages away would change bytes under their readers"
        );
        // SAFETY: the range lies in this mapping, and the advice used keeps its contents.
        unsafe { advise(self.ptr.as_ptr().add(offset), len, advice) }
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and whoever lent parts of it holds the value.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::file::is_no_file;

    #[test]
    fn handles_wait_and_lead_to_the_file_whatever_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, [1; 100]).unwrap();
        let (file, _) = open_regular(&path).unwrap();
        // SAFETY: no memory is involved.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        assert_eq!(flags & libc::O_NONBLOCK, 0);
        fs::rename(&path, dir.path().join("b")).unwrap();
        fs::write(&path, [2; 5]).unwrap();
        assert_eq!(fs::read(path_of(&file)).unwrap(), [1; 100]);
        assert!(is_no_file(&open_regular(dir.path()).unwrap_err()));
        let socket = dir.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(is_no_file(&open_regular(&socket).unwrap_err()));
    }
}
