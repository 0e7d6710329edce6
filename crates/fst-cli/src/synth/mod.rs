//! Writes checkpoints that look like published ones and hold pseudo-random values.
//!
//! ```
//! use fst_cli::models::Model;
//! use fst_cli::synth::{Recipe, Watch};
//!
//! let folder = tempfile::tempdir()?;
//! let model = Model::find("gpt2").unwrap();
//! let recipe = Recipe::new(model).layers(1).shrink(64).shards(2);
//! let written = recipe.write(&folder.path().join("gpt2"), &Watch::default())?;
//! assert_eq!(written.files.len(), 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod content;
mod folder;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use fst::Dtype;
use fst::format::WriteError;

use crate::models::{Model, ShardError, ShardRule, ShardSpec, TensorSpec};

pub use content::Content;
use folder::{Folder, Unfinished};

/// Bytes made and written at a time.
const BLOCK: usize = 4 << 20;

/// Files written at a time; more threads than this wait for the drive.
const MAX_WRITERS: usize = 8;

/// Dimensions below this are left alone by [`Recipe::shrink`].
const SMALLEST_SHRUNK_DIM: usize = 64;

/// Which checkpoint to make: a model, cut down or changed as asked.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    model: &'static Model,
    layers: Option<usize>,
    files: Option<usize>,
    dtype: Option<Dtype>,
    seed: u64,
    shrink: usize,
}

impl Recipe {
    /// The checkpoint of `model` as published: all layers, its dtypes, its cut into files.
    pub fn new(model: &'static Model) -> Self {
        Self { model, layers: None, files: None, dtype: None, seed: 0, shrink: 1 }
    }

    /// Keeps only the first `layers` decoder layers.
    #[must_use]
    pub fn layers(self, layers: usize) -> Self {
        Self { layers: Some(layers), ..self }
    }

    /// Cuts the checkpoint into this many files of nearly equal size.
    #[must_use]
    pub fn shards(self, files: usize) -> Self {
        Self { files: Some(files), ..self }
    }

    /// Gives all tensors of a floating-point dtype this dtype.
    #[must_use]
    pub fn dtype(self, dtype: Dtype) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// Chooses other values: the same seed gives the same bytes.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Divides every dimension of 64 or more by `divisor`, rounding up: the names, dtypes and
    /// order of a large model in a checkpoint that fits a test. 0 counts as 1.
    #[must_use]
    pub fn shrink(self, divisor: usize) -> Self {
        Self { shrink: divisor.max(1), ..self }
    }

    /// The files and their tensors.
    pub fn plan(&self) -> Result<Vec<ShardSpec>, ShardError> {
        let mut tensors = self.model.first_layers(self.layers.unwrap_or(usize::MAX));
        for TensorSpec { dtype, shape, .. } in &mut tensors {
            if let Some(wanted) = self.dtype
                && is_floating_point(*dtype)
            {
                *dtype = wanted;
            }
            for dim in shape.iter_mut().filter(|dim| **dim >= SMALLEST_SHRUNK_DIM) {
                *dim = dim.div_ceil(self.shrink);
            }
        }
        let rule = self.files.map_or(self.model.shard_rule(), ShardRule::Count);
        self.model.shards(tensors, rule)
    }

    /// Writes the checkpoint into `folder`, which is made if it does not exist.
    ///
    /// Files have temporary names until all are complete, and are removed if anything goes wrong.
    /// A sharded checkpoint gets a `model.safetensors.index.json`.
    pub fn write(&self, folder: &Path, watch: &Watch<'_>) -> Result<Written, SynthError> {
        let plan = self.plan().map_err(|source| SynthError::Cut { source })?;
        let folder = Folder::prepare(folder)?;
        let needed = plan.iter().map(ShardSpec::bytes).sum();
        folder.check_space(needed)?;
        let files = write_files(&plan, self.seed, &folder, watch)?;
        Ok(Written {
            files: folder.finish(&plan, &files)?,
            tensors: plan.iter().map(|shard| shard.tensors.len()).sum(),
            bytes: needed,
        })
    }
}

/// Whether `dtype` holds floating-point numbers, complex ones and bare scales aside.
pub fn is_floating_point(dtype: Dtype) -> bool {
    matches!(
        dtype,
        Dtype::F4
            | Dtype::F6E2M3
            | Dtype::F6E3M2
            | Dtype::F8E5M2
            | Dtype::F8E4M3
            | Dtype::F8E4M3Fnuz
            | Dtype::F8E5M2Fnuz
            | Dtype::F16
            | Dtype::BF16
            | Dtype::F32
            | Dtype::F64
    )
}

/// What the caller of [`Recipe::write`] is told and can say while it runs.
#[derive(Clone, Copy, Default)]
pub struct Watch<'a> {
    /// Called with the number of bytes written since the last call, from several threads.
    pub progress: Option<&'a (dyn Fn(u64) + Sync)>,
    /// Set by the caller to stop the work.
    pub cancelled: Option<&'a AtomicBool>,
}

impl std::fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("cancelled", &self.cancelled).finish_non_exhaustive()
    }
}

/// A finished checkpoint.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Written {
    /// The safetensors files, in order.
    pub files: Vec<PathBuf>,
    /// The number of tensors.
    pub tensors: usize,
    /// The bytes of all tensors.
    pub bytes: u64,
}

/// A checkpoint that could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthError {
    /// The tensors do not fit the files asked for.
    #[error("{source}")]
    Cut {
        /// What is wrong.
        source: ShardError,
    },
    /// The folder holds a checkpoint already; nothing is overwritten.
    #[error("{}: already exists; name a folder without a checkpoint", path.display())]
    Exists {
        /// The file that is in the way.
        path: PathBuf,
    },
    /// The file system has no room for the checkpoint.
    #[error(
        "{}: no room for a checkpoint of {needed} bytes: {free} bytes are free, {} are missing",
        path.display(), needed.saturating_sub(*free)
    )]
    NoSpace {
        /// The folder.
        path: PathBuf,
        /// Bytes of the tensors; headers come on top.
        needed: u64,
        /// Bytes that this user may still write there.
        free: u64,
    },
    /// A folder or file could not be made, renamed or removed.
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A safetensors file could not be written: the drive is full, for one.
    #[error("{}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: WriteError,
    },
    /// The index of a sharded checkpoint could not be written.
    #[error("{source}")]
    Index {
        /// What went wrong, with the path.
        source: WriteError,
    },
    /// The caller stopped the work.
    #[error("{}: cancelled", path.display())]
    Cancelled {
        /// The folder.
        path: PathBuf,
    },
}

/// Writes the files of `plan` under temporary names, several at a time.
fn write_files(
    plan: &[ShardSpec],
    seed: u64,
    folder: &Folder,
    watch: &Watch<'_>,
) -> Result<Vec<Unfinished>, SynthError> {
    let writers = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let results: Mutex<Vec<(usize, Result<Unfinished, SynthError>)>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let write = || {
            let mut block = vec![0; BLOCK];
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(shard) = plan.get(index) else { break };
                if failed.load(Ordering::Relaxed) {
                    break;
                }
                let result = write_file(shard, seed, folder, &mut block, watch, &failed);
                if result.is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
                // A thread that panicked while it held the lock has left the list whole.
                let mut results = results.lock().unwrap_or_else(|poison| poison.into_inner());
                results.push((index, result));
            }
        };
        // A machine out of threads writes with those it has.
        for _ in 1..writers.min(MAX_WRITERS).min(plan.len()) {
            let _ = std::thread::Builder::new().spawn_scoped(scope, write);
        }
        write();
    });
    let mut results = results.into_inner().unwrap_or_else(|poison| poison.into_inner());
    results.sort_by_key(|&(index, ref result)| {
        // Files that stopped because another failed do not speak for the cause.
        (matches!(result, Err(SynthError::Cancelled { .. })), index)
    });
    results.into_iter().map(|(_, result)| result).collect()
}

/// Writes one file of a checkpoint.
fn write_file(
    shard: &ShardSpec,
    seed: u64,
    folder: &Folder,
    block: &mut [u8],
    watch: &Watch<'_>,
    failed: &AtomicBool,
) -> Result<Unfinished, SynthError> {
    let file = folder.file(&shard.file_name);
    let mut writer = file.create(shard)?;
    for tensor in &shard.tensors {
        let content = Content::new(seed, &tensor.name, tensor.dtype);
        let mut offset = 0;
        let bytes = tensor.bytes();
        while offset < bytes {
            let cancelled = watch.cancelled.is_some_and(|flag| flag.load(Ordering::Relaxed));
            if cancelled || failed.load(Ordering::Relaxed) {
                return Err(SynthError::Cancelled { path: folder.path().to_owned() });
            }
            let len = (bytes - offset).min(block.len() as u64) as usize;
            content.fill(offset, &mut block[..len]);
            writer.write_all(&block[..len]).map_err(|source| file.failed(source))?;
            offset += len as u64;
            if let Some(progress) = watch.progress {
                progress(len as u64);
            }
        }
    }
    writer.finish().map_err(|source| file.failed(source))?;
    Ok(file)
}
