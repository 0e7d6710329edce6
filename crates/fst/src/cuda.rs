//! Loads into a CUDA device's memory: blocks are read into pinned memory and leave from there by
//! asynchronous copies, cut and converted on the device on the way.

mod reads;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fst_format::Checkpoint;
use fst_gpu::cufile::{self, CuFile, GdsError, GdsOptions};
use fst_gpu::kernel::{Kernel, StridedJob};
use fst_gpu::{
    Afterwards, CopyOp, CudaDevice, DEVICE_ALIGN, DeviceArena, Landing, PipelineOptions,
    RingOptions,
};
use fst_io::arenas::{ArenaMemory, Arenas};
use fst_io::budget::Lease;
use fst_io::plan::{Block, Limits};
use fst_io::sink::SinkError;
use fst_io::{Budget, Engine, ReadOptions, ReadStats, ResolvedEngine, SourceFile};

use crate::available;
use crate::cached::{DeviceCopy, DeviceOptions};
use crate::error::{DeviceError, Error, Result};
use crate::host::{Deliver, HostLoad, Part, Watch, from_sink, locate, open_files};
use crate::options::Item;
use crate::tensor::{Data, Tensor};
use crate::transform::{Cut, Sharing, TransformPlan, Work};

/// Bytes of host memory for tensors that are converted on the host on their way to a device, unless
/// one of them needs more.
const TORN_MEMORY: u64 = 1 << 30;

/// Pinned blocks for what is too short to be copied straight out of the page cache: as many as are pinned
/// at once.
const DIRECT_BLOCKS: usize = 4;

/// One arena on a device, and the part of a memory budget that it takes.
#[derive(Debug)]
pub(crate) struct CudaMemory {
    pub(crate) arena: DeviceArena,
    /// Declared behind the arena: the bytes are back in the budget once they are back on the
    /// device.
    _lease: Option<Lease>,
}

impl CudaMemory {
    /// Memory that no budget counts.
    pub(crate) fn new(arena: DeviceArena) -> Arc<Self> {
        Arc::new(Self { arena, _lease: None })
    }
}

impl ArenaMemory for CudaMemory {
    type Full = Arc<Self>;

    unsafe fn full(this: Arc<Self>) -> Arc<Self> {
        this
    }
}

/// How many work at once on the way to the device, and so how much of its memory they take beside the
/// tensors'.
#[derive(Debug, Clone, Copy)]
struct Crew {
    /// Copy streams of a pipeline.
    streams: usize,
    gds: GdsOptions,
}

/// From this many slices or tensors on, kernels may be asked to deal them out.
const CROWD: usize = 16;

/// A load that is planned and whose files are open.
#[derive(Debug)]
pub(crate) struct CudaLoad {
    device: CudaDevice,
    items: Vec<Item>,
    files: Arc<Vec<SourceFile>>,
    /// Items without a byte.
    empty: Vec<usize>,
    /// The items of the plan's work, in order.
    order: Vec<usize>,
    plan: TransformPlan,
    /// Those to be converted whose file leaves them misaligned, so that elements lie across
    /// blocks: they are converted on the host. No writer of today makes such files. They are loaded
    /// by groups of at most [`TORN_MEMORY`], one after the other, in order.
    torn: Vec<(HostLoad, Vec<usize>)>,
    options: DeviceOptions,
    crew: Crew,
    /// Memory of the caller's for each item; without, the load makes its own.
    given: Option<Vec<Arc<CudaMemory>>>,
    /// How bytes travelled, once they did.
    copy: Mutex<Option<DeviceCopy>>,
}

impl CudaLoad {
    /// Plans the loading of `items` into arenas of about `arena` bytes, tensors shorter than `apart` in
    /// others than the rest.
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        items: Vec<Item>,
        device: &CudaDevice,
        arena: u64,
        apart: u64,
    ) -> Result<Self> {
        let (files, number) = open_files(checkpoint, &items)?;
        let files = Arc::new(files);
        let align = files.iter().map(SourceFile::align).max().unwrap_or(Limits::MIN_ALIGN);
        let block = PipelineOptions::default().ring.block_bytes as u64;
        let limits = Limits { align, block, ..Limits::default() };
        let (mut empty, mut order, mut works) = (Vec::new(), Vec::new(), Vec::new());
        let mut torn = Vec::new();
        for (index, item) in items.iter().enumerate() {
            match number[item.info.shard()].filter(|_| item.source_len() > 0) {
                Some(_) if item.is_torn() => torn.push(index),
                Some(file) => {
                    order.push(index);
                    works.push((item, file));
                }
                None => empty.push(index),
            }
        }
        let plan =
            TransformPlan::new(&works, limits, Sharing { arena, align: DEVICE_ALIGN, apart })
                .map_err(|e| locate(e, &items))?;
        let torn = groups(torn, TORN_MEMORY, |index| items[*index].len()).into_iter();
        let torn = torn.map(|indices| {
            let items = indices.iter().map(|index| items[*index].clone()).collect();
            let files = files.clone();
            let load = HostLoad::with_files(files, &number, items, arena.max(1), false)?;
            Ok((load.within_another(), indices))
        });
        let torn = torn.collect::<Result<_>>()?;
        let (options, copy) = (DeviceOptions::default(), Mutex::default());
        let device = device.clone();
        let streams = PipelineOptions::default().streams;
        let crew = Crew { streams, gds: GdsOptions::default() };
        Ok(Self {
            device,
            items,
            files,
            empty,
            order,
            plan,
            torn,
            options,
            crew,
            given: None,
            copy,
        })
    }

    /// Says how host memory is used on the way.
    pub(crate) fn with_options(self, options: DeviceOptions) -> Self {
        Self { options, ..self }
    }

    /// Keeps what is needed beside the tensors' memory to a quarter of `budget` and to what the largest
    /// of them leave of it, if that is possible at all.
    pub(crate) fn within(mut self, budget: u64, in_order: bool) -> Self {
        let room = (budget / 4).min(budget.saturating_sub(self.least_memory(in_order)));
        let one = PipelineOptions { streams: 1, ..PipelineOptions::default() };
        let streams = room / one.device_bytes().max(1);
        self.crew.streams = (streams as usize).clamp(1, self.crew.streams);
        self.crew.gds = self.crew.gds.within(room, self.plan.plan.limits().block);
        self
    }

    /// Bytes of device memory that are needed beside the tensors', at most. A driver that has a call for
    /// many copies and then refuses it makes it more.
    pub(crate) fn scratch(&self, read: &ReadOptions, budget: bool) -> u64 {
        let plan = &self.plan.plan;
        if self.order.is_empty() {
            return 0;
        }
        if read.engine == Engine::Gds {
            return self.crew.gds.device_bytes(plan.blocks().len(), plan.limits().block);
        }
        let items = || self.order.iter().filter_map(|index| self.items.get(*index));
        let casts = items().any(|item| item.cast().is_some());
        let slices = items().filter(|item| item.runs().count > 1).count();
        let crowd = !self.device.copies_in_batches() && self.order.len() >= CROWD;
        if !casts && slices < CROWD && !crowd {
            return 0;
        }
        let pipeline = PipelineOptions { streams: self.crew.streams, ..PipelineOptions::default() };
        let pipelines = 1 + u64::from(self.options.cached.may_register(read, budget));
        pipelines * pipeline.device_bytes()
    }

    /// Loads into memory of the caller's, a piece for each item. The arenas that were planned have
    /// one item each.
    ///
    /// # Safety
    ///
    /// Nobody else uses the memory until the load is over.
    pub(crate) unsafe fn into_memory(self, given: Vec<DeviceArena>) -> Self {
        let memory = |arena| Arc::new(CudaMemory { arena, _lease: None });
        Self { given: Some(given.into_iter().map(memory).collect()), ..self }
    }

    /// How bytes got to the device, once the load is done.
    pub(crate) fn copy(&self) -> Option<DeviceCopy> {
        self.copy.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    pub(crate) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Bytes that will be read.
    pub(crate) fn bytes_read(&self) -> u64 {
        let torn = self.torn.iter().map(|(load, _)| load.bytes_read());
        self.plan.plan.bytes_read() + torn.sum::<u64>()
    }

    /// Has an item read before others; for loads whose arenas may all be in memory at once.
    pub(crate) fn prefer(&self, index: usize, watch: &Watch) {
        if let Ok(piece) = self.order.binary_search(&index) {
            watch.prefer(Part::Transformed, self.plan.extents_of(piece));
        }
    }

    /// Bytes of arenas that must be in the device's memory at once. Torn tensors come first; where
    /// tensors are taken in the checkpoint's order, all of these may have to wait for their turn.
    pub(crate) fn least_memory(&self, in_order: bool) -> u64 {
        let torn = self.torn.iter().flat_map(|(load, _)| load.items()).map(Item::len);
        match in_order {
            true => self.plan.least_memory() + torn.sum::<u64>(),
            false => self.plan.least_memory().max(torn.max().unwrap_or(0)),
        }
    }

    /// The files that are read.
    pub(crate) fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// How blocks get to the device through pinned memory; with `registers`, beside
    /// [what goes straight out of the page cache](Self::registering): both rings together are no larger
    /// than one alone.
    fn staging(&self, registers: bool) -> PipelineOptions {
        let mut ring = RingOptions::default();
        ring.blocks -= if registers { DIRECT_BLOCKS } else { 0 };
        let mut ring = ring.for_blocks(self.plan.plan.blocks().len());
        if self.options.keep_pinned {
            ring.afterwards = Afterwards::Keep;
        }
        PipelineOptions { ring, streams: self.crew.streams }
    }

    /// How blocks get to the device out of registered mappings. Short runs are staged.
    fn registering(&self) -> PipelineOptions {
        let ring = RingOptions { blocks: DIRECT_BLOCKS, ..RingOptions::default() };
        PipelineOptions { ring, streams: self.crew.streams }
    }

    /// Bytes of host memory that are taken on the way to the device, at most. What registered mappings
    /// pin is in memory already; what cuFile takes for itself is not known.
    pub(crate) fn host_memory(&self, read: &ReadOptions, budget: bool) -> u64 {
        // One after the other, and all before the first ring.
        let torn = self.torn.iter().map(|(load, _)| load.memory()).max().unwrap_or(0);
        if self.order.is_empty() || read.engine == Engine::Gds {
            return torn;
        }
        let registers = self.options.cached.may_register(read, budget);
        let mut pinned = self.staging(registers).pinned_bytes();
        if registers {
            pinned += self.registering().pinned_bytes();
        }
        torn.max(pinned.saturating_sub(fst_gpu::kept_bytes() as u64))
    }

    /// Refuses a load that the device has no room for, before anything is read; with `host`, also one that
    /// host memory has none for on its way.
    pub(crate) fn check_memory(&self, read: &ReadOptions, host: bool) -> Result<()> {
        available::check(host, self.host_memory(read, false))?;
        let torn = self.torn.iter().flat_map(|(load, _)| load.items()).map(Item::len);
        let arenas = self.plan.arenas.iter().map(|(len, _)| *len).chain(torn).sum::<u64>();
        let arenas = if self.given.is_some() { 0 } else { arenas };
        let needed = arenas.saturating_add(self.scratch(read, false));
        DeviceArena::check_fits(&self.device, needed).map_err(|source| {
            let largest = self.items.iter().max_by_key(|item| item.len());
            match largest {
                Some(item) => DeviceError::TooLarge {
                    source,
                    largest: item.info.name().to_owned(),
                    bytes: item.len(),
                },
                None => DeviceError::Cuda(source),
            }
            .into()
        })
    }

    /// Reads everything; every item is delivered once, unless there is an error.
    pub(crate) fn run(
        &self,
        options: &ReadOptions,
        budget: Option<&Budget>,
        watch: &Watch,
        deliver: Deliver<'_>,
    ) -> Result<Vec<ReadStats>> {
        for index in self.empty.iter().filter(|_| self.given.is_none()) {
            let arena = DeviceArena::new(&self.device, 0).map_err(DeviceError::Cuda)?;
            let memory = Arc::new(CudaMemory { arena, _lease: None });
            deliver(*index, self.tensor(*index, memory, 0)).map_err(from_sink)?;
        }
        let mut reads = Vec::new();
        for (load, indices) in &self.torn {
            let arrived = Mutex::new(Vec::new());
            let keep = |index: usize, tensor: Tensor| {
                arrived.lock().unwrap_or_else(|e| e.into_inner()).push((indices[index], tensor));
                Ok(())
            };
            let mut options = options.clone();
            options.engine = host_engine(options.engine);
            reads.extend(load.run(&options, None, watch, &keep)?);
            let mut arrived = arrived.into_inner().unwrap_or_else(|e| e.into_inner());
            // In order, and with no reader held up by whoever holds the tensors in front.
            arrived.sort_by_key(|(index, _)| *index);
            for (index, tensor) in arrived {
                let bytes = tensor.bytes()?;
                if let Some(memory) = self.given.as_ref().and_then(|given| given.get(index)) {
                    memory.arena.copy_from_host(0, bytes).map_err(DeviceError::Cuda)?;
                    continue;
                }
                let memory = self.upload(bytes, budget)?;
                deliver(index, self.tensor(index, memory, 0)).map_err(from_sink)?;
            }
        }
        if self.order.is_empty() {
            return Ok(reads);
        }
        let mut by_arena = vec![Vec::new(); self.plan.arenas.len()];
        for (index, dest) in self.order.iter().zip(self.plan.dests()) {
            by_arena[dest.arena].push((*index, dest.offset));
        }
        let on_arena = |arena: usize, memory: Arc<CudaMemory>| {
            by_arena[arena].iter().try_for_each(|(index, offset)| {
                deliver(*index, self.tensor(*index, memory.clone(), *offset))
            })
        };
        let make = |bytes, lease| {
            let arena = DeviceArena::new(&self.device, bytes)
                .map_err(|e| Error::from(DeviceError::Cuda(e)))?;
            Ok(CudaMemory { arena, _lease: lease })
        };
        let arenas = match &self.given {
            Some(given) => Places::Given(self.order.iter().map(|i| given[*i].clone()).collect()),
            None => {
                let arenas = self.plan.arenas.iter().copied();
                Places::Made(Arenas::with(arenas, budget, make, &on_arena))
            }
        };
        let landing = LandingSite { load: self, arenas, arrived: Arc::default() };
        match options.engine {
            Engine::Gds => reads.push(landing.run_gds(budget, watch)?),
            _ => reads.extend(reads::run(&landing, options, budget, watch)?),
        }
        Ok(reads)
    }

    /// Copies a tensor to device memory of its own, once the budget has room for it.
    fn upload(&self, bytes: &[u8], budget: Option<&Budget>) -> Result<Arc<CudaMemory>> {
        let len = bytes.len() as u64;
        let lease = match budget {
            None => None,
            Some(budget) => loop {
                let seen = budget.generation();
                match budget.take(len) {
                    None if budget.wait_past(seen) => {}
                    // Closed: nobody listens any more.
                    None => return Err(Error::Cancelled),
                    lease => break lease,
                }
            },
        };
        let arena = DeviceArena::new(&self.device, len).map_err(DeviceError::Cuda)?;
        arena.copy_from_host(0, bytes).map_err(DeviceError::Cuda)?;
        Ok(Arc::new(CudaMemory { arena, _lease: lease }))
    }

    fn tensor(&self, index: usize, memory: Arc<CudaMemory>, offset: u64) -> Tensor {
        let item = &self.items[index];
        Tensor::of(item, Data::Cuda { memory, offset, len: item.len(), owners: Arc::default() })
    }
}

/// Parts of `items`, in their order, of at most `most` bytes each, or of one item that is longer.
fn groups<T>(items: Vec<T>, most: u64, bytes: impl Fn(&T) -> u64) -> Vec<Vec<T>> {
    let mut groups: Vec<Vec<T>> = Vec::new();
    let mut used = 0u64;
    for item in items {
        used = used.saturating_add(bytes(&item));
        match groups.last_mut().filter(|_| used <= most) {
            Some(group) => group.push(item),
            None => {
                used = bytes(&item);
                groups.push(vec![item]);
            }
        }
    }
    groups
}

/// The engine for what passes through host memory.
fn host_engine(engine: Engine) -> Engine {
    if engine == Engine::Gds { Engine::Auto } else { engine }
}

/// How often a reader that waits for device memory looks whether copies have ended.
const POLL: Duration = Duration::from_micros(500);

/// Source bytes that have arrived in an arena.
type Arrival = (usize, u64);

/// The memory of a plan's arenas.
enum Places<'a> {
    /// The load's own; each is handed over when it is full.
    Made(Arenas<'a, CudaMemory>),
    /// The caller's.
    Given(Vec<Arc<CudaMemory>>),
}

impl Places<'_> {
    /// The memory of an arena, if it has some by now.
    fn get(&self, index: usize) -> Result<Option<Arc<CudaMemory>>, SinkError> {
        match self {
            Self::Made(arenas) => arenas.get(index, false),
            Self::Given(memory) => Ok(memory.get(index).cloned()),
        }
    }

    /// Counts source bytes of an arena as arrived.
    ///
    /// # Safety
    ///
    /// As for [`Arenas::fill`].
    unsafe fn fill(&self, index: usize, bytes: u64) -> Result<(), SinkError> {
        match self {
            // SAFETY: passed on from the caller.
            Self::Made(arenas) => unsafe { arenas.fill(index, bytes) },
            Self::Given(_) => Ok(()),
        }
    }
}

/// Where blocks become tensors.
struct LandingSite<'a> {
    load: &'a CudaLoad,
    arenas: Places<'a>,
    /// What copies have brought since somebody last looked.
    arrived: Arc<Mutex<Vec<Arrival>>>,
}

impl LandingSite<'_> {
    fn run_gds(&self, budget: Option<&Budget>, watch: &Watch) -> Result<ReadStats> {
        let began = Instant::now();
        let load = self.load;
        let gds = |e: GdsError| match e {
            GdsError::Cancelled => Error::Cancelled,
            GdsError::Consumer(error) => from_sink(error),
            GdsError::Source(error) => locate(error, &load.items),
            other => DeviceError::Gds(Box::new(other)).into(),
        };
        let cufile = CuFile::open().map_err(|e| gds(e.into()))?;
        let route = |block: &Block| {
            self.take_arrivals()?;
            self.route(block)
        };
        // Without a budget there is room, or there is an error.
        let admit = |block: &Block, wait: bool| {
            let seen = budget.map(Budget::generation);
            self.take_arrivals()?;
            let room = self.has_room(block)?;
            match (budget, seen) {
                (Some(budget), Some(seen)) if wait && !room => {
                    match budget.wait_past_for(seen, POLL) {
                        true => self.has_room(block),
                        // Closed: nobody listens any more.
                        false => Err(Error::Cancelled.into()),
                    }
                }
                _ => Ok(room),
            }
        };
        let plan = &load.plan.plan;
        // SAFETY: as for the pipeline.
        let done = unsafe {
            cufile::read(
                cufile,
                &load.device,
                &load.files,
                plan,
                &route,
                Some(&admit),
                load.crew.gds,
                &watch.next_of(Part::Transformed),
            )
        }
        .map_err(gds)?;
        self.take_arrivals().map_err(from_sink)?;
        let reason = "asked for".to_owned();
        let engine = ResolvedEngine { asked: Engine::Gds, used: Engine::Gds, reason };
        let mut stats = ReadStats::new(engine, done.workers, plan);
        stats.seconds = began.elapsed().as_secs_f64();
        let direct = &mut stats.stages[fst_io::stats::Stage::Direct as usize];
        (direct.blocks, direct.bytes) = (done.reads, done.bytes_read);
        Ok(stats)
    }

    /// Whether the arenas of a block have memory; gives it to them if there is some.
    fn has_room(&self, block: &Block) -> Result<bool, SinkError> {
        for arena in self.load.plan.arenas_of(block) {
            if self.arenas.get(arena)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Counts what copies have brought, and delivers the tensors that are complete.
    fn take_arrivals(&self) -> Result<(), SinkError> {
        let arrived = std::mem::take(&mut *self.arrived.lock().unwrap_or_else(|e| e.into_inner()));
        for (arena, bytes) in arrived {
            // SAFETY: each submission counts its bytes once, when the device is done with it.
            unsafe { self.arenas.fill(arena, bytes)? };
        }
        Ok(())
    }

    /// What is to happen with a block that has landed.
    fn route(&self, block: &Block) -> Result<Landing, SinkError> {
        let mut ops = Vec::new();
        let mut arrivals: Vec<Arrival> = Vec::new();
        let mut held = Vec::new();
        for (_, work, part) in self.load.plan.parts_of(block) {
            let index = work.dest.arena;
            if arrivals.last().is_none_or(|(last, _)| *last != index) {
                let missing = || format!("arena {index} is gone");
                held.push(self.arenas.get(index)?.ok_or_else(missing)?);
                arrivals.push((index, 0));
            }
            let (Some(memory), Some((_, bytes))) = (held.last(), arrivals.last_mut()) else {
                continue;
            };
            let base = part.start - block.offset;
            for cut in work.cuts(part.start - work.start, part.end - part.start) {
                *bytes += cut.rows * cut.len;
                ops.push(op(work, &memory.arena, base + cut.at, cut)?);
            }
        }
        let arrived = self.arrived.clone();
        Ok(Landing {
            ops,
            done: Some(Box::new(move || {
                arrived.lock().unwrap_or_else(|e| e.into_inner()).extend(arrivals);
                drop(held);
            })),
        })
    }
}

/// The copy of a cut, whose bytes start at `source` in their block.
fn op(work: &Work, arena: &DeviceArena, source: u64, cut: Cut) -> Result<CopyOp, SinkError> {
    let dest = |at: u64, len: u64| {
        if at.checked_add(len).is_none_or(|end| end > work.dest.len) {
            return Err(format!("bytes {at}..+{len} lie outside of the tensor"));
        }
        arena.range(work.dest.offset + at, len).map_err(|e| e.to_string())
    };
    let Some((from, to)) = work.cast else {
        let destination = dest(cut.position, cut.rows * cut.len)?;
        return Ok(if cut.rows == 1 {
            CopyOp::Linear { source, destination, len: cut.len }
        } else {
            CopyOp::Strided {
                source,
                source_pitch: cut.pitch,
                destination,
                destination_pitch: cut.len,
                width: cut.len,
                rows: cut.rows,
            }
        });
    };
    let (size, out) = (from.size() as u64, to.size() as u64);
    let elements = cut.len / size;
    let job = StridedJob {
        src: source,
        dst: dest(cut.position / size * out, cut.rows * elements * out)?,
        rows: cut.rows,
        cols: elements,
        src_pitch: cut.pitch,
    };
    Ok(CopyOp::Transform { kernel: Kernel::Cast { from, to }, job })
}

#[cfg(test)]
mod tests {
    use super::groups;

    #[test]
    fn groups_keep_to_their_bytes_unless_one_item_is_longer() {
        let of = |items: &[u64]| groups(items.to_vec(), 10, |bytes| *bytes);
        assert!(of(&[]).is_empty());
        assert_eq!(
            of(&[4, 6, 1, 30, 2, 8, 1]),
            [vec![4, 6], vec![1], vec![30], vec![2, 8], vec![1]]
        );
        assert_eq!(of(&[30, 31]), [vec![30], vec![31]]);
        assert_eq!(of(&[u64::MAX, u64::MAX]).len(), 2);
    }
}
