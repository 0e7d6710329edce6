//! Device arenas: errors, sharing, poison, leaks.

use crate::support::{machine, pattern, simulated};
use fst_gpu::{CudaDevice, DeviceArena, Error};

#[test]
fn bytes_go_there_and_back() {
    let _machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let arena = DeviceArena::new(&device, 100_000).unwrap();
    let bytes = pattern(70_001, 1);
    arena.copy_from_host(12_345, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    arena.copy_to_host(12_345, &mut back).unwrap();
    assert_eq!(bytes, back);
    let beyond = arena.copy_to_host(30_000, &mut back).unwrap_err();
    assert_eq!(
        beyond,
        Error::OutOfRange { what: "device arena", start: 30_000, end: 100_001, len: 100_000 }
    );
    assert!(arena.range(u64::MAX, 2).is_err());
}

#[test]
fn too_much_says_what_is_free() {
    let Some(sim) = simulated(1, 10 << 20) else {
        return;
    };
    let device = CudaDevice::open(0).unwrap();
    let first = DeviceArena::new(&device, 6 << 20).unwrap();
    let expected =
        Error::OutOfMemory { device: 0, needed: 5 << 20, free: 4 << 20, total: 10 << 20 };
    assert_eq!(DeviceArena::check_fits(&device, 5 << 20), Err(expected.clone()));
    assert_eq!(DeviceArena::new(&device, 5 << 20).unwrap_err(), expected);
    drop(first);
    assert_eq!(sim.report().arrays, 0);
    DeviceArena::check_fits(&device, 5 << 20).unwrap();
    DeviceArena::new(&device, 5 << 20).unwrap();
}

#[test]
fn the_last_reference_frees() {
    let Some(sim) = simulated(2, 1 << 20) else {
        return;
    };
    let arena = DeviceArena::new(&CudaDevice::open(1).unwrap(), 4096).unwrap();
    let clone = arena.clone();
    drop(arena);
    assert_eq!(sim.report().arrays, 1);
    // From a thread where another device's context is current, or none.
    std::thread::spawn(move || {
        let other = CudaDevice::open(0).unwrap();
        let _current = other.make_current().unwrap();
        drop(clone);
    })
    .join()
    .unwrap();
    let report = sim.report();
    assert_eq!((report.arrays, report.contexts), (0, 0));
}

#[test]
fn freed_memory_is_poisoned() {
    let Some(_sim) = simulated(1, 1 << 20) else {
        return;
    };
    let arena = DeviceArena::new(&CudaDevice::open(0).unwrap(), 64).unwrap();
    arena.copy_from_host(0, &[7; 64]).unwrap();
    let address = arena.address() as *const u8;
    drop(arena);
    // SAFETY: the simulator keeps freed memory mapped and poisoned.
    assert_eq!(unsafe { address.read_volatile() }, cuda_sim::POISON);
}

#[test]
fn an_empty_arena_is_no_allocation() {
    let Some(sim) = simulated(1, 1 << 20) else {
        return;
    };
    let arena = DeviceArena::new(&CudaDevice::open(0).unwrap(), 0).unwrap();
    assert!(arena.is_empty());
    assert_eq!(sim.calls("cuMemAlloc_v2"), 0);
    arena.copy_to_host(0, &mut []).unwrap();
}

#[test]
fn a_leak_is_found() {
    let Some(mut sim) = simulated(1, 1 << 20) else {
        return;
    };
    let arena = DeviceArena::new(&CudaDevice::open(0).unwrap(), 64).unwrap();
    let faults = sim.report().faults();
    assert!(faults.iter().any(|f| f.contains("1 device allocations left")), "{faults:?}");
    drop(arena);
    assert_eq!(sim.report().faults(), [""; 0]);
    sim.skip_check();
}

#[test]
fn dropping_after_the_context_died_does_not_panic() {
    let Some(sim) = simulated(1, 1 << 20) else {
        return;
    };
    let arena = DeviceArena::new(&CudaDevice::open(0).unwrap(), 64).unwrap();
    sim.fail("run:copy", 1, cuda_sim::ERROR_ILLEGAL_ADDRESS);
    let error = arena.copy_from_host(0, &[1; 64]).unwrap_err();
    assert!(error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    drop(arena);
}
