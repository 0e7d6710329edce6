//! Files to device memory: fst-io's readers with the pipeline as their sink.

use crate::support::{machine, pattern, simulated};
use fst_gpu::{
    Afterwards, CopyOp, CudaDevice, DeviceArena, Landing, Pipeline, PipelineOptions, PipelineSink,
    RingOptions,
};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::sink::{Sink, SinkError};
use fst_io::{Control, Engine, Extent, ReadOptions, SourceFile};
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) const BLOCK: u64 = 64 << 10;

/// Two files, and extents of them with where each goes in the arena.
pub(crate) struct Case {
    _folder: tempfile::TempDir,
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) extents: Vec<Extent>,
    /// Offset of each extent in the arena, 256-byte aligned.
    places: Vec<u64>,
    pub(crate) expected: Vec<u8>,
}

pub(crate) fn case() -> Case {
    case_of([1_500_123, 700_001], 200_000)
}

/// Files of these lengths, and extents of up to about `longest` bytes.
pub(crate) fn case_of(lens: [usize; 2], longest: usize) -> Case {
    let folder = tempfile::tempdir().unwrap();
    let (mut paths, mut extents, mut places) = (Vec::new(), Vec::new(), Vec::new());
    let mut expected = Vec::new();
    for (file, len) in (0u32..).zip(lens) {
        let bytes = pattern(len, u64::from(file) + 1);
        let path = folder.path().join(format!("{file}.bin"));
        std::fs::write(&path, &bytes).unwrap();
        paths.push(path);
        let mut at = 137;
        let mut step = 1;
        while at < len {
            let end = (at + step).min(len);
            extents.push(Extent::new(file, at as u64..end as u64));
            expected.resize(expected.len().next_multiple_of(256), cuda_sim::FRESH);
            places.push(expected.len() as u64);
            expected.extend_from_slice(&bytes[at..end]);
            at = end + step % 7;
            step = step * 3 + 1;
            if step > longest {
                step = 11;
            }
        }
    }
    Case { _folder: folder, paths, extents, places, expected }
}

impl Case {
    /// The copies of a block: for each extent in it, the part that is there.
    pub(crate) fn ops(&self, block: &Block, arena: &DeviceArena) -> Vec<CopyOp> {
        block
            .extents
            .clone()
            .filter_map(|i| {
                let extent = &self.extents[i as usize];
                let start = extent.offset.max(block.offset);
                let end = extent.end().min(block.offset + block.need);
                (start < end).then(|| CopyOp::Linear {
                    source: start - block.offset,
                    destination: arena.address() + self.places[i as usize] + start - extent.offset,
                    len: end - start,
                })
            })
            .collect()
    }

    fn load(&self, device: &CudaDevice, engine: Engine) -> Result<DeviceArena, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let files: Vec<SourceFile> =
            self.paths.iter().map(|p| SourceFile::open(p, None).unwrap()).collect();
        let align = files.iter().map(SourceFile::align).max().unwrap();
        let limits = Limits { align, block: BLOCK, ..Limits::default() };
        let plan = ReadPlan::new(self.extents.clone(), limits).unwrap();
        let arena = DeviceArena::new(device, self.expected.len() as u64).map_err(|e| text(&e))?;
        let ring =
            RingOptions { block_bytes: BLOCK as usize, blocks: 6, afterwards: Afterwards::Release };
        let pipeline =
            Pipeline::new(device, PipelineOptions { ring, streams: 3 }).map_err(|e| text(&e))?;
        pipeline.keep(Arc::new(arena.clone()));
        let route = |block: &Block| -> Result<Landing, SinkError> {
            Ok(Landing { ops: self.ops(block, &arena), ..Landing::default() })
        };
        // SAFETY: the pipeline keeps the arena, and extents do not overlap.
        let sink = unsafe { PipelineSink::new(&pipeline, &route) };
        let mut options = ReadOptions::default();
        options.engine = engine;
        options.workers = Some(3);
        fst_io::read(&files, &plan, &sink, &options, &Control::new()).map_err(|e| text(&e))?;
        pipeline.flush().map_err(|e| text(&e))?;
        Ok(arena)
    }
}

/// Equal but for the padding between tensors.
pub(crate) fn check(case: &Case, arena: &DeviceArena, what: &str) {
    let mut bytes = vec![0; arena.len() as usize];
    arena.copy_to_host(0, &mut bytes).unwrap();
    for (extent, &place) in case.extents.iter().zip(&case.places) {
        let range = place as usize..(place + extent.end() - extent.offset) as usize;
        assert!(bytes[range.clone()] == case.expected[range], "{what}: {extent:?}");
    }
}

#[test]
fn files_arrive_through_every_engine() {
    let _machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let case = case();
    for engine in [Engine::Auto, Engine::Pread, Engine::Mmap] {
        check(&case, &case.load(&device, engine).unwrap(), engine.as_str());
    }
}

#[test]
fn two_loads_to_two_devices_at_once() {
    let Some(_sim) = simulated(2, 64 << 20) else { return };
    let case = case();
    std::thread::scope(|scope| {
        for ordinal in [0, 1] {
            let case = &case;
            scope.spawn(move || {
                let device = CudaDevice::open(ordinal).unwrap();
                check(case, &case.load(&device, Engine::Pread).unwrap(), "load");
            });
        }
    });
}

#[test]
fn a_failing_copy_ends_the_read() {
    let case = case();
    for (call, nth) in [
        ("cuMemcpyHtoDAsync_v2", 1),
        ("cuMemcpyHtoDAsync_v2", 7),
        ("cuEventRecord", 3),
        ("cuEventQuery", 2),
        ("run:copy", 9),
        ("cuMemHostRegister_v2", 1),
    ] {
        let Some(sim) = simulated(1, 64 << 20) else { return };
        let device = CudaDevice::open(0).unwrap();
        sim.fail(call, nth, cuda_sim::ERROR_LAUNCH_FAILED);
        sim.fail("cuMemHostAlloc", 1, cuda_sim::ERROR_LAUNCH_FAILED);
        let error = case.load(&device, Engine::Auto).unwrap_err();
        assert!(error.contains("CUDA_ERROR_LAUNCH_FAILED"), "{call} {nth}: {error}");
    }
}

#[test]
fn a_file_that_shrinks_ends_the_load_and_nothing_is_left() {
    let _machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let case = case();
    let file = std::fs::OpenOptions::new().write(true).open(&case.paths[1]).unwrap();
    file.set_len(300_000).unwrap();
    let error = case.load(&device, Engine::Auto).unwrap_err();
    assert!(error.contains("1.bin"), "{error}");
}

#[test]
fn a_block_that_the_kernel_may_write_to_for_ever_is_leaked() {
    let Some(mut sim) = simulated(1, 64 << 20) else { return };
    let device = CudaDevice::open(0).unwrap();
    let ring = RingOptions { block_bytes: BLOCK as usize, blocks: 2, afterwards: Afterwards::Keep };
    let pipeline = Pipeline::new(&device, PipelineOptions { ring, streams: 1 }).unwrap();
    let limits = Limits { block: BLOCK, ..Limits::default() };
    let plan = ReadPlan::new(vec![Extent::new(0, 0..BLOCK)], limits).unwrap();
    let block = &plan.blocks()[0];
    let route = |_: &Block| Ok(Landing::default());
    // SAFETY: nothing is copied.
    let sink = unsafe { PipelineSink::new(&pipeline, &route) };
    let [target, other] = [0, 1].map(|_| sink.reserve(block, true).unwrap().unwrap());
    let (told, ended) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let sink = &sink;
        scope.spawn(move || {
            let error = std::iter::repeat_with(|| sink.reserve(block, true)).find_map(Result::err);
            told.send(error).unwrap();
        });
        let early = ended.recv_timeout(std::time::Duration::from_millis(50));
        assert!(early.is_err(), "nothing is free");
        assert!(sink.lost(block, target).is_none());
        let error = ended.recv_timeout(std::time::Duration::from_secs(60));
        // Whatever came of it, the thread ends.
        sink.abandoned(block, other);
        let error = error.expect("another reader still waits").unwrap();
        assert_eq!(error.downcast_ref(), Some(&fst_gpu::Error::BlockLost));
    });
    assert!(sink.reserve(block, false).is_err(), "others end, too");
    assert_eq!(pipeline.flush(), Err(fst_gpu::Error::BlockLost));
    drop(pipeline);
    assert_eq!((sim.report().pinned_ranges, sim.calls("cuMemHostUnregister")), (1, 0));
    assert_eq!(fst_gpu::release_kept(), 0, "nor kept");
    sim.skip_check();
}

#[test]
fn targets_of_another_pipeline_are_refused() {
    let _machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let ring =
        RingOptions { block_bytes: BLOCK as usize, blocks: 2, afterwards: Afterwards::Release };
    let limits = Limits { block: BLOCK, ..Limits::default() };
    let plan = ReadPlan::new(vec![Extent::new(0, 0..2 * BLOCK)], limits).unwrap();
    let [block, other] = [&plan.blocks()[0], &plan.blocks()[1]];
    let route = |_: &Block| Ok(Landing::default());
    let pipeline = || Pipeline::new(&device, PipelineOptions { ring, streams: 1 }).unwrap();
    let (own, foreign) = (pipeline(), pipeline());
    // SAFETY: nothing is copied.
    let sinks = [&own, &foreign].map(|pipeline| unsafe { PipelineSink::new(pipeline, &route) });
    let reserve = |sink: &PipelineSink<'_>| sink.reserve(block, true).unwrap().unwrap();
    assert!(sinks[0].landed(block, reserve(&sinks[1])).is_err());
    sinks[0].abandoned(block, reserve(&sinks[1]));
    assert!(sinks[0].landed(other, reserve(&sinks[0])).is_err());
    sinks[0].landed(block, reserve(&sinks[0])).unwrap();
    own.flush().unwrap();
}

#[test]
fn a_panic_where_blocks_are_routed_ends_the_read() {
    let _machine = machine();
    let device = CudaDevice::open(0).unwrap();
    let case = case();
    let files: Vec<SourceFile> =
        case.paths.iter().map(|path| SourceFile::open(path, None).unwrap()).collect();
    let limits = Limits { block: BLOCK, ..Limits::default() };
    let plan = ReadPlan::new(case.extents.clone(), limits).unwrap();
    for engine in [Engine::Auto, Engine::Pread, Engine::Mmap] {
        let ring =
            RingOptions { block_bytes: BLOCK as usize, blocks: 2, afterwards: Afterwards::Release };
        let pipeline = Pipeline::new(&device, PipelineOptions { ring, streams: 1 }).unwrap();
        let route = |_: &Block| -> Result<Landing, SinkError> { panic!("as the test wants") };
        // No room for anybody else's block, however long they wait for it.
        let first = std::sync::atomic::AtomicBool::new(true);
        let admit = |_: &Block, wait: bool| {
            let first = first.swap(false, std::sync::atomic::Ordering::Relaxed);
            if wait && !first {
                std::thread::sleep(fst_io::sink::WAIT);
            }
            Ok(first)
        };
        // SAFETY: nothing is copied.
        let sink = unsafe { PipelineSink::new(&pipeline, &route) }.with_admission(&admit);
        let mut options = ReadOptions::default();
        (options.engine, options.workers) = (engine, Some(3));
        let read = || fst_io::read(&files, &plan, &sink, &options, &Control::new()).map(drop);
        let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
        assert!(read.is_err(), "{engine}: {read:?}");
    }
}
