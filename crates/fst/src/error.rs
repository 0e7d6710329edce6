//! Everything that can end a load.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fst_format::{Dtype, SelectError};
use fst_io::Engine;

use crate::device::Device;
#[cfg(feature = "dist")]
use crate::dist::DistError;
use crate::update::Difference;
use fst_format::{ManifestError, VerifyError};

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a load, or a look at a tensor, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint is bad: says file, tensor, byte range and rule.
    #[error(transparent)]
    Format(#[from] fst_format::Error),
    /// Reading failed: says file and offset.
    #[error("{source}{}", in_tensor(tensor.as_deref()))]
    Io {
        /// The tensor at the place of the failure, where there is a place.
        tensor: Option<String>,
        /// What failed.
        source: fst_io::Error,
    },
    /// A tensor that cannot be handed over for writing.
    #[error("{tensor} cannot be handed over for writing: {reason}")]
    NotWritable {
        /// Its name.
        tensor: String,
        /// Who else relies on its bytes, and what to do.
        reason: &'static str,
    },
    /// What is asked for does not suit the checkpoint; but [`UnknownTensor`](Self::UnknownTensor) is this
    /// enum's own.
    #[error(transparent)]
    Select(SelectError),
    /// There is no tensor of this name.
    #[error("no tensor named {name:?}")]
    UnknownTensor {
        /// The name asked for.
        name: String,
    },
    /// The tensor's elements are of another type than the one asked for.
    #[error("tensor {tensor:?} holds {found}, not {asked}")]
    WrongDtype {
        /// The tensor.
        tensor: String,
        /// The type asked for.
        asked: Dtype,
        /// The type of its elements.
        found: Dtype,
    },
    /// The bytes lie in another memory than where they were looked for.
    #[error("tensor {tensor:?} lies on {device}, not in host memory; copy it to the host first")]
    NotOnHost {
        /// The tensor.
        tensor: String,
        /// Where it is.
        device: Device,
    },
    /// The bytes do not start at a multiple of the element's alignment.
    #[error("tensor {tensor:?} starts at an address that is not aligned for {dtype}")]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Type of its elements.
        dtype: Dtype,
    },
    /// The memory given for a tensor is not as long as the tensor.
    #[error("tensor {tensor:?} has {expected} bytes, and the memory given for it {found}")]
    DestinationLength {
        /// The tensor.
        tensor: String,
        /// Bytes of the tensor, as loaded.
        expected: u64,
        /// Bytes given.
        found: u64,
    },
    /// The memory given for a tensor is not where the loader loads to.
    #[error("the memory given for tensor {tensor:?} is not that of {device}, which is loaded to")]
    DestinationDevice {
        /// The tensor.
        tensor: String,
        /// Where the loader loads to.
        device: Device,
    },
    /// Memory was given twice for one tensor.
    #[error("tensor {tensor:?} was given two pieces of memory")]
    DuplicateDestination {
        /// The tensor.
        tensor: String,
    },
    /// Memory was given for a tensor that is not among those selected.
    #[error("tensor {tensor:?} was given memory and is not selected")]
    NotSelected {
        /// The tensor.
        tensor: String,
    },
    /// The memory budget is too small for what must be in memory at once.
    #[error("memory budget of {budget} bytes is too small: the smallest that works is {needed}")]
    Budget {
        /// The budget given, in bytes.
        budget: u64,
        /// The smallest that works, in bytes.
        needed: u64,
    },
    /// There is less host memory than the load fills. See
    /// [`Loader::check_memory`](crate::Loader::check_memory).
    #[error(
        "{needed} bytes of host memory are needed, and {available} are available ({limit}); load a part, \
         map the files, or stream within a budget"
    )]
    Memory {
        /// Bytes needed, by all ranks that share the memory together.
        needed: u64,
        /// Bytes available.
        available: u64,
        /// What leaves no more.
        limit: fst_io::available::MemoryLimit,
    },
    /// The reader waits for memory that the tensors handed out so far hold.
    #[error(
        "nothing could be read for {:.1} s: tensors that are still held fill the memory budget of \
         {budget} bytes, or tensors that were read and nobody took: drop or take some, ask for them in \
         the order of the files, or allow more",
        waited.as_secs_f64()
    )]
    Stalled {
        /// The budget in bytes.
        budget: u64,
        /// How long nothing moved.
        waited: Duration,
    },
    /// The engine and the device do not go together.
    #[error("engine {engine} cannot load to {device}: {reason}")]
    Engine {
        /// The engine asked for.
        engine: Engine,
        /// The device asked for.
        device: Device,
        /// Why not.
        reason: String,
    },
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A manifest cannot be used.
    #[error("{}: {source}", path.display())]
    Manifest {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// What was loaded is not what the manifest says.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// Several ranks could not load together.
    #[cfg(feature = "dist")]
    #[error(transparent)]
    Dist(#[from] DistError),
    /// A thread that loads panicked: a mistake in this library, or in a closure that was given to it.
    #[error("a thread of the load panicked: {message}")]
    Panicked {
        /// What the panic said.
        message: String,
    },
    /// The load in the background that was to bring tensors has failed; all who ask it get this error.
    #[error(transparent)]
    Failed(Arc<Error>),
    /// The tensor was [taken](crate::Loading::take) out of the load before.
    #[error("tensor {tensor:?} was taken before; use `get` for what is asked for more than once")]
    Taken {
        /// The tensor.
        tensor: String,
    },
    /// What is loaded is not what the tensors to be [updated](crate::Loader::update) are.
    #[error("tensor {tensor:?} cannot be updated: {difference}")]
    OtherPlan {
        /// The first tensor that differs.
        tensor: String,
        /// How.
        difference: Difference,
    },
    /// An update by [sums](crate::Reread::OtherSums) lacks those of the new checkpoint.
    #[error(
        "what has changed is told by two manifests: give the new checkpoint's to Loader::verify"
    )]
    NoSums,
    /// The load was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The load took longer than [`Loader::timeout`](crate::Loader::timeout) allows.
    #[error("not done within {:.0} s", after.as_secs_f64())]
    TimedOut {
        /// What it allows.
        after: Duration,
    },
}

impl From<SelectError> for Error {
    fn from(error: SelectError) -> Self {
        match error {
            SelectError::UnknownTensor { name } => Self::UnknownTensor { name },
            other => Self::Select(other),
        }
    }
}

impl From<fst_format::ManifestFileError> for Error {
    fn from(error: fst_format::ManifestFileError) -> Self {
        Self::Manifest { path: error.path, source: error.source }
    }
}

impl From<fst_io::available::Shortage> for Error {
    fn from(shortage: fst_io::available::Shortage) -> Self {
        let fst_io::available::Shortage { needed, available, limit, .. } = shortage;
        Self::Memory { needed, available, limit }
    }
}

impl From<fst_io::Error> for Error {
    fn from(source: fst_io::Error) -> Self {
        crate::files::locate(source, &[])
    }
}

fn in_tensor(tensor: Option<&str>) -> String {
    tensor.map(|name| format!(" (tensor {name:?})")).unwrap_or_default()
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The name is no device's.
    #[error("unknown device {name:?}: expected host or cuda:N")]
    Unknown {
        /// The name given.
        name: String,
    },
    /// CUDA: no driver, no such device, out of memory, a failed call.
    #[error(transparent)]
    Cuda(#[from] fst_gpu::Error),
    /// What is to be loaded does not fit into the device's memory.
    #[error("{source}; the largest tensor is {largest:?} with {bytes} bytes")]
    TooLarge {
        /// Bytes needed and free.
        source: fst_gpu::Error,
        /// Name of the largest tensor.
        largest: String,
        /// Its bytes.
        bytes: u64,
    },
    /// GPUDirect Storage.
    #[error("{0}")]
    Gds(Box<fst_gpu::cufile::GdsError>),
    /// The bytes of the tensor are not in a CUDA device's memory.
    #[error("tensor {tensor:?} is in host memory")]
    NotOnDevice {
        /// The tensor.
        tensor: String,
    },
    /// The type of element has no counterpart there.
    #[error("{dtype} elements cannot be handed out as {as_what}")]
    NoCounterpart {
        /// The type of the elements.
        dtype: Dtype,
        /// What was asked for.
        as_what: &'static str,
    },
}
