//! Loads to devices that read host memory, under the simulated driver: where that is all the memory they
//! have, nothing is copied to them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;

use fst::{Device, Dtype, Engine, Loader};
use fst_tests::{crowded_checkpoint, misaligned_checkpoint};
use gpu_support::{MEMORY, assert_same, assert_same_bytes, open, simulated_or_skip};

/// Calls that move bytes to a device, or prepare for it.
const MOVING: [&str; 6] = [
    "cuMemAlloc_v2",
    "cuMemHostAlloc",
    "cuMemHostRegister_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyBatchAsync_v2",
    "cuModuleLoadData",
];

#[test]
fn devices_without_memory_of_their_own_read_the_host_s() {
    let dir = tempfile::tempdir().unwrap();
    let mut paths = crowded_checkpoint(dir.path());
    let odd = dir.path().join("odd.safetensors");
    misaligned_checkpoint(&odd);
    for loader in [
        Loader::new(),
        Loader::new().dtype(Dtype::F32),
        Loader::new().slice("huge", 1, 3..1500).slice("big", 0, 7..1400),
        Loader::new().engine(Engine::Pread),
    ] {
        let checkpoint = open(&paths);
        let host = loader.load(&checkpoint).unwrap();
        let sim = simulated_or_skip!(1, MEMORY);
        assert!(sim.set("integrated", 1));
        let tensors = loader.device(Device::cuda(0).unwrap()).load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &"integrated");
        for call in MOVING {
            assert_eq!(sim.calls(call), 0, "{call}");
        }
        let copy = tensors.report().device_copy.clone().unwrap();
        assert!(copy.reason.contains("no memory but the host's"), "{}", copy.reason);
        // Memory goes back when the device is done with it.
        let before = sim.calls("cuCtxSynchronize");
        let kept = tensors.get("big").unwrap().clone();
        drop(tensors);
        assert!(sim.calls("cuCtxSynchronize") > before);
        assert_same_bytes(&kept, &host);
    }
    paths = vec![odd];
    let checkpoint = open(&paths);
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(1, MEMORY);
    assert!(sim.set("integrated", 1));
    let loader = Loader::new().device(Device::cuda(0).unwrap());
    assert_same(&loader.load(&checkpoint).unwrap(), &host, &"misaligned");
}

#[test]
fn streams_to_such_devices_keep_to_their_budget() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(1, MEMORY);
    assert!(sim.set("integrated", 1));
    let loader = Loader::new().device(Device::cuda(0).unwrap()).memory_budget(24 << 20);
    for in_order in [false, true] {
        let mut stream = loader.clone().in_order(in_order).stream(&checkpoint).unwrap();
        let mut count = 0;
        for tensor in &mut stream {
            assert_same_bytes(&tensor.unwrap(), &host);
            count += 1;
        }
        assert_eq!(count, host.len());
        assert!(stream.peak_bytes() <= 24 << 20);
    }
}

/// As in GH200 and GB200: tensors belong into the device's own memory.
#[test]
fn devices_with_memory_of_their_own_get_copies() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(1, MEMORY);
    assert!(sim.set("coherent", 1));
    let loader = Loader::new().device(Device::cuda(0).unwrap());
    assert_same(&loader.load(&checkpoint).unwrap(), &host, &"coherent");
    assert!(sim.report().copied_bytes >= host.report().bytes);
}
