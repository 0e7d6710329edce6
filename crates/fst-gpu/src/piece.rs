//! Pieces: byte ranges of files and what becomes of them. A plan says which blocks are read for them, and
//! which bytes of which arena a block's bytes become. Pure.

use std::ops::Range;

use fst_io::Extent;
use fst_io::plan::{Block, Limits, ReadPlan};

use crate::cast::{self, CastType};

/// Runs of bytes of a file, of one length and at equal distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Runs {
    /// First byte of the first run, from the start of the file.
    pub start: u64,
    /// Bytes of each run.
    pub len: u64,
    /// Bytes from the start of a run to the start of the next.
    pub stride: u64,
    /// Number of runs.
    pub count: u64,
}

/// These runs are no piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{} runs of {} bytes, {} apart, from byte {} on: {rule}", runs.count, runs.len, runs.stride, runs.start)]
pub struct PieceError {
    /// The runs given.
    pub runs: Runs,
    /// What does not hold of them.
    pub rule: &'static str,
}

/// Runs of bytes of a file that become one dense range of memory, converted if asked.
///
/// Several [`Runs`] come one behind the other, in whatever order they lie in the file.
///
/// ```
/// use fst_gpu::cast::CastType;
/// use fst_gpu::{Piece, Runs};
///
/// // The first half of each of 100 rows of 64 BF16 elements, as F32.
/// let runs = Runs { start: 4096, len: 64, stride: 128, count: 100 };
/// let piece = Piece::new(0, runs)?.converted(CastType::BF16, CastType::F32)?.aligned(4);
/// assert_eq!((piece.source_len(), piece.len()), (6400, 12800));
/// # Ok::<(), fst_gpu::PieceError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Index of its source file.
    pub(crate) file: u32,
    runs: Runs,
    /// What comes behind the first runs. Of nearly all pieces nothing does.
    more: Box<[Runs]>,
    pub(crate) cast: Option<(CastType, CastType)>,
    /// Of what the address of its first byte is to be a multiple.
    align: u64,
    /// Which of a load's devices it goes to.
    pub(crate) device: u32,
    /// Bytes of the file.
    source_len: u64,
    /// Bytes that it becomes.
    len: u64,
}

impl Piece {
    /// `runs` of file number `file`, one behind the other.
    ///
    /// # Errors
    ///
    /// [`PieceError`] where runs overlap or end past any file's end.
    pub fn new(file: u32, runs: Runs) -> Result<Self, PieceError> {
        Self::joined(file, [runs])
    }

    /// As [`new`](Self::new), of several runs in this order. They may share bytes of the file.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and where no memory holds them together.
    pub fn joined(file: u32, runs: impl IntoIterator<Item = Runs>) -> Result<Self, PieceError> {
        let mut len = 0u64;
        let mut checked = runs.into_iter().map(|runs| {
            let runs = runs.checked()?;
            // No overflow: they do not overlap, so that this is no more than their span.
            len = len.saturating_add(runs.len * runs.count);
            match len <= i64::MAX as u64 {
                true => Ok(runs),
                false => Err(PieceError { runs, rule: "no memory holds what they become" }),
            }
        });
        let first = checked.next().transpose()?;
        let more = checked.collect::<Result<_, _>>()?;
        let runs = first.unwrap_or(Runs { start: 0, len: 0, stride: 0, count: 0 });
        Ok(Self { file, runs, more, cast: None, align: 1, device: 0, source_len: len, len })
    }

    /// Converts its elements.
    ///
    /// # Errors
    ///
    /// [`PieceError`] where the runs are not whole elements, or where there is no such conversion.
    pub fn converted(self, from: CastType, to: CastType) -> Result<Self, PieceError> {
        let refuse = |runs, rule| Err(PieceError { runs, rule });
        let size = from.size() as u64;
        let whole = |bytes: u64| bytes.is_multiple_of(size);
        let whole = |runs: &&Runs| whole(runs.len) && (runs.count < 2 || whole(runs.stride));
        if let Some(runs) = self.runs().find(|runs| !whole(runs)) {
            return refuse(*runs, "they are not whole elements");
        }
        if !cast::supported(from, to) {
            return refuse(self.runs, "there is no such conversion");
        }
        match (self.source_len / size).checked_mul(to.size() as u64) {
            Some(len) if len <= i64::MAX as u64 => Ok(Self { cast: Some((from, to)), len, ..self }),
            _ => refuse(self.runs, "no memory holds what they become"),
        }
    }

    /// Has it start at a multiple of `align` bytes, a power of two of at most [`HOST_ALIGN`].
    #[must_use]
    pub fn aligned(self, align: u64) -> Self {
        Self { align: align.clamp(1, HOST_ALIGN), ..self }
    }

    /// Has it land on the device of this number, of those that its [load](crate::load) is given; the first
    /// unless told otherwise.
    #[must_use]
    pub fn on(self, device: u32) -> Self {
        Self { device, ..self }
    }

    /// Bytes of the file that it consists of.
    pub fn source_len(&self) -> u64 {
        self.source_len
    }

    /// Bytes that it becomes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it becomes no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether its bytes are one range of the file that can be used where it lands.
    pub fn lands_in_place(&self) -> bool {
        self.unchanged().is_some_and(|range| range.start.is_multiple_of(self.align))
    }

    /// The range of the file that it is, if it is one that is not converted.
    pub(crate) fn unchanged(&self) -> Option<Range<u64>> {
        self.range().filter(|_| self.cast.is_none())
    }

    /// The range of the file that it is made of, if it is one.
    pub(crate) fn range(&self) -> Option<Range<u64>> {
        let Runs { start, len, count, .. } = self.runs;
        (count <= 1 && self.more.is_empty()).then(|| start..start + len * count)
    }

    /// What it is made of, in this order.
    pub(crate) fn runs(&self) -> impl Iterator<Item = &Runs> {
        std::iter::once(&self.runs).chain(&self.more)
    }

    /// Whether elements that are to be converted do not start at multiples of their size in the file, so
    /// that they can straddle two blocks.
    #[cfg(feature = "cuda")]
    pub(crate) fn straddles(&self) -> bool {
        let size = self.cast.map_or(1, |(from, _)| from.size() as u64);
        !self.runs().all(|runs| runs.start.is_multiple_of(size))
    }
}

impl Runs {
    /// These runs, if they do not overlap and may lie in a file.
    fn checked(self) -> Result<Self, PieceError> {
        let refuse = |rule| Err(PieceError { runs: self, rule });
        let last = self.count.saturating_sub(1);
        if last > 0 && self.stride < self.len {
            return refuse("they overlap");
        }
        let end = last.checked_mul(self.stride).and_then(|span| span.checked_add(self.start));
        let end = end.and_then(|start| start.checked_add(self.len));
        if end.is_none_or(|end| end > i64::MAX as u64) {
            return refuse("they end past any file's end");
        }
        Ok(Self { stride: self.stride.max(self.len), ..self })
    }

    /// First byte behind them.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.count.saturating_sub(1) * self.stride + self.len * self.count.min(1)
    }

    /// The ranges of the file that they are.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let Self { start, len, stride, count } = *self;
        (0..count).map(move |run| start + run * stride).map(move |at| at..at + len)
    }
}

/// Where a piece's final bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dest {
    pub(crate) arena: usize,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// Runs of a piece that is planned.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) runs: Runs,
    pub(crate) cast: Option<(CastType, CastType)>,
    /// Where these runs' final bytes lie.
    pub(crate) dest: Dest,
    /// Up to where in the file these runs, and those of the piece in front of them in the file, reach.
    reach: u64,
}

/// Rows of wanted bytes, equally long and equally far apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// First byte, from the start of the bytes at hand.
    pub(crate) at: u64,
    /// How many wanted bytes of the piece lie before it.
    pub(crate) position: u64,
    /// Bytes of a row.
    pub(crate) len: u64,
    /// Bytes from row to row.
    pub(crate) pitch: u64,
    /// Number of rows.
    pub(crate) rows: u64,
}

impl Work {
    /// The part of the arena that bytes `part` of the file become.
    fn image(&self, part: Range<u64>) -> Option<Range<u64>> {
        let mut cuts = self.cuts(part);
        let first = cuts.next()?;
        let last = cuts.last().unwrap_or(first);
        let (start, end) = (first.position, last.position + last.rows * last.len);
        let becomes = |position| self.dest.offset + becomes(self.cast, position);
        Some(becomes(start)..becomes(end))
    }

    /// What is wanted of bytes `part` of the file, none of which lie before the piece: the rest of a run
    /// that began earlier, whole runs, and the beginning of one that goes on.
    pub(crate) fn cuts(&self, part: Range<u64>) -> impl Iterator<Item = Cut> + use<> {
        let Runs { start, len, stride, count } = self.runs;
        let (at, end) = (part.start.saturating_sub(start), part.end.saturating_sub(start));
        let stride = stride.max(1);
        // Runs that begin before `at`, and runs that end by `end`.
        let begun = at.div_ceil(stride).min(count);
        let ended = if end >= len { ((end - len) / stride + 1).min(count) } else { 0 };
        let single = move |run: u64| {
            let (lo, hi) = ((run * stride).max(at), (run * stride + len).min(end));
            (run < count && lo < hi).then(|| Cut {
                at: lo - at,
                position: run * len + (lo - run * stride),
                len: hi - lo,
                pitch: hi - lo,
                rows: 1,
            })
        };
        let head = begun.checked_sub(1).and_then(single);
        let whole = (begun < ended).then(|| Cut {
            at: begun * stride - at,
            position: begun * len,
            len,
            pitch: stride,
            rows: ended - begun,
        });
        // The run that the end cuts, unless it is the one that the start cuts too.
        let tail = if ended >= begun { single(ended) } else { None };
        [head, whole, tail].into_iter().flatten()
    }
}

/// The bytes that so many source bytes become.
fn becomes(cast: Option<(CastType, CastType)>, bytes: u64) -> u64 {
    cast.map_or(bytes, |(from, to)| bytes / from.size() as u64 * to.size() as u64)
}

/// What to read for pieces, and where it goes.
#[derive(Debug)]
pub(crate) struct PiecePlan {
    pub(crate) plan: ReadPlan,
    /// Piece by piece; those of a piece in the order of the file.
    pub(crate) work: Vec<Work>,
    /// For each piece, where it goes, and its part of the work.
    places: Vec<(Dest, Range<usize>)>,
    /// For each extent of the plan, the index of its piece.
    owners: Vec<u32>,
    /// Length in bytes of each arena, and the source bytes that it waits for.
    pub(crate) arenas: Vec<(u64, u64)>,
    /// For each arena, what pieces it is for.
    pub(crate) pools: Vec<Pool>,
    /// For each arena, its first piece and its last.
    spans: Vec<(u32, u32)>,
    /// Bytes of arenas that must be in memory at once, where not all are: those that are filled beside each
    /// other, one for each pool. (Arenas come in the order of the blocks, so that the first block that is
    /// not done finds all that came before these full and gone.)
    pub(crate) least_memory: u64,
}

/// Pieces that may share arenas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Pool {
    /// The device that they go to, by its number.
    pub(crate) device: u32,
    /// Whether their arenas are in host memory, be it on the way to a device.
    pub(crate) on_host: bool,
}

impl Pool {
    /// Of pieces that all go to host memory.
    pub(crate) const HOST: Self = Self { device: 0, on_host: true };
}

/// Alignment of pieces in a host arena, in bytes: a cache line.
pub const HOST_ALIGN: u64 = 64;

/// How pieces share arenas.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sharing {
    /// Pieces that fit share an arena of at most so many bytes; with 0, each has one of its own.
    pub(crate) arena: u64,
    /// Of what a piece's offset in its arena is a multiple, in bytes.
    pub(crate) align: u64,
    /// Pieces shorter than this share no arena with others: who keeps a few of them keeps little memory.
    /// Above 0 only where all arenas may be in memory at once.
    pub(crate) apart: u64,
}

impl PiecePlan {
    /// Plans for pieces, sorted by file and offset, each with what it may share arenas with.
    pub(crate) fn new<'p>(
        pieces: impl ExactSizeIterator<Item = (&'p Piece, Pool)>,
        limits: Limits,
        Sharing { arena, align, apart }: Sharing,
    ) -> Result<Self, fst_io::Error> {
        let mut extents = Vec::new();
        let mut owners = Vec::new();
        let mut arenas: Vec<(u64, u64)> = Vec::new();
        let mut work: Vec<Work> = Vec::with_capacity(pieces.len());
        let mut places = Vec::with_capacity(pieces.len());
        let mut wanted: Vec<Range<u64>> = Vec::new();
        let mut spans: Vec<(u32, u32)> = Vec::new();
        let mut pools = Vec::new();
        // The arenas of each pool that are being filled: that of short pieces, and that of the others.
        let mut open: Vec<(Pool, [Option<usize>; 2])> = Vec::new();
        // The first arena of each group of those that are filled beside each other.
        let mut groups = vec![0];
        for (index, (piece, pool)) in pieces.enumerate() {
            let Piece { file, cast, len, .. } = *piece;
            let kind = usize::from(len >= apart);
            let known = open.iter().position(|(known, _)| *known == pool);
            let last = known.and_then(|known| open[known].1[kind]);
            let free = |at: usize| arenas[at].0.next_multiple_of(align);
            let (at, offset) = match last.map(|at| (at, free(at))) {
                Some((at, offset)) if offset + len <= arena => (at, offset),
                _ => (arenas.len(), 0),
            };
            if at == arenas.len() {
                arenas.push((0, 0));
                pools.push(pool);
                spans.push((index as u32, 0));
                if apart == 0 && last.is_some() {
                    // No arena stays open for long while others come and go.
                    groups.push(at);
                    open.clear();
                }
            }
            let known = open.iter().position(|(known, _)| *known == pool);
            let known = known.unwrap_or_else(|| {
                open.push((pool, [None; 2]));
                open.len() - 1
            });
            // Short pieces are soon complete if they wait for their neighbours only.
            if kind == 1 && open[known].1[1] != Some(at) {
                open[known].1[0] = None;
            }
            open[known].1[kind] = Some(at);
            spans[at].1 = index as u32;
            let (end, missing) = &mut arenas[at];
            (*end, *missing) = (offset + len, *missing + piece.source_len());
            let first = work.len();
            let mut position = offset;
            for runs in piece.runs().filter(|runs| runs.count > 0 && runs.len > 0) {
                let dest =
                    Dest { arena: at, offset: position, len: becomes(cast, runs.len * runs.count) };
                position += dest.len;
                work.push(Work { runs: *runs, cast, dest, reach: 0 });
                if runs.stride - runs.len <= limits.gap {
                    wanted.push(runs.start..runs.end());
                } else {
                    wanted.extend(runs.ranges());
                }
            }
            let own = &mut work[first..];
            own.sort_by_key(|work| work.runs.start);
            let mut reach = 0;
            for work in own {
                reach = reach.max(work.runs.end());
                work.reach = reach;
            }
            places.push((Dest { arena: at, offset, len }, first..work.len()));
            // What is wanted lies apart in the plan, however it lies in the piece.
            wanted.sort_by_key(|range| range.start);
            let mut wanted = wanted.drain(..);
            let mut last = wanted.next();
            while let Some(range) = last.take() {
                let mut range = range;
                for next in wanted.by_ref() {
                    if next.start <= range.end.saturating_add(limits.gap) {
                        range.end = range.end.max(next.end);
                    } else {
                        last = Some(next);
                        break;
                    }
                }
                extents.push(Extent::new(file, range));
                owners.push(index as u32);
            }
        }
        // A block that led to two arenas would need the memory of both at once. Where each piece has
        // an arena of its own, or all arenas may be there at once, blocks may have any pieces.
        let group = |extent: usize| match arena {
            _ if apart > 0 => 0,
            0 => 0,
            _ => places[owners[extent] as usize].0.arena,
        };
        let plan = ReadPlan::grouped(extents, group, limits)?;
        let ends = groups.iter().skip(1).copied().chain([arenas.len()]);
        let of_group = groups.iter().zip(ends).map(|(start, end)| &arenas[*start..end]);
        let least_memory = of_group.map(|group| group.iter().map(|(len, _)| len).sum()).max();
        Ok(Self {
            plan,
            work,
            places,
            owners,
            arenas,
            pools,
            spans,
            least_memory: least_memory.unwrap_or(0),
        })
    }

    /// The work with bytes in a block, by number, and the part of the file where these are.
    pub(crate) fn parts_of(
        &self,
        block: &Block,
    ) -> impl Iterator<Item = (u32, &Work, Range<u64>)> + use<'_> {
        let (start, end) = (block.offset, block.need_end());
        block.extents.clone().flat_map(move |extent| {
            let piece = self.owners.get(extent as usize).map(|owner| *owner as usize);
            let own = piece.and_then(|piece| self.places.get(piece)).map(|(_, own)| own.clone());
            let own = own.unwrap_or_default();
            let part = self.plan.extents().get(extent as usize);
            let part = part.map_or(0..0, |one| one.offset.max(start)..one.end().min(end));
            let work = self.work.get(own.clone()).unwrap_or_default();
            let ended = work.partition_point(|work| work.reach <= part.start);
            let begun = work.partition_point(|work| work.runs.start < part.end).max(ended);
            (own.start + ended..).zip(&work[ended..begun]).filter_map(move |(number, work)| {
                let part = part.start.max(work.runs.start)..part.end;
                (part.start < part.end).then_some((number as u32, work, part))
            })
        })
    }

    /// As [`parts_of`](Self::parts_of), of the work in host memory, or of the rest.
    pub(crate) fn parts_on(
        &self,
        block: &Block,
        host: bool,
    ) -> impl Iterator<Item = (u32, &Work, Range<u64>)> + use<'_> {
        self.parts_of(block).filter(move |(_, work, _)| self.is_on_host(work.dest.arena) == host)
    }

    /// Whether an arena is in host memory.
    pub(crate) fn is_on_host(&self, arena: usize) -> bool {
        self.pools.get(arena).is_some_and(|pool| pool.on_host)
    }

    /// The bytes of arenas in host memory that a block's bytes become, piece by piece.
    pub(crate) fn images_of(
        &self,
        block: &Block,
    ) -> impl Iterator<Item = (usize, Range<u64>)> + use<'_> {
        self.parts_on(block, true)
            .filter_map(|(_, work, part)| Some((work.dest.arena, work.image(part)?)))
    }

    /// The arenas that a block leads to, each once.
    pub(crate) fn arenas_of(&self, block: &Block) -> impl Iterator<Item = usize> + use<'_> {
        let mut last = None;
        // Pieces are packed in the order of the file, so that equal arenas of a pool come together, but for
        // those of short pieces.
        self.parts_of(block).filter_map(move |(_, work, _)| {
            let arena = work.dest.arena;
            (last.replace(arena) != Some(arena)).then_some(arena)
        })
    }

    /// The extents that fill the arena of a piece.
    pub(crate) fn extents_of(&self, piece: usize) -> Range<u32> {
        let Some((dest, _)) = self.places.get(piece) else { return 0..0 };
        let (first, last) = self.spans[dest.arena];
        // Pieces and extents have one order.
        self.owners.partition_point(|owner| *owner < first) as u32
            ..self.owners.partition_point(|owner| *owner <= last) as u32
    }

    /// For each arena, the pieces that lie in it: of `numbers`, those of the plan's pieces.
    pub(crate) fn by_arena(&self, numbers: &[usize]) -> Vec<Vec<(usize, Dest)>> {
        let mut by_arena = vec![Vec::new(); self.arenas.len()];
        for (number, (dest, _)) in numbers.iter().zip(&self.places) {
            by_arena[dest.arena].push((*number, *dest));
        }
        by_arena
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Counted byte by byte: what is wanted of a window, and where it goes.
        #[test]
        fn cuts_are_what_is_wanted_of_a_window(
            start in 0u64..50, len in 1u64..20, gap in 0u64..30, count in 1u64..12,
            at in 0u64..300, available in 0u64..300,
        ) {
            let runs = Runs { start, len, stride: len + gap, count };
            let piece = Piece::new(0, runs).unwrap();
            let dest = Dest { arena: 0, offset: 0, len: piece.len() };
            let work = Work { runs: piece.runs, cast: None, dest, reach: 0 };
            let window = start + at..start + at + available;
            let mut got = Vec::new();
            for cut in work.cuts(window.clone()) {
                for row in 0..cut.rows {
                    for byte in 0..cut.len {
                        let source = window.start + cut.at + row * cut.pitch + byte;
                        got.push((source, cut.position + row * cut.len + byte));
                    }
                }
            }
            let wanted = (0..count).flat_map(|run| {
                (0..len).map(move |byte| (start + run * (len + gap) + byte, run * len + byte))
            });
            let expected: Vec<_> = wanted.filter(|(source, _)| window.contains(source)).collect();
            let ends = expected.first().zip(expected.last());
            prop_assert_eq!(work.image(window), ends.map(|(first, last)| first.1..last.1 + 1));
            prop_assert_eq!(got, expected);
        }

        /// Blocks of any length together bring each byte of a piece to its place, once for each time that it
        /// is wanted, and are read of the file once.
        #[test]
        fn joined_runs_arrive_in_their_order(
            all in proptest::collection::vec((0u64..400, 1u64..30, 0u64..40, 1u64..9), 1..7),
            block in 1u64..9, gap in 0u64..60,
        ) {
            let runs = all.iter().map(|&(start, len, gap, count)| Runs { start, len, stride: len + gap, count });
            let piece = Piece::joined(0, runs.clone()).unwrap();
            let other = Piece::new(0, Runs { start: 1000, len: 7, stride: 7, count: 1 }).unwrap();
            let limits = Limits { align: 1, block: block * 16, gap, segment: u64::MAX };
            let sharing = Sharing { arena: 1 << 20, align: 8, apart: 0 };
            let pieces = [&piece, &other].map(|piece| (piece, Pool::HOST)).into_iter();
            let plan = PiecePlan::new(pieces, limits, sharing).unwrap();
            let mut got = vec![Vec::new(); piece.len() as usize];
            let mut read = 0;
            for block in plan.plan.blocks() {
                read += block.need;
                for (number, work, part) in plan.parts_of(block) {
                    prop_assert!(part.start >= block.offset && part.end <= block.need_end());
                    prop_assert!(std::ptr::eq(work, &plan.work[number as usize]));
                    for cut in work.cuts(part.clone()) {
                        for byte in 0..cut.rows * cut.len {
                            let (row, at) = (byte / cut.len, byte % cut.len);
                            let to = work.dest.offset + cut.position + byte;
                            if let Some(got) = got.get_mut(to as usize) {
                                got.push(part.start + cut.at + row * cut.pitch + at);
                            }
                        }
                    }
                }
            }
            let wanted = runs.flat_map(|runs| runs.ranges()).flatten();
            prop_assert_eq!(got, wanted.map(|byte| vec![byte]).collect::<Vec<_>>());
            prop_assert!(read <= 1007);
        }

        /// Whatever the numbers are, a piece that is made has a span and lengths that fit a file.
        #[test]
        fn pieces_are_sound_or_refused(
            start: u64, len: u64, stride: u64, count: u64, shift in 0u32..64, near in 0u64..6,
        ) {
            let [start, len, stride, count] = [start, len, stride, count].map(|n| n >> shift);
            // About as far apart as they are long, but for one case.
            let stride = if near < 5 { (len + near).saturating_sub(2) } else { stride };
            let runs = Runs { start, len, stride, count };
            let span = count.saturating_sub(1) as u128 * stride as u128 + len as u128;
            let sound = start as u128 + span <= i64::MAX as u128 && (count < 2 || stride >= len);
            let piece = Piece::new(0, runs);
            prop_assert_eq!(piece.is_ok(), sound);
            let Ok(piece) = piece else { return Ok(()) };
            prop_assert!(piece.source_len() as u128 == len as u128 * count as u128);
            if let Ok(wider) = piece.clone().converted(CastType::F8E4M3, CastType::F64) {
                prop_assert_eq!(wider.len(), piece.len() * 8);
            }
            let whole = len % 4 == 0 && (count < 2 || stride % 4 == 0);
            prop_assert_eq!(piece.clone().converted(CastType::F32, CastType::BF16).is_ok(), whole);
            prop_assert!(piece.converted(CastType::F32, CastType::F8E8M0).is_err());
        }
    }
}
