//! Reading headers, several files at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::checkpoint::Shard;
use crate::{Decoded, Error, HeaderDecoder, HeaderError, sniff};

/// Most threads that read headers at once. Those that wait for storage may outnumber the cores.
const MAX_READERS: usize = 8;

/// A header that took longer to read was waited for: it did not come from the page cache.
const A_WAIT: Duration = Duration::from_micros(500);

/// Why `path` could not be opened.
pub(crate) fn open_error(path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::EMFILE) => Error::TooManyFiles { path },
        Some(libc::ENOENT) => match std::fs::read_link(&path) {
            Ok(target) => Error::DanglingLink { path, target },
            Err(_) => Error::Open { path, source },
        },
        _ => Error::Open { path, source },
    }
}

/// Opens a regular file; the metadata is that of the file that was opened.
///
/// A check of the name before opening would say nothing of what is opened then. So what it leads to is
/// opened without waiting (a named pipe would otherwise wait for a writer, perhaps for ever), and
/// looked at by its handle.
pub(crate) fn open_file(path: &Path) -> Result<(File, std::fs::Metadata), Error> {
    let open_error = |source| open_error(path, source);
    let not_a_file = || Error::NotAFile { path: path.to_owned() };
    let open = |flags| OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = match open(libc::O_NONBLOCK) {
        Ok(file) => file,
        // Another process holds a lease on the file, which is waited for, but only if it is a file.
        Err(error) if error.raw_os_error() == Some(libc::EWOULDBLOCK) => {
            let place = open(libc::O_PATH).map_err(open_error)?;
            if !place.metadata().map_err(open_error)?.is_file() {
                return Err(not_a_file());
            }
            let same = format!("/proc/thread-self/fd/{}", place.as_raw_fd());
            File::open(same).map_err(open_error)?
        }
        // Sockets cannot be opened, nor can devices without a driver.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
            return Err(not_a_file());
        }
        Err(error) => return Err(open_error(error)),
    };
    let metadata = file.metadata().map_err(open_error)?;
    if metadata.is_file() { Ok((file, metadata)) } else { Err(not_a_file()) }
}

/// Appends the bytes of `range`, which starts where `bytes` ends and the file was last read.
///
/// Not `read_exact_at` into a resized vector: zeroing megabytes first costs as much as copying them.
pub(crate) fn read_onto(
    mut file: &File,
    path: &Path,
    bytes: &mut Vec<u8>,
    range: Range<u64>,
) -> Result<(), Error> {
    let len = range.end - range.start;
    bytes.reserve_exact(len as usize);
    let source = match file.by_ref().take(len).read_to_end(bytes) {
        Ok(read) if read as u64 == len => return Ok(()),
        Ok(_) => io::ErrorKind::UnexpectedEof.into(),
        Err(source) => source,
    };
    Err(Error::Read { path: path.to_owned(), range, source })
}

/// Reads headers one after the other.
#[derive(Default)]
struct HeaderReader {
    /// Memory for a header's text, kept for the next one: the first touch of memory costs as much as
    /// copying into it does.
    text: Vec<u8>,
    /// How long opening and reading took, the last time.
    waited: Duration,
}

impl HeaderReader {
    fn read(&mut self, path: &Path) -> Result<Shard, Error> {
        let began = Instant::now();
        let (file, file_metadata) = open_file(path)?;
        let header_error = |source: HeaderError| match sniff::format_of(&file, &source) {
            Some(format) => Error::OtherFormat { path: path.to_owned(), format },
            None => Error::Header { path: path.to_owned(), source },
        };
        let decoder = HeaderDecoder::new(file_metadata.len()).map_err(header_error)?;
        self.text.clear();
        let header = loop {
            self.waited = began.elapsed();
            match decoder.decode(&self.text).map_err(header_error)? {
                Decoded::Need(range) => read_onto(&file, path, &mut self.text, range)?,
                Decoded::Header(header) => break header,
            }
        };
        Ok(Shard { path: path.to_owned(), file_metadata, header: header.into() })
    }
}

/// Files whose headers are read, or to be read, by some threads.
///
/// The first are read while it is still being found out which there are: an index is megabytes
/// long, and its first line names a file. What came of those is asked for by their numbers in the
/// end, so that a failure of a file that turns out not to belong to the checkpoint is none.
pub(crate) struct HeaderReads {
    state: Mutex<State>,
    more: Condvar,
    cores: usize,
}

#[derive(Default)]
struct State {
    files: Vec<PathBuf>,
    done: Vec<Option<Result<Shard, Error>>>,
    /// The first file that no thread has taken.
    next: usize,
    threads: usize,
    /// No more files come.
    closed: bool,
}

impl State {
    fn waiting(&self) -> usize {
        self.files.len() - self.next
    }
}

impl HeaderReads {
    pub(crate) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { state: Mutex::default(), more: Condvar::new(), cores }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a file, and says its number.
    pub(crate) fn add(&self, path: PathBuf) -> usize {
        let mut state = self.lock();
        state.files.push(path);
        state.done.push(None);
        let number = state.files.len() - 1;
        drop(state);
        self.more.notify_one();
        number
    }

    /// Adds a thread where a core, besides the caller's, and a file are there for it.
    pub(crate) fn help<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        self.spawn(scope, self.cores.min(MAX_READERS) - 1);
    }

    /// Adds a thread if there are fewer than `most`, and something to do for it.
    fn spawn<'s>(&'s self, scope: &'s Scope<'s, '_>, most: usize) {
        let mut state = self.lock();
        if state.threads >= most || state.waiting() == 0 {
            return;
        }
        state.threads += 1;
        drop(state);
        let builder = std::thread::Builder::new().name("fst-headers".to_owned());
        // A machine out of threads reads with those it has; the caller's always works.
        let _ = builder.spawn_scoped(scope, || self.work(scope));
    }

    /// Reads what is left, together with the threads that are there. All are done at the end of the
    /// scope.
    pub(crate) fn finish<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        let waiting = self.lock().waiting();
        for _ in 1..waiting {
            self.help(scope);
        }
        self.close();
        self.work(scope);
    }

    /// What came of a file. One that was left unread, as others are behind an error, is read now.
    pub(crate) fn result(&self, number: usize) -> Result<Shard, Error> {
        let mut state = self.lock();
        if let Some(result) = state.done[number].take() {
            return result;
        }
        let path = state.files[number].clone();
        drop(state);
        HeaderReader::default().read(&path)
    }

    /// Says that no more files come.
    fn close(&self) {
        self.lock().closed = true;
        self.more.notify_all();
    }

    /// Reads header after header until there are no more, as every thread does.
    fn work<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        let mut reader = HeaderReader::default();
        let mut state = self.lock();
        loop {
            let number = state.next;
            let Some(path) = state.files.get(number).cloned() else {
                if state.closed {
                    return;
                }
                state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.next += 1;
            drop(state);
            let result = reader.read(&path);
            if reader.waited > A_WAIT {
                self.spawn(scope, MAX_READERS - 1);
            }
            state = self.lock();
            if state.closed && result.is_err() {
                // That is, most likely, the error of the whole: the rest need not be read.
                state.next = state.files.len();
            }
            state.done[number] = Some(result);
        }
    }
}

/// When dropped, leaves what nobody has begun to read: threads end with the file that they are at.
pub(crate) struct AbandonOnDrop<'r>(pub(crate) &'r HeaderReads);

impl Drop for AbandonOnDrop<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.next = state.files.len();
        drop(state);
        self.0.close();
    }
}
