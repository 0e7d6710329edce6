//! What tests of loads to devices share: the simulated machine, and what loads are held to.

#![allow(unused_macros, dead_code, reason = "each test takes what it needs")]

use std::path::PathBuf;

use cuda_sim::{Guard, Sim};
use fst::{Checkpoint, Error, Tensor, Tensors};

pub(crate) const MEMORY: u64 = 256 << 20;

/// A simulated machine; `None` where the tests use the machine's own driver.
pub(crate) fn simulated(devices: u64, memory: u64) -> Option<Guard> {
    if std::env::var_os("FST_TEST_REAL_CUDA").is_some_and(|v| v == "1") {
        return None;
    }
    let sim = Sim::load().expect("the simulator").exclusive(devices, memory);
    assert!(sim.add_kernels(fst_cuda_sim_kernels::LIBRARY.as_ref()));
    Some(sim)
}

/// A machine with one device, for tests that can run on real hardware as well.
pub(crate) fn machine() -> Option<Guard> {
    simulated(1, MEMORY)
}

/// For tests that need the simulator.
macro_rules! simulated_or_skip {
    ($devices:expr, $memory:expr) => {
        match $crate::gpu_support::simulated($devices, $memory) {
            Some(sim) => sim,
            None => {
                println!("SKIPPED: needs the simulated driver");
                return;
            }
        }
    };
}

pub(crate) fn open(paths: &[PathBuf]) -> Checkpoint {
    Checkpoint::open_all(paths).unwrap()
}

/// Both sets hold the same tensors with the same bytes, wherever they are.
pub(crate) fn assert_same<'a>(
    device: impl IntoIterator<Item = &'a Tensor>,
    host: &Tensors,
    what: &dyn std::fmt::Debug,
) {
    let mut count = 0;
    for tensor in device {
        let expected = host.get(tensor.name()).unwrap();
        assert_eq!(tensor.dtype(), expected.dtype());
        assert_eq!(tensor.shape(), expected.shape());
        assert_eq!(tensor.device().to_string(), "cuda:0");
        assert_eq!(tensor.device_ptr().unwrap() % 256, 0, "{}", tensor.name());
        assert!(matches!(tensor.bytes(), Err(Error::NotOnHost { .. })));
        let copy = tensor.to_host().unwrap();
        assert!(copy.bytes().unwrap() == expected.bytes().unwrap(), "{what:?}: {}", tensor.name());
        count += 1;
    }
    assert_eq!(count, host.len());
}
#[allow(unused_imports, reason = "not every test file needs it")]
pub(crate) use simulated_or_skip;

/// The tensor holds what the host's of the same name holds.
pub(crate) fn assert_same_bytes(tensor: &Tensor, host: &Tensors) {
    let expected = host.get(tensor.name()).unwrap();
    let copy = tensor.to_host().unwrap();
    assert!(copy.bytes().unwrap() == expected.bytes().unwrap(), "{}", tensor.name());
}
