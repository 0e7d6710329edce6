//! Who reads which part of what is read once, in which rounds, within which buffers.
//!
//! Tensors that are read once form a *line*, in the order of the files. The line is cut into one
//! segment per rank, a segment into *units* of a block's size. In round `k` every rank reads the
//! `k`-th unit of its segment and the units of the round are exchanged, so all ranks read and all
//! links work at once. A line is stored as tensor numbers, their start positions and one border per
//! rank; everything else follows from these.

use std::ops::Range;

use crate::tensor::TensorDesc;

/// Borders between readers and units fall on this multiple of the file offset where the tensor allows,
/// so that direct I/O does not read a page twice.
const ALIGN: u64 = 4096;

/// How the bytes of a line reach the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LineKind {
    /// Each rank gets from each unit what it keeps.
    Scatter,
    /// Each rank gets each unit whole.
    Broadcast,
}

/// Bytes of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tensor, as an index into the plan's tensors.
    pub tensor: u32,
    /// Bytes from the start of its data.
    pub range: Range<u64>,
}

#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) kind: LineKind,
    tensors: Vec<u32>,
    /// One more than tensors: where each starts on the line.
    starts: Vec<u64>,
    /// One more than ranks: rank `r` reads positions `borders[r]..borders[r + 1]`.
    pub(crate) borders: Vec<u64>,
}

impl Line {
    /// A line of `tensors` (in the order of the files), cut among the ranks by their shares.
    pub(crate) fn new(
        kind: LineKind,
        tensors: Vec<u32>,
        table: &[TensorDesc],
        shares: &[f64],
    ) -> Self {
        let mut starts = Vec::with_capacity(tensors.len() + 1);
        let mut end = 0;
        starts.push(0);
        for &tensor in &tensors {
            end += table[tensor as usize].byte_len();
            starts.push(end);
        }
        let mut line = Self { kind, tensors, starts, borders: vec![0] };
        let (total, mut sum) = (line.total(), 0.0);
        for (index, share) in shares.iter().enumerate() {
            sum += share;
            let nominal =
                if index + 1 == shares.len() { total } else { (sum * total as f64) as u64 };
            let low = line.borders[index];
            line.borders.push(line.aligned(nominal.min(total), table).max(low));
        }
        // A rank without share must not get the rest that rounding leaves.
        if let Some(last) = shares.iter().rposition(|&share| share > 0.0) {
            line.borders[last + 1..].fill(total);
        }
        line
    }

    /// The positions that a rank reads.
    pub(crate) fn segment(&self, rank: u32) -> Range<u64> {
        let border = |index: usize| self.borders.get(index).copied().unwrap_or(self.total());
        border(rank as usize)..border(rank as usize + 1)
    }

    pub(crate) fn total(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// The tensor at a position below the total.
    fn tensor_at(&self, pos: u64) -> usize {
        self.starts.partition_point(|&start| start <= pos) - 1
    }

    /// The next place at or after `pos` where the file offset is aligned or a tensor ends.
    fn aligned(&self, pos: u64, table: &[TensorDesc]) -> u64 {
        if pos >= self.total() {
            return self.total();
        }
        let index = self.tensor_at(pos);
        let start = self.starts[index];
        if pos == start {
            return pos;
        }
        let file = table[self.tensors[index] as usize].file_range.start;
        let up = (file + (pos - start)).next_multiple_of(ALIGN);
        (up - file + start).min(self.starts[index + 1])
    }

    /// The pieces of positions `range`, empty tensors left out.
    pub(crate) fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece> + '_ {
        let mut pos = range.start;
        let mut index = if range.start < range.end { self.tensor_at(pos) } else { 0 };
        std::iter::from_fn(move || {
            if pos >= range.end {
                return None;
            }
            while self.starts[index + 1] <= pos {
                index += 1;
            }
            let (start, end) = (self.starts[index], self.starts[index + 1].min(range.end));
            let piece = Piece { tensor: self.tensors[index], range: pos - start..end - start };
            pos = end;
            Some(piece)
        })
    }

    /// Positions of the `round`-th unit of a rank; empty when it has no more.
    pub(crate) fn unit(
        &self,
        rank: u32,
        round: u64,
        block: u64,
        table: &[TensorDesc],
    ) -> Range<u64> {
        let segment = self.segment(rank);
        let step = step(block);
        let at = |round: u64| match segment.start.checked_add(round.saturating_mul(step)) {
            Some(pos) if pos < segment.end => self.aligned(pos, table).min(segment.end),
            _ => segment.end,
        };
        at(round)..at(round + 1)
    }

    /// Bytes of the longest segment.
    pub(crate) fn longest_segment(&self) -> u64 {
        self.borders.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }

    /// Rounds until every rank has read its segment.
    pub(crate) fn rounds(&self, block: u64) -> u64 {
        self.longest_segment().div_ceil(step(block))
    }
}

/// From one unit to the next. Aligning moves a border up by less than `ALIGN`, and a unit may start up to
/// `ALIGN` into its block (congruent to the file offset): it never outgrows the block.
fn step(block: u64) -> u64 {
    block - 2 * ALIGN
}

/// The staging buffers of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// Bytes of a block: the most that a unit holds.
    pub block: u64,
    /// Blocks that units are read into (one read while another is sent).
    pub read_blocks: u32,
    /// Bytes for messages gathered from strided parts of one unit.
    pub pack: u64,
    /// Blocks that arrive at a time and cannot go straight to their place; also the number of
    /// peers that a rank sends to and receives from in one step.
    pub receive_blocks: u32,
    /// The most bytes that a rank reads straight to their place at a time, while no block is free.
    pub direct: u64,
}

/// Units are between these sizes, if the budget allows.
const BLOCK: Range<u64> = 64 << 10..32 << 20;

impl Buffers {
    /// Blocks that fit into `budget` bytes, where a byte goes to at most `copies` other ranks of
    /// `world`. The error is the smallest budget that works.
    pub(crate) fn fit(budget: u64, world: u32, copies: u64) -> Result<Self, u64> {
        let read_blocks = 2;
        let peers = u64::from(world.saturating_sub(1));
        let parts = |receive: u64| u64::from(read_blocks) + copies + receive;
        // Few steps while blocks stay large, else fewer peers at a time.
        let receive = [8, 4, 2, 1]
            .into_iter()
            .map(|receive| peers.clamp(1, receive))
            .find(|&receive| budget / parts(receive) >= 4 << 20)
            .unwrap_or(1);
        let block = (budget / parts(receive)).min(BLOCK.end) / ALIGN * ALIGN;
        if block < BLOCK.start {
            return Err(BLOCK.start * parts(1));
        }
        let receive_blocks = receive as u32;
        let (pack, direct) = (block * copies, block * 4);
        Ok(Self { block, read_blocks, pack, receive_blocks, direct })
    }

    /// Blocks that are no longer than what passes through them: segments of `segment` bytes at most,
    /// and pieces of `staged` bytes at most that are read for the rank itself.
    pub(crate) fn bounded(mut self, segment: u64, staged: u64) -> Self {
        let unit = if segment > 0 { segment.saturating_add(2 * ALIGN) } else { 0 };
        let block = unit.max(staged).max(BLOCK.start).checked_next_multiple_of(ALIGN);
        let block = block.map_or(self.block, |block| block.min(self.block));
        self.pack = self.pack / self.block * block;
        self.block = block;
        self
    }

    /// Bytes of the blocks that units are read into.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.block * u64::from(self.read_blocks)
    }

    /// Bytes in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.block * u64::from(self.read_blocks + self.receive_blocks) + self.pack
    }
}
