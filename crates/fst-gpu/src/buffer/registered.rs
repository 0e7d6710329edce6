//! Host memory of the caller's, registered with the driver for direct transfers.

use crate::device::CudaDevice;
use crate::error::Result;
use cudarc::driver::sys;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

/// Host memory of the caller's, registered so that copy engines read it directly: a mapping of
/// cached pages goes to the device with no copy through staging.
pub struct RegisteredHost {
    device: CudaDevice,
    /// `len` readable bytes, kept by `_owner`, registered in `new`.
    start: NonNull<u8>,
    len: usize,
    _owner: Arc<dyn std::any::Any + Send + Sync>,
}

// SAFETY: the memory is only read, and owned by a `Send + Sync` owner.
unsafe impl Send for RegisteredHost {}
// SAFETY: as above.
unsafe impl Sync for RegisteredHost {}

/// Whether registered memory may be written by the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostAccess {
    /// The device only reads: pages of a read-only mapping.
    ReadOnly,
    /// The device may write.
    ReadWrite,
}

impl RegisteredHost {
    /// Registers `len` bytes at `start`. Drivers and file systems may refuse file-backed pages:
    /// then the error says so, and the bytes go through staging.
    ///
    /// # Safety
    ///
    /// The bytes stay mapped, and, if they are a mapping of a file, the file keeps at least that
    /// length, as long as `owner` lives.
    pub unsafe fn new(
        device: &CudaDevice,
        start: NonNull<u8>,
        len: usize,
        access: HostAccess,
        owner: Arc<dyn std::any::Any + Send + Sync>,
    ) -> Result<Arc<Self>> {
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE
            | match access {
                HostAccess::ReadOnly => sys::CU_MEMHOSTREGISTER_READ_ONLY,
                HostAccess::ReadWrite => 0,
            };
        let _current = device.make_current()?;
        // SAFETY: the caller's contract.
        let result = unsafe { sys::cuMemHostRegister_v2(start.as_ptr().cast(), len, flags) };
        device.check(result, "cuMemHostRegister")?;
        Ok(Arc::new(Self { device: device.clone(), start, len, _owner: owner }))
    }

    /// Address of the first byte.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for RegisteredHost {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.make_current() {
            // SAFETY: registered in `new`. Pipelines hold a reference while copies run.
            let _ = unsafe { sys::cuMemHostUnregister(self.start.as_ptr().cast()) };
        }
    }
}

impl fmt::Debug for RegisteredHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegisteredHost({}, {:?}, {} bytes)", self.device, self.start, self.len)
    }
}
