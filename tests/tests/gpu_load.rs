//! Loads to CUDA devices under the simulated driver, held to loads to the host, which other tests
//! hold to the official crate. Copies happen at the latest moment that the driver's contract
//! allows, fresh and freed memory is poisoned, and whatever is left over fails the test.
//!
//! With `FST_TEST_REAL_CUDA=1` the tests that need no simulator run on the machine's own driver
//! and device 0; the others say that they were skipped.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;
mod stream_support;

use cuda_sim::Sim;
use fst::{CachedCopy, Device, DeviceError, Dtype, Engine, Error, Loader};
use fst_tests::{crowded_checkpoint, misaligned_checkpoint};
use gpu_support::{
    MEMORY, assert_same, assert_same_bytes, machine, open, simulated, simulated_or_skip,
};
use stream_support::arrival;

#[test]
fn whole_checkpoints_arrive_through_every_engine() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    for engine in [Engine::Auto, Engine::Uring, Engine::Pread, Engine::Mmap] {
        let _sim = machine();
        let loader = Loader::new().device(Device::cuda(0).unwrap()).engine(engine);
        if engine == Engine::Uring
            && let Some(refusal) = fst::io::engine::uring_refusal()
        {
            println!("SKIPPED: io_uring: {refusal}");
            continue;
        }
        let tensors = loader.load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &engine);
        assert_eq!(tensors.report().bytes, host.report().bytes);
        assert_eq!(tensors.report().device.to_string(), "cuda:0");
    }
}

#[test]
fn slices_and_conversions_happen_on_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let dtypes = [None, Some(Dtype::F32), Some(Dtype::F16), Some(Dtype::F64), Some(Dtype::F8E5M2)];
    for dtype in dtypes {
        let mut loader =
            Loader::new().slice("huge", 1, 3..1500).slice("big", 0, 7..1400).slice("wide", 1, 1..3);
        // Several dimensions, and several ranges of one.
        loader = loader.slice("huge", 0, 2..2000).slice("huge", 1, 0..2).slice("wide", 2, 5..7);
        loader = loader.slice("big", 0, 3..9).slice("wide", 0, 2..3).slice("wide", 0, 0..3);
        if let Some(dtype) = dtype {
            loader = loader.dtype(dtype);
        }
        let host = loader.load(&checkpoint).unwrap();
        let _sim = machine();
        let tensors = loader.device(Device::cuda(0).unwrap()).load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &dtype);
    }
}

#[test]
fn misaligned_tensors_are_moved_and_converted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd.safetensors");
    misaligned_checkpoint(&path);
    let checkpoint = open(&[path]);
    for loader in [Loader::new(), Loader::new().dtype(Dtype::F64)] {
        let host = loader.load(&checkpoint).unwrap();
        let _sim = machine();
        let tensors = loader.device(Device::cuda(0).unwrap()).load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &"misaligned");
    }
}

#[test]
fn streams_keep_to_a_budget_of_device_memory() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    for in_order in [false, true] {
        let _sim = machine();
        let budget = 9 << 20;
        let loader = Loader::new().device(Device::cuda(0).unwrap()).memory_budget(budget);
        let mut stream = loader.in_order(in_order).stream(&checkpoint).unwrap();
        let mut names = Vec::new();
        for tensor in &mut stream {
            let tensor = tensor.unwrap();
            let copy = tensor.to_host().unwrap();
            let expected = host.get(tensor.name()).unwrap();
            assert!(copy.bytes().unwrap() == expected.bytes().unwrap(), "{}", tensor.name());
            names.push(tensor.name().to_owned());
        }
        assert_eq!(names.len(), host.len());
        if in_order {
            let order = checkpoint.tensors().iter().map(|t| t.name().to_owned());
            assert_eq!(names, order.collect::<Vec<_>>());
        }
        assert!(stream.peak_bytes() <= budget);
    }
}

#[test]
fn a_stream_dropped_midway_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let _sim = machine();
    let loader = Loader::new().device(Device::cuda(0).unwrap()).memory_budget(9 << 20);
    let mut stream = loader.stream(&checkpoint).unwrap();
    let kept = stream.next().unwrap().unwrap();
    drop(stream);
    assert!(kept.to_host().is_ok());
}

#[test]
fn too_little_device_memory_is_told_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let sim = simulated_or_skip!(1, 8 << 20);
    let error = Loader::new().device(Device::cuda(0).unwrap()).load(&checkpoint).unwrap_err();
    let Error::Device(DeviceError::TooLarge { largest, bytes, .. }) = &error else {
        panic!("{error}")
    };
    assert_eq!((largest.as_str(), *bytes), ("huge", 2048 * 2051 * 2));
    assert!(error.to_string().contains("out of memory on cuda:0"), "{error}");
    assert_eq!(sim.report().copied_bytes, 0);
}

#[test]
fn memory_beside_the_tensors_counts_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let casting = Loader::new().dtype(Dtype::F32);
    for (loader, engine, way) in [
        (casting.clone(), Engine::Auto, CachedCopy::Registered),
        (casting.clone(), Engine::Pread, CachedCopy::Auto),
        (casting, Engine::Gds, CachedCopy::Auto),
        (Loader::new(), Engine::Gds, CachedCopy::Auto),
    ] {
        let host = loader.load(&checkpoint).unwrap();
        let load = |memory: u64| {
            let sim = Sim::load().unwrap().exclusive(1, memory);
            assert!(sim.add_kernels(fst_cuda_sim_kernels::LIBRARY.as_ref()));
            // As real drivers do.
            assert!(sim.set("allocation_unit", 2 << 20));
            fst::gpu::cufile::CuFile::open_simulated(sim.path()).unwrap();
            let loader = loader.clone().device(Device::cuda(0).unwrap()).engine(engine);
            match loader.cached_copy(way).load(&checkpoint) {
                Ok(tensors) => {
                    assert_same(&tensors, &host, &engine);
                    Ok(())
                }
                Err(Error::Device(DeviceError::TooLarge { source, .. })) => {
                    assert_eq!(sim.calls("cuMemAlloc_v2"), 0);
                    let fst::gpu::Error::OutOfMemory { needed, .. } = source else {
                        panic!("{source}")
                    };
                    Err(needed)
                }
                Err(other) => panic!("{engine}: {other}"),
            }
        };
        if simulated(1, MEMORY).is_none() {
            println!("SKIPPED: needs the simulated driver");
            return;
        }
        let needed = load(1 << 20).unwrap_err();
        assert!(needed > host.report().bytes + (4 << 20), "{engine}: {needed}");
        assert_eq!(load(needed - 1), Err(needed));
        load(needed).unwrap();
    }
}

#[test]
fn streams_keep_to_their_budget_with_all_that_they_take() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let casting = Loader::new().dtype(Dtype::F32);
    for (loader, engine) in
        [(casting.clone(), Engine::Auto), (casting, Engine::Gds), (Loader::new(), Engine::Gds)]
    {
        let host = loader.load(&checkpoint).unwrap();
        let loader = loader.engine(engine);
        let least = {
            let sim = simulated_or_skip!(1, MEMORY);
            fst::gpu::cufile::CuFile::open_simulated(sim.path()).unwrap();
            let loader = loader.clone().device(Device::cuda(0).unwrap());
            match loader.memory_budget(1 << 20).stream(&checkpoint) {
                Err(Error::Budget { needed, .. }) => needed,
                other => panic!("{other:?}"),
            }
        };
        for budget in [least, least + (1 << 20), 3 * least, 8 * least] {
            // A device that has no more than the budget.
            let _sim = simulated_or_skip!(1, budget);
            let loader = loader.clone().device(Device::cuda(0).unwrap()).memory_budget(budget);
            let mut count = 0;
            for tensor in loader.stream(&checkpoint).unwrap() {
                assert_same_bytes(&tensor.unwrap(), &host);
                count += 1;
            }
            assert_eq!(count, host.len(), "{engine}, {budget} bytes");
        }
    }
}

#[test]
fn failures_at_every_call_end_the_load_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let expected = checkpoint.tensors().len();
    let calls = ["cuMemAlloc_v2", "cuStreamCreate", "cuEventCreate", "cuEventRecord", "run:copy"];
    for call in calls {
        let mut failed = 0;
        for nth in [1, 2, 5] {
            let sim = simulated_or_skip!(1, MEMORY);
            let device = Device::cuda(0).unwrap();
            sim.fail(call, nth, 2);
            match Loader::new().device(device).load(&checkpoint) {
                // The load was over before the call that was to fail.
                Ok(tensors) => assert_eq!(tensors.len(), expected),
                Err(Error::Device(_)) => failed += 1,
                Err(other) => panic!("{call} {nth}: {other}"),
            }
        }
        assert!(failed > 0, "{call} was never reached");
    }
}

#[test]
fn two_devices_and_two_loads_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let _sim = simulated_or_skip!(2, MEMORY);
    std::thread::scope(|scope| {
        let loads: Vec<_> = [0, 1, 0]
            .map(|ordinal| {
                let (checkpoint, host) = (&checkpoint, &host);
                scope.spawn(move || {
                    let loader = Loader::new().device(Device::cuda(ordinal).unwrap());
                    for tensor in &loader.load(checkpoint).unwrap() {
                        assert_eq!(tensor.device(), Device::cuda(ordinal).unwrap());
                        let copy = tensor.to_host().unwrap();
                        let expected = host.get(tensor.name()).unwrap();
                        assert!(copy.bytes().unwrap() == expected.bytes().unwrap());
                    }
                })
            })
            .into_iter()
            .collect();
        for load in loads {
            load.join().unwrap();
        }
    });
}

#[test]
fn devices_that_are_not_there_are_errors() {
    let _sim = simulated_or_skip!(1, MEMORY);
    assert_eq!(Device::available().len(), 2);
    let error = Device::cuda(1).unwrap_err().to_string();
    assert!(error.contains("no CUDA device 1"), "{error}");
    assert!("cuda:x".parse::<Device>().is_err());
    assert!("tpu".parse::<Device>().is_err());
    assert_eq!("cuda:0".parse::<Device>().unwrap(), Device::cuda(0).unwrap());
}

#[test]
fn tensors_are_handed_to_cudarc_and_dlpack_without_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let _sim = machine();
    let loader = Loader::new().device(Device::cuda(0).unwrap()).select("big");
    let tensor = loader.load(&checkpoint).unwrap().get("big").unwrap().clone();
    let source = tensor.dlpack().unwrap();
    assert_eq!(source.address, tensor.device_ptr().unwrap());
    assert_eq!(source.shape, [1500, 1001]);
    drop(tensor);
    let managed = source.into_managed();
    // SAFETY: a managed tensor that nobody else has; its deleter is called once.
    unsafe {
        let deleter = managed.as_ref().deleter.unwrap();
        deleter(managed.as_ptr());
    }
}

#[test]
fn only_the_last_owner_exports_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let tensors = Loader::new().load(&checkpoint).unwrap();
    let shared = tensors.get("big").unwrap().clone();
    assert!(matches!(shared.into_dlpack(), Err(Error::NotWritable { .. })));
    let mut all: Vec<_> = tensors.into_iter().collect();
    let index = all.iter().position(|tensor| tensor.name() == "big").unwrap();
    let tensor = all.swap_remove(index);
    let before: Vec<Vec<u8>> = all.iter().map(|t| t.bytes().unwrap().to_vec()).collect();
    let (read_only, len) = (tensor.dlpack().unwrap(), tensor.byte_len());
    assert!(matches!(tensor.clone().into_dlpack(), Err(Error::NotWritable { .. })));
    drop(read_only);
    let source = tensor.into_dlpack().unwrap();
    // SAFETY: memory that the export alone refers to.
    unsafe { (source.address as usize as *mut u8).write_bytes(0xA5, len) };
    // The neighbours in its arena are what they were.
    assert!(all.iter().zip(&before).all(|(tensor, bytes)| tensor.bytes().unwrap() == bytes));
}

/// Also elements that DLPack has no code for, and to whatever takes an owner of bytes.
#[test]
fn bytes_are_handed_over_whatever_they_are_elements_of() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("packed.safetensors");
    let header = r#"{"f4":{"dtype":"F4","shape":[3,4],"data_offsets":[0,6]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&[1, 2, 3, 4, 5, 6]);
    std::fs::write(&path, file).unwrap();
    let checkpoint = open(&[path]);
    let _sim = machine();
    for device in [Device::host(), Device::cuda(0).unwrap()] {
        let tensors = Loader::new().device(device).load(&checkpoint).unwrap();
        let tensor = tensors.into_iter().next().unwrap();
        assert!(tensor.dlpack().is_err());
        let source = tensor.dlpack_bytes().unwrap();
        assert_eq!((&*source.shape, source.dtype.bits), (&[6][..], 8));
        assert!(tensor.clone().into_dlpack_bytes().is_err());
        drop(source);
        let bytes = tensor.clone().into_bytes().unwrap();
        let owned: Box<dyn AsRef<[u8]> + Send + Sync> = Box::new(bytes);
        assert_eq!(owned.as_ref().as_ref(), [1, 2, 3, 4, 5, 6]);
        drop(owned);
        assert_eq!(tensor.into_dlpack_bytes().unwrap().shape, [6]);
    }
}

#[test]
fn cufile_loads_what_the_pipeline_loads() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let sim = simulated_or_skip!(1, MEMORY);
    fst::gpu::cufile::CuFile::open_simulated(sim.path()).unwrap();
    for dtype in [None, Some(Dtype::F32)] {
        let mut loader = Loader::new().slice("huge", 1, 3..1500);
        if let Some(dtype) = dtype {
            loader = loader.dtype(dtype);
        }
        let host = loader.load(&checkpoint).unwrap();
        let loader = loader.device(Device::cuda(0).unwrap()).engine(Engine::Gds);
        let tensors = loader.load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &dtype);
        assert_eq!(tensors.report().engine.used, Engine::Gds);
        assert!(tensors.report().bytes_read >= tensors.report().bytes_asked);
        let mut budget = 16 << 20;
        if dtype.is_some() {
            budget *= 2;
        }
        let mut stream = loader.memory_budget(budget).stream(&checkpoint).unwrap();
        let mut count = 0;
        for tensor in &mut stream {
            assert_same_bytes(&tensor.unwrap(), &host);
            count += 1;
        }
        assert_eq!(count, host.len());
        assert!(stream.peak_bytes() <= budget);
    }
    // Dropped midway, held up by what is held, and with a failing read.
    let loader = Loader::new().device(Device::cuda(0).unwrap()).engine(Engine::Gds);
    let loader = loader.memory_budget(11 << 20).stall_timeout(std::time::Duration::from_millis(50));
    let mut stream = loader.stream(&checkpoint).unwrap();
    let mut held = Vec::new();
    let stalled = loop {
        match stream.next() {
            Some(Ok(tensor)) => held.push(tensor),
            Some(Err(error)) => break error,
            None => panic!("all fits"),
        }
    };
    assert!(matches!(stalled, Error::Stalled { .. }), "{stalled}");
    drop(stream);
    drop(held);
    sim.fail("cuFileRead", 2, 5010);
    let mut stream = loader.stream(&checkpoint).unwrap();
    let error = std::iter::from_fn(|| arrival(&mut stream)).find_map(Result::err).unwrap();
    assert!(matches!(error, Error::Device(_)), "{error}");
    drop(stream);
    let host = Loader::new().engine(Engine::Gds).load(&checkpoint);
    assert!(host.unwrap_err().to_string().contains("device memory only"));
}

#[test]
fn cufile_streams_more_than_its_slots_hold() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.safetensors");
    let names: Vec<&'static str> = (0..24).map(|i| &*format!("t{i}").leak()).collect();
    let specs: Vec<fst_tests::Spec> =
        names.iter().map(|name| (*name, safetensors::Dtype::U8, vec![4 << 20])).collect();
    fst_tests::write(&path, &specs);
    let checkpoint = open(&[path]);
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(1, MEMORY);
    fst::gpu::cufile::CuFile::open_simulated(sim.path()).unwrap();
    let loader = Loader::new().device(Device::cuda(0).unwrap()).engine(Engine::Gds);
    let loader = loader.memory_budget(16 << 20).stall_timeout(std::time::Duration::from_secs(60));
    let mut count = 0;
    for tensor in loader.stream(&checkpoint).unwrap() {
        // Memory comes back as soon as it is looked at: whoever waits, waits for reads alone.
        assert_same_bytes(&tensor.unwrap(), &host);
        count += 1;
    }
    assert_eq!(count, names.len());
}

#[test]
fn a_crowd_of_tiny_tensors_costs_few_driver_calls() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crowd.safetensors");
    let count = 3000;
    let names: Vec<&'static str> = (0..count).map(|i| &*format!("t{i}").leak()).collect();
    let specs: Vec<fst_tests::Spec> = names
        .iter()
        .enumerate()
        .map(|(i, name)| (*name, safetensors::Dtype::F16, vec![1 + i % 7, 2 + i % 41]))
        .chain([("large", safetensors::Dtype::F16, vec![700, 300])])
        .collect();
    fst_tests::write(&path, &specs);
    let checkpoint = open(&[path]);
    let plain = Loader::new();
    let sliced = (0..count).fold(Loader::new(), |l, i| l.slice(names[i], 1, 1..2 + i % 41));
    for (loader, batch) in [
        (plain.clone(), true),
        (plain.clone(), false),
        (plain.dtype(Dtype::F32), false),
        (sliced.clone(), false),
        (sliced.dtype(Dtype::BF16), true),
    ] {
        let host = loader.load(&checkpoint).unwrap();
        let sim = simulated_or_skip!(1, MEMORY);
        sim.set("batch_copies", batch.into());
        let tensors = loader.device(Device::cuda(0).unwrap()).load(&checkpoint).unwrap();
        let calls: u64 = [
            "cuMemcpyHtoDAsync_v2",
            "cuMemcpy2DAsync_v2",
            "cuMemcpyBatchAsync",
            "cuMemcpyBatchAsync_v2",
            "cuLaunchKernel",
            "cuEventRecord",
        ]
        .iter()
        .map(|call| sim.calls(call))
        .sum();
        assert!(calls < 20, "{calls} driver calls for {count} tensors");
        assert_same(&tensors, &host, &"crowd");
    }
}

#[test]
fn pinned_memory_is_kept_for_later_loads_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let sim = simulated_or_skip!(1, MEMORY);
    let pinned = || sim.calls("cuMemHostRegister_v2") + sim.calls("cuMemHostAlloc");
    let loader = Loader::new().device(Device::cuda(0).unwrap()).select("t*");
    loader.load(&checkpoint).unwrap();
    assert_eq!((pinned(), sim.report().pinned_ranges), (1, 0), "given back by default");
    let loader = loader.keep_pinned(true);
    loader.load(&checkpoint).unwrap();
    assert_eq!((pinned(), sim.report().pinned_ranges), (2, 1));
    loader.load(&checkpoint).unwrap();
    assert_eq!(loader.stream(&checkpoint).unwrap().filter_map(Result::ok).count(), 10);
    assert_eq!((pinned(), sim.report().pinned_ranges), (2, 1), "used again");
    assert_eq!(fst::gpu::release_kept() as u64, 2 << 20);
    assert_eq!(sim.report().pinned_ranges, 0);
}

#[test]
fn torn_tensors_and_views_count_against_a_streams_budget() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd.safetensors");
    misaligned_checkpoint(&path);
    let checkpoint = open(&[path]);
    let sizes = [600_001 * 8, 3001 * 8];
    let budget = sizes[0] + 10;
    let loader = Loader::new().dtype(Dtype::F64);
    let host = loader.load(&checkpoint).unwrap();
    let _sim = machine();
    let loader = loader
        .device(Device::cuda(0).unwrap())
        .memory_budget(budget)
        .stall_timeout(std::time::Duration::from_millis(100));
    let mut stream = loader.stream(&checkpoint).unwrap();
    let first = arrival(&mut stream).unwrap().unwrap();
    assert_eq!(first.name(), "a");
    assert_same_bytes(&first, &host);
    assert_eq!(stream.peak_bytes(), sizes[0]);
    assert!(matches!(stream.next(), Some(Err(Error::Stalled { .. }))), "the tensor holds it up");
    let context = cudarc::driver::CudaContext::new(0).unwrap();
    let view = first.cuda_view::<f64>(&context.default_stream()).unwrap();
    drop(first);
    assert!(matches!(stream.next(), Some(Err(Error::Stalled { .. }))), "the view holds it up");
    drop(view);
    let second = arrival(&mut stream).unwrap().unwrap();
    assert_same_bytes(&second, &host);
    assert!(stream.next().is_none());
    // In order no more is needed: what straddles blocks is read with all else.
    let needed = |loader: &Loader| match loader.stream(&checkpoint) {
        Err(Error::Budget { needed, .. }) => needed,
        other => panic!("{other:?}"),
    };
    assert_eq!(needed(&loader.clone().memory_budget(1 << 20)), sizes[0]);
    assert_eq!(needed(&loader.in_order(true).memory_budget(1 << 20)), sizes[0]);
}

/// Of a model, an engine may keep the norms and give the rest away, as it quantises that.
#[test]
fn small_tensors_keep_no_memory_of_large_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let norms = ["norm0", "norm1", "norm2", "norm3"];
    let layers = ["layer0", "layer1", "layer2", "layer3"];
    let layer = |i| [(layers[i], vec![1024, 1100]), (norms[i], vec![1024])];
    let specs: Vec<fst_tests::Spec> = (0..4)
        .flat_map(layer)
        .map(|(name, shape)| (name, safetensors::Dtype::F32, shape))
        .collect();
    fst_tests::write(&path, &specs);
    let checkpoint = open(&[path]);
    for loader in [Loader::new(), Loader::new().dtype(Dtype::BF16)] {
        let host = loader.load(&checkpoint).unwrap();
        let sim = simulated_or_skip!(1, MEMORY);
        let tensors = loader.device(Device::cuda(0).unwrap()).load(&checkpoint).unwrap();
        assert_same(&tensors, &host, &"norms and layers");
        let kept: Vec<_> = norms.iter().map(|norm| tensors.get(norm).unwrap().clone()).collect();
        assert!(sim.report().device_bytes > 8 << 20);
        drop(tensors);
        let held = sim.report().device_bytes;
        assert!(held <= 64 << 10, "{held} bytes held by 4 norms");
        assert!(kept.iter().all(|norm| norm.to_host().is_ok()));
    }
}
