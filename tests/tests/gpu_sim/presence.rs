//! Which devices there are, and what is said when there is none.

use crate::support::{machine, simulated};
use fst_gpu::{CudaDevice, CudaVersion, Error};

#[test]
fn a_device_says_what_it_is() {
    let machine = machine();
    let device = CudaDevice::open(0).unwrap();
    assert!(CudaDevice::available());
    assert_eq!(device.ordinal(), 0);
    assert!(!device.name().is_empty());
    assert!(device.compute_capability() >= (5, 0));
    assert!(device.pci_bus_id().contains(':'));
    let memory = device.memory().unwrap();
    assert!(memory.free <= memory.total && memory.total > 0);
    assert!(device.driver_version().unwrap() >= CudaVersion { major: 12, minor: 0 });
    if machine.sim().is_some() {
        assert_eq!(device.name(), "Simulated GPU");
        assert_eq!(device.numa_node(), None);
    }
    println!("{device:?} {memory:?}");
}

#[test]
fn openings_share_one_context() {
    let Some(sim) = simulated(2, 1 << 20) else {
        return;
    };
    let (a, b) = (CudaDevice::open(1).unwrap(), CudaDevice::open(1).unwrap());
    assert_eq!(a, b);
    assert_eq!(a.context(), b.context());
    assert_eq!(sim.report().contexts, 1);
    drop(a);
    assert_eq!(sim.report().contexts, 1);
    drop(b);
    assert_eq!(sim.report().contexts, 0);
    assert!(CudaDevice::open(1).is_ok());
}

#[test]
fn a_bad_ordinal_names_the_count() {
    let Some(_sim) = simulated(2, 1 << 20) else {
        return;
    };
    assert_eq!(CudaDevice::count(), Ok(2));
    assert_eq!(CudaDevice::open(2).unwrap_err(), Error::NoDevice { ordinal: 2, count: 2 });
}

#[test]
fn failures_of_the_first_calls_are_errors() {
    let calls = [
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceGetPCIBusId",
        "cuDeviceTotalMem_v2",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
    ];
    for call in calls {
        let Some(sim) = simulated(1, 1 << 20) else {
            return;
        };
        // The driver itself stays open from the first test on.
        CudaDevice::count().unwrap();
        sim.fail(call, 1, cuda_sim::ERROR_UNKNOWN);
        let error = CudaDevice::open(0).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("CUDA_ERROR_UNKNOWN (999)"), "{call}: {text}");
        assert!(text.contains(call.trim_end_matches("_v2")), "{call}: {text}");
        assert!(CudaDevice::open(0).is_ok(), "{call} failed once only");
    }
}

#[test]
fn the_context_before_is_current_again() {
    let Some(_sim) = simulated(2, 1 << 20) else {
        return;
    };
    let (a, b) = (CudaDevice::open(0).unwrap(), CudaDevice::open(1).unwrap());
    let _outer = a.make_current().unwrap();
    let here = || {
        let mut context = std::ptr::null_mut();
        // SAFETY: a valid out pointer; the simulated driver is open.
        let result = unsafe { cudarc::driver::sys::cuCtxGetCurrent(&mut context) };
        assert_eq!(result as u32, 0);
        context
    };
    assert_eq!(here(), a.context());
    {
        let _inner = b.make_current().unwrap();
        assert_eq!(here(), b.context());
    }
    b.memory().unwrap();
    assert_eq!(here(), a.context());
}
