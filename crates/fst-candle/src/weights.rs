//! The builder: what is read, when, and how it is given out.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::{SimpleBackend, VarBuilderArgs};
use fst::{Checkpoint, Engine, Loader, TensorInfo};

use crate::backend::{Sharded, Whole};
use crate::background::{Background, Plan};
use crate::error::{self, wrapped};
use crate::paths::Paths;

pub(crate) type OnProgress = Arc<dyn Fn(&Progress) + Send + Sync>;
type Ahead = Arc<dyn Fn(&TensorInfo) -> bool + Send + Sync>;

/// How far reading is, of what is read before somebody asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes of the files that have been read.
    pub bytes_done: u64,
    /// Bytes of the files to read in all.
    pub bytes_total: u64,
    /// Tensors that are there.
    pub tensors_done: usize,
    /// Tensors to read in all.
    pub tensors_total: usize,
}

/// What becomes of a tensor that was given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Repeats {
    /// It is kept as long as the `VarBuilder` lives, and whoever asks again shares its memory. The right
    /// choice for models that keep what they ask for.
    #[default]
    Share,
    /// It is handed over, and read again for whoever asks again. The right choice for models that make
    /// something else of their weights and drop them, as quantisation while loading does.
    ReadAgain,
}

/// Says what a `VarBuilder` reads and how, and makes it.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use fst_candle::Weights;
///
/// let vb = Weights::open("model")?
///     .overlay("patch.safetensors")?
///     .rename(|tensor| tensor.name().strip_prefix("model.").map(str::to_owned))?
///     .read_ahead(|tensor| !tensor.name().starts_with("vision."))
///     .on_progress(|progress| eprint!("\r{} of {}", progress.bytes_done, progress.bytes_total))
///     .var_builder(DType::BF16, &Device::Cpu)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct Weights {
    checkpoint: Checkpoint,
    loader: Loader,
    ahead: Option<Ahead>,
    budget: Option<u64>,
    repeats: Repeats,
    on_progress: Option<OnProgress>,
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weights")
            .field("checkpoint", &self.checkpoint)
            .field("budget", &self.budget)
            .field("repeats", &self.repeats)
            .finish_non_exhaustive()
    }
}

impl Weights {
    /// Opens a checkpoint: reads its headers.
    ///
    /// # Errors
    ///
    /// What is wrong with its files.
    pub fn open(paths: impl Paths) -> Result<Self> {
        Ok(Self {
            checkpoint: paths.open().map_err(wrapped)?,
            loader: Loader::new(),
            ahead: None,
            budget: None,
            repeats: Repeats::default(),
            on_progress: None,
        })
    }

    /// Lays another checkpoint over: of two tensors by one name, its own counts.
    ///
    /// # Errors
    ///
    /// What is wrong with its files.
    pub fn overlay(mut self, paths: impl Paths) -> Result<Self> {
        self.checkpoint = self.checkpoint.overlay(&paths.open().map_err(wrapped)?);
        Ok(self)
    }

    /// Gives tensors other names, those for which `rename` has one. (`VarBuilder::rename_f` translates the
    /// names that the model asks for; this one those of the files.)
    ///
    /// # Errors
    ///
    /// Two tensors would have one name.
    pub fn rename(mut self, rename: impl FnMut(&TensorInfo) -> Option<String>) -> Result<Self> {
        let renamed =
            self.checkpoint.renamed(rename).map_err(|error| wrapped(fst::Error::from(error)))?;
        self.checkpoint = renamed;
        Ok(self)
    }

    /// Reads before it is asked for only what `wanted` says yes to; other tensors are read when somebody
    /// asks for them, and never if nobody does. Without this, all are read.
    #[must_use]
    pub fn read_ahead(
        mut self,
        wanted: impl Fn(&TensorInfo) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.ahead = Some(Arc::new(wanted));
        self
    }

    /// The most bytes of tensors that are in memory before somebody asks for them. Without it, all of them
    /// may be, and a checkpoint that is larger than the available memory is refused.
    #[must_use]
    pub fn budget(mut self, bytes: u64) -> Self {
        self.budget = Some(bytes);
        self
    }

    /// What becomes of tensors that were given out.
    #[must_use]
    pub fn repeats(mut self, repeats: Repeats) -> Self {
        self.repeats = repeats;
        self
    }

    /// Calls `hook` about twenty times a second while tensors are read, from the threads that read.
    #[must_use]
    pub fn on_progress(mut self, hook: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        self.on_progress = Some(Arc::new(hook));
        self
    }

    /// How bytes get from the files into memory, instead of the fastest way.
    #[must_use]
    pub fn engine(mut self, engine: Engine) -> Self {
        self.loader = self.loader.engine(engine);
        self
    }

    /// Number of reader threads, instead of one that suits the machine.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.loader = self.loader.workers(workers);
        self
    }

    /// The checkpoint: names, shapes and types of its tensors.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Starts reading, and returns a `VarBuilder` at once. Floating-point tensors are converted to `dtype`
    /// while they are read.
    ///
    /// # Errors
    ///
    /// There is less memory than the tensors need, or no thread to be had.
    pub fn var_builder(self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
        Ok(VarBuilder::from_backend(self.backend(dtype, device)?, dtype, device.clone()))
    }

    /// What stands behind the `VarBuilder`, for engines that take a backend of candle's kind into a builder of
    /// their own.
    ///
    /// # Errors
    ///
    /// As for [`var_builder`](Self::var_builder).
    pub fn backend(self, dtype: DType, device: &Device) -> Result<Box<dyn SimpleBackend>> {
        Ok(Box::new(Whole(self.start(dtype, device, None)?)))
    }

    /// A `VarBuilder` of which each tensor can be asked for in part, for tensor parallelism: with
    /// [`Shard`](candle_nn::var_builder::Shard) as a hint, as candle's `ShardedVarBuilder`. Only the part
    /// is read, when it is asked for. What [`read_ahead`](Self::read_ahead) says yes to is read whole
    /// before that; without it, nothing is.
    ///
    /// # Errors
    ///
    /// As for [`var_builder`](Self::var_builder).
    pub fn sharded(
        self,
        dtype: DType,
        device: &Device,
    ) -> Result<VarBuilderArgs<'static, Sharded>> {
        let backend = Sharded(self.start(dtype, device, Some(|_| false))?);
        Ok(VarBuilderArgs::new_with_args(backend, dtype, device))
    }

    /// Reads all tensors (or those that [`read_ahead`](Self::read_ahead) says yes to), as they are.
    ///
    /// # Errors
    ///
    /// What is wrong with the files, elements that candle has no type for, or too little memory.
    pub fn load(mut self, device: &Device) -> Result<HashMap<String, Tensor>> {
        let ahead = self.ahead.clone();
        let wanted = |info: &&TensorInfo| ahead.as_ref().is_none_or(|ahead| ahead(info));
        let wanted = self.checkpoint.tensors().iter().filter(wanted);
        let names: Vec<String> = wanted.map(|info| info.name().to_owned()).collect();
        self.budget = None;
        self.repeats = Repeats::ReadAgain;
        let all = self.start(None, device, None)?;
        let get = |name: String| all.get(&name, None, None, device).map(|tensor| (name, tensor));
        names.into_iter().map(get).collect()
    }

    fn start(
        self,
        dtype: impl Into<Option<DType>>,
        device: &Device,
        default: Option<fn(&TensorInfo) -> bool>,
    ) -> Result<Background> {
        let Self { checkpoint, loader, ahead, budget, repeats, on_progress } = self;
        let (dtype, device) = (dtype.into(), device.clone());
        let plan = Plan { checkpoint, loader, dtype, device, budget, repeats, on_progress };
        let all = |_: &TensorInfo| true;
        let ahead = match (&ahead, &default) {
            (Some(ahead), _) => &**ahead,
            (None, Some(default)) => default,
            (None, None) => &all,
        };
        Background::start(plan, ahead).map_err(error::start)
    }
}
