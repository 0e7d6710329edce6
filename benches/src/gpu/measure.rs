//! Rates of this machine's ways to the device: what loads are held to.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use fst::gpu::{
    CopyOp, CudaDevice, DeviceArena, Error, HostAccess, Pipeline, PipelineOptions, RegisteredHost,
    Result,
};

/// Registered at once when mapped memory goes to the device directly: registration costs per page
/// and per call, and pieces let several threads share it.
pub const MAPPED_PIECE: usize = 16 << 20;

/// Measured rates from cached (mapped) memory to the device, in bytes per second.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct CachedRates {
    /// The mapping registered piece by piece and read by the copy engine, or why that is refused.
    pub direct: Result<f64>,
    /// Copied by threads into pinned blocks, and from there by the copy engine.
    pub staged: f64,
}

impl CachedRates {
    /// Whether to register mappings rather than copy out of them.
    pub fn direct_is_faster(&self) -> bool {
        self.direct.as_ref().is_ok_and(|direct| *direct > self.staged)
    }
}

fn rate(bytes: usize, since: Instant) -> f64 {
    bytes as f64 / since.elapsed().as_secs_f64().max(1e-9)
}

/// Rate of large pinned copies to a device with nothing else going on, in bytes per second: the
/// best of three of `bytes` each, rounded to blocks. What the link can do.
///
/// # Errors
///
/// The device's.
pub fn pinned_rate(device: &CudaDevice, bytes: usize) -> Result<f64> {
    let mut options = PipelineOptions::default();
    let block = options.ring.block_bytes;
    options.ring.blocks = bytes.div_ceil(block).clamp(1, 64);
    options.streams = 1;
    let blocks = options.ring.blocks;
    let arena = DeviceArena::new(device, (blocks * block) as u64)?;
    let pipeline = Pipeline::new(device, options)?;
    pipeline.keep(Arc::new(arena.clone()));
    pipeline.ring().wait_until_pinned();
    let mut best = 0f64;
    for _ in 0..3 {
        let held = (0..blocks).map(|_| pipeline.acquire()).collect::<Result<Vec<_>>>()?;
        let started = Instant::now();
        for (i, pinned) in held.into_iter().enumerate() {
            let destination = arena.range((i * block) as u64, block as u64)?;
            let copy = CopyOp::Linear { source: 0, destination, len: block as u64 };
            // SAFETY: the pipeline keeps the arena; blocks have ranges of their own.
            unsafe { pipeline.submit(pinned, &[copy])? };
        }
        pipeline.flush()?;
        best = best.max(rate(blocks * block, started));
    }
    Ok(best)
}

/// Measures both ways for `len` bytes of mapped memory, which should be cached and typical of what
/// is to be loaded (64 MiB tell enough), with `threads` threads.
///
/// # Errors
///
/// The device's; a refusal to register is a part of the result.
///
/// # Safety
///
/// As for [`RegisteredHost::new`]: the bytes stay mapped and backed as long as `owner` lives.
pub unsafe fn cached_rates(
    pipeline: &Pipeline,
    start: NonNull<u8>,
    len: usize,
    owner: &Arc<dyn Any + Send + Sync>,
    threads: usize,
) -> Result<CachedRates> {
    let arena = DeviceArena::new(pipeline.device(), len as u64)?;
    pipeline.ring().wait_until_pinned();
    let sample = Sample { pipeline, start, len, arena: &arena, next: AtomicUsize::new(0) };
    let started = Instant::now();
    let staged = sample.on_threads(threads, || sample.staged()).and_then(|()| pipeline.flush());
    let staged = settle(pipeline, staged).map(|()| rate(len, started))?;

    sample.next.store(0, Ordering::Relaxed);
    let started = Instant::now();
    let refusal = std::sync::OnceLock::new();
    let direct = sample.on_threads(threads, || {
        // SAFETY: the caller's contract.
        unsafe { sample.direct(owner, &refusal) }
    });
    let direct = direct.and_then(|()| pipeline.flush());
    settle(pipeline, direct)?;
    let direct = refusal.into_inner().map_or_else(|| Ok(rate(len, started)), Err);
    Ok(CachedRates { direct, staged })
}

/// After an error nothing may still write to the sample's arena when it is freed.
fn settle(pipeline: &Pipeline, result: Result<()>) -> Result<()> {
    if result.is_err() {
        let _ = pipeline.device().synchronize();
    }
    result
}

struct Sample<'a> {
    pipeline: &'a Pipeline,
    start: NonNull<u8>,
    len: usize,
    arena: &'a DeviceArena,
    /// Next piece to be taken by a thread.
    next: AtomicUsize,
}

// SAFETY: the bytes at `start` are only read.
unsafe impl Sync for Sample<'_> {}

impl Sample<'_> {
    fn on_threads(&self, threads: usize, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
        std::thread::scope(|scope| {
            let handles: Vec<_> = (1..threads)
                .filter_map(|i| {
                    let thread = std::thread::Builder::new().name(format!("fst-measure-{i}"));
                    // Fewer threads measure what fewer threads reach.
                    thread.spawn_scoped(scope, &work).ok()
                })
                .collect();
            let own = work();
            handles.into_iter().fold(own, |result, h| match h.join() {
                Ok(other) => result.and(other),
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }

    /// The next piece of at most `most` bytes: its start and length.
    fn piece(&self, most: usize) -> Option<(usize, usize)> {
        let at = self.next.fetch_add(most, Ordering::Relaxed);
        (at < self.len).then(|| (at, most.min(self.len - at)))
    }

    fn staged(&self) -> Result<()> {
        while let Some((at, len)) = self.piece(self.pipeline.block_bytes()) {
            let mut block = self.pipeline.acquire()?;
            let destination = self.arena.range(at as u64, len as u64)?;
            // SAFETY: `at + len` lies within the sample, and the block holds `len` bytes.
            unsafe {
                let from = self.start.as_ptr().add(at);
                std::ptr::copy_nonoverlapping(from, block.as_mut_slice().as_mut_ptr(), len);
            }
            let copy = CopyOp::Linear { source: 0, destination, len: len as u64 };
            // SAFETY: the arena outlives the flush; pieces are apart.
            unsafe { self.pipeline.submit(block, &[copy])? };
        }
        Ok(())
    }

    /// # Safety
    ///
    /// As for [`cached_rates`].
    unsafe fn direct(
        &self,
        owner: &Arc<dyn Any + Send + Sync>,
        refusal: &std::sync::OnceLock<Error>,
    ) -> Result<()> {
        while let Some((at, len)) = self.piece(MAPPED_PIECE) {
            // SAFETY: within the sample; the caller's contract.
            let mapping = unsafe {
                let start = self.start.add(at);
                let device = self.pipeline.device();
                RegisteredHost::new(device, start, len, HostAccess::ReadOnly, Arc::clone(owner))
            };
            let mapping = match mapping {
                Ok(mapping) => mapping,
                Err(error) => {
                    let _ = refusal.set(error);
                    return Ok(());
                }
            };
            let destination = self.arena.range(at as u64, len as u64)?;
            let copy = CopyOp::Linear { source: 0, destination, len: len as u64 };
            // SAFETY: the arena outlives the flush; pieces are apart.
            unsafe { self.pipeline.submit_registered(&mapping, &[copy], None)? };
        }
        Ok(())
    }
}
