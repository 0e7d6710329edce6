//! Tensors whose bytes cannot be used where they would land: inner-dimension slices, conversions,
//! and tensors that their file leaves misaligned. Blocks pass through scratch memory, and what is
//! wanted of them is moved or converted into the tensor's final place.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fst_format::Runs;
use fst_gpu::cast::{self, CastType};
use fst_io::Extent;
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::sink::SinkError;

use crate::memory::Memory;
use crate::options::Item;

/// Where a tensor's final bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dest {
    pub(crate) arena: usize,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// A tensor, or a part of one, to bring into shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    /// Index of its source file.
    file: u32,
    /// First byte of the tensor in its file.
    start: u64,
    /// The wanted runs of bytes, from the tensor's start.
    runs: Runs,
    cast: Option<(CastType, CastType)>,
    /// Bytes that it becomes.
    len: u64,
}

impl Piece {
    /// All that is wanted of `item`.
    pub(crate) fn of(item: &Item, file: u32) -> Self {
        let (runs, cast, len) = (item.runs(), item.cast(), item.len());
        Self { file, start: item.info.file_range().start, runs, cast, len }
    }

    /// The bytes `range` of a file, unchanged.
    pub(crate) fn bytes(file: u32, range: Range<u64>) -> Self {
        let len = range.end - range.start;
        let runs = Runs { first: 0, len, stride: len, count: u64::from(len > 0) };
        Self { file, start: range.start, runs, cast: None, len }
    }

    /// Bytes wanted from the file.
    fn source_len(&self) -> u64 {
        self.runs.len * self.runs.count
    }
}

/// A piece that is planned.
#[derive(Debug)]
pub(crate) struct Work {
    /// First byte of the tensor in its file.
    pub(crate) start: u64,
    runs: Runs,
    pub(crate) cast: Option<(CastType, CastType)>,
    pub(crate) dest: Dest,
}

/// Rows of wanted bytes, equally long and equally far apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// First byte, from the start of the bytes at hand.
    pub(crate) at: u64,
    /// How many wanted bytes of the tensor lie before it.
    pub(crate) position: u64,
    /// Bytes of a row.
    pub(crate) len: u64,
    /// Bytes from row to row.
    pub(crate) pitch: u64,
    /// Number of rows.
    pub(crate) rows: u64,
}

impl Work {
    /// The part of the arena that bytes `at..at + available` of the tensor become.
    fn image(&self, at: u64, available: u64) -> Option<Range<u64>> {
        let mut cuts = self.cuts(at, available);
        let first = cuts.next()?;
        let last = cuts.last().unwrap_or(first);
        let (start, end) = (first.position, last.position + last.rows * last.len);
        let becomes = |position: u64| match self.cast {
            Some((from, to)) => position / from.size() as u64 * to.size() as u64,
            None => position,
        };
        Some(self.dest.offset + becomes(start)..self.dest.offset + becomes(end))
    }

    /// What is wanted of bytes `at..at + available` of the tensor: the rest of a run that began
    /// earlier, whole runs, and the beginning of one that goes on.
    pub(crate) fn cuts(&self, at: u64, available: u64) -> impl Iterator<Item = Cut> + use<> {
        let Runs { first, len, stride, count } = self.runs;
        let end = at + available;
        let (stride, bytes_of) = (stride.max(1), move |run: u64| first + run * stride);
        // Runs that begin before `at`, and runs that end by `end`.
        let begun = if at > first { (at - first).div_ceil(stride).min(count) } else { 0 };
        let ended =
            if end >= first + len { ((end - first - len) / stride + 1).min(count) } else { 0 };
        let single = move |run: u64| {
            let (lo, hi) = (bytes_of(run).max(at), (bytes_of(run) + len).min(end));
            (run < count && lo < hi).then(|| Cut {
                at: lo - at,
                position: run * len + (lo - bytes_of(run)),
                len: hi - lo,
                pitch: hi - lo,
                rows: 1,
            })
        };
        let head = begun.checked_sub(1).and_then(single);
        let whole = (begun < ended).then(|| Cut {
            at: bytes_of(begun) - at,
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

/// What to read and where it goes. Pure.
#[derive(Debug)]
pub(crate) struct TransformPlan {
    pub(crate) plan: ReadPlan,
    work: Vec<Work>,
    /// For each extent of the plan, the index of its work.
    owners: Vec<u32>,
    /// Length in bytes of each arena, and the source bytes that it waits for.
    pub(crate) arenas: Vec<(u64, u64)>,
    /// For each arena, its first piece and its last.
    spans: Vec<(u32, u32)>,
}

/// Alignment of tensors in a host arena, in bytes: a cache line.
pub(crate) const HOST_ALIGN: u64 = 64;

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

impl TransformPlan {
    /// Plans for `items`, each with the index of its source file, sorted by file and offset.
    pub(crate) fn new(
        items: &[(&Item, u32)],
        limits: Limits,
        sharing: Sharing,
    ) -> Result<Self, fst_io::Error> {
        let pieces: Vec<_> = items.iter().map(|(item, file)| Piece::of(item, *file)).collect();
        Self::of_pieces(&pieces, limits, sharing)
    }

    /// Plans for pieces, sorted by file and offset.
    pub(crate) fn of_pieces(
        pieces: &[Piece],
        limits: Limits,
        Sharing { arena, align, apart }: Sharing,
    ) -> Result<Self, fst_io::Error> {
        let mut extents = Vec::new();
        let mut owners = Vec::new();
        let mut arenas: Vec<(u64, u64)> = Vec::new();
        let mut work: Vec<Work> = Vec::with_capacity(pieces.len());
        let mut spans: Vec<(u32, u32)> = Vec::new();
        // The arenas that are being filled: that of short pieces, and that of the others.
        let mut open: [Option<usize>; 2] = [None; 2];
        for (index, piece) in pieces.iter().enumerate() {
            let Piece { file, start, runs, cast, len } = *piece;
            let mut push = |range: Range<u64>| {
                extents.push(Extent::new(file, start + range.start..start + range.end));
                owners.push(index as u32);
            };
            if runs.count > 0 && runs.stride - runs.len <= limits.gap {
                push(runs.first..runs.first + (runs.count - 1) * runs.stride + runs.len);
            } else {
                (0..runs.count).map(|k| runs.first + k * runs.stride).for_each(|at| {
                    push(at..at + runs.len);
                });
            }
            let kind = usize::from(len >= apart);
            let free = |at: usize| arenas[at].0.next_multiple_of(align);
            let (at, offset) = match open[kind].map(|at| (at, free(at))) {
                Some((at, offset)) if offset + len <= arena => (at, offset),
                _ => (arenas.len(), 0),
            };
            if at == arenas.len() {
                arenas.push((0, 0));
                spans.push((index as u32, 0));
                // Short pieces are soon complete if they wait for their neighbours only.
                if kind == 1 {
                    open[0] = None;
                }
            }
            open[kind] = Some(at);
            spans[at].1 = index as u32;
            let (end, missing) = &mut arenas[at];
            (*end, *missing) = (offset + len, *missing + piece.source_len());
            let dest = Dest { arena: at, offset, len };
            work.push(Work { start, runs, cast, dest });
        }
        // A block that led to two arenas would need the memory of both at once. Where each piece has
        // an arena of its own, or all arenas may be there at once, blocks may have any pieces.
        let group = |extent: usize| match arena {
            _ if apart > 0 => 0,
            0 => 0,
            _ => work[owners[extent] as usize].dest.arena,
        };
        let plan = ReadPlan::grouped(extents, group, limits)?;
        Ok(Self { plan, work, owners, arenas, spans })
    }

    /// The tensors that have bytes in a block, and the part of the file where these are.
    pub(crate) fn parts_of(
        &self,
        block: &Block,
    ) -> impl Iterator<Item = (u32, &Work, Range<u64>)> + use<'_> {
        let (start, end) = (block.offset, block.need_end());
        block.extents.clone().filter_map(move |extent| {
            let owner = *self.owners.get(extent as usize)?;
            let work = self.work.get(owner as usize)?;
            let extent = self.plan.extents().get(extent as usize)?;
            let part = extent.offset.max(start)..extent.end().min(end);
            (part.start < part.end).then_some((owner, work, part))
        })
    }

    /// The bytes of arenas that a block's bytes become, tensor by tensor.
    fn images_of(&self, block: &Block) -> impl Iterator<Item = (usize, Range<u64>)> + use<'_> {
        self.parts_of(block).filter_map(|(_, work, part)| {
            let image = work.image(part.start - work.start, part.end - part.start)?;
            Some((work.dest.arena, image))
        })
    }

    /// The arenas that a block leads to, each once.
    pub(crate) fn arenas_of(&self, block: &Block) -> impl Iterator<Item = usize> + use<'_> {
        let mut last = None;
        // Tensors are packed in the order of the file, so that equal arenas come together, but for those
        // of short pieces.
        self.parts_of(block).filter_map(move |(_, work, _)| {
            let arena = work.dest.arena;
            (last.replace(arena) != Some(arena)).then_some(arena)
        })
    }

    /// Bytes of arenas that must be in memory at once: a block needs all that it leads to. (Arenas
    /// come in the order of the blocks, so that the first block that is not done finds those of all
    /// blocks in front of it full and gone.)
    pub(crate) fn least_memory(&self) -> u64 {
        let of_block = |block| self.arenas_of(block).map(|arena| self.arenas[arena].0).sum();
        self.plan.blocks().iter().map(of_block).max().unwrap_or(0)
    }

    /// The extents that fill the arena of a piece.
    pub(crate) fn extents_of(&self, piece: usize) -> Range<u32> {
        let Some((first, last)) = self.work.get(piece).map(|work| self.spans[work.dest.arena])
        else {
            return 0..0;
        };
        // Pieces and extents have one order.
        self.owners.partition_point(|owner| *owner < first) as u32
            ..self.owners.partition_point(|owner| *owner <= last) as u32
    }

    /// Where each item goes, in the order given.
    pub(crate) fn dests(&self) -> impl Iterator<Item = Dest> + '_ {
        self.work.iter().map(|work| work.dest)
    }
}

/// Elements to convert that lie across two blocks, by tensor and position. Only tensors that their
/// file leaves misaligned have any.
#[derive(Debug, Default)]
pub(crate) struct TornElements(Mutex<HashMap<(u32, u64), Torn>>);

/// An element of which a part has arrived.
#[derive(Debug, Default)]
struct Torn {
    bytes: [u8; 8],
    seen: usize,
}

/// A converted element.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mended {
    /// First byte in the loaded tensor.
    pub(crate) at: u64,
    /// Bytes of the element.
    pub(crate) len: usize,
    bytes: [u8; 8],
}

impl Mended {
    /// The element's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl TornElements {
    /// Keeps a part of an element (`position` counts wanted source bytes) until the rest has come,
    /// then converts the element.
    pub(crate) fn join(
        &self,
        owner: u32,
        (from, to): (CastType, CastType),
        position: u64,
        part: &[u8],
    ) -> Result<Option<Mended>, SinkError> {
        if part.is_empty() {
            return Ok(None);
        }
        let size = from.size();
        let element = position / size as u64;
        let mut torn = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let whole = torn.entry((owner, element)).or_default();
        let offset = (position % size as u64) as usize;
        whole.bytes[offset..offset + part.len()].copy_from_slice(part);
        whole.seen += part.len();
        if whole.seen < size {
            return Ok(None);
        }
        let whole = whole.bytes;
        torn.remove(&(owner, element));
        let mut mended = Mended { at: element * to.size() as u64, len: to.size(), bytes: [0; 8] };
        cast::cast(&whole[..size], from, &mut mended.bytes[..to.size()], to)?;
        Ok(Some(mended))
    }
}

/// The whole elements in a part of a run, and the parts of elements at its ends, as lengths in
/// bytes. `position` counts the wanted source bytes before the part.
pub(crate) fn whole_elements(position: u64, len: u64, size: u64) -> (u64, u64, u64) {
    let head = ((size - position % size) % size).min(len);
    let whole = (len - head) / size * size;
    (head, whole, len - head - whole)
}

/// Carries a [`TransformPlan`] out, block by block, from any thread.
pub(crate) struct Transform<'a, M> {
    plan: &'a TransformPlan,
    memory: M,
    torn: TornElements,
    /// Up to where each arena is backed with memory.
    backed: Vec<AtomicU64>,
    touch: AtomicU64,
    touch_bytes: AtomicU64,
}

/// What one page fault brings where huge pages are to be had, in bytes.
const FAULT: u64 = 2 << 20;

impl<'a, M: Memory> Transform<'a, M> {
    pub(crate) fn new(plan: &'a TransformPlan, memory: M) -> Self {
        Self {
            plan,
            memory,
            torn: TornElements::default(),
            backed: plan.arenas.iter().map(|_| AtomicU64::new(0)).collect(),
            touch: AtomicU64::new(0),
            touch_bytes: AtomicU64::new(0),
        }
    }

    /// Time spent on backing arenas with memory, over all threads, and how many bytes.
    pub(crate) fn touched(&self) -> (Duration, u64) {
        (Duration::from_nanos(self.touch.load(Relaxed)), self.touch_bytes.load(Relaxed))
    }

    /// Backs with memory what a block leads to. Done while its read waits for its turn, this costs
    /// nothing; page faults in [`take`](Self::take) would keep the reader from its device.
    ///
    /// Arenas are filled from front to back, near enough: what lies before the furthest byte is
    /// taken for done.
    fn back(&self, block: &Block) -> Result<(), SinkError> {
        for (arena, image) in self.plan.images_of(block) {
            let (Some(backed), Some((len, _))) =
                (self.backed.get(arena), self.plan.arenas.get(arena))
            else {
                continue;
            };
            let end = image.end.next_multiple_of(FAULT).min(*len);
            let start = backed.fetch_max(end, Relaxed);
            if start < end {
                let began = Instant::now();
                self.memory.populate(arena, start as usize..end as usize)?;
                self.touch.fetch_add(began.elapsed().as_nanos() as u64, Relaxed);
                self.touch_bytes.fetch_add(end - start, Relaxed);
            }
        }
        Ok(())
    }

    /// Whether all arenas that a block leads to have memory.
    pub(crate) fn admit(&self, block: &Block, wait: bool) -> Result<bool, SinkError> {
        for arena in self.plan.arenas_of(block) {
            if !self.memory.ready(arena, wait)? {
                return Ok(false);
            }
        }
        self.back(block)?;
        Ok(true)
    }

    /// Takes what is wanted out of a block.
    pub(crate) fn take(&self, block: &Block, bytes: &[u8]) -> Result<(), SinkError> {
        for (owner, work, part) in self.plan.parts_of(block) {
            let within = (part.start - block.offset) as usize..(part.end - block.offset) as usize;
            let Some(here) = bytes.get(within) else {
                return Err(format!("block at {} came short", block.offset).into());
            };
            let moved = self.scatter(owner, work, part.start - work.start, here)?;
            // SAFETY: `scatter` wrote what these source bytes become. Source bytes arrive once
            // (the plan's blocks are disjoint), and each belongs to one place.
            unsafe { self.memory.fill(work.dest.arena, moved)? };
        }
        Ok(())
    }

    /// Moves the wanted parts of `bytes`, which start at byte `at` of the tensor; says how many
    /// source bytes were wanted.
    fn scatter(&self, owner: u32, work: &Work, at: u64, bytes: &[u8]) -> Result<u64, SinkError> {
        let mut moved = 0;
        for cut in work.cuts(at, bytes.len() as u64) {
            for row in 0..cut.rows {
                let start = (cut.at + row * cut.pitch) as usize;
                let part = &bytes[start..start + cut.len as usize];
                let position = cut.position + row * cut.len;
                match work.cast {
                    None => self.copy(work.dest, position, part)?,
                    Some(types) => self.convert(owner, work.dest, types, position, part)?,
                }
            }
            moved += cut.rows * cut.len;
        }
        Ok(moved)
    }

    fn convert(
        &self,
        owner: u32,
        dest: Dest,
        (from, to): (CastType, CastType),
        position: u64,
        part: &[u8],
    ) -> Result<(), SinkError> {
        let (size, out_size) = (from.size(), to.size());
        let (head, whole, _) = whole_elements(position, part.len() as u64, size as u64);
        let (head, rest) = part.split_at(head as usize);
        let (whole, tail) = rest.split_at(whole as usize);
        let element = (position + head.len() as u64) / size as u64;
        self.torn_part(owner, dest, (from, to), position, head)?;
        let tail_at = position + (head.len() + whole.len()) as u64;
        self.torn_part(owner, dest, (from, to), tail_at, tail)?;
        if whole.is_empty() {
            return Ok(());
        }
        let out_len = whole.len() / size * out_size;
        self.write(dest, element * out_size as u64, out_len, |out| {
            cast::cast(whole, from, out, to).map_err(Into::into)
        })
    }

    fn torn_part(
        &self,
        owner: u32,
        dest: Dest,
        types: (CastType, CastType),
        position: u64,
        part: &[u8],
    ) -> Result<(), SinkError> {
        match self.torn.join(owner, types, position, part)? {
            Some(whole) => self.copy(dest, whole.at, whole.bytes()),
            None => Ok(()),
        }
    }

    /// Copies `part` to byte `at` of a tensor.
    fn copy(&self, dest: Dest, at: u64, part: &[u8]) -> Result<(), SinkError> {
        let range = range_in(dest, at, part.len())?;
        // SAFETY: as in `write`.
        let copied = unsafe { self.memory.copy(dest.arena, range.start, part) }?;
        if copied { Ok(()) } else { Err(missing(dest, at, part.len())) }
    }

    /// Lets `fill` write bytes `at..at + len` of a tensor.
    fn write(
        &self,
        dest: Dest,
        at: u64,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        let range = range_in(dest, at, len)?;
        // SAFETY: tensors have disjoint places in their arena, and within a tensor each byte is
        // the image of source bytes that arrive once (a torn element is written by whoever brings
        // its last part). Nobody reads the arena before all of it is filled.
        let written = unsafe { self.memory.write(dest.arena, range, fill) }?;
        if written { Ok(()) } else { Err(missing(dest, at, len)) }
    }
}

/// Bytes `at..at + len` of a tensor, in its arena.
fn range_in(dest: Dest, at: u64, len: usize) -> Result<Range<usize>, SinkError> {
    if at.checked_add(len as u64).is_none_or(|end| end > dest.len) {
        return Err(missing(dest, at, len));
    }
    let start = (dest.offset + at) as usize;
    Ok(start..start + len)
}

fn missing(dest: Dest, at: u64, len: usize) -> SinkError {
    format!("arena {} has no bytes {at}..+{len}", dest.arena).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Told byte by byte: what is wanted of a window, and where it goes.
        #[test]
        fn cuts_are_what_is_wanted_of_a_window(
            first in 0u64..50, len in 1u64..20, gap in 0u64..30, count in 1u64..12,
            at in 0u64..300, available in 0u64..300,
        ) {
            let runs = Runs { first, len, stride: len + gap, count };
            let dest = Dest { arena: 0, offset: 0, len: len * count };
            let work = Work { start: 0, runs, cast: None, dest };
            let mut got = Vec::new();
            for cut in work.cuts(at, available) {
                for row in 0..cut.rows {
                    for byte in 0..cut.len {
                        let source = at + cut.at + row * cut.pitch + byte;
                        got.push((source, cut.position + row * cut.len + byte));
                    }
                }
            }
            let wanted = (0..count).flat_map(|run| {
                (0..len).map(move |byte| (first + run * (len + gap) + byte, run * len + byte))
            });
            let window = at..at + available;
            let expected: Vec<_> = wanted.filter(|(source, _)| window.contains(source)).collect();
            let image = work.image(at, available);
            let ends = expected.first().zip(expected.last());
            prop_assert_eq!(image, ends.map(|(first, last)| first.1..last.1 + 1));
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn torn_elements_are_mended_in_any_order() {
        let torn = TornElements::default();
        let types = (CastType::F32, CastType::F64);
        let bytes = 1.5f32.to_le_bytes();
        assert!(torn.join(0, types, 8 + 3, &bytes[3..]).unwrap().is_none());
        assert!(torn.join(1, types, 8, &bytes[..3]).unwrap().is_none(), "another tensor's");
        let mended = torn.join(0, types, 8, &bytes[..3]).unwrap().unwrap();
        assert_eq!((mended.at, mended.bytes()), (16, &1.5f64.to_le_bytes()[..]));
        assert_eq!(whole_elements(3, 10, 4), (1, 8, 1));
        assert_eq!(whole_elements(3, 1, 4), (1, 0, 0));
        assert_eq!(whole_elements(4, 3, 4), (0, 0, 3));
    }
}
