//! The simulator in a program that a test starts: this test binary itself stands for one.

use crate::support::simulated;
use cuda_sim::Report;
use fst_gpu::{CudaDevice, DeviceArena};

const CHILD: &str = "FST_TEST_CHILD";

#[test]
fn a_started_program_finds_the_simulator_and_leaves_a_report() {
    if std::env::var_os(CHILD).is_some() {
        // No `Sim::load` here: the environment alone has brought it.
        assert_eq!(CudaDevice::count(), Ok(3));
        let device = CudaDevice::open(2).unwrap();
        std::mem::forget(DeviceArena::new(&device, 1000).unwrap());
        assert!(DeviceArena::new(&device, 1000).is_err());
        return;
    }
    let Some(sim) = simulated(1, 1 << 20) else { return };
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "program::a_started_program_finds_the_simulator_and_leaves_a_report"])
        .envs(sim.environment(&report))
        .env(CHILD, "1")
        .env("FST_SIM_DEVICES", "3")
        .env("FST_SIM_FAIL", "cuMemAlloc_v2:2:2")
        .env("FST_SIM_KERNELS", fst_cuda_sim_kernels::LIBRARY)
        .output()
        .unwrap();
    assert!(status.status.success(), "{status:?}");
    let report = Report::parse(&std::fs::read_to_string(&report).unwrap());
    assert_eq!((report.arrays, report.device_bytes), (1, 1000));
    assert_eq!(report.violations, [""; 0]);
}
