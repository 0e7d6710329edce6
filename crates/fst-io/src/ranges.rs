//! Reads of file ranges into memory that exists: a caller's own, or that of a rank.
//!
//! What covers whole aligned blocks of a file, and whose memory suits direct I/O, is read in place. What the
//! page cache holds is copied into place. The rest, ragged edges included, passes through slots of scratch memory, neighbours
//! together.

use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::engine::{CachePolicy, Control, ReadOptions, read};
use crate::error::Error;
use crate::extent::Extent;
use crate::file::SourceFile;
use crate::ledger::{Ledger, NoPlace};
use crate::plan::{Block, Limits, PlanError, ReadPlan};
use crate::sink::{Sink, SinkError, Target};
use crate::slots::Slots;
use crate::stats::ReadStats;
use crate::touch::Untouched;

/// From this length on what suits direct I/O is read in place.
const IN_PLACE: u64 = 1 << 20;
/// From this length on a copy out of the page cache goes in place.
const COPY_IN_PLACE: u64 = 256 << 10;
/// The share of a range, in eighths, that counts as cached.
const CACHED: u64 = 7;
/// Bytes that one slot takes in, at most; aligning adds to them. Short, so that slots stay in the processor's
/// cache.
const GROUP: u64 = 512 << 10;
/// Slots of one read.
const SLOTS: usize = 24;

/// A range of a file, and the memory that its bytes are read into.
#[derive(Debug)]
pub struct RangeInto<'d> {
    /// Index of the file.
    pub file: u32,
    /// First byte of the range in the file.
    pub start: u64,
    /// Where the bytes go: as many as the range has.
    pub into: &'d mut [MaybeUninit<u8>],
}

/// Takes note of bytes of a range (its index in the list, and how many) that are in place, from the thread that brought
/// them; its error ends the read. Once all bytes of a range have come, nothing touches its memory any more.
pub type OnRange<'a> = &'a (dyn Fn(usize, u64) -> Result<(), SinkError> + Send + Sync);

/// A part of a file and where its bytes go.
#[derive(Debug, Clone, Copy)]
struct Part {
    file: u32,
    start: u64,
    len: u64,
    dest: NonNull<u8>,
    /// The range that it is (part of).
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
    InPlace(Part),
    /// Through a slot, to these parts.
    Slot(Range<usize>),
}

/// Ranges of files that are read as one: in place, and through slots.
pub struct Way<'d> {
    plan: ReadPlan,
    /// By extent, which is also by segment.
    dests: Vec<Dest>,
    parts: Vec<Part>,
    /// By range, its memory if nobody has touched it.
    untouched: Arc<[Option<Untouched>]>,
    /// The memory of `dests` and `parts`, parts of the ranges'.
    memory: PhantomData<&'d mut [MaybeUninit<u8>]>,
}

// SAFETY: the pointers are parts of `&'d mut [MaybeUninit<u8>]`, which may go to another thread.
unsafe impl Send for Way<'_> {}
// SAFETY: shared references give no access to the memory; sinks are made of exclusive ones.
unsafe impl Sync for Way<'_> {}

impl fmt::Debug for Way<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Way").field("extents", &self.dests.len()).finish_non_exhaustive()
    }
}

/// Sorts parts, which come in the order of the files, by where they go.
#[derive(Default)]
struct Sorted {
    gap: u64,
    extents: Vec<Extent>,
    dests: Vec<Dest>,
    parts: Vec<Part>,
}

impl Sorted {
    fn in_place(&mut self, part: Part) {
        self.extents.push(Extent::new(part.file, part.start..part.end()));
        self.dests.push(Dest::InPlace(part));
    }

    /// Has a part pass through slots.
    fn through_slots(&mut self, part: Part) {
        let mut at = part.start;
        while at < part.end() {
            let end = ((at / GROUP + 1) * GROUP).min(part.end());
            self.through_slot(part.cut(at, end));
            at = end;
        }
    }

    /// Adds a short part, to the slot of its neighbours if they are near.
    fn through_slot(&mut self, part: Part) {
        let at = self.parts.len();
        self.parts.push(part);
        if let (Some(extent), Some(Dest::Slot(parts))) =
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
        self.dests.push(Dest::Slot(at..at + 1));
    }

    fn planned<'d>(
        self,
        align: u64,
        untouched: Arc<[Option<Untouched>]>,
    ) -> Result<Way<'d>, PlanError> {
        // Every extent is a segment of its own, for each has memory of its own.
        let in_place = self.dests.iter().any(|dest| matches!(dest, Dest::InPlace(_)));
        let block = if in_place { Limits::DEFAULT_BLOCK } else { GROUP };
        let limits = Limits { align, block, gap: 0, segment: 1 };
        let plan = ReadPlan::new(self.extents, limits)?;
        Ok(Way { plan, dests: self.dests, parts: self.parts, untouched, memory: PhantomData })
    }
}

/// Ranges of files, sorted by the way that their bytes take.
#[derive(Debug)]
pub struct Ranges<'d> {
    /// Read around the page cache where that pays.
    pub direct: Way<'d>,
    /// Copied out of the page cache, wherever in a file or in memory they start.
    pub cached: Way<'d>,
    align: u64,
}

impl<'d> Ranges<'d> {
    /// Sorts `ranges` of `files`. Those that pass through slots are read together with up to `gap` bytes
    /// between them.
    ///
    /// # Errors
    ///
    /// [`PlanError`], as when a range names no file, or ranges that are read in place overlap.
    pub fn new(
        files: &[SourceFile],
        ranges: impl IntoIterator<Item = RangeInto<'d>>,
        gap: u64,
    ) -> Result<Self, PlanError> {
        let align = SourceFile::align_of(files);
        let mut untouched = Vec::new();
        let part = |(range, RangeInto { file, start, into }): (usize, RangeInto<'d>)| {
            untouched.push(Untouched::new(into));
            let len = into.len() as u64;
            Part { file, start, len, dest: NonNull::from(into).cast(), range }
        };
        let mut parts: Vec<Part> = ranges.into_iter().enumerate().map(part).collect();
        parts.retain(|part| part.len > 0);
        parts.sort_by_key(|part| (part.file, part.start));
        let (mut direct, mut cached) = (Sorted { gap, ..Sorted::default() }, Sorted::default());
        for part in parts {
            let Some(file) = files.get(part.file as usize) else {
                // No file has such an extent: the plan says which.
                direct.in_place(Part { len: u64::MAX, ..part });
                break;
            };
            let inner = part.start.next_multiple_of(align)..part.end() / align * align;
            if file.may_be_direct() && inner.end.saturating_sub(inner.start) >= IN_PLACE {
                let body = part.cut(inner.start, inner.end);
                if (body.dest.as_ptr() as u64).is_multiple_of(file.memory_align()) {
                    direct.through_slots(part.cut(part.start, inner.start));
                    direct.in_place(body);
                    direct.through_slots(part.cut(inner.end, part.end()));
                    continue;
                }
            }
            // Without direct I/O all goes through the page cache; what that holds is copied once.
            let is_cached = || {
                file.resident_bytes_of(part.start, part.len)
                    .is_ok_and(|bytes| bytes >= part.len / 8 * CACHED)
            };
            if part.len >= COPY_IN_PLACE && (!file.may_be_direct() || is_cached()) {
                cached.in_place(part);
            } else {
                direct.through_slots(part);
            }
        }
        let untouched: Arc<[_]> = untouched.into();
        let direct = direct.planned(align, untouched.clone())?;
        Ok(Self { direct, cached: cached.planned(1, untouched)?, align })
    }

    /// Bytes that will be read.
    pub fn bytes_read(&self) -> u64 {
        self.direct.plan.bytes_read() + self.cached.plan.bytes_read()
    }

    /// Bytes of scratch memory that a read takes with [slots](Self::slots) of its own.
    pub fn slot_bytes(&self) -> u64 {
        self.slot_count() as u64 * slot_len(self.align)
    }

    fn slot_count(&self) -> usize {
        let through = |dest: &&Dest| matches!(dest, Dest::Slot(_));
        self.direct.dests.iter().filter(through).take(SLOTS).count()
    }

    /// Slots for this read alone.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn slots(&self) -> Result<Slots, Error> {
        Slots::new(self.slot_count(), slot_len(self.align))
    }

    /// Reads everything, through `slots` where bytes cannot be read in place. `follow` makes the control of
    /// each of up to two reads.
    ///
    /// # Errors
    ///
    /// As for [`read`].
    pub fn read(
        mut self,
        files: &[SourceFile],
        options: &ReadOptions,
        slots: &Slots,
        follow: &dyn Fn() -> Arc<Control>,
        landed: OnRange<'_>,
    ) -> Result<Vec<ReadStats>, Error> {
        let mut reads = Vec::new();
        let mut buffered = options.clone();
        buffered.cache = CachePolicy::Buffered;
        for (way, options) in [(&mut self.direct, options), (&mut self.cached, &buffered)] {
            if !way.plan.blocks().is_empty() {
                let (plan, sink) = way.sink(slots, landed);
                reads.push(read(files, plan, &sink, options, &follow())?);
            }
        }
        Ok(reads)
    }
}

/// Slots for any reads of files that ask for this alignment, with all that a read makes use of.
///
/// # Errors
///
/// [`Error::Memory`].
pub fn slots(align: u64) -> Result<Slots, Error> {
    Slots::new(SLOTS, slot_len(align))
}

fn slot_len(align: u64) -> u64 {
    // Both ends may be ragged.
    (GROUP + 2 * align).next_multiple_of(align)
}

impl<'d> Way<'d> {
    /// What is read.
    pub fn plan(&self) -> &ReadPlan {
        &self.plan
    }

    /// The sink of one read of the plan. Once that has succeeded, every byte of the ranges has been written.
    pub fn sink<'a>(
        &'a mut self,
        slots: &'a Slots,
        landed: OnRange<'a>,
    ) -> (&'a ReadPlan, impl Sink + use<'a, 'd>) {
        let way = &*self;
        (&way.plan, Places { ledger: Ledger::new(&way.plan), way, slots, landed })
    }
}

/// The token of targets that are in place.
const IN_PLACE_TOKEN: u64 = u64::MAX;

/// The sink of a [`Way`].
struct Places<'a, 'd> {
    ledger: Ledger<'a>,
    /// Exclusively this value's, see [`Way::sink`].
    way: &'a Way<'d>,
    slots: &'a Slots,
    landed: OnRange<'a>,
}

impl Places<'_, '_> {
    /// Where a block goes, and where its segment starts.
    fn dest(&self, block: &Block) -> Result<(&Dest, u64), NoPlace> {
        let segment = self.way.plan.segments().get(block.segment as usize);
        let dest = segment.and_then(|segment| {
            let dest = self.way.dests.get(segment.extents.start as usize)?;
            (segment.extents.len() == 1).then_some((dest, segment.start))
        });
        dest.ok_or_else(|| NoPlace::of(block))
    }

    /// Chooses the pages of memory of a range that nobody has touched; whether it is such.
    fn prepare(&self, range: usize, ptr: NonNull<u8>, len: usize) -> bool {
        let untouched = self.way.untouched.get(range).and_then(Option::as_ref);
        if let Some(untouched) = untouched {
            // SAFETY: the range's memory is borrowed for as long as the `Way` lives.
            unsafe { untouched.prepare(ptr, len) };
        }
        untouched.is_some()
    }

    /// Copies what a slot has for its parts.
    fn scatter(&self, block: &Block, slot: u64, parts: &[Part]) -> Result<(), SinkError> {
        let start = slot as usize * self.slots.slot_len();
        // SAFETY: the slot's target came back, so that nobody writes to it until it is released.
        let bytes = unsafe { self.slots.memory().slice(start..start + block.need as usize) };
        let bytes = bytes.ok_or_else(|| NoPlace::of(block))?;
        for part in parts {
            let (from, to) = (part.start.max(block.offset), part.end().min(block.need_end()));
            if from >= to {
                continue;
            }
            let within = (from - block.offset) as usize..(to - block.offset) as usize;
            let here = part.cut(from, to);
            let bytes = bytes.get(within).ok_or_else(|| NoPlace::of(block))?;
            // SAFETY: the part lies in memory that is this sink's alone; parts lie apart, and each byte of
            // one arrives in one block, which lands once.
            unsafe { here.dest.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
            (self.landed)(part.range, here.len)?;
        }
        Ok(())
    }
}

// SAFETY: a target is a slot, which holds the block's whole length; or it is the place of one block in an
// extent that is read in place. Those extents start and end at multiples of the plan's alignment (of the
// files' one, or of 1), so that their segment is the extent itself, the block's whole length lies in the
// extent's memory, and blocks lie apart. That memory is borrowed exclusively for `'d` by the `Way`, of which
// this sink has the only reference. The ledger gives out a block's place once, and knows the targets that are its own.
unsafe impl Sink for Places<'_, '_> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        self.ledger.free(block)?;
        let (dest, segment) = self.dest(block)?;
        match dest {
            Dest::InPlace(part) => {
                let at = (block.offset - segment) as usize;
                if segment != part.start || at as u64 + block.len > part.len {
                    return Err(NoPlace::of(block).into());
                }
                // SAFETY: within the extent's memory, as was just checked.
                let ptr = unsafe { part.dest.add(at) };
                let len = block.len as usize;
                // SAFETY: see the comment on the implementation.
                let target = unsafe { self.ledger.lend(block, ptr, len, IN_PLACE_TOKEN) }?;
                let fresh = self.prepare(part.range, ptr, len);
                Ok(Some(if fresh { target.fresh() } else { target }))
            }
            Dest::Slot(parts) => {
                let target = self.slots.lend(&self.ledger, block, wait)?;
                let parts = self.way.parts.get(parts.clone()).unwrap_or_default();
                for part in parts.iter().filter(|_| target.is_some()) {
                    self.prepare(part.range, part.dest, part.len as usize);
                }
                Ok(target)
            }
        }
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        self.ledger.landed(block, &target)?;
        match self.dest(block)?.0 {
            Dest::InPlace(part) => (self.landed)(part.range, block.need),
            Dest::Slot(parts) => {
                let parts = self.way.parts.get(parts.clone()).unwrap_or_default();
                let result = self.scatter(block, target.token(), parts);
                self.abandoned(block, target);
                result
            }
        }
    }

    fn abandoned(&self, block: &Block, target: Target) {
        if target.token() != IN_PLACE_TOKEN {
            // SAFETY: all other targets of the ledger are of these slots.
            unsafe { self.slots.take_back(&self.ledger, block, target) };
        }
    }

    fn end(&self) {
        self.slots.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::{Engine, ResolvedEngine};

    const LEN: usize = 6 << 20;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Whatever the way, each range's memory holds what `std::fs::read` says, all bytes of it are
        /// reported, and not one byte beside it is touched.
        #[test]
        fn ranges_hold_what_the_file_has(
            mut cuts in proptest::collection::vec(0usize..=LEN, 2..24),
            shifts in proptest::collection::vec(0usize..4096, 24),
            aligned in any::<bool>(), engine in 0usize..3, drop_cache in any::<bool>(),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a");
            let bytes: Vec<u8> = (0..LEN as u32).map(|i| ((i * 7 / 3) ^ (i >> 9)) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            let files = [SourceFile::open(&path, None).unwrap()];
            if drop_cache {
                use std::os::fd::AsRawFd;
                files[0].buffered().unwrap().sync_all().unwrap();
                let fd = files[0].buffered().unwrap().as_raw_fd();
                // SAFETY: a call about an open descriptor.
                unsafe { libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED) };
            }
            cuts.sort_unstable();
            let ranges: Vec<Range<usize>> = cuts.chunks_exact(2).map(|at| at[0]..at[1]).collect();
            // Memory that is congruent to the file, or not, with a border on both sides.
            let mut memory: Vec<Vec<MaybeUninit<u8>>> = ranges
                .iter()
                .map(|range| vec![MaybeUninit::new(0xee); range.len() + 3 * 4096])
                .collect();
            let places: Vec<usize> = ranges.iter().zip(&memory).zip(&shifts).map(|((range, memory), shift)| {
                let fit = (range.start as u64).wrapping_sub(memory.as_ptr() as u64) % 4096;
                if aligned { fit as usize } else { *shift }
            }).collect();
            let into = ranges.iter().zip(&mut memory).zip(&places).map(|((range, memory), at)| RangeInto {
                file: 0,
                start: range.start as u64,
                into: &mut memory[*at..*at + range.len()],
            });
            // In any order.
            let all = Ranges::new(&files, into.rev(), 4096).unwrap();
            let slots = all.slots().unwrap();
            let engine = [Engine::Auto, Engine::Pread, Engine::Mmap][engine];
            let can = ResolvedEngine::resolve(engine).is_ok();
            let options = ReadOptions {
                engine: if can { engine } else { Engine::Auto },
                ..ReadOptions::default()
            };
            let told = Mutex::new(vec![0; ranges.len()]);
            let landed = |range: usize, bytes: u64| {
                told.lock().unwrap()[range] += bytes;
                Ok(())
            };
            all.read(&files, &options, &slots, &|| Arc::new(Control::new()), &landed).unwrap();
            let told = told.into_inner().unwrap();
            for (index, (range, memory)) in ranges.iter().zip(memory).enumerate() {
                // SAFETY: made of initialised bytes.
                let got: Vec<u8> = memory.iter().map(|b| unsafe { b.assume_init() }).collect();
                let at = places[index];
                prop_assert!(got[at..at + range.len()] == bytes[range.clone()], "{range:?}");
                prop_assert!(got[..at].iter().chain(&got[at + range.len()..]).all(|b| *b == 0xee));
                prop_assert_eq!(told[ranges.len() - 1 - index], range.len() as u64);
            }
        }
    }

    #[test]
    fn ranges_that_overlap_or_name_no_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![0; 3 << 20]).unwrap();
        let files = [SourceFile::open(&path, None).unwrap()];
        let mut memory = vec![MaybeUninit::uninit(); 4 << 20];
        let (a, b) = memory.split_at_mut(2 << 20);
        let one = RangeInto { file: 0, start: 0, into: &mut *a };
        let other = RangeInto { file: 0, start: 4096, into: b };
        assert!(Ranges::new(&files, [one, other], 0).is_err());
        let range = RangeInto { file: 1, start: 0, into: a };
        assert!(Ranges::new(&files, [range], 0).is_err());
    }

    #[test]
    fn a_place_is_given_out_once_and_for_its_own_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![0; 3 << 20]).unwrap();
        let files = [SourceFile::open(&path, None).unwrap()];
        let mut memory = vec![MaybeUninit::new(0); 3 << 20];
        let range = RangeInto { file: 0, start: 0, into: &mut memory };
        let mut ranges = Ranges::new(&files, [range], 0).unwrap();
        let slots = ranges.slots().unwrap();
        for way in [&mut ranges.direct, &mut ranges.cached] {
            let (plan, sink) = way.sink(&slots, &|_, _| Ok(()));
            for block in plan.blocks() {
                let mut foreign = block.clone();
                foreign.len *= 1000;
                assert!(sink.reserve(&foreign, false).is_err());
                let target = sink.reserve(block, false).unwrap().unwrap();
                assert!(sink.reserve(block, false).is_err());
                assert!(sink.landed(&foreign, target).is_err());
            }
        }
    }
}
