//! Reads of single tensors, in any order, from files that stay open.

use std::cell::RefCell;
use std::fmt;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use fst_format::Checkpoint;
use fst_gpu::cast;
use fst_io::{SharedBuffer, SourceFile};

use crate::error::{Error, Result};
use crate::host::locate_in;
use crate::into::Destination;
use crate::loader::Loader;
use crate::options::Item;
use crate::request::{Planned, Request};
use crate::tensor::{Data, Tensor};

/// Up to this many bytes of a file are read by the thread that asks; more are read as a load reads them.
const SMALL: u64 = 1 << 20;

/// A session for reads out of order: of one tensor after the other, or of parts of them, by any number of
/// threads at once. Files stay open, and a small read costs little more than the system's own
/// (`pread(2)`), however many tensors there are.
///
/// ```no_run
/// use fst::{Checkpoint, Dtype, Loader, Request};
///
/// let checkpoint = Checkpoint::open("model")?;
/// let reader = Loader::new().dtype(Dtype::F32).reader(&checkpoint);
/// let mut rows = vec![0f32; 10 * 4096];
/// let request = Request::new("model.embed_tokens.weight").slice(0, 500..510);
/// reader.read(request, fst::Destination::elements(&mut rows))?;
/// let norm = reader.tensor("model.norm.weight")?;
/// # Ok::<(), fst::Error>(())
/// ```
pub struct Reader {
    loader: Loader,
    checkpoint: Checkpoint,
    /// Each opened when it is first read.
    files: Vec<OnceLock<SourceFile>>,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("checkpoint", &self.checkpoint).finish_non_exhaustive()
    }
}

impl Loader {
    /// A session for reads of single tensors into host memory, which do by default what this loader says:
    /// its type of element, its slices, its engine for large reads. What it selects, and its device, do
    /// not count.
    pub fn reader(&self, checkpoint: &Checkpoint) -> Reader {
        let files = checkpoint.shards().iter().map(|_| OnceLock::new()).collect();
        Reader { loader: self.clone(), checkpoint: checkpoint.clone(), files }
    }
}

thread_local! {
    /// What is cut or converted passes through here.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Reader {
    /// What a request comes to: name, type of element, shape, bytes.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn planned(&self, request: impl Into<Request>) -> Result<Planned> {
        self.item(&request.into()).map(|item| Planned::of(&item))
    }

    /// Reads what a request wants into host memory of exactly its length.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTensor`], [`Error::Slice`], [`Error::Cast`], [`Error::DestinationLength`],
    /// [`Error::WrongDtype`], [`Error::DestinationDevice`]; and [`Error::Io`] where the file cannot be read
    /// or has changed since the checkpoint was opened.
    pub fn read<'d>(
        &self,
        request: impl Into<Request>,
        destination: impl Into<Destination<'d>>,
    ) -> Result<()> {
        let request = request.into();
        let item = self.item(&request)?;
        let destination = destination.into();
        if item.source_len() > SMALL {
            let destinations = [(item.name().to_owned(), destination)];
            let loader = self.loader.for_one(request);
            return loader.load_into(&self.checkpoint, destinations).map(drop);
        }
        let memory = destination.host_for(&item)?;
        // SAFETY: zeros initialise it, and all of it is at most a few mebibytes.
        let bytes = unsafe {
            let start = memory.as_mut_ptr().cast::<u8>();
            start.write_bytes(0, memory.len());
            std::slice::from_raw_parts_mut(start, memory.len())
        };
        self.fill(&item, bytes)
    }

    /// Reads what a request wants into memory of its own.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn tensor(&self, request: impl Into<Request>) -> Result<Tensor> {
        let request = request.into();
        let item = self.item(&request)?;
        if item.source_len() > SMALL {
            let loaded = self.loader.for_one(request).load(&self.checkpoint)?;
            let name = || Error::UnknownTensor { name: item.name().to_owned() };
            return loaded.into_iter().next().ok_or_else(name);
        }
        let len = item.len() as usize;
        let buffer = SharedBuffer::filled(len, |bytes| self.fill(&item, bytes))?;
        // SAFETY: the buffer is new and this is all of it.
        Ok(Tensor::of(&item, unsafe { Data::host(buffer, 0, len) }))
    }

    fn item(&self, request: &Request) -> Result<Item> {
        self.loader.selection.item_of(&self.checkpoint, request)
    }

    /// The file of an item.
    fn file(&self, item: &Item) -> Result<&SourceFile> {
        let shard = item.info.shard();
        let slot = &self.files[shard];
        if let Some(file) = slot.get() {
            return Ok(file);
        }
        let source = &self.checkpoint.shards()[shard];
        let file = SourceFile::open(source.path(), Some(source.file_metadata()))
            .map_err(|e| locate_in(e, std::iter::once(&item.info)))?;
        Ok(slot.get_or_init(|| file))
    }

    /// Reads a small item.
    fn fill(&self, item: &Item, bytes: &mut [u8]) -> Result<()> {
        let located = |e| locate_in(e, std::iter::once(&item.info));
        if item.source_len() == 0 {
            return Ok(());
        }
        let file = self.file(item)?;
        let (runs, start) = (item.runs(), item.info.file_range().start);
        let at = start + runs.first;
        match item.cast() {
            None if runs.count == 1 => read_exact(file, at, bytes),
            cast => SCRATCH.with_borrow_mut(|scratch| {
                // Rows that lie close are read together, gaps and all.
                let span = (runs.count - 1) * runs.stride + runs.len;
                let together = span <= SMALL.max(2 * item.source_len());
                let wanted = item.source_len() as usize;
                scratch.resize(wanted + if together { span as usize } else { 0 }, 0);
                let (rows, all) = scratch.split_at_mut(wanted);
                let len = runs.len as usize;
                if runs.count == 1 {
                    read_exact(file, at, rows)?;
                } else if together {
                    read_exact(file, at, all)?;
                    let every = all.chunks(runs.stride as usize);
                    rows.chunks_mut(len)
                        .zip(every)
                        .for_each(|(to, from)| to.copy_from_slice(&from[..len]));
                } else {
                    let starts = (0..runs.count).map(|run| at + run * runs.stride);
                    rows.chunks_mut(len)
                        .zip(starts)
                        .try_for_each(|(to, at)| read_exact(file, at, to))?;
                }
                match cast {
                    None => bytes.copy_from_slice(rows),
                    Some((from, to)) => cast::cast(rows, from, bytes, to)
                        .map_err(|error| fst_io::Error::Sink(error.into()))?,
                }
                Ok(())
            }),
        }
        .map_err(located)?;
        file.verify_handle().map_err(located)
    }
}

/// Reads all of `bytes` at `offset`.
fn read_exact(file: &SourceFile, offset: u64, bytes: &mut [u8]) -> Result<(), fst_io::Error> {
    file.buffered().read_exact_at(bytes, offset).map_err(|source| fst_io::Error::Read {
        path: file.path().to_owned(),
        offset,
        len: bytes.len() as u64,
        source,
    })
}
