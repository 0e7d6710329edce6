//! What is wanted of one tensor, and what comes of a loader's wishes.

use std::ops::Range;
use std::path::{Path, PathBuf};

use fst_format::{Checkpoint, Dtype};

use crate::error::Result;
use crate::loader::Loader;
use crate::options::Item;

/// What is wanted of one tensor; see [`Loader::request`]. What it does not say is as the loader says.
///
/// ```
/// use fst::{Dtype, Request};
///
/// let whole = Request::from("lm_head.weight");
/// let part = Request::new("model.embed_tokens.weight").slice(0, 0..1000).dtype(Dtype::F32).named("embed");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub(crate) tensor: String,
    pub(crate) name: Option<String>,
    pub(crate) dtype: Option<Dtype>,
    pub(crate) slice: Option<(usize, Range<usize>)>,
}

impl Request {
    /// The tensor of this name in the checkpoint.
    pub fn new(tensor: impl Into<String>) -> Self {
        Self { tensor: tensor.into(), name: None, dtype: None, slice: None }
    }

    /// Calls the loaded tensor so.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Converts it to this type of element, if it is of a floating-point type.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Loads only positions `range` of dimension `dim`.
    #[must_use]
    pub fn slice(mut self, dim: usize, range: Range<usize>) -> Self {
        self.slice = Some((dim, range));
        self
    }
}

impl<S: Into<String>> From<S> for Request {
    fn from(tensor: S) -> Self {
        Self::new(tensor)
    }
}

/// A tensor that a loader would load; see [`Loader::planned`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Planned {
    /// Its name once it is loaded.
    pub name: String,
    /// Its name in the checkpoint.
    pub source: String,
    /// Type of the loaded elements.
    pub dtype: Dtype,
    /// Dimensions as loaded, outermost first.
    pub shape: Vec<usize>,
    /// Bytes as loaded.
    pub bytes: u64,
    /// The file that holds it.
    path: PathBuf,
    /// Its bytes in that file, of which a slice takes a part.
    pub file_range: Range<u64>,
}

impl Planned {
    pub(crate) fn of(item: &Item) -> Self {
        Self {
            name: item.name().to_owned(),
            source: item.info.name().to_owned(),
            dtype: item.dtype,
            shape: item.shape().to_vec(),
            bytes: item.len(),
            path: item.info.path().to_owned(),
            file_range: item.info.file_range(),
        }
    }

    /// The file that holds it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Loader {
    /// Loads exactly these tensors, each as its request says; with [patterns](Self::select), besides those
    /// that the patterns select. A name is looked up, not searched for. Each tensor may be asked for once,
    /// and names of loaded tensors must differ.
    ///
    /// ```no_run
    /// use fst::{Checkpoint, Dtype, Loader, Request};
    ///
    /// let checkpoint = Checkpoint::open("model")?;
    /// let tensors = Loader::new()
    ///     .dtype(Dtype::BF16)
    ///     .request([
    ///         Request::new("model.norm.weight").dtype(Dtype::F32).named("norm"),
    ///         Request::from("lm_head.weight"),
    ///     ])
    ///     .load(&checkpoint)?;
    /// println!("{:?}", tensors.get("norm")?.dtype());
    /// # Ok::<(), fst::Error>(())
    /// ```
    #[must_use]
    pub fn request<R: Into<Request>>(mut self, requests: impl IntoIterator<Item = R>) -> Self {
        self.selection.add_requests(requests.into_iter().map(Into::into));
        self
    }

    /// What would be loaded: after selection, slices, conversion and new names, in the order of the files.
    /// Reads nothing.
    ///
    /// # Errors
    ///
    /// What is wrong with the request.
    pub fn planned(&self, checkpoint: &Checkpoint) -> Result<Vec<Planned>> {
        Ok(self.selection.resolve(checkpoint)?.iter().map(Planned::of).collect())
    }
}
