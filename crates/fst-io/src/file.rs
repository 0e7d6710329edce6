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
    expected: Identity,
}

impl SourceFile {
    /// Opens `path` for reading, and for direct reading where the file system allows it.
    ///
    /// `expected` is what the file was when its header was read; a file that is another by now is
    /// refused, as [`verify_unchanged`](Self::verify_unchanged) describes. With `None`, the file as it
    /// is found is the expected one.
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
        let (len, found) = (found.len(), Identity::of(&found));
        if let Some(change) = expected.and_then(|was| Identity::of(was).change(&found)) {
            return Err(Error::Changed { path: path.to_owned(), change });
        }
        let (direct, direct_io) = open_direct(&buffered);
        Ok(Self {
            path: path.to_owned(),
            buffered,
            direct,
            direct_io,
            direct_off: AtomicBool::new(false),
            len,
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

    /// Checks that the file is still what it was when it was opened, by its handle, and that its path
    /// does not lead to another file.
    ///
    /// - Its length and modification time must be the same, and its status change time (`ctime`) too,
    ///   which nobody can set back. What moves that time and leaves the bytes alone is accepted where
    ///   it shows: another number of links, another mode or owner, and a rename.
    /// - A file that was removed or renamed is read from its handle, and is no error. Neither is an
    ///   inode number that differs, as some file systems (FUSE) give out a new one at each look-up: a
    ///   path leads to another file if any of the times or the length differs as well.
    ///
    /// # Errors
    ///
    /// [`Error::Changed`], or [`Error::Open`] when the system cannot tell of the open file.
    pub fn verify_unchanged(&self) -> Result<(), Error> {
        let path = || self.path.clone();
        let now = self.buffered.metadata();
        let now = now.map_err(|source| Error::Open { path: path(), source })?;
        let by_name = std::fs::metadata(&self.path).ok();
        let by_name = by_name.as_ref().map(Identity::of);
        match self.expected.change_of_open(&Identity::of(&now), by_name.as_ref()) {
            Some(change) => Err(Error::Changed { path: path(), change }),
            None => Ok(()),
        }
    }

    pub(crate) fn expected(&self) -> Identity {
        self.expected
    }
}

/// What tells that a file is the one that it was, and was not written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Device and inode.
    place: (u64, u64),
    len: u64,
    /// Seconds and nanoseconds of the last write, as anybody may have set them.
    modified: (i64, i64),
    /// Of the last write or change of what follows, by the file system's clock.
    status: (i64, i64),
    links: u64,
    /// Mode, user and group.
    rights: (u32, u32, u32),
}

impl Identity {
    pub(crate) fn of(file: &Metadata) -> Self {
        Self {
            place: (file.dev(), file.ino()),
            len: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            status: (file.ctime(), file.ctime_nsec()),
            links: file.nlink(),
            rights: (file.mode(), file.uid(), file.gid()),
        }
    }

    /// How the file that a path or handle leads to now differs from this one.
    fn change(&self, now: &Self) -> Option<Change> {
        let same = self.place == now.place;
        if self.len != now.len {
            let (was, now) = (self.len, now.len);
            Some(if same { Change::Length { was, now } } else { Change::Replaced })
        } else if self.modified != now.modified {
            Some(if same { Change::Written } else { Change::Replaced })
        } else if self.status == now.status {
            // An inode number alone says nothing.
            None
        } else if !same {
            Some(Change::Replaced)
        } else if (self.links, self.rights) != (now.links, now.rights) {
            None
        } else {
            Some(Change::Status)
        }
    }

    /// As [`change`](Self::change), of a file that stayed open, and of what its name leads to.
    fn change_of_open(&self, handle: &Self, name: Option<&Self>) -> Option<Change> {
        let elsewhere = name.is_none_or(|name| handle.change(name) == Some(Change::Replaced));
        // A rename is a change of status that only the name shows.
        let by_handle = self.change(handle).filter(|c| *c != Change::Status || !elsewhere);
        by_handle.or_else(|| handle.change(name?))
    }

    /// Checks what `path` leads to, if anything.
    pub(crate) fn check_name(&self, path: &Path) -> Result<(), Error> {
        let Ok(by_name) = std::fs::metadata(path) else { return Ok(()) };
        match self.change(&Self::of(&by_name)) {
            Some(change) => Err(Error::Changed { path: path.to_owned(), change }),
            None => Ok(()),
        }
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
    fn a_write_whose_modification_time_is_set_back_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, [1; 100]).unwrap();
        let header = fs::metadata(&path).unwrap();
        let file = SourceFile::open(&path, Some(&header)).unwrap();
        let writer = File::options().write(true).open(&path).unwrap();
        // Clocks of file systems tick coarsely: until the change shows.
        while fs::metadata(&path).unwrap().ctime_nsec() == header.ctime_nsec() {
            std::os::unix::fs::FileExt::write_all_at(&writer, &[2; 50], 10).unwrap();
            writer.set_modified(header.modified().unwrap()).unwrap();
        }
        let at_end = file.verify_unchanged().unwrap_err();
        let at_open = SourceFile::open(&path, Some(&header)).unwrap_err();
        for error in [at_end, at_open] {
            assert!(matches!(error, Error::Changed { change: Change::Status, .. }), "{error}");
        }
    }

    #[test]
    fn what_leaves_the_bytes_alone_is_accepted() {
        use std::os::unix::fs::PermissionsExt;
        type Act = fn(&Path);
        let acts: [Act; 4] = [
            |path| fs::hard_link(path, path.with_extension("link")).unwrap(),
            |path| fs::set_permissions(path, PermissionsExt::from_mode(0o400)).unwrap(),
            |path| fs::rename(path, path.with_extension("moved")).unwrap(),
            |path| fs::remove_file(path).unwrap(),
        ];
        for (number, act) in acts.into_iter().enumerate() {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a");
            fs::write(&path, [1; 100]).unwrap();
            let file = SourceFile::open(&path, None).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            act(&path);
            file.verify_unchanged().unwrap_or_else(|error| panic!("{number}: {error}"));
            file.expected().check_name(&path).unwrap();
        }
    }

    #[test]
    fn an_inode_number_alone_says_nothing() {
        let was = Identity {
            place: (1, 2),
            len: 100,
            modified: (5, 0),
            status: (6, 0),
            links: 1,
            rights: (0o100644, 0, 0),
        };
        let found_anew = Identity { place: (1, 3), ..was };
        assert_eq!(was.change(&found_anew), None);
        assert_eq!(was.change_of_open(&was, Some(&found_anew)), None);
        for other in [
            Identity { len: 101, ..found_anew },
            Identity { modified: (5, 1), ..found_anew },
            Identity { status: (6, 1), ..found_anew },
        ] {
            assert_eq!(was.change(&other), Some(Change::Replaced));
            assert_eq!(was.change_of_open(&was, Some(&other)), Some(Change::Replaced));
        }
        // The file that is open was written to, and its name gives another number.
        let written = Identity { status: (6, 1), ..was };
        let by_name = Identity { place: (1, 3), ..written };
        assert_eq!(was.change_of_open(&written, Some(&by_name)), Some(Change::Status));
        // Renamed, and renamed with another file in its place.
        assert_eq!(was.change_of_open(&written, None), None);
        assert_eq!(was.change_of_open(&written, Some(&found_anew)), Some(Change::Replaced));
        let cut = Identity { len: 50, ..written };
        let length = Change::Length { was: 100, now: 50 };
        assert_eq!(was.change_of_open(&cut, None), Some(length));
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
