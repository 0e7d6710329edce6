//! The reading thread: units of the coming rounds into blocks, and what the rank keeps for itself.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Instant;

use super::{ExchangeReport, Landing, Region};
use crate::backend::{Arriving, Backend, Cause, CopyAt, ReadAt};
use crate::error::ExchangeError;
use crate::group::Group;
use crate::rank::{DirectRead, RankPlan, Round};
use crate::schedule::Piece;
use crate::tensor::Strided;

/// A block with the bytes of a unit, from `addr` on, once these have been [waited](Batch::wait) for.
pub(super) struct Filled<'a> {
    pub(super) block: u64,
    pub(super) addr: u64,
    pub(super) bytes: Batch<'a>,
}

/// The bytes of one batch of reads.
pub(super) struct Batch<'a> {
    arriving: Arriving<'a>,
    /// The first of the reads, for errors.
    first: Option<ReadAt>,
}

impl Batch<'_> {
    /// Waits until the bytes are there.
    pub(super) fn wait(self, view: &RankPlan<'_>) -> Result<(), ExchangeError> {
        self.arriving.wait().map_err(|source| read_error(view, self.first.as_ref(), source))
    }
}

pub(super) struct Reading<'a> {
    pub(super) view: &'a RankPlan<'a>,
    pub(super) group: &'a dyn Group,
    pub(super) backend: &'a dyn Backend,
    pub(super) outputs: &'a [Region],
    pub(super) landing: &'a Landing<'a>,
    pub(super) report: ExchangeReport,
    /// What was read for the rank itself and may be on its way still.
    pub(super) own: VecDeque<(Batch<'a>, Vec<ReadAt>)>,
}

/// Requests of one batch of direct reads: enough to keep a deep queue busy.
const BATCH: usize = 256;

/// Batches of what the rank keeps for itself that are on their way at once.
const AHEAD: usize = 2;

impl<'a> Reading<'a> {
    /// Ends early, without error, when the trading thread is gone.
    pub(super) fn run(
        &mut self,
        free: &Receiver<u64>,
        fill: Sender<Filled<'a>>,
    ) -> Result<(), ExchangeError> {
        let view = self.view;
        let mut direct = view.direct_reads().peekable();
        // Rows are read with the gaps between them only where there is memory to pick them from.
        let gap = (view.staging_bytes() > 0).then(|| view.plan().coalesce_gap());
        let mut own = DirectQueue { gap, list: Vec::new() };
        for round in view.rounds().filter(|round| round.unit_bytes(round.rank()) > 0) {
            let block = loop {
                match free.try_recv() {
                    Ok(block) => break block,
                    Err(TryRecvError::Disconnected) => return Ok(()),
                    Err(TryRecvError::Empty) => {}
                }
                own.refill(&mut direct);
                if self.direct(&mut own, None)? {
                    continue;
                }
                match free.recv() {
                    Ok(block) => break block,
                    Err(_) => return Ok(()),
                }
            };
            let filled = self.unit(&round, block)?;
            if fill.send(filled).is_err() {
                return Ok(());
            }
        }
        // The blocks come back as the last rounds end; what needs none of them goes first.
        drop(fill);
        let mut block = None;
        loop {
            own.refill(&mut direct);
            if own.list.is_empty() {
                return self.settle(0);
            }
            if !self.direct(&mut own, block)? {
                match free.recv() {
                    Ok(free) => block = Some(free),
                    Err(_) => return Ok(()),
                }
            }
        }
    }

    /// Reads a unit into a block. The first byte is congruent to its file offset, as direct I/O likes.
    fn unit(&mut self, round: &Round<'_>, block: u64) -> Result<Filled<'a>, ExchangeError> {
        let mut ranges: Vec<ReadAt> = Vec::new();
        let mut addr = 0;
        for Piece { tensor, range } in round.unit(round.rank()) {
            let desc = &self.view.plan().tensors()[tensor as usize];
            let (shard, offset) = (desc.shard, desc.file_range.start + range.start);
            let len = range.end - range.start;
            if ranges.is_empty() {
                addr = block + offset % 4096;
            }
            let to = addr + ranges.iter().map(|range| range.len).sum::<u64>();
            match ranges.last_mut() {
                Some(last) if last.shard == shard && last.offset + last.len == offset => {
                    last.len += len;
                }
                _ => ranges.push(ReadAt { tensor, shard, offset, len, addr: to }),
            }
        }
        let bytes = self.read(&ranges)?;
        Ok(Filled { block, addr, bytes })
    }

    /// Waits for what was read for the rank itself, but for the last `left` batches.
    fn settle(&mut self, left: usize) -> Result<(), ExchangeError> {
        while self.own.len() > left
            && let Some((batch, ranges)) = self.own.pop_front()
        {
            batch.wait(self.view)?;
            ranges.iter().for_each(|range| self.landing.add(range.addr, range.len));
        }
        Ok(())
    }

    /// Reads some of what this rank keeps for itself; `false` if that needs a block and there is none.
    fn direct(&mut self, own: &mut DirectQueue, block: Option<u64>) -> Result<bool, ExchangeError> {
        let plan = self.view.plan();
        let mut ranges = Vec::new();
        let limit = plan.buffers().direct;
        let mut bytes = 0;
        while let Some(mut job) = own.list.pop() {
            let desc = &plan.tensors()[job.tensor as usize];
            let base = self.outputs[job.output as usize].addr;
            let copy = job.copy;
            let near = |gap| copy.src_stride - copy.len <= gap;
            let coalesce = copy.count > 1 && own.gap.is_some_and(near);
            if coalesce && copy.len <= plan.buffers().block {
                if !ranges.is_empty() {
                    own.list.push(job);
                    break;
                }
                let Some(block) = block else {
                    own.list.push(job);
                    return Ok(false);
                };
                let rows =
                    ((plan.buffers().block - copy.len) / copy.src_stride + 1).min(copy.count);
                let part = Strided { count: rows, ..copy };
                let offset = desc.file_range.start + copy.src;
                let (tensor, shard, len) = (job.tensor, desc.shard, part.src_span());
                let read = [ReadAt { tensor, shard, offset, len, addr: block }];
                self.read(&read)?.wait(self.view)?;
                let copy = CopyAt {
                    src: block,
                    dst: base + copy.dst,
                    len: copy.len,
                    count: rows,
                    src_stride: copy.src_stride,
                    dst_stride: copy.dst_stride,
                };
                self.copy(&[copy])?;
                if job.skip(rows) {
                    own.list.push(job);
                }
                return Ok(true);
            }
            // One piece of it, or as much of one as is left of the batch.
            let len = (copy.len - job.done).min(limit - bytes);
            ranges.push(ReadAt {
                tensor: job.tensor,
                shard: desc.shard,
                offset: desc.file_range.start + copy.src + job.done,
                len,
                addr: base + copy.dst + job.done,
            });
            bytes += len;
            job.done += len;
            if job.done < copy.len || job.skip(1) {
                own.list.push(job);
            }
            if bytes >= limit || ranges.len() >= BATCH {
                break;
            }
        }
        if !ranges.is_empty() {
            let batch = self.read(&ranges)?;
            self.own.push_back((batch, ranges));
            self.settle(AHEAD)?;
            return Ok(true);
        }
        Ok(false)
    }

    fn read(&mut self, ranges: &[ReadAt]) -> Result<Batch<'a>, ExchangeError> {
        let start = Instant::now();
        // SAFETY: blocks belong to this thread until they are sent, and then to who waits for what is on its
        // way; direct reads go to parts of the outputs that the plan gives to nobody else.
        let read = unsafe { self.backend.read_ahead(ranges) };
        // The others wait for the disk, not for the dead.
        self.group.alive();
        self.report.read += start.elapsed();
        self.report.read_bytes += ranges.iter().map(|range| range.len).sum::<u64>();
        match read {
            Ok(arriving) => Ok(Batch { arriving, first: ranges.first().copied() }),
            Err((index, source)) => Err(read_error(self.view, ranges.get(index), source)),
        }
    }

    fn copy(&self, copies: &[CopyAt]) -> Result<(), ExchangeError> {
        // SAFETY: from this thread's block to outputs that the plan gives to nobody else.
        let copied = unsafe { self.backend.copy(copies) };
        copied.map_err(|source| ExchangeError::Copy { rank: self.view.rank(), source })?;
        self.landing.copied(copies);
        Ok(())
    }
}

fn read_error(view: &RankPlan<'_>, range: Option<&ReadAt>, source: Cause) -> ExchangeError {
    let name = range.and_then(|range| view.plan().tensors().get(range.tensor as usize));
    ExchangeError::Read {
        rank: view.rank(),
        tensor: name.map(|desc| desc.name.clone()).unwrap_or_default(),
        shard: range.map_or(0, |range| range.shard),
        range: range.map_or(0..0, |range| range.offset..range.offset + range.len),
        source,
    }
}

/// Direct reads taken apart into single strided copies, in reverse order.
struct DirectQueue {
    /// The largest gap that is read along; `None` where there is no block to read it into.
    gap: Option<u64>,
    list: Vec<DirectJob>,
}

struct DirectJob {
    tensor: u32,
    output: u32,
    copy: Strided,
    /// Bytes of the first piece that are read already.
    done: u64,
}

impl DirectJob {
    /// Takes pieces off the front; whether any are left.
    fn skip(&mut self, pieces: u64) -> bool {
        self.done = 0;
        self.copy.count -= pieces;
        self.copy.src += pieces * self.copy.src_stride;
        self.copy.dst += pieces * self.copy.dst_stride;
        self.copy.count > 0
    }
}

impl DirectQueue {
    /// Keeps enough jobs at hand for a batch.
    fn refill(&mut self, direct: &mut impl Iterator<Item = DirectRead>) {
        if self.list.len() >= BATCH {
            return;
        }
        let mut fresh = Vec::new();
        while self.list.len() + fresh.len() < BATCH {
            let Some(read) = direct.next() else { break };
            let (tensor, output) = (read.tensor, read.output);
            let job = |copy| DirectJob { tensor, output, copy, done: 0 };
            fresh.extend(read.copies.into_iter().map(job));
        }
        fresh.reverse();
        // What is at hand comes first: it stays on top.
        fresh.append(&mut self.list);
        self.list = fresh;
    }
}
