//! The kernels of fst-gpu, compiled for the host from the same `.cu` sources, found by name and
//! launched over host memory: what stands in for a device in tests and in the simulated driver.

use std::ffi::{CStr, c_char, c_void};
use std::fmt;

/// A shared library with a symbol `fst_sim_kernel_NAME(grid, block, params)` for each kernel, called
/// like [`HostKernel::launch`]; the simulated driver loads it.
pub const LIBRARY: &str = concat!(env!("OUT_DIR"), "/libfst_sim_kernels.so");

type Function = unsafe extern "C" fn(*const u32, *const u32, *mut *mut c_void);

unsafe extern "C" {
    fn fst_sim_kernel_lookup(name: *const c_char) -> Option<Function>;
}

/// A kernel that runs on the host.
#[derive(Clone, Copy)]
pub struct HostKernel(Function);

impl HostKernel {
    /// The kernel whose entry in its fat binary is called `name`.
    pub fn named(name: &CStr) -> Option<Self> {
        // SAFETY: `name` is a null-terminated string, only read during the call.
        unsafe { fst_sim_kernel_lookup(name.as_ptr()) }.map(Self)
    }

    /// Runs every thread of every block, one after the other, on this thread.
    ///
    /// # Safety
    /// `params` holds one address for each parameter of the kernel, each of a value of the parameter's
    /// type, and all memory that the values lead to may be read and written as the kernel does.
    pub unsafe fn launch(&self, grid: [u32; 3], block: [u32; 3], params: *mut *mut c_void) {
        // SAFETY: the caller's promise; the sizes are read during the call.
        unsafe { (self.0)(grid.as_ptr(), block.as_ptr(), params) }
    }
}

impl fmt::Debug for HostKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostKernel({:p})", self.0 as *const ())
    }
}
