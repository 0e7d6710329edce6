//! Block engines: they carry out a [`ReadPlan`].
//!
//! [`read`] starts a few worker threads that take blocks off one shared cursor. For each block the
//! worker borrows memory from the [`Sink`], chooses its way by what the page cache holds (resident
//! blocks are copied out of it, cold ones read around it with `O_DIRECT`), reads, and hands the
//! block over. No lock is taken on the way of a block; a worker waits only for its own reads, or
//! for the sink when that has no memory to lend. On machines of several NUMA nodes, workers stay
//! beside the storage that they read.

// Some of both is for io_uring only.
#[cfg_attr(any(not(target_os = "linux"), fst_portable), allow(dead_code))]
mod depth;
#[cfg_attr(any(not(target_os = "linux"), fst_portable), allow(dead_code))]
mod job;
#[cfg_attr(any(not(target_os = "linux"), fst_portable), path = "../portable/mmap.rs")]
mod mmap;
mod pread;
#[cfg_attr(any(not(target_os = "linux"), fst_portable), path = "../portable/uring.rs")]
mod uring;

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use crate::error::Error;
use crate::file::SourceFile;
use crate::numa::{self, Bound};
use crate::plan::ReadPlan;
use crate::sink::Sink;
use crate::stats::ReadStats;
use depth::Depth;
use job::Job;

pub use uring::uring_refusal;

/// How blocks get from files into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Engine {
    /// The fastest that works here.
    #[default]
    Auto,
    /// io_uring: many direct reads in flight from few threads.
    Uring,
    /// Threads that call `pread(2)`.
    Pread,
    /// Threads that copy out of a mapping of the file.
    Mmap,
    /// NVIDIA GPUDirect Storage (cuFile), for loads into device memory.
    Gds,
    /// Threads that ask [sources](crate::source::Source) for ranges, one each at a time. Used for files that
    /// are not local, and for nothing else.
    Object,
}

impl Engine {
    /// The engines that can be asked for, by name.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Uring, Self::Pread, Self::Mmap, Self::Gds];

    /// The engine's name, as programs take it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Pread => "pread",
            Self::Mmap => "mmap",
            Self::Gds => "gds",
            Self::Object => "object",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A name that is no engine's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown engine {name:?}: expected auto, uring, pread, mmap or gds")]
pub struct UnknownEngine {
    /// The name given.
    pub name: String,
}

impl FromStr for Engine {
    type Err = UnknownEngine;

    fn from_str(name: &str) -> Result<Self, UnknownEngine> {
        Self::ALL
            .into_iter()
            .find(|engine| engine.as_str() == name)
            .ok_or_else(|| UnknownEngine { name: name.to_owned() })
    }
}

/// What was asked for, and what it came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedEngine {
    /// The engine asked for.
    pub asked: Engine,
    /// The engine used; never [`Engine::Auto`].
    pub used: Engine,
    /// Why this one, in a few words.
    pub reason: String,
}

impl ResolvedEngine {
    /// Finds the engine that runs for `asked` on this machine.
    ///
    /// # Errors
    ///
    /// [`Error::EngineUnavailable`] when an engine asked for by name cannot run.
    pub fn resolve(asked: Engine) -> Result<Self, Error> {
        let refusal = match asked {
            Engine::Auto | Engine::Uring => uring_refusal(),
            Engine::Mmap => mmap::refusal(),
            Engine::Pread => None,
            Engine::Gds => Some("cuFile reads into device memory only".to_owned()),
            Engine::Object => Some("it reads no local files".to_owned()),
        };
        let (used, reason) = match (asked, refusal) {
            (Engine::Auto, None) => (Engine::Uring, "io_uring is available".to_owned()),
            (Engine::Auto, Some(why)) => (Engine::Pread, why),
            (named, None) => (named, "asked for".to_owned()),
            (named, Some(reason)) => {
                return Err(Error::EngineUnavailable { engine: named, reason });
            }
        };
        Ok(Self { asked, used, reason })
    }

    /// The engine that runs for `asked` where files are [not local](SourceFile::remote).
    ///
    /// # Errors
    ///
    /// [`Error::EngineUnavailable`] when an engine for local files was asked for by name.
    pub fn resolve_remote(asked: Engine) -> Result<Self, Error> {
        match asked {
            Engine::Auto | Engine::Object => {
                let reason = "the files are not local".to_owned();
                Ok(Self { asked, used: Engine::Object, reason })
            }
            engine => {
                let reason = "it reads local files only; use auto for others".to_owned();
                Err(Error::EngineUnavailable { engine, reason })
            }
        }
    }
}

/// Ranges of sources that are asked for at the same time, unless told otherwise.
const REMOTE_WORKERS: usize = 16;

/// When to go through the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum CachePolicy {
    /// Block by block: copy what the cache holds, read the rest around it.
    #[default]
    Residency,
    /// Always around the cache where the file system can.
    Direct,
    /// Always through the cache.
    Buffered,
}

/// How to carry out a plan.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ReadOptions {
    /// The engine to use.
    pub engine: Engine,
    /// Reader threads; by default one a core, within bounds that suit the engine.
    pub workers: Option<usize>,
    /// Reads in flight over all workers of the engine `uring`; by default as many as prove useful
    /// while the first blocks arrive, within 4..=128 requests and 256 MiB.
    pub depth: Option<usize>,
    /// When to go through the page cache.
    pub cache: CachePolicy,
    /// Record every block's times, for a timeline.
    pub trace: bool,
}

/// The owner's handle on a running read: how far it is, what is wanted first, and the way to end it.
#[derive(Debug, Default)]
pub struct Control {
    cancelled: Arc<AtomicBool>,
    /// Another flag that ends the read.
    outer: Option<Arc<AtomicBool>>,
    landed: AtomicU64,
    /// Extents to read before others, the next ones last.
    preferred: Mutex<Vec<Range<u32>>>,
    /// Whether there are any.
    prefers: AtomicBool,
}

/// What there is among extents that are preferred.
enum Pick<T> {
    Found(T),
    /// Nothing now.
    Later,
    /// Nothing any more.
    Nothing,
}

impl Control {
    /// A fresh handle.
    pub fn new() -> Self {
        Self::default()
    }

    /// A handle whose read also ends when `cancelled` becomes true. One flag can end many reads.
    pub fn with_flag(cancelled: Arc<AtomicBool>) -> Self {
        Self { cancelled, ..Self::default() }
    }

    /// The same handle, whose read also ends when `outer` becomes true; [`cancel`](Self::cancel) leaves that
    /// as it is.
    #[must_use]
    pub fn within(self, outer: Arc<AtomicBool>) -> Self {
        Self { outer: Some(outer), ..self }
    }

    /// Ends the read as soon as the requests in flight are over; it returns
    /// [`Error::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }

    /// Whether [`cancel`](Self::cancel) was called, or a flag ends the read.
    pub fn is_cancelled(&self) -> bool {
        let is_set = |flag: &Arc<AtomicBool>| flag.load(Relaxed);
        is_set(&self.cancelled) || self.outer.as_ref().is_some_and(is_set)
    }

    /// Has the blocks of these extents of the plan read before all others that nobody reads yet, those
    /// preferred before included, as soon as the sink [has memory](Sink::prefer) for them. Without effect on
    /// blocks that are read already, or that a [part](ReadPlan::only) of the plan lacks.
    pub fn prefer(&self, extents: Range<u32>) {
        self.preferred.lock().unwrap_or_else(|e| e.into_inner()).push(extents);
        self.prefers.store(true, Release);
    }

    /// What `pick` finds among the extents preferred last; where there is nothing, or nothing yet, among
    /// those before.
    fn pick<T>(&self, mut pick: impl FnMut(&Range<u32>) -> Pick<T>) -> Option<T> {
        if !self.prefers.load(Acquire) {
            return None;
        }
        let mut preferred = self.preferred.lock().unwrap_or_else(|e| e.into_inner());
        for at in (0..preferred.len()).rev() {
            match pick(&preferred[at]) {
                Pick::Found(found) => return Some(found),
                Pick::Later => {}
                Pick::Nothing => drop(preferred.remove(at)),
            }
        }
        self.prefers.store(!preferred.is_empty(), Release);
        None
    }

    /// Bytes that have landed so far (of [`ReadPlan::bytes_read`]).
    pub fn landed_bytes(&self) -> u64 {
        self.landed.load(Relaxed)
    }

    /// Counts bytes that have landed; for readers of other kinds, such as cuFile's.
    pub fn add_landed(&self, bytes: u64) {
        self.landed.fetch_add(bytes, Relaxed);
    }
}

/// Reads every block of `plan` into memory lent by `sink`, and checks afterwards that no file that it
/// read from changed meanwhile.
///
/// `files` are the sources that the plan's file numbers index. Returns when every block has
/// landed or the first error has ended the read; either way no request is in flight any more, and
/// all memory is back with the sink.
///
/// # Errors
///
/// The first [`Error`] that any worker met.
///
/// # Panics
///
/// When `sink` or one of its callbacks does, after all workers have ended.
pub fn read(
    files: &[SourceFile],
    plan: &ReadPlan,
    sink: &dyn Sink,
    options: &ReadOptions,
    control: &Control,
) -> Result<ReadStats, Error> {
    let started = Instant::now();
    // A part of a load may read from few of its files: to look at all each time would take long.
    let numbers: BTreeSet<u32> = plan.blocks().iter().map(|block| block.file).collect();
    let read = || numbers.iter().filter_map(|number| files.get(*number as usize));
    let engine = match read().any(|file| file.source().is_some()) {
        true => ResolvedEngine::resolve_remote(options.engine)?,
        false => ResolvedEngine::resolve(options.engine)?,
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let workers = options.workers.unwrap_or_else(|| match engine.used {
        // Copies out of the page cache scale with cores; direct reads keep one busy a little.
        Engine::Uring => cores.clamp(1, 16),
        // The number of threads is the number of reads in flight.
        Engine::Pread => (2 * cores).clamp(8, 32),
        Engine::Object => REMOTE_WORKERS,
        _ => cores.clamp(1, 16),
    });
    let workers = workers.clamp(1, plan.blocks().len().max(1));
    let depth = Depth::new(options.depth, workers, plan.limits().block);
    let job = Job::new(files, plan, sink, options, control, started, depth)?;
    let near = numa::processors_near(read());
    let run = |worker: usize| {
        let _bound = near.as_ref().and_then(Bound::to);
        let unwinding = EndOnUnwind(&job);
        let stats = match engine.used {
            Engine::Uring => uring::work(&job, worker),
            Engine::Mmap => mmap::work(&job, worker),
            _ => pread::work(&job, worker),
        };
        std::mem::forget(unwinding);
        stats
    };
    let mut stats = ReadStats::new(engine.clone(), workers, plan);
    thread::scope(|scope| {
        let threads: Vec<_> = (1..workers)
            .filter_map(|worker| {
                let spawned = thread::Builder::new()
                    .name(format!("fst-read-{worker}"))
                    .spawn_scoped(scope, move || run(worker));
                // Fewer threads are slower and still right.
                spawned.ok()
            })
            .collect();
        stats.add(run(0));
        for thread in threads {
            match thread.join() {
                Ok(worker) => stats.add(worker),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    stats.depth = match engine.used {
        Engine::Uring => job.depth.total(),
        _ => workers,
    };
    job.finish()?;
    SourceFile::verify_all(read())?;
    stats.seconds = started.elapsed().as_secs_f64();
    Ok(stats)
}

/// Ends the read when a worker unwinds: the others would otherwise wait for memory that it held.
struct EndOnUnwind<'j, 'a>(&'j Job<'a>);

impl Drop for EndOnUnwind<'_, '_> {
    fn drop(&mut self) {
        self.0.fail(Error::Cancelled);
    }
}

#[cfg(test)]
mod tests;
