//! Loads by several ranks onto simulated CUDA devices when one of them fails: all end, in time, name it,
//! and leave nothing on any device.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod dist_support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cuda_sim::{ERROR_ILLEGAL_ADDRESS, ERROR_OUT_OF_MEMORY, Guard, Sim};
use dist_support::nccl::Nccl;
use dist_support::{Join, LONG, load_in, local, synth};
use fst::dist::{RankError, local_groups_with};
use fst::{
    CancelToken, Checkpoint, Device, DeviceError, DistError, Dtype, Error, Loader, Preset, Shard,
    Topology,
};

const WORLD: u32 = 3;
const MEMORY: u64 = 128 << 20;
const STAGING: u64 = 4 << 20;

fn simulated(devices: u64, memory: u64) -> Guard {
    let sim = Sim::load().expect("the simulator").exclusive(devices, memory);
    assert!(sim.add_kernels(fst_cuda_sim_kernels::LIBRARY.as_ref()));
    sim
}

fn devices(count: u32) -> Vec<Device> {
    (0..WORLD).map(|rank| Device::cuda((rank % count) as usize).unwrap()).collect()
}

fn in_process(devices: &[Device]) -> Vec<Join<'static>> {
    local(local_groups_with(devices, LONG).unwrap())
}

/// A checkpoint of a few megabytes that needs every kind of copy.
fn model(path: &Path) {
    synth(path, "llama-2-7b", |recipe| recipe.layers(1).shrink(10).shards(2));
}

fn loader() -> Loader {
    Loader::new().preset(Preset::llama()).staging(STAGING)
}

/// What each rank says, all of them within a few seconds.
#[track_caller]
fn failures(
    ranks: Vec<Join<'_>>,
    devices: &[Device],
    loader: &Loader,
    checkpoint: impl Fn(u32) -> Checkpoint + Sync,
) -> Vec<String> {
    let results = outcomes(ranks, devices, loader, checkpoint);
    let error = |result: Result<(), Error>| result.expect_err("a rank loaded").to_string();
    results.into_iter().map(error).collect()
}

/// How each rank's load ended.
fn outcomes(
    ranks: Vec<Join<'_>>,
    devices: &[Device],
    loader: &Loader,
    checkpoint: impl Fn(u32) -> Checkpoint + Sync,
) -> Vec<Result<(), Error>> {
    let start = Instant::now();
    let loader = |rank: u32| loader.clone().device(devices[rank as usize].clone());
    let results = load_in(ranks, loader, checkpoint);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    results.into_iter().map(|result| result.map(drop)).collect()
}

#[track_caller]
fn assert_told(told: &[String], failing: u32, cause: &str, what: &str) {
    for (rank, error) in (0..).zip(told) {
        assert!(error.contains(cause), "{what}: rank {rank} says {error}");
        // The rank itself may say just what went wrong.
        let names = error.contains(&format!("rank {failing}"));
        assert!(names || rank == failing, "{what}: rank {rank} says {error}");
    }
}

/// Calls that a rank's load makes, the code that they fail with, and what is told of it.
const CALLS: [(&str, i32, &str); 10] = [
    ("cuMemAlloc_v2", ERROR_OUT_OF_MEMORY, "out of memory"),
    ("cuStreamCreate", ERROR_OUT_OF_MEMORY, "cuStreamCreate failed"),
    ("cuEventCreate", ERROR_OUT_OF_MEMORY, "cuEventCreate failed"),
    ("cuEventRecord", ERROR_ILLEGAL_ADDRESS, "cuEventRecord failed"),
    ("cuMemsetD8Async", ERROR_ILLEGAL_ADDRESS, "cuMemsetD8Async failed"),
    ("cuMemcpy2DAsync_v2", ERROR_ILLEGAL_ADDRESS, "cuMemcpy2DAsync failed"),
    ("cuMemcpyHtoDAsync_v2", ERROR_ILLEGAL_ADDRESS, "cuMemcpyHtoDAsync failed"),
    ("cuMemcpyPeerAsync", ERROR_ILLEGAL_ADDRESS, "cuMemcpyPeerAsync failed"),
    ("run:copy", ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"),
    ("cuLaunchKernel", ERROR_ILLEGAL_ADDRESS, "cuLaunchKernel failed"),
];

#[test]
fn a_call_that_fails_on_one_device_ends_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    for (call, code, cause) in CALLS {
        let mut hits = 0;
        for failing in 0..WORLD {
            for turn in [1, 2, 5, 12, 30] {
                let sim = simulated(WORLD.into(), MEMORY);
                let devices = devices(WORLD);
                let ranks = in_process(&devices);
                let (call, what) = (format!("{call}@{failing}"), format!("{call} {turn}"));
                let before = sim.calls(&call);
                sim.fail(&call, turn, code);
                let loader = loader().dtype(Dtype::F32);
                let open = |_| Checkpoint::open(folder.path()).unwrap();
                let results = outcomes(ranks, &devices, &loader, open);
                if sim.calls(&call) < before + turn {
                    assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
                    continue;
                }
                hits += 1;
                let told: Vec<String> =
                    results.into_iter().map(|r| r.expect_err(&what).to_string()).collect();
                assert_told(&told, failing, cause, &what);
            }
        }
        assert!(hits > 0, "{call} is not called");
    }
}

#[test]
fn a_call_that_fails_under_nccl_ends_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    for (call, turn, code, cause) in [
        ("cuMemAlloc_v2", 2, ERROR_OUT_OF_MEMORY, "out of memory"),
        ("cuMemcpy2DAsync_v2", 2, ERROR_ILLEGAL_ADDRESS, "cuMemcpy2DAsync failed"),
        ("run:copy", 4, ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuStreamQuery", 3, ERROR_ILLEGAL_ADDRESS, "cuStreamQuery failed"),
    ] {
        for failing in 0..WORLD {
            let sim = simulated(WORLD.into(), MEMORY);
            let nccl = Nccl::load(&sim);
            let devices = devices(WORLD);
            let ranks = nccl.join(&devices, LONG);
            sim.fail(&format!("{call}@{failing}"), turn, code);
            let open = |_| Checkpoint::open(folder.path()).unwrap();
            let told = failures(ranks, &devices, &loader(), open);
            assert_told(&told, failing, cause, &format!("{call}, rank {failing}"));
            assert_eq!(nccl.violations(), 0);
        }
    }
    for call in ["ncclSend", "ncclGroupEnd"] {
        let sim = simulated(WORLD.into(), MEMORY);
        let nccl = Nccl::load(&sim);
        let devices = devices(WORLD);
        let ranks = nccl.join(&devices, LONG);
        nccl.fail(call, 2, 2);
        let open = |_| Checkpoint::open(folder.path()).unwrap();
        let told = failures(ranks, &devices, &loader(), open);
        let words = format!("{call}: unhandled system error");
        assert!(told.iter().all(|error| error.contains(&words)), "{told:?}");
        assert_eq!(nccl.violations(), 0);
    }
}

#[test]
fn a_context_that_dies_ends_all_ranks_that_share_it() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    for turn in [1, 2, 10, 30] {
        let sim = simulated(1, MEMORY);
        let devices = devices(1);
        let ranks = in_process(&devices);
        sim.fail("run:copy", turn, ERROR_ILLEGAL_ADDRESS);
        let open = |_| Checkpoint::open(folder.path()).unwrap();
        let told = failures(ranks, &devices, &loader(), open);
        assert!(told.iter().all(|error| error.contains("CUDA_ERROR_ILLEGAL_ADDRESS")), "{told:?}");
    }
}

fn some_file(folder: &Path) -> PathBuf {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).max().unwrap()
}

/// A file of one rank is gone or too short, when it is opened or only when it is read.
#[test]
fn a_file_that_goes_bad_on_one_rank_ends_all() {
    for failing in 0..WORLD {
        for (fault, over_nccl) in
            [("gone", false), ("shorter", true), ("shrinks", false), ("shrinks", true)]
        {
            let folder = tempfile::tempdir().unwrap();
            let [good, bad] = ["good", "bad"].map(|name| folder.path().join(name));
            model(&good);
            model(&bad);
            let file = some_file(&bad);
            let shorten = || {
                let file = std::fs::File::options().write(true).open(&file).unwrap();
                file.set_len(100_000).unwrap();
            };
            let sim = simulated(WORLD.into(), MEMORY);
            let nccl = Nccl::load(&sim);
            let devices = devices(WORLD);
            let ranks = if over_nccl { nccl.join(&devices, LONG) } else { in_process(&devices) };
            let loader = |rank: u32| {
                let file = (rank == failing && fault == "shrinks").then(|| file.clone());
                let loader = Loader::new().staging(STAGING).device(devices[rank as usize].clone());
                loader.shard(move |tensor| {
                    // By now the files are open and have been looked at.
                    if let Some(file) = &file {
                        let file = std::fs::File::options().write(true).open(file).unwrap();
                        file.set_len(100_000).unwrap();
                    }
                    if tensor.shape().len() == 2 { Shard::split(0) } else { Shard::replicate() }
                })
            };
            let checkpoint = |rank| {
                if rank != failing {
                    return Checkpoint::open(&good).unwrap();
                }
                let checkpoint = Checkpoint::open(&bad).unwrap();
                match fault {
                    "gone" => std::fs::remove_file(&file).unwrap(),
                    "shorter" => shorten(),
                    _ => {}
                }
                checkpoint
            };
            let start = Instant::now();
            let results = load_in(ranks, loader, checkpoint);
            assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
            let told: Vec<String> =
                results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
            let what = format!("{fault}, rank {failing}");
            assert_told(&told, failing, bad.to_str().unwrap(), &what);
            assert_eq!(nccl.violations(), 0);
        }
    }
}

#[test]
fn too_little_memory_is_told_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    let open = || Checkpoint::open(folder.path()).unwrap();
    let plan = loader().topology(Topology::one_node(WORLD)).rank_plan(&open()).unwrap();
    let needed = plan.loads().iter().map(|load| load.kept).max().unwrap();
    let staging = plan.staging_bytes();
    assert!(staging > 0);
    // Not even the shards; shards, but no staging; shards and staging, but not what they become.
    for (memory, loader) in [
        (needed / 2, loader()),
        (needed + staging / 2, loader()),
        (needed * 2, loader().staging(1 << 20).dtype(Dtype::F64)),
    ] {
        let sim = simulated(WORLD.into(), memory);
        let devices = devices(WORLD);
        let results = load_in(
            in_process(&devices),
            |rank| loader.clone().device(devices[rank as usize].clone()),
            |_| open(),
        );
        let errors: Vec<Error> = results.into_iter().map(Result::unwrap_err).collect();
        let own = |error: &&Error| matches!(error, Error::Device(DeviceError::TooLarge { .. }));
        assert!(errors.iter().filter(own).count() > 0, "{errors:?}");
        for error in &errors {
            assert!(error.to_string().contains("out of memory on cuda:"), "{error}");
            let told = matches!(error, Error::Dist(DistError::Group(_)));
            assert!(told || own(&error), "{error}");
        }
        assert_eq!(sim.report().copied_bytes, 0);
        assert_eq!(sim.calls("cuMemHostRegister_v2"), 0);
    }
}

#[test]
fn ranks_that_share_a_device_have_room_together_or_nothing_is_read() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    let open = || Checkpoint::open(folder.path()).unwrap();
    let plan = loader().topology(Topology::one_node(WORLD)).rank_plan(&open()).unwrap();
    let kept: u64 = plan.loads().iter().map(|load| load.kept).sum();
    let rank = plan.loads().iter().map(|load| load.kept).max().unwrap() + plan.staging_bytes();
    // Two ranks more than fill the first device, though each alone has room.
    for (count, memory, crowded) in
        [(1, rank * 2, &[0, 1, 2][..]), (2, rank + rank / 2, &[0, 2]), (1, rank * 4, &[])]
    {
        let sim = simulated(count, memory);
        let devices = devices(count as u32);
        let results = load_in(
            in_process(&devices),
            |rank| loader().device(devices[rank as usize].clone()),
            |_| open(),
        );
        if crowded.is_empty() {
            assert!(results.iter().all(Result::is_ok), "{results:?}");
            continue;
        }
        let mut told = 0;
        for result in results {
            let error = result.unwrap_err();
            let text = error.to_string();
            assert!(text.contains("out of memory on cuda:0: "), "{text}");
            let Error::Dist(DistError::Rank(error)) = error else {
                assert!(matches!(error, Error::Dist(DistError::Group(_))), "{text}");
                continue;
            };
            let RankError::SharedDevice { ranks, needed, free, largest, bytes, .. } = *error else {
                panic!("{text}");
            };
            told += 1;
            assert_eq!((&ranks[..], free), (crowded, memory));
            assert!(needed > free && needed < rank * (ranks.len() as u64 + 1), "{needed}");
            assert!(count > 1 || needed >= kept, "{needed} for {kept}");
            let shards = (0..WORLD).map(|rank| plan.rank(rank));
            let shards = shards.flat_map(|view| {
                let shards = view.outputs().iter().map(|o| (o.bytes, o.name.to_owned()));
                shards.collect::<Vec<_>>()
            });
            assert!(shards.clone().any(|shard| shard == (bytes, largest.clone())), "{largest}");
            assert_eq!(Some(bytes), shards.map(|(bytes, _)| bytes).max());
        }
        assert!(told > 0);
        assert_eq!((sim.calls("cuMemAlloc_v2@0"), sim.report().copied_bytes), (0, 0));
    }
}

#[test]
fn cancelling_one_rank_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    let _sim = simulated(2, MEMORY);
    let devices = devices(2);
    let token = CancelToken::new();
    token.cancel();
    let loader = |rank: u32| {
        let loader = loader().device(devices[rank as usize].clone());
        if rank == 1 { loader.cancel(token.clone()) } else { loader }
    };
    let results =
        load_in(in_process(&devices), loader, |_| Checkpoint::open(folder.path()).unwrap());
    assert!(matches!(results[1], Err(Error::Cancelled)), "{:?}", results[1]);
    for rank in [0, 2] {
        let error = results[rank].as_ref().unwrap_err().to_string();
        assert!(error.starts_with("rank 1 failed: ") && error.ends_with("cancelled"), "{error}");
    }
}

#[test]
fn groups_that_do_not_reach_a_device_are_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    let sim = simulated(WORLD.into(), MEMORY);
    let devices = devices(WORLD);
    let open = |_| Checkpoint::open(folder.path()).unwrap();
    // Files that are gone: whoever looked at one would say so.
    let gone = |_| {
        let folder = tempfile::tempdir().unwrap();
        model(folder.path());
        Checkpoint::open(folder.path()).unwrap()
    };
    let unreached = |result: &Result<(), Error>, by: u32| match result {
        Err(Error::Dist(DistError::Unreached { rank, device })) => {
            *rank == by && *device == devices[by as usize]
        }
        _ => false,
    };
    let host = || local(fst::LocalGroup::host(WORLD));
    let results = outcomes(host(), &devices, &loader(), gone);
    for (rank, result) in (0..).zip(&results) {
        let told = matches!(result, Err(Error::Dist(DistError::Group(_))));
        assert!(told || unreached(result, rank), "{results:?}");
    }
    assert!((0..).zip(&results).any(|(rank, result)| unreached(result, rank)), "{results:?}");
    let told = failures(host(), &devices, &loader(), gone);
    assert!(told.iter().all(|error| error.contains("local_groups")), "{told:?}");

    // One rank's only; the others learn of it.
    let others = in_process(&[devices[0].clone(), devices[0].clone(), devices[1].clone()]);
    let results = outcomes(others, &devices, &loader(), open);
    assert!(unreached(&results[2], 2), "{results:?}");
    for result in &results[..2] {
        let error = result.as_ref().unwrap_err().to_string();
        assert!(error.starts_with("rank 2 failed: ") && error.contains("cuda:2"), "{error}");
    }
    assert_eq!(sim.report().copied_bytes, 0);

    // NCCL knows devices only.
    let nccl = Nccl::load(&sim);
    let on_host = vec![Device::host(); WORLD as usize];
    let told = failures(nccl.join(&devices, LONG), &on_host, &loader(), gone);
    let words = "does not reach host; load to the group's device";
    assert!(told.iter().all(|error| error.contains(words)), "{told:?}");
    let error = fst::dist::nccl_group(&Device::host()).unwrap_err().to_string();
    assert!(error.contains("needs a CUDA device, not host"), "{error}");
}
