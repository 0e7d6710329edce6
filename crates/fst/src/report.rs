//! What a load did, and what bound it.

use std::time::Duration;

use fst_dist::ExchangeReport;
use fst_io::stats::{self, Event};
use fst_io::{ReadStats, ResolvedEngine};

use crate::device::Device;

/// A part of a load.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Stage {
    /// What was done, such as `open`, `plan`, `read`, `map`, `populate` (these follow each other and add up to the
    /// load's seconds), or one of the parts of `read`, whose times are added up over threads and so
    /// can exceed the wall clock: `read.direct`, `read.cached`, `read.buffered`, `read.mapped`
    /// (from issue to arrival), `read.issue` (handing requests over, first touch of fresh pages
    /// included), `read.wait` (nothing to do until storage answers), `read.reserve` (waiting for
    /// memory), `read.deliver` (converting and handing over). In a load by ranks also
    /// `read.exchange` (transfers, waiting for other ranks among them), `read.pack` (bringing parts
    /// into and out of the order in which they travel) and `read.starve` (waiting for blocks to
    /// send), and afterwards `convert`.
    pub name: &'static str,
    /// Seconds.
    pub seconds: f64,
    /// Bytes that went through it; 0 where that makes no sense.
    pub bytes: u64,
}

/// What a load did, and what bound it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LoadReport {
    /// Tensors loaded.
    pub tensors: usize,
    /// Bytes of the loaded tensors.
    pub bytes: u64,
    /// Bytes of the files that were asked for.
    pub bytes_asked: u64,
    /// Bytes of the files that were read, with gaps that were read over.
    pub bytes_read: u64,
    /// Wall-clock seconds from opening the first file to the last tensor usable, without the time
    /// between opening the checkpoint and starting the load.
    pub seconds: f64,
    /// The engine asked for, the one used, and why.
    pub engine: ResolvedEngine,
    /// Where the tensors are.
    pub device: Device,
    /// Reader threads.
    pub workers: usize,
    /// Length of the longest read in bytes.
    pub block_bytes: u64,
    /// Bytes of the files that the page cache held before the load; `None` where the system does
    /// not tell.
    pub resident_bytes: Option<u64>,
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// Every block's way, when a trace was asked for.
    pub events: Vec<Event>,
    /// This rank's part, in a load by several.
    pub rank: Option<RankReport>,
}

/// What one rank of several kept and exchanged. What it read, the [report](LoadReport) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RankReport {
    /// The rank.
    pub rank: u32,
    /// How many ranks there are.
    pub world: u32,
    /// Bytes of the files that it keeps, before conversion and padding.
    pub kept_bytes: u64,
    /// Bytes sent to other ranks; a broadcast counts once for each receiver.
    pub sent_bytes: u64,
    /// Bytes received from other ranks.
    pub received_bytes: u64,
}

impl LoadReport {
    /// Bytes loaded per second, in units of 1e9.
    pub fn gb_per_s(&self) -> f64 {
        if self.seconds > 0.0 { self.bytes as f64 / self.seconds / 1e9 } else { 0.0 }
    }

    /// The stage of this name.
    pub fn stage(&self, name: &str) -> Option<&Stage> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    pub(crate) fn new(engine: ResolvedEngine, device: Device) -> Self {
        Self {
            tensors: 0,
            bytes: 0,
            bytes_asked: 0,
            bytes_read: 0,
            seconds: 0.0,
            engine,
            device,
            workers: 0,
            block_bytes: 0,
            resident_bytes: None,
            stages: Vec::new(),
            events: Vec::new(),
            rank: None,
        }
    }

    /// Adds a stage of the load that others follow.
    pub(crate) fn push(&mut self, name: &'static str, time: Duration, bytes: u64) {
        self.seconds += time.as_secs_f64();
        self.stages.push(Stage { name, seconds: time.as_secs_f64(), bytes });
    }

    /// Adds what the readers did, as parts of the stage `read`.
    pub(crate) fn add_reads(&mut self, reads: &[ReadStats]) {
        let ways = stats::Stage::ALL.map(|way| match way {
            stats::Stage::Direct => "read.direct",
            stats::Stage::Cached => "read.cached",
            stats::Stage::Buffered => "read.buffered",
            _ => "read.mapped",
        });
        for (index, name) in ways.into_iter().enumerate() {
            let bytes = reads.iter().map(|read| read.stages[index].bytes).sum();
            let time: Duration = reads.iter().map(|read| read.stages[index].latency).sum();
            if bytes > 0 {
                self.stages.push(Stage { name, seconds: time.as_secs_f64(), bytes });
            }
        }
        let total = |part: fn(&ReadStats) -> Duration| -> f64 {
            reads.iter().map(part).sum::<Duration>().as_secs_f64()
        };
        for (name, seconds) in [
            ("read.issue", total(|read| read.issue)),
            ("read.wait", total(|read| read.wait)),
            ("read.reserve", total(|read| read.reserve)),
            ("read.deliver", total(|read| read.deliver)),
        ] {
            self.stages.push(Stage { name, seconds, bytes: 0 });
        }
        for read in reads {
            self.bytes_asked += read.bytes_asked;
            self.bytes_read += read.bytes_read;
            self.workers = self.workers.max(read.workers);
            self.block_bytes = self.block_bytes.max(read.block_bytes);
            self.events.extend_from_slice(&read.events);
        }
    }

    /// Adds what the exchange did, as parts of the stage `read`.
    pub(crate) fn add_exchange(&mut self, exchange: &ExchangeReport) {
        for (name, time, bytes) in [
            ("read.exchange", exchange.exchange, exchange.received_bytes),
            ("read.pack", exchange.copy, 0),
            ("read.starve", exchange.wait, 0),
        ] {
            self.stages.push(Stage { name, seconds: time.as_secs_f64(), bytes });
        }
    }
}
