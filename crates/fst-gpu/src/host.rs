//! Loads into host memory: of pieces, into arenas of the load's own, or into memory that the caller has.

use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use fst_io::arenas::Arenas;
use fst_io::available;
use fst_io::place::{InPlace, Layout};
use fst_io::plan::{Limits, ReadPlan};
use fst_io::ranges::{RangeInto, Ranges};
use fst_io::watch::{Part, Watch, both};
use fst_io::{Budget, Error, Extent, ReadOptions, ReadStats, SharedBuffer, SourceFile};

use crate::error::LoadError;
use crate::load::{Deliver, Filled, PieceLoad};
use crate::memory::{Borrowed, OnFilled};
use crate::piece::{HOST_ALIGN, Piece, PiecePlan, Pool, Sharing};
use crate::transform::{Transform, scratch_bytes, scratch_limits};

type Result<T, E = Error> = std::result::Result<T, E>;

/// A planned load of pieces into host memory of its own. Pieces that are one range of the file at a multiple
/// of their alignment land in place, by reads into the arenas; the others are moved, cut or converted on
/// their way.
#[derive(Debug)]
pub struct HostLoad {
    pieces: Vec<Piece>,
    files: Arc<Vec<SourceFile>>,
    /// Pieces without a byte.
    empty: Vec<usize>,
    /// Those that are usable where they land: the pieces of the plan's extents, in order.
    placed: Vec<usize>,
    plan: ReadPlan,
    layout: Layout,
    /// For each arena of the layout, its extents.
    arena_extents: Vec<Range<u32>>,
    /// Those that are moved or converted: the pieces of its work, in order.
    transformed: Vec<usize>,
    transform: PiecePlan,
    /// Bytes of host memory that the process keeps at most when nobody has the pieces any more.
    keep: u64,
}

impl HostLoad {
    /// Plans the loading of `pieces`, sorted by file and offset, into arenas of about `arena` bytes. With
    /// `in_order`, they become complete in this order.
    ///
    /// # Errors
    ///
    /// [`Error::Plan`] where pieces overlap or are not sorted.
    pub fn new(
        files: Arc<Vec<SourceFile>>,
        pieces: Vec<Piece>,
        arena: u64,
        in_order: bool,
    ) -> Result<Self> {
        let all_placed = pieces.iter().all(|piece| piece.is_empty() || piece.lands_in_place());
        // Two reads that follow each other cannot keep one order: then all go one way.
        let in_place = |piece: &Piece| piece.lands_in_place() && (all_placed || !in_order);
        Self::with(files, pieces, arena, HOST_ALIGN, in_place)
    }

    /// As [`new`](Self::new), in the order of the pieces: those that `in_place` says yes to land in place, the
    /// others at multiples of `align` bytes.
    pub(crate) fn with(
        files: Arc<Vec<SourceFile>>,
        pieces: Vec<Piece>,
        arena: u64,
        align: u64,
        in_place: impl Fn(&Piece) -> bool,
    ) -> Result<Self> {
        let limits = Limits { segment: arena, ..SourceFile::limits_of(&files) };
        let (mut empty, mut placed, mut transformed) = (Vec::new(), Vec::new(), Vec::new());
        let mut extents = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            if piece.is_empty() {
                empty.push(index);
            } else if in_place(piece) {
                extents.extend(piece.range().map(|range| Extent::new(piece.file, range)));
                placed.push(index);
            } else {
                transformed.push(index);
            }
        }
        let plan = ReadPlan::new(extents, limits)?;
        let layout = Layout::new(&plan, arena);
        // Arenas take segments in order, and segments extents.
        let mut arena_extents: Vec<Range<u32>> = Vec::new();
        for (segment, place) in plan.segments().iter().zip(layout.places()) {
            match arena_extents.get_mut(place.arena) {
                Some(extents) => extents.end = segment.extents.end,
                None => arena_extents.push(segment.extents.clone()),
            }
        }
        let limits = Limits { segment: u64::MAX, ..scratch_limits(&files) };
        let sharing = Sharing { arena, align, apart: 0 };
        let works = transformed.iter().map(|index| (&pieces[*index], Pool::HOST));
        let transform = PiecePlan::new(works, limits, sharing)?;
        Ok(Self {
            pieces,
            files,
            empty,
            placed,
            plan,
            layout,
            arena_extents,
            transformed,
            transform,
            keep: 0,
        })
    }

    /// Has the process keep the memory of its pieces when nobody has them any more, at most `most` bytes, and
    /// uses what was [kept](fst_io::kept_bytes) before. Within a budget, [that](Budget::keeping) says so.
    #[must_use]
    pub fn keeping(self, most: u64) -> Self {
        Self { keep: most, ..self }
    }
}

impl PieceLoad for HostLoad {
    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn bytes_read(&self) -> u64 {
        self.plan.bytes_read() + self.transform.plan.bytes_read()
    }

    fn least_memory(&self, _in_order: bool) -> u64 {
        let placed = self.layout.arenas().iter().copied().max().unwrap_or(0);
        placed.max(self.transform.least_memory)
    }

    fn scratch(&self, _read: &ReadOptions, _budget: bool) -> u64 {
        if self.transformed.is_empty() { 0 } else { scratch_bytes(&self.transform.plan) }
    }

    fn host_memory(&self, read: &ReadOptions, budget: Option<u64>) -> u64 {
        let transformed = self.transform.arenas.iter().map(|(len, _)| *len);
        let arenas = self.layout.arenas().iter().copied().chain(transformed);
        let all = arenas.fold(self.scratch(read, budget.is_some()), u64::saturating_add);
        all.min(budget.unwrap_or(u64::MAX))
    }

    fn check_memory(&self, read: &ReadOptions, host: bool) -> Result<(), LoadError> {
        Ok(available::check(host, self.host_memory(read, None), self.keep > 0)?)
    }

    fn prefer(&self, index: usize, watch: &Watch) {
        // A piece is there once its arena is.
        if let Ok(extent) = self.placed.binary_search(&index) {
            if let Some(place) = self.layout.extent(&self.plan, extent as u32) {
                watch.prefer(Part::Placed, self.arena_extents[place.arena].clone());
            }
        } else if let Ok(piece) = self.transformed.binary_search(&index) {
            watch.prefer(Part::Transformed, self.transform.extents_of(piece));
        }
    }

    /// Both parts, if there are two, are read at once where something may be
    /// [preferred](PieceLoad::prefer).
    fn run(
        &self,
        options: &ReadOptions,
        budget: Option<&Budget>,
        watch: &Watch,
        deliver: Deliver<'_>,
    ) -> Result<Vec<ReadStats>, LoadError> {
        let hand_over = |buffer: &SharedBuffer, index: usize, offset: u64, len: u64| {
            // SAFETY: pieces have disjoint places, each is delivered once, and nobody reads the arena
            // itself.
            deliver(index, unsafe { Filled::on_host(buffer, offset, len) })
        };
        for index in &self.empty {
            hand_over(&SharedBuffer::empty(), *index, 0, 0).map_err(Error::Sink)?;
        }
        let placed = || -> Result<ReadStats> {
            let on_arena = |arena: usize, buffer: SharedBuffer| {
                for extent in self.arena_extents[arena].clone() {
                    let index = self.placed[extent as usize];
                    let Some(place) = self.layout.extent(&self.plan, extent) else { continue };
                    hand_over(&buffer, index, place.offset, self.pieces[index].len())?;
                }
                Ok(())
            };
            let sink = InPlace::new(&self.plan, &self.layout, budget, &on_arena);
            let sink = sink.keeping(self.keep);
            let control = watch.next_of(Part::Placed);
            fst_io::read(&self.files, &self.plan, &sink, options, &control)
        };
        let transformed = || -> Result<ReadStats> {
            let by_arena = self.transform.by_arena(&self.transformed);
            let on_arena = |arena: usize, buffer: SharedBuffer| {
                let mut pieces = by_arena[arena].iter();
                pieces
                    .try_for_each(|(index, dest)| hand_over(&buffer, *index, dest.offset, dest.len))
            };
            let arenas = Arenas::new(self.transform.arenas.iter().copied(), budget, &on_arena)
                .keeping(self.keep);
            let control = watch.next_of(Part::Transformed);
            Transform::new(&self.transform, arenas).read(&self.files, options, &control)
        };
        Ok(match (self.placed.is_empty(), self.transformed.is_empty()) {
            (true, true) => Vec::new(),
            (false, true) => vec![placed()?],
            (true, false) => vec![transformed()?],
            (false, false) if watch.may_prefer() => {
                let (one, other) = both(watch, placed, transformed);
                // The first failure ended the other.
                let failed = |read: &Result<_>| matches!(read, Err(Error::Cancelled));
                let (one, other) = if failed(&one) { (other, one) } else { (one, other) };
                vec![one?, other?]
            }
            (false, false) => vec![placed()?, transformed()?],
        })
    }
}

/// A planned load of pieces into memory that the caller has: by [`Ranges`] where they are ranges of a file, and
/// through scratch memory where they are cut or converted.
pub struct BorrowedLoad<'d> {
    ranges: Ranges<'d>,
    /// For each range, its piece.
    of_ranges: Vec<usize>,
    plan: PiecePlan,
    /// For each piece of the plan, the place for it.
    memory: Vec<&'d mut [MaybeUninit<u8>]>,
    /// For each piece of the plan, which it is.
    of_plan: Vec<usize>,
}

impl fmt::Debug for BorrowedLoad<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BorrowedLoad")
            .field("ranges", &self.ranges)
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl<'d> BorrowedLoad<'d> {
    /// Plans the loading of pieces, sorted by file and offset, each into the memory beside it, whose length
    /// is the piece's.
    ///
    /// # Errors
    ///
    /// [`Error::Plan`] where pieces overlap or are not sorted, [`Error::Sink`] where lengths differ.
    pub fn new(
        files: &[SourceFile],
        pieces: impl IntoIterator<Item = (Piece, &'d mut [MaybeUninit<u8>])>,
    ) -> Result<Self> {
        let (mut ranges, mut of_ranges) = (Vec::new(), Vec::new());
        let (mut cut, mut memory, mut of_plan) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (piece, into)) in pieces.into_iter().enumerate() {
            let (expected, found) = (piece.len(), into.len());
            if expected != found as u64 {
                let error =
                    format!("a piece of {expected} bytes was given {found} bytes of memory");
                return Err(Error::Sink(error.into()));
            }
            if let Some(range) = piece.unchanged() {
                ranges.push(RangeInto { file: piece.file, start: range.start, into });
                of_ranges.push(index);
            } else if !piece.is_empty() {
                cut.push(piece);
                memory.push(into);
                of_plan.push(index);
            }
        }
        let ranges = Ranges::new(files, ranges, SourceFile::limits_of(files).gap)?;
        let limits = scratch_limits(files);
        let sharing = Sharing { arena: 0, align: 1, apart: 0 };
        let plan = PiecePlan::new(cut.iter().map(|piece| (piece, Pool::HOST)), limits, sharing)?;
        Ok(Self { ranges, of_ranges, plan, memory, of_plan })
    }

    /// Bytes that will be read.
    pub fn bytes_read(&self) -> u64 {
        self.ranges.bytes_read() + self.plan.plan.bytes_read()
    }

    /// The most bytes of scratch memory that are used at a time.
    pub fn scratch(&self) -> u64 {
        let blocks = self.plan.plan.blocks();
        let cut = if blocks.is_empty() { 0 } else { scratch_bytes(&self.plan.plan) };
        cut.max(self.ranges.slot_bytes())
    }

    /// Reads everything, one kind after the other. Once `on_filled` has been called for all source bytes of
    /// a piece, its memory is initialised and nothing touches it any more.
    ///
    /// # Errors
    ///
    /// The reads', and as [`Error::Sink`] those of `on_filled`.
    pub fn run(
        self,
        files: &[SourceFile],
        options: &ReadOptions,
        watch: &Watch,
        on_filled: OnFilled<'_>,
    ) -> Result<Vec<ReadStats>> {
        let of = |pieces: &[usize], index: usize, bytes| match pieces.get(index) {
            Some(piece) => on_filled(*piece, bytes),
            None => Ok(()),
        };
        let landed = |index, bytes| of(&self.of_ranges, index, bytes);
        let slots = self.ranges.slots()?;
        let mut reads = self.ranges.read(files, options, &slots, &|| watch.next(), &landed)?;
        drop(slots);
        if !self.plan.plan.blocks().is_empty() {
            let landed = |index, bytes| of(&self.of_plan, index, bytes);
            let memory = Borrowed::new(self.memory, &landed);
            reads.push(Transform::new(&self.plan, memory).read(files, options, &watch.next())?);
        }
        Ok(reads)
    }
}
