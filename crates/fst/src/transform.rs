//! Tensors whose bytes cannot be used where they would land: inner-dimension slices, conversions,
//! and tensors that their file leaves misaligned. Blocks pass through scratch memory, and what is
//! wanted of them is moved or converted into the tensor's final place.

use std::collections::HashMap;
use std::sync::Mutex;

use fst_format::Runs;
use fst_gpu::cast::{self, CastType};
use fst_io::Extent;
use fst_io::arenas::Arenas;
use fst_io::plan::{Block, Limits, ReadPlan};
use fst_io::sink::SinkError;

use crate::options::Item;

/// Where a tensor's final bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dest {
    pub(crate) arena: usize,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// One tensor to bring into shape.
#[derive(Debug)]
struct Work {
    /// First byte of the tensor in its file.
    start: u64,
    runs: Runs,
    cast: Option<(CastType, CastType)>,
    dest: Dest,
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
}

/// Alignment of tensors in their arena, in bytes: a cache line.
const ALIGN: u64 = 64;

impl TransformPlan {
    /// Plans for `items`, each with the index of its source file, sorted by file and offset.
    pub(crate) fn new(
        items: &[(&Item, u32)],
        limits: Limits,
        arena: u64,
    ) -> Result<Self, fst_io::Error> {
        let mut extents = Vec::new();
        let mut owners = Vec::new();
        let mut arenas: Vec<(u64, u64)> = Vec::new();
        let mut work = Vec::with_capacity(items.len());
        for (index, (item, file)) in items.iter().enumerate() {
            let (start, runs, len) = (item.info.file_range().start, item.runs(), item.len());
            let mut push = |range: std::ops::Range<u64>| {
                extents.push(Extent::new(*file, start + range.start..start + range.end));
                owners.push(index as u32);
            };
            if runs.count > 0 && runs.stride - runs.len <= limits.gap {
                push(runs.first..runs.first + (runs.count - 1) * runs.stride + runs.len);
            } else {
                (0..runs.count).map(|k| runs.first + k * runs.stride).for_each(|at| {
                    push(at..at + runs.len);
                });
            }
            let offset = match arenas.last_mut() {
                Some((end, missing)) if end.next_multiple_of(ALIGN) + len <= arena => {
                    let offset = end.next_multiple_of(ALIGN);
                    *end = offset + len;
                    *missing += item.source_len();
                    offset
                }
                _ => {
                    arenas.push((len, item.source_len()));
                    0
                }
            };
            let dest = Dest { arena: arenas.len() - 1, offset, len };
            work.push(Work { start, runs, cast: item.cast(), dest });
        }
        let plan = ReadPlan::new(extents, limits)?;
        Ok(Self { plan, work, owners, arenas })
    }

    /// Where each item goes, in the order given.
    pub(crate) fn dests(&self) -> impl Iterator<Item = Dest> + '_ {
        self.work.iter().map(|work| work.dest)
    }
}

/// An element of which a part has arrived.
#[derive(Debug, Default)]
struct Torn {
    bytes: [u8; 8],
    seen: usize,
}

/// Carries a [`TransformPlan`] out, block by block, from any thread.
pub(crate) struct Transform<'a> {
    plan: &'a TransformPlan,
    arenas: Arenas<'a>,
    /// Elements that lie across two blocks, by work and position. Only tensors that their file
    /// leaves misaligned have any.
    torn: Mutex<HashMap<(u32, u64), Torn>>,
}

impl<'a> Transform<'a> {
    pub(crate) fn new(plan: &'a TransformPlan, arenas: Arenas<'a>) -> Self {
        Self { plan, arenas, torn: Mutex::default() }
    }

    fn work_of(&self, block: &Block) -> impl Iterator<Item = (u32, &'a Work, Extent)> + use<'a> {
        let plan = self.plan;
        block.extents.clone().filter_map(move |extent| {
            let owner = *plan.owners.get(extent as usize)?;
            let work = plan.work.get(owner as usize)?;
            Some((owner, work, *plan.plan.extents().get(extent as usize)?))
        })
    }

    /// Whether all arenas that a block leads to have memory.
    pub(crate) fn admit(&self, block: &Block, wait: bool) -> Result<bool, SinkError> {
        let mut last = None;
        for (_, work, extent) in self.work_of(block) {
            if extent.len > 0 && last != Some(work.dest.arena) {
                if self.arenas.get(work.dest.arena, wait)?.is_none() {
                    return Ok(false);
                }
                last = Some(work.dest.arena);
            }
        }
        Ok(true)
    }

    /// Takes what is wanted out of a block.
    pub(crate) fn take(&self, block: &Block, bytes: &[u8]) -> Result<(), SinkError> {
        for (owner, work, extent) in self.work_of(block) {
            let lo = extent.offset.max(block.offset);
            let hi = extent.end().min(block.need_end());
            if lo >= hi {
                continue;
            }
            let Some(here) = bytes.get((lo - block.offset) as usize..(hi - block.offset) as usize)
            else {
                return Err(format!("block at {} came short", block.offset).into());
            };
            let moved = self.scatter(owner, work, lo - work.start, here)?;
            // SAFETY: `scatter` wrote what these source bytes become. Source bytes arrive once
            // (the plan's blocks are disjoint), and each belongs to one place.
            unsafe { self.arenas.fill(work.dest.arena, moved)? };
        }
        Ok(())
    }

    /// Moves the wanted parts of `bytes`, which start at byte `at` of the tensor; says how many
    /// source bytes were wanted.
    fn scatter(&self, owner: u32, work: &Work, at: u64, bytes: &[u8]) -> Result<u64, SinkError> {
        let Runs { first, len, stride, count } = work.runs;
        let end = at + bytes.len() as u64;
        let mut moved = 0;
        let mut run = at.saturating_sub(first) / stride.max(1);
        while run < count {
            let start = first + run * stride;
            if start >= end {
                break;
            }
            let (lo, hi) = (start.max(at), (start + len).min(end));
            if lo < hi {
                let part = &bytes[(lo - at) as usize..(hi - at) as usize];
                // Position among the wanted source bytes.
                let position = run * len + (lo - start);
                match work.cast {
                    None => self.write(work.dest, position, part.len(), |out| {
                        out.copy_from_slice(part);
                        Ok(())
                    })?,
                    Some(types) => self.convert(owner, work.dest, types, position, part)?,
                }
                moved += hi - lo;
            }
            run += 1;
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
        let lead = (size - (position % size as u64) as usize) % size;
        let (head, rest) = part.split_at(lead.min(part.len()));
        let (whole, tail) = rest.split_at(rest.len() / size * size);
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

    /// Keeps a part of an element until the rest has come, then converts the element.
    fn torn_part(
        &self,
        owner: u32,
        dest: Dest,
        (from, to): (CastType, CastType),
        position: u64,
        part: &[u8],
    ) -> Result<(), SinkError> {
        if part.is_empty() {
            return Ok(());
        }
        let size = from.size();
        let element = position / size as u64;
        let mut torn = self.torn.lock().unwrap_or_else(|e| e.into_inner());
        let whole = torn.entry((owner, element)).or_default();
        let offset = (position % size as u64) as usize;
        whole.bytes[offset..offset + part.len()].copy_from_slice(part);
        whole.seen += part.len();
        if whole.seen < size {
            return Ok(());
        }
        let whole = whole.bytes;
        torn.remove(&(owner, element));
        drop(torn);
        self.write(dest, element * to.size() as u64, to.size(), |out| {
            cast::cast(&whole[..size], from, out, to).map_err(Into::into)
        })
    }

    /// Lets `fill` write bytes `at..at + len` of a tensor.
    fn write(
        &self,
        dest: Dest,
        at: u64,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        let missing = || format!("arena {} has no bytes {at}..+{len}", dest.arena);
        let arena = self.arenas.get(dest.arena, true)?.ok_or_else(missing)?;
        if at.checked_add(len as u64).is_none_or(|end| end > dest.len) {
            return Err(missing().into());
        }
        let start = (dest.offset + at) as usize;
        // SAFETY: tensors have disjoint places in their arena, and within a tensor each byte is
        // the image of source bytes that arrive once (a torn element is written by whoever brings
        // its last part). Nobody reads the arena before all of it is filled.
        let out = unsafe { arena.slice_mut(start..start + len) }.ok_or_else(missing)?;
        fill(out)
    }
}
