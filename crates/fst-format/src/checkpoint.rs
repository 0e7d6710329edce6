//! Checkpoints: one table of all tensors over one or many files.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::folder::{self, Choice};
use crate::index::{Index, MAX_INDEX_LEN};
use crate::names::NameTable;
use crate::reading;
use crate::remote::{self, Cache, Object};
use crate::{Dtype, Error, Header, HeaderTensor, Metadata, hub, open};

/// The tensors of a checkpoint and the files that hold them. Headers only: no file stays open but those that
/// were [given](Checkpoint::from_files) open.
///
/// A clone shares everything.
#[derive(Clone)]
pub struct Checkpoint {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) files: Arc<Files>,
    pub(crate) tensors: Vec<TensorInfo>,
    /// Positions in `tensors`; not needed for one shard, whose header has its own.
    pub(crate) by_name: Option<NameTable>,
    pub(crate) metadata: Metadata,
    pub(crate) byte_len: u64,
    pub(crate) open_time: Duration,
    pub(crate) notices: Vec<Notice>,
}

/// How a checkpoint is opened.
///
/// ```no_run
/// use fst_format::OpenOptions;
///
/// let checkpoint = OpenOptions::new().allow_missing(true).open("model")?;
/// for notice in checkpoint.notices() {
///     eprintln!("{notice}");
/// }
/// # Ok::<(), fst_format::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    allow_missing: bool,
    cache: Option<Cache>,
}

impl OpenOptions {
    /// Those of [`Checkpoint::open`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a tensor that an index puts into a shard without it is left out, with a
    /// [`Notice::Missing`], instead of being an error.
    #[must_use]
    pub fn allow_missing(mut self, allow: bool) -> Self {
        self.allow_missing = allow;
        self
    }

    /// A local folder with copies of shards that are not local. Of each shard that is asked for by URL, its
    /// first bytes are read to see which version it is; if the cache has that, the shard is the local file.
    /// Others are copied there beside the loads of this checkpoint that read all of them and succeed, be it
    /// one load or several; [`fst_object::Cache::wait`] waits for that. What a load does not read, as of a
    /// selection, is not fetched for the cache.
    #[cfg(feature = "object-store")]
    #[must_use]
    pub fn cache(mut self, cache: &Cache) -> Self {
        self.cache = Some(cache.clone());
        self
    }

    /// As [`Checkpoint::open`].
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open`].
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Checkpoint, Error> {
        self.open_all([path])
    }

    /// As [`Checkpoint::open_all`].
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open_all`].
    pub fn open_all<I, P>(&self, paths: I) -> Result<Checkpoint, Error>
    where
        I: IntoIterator<Item = P>,
        P: AsRef<Path>,
    {
        let began = Instant::now();
        let mut indices = Vec::new();
        let mut notices = Vec::new();
        let shards = read_shards(paths, self.cache.as_ref(), &mut indices, &mut notices)?;
        self.assemble(shards, &indices, notices, began)
    }

    /// As [`Checkpoint::from_files`].
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::from_files`].
    pub fn from_files<P: Into<PathBuf>>(
        &self,
        files: impl IntoIterator<Item = (P, File)>,
    ) -> Result<Checkpoint, Error> {
        let began = Instant::now();
        let files = files.into_iter().map(|(name, file)| (name.into(), file));
        let shards = reading::read_files(files)?;
        if shards.is_empty() {
            return Err(Error::NoPaths);
        }
        self.assemble(shards, &[], Vec::new(), began)
    }

    fn assemble(
        &self,
        shards: Vec<Shard>,
        indices: &[IndexSource],
        notices: Vec<Notice>,
        began: Instant,
    ) -> Result<Checkpoint, Error> {
        let mut checkpoint = Checkpoint::assemble(shards, indices, self.allow_missing, notices)?;
        // Nobody shares a checkpoint that is not out yet.
        if let Some(inner) = Arc::get_mut(&mut checkpoint.inner) {
            inner.open_time = began.elapsed();
        }
        Ok(checkpoint)
    }
}

/// Something that a checkpoint could be opened without, but that may not be meant. Displays as one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Notice {
    /// An index puts tensors into shards that do not have them. They are left out.
    #[error(
        "{}: weight_map puts {count} tensors into shards without them, the first is {tensor:?}: left out",
        index.display()
    )]
    Missing {
        /// The index.
        index: PathBuf,
        /// The first of them.
        tensor: String,
        /// How many there are.
        count: usize,
    },
    /// Shards have copies of tensors that the index puts elsewhere. The copies are left out.
    #[error(
        "{}: {count} copies of tensors in other shards than weight_map says, the first is {tensor:?}: \
         left out",
        index.display()
    )]
    Superseded {
        /// The index.
        index: PathBuf,
        /// The first of them.
        tensor: String,
        /// How many there are.
        count: usize,
    },
    /// A folder has a single file and an index, and the file is taken, as transformers does.
    #[error("{}: taken, and not what {} beside it lists", file.display(), index.display())]
    BesideIndex {
        /// The file.
        file: PathBuf,
        /// The index.
        index: PathBuf,
    },
    /// Shards have tensors that the index does not list. They belong to the checkpoint.
    #[error("{}: weight_map does not list {count} tensors, the first is {tensor:?}", index.display())]
    Unlisted {
        /// The index.
        index: PathBuf,
        /// The first of them.
        tensor: String,
        /// How many there are.
        count: usize,
    },
}

/// What tensors refer to.
pub(crate) struct Files {
    pub(crate) shards: Vec<Shard>,
    /// Names that differ from those of the headers, by shard and place in its header.
    pub(crate) names: HashMap<(u32, u32), Box<str>>,
}

impl Checkpoint {
    /// Opens a checkpoint: a safetensors file, an index (`*.index.json`), or a folder.
    ///
    /// In a folder the first match wins: `model.safetensors`, even beside an index;
    /// `model.safetensors.index.json`; the only `*.safetensors.index.json`; the only complete set
    /// `NAME-00001-of-0000N.safetensors`, numbered from 0 or 1; the only `*.safetensors`. The first
    /// two are what transformers does. A variant, as `NAME.fp16.safetensors`, is taken where `NAME`
    /// itself is not there; hidden files are not seen; other mixtures are refused. The folder of a
    /// repository in the cache of the Hugging Face hub, `models--ORG--NAME`, stands for the snapshot
    /// that its `refs/main` names, or its only one.
    ///
    /// An index says who owns a tensor: each that it lists is in the shard that it says, and copies
    /// of it in other shards are left out. Tensors in those shards that it does not list belong to
    /// the checkpoint, as transformers loads them too. [`Checkpoint::notices`] tells of both.
    ///
    /// With the feature `object-store`, also a URL: `s3://`, `gs://` or `az://` with a bucket and a key,
    /// `http(s)://`, or `hf://ORG/NAME[@REVISION]` of the Hugging Face hub, of a file, an index or a folder. A
    /// folder of a web server, which lists nothing, is asked for `model.safetensors` and then for its index. A
    /// revision of the hub (by default `main`; a slash in one is written `%2F`) is that commit which it is now.
    /// With `HF_HUB_OFFLINE=1` it is looked for in the hub's cache only.
    ///
    /// Headers are read, in parallel where there are several files; data is not.
    ///
    /// # Errors
    ///
    /// Files that are missing, unreadable or not sound, an index that leaves its folder or
    /// disagrees, and a tensor's name in two shards, or in one that is there twice.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint, Error> {
        Self::open_all([path])
    }

    /// Opens a model of the Hugging Face hub, `org/name`, that was downloaded into the hub's local cache
    /// ([`hub::find`](crate::hub::find) says where and which revision that is). The network is never used.
    ///
    /// ```no_run
    /// use fst_format::{Checkpoint, Error};
    ///
    /// match Checkpoint::open_cached("org/name", Some("v1.0")) {
    ///     Ok(checkpoint) => println!("{} tensors", checkpoint.tensors().len()),
    ///     Err(error @ Error::NotCached { .. }) => eprintln!("{error}"), // says what downloads it
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NotCached`], and as [`Checkpoint::open`] and [`hub::find`](crate::hub::find).
    pub fn open_cached(id: &str, revision: Option<&str>) -> Result<Checkpoint, Error> {
        Self::open(hub::find(id, revision)?)
    }

    /// Opens several paths, each as [`Checkpoint::open`] would, as one checkpoint.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open`], and where `paths` is empty.
    pub fn open_all<I, P>(paths: I) -> Result<Checkpoint, Error>
    where
        I: IntoIterator<Item = P>,
        P: AsRef<Path>,
    {
        OpenOptions::new().open_all(paths)
    }

    /// Opens safetensors files that are open already, as one checkpoint: files without a name (`memfd_create(2)`),
    /// removed ones, descriptors from another process. Each has a name, which errors and
    /// [`Shard::path`] tell and nothing is opened by. They are read at positions of the reader's own, and stay
    /// open as long as the checkpoint does.
    ///
    /// ```no_run
    /// use std::fs::File;
    /// use fst_format::Checkpoint;
    ///
    /// let checkpoint = Checkpoint::from_files([("weights", File::open("/dev/shm/weights")?)])?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Files that cannot be read, are no regular files or not sound, a tensor's name in two of them, and where
    /// `files` is empty.
    pub fn from_files<P: Into<PathBuf>>(
        files: impl IntoIterator<Item = (P, File)>,
    ) -> Result<Checkpoint, Error> {
        OpenOptions::new().from_files(files)
    }

    fn assemble(
        shards: Vec<Shard>,
        indices: &[IndexSource],
        allow_missing: bool,
        mut notices: Vec<Notice>,
    ) -> Result<Checkpoint, Error> {
        let mut missing = Vec::new();
        // For each shard, which of its tensors are left out; empty where none is.
        let mut left_out: Vec<Vec<bool>> = vec![Vec::new(); shards.len()];
        for (position, index) in indices.iter().enumerate() {
            index.check(position, &shards, &mut left_out, &mut missing, &mut notices)?;
        }
        let files = Arc::new(Files { shards, names: HashMap::new() });
        let shards = &files.shards;
        let mut tensors = Vec::with_capacity(shards.iter().map(|s| s.header.len()).sum());
        for (shard, (file, left_out)) in shards.iter().zip(&left_out).enumerate() {
            let kept = (0..file.header.len()).filter(|&i| !left_out.get(i).is_some_and(|out| *out));
            tensors.extend(kept.map(|index| TensorInfo {
                files: Arc::clone(&files),
                shard: shard as u32,
                index: index as u32,
            }));
        }
        let by_name = if shards.len() > 1 {
            let mut table = NameTable::with_capacity(tensors.len());
            let name_of = |position: u32| tensors[position as usize].name();
            for position in 0..tensors.len() as u32 {
                table.insert(position, name_of).map_err(|first| {
                    let of = |position: u32| tensors[position as usize].shard();
                    let (a, b) = (of(first), of(position));
                    let tensor = name_of(position).to_owned();
                    // Copies of what an index lists once are left out already.
                    let lists = |index: &&IndexSource| {
                        index.has(a) && index.has(b) && index.index.tensors().any(|t| t.0 == tensor)
                    };
                    if let Some(index) = indices.iter().find(lists) {
                        return Error::RepeatedInIndex { index: index.path.clone(), tensor };
                    }
                    let (one, other) = (&shards[a], &shards[b]);
                    let (first, second) = (one.path.clone(), other.path.clone());
                    if one.is_same_file(other) {
                        return Error::RepeatedFile { first, second };
                    }
                    Error::RepeatedTensor { tensor, first, second }
                })?;
            }
            Some(table)
        } else {
            None
        };
        let metadata = Metadata::merged(shards.iter().map(Shard::metadata));
        let byte_len = tensors.iter().fold(0u64, |sum, t| sum.saturating_add(t.byte_len()));
        let open_time = Duration::ZERO;
        let inner = Inner { files, tensors, by_name, metadata, byte_len, open_time, notices };
        let checkpoint = Checkpoint { inner: Arc::new(inner) };
        for (index, name, shard) in missing {
            checkpoint.check_missing(&indices[index], name, shard, allow_missing)?;
        }
        Ok(checkpoint)
    }

    /// Checks what the index puts into a shard that lacks it: that is not all right where the index lists
    /// it elsewhere too, or where nothing may be missing.
    fn check_missing(
        &self,
        index: &IndexSource,
        name: &str,
        shard: usize,
        allow: bool,
    ) -> Result<(), Error> {
        let tensor = name.to_owned();
        // Of the index's shards, one keeps a listed tensor only if it is listed there.
        if self.get(name).is_some_and(|found| index.has(found.shard())) {
            return Err(Error::RepeatedInIndex { index: index.path.clone(), tensor });
        }
        if allow {
            return Ok(());
        }
        let has = |shard: &&Shard| shard.header.position(name).is_some();
        Err(Error::NotInShard {
            index: index.path.clone(),
            tensor,
            shard: self.shards()[shard].path.clone(),
            found: self.shards().iter().find(has).map(|shard| shard.path.clone()),
        })
    }

    /// What may not be meant, though the checkpoint could be opened.
    #[must_use]
    pub fn notices(&self) -> &[Notice] {
        &self.inner.notices
    }

    /// How long opening took: reading and checking all headers.
    #[must_use]
    pub fn open_time(&self) -> Duration {
        self.inner.open_time
    }

    /// The files, in the order given, or by name for an index.
    #[must_use]
    pub fn shards(&self) -> &[Shard] {
        &self.inner.files.shards
    }

    /// All tensors by shard, and by place in the file within a shard.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.inner.tensors
    }

    /// The tensor of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.inner.tensors.get(self.position(name)?)
    }

    /// Where the tensor of this name is in the list of all.
    fn position(&self, name: &str) -> Option<usize> {
        let tensors = &self.inner.tensors;
        match &self.inner.by_name {
            Some(table) => {
                table.get(name, |position| tensors[position as usize].name()).map(|at| at as usize)
            }
            None => self.shards().first()?.header.position(name),
        }
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.inner.byte_len
    }

    /// The metadata of all shards; of two values for one key, the earlier shard's.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.inner.metadata
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("shards", &self.shards())
            .field("tensors", &self.tensors().len())
            .field("byte_len", &self.byte_len())
            .finish_non_exhaustive()
    }
}

/// One file of a checkpoint. Cheap to clone.
#[derive(Clone)]
pub struct Shard {
    pub(crate) path: PathBuf,
    pub(crate) origin: Origin,
    pub(crate) header: Arc<Header>,
    /// Where it was given open.
    pub(crate) file: Option<Arc<File>>,
}

/// Where a shard is, and what tells it from others of its name.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// What the file system said of the open file whose header was parsed.
    File(std::fs::Metadata),
    Object(Object),
}

impl Origin {
    /// Whether nothing was written between two looks at one file.
    fn is_unchanged(&self, other: &Self) -> bool {
        match (self, other) {
            (Origin::File(one), Origin::File(two)) => open::is_unchanged(one, two),
            (Origin::Object(one), Origin::Object(two)) => one.is_same_version(two),
            _ => false,
        }
    }
}

impl Shard {
    /// The file, if it was [given](Checkpoint::from_files) open: its path is a name only.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.file.as_deref()
    }

    /// Its path or URL, as given or as the index leads to it; links are not resolved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a shard has at least eight bytes")]
    #[must_use]
    pub fn len(&self) -> u64 {
        match &self.origin {
            Origin::File(metadata) => metadata.len(),
            Origin::Object(object) => object.len(),
        }
    }

    /// Offset in the file of the first tensor's first byte.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        self.header.data_start()
    }

    /// What the file system said of the open file whose header was parsed. A loader that opens
    /// the path again compares length and times to see that it got the same file. `None` of an object.
    #[must_use]
    pub fn file_metadata(&self) -> Option<&std::fs::Metadata> {
        match &self.origin {
            Origin::File(metadata) => Some(metadata),
            Origin::Object(_) => None,
        }
    }

    /// The object that the shard is, if it is no local file.
    #[cfg(feature = "object-store")]
    #[must_use]
    pub fn object(&self) -> Option<&Object> {
        match &self.origin {
            Origin::File(_) => None,
            Origin::Object(object) => Some(object),
        }
    }

    /// Whether both are one file, by whatever names.
    fn is_same_file(&self, other: &Shard) -> bool {
        match (&self.origin, &other.origin) {
            (Origin::File(one), Origin::File(two)) => {
                open::is_same((&self.path, one), (&other.path, two))
            }
            (Origin::Object(one), Origin::Object(two)) => one.is_same(two),
            _ => false,
        }
    }

    /// The file's own metadata.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        self.header.metadata()
    }

    /// The parsed header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shard").field("path", &self.path).field("header", &self.header).finish()
    }
}

/// A tensor of a checkpoint: what it is and where its bytes are.
///
/// Sixteen bytes and a shared count: cloning one costs nothing worth saving, and a clone stays
/// valid when the checkpoint is gone.
#[derive(Clone)]
pub struct TensorInfo {
    pub(crate) files: Arc<Files>,
    pub(crate) shard: u32,
    pub(crate) index: u32,
}

impl TensorInfo {
    fn entry(&self) -> HeaderTensor<'_> {
        self.files.shards[self.shard as usize].header.entry_at(self.index as usize)
    }

    /// Its name: that in the file, unless the checkpoint was [renamed](Checkpoint::renamed).
    #[must_use]
    pub fn name(&self) -> &str {
        let names = &self.files.names;
        if !names.is_empty()
            && let Some(name) = names.get(&(self.shard, self.index))
        {
            return name;
        }
        self.entry().name()
    }

    /// Type of its elements.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.entry().dtype()
    }

    /// Its dimensions, outermost first; empty for a scalar.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.entry().shape()
    }

    /// Place of its file in [`Checkpoint::shards`].
    #[must_use]
    pub fn shard(&self) -> usize {
        self.shard as usize
    }

    /// Path of its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.files.shards[self.shard as usize].path
    }

    /// Its bytes, from the start of its file.
    #[must_use]
    pub fn file_range(&self) -> Range<u64> {
        self.entry().file_range()
    }

    /// Whether both are the same elements of the same file, by whatever paths, and nothing was written to it
    /// between the times at which their headers were read: by device, inode, length and times, or by ETag or version.
    #[must_use]
    pub fn is_same_range(&self, other: &Self) -> bool {
        let one = &self.files.shards[self.shard as usize];
        let two = &other.files.shards[other.shard as usize];
        one.is_same_file(two)
            && one.origin.is_unchanged(&two.origin)
            && self.file_range() == other.file_range()
            && (self.dtype(), self.shape()) == (other.dtype(), other.shape())
    }

    /// Number of its bytes.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        let range = self.entry().data_range();
        range.end - range.start
    }

    /// Number of its elements.
    #[must_use]
    pub fn elements(&self) -> u64 {
        // No overflow: the header's checks took the same product.
        self.shape().iter().map(|&dim| dim as u64).product()
    }
}

impl fmt::Debug for TensorInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorInfo")
            .field("name", &self.name())
            .field("dtype", &self.dtype())
            .field("shape", &self.shape())
            .field("shard", &self.shard)
            .field("file_range", &self.file_range())
            .finish()
    }
}

/// Files to open, in order, each with what named it if an index did.
type Sources = (Vec<PathBuf>, Vec<Option<NamedBy>>);

/// Where in the indices and their files a source comes from.
struct NamedBy {
    index: usize,
    file: usize,
}

/// An index whose files are the shards from `first_shard` on.
struct IndexSource {
    path: PathBuf,
    index: Index,
    first_shard: usize,
}

impl IndexSource {
    /// Whether a shard is one of this index.
    fn has(&self, shard: usize) -> bool {
        (self.first_shard..self.first_shard + self.index.files.len()).contains(&shard)
    }

    /// Compares the index with its shards: adds what they lack to `missing`, with the position of the
    /// index, and marks copies of what it puts elsewhere in `left_out`.
    fn check<'i>(
        &'i self,
        position: usize,
        shards: &[Shard],
        left_out: &mut [Vec<bool>],
        missing: &mut Vec<(usize, &'i str, usize)>,
        notices: &mut Vec<Notice>,
    ) -> Result<(), Error> {
        let own = self.first_shard..self.first_shard + self.index.files.len();
        let mut listed: Vec<Vec<bool>> =
            shards[own.clone()].iter().map(|shard| vec![false; shard.header.len()]).collect();
        let first_missing = missing.len();
        for (name, file) in self.index.tensors() {
            let shard = self.first_shard + file;
            match shards[shard].header.position(name) {
                Some(at) if std::mem::replace(&mut listed[file][at], true) => {
                    let (index, tensor) = (self.path.clone(), name.to_owned());
                    return Err(Error::RepeatedInIndex { index, tensor });
                }
                Some(_) => {}
                None => missing.push((position, name, shard)),
            }
        }
        let index = || self.path.clone();
        if let Some((_, tensor, _)) = missing.get(first_missing) {
            let (tensor, count) = ((*tensor).to_owned(), missing.len() - first_missing);
            notices.push(Notice::Missing { index: index(), tensor, count });
        }
        if listed.iter().flatten().all(|listed| *listed) {
            return Ok(());
        }
        let names: HashSet<&str> = self.index.tensors().map(|(name, _)| name).collect();
        let (mut copies, mut others) = (Vec::new(), Vec::new());
        for (shard, listed) in own.zip(listed) {
            let header = &shards[shard].header;
            for at in (0..listed.len()).filter(|&at| !listed[at]) {
                let name = header.name_at(at);
                if names.contains(name) {
                    left_out[shard].resize(listed.len(), false);
                    left_out[shard][at] = true;
                    copies.push(name);
                } else {
                    others.push(name);
                }
            }
        }
        if let Some(tensor) = copies.first().map(|&name| name.to_owned()) {
            notices.push(Notice::Superseded { index: index(), tensor, count: copies.len() });
        }
        if let Some(tensor) = others.first().map(|&name| name.to_owned()) {
            notices.push(Notice::Unlisted { index: index(), tensor, count: others.len() });
        }
        Ok(())
    }
}

/// Reads the headers of all files that `paths` stand for. Of several errors, the one of the first
/// file is returned.
fn read_shards<P: AsRef<Path>>(
    paths: impl IntoIterator<Item = P>,
    cache: Option<&Cache>,
    indices: &mut Vec<IndexSource>,
    notices: &mut Vec<Notice>,
) -> Result<Vec<Shard>, Error> {
    let mut sources = Sources::default();
    for path in paths {
        add_sources(path.as_ref(), &mut sources, indices, notices)?;
    }
    let (files, named_by) = sources;
    if files.is_empty() {
        return Err(Error::NoPaths);
    }
    reading::read_headers(&files, cache).map_err(|(file, error)| match (error, &named_by[file]) {
        (Error::Open { path, source }, Some(by)) if source.kind() == io::ErrorKind::NotFound => {
            let IndexSource { path: index, index: Index { files, .. }, .. } = &indices[by.index];
            let tensor = files[by.file].1.clone();
            Error::MissingShard { index: index.clone(), shard: path, tensor }
        }
        (error, Some(by)) if remote::is_missing(&error) => {
            let IndexSource { path: index, index: Index { files, .. }, .. } = &indices[by.index];
            let (name, tensor) = files[by.file].clone();
            let shard = index.with_file_name(name);
            Error::MissingShard { index: index.clone(), shard, tensor }
        }
        (error, _) => error,
    })
}

/// Adds the files that `path` stands for.
fn add_sources(
    path: &Path,
    (files, named_by): &mut Sources,
    indices: &mut Vec<IndexSource>,
    notices: &mut Vec<Notice>,
) -> Result<(), Error> {
    let offline = remote::offline(path)?;
    let path = offline.as_deref().unwrap_or(path);
    let stat = match reading::is_url(path) {
        true => None,
        false => Some(std::fs::metadata(path).map_err(|source| reading::open_error(path, source))?),
    };
    let is_dir = stat.as_ref().is_some_and(std::fs::Metadata::is_dir);
    let choice = if stat.is_none() {
        remote::choose(path)?
    } else if is_dir {
        folder::choose(path)?
    } else if path.file_name().is_some_and(|name| folder::is_index(&name.to_string_lossy())) {
        Choice::Index(path.to_owned())
    } else {
        Choice::Files(vec![path.to_owned()])
    };
    match choice {
        Choice::Files(chosen) => {
            if is_dir
                && let [file] = &chosen[..]
                && let index = file.with_extension("safetensors.index.json")
                && index.is_file()
            {
                notices.push(Notice::BesideIndex { file: file.clone(), index });
            }
            files.extend(chosen);
        }
        Choice::Index(path) => {
            let index = Index::parse(read_index(&path)?, &path)?;
            let folder = path.parent().unwrap_or(Path::new(""));
            let first_shard = files.len();
            for (file, (name, _)) in index.files.iter().enumerate() {
                files.push(folder.join(name));
                named_by.resize_with(files.len() - 1, || None);
                named_by.push(Some(NamedBy { index: indices.len(), file }));
            }
            indices.push(IndexSource { path, index, first_shard });
        }
    }
    named_by.resize_with(files.len(), || None);
    Ok(())
}

fn read_index(path: &Path) -> Result<Vec<u8>, Error> {
    if reading::is_url(path) {
        return remote::read_index(path);
    }
    let (file, metadata) = reading::open_file(path)?;
    let len = metadata.len();
    if len > MAX_INDEX_LEN {
        return Err(Error::IndexTooLarge { index: path.to_owned(), len, max: MAX_INDEX_LEN });
    }
    let mut bytes = Vec::new();
    reading::read_onto(&file, path, &mut bytes, 0..len)?;
    Ok(bytes)
}
