//! Casts and gathers on the way: the shipped kernels, run by the driver, against the host's casts.

use crate::support::{Machine, machine, pattern};
use fst_gpu::cast::{CastType, cast};
use fst_gpu::kernel::{Kernel, StridedJob};
use fst_gpu::{
    Afterwards, CopyOp, CudaDevice, DeviceArena, Error, Pipeline, PipelineOptions, RingOptions,
};
use std::path::Path;

const BLOCK: usize = 64 << 10;

fn pipeline(device: &CudaDevice) -> Pipeline {
    let ring = RingOptions { block_bytes: BLOCK, blocks: 3, afterwards: Afterwards::Release };
    Pipeline::new(device, PipelineOptions { ring, streams: 2 }).unwrap()
}

fn with_kernels() -> Machine {
    let machine = machine();
    if let Some(sim) = machine.sim() {
        assert!(sim.add_kernels(Path::new(fst_cuda_sim_kernels::LIBRARY)));
    }
    machine
}

fn bytes_of(arena: &DeviceArena) -> Vec<u8> {
    let mut bytes = vec![0; arena.len() as usize];
    arena.copy_to_host(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn every_pair_of_types_is_cast_on_the_way() {
    let _machine = with_kernels();
    let device = CudaDevice::open(0).unwrap();
    let pairs: Vec<(CastType, CastType)> = CastType::ALL
        .into_iter()
        .flat_map(|from| CastType::ALL.map(|to| (from, to)))
        .filter(|&(from, to)| Kernel::Cast { from, to }.entry().is_some())
        .collect();
    assert_eq!(pairs.len(), 36);
    for (from, to) in pairs {
        let kernel = Kernel::Cast { from, to };
        device.prepare(kernel).unwrap();
        // Three blocks and a rest; tensors of odd length, at odd offsets.
        let elements = 3 * BLOCK / from.size() + 1001;
        let bytes = pattern(elements * from.size(), from.size() as u64 + 7);
        let mut expected = vec![0; elements * to.size()];
        cast(&bytes, from, &mut expected, to).unwrap();
        let arena = DeviceArena::new(&device, expected.len() as u64).unwrap();
        let pipeline = pipeline(&device);
        let per_block = 5003;
        let mut first = 0;
        while first < elements {
            let count = per_block.min(elements - first);
            let mut block = pipeline.acquire().unwrap();
            let (lead, width) = (first % 97, count * from.size());
            block.as_mut_slice()[lead..lead + width]
                .copy_from_slice(&bytes[first * from.size()..][..width]);
            // Two tensors in the block.
            let half = count / 2;
            let ops = [(0, half), (half, count - half)].map(|(at, n)| CopyOp::Transform {
                kernel,
                job: StridedJob::dense(
                    (lead + at * from.size()) as u64,
                    arena.address() + ((first + at) * to.size()) as u64,
                    n as u64,
                ),
            });
            // SAFETY: the arena outlives the flush.
            unsafe { pipeline.submit(block, &ops).unwrap() };
            first += count;
        }
        pipeline.flush().unwrap();
        assert!(bytes_of(&arena) == expected, "{from:?} to {to:?}");
    }
}

#[test]
fn tables_of_jobs_follow_each_other_without_getting_mixed_up() {
    let _machine = with_kernels();
    let device = CudaDevice::open(0).unwrap();
    let kernel = Kernel::Cast { from: CastType::BF16, to: CastType::F32 };
    device.prepare(kernel).unwrap();
    // One stream; more tables than may be on their way at once, out of one block and of the next.
    let ring = RingOptions { block_bytes: BLOCK, blocks: 3, afterwards: Afterwards::Release };
    let pipeline = Pipeline::new(&device, PipelineOptions { ring, streams: 1 }).unwrap();
    let (width, jobs) = (8u64, BLOCK as u64 / 8);
    let mut arenas = Vec::new();
    for round in 0..2 {
        let bytes = pattern(BLOCK, 11 + round);
        let mut expected = vec![0; 2 * BLOCK];
        cast(&bytes, CastType::BF16, &mut expected, CastType::F32).unwrap();
        let arena = DeviceArena::new(&device, expected.len() as u64).unwrap();
        let mut block = pipeline.acquire().unwrap();
        block.as_mut_slice().copy_from_slice(&bytes);
        // Backwards, so that each is a job of its own.
        let ops: Vec<CopyOp> = (0..jobs)
            .rev()
            .map(|i| CopyOp::Transform {
                kernel,
                job: StridedJob::dense(i * width, arena.address() + 2 * i * width, width / 2),
            })
            .collect();
        // SAFETY: the arena outlives the flush.
        unsafe { pipeline.submit(block, &ops).unwrap() };
        arenas.push((arena, expected));
    }
    pipeline.flush().unwrap();
    for (arena, expected) in arenas {
        assert!(bytes_of(&arena) == expected);
    }
}

#[test]
fn columns_are_cut_and_cast_in_one_go_from_bounded_scratch() {
    let machine = with_kernels();
    let device = CudaDevice::open(0).unwrap();
    // Columns 7..40 of 300 rows of 100 bf16, in blocks of 50 rows.
    let (rows, columns, wanted) = (300, 100, 7..40);
    let bytes = pattern(rows * columns * 2, 9);
    let cut: Vec<u8> = bytes
        .chunks(columns * 2)
        .flat_map(|row| &row[wanted.start * 2..wanted.end * 2])
        .copied()
        .collect();
    let mut wide = vec![0; cut.len() * 2];
    cast(&cut, CastType::BF16, &mut wide, CastType::F32).unwrap();
    for (kernel, expected) in
        [(Kernel::Gather, &cut), (Kernel::Cast { from: CastType::BF16, to: CastType::F32 }, &wide)]
    {
        let arena = DeviceArena::new(&device, expected.len() as u64).unwrap();
        let pipeline = pipeline(&device);
        for (i, chunk) in bytes.chunks(50 * columns * 2).enumerate() {
            let mut block = pipeline.acquire().unwrap();
            block.as_mut_slice()[..chunk.len()].copy_from_slice(chunk);
            let unit = if kernel == Kernel::Gather { 2 } else { 1 };
            let job = StridedJob {
                src: wanted.start as u64 * 2,
                dst: arena.address() + (i * expected.len() / 6) as u64,
                rows: 50,
                cols: (wanted.len() * unit) as u64,
                src_pitch: columns as u64 * 2,
            };
            // SAFETY: the arena outlives the flush.
            unsafe { pipeline.submit(block, &[CopyOp::Transform { kernel, job }]).unwrap() };
        }
        pipeline.flush().unwrap();
        assert!(bytes_of(&arena) == *expected, "{kernel:?}");
        if let Some(sim) = machine.sim() {
            let scratch = sim.report().device_bytes - arena.len();
            // A block, its margins and a table of jobs on each stream.
            assert!(scratch <= 2 * (BLOCK as u64 + 512 + (64 << 10)), "{scratch}");
        }
    }
}

#[test]
fn what_no_kernel_does_is_an_error() {
    let machine = with_kernels();
    let device = CudaDevice::open(0).unwrap();
    let none = Kernel::Cast { from: CastType::F32, to: CastType::F8E8M0 };
    assert_eq!(device.prepare(none).unwrap_err(), Error::NoKernel { kernel: none });
    if let Some(sim) = machine.sim() {
        let kernel = Kernel::Cast { from: CastType::BF16, to: CastType::F32 };
        for call in ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "run:launch"] {
            sim.fail(call, 1, cuda_sim::ERROR_LAUNCH_FAILED);
            let arena = DeviceArena::new(&device, 4096).unwrap();
            let pipeline = pipeline(&device);
            let block = pipeline.acquire().unwrap();
            let job = StridedJob::dense(0, arena.address(), 1024);
            // SAFETY: the arena outlives the pipeline.
            let queued = unsafe { pipeline.submit(block, &[CopyOp::Transform { kernel, job }]) };
            let error = queued.and(pipeline.flush()).unwrap_err();
            assert!(error.to_string().contains("CUDA_ERROR_LAUNCH_FAILED"), "{call}: {error}");
        }
    }
}
