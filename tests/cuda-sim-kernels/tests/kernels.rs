//! The kernels, run on the host, against host casts, PyTorch's golden table and the slow reference.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../../crates/fst-gpu/tests/golden/mod.rs"]
#[allow(dead_code)] // Its other half is for the tests of host casts.
mod golden;
#[path = "../../../crates/fst-gpu/tests/reference/mod.rs"]
mod reference;

use std::ffi::c_void;
use std::fs;
use std::path::Path;

use fst_cuda_sim_kernels::HostKernel;
use fst_gpu::cast::{CastType, cast};
use fst_gpu::kernel::{ChecksumJob, Kernel, Launch, StridedJob, kernels};
use reference::Rows;

/// Few blocks and threads, so that every thread goes around its loop; enough, so that some have
/// nothing to do; and what is launched on devices.
const LAUNCHES: [Launch; 3] = [
    Launch { grid: [1, 1, 1], block: [3, 1, 1] },
    Launch { grid: [5, 1, 1], block: [64, 1, 1] },
    Launch { grid: [16, 1, 1], block: [256, 1, 1] },
];

const GUARD: u8 = 0x5A;

fn host(kernel: Kernel) -> HostKernel {
    HostKernel::named(kernel.entry().unwrap()).unwrap()
}

fn run_single(kernel: Kernel, launch: Launch, mut job: StridedJob) {
    let mut params = job.params();
    // SAFETY: the parameters are a job's fields, and callers pass jobs over live buffers.
    unsafe { host(kernel).launch(launch.grid, launch.block, params.as_mut_ptr()) };
}

fn run_batch(kernel: Kernel, launch: Launch, jobs: &[StridedJob]) {
    let mut address = jobs.as_ptr() as u64;
    let mut count = jobs.len() as u64;
    let mut params: [*mut c_void; 2] = [(&raw mut address).cast(), (&raw mut count).cast()];
    // SAFETY: the parameters are the array and its length; callers pass jobs over live buffers.
    unsafe { host(kernel).launch(launch.grid, launch.block, params.as_mut_ptr()) };
}

/// A buffer whose part from `shift` bytes after a 64-byte border is in use, guarded on both sides.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize, shift: usize) -> Self {
        let bytes = vec![GUARD; len + shift + 192];
        let start = bytes.as_ptr().align_offset(64) + 64 + shift;
        Self { bytes, start, len }
    }

    fn holding(content: &[u8], shift: usize) -> Self {
        let mut buffer = Self::new(content.len(), shift);
        buffer.bytes[buffer.start..][..content.len()].copy_from_slice(content);
        buffer
    }

    fn address(&mut self) -> u64 {
        self.bytes[self.start..].as_mut_ptr() as u64
    }

    fn check(&self, expected: &[u8], what: impl std::fmt::Debug) {
        let (before, rest) = self.bytes.split_at(self.start);
        let (found, after) = rest.split_at(self.len);
        if found != expected {
            let at = found.iter().zip(expected).position(|(a, b)| a != b);
            panic!("{what:?}: differs at byte {at:?} of {}", expected.len());
        }
        assert!(before.iter().chain(after).all(|b| *b == GUARD), "{what:?}: wrote outside");
    }
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

fn casts() -> impl Iterator<Item = (CastType, CastType)> {
    kernels().filter_map(|kernel| match kernel {
        Kernel::Cast { from, to } => Some((from, to)),
        _ => None,
    })
}

#[test]
fn every_kernel_is_in_all_its_images_and_on_the_host() {
    for kernel in kernels() {
        let entry = kernel.entry().unwrap().to_str().unwrap();
        let images = cuda_sim::fatbin::images(kernel.fatbin().unwrap()).unwrap();
        assert_eq!(
            images.iter().map(|i| i.architecture).collect::<Vec<_>>(),
            [80, 90, 100, 120, 70]
        );
        for image in images {
            let holds = |text: String| {
                image.bytes.windows(text.len()).any(|window| window == text.as_bytes())
            };
            assert_eq!(image.is_code, image.bytes.starts_with(b"\x7fELF"), "{entry}");
            assert_eq!(image.is_code, image.architecture != 70, "{entry}");
            if image.is_code {
                assert!(holds(format!("\0.text.{entry}\0")), "{entry}");
            } else {
                assert!(holds(format!(".visible .entry {entry}(")), "{entry}");
            }
        }
        assert!(HostKernel::named(kernel.entry().unwrap()).is_some(), "{entry}");
    }
    let golden: Vec<_> = golden::pairs().iter().map(|pair| (pair.from, pair.to)).collect();
    assert_eq!(casts().collect::<Vec<_>>(), golden);
    assert_eq!(Kernel::Cast { from: CastType::F32, to: CastType::F32 }.entry(), None);
}

#[test]
fn the_fat_binaries_are_those_of_these_sources() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/fst-gpu/kernels");
    let sums = fs::read_to_string(folder.join("SHA256SUMS")).unwrap();
    let mut named: Vec<&str> = Vec::new();
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ").unwrap();
        let bytes = fs::read(folder.join(name)).unwrap();
        assert_eq!(sum, golden::sha256(&bytes), "{name}: run tools/kernels/build.sh");
        named.push(name);
    }
    let there = |folder: &Path| fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let fatbin = folder.join("fatbin");
    let files = there(&folder).chain(there(&fatbin)).filter(|path| {
        path.extension().is_some_and(|e| ["cu", "cuh", "fatbin"].map(Some).contains(&e.to_str()))
    });
    assert_eq!(files.count(), named.len());
}

#[test]
fn all_inputs_match_host_casts_and_pytorch() {
    for pair in golden::pairs() {
        let (from, to) = (pair.from, pair.to);
        let inputs = golden::inputs(from);
        let len = pair.count * to.size();
        let mut expected = vec![0; len];
        cast(&inputs, from, &mut expected, to).unwrap();

        // Multiples and not of the vectors' bytes: both loads.
        for shift in [0, from.size()] {
            let mut src = Buffer::holding(&inputs, shift);
            let mut dst = Buffer::new(len, 0);
            let job = StridedJob::dense(src.address(), dst.address(), pair.count as u64);
            run_single(Kernel::Cast { from, to }, Launch::cast(job.cols, from, to, 1), job);
            dst.check(&expected, (from, to, shift));
        }
        golden::one_nan(&mut expected, to);
        assert_eq!(golden::sha256(&expected), pair.sha256, "{from} to {to}");
    }
}

#[test]
fn any_length_and_alignment_gives_the_same_elements() {
    for (from, to) in casts() {
        let inputs = numbers(400 * from.size());
        let mut outputs = vec![0; 400 * to.size()];
        cast(&inputs, from, &mut outputs, to).unwrap();
        for elements in [0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 100, 257, 400] {
            for (src_shift, dst_shift) in
                [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (4, 4), (8, 0), (0, 8), (3, 5), (7, 14)]
            {
                for launch in LAUNCHES {
                    let mut src = Buffer::holding(&inputs[..elements * from.size()], src_shift);
                    let mut dst = Buffer::new(elements * to.size(), dst_shift);
                    let job = StridedJob::dense(src.address(), dst.address(), elements as u64);
                    run_single(Kernel::Cast { from, to }, launch, job);
                    let what = (from, to, elements, src_shift, dst_shift, launch);
                    dst.check(&outputs[..elements * to.size()], what);
                }
            }
        }
    }
}

const SHAPES: [(usize, usize, usize); 12] = [
    // rows, columns, bytes between rows
    (1, 100, 7),
    (2, 1, 9),
    (3, 16, 0),
    (5, 16, 128),
    (4, 32, 300),
    (7, 64, 512),
    (6, 33, 40),
    (3, 10, 1),
    (9, 8, 8),
    (33, 4, 4),
    (4, 250, 6),
    (0, 5, 5),
];

#[test]
fn strided_rows_are_cast_as_the_reference_does() {
    for (from, to) in casts() {
        for (rows, cols, gap) in SHAPES {
            let src_pitch = cols * from.size() + gap;
            let shape = Rows { rows, cols, src_pitch };
            let content = numbers(rows * src_pitch + 1);
            let mut expected = vec![0; rows * cols * to.size()];
            reference::gather_cast(&content, from, &mut expected, to, shape);
            for (src_shift, dst_shift) in [(0, 0), (2, 0), (0, 1), (8, 4), (5, 16)] {
                for launch in LAUNCHES {
                    let mut src = Buffer::holding(&content, src_shift);
                    let mut dst = Buffer::new(expected.len(), dst_shift);
                    let job = strided(&mut src, &mut dst, shape);
                    run_single(Kernel::Cast { from, to }, launch, job);
                    dst.check(&expected, (from, to, shape, src_shift, dst_shift, launch));
                }
            }
        }
    }
}

#[test]
fn strided_rows_are_gathered_as_the_reference_does() {
    for (rows, cols, gap) in SHAPES {
        for unit in [1, 2, 4, 8, 16] {
            let cols = cols * unit;
            let shape = Rows { rows, cols, src_pitch: cols + gap };
            let content = numbers(rows * shape.src_pitch + 1);
            let mut expected = vec![0; rows * cols];
            reference::gather(&content, &mut expected, shape);
            for src_shift in 0..17 {
                for dst_shift in [0, 1, 2, 4, 8, 3] {
                    for launch in LAUNCHES {
                        let mut src = Buffer::holding(&content, src_shift);
                        let mut dst = Buffer::new(expected.len(), dst_shift);
                        let job = strided(&mut src, &mut dst, shape);
                        run_single(Kernel::Gather, launch, job);
                        dst.check(&expected, (shape, src_shift, dst_shift, launch));
                    }
                }
            }
        }
    }
}

fn strided(src: &mut Buffer, dst: &mut Buffer, rows: Rows) -> StridedJob {
    StridedJob {
        src: src.address(),
        dst: dst.address(),
        rows: rows.rows as u64,
        cols: rows.cols as u64,
        src_pitch: rows.src_pitch as u64,
    }
}

#[test]
fn batches_do_every_job_also_in_pieces() {
    let batches = kernels().filter_map(|kernel| match kernel {
        Kernel::GatherBatch => Some((kernel, None)),
        Kernel::CastBatch { from, to } => Some((kernel, Some((from, to)))),
        _ => None,
    });
    for (kernel, pair) in batches {
        let (from, to) = pair.map_or((1, 1), |(from, to)| (from.size(), to.size()));
        let mut buffers = Vec::new();
        for (rows, cols, gap) in SHAPES.into_iter().chain([(3, 5000, 3), (900, 7, 2), (1, 9001, 0)])
        {
            let shape = Rows { rows, cols, src_pitch: cols * from + gap };
            let content = numbers(rows * shape.src_pitch + 1);
            let mut expected = vec![0; rows * cols * to];
            match pair {
                None => reference::gather(&content, &mut expected, shape),
                Some((from, to)) => {
                    reference::gather_cast(&content, from, &mut expected, to, shape);
                }
            }
            let dst = Buffer::new(expected.len(), 0);
            buffers.push((Buffer::holding(&content, rows % 5), dst, expected, shape));
        }
        for bytes in [64, 1000, 1 << 20] {
            let mut jobs = Vec::new();
            for (src, dst, _, shape) in &mut buffers {
                dst.bytes.fill(GUARD);
                let job = strided(src, dst, *shape);
                job.pieces(from as u64, to as u64, bytes, |piece| jobs.push(piece));
            }
            run_batch(kernel, Launch::batch(jobs.len() as u64 / 2, 1), &jobs);
            for (_, dst, expected, shape) in &buffers {
                dst.check(expected, (kernel, shape, bytes));
            }
        }
    }
}

#[test]
fn pieces_are_of_the_size_asked_for_and_keep_the_alignment() {
    let job = StridedJob { src: 1 << 20, dst: 1 << 40, rows: 300, cols: 1000, src_pitch: 4000 };
    let mut next = job.dst;
    job.pieces(2, 4, 16 << 10, |piece| {
        assert_eq!(piece.dst, next);
        assert!(piece.rows * piece.cols * 4 <= 16 << 10);
        next += piece.rows * piece.cols * 4;
    });
    assert_eq!(next, job.dst + 300 * 1000 * 4);
    StridedJob::dense(0, 0, 1 << 20).pieces(2, 4, 10_000, |piece| assert_eq!(piece.dst % 256, 0));
}

#[test]
fn checksums_are_the_sums_of_words() {
    // By hand: words 1 and 0x0302, the second padded.
    assert_eq!(reference::checksum(&[1, 0, 0, 0, 0, 0, 0, 0, 2, 3]), [0x303, 1 + 3 * 0x302]);

    let lengths = [0, 1, 7, 8, 9, 15, 16, 17, 100, 1000, 4096, 12_345];
    let contents: Vec<_> = lengths.iter().map(|len| numbers(*len)).collect();
    for shift in [0, 1, 4, 8] {
        for part in [16, 100, 1 << 20] {
            let mut buffers: Vec<_> = contents.iter().map(|c| Buffer::holding(c, shift)).collect();
            let mut jobs = Vec::new();
            for (slot, buffer) in buffers.iter_mut().enumerate() {
                let (src, bytes) = (buffer.address(), buffer.len as u64);
                ChecksumJob::parts(src, bytes, slot as u64, part, |job| jobs.push(job));
            }
            let mut sums = vec![[0u64; 2]; lengths.len()];
            let mut values = [jobs.as_ptr() as u64, jobs.len() as u64, sums.as_mut_ptr() as u64];
            let mut params = values.each_mut().map(|value| std::ptr::from_mut(value).cast());
            for launch in LAUNCHES {
                sums.fill([0; 2]);
                let kernel = host(Kernel::Checksum);
                // SAFETY: array, length and sums, over live buffers.
                unsafe { kernel.launch(launch.grid, launch.block, params.as_mut_ptr()) };
                for (sum, content) in sums.iter().zip(&contents) {
                    assert_eq!(*sum, reference::checksum(content), "{} {shift}", content.len());
                }
            }
        }
    }
}
