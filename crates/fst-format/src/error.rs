//! What can be wrong with headers, checkpoints, slices and written files.
//!
//! Every `Display` is one complete line that already contains its causes; `source()` gives the
//! causes of I/O and JSON errors for programs that look at them.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::Dtype;

/// Why a file's header is not sound. Byte ranges and offsets count from the start of the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file ends before the eight bytes of the header's length.
    #[error("file of {file_len} bytes is too short for a header length (8 bytes)")]
    TooShort {
        /// Length of the file in bytes.
        file_len: u64,
    },
    /// The header is longer than any reader of the format accepts.
    #[error(
        "header of {len} bytes is longer than the format's limit of {max} bytes: not a safetensors file?"
    )]
    TooLarge {
        /// Length of the header in bytes.
        len: u64,
        /// The limit, [`crate::MAX_HEADER_LEN`].
        max: u64,
    },
    /// The file ends before its header does.
    #[error(
        "header at bytes {}..{} passes the end of the file at byte {file_len}: an interrupted \
         download, or not a safetensors file",
        range.start, range.end
    )]
    PastEnd {
        /// Where the header would be.
        range: Range<u64>,
        /// Length of the file in bytes.
        file_len: u64,
    },
    /// The data would end where no file offset reaches.
    #[error("data of {data_len} bytes is longer than any file")]
    FileTooLong {
        /// Length of the data in bytes.
        data_len: u64,
    },
    /// The header is not UTF-8.
    #[error("header is not UTF-8 at byte {offset}")]
    NotUtf8 {
        /// The first byte that is wrong.
        offset: u64,
    },
    /// The header is not JSON of the format's structure.
    #[error("{}invalid header JSON near byte {offset}: {source}", InTensor(tensor))]
    Json {
        /// The tensor whose entry was being read, if the error lies in one.
        tensor: Option<String>,
        /// About where the parser stopped.
        offset: u64,
        /// What the parser found.
        source: JsonError,
    },
    /// A dtype that the format does not have.
    #[error("tensor {tensor:?}: unknown dtype {dtype:?}")]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// Its dtype as written.
        dtype: String,
    },
    /// A tensor's entry lacks one of its fields.
    #[error("tensor {tensor:?}: no field {field:?}")]
    MissingField {
        /// The tensor.
        tensor: String,
        /// The field.
        field: &'static str,
    },
    /// A tensor's entry has one of its fields twice.
    #[error("tensor {tensor:?}: field {field:?} twice")]
    RepeatedField {
        /// The tensor.
        tensor: String,
        /// The field.
        field: &'static str,
    },
    /// Two tensors have one name.
    #[error("tensor {tensor:?} is declared twice")]
    RepeatedTensor {
        /// The name.
        tensor: String,
    },
    /// `__metadata__` appears twice.
    #[error("\"__metadata__\" is declared twice")]
    RepeatedMetadata,
    /// A tensor's bytes end before they begin.
    #[error("tensor {tensor:?}: data_offsets [{begin}, {end}] end before they begin")]
    NegativeRange {
        /// The tensor.
        tensor: String,
        /// First offset, from the start of the data.
        begin: u64,
        /// Second offset, from the start of the data.
        end: u64,
    },
    /// Bytes before a tensor belong to no tensor.
    #[error(
        "tensor {tensor:?} at bytes {}..{}: bytes {}..{} before it belong to no tensor",
        range.start, range.end, hole.start, hole.end
    )]
    Hole {
        /// The tensor after the hole.
        tensor: String,
        /// Its bytes.
        range: Range<u64>,
        /// The bytes that nothing covers.
        hole: Range<u64>,
    },
    /// Two tensors share bytes.
    #[error(
        "tensor {tensor:?} at bytes {}..{} overlaps tensor {other:?} at bytes {}..{}",
        range.start, range.end, other_range.start, other_range.end
    )]
    Overlap {
        /// The later tensor.
        tensor: String,
        /// Its bytes.
        range: Range<u64>,
        /// The tensor that ends after the later one's start.
        other: String,
        /// That tensor's bytes.
        other_range: Range<u64>,
    },
    /// Shape and dtype ask for no size that there is.
    #[error("tensor {tensor:?}: {source}")]
    Size {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        source: SizeError,
    },
    /// The byte range has another length than shape and dtype ask for.
    #[error(
        "tensor {tensor:?} at bytes {}..{}: {dtype} {shape:?} needs {expected} bytes, found {}",
        range.start, range.end, range.end - range.start
    )]
    WrongSize {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Its bytes as declared.
        range: Range<u64>,
        /// The length that shape and dtype ask for.
        expected: u64,
    },
    /// The file ends before its last tensor does.
    #[error(
        "file of {file_len} bytes is {} shorter than its header says, as after an interrupted \
         download; the first tensor that is not all there is {tensor:?} at bytes {}..{}",
        Bytes(needed.saturating_sub(*file_len)), range.start, range.end
    )]
    Truncated {
        /// The first tensor that the file does not hold in full.
        tensor: String,
        /// Its bytes.
        range: Range<u64>,
        /// Length of the file in bytes.
        file_len: u64,
        /// Length that the header asks for, in bytes.
        needed: u64,
    },
    /// Bytes after the last tensor belong to no tensor.
    #[error("bytes {}..{} after the last tensor belong to no tensor", range.start, range.end)]
    TrailingBytes {
        /// The bytes that nothing covers.
        range: Range<u64>,
    },
}

/// Why a shape of a dtype has no size in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SizeError {
    /// The size is no `u64` of bits, or with those of tensors before it no `u64` of bytes.
    #[error("size of {dtype} {shape:?} overflows")]
    Overflow {
        /// The dtype.
        dtype: Dtype,
        /// The shape.
        shape: Vec<usize>,
    },
    /// The elements of a packed dtype do not fill whole bytes.
    #[error("{dtype} {shape:?} is {bits} bits, not whole bytes")]
    PartialByte {
        /// The dtype.
        dtype: Dtype,
        /// The shape.
        shape: Vec<usize>,
        /// The size in bits.
        bits: u64,
    },
}

/// A number of bytes with its noun.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0 == 1 { "" } else { "s" };
        write!(f, "{} byte{plural}", self.0)
    }
}

/// Prefix `tensor "x": ` where there is a tensor.
struct InTensor<'a>(&'a Option<String>);

impl fmt::Display for InTensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(name) => write!(f, "tensor {name:?}: "),
            None => Ok(()),
        }
    }
}

/// What the JSON parser found; its type is not part of this crate's interface.
#[derive(Debug)]
pub struct JsonError(serde_json::Error);

impl JsonError {
    pub(crate) fn new(error: serde_json::Error) -> Self {
        Self(error)
    }

    /// Byte offset in `text` of the line and column that the error names.
    pub(crate) fn offset_in(&self, text: &str) -> u64 {
        let lines_before = self.0.line().saturating_sub(1);
        let line_start: usize = text.split_inclusive('\n').take(lines_before).map(str::len).sum();
        (line_start + self.0.column()).min(text.len()) as u64
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for JsonError {}

/// Why a checkpoint could not be opened. Every variant names the path it is about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An object, or a file of a web server, could not be read.
    #[cfg(feature = "object-store")]
    #[error(transparent)]
    Object(#[from] fst_object::Error),
    /// A URL was given, and this build reads local files only.
    #[error(
        "{}: URLs are read with the feature `object-store`, which this build lacks",
        url.display()
    )]
    NoObjectStore {
        /// The URL.
        url: PathBuf,
    },
    /// A file or folder could not be opened or looked at.
    #[error("{}: cannot open: {source}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file could not be opened, since the process has as many files open as it may.
    #[error(
        "{}: cannot open: this process has as many files open as it may; raise the limit, as with \
         `ulimit -n`",
        path.display()
    )]
    TooManyFiles {
        /// The file.
        path: PathBuf,
    },
    /// A link that leads to nothing.
    #[error(
        "{}: link to {}, which is not there, as after an interrupted download or a cleaned cache",
        path.display(), target.display()
    )]
    DanglingLink {
        /// The link.
        path: PathBuf,
        /// Where it leads, as it is written.
        target: PathBuf,
    },
    /// A file of another format.
    #[error("{}: not a safetensors file but {format}", path.display())]
    OtherFormat {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do about it.
        format: &'static str,
    },
    /// Bytes could not be read.
    #[error("{}: cannot read bytes {}..{}: {source}", path.display(), range.start, range.end)]
    Read {
        /// The file.
        path: PathBuf,
        /// The bytes asked for.
        range: Range<u64>,
        /// The system's reason; an unexpected end of file when the file shrank meanwhile.
        source: io::Error,
    },
    /// The path is neither a regular file nor a folder.
    #[error("{}: neither a file nor a folder", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file's header is not sound.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// No path was given.
    #[error("no checkpoint path given")]
    NoPaths,
    /// The folder holds no checkpoint.
    #[error(
        "{}: folder holds no .safetensors file and no .safetensors.index.json{}",
        folder.display(), Others(others)
    )]
    NoCheckpoint {
        /// The folder.
        folder: PathBuf,
        /// Some of its files that hold weights in other formats.
        others: Vec<String>,
    },
    /// The folder holds files that are not one checkpoint; the caller has to choose.
    #[error(
        "{}: folder holds several checkpoints, name one of them by its files: {}",
        folder.display(), files.join(", ")
    )]
    Ambiguous {
        /// The folder.
        folder: PathBuf,
        /// Names of the files that could be meant, sorted.
        files: Vec<String>,
    },
    /// A repository in the hub's cache has no `refs/main` that leads to a snapshot, and not one snapshot.
    #[error(
        "{}: refs/main leads to no snapshot; {}",
        folder.display(), Snapshots(snapshots)
    )]
    NoSnapshot {
        /// The repository's folder.
        folder: PathBuf,
        /// Names of its snapshots, sorted.
        snapshots: Vec<String>,
    },
    /// A model of the Hugging Face hub, or this revision of it, is not in the hub's cache on this machine.
    #[error("{}", Uncached(id, revision.as_deref(), folder.as_deref()))]
    NotCached {
        /// The model's id.
        id: String,
        /// The revision asked for, if one was.
        revision: Option<String>,
        /// Where the model would be; `None` where no folder is known to hold the cache.
        folder: Option<PathBuf>,
    },
    /// What was to name a model of the Hugging Face hub.
    #[error("{id:?} is not the id of a model of the Hugging Face hub, which is written ORG/NAME")]
    NotAModel {
        /// What was given.
        id: String,
    },
    /// A folder without index holds some of the files of a numbered set, not all.
    #[error("{}: folder lacks shard {missing}", folder.display())]
    IncompleteSet {
        /// The folder.
        folder: PathBuf,
        /// Name of the first file that is not there.
        missing: String,
    },
    /// The index is larger than any real one.
    #[error("{}: index of {len} bytes is longer than the limit of {max} bytes", index.display())]
    IndexTooLarge {
        /// The index.
        index: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// The index is not UTF-8.
    #[error("{}: index is not UTF-8 at byte {offset}", index.display())]
    IndexNotUtf8 {
        /// The index.
        index: PathBuf,
        /// The first byte that is wrong.
        offset: u64,
    },
    /// The index is not JSON of an index's structure.
    #[error("{}: invalid index JSON near byte {offset}: {source}", index.display())]
    IndexJson {
        /// The index.
        index: PathBuf,
        /// About where the parser stopped.
        offset: u64,
        /// What the parser found.
        source: JsonError,
    },
    /// The index lists no tensor.
    #[error("{}: index has an empty weight_map", index.display())]
    EmptyIndex {
        /// The index.
        index: PathBuf,
    },
    /// The index lists a tensor twice.
    #[error("{}: weight_map lists tensor {tensor:?} twice", index.display())]
    RepeatedInIndex {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The index names a file outside of its folder.
    #[error(
        "{}: weight_map puts tensor {tensor:?} into {entry:?}, which is no plain path inside the \
         index's folder",
        index.display()
    )]
    OutsideFolder {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file as the index writes it.
        entry: String,
    },
    /// The index names a file that is not there.
    #[error("{}: missing shard {} with tensor {tensor:?}", index.display(), shard.display())]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The file.
        shard: PathBuf,
        /// A tensor that it should hold.
        tensor: String,
    },
    /// The index puts a tensor into a shard that does not have it.
    #[error(
        "{}: weight_map puts tensor {tensor:?} into {}, {}",
        index.display(), shard.display(), Elsewhere(found)
    )]
    NotInShard {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard that the index names.
        shard: PathBuf,
        /// The shard that has it, if one does.
        found: Option<PathBuf>,
    },
    /// A file is among the paths twice.
    #[error("{}: given twice{}", second.display(), AlsoNamed(first, second))]
    RepeatedFile {
        /// The path that comes first.
        first: PathBuf,
        /// The path that comes second, of the same file.
        second: PathBuf,
    },
    /// Two shards have a tensor of one name.
    #[error(
        "{}: tensor {tensor:?} is also in {}", second.display(), first.display()
    )]
    RepeatedTensor {
        /// The tensor.
        tensor: String,
        /// The shard that comes first.
        first: PathBuf,
        /// The shard that comes second.
        second: PathBuf,
    },
    /// Two tensors of a renamed checkpoint would have one name.
    #[error("two tensors would be named {name:?}")]
    RepeatedName {
        /// The name.
        name: String,
    },
}

/// What a folder holds instead.
struct Others<'a>(&'a [String]);

impl fmt::Display for Others<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => Ok(()),
            others => write!(f, "; it holds {}, which are not safetensors", others.join(", ")),
        }
    }
}

/// What there is to choose from.
struct Snapshots<'a>(&'a [String]);

impl fmt::Display for Snapshots<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("none was downloaded"),
            names => write!(f, "name one of snapshots/: {}", names.join(", ")),
        }
    }
}

/// A model, its revision, and its folder in the cache.
struct Uncached<'a>(&'a str, Option<&'a str>, Option<&'a Path>);

impl fmt::Display for Uncached<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(id, revision, folder) = *self;
        let Some(folder) = folder else {
            let set = "set HF_HUB_CACHE or HF_HOME";
            return write!(f, "{id}: the hub's cache is in no known folder: {set}");
        };
        match revision {
            None => write!(f, "{id}: no snapshot of it in the hub's cache, {}", folder.display())?,
            Some(revision) => {
                let folder = folder.display();
                write!(f, "{id}: no revision {revision:?} of it in the hub's cache, {folder}")?;
            }
        }
        write!(f, "; `hf download {id}")?;
        revision.map_or(Ok(()), |revision| write!(f, " --revision {revision}"))?;
        f.write_str("` downloads it")
    }
}

/// The other path of a file, if it has one.
struct AlsoNamed<'a>(&'a Path, &'a Path);

impl fmt::Display for AlsoNamed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 == self.1 {
            true => Ok(()),
            false => write!(f, ", it is the same file as {}", self.0.display()),
        }
    }
}

/// The end of a sentence on a tensor that is not where the index says.
struct Elsewhere<'a>(&'a Option<PathBuf>);

impl fmt::Display for Elsewhere<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(path) => write!(f, "found in {}", path.display()),
            None => f.write_str("found in no shard"),
        }
    }
}
