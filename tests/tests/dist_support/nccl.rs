//! The simulated NCCL, on streams of the simulated driver.

use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cuda_sim::Sim;
use fst::Device;
use fst::dist::NcclStream;
use fst::dist::group::{Control, HostCopier, LocalGroup, NcclGroup};
use libloading::Library;

use super::Join;

/// The library; one test at a time has it, by the guard of the simulated driver.
pub(crate) struct Nccl {
    path: PathBuf,
    library: ManuallyDrop<Library>,
}

impl Nccl {
    /// Opens the library, so that its name leads to it from now on, and puts its work on the driver's
    /// streams.
    pub(crate) fn load(sim: &Sim) -> Self {
        // Test binaries lie in target/PROFILE/deps.
        let executable = std::env::current_exe().unwrap();
        let path = executable.parent().unwrap().join("libnccl_sim.so");
        // SAFETY: our own library, whose initialisers do nothing.
        let library = ManuallyDrop::new(unsafe { Library::new(&path) }.unwrap());
        // SAFETY: the function has this signature, and the library is never closed.
        let done: extern "C" fn(*mut c_void) -> c_int =
            unsafe { *library.get("fst_sim_nccl_stream_done").unwrap() };
        sim.stream_hook(done);
        let nccl = Self { path, library };
        nccl.violations();
        nccl
    }

    /// Makes each rank join on its own thread.
    pub(crate) fn join(&self, devices: &[Device], deadline: Duration) -> Vec<Join<'static>> {
        let controls = LocalGroup::with(devices.len() as u32, HostCopier, deadline);
        let join = |(control, device): (LocalGroup, &Device)| {
            let (device, path) = (device.clone(), self.path.clone());
            let join = move || {
                let nccl = fst::dist::group::Nccl::open_at(&path).unwrap();
                let stream = Box::new(NcclStream::new(device.as_cuda().unwrap()).unwrap());
                let group = NcclGroup::init_with(nccl, Box::new(control), stream).unwrap();
                // A rank that fails before others have joined would fail their joining.
                group.barrier().unwrap();
                Arc::new(group) as Arc<dyn fst::Group>
            };
            Box::new(join) as Join<'static>
        };
        controls.into_iter().zip(devices).map(join).collect()
    }

    /// How often the library was misused since this was last asked.
    pub(crate) fn violations(&self) -> u32 {
        // SAFETY: the function has this signature.
        unsafe {
            let ask = self.library.get::<extern "C" fn() -> u32>("fst_sim_nccl_violations");
            (ask.unwrap())()
        }
    }

    /// Makes the `nth` call from now on fail.
    pub(crate) fn fail(&self, call: &str, nth: u32, code: c_int) {
        let call = CString::new(call).unwrap();
        // SAFETY: the function has this signature.
        unsafe {
            let symbol = "fst_sim_nccl_fail";
            let fail = self.library.get::<unsafe extern "C" fn(*const c_char, u32, c_int)>(symbol);
            fail.unwrap()(call.as_ptr(), nth, code);
        }
    }
}
