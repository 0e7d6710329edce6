//! Touches every byte of loaded tensors on the device: the sum of their 64-bit words.

use anyhow::{Context, Result};
use cudarc::driver::result;
use cudarc::driver::sys::{CUfunction, CUmodule};
use fst::gpu::kernel::{ChecksumJob, Kernel, Launch};
use fst::gpu::{CudaDevice, DeviceArena};

/// The checksum kernel, loaded.
#[derive(Debug)]
pub struct DeviceSum {
    device: CudaDevice,
    module: CUmodule,
    entry: CUfunction,
}

/// Bytes that one block of the kernel sums.
const PART: u64 = 256 << 10;

impl DeviceSum {
    /// Loads the kernel.
    ///
    /// # Errors
    /// A driver that does not take it.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let _current = device.make_current()?;
        let image = Kernel::Checksum.fatbin().context("there is no checksum kernel")?;
        let name = Kernel::Checksum.entry().context("the checksum kernel has no name")?;
        // SAFETY: a whole fat binary; a context is current.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
        // SAFETY: the module was just loaded.
        let entry = unsafe { result::module::get_function(module, name.to_owned()) }?;
        Ok(Self { device: device.clone(), module, entry })
    }

    /// The sum of all 64-bit words of all tensors, each tensor's tail filled up with zeros.
    ///
    /// # Errors
    /// Tensors that are not on the device, or the driver's.
    pub fn of<'a>(&self, tensors: impl IntoIterator<Item = &'a fst::Tensor>) -> Result<u64> {
        let mut jobs = Vec::new();
        for tensor in tensors {
            let start = tensor.device_ptr().context("a tensor is not on a device")?;
            ChecksumJob::parts(start, tensor.byte_len() as u64, 0, PART, |part| jobs.push(part));
        }
        let list: &[u8] = bytemuck::cast_slice(&jobs);
        let on_device = DeviceArena::new(&self.device, (list.len() as u64).max(8))?;
        on_device.copy_from_host(0, list)?;
        let sums = DeviceArena::new(&self.device, 16)?;
        sums.copy_from_host(0, &[0; 16])?;
        let launch = Launch::batch(jobs.len() as u64, self.device.processors());
        let ([x, y, z], [bx, by, bz]) = (launch.grid, launch.block);
        let mut values = [on_device.address(), jobs.len() as u64, sums.address()];
        let mut params = values.each_mut().map(|value| std::ptr::from_mut(value).cast());
        let _current = self.device.make_current()?;
        if !jobs.is_empty() {
            let stream = std::ptr::null_mut();
            // SAFETY: the kernel's three parameters; its jobs name memory of live tensors.
            unsafe {
                let (grid, block) = ((x, y, z), (bx, by, bz));
                result::launch_kernel(self.entry, grid, block, 0, stream, &mut params)?;
            }
        }
        self.device.synchronize()?;
        let mut found = [0; 16];
        sums.copy_to_host(0, &mut found)?;
        let (first, _) = found.split_at(8);
        Ok(u64::from_le_bytes(first.try_into()?))
    }
}

impl Drop for DeviceSum {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.make_current() {
            // SAFETY: loaded in `new`, unloaded once.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}
