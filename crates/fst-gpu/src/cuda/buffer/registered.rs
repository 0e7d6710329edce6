//! Host memory of the caller's, registered with the driver for direct transfers.

use crate::cuda::device::CudaDevice;
use crate::error::Result;
use cudarc::driver::sys;
use std::any::Any;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Host memory of the caller's, registered so that copy engines read it directly: a mapping of
/// cached pages goes to the device with no copy through staging.
pub struct RegisteredHost {
    device: CudaDevice,
    /// `len` readable bytes, kept by `owner`, registered in `new`.
    start: NonNull<u8>,
    len: usize,
    owner: ManuallyDrop<Arc<dyn Any + Send + Sync>>,
    /// A copy engine may read the memory for ever: it stays registered, and its owner alive.
    stuck: AtomicBool,
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
    /// The bytes stay mapped as long as `owner` lives. (Of a mapped file, registration pins the
    /// pages or is refused; what becomes of the file then harms only who touches the mapping.)
    pub unsafe fn new(
        device: &CudaDevice,
        start: NonNull<u8>,
        len: usize,
        access: HostAccess,
        owner: Arc<dyn Any + Send + Sync>,
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
        let (device, owner) = (device.clone(), ManuallyDrop::new(owner));
        Ok(Arc::new(Self { device, start, len, owner, stuck: AtomicBool::new(false) }))
    }

    /// Marks the memory as possibly in use by a copy engine for ever.
    pub(crate) fn set_stuck(&self) {
        self.stuck.store(true, Ordering::Release);
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
        if self.stuck.load(Ordering::Acquire) {
            return;
        }
        if let Ok(_current) = self.device.make_current() {
            // SAFETY: registered in `new`. Pipelines hold a reference while copies run.
            let _ = unsafe { sys::cuMemHostUnregister(self.start.as_ptr().cast()) };
        }
        // SAFETY: dropped once, here.
        unsafe { ManuallyDrop::drop(&mut self.owner) };
    }
}

impl fmt::Debug for RegisteredHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegisteredHost({}, {:?}, {} bytes)", self.device, self.start, self.len)
    }
}
