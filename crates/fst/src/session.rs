//! Reads of single tensors, in any order, from files that stay open.

use std::fmt;
use std::sync::OnceLock;
use std::time::Instant;

use fst_format::{Checkpoint, Planned, Request};
use fst_gpu::SMALL_PIECE;
use fst_io::{SharedBuffer, SourceFile};

use crate::error::{Error, Result};
use crate::files::{converts, locate_in, open_shard, piece_of};
use crate::into::{Destination, elsewhere};
use crate::loader::Loader;
use crate::owned::OwnedMemory;
use crate::tensor::{Data, Tensor};

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
    /// not count; [`Reader::tensor`] goes to the device of its request.
    pub fn reader(&self, checkpoint: &Checkpoint) -> Reader {
        let files = checkpoint.shards().iter().map(|_| OnceLock::new()).collect();
        Reader { loader: self.to_host(), checkpoint: checkpoint.clone(), files }
    }
}

impl Reader {
    /// What a request comes to: name, type of element, shape, bytes.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn planned(&self, request: impl Into<Request>) -> Result<Planned> {
        let selection = &self.loader.selection;
        Ok(selection.resolve_one(&self.checkpoint, &request.into(), &converts)?)
    }

    /// Reads what a request wants into host memory of exactly its length.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTensor`], [`Error::Select`], [`Error::DestinationLength`],
    /// [`Error::WrongDtype`], [`Error::DestinationDevice`]; and [`Error::Io`] where the file cannot be read
    /// or has changed since the checkpoint was opened.
    pub fn read<'d>(
        &self,
        request: impl Into<Request>,
        destination: impl Into<Destination<'d>>,
    ) -> Result<()> {
        let item = self.planned(request)?;
        if !self.loader.is_to_host(&item) {
            return Err(elsewhere(&item, &self.loader.device_of(&item)?));
        }
        let mut memory = destination.into().host_for(&item)?;
        if item.source_len() > SMALL_PIECE {
            let mut report = self.loader.begin(&self.checkpoint)?;
            let (wanted, began) = (vec![(item, memory)], Instant::now());
            return self.loader.fill(&self.checkpoint, wanted, began, &mut report, &|_, _| {});
        }
        // SAFETY: zeros initialise it, and all of it is at most a few mebibytes.
        let bytes = unsafe {
            let memory = memory.memory();
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
        let item = self.planned(request)?;
        if item.source_len() > SMALL_PIECE || !self.loader.is_to_host(&item) {
            let mut report = self.loader.begin(&self.checkpoint)?;
            let (items, began) = (vec![item], Instant::now());
            let loaded = self.loader.load_items(&self.checkpoint, items, began, &mut report)?;
            // A load that succeeds brings what it is asked for.
            return loaded.into_iter().next().ok_or(Error::Cancelled);
        }
        let len = item.byte_len() as usize;
        let buffer = SharedBuffer::filled(len, |bytes| self.fill(&item, bytes))?;
        // SAFETY: the buffer is new and this is all of it.
        Ok(Tensor::of(&item, unsafe { Data::host(buffer, 0, len) }))
    }

    /// The file of an item.
    fn file(&self, item: &Planned) -> Result<&SourceFile> {
        let shard = item.source().shard();
        let slot = &self.files[shard];
        if let Some(file) = slot.get() {
            return Ok(file);
        }
        let file = open_shard(&self.checkpoint, std::slice::from_ref(item), shard)?;
        Ok(slot.get_or_init(|| file))
    }

    /// Reads a small item.
    fn fill(&self, item: &Planned, bytes: &mut [u8]) -> Result<()> {
        let located = |e| locate_in(e, std::iter::once(item.source()));
        if item.source_len() == 0 {
            return Ok(());
        }
        let file = self.file(item)?;
        piece_of(item, 0)?.read(file, bytes).map_err(located)?;
        file.verify_handle().map_err(located)
    }
}
