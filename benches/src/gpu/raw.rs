//! The layers below the facade: the raw ceiling of cold reads, and the pipeline with other sizes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use fst::gpu::{
    Afterwards, CopyOp, CudaDevice, DeviceArena, Landing, Pipeline, PipelineOptions, PipelineSink,
    RingOptions,
};
use fst::io::engine::CachePolicy;
use fst::io::plan::{Block, Limits, ReadPlan};
use fst::io::sink::{Origin, Sink, SinkError, Target};
use fst::io::{Control, Extent, ReadOptions, SourceFile, read};
use serde_json::{Value, json};

/// Sizes of one carriage of whole files to the device.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Blocks in the pinned ring.
    pub blocks: usize,
    /// Copy streams.
    pub streams: usize,
    /// Reader threads; the engine's choice if `None`.
    pub workers: Option<usize>,
    /// Direct reads in flight; the engine's choice if `None`.
    pub depth: Option<usize>,
}

impl Default for Sizes {
    /// What the facade uses.
    fn default() -> Self {
        let PipelineOptions { ring, streams } = PipelineOptions::default();
        let RingOptions { block_bytes, blocks, .. } = ring;
        Self { block_bytes, blocks, streams, workers: None, depth: None }
    }
}

impl Sizes {
    /// For tables.
    #[must_use]
    pub fn label(&self) -> String {
        let or_auto = |n: Option<usize>| n.map_or_else(|| "auto".to_owned(), |n| n.to_string());
        format!(
            "{} KiB x {}, {} streams, {} workers, depth {}",
            self.block_bytes >> 10,
            self.blocks,
            self.streams,
            or_auto(self.workers),
            or_auto(self.depth),
        )
    }

    fn pipeline(&self, device: &CudaDevice) -> Result<Pipeline> {
        let Self { block_bytes, blocks, streams, .. } = *self;
        let ring = RingOptions { block_bytes, blocks, afterwards: Afterwards::Release };
        Ok(Pipeline::new(device, PipelineOptions { ring, streams })?)
    }

    fn options(&self, cache: CachePolicy) -> ReadOptions {
        let mut options = ReadOptions::default();
        options.workers = self.workers;
        options.depth = self.depth;
        options.cache = cache;
        options
    }
}

/// Files that are open, and the plan to read all of them.
struct Whole {
    files: Vec<SourceFile>,
    plan: ReadPlan,
    /// Where each file starts, when they lie one behind the other.
    starts: Vec<u64>,
    bytes: u64,
}

impl Whole {
    fn open(paths: &[PathBuf], block: usize) -> Result<Self> {
        let files = paths.iter().map(|path| Ok(SourceFile::open(path, None)?));
        let files: Vec<SourceFile> = files.collect::<Result<_>>()?;
        let align = SourceFile::align_of(&files);
        let (mut starts, mut extents, mut bytes) = (Vec::new(), Vec::new(), 0u64);
        for (number, file) in (0..).zip(&files) {
            starts.push(bytes);
            extents.push(Extent::new(number, 0..file.len()));
            bytes += file.len().next_multiple_of(align);
        }
        let limits = Limits { align, block: block as u64, ..Limits::default() };
        Ok(Self { plan: ReadPlan::new(extents, limits)?, files, starts, bytes })
    }
}

/// Reads all bytes around the page cache into pinned memory and drops them there: seconds, bytes,
/// and what the reader says. The ring is pinned before the clock starts.
///
/// # Errors
/// The reader's or the device's.
pub fn ceiling(device: &CudaDevice, paths: &[PathBuf], sizes: Sizes) -> Result<(f64, u64, Value)> {
    let pipeline = sizes.pipeline(device)?;
    pipeline.ring().wait_until_pinned();
    let start = Instant::now();
    let whole = Whole::open(paths, sizes.block_bytes)?;
    let options = sizes.options(CachePolicy::Direct);
    let sink = Discard { pipeline: &pipeline, origin: Origin::new() };
    let stats = read(&whole.files, &whole.plan, &sink, &options, &Control::new())?;
    let seconds = start.elapsed().as_secs_f64();
    let direct: Vec<String> = whole.files.iter().map(|f| f.direct_io().to_string()).collect();
    let detail = json!({
        "engine": stats.engine.used.as_str(), "workers": stats.workers, "direct_io": direct,
    });
    Ok((seconds, whole.plan.bytes_asked(), detail))
}

/// Carries all bytes of the files to the device through a pipeline of these sizes. The clock runs
/// while the ring is pinned, as in a load; device memory is there before.
///
/// # Errors
/// The reader's or the device's.
pub fn carry(
    device: &CudaDevice,
    paths: &[PathBuf],
    sizes: Sizes,
    cache: CachePolicy,
) -> Result<(f64, u64, Value)> {
    let whole = Whole::open(paths, sizes.block_bytes)?;
    let arena = DeviceArena::new(device, whole.bytes)?;
    let start = Instant::now();
    let pipeline = sizes.pipeline(device)?;
    pipeline.keep(Arc::new(arena.clone()));
    let route = |block: &Block| {
        let missing = || format!("there is no file {}", block.file);
        let base = whole.starts.get(block.file as usize).ok_or_else(missing)?;
        let len = block.need;
        let destination = arena.range(base + block.offset, len)?;
        Ok(Landing {
            ops: vec![CopyOp::Linear { source: 0, destination, len }],
            ..Landing::default()
        })
    };
    // SAFETY: the pipeline keeps the arena, and each block has a range of its own in it.
    let sink = unsafe { PipelineSink::new(&pipeline, &route) };
    let stats = read(&whole.files, &whole.plan, &sink, &sizes.options(cache), &Control::new())?;
    pipeline.flush()?;
    let seconds = start.elapsed().as_secs_f64();
    let copies = pipeline.stats();
    let detail = json!({
        "sizes": sizes.label(),
        "engine": stats.engine.used.as_str(),
        "workers": stats.workers,
        "ring_waits": copies.ring_waits,
        "copy_calls": copies.copy_calls,
        "wait_s": stats.wait.as_secs_f64(),
        "issue_s": stats.issue.as_secs_f64(),
        "deliver_s": stats.deliver.as_secs_f64(),
        "reserve_s": stats.reserve.as_secs_f64(),
    });
    Ok((seconds, whole.plan.bytes_asked(), detail))
}

/// Bytes of the first file's start, mapped: direct and staged copies of it to the device.
///
/// # Errors
/// The file's or the device's; a refusal to register is a part of the answer.
pub fn mapped(device: &CudaDevice, path: &PathBuf, most: usize, threads: usize) -> Result<Value> {
    let file = std::fs::File::open(path)?;
    // SAFETY: the check's own file, which nobody changes.
    let map = Arc::new(unsafe { memmap2::Mmap::map(&file) }?);
    let len = map.len().min(most);
    let start = std::ptr::NonNull::new(map.as_ptr().cast_mut()).context("an empty mapping")?;
    let pipeline = Sizes::default().pipeline(device)?;
    let owner: Arc<dyn std::any::Any + Send + Sync> = map;
    // SAFETY: `len` bytes of a mapping that `owner` keeps.
    let rates = unsafe { super::measure::cached_rates(&pipeline, start, len, &owner, threads) }?;
    pipeline.flush()?;
    let direct = rates.direct.as_ref().map(|rate| rate / 1e9).map_err(ToString::to_string);
    Ok(json!({"threads": threads, "staged_gb_per_s": rates.staged / 1e9, "direct": direct}))
}

/// Lends pinned blocks and takes them back, whatever is in them.
struct Discard<'a> {
    pipeline: &'a Pipeline,
    origin: Origin,
}

// SAFETY: a target is a pinned block given up for its number: nobody else has it until the number
// comes back with the target. The ring lives as long as the pipeline, which is borrowed.
unsafe impl Sink for Discard<'_> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        let pinned = match wait {
            true => self.pipeline.acquire_soon()?,
            false => self.pipeline.try_acquire()?,
        };
        let capacity = self.pipeline.block_bytes();
        Ok(pinned.map(|pinned| {
            let start = pinned.as_ptr();
            let token = u64::from(pinned.into_index());
            // SAFETY: see the comment on the implementation.
            unsafe { Target::new(&self.origin, block, start, capacity, token) }
        }))
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        self.abandoned(block, target);
        Ok(())
    }

    fn abandoned(&self, block: &Block, target: Target) {
        if self.origin.made(block, &target) {
            // SAFETY: the target came from `reserve` and comes back once, by value.
            drop(unsafe { self.pipeline.block(target.token() as u32) });
        }
    }
}
