//! The kernels on a real device, from the fat binaries that we ship, against host casts and the reference,
//! and their speed against the device's own copies. Ignored where there may be no device:
//!
//!     cargo test --release -p fst-gpu --test kernels_on_device -- --ignored --nocapture --test-threads 1
//!
//! `FST_KERNEL_BENCH_MIB` (2048) is the size of the buffers whose speed is measured.

#![allow(clippy::unwrap_used, clippy::panic, clippy::undocumented_unsafe_blocks)]

#[allow(dead_code)] // Its other half is for the tests of host casts.
mod golden;
mod reference;

use std::ffi::c_void;
use std::time::Instant;

use cudarc::driver::{result, sys};
use fst_gpu::cast::{CastType, cast};
use fst_gpu::kernel::{ChecksumJob, Kernel, Launch, PIECE_BYTES, StridedJob, kernels};
use reference::Rows;

const GUARD: u8 = 0x5A;

/// Device 0, its primary context current on this thread.
struct Device {
    handle: sys::CUdevice,
    name: String,
    processors: u32,
}

impl Device {
    fn open() -> Self {
        result::init().unwrap();
        let handle = result::device::get(0).unwrap();
        let context = unsafe { result::primary_ctx::retain(handle) }.unwrap();
        unsafe { result::ctx::set_current(context) }.unwrap();
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = unsafe { result::device::get_attribute(handle, count) }.unwrap() as u32;
        let name = result::device::get_name(handle).unwrap();
        Self { handle, name, processors }
    }

    fn function(&self, kernel: Kernel) -> Function {
        let image = kernel.fatbin().unwrap();
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.unwrap();
        let entry = kernel.entry().unwrap().to_owned();
        Function { module, entry: unsafe { result::module::get_function(module, entry) }.unwrap() }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        unsafe { result::primary_ctx::release(self.handle) }.unwrap();
    }
}

struct Function {
    module: sys::CUmodule,
    entry: sys::CUfunction,
}

impl Function {
    /// On the default stream.
    fn launch(&self, launch: Launch, params: &mut [*mut c_void]) {
        let ([x, y, z], [bx, by, bz]) = (launch.grid, launch.block);
        let stream = std::ptr::null_mut();
        unsafe {
            result::launch_kernel(self.entry, (x, y, z), (bx, by, bz), 0, stream, params).unwrap();
        }
    }

    fn batch(&self, launch: Launch, jobs: &Buffer, count: usize) {
        let mut values = [jobs.address, count as u64];
        let mut params = values.each_mut().map(|value| std::ptr::from_mut(value).cast());
        self.launch(launch, &mut params);
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        unsafe { result::module::unload(self.module) }.unwrap();
    }
}

/// Device memory.
struct Buffer {
    address: u64,
    len: usize,
}

impl Buffer {
    /// Whole words, which is what kernels read.
    fn new(len: usize) -> Self {
        let whole = len.max(1).next_multiple_of(4);
        Self { address: unsafe { result::malloc_sync(whole) }.unwrap(), len }
    }

    fn filled(len: usize, byte: u8) -> Self {
        let buffer = Self::new(len);
        unsafe { result::memset_d8_sync(buffer.address, byte, len) }.unwrap();
        buffer
    }

    fn holding<T: bytemuck::Pod>(content: &[T]) -> Self {
        let buffer = Self::new(size_of_val(content));
        unsafe { result::memcpy_htod_sync(buffer.address, content) }.unwrap();
        buffer
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        unsafe { result::memcpy_dtoh_sync(&mut bytes, self.address) }.unwrap();
        bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        unsafe { result::free_sync(self.address) }.unwrap();
    }
}

fn casts() -> impl Iterator<Item = (CastType, CastType)> {
    kernels().filter_map(|kernel| match kernel {
        Kernel::Cast { from, to } => Some((from, to)),
        _ => None,
    })
}

fn first_difference(found: &[u8], expected: &[u8]) -> Option<usize> {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).position(|(a, b)| a != b)
}

fn numbers(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(len)
    .collect()
}

#[test]
#[ignore = "needs a CUDA device"]
fn all_inputs_give_the_bits_of_host_casts() {
    let device = Device::open();
    for (from, to) in casts() {
        let inputs = golden::inputs(from);
        let elements = inputs.len() / from.size();
        let mut expected = vec![0; elements * to.size()];
        cast(&inputs, from, &mut expected, to).unwrap();
        let function = device.function(Kernel::Cast { from, to });
        for shift in [0, from.size()] {
            let src = Buffer::holding(&[&vec![0; shift], inputs.as_slice()].concat());
            let dst = Buffer::filled(expected.len(), GUARD);
            let src = src.address + shift as u64;
            let mut job = StridedJob::dense(src, dst.address, elements as u64);
            let launch = Launch::cast(job.cols, from, to, device.processors);
            function.launch(launch, &mut job.params());
            let found = dst.read();
            if let Some(at) = first_difference(&found, &expected) {
                let at = at / to.size();
                panic!(
                    "{from} to {to}: {:02x?} gave {:02x?}, not {:02x?}",
                    &inputs[at * from.size()..][..from.size()],
                    &found[at * to.size()..][..to.size()],
                    &expected[at * to.size()..][..to.size()],
                );
            }
        }
    }
}

/// Shapes and alignments of every sort, all in two buffers, run job by job and as one batch.
#[test]
#[ignore = "needs a CUDA device"]
fn any_shape_and_alignment_matches_the_reference() {
    let device = Device::open();
    let pairs = casts().map(Some).chain([None]);
    for pair in pairs {
        let (from, to) = pair.map_or((1, 1), |(from, to)| (from.size(), to.size()));
        let mut shapes: Vec<_> =
            [0, 1, 3, 15, 16, 17, 33, 100, 1023, 5000].map(|cols| (1, cols, 0)).to_vec();
        shapes.extend([(3, 16, 0), (5, 16, 128), (4, 32, 300), (6, 33, 40), (33, 4, 4)]);
        shapes.extend([(70, 1000, 6), (2, 1, 9), (300, 64, 64)]);
        let mut source = Vec::new();
        let mut expected = Vec::new();
        let mut jobs = Vec::new();
        for (rows, cols, gap) in shapes {
            for (src_shift, dst_shift) in [(0, 0), (1, 0), (0, 1), (2, 2), (4, 8), (8, 4), (5, 11)]
            {
                let shape = Rows { rows, cols, src_pitch: cols * from + gap };
                let content = numbers(rows * shape.src_pitch + 1);
                let mut result = vec![0; rows * cols * to];
                match pair {
                    None => reference::gather(&content, &mut result, shape),
                    Some((from, to)) => {
                        reference::gather_cast(&content, from, &mut result, to, shape);
                    }
                }
                source.resize(source.len().next_multiple_of(64) + src_shift, 0);
                expected.resize(expected.len().next_multiple_of(64) + 64 + dst_shift, GUARD);
                jobs.push(StridedJob {
                    src: source.len() as u64,
                    dst: expected.len() as u64,
                    rows: rows as u64,
                    cols: cols as u64,
                    src_pitch: shape.src_pitch as u64,
                });
                source.extend(content);
                expected.extend(result);
            }
        }
        expected.resize(expected.len() + 64, GUARD);
        let src = Buffer::holding(&source);
        let single = Buffer::filled(expected.len(), GUARD);
        let batch = Buffer::filled(expected.len(), GUARD);
        let placed = |job: &StridedJob, dst: &Buffer| StridedJob {
            src: job.src + src.address,
            dst: job.dst + dst.address,
            ..*job
        };
        let (one, many) = match pair {
            None => (Kernel::Gather, Kernel::GatherBatch),
            Some((from, to)) => (Kernel::Cast { from, to }, Kernel::CastBatch { from, to }),
        };
        let function = device.function(one);
        for job in &jobs {
            let mut job = placed(job, &single);
            let launch = match pair {
                None => Launch::gather(job.rows * job.cols, device.processors),
                Some((from, to)) => Launch::cast(job.rows * job.cols, from, to, device.processors),
            };
            function.launch(launch, &mut job.params());
        }
        let mut pieces = Vec::new();
        for job in &jobs {
            placed(job, &batch).pieces(from as u64, to as u64, 4096, |piece| pieces.push(piece));
        }
        let list = Buffer::holding(&pieces);
        let launch = Launch::batch(pieces.len() as u64, device.processors);
        device.function(many).batch(launch, &list, pieces.len());
        assert_eq!(first_difference(&single.read(), &expected), None, "{pair:?} one by one");
        assert_eq!(first_difference(&batch.read(), &expected), None, "{pair:?} as a batch");
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn checksums_match_the_reference() {
    let device = Device::open();
    let function = device.function(Kernel::Checksum);
    let content = numbers(1 << 20);
    let buffer = Buffer::holding(&content);
    let mut jobs = Vec::new();
    let mut expected = Vec::new();
    for (offset, len) in [(0, 1 << 20), (1, 1000), (8, 0), (16, 7), (4, 65_537), (3, 8)] {
        let (src, slot) = (buffer.address + offset as u64, expected.len() as u64);
        ChecksumJob::parts(src, len as u64, slot, 4096, |part| jobs.push(part));
        expected.push(reference::checksum(&content[offset..][..len]));
    }
    let list = Buffer::holding(&jobs);
    let sums = Buffer::filled(expected.len() * 16, 0);
    let mut values = [list.address, jobs.len() as u64, sums.address];
    let mut params = values.each_mut().map(|value| std::ptr::from_mut(value).cast());
    function.launch(Launch::batch(jobs.len() as u64, device.processors), &mut params);
    assert_eq!(sums.read(), bytemuck::cast_slice::<_, u8>(&expected));
}

/// Seconds of one run, over enough runs; the first is not counted.
fn seconds(mut run: impl FnMut()) -> f64 {
    run();
    result::ctx::synchronize().unwrap();
    let runs = 10;
    let start = Instant::now();
    for _ in 0..runs {
        run();
    }
    result::ctx::synchronize().unwrap();
    start.elapsed().as_secs_f64() / f64::from(runs)
}

/// Prints bytes read and written per second, and the ratio to the device's own copy.
#[test]
#[ignore = "needs a CUDA device"]
fn speed() {
    let device = Device::open();
    let mib = std::env::var("FST_KERNEL_BENCH_MIB").ok().and_then(|v| v.parse().ok());
    let len = mib.unwrap_or(2048) << 20;
    let (src, dst) = (Buffer::filled(len, 0x3C), Buffer::filled(len, 0));
    let copy = seconds(|| unsafe {
        result::memcpy_dtod_async(dst.address, src.address, len, std::ptr::null_mut()).unwrap();
    });
    let copied = 2.0 * len as f64 / copy;
    let report = |what: &str, bytes: usize, seconds: f64| {
        let rate = bytes as f64 / seconds;
        println!("{what:<44} {:8.1} GB/s {:6.2} of copy", rate / 1e9, rate / copied);
    };
    println!(
        "{}, {} multiprocessors, buffers of {} MiB",
        device.name,
        device.processors,
        len >> 20
    );
    report("device copy", 2 * len, copy);

    let gather = device.function(Kernel::Gather);
    let launch = Launch::gather(len as u64, device.processors);
    let mut job = StridedJob::dense(src.address, dst.address, len as u64);
    report("gather, dense", 2 * len, seconds(|| gather.launch(launch, &mut job.params())));
    let odd = len as u64 - 16;
    let mut job = StridedJob::dense(src.address + 2, dst.address, odd);
    report(
        "gather, dense, source 2 bytes off",
        2 * len,
        seconds(|| {
            gather.launch(launch, &mut job.params());
        }),
    );
    for row in [256, 4096] {
        let (cols, rows) = (row as u64, len as u64 / 2 / row as u64);
        let (src, dst, src_pitch) = (src.address, dst.address, 2 * cols);
        let mut job = StridedJob { src, dst, rows, cols, src_pitch };
        let launch = Launch::gather(rows * cols, device.processors);
        let what = format!("gather, half of rows of {} bytes", 2 * row);
        report(&what, len, seconds(|| gather.launch(launch, &mut job.params())));
    }
    for (from, to) in casts() {
        let function = device.function(Kernel::Cast { from, to });
        let elements = len / from.size().max(to.size());
        let moved = elements * (from.size() + to.size());
        let mut job = StridedJob::dense(src.address, dst.address, elements as u64);
        let launch = Launch::cast(job.cols, from, to, device.processors);
        let time = seconds(|| function.launch(launch, &mut job.params()));
        report(&format!("cast {from} to {to}"), moved, time);
    }
    let (from, to) = (CastType::BF16, CastType::F32);
    let function = device.function(Kernel::CastBatch { from, to });
    for count in [16, 20_000] {
        let elements = (len / 4 / count) as u64 & !63;
        let mut jobs = Vec::new();
        for i in 0..count as u64 {
            let (src, dst) = (src.address + i * elements * 2, dst.address + i * elements * 4);
            StridedJob::dense(src, dst, elements)
                .pieces(2, 4, PIECE_BYTES, |piece| jobs.push(piece));
        }
        let list = Buffer::holding(&jobs);
        let launch = Launch::batch(jobs.len() as u64, device.processors);
        let time = seconds(|| function.batch(launch, &list, jobs.len()));
        let moved = elements as usize * count * 6;
        report(&format!("batch of {count} casts BF16 to F32"), moved, time);
    }
    let sums = Buffer::filled(16, 0);
    let mut jobs = Vec::new();
    ChecksumJob::parts(src.address, len as u64, 0, 1 << 20, |part| jobs.push(part));
    let list = Buffer::holding(&jobs);
    let checksum = device.function(Kernel::Checksum);
    let launch = Launch::batch(jobs.len() as u64, device.processors);
    let mut values = [list.address, jobs.len() as u64, sums.address];
    let time = seconds(|| {
        let mut params = values.each_mut().map(|value| std::ptr::from_mut(value).cast());
        checksum.launch(launch, &mut params);
    });
    report("checksum (reads only)", len, time);
    let start = Instant::now();
    let modules: Vec<_> = kernels().map(|kernel| device.function(kernel)).collect();
    let each = start.elapsed().as_secs_f64() / modules.len() as f64;
    println!("loading a module takes {:.2} ms", each * 1e3);
}
