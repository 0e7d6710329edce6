//! Puts files into a known page-cache state and checks that it worked.
//!
//! Sources: `posix_fadvise(2)` (`POSIX_FADV_DONTNEED` drops clean, unmapped pages only, hence the
//! `fsync` before it), `cachestat(2)` (Linux 6.5), `mincore(2)`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The page-cache state that a run starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CacheState {
    /// Less than [`COLD_AT_MOST`] of the files' pages are in the page cache.
    Cold,
    /// More than [`WARM_AT_LEAST`] of them are.
    Warm,
}

/// Largest resident fraction that counts as cold.
pub const COLD_AT_MOST: f64 = 0.01;
/// Smallest resident fraction that counts as warm.
pub const WARM_AT_LEAST: f64 = 0.99;

impl CacheState {
    /// Whether a resident fraction confirms this state.
    #[must_use]
    pub fn confirmed_by(self, resident: f64) -> bool {
        match self {
            Self::Cold => resident < COLD_AT_MOST,
            Self::Warm => resident > WARM_AT_LEAST,
        }
    }

    /// Lower-case name, as in the program's arguments.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
        }
    }
}

/// A file system type whose files always live in memory, as `f_type` of `statfs(2)`.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// The part of a file, from its start, whose residency matters to a run.
#[derive(Debug, Clone)]
pub struct Part {
    path: PathBuf,
    len: u64,
}

impl Part {
    /// All of a file.
    ///
    /// # Errors
    /// A file that is not there.
    pub fn whole(path: &Path) -> Result<Self> {
        let len =
            std::fs::metadata(path).with_context(|| format!("stat {}", path.display()))?.len();
        Ok(Self { path: path.to_owned(), len })
    }

    /// The header of a safetensors file, with the length before it.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn header(path: &Path) -> Result<Self> {
        let mut len = [0; 8];
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        file.read_exact_at(&mut len, 0).with_context(|| format!("read {}", path.display()))?;
        let len = u64::from_le_bytes(len).saturating_add(8).min(file.metadata()?.len());
        Ok(Self { path: path.to_owned(), len })
    }
}

/// Brings parts of files into `state` and returns the resident fraction measured afterwards.
///
/// The caller decides whether the fraction [confirms](CacheState::confirmed_by) the state.
///
/// # Errors
/// A file that cannot be opened, read, or measured.
pub fn establish(parts: &[Part], state: CacheState) -> Result<f64> {
    for part in parts {
        let path = part.path.display();
        match state {
            CacheState::Cold => evict(part).with_context(|| format!("evict {path}"))?,
            CacheState::Warm => fill(part).with_context(|| format!("fill {path}"))?,
        }
    }
    resident_fraction(parts)
}

/// Fraction of the parts' pages that the page cache holds, by `cachestat` or else `mincore`.
///
/// # Errors
/// A file that cannot be opened or measured.
pub fn resident_fraction(parts: &[Part]) -> Result<f64> {
    let page = page_size();
    let (mut resident, mut total) = (0u64, 0u64);
    for Part { path, len } in parts {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        total += len.div_ceil(page);
        resident += resident_pages(&file, *len)
            .with_context(|| format!("page-cache residency of {}", path.display()))?;
    }
    Ok(if total == 0 { 1.0 } else { resident as f64 / total as f64 })
}

fn resident_pages(file: &File, len: u64) -> io::Result<u64> {
    if on_tmpfs(file) {
        return Ok(len.div_ceil(page_size()));
    }
    match cachestat(file, len) {
        Err(e)
            if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP)) =>
        {
            mincore(file, len)
        }
        result => result,
    }
}

fn on_tmpfs(file: &File) -> bool {
    // SAFETY: `statfs` is plain data for which all-zero bytes are a valid value.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `stat` is a valid out-pointer.
    let ok = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } == 0;
    ok && stat.f_type as i64 == TMPFS_MAGIC
}

/// Drops the whole file: read-ahead goes beyond a part.
fn evict(part: &Part) -> io::Result<()> {
    let file = File::open(&part.path)?;
    file.sync_all()?;
    // SAFETY: the descriptor is open; the call takes no pointers.
    let code = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
}

fn fill(part: &Part) -> io::Result<()> {
    let file = File::open(&part.path)?;
    let len = part.len;
    if resident_pages(&file, len)? == len.div_ceil(page_size()) {
        return Ok(());
    }
    let mut buffer = vec![0u8; 4 << 20];
    let mut offset = 0;
    while offset < len {
        let wanted = buffer.len().min((len - offset) as usize);
        match file.read_at(&mut buffer[..wanted], offset)? {
            0 => break,
            n => offset += n as u64,
        }
    }
    Ok(())
}

fn page_size() -> u64 {
    // SAFETY: takes and returns integers only.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// `struct cachestat_range` of `linux/mman.h`.
#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

/// `struct cachestat` of `linux/mman.h`, counts in pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}

/// Number of `cachestat`, the same on every architecture (added after numbers were unified).
const SYS_CACHESTAT: libc::c_long = 451;

fn cachestat(file: &File, len: u64) -> io::Result<u64> {
    if len == 0 {
        return Ok(0);
    }
    let range = CachestatRange { off: 0, len };
    let mut stat = Cachestat::default();
    // SAFETY: both pointers are to live values of the layout that the kernel defines; flags must be 0.
    let code = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0)
    };
    if code == 0 { Ok(stat.nr_cache) } else { Err(io::Error::last_os_error()) }
}

fn mincore(file: &File, len: u64) -> io::Result<u64> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    if len == 0 {
        return Ok(0);
    }
    // SAFETY: the mapping is never dereferenced, so a file that shrinks cannot fault us.
    let map = unsafe { memmap2::MmapOptions::new().len(len).map(file)? };
    let mut pages = vec![0u8; len.div_ceil(page_size() as usize)];
    // SAFETY: the range is mapped and `pages` has one byte for each of its pages.
    let code =
        unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), len, pages.as_mut_ptr().cast()) };
    if code != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pages.iter().filter(|&&p| p & 1 != 0).count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Beside the sources, since a temporary folder may be a tmpfs, which cannot be cold.
    fn file_of(len: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&vec![1u8; len]).unwrap();
        file
    }

    #[test]
    fn cold_and_warm_are_seen_by_both_counters() {
        let file = file_of((8 << 20) + 17);
        let files = [Part::whole(file.path()).unwrap()];
        let len = file.as_file().metadata().unwrap().len();
        // SAFETY: nobody looks at the bytes. Where they may be locked, they stay in memory.
        let held = unsafe { memmap2::Mmap::map(file.as_file()) }.unwrap();
        let _ = held.lock();
        let warm = establish(&files, CacheState::Warm).unwrap();
        assert!(CacheState::Warm.confirmed_by(warm), "{warm}");
        assert!(!CacheState::Cold.confirmed_by(warm), "{warm}");
        assert_eq!(mincore(file.as_file(), len).unwrap(), len.div_ceil(page_size()));
        drop(held);
        // The kernel may keep pages that it is busy with.
        let again = |_| establish(&files, CacheState::Cold).unwrap();
        let cold = (0..50).map(again).find(|cold| *cold == 0.0).unwrap_or(1.0);
        // Memory is all that a tmpfs file has: the check must see that it did not get cold.
        if on_tmpfs(file.as_file()) {
            assert!(!CacheState::Cold.confirmed_by(cold), "{cold}");
            return;
        }
        assert!(CacheState::Cold.confirmed_by(cold), "{cold}");
        assert_eq!(mincore(file.as_file(), len).unwrap(), 0);
    }
}
