//! Devices: which there are, what they offer, and the context that all work goes through.

use crate::cuda::modules::Modules;
use crate::cuda::sys::{self as driver, checked};
use crate::error::{CudaVersion, Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use std::ffi::{CStr, c_char};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A CUDA device, held by a reference to its primary context: the one that cudarc, candle and
/// PyTorch use too, so memory passes between them and this crate.
///
/// Clones are cheap and share one reference, given back when the last of them and the last object
/// made through them is gone.
#[derive(Clone)]
pub struct CudaDevice {
    inner: Arc<Inner>,
}

struct Inner {
    ordinal: usize,
    device: sys::CUdevice,
    /// The primary context, retained once by this struct.
    context: sys::CUcontext,
    name: String,
    pci_bus_id: String,
    numa_node: Option<u32>,
    capability: (u32, u32),
    total: u64,
    processors: u32,
    modules: Modules,
}

// SAFETY: the context handle is valid from any thread while it is retained, which this struct sees
// to; the driver API is thread-safe.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing is mutated.
unsafe impl Sync for Inner {}

/// Devices in use, so that opening one twice shares its context.
static OPEN: Mutex<Vec<(usize, Weak<Inner>)>> = Mutex::new(Vec::new());

/// Bytes free and in all on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes free.
    pub free: u64,
    /// Bytes in all.
    pub total: u64,
}

impl CudaDevice {
    /// Whether there is a usable driver with at least one device.
    pub fn available() -> bool {
        Self::count().is_ok_and(|n| n > 0)
    }

    /// Number of devices that the process may use, or why there is no usable driver.
    pub fn count() -> Result<usize> {
        match driver::driver() {
            Ok(_) => {}
            Err(Error::NoDevice { .. }) => return Ok(0),
            Err(error) => return Err(error),
        }
        let mut count = 0;
        // SAFETY: the driver is initialised; a valid out pointer.
        let result = unsafe { sys::cuDeviceGetCount(&mut count) };
        checked(result, "cuDeviceGetCount", 0)?;
        Ok(count.max(0) as usize)
    }

    /// Opens device `ordinal`, counted from 0 among those that the process may use.
    ///
    /// The first opening in a process creates the device's context, which takes a fraction of a
    /// second on real hardware.
    pub fn open(ordinal: usize) -> Result<Self> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inner) = open.iter().find(|(n, _)| *n == ordinal).and_then(|(_, w)| w.upgrade())
        {
            return Ok(Self { inner });
        }
        let inner = Arc::new(Inner::new(ordinal)?);
        open.retain(|(n, weak)| *n != ordinal && weak.strong_count() > 0);
        open.push((ordinal, Arc::downgrade(&inner)));
        Ok(Self { inner })
    }

    /// The number it was opened by.
    pub fn ordinal(&self) -> usize {
        self.inner.ordinal
    }

    /// The product's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The address on the PCI bus, as `0000:3b:00.0`, lower case as in sysfs.
    pub fn pci_bus_id(&self) -> &str {
        &self.inner.pci_bus_id
    }

    /// The identity of the device, or of the part of one that is a device of its own (MIG): no other
    /// device has it, on any machine.
    pub fn uuid(&self) -> Result<[u8; 16]> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the driver is initialised and the device is open; a valid out pointer.
        let result = unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, self.inner.device) };
        self.check(result, "cuDeviceGetUuid")?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// The NUMA node that the device hangs on, where the system knows.
    pub fn numa_node(&self) -> Option<u32> {
        self.inner.numa_node
    }

    /// Compute capability, such as (9, 0).
    pub fn compute_capability(&self) -> (u32, u32) {
        self.inner.capability
    }

    /// Bytes of memory that the device has.
    pub fn total_memory(&self) -> u64 {
        self.inner.total
    }

    /// Number of multiprocessors.
    pub fn processors(&self) -> u32 {
        self.inner.processors
    }

    /// The CUDA version that the driver offers.
    pub fn driver_version(&self) -> Result<CudaVersion> {
        Ok(driver::driver()?.version)
    }

    /// The name under which the driver's library was opened.
    pub fn driver_library() -> Result<&'static str> {
        Ok(driver::driver()?.library)
    }

    /// Memory free now.
    pub fn memory(&self) -> Result<DeviceMemory> {
        let _current = self.make_current()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: a context is current; valid out pointers.
        let result = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        self.check(result, "cuMemGetInfo")?;
        Ok(DeviceMemory { free: free as u64, total: total as u64 })
    }

    /// Whether read-only host mappings can be registered for direct transfers.
    pub fn can_register_read_only(&self) -> bool {
        self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED)
            .is_ok_and(|v| v > 0)
    }

    /// Whether the device has no memory but the host's, and reads all of it by the host's addresses, as
    /// in DGX Spark. A load to it then fills host memory, of which the device needs no copy.
    ///
    /// A device that reads host memory and has memory of its own, as in GH200 and GB200, is none of these:
    /// tensors belong into the faster memory.
    pub fn shares_host_memory(&self) -> bool {
        let tables = Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES;
        [Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED, tables]
            .into_iter()
            .all(|attribute| self.attribute(attribute).is_ok_and(|value| value > 0))
    }

    /// Whether one call of the driver makes many copies from pinned memory (CUDA 12.8 and later);
    /// without, kernels scatter many small ones.
    ///
    /// The call takes addresses as the device has them. Where the device knows registered memory by
    /// others than the host does, it would read what is not there: that kills the context.
    pub fn copies_in_batches(&self) -> bool {
        let same = Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
        driver::has_batch() && self.attribute(same).is_ok_and(|v| v > 0)
    }

    /// Waits for all work of the device's context, of other libraries too.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: a context is current.
        let result = unsafe { sys::cuCtxSynchronize() };
        self.check(result, "cuCtxSynchronize")
    }

    /// The primary context's handle, valid while this value lives.
    pub fn context(&self) -> sys::CUcontext {
        self.inner.context
    }

    /// Makes the device's context current to the calling thread until the guard is dropped; then
    /// the one before is current again, as callers of other libraries expect.
    pub fn make_current(&self) -> Result<CurrentContext> {
        // SAFETY: the context is retained.
        let result = unsafe { sys::cuCtxPushCurrent_v2(self.inner.context) };
        self.check(result, "cuCtxPushCurrent")?;
        Ok(CurrentContext { _not_send: std::marker::PhantomData })
    }

    pub(crate) fn check(&self, result: sys::CUresult, call: &'static str) -> Result<()> {
        checked(result, call, self.inner.ordinal)
    }

    pub(crate) fn modules(&self) -> &Modules {
        &self.inner.modules
    }

    fn attribute(&self, attribute: Attribute) -> Result<i32> {
        attribute_of(self.inner.device, attribute, self.inner.ordinal)
    }
}

impl PartialEq for CudaDevice {
    fn eq(&self, other: &Self) -> bool {
        self.inner.ordinal == other.inner.ordinal
    }
}

impl Eq for CudaDevice {}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice")
            .field("ordinal", &self.inner.ordinal)
            .field("name", &self.inner.name)
            .field("pci_bus_id", &self.inner.pci_bus_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{}", self.inner.ordinal)
    }
}

/// A context made current to this thread; see [`CudaDevice::make_current`].
#[derive(Debug)]
#[must_use = "the context is current only while this lives"]
pub struct CurrentContext {
    /// The stack of contexts belongs to the thread.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl Drop for CurrentContext {
    fn drop(&mut self) {
        let mut old = std::ptr::null_mut();
        // SAFETY: pops what `make_current` pushed on this thread. It can fail only when the driver
        // is going away with the process, and then there is nothing to restore.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut old) };
    }
}

fn attribute_of(device: sys::CUdevice, attribute: Attribute, ordinal: usize) -> Result<i32> {
    let mut value = 0;
    // SAFETY: a device number from the driver; a valid out pointer.
    let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
    checked(result, "cuDeviceGetAttribute", ordinal)?;
    Ok(value)
}

/// Asks for a text of the driver's by a function that fills a buffer.
fn text_of(fill: impl FnOnce(*mut c_char, i32) -> Result<()>) -> Result<String> {
    let mut buffer = [0u8; 256];
    fill(buffer.as_mut_ptr().cast(), buffer.len() as i32 - 1)?;
    Ok(CStr::from_bytes_until_nul(&buffer)
        .map(|t| t.to_string_lossy().into_owned())
        .unwrap_or_default())
}

impl Inner {
    fn new(ordinal: usize) -> Result<Self> {
        let mut device = 0;
        // SAFETY: the driver is initialised (a count was asked for); valid out pointers of the
        // stated sizes throughout.
        unsafe {
            checked(sys::cuDeviceGet(&mut device, ordinal as i32), "cuDeviceGet", ordinal)?;
            let name = text_of(|p, n| {
                checked(sys::cuDeviceGetName(p, n, device), "cuDeviceGetName", ordinal)
            })?;
            let pci_bus_id = text_of(|p, n| {
                checked(sys::cuDeviceGetPCIBusId(p, n, device), "cuDeviceGetPCIBusId", ordinal)
            })?
            .to_ascii_lowercase();
            let mut total = 0usize;
            let result = sys::cuDeviceTotalMem_v2(&mut total, device);
            checked(result, "cuDeviceTotalMem", ordinal)?;
            let capability = (
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            );
            let capability = (
                attribute_of(device, capability.0, ordinal)?.max(0) as u32,
                attribute_of(device, capability.1, ordinal)?.max(0) as u32,
            );
            let processors = Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
            let processors = attribute_of(device, processors, ordinal)?.max(1) as u32;
            let numa_node = numa_node(&pci_bus_id, Path::new("/sys/bus/pci/devices"));
            let mut context = std::ptr::null_mut();
            let result = sys::cuDevicePrimaryCtxRetain(&mut context, device);
            checked(result, "cuDevicePrimaryCtxRetain", ordinal)?;
            Ok(Self {
                ordinal,
                device,
                context,
                name,
                pci_bus_id,
                numa_node,
                capability,
                total: total as u64,
                processors,
                modules: Modules::default(),
            })
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the context is retained; pushed and popped on this thread.
        unsafe {
            if sys::cuCtxPushCurrent_v2(self.context) == sys::CUresult::CUDA_SUCCESS {
                self.modules.unload();
                let _ = sys::cuCtxPopCurrent_v2(&mut std::ptr::null_mut());
            }
        }
        // SAFETY: retained once in `new`. A failure means that the driver is shutting down.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Reads `numa_node` of a PCI device; `None` where the system does not know (it says -1).
fn numa_node(pci_bus_id: &str, devices: &Path) -> Option<u32> {
    let text = std::fs::read_to_string(devices.join(pci_bus_id).join("numa_node")).ok()?;
    text.trim().parse::<i32>().ok().and_then(|n| u32::try_from(n).ok())
}
