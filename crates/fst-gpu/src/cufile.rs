//! NVIDIA GPUDirect Storage: reads from storage into device memory through cuFile.
//!
//! The library is opened at run time under the names that installations and wheels give it.
//! Without the `nvidia-fs` kernel module cuFile may still work in its compatibility mode, where it
//! reads into host memory and copies: then the pinned pipeline is the faster way, and
//! [`GdsStatus`] says so.

use std::path::PathBuf;

use fst_io::sink::SinkError;

use crate::error::Error;

#[cfg(feature = "cuda")]
pub use crate::cuda::cufile::{
    CUFILE_LIBRARIES, CuFile, GdsArena, GdsFile, GdsOptions, GdsStats, read,
};

/// What can go wrong with cuFile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CuFileError {
    /// The library is not there.
    #[error("no cuFile library: looked for {}; {reason}", looked_for.join(", "))]
    NotFound {
        /// The names tried.
        looked_for: Vec<String>,
        /// The loader's words for the last of them.
        reason: String,
    },
    /// The library lacks a function.
    #[error("the cuFile library {library} lacks {symbol}")]
    MissingSymbol {
        /// The library opened.
        library: String,
        /// The first function not found in it.
        symbol: &'static str,
    },
    /// The kernel's list of modules cannot be read. The driver is not opened then: the library would
    /// look for the list without end.
    #[error(
        "cuFile is not opened without {}, for which it would wait for ever: {reason}; \
         mount /proc, or use another engine",
        path.display()
    )]
    NoModuleList {
        /// The list.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// The `nvidia-fs` module is loaded and its device nodes are missing. The driver is not opened
    /// then: the library would close descriptors that are not its own.
    #[error(
        "the nvidia-fs module is loaded, and {} is missing: make its device nodes visible \
         (in a container, pass /dev/nvidia-fs*), or use another engine",
        path.display()
    )]
    NoDeviceNode {
        /// The first node.
        path: PathBuf,
    },
    /// A call failed.
    #[error("{call} failed: {} ({code}), CUDA code {cuda}", code_name(*code))]
    Call {
        /// The call.
        call: &'static str,
        /// `CUfileOpError`.
        code: i32,
        /// The `CUresult` beside it, 0 for none.
        cuda: i32,
    },
    /// A read failed with a system error.
    #[error("cuFileRead at byte {offset}: {}", std::io::Error::from_raw_os_error(*errno))]
    Read {
        /// First byte of the read in the file.
        offset: u64,
        /// `errno`.
        errno: i32,
    },
    /// A file ended before all wanted bytes were read.
    #[error("file ends at byte {end}; bytes up to {wanted} are needed")]
    Short {
        /// Where the reads ended.
        end: u64,
        /// One past the last byte wanted.
        wanted: u64,
    },
    /// The device's part failed.
    #[error(transparent)]
    Device(#[from] Error),
}

/// The name of a `CUfileOpError`.
fn code_name(code: i32) -> &'static str {
    match code {
        5001 => "the nvidia-fs driver is not loaded and compatibility mode is off",
        5002 => "invalid driver properties",
        5003 => "unsupported driver limit",
        5004 => "nvidia-fs driver version mismatch",
        5005 => "nvidia-fs driver version not readable",
        5006 => "driver closing",
        5007 => "platform not supported",
        5008 => "I/O not supported",
        5009 => "device not supported",
        5010 => "nvidia-fs driver error",
        5011 => "CUDA driver error",
        5012 => "invalid device pointer",
        5013 => "invalid memory type",
        5014 => "pointer range exceeds the allocation",
        5015 => "CUDA context mismatch",
        5016 => "invalid mapping size",
        5017 => "invalid mapping range",
        5018 => "invalid file type",
        5019 => "invalid file open flag",
        5020 => "file not opened with O_DIRECT",
        5022 => "invalid value",
        5023 => "memory already registered",
        5024 => "memory not registered",
        5025 => "permission denied",
        5026 => "driver already open",
        5027 => "file not registered",
        5028 => "file already registered",
        5029 => "device not found",
        5030 => "internal error",
        5031 => "no new file descriptor",
        5033 => "nvidia-fs setup error",
        5034 => "I/O disabled",
        5036 => "device memory could not be pinned",
        5043 => "cuFile is out of memory",
        5044 => "I/O error",
        5045 => "device memory could not be registered",
        5047 => "invalid CUDA context",
        5048 => "nvidia-fs internal error",
        _ => "cuFile error",
    }
}

/// How cuFile would move bytes on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum GdsMode {
    /// From storage to the device with no host memory in between, on file systems that allow it.
    Direct,
    /// Through host memory, by cuFile's own copies: slower than the pinned pipeline.
    Compatibility,
    /// Not at all.
    Unavailable(CuFileError),
}

/// What was found out about GPUDirect Storage.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GdsStatus {
    /// Whether the `nvidia-fs` kernel module is loaded.
    pub nvidia_fs: bool,
    /// The module's version, where it tells.
    pub nvidia_fs_version: Option<String>,
    /// The cuFile library opened, if any.
    pub library: Option<String>,
    /// The library's version.
    pub version: Option<(u32, u32)>,
    /// How it would work.
    pub mode: GdsMode,
}

/// Why a read through cuFile ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GdsError {
    /// cuFile or the device failed while bytes of a file were read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// First byte of the block.
        offset: u64,
        /// Why.
        source: CuFileError,
    },
    /// Something failed before or after reading.
    #[error(transparent)]
    CuFile(#[from] CuFileError),
    /// A file changed meanwhile.
    #[error(transparent)]
    Source(#[from] fst_io::Error),
    /// The consumer's own error.
    #[error("{0}")]
    Consumer(SinkError),
    /// The owner asked for the end.
    #[error("cancelled")]
    Cancelled,
}

impl From<Error> for GdsError {
    fn from(error: Error) -> Self {
        Self::CuFile(error.into())
    }
}
