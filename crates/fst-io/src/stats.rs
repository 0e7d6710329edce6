//! What a read did: bytes and time per way, and, when asked, every block's times.

use std::time::Duration;

use crate::engine::ResolvedEngine;
use crate::plan::ReadPlan;

/// The ways by which a block's bytes arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Stage {
    /// Read around the page cache.
    Direct,
    /// Copied out of the page cache.
    Cached,
    /// Read through the page cache, which had to be filled.
    Buffered,
    /// Copied out of a mapping.
    Mapped,
    /// Read from a source that is no local file.
    Remote,
}

impl Stage {
    /// All stages, in the order of [`ReadStats::stages`].
    pub const ALL: [Self; 5] =
        [Self::Direct, Self::Cached, Self::Buffered, Self::Mapped, Self::Remote];

    /// A short name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Cached => "cached",
            Self::Buffered => "buffered",
            Self::Mapped => "mapped",
            Self::Remote => "remote",
        }
    }
}

/// One block's way, for a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The worker thread, from 0.
    pub worker: u32,
    /// Its way.
    pub stage: Stage,
    /// Index of the file.
    pub file: u32,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes that arrived.
    pub bytes: u64,
    /// When the read was issued, counted from the start of the load.
    pub start: Duration,
    /// From issue to arrival.
    pub duration: Duration,
}

/// Blocks and bytes that took one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StageStats {
    /// Blocks.
    pub blocks: u64,
    /// Bytes that arrived.
    pub bytes: u64,
    /// The blocks' times from issue to arrival, added up: with many in flight, far more than the
    /// time that passed.
    pub latency: Duration,
}

/// What one worker did.
#[derive(Debug, Clone, Default)]
pub(crate) struct WorkerStats {
    pub(crate) stages: [StageStats; Stage::ALL.len()],
    pub(crate) touch: Duration,
    pub(crate) touch_bytes: u64,
    pub(crate) issue: Duration,
    pub(crate) wait: Duration,
    pub(crate) reserve: Duration,
    pub(crate) deliver: Duration,
    pub(crate) events: Vec<Event>,
}

impl WorkerStats {
    pub(crate) fn count(&mut self, stage: Stage, bytes: u64, latency: Duration) {
        let stage = &mut self.stages[stage as usize];
        stage.blocks += 1;
        stage.bytes += bytes;
        stage.latency += latency;
    }
}

/// What a read did, over all workers.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ReadStats {
    /// The engine, and why it was that one.
    pub engine: ResolvedEngine,
    /// Reader threads.
    pub workers: usize,
    /// Wall-clock seconds from start to the last block.
    pub seconds: f64,
    /// Bytes that were asked for.
    pub bytes_asked: u64,
    /// Bytes that were read, gaps and ragged starts included.
    pub bytes_read: u64,
    /// Length of the longest block, in bytes.
    pub block_bytes: u64,
    /// Reads in flight over all workers, at the end: what was asked for, or what the first blocks
    /// showed to be fastest.
    pub depth: usize,
    /// By way, in the order of [`Stage::ALL`].
    pub stages: [StageStats; Stage::ALL.len()],
    /// Time in which workers faulted fresh destination memory in, other reads being under way;
    /// added up over workers.
    pub touch: Duration,
    /// Bytes of destination memory that were faulted in.
    pub touch_bytes: u64,
    /// Time in which workers handed requests to the kernel; added up over workers.
    pub issue: Duration,
    /// Time in which workers had nothing to do but wait for storage; added up over workers.
    pub wait: Duration,
    /// Time in which workers waited for memory from the sink; added up over workers.
    pub reserve: Duration,
    /// Time that the sink took to take blocks; added up over workers.
    pub deliver: Duration,
    /// Every block's way, when a trace was asked for, ordered by start.
    pub events: Vec<Event>,
}

impl ReadStats {
    /// Statistics of a read that has not begun; for readers of other kinds to fill in.
    pub fn new(engine: ResolvedEngine, workers: usize, plan: &ReadPlan) -> Self {
        Self {
            engine,
            workers,
            depth: workers,
            seconds: 0.0,
            bytes_asked: plan.bytes_asked(),
            bytes_read: plan.bytes_read(),
            block_bytes: plan.limits().block,
            stages: Default::default(),
            touch: Duration::ZERO,
            touch_bytes: 0,
            issue: Duration::ZERO,
            wait: Duration::ZERO,
            reserve: Duration::ZERO,
            deliver: Duration::ZERO,
            events: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, worker: WorkerStats) {
        for (sum, part) in self.stages.iter_mut().zip(worker.stages) {
            sum.blocks += part.blocks;
            sum.bytes += part.bytes;
            sum.latency += part.latency;
        }
        self.touch += worker.touch;
        self.touch_bytes += worker.touch_bytes;
        self.issue += worker.issue;
        self.wait += worker.wait;
        self.reserve += worker.reserve;
        self.deliver += worker.deliver;
        self.events.extend(worker.events);
        self.events.sort_by_key(|event| event.start);
    }

    /// Blocks and bytes that took one way.
    pub fn stage(&self, stage: Stage) -> StageStats {
        self.stages[stage as usize]
    }
}
