//! Which way cached files take to a device: straight out of the page cache, whose pages the driver
//! is asked to register, or through staging memory. Measured where it pays, and told in the report.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::sync::{LazyLock, Mutex};

use fst_gpu::{CudaDevice, Pipeline};
use fst_io::plan::{Block, ReadPlan};
use fst_io::{CachePolicy, Engine, ReadOptions, SourceFile, residency};

/// How bytes that the page cache (or tmpfs) holds get to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum CachedCopy {
    /// By the way that was measured to be faster. The first load with a gigabyte of cached bytes
    /// measures both, on blocks of its own, and later ones of the process to the same device from
    /// the same file system keep to the result; until then, as [`Staged`](Self::Staged).
    #[default]
    Auto,
    /// As [`Auto`](Self::Auto), but this load measures, however little is cached.
    Measured,
    /// The copy engine reads mappings that are registered with the driver, which pins their pages.
    /// What the driver refuses to register is staged, and so are runs of up to 64 KiB, which a driver
    /// may copy itself. A file that is truncated meanwhile is an error as long as the driver leaves
    /// longer copies to the device; files that others may truncate are safest with
    /// [`Staged`](Self::Staged).
    Registered,
    /// Threads copy into pinned memory, which the copy engine reads.
    Staged,
}

impl CachedCopy {
    /// Why nothing travels straight out of the page cache, whatever is in it.
    pub(crate) fn refusal(self, read: &ReadOptions, budget: bool) -> Option<&'static str> {
        match self {
            Self::Staged => Some("staging was asked for"),
            // Blocks that wait for memory must come in order: cached ones cannot go ahead of others.
            _ if budget => Some("streams stage, as their blocks come in order"),
            _ if read.engine != Engine::Auto => Some("an engine was asked for"),
            _ if read.cache != CachePolicy::Residency => {
                Some("a way around the cache was asked for")
            }
            _ => None,
        }
    }

    /// Whether something may travel straight out of the page cache.
    pub(crate) fn may_register(self, read: &ReadOptions, budget: bool) -> bool {
        self.refusal(read, budget).is_none()
    }
}

/// How a load uses host memory on the way to a device.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DeviceOptions {
    pub(crate) cached: CachedCopy,
    /// Pinned memory stays for later loads.
    pub(crate) keep_pinned: bool,
}

/// How bytes got from host memory to a device.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DeviceCopy {
    /// What was asked for.
    pub asked: CachedCopy,
    /// Why cached bytes took the way that they took.
    pub reason: String,
    /// Bytes of files that the copy engine took straight out of the page cache.
    pub registered_bytes: u64,
    /// Bytes of files that went through staging memory.
    pub staged_bytes: u64,
    /// Measured rate out of registered mappings, in bytes per second.
    pub registered_rate: Option<f64>,
    /// Measured rate through staging memory, in bytes per second.
    pub staged_rate: Option<f64>,
    /// Why the driver refused to register mappings, if it did.
    pub refused: Option<String>,
    /// Bytes of staging memory that were pinned, at most. Mappings that are registered are pinned for as
    /// long as they are, too.
    pub pinned_bytes: u64,
    /// Copy streams.
    pub streams: usize,
    /// Calls of the driver that queued copies.
    pub copy_calls: u64,
    /// Kernels that were launched: slices, conversions, crowds of small tensors.
    pub launches: u64,
    /// Times that a reader waited for a pinned block: copying was slower than reading.
    pub ring_waits: u64,
}

impl DeviceCopy {
    pub(crate) fn new(asked: CachedCopy) -> Self {
        Self {
            asked,
            reason: String::new(),
            registered_bytes: 0,
            staged_bytes: 0,
            registered_rate: None,
            staged_rate: None,
            refused: None,
            pinned_bytes: 0,
            streams: 0,
            copy_calls: 0,
            launches: 0,
            ring_waits: 0,
        }
    }

    /// Adds what a pipeline did.
    pub(crate) fn add(&mut self, pipeline: &Pipeline) {
        let stats = pipeline.stats();
        self.pinned_bytes += pipeline.pinned_bytes();
        self.streams += pipeline.streams();
        self.copy_calls += stats.copy_calls;
        self.launches += stats.launches;
        self.ring_waits += stats.ring_waits;
    }

    /// Whether the rates say that registered mappings are faster.
    pub(crate) fn registered_is_faster(&self) -> bool {
        self.refused.is_none() && self.registered_rate > self.staged_rate
    }
}

/// From this many cached bytes on, `Auto` measures: both samples are then a small part of the load,
/// and so are the milliseconds that pinning all of the ring ahead of the second takes.
const WORTH_MEASURING: u64 = 1 << 30;

/// Bytes of a sample, at most; and the share of what is cached, at most.
const SAMPLE: u64 = 64 << 20;
const SAMPLE_SHARE: u64 = 4;

/// What was measured for a device and a file system.
static MEASURED: LazyLock<Mutex<HashMap<(usize, u64), DeviceCopy>>> = LazyLock::new(Mutex::default);

fn key(device: &CudaDevice, files: &[SourceFile]) -> (usize, u64) {
    let file_system = files.first().and_then(|file| file.buffered().metadata().ok());
    (device.ordinal(), file_system.map_or(0, |metadata| metadata.dev()))
}

/// Bytes of a sample, at least, for later loads to keep to its result.
const LEAST_SAMPLE: u64 = 8 << 20;

/// Keeps what a load measured for later ones, on `sample` bytes or more each: of less, noise would
/// decide for the whole process.
pub(crate) fn remember(
    device: &CudaDevice,
    files: &[SourceFile],
    measured: &DeviceCopy,
    sample: u64,
) {
    if sample < LEAST_SAMPLE {
        return;
    }
    let mut known = MEASURED.lock().unwrap_or_else(|e| e.into_inner());
    known.insert(key(device, files), measured.clone());
}

/// What a load does with its cached blocks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Staged,
    Registered,
    /// Measures both, each on so many bytes.
    Contest(u64),
}

/// Chooses for a load that has `cached` bytes in the page cache, and says why in `copy`.
pub(crate) fn choose(
    copy: &mut DeviceCopy,
    cached: u64,
    device: &CudaDevice,
    files: &[SourceFile],
) -> Way {
    let contest = Way::Contest((cached / SAMPLE_SHARE).min(SAMPLE));
    let (way, reason) = match copy.asked {
        CachedCopy::Staged => (Way::Staged, "staging was asked for"),
        _ if cached == 0 => (Way::Staged, "nothing is cached"),
        CachedCopy::Registered => (Way::Registered, "registered mappings were asked for"),
        CachedCopy::Measured => (contest, "measured"),
        CachedCopy::Auto => {
            let known = MEASURED.lock().unwrap_or_else(|e| e.into_inner());
            match known.get(&key(device, files)) {
                Some(known) => {
                    copy.registered_rate = known.registered_rate;
                    copy.staged_rate = known.staged_rate;
                    copy.refused.clone_from(&known.refused);
                    let way = match known.registered_is_faster() {
                        true => Way::Registered,
                        false => Way::Staged,
                    };
                    (way, "measured by an earlier load")
                }
                None if cached < WORTH_MEASURING => {
                    (Way::Staged, "too little is cached to measure")
                }
                None => (contest, "measured"),
            }
        }
    };
    copy.reason = reason.to_owned();
    if matches!(way, Way::Contest(_)) && !device.can_register_read_only() {
        // The driver would refuse each window.
        copy.reason = "the device takes no registered mappings of files".to_owned();
        copy.refused = Some("READ_ONLY_HOST_REGISTER_SUPPORTED is 0".to_owned());
        return Way::Staged;
    }
    way
}

/// Numbers of the blocks that the page cache holds, all of each.
pub(crate) fn cached_blocks(plan: &ReadPlan, files: &[SourceFile]) -> Vec<u32> {
    let cached = |block: &&Block| {
        files.get(block.file as usize).is_some_and(|file| {
            residency::resident_bytes(file.buffered(), block.offset, block.need)
                .is_ok_and(|bytes| bytes >= block.need)
        })
    };
    plan.blocks().iter().filter(cached).map(|block| block.index).collect()
}

/// Cuts off the first blocks that have about `bytes` bytes together.
pub(crate) fn sample<'b>(plan: &ReadPlan, blocks: &'b [u32], bytes: u64) -> (&'b [u32], &'b [u32]) {
    let mut sum = 0;
    let end = blocks.iter().position(|index| {
        sum += plan.blocks().get(*index as usize).map_or(0, |block| block.need);
        sum >= bytes
    });
    blocks.split_at(end.map_or(blocks.len(), |last| last + 1))
}
