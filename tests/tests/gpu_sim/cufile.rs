//! cuFile under simulation: files into device memory with nothing in between.

use crate::sink::{BLOCK, Case, case, check};
use crate::support::simulated;
use fst_gpu::cufile::{CuFile, GdsError, GdsMode, GdsOptions, GdsStatus, read};
use fst_gpu::{CudaDevice, DeviceArena, Landing};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::sink::SinkError;
use fst_io::{Control, SourceFile};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

fn open(sim: &cuda_sim::Sim) -> &'static CuFile {
    CuFile::open_simulated(sim.path()).unwrap()
}

fn load(
    case: &Case,
    cufile: &'static CuFile,
    device: &CudaDevice,
    options: GdsOptions,
) -> Result<DeviceArena, GdsError> {
    let files: Vec<SourceFile> =
        case.paths.iter().map(|p| SourceFile::open(p, None).unwrap()).collect();
    let align = files.iter().map(SourceFile::align).max().unwrap();
    let limits = Limits { align, block: BLOCK, ..Limits::default() };
    let plan = ReadPlan::new(case.extents.clone(), limits).unwrap();
    let arena = DeviceArena::new(device, case.expected.len() as u64)?;
    let landed = Arc::new(AtomicU64::new(0));
    let route = |block: &Block| -> Result<Landing, SinkError> {
        let landed = Arc::clone(&landed);
        let done = Box::new(move || {
            landed.fetch_add(1, Ordering::Relaxed);
        });
        Ok(Landing { ops: case.ops(block, &arena), done: Some(done), ..Landing::default() })
    };
    let control = Control::new();
    // SAFETY: the arena outlives the call, and extents do not overlap.
    let stats = unsafe { read(cufile, device, &files, &plan, &route, None, options, &control) }?;
    assert_eq!(stats.reads, plan.blocks().len() as u64);
    assert_eq!(landed.load(Ordering::Relaxed), stats.reads);
    Ok(arena)
}

#[test]
fn files_arrive_with_queued_work_on_every_slot() {
    let Some(sim) = simulated(1, 64 << 20) else { return };
    let (cufile, device, case) = (open(&sim), CudaDevice::open(0).unwrap(), case());
    assert_eq!(cufile.version(), Some((1, 14)));
    for (workers, slots, most) in [(1, 1, i64::MAX), (1, 3, 4096), (4, 2, 5000)] {
        sim.set("cufile_most", most);
        let arena = load(&case, cufile, &device, GdsOptions { workers, slots }).unwrap();
        check(&case, &arena, "cufile");
    }
}

#[test]
fn memory_that_is_not_registered_is_read_into_all_the_same() {
    let Some(sim) = simulated(1, 64 << 20) else { return };
    let (cufile, device, case) = (open(&sim), CudaDevice::open(0).unwrap(), case());
    // The second worker finds no room to pin its slots.
    sim.fail("cuFileBufRegister", 2, 5036);
    let arena = load(&case, cufile, &device, GdsOptions { workers: 2, slots: 2 }).unwrap();
    check(&case, &arena, "partly registered");
}

#[test]
fn failures_name_the_file_and_leave_nothing() {
    for (call, nth) in [
        ("cuFileHandleRegister", 2),
        ("cuFileBufRegister", 1),
        ("cuFileRead", 1),
        ("cuFileRead", 17),
        ("cuMemcpyDtoDAsync_v2", 5),
        ("cuEventRecord", 2),
        ("cuEventSynchronize", 2),
        ("run:copy", 11),
    ] {
        let Some(sim) = simulated(1, 64 << 20) else { return };
        let (cufile, device, case) = (open(&sim), CudaDevice::open(0).unwrap(), case());
        // Not one of those after which cuFile is done without.
        sim.fail(call, nth, 5033);
        let error = load(&case, cufile, &device, GdsOptions { workers: 2, slots: 2 }).unwrap_err();
        let text = error.to_string();
        // A worker that meets the dead context first may be the one to report.
        let dead = call == "run:copy" && text.contains("CUDA driver error");
        assert!(dead || text.contains("5033"), "{call} {nth}: {text}");
        if call == "cuFileRead" {
            assert!(text.contains(".bin: ") && text.contains("nvidia-fs setup error"), "{text}");
        }
    }
}

#[test]
fn a_short_file_says_where_it_ends() {
    let Some(sim) = simulated(1, 64 << 20) else { return };
    let (cufile, device, case) = (open(&sim), CudaDevice::open(0).unwrap(), case());
    let file = std::fs::OpenOptions::new().write(true).open(&case.paths[1]).unwrap();
    file.set_len(300_000).unwrap();
    let error = load(&case, cufile, &device, GdsOptions::default()).unwrap_err().to_string();
    assert!(error.contains("1.bin: file ends at byte 300000"), "{error}");
}

#[test]
fn compatibility_mode_is_told_from_direct() {
    let Some(sim) = simulated(1, 1 << 20) else { return };
    let cufile = open(&sim);
    let root = tempfile::tempdir().unwrap();
    let mode = |root: &Path| GdsStatus::with(Ok(cufile), root).mode;
    assert_eq!(mode(root.path()), GdsMode::Compatibility);
    // Peer-to-peer by the kernel's own NVMe driver needs no nvidia-fs.
    sim.set("cufile_p2p", 1);
    assert_eq!(mode(root.path()), GdsMode::Direct);
    sim.set("cufile_p2p", 1 << 2);
    assert_eq!(mode(root.path()), GdsMode::Compatibility);
    sim.set("cufile_p2p", 0);
    // The flag of older versions says nothing where there is a call to ask.
    sim.set("cufile_flags", 1 << 11);
    assert_eq!(mode(root.path()), GdsMode::Compatibility);
    std::fs::create_dir_all(root.path().join("proc/driver/nvidia-fs")).unwrap();
    assert_eq!(mode(root.path()), GdsMode::Direct);
}
