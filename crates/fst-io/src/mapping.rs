//! Files as memory: a read-only mapping, and bringing parts of it in ahead of whoever reads them.
//!
//! A mapping costs no copy and no memory of its own, and has a price: the bytes stay the file's. A
//! write to the file shows through, and whoever touches a page behind the end of a file that was
//! truncated is killed (SIGBUS). [`Mapping::populate`] brings pages in through `madvise(2)`, which
//! answers with an error instead.

use std::io::ErrorKind;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::{io, slice, thread};

use memmap2::{MmapOptions, MmapRaw};

use crate::error::Error;
use crate::file::{Identity, SourceFile};
use crate::sys;

/// Bytes that are brought in by one call: two huge pages, enough for storage to work on.
const WINDOW: usize = 4 << 20;

/// Most threads that bring pages in at once. Warm pages come at the speed of one core's page-table
/// work; cold ones need a few requests in flight.
const MAX_THREADS: usize = 8;

/// A whole file, mapped for reading. Its bytes are shared with the page cache.
#[derive(Debug)]
pub struct Mapping {
    map: Option<MmapRaw>,
    path: PathBuf,
    /// Whether the path leads to the file.
    named: bool,
    expected: Identity,
}

impl Mapping {
    /// Maps all of `file`.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] on file systems that cannot map files and when the address space does not
    /// suffice, [`Error::EarlyEnd`] when the file shrank since it was opened.
    ///
    /// # Safety
    ///
    /// While the mapping lives, nobody may write to the file or truncate it, in this process or any
    /// other: [`Deref`] hands its bytes out as a slice, which must not change.
    pub unsafe fn new(file: &SourceFile) -> Result<Self, Error> {
        let path = file.path().to_owned();
        let (Some(expected), Some(opened)) = (file.expected(), file.buffered()) else {
            let source = io::Error::new(io::ErrorKind::Unsupported, "it is no local file");
            return Err(Error::Map { path, source });
        };
        let named = file.is_named();
        if file.is_empty() {
            return Ok(Self { map: None, path, named, expected });
        }
        let map = MmapOptions::new().map_raw_read_only(opened);
        let map = map.map_err(|source| Error::Map { path: path.clone(), source })?;
        if (map.len() as u64) < file.len() {
            return Err(Error::EarlyEnd { path, end: map.len() as u64, needed: file.len() });
        }
        // Where the file system has large folios, cold pages are then read as huge ones and mapped
        // by one entry. Elsewhere this is refused, and nothing is lost.
        let _ = sys::map_huge(&map);
        Ok(Self { map: Some(map), path, named, expected })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns once the pages of `range` are in memory and mapped, so that reading them neither
    /// waits nor faults.
    ///
    /// # Errors
    ///
    /// [`Error::EarlyEnd`] when the file was truncated below the range, [`Error::Read`] when
    /// storage fails.
    pub fn populate(&self, range: Range<usize>) -> Result<(), Error> {
        let Some(map) = &self.map else { return Ok(()) };
        let range = range.start.min(map.len())..range.end.min(map.len());
        if range.is_empty() {
            return Ok(());
        }
        let mut retries = 0;
        loop {
            match sys::populate_mapped(map, range.clone()) {
                Ok(()) => return Ok(()),
                Err(e) => match e.kind() {
                    ErrorKind::Interrupted | ErrorKind::WouldBlock if retries < 1000 => {
                        retries += 1;
                    }
                    // Before Linux 5.14, and on other systems.
                    ErrorKind::InvalidInput | ErrorKind::Unsupported => {
                        return self.fault_in(map, range);
                    }
                    _ => return Err(self.failure(&range, e)),
                },
            }
        }
    }

    /// Touches each page: slower than `MADV_POPULATE_READ`, and on Linux, through the kernel, like it an
    /// error where a read would be a signal. Elsewhere only a file that is short by now is one.
    fn fault_in(&self, map: &MmapRaw, range: Range<usize>) -> Result<(), Error> {
        let (path, needed) = (&self.path, range.end as u64);
        if let Ok(now) = std::fs::metadata(path).map(|now| now.len())
            && now < needed
        {
            return Err(Error::EarlyEnd { path: path.clone(), end: now, needed });
        }
        let mut byte = 0u8;
        for at in range.clone().step_by(sys::page_size()) {
            // SAFETY: `byte` is this function's own; the source lies in the mapping.
            unsafe { sys::copy_fallible(map.as_ptr().wrapping_add(at), &raw mut byte, 1) }
                .map_err(|e| self.failure(&range, e))?;
        }
        Ok(())
    }

    fn failure(&self, range: &Range<usize>, source: io::Error) -> Error {
        let (path, needed) = (self.path.clone(), range.end as u64);
        if !sys::is_fault(&source) {
            let (offset, len) = (range.start as u64, range.len() as u64);
            return Error::Read { path, offset, len, source };
        }
        // A page that a read would be killed for: it is behind the end, or storage failed.
        match std::fs::metadata(&self.path) {
            Ok(now) if now.len() < needed => Error::EarlyEnd { path, end: now.len(), needed },
            _ => {
                let (offset, len) = (range.start as u64, range.len() as u64);
                let source = io::Error::other("a page of the file cannot be read in");
                Error::Read { path, offset, len, source }
            }
        }
    }

    /// Checks that the path does not lead to another file than the one that was mapped, and that that
    /// is still what it was when it was opened.
    ///
    /// By name, since a mapping keeps no descriptor. Nothing is known of a file that was renamed or
    /// removed; the mapping keeps its bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Changed`].
    pub fn verify_unchanged(&self) -> Result<(), Error> {
        if self.named { self.expected.check_name(&self.path) } else { Ok(()) }
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.map {
            // SAFETY: the mapping lives as long as `self`, is readable and never written through;
            // that the file does not change is the promise that `new` demands.
            Some(map) => unsafe { slice::from_raw_parts(map.as_ptr(), map.len()) },
            None => &[],
        }
    }
}

/// Ranges cut into windows.
fn windows<M: Clone>(
    ranges: impl IntoIterator<Item = (M, Range<usize>)>,
) -> Vec<(M, Range<usize>)> {
    let cut = |(map, range): (M, Range<usize>)| {
        let starts = range.clone().step_by(WINDOW);
        starts.map(move |at| (map.clone(), at..range.end.min(at + WINDOW))).collect::<Vec<_>>()
    };
    ranges.into_iter().flat_map(cut).collect()
}

fn threads(windows: usize) -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(windows.max(1))
}

/// Brings ranges of mappings into memory by several threads, and checks that no file changed.
/// Returns when all are there; see [`Mapping::populate`].
///
/// # Errors
///
/// The first that any range met; [`Error::Cancelled`] when `cancelled` became true.
pub fn populate(
    ranges: &[(Arc<Mapping>, Range<usize>)],
    cancelled: &AtomicBool,
) -> Result<(), Error> {
    let windows = windows(ranges.iter().map(|(map, range)| (map, range.clone())));
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let failed = AtomicBool::new(false);
    let work = || {
        while !failed.load(Relaxed) {
            let Some((map, range)) = windows.get(next.fetch_add(1, Relaxed)) else { break };
            let result = match cancelled.load(Relaxed) {
                true => Err(Error::Cancelled),
                false => map.populate(range.clone()),
            };
            if let Err(error) = result {
                failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
                failed.store(true, Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads(windows.len()) {
            // Fewer threads are slower and still right.
            let _ = thread::Builder::new().name("fst-map".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(error);
    }
    let mut last: Option<&Arc<Mapping>> = None;
    for (map, _) in ranges {
        if !last.is_some_and(|last| Arc::ptr_eq(last, map)) {
            map.verify_unchanged()?;
            last = Some(map);
        }
    }
    Ok(())
}

/// Starts bringing ranges of mappings into memory, in order, and returns at once. Best effort: it
/// ends when all is there, at the first refusal, or when nobody else holds a mapping any more.
pub fn read_ahead(ranges: &[(Arc<Mapping>, Range<usize>)]) {
    let weak = ranges.iter().map(|(map, range)| (Arc::downgrade(map), range.clone()));
    let windows: Arc<[(Weak<Mapping>, Range<usize>)]> = windows(weak).into();
    let next = Arc::new(AtomicUsize::new(0));
    // One core is left to whoever reads: it needs no help where this falls behind.
    for _ in 0..threads(windows.len()).saturating_sub(1).max(1) {
        let (windows, next) = (windows.clone(), next.clone());
        let ahead = move || {
            while let Some((map, range)) = windows.get(next.fetch_add(1, Relaxed)) {
                let Some(map) = map.upgrade() else { continue };
                if map.populate(range.clone()).is_err() {
                    break;
                }
            }
        };
        // Without the thread, readers fault their pages themselves.
        let _ = thread::Builder::new().name("fst-ahead".to_owned()).spawn(ahead);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::{Duration, Instant};

    fn mapped(len: usize) -> (tempfile::TempDir, Arc<Mapping>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let bytes: Vec<u8> = (0..len).map(|i| (i / 7) as u8).collect();
        fs::write(&path, bytes).unwrap();
        let file = SourceFile::open(&path, None).unwrap();
        // SAFETY: nobody else knows the file; tests that truncate it read nothing afterwards.
        let map = unsafe { Mapping::new(&file) }.unwrap();
        // Pages that are brought in are not taken away again, where memory may be locked.
        // SAFETY: the call touches no byte of the mapping.
        unsafe { libc::mlock2(map.as_ptr().cast(), map.len(), libc::MLOCK_ONFAULT) };
        (dir, Arc::new(map))
    }

    /// Pages of the range that this process has mapped, by `pagemap`.
    fn faulted(map: &Mapping, range: Range<usize>) -> usize {
        use std::os::unix::fs::FileExt;
        let pagemap = fs::File::open("/proc/self/pagemap").unwrap();
        let page = sys::page_size();
        let first = (map.as_ptr() as usize + range.start) / page;
        let mut entries = vec![0; range.len().div_ceil(page) * 8];
        pagemap.read_exact_at(&mut entries, first as u64 * 8).unwrap();
        entries.chunks(8).filter(|entry| entry[7] & 0x80 != 0).count()
    }

    #[test]
    fn populated_pages_are_mapped_and_right() {
        let len = (9 << 20) + 123;
        let (_dir, map) = mapped(len);
        assert_eq!(map.len(), len);
        let pages = len.div_ceil(sys::page_size());
        assert_eq!(faulted(&map, 0..len), 0);
        populate(&[(map.clone(), 0..len)], &AtomicBool::new(false)).unwrap();
        assert_eq!(faulted(&map, 0..len), pages);
        assert!(map.iter().enumerate().all(|(i, byte)| *byte == (i / 7) as u8));
    }

    #[test]
    fn both_ways_bring_pages_in() {
        let (_dir, map) = mapped(1 << 20);
        let raw = map.map.as_ref().unwrap();
        map.fault_in(raw, 0..1 << 20).unwrap();
        assert_eq!(faulted(&map, 0..1 << 20), (1 << 20) / sys::page_size());
    }

    #[test]
    fn reading_ahead_happens_by_itself_and_lets_go() {
        let len = 9 << 20;
        let (_dir, map) = mapped(len);
        read_ahead(&[(map.clone(), 0..len)]);
        let deadline = Instant::now() + Duration::from_secs(20);
        while faulted(&map, 0..len) < len / sys::page_size() {
            assert!(Instant::now() < deadline, "only {} pages", faulted(&map, 0..len));
            thread::sleep(Duration::from_millis(5));
        }
        while Arc::strong_count(&map) > 1 {
            assert!(Instant::now() < deadline, "the threads keep the mapping");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_truncated_file_is_an_error_and_not_a_signal() {
        let (_dir, map) = mapped(9 << 20);
        fs::File::options().write(true).open(map.path()).unwrap().set_len(4096).unwrap();
        let all = [(map.clone(), 0..map.len())];
        let error = populate(&all, &AtomicBool::new(false)).unwrap_err();
        assert!(matches!(error, Error::EarlyEnd { end: 4096, .. }), "{error}");
        let raw = map.map.as_ref().unwrap();
        let error = map.fault_in(raw, 0..map.len()).unwrap_err();
        assert!(matches!(error, Error::EarlyEnd { end: 4096, .. }), "{error}");
        // What is left can be brought in, and the change is seen.
        let error = populate(&[(map, 0..4096)], &AtomicBool::new(false)).unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");
    }

    #[test]
    fn empty_files_map_to_nothing_and_flags_cancel() {
        let (_dir, map) = mapped(0);
        assert!(map.is_empty());
        populate(&[(map, 0..0)], &AtomicBool::new(false)).unwrap();
        let (_dir, map) = mapped(10);
        let error = populate(&[(map, 0..10)], &AtomicBool::new(true)).unwrap_err();
        assert!(matches!(error, Error::Cancelled));
    }
}
