//! Source files: opened for reads through the page cache, and around it when that is asked for,
//! shared within the process, watched for change.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::error::{Change, Error};
use crate::plan::Limits;
use crate::source::{Source, Unfilled};
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

/// A file to read from: a local one, or one that is read [by range](Source). A clone is the same open file.
///
/// The descriptor for direct reads of a local file is opened when it is first asked for.
#[derive(Debug, Clone)]
pub struct SourceFile(Inner);

#[derive(Debug, Clone)]
enum Inner {
    Local(Arc<Opened>),
    Remote(Arc<dyn Source>),
}

/// How many sources that are not local are asked at once whether they changed.
const MAX_VERIFIERS: usize = 64;

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    /// Whether the path leads to the file.
    named: bool,
    buffered: File,
    /// Alignments of memory and offset that direct reads need, where they may be possible.
    aligns: Option<(u64, u64)>,
    direct: OnceLock<(Option<File>, DirectIo)>,
    /// Set when a direct read was refused at run time (EINVAL): later blocks do not try again.
    direct_off: AtomicBool,
    len: u64,
    expected: Identity,
}

impl SourceFile {
    /// Opens `path` for reading.
    ///
    /// `expected` is what the file was when its header was read; a file that is another by now is
    /// refused, as [`verify_unchanged`](Self::verify_unchanged) describes. Whoever in this process
    /// opens the same file at the same time, as ranks do, shares its descriptors. With `None`, the
    /// file as it is found is the expected one, and is opened anew.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], [`Error::TooManyFiles`], or [`Error::Changed`].
    pub fn open(path: &Path, expected: Option<&Metadata>) -> Result<Self, Error> {
        let Some(expected) = expected else {
            return Ok(Self(Inner::Local(Self::open_as_found(path)?)));
        };
        let expected = Identity::of(expected);
        if let Some(opened) = shared::get(path)
            && expected.change(&opened.expected).is_none()
            // The path still leads there.
            && std::fs::metadata(path).is_ok_and(|now| opened.serves(&Identity::of(&now)))
        {
            return Ok(Self(Inner::Local(opened)));
        }
        let opened = match Self::open_as_found(path) {
            Err(Error::Open { source, .. }) if is_no_file(&source) => {
                Err(Error::Changed { path: path.to_owned(), change: Change::Replaced })
            }
            opened => opened,
        }?;
        match expected.change(&opened.expected) {
            Some(change) => Err(Error::Changed { path: path.to_owned(), change }),
            None => Ok(Self(Inner::Local(shared::offer(opened)))),
        }
    }

    fn open_as_found(path: &Path) -> Result<Arc<Opened>, Error> {
        let (buffered, found) =
            sys::open_regular(path).map_err(|source| match sys::descriptors_used_up(&source) {
                Some(limit) => Error::TooManyFiles { path: path.to_owned(), limit },
                None => Error::Open { path: path.to_owned(), source },
            })?;
        Ok(Arc::new(Opened::new(path, buffered, &found)))
    }

    /// A file that is read from `source`, by the engine [`Object`](crate::Engine::Object).
    pub fn remote(source: Arc<dyn Source>) -> Self {
        Self(Inner::Remote(source))
    }

    /// A file that is open already, by a name that is for errors and leads nowhere. Its descriptor is
    /// duplicated; its position is not used.
    ///
    /// `expected` is as for [`open`](Self::open). That file must not change its status while it is read, as by
    /// being renamed: nothing tells that from a write whose time was set back.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn of(file: &File, name: &Path, expected: &Metadata) -> Result<Self, Error> {
        let fail = |source| Error::Open { path: name.to_owned(), source };
        let buffered = file.try_clone().map_err(fail)?;
        let found = buffered.metadata().map_err(fail)?;
        if !found.is_file() {
            return Err(fail(no_file()));
        }
        sys::set_blocking(&buffered).map_err(fail)?;
        if let Some(change) = Identity::of(expected).change(&Identity::of(&found)) {
            return Err(Error::Changed { path: name.to_owned(), change });
        }
        let mut opened = Opened::new(name, buffered, &found);
        opened.named = false;
        Ok(Self(Inner::Local(Arc::new(opened))))
    }

    fn local(&self) -> Option<&Opened> {
        match &self.0 {
            Inner::Local(opened) => Some(opened),
            Inner::Remote(_) => None,
        }
    }

    /// Where its bytes come from, if it is no local file.
    pub fn source(&self) -> Option<&dyn Source> {
        match &self.0 {
            Inner::Local(_) => None,
            Inner::Remote(source) => Some(&**source),
        }
    }

    /// The path that it was opened by, or its name, or that of its source.
    pub fn path(&self) -> &Path {
        match &self.0 {
            Inner::Local(opened) => &opened.path,
            Inner::Remote(source) => source.path(),
        }
    }

    /// Length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        match &self.0 {
            Inner::Local(opened) => opened.len,
            Inner::Remote(source) => source.len(),
        }
    }

    /// Whether the file held no byte when it was opened.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file, read through the page cache, if it is a local one.
    pub fn buffered(&self) -> Option<&File> {
        self.local().map(|opened| &opened.buffered)
    }

    /// Fills `bytes` from `offset` on, on the calling thread.
    ///
    /// # Errors
    ///
    /// [`Error::Read`], [`Error::EarlyEnd`], and those of [`Source::read`].
    pub fn read_exact_at(&self, mut bytes: &mut [u8], offset: u64) -> Result<(), Error> {
        let path = || self.path().to_owned();
        let end = offset + bytes.len() as u64;
        let file = match &self.0 {
            Inner::Local(opened) => &opened.buffered,
            Inner::Remote(source) => {
                // SAFETY: only initialised bytes are written through it.
                let memory = unsafe { &mut *(std::ptr::from_mut(bytes) as *mut [MaybeUninit<u8>]) };
                let mut into = Unfilled::new(memory, &|| false);
                source.read(offset, &mut into)?;
                return match into.missing() {
                    0 => Ok(()),
                    missing => Err(Error::EarlyEnd {
                        path: path(),
                        end: end - missing as u64,
                        needed: end,
                    }),
                };
            }
        };
        while !bytes.is_empty() {
            let at = end - bytes.len() as u64;
            match sys::read_at(file, bytes, at) {
                Ok(0) => return Err(Error::EarlyEnd { path: path(), end: at, needed: end }),
                Ok(read) => bytes = &mut bytes[read..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    let len = bytes.len() as u64;
                    return Err(Error::Read { path: path(), offset: at, len, source });
                }
            }
        }
        Ok(())
    }

    /// The file opened with `O_DIRECT`, unless that is not to be had.
    ///
    /// The last quarter of the descriptors that the process may have is left to others: files that
    /// would need one of these are read through the page cache.
    pub fn direct(&self) -> Option<&File> {
        let opened = self.local()?;
        if opened.direct_off.load(Relaxed) { None } else { opened.direct().0.as_ref() }
    }

    /// The file opened with `O_DIRECT`, if it was asked for before.
    #[cfg_attr(any(not(target_os = "linux"), fst_portable), allow(dead_code))] // for io_uring
    pub(crate) fn direct_if_open(&self) -> Option<&File> {
        self.local()?.direct.get()?.0.as_ref()
    }

    /// Whether direct reads are possible, as far as is known; opens nothing.
    pub fn may_be_direct(&self) -> bool {
        self.local().is_some_and(|opened| {
            !opened.direct_off.load(Relaxed)
                && opened.direct.get().map_or(opened.aligns.is_some(), |(file, _)| file.is_some())
        })
    }

    /// Whether and why direct reads are (not) used. Opens the file for them.
    pub fn direct_io(&self) -> &DirectIo {
        self.local().map_or(&DirectIo::Unsupported, |opened| &opened.direct().1)
    }

    /// Alignment, in bytes, that blocks of this file must have, for memory and offset alike.
    pub fn align(&self) -> u64 {
        let (memory, offset) = self.aligns().unwrap_or_default();
        memory.max(offset).max(Limits::MIN_ALIGN)
    }

    fn aligns(&self) -> Option<(u64, u64)> {
        self.local()?.aligns
    }

    /// The [alignment](Self::align) that suits all of `files`.
    pub fn align_of(files: &[Self]) -> u64 {
        files.iter().map(Self::align).max().unwrap_or(Limits::MIN_ALIGN)
    }

    /// The alignment, the blocks and the gaps that suit all of `files`.
    pub fn limits_of(files: &[Self]) -> Limits {
        let all = Limits { align: Self::align_of(files), ..Limits::default() };
        files.iter().filter_map(Self::source).map(Source::limits).fold(all, |all, one| Limits {
            block: all.block.max(one.block),
            gap: all.gap.max(one.gap),
            ..all
        })
    }

    /// Alignment, in bytes, that direct reads of this file demand of memory: no more than
    /// [`align`](Self::align), and where the system tells, often far less.
    pub fn memory_align(&self) -> u64 {
        self.aligns().map_or(Limits::MIN_ALIGN, |(memory, _)| memory)
    }

    /// Bytes of the file in the page cache, of a long file by samples; none of what is no local file.
    ///
    /// # Errors
    ///
    /// The system's error where it cannot tell.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        let len = self.len();
        self.buffered().map_or(Ok(0), |file| crate::residency::resident_estimate(file, len))
    }

    /// Bytes of `offset..offset + len` in the page cache.
    ///
    /// # Errors
    ///
    /// As for [`resident_bytes`](Self::resident_bytes).
    pub fn resident_bytes_of(&self, offset: u64, len: u64) -> io::Result<u64> {
        self.buffered().map_or(Ok(0), |file| crate::residency::resident_bytes(file, offset, len))
    }

    /// A source of a length, and with a descriptor for direct reads, of the test's own choice.
    #[cfg(test)]
    pub(crate) fn faked(path: &Path, direct: Option<File>, len: u64) -> io::Result<Self> {
        let (buffered, found) = sys::open_regular(path)?;
        let mut opened = Opened::new(path, buffered, &found);
        (opened.aligns, opened.len) = (None, len);
        opened.direct = OnceLock::from((direct, DirectIo::NotTried));
        Ok(Self(Inner::Local(Arc::new(opened))))
    }

    pub(crate) fn refuse_direct(&self) {
        if let Some(opened) = self.local() {
            opened.direct_off.store(true, Relaxed);
        }
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
        let opened = match &self.0 {
            Inner::Local(opened) => opened,
            Inner::Remote(source) => return source.verify_unchanged(),
        };
        let path = || self.path().to_owned();
        let now = opened.buffered.metadata();
        let now = now.map_err(|source| Error::Open { path: path(), source })?;
        let (expected, now) = (opened.expected, Identity::of(&now));
        let change = if opened.named {
            let by_name = std::fs::metadata(self.path()).ok();
            expected.change_of_open(&now, by_name.as_ref().map(Identity::of).as_ref())
        } else {
            expected.change(&now)
        };
        match change {
            Some(change) => Err(Error::Changed { path: path(), change }),
            None => Ok(()),
        }
    }

    /// [`verify_unchanged`](Self::verify_unchanged) of each of `files`; of those that are not local at the same
    /// time.
    ///
    /// # Errors
    ///
    /// As for [`verify_unchanged`](Self::verify_unchanged): that of the first file which has one.
    pub fn verify_all<'a>(files: impl Iterator<Item = &'a Self>) -> Result<(), Error> {
        let (local, remote): (Vec<_>, Vec<_>) = files.partition(|file| file.local().is_some());
        local.into_iter().try_for_each(Self::verify_unchanged)?;
        let verify = |files: &[&Self]| files.iter().try_for_each(|file| file.verify_unchanged());
        let share = remote.len().div_ceil(MAX_VERIFIERS).max(1);
        std::thread::scope(|scope| {
            let mut shares = remote.chunks(share);
            let own = shares.next().unwrap_or_default();
            let others: Vec<_> = shares
                .map(|files| {
                    let thread = std::thread::Builder::new().name("fst-verify".to_owned());
                    (files, thread.spawn_scoped(scope, move || verify(files)))
                })
                .collect();
            others.into_iter().fold(verify(own), |all, (files, thread)| {
                all.and_then(|()| match thread.map(|thread| thread.join()) {
                    Ok(Ok(verified)) => verified,
                    Ok(Err(panic)) => std::panic::resume_unwind(panic),
                    // No thread was to be had.
                    Err(_) => verify(files),
                })
            })
        })
    }

    /// As [`verify_unchanged`](Self::verify_unchanged), but does not look what the path leads to, where the
    /// handle shows no change: for those who read from the handle again and again. What is no local file is
    /// compared at each read.
    ///
    /// # Errors
    ///
    /// As for [`verify_unchanged`](Self::verify_unchanged).
    pub fn verify_handle(&self) -> Result<(), Error> {
        let Some(opened) = self.local() else { return Ok(()) };
        match opened.buffered.metadata() {
            Ok(now) if opened.expected.change(&Identity::of(&now)).is_none() => Ok(()),
            _ => self.verify_unchanged(),
        }
    }

    /// Whether its path leads to it.
    pub(crate) fn is_named(&self) -> bool {
        self.local().is_none_or(|opened| opened.named)
    }

    /// What the file was when it was opened, if it is a local one.
    pub(crate) fn expected(&self) -> Option<Identity> {
        Some(self.local()?.expected)
    }
}

impl Opened {
    fn new(path: &Path, buffered: File, found: &Metadata) -> Self {
        let aligns = match sys::dio_align(&buffered) {
            Ok(DioAlign::Unsupported) => None,
            Ok(DioAlign::Bytes { memory, offset })
                if memory.is_power_of_two() && offset.is_power_of_two() =>
            {
                Some((memory, offset))
            }
            // Kernels before 6.1 do not say. A page satisfies every block device; should a file
            // system want more, its EINVAL sends the block through the page cache.
            _ => Some((Limits::MIN_ALIGN, Limits::MIN_ALIGN)),
        };
        Self {
            path: path.to_owned(),
            named: true,
            buffered,
            aligns,
            direct: OnceLock::new(),
            direct_off: AtomicBool::new(false),
            len: found.len(),
            expected: Identity::of(found),
        }
    }

    fn direct(&self) -> &(Option<File>, DirectIo) {
        self.direct.get_or_init(|| {
            let Some((memory_align, offset_align)) = self.aligns else {
                return (None, DirectIo::Unsupported);
            };
            match sys::open_direct(&self.buffered) {
                Ok(file) => (Some(file), DirectIo::Available { memory_align, offset_align }),
                Err(e) => (None, DirectIo::Refused(e.raw_os_error().unwrap_or_default())),
            }
        })
    }

    /// Whether this is the file that a path leads to, unchanged in every respect.
    fn serves(&self, by_name: &Identity) -> bool {
        self.expected.status == by_name.status && self.expected.change(by_name).is_none()
    }
}

/// The files that are open, so that each is opened once.
mod shared {
    use super::*;

    static OPEN: Mutex<BTreeMap<PathBuf, Weak<Opened>>> = Mutex::new(BTreeMap::new());

    fn open_files() -> MutexGuard<'static, BTreeMap<PathBuf, Weak<Opened>>> {
        OPEN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file that was opened by this path, and is still open.
    pub(super) fn get(path: &Path) -> Option<Arc<Opened>> {
        // The lock is not held when the result is dropped.
        let found = open_files().get(path).cloned();
        found?.upgrade()
    }

    /// Shares a file that was just opened; returns the one of whoever was faster.
    pub(super) fn offer(new: Arc<Opened>) -> Arc<Opened> {
        let mut open = open_files();
        let before = open.get(&new.path).and_then(Weak::upgrade);
        match before {
            Some(before) if before.serves(&new.expected) => before,
            before => {
                open.insert(new.path.clone(), Arc::downgrade(&new));
                // It may be the last that holds it, and dropping takes the lock.
                drop(open);
                drop(before);
                new
            }
        }
    }

    impl Drop for Opened {
        fn drop(&mut self) {
            let mut open = open_files();
            if open.get(&self.path).is_some_and(|file| file.strong_count() == 0) {
                open.remove(&self.path);
            }
        }
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
    #[cfg(unix)]
    pub(crate) fn of(file: &Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self {
            place: (file.dev(), file.ino()),
            len: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            status: (file.ctime(), file.ctime_nsec()),
            links: file.nlink(),
            rights: (file.mode(), file.uid(), file.gid()),
        }
    }

    /// By the standard library alone: the time of creation stands for device and inode, and a write whose time
    /// was set back is not seen. Not run on Linux.
    #[cfg(not(unix))]
    pub(crate) fn of(file: &Metadata) -> Self {
        use std::time::SystemTime;
        let since = |time: io::Result<SystemTime>| {
            let time = time.ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
            Some((time.as_secs(), time.subsec_nanos()))
        };
        let created = since(file.created()).unwrap_or_default();
        let modified = since(file.modified()).unwrap_or_default();
        Self {
            place: (created.0, created.1.into()),
            len: file.len(),
            modified: (modified.0 as i64, modified.1.into()),
            status: (0, 0),
            links: 1,
            rights: (0, 0, 0),
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

/// What opening something else than a regular file comes to.
pub(crate) fn no_file() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")
}

pub(crate) fn is_no_file(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidInput && error.raw_os_error().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

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
            file.expected().unwrap().check_name(&path).unwrap();
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
    fn who_opens_a_file_that_is_open_shares_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, [1; 100]).unwrap();
        let header = fs::metadata(&path).unwrap();
        let open = || SourceFile::open(&path, Some(&header)).unwrap();
        fn opened(file: &SourceFile) -> &Opened {
            file.local().unwrap()
        }
        let shares = |a: &SourceFile, b: &SourceFile| std::ptr::eq(opened(a), opened(b));
        let first = open();
        assert!(shares(&first, &open()));
        assert!(first.direct_if_open().is_none(), "nobody asked for it");
        assert!(!shares(&first, &SourceFile::open(&path, None).unwrap()));
        drop(first);
        assert!(shared::get(&path).is_none());

        let first = open();
        let other = dir.path().join("b");
        fs::write(&other, [2; 101]).unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(SourceFile::open(&path, Some(&header)).is_err());
        let second = SourceFile::open(&path, Some(&fs::metadata(&path).unwrap())).unwrap();
        assert!(!shares(&first, &second));
        drop(first);
        assert!(shared::get(&path).is_some_and(|open| std::ptr::eq(&*open, opened(&second))));
    }

    #[test]
    fn a_missing_file_says_its_path() {
        let error = SourceFile::open(Path::new("/no/such/file"), None).unwrap_err();
        assert!(error.to_string().starts_with("/no/such/file: cannot open"));
    }
}
