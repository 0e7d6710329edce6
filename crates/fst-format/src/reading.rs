//! Reading headers, several files at once.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::checkpoint::{Origin, Shard};
use crate::{Decoded, Error, Header, HeaderDecoder, HeaderError, open, remote, sniff};

/// Most threads that read headers at once. Those that wait for storage may outnumber the cores.
const MAX_READERS: usize = 8;

/// The same for files that are not local: all at once, for as long as nobody has thousands.
const MAX_REMOTE_READERS: usize = 128;

/// A header that took longer to read was waited for: it did not come from the page cache.
const A_WAIT: Duration = Duration::from_micros(500);

/// Whether a path is a URL, such as `s3://bucket/model`.
pub(crate) fn is_url(path: &Path) -> bool {
    let scheme = path.to_str().and_then(|path| Some(path.split_once("://")?.0));
    scheme.is_some_and(|scheme| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
    })
}

/// Why `path` could not be opened.
pub(crate) fn open_error(path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    if open::is_too_many(&source) {
        return Error::TooManyFiles { path };
    }
    match std::fs::read_link(&path) {
        Ok(target) if source.kind() == io::ErrorKind::NotFound => {
            Error::DanglingLink { path, target }
        }
        _ => Error::Open { path, source },
    }
}

/// Opens a regular file; the metadata is that of the file that was opened.
pub(crate) fn open_file(path: &Path) -> Result<(File, Metadata), Error> {
    match open::regular(path) {
        Ok(opened) => opened.ok_or_else(|| Error::NotAFile { path: path.to_owned() }),
        Err(source) => Err(open_error(path, source)),
    }
}

/// A file from a position on. Its own position, which others may share, stays as it is.
struct FromPosition<'f>(&'f File, u64);

impl Read for FromPosition<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = open::read_at(self.0, bytes, self.1)?;
        self.1 += read as u64;
        Ok(read)
    }
}

/// Appends the bytes of `range`.
///
/// Not `read_exact_at` into a resized vector: zeroing megabytes first costs as much as copying them.
pub(crate) fn read_onto(
    file: &File,
    path: &Path,
    bytes: &mut Vec<u8>,
    range: Range<u64>,
) -> Result<(), Error> {
    let len = range.end - range.start;
    bytes.reserve_exact(len as usize);
    let source = match FromPosition(file, range.start).take(len).read_to_end(bytes) {
        Ok(read) if read as u64 == len => return Ok(()),
        Ok(_) => io::ErrorKind::UnexpectedEof.into(),
        Err(source) => source,
    };
    Err(Error::Read { path: path.to_owned(), range, source })
}

/// Reads headers one after the other.
#[derive(Default)]
struct HeaderReader<'c> {
    /// Where copies of what is not local are looked for and put.
    cache: Option<&'c remote::Cache>,
    /// Memory for a header's text, kept for the next one: the first touch of memory costs as much as
    /// copying into it does.
    text: Vec<u8>,
    /// How long opening and reading took, the last time.
    waited: Duration,
}

impl HeaderReader<'_> {
    fn read(&mut self, path: &Path) -> Result<Shard, Error> {
        let began = Instant::now();
        if is_url(path) {
            let (mut object, head) = remote::open(path)?;
            let copy = self.cache.and_then(|cache| remote::find(cache, &object));
            if let Some(copy) = copy
                && let Ok(shard) = self.read_file(&copy, began)
            {
                return Ok(shard);
            }
            if let Some(cache) = self.cache {
                remote::copy(&mut object, cache, &head);
            }
            let first = |start: &mut [u8]| {
                let len = head.len().min(start.len());
                start[..len].copy_from_slice(&head[..len]);
                Some(len)
            };
            self.text.clear();
            self.text.extend_from_slice(&head);
            let more = |text: &mut Vec<u8>, range| remote::read_onto(&object, text, range);
            let header = self.decode(path, object.len(), began, first, more)?;
            let (path, origin) = (path.to_owned(), Origin::Object(object));
            return Ok(Shard { path, origin, header: header.into(), file: None });
        }
        self.read_file(path, began)
    }

    fn read_file(&mut self, path: &Path, began: Instant) -> Result<Shard, Error> {
        let (file, metadata) = open_file(path)?;
        let header = self.header(&file, path, &metadata, began)?;
        let (path, origin) = (path.to_owned(), Origin::File(metadata));
        Ok(Shard { path, origin, header: header.into(), file: None })
    }

    /// Reads the header of a file that is open.
    fn header(
        &mut self,
        file: &File,
        path: &Path,
        metadata: &Metadata,
        began: Instant,
    ) -> Result<Header, Error> {
        self.text.clear();
        let first = |start: &mut [u8]| open::read_at(file, start, 0).ok();
        let more = |text: &mut Vec<u8>, range| read_onto(file, path, text, range);
        self.decode(path, metadata.len(), began, first, more)
    }

    /// Decodes the header of a file of `len` bytes, of which `text` has the first, maybe. `more` appends to
    /// them, and `first` tells other formats apart.
    fn decode(
        &mut self,
        path: &Path,
        len: u64,
        began: Instant,
        first: impl Fn(&mut [u8]) -> Option<usize>,
        more: impl Fn(&mut Vec<u8>, Range<u64>) -> Result<(), Error>,
    ) -> Result<Header, Error> {
        let header_error = |source: HeaderError| match sniff::format_of(&source, &first) {
            Some(format) => Error::OtherFormat { path: path.to_owned(), format },
            None => Error::Header { path: path.to_owned(), source },
        };
        let decoder = HeaderDecoder::new(len).map_err(header_error)?;
        loop {
            self.waited = began.elapsed();
            match decoder.decode(&self.text).map_err(header_error)? {
                Decoded::Need(range) => more(&mut self.text, range)?,
                Decoded::Header(header) => return Ok(header),
            }
        }
    }
}

/// Reads the headers of files that are open, each with a name for errors.
pub(crate) fn read_files(
    files: impl IntoIterator<Item = (PathBuf, File)>,
) -> Result<Vec<Shard>, Error> {
    let mut reader = HeaderReader::default();
    let read = |(path, file): (PathBuf, File)| {
        let metadata = file.metadata().map_err(|source| open_error(&path, source))?;
        if !metadata.is_file() {
            return Err(Error::NotAFile { path });
        }
        let header = reader.header(&file, &path, &metadata, Instant::now())?;
        let (origin, file) = (Origin::File(metadata), Some(Arc::new(file)));
        Ok(Shard { path, origin, header: header.into(), file })
    };
    files.into_iter().map(read).collect()
}

/// Reads the headers of these files, in their order. Those of a URL that `cache` has a copy of are the copy's.
///
/// # Errors
///
/// That of the first file which cannot be read, with its position.
pub(crate) fn read_headers(
    paths: &[PathBuf],
    cache: Option<&remote::Cache>,
) -> Result<Vec<Shard>, (usize, Error)> {
    let remote = paths.iter().any(|path| is_url(path));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let reads = HeaderReads {
        paths,
        cache,
        next: AtomicUsize::new(0),
        threads: AtomicUsize::new(1),
        most: if remote { MAX_REMOTE_READERS } else { MAX_READERS },
        done: Mutex::new(paths.iter().map(|_| None).collect()),
    };
    // Who waits for a network needs no core.
    let at_once = if remote { paths.len() } else { cores.min(paths.len()) };
    std::thread::scope(|scope| {
        for _ in 1..at_once {
            reads.help(scope);
        }
        reads.work(scope);
    });
    let done = reads.done.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Files are taken in order, so that all before one that failed are done.
    let done = done.into_iter().enumerate().map_while(|(at, done)| done.map(|done| (at, done)));
    done.map(|(at, done)| done.map_err(|error| (at, error))).collect()
}

/// Files whose headers some threads read.
struct HeaderReads<'p> {
    paths: &'p [PathBuf],
    cache: Option<&'p remote::Cache>,
    /// The first file that no thread has taken.
    next: AtomicUsize,
    threads: AtomicUsize,
    /// Most threads that there may be.
    most: usize,
    done: Mutex<Vec<Option<Result<Shard, Error>>>>,
}

impl HeaderReads<'_> {
    /// Adds a thread, unless there are enough.
    fn help<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        if self.threads.fetch_add(1, Relaxed) < self.most {
            let builder = std::thread::Builder::new().name("fst-headers".to_owned());
            // A machine out of threads reads with those it has; the caller's always works.
            let _ = builder.spawn_scoped(scope, || self.work(scope));
        }
    }

    /// Reads header after header until there are no more, as every thread does.
    fn work<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        let mut reader = HeaderReader { cache: self.cache, ..HeaderReader::default() };
        loop {
            let number = self.next.fetch_add(1, Relaxed);
            let Some(path) = self.paths.get(number) else { return };
            let result = reader.read(path);
            if result.is_err() {
                // The error of the whole is this or an earlier one: the rest need not be read.
                self.next.store(self.paths.len(), Relaxed);
            } else if reader.waited > A_WAIT {
                self.help(scope);
            }
            let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            done[number] = Some(result);
        }
    }
}
