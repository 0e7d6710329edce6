//! The read plan: extents that are wanted become aligned blocks that are read. Pure: no file is
//! touched here.
//!
//! Extents of a file that touch, or that lie closer than [`Limits::gap`], are read as one
//! [`Segment`]; a segment is covered by [`Block`]s whose borders are multiples of
//! [`Limits::align`], so that each can be one direct read. Memory for a segment that starts at an
//! aligned address therefore receives all of its blocks in place, ragged edges included.

use std::ops::Range;

use crate::extent::Extent;

/// What bounds the shape of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Block borders are multiples of this many bytes, a power of two: what direct I/O asks for.
    pub align: u64,
    /// Longest block in bytes; rounded down to a multiple of `align`, at least one `align`.
    pub block: u64,
    /// Two extents of a file with at most this many unwanted bytes between them are read as one.
    pub gap: u64,
    /// Segments are cut between extents rather than grow past this many bytes. A single longer
    /// extent is a segment of its own.
    pub segment: u64,
}

impl Limits {
    /// The smallest alignment used: a page, which all direct I/O accepts that reports nothing.
    pub const MIN_ALIGN: u64 = 4096;
    /// Block length used unless something better is known: whole huge pages, and few enough of
    /// them to plan and deliver. The engines read a block by shorter requests, which are what a
    /// device sees, so that its rate hardly depends on this.
    pub const DEFAULT_BLOCK: u64 = 4 << 20;
    /// Largest gap read over: where one request costs as much as the bytes.
    pub const DEFAULT_GAP: u64 = 64 << 10;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            align: Self::MIN_ALIGN,
            block: Self::DEFAULT_BLOCK,
            gap: Self::DEFAULT_GAP,
            segment: u64::MAX,
        }
    }
}

/// One read: an aligned range of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Position of this block in [`ReadPlan::blocks`].
    pub index: u32,
    /// Index of the file.
    pub file: u32,
    /// Index of the segment that this block is a part of.
    pub segment: u32,
    /// First byte in the file, aligned.
    pub offset: u64,
    /// Length in bytes, aligned; the last block of a file may reach past its end.
    pub len: u64,
    /// How many bytes from `offset` must arrive: up to the last wanted byte.
    pub need: u64,
    /// The extents, as indices into [`ReadPlan::extents`], that have bytes in this block.
    pub extents: Range<u32>,
}

impl Block {
    /// One past the last byte that must arrive, from the start of the file.
    pub fn need_end(&self) -> u64 {
        self.offset + self.need
    }
}

/// A range of a file whose blocks are adjacent, and so can land in one piece of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Index of the file.
    pub file: u32,
    /// First byte in the file, aligned down.
    pub start: u64,
    /// One past the last byte, aligned up: may lie past the end of the file.
    pub end: u64,
    /// The blocks of this segment.
    pub blocks: Range<u32>,
    /// The extents of this segment.
    pub extents: Range<u32>,
}

impl Segment {
    /// Bytes of memory that the segment needs when it lands in place.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there is nothing to read; never so in a plan.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

/// Which blocks to read for a list of extents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadPlan {
    limits: Limits,
    extents: Vec<Extent>,
    segments: Vec<Segment>,
    blocks: Vec<Block>,
}

/// Why extents cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The alignment is not a power of two.
    #[error("alignment of {align} bytes is not a power of two")]
    Alignment {
        /// The alignment asked for.
        align: u64,
    },
    /// Extents must be sorted by file and offset, and must not overlap.
    #[error(
        "extent {index} (file {file}, offset {offset}) starts before the one in front of it ends"
    )]
    Unsorted {
        /// Position of the offending extent.
        index: usize,
        /// Its file.
        file: u32,
        /// Its first byte.
        offset: u64,
    },
    /// The extent's end does not fit into 63 bits, which is what files can hold.
    #[error("extent {index} (file {file}, offset {offset}, {len} bytes) ends past any file's end")]
    TooLong {
        /// Position of the offending extent.
        index: usize,
        /// Its file.
        file: u32,
        /// Its first byte.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// More blocks or extents than 32-bit indices can tell apart.
    #[error("the plan has more than {} entries; use larger blocks", u32::MAX)]
    TooMany,
}

impl ReadPlan {
    /// Plans the reading of `extents`, which are sorted by file and offset and do not overlap.
    /// Extents of zero bytes are kept, and belong to no block.
    ///
    /// # Errors
    ///
    /// [`PlanError`] when the extents are not sorted, overlap or overflow, or when `limits.align`
    /// is not a power of two.
    pub fn new(extents: Vec<Extent>, limits: Limits) -> Result<Self, PlanError> {
        Self::grouped(extents, |_| 0, limits)
    }

    /// The same, with no block that has bytes of two groups: where the group of an extent, given
    /// by its index, differs from that of the extent before, a new segment begins. The pages that
    /// two groups share are read for each.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn grouped(
        extents: Vec<Extent>,
        group: impl Fn(usize) -> usize,
        limits: Limits,
    ) -> Result<Self, PlanError> {
        check(&extents, &limits)?;
        let limits =
            Limits { block: (limits.block / limits.align).max(1) * limits.align, ..limits };
        let mut plan = Self { limits, segments: Vec::new(), blocks: Vec::new(), extents };
        let mut next = 0;
        while next < plan.extents.len() {
            next = plan.push_segment(next, &group)?;
        }
        Ok(plan)
    }

    /// Appends the segment that starts with extent number `first`; says which extent comes next.
    fn push_segment(
        &mut self,
        first: usize,
        group: impl Fn(usize) -> usize,
    ) -> Result<usize, PlanError> {
        let head = self.extents[first];
        if head.len == 0 {
            return Ok(first + 1);
        }
        let align = self.limits.align;
        let start = head.offset & !(align - 1);
        let mut end = head.end();
        let mut next = first + 1;
        for extent in &self.extents[next..] {
            if extent.file != head.file {
                break;
            }
            if extent.len != 0 {
                let fits = extent.end() - start <= self.limits.segment;
                let far = extent.offset - end > self.limits.gap;
                if far || !fits || group(next) != group(first) {
                    break;
                }
                end = extent.end();
            }
            next += 1;
        }
        let segment = index(self.segments.len())?;
        let first_block = index(self.blocks.len())?;
        // Before any is made: a sparse file can be longer than the memory for its plan.
        let more = (end - start).div_ceil(self.limits.block);
        index(usize::try_from(more.saturating_add(first_block.into())).unwrap_or(usize::MAX))?;
        let mut extent = first;
        let mut offset = start;
        while offset < end {
            // Borders at multiples of the block length keep huge pages and device stripes whole.
            let border = (offset / self.limits.block + 1) * self.limits.block;
            let stop = border.min(end.next_multiple_of(align));
            while extent < next && self.extents[extent].end() <= offset {
                extent += 1;
            }
            let mut last = extent;
            let mut need_end = offset;
            while last < next && self.extents[last].offset < stop {
                need_end = need_end.max(self.extents[last].end().min(stop));
                last += 1;
            }
            if need_end > offset {
                self.blocks.push(Block {
                    index: index(self.blocks.len())?,
                    file: head.file,
                    segment,
                    offset,
                    len: stop - offset,
                    need: need_end - offset,
                    extents: index(extent)?..index(last)?,
                });
            }
            offset = stop;
        }
        self.segments.push(Segment {
            file: head.file,
            start,
            end: end.next_multiple_of(align),
            blocks: first_block..index(self.blocks.len())?,
            extents: index(first)?..index(next)?,
        });
        Ok(next)
    }

    /// The limits that the plan keeps to.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The extents as they were given.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Runs of adjacent blocks, in the order of the extents.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// All reads, in the order of the extents.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The same plan without the blocks that `keep` says no to, for reads that share the work.
    /// Extents and segments keep their numbers.
    #[must_use]
    pub fn only(&self, mut keep: impl FnMut(&Block) -> bool) -> Self {
        let mut plan = Self { blocks: Vec::new(), ..self.clone() };
        for segment in &mut plan.segments {
            let first = plan.blocks.len() as u32;
            let range = segment.blocks.start as usize..segment.blocks.end as usize;
            for block in self.blocks[range].iter().filter(|block| keep(block)) {
                plan.blocks.push(Block { index: plan.blocks.len() as u32, ..block.clone() });
            }
            segment.blocks = first..plan.blocks.len() as u32;
        }
        plan
    }

    /// Bytes that were asked for.
    pub fn bytes_asked(&self) -> u64 {
        self.extents.iter().map(|e| e.len).sum()
    }

    /// Bytes that the blocks must bring: those asked for, the gaps read over and aligned starts.
    pub fn bytes_read(&self) -> u64 {
        self.blocks.iter().map(|b| b.need).sum()
    }
}

fn index(n: usize) -> Result<u32, PlanError> {
    u32::try_from(n).map_err(|_| PlanError::TooMany)
}

fn check(extents: &[Extent], limits: &Limits) -> Result<(), PlanError> {
    if !limits.align.is_power_of_two() {
        return Err(PlanError::Alignment { align: limits.align });
    }
    // One block beyond the end must still be a valid file offset.
    let ceiling =
        (i64::MAX as u64).saturating_sub(limits.align).saturating_sub(limits.block.min(1 << 40));
    let mut before: Option<&Extent> = None;
    for (index, extent) in extents.iter().enumerate() {
        let Extent { file, offset, len } = *extent;
        if offset.checked_add(len).is_none_or(|end| end > ceiling) {
            return Err(PlanError::TooLong { index, file, offset, len });
        }
        if let Some(before) = before
            && (file, offset) < (before.file, before.end())
        {
            return Err(PlanError::Unsorted { index, file, offset });
        }
        before = Some(extent);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
