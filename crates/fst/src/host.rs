//! Loads into host memory.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use fst_format::{Checkpoint, TensorInfo};
use fst_io::arenas::Arenas;
use fst_io::place::{InPlace, Layout};
use fst_io::plan::{Limits, ReadPlan};
use fst_io::scratch::Scratch;
use fst_io::sink::SinkError;
use fst_io::{Budget, Control, Extent, ReadOptions, ReadStats, SharedBuffer, SourceFile};

use crate::error::{DeviceError, Error, Result};
use crate::options::Item;
use crate::tensor::{Data, Tensor};
use crate::transform::{HOST_ALIGN, Sharing, Transform, TransformPlan};

/// Bytes of scratch memory, in slots of [`SCRATCH_BLOCK`].
///
/// Little, in short slots: it stays in the processor's cache, where neither the device's writes nor
/// the copies out of it wait for memory. Half of each row of a 4.6 GB checkpoint came from a virtual
/// disk in 1.65 s with 16 or 24 slots of 512 KiB, in 1.9 with 10, in 2.0 with 64, and in 2.4 with
/// 16 of 2 MiB.
pub(crate) const SCRATCH: u64 = 12 << 20;
pub(crate) const SCRATCH_BLOCK: u64 = 512 << 10;

/// A load that is planned and whose files are open.
#[derive(Debug)]
pub(crate) struct HostLoad {
    items: Vec<Item>,
    files: Arc<Vec<SourceFile>>,
    /// Items without a byte.
    empty: Vec<usize>,
    /// Those that are usable where they land: the items of the plan's extents, in order.
    placed: Vec<usize>,
    plan: ReadPlan,
    layout: Layout,
    /// For each arena of the layout, its extents.
    arena_extents: Vec<Range<u32>>,
    /// Those that are moved or converted: the items of its work, in order.
    transformed: Vec<usize>,
    transform: TransformPlan,
    /// Whether what is preferred is of this load.
    alone: bool,
}

/// Takes a tensor that is complete, with its place in the list of items; from reader threads.
pub(crate) type Deliver<'a> = &'a (dyn Fn(usize, Tensor) -> Result<(), SinkError> + Send + Sync);

impl HostLoad {
    /// Plans the loading of `items` into arenas of about `arena` bytes. With `in_order`, tensors
    /// become complete in the order of the items.
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        items: Vec<Item>,
        arena: u64,
        in_order: bool,
    ) -> Result<Self> {
        let (files, number) = open_files(checkpoint, &items)?;
        Self::with_files(Arc::new(files), &number, items, arena, in_order)
    }

    /// As [`new`](Self::new), out of files that are open, and of which `number` tells the shards.
    pub(crate) fn with_files(
        files: Arc<Vec<SourceFile>>,
        number: &[Option<u32>],
        items: Vec<Item>,
        arena: u64,
        in_order: bool,
    ) -> Result<Self> {
        let align = files.iter().map(SourceFile::align).max().unwrap_or(Limits::MIN_ALIGN);
        let limits = Limits { align, segment: arena, ..Limits::default() };

        let all_placed = items.iter().all(|item| item.source_len() == 0 || item.lands_in_place());
        let (mut empty, mut placed, mut transformed) = (Vec::new(), Vec::new(), Vec::new());
        let (mut extents, mut works) = (Vec::new(), Vec::new());
        for (index, item) in items.iter().enumerate() {
            let Some(file) = number[item.info.shard()].filter(|_| item.source_len() > 0) else {
                empty.push(index);
                continue;
            };
            // Two reads that follow each other cannot keep one order: then all go one way.
            if item.lands_in_place() && (all_placed || !in_order) {
                let start = item.info.file_range().start + item.runs().first;
                extents.push(Extent::new(file, start..start + item.source_len()));
                placed.push(index);
            } else {
                works.push((item, file));
                transformed.push(index);
            }
        }
        let io = |e: fst_io::Error| locate(e, &items);
        let plan = ReadPlan::new(extents, limits).map_err(|e| io(e.into()))?;
        let layout = Layout::new(&plan, arena);
        // Arenas take segments in order, and segments extents.
        let mut arena_extents: Vec<Range<u32>> = Vec::new();
        for (segment, place) in plan.segments().iter().zip(layout.places()) {
            match arena_extents.get_mut(place.arena) {
                Some(extents) => extents.end = segment.extents.end,
                None => arena_extents.push(segment.extents.clone()),
            }
        }
        let limits = Limits { block: SCRATCH_BLOCK, segment: u64::MAX, ..limits };
        let transform =
            TransformPlan::new(&works, limits, Sharing { arena, align: HOST_ALIGN, apart: 0 })
                .map_err(io)?;
        Ok(Self {
            items,
            files,
            empty,
            placed,
            plan,
            layout,
            arena_extents,
            transformed,
            transform,
            alone: true,
        })
    }

    pub(crate) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Bytes that will be read.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.plan.bytes_read() + self.transform.plan.bytes_read()
    }

    /// Bytes of arenas that must be in memory at once.
    pub(crate) fn least_memory(&self) -> u64 {
        let placed = self.layout.arenas().iter().copied().max().unwrap_or(0);
        placed.max(self.transform.least_memory())
    }

    /// Bytes of all arenas, and of the scratch memory beside them.
    pub(crate) fn memory(&self) -> u64 {
        let transformed = self.transform.arenas.iter().map(|(len, _)| *len);
        let arenas = self.layout.arenas().iter().copied().chain(transformed);
        let scratch = if self.uses_scratch() { SCRATCH } else { 0 };
        arenas.fold(scratch, u64::saturating_add)
    }

    /// Whether scratch memory is used beside the arenas.
    pub(crate) fn uses_scratch(&self) -> bool {
        !self.transformed.is_empty()
    }

    /// The files that are read.
    pub(crate) fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// Has an item read before others; for loads whose arenas may all be in memory at once.
    pub(crate) fn prefer(&self, index: usize, watch: &Watch) {
        // A tensor is there once its arena is.
        if let Ok(extent) = self.placed.binary_search(&index) {
            if let Some(place) = self.layout.extent(&self.plan, extent as u32) {
                watch.prefer(Part::Placed, self.arena_extents[place.arena].clone());
            }
        } else if let Ok(piece) = self.transformed.binary_search(&index) {
            watch.prefer(Part::Transformed, self.transform.extents_of(piece));
        }
    }

    /// The same, as a part of another load, whose preferences are none of its own.
    pub(crate) fn within_another(self) -> Self {
        Self { alone: false, ..self }
    }

    /// Reads everything; every item is delivered once, unless there is an error. Both parts, if there are
    /// two, are read at once where something may be [preferred](Self::prefer).
    pub(crate) fn run(
        &self,
        options: &ReadOptions,
        budget: Option<&Budget>,
        watch: &Watch,
        deliver: Deliver<'_>,
    ) -> Result<Vec<ReadStats>> {
        let located = |e| locate(e, &self.items);
        for index in &self.empty {
            // SAFETY: there is no byte.
            let data = unsafe { Data::host(SharedBuffer::empty(), 0, 0) };
            deliver(*index, self.tensor(*index, data)).map_err(from_sink)?;
        }
        let placed = || -> Result<ReadStats, fst_io::Error> {
            let on_arena =
                |arena: usize, buffer: SharedBuffer| self.hand_out(arena, &buffer, deliver);
            let sink = InPlace::new(&self.plan, &self.layout, budget, &on_arena);
            let control = watch.follow(self.alone.then_some(Part::Placed));
            fst_io::read(&self.files, &self.plan, &sink, options, &control)
        };
        let transformed = || -> Result<ReadStats, fst_io::Error> {
            let mut by_arena = vec![Vec::new(); self.transform.arenas.len()];
            for (index, dest) in self.transformed.iter().zip(self.transform.dests()) {
                by_arena[dest.arena].push((*index, dest));
            }
            let on_arena = |arena: usize, buffer: SharedBuffer| {
                by_arena[arena].iter().try_for_each(|(index, dest)| {
                    let (offset, len) = (dest.offset as usize, dest.len as usize);
                    // SAFETY: items are apart, and nobody reads the arena itself.
                    let data = unsafe { Data::host(buffer.clone(), offset, len) };
                    deliver(*index, self.tensor(*index, data))
                })
            };
            let arenas = Arenas::new(self.transform.arenas.iter().copied(), budget, &on_arena);
            let transform = Transform::new(&self.transform, arenas);
            let admit = |block: &_, wait| transform.admit(block, wait);
            let take = |block: &_, bytes: &[u8]| transform.take(block, bytes);
            let plan = &self.transform.plan;
            let slots = (SCRATCH / plan.limits().block).max(1) as usize;
            let sink = Scratch::new(plan, slots, &admit, &take)?;
            let control = watch.follow(self.alone.then_some(Part::Transformed));
            let mut stats = fst_io::read(&self.files, plan, &sink, options, &control)?;
            // Done inside of `reserve`, and a stage of its own.
            let (touch, touch_bytes) = transform.touched();
            stats.reserve = stats.reserve.saturating_sub(touch);
            stats.touch += touch;
            stats.touch_bytes += touch_bytes;
            Ok(stats)
        };
        let reads = match (self.placed.is_empty(), self.transformed.is_empty()) {
            (true, true) => Vec::new(),
            (false, true) => vec![placed().map_err(located)?],
            (true, false) => vec![transformed().map_err(located)?],
            (false, false) if watch.may_prefer && self.alone => {
                let (one, other) = both(watch, placed, transformed);
                // The first failure ended the other.
                let failed = |read: &Result<_, _>| matches!(read, Err(fst_io::Error::Cancelled));
                let (one, other) = if failed(&one) { (other, one) } else { (one, other) };
                vec![one.map_err(located)?, other.map_err(located)?]
            }
            (false, false) => vec![placed().map_err(located)?, transformed().map_err(located)?],
        };
        Ok(reads)
    }

    /// Delivers the tensors of a complete arena.
    fn hand_out(
        &self,
        arena: usize,
        buffer: &SharedBuffer,
        deliver: Deliver<'_>,
    ) -> Result<(), SinkError> {
        for extent in self.arena_extents[arena].clone() {
            let index = self.placed[extent as usize];
            let Some(place) = self.layout.extent(&self.plan, extent) else { continue };
            let (offset, len) = (place.offset as usize, self.items[index].len() as usize);
            // SAFETY: extents are those of one item each, and nobody reads the arena itself.
            let data = unsafe { Data::host(buffer.clone(), offset, len) };
            deliver(index, self.tensor(index, data))?;
        }
        Ok(())
    }

    fn tensor(&self, index: usize, data: Data) -> Tensor {
        let item = &self.items[index];
        Tensor::of(item, data)
    }
}

/// Opens the files that items have bytes in; says for each shard which of them it is.
pub(crate) fn open_files(
    checkpoint: &Checkpoint,
    items: &[Item],
) -> Result<(Vec<SourceFile>, Vec<Option<u32>>)> {
    open_shards(checkpoint, items, shards_of(items))
}

/// The shards that items have bytes in, in the order of the items, some more than once.
pub(crate) fn shards_of(items: &[Item]) -> impl Iterator<Item = usize> {
    items.iter().filter(|item| item.source_len() > 0).map(|item| item.info.shard())
}

/// Opens these shards; says for each shard of the checkpoint which of them it is.
pub(crate) fn open_shards(
    checkpoint: &Checkpoint,
    items: &[Item],
    shards: impl Iterator<Item = usize>,
) -> Result<(Vec<SourceFile>, Vec<Option<u32>>)> {
    let mut number = vec![None; checkpoint.shards().len()];
    let mut files = Vec::new();
    for shard in shards {
        if number[shard].is_none() {
            number[shard] = Some(files.len() as u32);
            files.push(open_shard(checkpoint, items, shard)?);
        }
    }
    Ok((files, number))
}

/// Opens a shard, unless it has changed since its header was read.
pub(crate) fn open_shard(
    checkpoint: &Checkpoint,
    items: &[Item],
    shard: usize,
) -> Result<SourceFile> {
    let source = &checkpoint.shards()[shard];
    let file = SourceFile::open(source.path(), Some(source.file_metadata()));
    file.map_err(|e| locate(e, items))
}

/// What a read of a load is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Tensors that are usable where they land.
    Placed,
    /// Tensors that are moved, cut or converted on their way.
    Transformed,
}

/// Follows the reads of one load: how many bytes they brought, what is wanted first, and whether to end.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    flag: Arc<AtomicBool>,
    /// That of the user's token, where `flag` is not.
    token: Option<Arc<AtomicBool>>,
    reads: Mutex<Reads>,
    /// Whether anything may be preferred.
    may_prefer: bool,
    /// Tensors that have landed and are being hashed, or wait for that.
    pub(crate) hashing: AtomicUsize,
}

/// The reads that have begun, and what was preferred, whether its read has begun or not.
#[derive(Debug, Default)]
struct Reads {
    controls: Vec<(Option<Part>, Arc<Control>)>,
    preferred: Vec<(Part, Range<u32>)>,
}

impl Watch {
    pub(crate) fn new(flag: Arc<AtomicBool>) -> Self {
        Self { flag, ..Self::default() }
    }

    /// Of a load that goes on in the background, and ends by `token` or by [`stop`](Self::stop). With
    /// `may_prefer`, tensors may be preferred.
    pub(crate) fn background(token: Arc<AtomicBool>, may_prefer: bool) -> Self {
        Self { token: Some(token), may_prefer, ..Self::default() }
    }

    /// Marks this thread as one of the load's own.
    pub(crate) fn enter(&self) -> Entered {
        Entered(ENTERED.replace(std::ptr::from_ref(self) as usize))
    }

    /// Whether this thread is one of the load's own.
    pub(crate) fn is_entered(&self) -> bool {
        ENTERED.get() == std::ptr::from_ref(self) as usize
    }

    /// Ends the reads.
    pub(crate) fn stop(&self) {
        self.flag.store(true, Relaxed);
    }

    fn reads(&self) -> MutexGuard<'_, Reads> {
        self.reads.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Follows one more read.
    pub(crate) fn next(&self) -> Arc<Control> {
        self.follow(None)
    }

    /// Follows one more read, of a part whose extents may be preferred.
    pub(crate) fn next_of(&self, part: Part) -> Arc<Control> {
        self.follow(Some(part))
    }

    fn follow(&self, part: Option<Part>) -> Arc<Control> {
        let control = Control::with_flag(self.flag.clone());
        let control = Arc::new(match &self.token {
            Some(token) => control.within(token.clone()),
            None => control,
        });
        let mut reads = self.reads();
        let wanted = reads.preferred.iter().filter(|(of, _)| Some(*of) == part);
        wanted.for_each(|(_, extents)| control.prefer(extents.clone()));
        reads.controls.push((part, control.clone()));
        control
    }

    /// Has these extents read before others of the same part.
    pub(crate) fn prefer(&self, part: Part, extents: Range<u32>) {
        let mut reads = self.reads();
        let begun = reads.controls.iter().filter(|(of, _)| *of == Some(part));
        begun.for_each(|(_, control)| control.prefer(extents.clone()));
        reads.preferred.push((part, extents));
    }

    /// Bytes that have been read so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.reads().controls.iter().map(|(_, control)| control.landed_bytes()).sum()
    }
}

thread_local! {
    /// Address of the watch of the load that this thread is of; 0 for others.
    static ENTERED: Cell<usize> = const { Cell::new(0) };
}

/// Ends the mark of a thread, by what was there before.
pub(crate) struct Entered(usize);

impl Drop for Entered {
    fn drop(&mut self) {
        ENTERED.set(self.0);
    }
}

/// Carries out two reads at once; the first that fails ends the other.
fn both(
    watch: &Watch,
    mut one: impl FnMut() -> Result<ReadStats, fst_io::Error> + Send,
    mut other: impl FnMut() -> Result<ReadStats, fst_io::Error>,
) -> (Result<ReadStats, fst_io::Error>, Result<ReadStats, fst_io::Error>) {
    /// Ends the other read also where one panics.
    struct Other<'w>(&'w Watch, bool);
    impl Drop for Other<'_> {
        fn drop(&mut self) {
            if !self.1 {
                self.0.stop();
            }
        }
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("fst-read".to_owned());
        let carry_out = |read: &mut dyn FnMut() -> Result<ReadStats, fst_io::Error>| {
            let mut other = Other(watch, false);
            let result = read();
            other.1 = result.is_ok();
            result
        };
        match thread.spawn_scoped(scope, move || carry_out(&mut one)) {
            Ok(thread) => {
                let other = carry_out(&mut other);
                let one = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                (one, other)
            }
            Err(source) => {
                let what = "a thread for reads";
                (Err(fst_io::Error::Setup { what, source }), Err(fst_io::Error::Cancelled))
            }
        }
    })
}

/// Turns what a sink passed through a reader back into this crate's error.
pub(crate) fn from_sink(error: SinkError) -> Error {
    let error = match error.downcast::<Error>() {
        Ok(own) => return *own,
        Err(other) => other,
    };
    match error.downcast::<fst_gpu::Error>() {
        Ok(gpu) => DeviceError::Cuda(*gpu).into(),
        Err(other) => Error::Io { tensor: None, source: fst_io::Error::Sink(other) },
    }
}

/// Says which tensor an I/O error hit.
pub(crate) fn locate(error: fst_io::Error, items: &[Item]) -> Error {
    locate_in(error, items.iter().map(|item| &item.info))
}

/// Says which of `tensors` an I/O error hit.
pub(crate) fn locate_in<'t>(
    error: fst_io::Error,
    mut tensors: impl Iterator<Item = &'t TensorInfo>,
) -> Error {
    let (path, offset) = match error {
        fst_io::Error::Cancelled => return Error::Cancelled,
        fst_io::Error::Sink(error) => return from_sink(error),
        fst_io::Error::Read { ref path, offset, len, .. } => (path, offset..offset + len.max(1)),
        fst_io::Error::EarlyEnd { ref path, end, .. } => (path, end..end + 1),
        source => return Error::Io { tensor: None, source },
    };
    let hit = tensors.find(|info| {
        let range = info.file_range();
        info.path() == path && range.start < offset.end && offset.start < range.end
    });
    Error::Io { tensor: hit.map(|info| info.name().to_owned()), source: error }
}
