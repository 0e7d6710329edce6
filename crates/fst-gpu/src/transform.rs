//! What cannot be used where it would land: cuts, conversions, and bytes that their file leaves misaligned.
//! Blocks pass through scratch memory, and what is wanted of them is moved or converted into its place.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::scratch::Scratch;
use fst_io::sink::SinkError;
use fst_io::{Control, ReadOptions, ReadStats, SourceFile};

use crate::cast::{self, CastType};
use crate::memory::Memory;
use crate::piece::{Dest, PiecePlan, Work};

/// Bytes of scratch memory, in slots of [`SCRATCH_BLOCK`].
///
/// Little, in short slots: it stays in the processor's cache, where neither the device's writes nor
/// the copies out of it wait for memory. Half of each row of a 4.6 GB checkpoint came from a virtual
/// disk in 1.65 s with 16 or 24 slots of 512 KiB, in 1.9 with 10, in 2.0 with 64, and in 2.4 with
/// 16 of 2 MiB.
const SCRATCH: u64 = 12 << 20;
const SCRATCH_BLOCK: u64 = 512 << 10;
/// The same where files are not local, and a round trip takes longer than a copy.
const REMOTE_SCRATCH: u64 = 32 << 20;
const REMOTE_SCRATCH_BLOCK: u64 = 2 << 20;

/// How bytes of `files` are read through scratch memory.
pub(crate) fn scratch_limits(files: &[SourceFile]) -> Limits {
    let remote = files.iter().any(|file| file.source().is_some());
    let block = if remote { REMOTE_SCRATCH_BLOCK } else { SCRATCH_BLOCK };
    Limits { block, ..SourceFile::limits_of(files) }
}

/// Bytes of scratch memory for a plan with such limits.
pub(crate) fn scratch_bytes(plan: &ReadPlan) -> u64 {
    if plan.limits().block > SCRATCH_BLOCK { REMOTE_SCRATCH } else { SCRATCH }
}

/// Elements to convert that straddle two blocks, by piece and position. Only pieces that their file leaves
/// misaligned have any.
#[derive(Debug, Default)]
struct StraddlingElements(Mutex<HashMap<(u32, u64), Partial>>);

/// An element of which a part has arrived.
#[derive(Debug, Default)]
struct Partial {
    bytes: [u8; 8],
    seen: usize,
}

/// A straddling element that was joined and converted.
#[derive(Debug, Clone, Copy)]
struct JoinedElement {
    /// First byte in what the piece becomes.
    at: u64,
    /// Bytes of the element.
    len: usize,
    bytes: [u8; 8],
}

impl JoinedElement {
    /// The element's bytes.
    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl StraddlingElements {
    /// Keeps a part of an element (`position` counts wanted source bytes) until the rest has come,
    /// then converts the element.
    fn join(
        &self,
        owner: u32,
        (from, to): (CastType, CastType),
        position: u64,
        part: &[u8],
    ) -> Result<Option<JoinedElement>, SinkError> {
        if part.is_empty() {
            return Ok(None);
        }
        let size = from.size();
        let element = position / size as u64;
        let mut partial = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let whole = partial.entry((owner, element)).or_default();
        let offset = (position % size as u64) as usize;
        whole.bytes[offset..offset + part.len()].copy_from_slice(part);
        whole.seen += part.len();
        if whole.seen < size {
            return Ok(None);
        }
        let whole = whole.bytes;
        partial.remove(&(owner, element));
        let (at, len) = (element * to.size() as u64, to.size());
        let mut joined = JoinedElement { at, len, bytes: [0; 8] };
        cast::cast(&whole[..size], from, &mut joined.bytes[..len], to)?;
        Ok(Some(joined))
    }
}

/// The whole elements in a part of a run, and the parts of elements at its ends, as lengths in
/// bytes. `position` counts the wanted source bytes before the part.
fn whole_elements(position: u64, len: u64, size: u64) -> (u64, u64, u64) {
    let head = ((size - position % size) % size).min(len);
    let whole = (len - head) / size * size;
    (head, whole, len - head - whole)
}

/// Carries a [`PiecePlan`] out, block by block, from any thread.
pub(crate) struct Transform<'a, M> {
    plan: &'a PiecePlan,
    pub(crate) memory: M,
    straddling: StraddlingElements,
    /// Up to where each arena is backed with memory.
    backed: Vec<AtomicU64>,
    touch: AtomicU64,
    touch_bytes: AtomicU64,
}

/// What one page fault brings where huge pages are to be had, in bytes.
const FAULT: u64 = 2 << 20;

impl<'a, M: Memory> Transform<'a, M> {
    pub(crate) fn new(plan: &'a PiecePlan, memory: M) -> Self {
        Self {
            plan,
            memory,
            straddling: StraddlingElements::default(),
            backed: plan.arenas.iter().map(|_| AtomicU64::new(0)).collect(),
            touch: AtomicU64::new(0),
            touch_bytes: AtomicU64::new(0),
        }
    }

    /// Reads the plan's blocks through scratch memory, and carries the plan out on the way.
    pub(crate) fn read(
        &self,
        files: &[SourceFile],
        options: &ReadOptions,
        control: &Control,
    ) -> Result<ReadStats, fst_io::Error> {
        let admit = |block: &Block, wait| self.admit(block, wait);
        let prefer = |block: &Block| self.prefer(block);
        let take = |block: &Block, bytes: &[u8]| self.take(block, bytes);
        let plan = &self.plan.plan;
        let slots = (scratch_bytes(plan) / plan.limits().block).max(1) as usize;
        let sink = Scratch::new(plan, slots, &admit, &take)?.with_preference(&prefer);
        fst_io::read(files, plan, &sink, options, control).map(|stats| self.counted(stats))
    }

    /// The statistics of a read with what backing memory took, which is done inside of `reserve`, and a stage
    /// of its own.
    pub(crate) fn counted(&self, mut stats: ReadStats) -> ReadStats {
        let touch = Duration::from_nanos(self.touch.swap(0, Relaxed));
        stats.reserve = stats.reserve.saturating_sub(touch);
        stats.touch += touch;
        stats.touch_bytes += self.touch_bytes.swap(0, Relaxed);
        stats
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
                if self.memory.populate(arena, start as usize..end as usize)? {
                    self.touch.fetch_add(began.elapsed().as_nanos() as u64, Relaxed);
                    self.touch_bytes.fetch_add(end - start, Relaxed);
                }
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

    /// Whether all arenas that a block leads to have memory, be it before their turn.
    pub(crate) fn prefer(&self, block: &Block) -> Result<bool, SinkError> {
        for arena in self.plan.arenas_of(block) {
            if !self.memory.prefer(arena)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes what is wanted in host memory out of a block.
    pub(crate) fn take(&self, block: &Block, bytes: &[u8]) -> Result<(), SinkError> {
        for (owner, work, part) in self.plan.parts_on(block, true) {
            let within = (part.start - block.offset) as usize..(part.end - block.offset) as usize;
            let Some(here) = bytes.get(within) else {
                return Err(format!("block at {} came short", block.offset).into());
            };
            let moved = self.scatter(owner, work, part, here)?;
            // SAFETY: `scatter` wrote what these source bytes become. Source bytes arrive once
            // (the plan's blocks are disjoint), and each belongs to one place.
            unsafe { self.memory.fill(work.dest.arena, moved)? };
        }
        Ok(())
    }

    /// Moves the wanted parts of `bytes`, which are bytes `part` of the file; says how many were wanted.
    fn scatter(
        &self,
        owner: u32,
        work: &Work,
        part: Range<u64>,
        bytes: &[u8],
    ) -> Result<u64, SinkError> {
        let mut moved = 0;
        for cut in work.cuts(part) {
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
        let whole_at = position + head.len() as u64;
        for (at, part) in [(position, head), (whole_at + whole.len() as u64, tail)] {
            if let Some(joined) = self.straddling.join(owner, (from, to), at, part)? {
                self.copy(dest, joined.at, joined.bytes())?;
            }
        }
        if whole.is_empty() {
            return Ok(());
        }
        let out_len = whole.len() / size * out_size;
        self.write(dest, whole_at / size as u64 * out_size as u64, out_len, |out| {
            cast::cast(whole, from, out, to).map_err(Into::into)
        })
    }

    /// Copies `part` to byte `at` of a piece.
    fn copy(&self, dest: Dest, at: u64, part: &[u8]) -> Result<(), SinkError> {
        let range = range_in(dest, at, part.len())?;
        // SAFETY: as in `write`.
        let copied = unsafe { self.memory.copy(dest.arena, range.start, part) }?;
        if copied { Ok(()) } else { Err(missing(dest, at, part.len())) }
    }

    /// Lets `fill` write bytes `at..at + len` of a piece.
    fn write(
        &self,
        dest: Dest,
        at: u64,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        let range = range_in(dest, at, len)?;
        // SAFETY: pieces have disjoint places in their arena, and within a piece each byte is the
        // image of source bytes that arrive once (a straddling element is written by whoever brings
        // its last part). Nobody reads the arena before all of it is filled.
        let written = unsafe { self.memory.write(dest.arena, range, fill) }?;
        if written { Ok(()) } else { Err(missing(dest, at, len)) }
    }
}

/// Bytes `at..at + len` of a piece, in its arena.
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

    #[test]
    fn straddling_elements_are_joined_in_any_order() {
        let straddling = StraddlingElements::default();
        let types = (CastType::F32, CastType::F64);
        let bytes = 1.5f32.to_le_bytes();
        assert!(straddling.join(0, types, 8 + 3, &bytes[3..]).unwrap().is_none());
        assert!(straddling.join(1, types, 8, &bytes[..3]).unwrap().is_none(), "another piece's");
        let joined = straddling.join(0, types, 8, &bytes[..3]).unwrap().unwrap();
        assert_eq!((joined.at, joined.bytes()), (16, &1.5f64.to_le_bytes()[..]));
        assert_eq!(whole_elements(3, 10, 4), (1, 8, 1));
        assert_eq!(whole_elements(3, 1, 4), (1, 0, 0));
        assert_eq!(whole_elements(4, 3, 4), (0, 0, 3));
    }
}
