//! The shipped kernels on a device: modules loaded once per context, functions found, launches.

use crate::cuda::device::CudaDevice;
use crate::cuda::kernel::{Kernel, Launch, StridedJob};
use crate::cuda::stream::Stream;
use crate::cuda::sys::checked;
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

/// What a device's context has loaded. Owned by the device, which unloads it before the context
/// goes.
#[derive(Default)]
pub(crate) struct Modules {
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    /// By the address of the image, which is static.
    modules: HashMap<usize, sys::CUmodule>,
    functions: HashMap<Kernel, sys::CUfunction>,
}

// SAFETY: module and function handles may be used from any thread while their context lives; the
// device that owns this value holds it.
unsafe impl Send for Modules {}
// SAFETY: as above; the maps are behind a lock.
unsafe impl Sync for Modules {}

impl Modules {
    /// The function of a kernel, loaded on first use. The device's context is current.
    fn function(&self, kernel: Kernel, device: usize) -> Result<sys::CUfunction> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = loaded.functions.get(&kernel) {
            return Ok(function);
        }
        let (Some(image), Some(entry)) = (kernel.fatbin(), kernel.entry()) else {
            return Err(Error::NoKernel { kernel });
        };
        let key = image.as_ptr() as usize;
        let module = match loaded.modules.get(&key) {
            Some(&module) => module,
            None => {
                let mut module = std::ptr::null_mut();
                // SAFETY: a whole fat binary, aligned to its words; a context is current; a valid out
                // pointer.
                let result = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
                checked(result, "cuModuleLoadData", device)?;
                loaded.modules.insert(key, module);
                module
            }
        };
        let mut function = std::ptr::null_mut();
        // SAFETY: a live module and a NUL-terminated name; a valid out pointer.
        let result = unsafe { sys::cuModuleGetFunction(&mut function, module, entry.as_ptr()) };
        checked(result, "cuModuleGetFunction", device)?;
        loaded.functions.insert(kernel, function);
        Ok(function)
    }

    /// Unloads everything. The device's context is current, and no work of it runs.
    pub(crate) fn unload(&mut self) {
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner);
        loaded.functions.clear();
        for (_, module) in loaded.modules.drain() {
            // SAFETY: loaded in `function`, unloaded once. Errors mean that the driver goes away.
            let _ = unsafe { sys::cuModuleUnload(module) };
        }
    }
}

impl CudaDevice {
    /// Loads a kernel now, so that its first launch does not wait for the driver to compile it.
    ///
    /// # Errors
    ///
    /// [`Error::NoKernel`], or the driver's.
    pub fn prepare(&self, kernel: Kernel) -> Result<()> {
        let _current = self.make_current()?;
        self.modules().function(kernel, self.ordinal()).map(drop)
    }
}

impl Stream {
    /// Queues one gather or cast.
    ///
    /// # Errors
    ///
    /// [`Error::NoKernel`], or the driver's.
    ///
    /// # Safety
    ///
    /// The job's source and destination are device memory of the sizes that it names (the source
    /// may be read up to three bytes before and after), disjoint, allocated until the work has
    /// run, and used by nothing else that is not ordered with this stream.
    pub unsafe fn run(&self, kernel: Kernel, mut job: StridedJob) -> Result<()> {
        let processors = self.device().processors();
        let elements = job.rows.saturating_mul(job.cols);
        if elements == 0 {
            return Ok(());
        }
        let launch = match kernel {
            Kernel::Gather => Launch::gather(elements, processors),
            Kernel::Cast { from, to } => Launch::cast(elements, from, to, processors),
            _ => return Err(Error::NoKernel { kernel }),
        };
        // SAFETY: these kernels take the job's five fields; the rest is the caller's promise.
        unsafe { self.launch(kernel, launch, &mut job.params()) }
    }

    /// Queues a launch of any of the shipped kernels.
    ///
    /// # Errors
    ///
    /// As for [`run`](Self::run).
    ///
    /// # Safety
    ///
    /// `params` are the addresses of the kernel's parameters, and what these lead to is as for
    /// [`run`](Self::run).
    pub unsafe fn launch(
        &self,
        kernel: Kernel,
        launch: Launch,
        params: &mut [*mut c_void],
    ) -> Result<()> {
        let device = self.device();
        let _current = device.make_current()?;
        let function = device.modules().function(kernel, device.ordinal())?;
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        // SAFETY: a live function and stream; parameters are read during the call.
        let result = unsafe {
            sys::cuLaunchKernel(
                function,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                0,
                self.handle(),
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        device.check(result, "cuLaunchKernel")
    }
}
