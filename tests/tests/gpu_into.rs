//! Loads into device memory of the caller's under the simulated driver, held to loads to the host.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod gpu_support;

use cudarc::driver::CudaContext;
use fst::gpu::{CudaDevice, DeviceArena};
use fst::{Checkpoint, Destination, Device, Dtype, Engine, Error, Loader, Tensors};
use fst_tests::{crowded_checkpoint, misaligned_checkpoint};
use gpu_support::{MEMORY, machine, open, simulated_or_skip};
use half::bf16;

/// Room for all tensors of `host`, every one at an odd place: what lies between must stay as it is.
struct Room {
    arena: DeviceArena,
    places: Vec<(String, u64, u64)>,
}

const BETWEEN: u8 = 0xA7;

impl Room {
    fn new(host: &Tensors, align: u64) -> Self {
        let mut len = 0;
        let places = host.iter().map(|tensor| {
            let start = len + align;
            len = (start + tensor.byte_len() as u64).next_multiple_of(align);
            (tensor.name().to_owned(), start, tensor.byte_len() as u64)
        });
        let places = places.collect();
        let arena = DeviceArena::new(&CudaDevice::open(0).unwrap(), len + 1).unwrap();
        arena.copy_from_host(0, &vec![BETWEEN; len as usize + 1]).unwrap();
        Self { arena, places }
    }

    fn destinations(&self) -> Vec<(String, Destination<'static>)> {
        let place = |(name, start, len): &(String, u64, u64)| {
            let address = self.arena.range(*start, *len).unwrap();
            // SAFETY: a place of its own in an arena that nobody else uses before the load is over.
            (name.clone(), unsafe { Destination::device_bytes(address, *len) })
        };
        self.places.iter().map(place).collect()
    }

    fn check(&self, host: &Tensors) {
        let mut bytes = vec![0; self.arena.len() as usize];
        self.arena.copy_to_host(0, &mut bytes).unwrap();
        let mut end = 0;
        for (name, start, len) in &self.places {
            let (start, len) = (*start as usize, *len as usize);
            assert!(bytes[end..start].iter().all(|b| *b == BETWEEN), "in front of {name}");
            end = start + len;
            assert!(bytes[start..end] == *host.get(name).unwrap().bytes().unwrap(), "{name}");
        }
        assert!(bytes[end..].iter().all(|b| *b == BETWEEN), "behind the last");
    }
}

fn both_ways(loader: &Loader, checkpoint: &Checkpoint, align: u64) {
    let host = loader.load(checkpoint).unwrap();
    let machine = machine();
    let room = Room::new(&host, align);
    let before = machine.as_ref().map(|sim| sim.report().arrays);
    let loader = loader.clone().device(Device::cuda(0).unwrap());
    let report = loader.load_into(checkpoint, room.destinations()).unwrap();
    room.check(&host);
    assert_eq!((report.tensors, report.bytes), (host.len(), host.report().bytes));
    assert_eq!(report.bytes_asked, host.report().bytes_asked);
    assert_eq!(report.device.to_string(), "cuda:0");
    assert_eq!(machine.as_ref().map(|sim| sim.report().arrays), before, "nothing is left");
}

#[test]
fn tensors_arrive_in_the_callers_device_memory() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let loader = Loader::new().slice("huge", 1, 3..1500).slice("big", 0, 7..1400);
    let loader = loader.slice("huge", 1, 0..2).slice("huge", 0, 9..700).slice("big", 0, 3..9);
    both_ways(&loader, &checkpoint, 8);
    // Bytes that are not converted go anywhere.
    both_ways(&loader, &checkpoint, 1);
    both_ways(&loader.dtype(Dtype::F32), &checkpoint, 8);
    let path = dir.path().join("odd.safetensors");
    misaligned_checkpoint(&path);
    both_ways(&Loader::new().dtype(Dtype::F64), &open(&[path]), 8);
}

#[test]
fn cudarc_slices_are_filled() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let _sim = machine();
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let mut big = stream.alloc_zeros::<bf16>(1500 * 1001).unwrap();
    let mut ids = stream.alloc_zeros::<i64>(20).unwrap();
    let mut middle = ids.slice_mut(5..14);
    let loader = Loader::new().device(Device::cuda(0).unwrap());
    let destinations = [
        ("big", Destination::cuda(&mut big).unwrap()),
        ("ids", Destination::cuda_view(&mut middle).unwrap()),
    ];
    // The zeros were queued: had nobody waited for them, they would be written last.
    loader.load_into(&checkpoint, destinations).unwrap();
    let got = stream.clone_dtoh(&big).unwrap();
    let got: Vec<u8> = got.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
    assert!(got == host.get("big").unwrap().bytes().unwrap());
    let got = stream.clone_dtoh(&ids).unwrap();
    assert_eq!(got[5..14], *host.get("ids").unwrap().as_slice::<i64>().unwrap());
    assert!(got[..5].iter().chain(&got[14..]).all(|id| *id == 0));
    let typed = [("big", Destination::cuda(&mut ids).unwrap())];
    let error = loader.load_into(&checkpoint, typed).unwrap_err();
    assert!(matches!(error, Error::WrongDtype { .. }), "{error}");
    drop((big, ids));
    stream.synchronize().unwrap();
}

#[test]
fn cufile_fills_the_callers_memory() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    let sim = simulated_or_skip!(1, MEMORY);
    fst::gpu::cufile::CuFile::open_simulated(sim.path()).unwrap();
    let room = Room::new(&host, 8);
    let loader = Loader::new().device(Device::cuda(0).unwrap()).engine(Engine::Gds);
    loader.load_into(&checkpoint, room.destinations()).unwrap();
    room.check(&host);
}

#[test]
fn memory_of_another_place_is_refused_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let sim = simulated_or_skip!(2, MEMORY);
    let device = Loader::new().device(Device::cuda(0).unwrap());
    let mut ids = [0i64; 9];
    let on_host = [("ids", Destination::elements(&mut ids))];
    let error = device.load_into(&checkpoint, on_host).unwrap_err();
    assert!(matches!(error, Error::DestinationDevice { .. }), "{error}");
    for (ordinal, loader) in [(1, device.clone()), (0, Loader::new())] {
        let stream = CudaContext::new(ordinal).unwrap().default_stream();
        let mut ids = stream.alloc_zeros::<i64>(9).unwrap();
        let elsewhere = [("ids", Destination::cuda(&mut ids).unwrap())];
        let error = loader.load_into(&checkpoint, elsewhere).unwrap_err();
        assert!(matches!(error, Error::DestinationDevice { .. }), "{error}");
        // cudarc frees in the order of the stream.
        drop(ids);
        stream.synchronize().unwrap();
    }
    let arena = DeviceArena::new(&CudaDevice::open(0).unwrap(), 4096).unwrap();
    // SAFETY: nobody else uses the arena.
    let at = |start, len| unsafe { Destination::device_bytes(arena.address() + start, len) };
    let error = device.load_into(&checkpoint, [("half", at(0, 153))]).unwrap_err();
    assert!(matches!(error, Error::DestinationLength { expected: 154, found: 153, .. }), "{error}");
    let error = device.dtype(Dtype::F32).load_into(&checkpoint, [("half", at(2, 308))]);
    assert!(matches!(error, Err(Error::Misaligned { .. })), "{error:?}");
    assert_eq!(sim.report().copied_bytes, 0);
}

#[test]
fn a_failed_load_leaves_the_memory_to_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = open(&crowded_checkpoint(dir.path()));
    let host = Loader::new().load(&checkpoint).unwrap();
    for (call, nth) in [("cuEventRecord", 2), ("cuMemcpyHtoDAsync_v2", 2), ("cuEventCreate", 3)] {
        let sim = simulated_or_skip!(1, MEMORY);
        let room = Room::new(&host, 8);
        let loader = Loader::new().device(Device::cuda(0).unwrap());
        sim.fail(call, nth, cuda_sim::ERROR_UNKNOWN);
        let error = loader.load_into(&checkpoint, room.destinations()).unwrap_err();
        assert!(matches!(error, Error::Device(_)), "{call}: {error}");
        assert_eq!((sim.report().arrays, sim.report().pending), (1, 0), "{call}");
    }
}
