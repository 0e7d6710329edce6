#![doc = include_str!("../README.md")]

#[cfg(target_endian = "big")]
compile_error!("the format is little-endian, and its bytes become burn's numbers as they are");

mod source;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use burn_store::burn_pack::Tensor as PackTensor;
use burn_store::{
    ApplyError, ApplyResult, IdentityAdapter, KeyRemapper, ModuleAdapter, ModuleSnapshot,
    ModuleStore, PathFilter,
};
use fst::{Checkpoint, Loader};

use source::Source;

/// Why a module was not loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The checkpoint cannot be opened or read.
    #[error(transparent)]
    Load(#[from] fst::Error),
    /// burn has no type for the elements of a tensor.
    #[error(
        "tensor {tensor:?} holds {dtype}, which burn has no type for: leave it out by Loader::select, or convert it by Loader::dtype"
    )]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Type of its elements.
        dtype: fst::Dtype,
    },
    /// Two tensors have one name once they are renamed.
    #[error("two tensors are named {name:?} once they are renamed")]
    Name {
        /// The name.
        name: String,
    },
    /// Tensors were found, and could not be applied.
    #[error("tensors cannot be applied to the module: {errors:?}")]
    Apply {
        /// Which and why.
        errors: Vec<ApplyError>,
    },
    /// The module has tensors that the checkpoint lacks.
    #[error("the checkpoint has no tensors by these names: {}; with allow_partial(true), they stay as they are", names.join(", "))]
    Missing {
        /// Their paths in the module.
        names: Vec<String>,
    },
    /// The store was to be written to.
    #[error("fst-burn does not write: save with burn-store's SafetensorsStore")]
    ReadOnly,
}

/// A checkpoint, as burn's modules load from it.
///
/// Reading begins with [`apply_to`](ModuleStore::apply_to) (that is, `module.load_from(&mut store)`); single
/// tensors are read when their bytes are asked for.
pub struct Store {
    checkpoint: Checkpoint,
    loader: Loader,
    filter: PathFilter,
    remapper: KeyRemapper,
    adapter: Box<dyn ModuleAdapter>,
    allow_partial: bool,
    validate: bool,
    skip_enum_variants: bool,
    opened: Option<Opened>,
}

/// What a checkpoint has.
struct Opened {
    source: Arc<Source>,
    /// By their names once they are renamed.
    tensors: BTreeMap<String, PackTensor>,
    /// Names in the checkpoint, by the same.
    origins: BTreeMap<String, String>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("checkpoint", &self.checkpoint).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens a checkpoint: a `.safetensors` file, an index, or a folder that holds either. Reads headers only.
    ///
    /// # Errors
    ///
    /// [`StoreError::Load`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let checkpoint = Checkpoint::open(path).map_err(fst::Error::from)?;
        Ok(Self::with(checkpoint, Loader::new()))
    }

    /// A checkpoint that is open already, read as `loader` says, into host memory.
    pub fn with(checkpoint: Checkpoint, loader: Loader) -> Self {
        Self {
            checkpoint,
            loader: loader.device(fst::Device::host()),
            filter: PathFilter::new(),
            remapper: KeyRemapper::new(),
            adapter: Box::new(IdentityAdapter),
            allow_partial: false,
            validate: true,
            skip_enum_variants: false,
            opened: None,
        }
    }

    /// Applies to these paths of the module only; the others' tensors are not read either.
    #[must_use]
    pub fn filter(mut self, filter: PathFilter) -> Self {
        self.filter = filter;
        self
    }

    /// Gives the checkpoint's tensors other names.
    #[must_use]
    pub fn remap(mut self, remapper: KeyRemapper) -> Self {
        (self.remapper, self.opened) = (remapper, None);
        self
    }

    /// Makes a module's tensors of a checkpoint's, as `PyTorchToBurnAdapter` does.
    #[must_use]
    pub fn with_from_adapter(mut self, adapter: impl ModuleAdapter + 'static) -> Self {
        self.adapter = Box::new(adapter);
        self
    }

    /// Whether tensors of the module that the checkpoint lacks stay as they are, instead of an error.
    #[must_use]
    pub fn allow_partial(mut self, allow: bool) -> Self {
        self.allow_partial = allow;
        self
    }

    /// Whether tensors that cannot be applied are an error (the default), or only said in the result. A tensor
    /// that cannot be read is always an error.
    #[must_use]
    pub fn validate(mut self, validate: bool) -> Self {
        self.validate = validate;
        self
    }

    /// Whether names of enum variants are left out of the module's paths.
    #[must_use]
    pub fn skip_enum_variants(mut self, skip: bool) -> Self {
        self.skip_enum_variants = skip;
        self
    }

    /// The tensors, none of them read.
    fn find(&mut self) -> Result<&Opened, StoreError> {
        let opened = match self.opened.take() {
            Some(opened) => opened,
            None => self.look()?,
        };
        Ok(self.opened.insert(opened))
    }

    fn look(&self) -> Result<Opened, StoreError> {
        let source = Arc::new(Source::new(self.loader.reader(&self.checkpoint)));
        let planned = self.loader.planned(&self.checkpoint)?;
        let (mut tensors, mut origins) = (Vec::new(), Vec::new());
        for planned in planned {
            origins.push(planned.source().name().to_owned());
            tensors.push(source::tensor(&source, planned)?);
        }
        if !self.remapper.is_empty() {
            // It keeps the order.
            tensors = self.remapper.remap(tensors).0;
        }
        let names: Vec<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
        let origins = names.into_iter().zip(origins).collect();
        let mut by_name = BTreeMap::new();
        for tensor in tensors {
            if let Some(twice) = by_name.insert(tensor.name.clone(), tensor) {
                return Err(StoreError::Name { name: twice.name });
            }
        }
        Ok(Opened { source, tensors: by_name, origins })
    }
}

impl ModuleStore for Store {
    type Error = StoreError;

    /// Refused.
    fn collect_from<M: ModuleSnapshot>(&mut self, _: &M) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly)
    }

    fn apply_to<M: ModuleSnapshot>(&mut self, module: &mut M) -> Result<ApplyResult, StoreError> {
        let filter = (!self.filter.is_empty()).then(|| self.filter.clone());
        let (adapter, skip) = (self.adapter.clone(), self.skip_enum_variants);
        let (mut loader, checkpoint) = (self.loader.clone(), self.checkpoint.clone());
        let Opened { source, tensors, origins } = self.find()?;
        if let Some(filter) = &filter {
            let wanted = origins.iter().filter(|(name, _)| filter.matches(name));
            let wanted: HashSet<String> = wanted.map(|(_, origin)| origin.clone()).collect();
            loader = loader.select_with(move |info| wanted.contains(info.name()));
        }
        let reading = source.read_ahead(loader.start(&checkpoint)?);
        let tensors = tensors.values().cloned().collect();
        let result = module.apply(tensors, filter, Some(adapter), skip);
        if let Some(error) = reading.end() {
            return Err(error.into());
        }
        if self.validate && !result.errors.is_empty() {
            return Err(StoreError::Apply { errors: result.errors });
        }
        if !self.allow_partial && !result.missing.is_empty() {
            let names = result.missing.into_iter().map(|(name, _)| name).collect();
            return Err(StoreError::Missing { names });
        }
        Ok(result)
    }

    fn get_tensor(&mut self, name: &str) -> Result<Option<&PackTensor>, StoreError> {
        Ok(self.find()?.tensors.get(name))
    }

    fn get_all_tensors(&mut self) -> Result<&BTreeMap<String, PackTensor>, StoreError> {
        Ok(&self.find()?.tensors)
    }

    fn keys(&mut self) -> Result<Vec<String>, StoreError> {
        Ok(self.find()?.tensors.keys().cloned().collect())
    }
}
