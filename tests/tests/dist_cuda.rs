//! Loads by several ranks onto simulated CUDA devices, in one process and over a simulated NCCL,
//! against slices of what the official reader gives. Copies run at the latest moment that the driver's
//! contract allows, memory is poisoned, and whatever is left over fails the test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../crates/fst-dist/tests/conformance/mod.rs"]
mod conformance;
mod dist_support;

use std::collections::HashMap;
use std::sync::Mutex;

use cuda_sim::{Guard, Sim};
use dist_support::nccl::Nccl;
use dist_support::{
    ByName, FAMILIES, Join, LONG, Values, assert_little_moves, assert_same, expected, load_in,
    local, official, synth, values,
};
use fst::dist::{Cause, Space, local_groups, local_groups_with};
use fst::{Checkpoint, Device, Dtype, Engine, Error, Loader, Preset, Shard, Tensors};

const MEMORY: u64 = 512 << 20;
/// Staging memory of a rank: small, so that eight fit.
const STAGING: u64 = 16 << 20;

fn simulated(devices: u64) -> Guard {
    let sim = Sim::load().expect("the simulator").exclusive(devices, MEMORY);
    assert!(sim.add_kernels(fst_cuda_sim_kernels::LIBRARY.as_ref()));
    sim
}

/// The devices of `world` ranks, in turn.
fn devices(world: u32, count: u32) -> Vec<Device> {
    (0..world).map(|rank| Device::cuda((rank % count) as usize).unwrap()).collect()
}

fn in_process(devices: &[Device]) -> Vec<Join<'static>> {
    local(local_groups_with(devices, LONG).unwrap())
}

/// Loads on `devices` by a loader.
fn load(
    ranks: Vec<Join<'_>>,
    devices: &[Device],
    loader: &Loader,
    path: &std::path::Path,
) -> Vec<Result<Tensors, Error>> {
    let loader = |rank: u32| loader.clone().device(devices[rank as usize].clone());
    load_in(ranks, loader, |_| Checkpoint::open(path).unwrap())
}

#[track_caller]
fn assert_shards(
    results: Vec<Result<Tensors, Error>>,
    devices: &[Device],
    expected: impl Fn(usize) -> ByName,
    what: &str,
) {
    for (rank, result) in results.into_iter().enumerate() {
        let tensors = result.unwrap_or_else(|error| panic!("{what}, rank {rank}: {error}"));
        for tensor in &tensors {
            assert_eq!(tensor.device(), devices[rank]);
            assert_eq!(tensor.device_ptr().unwrap() % 256, 0, "{}", tensor.name());
        }
        assert_same(&values(&tensors), &expected(rank), &format!("{what}, rank {rank}"));
    }
}

#[test]
fn presets_on_devices_keep_what_slices_of_the_official_reader_hold() {
    for (model, family, layers, shrink) in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        synth(&path, model, |recipe| recipe.layers(layers).shrink(shrink).shards(2));
        let all = official(&path);
        let loader = Loader::new().preset(Preset::named(family).unwrap()).staging(STAGING);
        for (world, count) in [(1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (4, 1), (5, 2)] {
            let expected = |rank| expected(family, &all, rank, world as usize);
            let _sim = simulated(count.into());
            let devices = devices(world, count);
            let what = format!("{model} on {count} devices");
            let results = load(in_process(&devices), &devices, &loader, &path);
            assert_shards(results, &devices, expected, &what);
        }
    }
}

#[test]
fn ranks_over_nccl_keep_the_same() {
    for (model, family, layers, shrink) in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        synth(&path, model, |recipe| recipe.layers(layers).shrink(shrink).shards(2));
        let all = official(&path);
        let loader = Loader::new().preset(Preset::named(family).unwrap()).staging(STAGING);
        for world in [1, 2, 3, 4, 8] {
            let expected = |rank| expected(family, &all, rank, world as usize);
            let sim = simulated(world.into());
            let nccl = Nccl::load(&sim);
            let devices = devices(world, world);
            let results = load(nccl.join(&devices, LONG), &devices, &loader, &path);
            assert_shards(results, &devices, expected, &format!("{model} over NCCL"));
            assert_eq!(nccl.violations(), 0);
        }
    }
}

/// Enough bytes for several units of exchange, blocks that hold many tensors, and ragged edges.
#[test]
fn each_engine_and_staging_gives_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(4).shards(3));
    let all = official(&path);
    for (world, count) in [(3, 3), (4, 1)] {
        for engine in [Engine::Auto, Engine::Pread, Engine::Mmap] {
            for staging in [8 << 20, 64 << 20] {
                let loader = Loader::new().engine(engine).preset(Preset::llama()).staging(staging);
                let _sim = simulated(count.into());
                let devices = devices(world, count);
                let results = load(in_process(&devices), &devices, &loader, &path);
                let expected = |rank| expected("llama", &all, rank, world as usize);
                let what = format!("{engine}, {staging} bytes of staging, {count} devices");
                assert_shards(results, &devices, expected, &what);
            }
        }
    }
}

#[test]
fn nothing_is_read_twice_and_nobody_receives_what_it_drops() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(4).shards(3));
    let all = official(&path);
    let _sim = simulated(4);
    let devices = devices(4, 4);
    let loader = Loader::new().preset(Preset::llama()).staging(STAGING);
    let results = load(in_process(&devices), &devices, &loader, &path);
    let results: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    assert_eq!(results.len(), 4);
    assert_little_moves(&results, "llama", &all);
    for (tensors, device) in results.iter().zip(&devices) {
        assert_eq!(&tensors.report().device, device);
    }
}

/// Streams are waited for in the end, and not after each of a rank's reads.
#[test]
fn reads_of_a_rank_are_not_drained() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let names = ["a", "b", "c", "d"];
    fst_tests::write(&path, &names.map(|name| (name, safetensors::Dtype::U8, vec![2, 16 << 20])));
    let expected = Loader::new().load(&Checkpoint::open(&path).unwrap()).unwrap();
    let sim = simulated(1);
    let devices = devices(2, 1);
    let loader = Loader::new().shard(|_| Shard::split(0)).staging(STAGING);
    let results = load(in_process(&devices), &devices, &loader, &path);
    // 64 MiB a rank, in reads of at most 16 MiB, through two streams each.
    let waits = sim.calls("cuStreamSynchronize");
    assert!(waits <= 10, "{waits} waits");
    for (rank, tensors) in results.into_iter().enumerate() {
        for tensor in &tensors.unwrap() {
            let whole = expected.get(tensor.name()).unwrap();
            let part = &whole.bytes().unwrap()[rank * (16 << 20)..][..16 << 20];
            let copy = tensor.to_host().unwrap();
            assert!(copy.bytes().unwrap() == part, "{rank}: {}", tensor.name());
        }
    }
}

#[test]
fn pinned_memory_is_kept_for_later_loads_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "gpt2", |recipe| recipe.layers(1).shrink(12));
    let all = official(&path);
    let sim = simulated(2);
    let devices = devices(2, 2);
    let pinned = || sim.calls("cuMemHostRegister_v2") + sim.calls("cuMemHostAlloc");
    let load = |loader: &Loader| {
        let results = load(in_process(&devices), &devices, loader, &path);
        assert_shards(results, &devices, |_| all.clone(), "replicated");
        (pinned(), sim.report().pinned_ranges)
    };
    let (once, left) = load(&Loader::new());
    assert!(once > 0 && left == 0, "given back by default");
    let keeping = Loader::new().keep_pinned(true);
    // A load may be over before all of its rings is pinned: two, of four blocks each.
    for _ in 0..3 {
        let (pinned, kept) = load(&keeping);
        assert!((1..=8).contains(&kept) && pinned == once + kept, "used again: {kept}");
    }
    assert!(fst::gpu::release_kept() > 0);
    assert_eq!(sim.report().pinned_ranges, 0);
}

#[test]
fn shards_are_converted_on_their_device() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "llama-2-7b", |recipe| recipe.layers(1).shrink(37).shards(2).dtype(Dtype::BF16));
    // Every bfloat16 is the upper half of a float.
    let widen = |tensor: Values| {
        let widened = tensor.bytes.chunks_exact(2).flat_map(|b| [0, 0, b[0], b[1]]).collect();
        Values { dtype: "F32".to_owned(), shape: tensor.shape, bytes: widened }
    };
    let all = official(&path);
    assert!(all.values().all(|tensor| tensor.dtype == "BF16"));
    let loader = Loader::new().preset(Preset::llama()).dtype(Dtype::F32).staging(STAGING);
    for (world, count) in [(1, 1), (3, 3), (4, 1)] {
        let sim = simulated(count.into());
        let devices = devices(world, count);
        let results = load(in_process(&devices), &devices, &loader, &path);
        // What was converted is gone.
        let loaded: u64 = results.iter().map(|r| r.as_ref().unwrap().report().bytes).sum();
        let left = sim.report().device_bytes;
        assert!(left < loaded + loaded / 10, "{left} bytes for {loaded}");
        let expected = |rank| {
            let expected = expected("llama", &all, rank, world as usize);
            expected.into_iter().map(|(name, tensor)| (name, widen(tensor))).collect()
        };
        assert_shards(results, &devices, expected, &format!("F32 on {count} devices"));
    }
}

#[test]
fn the_host_may_be_among_the_devices() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "gpt2", |recipe| recipe.layers(2).shrink(12).shards(2));
    let all = official(&path);
    let _sim = simulated(2);
    let mut devices = devices(2, 2);
    devices.insert(1, Device::host());
    let loader = Loader::new().preset(Preset::gpt2()).staging(STAGING);
    let results = load(in_process(&devices), &devices, &loader, &path);
    for (rank, result) in results.into_iter().enumerate() {
        let expected = expected("gpt2", &all, rank, 3);
        let tensors = result.unwrap();
        assert!(tensors.iter().all(|tensor| tensor.device() == devices[rank]));
        assert_same(&values(&tensors), &expected, &format!("rank {rank}"));
    }
}

#[test]
fn tensors_outlive_ranks_and_groups() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    synth(&path, "gpt2", |recipe| recipe.layers(1).shrink(12));
    let all = official(&path);
    let sim = simulated(2);
    let devices = devices(2, 2);
    let results = load(local(local_groups(&devices).unwrap()), &devices, &Loader::new(), &path);
    let report = sim.report();
    // Shards, and nothing else, are left on the devices.
    assert_eq!((report.pinned_ranges, report.streams, report.events), (0, 0, 0));
    assert_shards(results, &devices, |_| all.clone(), "replicated");
}

/// Memory of a device for the battery.
struct Scratch {
    device: fst_gpu::CudaDevice,
    arenas: Mutex<HashMap<u64, fst_gpu::DeviceArena>>,
}

impl conformance::Scratch for Scratch {
    fn space(&self) -> Space {
        Space::Device(self.device.ordinal() as u32)
    }

    fn put(&self, bytes: &[u8]) -> Result<u64, Cause> {
        // One byte more: empty messages have addresses of their own too.
        let arena = fst_gpu::DeviceArena::new(&self.device, bytes.len() as u64 + 1)?;
        arena.copy_from_host(0, bytes)?;
        let addr = arena.address();
        self.arenas.lock().unwrap().insert(addr, arena);
        Ok(addr)
    }

    fn take(&self, addr: u64) -> Result<Vec<u8>, Cause> {
        let arena = self.arenas.lock().unwrap().remove(&addr).unwrap();
        let mut bytes = vec![0; arena.len() as usize - 1];
        arena.copy_to_host(0, &mut bytes)?;
        Ok(bytes)
    }
}

#[test]
fn groups_on_devices_pass_the_battery() {
    for (world, count) in [(1, 1), (2, 2), (3, 1), (4, 4), (8, 3)] {
        for over_nccl in [false, true] {
            if over_nccl && world != count {
                continue;
            }
            let sim = simulated(count.into());
            let nccl = Nccl::load(&sim);
            let devices = devices(world, count);
            let ranks = if over_nccl { nccl.join(&devices, LONG) } else { in_process(&devices) };
            std::thread::scope(|scope| {
                for (join, device) in ranks.into_iter().zip(&devices) {
                    let device = device.as_cuda().unwrap().clone();
                    scope.spawn(move || {
                        let scratch = Scratch { device, arenas: Mutex::default() };
                        conformance::run_in(&*join(), &scratch).unwrap();
                    });
                }
            });
            assert_eq!(nccl.violations(), 0);
        }
    }
}
