//! A rank's reads from files into host memory, through the block engines.
//!
//! What covers whole aligned blocks of a file is read in place; ragged edges and short ranges,
//! neighbours together, pass through a bounce slot that is kept for all reads of the load.

use std::path::Path;
use std::ptr::NonNull;
use std::sync::Mutex;

use fst_dist::{Backend, Cause, CopyAt, HostBackend, ReadAt, ReadInto, Reader, Space, Staging};
use fst_io::ledger::{Ledger, NoPlace};
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::sink::{Sink, SinkError, Target};
use fst_io::slots::Slots;
use fst_io::{Extent, HostBuffer, ReadOptions, ReadStats, SourceFile};

use crate::host::Watch;

/// From this length on a range is read in place.
const IN_PLACE: u64 = 1 << 20;
/// Bytes of a bounce slot, and of what is read into one at most (aligning adds to it).
const SLOT: usize = 2 << 20;
const GROUP: u64 = 1 << 20;
const SLOTS: usize = 16;

/// Files that a rank reads from.
pub(super) struct FileReader<'a> {
    files: &'a [SourceFile],
    /// For each shard file of the checkpoint, which of `files` it is.
    number: &'a [Option<u32>],
    options: ReadOptions,
    gap: u64,
    watch: &'a Watch,
    /// For what cannot be read in place.
    bounce: Slots,
    stats: Mutex<Vec<ReadStats>>,
}

impl<'a> FileReader<'a> {
    pub(super) fn new(
        files: &'a [SourceFile],
        number: &'a [Option<u32>],
        options: ReadOptions,
        gap: u64,
        watch: &'a Watch,
    ) -> Result<Self, fst_io::Error> {
        let bounce = Slots::new(SLOTS, SLOT as u64)?;
        Ok(Self { files, number, options, gap, watch, bounce, stats: Mutex::default() })
    }

    fn align(&self) -> u64 {
        self.files.iter().map(SourceFile::align).max().unwrap_or(Limits::MIN_ALIGN)
    }

    /// The ranges as parts of files, sorted.
    fn parts(&self, ranges: &mut [ReadInto<'_>]) -> Result<Vec<Part>, (usize, Cause)> {
        let mut parts = Vec::with_capacity(ranges.len());
        for (index, range) in ranges.iter_mut().enumerate() {
            let file = self.number.get(range.shard as usize).copied().flatten();
            let Some(file) = file else {
                return Err((index, format!("file {} is not open", range.shard).into()));
            };
            let (start, len) = (range.offset, range.into.len() as u64);
            let dest = NonNull::from(&mut *range.into).cast();
            if len > 0 {
                parts.push(Part { file, start, len, dest, range: index });
            }
        }
        parts.sort_unstable_by_key(|part| (part.file, part.start));
        Ok(parts)
    }
}

impl Reader for FileReader<'_> {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        let parts = self.parts(ranges)?;
        let align = self.align();
        let mut ways = Ways { align, gap: self.gap.max(align), ..Ways::default() };
        for part in &parts {
            ways.add(*part, &self.files[part.file as usize]);
        }
        let first = parts.first().map_or(0, |part| part.range);
        let Ways { extents, dests, parts: bounced, .. } = ways;
        // Every extent is a segment of its own: each has its own way.
        let limits = Limits { align, gap: 0, segment: 1, ..Limits::default() };
        let plan = ReadPlan::new(extents, limits).map_err(|e| (first, e.into()))?;
        let ledger = Ledger::new(&plan);
        let sink = Places { ledger, dests, parts: bounced, bounce: &self.bounce };
        let control = self.watch.next();
        match fst_io::read(self.files, &plan, &sink, &self.options, &control) {
            Ok(stats) => {
                self.stats.lock().unwrap_or_else(|e| e.into_inner()).push(stats);
                Ok(())
            }
            Err(error) => {
                let ranges =
                    parts.iter().map(|part| (part.file, part.start, part.end(), part.range));
                Err((blame(&error, self.files, ranges).unwrap_or(first), error.into()))
            }
        }
    }
}

/// Which of some ranges of files an error of reading them is about: the first that it touches.
/// Ranges come as index of the file, first byte, end, and number.
pub(super) fn blame(
    error: &fst_io::Error,
    files: &[SourceFile],
    mut ranges: impl Iterator<Item = (u32, u64, u64, usize)>,
) -> Option<usize> {
    let (path, start, end): (&Path, u64, u64) = match error {
        fst_io::Error::Read { path, offset, len, .. } => (path, *offset, offset + len.max(&1)),
        fst_io::Error::EarlyEnd { path, end, .. } => (path, *end, u64::MAX),
        _ => return None,
    };
    let hit = |&(file, first, last, _): &(u32, u64, u64, usize)| {
        files[file as usize].path() == path && first < end && start < last
    };
    ranges.find(hit).map(|(.., number)| number)
}

/// A part of a file and where its bytes go.
#[derive(Debug, Clone, Copy)]
struct Part {
    file: u32,
    start: u64,
    len: u64,
    dest: NonNull<u8>,
    /// The range asked for that it is (part of).
    range: usize,
}

impl Part {
    fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Its bytes from `at` to `end`, offsets in the file.
    fn cut(&self, at: u64, end: u64) -> Self {
        let dest = self.dest.as_ptr().wrapping_add((at - self.start) as usize);
        // Within a slice, so never null.
        let dest = NonNull::new(dest).unwrap_or(self.dest);
        Self { start: at, len: end - at, dest, ..*self }
    }
}

/// Where an extent's bytes go.
#[derive(Debug, Clone)]
enum Dest {
    /// Where they belong.
    InPlace(NonNull<u8>),
    /// Through a slot, to these parts.
    Bounce(std::ops::Range<usize>),
}

/// Sorts parts by the way that they take, in the order of the files.
#[derive(Debug, Default)]
struct Ways {
    align: u64,
    gap: u64,
    extents: Vec<Extent>,
    dests: Vec<Dest>,
    parts: Vec<Part>,
}

impl Ways {
    fn add(&mut self, part: Part, file: &SourceFile) {
        let inner_start = part.start.next_multiple_of(self.align);
        let inner_end = part.end() / self.align * self.align;
        if inner_end.saturating_sub(inner_start) >= IN_PLACE {
            let inner = part.cut(inner_start, inner_end);
            let suits = (inner.dest.as_ptr() as u64).is_multiple_of(file.memory_align());
            if suits || !file.may_be_direct() {
                self.bounce(part.cut(part.start, inner_start));
                self.extents.push(Extent::new(part.file, inner_start..inner_end));
                self.dests.push(Dest::InPlace(inner.dest));
                return self.bounce(part.cut(inner_end, part.end()));
            }
        }
        let mut at = part.start;
        while at < part.end() {
            let end = ((at / GROUP + 1) * GROUP).min(part.end());
            self.bounce(part.cut(at, end));
            at = end;
        }
    }

    /// Adds a short part, to the slot of its neighbours if they are near.
    fn bounce(&mut self, part: Part) {
        if part.len == 0 {
            return;
        }
        let at = self.parts.len();
        self.parts.push(part);
        if let (Some(extent), Some(Dest::Bounce(parts))) =
            (self.extents.last_mut(), self.dests.last_mut())
            && extent.file == part.file
            && part.start.saturating_sub(extent.end()) <= self.gap
            && part.end() - extent.offset <= GROUP
        {
            extent.len = extent.len.max(part.end() - extent.offset);
            parts.end = at + 1;
            return;
        }
        self.extents.push(Extent::new(part.file, part.start..part.end()));
        self.dests.push(Dest::Bounce(at..at + 1));
    }
}

/// The token of targets that are in place.
const IN_PLACE_TOKEN: u64 = u64::MAX;

/// The sink of one batch of ranges.
struct Places<'a> {
    ledger: Ledger<'a>,
    /// By extent, which is also by segment.
    dests: Vec<Dest>,
    parts: Vec<Part>,
    bounce: &'a Slots,
}

// SAFETY: the pointers are parts of slices that the caller of `Reader::read` lends exclusively for
// the call; they may be used from any thread.
unsafe impl Send for Places<'_> {}
// SAFETY: shared references hand out disjoint parts, each once (see `Sink` below).
unsafe impl Sync for Places<'_> {}

impl Places<'_> {
    /// The way of a block, and where its segment starts.
    fn dest(&self, block: &Block) -> Result<(&Dest, u64), NoPlace> {
        let segment = self.ledger.plan().segments().get(block.segment as usize);
        let dest = segment.and_then(|segment| {
            let dest = self.dests.get(segment.extents.start as usize)?;
            (segment.extents.len() == 1).then_some((dest, segment.start))
        });
        dest.ok_or_else(|| NoPlace::of(block))
    }

    /// Copies what a slot has for its parts.
    fn scatter(&self, block: &Block, slot: u64, parts: &[Part]) -> Result<(), SinkError> {
        let start = slot as usize * SLOT;
        // SAFETY: the slot's target came back, so that nobody writes to it until `release`.
        let bytes = unsafe { self.bounce.memory().slice(start..start + block.need as usize) };
        let bytes = bytes.ok_or_else(|| NoPlace::of(block))?;
        for part in parts {
            let (from, to) = (part.start.max(block.offset), part.end().min(block.need_end()));
            if from >= to {
                continue;
            }
            let within = (from - block.offset) as usize..(to - block.offset) as usize;
            let part = part.cut(from, to);
            let bytes = bytes.get(within).ok_or_else(|| NoPlace::of(block))?;
            // SAFETY: the part lies in a slice that is lent exclusively for this read; parts lie
            // apart, and each byte of one arrives in one block, which lands once.
            unsafe { part.dest.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
        Ok(())
    }
}

// SAFETY: a target is a slot of `bounce`, which holds the block's whole length; or it is the place of one block
// in an extent that is read in place. Those extents start and end at multiples of the plan's
// alignment, so that their segment is the extent itself, the block's whole length lies in the
// extent's memory, and blocks lie apart; that memory is lent exclusively for the call that this
// sink lives in. The ledger lends a block's place once, and knows the targets that are its own.
unsafe impl Sink for Places<'_> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        self.ledger.free(block)?;
        let (dest, segment) = self.dest(block)?;
        match dest {
            Dest::InPlace(start) => {
                // SAFETY: within the extent's memory, see above.
                let ptr = unsafe { start.add((block.offset - segment) as usize) };
                let len = block.len as usize;
                // SAFETY: see the comment on the implementation.
                Ok(Some(unsafe { self.ledger.lend(block, ptr, len, IN_PLACE_TOKEN) }?))
            }
            Dest::Bounce(_) => Ok(self.bounce.lend(&self.ledger, block, wait)?),
        }
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        self.ledger.landed(block, &target)?;
        let (dest, _) = self.dest(block)?;
        let Dest::Bounce(parts) = dest else { return Ok(()) };
        let parts = self.parts.get(parts.clone()).unwrap_or_default();
        let result = self.scatter(block, target.token(), parts);
        self.abandoned(block, target);
        result
    }

    fn abandoned(&self, block: &Block, target: Target) {
        if target.token() != IN_PLACE_TOKEN {
            // SAFETY: all other targets of the ledger are lent by these slots.
            unsafe { self.bounce.take_back(&self.ledger, block, target) };
        }
    }

    fn end(&self) {
        self.bounce.wake();
    }
}

/// A rank's host memory: that of [`HostBackend`], with staging on huge pages, and outputs of
/// [`HostOutputs`](super::outputs::HostOutputs).
pub(super) struct HostRank<'a> {
    reads: HostBackend<Reading<'a>>,
    reader: std::sync::Arc<FileReader<'a>>,
}

/// A share of a reader.
struct Reading<'a>(std::sync::Arc<FileReader<'a>>);

impl Reader for Reading<'_> {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        self.0.read(ranges)
    }
}

impl<'a> HostRank<'a> {
    pub(super) fn new(reader: FileReader<'a>) -> Self {
        let reader = std::sync::Arc::new(reader);
        Self { reads: HostBackend::new(Reading(reader.clone())), reader }
    }

    /// What the reads did.
    pub(super) fn into_stats(self) -> Vec<ReadStats> {
        std::mem::take(&mut *self.reader.stats.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

// SAFETY: all but zeros and staging is `HostBackend`'s; outputs start as zeros; staging is memory of the
// asked length, aligned to huge pages or at least pages, zeroed, and kept by its owner.
unsafe impl Backend for HostRank<'_> {
    fn space(&self) -> Space {
        self.reads.space()
    }

    fn stage(&self, bytes: u64) -> Result<Staging, Cause> {
        let buffer = HostBuffer::new(usize::try_from(bytes)?)?;
        Ok(Staging::new(buffer.as_ptr().as_ptr() as u64, buffer))
    }

    unsafe fn read(&self, ranges: &[ReadAt]) -> Result<(), (usize, Cause)> {
        // SAFETY: passed on from the caller.
        unsafe { self.reads.read(ranges) }
    }

    unsafe fn copy(&self, copies: &[CopyAt]) -> Result<(), Cause> {
        // SAFETY: passed on from the caller.
        unsafe { self.reads.copy(copies) }
    }

    /// Padding ends an output, and nobody has written there: outputs are fresh memory, zeros already, and
    /// writing zeros would put pages behind them.
    unsafe fn zero(&self, _addr: u64, _len: u64) -> Result<(), Cause> {
        Ok(())
    }
}
