//! What stands in for CUDA where the feature `cuda` is off: no device can be opened, so that there is no
//! value of the types of what is on one.

use std::convert::Infallible;
use std::ffi::c_void;
use std::sync::Arc;

use fst_io::SourceFile;

use crate::cufile::{GdsMode, GdsStatus};
use crate::device_copy::DeviceOptions;
use crate::error::{CudaVersion, Error, LoadError, Result};
use crate::load::{ArenaOptions, PieceLoad};
use crate::piece::Piece;

/// A CUDA device, of which there is none in this build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDevice(Infallible);

/// Bytes free and in all on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes free.
    pub free: u64,
    /// Bytes in all.
    pub total: u64,
}

#[allow(missing_docs, reason = "as in cuda/device.rs")]
impl CudaDevice {
    pub fn count() -> Result<usize> {
        Err(Error::FeatureOff)
    }

    pub fn open(_ordinal: usize) -> Result<Self> {
        Err(Error::FeatureOff)
    }

    pub fn ordinal(&self) -> usize {
        match self.0 {}
    }

    pub fn name(&self) -> &str {
        match self.0 {}
    }

    pub fn driver_version(&self) -> Result<CudaVersion> {
        match self.0 {}
    }

    pub fn memory(&self) -> Result<DeviceMemory> {
        match self.0 {}
    }

    pub fn context(&self) -> *mut c_void {
        match self.0 {}
    }
}

/// Memory on a device.
#[derive(Debug, Clone)]
pub struct DeviceArena(Infallible);

#[allow(missing_docs, reason = "as in cuda/buffer/device.rs")]
impl DeviceArena {
    /// # Safety
    ///
    /// None: there is no device.
    pub unsafe fn borrowed(device: &CudaDevice, _address: u64, _len: u64) -> Self {
        match device.0 {}
    }

    pub fn device(&self) -> &CudaDevice {
        match self.0 {}
    }

    pub fn address(&self) -> u64 {
        match self.0 {}
    }

    pub fn len(&self) -> u64 {
        match self.0 {}
    }

    pub fn is_empty(&self) -> bool {
        match self.0 {}
    }

    pub fn copy_to_host(&self, _offset: u64, _to: &mut [u8]) -> Result<()> {
        match self.0 {}
    }
}

/// One arena on a device, and the part of a memory budget that it takes.
#[derive(Debug)]
pub struct CudaMemory(Infallible);

impl CudaMemory {
    /// The arena.
    pub fn arena(&self) -> &DeviceArena {
        match self.0 {}
    }
}

pub(crate) fn load_to_devices(
    _files: Arc<Vec<SourceFile>>,
    _pieces: Vec<Piece>,
    _devices: &[Option<CudaDevice>],
    _arenas: ArenaOptions,
    _options: DeviceOptions,
) -> Result<Box<dyn PieceLoad>, LoadError> {
    Err(Error::FeatureOff.into())
}

/// Nothing is loaded to a device.
///
/// # Errors
///
/// [`Error::FeatureOff`].
///
/// # Safety
///
/// None: there is no device.
pub unsafe fn load_into_devices(
    _files: Arc<Vec<SourceFile>>,
    _pieces: Vec<Piece>,
    _memory: Vec<DeviceArena>,
    _options: DeviceOptions,
) -> Result<Box<dyn PieceLoad>, LoadError> {
    Err(Error::FeatureOff.into())
}

impl GdsStatus {
    /// Says that the feature is off.
    pub fn probe() -> Self {
        let mode = GdsMode::Unavailable(Error::FeatureOff.into());
        Self { nvidia_fs: false, nvidia_fs_version: None, library: None, version: None, mode }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_refused_by_an_error_that_names_the_feature() {
        assert_eq!(CudaDevice::open(0), Err(Error::FeatureOff));
        assert!(CudaDevice::count().unwrap_err().to_string().contains("feature `cuda`"));
        assert!(matches!(GdsStatus::probe().mode, GdsMode::Unavailable(_)));
    }
}
