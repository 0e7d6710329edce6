//! Where tensors are loaded to.

use std::fmt;
use std::str::FromStr;

use fst_gpu::CudaDevice;

use crate::error::{DeviceError, Error, Result};

/// A memory that tensors can be loaded into.
#[derive(Clone, Default)]
pub struct Device(Option<CudaDevice>);

impl Device {
    /// The memory of this process.
    pub fn host() -> Self {
        Self(None)
    }

    /// The memory of CUDA device `ordinal`, counted from 0 among those that the process may use.
    /// Opens the driver, which need not have been there when this program was built.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Cuda`] says what was looked for and found: no driver, one that is too old,
    /// no device of this number.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        let device = CudaDevice::open(ordinal).map_err(DeviceError::Cuda)?;
        Ok(Self(Some(device)))
    }

    /// All devices that can be used here, the host first.
    pub fn available() -> Vec<Self> {
        let count = CudaDevice::count().unwrap_or(0);
        let cuda = (0..count).filter_map(|ordinal| Self::cuda(ordinal).ok());
        std::iter::once(Self::host()).chain(cuda).collect()
    }

    /// Whether this is the memory of this process.
    pub fn is_host(&self) -> bool {
        self.0.is_none()
    }

    /// The CUDA device, for use with `fst_gpu` and cudarc; `None` for the host.
    pub fn as_cuda(&self) -> Option<&CudaDevice> {
        self.0.as_ref()
    }

    pub(crate) fn of_cuda(device: &CudaDevice) -> Self {
        Self(Some(device.clone()))
    }

    fn ordinal(&self) -> Option<usize> {
        self.as_cuda().map(CudaDevice::ordinal)
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        self.ordinal() == other.ordinal()
    }
}

impl Eq for Device {}

impl std::hash::Hash for Device {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.ordinal().hash(state);
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ordinal() {
            None => f.write_str("host"),
            Some(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({self})")
    }
}

impl FromStr for Device {
    type Err = Error;

    /// Parses `host`, or opens `cuda:N` (`cuda` alone is `cuda:0`).
    fn from_str(name: &str) -> Result<Self> {
        let unknown = || DeviceError::Unknown { name: name.to_owned() };
        match name.split_once(':') {
            None if name == "host" => Ok(Self::host()),
            None if name == "cuda" => Self::cuda(0),
            Some(("cuda", ordinal)) => Self::cuda(ordinal.parse().map_err(|_| unknown())?),
            _ => Err(unknown().into()),
        }
    }
}
