//! What a load did, and what bound it.

use std::path::PathBuf;
use std::time::Duration;

use fst_gpu::DeviceCopy;
use fst_io::stats::{self, Event};
use fst_io::touch::{self, FirstTouch};
use fst_io::{ReadStats, ResolvedEngine, SourceFile};

use crate::device::Device;

/// A part of a load.
///
/// Stages whose name has no dot, such as `open`, `plan` and `read`, follow each other: their wall
/// clocks add up to the load's seconds. Those with a dot, such as `read.direct`, are parts of the
/// one in front of the dot, and their times are added up over the threads and requests that were
/// busy at once, so that they can exceed the wall clock. [`meaning`](Self::meaning) says what each
/// is.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Stage {
    /// What was done.
    pub name: &'static str,
    /// Seconds.
    pub seconds: f64,
    /// Bytes that went through it; 0 where that makes no sense.
    pub bytes: u64,
}

impl Stage {
    /// The stage that this is a part of: its seconds are then added up over threads and requests.
    pub fn part_of(&self) -> Option<&'static str> {
        self.name.split_once('.').map(|(whole, _)| whole)
    }

    /// What was done, in a few words; empty for stages without an explanation.
    pub fn meaning(&self) -> &'static str {
        match self.name {
            "open" => "reading and checking headers",
            "plan" => "opening files, choosing what to read",
            "read" => "from the first request to the last tensor",
            "map" => "mapping files into memory",
            "populate" => "bringing mapped pages in",
            "verify" => "hashing that was left when all was read",
            "read.direct" => "around the page cache, from request to arrival",
            "read.cached" => "copied out of the page cache",
            "read.buffered" => "through the page cache, filled from storage",
            "read.mapped" => "copied out of a mapping",
            "read.remote" => "by range from where it is stored",
            "read.touch" => "first touch of fresh destination memory",
            "read.issue" => "handing requests to the kernel",
            "read.wait" => "nothing to do until storage answers",
            "read.reserve" => "waiting for memory to read into",
            "read.deliver" => "converting, handing tensors over",
            "read.pin" => "pinning host memory, beside the reads",
            "read.streams" => "making streams and events",
            "read.allocate" => "allocating device memory",
            "read.kernels" => "loading kernels, beside the reads",
            "read.exchange" => "transfers, waiting for other ranks among them",
            "read.pack" => "into and out of the order in which parts travel",
            "read.starve" => "waiting for blocks to send",
            "convert" => "converting shards that arrived",
            "verify.hash" => "hashing, beside reading",
            _ => "",
        }
    }
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
    /// Reads that may be in flight at once, over all threads.
    pub depth: usize,
    /// Length of the longest read in bytes.
    pub block_bytes: u64,
    /// The files that were used.
    pub files: Vec<PathBuf>,
    /// Bytes of these files.
    pub file_bytes: u64,
    /// How many of these the page cache held before the load; `None` where the system does not
    /// tell.
    pub resident_bytes: Option<u64>,
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// Every block's way, when a [trace](crate::Loader::trace) was asked for, in the order of
    /// their start. Starts count from that of the load, files are positions in
    /// [`files`](Self::files).
    pub events: Vec<Event>,
    /// This rank's part, in a load by several.
    pub rank: Option<RankReport>,
    /// How bytes got to a CUDA device, unless cuFile brought them.
    pub device_copy: Option<DeviceCopy>,
    /// How fast fresh host memory came when this process last looked, and whether small pages were taken for
    /// that; `None` where no load into host memory was large enough to look.
    pub first_touch: Option<FirstTouch>,
    /// What requests for shards came to that are not local, if there are any.
    pub remote: Option<RemoteReport>,
    /// Where in `files` those of the next read begin.
    first_file: usize,
}

/// What requests for the shards of a checkpoint came to since it was opened, those of its headers and of all
/// its loads in this process together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RemoteReport {
    /// The servers that were asked for ranges, sorted.
    pub endpoints: Vec<String>,
    /// Requests that were made.
    pub requests: u64,
    /// Those of them that were made again after a failure.
    pub retries: u64,
    /// Answers that asked for patience (429 and 503).
    pub throttled: u64,
    /// Bytes that came.
    pub received_bytes: u64,
    /// Those of them that had come before: what follows a header comes with it, and again with the tensors.
    pub repeated_bytes: u64,
    /// Half of the requests were answered within this time.
    pub first_byte_p50: Duration,
    /// Of a hundred requests, 99 were answered within this time.
    pub first_byte_p99: Duration,
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
            depth: 0,
            block_bytes: 0,
            files: Vec::new(),
            file_bytes: 0,
            resident_bytes: Some(0),
            stages: Vec::new(),
            events: Vec::new(),
            first_file: 0,
            rank: None,
            device_copy: None,
            first_touch: None,
            remote: None,
        }
    }

    /// Adds a stage of the load that others follow.
    pub(crate) fn push(&mut self, name: &'static str, time: Duration, bytes: u64) {
        self.seconds += time.as_secs_f64();
        self.push_part(name, time, bytes);
    }

    /// Adds a part of a stage, whose time is added up over threads.
    pub(crate) fn push_part(&mut self, name: &'static str, time: Duration, bytes: u64) {
        let seconds = time.as_secs_f64();
        match self.stages.iter_mut().find(|stage| stage.name == name) {
            Some(stage) => {
                (stage.seconds, stage.bytes) = (stage.seconds + seconds, stage.bytes + bytes)
            }
            None => self.stages.push(Stage { name, seconds, bytes }),
        }
    }

    /// Adds the files that are used next, and what the page cache holds of them.
    pub(crate) fn add_files(&mut self, files: &[SourceFile]) {
        let known = self.files.len();
        self.first_file = known;
        for file in files {
            if !self.files[..known].iter().any(|path| path == file.path()) {
                self.file_bytes += file.len();
                let resident = file.resident_bytes().ok();
                self.resident_bytes = self.resident_bytes.zip(resident).map(|(a, b)| a + b);
            }
            self.files.push(file.path().to_owned());
        }
    }

    /// Adds what the readers did, one read after the other, as parts of the stage `read`, which is
    /// the last that was added.
    pub(crate) fn add_reads(&mut self, reads: &[ReadStats]) {
        if self.device.is_host() {
            self.first_touch = touch::last();
        }
        let mut began = self.seconds - self.stage("read").map_or(0.0, |stage| stage.seconds);
        let ways = stats::Stage::ALL.map(|way| match way {
            stats::Stage::Direct => "read.direct",
            stats::Stage::Cached => "read.cached",
            stats::Stage::Buffered => "read.buffered",
            stats::Stage::Remote => "read.remote",
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
        let touched = reads.iter().map(|read| read.touch_bytes).sum();
        for (name, seconds, bytes) in [
            ("read.touch", total(|read| read.touch), touched),
            ("read.issue", total(|read| read.issue), 0),
            ("read.wait", total(|read| read.wait), 0),
            ("read.reserve", total(|read| read.reserve), 0),
            ("read.deliver", total(|read| read.deliver), 0),
        ] {
            self.stages.push(Stage { name, seconds, bytes });
        }
        for read in reads {
            self.bytes_asked += read.bytes_asked;
            self.bytes_read += read.bytes_read;
            self.workers = self.workers.max(read.workers);
            self.block_bytes = self.block_bytes.max(read.block_bytes);
            self.depth = self.depth.max(read.depth);
            let start = Duration::try_from_secs_f64(began).unwrap_or_default();
            self.events.extend(read.events.iter().map(|event| Event {
                start: event.start + start,
                file: event.file + self.first_file as u32,
                ..*event
            }));
            began += read.seconds;
        }
    }

    /// Adds how bytes got to a device, and what was made for that as parts of the stage `read`.
    pub(crate) fn add_device_copy(&mut self, copy: Option<DeviceCopy>) {
        for part in copy.iter().flat_map(|copy| &copy.preparations) {
            let time = Duration::try_from_secs_f64(part.seconds).unwrap_or_default();
            self.push_part(part.name, time, 0);
        }
        self.device_copy = copy;
    }

    /// Adds what the exchange did, as parts of the stage `read`.
    #[cfg(feature = "dist")]
    pub(crate) fn add_exchange(&mut self, exchange: &fst_dist::ExchangeReport) {
        for (name, time, bytes) in [
            ("read.exchange", exchange.exchange, exchange.received_bytes),
            ("read.pack", exchange.copy, 0),
            ("read.starve", exchange.wait, 0),
        ] {
            self.push_part(name, time, bytes);
        }
    }
}
