//! How much of a file range is in the page cache.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use memmap2::MmapOptions;

use crate::sys;

/// Bytes of `offset..offset + len` that are in the page cache, counted in whole pages.
///
/// Asks `cachestat(2)`, and `mincore(2)` on a mapping where the kernel has no such call.
///
/// # Errors
///
/// The system's error where both calls fail: on file systems that cannot be mapped, and for files
/// that this process neither owns nor may write to, where the kernel keeps it to itself.
pub fn resident_bytes(file: &File, offset: u64, len: u64) -> io::Result<u64> {
    static NO_CACHESTAT: AtomicBool = AtomicBool::new(false);
    if len == 0 {
        return Ok(0);
    }
    let page = sys::page_size() as u64;
    if !NO_CACHESTAT.load(Relaxed) {
        match sys::cachestat(file.as_raw_fd(), offset, len) {
            Ok(pages) => return Ok((pages * page).min(len)),
            // Absent from the kernel: it will not come back. Any other error is of this file: one
            // that this process may not ask about (EPERM), or whose file system has no page cache
            // of the usual kind.
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {
                NO_CACHESTAT.store(true, Relaxed);
            }
            Err(_) => {}
        }
    }
    by_mincore(file, offset, len)
}

/// Bytes from the start of a file to `len` of which the page cache holds the pages; of a long file by samples
/// at equal distances, since asking takes time for each page: some 40 ms for 16 GB.
///
/// # Errors
///
/// As for [`resident_bytes`].
pub fn resident_estimate(file: &File, len: u64) -> io::Result<u64> {
    const SAMPLES: u64 = 32;
    const SAMPLE: u64 = 256 << 10;
    if len <= 8 * SAMPLES * SAMPLE {
        return resident_bytes(file, 0, len);
    }
    let starts = (0..SAMPLES).map(|sample| len / SAMPLES * sample / SAMPLE * SAMPLE);
    let found: io::Result<u64> = starts.map(|start| resident_bytes(file, start, SAMPLE)).sum();
    Ok((u128::from(found?) * u128::from(len) / u128::from(SAMPLES * SAMPLE)) as u64)
}

fn by_mincore(file: &File, offset: u64, len: u64) -> io::Result<u64> {
    let page = sys::page_size() as u64;
    let start = offset / page * page;
    let metadata = file.metadata()?;
    // Of files that the caller neither owns nor may write to, `mincore` claims all pages.
    if !sys::may_write(file, metadata.uid()) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let size = metadata.len();
    let end = (offset + len).min(size);
    if end <= start {
        return Ok(0);
    }
    let map_len = usize::try_from(end - start).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the mapping is asked about and never read, so that other writers do not matter.
    let map = unsafe { MmapOptions::new().offset(start).len(map_len).map(file)? };
    Ok((sys::mincore(&map, page as usize)? * page).min(len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_was_just_written_is_resident_and_both_ways_agree() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
        // SAFETY: nobody looks at the bytes. Where they may be locked, they stay in memory.
        let map = unsafe { MmapOptions::new().map(&file) }.unwrap();
        let _ = map.lock();
        assert_eq!(resident_bytes(&file, 0, 1 << 20).unwrap(), 1 << 20);
        assert_eq!(by_mincore(&file, 0, 1 << 20).unwrap(), 1 << 20);
        assert_eq!(by_mincore(&file, 4096, 8192).unwrap(), 8192);
        assert_eq!(resident_bytes(&file, 4096, 8192).unwrap(), 8192);
        assert_eq!(by_mincore(&file, 2 << 20, 4096).unwrap(), 0);
        assert_eq!(resident_bytes(&file, 0, 0).unwrap(), 0);
    }

    #[test]
    fn long_files_are_looked_at_by_samples() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 40 << 20]).unwrap();
        assert_eq!(resident_estimate(&file, 40 << 20).unwrap(), 40 << 20);
        file.set_len(120 << 20).unwrap();
        let estimate = resident_estimate(&file, 120 << 20).unwrap();
        assert!((35 << 20..45 << 20).contains(&estimate), "{estimate}");
    }

    #[test]
    fn the_files_of_others_are_not_taken_for_resident() {
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
        file.sync_all().unwrap();
        // SAFETY: neither call touches memory. The bare system call changes this thread's user
        // alone, which no other test runs on. Where this process may not change users, it fails,
        // and the file stays its own.
        unsafe {
            libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED);
            libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534);
        }
        assert!(resident_bytes(&file, 0, 1 << 20).map_or(true, |bytes| bytes < 1 << 20));
        assert!(by_mincore(&file, 0, 1 << 20).map_or(true, |bytes| bytes < 1 << 20));
    }

    #[test]
    fn what_was_dropped_is_not_resident() {
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
        file.sync_all().unwrap();
        // The kernel may keep pages that it is busy with, or drop more between the two questions.
        let seen = (0..50).any(|_| {
            // SAFETY: advice on an open file touches no memory of this process.
            let dropped =
                unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
            assert_eq!(dropped, 0);
            let left = by_mincore(&file, 0, 1 << 20).unwrap();
            left < 1 << 20 && resident_bytes(&file, 0, 1 << 20).unwrap() == left
        });
        assert!(seen, "still cached, or one way to ask says so");
    }
}
