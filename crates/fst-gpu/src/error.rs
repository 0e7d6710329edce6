//! What can go wrong on the way to and on a device. Values only, so that an error can be kept,
//! cloned and given to every thread of a load.

use std::fmt;

use crate::cufile::GdsError;

/// An error of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The program was built without CUDA.
    #[error("built without CUDA: the feature `cuda` of fst is off")]
    FeatureOff,
    /// No CUDA driver library could be opened.
    #[error("no NVIDIA driver: looked for {}; {reason}", looked_for.join(", "))]
    NoDriver {
        /// The library names tried.
        looked_for: Vec<&'static str>,
        /// The loader's words for the last of them.
        reason: String,
    },
    /// The library found is no driver that this crate can use.
    #[error(
        "the driver library {library} lacks {symbol}: needed is a driver of series 525 or later"
    )]
    MissingSymbol {
        /// The library opened.
        library: String,
        /// The first function not found in it.
        symbol: String,
    },
    /// The library found is the stub that CUDA's toolkit brings for linking.
    #[error(
        "the driver library {library} that was found first is the CUDA toolkit's stub, which only \
         serves to link programs: take its folder (stubs) out of LD_LIBRARY_PATH"
    )]
    StubDriver {
        /// The library opened.
        library: String,
    },
    /// The driver is older than CUDA 12.0.
    #[error("the driver is too old: it offers CUDA {found}, needed is {needed} (series 525)")]
    DriverTooOld {
        /// What the driver offers.
        found: CudaVersion,
        /// The least that works.
        needed: CudaVersion,
    },
    /// There is a driver, but no device of this number.
    #[error("no CUDA device {ordinal}: the driver shows {count}")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// Devices visible to the process (`CUDA_VISIBLE_DEVICES` limits them).
        count: usize,
    },
    /// A device allocation does not fit.
    #[error("out of memory on cuda:{device}: {needed} bytes needed, {free} of {total} free")]
    OutOfMemory {
        /// The device's number.
        device: usize,
        /// Bytes asked for.
        needed: u64,
        /// Bytes free when it was refused.
        free: u64,
        /// Bytes that the device has.
        total: u64,
    },
    /// Host memory for staging could not be had.
    #[error("{needed} bytes of pinned host memory refused: {code}")]
    NoPinnedMemory {
        /// Bytes asked for.
        needed: u64,
        /// The driver's reason.
        code: Code,
    },
    /// A driver call failed.
    #[error("{call} failed on cuda:{device}: {code}")]
    Driver {
        /// The call.
        call: &'static str,
        /// The device's number.
        device: usize,
        /// The driver's reason.
        code: Code,
    },
    /// A driver call failed that concerns no device yet.
    #[error("{call} failed: {code}")]
    Init {
        /// The call.
        call: &'static str,
        /// The driver's reason.
        code: Code,
    },
    /// A range lies outside the memory that it refers to.
    #[error("{what}: bytes {start}..{end} do not lie in a range of {len}")]
    OutOfRange {
        /// What was addressed.
        what: &'static str,
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
        /// Bytes that there are.
        len: u64,
    },
    /// An address does not suit the elements that it is to be read as.
    #[error("address {address:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// The address.
        address: u64,
        /// Bytes that it should be a multiple of.
        align: u64,
    },
    /// A setting that cannot work.
    #[error("{what}: {value} is not in {least}..={most}")]
    BadSetting {
        /// The setting.
        what: &'static str,
        /// The value given.
        value: u64,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        most: u64,
    },
    /// Two objects of different devices were put together.
    #[error("memory of cuda:{found} given to work on cuda:{expected}")]
    WrongDevice {
        /// The device at work.
        expected: usize,
        /// The device that the memory is on.
        found: usize,
    },
    /// There is no such kernel, or it does not do what was asked of it here.
    #[error("no kernel for this: {kernel:?}")]
    #[cfg(feature = "cuda")]
    NoKernel {
        /// The kernel asked for.
        kernel: crate::kernel::Kernel,
    },
    /// A system call failed.
    #[error("{call}: {reason}")]
    System {
        /// The call.
        call: &'static str,
        /// The system's words.
        reason: String,
    },
    /// A reader gave up a block that the kernel may still write to, and ended.
    #[error("a reader lost a pinned block: the kernel no longer says whether it writes to it")]
    BlockLost,
    /// A thread of the pipeline ended without a result.
    #[error("the thread that pins staging memory could not run: {reason}")]
    Thread {
        /// The system's words.
        reason: String,
    },
}

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a load to a device failed. Pieces are named by their place in the list that the load was given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Reading, or whoever takes what was read.
    #[error(transparent)]
    Io(#[from] fst_io::Error),
    /// The device.
    #[error(transparent)]
    Cuda(#[from] Error),
    /// GPUDirect Storage.
    #[error(transparent)]
    Gds(Box<GdsError>),
    /// The pieces do not fit into the device's memory.
    #[error("{source}; the largest piece is number {largest}")]
    TooLarge {
        /// Bytes needed and free.
        source: Error,
        /// The largest piece.
        largest: usize,
    },
    /// Host memory has no room for what passes through it on the way.
    #[error(transparent)]
    Memory(#[from] fst_io::available::Shortage),
}

impl From<GdsError> for LoadError {
    fn from(error: GdsError) -> Self {
        match error {
            GdsError::Cancelled => Self::Io(fst_io::Error::Cancelled),
            GdsError::Consumer(error) => Self::Io(fst_io::Error::Sink(error)),
            GdsError::Source(error) => Self::Io(error),
            other => Self::Gds(Box::new(other)),
        }
    }
}

/// A `CUresult` as the integer that the driver gave, with the driver's own name for it.
///
/// Newer drivers return codes that no binding knows: they are kept as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Code {
    pub(crate) number: u32,
    pub(crate) name: String,
}

impl Code {
    /// The integer.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The driver's name, such as `CUDA_ERROR_ILLEGAL_ADDRESS`; empty if it has none.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.is_empty() {
            write!(f, "CUresult {}", self.number)
        } else {
            write!(f, "{} ({})", self.name, self.number)
        }
    }
}

/// A CUDA version such as 12.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CudaVersion {
    /// Before the dot.
    pub major: u32,
    /// After the dot.
    pub minor: u32,
}

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
