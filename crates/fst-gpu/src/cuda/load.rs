//! Loads of pieces into a CUDA device's memory: blocks are read into pinned memory and leave from there by
//! asynchronous copies, cut and converted on the device on the way.

mod choice;
mod preparations;
mod reads;
mod shared;

use std::sync::{Arc, Mutex};
use std::thread::Builder;
use std::time::{Duration, Instant};

use fst_io::arenas::{ArenaMemory, Arenas};
use fst_io::available;
use fst_io::budget::Lease;
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::sink::SinkError;
use fst_io::watch::{Part, Watch};
use fst_io::{
    Budget, Engine, HostBuffer, ReadOptions, ReadStats, ResolvedEngine, SharedBuffer, SourceFile,
};

use crate::cuda::buffer::device::{DEVICE_ALIGN, DeviceArena};
use crate::cuda::buffer::pinned::{Afterwards, RingOptions, kept_bytes};
use crate::cuda::cufile::{self, CuFile, GdsOptions};
use crate::cuda::device::CudaDevice;
use crate::cuda::kernel::{Kernel, StridedJob};
use crate::cuda::pipeline::{CopyOp, PipelineOptions};
use crate::cuda::sink::Landing;
use crate::cufile::GdsError;
use crate::device_copy::{DeviceCopy, DeviceOptions};
use crate::error::{Error, LoadError};
use crate::load::{ArenaOptions, Deliver, Filled, PieceLoad};
use crate::memory::OnHost;
use crate::piece::{Cut, Piece, PiecePlan, Pool, Sharing, Work};
use crate::transform::Transform;
use preparations::Preparations;
use shared::SharedLoad;

type Result<T> = std::result::Result<T, LoadError>;

/// Pinned blocks for what is too short to be copied straight out of the page cache: as many as are pinned
/// at once.
const DIRECT_BLOCKS: usize = 8;

/// One arena on a device, and the part of a memory budget that it takes.
#[derive(Debug)]
pub struct CudaMemory {
    arena: DeviceArena,
    /// Declared behind the arena: the bytes are back in the budget once they are back on the
    /// device.
    _lease: Option<Lease>,
}

impl CudaMemory {
    /// Memory that no budget counts.
    pub fn new(arena: DeviceArena) -> Arc<Self> {
        Arc::new(Self { arena, _lease: None })
    }

    /// The arena.
    pub fn arena(&self) -> &DeviceArena {
        &self.arena
    }
}

/// The memory of an arena.
enum Place {
    Host(Arc<HostBuffer>),
    /// Host memory of pieces that are uploaded once they are whole, and the part of a budget that is for them
    /// on the device.
    Upload(HostBuffer, Mutex<Option<Lease>>),
    Device(Arc<CudaMemory>),
}

impl ArenaMemory for Place {
    type Full = Arc<Self>;

    unsafe fn full(this: Arc<Self>) -> Arc<Self> {
        this
    }
}

impl OnHost for Place {
    fn on_host(&self) -> Option<&HostBuffer> {
        match self {
            Self::Host(buffer) => Some(buffer),
            Self::Upload(buffer, _) => Some(buffer),
            Self::Device(_) => None,
        }
    }
}

/// How many work at once on the way to the device, and so how much of its memory they take beside the
/// pieces'.
#[derive(Debug, Clone, Copy)]
struct Concurrency {
    /// Copy streams of a pipeline.
    streams: usize,
    gds: GdsOptions,
}

/// From this many slices or pieces on, kernels may be asked to copy them.
const MANY: usize = 16;

/// As [`crate::load`], where some device is not the host.
pub(crate) fn load_to_devices(
    files: Arc<Vec<SourceFile>>,
    pieces: Vec<Piece>,
    devices: &[Option<CudaDevice>],
    arenas: ArenaOptions,
    options: DeviceOptions,
) -> Result<Box<dyn PieceLoad>> {
    if devices.iter().flatten().all(CudaDevice::shares_host_memory) {
        return Ok(Box::new(SharedLoad::new(files, pieces, devices, arenas, options)?));
    }
    Ok(Box::new(DeviceLoad::new(files, pieces, devices, arenas, options)?))
}

/// Plans the loading of `pieces`, sorted by file and offset, each into memory of the caller's on a device.
///
/// # Errors
///
/// As for [`load`](crate::load); [`Error::OutOfRange`] where memory is shorter than its piece, or missing.
///
/// # Safety
///
/// Nobody else uses the memory until the load is over, and what is delivered, which is this memory, is dropped
/// before it goes.
pub unsafe fn load_into_devices(
    files: Arc<Vec<SourceFile>>,
    pieces: Vec<Piece>,
    memory: Vec<DeviceArena>,
    options: DeviceOptions,
) -> Result<Box<dyn PieceLoad>> {
    let (mut devices, mut placed): (Vec<Option<CudaDevice>>, _) = (Vec::new(), Vec::new());
    for (index, piece) in pieces.into_iter().enumerate() {
        let given = memory.get(index);
        let len = given.map_or(0, DeviceArena::len);
        let Some(given) = given.filter(|_| len >= piece.len()) else {
            let (what, end) = ("memory given for a piece", piece.len());
            return Err(Error::OutOfRange { what, start: 0, end, len }.into());
        };
        let device = Some(given.device().clone());
        let known = devices.iter().position(|known| *known == device);
        let number = known.unwrap_or(devices.len());
        if number == devices.len() {
            devices.push(device);
        }
        placed.push(piece.on(number as u32));
    }
    if placed.is_empty() {
        return crate::load(files, placed, &[], ArenaOptions::default(), options);
    }
    // Arenas of one piece each.
    let load = DeviceLoad::new(files, placed, &devices, ArenaOptions::default(), options)?;
    let given = Some(memory.into_iter().map(CudaMemory::new).collect());
    Ok(Box::new(DeviceLoad { given, ..load }))
}

/// A planned load of pieces into the memory of CUDA devices, and of the host where not all go to these. Each
/// block is read once into pinned memory, from where all devices that want parts of it have them.
///
/// Pieces to be converted whose file leaves them misaligned, so that elements straddle blocks, are converted
/// on the host and uploaded. No writer of today makes such files.
#[derive(Debug)]
struct DeviceLoad {
    /// The devices of the pieces, by number; `None` is the host.
    devices: Vec<Option<CudaDevice>>,
    /// For each, its number in pipelines.
    goals: Vec<usize>,
    /// Those of pipelines: the first, and others.
    first: CudaDevice,
    more: Vec<CudaDevice>,
    pieces: Vec<Piece>,
    files: Arc<Vec<SourceFile>>,
    /// Pieces without a byte.
    empty: Vec<usize>,
    /// The pieces of the plan's work, in order.
    order: Vec<usize>,
    plan: PiecePlan,
    /// Bytes of host memory that the process keeps at most when nobody has the pieces any more.
    keep: u64,
    options: DeviceOptions,
    concurrency: Concurrency,
    /// Memory of the caller's for each piece; without, the load makes its own.
    given: Option<Vec<Arc<CudaMemory>>>,
    /// How bytes travelled, once they did.
    copy: Mutex<Option<DeviceCopy>>,
}

impl DeviceLoad {
    fn new(
        files: Arc<Vec<SourceFile>>,
        pieces: Vec<Piece>,
        devices: &[Option<CudaDevice>],
        arenas: ArenaOptions,
        options: DeviceOptions,
    ) -> Result<Self> {
        let mut cuda = 0;
        let number = |device: &Option<CudaDevice>| {
            let before = cuda;
            cuda += usize::from(device.is_some());
            before
        };
        let goals = devices.iter().map(number).collect();
        let mut all = devices.iter().flatten().cloned();
        let Some(first) = all.next() else {
            let what = "CUDA devices of a load to some";
            return Err(Error::BadSetting { what, value: 0, least: 1, most: u64::MAX }.into());
        };
        let block = PipelineOptions::default().ring.block_bytes as u64;
        let limits = Limits { block, ..SourceFile::limits_of(&files) };
        let (empty, order): (Vec<usize>, Vec<usize>) =
            (0..pieces.len()).partition(|index| pieces[*index].is_empty());
        let pooled = |index: &usize| {
            let piece = &pieces[*index];
            let on_host = devices.get(piece.device as usize).is_none_or(Option::is_none);
            (piece, Pool { device: piece.device, on_host: on_host || piece.straddles() })
        };
        let sharing = Sharing { arena: arenas.bytes, align: DEVICE_ALIGN, apart: arenas.apart };
        let plan = PiecePlan::new(order.iter().map(pooled), limits, sharing)?;
        let streams = PipelineOptions::default().streams;
        Ok(Self {
            devices: devices.to_vec(),
            goals,
            first,
            more: all.collect(),
            files,
            empty,
            order,
            plan,
            pieces,
            keep: arenas.keep,
            options,
            concurrency: Concurrency { streams, gds: GdsOptions::default() },
            given: None,
            copy: Mutex::default(),
        })
    }

    /// A device by its number; `None` is the host.
    fn device(&self, number: u32) -> Option<&CudaDevice> {
        self.devices.get(number as usize)?.as_ref()
    }

    /// The CUDA devices.
    fn cuda(&self) -> impl Iterator<Item = &CudaDevice> {
        std::iter::once(&self.first).chain(&self.more)
    }

    /// Lengths of the arenas in host memory: of those that stay there, or of those that are uploaded.
    fn host_arenas(&self, uploaded: bool) -> impl Iterator<Item = u64> + use<'_> {
        let arenas = self.plan.pools.iter().zip(&self.plan.arenas);
        let of = move |pool: &Pool| pool.on_host && self.device(pool.device).is_some() == uploaded;
        arenas.filter(move |(pool, _)| of(pool)).map(|(_, (len, _))| *len)
    }

    /// Whether something of a block goes to host memory, be it on its way.
    fn lands_on_host(&self, block: &Block) -> bool {
        self.plan.parts_on(block, true).next().is_some()
    }

    /// Whether blocks go by cuFile, which reads for one device.
    fn by_cufile(&self, read: &ReadOptions) -> bool {
        read.engine == Engine::Gds && self.more.is_empty()
    }

    /// Whether blocks may travel straight out of the page cache.
    fn may_register(&self, read: &ReadOptions, budget: bool) -> bool {
        self.options.cached.refusal(read, budget, self.more.len()).is_none()
    }

    /// How many arenas are needed on each device beside the pieces', at most, and the length of each.
    fn scratch_arenas(&self, read: &ReadOptions, budget: bool) -> (u64, u64) {
        let plan = &self.plan.plan;
        if self.order.is_empty() {
            return (0, 0);
        }
        if self.by_cufile(read) {
            let (gds, blocks) = (self.concurrency.gds, plan.blocks().len());
            let workers = gds.workers.clamp(1, blocks.max(1)) as u64;
            return (workers, gds.device_bytes(blocks, plan.limits().block) / workers);
        }
        if self.kernels().is_empty() {
            return (0, 0);
        }
        let pipelines = 1 + u64::from(self.may_register(read, budget));
        let streams = self.concurrency.streams as u64;
        let bytes = self.pipeline(RingOptions::default()).device_bytes();
        (pipelines * streams, bytes / streams)
    }

    /// The kernels that blocks may have to wait for.
    fn kernels(&self) -> Vec<Kernel> {
        let mut kernels = Vec::new();
        let work = || self.plan.work.iter().filter(|work| !self.plan.is_on_host(work.dest.arena));
        for (from, to) in work().filter_map(|work| work.cast) {
            if !kernels.contains(&Kernel::Cast { from, to }) {
                kernels.push(Kernel::Cast { from, to });
            }
        }
        let slices = work().filter(|work| work.runs.count > 1).count();
        let many = !self.first.copies_in_batches() && self.order.len() >= MANY;
        if slices >= MANY || many {
            kernels.push(Kernel::GatherBatch);
        }
        kernels
    }

    fn pipeline(&self, ring: RingOptions) -> PipelineOptions {
        PipelineOptions { ring, streams: self.concurrency.streams }
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
        self.pipeline(ring)
    }

    /// How blocks get to the device out of registered mappings. Short runs are staged.
    fn registering(&self) -> PipelineOptions {
        self.pipeline(RingOptions { blocks: DIRECT_BLOCKS, ..RingOptions::default() })
    }

    /// Loads kernels while the first blocks are read.
    fn load_kernels(&self, kernels: &[Kernel], preparations: &Preparations) {
        for (device, kernel) in
            self.cuda().flat_map(|device| kernels.iter().map(move |k| (device, k)))
        {
            let loaded = preparations.time("read.kernels", || device.prepare(*kernel));
            if loaded.is_err() {
                return;
            }
        }
    }

    /// The memory of an arena: of the caller's for `piece`, its only one, if there is some.
    fn place(
        &self,
        pool: Pool,
        piece: usize,
        bytes: u64,
        lease: Option<Lease>,
        preparations: &Preparations,
    ) -> Landed<Place> {
        Ok(match (self.device(pool.device), &self.given) {
            (None, _) => Place::Host(Arc::new(HostBuffer::of_arena(bytes, lease, self.keep)?)),
            (Some(_), _) if pool.on_host => {
                Place::Upload(HostBuffer::of_arena(bytes, None, 0)?, lease.into())
            }
            (Some(_), Some(given)) => Place::Device(given[piece].clone()),
            (Some(device), None) => {
                let new = || DeviceArena::new(device, bytes);
                let arena = preparations.time("read.allocate", new)?;
                Place::Device(Arc::new(CudaMemory { arena, _lease: lease }))
            }
        })
    }

    /// Copies an arena of pieces that are whole to their device.
    fn upload(
        &self,
        pool: Pool,
        piece: usize,
        from: &HostBuffer,
        lease: &Mutex<Option<Lease>>,
    ) -> Landed<Arc<CudaMemory>> {
        let lease = lease.lock().unwrap_or_else(|e| e.into_inner()).take();
        let (to, none) = (Pool { on_host: false, ..pool }, Preparations::begin());
        let place = self.place(to, piece, from.len() as u64, lease, &none)?;
        let Place::Device(memory) = place else { return Err("not on a device".into()) };
        // SAFETY: it is full, so that nobody writes to it.
        let bytes = unsafe { from.slice(0..from.len()) }.unwrap_or_default();
        memory.arena.copy_from_host(0, bytes)?;
        Ok(memory)
    }
}

impl PieceLoad for DeviceLoad {
    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn bytes_read(&self) -> u64 {
        self.plan.plan.bytes_read()
    }

    fn least_memory(&self, _in_order: bool) -> u64 {
        self.plan.least_memory
    }

    /// A driver that has a call for many copies and then refuses it makes it more.
    fn scratch(&self, read: &ReadOptions, budget: bool) -> u64 {
        let (arenas, len) = self.scratch_arenas(read, budget);
        arenas * len * self.cuda().count() as u64
    }

    /// To a quarter of `budget` and to what the largest arenas leave of it, if that is possible at all.
    fn keep_within(&mut self, budget: u64, in_order: bool) {
        let room = (budget / 4).min(budget.saturating_sub(self.least_memory(in_order)));
        let one = PipelineOptions { streams: 1, ..PipelineOptions::default() };
        let streams = room / (one.device_bytes() * self.cuda().count() as u64).max(1);
        self.concurrency.streams = (streams as usize).clamp(1, self.concurrency.streams);
        self.concurrency.gds = self.concurrency.gds.within(room, self.plan.plan.limits().block);
    }

    /// What registered mappings pin is in memory already; what cuFile takes for itself is not known. Of what
    /// is uploaded, one arena is filled while another leaves.
    fn host_memory(&self, read: &ReadOptions, budget: Option<u64>) -> u64 {
        let stay = self.host_arenas(false).sum::<u64>().min(budget.unwrap_or(u64::MAX));
        let pass = 2 * self.host_arenas(true).max().unwrap_or(0);
        if self.order.is_empty() || self.by_cufile(read) && stay + pass == 0 {
            return 0;
        }
        let registers = self.may_register(read, budget.is_some());
        let mut pinned = self.staging(registers).pinned_bytes();
        if registers {
            pinned += self.registering().pinned_bytes();
        }
        stay + pass + pinned.saturating_sub(kept_bytes() as u64)
    }

    fn check_memory(&self, read: &ReadOptions, host: bool) -> Result<()> {
        available::check(host, self.host_memory(read, None), self.keep > 0)?;
        let (beside, len) = self.scratch_arenas(read, false);
        for (number, device) in self.devices.iter().enumerate() {
            let Some(device) = device else { continue };
            let number = number as u32;
            let arenas = self.plan.pools.iter().zip(&self.plan.arenas);
            let arenas = arenas.filter(|(pool, _)| pool.device == number && self.given.is_none());
            let arenas = arenas.map(|(_, (len, _))| *len).chain((0..beside).map(|_| len));
            DeviceArena::check_fits(device, DeviceArena::footprint(arenas)).map_err(|source| {
                let pieces = self.pieces.iter().enumerate();
                let largest = pieces.filter(|(_, piece)| piece.device == number);
                match largest.max_by_key(|(_, piece)| piece.len()) {
                    Some((largest, _)) => LoadError::TooLarge { source, largest },
                    None => source.into(),
                }
            })?;
        }
        Ok(())
    }

    fn prefer(&self, index: usize, watch: &Watch) {
        if let Ok(piece) = self.order.binary_search(&index) {
            watch.prefer(Part::Transformed, self.plan.extents_of(piece));
        }
    }

    fn device_copy(&self) -> Option<DeviceCopy> {
        self.copy.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn run(
        &self,
        options: &ReadOptions,
        budget: Option<&Budget>,
        watch: &Watch,
        deliver: Deliver<'_>,
    ) -> Result<Vec<ReadStats>> {
        let preparations = &Preparations::begin();
        for &index in &self.empty {
            let pool = Pool { device: self.pieces[index].device, on_host: false };
            let place = self.place(pool, index, 0, None, preparations);
            let filled = match place.map_err(fst_io::Error::Sink)? {
                Place::Device(memory) => Filled::Cuda { memory, offset: 0 },
                _ => Filled::empty(),
            };
            deliver(index, filled).map_err(fst_io::Error::Sink)?;
        }
        if self.order.is_empty() {
            return Ok(Vec::new());
        }
        let by_arena = self.plan.by_arena(&self.order);
        let make = |arena: usize, bytes, lease| {
            self.place(self.plan.pools[arena], by_arena[arena][0].0, bytes, lease, preparations)
        };
        let on_arena = |arena: usize, place: Arc<Place>| {
            let (pool, pieces) = (self.plan.pools[arena], &by_arena[arena]);
            let memory = match &*place {
                Place::Host(buffer) => {
                    // SAFETY: it is full, so that nobody writes to it any more.
                    let buffer = unsafe { SharedBuffer::new(buffer.clone()) };
                    return pieces.iter().try_for_each(|(index, dest)| {
                        // SAFETY: pieces have disjoint places, and each is delivered once.
                        deliver(*index, unsafe { Filled::on_host(&buffer, dest.offset, dest.len) })
                    });
                }
                Place::Upload(buffer, lease) => self.upload(pool, pieces[0].0, buffer, lease)?,
                Place::Device(memory) => memory.clone(),
            };
            pieces.iter().try_for_each(|(index, dest)| {
                deliver(*index, Filled::Cuda { memory: memory.clone(), offset: dest.offset })
            })
        };
        let arenas = Arenas::with(self.plan.arenas.iter().copied(), budget, make, &on_arena);
        let transform = Transform::new(&self.plan, arenas);
        let landing = LandingSite { load: self, transform, arrived: Arc::default(), preparations };
        std::thread::scope(|scope| {
            let kernels = self.kernels();
            if !kernels.is_empty() {
                let load = move || self.load_kernels(&kernels, preparations);
                // Without this thread, and after an error in it, whoever needs a kernel loads it.
                let _ = Builder::new().name("fst-kernels".into()).spawn_scoped(scope, load);
            }
            reads::run(&landing, options, budget, watch)
        })
    }
}

/// What blocks that pass through host memory are read by.
fn host_options(options: &ReadOptions) -> ReadOptions {
    let mut options = options.clone();
    if options.engine == Engine::Gds {
        options.engine = Engine::Auto;
    }
    options
}

/// How often a reader that waits for device memory looks whether copies have ended.
const POLL: Duration = Duration::from_micros(500);

/// What those who take blocks answer.
type Landed<T> = std::result::Result<T, SinkError>;

/// Source bytes that have arrived in an arena.
type Arrival = (usize, u64);

/// Where blocks become pieces.
struct LandingSite<'a> {
    load: &'a DeviceLoad,
    transform: Transform<'a, Arenas<'a, Place>>,
    /// What copies have brought since somebody last looked.
    arrived: Arc<Mutex<Vec<Arrival>>>,
    preparations: &'a Preparations,
}

impl LandingSite<'_> {
    /// Reads the blocks of a part of the plan by cuFile.
    fn run_gds(
        &self,
        plan: &ReadPlan,
        budget: Option<&Budget>,
        watch: &Watch,
    ) -> Result<ReadStats> {
        let began = Instant::now();
        let load = self.load;
        let cufile = CuFile::open().map_err(GdsError::from)?;
        let route = |block: &Block| {
            self.take_arrivals()?;
            self.route(block)
        };
        // Without a budget there is room, or there is an error.
        let admit = |block: &Block, wait: bool| {
            let seen = budget.map(Budget::generation);
            self.take_arrivals()?;
            let room = self.transform.admit(block, false)?;
            match (budget, seen) {
                (Some(budget), Some(seen)) if wait && !room => {
                    match budget.wait_past_for(seen, POLL) {
                        true => self.transform.admit(block, false),
                        // Closed: nobody listens any more.
                        false => Err(fst_io::Error::Cancelled.into()),
                    }
                }
                _ => Ok(room),
            }
        };
        // SAFETY: as for the pipeline.
        let done = unsafe {
            cufile::read(
                cufile,
                &load.first,
                &load.files,
                plan,
                &route,
                Some(&admit),
                load.concurrency.gds,
                &watch.next_of(Part::Transformed),
            )
        }?;
        self.take_arrivals().map_err(fst_io::Error::Sink)?;
        let reason = "asked for".to_owned();
        let engine = ResolvedEngine { asked: Engine::Gds, used: Engine::Gds, reason };
        let mut stats = ReadStats::new(engine, done.workers, plan);
        stats.seconds = began.elapsed().as_secs_f64();
        let direct = &mut stats.stages[fst_io::stats::Stage::Direct as usize];
        (direct.blocks, direct.bytes) = (done.reads, done.bytes_read);
        Ok(stats)
    }

    /// Counts what copies have brought, and delivers the pieces that are complete.
    fn take_arrivals(&self) -> Landed<()> {
        let arrived = std::mem::take(&mut *self.arrived.lock().unwrap_or_else(|e| e.into_inner()));
        for (arena, bytes) in arrived {
            // SAFETY: each submission counts its bytes once, when the device is done with it.
            unsafe { self.transform.memory.fill(arena, bytes)? };
        }
        Ok(())
    }

    /// What is to happen with a block that has landed, beside what the host takes of it.
    fn route(&self, block: &Block) -> Landed<Landing> {
        self.preparations.block();
        let mut landing = Landing::default();
        let mut arrivals: Vec<Arrival> = Vec::new();
        let mut held: Vec<Arc<Place>> = Vec::new();
        for (_, work, part) in self.load.plan.parts_on(block, false) {
            let index = work.dest.arena;
            if arrivals.last().is_none_or(|(last, _)| *last != index) {
                let missing = || format!("arena {index} is gone");
                held.push(self.transform.memory.get(index, false)?.ok_or_else(missing)?);
                arrivals.push((index, 0));
            }
            let (Some(Place::Device(memory)), Some((_, bytes))) =
                (held.last().map(|place| &**place), arrivals.last_mut())
            else {
                continue;
            };
            let device = self.load.plan.pools[index].device as usize;
            let ops = landing.ops_to(self.load.goals[device]);
            let base = part.start - block.offset;
            for cut in work.cuts(part) {
                *bytes += cut.rows * cut.len;
                ops.push(op(work, &memory.arena, base + cut.at, cut)?);
            }
        }
        let arrived = self.arrived.clone();
        landing.done = Some(Box::new(move || {
            arrived.lock().unwrap_or_else(|e| e.into_inner()).extend(arrivals);
            drop(held);
        }));
        Ok(landing)
    }
}

/// The copy of a cut, whose bytes start at `source` in their block.
fn op(work: &Work, arena: &DeviceArena, source: u64, cut: Cut) -> Landed<CopyOp> {
    let dest = |at: u64, len: u64| {
        if at.checked_add(len).is_none_or(|end| end > work.dest.len) {
            return Err(format!("bytes {at}..+{len} lie outside of the piece"));
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
