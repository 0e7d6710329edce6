//! Loads to several devices at once under the simulated driver: each tensor where its request says, held to
//! the official crate, and every byte of the files read once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;

use std::path::PathBuf;

use fst::gpu::{CudaDevice, DeviceArena};
use fst::{Checkpoint, Destination, Device, DeviceError, Dtype, Engine, Error, Loader};
use fst::{LocalGroup, Request, Reread, Tensor};
use fst_tests::{crowded_checkpoint, misaligned_checkpoint};
use gpu_support::{MEMORY, assert_same_bytes, open, simulated_or_skip};
use safetensors::SafeTensors;

const DEVICES: [&str; 3] = ["cuda:0", "host", "cuda:1"];

/// Neighbours go to different devices.
fn requests(checkpoint: &Checkpoint) -> Vec<Request> {
    let tensors = checkpoint.tensors().iter().zip(DEVICES.iter().cycle());
    tensors.map(|(tensor, device)| Request::new(tensor.name()).device(device)).collect()
}

/// All tensors are where their requests say.
fn assert_placed<'t>(checkpoint: &Checkpoint, tensors: impl IntoIterator<Item = &'t Tensor>) {
    let mut count = 0;
    for tensor in tensors {
        let at = checkpoint.tensors().iter().position(|t| t.name() == tensor.name()).unwrap();
        assert_eq!(tensor.device().to_string(), DEVICES[at % 3], "{}", tensor.name());
        count += 1;
    }
    assert_eq!(count, checkpoint.tensors().len());
}

fn bytes_of(paths: &[PathBuf]) -> u64 {
    paths.iter().map(|path| path.metadata().unwrap().len()).sum()
}

#[test]
fn neighbours_on_three_devices_are_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let paths = crowded_checkpoint(dir.path());
    let checkpoint = open(&paths);
    let files: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let official: Vec<_> =
        files.iter().map(|file| SafeTensors::deserialize(file).unwrap()).collect();
    for engine in [Engine::Auto, Engine::Pread, Engine::Mmap] {
        let sim = simulated_or_skip!(2, MEMORY);
        let loader = Loader::new().engine(engine).request(requests(&checkpoint));
        let tensors = loader.load(&checkpoint).unwrap();
        assert_placed(&checkpoint, &tensors);
        let mut on_devices = 0;
        for tensor in &tensors {
            let file = official.iter().find_map(|file| file.tensor(tensor.name()).ok()).unwrap();
            let copy = tensor.to_host().unwrap();
            assert!(copy.bytes().unwrap() == file.data(), "{engine}: {}", tensor.name());
            on_devices += if tensor.device().is_host() { 0 } else { tensor.byte_len() as u64 };
        }
        // One pass over the files: no page twice, though neighbours share them.
        let read = tensors.report().stage("read").unwrap().bytes;
        assert!(read <= bytes_of(&paths), "{engine}: {read} bytes read");
        let copied = sim.report().copied_bytes;
        assert!((on_devices..=read).contains(&copied), "{copied} of {on_devices} bytes");
        assert_eq!(
            tensors.report().bytes,
            tensors.iter().map(|t| t.byte_len() as u64).sum::<u64>()
        );
        let copy = tensors.report().device_copy.clone().unwrap();
        assert_eq!((copy.staged_bytes, copy.streams), (read, 8));
    }
}

#[test]
fn cuts_and_casts_are_each_device_s_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut paths = crowded_checkpoint(dir.path());
    let odd = dir.path().join("odd.safetensors");
    misaligned_checkpoint(&odd);
    paths.push(odd);
    for paths in [&paths[..3], &paths[3..]] {
        let checkpoint = open(paths);
        for loader in [
            Loader::new().dtype(Dtype::F32),
            Loader::new().dtype(Dtype::F64),
            Loader::new().dtype(Dtype::F16).keep_memory(1 << 30),
        ] {
            let cuts = |request: Request, at: usize| match checkpoint.tensors()[at].shape() {
                [rows, columns, ..] if *rows > 8 && *columns > 8 => {
                    request.slice(1, 1..columns / 2).slice(0, 3..*rows).slice(0, 0..2)
                }
                _ => request,
            };
            let cut = requests(&checkpoint).into_iter().enumerate().map(|(at, r)| cuts(r, at));
            let cut: Vec<Request> = cut.collect();
            let on_host = cut.iter().cloned().map(|request| request.device("host"));
            let host = loader.clone().request(on_host).load(&checkpoint).unwrap();
            // Every device has its turn.
            for turn in 0..3 {
                let _sim = simulated_or_skip!(2, MEMORY);
                let turned = cut.iter().cloned().zip(DEVICES.iter().cycle().skip(turn));
                let turned = turned.map(|(request, device)| request.device(device));
                let tensors = loader.clone().request(turned).load(&checkpoint).unwrap();
                assert_eq!(tensors.len(), host.len());
                tensors.iter().for_each(|tensor| assert_same_bytes(tensor, &host));
            }
        }
    }
    fst::io::release_kept();
}

#[test]
fn requests_without_a_device_go_to_the_loader_s() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let _sim = simulated_or_skip!(2, MEMORY);
    let own = Device::cuda(1).unwrap();
    let loader = Loader::new().device(own.clone()).select("*").request([
        Request::new("big").device(Device::host()),
        Request::new("huge").device(&own),
        Request::new("t9").device("cuda:0"),
    ]);
    for engine in [Engine::Auto, Engine::Pread] {
        let tensors = loader.clone().engine(engine).load(&checkpoint).unwrap();
        assert_eq!(tensors.len(), host.len());
        for tensor in &tensors {
            let expected = match tensor.name() {
                "big" => "host",
                "t9" => "cuda:0",
                _ => "cuda:1",
            };
            assert_eq!(tensor.device().to_string(), expected, "{}", tensor.name());
            assert_same_bytes(tensor, &host);
        }
    }
}

#[test]
fn loads_in_the_background_go_to_several_devices() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let loader = Loader::new().request(requests(&checkpoint));
    for budget in [None, Some(1), Some(24 << 20)] {
        for dtype in [None, Some(Dtype::F32)] {
            let mut loader = loader.clone();
            let mut host = host.clone();
            if let Some(dtype) = dtype {
                loader = loader.dtype(dtype);
                host = Loader::new().dtype(dtype).load(&checkpoint).unwrap();
            }
            let _sim = simulated_or_skip!(2, MEMORY);
            let budget = match budget {
                // The least that works.
                Some(1) => match loader.clone().memory_budget(1).stream(&checkpoint) {
                    Err(Error::Budget { needed, .. }) => Some(needed),
                    other => panic!("{other:?}"),
                },
                budget => budget,
            };
            if let Some(bytes) = budget {
                loader = loader.memory_budget(bytes);
            }
            // By name, from the last to the first, where there is room for all.
            let roomy = loader.clone().memory_budget(64 << 20);
            let loading =
                if budget.is_some() { &roomy } else { &loader }.start(&checkpoint).unwrap();
            for tensor in checkpoint.tensors().iter().rev() {
                assert_same_bytes(&loading.take(tensor.name()).unwrap(), &host);
            }
            loading.finish().unwrap();
            drop(loading);
            for in_order in [true, false] {
                let mut stream = loader.clone().in_order(in_order).stream(&checkpoint).unwrap();
                let mut names = Vec::new();
                for tensor in &mut stream {
                    let tensor = tensor.unwrap();
                    assert_same_bytes(&tensor, &host);
                    names.push(tensor.name().to_owned());
                }
                let mut expected: Vec<_> = host.iter().map(|t| t.name().to_owned()).collect();
                if !in_order {
                    names.sort();
                    expected.sort();
                }
                assert_eq!(names, expected);
                assert!(budget.is_none_or(|budget| stream.peak_bytes() <= budget));
            }
        }
    }
}

#[test]
fn memory_of_the_caller_s_is_on_the_tensor_s_device() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let _sim = simulated_or_skip!(2, MEMORY);
    let loader = Loader::new().request(requests(&checkpoint));
    let len = |at: usize| host.get(checkpoint.tensors()[at].name()).unwrap().byte_len();
    let mut on_host: Vec<Vec<u8>> =
        (0..host.len()).map(|at| vec![0; if at % 3 == 1 { len(at) } else { 0 }]).collect();
    let arena = |at: usize| {
        let device = CudaDevice::open([0, 0, 1][at % 3]).unwrap();
        DeviceArena::new(&device, len(at) as u64).unwrap()
    };
    let arenas: Vec<DeviceArena> = (0..host.len()).map(arena).collect();
    let memory = on_host.iter_mut().zip(&arenas).zip(checkpoint.tensors()).enumerate();
    let memory = memory.map(|(at, ((bytes, arena), tensor))| match at % 3 {
        1 => (tensor.name(), Destination::from(bytes)),
        // SAFETY: nobody else uses the arena before the load is over.
        _ => (tensor.name(), unsafe { Destination::device_bytes(arena.address(), arena.len()) }),
    });
    let report = loader.load_into(&checkpoint, memory).unwrap();
    assert_eq!((report.tensors, report.bytes), (host.len(), host.report().bytes));
    for (at, tensor) in checkpoint.tensors().iter().enumerate() {
        let mut found = vec![0; len(at)];
        match at % 3 {
            1 => found.copy_from_slice(&on_host[at]),
            _ => arenas[at].copy_to_host(0, &mut found).unwrap(),
        }
        assert!(found == host.get(tensor.name()).unwrap().bytes().unwrap(), "{}", tensor.name());
    }
    // Host memory for a tensor that goes to a device.
    let name = checkpoint.tensors()[2].name();
    let error = loader.load_into(&checkpoint, [(name, &mut vec![0; len(2)])]).unwrap_err();
    assert!(
        matches!(&error, Error::DestinationDevice { device, .. } if device.to_string() == "cuda:1"),
        "{error}"
    );
    // Updates go to where the tensors are.
    let mut tensors = loader.load(&checkpoint).unwrap();
    loader.update(&mut tensors, &checkpoint, Reread::All).unwrap();
    assert_placed(&checkpoint, &tensors);
    tensors.iter().for_each(|tensor| assert_same_bytes(tensor, &host));
    let error = Loader::new().update(&mut tensors, &checkpoint, Reread::All).unwrap_err();
    assert!(matches!(error, Error::OtherPlan { .. }), "{error}");
}

#[test]
fn what_is_for_one_device_refuses_several() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(2, MEMORY);
    fst::gpu::cufile::CuFile::open_simulated(sim.path()).unwrap();
    let on = |device: &str| Request::new("big").device(device);
    let loader = Loader::new().request(requests(&checkpoint)).device(Device::cuda(0).unwrap());
    let error = loader.clone().engine(Engine::Gds).load(&checkpoint).unwrap_err();
    assert!(matches!(error, Error::Engine { engine: Engine::Gds, .. }), "{error}");
    // One device beside the host: what lands there is read by another engine.
    let one = Loader::new().engine(Engine::Gds).device(Device::cuda(0).unwrap());
    let one = one.select("*").request([on("host")]).load(&checkpoint).unwrap();
    one.iter().for_each(|tensor| assert_same_bytes(tensor, &host));
    assert!(one.get("big").unwrap().device().is_host());

    for name in ["cuda:7", "tpu:0", ""] {
        let error = Loader::new().request([on(name)]).load(&checkpoint).unwrap_err();
        let unknown = matches!(error, Error::Device(DeviceError::Unknown { .. }));
        assert_eq!(unknown, !name.starts_with("cuda"), "{error}");
        assert!(matches!(error, Error::Device(_)), "{error}");
    }
    let group = std::sync::Arc::new(LocalGroup::host(1).remove(0));
    let error = Loader::new().group(group).request([on("host")]).load(&checkpoint).unwrap_err();
    assert!(error.to_string().contains("a request's device"), "{error}");
    let owned = Loader::new().request([on("cuda:1")]).load_owned(
        &checkpoint,
        |tensor| Vec::<u8>::with_capacity(tensor.byte_len() as usize),
        |_, _| panic!("nothing is read"),
    );
    assert!(matches!(owned, Err(Error::DestinationDevice { .. })), "{owned:?}");
    let reader = Loader::new().reader(&checkpoint);
    for name in ["big", "t4"] {
        let request = || Request::new(name).device("cuda:1");
        let tensor = reader.tensor(request()).unwrap();
        assert_eq!(tensor.device().to_string(), "cuda:1");
        assert_same_bytes(&tensor, &host);
        let read = reader.read(request(), &mut vec![0; tensor.byte_len()]);
        assert!(matches!(read, Err(Error::DestinationDevice { .. })), "{read:?}");
    }
    // SAFETY: nobody writes to the files.
    let mapped = unsafe { Loader::new().request(requests(&checkpoint)).map(&checkpoint) }.unwrap();
    assert_placed(&checkpoint, &mapped);
    mapped.iter().for_each(|tensor| assert_same_bytes(tensor, &host));
    let sums = Loader::new().request(requests(&checkpoint)).checksums(&checkpoint, |_| {}).unwrap();
    assert_eq!(sums, Loader::new().checksums(&checkpoint, |_| {}).unwrap());
}

#[test]
fn each_device_needs_room_for_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    // The largest two, and a device has room for one.
    let sim = simulated_or_skip!(2, 11 << 20);
    let request = |name: &str, device: &str| Request::new(name).device(device);
    let together = Loader::new().request([request("huge", "cuda:1"), request("big", "cuda:1")]);
    let error = together.load(&checkpoint).unwrap_err();
    assert!(error.to_string().contains("cuda:1"), "{error}");
    assert!(matches!(error, Error::Device(DeviceError::TooLarge { .. })), "{error}");
    assert_eq!(sim.report().copied_bytes, 0);
    let apart = Loader::new().request([request("huge", "cuda:0"), request("big", "cuda:1")]);
    let tensors = apart.load(&checkpoint).unwrap();
    tensors.iter().for_each(|tensor| assert_same_bytes(tensor, &host));
}

#[test]
fn devices_that_share_host_memory_are_loaded_beside_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(2, MEMORY);
    assert!(sim.set("integrated", 1));
    let tensors = Loader::new().request(requests(&checkpoint)).load(&checkpoint).unwrap();
    assert_placed(&checkpoint, &tensors);
    tensors.iter().for_each(|tensor| assert_same_bytes(tensor, &host));
    assert_eq!(sim.calls("cuMemAlloc_v2"), 0);
}
