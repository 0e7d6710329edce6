//! The copy pipeline: right bytes under the worst timing, and nothing lost or reused after errors.

use crate::support::{machine, pattern, simulated};
use fst_gpu::{
    Afterwards, CopyOp, CudaDevice, DeviceArena, Error, Pipeline, PipelineOptions, Result,
    RingOptions,
};
use std::sync::{Arc, Mutex};

const BLOCK: usize = 8192;

fn options(blocks: usize, streams: usize) -> PipelineOptions {
    let ring = RingOptions { block_bytes: BLOCK, blocks, afterwards: Afterwards::Release };
    PipelineOptions { ring, streams }
}

/// Sends `bytes` through the pipeline in blocks, as `reader`, one of `readers` threads, would.
fn send(
    pipeline: &Pipeline,
    arena: &DeviceArena,
    bytes: &[u8],
    reader: usize,
    readers: usize,
) -> Result<()> {
    for (i, chunk) in bytes.chunks(BLOCK).enumerate().filter(|(i, _)| i % readers == reader) {
        let mut block = pipeline.acquire()?;
        block.as_mut_slice()[..chunk.len()].copy_from_slice(chunk);
        let len = chunk.len() as u64;
        let destination = arena.range((i * BLOCK) as u64, len)?;
        let copy = CopyOp::Linear { source: 0, destination, len };
        // SAFETY: the arena is kept by the pipeline; each block has a range of its own.
        unsafe { pipeline.submit(block, &[copy])? };
    }
    Ok(())
}

fn load(
    device: &CudaDevice,
    bytes: &[u8],
    options: PipelineOptions,
    readers: usize,
) -> Result<DeviceArena> {
    let arena = DeviceArena::new(device, bytes.len() as u64)?;
    let pipeline = Pipeline::new(device, options)?;
    pipeline.keep(Arc::new(arena.clone()));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..readers)
            .map(|r| {
                scope.spawn({
                    let (p, a) = (&pipeline, &arena);
                    move || send(p, a, bytes, r, readers)
                })
            })
            .collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap())
    })?;
    pipeline.flush()?;
    Ok(arena)
}

fn bytes_of(arena: &DeviceArena) -> Vec<u8> {
    let mut bytes = vec![0; arena.len() as usize];
    arena.copy_to_host(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn bytes_arrive_through_rings_of_any_size() {
    let _machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let bytes = pattern(BLOCK * 40 + 77, 3);
    for (blocks, streams, readers) in [(1, 1, 1), (2, 1, 1), (3, 2, 1), (8, 4, 4), (64, 3, 2)] {
        let arena = load(&device, &bytes, options(blocks, streams), readers).unwrap();
        assert!(bytes_of(&arena) == bytes, "{blocks} blocks, {streams} streams");
    }
}

#[test]
fn nothing_has_arrived_before_the_flush() {
    let Some(sim) = simulated(1, 1 << 20) else {
        return;
    };
    let device = CudaDevice::open(0).unwrap();
    let arena = DeviceArena::new(&device, 64).unwrap();
    let pipeline = Pipeline::new(&device, options(2, 1)).unwrap();
    let mut block = pipeline.acquire().unwrap();
    block.as_mut_slice()[..64].fill(9);
    let copy = CopyOp::Linear { source: 0, destination: arena.address(), len: 64 };
    // SAFETY: the arena outlives the pipeline's work.
    unsafe { pipeline.submit(block, &[copy]).unwrap() };
    assert_eq!(sim.report().pending, 1);
    assert_eq!(bytes_of(&arena), [cuda_sim::FRESH; 64]);
    pipeline.flush().unwrap();
    assert_eq!(bytes_of(&arena), [9; 64]);
}

#[test]
fn joined_batched_and_strided_copies_agree() {
    let machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let bytes = pattern(BLOCK, 5);
    let (refused, apart) = (cuda_sim::ERROR_INVALID_VALUE, "host_pointers");
    for (batch, refusal, off) in [
        (true, 0, ""),
        (false, 0, "batch_copies"),
        // Some memory that the call does not take: the copies are made one by one.
        (false, refused, ""),
        // The device has registered memory at other addresses: the call would read elsewhere.
        (false, 0, apart),
    ] {
        if let Some(sim) = machine.sim() {
            if refusal != 0 {
                sim.fail("cuMemcpyBatchAsync_v2", 1, refusal);
            }
            for name in ["batch_copies", apart] {
                assert!(sim.set(name, 1));
            }
            sim.set(off, 0);
        }
        let arena = DeviceArena::new(&device, 4 * BLOCK as u64).unwrap();
        arena.copy_from_host(0, &vec![0xEE; 4 * BLOCK]).unwrap();
        let pipeline = Pipeline::new(&device, options(4, 2)).unwrap();
        let mut expected = vec![0xEE; 4 * BLOCK];
        // Tiny tensors, each 256-byte aligned on the device.
        let tiny: Vec<CopyOp> = (0..12u64)
            .map(|i| CopyOp::Linear {
                source: i * 24,
                destination: arena.address() + i * 256,
                len: 24,
            })
            .collect();
        for i in 0..12 {
            expected[i * 256..i * 256 + 24].copy_from_slice(&bytes[i * 24..i * 24 + 24]);
        }
        // A run that continues on both sides: one copy.
        let run: Vec<CopyOp> = (0..8u64)
            .map(|i| CopyOp::Linear {
                source: i * 512,
                destination: arena.address() + BLOCK as u64 + i * 512,
                len: 512,
            })
            .collect();
        expected[BLOCK..BLOCK + 4096].copy_from_slice(&bytes[..4096]);
        // Columns 3..8 of a 50 x 20 matrix.
        let rows = [CopyOp::Strided {
            source: 3,
            source_pitch: 20,
            destination: arena.address() + 2 * BLOCK as u64,
            destination_pitch: 5,
            width: 5,
            rows: 50,
        }];
        for r in 0..50 {
            expected[2 * BLOCK + r * 5..][..5].copy_from_slice(&bytes[r * 20 + 3..][..5]);
        }
        for ops in [&tiny[..], &run, &rows] {
            let mut block = pipeline.acquire().unwrap();
            block.as_mut_slice().copy_from_slice(&bytes);
            // SAFETY: the arena outlives the flush below.
            unsafe { pipeline.submit(block, ops).unwrap() };
        }
        pipeline.flush().unwrap();
        assert!(bytes_of(&arena) == expected, "batch {batch}");
        let calls = pipeline.stats().copy_calls;
        if machine.sim().is_some() {
            assert_eq!(calls, if batch { 3 } else { 14 });
        }
    }
}

#[test]
fn a_range_outside_the_block_refuses_that_block_only() {
    let _machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let arena = DeviceArena::new(&device, BLOCK as u64).unwrap();
    let pipeline = Pipeline::new(&device, options(1, 1)).unwrap();
    let copy = CopyOp::Linear { source: 8000, destination: arena.address(), len: 193 };
    let block = pipeline.acquire().unwrap();
    // SAFETY: refused before anything is queued.
    let error = unsafe { pipeline.submit(block, &[copy]) }.unwrap_err();
    assert!(matches!(error, Error::OutOfRange { end: 8193, len: 8192, .. }), "{error}");
    // The only block is back.
    drop(pipeline.acquire().unwrap());
    pipeline.flush().unwrap();
}

#[test]
fn two_devices_and_two_loads_at_once() {
    let Some(_sim) = simulated(2, 64 << 20) else {
        return;
    };
    std::thread::scope(|scope| {
        for seed in 0..4u64 {
            scope.spawn(move || {
                let device = CudaDevice::open(seed as usize % 2).unwrap();
                let bytes = pattern(BLOCK * 30 + seed as usize, seed + 10);
                let arena = load(&device, &bytes, options(3, 2), 2).unwrap();
                assert!(bytes_of(&arena) == bytes, "load {seed}");
            });
        }
    });
}

#[test]
fn calls_come_once_when_the_bytes_are_there() {
    let machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let arena = DeviceArena::new(&device, 6 * BLOCK as u64).unwrap();
    let pipeline = Pipeline::new(&device, options(2, 2)).unwrap();
    let calls = Arc::new(Mutex::new(Vec::new()));
    for i in 0..6u8 {
        let mut block = pipeline.acquire().unwrap();
        block.as_mut_slice().fill(i);
        let destination = arena.range(u64::from(i) * BLOCK as u64, BLOCK as u64).unwrap();
        let copy = CopyOp::Linear { source: 0, destination, len: BLOCK as u64 };
        let (calls, arena) = (Arc::clone(&calls), arena.clone());
        let done = Box::new(move || {
            let mut bytes = vec![0; BLOCK];
            arena.copy_to_host(u64::from(i) * BLOCK as u64, &mut bytes).unwrap();
            assert!(bytes.iter().all(|&b| b == i));
            calls.lock().unwrap().push(i);
        });
        // SAFETY: the closures keep the arena, and the pipeline is flushed.
        unsafe { pipeline.submit_then(block, &[copy], Some(done)).unwrap() };
    }
    if machine.sim().is_some() {
        // Two blocks, six submissions: the first four had to be seen complete.
        assert_eq!(calls.lock().unwrap().len(), 4);
        while calls.lock().unwrap().len() < 6 {
            pipeline.poll().unwrap();
        }
    }
    pipeline.flush().unwrap();
    let mut calls = std::mem::take(&mut *calls.lock().unwrap());
    calls.sort_unstable();
    assert_eq!(calls, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn dropping_in_mid_stream_waits_and_frees() {
    let Some(sim) = simulated(1, 16 << 20) else {
        return;
    };
    let device = CudaDevice::open(0).unwrap();
    let arena = DeviceArena::new(&device, 4 * BLOCK as u64).unwrap();
    let pipeline = Pipeline::new(&device, options(8, 2)).unwrap();
    pipeline.keep(Arc::new(arena.clone()));
    send(&pipeline, &arena, &pattern(4 * BLOCK, 1), 0, 1).unwrap();
    let held = pipeline.acquire().unwrap();
    drop(arena);
    assert!(sim.report().pending > 0);
    drop(pipeline);
    // A block still held keeps its memory, and nothing more.
    let report = sim.report();
    assert_eq!((report.pending, report.arrays, report.streams), (0, 0, 0), "{report:?}");
    assert!(report.pinned_ranges > 0);
    drop(held);
    assert_eq!(sim.report().pinned_ranges, 0);
}

#[test]
fn a_failure_at_any_call_ends_the_load_and_leaves_nothing() {
    let calls = [
        ("cuMemAlloc_v2", 1),
        ("cuStreamCreate", 2),
        ("cuEventCreate", 6),
        ("cuMemcpyHtoDAsync_v2", 24),
        ("cuEventRecord", 24),
        ("cuEventQuery", 12),
        ("cuEventSynchronize", 6),
        ("cuStreamSynchronize", 2),
        ("cuCtxPushCurrent_v2", 40),
    ];
    let bytes = pattern(BLOCK * 24, 8);
    for (call, most) in calls {
        let mut hit = 0;
        for nth in 1..=most {
            let Some(sim) = simulated(1, 64 << 20) else {
                return;
            };
            let device = CudaDevice::open(0).unwrap();
            sim.fail(call, nth, cuda_sim::ERROR_UNKNOWN);
            let readers = 1 + (nth % 3) as usize;
            match load(&device, &bytes, options(6, 2), readers) {
                Err(error) => {
                    hit += 1;
                    assert!(
                        error.to_string().contains("CUDA_ERROR_UNKNOWN"),
                        "{call} {nth}: {error}"
                    );
                }
                // Not every use is a part of every load, and the waits in drops may fail.
                Ok(arena) => assert!(bytes_of(&arena) == bytes, "{call} {nth}"),
            }
        }
        assert!(hit > 0, "{call} was never used");
    }
}

#[test]
fn a_failure_of_running_work_ends_the_load() {
    for nth in [1, 5, 24] {
        let Some(sim) = simulated(1, 64 << 20) else {
            return;
        };
        let device = CudaDevice::open(0).unwrap();
        sim.fail("run:copy", nth, cuda_sim::ERROR_ILLEGAL_ADDRESS);
        let error = load(&device, &pattern(BLOCK * 24, 8), options(6, 2), 2).unwrap_err();
        assert!(error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{nth}: {error}");
        // Nobody can tell whether a dead context still reads staging memory: it is given up.
        assert_eq!(sim.calls("cuMemHostUnregister"), 0);
    }
}

#[test]
fn pinned_memory_refused_is_an_error() {
    let Some(sim) = simulated(1, 1 << 20) else {
        return;
    };
    let device = CudaDevice::open(0).unwrap();
    sim.fail("cuMemHostRegister_v2", 1, cuda_sim::ERROR_OUT_OF_MEMORY);
    sim.fail("cuMemHostAlloc", 1, cuda_sim::ERROR_OUT_OF_MEMORY);
    let pipeline = Pipeline::new(&device, options(2, 1)).unwrap();
    let error = pipeline.acquire().unwrap_err();
    assert!(matches!(error, Error::NoPinnedMemory { needed, .. } if needed == 2 * BLOCK as u64));
}

#[test]
fn registration_refused_falls_back_to_the_drivers_own_memory() {
    let Some(sim) = simulated(1, 16 << 20) else {
        return;
    };
    let device = CudaDevice::open(0).unwrap();
    sim.fail("cuMemHostRegister_v2", 1, cuda_sim::ERROR_NOT_SUPPORTED);
    let bytes = pattern(BLOCK * 9, 2);
    let arena = load(&device, &bytes, options(2, 1), 1).unwrap();
    assert!(bytes_of(&arena) == bytes);
    assert_eq!(sim.calls("cuMemHostAlloc"), 1);
}

#[test]
fn kept_memory_is_pinned_once() {
    let Some(sim) = simulated(1, 16 << 20) else {
        return;
    };
    let device = CudaDevice::open(0).unwrap();
    let bytes = pattern(BLOCK * 5, 2);
    let mut options = options(4, 2);
    options.ring.afterwards = Afterwards::Keep;
    for _ in 0..3 {
        let arena = load(&device, &bytes, options, 1).unwrap();
        assert!(bytes_of(&arena) == bytes);
    }
    assert_eq!(sim.calls("cuMemHostRegister_v2"), 1);
    assert_eq!(fst_gpu::release_kept(), 4 * BLOCK);
}

#[test]
fn registered_memory_goes_without_staging() {
    let machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let bytes: Arc<Vec<u8>> = Arc::new(pattern(3 << 20, 6));
    let arena = DeviceArena::new(&device, bytes.len() as u64).unwrap();
    let pipeline = Pipeline::new(&device, options(1, 2)).unwrap();
    let start = std::ptr::NonNull::new(bytes.as_ptr().cast_mut()).unwrap();
    let access = fst_gpu::HostAccess::ReadWrite;
    // SAFETY: the vector is kept by its `Arc` and never resized.
    let mapping = unsafe {
        fst_gpu::RegisteredHost::new(&device, start, bytes.len(), access, Arc::clone(&bytes) as _)
    }
    .unwrap();
    let half = bytes.len() as u64 / 2;
    for i in 0..2 {
        let copy =
            CopyOp::Linear { source: i * half, destination: arena.address() + i * half, len: half };
        // SAFETY: the arena outlives the flush.
        unsafe { pipeline.submit_registered(&mapping, &[copy], None).unwrap() };
    }
    // The pipeline keeps the registration as long as copies read it.
    drop(mapping);
    pipeline.flush().unwrap();
    assert!(bytes_of(&arena) == *bytes);
    if let Some(sim) = machine.sim() {
        sim.set("read_only_register", 0);
        // SAFETY: as above; refused here.
        let refused = unsafe {
            fst_gpu::RegisteredHost::new(
                &device,
                start,
                bytes.len(),
                fst_gpu::HostAccess::ReadOnly,
                Arc::clone(&bytes) as _,
            )
        };
        assert!(refused.unwrap_err().to_string().contains("CUDA_ERROR_NOT_SUPPORTED"));
    }
}

#[test]
fn registered_memory_stays_when_its_event_cannot_be_recorded() {
    let Some(sim) = simulated(1, 16 << 20) else { return };
    let device = CudaDevice::open(0).unwrap();
    let bytes: Arc<Vec<u8>> = Arc::new(pattern(1 << 20, 6));
    let arena = DeviceArena::new(&device, bytes.len() as u64).unwrap();
    let pipeline = Pipeline::new(&device, options(1, 2)).unwrap();
    let start = std::ptr::NonNull::new(bytes.as_ptr().cast_mut()).unwrap();
    let access = fst_gpu::HostAccess::ReadOnly;
    // SAFETY: the vector is kept by its `Arc` and never resized.
    let mapping = unsafe {
        fst_gpu::RegisteredHost::new(&device, start, bytes.len(), access, Arc::clone(&bytes) as _)
    }
    .unwrap();
    sim.fail("cuEventRecord", 1, cuda_sim::ERROR_UNKNOWN);
    let len = bytes.len() as u64;
    let copy = CopyOp::Linear { source: 0, destination: arena.address(), len };
    // SAFETY: the arena outlives the pipeline.
    let error = unsafe { pipeline.submit_registered(&mapping, &[copy], None) }.unwrap_err();
    assert!(error.to_string().contains("cuEventRecord"), "{error}");
    // The copy is queued with no event behind it; unregistering now must find it done.
    drop(mapping);
    assert_eq!(sim.report().faults().iter().filter(|f| f.contains("still queued")).count(), 0);
    assert_eq!(pipeline.flush().unwrap_err(), error);
}

/// A pipeline of four blocks and two streams, and four copies on their way, by the blocks' numbers: the
/// first and the third on one stream.
fn four_on_their_way(device: &CudaDevice) -> (Pipeline, [u32; 4]) {
    let arena = DeviceArena::new(device, 4 * BLOCK as u64).unwrap();
    let pipeline = Pipeline::new(device, options(4, 2)).unwrap();
    pipeline.keep(Arc::new(arena.clone()));
    pipeline.ring().wait_until_pinned();
    let numbers = [0, 1, 2, 3].map(|at| {
        let block = pipeline.acquire().unwrap();
        let number = block.index();
        let destination = arena.range(at * BLOCK as u64, BLOCK as u64).unwrap();
        let copy = CopyOp::Linear { source: 0, destination, len: BLOCK as u64 };
        // SAFETY: the arena is kept by the pipeline; each block has a range of its own.
        unsafe { pipeline.submit(block, &[copy]).unwrap() };
        number
    });
    (pipeline, numbers)
}

#[test]
fn who_waits_takes_the_streams_in_turn() {
    let Some(sim) = simulated(1, 64 << 20) else { return };
    assert!(sim.set("patience", 1000));
    let (pipeline, numbers) = four_on_their_way(&CudaDevice::open(0).unwrap());
    // Copies end when somebody waits for them: the block says which.
    let (one, other) = (pipeline.acquire().unwrap(), pipeline.acquire().unwrap());
    assert_eq!([one.index(), other.index()], [numbers[0], numbers[1]]);
}

#[test]
fn the_block_that_came_back_last_is_filled_first() {
    let _machine = machine();
    let (pipeline, _) = four_on_their_way(&CudaDevice::open(0).unwrap());
    pipeline.flush().unwrap();
    let held = [0; 4].map(|_| pipeline.acquire().unwrap());
    let numbers: Vec<u32> = held.iter().map(|block| block.index()).collect();
    held.into_iter().for_each(drop);
    let again = [0; 4].map(|_| pipeline.acquire().unwrap());
    assert!(again.iter().map(|block| block.index()).eq(numbers.into_iter().rev()));
}
