//! What loads to a device ask of the driver, counted under the simulated one: each bound is what the load
//! needs, with room for nothing that grows with its size but the blocks themselves.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;

use cuda_sim::Guard;
use fst::{Device, Dtype, Loader};
use gpu_support::{MEMORY, assert_same, open, simulated_or_skip};
use safetensors::Dtype as FileDtype;

/// Blocks of pinned memory, and their bytes.
const BLOCKS: u64 = 48;
const BLOCK: u64 = 2 << 20;

fn pins(sim: &Guard) -> u64 {
    sim.calls("cuMemHostRegister_v2") + sim.calls("cuMemHostAlloc")
}

fn copies(sim: &Guard) -> u64 {
    ["cuMemcpyHtoDAsync_v2", "cuMemcpyBatchAsync_v2", "cuMemcpy2DAsync_v2"]
        .into_iter()
        .map(|call| sim.calls(call))
        .sum()
}

fn waits(sim: &Guard) -> u64 {
    ["cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"]
        .into_iter()
        .map(|call| sim.calls(call))
        .sum()
}

#[test]
fn a_large_tensor_takes_a_copy_for_each_block() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.safetensors");
    let bytes = 80 << 20;
    fst_tests::write(&path, &[("large", FileDtype::U8, vec![bytes])]);
    let checkpoint = open(&[path]);
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(1, MEMORY);
    let loader = Loader::new().device(Device::cuda(0).unwrap()).keep_pinned(true);
    let blocks = (bytes as u64).div_ceil(BLOCK) + 1;
    let tensors = loader.load(&checkpoint).unwrap();
    assert!(pins(&sim) <= blocks.min(BLOCKS), "{} pins", pins(&sim));
    assert!(copies(&sim) <= blocks, "{} copies", copies(&sim));
    assert_eq!(sim.calls("cuMemAlloc_v2"), 1);
    assert!(sim.calls("cuStreamCreate") <= 4 && sim.calls("cuEventCreate") <= BLOCKS);
    assert_eq!((sim.calls("cuLaunchKernel"), sim.calls("cuModuleLoadData")), (0, 0));
    // The last copies, on each stream; and blocks that somebody had to wait for.
    let waited = tensors.report().device_copy.as_ref().unwrap().ring_waits;
    assert!(waits(&sim) <= 2 * 4 + waited, "{} waits, {waited} for blocks", waits(&sim));
    assert_same(&tensors, &host, &"large");
    drop(tensors);
    // What is pinned is found again; the first load may have been over before all was.
    assert_same(&loader.load(&checkpoint).unwrap(), &host, &"again");
    assert!(pins(&sim) <= blocks.min(BLOCKS), "{} pins", pins(&sim));
    drop(loader);
    fst::gpu::release_kept();
}

#[test]
fn small_tensors_share_calls() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.safetensors");
    let tensor = |i| (&*format!("expert.{i}.weight").leak(), FileDtype::BF16, vec![1000]);
    let tensors: Vec<_> = (0..2000).map(tensor).collect();
    fst_tests::write(&path, &tensors);
    let checkpoint = open(&[path]);
    let host = Loader::new().load(&checkpoint).unwrap();
    let blocks = 2000 * 2000 / BLOCK + 2;
    // By the driver's call for many copies; by a kernel.
    for batch in [true, false] {
        let sim = simulated_or_skip!(1, MEMORY);
        sim.set("batch_copies", batch.into());
        sim.set("host_pointers", batch.into());
        let loader = Loader::new().device(Device::cuda(0).unwrap());
        let tensors = loader.load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &batch);
        let to_host = 2000;
        assert!(copies(&sim) <= 8 * blocks, "{batch}: {} copies", copies(&sim));
        assert!(waits(&sim) <= to_host + 8 * blocks, "{batch}: {} waits", waits(&sim));
        let modules = sim.calls("cuModuleLoadData");
        assert_eq!(modules, u64::from(!batch));
        assert!(sim.calls("cuLaunchKernel") <= 2 * blocks);
        // The driver finds code for its device.
        assert_eq!(sim.report().compiled_here, 0);
    }
}

#[test]
fn conversions_load_one_module_for_a_pair_of_types() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("casts.safetensors");
    let dtypes = [FileDtype::BF16, FileDtype::F16];
    let tensor = |i: usize| (&*format!("layer.{i}.weight").leak(), dtypes[i % 2], vec![100_000]);
    let tensors: Vec<_> = (0..64).map(tensor).collect();
    fst_tests::write(&path, &tensors);
    let checkpoint = open(&[path]);
    let loader = Loader::new().dtype(Dtype::F32);
    let host = loader.load(&checkpoint).unwrap();
    // Machine code for 8.0 does for 8.6; of 7.5 there is PTX alone.
    for (capability, compiled) in [(80, 0), (86, 0), (90, 0), (121, 0), (75, 2)] {
        let sim = simulated_or_skip!(1, MEMORY);
        sim.set("capability", capability);
        let loader = loader.clone().device(Device::cuda(0).unwrap());
        assert_same(&loader.load(&checkpoint).unwrap(), &host, &capability);
        assert_eq!(sim.calls("cuModuleLoadData"), 2);
        assert_eq!(sim.report().compiled_here, compiled, "{capability}");
        assert!(sim.calls("cuLaunchKernel") <= 64 + 32, "{}", sim.calls("cuLaunchKernel"));
    }
}

/// Time passes as the table of costs says; what is made in front of the first copy is short.
#[test]
fn a_clock_runs_when_it_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("timed.safetensors");
    fst_tests::write(&path, &[("timed", FileDtype::U8, vec![20 << 20])]);
    let checkpoint = open(&[path]);
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(1, MEMORY);
    assert!(sim.set("cost_link", 1 << 30));
    let loader = Loader::new().device(Device::cuda(0).unwrap());
    sim.run_clock(1.0);
    let began = std::time::Instant::now();
    let tensors = loader.load(&checkpoint).unwrap();
    let took = began.elapsed();
    let report = sim.report();
    sim.run_clock(0.0);
    // 20 MiB at 1 GiB a second.
    let least = 20_000_000_000 / 1024;
    assert!((least..least + 500_000).contains(&report.link_busy_ns), "{}", report.link_busy_ns);
    assert!(took.as_nanos() as u64 >= report.link_busy_ns, "{took:?}");
    assert!(report.last_copy_ns - report.first_copy_ns >= report.link_busy_ns);
    let pinned: u64 = report
        .spans
        .iter()
        .filter(|s| s.call.contains("HostRegister"))
        .map(|s| s.ended - s.began)
        .sum();
    assert!(pinned >= 140_000, "{pinned}");
    assert_same(&tensors, &host, &"timed");
    let copy = tensors.report().device_copy.clone().unwrap();
    let names: Vec<_> = copy.preparations.iter().map(|p| p.name).collect();
    for name in ["read.pin", "read.streams", "read.allocate"] {
        assert!(names.contains(&name), "{names:?}");
        assert!(tensors.report().stage(name).is_some(), "{name}");
    }
    assert!(copy.first_block.is_some());
}
