//! Copies of whole objects in a local folder, written beside what reads them.
//!
//! A copy is one file, `KEY-SHA256.safetensors`, where the key is made of the object's URL and identity:
//! another version has another name. It gets that name when it is whole and on storage. Until then it is
//! called `*.partial` and locked by its process; one that nobody locks was left behind and is removed.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use sha2::{Digest, Sha256};

use crate::object::{Identity, Object};
use crate::ranges::Ranges;

/// Bytes that may wait to be written. Storage that falls behind further gets no copy.
const QUEUE: u64 = 128 << 20;
/// Bytes that are hashed at once.
const BLOCK: usize = 4 << 20;

/// A folder that keeps copies of objects, and the thread that writes them. A clone is the same one.
///
/// Objects are copied as they are read, and only if all of their bytes are. Those whose server tells neither a
/// strong `ETag` nor a version are not: that they changed could not be told.
#[derive(Debug, Clone)]
pub struct Cache {
    shared: Arc<Shared>,
    tasks: Arc<OnceLock<Option<Sender<Task>>>>,
}

/// What became of copies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheReport {
    /// Objects that were found.
    pub found: u64,
    /// Copies that were made.
    pub written: u64,
    /// Copies that were not, each with the object and the reason.
    pub given_up: Vec<String>,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    max_bytes: u64,
    queued: AtomicU64,
    /// Names that make no room for others.
    in_use: Mutex<HashSet<PathBuf>>,
    report: Mutex<CacheReport>,
}

#[derive(Debug)]
enum Task {
    Write(Arc<Copy>, u64, Vec<u8>),
    Keep(Arc<Copy>),
    Tell(Sender<()>),
}

/// A copy of an object that is being read.
#[derive(Debug)]
pub(crate) struct Copy {
    cache: Cache,
    url: String,
    key: String,
    len: u64,
    /// The SHA-256 that the object is to have, where its server tells it.
    sum: Option<String>,
    /// Its first bytes, until others come.
    head: Mutex<Option<Vec<u8>>>,
    /// Nothing more is to be written.
    given_up: AtomicBool,
    /// Used by the thread that writes only, which may be slow.
    partial: Mutex<Option<Partial>>,
}

/// A file that is not whole. It is removed when this is dropped.
#[derive(Debug)]
struct Partial {
    file: File,
    path: PathBuf,
    ranges: Ranges,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cache {
    /// A cache in `folder`, which need not be there, of at most about `max_bytes`: what was not used for the
    /// longest time goes first. What this process uses stays.
    pub fn new(folder: impl Into<PathBuf>, max_bytes: u64) -> Self {
        let (folder, queued) = (folder.into(), AtomicU64::new(0));
        let shared = Shared {
            folder,
            max_bytes,
            queued,
            in_use: Mutex::default(),
            report: Mutex::default(),
        };
        Self { shared: Arc::new(shared), tasks: Arc::default() }
    }

    /// The copy of this version of an object, if there is one.
    #[must_use]
    pub fn find(&self, object: &Object) -> Option<PathBuf> {
        let (key, _) = key(object.url(), object.identity())?;
        let is_copy = |name: &str| name.starts_with(&key) && name.ends_with(COPY);
        let mut files = self.shared.files(is_copy).ok()?.into_iter();
        let (path, _) = files.find(|(_, file)| file.len() == object.len())?;
        locked(&self.shared.report).found += 1;
        locked(&self.shared.in_use).insert(path.clone());
        Some(path)
    }

    /// Begins a copy of an object whose first bytes are `head`.
    pub(crate) fn copy(&self, url: &str, identity: &Identity, head: &[u8]) -> Option<Arc<Copy>> {
        let (key, sum) = key(url, identity)?;
        Some(Arc::new(Copy {
            cache: self.clone(),
            url: url.to_owned(),
            key,
            len: identity.len,
            sum,
            head: Mutex::new(Some(head.to_vec())),
            given_up: AtomicBool::new(false),
            partial: Mutex::new(None),
        }))
    }

    /// Waits until all that is to be copied has been, and says what became of it.
    #[must_use]
    pub fn wait(&self) -> CacheReport {
        let (tell, told) = channel();
        if self.tasks.get().is_some() && self.send(Task::Tell(tell)) {
            // The thread ends after the last task only.
            let _ = told.recv();
        }
        locked(&self.shared.report).clone()
    }

    /// Gives the thread a task; `false` where there is no thread to be had.
    fn send(&self, task: Task) -> bool {
        let tasks = self.tasks.get_or_init(|| {
            let (tasks, mine) = channel();
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name("fst-cache".to_owned());
            thread.spawn(move || shared.work(&mine)).ok().map(|_| tasks)
        });
        tasks.as_ref().is_some_and(|tasks| tasks.send(task).is_ok())
    }
}

/// How the names of copies end.
const COPY: &str = ".safetensors";
const PARTIAL: &str = ".partial";

/// What names a version of an object, and its SHA-256 if the hub tells that. `None` if versions cannot be told
/// apart.
fn key(url: &str, identity: &Identity) -> Option<(String, Option<String>)> {
    let Identity { len, version, modified, .. } = identity;
    let strong = identity.strong_etag();
    if strong.is_none() && version.is_none() {
        return None;
    }
    let of_hub = strong.filter(|_| url.starts_with("hf://")).map(|etag| etag.trim_matches('"'));
    let sum = of_hub.filter(|sum| sum.len() == 64).map(str::to_ascii_lowercase);
    // What is named by its sum is the same in all commits.
    let place = if sum.is_some() { "" } else { url };
    let parts = [place, strong.unwrap_or_default(), version.as_deref().unwrap_or_default()];
    let modified = modified.filter(|_| sum.is_none()).unwrap_or_default();
    let hash = Sha256::digest(format!("{}\0{len}\0{modified}", parts.join("\0")));
    Some((hexadecimal(&hash[..16]), sum))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl Shared {
    /// The files of the cache with such names.
    fn files(&self, named: impl Fn(&str) -> bool) -> io::Result<Vec<(PathBuf, fs::Metadata)>> {
        let mut files = Vec::new();
        for item in fs::read_dir(&self.folder)? {
            let item = item?;
            let name = item.file_name();
            let name = name.to_str().unwrap_or_default();
            // Another process may have removed it.
            if named(name)
                && let Ok(metadata) = item.metadata()
                && metadata.is_file()
            {
                files.push((item.path(), metadata));
            }
        }
        Ok(files)
    }

    /// Does what comes, in its order.
    fn work(&self, tasks: &Receiver<Task>) {
        for task in tasks {
            match task {
                Task::Write(copy, offset, bytes) => {
                    let written = copy.write(offset, &bytes);
                    self.queued.fetch_sub(bytes.len() as u64, Relaxed);
                    written.unwrap_or_else(|error| copy.give_up(&error.to_string()));
                }
                Task::Keep(copy) => {
                    let finished = copy.finish();
                    finished.unwrap_or_else(|error| copy.give_up(&error.to_string()));
                }
                Task::Tell(done) => drop(done.send(())),
            }
        }
    }

    /// Removes what processes left that were killed, and copies until there is room for `len` more bytes.
    fn make_room(&self, len: u64) -> io::Result<()> {
        let mut files = self.files(|name| name.ends_with(COPY) || name.ends_with(PARTIAL))?;
        files.retain(|(path, _)| !(path.to_string_lossy().ends_with(PARTIAL) && remove_dead(path)));
        // Only reading moves the time of access, and no time that tells a change.
        files.sort_by_key(|(_, file)| file.accessed().ok().max(file.modified().ok()));
        let mut total = files.iter().fold(len, |sum, (_, file)| sum.saturating_add(file.len()));
        let in_use = locked(&self.in_use);
        let copies = files.iter().filter(|(path, _)| path.to_string_lossy().ends_with(COPY));
        for (path, file) in copies.filter(|(path, _)| !in_use.contains(path)) {
            if total <= self.max_bytes {
                break;
            }
            if fs::remove_file(path).is_ok() {
                total -= file.len();
            }
        }
        if total <= self.max_bytes {
            return Ok(());
        }
        Err(io::Error::other(format!("no room within {} bytes", self.max_bytes)))
    }
}

/// Removes a file that nobody writes to any more.
fn remove_dead(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| file.try_lock().is_ok()) && fs::remove_file(path).is_ok()
}

impl Copy {
    /// Takes room in the queue for so many bytes, which are then [put](Self::put) or [dropped](Self::give_up).
    pub(crate) fn room(&self, len: u64) -> Option<Vec<u8>> {
        if self.given_up.load(Relaxed) {
            return None;
        }
        let queued = &self.cache.shared.queued;
        if queued.fetch_add(len, Relaxed).saturating_add(len) > QUEUE {
            queued.fetch_sub(len, Relaxed);
            self.give_up("it cannot be written as fast as it is read");
            return None;
        }
        Some(Vec::with_capacity(len as usize))
    }

    /// Has bytes written that there is room for.
    pub(crate) fn put(self: &Arc<Self>, offset: u64, bytes: Vec<u8>) {
        let head = locked(&self.head).take();
        if let Some(head) = head {
            self.cache.shared.queued.fetch_add(head.len() as u64, Relaxed);
            self.cache.send(Task::Write(self.clone(), 0, head));
        }
        self.cache.send(Task::Write(self.clone(), offset, bytes));
    }

    /// Gives room back.
    pub(crate) fn put_nothing(&self, room: u64) {
        self.cache.shared.queued.fetch_sub(room, Relaxed);
    }

    /// Has the copy kept, if it is whole: what was read is right.
    pub(crate) fn keep(self: &Arc<Self>) {
        if !self.given_up.load(Relaxed) && locked(&self.head).is_none() {
            self.cache.send(Task::Keep(self.clone()));
        }
    }

    fn give_up(&self, reason: &str) {
        if !self.given_up.swap(true, Relaxed) {
            locked(&self.cache.shared.report).given_up.push(format!("{}: {reason}", self.url));
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut partial = locked(&self.partial);
        if self.given_up.load(Relaxed) {
            *partial = None;
            return Ok(());
        }
        let partial = match &mut *partial {
            Some(partial) => partial,
            none => none.insert(self.begin()?),
        };
        partial.file.seek(SeekFrom::Start(offset))?;
        partial.file.write_all(bytes)?;
        partial.ranges.add(offset..offset + bytes.len() as u64);
        Ok(())
    }

    fn begin(&self) -> io::Result<Partial> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let shared = &self.cache.shared;
        fs::create_dir_all(&shared.folder)?;
        shared.make_room(self.len)?;
        let number = NUMBER.fetch_add(1, Relaxed);
        let name = format!("{}-{}-{number}{PARTIAL}", self.key, std::process::id());
        let path = shared.folder.join(name);
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        let partial = Partial { file, path, ranges: Ranges::default() };
        // Where files have no locks, what is left behind stays.
        let _ = partial.file.try_lock();
        // Its length counts as room that is taken.
        partial.file.set_len(self.len)?;
        Ok(partial)
    }

    /// Gives a whole copy its name, once it is on storage.
    fn finish(&self) -> io::Result<()> {
        let whole = locked(&self.partial).take_if(|partial| partial.ranges.are_whole(self.len));
        let Some(mut whole) = whole else { return Ok(()) };
        let path = self.publish(&mut whole)?;
        self.given_up.store(true, Relaxed);
        locked(&self.cache.shared.report).written += 1;
        locked(&self.cache.shared.in_use).insert(path);
        Ok(())
    }

    fn publish(&self, partial: &mut Partial) -> io::Result<PathBuf> {
        partial.file.sync_all()?;
        partial.file.seek(SeekFrom::Start(0))?;
        let (mut hash, mut block) = (Sha256::new(), vec![0; BLOCK]);
        loop {
            match partial.file.read(&mut block)? {
                0 => break,
                read => hash.update(&block[..read]),
            }
        }
        let sum = hexadecimal(&hash.finalize());
        if self.sum.as_ref().is_some_and(|expected| *expected != sum) {
            return Err(io::Error::other("its bytes are not those that the hub says"));
        }
        let folder = &self.cache.shared.folder;
        let path = folder.join(format!("{}-{sum}{COPY}", self.key));
        // One that is there is the same, and somebody may be reading it.
        if !path.exists() {
            fs::rename(&partial.path, &path)?;
        }
        if let Ok(folder) = File::open(folder) {
            let _ = folder.sync_all();
        }
        Ok(path)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
