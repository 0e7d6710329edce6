//! Loads by several ranks: each returns the parts of the tensors that its rank keeps, and what one
//! rank has read reaches the others that need it.
//!
//! ```no_run
//! use std::sync::Arc;
//! use fst::{Checkpoint, Loader, LocalGroup, Preset};
//!
//! let checkpoint = Checkpoint::open("Llama-2-7b-hf")?;
//! std::thread::scope(|scope| {
//!     for group in LocalGroup::host(4) {
//!         let loader = Loader::new().group(Arc::new(group)).preset(Preset::llama());
//!         let checkpoint = &checkpoint;
//!         scope.spawn(move || {
//!             let shards = loader.load(checkpoint)?;
//!             println!("{:?}", shards.get("lm_head.weight")?.shape());
//!             Ok::<(), fst::Error>(())
//!         });
//!     }
//! });
//! # Ok::<(), fst::Error>(())
//! ```
//!
//! Shards can go to GPUs: [`local_groups`] makes the ranks of a process that keep theirs on devices, and
//! [`nccl_group`] makes a process one rank of several, as torchrun starts them.
//!
//! All that the crate `fst-dist` has for pipelines of one's own is here too: groups, shard
//! specifications, the planner and the exchange.
//!
//! # What ranks must have in common
//!
//! The checkpoint, the selection, the shard specifications, the topology and the staging budget:
//! from these each rank makes the same plan. Before anything is read the ranks compare digests of
//! their plans, into which lengths and a sample of the bytes of the files go as well, so that two
//! checkpoints of one architecture are told apart. A rank that differs is refused by name.
//!
//! # Failure
//!
//! An error of one rank (a file that cannot be read or has changed, no memory, a panic) ends the
//! load on all of them, within the group's deadline at the latest, with an error that names the
//! rank and the cause. The group is of no use after that.

mod cuda;
mod cuda_outputs;
mod error;
mod fingerprint;
mod groups;
mod layout;
mod measure;
mod memory;
mod outputs;
mod reader;
mod room;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fst_format::{Checkpoint, TensorInfo};
use fst_io::{Engine, ReadOptions, ResolvedEngine, SourceFile};

pub use error::DistError;
pub use fst_dist::*;
pub use groups::{NcclStream, local_groups, local_groups_with, nccl_group};
pub use measure::MeasuredRates;

use crate::error::{Error, Result};
use crate::host::{Watch, locate, open_shards};
use crate::loader::Loader;
use crate::options::Item;
use crate::progress::Progress;
use crate::report::{LoadReport, RankReport};
use crate::tensor::Tensors;
use cuda::Sources;
use memory::{Outputs, RankMemory};

/// How soon a rank that waits for others notices that its load was cancelled, and how often one that reads
/// tells that it is alive.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// Chooses what each rank keeps of a tensor.
#[derive(Clone)]
enum Rule {
    Each(Arc<dyn Fn(&TensorInfo) -> Shard + Send + Sync>),
    Preset(Preset),
}

/// What a loader knows of ranks.
#[derive(Clone, Default)]
pub(crate) struct RankOptions {
    group: Option<Arc<dyn Group>>,
    rule: Option<Rule>,
    topology: Option<Topology>,
    staging: Option<u64>,
}

impl fmt::Debug for RankOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rule = self.rule.as_ref().map(|rule| match rule {
            Rule::Each(_) => "closure",
            Rule::Preset(preset) => preset.name(),
        });
        f.debug_struct("RankOptions")
            .field("group", &self.group)
            .field("rule", &rule)
            .field("topology", &self.topology)
            .field("staging", &self.staging)
            .finish()
    }
}

impl RankOptions {
    /// The group, if this loader is one rank of several.
    pub(crate) fn group(&self) -> Result<Option<&Arc<dyn Group>>, DistError> {
        match (&self.group, &self.rule) {
            (None, Some(_)) => Err(DistError::NoGroup),
            (group, _) => Ok(group.as_ref()),
        }
    }

    /// Refuses what ranks cannot do together.
    pub(crate) fn refuse(&self, what: &'static str) -> Result<(), DistError> {
        match self.group()? {
            Some(_) => Err(DistError::LoadOnly { what }),
            None => Ok(()),
        }
    }

    fn topology(&self) -> Result<Topology, DistError> {
        let world = self.group.as_ref().map(|group| group.world_size());
        match (&self.topology, world) {
            (Some(topology), Some(world)) if topology.world() != world => {
                Err(DistError::World { topology: topology.world(), group: world })
            }
            (Some(topology), _) => Ok(topology.clone()),
            (None, Some(world)) => Ok(Topology::one_node(world)),
            (None, None) => Err(DistError::NoGroup),
        }
    }

    /// The plan for `items`, and the type of the elements of each output must be one.
    fn plan(&self, items: &[Item], fingerprint: Vec<u8>) -> Result<Plan, DistError> {
        let topology = self.topology()?;
        let world = topology.world();
        if let Some(item) = items.iter().find(|item| item.slice.is_some()) {
            return Err(DistError::Sliced { tensor: item.info.name().to_owned() });
        }
        if let Some(item) = items.iter().find(|item| item.name.is_some()) {
            return Err(DistError::Renamed { tensor: item.info.name().to_owned() });
        }
        let table: Vec<TensorDesc> = items.iter().map(|item| (&item.info).into()).collect();
        let mut planner = Planner::new(topology).fingerprint(fingerprint);
        if let Some(bytes) = self.staging {
            planner = planner.budget(bytes);
        }
        let plan = match &self.rule {
            None => planner.plan(table, |_| Shard::replicate())?,
            Some(Rule::Preset(preset)) => {
                let rules = preset.rules(&table, world);
                planner.plan(table, |tensor| rules.shard(tensor))?
            }
            Some(Rule::Each(rule)) => {
                // The planner asks once for each tensor, in order.
                let mut infos = items.iter().map(|item| &item.info);
                planner.plan(table, |_| match infos.next() {
                    Some(info) => rule(info),
                    None => Shard::replicate(),
                })?
            }
        };
        Ok(plan)
    }
}

impl Loader {
    /// Makes this loader one rank of a group. [`load`](Self::load) then returns this rank's shards,
    /// and is called by all ranks of the group at about the same time, each from a thread or
    /// process of its own.
    ///
    /// What each rank keeps of a tensor, [`shard`](Self::shard) or [`preset`](Self::preset) says;
    /// without them, every rank keeps everything, and it is read once. Shards have the names of
    /// their tensors; tensors that are fused into one have the fused name; a rank that keeps
    /// nothing of a tensor does not have it. Elements are converted to
    /// [`dtype`](Self::dtype) by the rank that keeps them, after the exchange: what travels are the
    /// bytes of the files. [Slices](Self::slice) are refused: say it with
    /// [`Shard::ranges`].
    ///
    /// The shards go to the loader's [device](Self::device), which the group must reach:
    /// [`LocalGroup::host`] host memory, [`local_groups`] and [`nccl_group`] the devices that they are
    /// made for. The exchange needs [staging](Self::staging) memory there beside the shards, and the
    /// conversion one arena (1 GiB, or the largest shard if that is larger). A device that has no room
    /// for them, or for all ranks that share it, is told of before anything is read.
    #[must_use]
    pub fn group(mut self, group: Arc<dyn Group>) -> Self {
        self.ranks.group = Some(group);
        self
    }

    /// Says for each tensor what the ranks keep of it. All ranks must say the same.
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// # use fst::{Loader, LocalGroup, Shard};
    /// # let group = LocalGroup::host(1).remove(0);
    /// let loader = Loader::new().group(Arc::new(group)).shard(|tensor| {
    ///     match tensor.name().ends_with("o_proj.weight") {
    ///         true => Shard::split(1),
    ///         false => Shard::replicate(),
    ///     }
    /// });
    /// ```
    #[must_use]
    pub fn shard(mut self, rule: impl Fn(&TensorInfo) -> Shard + Send + Sync + 'static) -> Self {
        self.ranks.rule = Some(Rule::Each(Arc::new(rule)));
        self
    }

    /// Shards as is usual for a family of models, by the tensors' names.
    #[must_use]
    pub fn preset(mut self, preset: Preset) -> Self {
        self.ranks.rule = Some(Rule::Preset(preset));
        self
    }

    /// Where the ranks are, and the rates of storage and links. Unless given, all ranks are on one
    /// node with one storage. Rates steer the plan only; wrong ones are slower.
    #[must_use]
    pub fn topology(mut self, topology: Topology) -> Self {
        self.ranks.topology = Some(topology);
        self
    }

    /// The most bytes of staging memory that a rank uses for the exchange, 256 MiB unless set. It takes
    /// no more than the plan needs.
    #[must_use]
    pub fn staging(mut self, bytes: u64) -> Self {
        self.ranks.staging = Some(bytes);
        self
    }

    /// The plan that the ranks of [`group`](Self::group), or of [`topology`](Self::topology) if
    /// there is no group, would follow: what each reads, sends and receives. Reads nothing.
    ///
    /// # Errors
    ///
    /// What is wrong with the request; [`DistError::NoGroup`] without group and topology.
    pub fn plan(&self, checkpoint: &Checkpoint) -> Result<Plan> {
        let items = self.selection.resolve(checkpoint)?;
        Ok(self.ranks.plan(&items, Vec::new())?)
    }

    /// Loads this rank's shards.
    pub(crate) fn load_rank(
        &self,
        checkpoint: &Checkpoint,
        group: &Arc<dyn Group>,
    ) -> Result<Tensors> {
        // Before anything can end the group: it is another load's.
        let occupied = group.occupy().map_err(DistError::Group)?;
        let _guard = AbortOnPanic(&**group);
        let result = self.load_rank_unguarded(checkpoint, &occupied);
        result.map_err(|error| {
            if self.cancel.is_cancelled() {
                group.abort("cancelled");
                return Error::Cancelled;
            }
            // Others must not wait for a rank that gave up. What the group itself told is known
            // to them.
            group.abort(&error.to_string());
            error
        })
    }

    fn load_rank_unguarded(
        &self,
        checkpoint: &Checkpoint,
        occupied: &Occupied<'_>,
    ) -> Result<Tensors> {
        let group: &dyn Group = &**occupied;
        let device = self.target().clone();
        if !group.reaches(memory::space(&device)) {
            return Err(DistError::Unreached { rank: group.rank(), device }.into());
        }
        if self.read.engine == Engine::Gds && !device.is_host() {
            let reason = "ranks read through pinned host memory".to_owned();
            return Err(Error::Engine { engine: Engine::Gds, device, reason });
        }
        let engine = ResolvedEngine::resolve(self.read.engine).map_err(|e| locate(e, &[]))?;
        let began = Instant::now();
        let mut report = LoadReport::new(engine, device);
        report.push("open", checkpoint.open_time(), 0);
        if self.manifest.is_some() {
            return Err(DistError::LoadOnly { what: "a manifest" }.into());
        }
        let items = self.selection.resolve(checkpoint)?;
        let fingerprint = fingerprint::of(checkpoint, &items, &|| group.alive())?;
        let plan = self.ranks.plan(&items, fingerprint)?;
        let view = plan.rank(group.rank());
        let shards = view.shards().into_iter().map(|shard| shard as usize);
        let (files, number) = open_shards(checkpoint, &items, shards)?;
        report.add_files(&files);
        let outputs = Outputs::new(self.target(), &view, &items, group, !self.unchecked)?;
        report.push("plan", began.elapsed(), 0);

        let began = Instant::now();
        let load = plan.loads().get(group.rank() as usize).copied().unwrap_or_default();
        let watch = Watch::new(self.cancel.flag());
        let progress = |bytes_done| Progress {
            bytes_done,
            bytes_total: load.read(),
            tensors_total: view.outputs().len(),
            elapsed: began.elapsed(),
        };
        let neighbours = neighbours(plan.topology(), group.rank());
        let options = self.rank_reads(&report.engine, neighbours);
        let gap = plan.coalesce_gap();
        let sources = Sources { files: &files, number: &number, options, gap, watch: &watch };
        let keep = self.device_options.keep_pinned;
        let memory = RankMemory::new(self.target(), &view, sources, neighbours, keep)?;
        let exchanged = self.watched(&watch, &progress, || {
            let cancelled = || self.cancel.is_cancelled();
            attending(group, &cancelled, &|| watch.bytes(), || {
                // SAFETY: the regions are the outputs' own, apart from each other, and nothing
                // else reaches them before `finish`.
                unsafe { fst_dist::load_in(&view, occupied, memory.backend(), outputs.regions()) }
                    .map_err(|error| DistError::from(error).into())
            })
        })?;
        verify(&files, &items)?;
        let reads = memory.into_stats();
        report.push("read", began.elapsed(), reads.iter().map(|read| read.bytes_read).sum());
        report.add_reads(&reads);
        report.add_exchange(&exchanged);

        let began = Instant::now();
        // SAFETY: the exchange has succeeded on all ranks and is over, so that nobody writes to the
        // outputs any more.
        let (tensors, converted) = unsafe { outputs.finish(&view, &items, &|| group.alive()) }?;
        if converted > 0 {
            report.push("convert", began.elapsed(), converted);
        }
        // Done is when all are: a file that has changed, or a conversion that fails, ends all loads.
        group.barrier().map_err(DistError::Group)?;
        report.tensors = tensors.len();
        report.bytes = tensors.iter().map(|tensor| tensor.byte_len() as u64).sum();
        report.rank = Some(RankReport {
            rank: group.rank(),
            world: group.world_size(),
            kept_bytes: load.kept,
            sent_bytes: exchanged.sent_bytes,
            received_bytes: exchanged.received_bytes,
        });
        Ok(Tensors::new(tensors, report))
    }

    /// How this rank reads: ranks of one node share its cores.
    fn rank_reads(&self, engine: &ResolvedEngine, neighbours: u64) -> ReadOptions {
        let mut options = self.read.clone();
        if options.workers.is_none() && engine.used == Engine::Uring {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            options.workers = Some((cores / neighbours as usize).clamp(1, 16));
        }
        options
    }
}

/// Runs `load` while another thread attends to the group: it ends it when the load is cancelled, which a
/// rank that waits for others does not see, and tells that this rank is alive when `bytes` have moved,
/// which a rank that reads for long does not stop to tell.
fn attending<T>(
    group: &dyn Group,
    cancelled: &(dyn Fn() -> bool + Sync),
    bytes: &(dyn Fn() -> u64 + Sync),
    load: impl FnOnce() -> T,
) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = std::thread::Builder::new().name("fst-attend".to_owned());
        let watcher = watcher.spawn_scoped(scope, || {
            let mut known = bytes();
            while !done.load(Relaxed) {
                if cancelled() {
                    return group.abort("cancelled");
                }
                let now = bytes();
                if std::mem::replace(&mut known, now) != now {
                    group.alive();
                }
                std::thread::park_timeout(WATCH_INTERVAL);
            }
        });
        let _stop = Done(&done, watcher.as_ref().ok().map(|watcher| watcher.thread()));
        load()
    })
}

/// Ranks on the node of `rank`, that rank included.
fn neighbours(topology: &Topology, rank: u32) -> u64 {
    let node = |rank: u32| topology.places().get(rank as usize).map(|place| place.node);
    let neighbours = (0..topology.world()).filter(|&other| node(other) == node(rank)).count();
    neighbours.max(1) as u64
}

/// Ends the watcher when dropped, also by a panic: the scope waits for it.
struct Done<'a>(&'a AtomicBool, Option<&'a std::thread::Thread>);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
        if let Some(watcher) = self.1 {
            watcher.unpark();
        }
    }
}

/// A rank whose load panics tells the others.
struct AbortOnPanic<'a>(&'a dyn Group);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort("its load panicked");
        }
    }
}

/// Checks that no file has changed since its header was read.
fn verify(files: &[SourceFile], items: &[Item]) -> Result<()> {
    files.iter().try_for_each(|file| file.verify_unchanged().map_err(|e| locate(e, items)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use fst_dist::group::{Control, HostCopier};

    #[test]
    fn a_rank_is_waited_for_while_its_bytes_move() {
        let deadline = Duration::from_millis(800);
        for moves in [true, false] {
            let mut groups = LocalGroup::with(2, HostCopier, deadline);
            let (other, group) = (groups.remove(1), groups.remove(0));
            let waited = std::thread::scope(|scope| {
                let waited = scope.spawn(move || other.gather_messages(&[]));
                // One read that takes longer than the deadline.
                let bytes = AtomicU64::new(0);
                attending(&group, &|| false, &|| bytes.load(Relaxed), || {
                    for _ in 0..24 {
                        std::thread::sleep(deadline / 8);
                        bytes.fetch_add(moves.into(), Relaxed);
                    }
                });
                let _ = group.gather_messages(&[]);
                waited.join()
            });
            let waited = waited.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            assert_eq!(waited.is_ok(), moves, "{waited:?}");
        }
    }
}
