//! Files straight out of the page cache to device memory: bounded registrations that end when their
//! copies have, and files that shrink under a mapping.

use crate::sink::{Case, case_of, check};
use crate::support::{machine, simulated};
use fst_gpu::{
    Afterwards, CachedOptions, CachedStats, CudaDevice, DeviceArena, Landing, Pipeline,
    PipelineOptions, RingOptions, copy_cached,
};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::sink::SinkError;
use fst_io::{Control, Error, SourceFile};
use std::sync::Arc;

/// Bytes of a block; what has no more than 64 KiB does not go straight out of the page cache.
const BLOCK: u64 = 256 << 10;

/// Runs of all lengths, from a byte to several blocks.
fn case() -> Case {
    case_of([6_000_123, 2_800_001], 1_000_000)
}

/// Copies the case's files; `meanwhile` is called for every block that is about to be registered.
fn copy(
    case: &Case,
    device: &CudaDevice,
    options: CachedOptions,
    admitted: &(dyn Fn(&Block) + Send + Sync),
    meanwhile: &(dyn Fn(&Block) + Send + Sync),
) -> Result<(DeviceArena, CachedStats), Error> {
    let files: Vec<SourceFile> =
        case.paths.iter().map(|p| SourceFile::open(p, None).unwrap()).collect();
    let align = files.iter().map(SourceFile::align).max().unwrap();
    let limits = Limits { align, block: BLOCK, ..Limits::default() };
    let plan = ReadPlan::new(case.extents.clone(), limits).unwrap();
    let arena = DeviceArena::new(device, case.expected.len() as u64).unwrap();
    let ring =
        RingOptions { block_bytes: BLOCK as usize, blocks: 1, afterwards: Afterwards::Release };
    let pipeline = Pipeline::new(device, PipelineOptions { ring, streams: 2 }).unwrap();
    pipeline.keep(Arc::new(arena.clone()));
    let route = |block: &Block| -> Result<Landing, SinkError> {
        meanwhile(block);
        Ok(Landing { ops: case.ops(block, &arena), ..Landing::default() })
    };
    let admit = |block: &Block, _wait: bool| -> Result<bool, SinkError> {
        admitted(block);
        Ok(true)
    };
    let control = Control::new();
    // SAFETY: the pipeline keeps the arena, and extents do not overlap.
    let stats = unsafe {
        copy_cached(&pipeline, &files, plan.blocks(), &route, Some(&admit), options, &control)
    }?;
    assert_eq!(control.landed_bytes(), stats.bytes + stats.short_bytes);
    Ok((arena, stats))
}

fn options(window: u64, in_flight: u64) -> CachedOptions {
    CachedOptions { threads: 3, window, in_flight }
}

#[test]
fn windows_arrive_and_are_bounded() {
    let machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let case = case();
    for (window, in_flight) in [(1, 1), (BLOCK, 4 * BLOCK), (5 * BLOCK, 8 * BLOCK), (1 << 30, 0)] {
        let most = std::sync::atomic::AtomicU64::new(0);
        let look = |_: &Block| {
            if let Some(sim) = machine.sim() {
                most.fetch_max(sim.report().pinned_bytes, std::sync::atomic::Ordering::Relaxed);
            }
        };
        let (arena, stats) =
            copy(&case, &device, options(window, in_flight), &|_| {}, &look).unwrap();
        if let Some(refused) = stats.refused.as_ref().filter(|_| machine.sim().is_none()) {
            println!("SKIPPED: this driver refuses to register file mappings: {refused}");
            return;
        }
        check(&case, &arena, "registered");
        assert!(stats.left.is_empty() && stats.refused.is_none());
        assert!(stats.bytes > 0 && stats.short_bytes > 0);
        if in_flight > window {
            // The ring's only block, and what may be registered.
            let most = most.into_inner();
            assert!(most <= BLOCK + in_flight, "{most} bytes registered at once");
        }
    }
}

#[test]
fn refused_windows_are_left_for_another_way() {
    let Some(sim) = simulated(1, 64 << 20) else { return };
    let device = CudaDevice::open(0).unwrap();
    let case = case();
    // One of the registrations is the ring's, in whatever place.
    for nth in [5, 6] {
        sim.fail("cuMemHostRegister_v2", nth, cuda_sim::ERROR_NOT_SUPPORTED);
    }
    let (_arena, stats) = copy(&case, &device, options(BLOCK, 1 << 30), &|_| {}, &|_| {}).unwrap();
    assert!(stats.refused.is_some() && !stats.left.is_empty() && stats.bytes > 0);
    assert!(stats.left.is_sorted());
}

#[test]
fn failures_at_every_call_end_the_copies_and_leave_nothing() {
    for (call, nth) in [
        ("cuEventCreate", 3),
        ("cuEventRecord", 1),
        ("cuEventRecord", 9),
        ("cuEventQuery", 2),
        ("cuMemcpyHtoDAsync_v2", 3),
        ("run:copy", 7),
    ] {
        let Some(sim) = simulated(1, 64 << 20) else { return };
        let device = CudaDevice::open(0).unwrap();
        let case = case();
        sim.fail(call, nth, cuda_sim::ERROR_LAUNCH_FAILED);
        let result = copy(&case, &device, options(BLOCK, 4 * BLOCK), &|_| {}, &|_| {});
        let error = result.unwrap_err().to_string();
        assert!(error.contains("CUDA_ERROR_LAUNCH_FAILED"), "{call} {nth}: {error}");
    }
}

fn truncate(case: &Case) {
    let file = std::fs::OpenOptions::new().write(true).open(&case.paths[0]).unwrap();
    file.set_len(300_000).unwrap();
}

#[test]
fn a_file_that_shrinks_under_its_mapping_is_an_error_and_no_signal() {
    let machine = machine();
    let device = CudaDevice::open(0).unwrap();
    // Before registration the length is looked at, and pages that are gone are refused; after it,
    // the copy engine has pages of its own.
    for late in [false, true] {
        let case = case();
        let cut = |block: &Block| {
            if block.offset >= 8 * BLOCK {
                truncate(&case);
            }
        };
        let nothing = |_: &Block| {};
        let result = match late {
            false => copy(&case, &device, options(BLOCK, 4 * BLOCK), &cut, &nothing),
            true => copy(&case, &device, options(BLOCK, 4 * BLOCK), &nothing, &cut),
        };
        if let Some(refused) = result.as_ref().ok().and_then(|(_, stats)| stats.refused.as_ref())
            && machine.sim().is_none()
        {
            println!("SKIPPED: this driver refuses to register file mappings: {refused}");
            return;
        }
        let error = result.unwrap_err();
        assert!(
            matches!(error, Error::Changed { .. } | Error::EarlyEnd { .. }),
            "late: {late}: {error}"
        );
    }
}
