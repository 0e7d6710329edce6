//! Device arenas: one allocation that many tensors share.

use crate::cuda::device::CudaDevice;
use crate::cuda::transfer::{Transfer, Transfers};
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::fmt;
use std::sync::Arc;

/// Alignment of tensors in an arena, in bytes: what coalesced access and every kernel library ask
/// for. The arena itself is aligned to at least that by the driver.
pub const DEVICE_ALIGN: u64 = 256;

/// One allocation on a device, freed when the last clone is gone.
///
/// Its bytes are not initialised; writing them and knowing when they are whole is the business of
/// the pipeline and its user. Addresses are integers here: reading through one needs the driver.
#[derive(Clone)]
pub struct DeviceArena {
    inner: Arc<Inner>,
}

struct Inner {
    device: CudaDevice,
    /// From `cuMemAlloc`, freed once on drop unless `borrowed`; 0 when `len` is 0.
    address: sys::CUdeviceptr,
    len: u64,
    /// Somebody else's.
    borrowed: bool,
    /// The memory, where it is the host's and the device reads it there.
    host: Option<fst_io::Piece>,
}

impl DeviceArena {
    /// Allocates `len` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] with what is free.
    pub fn new(device: &CudaDevice, len: u64) -> Result<Self> {
        let mut address = 0;
        if len > 0 {
            let _current = device.make_current()?;
            // SAFETY: a context is current; a valid out pointer.
            let result = unsafe { sys::cuMemAlloc_v2(&mut address, len as usize) };
            if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(out_of_memory(device, len));
            }
            device.check(result, "cuMemAlloc")?;
        }
        Ok(Self {
            inner: Arc::new(Inner {
                device: device.clone(),
                address,
                len,
                borrowed: false,
                host: None,
            }),
        })
    }

    /// Memory of somebody else's: it is not freed here.
    ///
    /// # Safety
    ///
    /// `len` bytes at `address` are allocated on the device, in its primary context, and stay so as
    /// long as a clone of the arena lives.
    pub unsafe fn borrowed(device: &CudaDevice, address: u64, len: u64) -> Self {
        let inner = Inner { device: device.clone(), address, len, borrowed: true, host: None };
        Self { inner: Arc::new(inner) }
    }

    /// Host memory that the device [reads where it is](CudaDevice::shares_host_memory).
    pub(crate) fn on_host(device: &CudaDevice, memory: fst_io::Piece) -> Self {
        let len = memory.len() as u64;
        let address = if len > 0 { memory.as_ptr() as u64 } else { 0 };
        let host = Some(memory);
        let inner = Inner { device: device.clone(), address, len, borrowed: true, host };
        Self { inner: Arc::new(inner) }
    }

    /// Whether `needed` bytes are free now; the error that [`new`](Self::new) would give if not.
    /// Lets a load refuse before it reads anything.
    pub fn check_fits(device: &CudaDevice, needed: u64) -> Result<()> {
        let memory = device.memory()?;
        if needed <= memory.free {
            return Ok(());
        }
        Err(Error::OutOfMemory {
            device: device.ordinal(),
            needed,
            free: memory.free,
            total: memory.total,
        })
    }

    /// Bytes that the driver takes for arenas of these lengths: whole units, which short ones share.
    pub fn footprint(lens: impl IntoIterator<Item = u64>) -> u64 {
        /// What the driver takes at a time, in bytes; it packs what is shorter than half of that.
        const UNIT: u64 = 2 << 20;
        let (mut long, mut short) = (0u64, 0u64);
        for len in lens {
            let sum = if len < UNIT / 2 { &mut short } else { &mut long };
            let taken = if len < UNIT / 2 { len } else { len.next_multiple_of(UNIT) };
            *sum = sum.saturating_add(taken);
        }
        long.saturating_add(short.div_ceil(UNIT) * UNIT)
    }

    /// The device that holds it.
    pub fn device(&self) -> &CudaDevice {
        &self.inner.device
    }

    /// Address of the first byte; 0 for an empty arena.
    pub fn address(&self) -> u64 {
        self.inner.address
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.inner.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// Address of `len` bytes from `offset` on, checked to lie inside.
    pub fn range(&self, offset: u64, len: u64) -> Result<u64> {
        let end = offset.checked_add(len).filter(|&end| end <= self.inner.len);
        if end.is_none() {
            return Err(Error::OutOfRange {
                what: "device arena",
                start: offset,
                end: offset.saturating_add(len),
                len: self.inner.len,
            });
        }
        Ok(self.inner.address + offset)
    }

    /// Clones of this arena that live, this one included.
    pub fn references(&self) -> usize {
        Arc::strong_count(&self.inner)
    }

    /// Copies bytes from the device and waits for them.
    ///
    /// Work of other streams on the same bytes must be finished; after [`crate::Pipeline::flush`]
    /// it is.
    pub fn copy_to_host(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        let (source, len) = (self.range(offset, to.len() as u64)?, to.len() as u64);
        if let Some(bytes) = &self.inner.host {
            to.copy_from_slice(&bytes[offset as usize..][..to.len()]);
            return Ok(());
        }
        let copy = Transfer::ToHost { source, destination: to.as_mut_ptr() as u64, len };
        // SAFETY: both sides have that length, and are borrowed until the copy has run.
        unsafe { Transfers::new(&self.inner.device)?.run(&[copy]) }
    }

    /// Copies bytes to the device and waits until they are there.
    pub fn copy_from_host(&self, offset: u64, from: &[u8]) -> Result<()> {
        let (destination, len) = (self.range(offset, from.len() as u64)?, from.len() as u64);
        let copy = Transfer::FromHost { source: from.as_ptr() as u64, destination, len };
        // SAFETY: as in `copy_to_host`.
        unsafe { Transfers::new(&self.inner.device)?.run(&[copy]) }
    }
}

pub(crate) fn out_of_memory(device: &CudaDevice, needed: u64) -> Error {
    let (free, total) = device.memory().map_or((0, device.total_memory()), |m| (m.free, m.total));
    Error::OutOfMemory { device: device.ordinal(), needed, free, total }
}

impl fmt::Debug for DeviceArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceArena")
            .field("device", &self.inner.device.ordinal())
            .field("address", &format_args!("{:#x}", self.inner.address))
            .field("len", &self.inner.len)
            .finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.host.is_some() {
            // As the driver's own memory does, it stays until the device is done with it.
            let _ = self.device.synchronize();
        }
        if self.address == 0 || self.borrowed {
            return;
        }
        // Without a context the driver is shutting down and takes the memory with it.
        if let Ok(_current) = self.device.make_current() {
            // SAFETY: allocated in `new` in this context, freed here alone. An error can only be
            // one that earlier work left in the context: the memory goes with the context then.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}
