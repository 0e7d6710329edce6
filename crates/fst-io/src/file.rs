//! Source files: opened twice (through the page cache and around it), watched for change.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::error::{Change, Error};
use crate::plan::Limits;
use crate::sys::{self, DioAlign};

/// Whether a file can be read around the page cache, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirectIo {
    /// Yes, at these alignments in bytes.
    Available {
        /// Of memory addresses.
        memory_align: u64,
        /// Of file offsets and lengths.
        offset_align: u64,
    },
    /// `statx(2)` says that this file has no direct I/O.
    Unsupported,
    /// Opening with `O_DIRECT` was refused with this error number.
    Refused(i32),
    /// It was not asked for.
    NotTried,
}

impl std::fmt::Display for DirectIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Available { memory_align, offset_align } => {
                write!(f, "available (memory {memory_align}, offset {offset_align} bytes)")
            }
            Self::Unsupported => f.write_str("not supported by the file system"),
            Self::Refused(errno) => {
                write!(f, "O_DIRECT refused: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::NotTried => f.write_str("not tried"),
        }
    }
}

/// A file to read from.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    buffered: File,
    direct: Option<File>,
    direct_io: DirectIo,
    /// Set when a direct read was refused at run time (EINVAL): later blocks do not try again.
    direct_off: AtomicBool,
    len: u64,
    expected: Metadata,
}

impl SourceFile {
    /// Opens `path` for reading, and for direct reading where the file system allows it.
    ///
    /// `expected` is what the file was when its header was read; a file that is another by now is
    /// refused. With `None`, the file as it is found is the expected one.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], or [`Error::Changed`].
    pub fn open(path: &Path, expected: Option<&Metadata>) -> Result<Self, Error> {
        let fail = |source| Error::Open { path: path.to_owned(), source };
        let (buffered, found) = match open_regular(path).map_err(fail)? {
            Some(opened) => opened,
            None if expected.is_some() => {
                return Err(Error::Changed { path: path.to_owned(), change: Change::Replaced });
            }
            None => return Err(fail(io::Error::other("not a regular file"))),
        };
        if let Some(change) = expected.and_then(|expected| change(expected, &found)) {
            return Err(Error::Changed { path: path.to_owned(), change });
        }
        let (direct, direct_io) = open_direct(&buffered);
        Ok(Self {
            path: path.to_owned(),
            buffered,
            direct,
            direct_io,
            direct_off: AtomicBool::new(false),
            len: found.len(),
            expected: found,
        })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file held no byte when it was opened.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file, read through the page cache.
    pub fn buffered(&self) -> &File {
        &self.buffered
    }

    /// The file opened with `O_DIRECT`, unless that is not to be had.
    pub fn direct(&self) -> Option<&File> {
        if self.direct_off.load(Relaxed) { None } else { self.direct.as_ref() }
    }

    /// Whether and why direct reads are (not) used.
    pub fn direct_io(&self) -> &DirectIo {
        &self.direct_io
    }

    /// Alignment, in bytes, that blocks of this file must have, for memory and offset alike.
    pub fn align(&self) -> u64 {
        match self.direct_io {
            DirectIo::Available { memory_align, offset_align } => {
                memory_align.max(offset_align).max(Limits::MIN_ALIGN)
            }
            _ => Limits::MIN_ALIGN,
        }
    }

    /// Alignment, in bytes, that direct reads of this file demand of memory: no more than
    /// [`align`](Self::align), and where the system tells, often far less.
    pub fn memory_align(&self) -> u64 {
        match self.direct_io {
            DirectIo::Available { memory_align, .. } => memory_align,
            _ => Limits::MIN_ALIGN,
        }
    }

    /// Bytes of the file in the page cache.
    ///
    /// # Errors
    ///
    /// The system's error where it cannot tell.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        crate::residency::resident_bytes(&self.buffered, 0, self.len())
    }

    /// A source of a length, and with a descriptor for direct reads, of the test's own choice.
    #[cfg(test)]
    pub(crate) fn faked(path: &Path, direct: Option<File>, len: u64) -> Result<Self, Error> {
        let opened = Self::open(path, None)?;
        Ok(Self { direct, len, direct_io: DirectIo::NotTried, ..opened })
    }

    pub(crate) fn refuse_direct(&self) {
        self.direct_off.store(true, Relaxed);
    }

    /// Checks that the file is still what it was when it was opened: same length, not written to,
    /// and that its path still leads to it.
    ///
    /// # Errors
    ///
    /// [`Error::Changed`], or [`Error::Open`] when the path is gone.
    pub fn verify_unchanged(&self) -> Result<(), Error> {
        let path = || self.path.clone();
        let fail = |source| Error::Open { path: path(), source };
        let changed = |change| Error::Changed { path: path(), change };
        let now = self.buffered.metadata().map_err(fail)?;
        if let Some(change) = change(&self.expected, &now) {
            return Err(changed(change));
        }
        Self::check_unchanged(&self.path, &self.expected)
    }

    /// Checks that `path` leads to the file that `expected` describes, as it was then.
    pub(crate) fn check_unchanged(path: &Path, expected: &Metadata) -> Result<(), Error> {
        let fail = |source| Error::Open { path: path.to_owned(), source };
        let by_name = std::fs::metadata(path).map_err(fail)?;
        match change(expected, &by_name) {
            Some(change) => Err(Error::Changed { path: path.to_owned(), change }),
            None => Ok(()),
        }
    }

    pub(crate) fn expected(&self) -> &Metadata {
        &self.expected
    }
}

/// Opens a regular file; `None` where the path leads to anything else.
///
/// A check of the name before opening would say nothing of what is opened then. So what it leads to is
/// opened without waiting (a named pipe would otherwise wait for a writer, perhaps for ever), and
/// looked at by its handle.
fn open_regular(path: &Path) -> io::Result<Option<(File, Metadata)>> {
    let open = |flags| OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = match open(libc::O_NONBLOCK) {
        Ok(file) => file,
        // Another process holds a lease on the file, which is waited for, but only if it is a file.
        Err(error) if error.raw_os_error() == Some(libc::EWOULDBLOCK) => {
            let place = open(libc::O_PATH)?;
            if !place.metadata()?.is_file() {
                return Ok(None);
            }
            File::open(sys::path_of(&place))?
        }
        // Sockets cannot be opened, nor can devices without a driver.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(None);
    }
    // io_uring fails a read that would wait, where the file system cannot say so and the flag is set.
    sys::set_blocking(&file)?;
    Ok(Some((file, metadata)))
}

fn open_direct(buffered: &File) -> (Option<File>, DirectIo) {
    let align = match sys::dio_align(buffered) {
        Ok(DioAlign::Unsupported) => return (None, DirectIo::Unsupported),
        Ok(DioAlign::Bytes { memory, offset })
            if memory.is_power_of_two() && offset.is_power_of_two() =>
        {
            (memory, offset)
        }
        // Kernels before 6.1 do not say. A page satisfies every block device; should a file
        // system want more, its EINVAL sends the block through the page cache.
        _ => (Limits::MIN_ALIGN, Limits::MIN_ALIGN),
    };
    // Through the handle: the name may lead elsewhere by now.
    let same = sys::path_of(buffered);
    match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(same) {
        Ok(file) => {
            (Some(file), DirectIo::Available { memory_align: align.0, offset_align: align.1 })
        }
        Err(e) => (None, DirectIo::Refused(e.raw_os_error().unwrap_or(libc::EINVAL))),
    }
}

fn same_file(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

fn change(was: &Metadata, now: &Metadata) -> Option<Change> {
    if !same_file(was, now) {
        Some(Change::Replaced)
    } else if was.len() != now.len() {
        Some(Change::Length { was: was.len(), now: now.len() })
    } else if (was.mtime(), was.mtime_nsec()) != (now.mtime(), now.mtime_nsec()) {
        Some(Change::Written)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    #[test]
    fn change_is_noticed_in_length_content_and_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, [1; 100]).unwrap();
        let file = SourceFile::open(&path, None).unwrap();
        file.verify_unchanged().unwrap();

        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"more").unwrap();
        let error = file.verify_unchanged().unwrap_err();
        assert!(matches!(
            error,
            Error::Changed { change: Change::Length { was: 100, now: 104 }, .. }
        ));

        let file = SourceFile::open(&path, None).unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        let error = file.verify_unchanged().unwrap_err();
        assert!(matches!(error, Error::Changed { change: Change::Written, .. }));

        let before = fs::metadata(&path).unwrap();
        let file = SourceFile::open(&path, None).unwrap();
        let other = dir.path().join("b");
        fs::write(&other, [2; 104]).unwrap();
        fs::rename(&other, &path).unwrap();
        let error = file.verify_unchanged().unwrap_err();
        assert!(matches!(error, Error::Changed { change: Change::Replaced, .. }));
        let error = SourceFile::open(&path, Some(&before)).unwrap_err();
        assert!(matches!(error, Error::Changed { change: Change::Replaced, .. }));
    }

    #[test]
    fn a_pipe_that_took_the_name_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, [1; 100]).unwrap();
        let before = fs::metadata(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the name is a valid C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let error = SourceFile::open(&path, Some(&before)).unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");

        let (done, opened) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(SourceFile::open(&path, None).map(drop)));
        let opened = opened.recv_timeout(std::time::Duration::from_secs(60));
        let error = opened.expect("opening waits for a writer").unwrap_err();
        assert!(error.to_string().ends_with("not a regular file"), "{error}");
    }

    #[test]
    fn handles_wait_and_lead_to_the_file_whatever_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, [1; 100]).unwrap();
        let (file, _) = open_regular(&path).unwrap().unwrap();
        // SAFETY: no memory is involved.
        let flags = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&file), libc::F_GETFL) };
        assert_eq!(flags & libc::O_NONBLOCK, 0);
        fs::rename(&path, dir.path().join("b")).unwrap();
        fs::write(&path, [2; 5]).unwrap();
        assert_eq!(fs::read(sys::path_of(&file)).unwrap(), [1; 100]);
        assert!(open_regular(dir.path()).unwrap().is_none());
        let socket = dir.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(open_regular(&socket).unwrap().is_none());
    }

    #[test]
    fn a_missing_file_says_its_path() {
        let error = SourceFile::open(Path::new("/no/such/file"), None).unwrap_err();
        assert!(error.to_string().starts_with("/no/such/file: cannot open"));
    }
}
