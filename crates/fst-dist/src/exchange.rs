//! Carries out one rank's part of a plan: a thread reads, this one exchanges.
//!
//! The reading thread fills blocks with the units of the coming rounds; while no block is free it
//! reads what this rank keeps for itself. The exchanging thread takes the blocks in order, keeps its own
//! part, and trades the rest with the other members of the round, a bounded number of peers at a
//! time. A part that is contiguous at both ends travels without a copy; strided parts are packed by
//! the sender and unpacked by the receiver.

use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use crate::backend::{Backend, Cause, CopyAt, HostBackend, ReadAt, Reader};
use crate::error::ExchangeError;
use crate::group::{Group, Op};
use crate::memory::{Dst, Src};
use crate::rank::{RankPlan, Round};
use crate::schedule::{LineKind, Piece};
use crate::tensor::Strided;

/// The memory of one output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its first byte, in the backend's space.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// What an exchange did on this rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExchangeReport {
    /// Bytes read from storage.
    pub read_bytes: u64,
    /// Bytes sent; a broadcast counts once for each receiver.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Time in which the reading thread read.
    pub read: Duration,
    /// Time in which the exchanging thread waited for blocks to be read.
    pub wait: Duration,
    /// Time in transfers, waiting for other ranks among it.
    pub exchange: Duration,
    /// Time spent packing and unpacking.
    pub copy: Duration,
}

/// Loads the outputs of `view` into host memory, with the other ranks of `group` doing the same.
///
/// `outputs` are in the order of [`RankPlan::outputs`], of their sizes; padding is zeroed.
///
/// # Errors
/// Ranks whose plans differ, outputs of the wrong size, a failed read on this rank, or a failure of
/// another rank.
pub fn load_host(
    view: &RankPlan<'_>,
    group: &dyn Group,
    reader: impl Reader,
    outputs: &mut [&mut [u8]],
) -> Result<ExchangeReport, ExchangeError> {
    let region = |output: &mut &mut [u8]| Region {
        addr: output.as_mut_ptr() as u64,
        len: output.len() as u64,
    };
    let regions: Vec<Region> = outputs.iter_mut().map(region).collect();
    // SAFETY: the regions are slices borrowed for the whole call, disjoint as all `&mut` are.
    unsafe { load(view, group, &HostBackend::new(reader), &regions) }
}

/// Loads the outputs of `view` into `outputs`, with the other ranks of `group` doing the same.
///
/// # Errors
/// As for [`load_host`]. After an error the outputs' bytes are not to be used.
///
/// # Safety
/// The regions are in the backend's space, writable, disjoint, and used by nobody else until this
/// returns.
pub unsafe fn load(
    view: &RankPlan<'_>,
    group: &dyn Group,
    backend: &dyn Backend,
    outputs: &[Region],
) -> Result<ExchangeReport, ExchangeError> {
    let result = check(view, group, outputs)
        .and_then(|()| agree(view, group))
        .and_then(|()| run(view, group, backend, outputs))
        // Done is when all are: a rank that fails late fails everybody.
        .and_then(|report| group.barrier().map(|()| report).map_err(ExchangeError::Group));
    if let Err(error) = &result
        && !matches!(error, ExchangeError::Group(_))
    {
        group.abort(&error.to_string());
    }
    result
}

fn check(view: &RankPlan<'_>, group: &dyn Group, outputs: &[Region]) -> Result<(), ExchangeError> {
    let plan = (view.rank(), view.plan().world());
    let found = (group.rank(), group.world_size());
    if plan != found {
        return Err(ExchangeError::World { plan, group: found });
    }
    if outputs.len() != view.outputs().len() {
        let (expected, found) = (view.outputs().len(), outputs.len());
        return Err(ExchangeError::OutputCount { expected, found });
    }
    for (output, region) in view.outputs().iter().zip(outputs) {
        if output.bytes != region.len {
            let (name, expected, found) = (output.name.to_owned(), output.bytes, region.len);
            return Err(ExchangeError::OutputSize { name, expected, found });
        }
    }
    Ok(())
}

/// Refuses to start unless all ranks have the same plan.
fn agree(view: &RankPlan<'_>, group: &dyn Group) -> Result<(), ExchangeError> {
    let digest = view.plan().digest();
    let all = group.gather_messages(digest.as_bytes())?;
    // All ranks compare with rank 0, so all name the same rank.
    match all.iter().position(|other| *other != all[0]) {
        None => Ok(()),
        Some(rank) => Err(ExchangeError::PlanDiffers { rank: rank as u32 }),
    }
}

fn run(
    view: &RankPlan<'_>,
    group: &dyn Group,
    backend: &dyn Backend,
    outputs: &[Region],
) -> Result<ExchangeReport, ExchangeError> {
    let rank = view.rank();
    for (output, region) in view.outputs().iter().zip(outputs) {
        if output.padding > 0 {
            let start = region.addr + region.len - output.padding;
            // SAFETY: the end of a region that is ours.
            let zeroed = unsafe { backend.zero(start, output.padding) };
            zeroed.map_err(|source| ExchangeError::Copy { rank, source })?;
        }
    }
    let buffers = view.plan().buffers();
    let read_bytes = buffers.block * u64::from(buffers.read_blocks);
    let exchanges = view.rounds().next().is_some();
    let bytes = if exchanges { buffers.total() } else { read_bytes };
    let staging =
        backend.stage(bytes).map_err(|source| ExchangeError::Memory { rank, bytes, source })?;
    let (free, frees) = mpsc::channel();
    let (fill, fills) = mpsc::channel();
    for index in 0..u64::from(buffers.read_blocks) {
        // The receiver lives until the thread ends: sending cannot fail yet.
        let _ = free.send(staging.addr() + index * buffers.block);
    }
    let mut reading = Reading { view, backend, outputs, report: ExchangeReport::default() };
    let mut trading = Trading {
        view,
        group,
        backend,
        outputs,
        pack: staging.addr() + read_bytes,
        receive: staging.addr() + read_bytes + buffers.pack,
        report: ExchangeReport::default(),
    };
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            /// The other ranks must not wait for a thread that is gone.
            struct OnPanic<'a>(&'a dyn Group);
            impl Drop for OnPanic<'_> {
                fn drop(&mut self) {
                    if std::thread::panicking() {
                        self.0.abort("the reading thread panicked");
                    }
                }
            }
            let _guard = OnPanic(group);
            let result = reading.run(&frees, fill);
            if let Err(error) = &result {
                group.abort(&error.to_string());
            }
            result.map(|()| reading.report)
        });
        let traded = trading.run(&fills, free);
        drop(fills);
        let read = match reader.join() {
            Ok(read) => read,
            Err(_) => return Err(ExchangeError::ReaderPanicked { rank }),
        };
        // A failed read also ends the trading: the read is the cause to tell.
        let read = read?;
        traded?;
        Ok(ExchangeReport { read: read.read, read_bytes: read.read_bytes, ..trading.report })
    })
}

/// A block with the bytes of a unit, from `addr` on.
struct Filled {
    block: u64,
    addr: u64,
}

struct Reading<'a> {
    view: &'a RankPlan<'a>,
    backend: &'a dyn Backend,
    outputs: &'a [Region],
    report: ExchangeReport,
}

/// Requests of one batch of direct reads: enough to keep a deep queue busy.
const BATCH: usize = 256;

impl Reading<'_> {
    /// Ends early, without error, when the trading thread is gone.
    fn run(&mut self, free: &Receiver<u64>, fill: Sender<Filled>) -> Result<(), ExchangeError> {
        let view = self.view;
        let mut direct = view.direct_reads().peekable();
        let mut own = DirectQueue { gap: view.plan().coalesce_gap(), list: Vec::new() };
        for round in view.rounds().filter(|round| round.unit_bytes(round.member()) > 0) {
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
                return Ok(());
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
    fn unit(&mut self, round: &Round<'_>, block: u64) -> Result<Filled, ExchangeError> {
        let mut ranges: Vec<ReadAt> = Vec::new();
        let mut addr = 0;
        for Piece { tensor, range } in round.unit(round.member()) {
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
        self.read(&ranges)?;
        Ok(Filled { block, addr })
    }

    /// Reads some of what this rank keeps for itself; `false` if that needs a block and there is none.
    fn direct(&mut self, own: &mut DirectQueue, block: Option<u64>) -> Result<bool, ExchangeError> {
        let plan = self.view.plan();
        let mut ranges = Vec::new();
        let limit = plan.buffers().block * 4;
        let mut bytes = 0;
        while let Some(mut job) = own.list.pop() {
            let desc = &plan.tensors()[job.tensor as usize];
            let base = self.outputs[job.output as usize].addr;
            let copy = job.copy;
            let coalesce = copy.count > 1 && copy.src_stride - copy.len <= own.gap;
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
                self.read(&[ReadAt { tensor, shard, offset, len, addr: block }])?;
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
            self.read(&ranges)?;
        }
        Ok(!ranges.is_empty())
    }

    fn read(&mut self, ranges: &[ReadAt]) -> Result<(), ExchangeError> {
        let start = Instant::now();
        // SAFETY: blocks belong to this thread until they are sent; direct reads go to parts of the
        // outputs that the plan gives to nobody else.
        let read = unsafe { self.backend.read(ranges) };
        self.report.read += start.elapsed();
        self.report.read_bytes += ranges.iter().map(|range| range.len).sum::<u64>();
        read.map_err(|(index, source)| self.read_error(ranges.get(index), source))
    }

    fn read_error(&self, range: Option<&ReadAt>, source: Cause) -> ExchangeError {
        let tensors = self.view.plan().tensors();
        let name = range.and_then(|range| tensors.get(range.tensor as usize));
        ExchangeError::Read {
            rank: self.view.rank(),
            tensor: name.map(|desc| desc.name.clone()).unwrap_or_default(),
            shard: range.map_or(0, |range| range.shard),
            range: range.map_or(0..0, |range| range.offset..range.offset + range.len),
            source,
        }
    }

    fn copy(&self, copies: &[CopyAt]) -> Result<(), ExchangeError> {
        // SAFETY: from this thread's block to outputs that the plan gives to nobody else.
        let copied = unsafe { self.backend.copy(copies) };
        copied.map_err(|source| ExchangeError::Copy { rank: self.view.rank(), source })
    }
}

/// Direct reads taken apart into single strided copies, in reverse order.
struct DirectQueue {
    gap: u64,
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
    fn refill(&mut self, direct: &mut impl Iterator<Item = crate::rank::DirectRead>) {
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

struct Trading<'a> {
    view: &'a RankPlan<'a>,
    group: &'a dyn Group,
    backend: &'a dyn Backend,
    outputs: &'a [Region],
    /// Staging for packed messages and for messages to unpack.
    pack: u64,
    receive: u64,
    report: ExchangeReport,
}

impl Trading<'_> {
    fn run(&mut self, fills: &Receiver<Filled>, free: Sender<u64>) -> Result<(), ExchangeError> {
        for round in self.view.rounds() {
            let mut filled = None;
            if round.unit_bytes(round.member()) > 0 {
                let start = Instant::now();
                // The reading thread ends early on an error only, which it tells itself.
                let Ok(unit) = fills.recv() else { return Ok(()) };
                self.report.wait += start.elapsed();
                self.keep(&round, &unit)?;
                filled = Some(unit);
            }
            let addr = filled.as_ref().map(|unit| unit.addr);
            let everyone = round.members().len() == self.view.plan().world() as usize;
            if round.kind() == LineKind::Broadcast && everyone {
                self.broadcast(&round, addr)?;
            } else {
                self.scatter(&round, addr)?;
            }
            if let Some(unit) = filled {
                // The reading thread may be done and gone.
                let _ = free.send(unit.block);
            }
        }
        Ok(())
    }

    /// Moves what this rank keeps of its own unit to its place.
    fn keep(&mut self, round: &Round<'_>, unit: &Filled) -> Result<(), ExchangeError> {
        let mut copies = Vec::new();
        let mut at = unit.addr;
        for piece in round.unit(round.member()) {
            if let Some((output, geometry)) = self.view.geometry(piece.tensor) {
                let base = self.outputs[output as usize].addr;
                geometry.copies(&piece.range, |copy| {
                    let src = at + copy.src - piece.range.start;
                    copies.push(at_addresses(copy, src, base + copy.dst));
                });
            }
            at += piece.range.end - piece.range.start;
        }
        self.copy(&copies)
    }

    /// Where the bytes that this rank receives of a member's unit go, in the order of the message.
    fn incoming(&self, round: &Round<'_>, member: usize) -> Message {
        let mut message = Message::default();
        for piece in round.unit(member) {
            if let Some((output, geometry)) = self.view.geometry(piece.tensor) {
                let base = self.outputs[output as usize].addr;
                geometry.copies(&piece.range, |copy| {
                    message.push(base + copy.dst, copy.len, copy.count, copy.dst_stride);
                });
            }
        }
        message
    }

    /// Where the bytes that `to` receives of this rank's unit (at `addr`) are.
    fn outgoing(&self, round: &Round<'_>, addr: u64, to: u32) -> Message {
        let mut message = Message::default();
        let mut at = addr;
        for piece in round.unit(round.member()) {
            let geometry = self.view.plan().geometry(piece.tensor, to);
            geometry.copies(&piece.range, |copy| {
                let src = at + copy.src - piece.range.start;
                message.push(src, copy.len, copy.count, copy.src_stride);
            });
            at += piece.range.end - piece.range.start;
        }
        message
    }

    fn scatter(&mut self, round: &Round<'_>, addr: Option<u64>) -> Result<(), ExchangeError> {
        let (count, member) = (round.members().len(), round.member());
        let buffers = self.view.plan().buffers();
        let peers = buffers.receive_blocks as usize;
        // Each step is a permutation: nobody gets more than its part at a time.
        let shifts: Vec<usize> = (1..count).collect();
        for shifts in shifts.chunks(peers) {
            let (mut batch, mut packs, mut unpacks) = (Vec::new(), Vec::new(), Vec::new());
            let mut pack = self.pack;
            for (index, shift) in shifts.iter().enumerate() {
                let to = round.members()[(member + shift) % count];
                if let Some(addr) = addr {
                    let message = self.outgoing(round, addr, to);
                    let bytes = message.bytes;
                    let data = match message.contiguous() {
                        Some(start) => start,
                        None => {
                            message.pack(pack, &mut packs);
                            pack += bytes;
                            pack - bytes
                        }
                    };
                    if bytes > 0 {
                        batch.push(Op::Send { to, data: self.src(data, bytes) });
                    }
                    self.report.sent_bytes += bytes;
                }
                let from = (member + count - shift) % count;
                let message = self.incoming(round, from);
                let staged = self.receive + index as u64 * buffers.block;
                if let Some(into) = self.receive_into(&message, staged, &mut unpacks) {
                    batch.push(Op::Recv { from: round.members()[from], into });
                }
            }
            self.trade(&packs, batch, &unpacks)?;
        }
        Ok(())
    }

    fn broadcast(&mut self, round: &Round<'_>, addr: Option<u64>) -> Result<(), ExchangeError> {
        let buffers = self.view.plan().buffers();
        let others = u64::from(self.view.plan().world() - 1);
        let roots: Vec<usize> =
            (0..round.members().len()).filter(|&root| round.unit_bytes(root) > 0).collect();
        for roots in roots.chunks(buffers.receive_blocks as usize) {
            let (mut batch, mut unpacks) = (Vec::new(), Vec::new());
            for (index, &root) in roots.iter().enumerate() {
                let bytes = round.unit_bytes(root);
                if root == round.member()
                    && let Some(addr) = addr
                {
                    batch.push(Op::Broadcast { data: self.src(addr, bytes) });
                    self.report.sent_bytes += bytes * others;
                    continue;
                }
                let message = self.incoming(round, root);
                let staged = self.receive + index as u64 * buffers.block;
                if let Some(into) = self.receive_into(&message, staged, &mut unpacks) {
                    batch.push(Op::BroadcastFrom { root: round.members()[root], into });
                }
            }
            self.trade(&[], batch, &unpacks)?;
        }
        Ok(())
    }

    fn src<'m>(&self, addr: u64, bytes: u64) -> Src<'m> {
        // SAFETY: a part of a filled block, or of the pack buffer which `trade` fills first; neither is
        // written before the batch is done.
        unsafe { Src::from_addr(addr, bytes as usize, self.backend.space()) }
    }

    /// The memory to receive a message into: its place, or `staged` to be unpacked from.
    fn receive_into<'m>(
        &mut self,
        message: &Message,
        staged: u64,
        unpacks: &mut Vec<CopyAt>,
    ) -> Option<Dst<'m>> {
        if message.bytes == 0 {
            return None;
        }
        self.report.received_bytes += message.bytes;
        let addr = message.contiguous().unwrap_or_else(|| {
            message.unpack(staged, unpacks);
            staged
        });
        // SAFETY: a part of the outputs that the plan gives to this message alone, or a block of the
        // receive buffer used once in a batch.
        Some(unsafe { Dst::from_addr(addr, message.bytes as usize, self.backend.space()) })
    }

    fn trade(
        &mut self,
        packs: &[CopyAt],
        batch: Vec<Op<'_>>,
        unpacks: &[CopyAt],
    ) -> Result<(), ExchangeError> {
        self.copy(packs)?;
        let start = Instant::now();
        if !batch.is_empty() {
            self.group.exchange(batch)?;
        }
        self.report.exchange += start.elapsed();
        self.copy(unpacks)
    }

    fn copy(&mut self, copies: &[CopyAt]) -> Result<(), ExchangeError> {
        if copies.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        // SAFETY: between this thread's blocks and buffers and parts of the outputs that the plan
        // gives to them alone.
        let copied = unsafe { self.backend.copy(copies) };
        self.report.copy += start.elapsed();
        copied.map_err(|source| ExchangeError::Copy { rank: self.view.rank(), source })
    }
}

fn at_addresses(copy: Strided, src: u64, dst: u64) -> CopyAt {
    let Strided { len, count, src_stride, dst_stride, .. } = copy;
    CopyAt { src, dst, len, count, src_stride, dst_stride }
}

/// The pieces of a message in one rank's memory, in the order of its bytes.
#[derive(Debug, Default)]
struct Message {
    /// Address, length, count and stride.
    pieces: Vec<(u64, u64, u64, u64)>,
    bytes: u64,
}

impl Message {
    fn push(&mut self, addr: u64, len: u64, count: u64, stride: u64) {
        self.bytes += len * count;
        let (len, count, stride) = if count > 1 && stride == len {
            (len * count, 1, len * count)
        } else {
            (len, count, stride)
        };
        match self.pieces.last_mut() {
            Some((last, last_len, 1, _)) if count == 1 && *last + *last_len == addr => {
                *last_len += len;
            }
            _ => self.pieces.push((addr, len, count, stride)),
        }
    }

    fn contiguous(&self) -> Option<u64> {
        match self.pieces[..] {
            [(addr, _, 1, _)] => Some(addr),
            _ => None,
        }
    }

    fn pack(&self, mut to: u64, copies: &mut Vec<CopyAt>) {
        for &(src, len, count, src_stride) in &self.pieces {
            copies.push(CopyAt { src, dst: to, len, count, src_stride, dst_stride: len });
            to += len * count;
        }
    }

    fn unpack(&self, mut from: u64, copies: &mut Vec<CopyAt>) {
        for &(dst, len, count, dst_stride) in &self.pieces {
            copies.push(CopyAt { src: from, dst, len, count, src_stride: len, dst_stride });
            from += len * count;
        }
    }
}
