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
//! checkpoints of one architecture differ. A rank that differs is refused by name.
//!
//! # Failure
//!
//! An error of one rank (a file that cannot be read or has changed, no memory, a panic) ends the
//! load on all of them, within the group's deadline at the latest, with an error that names the
//! rank and the cause. The group is of no use after that.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use fst_format::{Checkpoint, Dtype, Planned, TensorInfo};
use fst_gpu::{Filled, LoadError};
use fst_io::watch::Watch;
use fst_io::{Engine, ReadOptions, ResolvedEngine, SourceFile};

#[cfg(feature = "cuda")]
#[path = "rank_devices.rs"]
mod devices;
#[cfg(feature = "cuda")]
pub use devices::{local_groups, local_groups_with, nccl_group};
pub use fst_dist::*;

use crate::device::Device;
use crate::doctor::first_of;
use crate::error::{DeviceError, Error, Result};
use crate::files::{cast_of, locate, locate_load, open_shard, open_shards, shards_of};
use crate::loader::Loader;
use crate::loading::Loading;
use crate::progress::Progress;
use crate::remote;
use crate::report::{LoadReport, RankReport};
use crate::tensor::{Data, Tensor, Tensors};

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
    fn plan(&self, items: &[Planned], fingerprint: Vec<u8>) -> Result<Plan, DistError> {
        let topology = self.topology()?;
        let world = topology.world();
        if let Some(item) = items.iter().find(|item| item.slice().is_some()) {
            return Err(DistError::Sliced { tensor: item.source().name().to_owned() });
        }
        if items.iter().any(|item| item.device().is_some()) {
            return Err(DistError::LoadOnly { what: "a request's device" });
        }
        if let Some(item) = items.iter().find(|item| item.new_name().is_some()) {
            return Err(DistError::Renamed { tensor: item.source().name().to_owned() });
        }
        let table: Vec<TensorDesc> = items.iter().map(|item| item.source().into()).collect();
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
                let mut infos = items.iter().map(Planned::source);
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
    /// process of its own. So is [`start`](Self::start), or [`stream`](Self::stream), which hand shards out as they
    /// become complete, those that are converted behind the exchange; without a
    /// [budget](Self::memory_budget). A rank that drops its load or cancels it ends it on all ranks.
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
    /// for them, or for all ranks that share it, is an error before anything is read.
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
    pub fn rank_plan(&self, checkpoint: &Checkpoint) -> Result<Plan> {
        Ok(self.ranks.plan(&self.planned(checkpoint)?, Vec::new())?)
    }

    /// Loads this rank's shards.
    pub(crate) fn load_rank(
        &self,
        checkpoint: &Checkpoint,
        group: &Arc<dyn Group>,
    ) -> Result<Tensors> {
        let slots: Mutex<Vec<Option<Tensor>>> = Mutex::default();
        let slot = || slots.lock().unwrap_or_else(|e| e.into_inner());
        let planned = |shards: Vec<(String, u64)>| slot().resize(shards.len(), None);
        let deliver = |index: usize, tensor| {
            if let Some(slot) = slot().get_mut(index) {
                *slot = Some(tensor);
            }
        };
        let watch = self.watch();
        let report = self.read_rank(checkpoint, group, &watch, &planned, &deliver)?;
        let slots = slots.into_inner().unwrap_or_else(|e| e.into_inner());
        let tensors: Option<Vec<Tensor>> = slots.into_iter().collect();
        // Every shard is delivered by a load that succeeds.
        Ok(Tensors::new(tensors.ok_or(Error::Cancelled)?, report))
    }

    /// Starts loading this rank's shards in the background.
    pub(crate) fn start_rank(
        &self,
        checkpoint: &Checkpoint,
        group: &Arc<dyn Group>,
    ) -> Result<Loading> {
        if self.budget.is_some() {
            return Err(DistError::LoadOnly { what: "a memory budget" }.into());
        }
        let (loader, checkpoint, group) = (self.clone(), checkpoint.clone(), group.clone());
        Loading::planned_by(self, move |watch, planned, deliver| {
            loader.read_rank(&checkpoint, &group, watch, planned, deliver)
        })
    }

    /// Loads this rank's shards: says which they are, with their bytes, and delivers each with its place among
    /// these.
    fn read_rank(
        &self,
        checkpoint: &Checkpoint,
        group: &Arc<dyn Group>,
        watch: &Watch,
        planned: &dyn Fn(Vec<(String, u64)>),
        deliver: &(dyn Fn(usize, Tensor) + Sync),
    ) -> Result<LoadReport> {
        // Before anything can end the group: it is another load's.
        let occupied = group.occupy().map_err(DistError::Group)?;
        let result = self.read_occupied(checkpoint, occupied, watch, planned, deliver);
        result.map_err(|error| {
            if watch.is_stopped() && !matches!(error, Error::TimedOut { .. }) {
                group.abort("cancelled");
                return Error::Cancelled;
            }
            // Others must not wait for a rank that gave up. What the group itself told is known
            // to them.
            group.abort(&error.to_string());
            error
        })
    }

    fn read_occupied(
        &self,
        checkpoint: &Checkpoint,
        occupied: Occupied<'_>,
        watch: &Watch,
        planned: &dyn Fn(Vec<(String, u64)>),
        deliver: &(dyn Fn(usize, Tensor) + Sync),
    ) -> Result<LoadReport> {
        let group: &dyn Group = &*occupied;
        let device = self.target().clone();
        let target = match device.as_cuda() {
            #[cfg(feature = "cuda")]
            Some(device) => {
                let keep_pinned = self.device_options.keep_pinned;
                LoadTarget::Cuda { device: device.clone(), keep_pinned }
            }
            _ => LoadTarget::Host,
        };
        if !group.reaches(target.space()) {
            return Err(DistError::Unreached { rank: group.rank(), device }.into());
        }
        if self.read.engine == Engine::Gds && !device.is_host() {
            let reason = "ranks read through pinned host memory".to_owned();
            return Err(Error::Engine { engine: Engine::Gds, device, reason });
        }
        let mut report = self.begin(checkpoint)?;
        let began = Instant::now();
        if self.manifest.is_some() {
            return Err(DistError::LoadOnly { what: "a manifest" }.into());
        }
        let items = self.planned(checkpoint)?;
        let fingerprint = fingerprint(checkpoint, &items, group)?;
        let plan = self.ranks.plan(&items, fingerprint)?;
        let view = plan.rank(group.rank());
        let shards = view.shards().into_iter().map(|shard| shard as usize);
        let (files, number) = open_shards(checkpoint, &items, shards)?;
        report.add_files(&files);
        check_dtypes(&view, &items)?;
        let casts: Vec<_> = items.iter().map(cast_of).collect();
        let failed = |error| rank_error(error, &view, &items);
        let shards: Vec<(String, u64)> =
            view.outputs().iter().map(|output| shard(output, &items)).collect();
        let bytes = shards.iter().map(|(_, bytes)| *bytes).sum();
        planned(shards);
        let deliver = |index: usize, filled| {
            let output = view.outputs().get(index);
            if let Some(tensor) = output.and_then(|output| tensor(output, filled, &items)) {
                deliver(index, tensor);
            }
        };
        let check = !self.unchecked;
        let load = ShardLoad::reserve(&view, &casts, target, &occupied, check).map_err(failed)?;
        report.push("plan", began.elapsed(), 0);

        let began = Instant::now();
        let own = plan.loads().get(group.rank() as usize).copied().unwrap_or_default();
        let progress = |bytes_done| Progress {
            bytes_done,
            bytes_total: own.read(),
            tensors_total: view.outputs().len(),
            elapsed: began.elapsed(),
        };
        let options = self.rank_reads(&report.engine, plan.topology().neighbours(group.rank()));
        let sources = RankFiles { files: &files, number: &number, options, watch };
        let arrived = self.watched(watch, &progress, || {
            load.exchange(&occupied, sources, &|| watch.is_stopped(), &deliver).map_err(failed)
        })?;
        verify(&files, &items)?;
        let (exchanged, reads) = (*arrived.exchange(), arrived.reads());
        report.push("read", began.elapsed(), reads.iter().map(|read| read.bytes_read).sum());
        report.add_reads(reads);
        report.add_exchange(&exchanged);

        let began = Instant::now();
        let converted = arrived.convert(&|| group.alive(), &deliver).map_err(failed)?;
        if converted > 0 {
            report.push("convert", began.elapsed(), converted);
        }
        (report.tensors, report.bytes) = (view.outputs().len(), bytes);
        report.rank = Some(RankReport {
            rank: group.rank(),
            world: group.world_size(),
            kept_bytes: own.kept,
            sent_bytes: exchanged.sent_bytes,
            received_bytes: exchanged.received_bytes,
        });
        // Done is when all are: a file that has changed, or a conversion that fails, ends all loads.
        occupied.end().map_err(DistError::Group)?;
        remote::loaded(checkpoint, &mut report);
        Ok(report)
    }

    /// How this rank reads: ranks of one node share its cores.
    fn rank_reads(&self, engine: &ResolvedEngine, neighbours: u32) -> ReadOptions {
        let mut options = self.read.clone();
        if options.workers.is_none() && engine.used == Engine::Uring {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            options.workers = Some((cores / neighbours as usize).clamp(1, 16));
        }
        options
    }
}

/// What ended this rank's load, in this crate's words.
fn rank_error(error: RankError, view: &RankPlan<'_>, items: &[Planned]) -> Error {
    match error {
        RankError::Exchange(error) => DistError::from(error).into(),
        RankError::Load(LoadError::TooLarge { source, largest }) => {
            let largest = view.outputs().get(largest).map(|o| (o.name.to_owned(), o.bytes));
            let (largest, bytes) = largest.unwrap_or_default();
            DeviceError::TooLarge { source, largest, bytes }.into()
        }
        RankError::Load(error) => locate_load(error, items),
        other => DistError::Rank(Box::new(other)).into(),
    }
}

/// Checks that no file has changed since its header was read.
fn verify(files: &[SourceFile], items: &[Planned]) -> Result<()> {
    SourceFile::verify_all(files.iter()).map_err(|e| locate(e, items))
}

/// The types of the elements, and what tells the files apart. Files are open one at a time: most are others'
/// to read.
fn fingerprint(checkpoint: &Checkpoint, items: &[Planned], group: &dyn Group) -> Result<Vec<u8>> {
    let types = items.iter().flat_map(|item| item.source().dtype().as_str().bytes().chain([0]));
    let mut shards: Vec<usize> = shards_of(items).collect();
    shards.sort_unstable();
    shards.dedup();
    let mut fingerprint = Fingerprint::new(shards.len(), types.collect());
    for shard in shards {
        group.alive();
        let file = open_shard(checkpoint, items, shard)?;
        fingerprint.add(&file).map_err(|e| locate(e, items))?;
    }
    Ok(fingerprint.into_bytes())
}

/// The item that an output's type, and name unless it is fused, are of.
fn first<'i>(output: &Output<'_>, items: &'i [Planned]) -> Option<&'i Planned> {
    output.tensors.first().and_then(|&tensor| items.get(tensor as usize))
}

/// Refuses outputs that are made of tensors of different types.
fn check_dtypes(view: &RankPlan<'_>, items: &[Planned]) -> Result<(), DistError> {
    for output in view.outputs() {
        let Some(expected) = first(output, items).map(|item| item.source().dtype()) else {
            continue;
        };
        for item in output.tensors.iter().filter_map(|&tensor| items.get(tensor as usize)) {
            let found = item.source().dtype();
            if found != expected {
                let (output, tensor) = (output.name.to_owned(), item.source().name().to_owned());
                return Err(DistError::FusedDtypes { output, expected, tensor, found });
            }
        }
    }
    Ok(())
}

/// Name of an output, and bytes once it is converted.
fn shard(output: &Output<'_>, items: &[Planned]) -> (String, u64) {
    let bits = first(output, items).map_or(0, |item| u64::from(item.dtype().bits()));
    (output.name.to_owned(), output.shape.iter().product::<u64>() * bits / 8)
}

/// The tensor that a rank's shard is.
fn tensor(output: &Output<'_>, filled: Filled, items: &[Planned]) -> Option<Tensor> {
    let item = first(output, items)?;
    let shape: Vec<usize> = output.shape.iter().map(|&extent| extent as usize).collect();
    let data = Data::of(filled, shard(output, items).1);
    let tensor = Tensor::new(item.source().clone(), item.dtype(), Some(&shape), data);
    Some(tensor.named(output.name))
}

/// Rates that were measured, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct MeasuredRates {
    /// Bytes per second that one reader got, with all else idle.
    pub storage_bytes_per_s: f64,
    /// Bytes that it read. The rate of a few megabytes says little about the storage.
    pub read_bytes: u64,
    /// Share of the files' bytes that was in the page cache before, from 0 to 1: their rate is that of
    /// the cache. `None` where the system does not tell.
    pub resident: Option<f64>,
    /// The engine that read.
    pub engine: Engine,
    /// Bytes per second that each of several ranks received from another and sent to a third at the
    /// same time, in host memory of one process.
    pub copy_bytes_per_s: f64,
    /// How many ranks these were.
    pub copy_ranks: u32,
}

impl MeasuredRates {
    /// Reads the first tensors of `checkpoint`, about `bytes` of them, into host memory as a rank
    /// would, and has `ranks` ranks of this process (2 to 8) send messages in a ring. Takes as much
    /// memory as it reads.
    ///
    /// ```no_run
    /// use fst::{Checkpoint, Loader, Preset, Topology, dist::MeasuredRates};
    ///
    /// let checkpoint = Checkpoint::open("Llama-2-7b-hf")?;
    /// let rates = MeasuredRates::measure(&checkpoint, 1 << 30, 8)?;
    /// let topology = rates.apply(Topology::one_node(8));
    /// let plan = Loader::new().preset(Preset::llama()).topology(topology).rank_plan(&checkpoint)?;
    /// println!("{:.1} s", plan.predict().seconds());
    /// # Ok::<(), fst::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The files cannot be read.
    pub fn measure(checkpoint: &Checkpoint, bytes: u64, ranks: u32) -> Result<Self> {
        let loader = Loader::new().request(first_of(checkpoint, bytes));
        let tensors = loader.load(checkpoint)?;
        let report = tensors.report();
        let seconds = report.stage("read").map_or(report.seconds, |read| read.seconds);
        let total = report.file_bytes.max(1) as f64;
        let copies = CopyRate::measure(ranks).map_err(DistError::Group)?;
        Ok(Self {
            // A positive number whatever the clock says.
            storage_bytes_per_s: report.bytes.max(1) as f64 / seconds.max(1e-9),
            read_bytes: report.bytes,
            resident: report.resident_bytes.map(|bytes| bytes as f64 / total),
            engine: report.engine.used,
            copy_bytes_per_s: copies.bytes_per_s,
            copy_ranks: copies.ranks,
        })
    }

    /// The topology with these rates: what one reader gets is taken for what a storage has for all its
    /// ranks together, and copies of the process for the links within a node. Links between nodes are
    /// not measured and stay as they are.
    #[must_use]
    pub fn apply(&self, topology: Topology) -> Topology {
        let mut links = topology.links();
        links.node_bytes_per_s = self.copy_bytes_per_s;
        let topology = topology.with_links(links);
        match topology.storages().first().copied() {
            // Nothing was there to be read.
            _ if self.read_bytes == 0 => topology,
            None => topology,
            Some(Storage { requests_per_s, .. }) => {
                let storage = Storage::with_rate(self.storage_bytes_per_s);
                topology.with_storage(Storage { requests_per_s, ..storage })
            }
        }
    }
}

/// Why ranks could not load together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DistError {
    /// The plan cannot be made.
    #[error(transparent)]
    Plan(Box<PlanError>),
    /// Reading or exchanging failed, on this rank or another.
    #[error(transparent)]
    Exchange(Box<ExchangeError>),
    /// The group failed: says which rank and why.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// Shards were asked for, and there are no ranks.
    #[error("shards need a group of ranks, or at least a topology to plan for")]
    NoGroup,
    /// Only whole loads are shared by ranks.
    #[error("{what} is for a single rank; ranks of a group load everything at once")]
    LoadOnly {
        /// What was asked for.
        what: &'static str,
    },
    /// A tensor is sliced as well as sharded.
    #[error("tensor {tensor:?} cannot be sliced in a load by ranks; shard it by ranges instead")]
    Sliced {
        /// The tensor.
        tensor: String,
    },
    /// A loaded tensor was given a name of its own, and ranks go by those of the checkpoint.
    #[error("tensor {tensor:?} is given another name; name the shards that ranks loaded")]
    Renamed {
        /// The tensor.
        tensor: String,
    },
    /// The topology has another number of ranks than the group.
    #[error("the topology has {topology} ranks, the group {group}")]
    World {
        /// Ranks of the topology.
        topology: u32,
        /// Ranks of the group.
        group: u32,
    },
    /// Tensors of different types are to be fused.
    #[error("tensor {tensor:?} of {found} cannot be part of {output:?}, which holds {expected}")]
    FusedDtypes {
        /// The fused tensor.
        output: String,
        /// Type of the elements of its first part.
        expected: Dtype,
        /// The part that differs.
        tensor: String,
        /// Its type.
        found: Dtype,
    },
    /// The group does not reach the memory of the loader's device.
    #[error(
        "rank {rank}: its group does not reach {device}; {}",
        match .device.is_host() {
            true => "load to the group's device, or use LocalGroup or MpiGroup",
            false => "make the group for this device: local_groups, or nccl_group with one process a rank",
        }
    )]
    Unreached {
        /// The rank.
        rank: u32,
        /// Its loader's device.
        device: Device,
    },
    /// A rank's load cannot be made, as when ranks that share a device have no room there together.
    #[error(transparent)]
    Rank(Box<RankError>),
    /// NCCL moves bytes between CUDA devices.
    #[error("a group over NCCL needs a CUDA device, not {device}")]
    NotCuda {
        /// The device given.
        device: Device,
    },
}

impl From<PlanError> for DistError {
    fn from(error: PlanError) -> Self {
        Self::Plan(Box::new(error))
    }
}

impl From<ExchangeError> for DistError {
    fn from(error: ExchangeError) -> Self {
        match error {
            ExchangeError::Group(error) => Self::Group(error),
            error => Self::Exchange(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_rates_replace_those_of_storage_and_of_links_within_a_node() {
        let mut rates = MeasuredRates {
            storage_bytes_per_s: 3e9,
            read_bytes: 1,
            resident: None,
            engine: Engine::Pread,
            copy_bytes_per_s: 7e9,
            copy_ranks: 2,
        };
        let before = Topology::local_storage(2, 2);
        let after = rates.apply(before.clone());
        for (before, after) in before.storages().iter().zip(after.storages()) {
            assert_eq!((after.bytes_per_s, after.rank_bytes_per_s), (3e9, 3e9));
            assert_eq!(after.requests_per_s, before.requests_per_s);
        }
        assert_eq!(after.links().node_bytes_per_s, 7e9);
        assert_eq!(after.links().net_bytes_per_s, before.links().net_bytes_per_s);
        // Where there was nothing to read, nothing is known of the storage.
        rates.read_bytes = 0;
        assert_eq!(rates.apply(before.clone()).storages(), before.storages());
    }
}
